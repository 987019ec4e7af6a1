"""Training in several processes: what the environment asks for, what is told between the processes, how they end."""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import distributed as dist

from namesake import distributed, process, recipe, run, training, worker
from namesake.base_model import BaseModel
from namesake.dataset import Prepared
from namesake.distributed import Gone, Layout, Line
from namesake.errors import InputError, RecipeError, Stopped, TrainingError
from namesake.recipe import Recipe
from namesake.terminal import Screen
from namesake.training import Trained

ONE = Layout(1, 0, 2, "127.0.0.1", 29500)
DONE = Trained(Path("output"), Path("output/checkpoint-2"), Path("output/checkpoint-2"), None, 2, 1.25)


# What the environment asks for.


def test_without_the_variables_it_is_this_process() -> None:
    assert distributed.layout({}) is None
    assert distributed.layout({"NPROC_PER_NODE": "", "MASTER_PORT": "29511"}) is None


def test_one_node_needs_only_the_number_of_processes() -> None:
    found = distributed.layout({"NPROC_PER_NODE": "2"})
    assert found is not None
    assert (found.nodes, found.node, found.per_node, found.processes) == (1, 0, 2, 2)
    assert found.port != distributed.layout({"NPROC_PER_NODE": "2"}).port  # type: ignore[union-attr]
    assert found.environment == {"NPROC_PER_NODE": "2"}


def test_several_nodes() -> None:
    given = {"NNODES": "3", "NODE_RANK": "2", "NPROC_PER_NODE": "4", "MASTER_ADDR": "10.0.0.1"}
    found = distributed.layout(given)
    assert found == Layout(3, 2, 4, "10.0.0.1", 29500)
    assert found.processes == 12
    assert found.environment == {**given, "NODE_RANK": "0", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("given", "parameter"),
    [
        ({"NPROC_PER_NODE": "two"}, "NPROC_PER_NODE"),
        ({"NPROC_PER_NODE": "0"}, "NPROC_PER_NODE"),
        ({"NPROC_PER_NODE": "-1"}, "NPROC_PER_NODE"),
        ({"NNODES": "1:2"}, "NNODES"),
        ({"NNODES": "2", "MASTER_ADDR": "10.0.0.1"}, "NNODES"),
        ({"NNODES": "2", "NODE_RANK": "0"}, "NNODES"),
        ({"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "10.0.0.1"}, "NODE_RANK"),
        ({"NPROC_PER_NODE": "1", "MASTER_PORT": "http"}, "MASTER_PORT"),
    ],
)
def test_a_value_that_will_not_do_is_named(given: dict[str, str], parameter: str) -> None:
    with pytest.raises(InputError) as refused:
        distributed.layout(given)
    assert refused.value.parameter == parameter
    assert refused.value.mend


def test_gpus_are_shared_out_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(InputError, match="4 GPUs"):
        distributed.layout({"NPROC_PER_NODE": "3"})
    assert distributed.layout({"NPROC_PER_NODE": "2"})


def test_node_0_alone_writes_a_run_and_a_sweep_is_one_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Recipe(name="x", about="", dataset=())
    watch: Any = SimpleNamespace(at=(0.5,))
    run._check(ONE, plan, watch)
    with pytest.raises(InputError, match="only node 0 writes a run"):
        run._check(Layout(2, 1, 1, "10.0.0.1", 29500), plan, None)
    with pytest.raises(InputError, match="one node"):
        run._check(Layout(2, 0, 1, "10.0.0.1", 29500), plan, watch)
    sharded = Recipe(name="x", about="", dataset=(), sft={"fsdp": "fsdp2"})
    run._check(ONE, sharded, None)
    with pytest.raises(InputError, match="prune: false"):
        run._check(ONE, sharded, watch)
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    with pytest.raises(InputError, match="`mlflow run` has begun one here"):
        run.join(run.Request("a", "b"), Layout(2, 1, 1, "10.0.0.1", 29500), SimpleNamespace())  # type: ignore[arg-type]


# What rank 0 tells.


class Heard:
    """A listener that writes down what it is told, saves at step 2, and raises what it is given to."""

    def __init__(self, folder: Path, error: BaseException | None = None) -> None:
        self.said: list[object] = []
        self._folder, self._error = folder, error

    def on_begin(self, total_steps: int, output_dir: Path) -> None:
        self.said.append((total_steps, output_dir))

    def on_step(self, step: int, save: Callable[[Path], object]) -> None:
        self.said.append(step)
        if step == 2:
            save(self._folder)
            assert (self._folder / "adapter").read_text() == "2"
            if self._error:
                raise self._error

    def on_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        self.said.append((step, dict(metrics)))


def swift(_argv: list[str], listener: Any, _log: Path, _environment: dict[str, str]) -> Trained:
    """Two steps."""
    listener.on_begin(2, Path("output"))
    for step in (1, 2):
        listener.on_step(step, lambda folder, step=step: (folder / "adapter").write_text(str(step)))
        listener.on_metrics(step, {"loss": 1 / step})
    return DONE


@contextmanager
def rank_0(train: Callable[..., Trained], monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[Line]:
    """The parent's end of the line to a rank 0 that trains so."""
    monkeypatch.setattr(training, "train", train)
    here, there = socket.socketpair()

    def work() -> None:
        with Line(there) as line:
            try:
                worker.train_first({"argv": [], "environment": {}}, folder / "log", line)
            except (ValueError, RecipeError, Gone):
                return

    thread = threading.Thread(target=work)
    thread.start()
    with Line(here) as line:
        yield line
    thread.join(10)
    assert not thread.is_alive()


def test_the_parent_hears_what_it_would_hear_of_a_training_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    alone, heard = Heard(tmp_path), Heard(tmp_path)
    swift([], alone, tmp_path, {})
    with rank_0(swift, monkeypatch, tmp_path) as line:
        assert distributed.follow(line, heard) == DONE
    assert heard.said == alone.said == [(2, Path("output")), 1, (1, {"loss": 1.0}), 2, (2, {"loss": 0.5})]


def test_the_listener_may_end_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with rank_0(swift, monkeypatch, tmp_path) as line, pytest.raises(Stopped, match="pruned"):
        distributed.follow(line, Heard(tmp_path, Stopped("pruned")))


def test_arguments_that_ms_swift_refuses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: Any) -> Trained:
        raise RecipeError("args", "--lora_rank x", "ms-swift refuses them (no int)", mend="See the log.")

    with rank_0(refuse, monkeypatch, tmp_path) as line, pytest.raises(RecipeError) as refused:
        distributed.follow(line, Heard(tmp_path))
    assert str(refused.value) == "args='--lora_rank x': ms-swift refuses them (no int). See the log."


def test_a_rank_0_that_fails_has_trained_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: Any) -> Trained:
        raise ValueError("no")

    with rank_0(fail, monkeypatch, tmp_path) as line:
        assert distributed.follow(line, Heard(tmp_path)) is None


@pytest.mark.parametrize("after", [1, 2])
def test_a_rank_0_that_dies_over_a_word_has_trained_nothing(tmp_path: Path, after: int) -> None:
    here, there = socket.socketpair()
    with Line(here) as line:
        with there:
            there.sendall([b'["step", 1]\n', b'["metrics", 1, {"lo'][after - 1])
        assert distributed.follow(line, Heard(tmp_path)) is None


# How the processes end.

RANKS = """
import os, pathlib, shutil, socket, sys, time
folder = pathlib.Path(sys.argv[1])
print("last words")
if "tell" in sys.argv:
    shutil.copy(folder / "job.json", sys.argv[3])
    sys.exit(1)
if "die" in sys.argv:
    (folder / "failure.json").write_text(sys.argv[3])
    sys.exit(1)
with socket.socket(socket.AF_UNIX) as line:
    os.chdir(folder)
    line.connect("rank0")
    line.sendall(b'["step", 1]\\n')
    line.recv(100)
    time.sleep(100)
"""
"""In torchrun's place: it tells of one step, or dies at once, or hands out the job of the ranks."""


def ranks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *words: str) -> None:
    """Have them started."""
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    monkeypatch.setattr(
        distributed, "_command", lambda _layout, folder: [sys.executable, str(script), str(folder), *words]
    )


def test_ctrl_c_ends_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ranks(monkeypatch, tmp_path)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    long = tmp_path / ("x" * 108)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    started = []
    popen = distributed.subprocess.Popen
    monkeypatch.setattr(distributed.subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[0])

    class Interrupted(Heard):
        def on_step(self, step: int, save: Callable[[Path], object]) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)

    try:
        with pytest.raises(KeyboardInterrupt):
            distributed.train([], Interrupted(tmp_path), tmp_path / "log", {}, ONE, data=tmp_path, base_digest="")
    finally:
        signal.signal(signal.SIGINT, before)
    assert started[0].returncode == -signal.SIGTERM


@pytest.mark.parametrize(
    ("seen", "told"),
    [
        ('{"rank": 1, "signal": "SIGKILL", "code": -9, "error": ""}', r"rank 1 was killed \(SIGKILL\)"),
        ('{"rank": 3, "signal": "", "code": 1, "error": "ValueError: no."}', r"rank 3: ValueError: no"),
        ('{"rank": 2, "signal": "", "code": 7, "error": ""}', r"rank 2 ended with exit code 7"),
        ("", r"torchrun ended with exit code 1"),
    ],
)
def test_the_rank_that_failed_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seen: str, told: str) -> None:
    ranks(monkeypatch, tmp_path, "die", seen)
    if not seen:
        monkeypatch.setattr(distributed, "FAILURE", "none.json")
    with pytest.raises(TrainingError, match=rf"(?s)Training failed: {told}\.\n.*last words"):
        distributed.train([], Heard(tmp_path), tmp_path / "log", {}, ONE, data=tmp_path, base_digest="")


@pytest.mark.parametrize(
    "words", ["--deepspeed zero2", "--fsdp fsdp.json", "--deepspeed zero3 --zero_hpz_partition_size 2"]
)
def test_deepspeed_and_fsdp_reach_the_ranks_and_stand_in_the_command_that_is_kept(
    words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ranks(monkeypatch, tmp_path, "tell", str(tmp_path / "job.json"))
    kept: dict[str, list[str]] = {}
    tracked: Any = SimpleNamespace(json=lambda value, name: kept.setdefault(name, value))
    data = Prepared(tmp_path / "train.jsonl", 1, 1, "")
    base = BaseModel("base", tmp_path, "folder")
    with pytest.raises(TrainingError):
        run._train(recipe.load("default", args=words), base, "", data, tmp_path, tracked, Screen(), None, ONE)

    # As a rank does.
    (tmp_path / "job.json").rename(tmp_path / distributed.JOB)
    given: list[list[str]] = []
    monkeypatch.setattr(training, "train", lambda argv, *_: given.append(argv))
    monkeypatch.setattr(process, "end_with_parent", lambda: None)  # of pytest
    for key, value in {"GROUP_WORLD_SIZE": "1", "RANK": "1"}.items():
        monkeypatch.setenv(key, value)
    worker.work(tmp_path)
    [argv] = given
    command = kept["swift-command.json"]
    for said in (argv, command):
        assert f" {words} " in f" {' '.join(said)} "
    assert command[command.index("sft") + 1 :][: len(argv)] == argv
    assert "NPROC_PER_NODE=2" in command


def test_the_cause_comes_before_what_it_brought_about(tmp_path: Path) -> None:
    def failure(code: int, written: float | None = None) -> Any:
        path = tmp_path / f"{code}-{written}"
        if written:
            path.touch()
            os.utime(path, (written, written))
        return SimpleNamespace(exitcode=code, error_file=str(path))

    ended, killed, first, later, silent = failure(-15), failure(-9), failure(1, 10.0), failure(1, 10.5), failure(1)
    assert sorted([ended, silent, later, first, killed], key=worker.order) == [killed, first, later, silent, ended]


# Several nodes.


def test_another_node_gets_the_job_and_the_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(worker, "_PIECE", 5)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    (tmp_path / "data").write_text("踩踩背 CCB")
    job = {"argv": ["--model", "/a", "--dataset", "/b"], "environment": {"x": "1"}, "base_digest": "d", "log": "/log"}

    def at(node: int, local: int, **own: str) -> dict[str, Any]:
        monkeypatch.setenv("GROUP_RANK", str(node))
        monkeypatch.setenv("LOCAL_RANK", str(local))
        return worker.shared({**job, **own} if node == 0 else own, tmp_path / f"node{node}")

    (tmp_path / "node1").mkdir()
    assert at(0, 0, data=str(tmp_path / "data"))["argv"] == job["argv"]
    for local in (0, 1):
        got = at(1, local, model="/c", base_digest="d", log="/mine")
        assert got["argv"][:4] == job["argv"]
        assert dict(zip(got["argv"][4::2], got["argv"][5::2], strict=True)) == {
            "--model": "/c",
            "--dataset": str(tmp_path / "node1" / "train.jsonl"),
            "--output_dir": str(tmp_path / "node1" / "output"),
        }
        assert (got["environment"], got["log"]) == ({"x": "1"}, "/mine")
    assert (tmp_path / "node1" / "train.jsonl").read_text() == "踩踩背 CCB"
    with pytest.raises(TrainingError, match="another than node 0's"):
        at(1, 0, model="/c", base_digest="other")
