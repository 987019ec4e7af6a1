"""A run as MLflow's Kubernetes backend starts it: its own code fills the job in and posts it; no cluster is there."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kubernetes_validate
import pytest
import yaml
from mlflow import projects
from mlflow.projects import kubernetes as backend
from mlflow.projects.utils import get_entry_point_command, load_project

from tests.conftest import ROOT

PROJECT = ROOT / "serving" / "deploy" / "kubernetes" / "project"
IN_THE_IMAGE = "/opt/namesake"

posted: list[tuple[str, dict[str, Any]]] = []


class Taker(BaseHTTPRequestHandler):
    """Takes what is posted, as Kubernetes' API answers."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        posted.append((self.path.partition("?")[0], json.loads(body)))
        self.send_response(201)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Where kubectl's configuration points."""
    posted.clear()
    with HTTPServer(("127.0.0.1", 0), Taker) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "here",
            "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me"}}],
            "clusters": [{"name": "here", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
            "users": [{"name": "me", "user": {}}],
        }
        (tmp_path / "kubeconfig").write_text(json.dumps(config), encoding="utf-8")
        monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "kubeconfig"))
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield
        server.shutdown()


@pytest.fixture(params=["main", "sweep"])
def entry(request: pytest.FixtureRequest) -> str:
    """An entry point of the project."""
    return str(request.param)


def job(entry: str, parameters: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What ``mlflow run -e`` posts for these parameters, once the image has been pushed."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("KUBE_MLFLOW_TRACKING_URI", "http://mlflow:5000")
    given = json.loads((PROJECT / "kubernetes_config.json").read_text(encoding="utf-8"))
    config = projects._parse_kubernetes_config(given)
    backend.run_kubernetes_job(
        load_project(str(PROJECT)).name,
        SimpleNamespace(info=SimpleNamespace(run_id="a" * 32)),
        f"{config['repository-uri']}:gpu",
        "sha256:" + "0" * 64,
        get_entry_point_command(load_project(str(PROJECT)), entry, parameters, None),
        {"MLFLOW_RUN_ID": "a" * 32, "MLFLOW_TRACKING_URI": "http://127.0.0.1:5000", "MLFLOW_EXPERIMENT_ID": "0"},
        config.get("kube-context"),
        config["kube-job-template"],
    )
    [(path, body)] = posted
    assert path == "/apis/batch/v1/namespaces/default/jobs"
    return body


def test_the_job_keeps_to_the_schema_of_kubernetes_and_has_run_image_and_address(
    entry: str, cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = job(entry, {}, monkeypatch)
    kubernetes_validate.validate(body, kubernetes_validate.latest_version(), strict=True)
    assert unfilled(body) == []
    [container] = body["spec"]["template"]["spec"]["containers"]
    assert container["image"] == "registry.example.org/namesake:gpu@sha256:" + "0" * 64
    variables = {one["name"]: one["value"] for one in container["env"]}
    assert variables["MLFLOW_RUN_ID"] == "a" * 32
    assert variables["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"
    assert variables["NAMESAKE_CACHE"].startswith("/data")


def unfilled(value: Any) -> list[str]:
    """Texts of the template that MLflow should have replaced."""
    if isinstance(value, dict):
        return [text for one in value.values() for text in unfilled(one)]
    if isinstance(value, list):
        return [text for one in value for text in unfilled(one)]
    return [value] if isinstance(value, str) and value.startswith("{replaced") else []


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"name": "小黄 Xiao Huang", "args": "--lora_rank 16 --system 'You are \"kind\".'"},
        {"name": "$(touch x) `touch y`; touch z", "author": 'a\'b "c" $HOME \\ *', "learning_rate": "1e-3"},
    ],
)
def test_namesake_is_called_in_the_job_as_it_is_called_here(
    entry: str, parameters: dict[str, str], cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [container] = job(entry, parameters, monkeypatch)["spec"]["template"]["spec"]["containers"]
    work = tmp_path / "work"
    work.mkdir()
    program = tmp_path / "namesake"
    program.write_text('#!/bin/sh\nfor one in "$@"; do printf "%s\\0" "$one"; done\n', encoding="utf-8")
    program.chmod(0o755)
    command = [part.replace(IN_THE_IMAGE, str(ROOT)) for part in container["command"]]
    called = subprocess.run(
        command,
        cwd=work,
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        check=True,
        encoding="utf-8",
    ).stdout
    here = get_entry_point_command(load_project(str(ROOT)), entry, parameters, None)
    expected = shlex.split(here[0])
    assert expected[expected.index("namesake") + 1] == {"main": "run"}.get(entry, entry)
    assert called.split("\0")[:-1] == expected[expected.index("namesake") + 1 :]
    assert list(work.iterdir()) == []


def test_the_project_has_the_entry_points_of_the_root() -> None:
    root, own = (yaml.safe_load((folder / "MLproject").read_text(encoding="utf-8")) for folder in (ROOT, PROJECT))
    script = f"sh {IN_THE_IMAGE}/{(PROJECT / 'namesake.sh').relative_to(ROOT)} "
    for name, entry in own["entry_points"].items():
        there = root["entry_points"][name]
        assert entry["parameters"] == there["parameters"]
        assert entry["command"].removeprefix(script) == there["command"].partition(" namesake ")[2]
    assert set(own["entry_points"]) == {"main", "sweep"}
    dockerfile = (ROOT / "serving" / "deploy" / "Dockerfile").read_text(encoding="utf-8")
    assert f"WORKDIR {IN_THE_IMAGE}\n" in dockerfile
    assert "COPY serving serving\n" in dockerfile
