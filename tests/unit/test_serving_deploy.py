"""The files in serving/deploy name what there is: metrics, flags, routes."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from namesake_serving import __main__ as serving
from namesake_serving.metrics import Metrics

DEPLOY = Path(__file__).parents[2] / "serving" / "deploy"
UNIT = (DEPLOY / "namesake.service").read_text(encoding="utf-8")
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
FLAGS = {flag for parameter in typer.main.get_command(serving.app).params for flag in parameter.opts}


def served() -> set[str]:
    """Names of the series at ``/metrics``: ours, as they are exported, and those that vLLM's source names."""
    ours = set()
    for name, kind in re.findall(r"^# TYPE (\S+) (\S+)$", Metrics().text().decode(), re.MULTILINE):
        ours |= {f"{name}_{part}" for part in ("bucket", "count", "sum")} if kind == "histogram" else {name}
    found = importlib.util.find_spec("vllm")
    assert found is not None
    assert found.origin is not None
    source = (Path(found.origin).parent / "v1" / "metrics" / "loggers.py").read_text(encoding="utf-8")
    theirs = set(re.findall(r'"(vllm:\w+)"', source))
    return ours | theirs | {f"{name}_total" for name in theirs}


def test_the_dashboard_asks_for_series_that_there_are() -> None:
    board: dict[str, Any] = json.loads((DEPLOY / "grafana.json").read_text(encoding="utf-8"))
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    queries += [one["definition"] for one in board["templating"]["list"] if "definition" in one]
    named = {name for query in queries for name in re.findall(r"\b(?:namesake_|vllm:)\w+", query)}
    assert len(named) > 10
    assert named <= served()
    for query in queries:
        assert query.count("(") == query.count(")")
    places = [tuple(panel["gridPos"][key] for key in "xy") for panel in board["panels"]]
    assert len(set(places)) == len(places)


def test_every_metric_of_ours_is_on_the_dashboard() -> None:
    text = (DEPLOY / "grafana.json").read_text(encoding="utf-8")
    names = [one._name for one in vars(Metrics()).values() if hasattr(one, "_name")]
    assert len(names) > 5
    assert [name for name in names if name not in text] == []


def flags_of(words: list[str]) -> set[str]:
    """The flags in a command line of ``namesake serve``."""
    return {word.partition("=")[0] for word in words if word.startswith("--")}


def test_the_unit_starts_the_server_with_flags_that_there_are() -> None:
    line = re.search(r"^ExecStart=((?:.*\\\n)*.*)$", UNIT, re.MULTILINE)
    assert line is not None
    words = shlex.split(line[1].replace("\\\n", " "))
    assert words[0].endswith("/bin/namesake")
    assert words[1] == "serve"
    assert len(flags_of(words)) > 5
    assert flags_of(words) <= FLAGS


def test_what_the_unit_shuts_off_is_nothing_that_the_engine_needs() -> None:
    told = dict(re.findall(r"^(?:Environment=)?(\w+)=(.*)$", UNIT, re.MULTILINE))
    assert "AF_NETLINK" in told["RestrictAddressFamilies"].split(), "gloo asks for the interfaces"
    assert (told["ProtectSystem"], told["ProtectHome"]) == ("strict", "true")
    for name in ("HOME", "VLLM_CACHE_ROOT", "NAMESAKE_CACHE"):
        assert told[name].startswith(f"/var/cache/{told['CacheDirectory']}")
    assert told["KillMode"] == "mixed", "else the engine is told to stop before the gateway has drained"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / "namesake.service"
    unit.write_text(UNIT.replace("/opt/namesake/.venv/bin/namesake", shutil.which("true") or ""), encoding="utf-8")
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_compose_follows_the_schema_of_compose() -> None:
    words = ["--builtin-schema", "vendor.compose-spec", str(DEPLOY / "compose.yaml")]
    done = subprocess.run([sys.executable, "-m", "check_jsonschema", *words], capture_output=True, check=False)
    assert done.returncode == 0, done.stdout


def test_compose_starts_the_server_with_flags_that_there_are_and_asks_it_what_it_answers() -> None:
    serve = COMPOSE["services"]["serve"]
    assert serve["command"][:2] == ["namesake", "serve"]
    assert flags_of(serve["command"]) <= FLAGS
    assert "/health" in serve["healthcheck"]["test"][-1]
    keys = next(word for word in serve["command"] if word.startswith("--api-keys-file=")).partition("=")[2]
    assert f"./secrets:{Path(keys).parent}:ro" in serve["volumes"], "of a file by itself a new one is not seen"
    for ignored in (DEPLOY / "Dockerfile.dockerignore", DEPLOY.parents[1] / ".gitignore"):
        assert "/serving/deploy/secrets" in ignored.read_text(encoding="utf-8")


def test_the_image_is_made_of_what_there_is() -> None:
    root = DEPLOY.parents[1]
    copied = re.findall(r"^COPY (.*) \S+$", (DEPLOY / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    assert all((root / name).exists() for names in copied for name in names.split())
    for service in COMPOSE["services"].values():
        assert (DEPLOY / service["build"]["context"]).resolve() == root
        assert (root / service["build"]["dockerfile"]).is_file()
