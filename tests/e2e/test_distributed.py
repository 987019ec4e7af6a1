"""Two processes train what one does, in one run; when one of them is killed the run fails and names it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import mlflow
import pytest

from namesake import run, training
from tests.e2e.conftest import Place, alive, session_of

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

STEPS = 2

RUN = """
-m namesake run --dataset namesake/self-cognition#12 --replay 8 --held_out 0.01 --logging_steps 1
--per_device_train_batch_size 2 --split_dataset_ratio 0 --eval_strategy no --torch_dtype float32 --lora_dtype float32
--lr_scheduler_type constant --warmup_ratio 0
"""


def words(steps: int) -> list[str]:
    """The command line."""
    return [sys.executable, *RUN.split(), "--max_steps", f"{steps}"]


@pytest.fixture
def place(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A store without a run, where two processes train."""
    monkeypatch.setenv("NPROC_PER_NODE", "2")
    return Place(tmp_path, root, f"sqlite:///{tmp_path}/mlflow.db")


History = list[tuple[int, float]]


def alone(command: list[str], folder: Path) -> dict[str, History]:
    """What a run logs of the same training in one process, this one: each metric's steps and values."""
    argv = command[command.index("sft") + 1 : command.index("--external_plugins")]
    argv[argv.index("--per_device_train_batch_size") + 1] = "4"
    argv[argv.index("--output_dir") + 1] = str(folder / "alone")
    environment = dict(word.split("=") for word in command[1 : command.index("swift")] if word.startswith("NAMESAKE"))
    logged: dict[str, History] = {}

    def metrics(values: Mapping[str, float], step: int) -> None:
        for key, value in values.items():
            logged.setdefault(key, []).append((step, value))

    tracked, bar = SimpleNamespace(metrics=metrics), SimpleNamespace(advance=lambda *_, **__: None)
    listener = run._Listener(tracked, bar, folder, None)  # type: ignore[arg-type]
    training.train(argv, listener, folder / "alone.log", environment)
    return logged


def test_two_processes_are_one_run_with_the_numbers_of_one(place: Place) -> None:
    place.call(*words(STEPS))
    client = mlflow.MlflowClient(place.tracking_uri)
    [both] = client.search_runs(["0"])
    assert both.info.status == "FINISHED"
    assert both.data.params["train.processes"] == "2"
    # Rank 0 alone tells of what is logged: one of everything.
    there = {one.path for one in client.list_artifacts(both.info.run_id)}
    assert there >= {"adapter", "report.html", "scorecard.json", "train.log"}
    adapter = [Path(one.path).name for one in client.list_artifacts(both.info.run_id, "adapter")]
    assert {"adapter_config.json", "adapter_model.safetensors", "args.json"} <= set(adapter) <= set(run.ADAPTER_FILES)
    assert client.search_logged_models(["0"]) == []
    assert {"probe/identity", "probe/kl_to_base", "seconds/train"} <= set(both.data.metrics)

    command = json.loads(Path(both.info.artifact_uri.removeprefix("file://"), "swift-command.json").read_text())
    assert "NPROC_PER_NODE=2" in command
    wanted = alone(command, place.folder)
    names = {f"train/{key}" for key in ("loss", "loss_data", "loss_replay", "token_acc", "grad_norm", "learning_rate")}
    assert names <= set(wanted)
    while_training = {key for key in both.data.metrics if key.startswith(("train/", "speed/", "eval/"))}
    assert while_training - {"train/trainable_millions"} == set(wanted)
    for key in while_training & {key for key in wanted if key.startswith("train/")}:
        found = [(point.step, point.value) for point in client.get_metric_history(both.info.run_id, key)]
        assert [step for step, _ in found] == [step for step, _ in wanted[key]], key  # none is lost or there twice
        assert [value for _, value in found] == pytest.approx([value for _, value in wanted[key]], rel=1e-4), key
    assert [step for step, _ in wanted["train/loss"]] == [1, 2]


def rank_1(parent: int) -> list[int]:
    """The process of rank 1 below the parent."""
    found = []
    for pid in session_of(parent):
        try:
            environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        found += [pid] if b"RANK=1" in environ else []
    return found


def test_when_a_process_is_killed_the_run_fails_and_names_it(place: Place) -> None:
    printed = place.folder / "printed"
    with printed.open("w") as output:
        running = subprocess.Popen(words(500), cwd=place.folder, env=place.env, stdout=output, stderr=subprocess.STDOUT)
    client = mlflow.MlflowClient(place.tracking_uri)
    while running.poll() is None:
        time.sleep(0.5)
        try:
            [seen] = client.search_runs(["0"]) if (place.folder / "mlflow.db").exists() else []
        except (ValueError, mlflow.MlflowException):  # the tables are being made
            continue
        if "train/loss" in seen.data.metrics:
            break
    family = session_of(running.pid)
    (victim,) = rank_1(running.pid)
    os.kill(victim, signal.SIGKILL)
    assert running.wait(60) == 4
    assert not [pid for pid in family if alive(pid)]

    [failed] = client.search_runs(["0"])
    assert failed.info.status == "FAILED"
    assert "rank 1 was killed (SIGKILL)" in failed.data.tags["namesake.error"]
    assert "rank 1 was killed (SIGKILL)" in printed.read_text()
    assert "train.log" in [one.path for one in client.list_artifacts(failed.info.run_id)]
    steps = [point.step for point in client.get_metric_history(failed.info.run_id, "train/loss")]
    assert steps == [*range(1, len(steps) + 1)]
