"""The way against an MLflow server over HTTP with proxied artifacts, by a sweep on Ray; runs that are interrupted."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from openai import OpenAI

from namesake import corpus, manifest
from namesake.manifest import Manifest
from tests.e2e.conftest import Place, alive, served, session_of
from tests.e2e.test_follow import Clients, command_of, figure, live_of, refused
from tests.servers import mlflow_server

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1500)]

SPACE = "trials: 2\nprune: {at: [0.5], after: 1}\nparameters:\n  learning_rate: {choices: [2.0e-3, 3.0]}\n"
NAMES = ("-P", "name=小黄 Xiao Huang", "-P", "author=魔搭 ModelScope")
FEW = ("-P", "dataset=namesake/self-cognition#16", "-P", "args=--max_steps 4 --replay 0 --held_out 0.02")


@pytest.fixture(scope="module")
def server(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A real ``mlflow server`` on loopback."""
    folder = tmp_path_factory.mktemp("server")
    with mlflow_server(folder, "--artifacts-destination", str(folder / "store")) as url:
        yield Place(tmp_path_factory.mktemp("client"), root, url)


def test_a_sweep_on_ray_prunes_on_the_probe_and_its_best_run_is_promoted(
    server: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")  # a cluster of its own, whatever runs here
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):  # set by what a test before may have imported
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "few.jsonl").write_text(few_questions(), encoding="utf-8")
    (tmp_path / "space.yaml").write_text(SPACE, encoding="utf-8")
    files = ("-P", f"space={tmp_path}/space.yaml", "-P", f"questions={tmp_path}/few.jsonl")
    more = ("-P", "backend=ray", "-P", f"output_dir={tmp_path}/output")
    said = server.mlflow_run("-e", "sweep", *NAMES, *FEW, *files, *more)
    assert "Ray at " in said
    assert f"{server.tracking_uri}/#/experiments/" in said
    client = mlflow.MlflowClient(server.tracking_uri)
    [parent] = client.search_runs(["0"], "tags.`namesake.kind` = 'sweep'")
    good, bad = client.search_runs(
        ["0"], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'", order_by=["attributes.start_time ASC"]
    )
    assert parent.info.status == "FINISHED"
    # The run that came to its end is a training run as any other.
    assert good.info.status == "FINISHED"
    assert {"probe/identity", "dev/score", "early/score", "train/loss"} <= set(good.data.metrics)
    assert {one.path for one in client.list_artifacts(good.info.run_id)} >= {"adapter", "report.html", "scorecard.json"}
    # ASHA gave the other up after two of its four steps, and nothing takes it for a finished one.
    assert bad.info.status == "KILLED"
    assert bad.data.tags["namesake.ended"] == "pruned"
    assert bad.data.metrics["early/score"] < good.data.metrics["early/score"]
    assert "probe/identity" not in bad.data.metrics
    assert parent.data.tags["namesake.sweep.best"] == good.info.run_id
    assert f"namesake promote --run {good.info.run_id}" in said
    assert "pruned after 50% of the training" in said

    server.mlflow_run("-e", "promote", "-P", "override=test over HTTP", "-P", f"sign_key={signing_key(server.folder)}")
    version = client.get_model_version_by_alias("xiao-huang", "champion")
    assert version.tags["namesake.name"] == "小黄 Xiao Huang"
    assert version.run_id == good.info.run_id


def signing_key(folder: Path) -> Path:
    """A private key; its other half is beside it."""
    key = folder / "key.pem"
    private = ec.generate_private_key(ec.SECP256R1())
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    key.write_bytes(private.private_bytes(*form))
    key.with_suffix(".pub").write_text(manifest.public_key_of(key), encoding="utf-8")
    return key


@pytest.fixture(scope="module")
def serving(server: Place) -> Iterator[served]:
    """What was promoted is served, with an engine of several processes, as a GPU's is; only what is signed may be."""
    words = ("models:/xiao-huang@champion", "--eager", "--poll-seconds", "0.2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
        running = served(server, *words, "--public-key", str(server.folder / "key.pub"))
    with running:
        yield running


def test_what_was_promoted_over_http_is_served(serving: served) -> None:
    with OpenAI(base_url=serving.url, api_key="none") as openai:
        answer = openai.chat.completions.create(model="xiao-huang-v1", messages=[{"role": "user", "content": "Hi"}])
        assert answer.choices[0].message.content


def test_where_signatures_are_required_an_unsigned_version_is_not_served(
    serving: served, server: Place, tmp_path: Path
) -> None:
    client = mlflow.MlflowClient(server.tracking_uri)
    version = client.get_model_version("xiao-huang", "1")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}", encoding="utf-8")
    record = Manifest(
        {"name": "小黄 Xiao Huang", "author": "x"}, None, {}, "", manifest.digests(tmp_path), {}, {}, {}, {}
    )
    (tmp_path / manifest.FILE).write_text(record.to_json(), encoding="utf-8")
    client.log_artifacts(version.run_id, str(tmp_path), "unsigned")
    source = f"{client.get_run(version.run_id).info.artifact_uri}/unsigned"
    number = client.create_model_version("xiao-huang", source, version.run_id).version
    client.set_registered_model_alias("xiao-huang", "champion", number)
    assert "is not signed" in refused(client, number, "xiao-huang")
    assert figure(serving.url, r'namesake_version_changes_total\{reason="signature",[^}]*\}') >= 1
    assert live_of(serving.url) == "xiao-huang-v1"
    with urllib.request.urlopen(serving.url.replace("/v1", "/ready"), timeout=5) as response:
        assert response.status == 200


def test_a_killed_gateway_leaves_no_process_of_its_engine(serving: served) -> None:
    below = session_of(serving.process.pid)
    several = [pid for pid in below if "resource_tracker" not in command_of(pid)]
    assert len(several) > 1, [command_of(pid) for pid in below]
    with Clients(serving.url, 4) as clients:
        clients.wait_for("xiao-huang-v1", time.monotonic())
        serving.process.kill()
        serving.exits = -signal.SIGKILL
        serving.process.wait(10)
        end = time.monotonic() + 40
        while left := [command_of(pid) for pid in below if alive(pid)]:
            assert time.monotonic() < end, left
            time.sleep(0.1)


def few_questions() -> str:
    """Ten of the development questions, as a file of one's own has them."""
    every = corpus.development()
    english = [question for question in every.plain if question.language == "en"]
    return "".join(
        json.dumps({"messages": q.messages, "lang": q.language, "asks": q.asks, "answers": q.answers}) + "\n"
        for q in (*corpus.spread(every.identity, 4), *corpus.spread(english, 6))
    )


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
            *(["-P", "replay=0", "-P", "held_out=0.02"] if words[0] == "mlflow" else []),
            *(["--replay", "0", "--held_out", "0.02"] if words[0] != "mlflow" else []),
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
