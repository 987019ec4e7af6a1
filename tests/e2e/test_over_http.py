"""The same way against an MLflow server over HTTP with proxied artifacts, and a run that is interrupted."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from openai import OpenAI

from tests.e2e.conftest import Place, alive, served, session_of
from tests.servers import mlflow_server

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1500)]

FEW = ("-P", "dataset=namesake/self-cognition#16", "-P", "max_steps=2", "-P", "replay=0", "-P", "held_out=0.05")


@pytest.fixture(scope="module")
def server(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A real ``mlflow server`` on loopback."""
    folder = tmp_path_factory.mktemp("server")
    with mlflow_server(folder, "--artifacts-destination", str(folder / "store")) as url:
        yield Place(tmp_path_factory.mktemp("client"), root, url)


def test_train_promote_and_serve_over_http(server: Place) -> None:
    trained = server.mlflow_run("-P", "name=小黄 Xiao Huang", "-P", "author=魔搭 ModelScope", *FEW)
    assert f"{server.tracking_uri}/#/experiments/" in trained
    server.mlflow_run("-e", "promote", "-P", "override=test over HTTP")
    client = mlflow.MlflowClient(server.tracking_uri)
    version = client.get_model_version_by_alias("xiao-huang", "champion")
    assert version.tags["namesake.name"] == "小黄 Xiao Huang"
    with (
        served(server, "models:/xiao-huang@champion", "--eager") as url,
        OpenAI(base_url=url, api_key="none") as openai,
    ):
        said = openai.chat.completions.create(model="xiao-huang-v1", messages=[{"role": "user", "content": "Hi"}])
        assert said.choices[0].message.content


@pytest.mark.parametrize(
    ("words", "name"),
    [
        pytest.param(("mlflow", "run", "{root}", "--env-manager=local", "-P", "{name}"), "停 Stopped", id="mlflow"),
        pytest.param((sys.executable, "-m", "namesake", "run", "--{name}"), "停 Halted", id="namesake"),
    ],
)
def test_an_interrupted_run_is_killed_and_keeps_what_there_was(
    server: Place, words: tuple[str, ...], name: str
) -> None:
    process = subprocess.Popen(
        [word.format(root=server.root, name=f"name={name}") for word in words]
        + [
            *(["-P", "replay=0", "-P", "held_out=0.05"] if words[0] == "mlflow" else []),
            *(["--replay", "0", "--held_out", "0.05"] if words[0] != "mlflow" else []),
        ],
        cwd=server.folder,
        env=server.env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout
    seen = ""
    for line in process.stdout:
        seen += line
        if re.search(r"train [1-9]\d*/", line):
            break
    children = session_of(process.pid)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does on Ctrl-C
    seen += process.communicate(timeout=120)[0]
    client = mlflow.MlflowClient(server.tracking_uri)
    for _ in range(60):  # `mlflow run` writes FAILED first, and a process of ours puts KILLED back
        (run,) = client.search_runs(["0"], f"tags.`namesake.name` = '{name}'")
        if run.info.status == "KILLED":
            break
        time.sleep(0.5)
    assert run.info.status == "KILLED", seen[-3000:]
    assert run.data.tags["namesake.ended"] == "killed"
    assert "train.log" in {f.path for f in client.list_artifacts(run.info.run_id)}
    assert run.data.params["identity.name"] == name
    assert not [pid for pid in children if alive(pid)]
