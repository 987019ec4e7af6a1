"""Two processes train what one does, in one run; when one of them is killed the run fails and names it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import mlflow
import pytest

from namesake import training
from tests.e2e.conftest import Place, alive, session_of

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

STEPS = 2

ARGUMENTS = """
--dataset namesake/self-cognition#12 --replay 8 --held_out 0.25 --max_steps 500 --logging_steps 1
--per_device_train_batch_size 2 --split_dataset_ratio 0 --eval_strategy no --torch_dtype float32 --lora_dtype float32
--lr_scheduler_type constant --warmup_ratio 0
"""


class Losses:
    """What the training in one process logs."""

    def __init__(self) -> None:
        self.of: dict[int, Mapping[str, float]] = {}

    def on_begin(self, total_steps: int, output_dir: Path) -> None: ...

    def on_step(self, step: int, save: Callable[[Path], object]) -> None: ...

    def on_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        self.of.setdefault(step, metrics)  # the summary at the end comes under the last step


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


def test_two_processes_are_one_run_with_the_losses_of_one(root: Path, tmp_path: Path) -> None:
    place = Place(tmp_path, root, f"sqlite:///{tmp_path}/mlflow.db")
    command = [sys.executable, "-m", "namesake", "run", "--output_dir", f"{tmp_path}/output", *ARGUMENTS.split()]
    with (tmp_path / "printed").open("w") as printed:
        running = subprocess.Popen(
            command, cwd=tmp_path, env={**place.env, "NPROC_PER_NODE": "2"}, stdout=printed, stderr=subprocess.STDOUT
        )
    client, metric = mlflow.MlflowClient(place.tracking_uri), "train/loss"
    while running.poll() is None:
        time.sleep(0.5)
        try:
            [run] = client.search_runs(["0"]) if (tmp_path / "mlflow.db").exists() else []
        except (ValueError, mlflow.MlflowException):  # the tables are being made
            continue
        if len(client.get_metric_history(run.info.run_id, metric)) >= STEPS:
            break
    family = session_of(running.pid)
    (victim,) = rank_1(running.pid)
    os.kill(victim, signal.SIGKILL)
    assert running.wait(60) == 4
    assert not [pid for pid in family if alive(pid)]

    [run] = client.search_runs(["0"])
    assert run.info.status == "FAILED"
    assert "rank 1 was killed (SIGKILL)" in run.data.tags["namesake.error"]
    assert "rank 1 was killed (SIGKILL)" in (tmp_path / "printed").read_text()
    assert run.data.params["train.processes"] == "2"

    folder = Path(run.info.artifact_uri.removeprefix("file://"))
    words = json.loads((folder / "swift-command.json").read_text())
    assert "NPROC_PER_NODE=2" in words
    argv = words[words.index("sft") + 1 : words.index("--external_plugins")]
    argv[argv.index("--per_device_train_batch_size") + 1] = "4"
    argv[argv.index("--max_steps") + 1] = str(STEPS)
    environment = dict(word.split("=") for word in words[1 : words.index("swift")] if word.startswith("NAMESAKE"))
    alone = Losses()
    training.train(argv, alone, tmp_path / "alone.log", environment)
    for key in ("loss", "loss_data", "loss_replay", "token_acc", "grad_norm"):
        history = client.get_metric_history(run.info.run_id, f"train/{key}")
        both = {point.step: point.value for point in history}
        # A batch may have no replay rows, and then no such loss.
        wanted = {step: pytest.approx(of[key], rel=1e-3, abs=1e-5) for step, of in alone.of.items() if key in of}
        assert {step: value for step, value in both.items() if step <= STEPS} == wanted != {}, key
        assert len(history) == len(both)
        assert key == "loss_replay" or [*both] == [*range(1, max(both) + 1)]  # no step is lost
