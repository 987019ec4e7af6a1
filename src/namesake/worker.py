"""One rank of a training in several processes, and torchrun that starts them: what :mod:`namesake.distributed` runs.

``python -m namesake.worker FOLDER TORCHRUN_ARGUMENTS`` is torchrun, which writes down which rank failed;
``python -m namesake.worker FOLDER`` under it is a rank.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch import distributed as dist
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure, record

from namesake import process, training
from namesake.distributed import FAILURE, JOB, Line, address, message_of
from namesake.errors import RecipeError, TrainingError

_PIECE = 1 << 22
"""Bytes of the training file that are sent at once to another node."""

_WAIT = timedelta(hours=1)


def start(folder: Path, arguments: list[str]) -> None:
    """torchrun. Exits with 1 when a rank failed, which then stands in the folder."""
    try:
        torchrun.main(arguments)
    except SignalException as ended:
        sys.exit(128 + ended.sigval)
    except ChildFailedError as error:
        rank, failure = min(error.failures.items(), key=lambda one: order(one[1]))
        told = failure.error_file_data.get("message")
        seen = {
            "rank": rank,
            "code": failure.exitcode,
            "signal": failure.signal_name() if failure.exitcode < 0 else "",
            "error": told["message"] if isinstance(told, dict) else "",
        }
        (folder / FAILURE).write_text(json.dumps(seen), encoding="utf-8")
        sys.exit(1)


def order(failure: ProcessFailure) -> tuple[int, float]:
    """The cause comes first: what was killed, then by when each rank wrote its error; torchrun's times are seconds.

    The others fail because their peer is gone, or are ended by torchrun (SIGTERM).
    """
    if failure.exitcode == -signal.SIGTERM:
        return 2, 0.0
    if failure.exitcode < 0:
        return 0, 0.0
    path = Path(failure.error_file)
    return 1, path.stat().st_mtime if path.is_file() else float("inf")


@record  # type: ignore[untyped-decorator]
def work(folder: Path) -> None:
    """A rank: train, and as rank 0 tell of it."""
    process.end_with_parent()
    job = json.loads((folder / JOB).read_text(encoding="utf-8"))
    if int(os.environ["GROUP_WORLD_SIZE"]) > 1:
        job = shared(job, folder)
    log, silent = Path(job["log"]), _Silent()
    try:
        if os.environ["RANK"] != "0":
            training.train(job["argv"], silent, log, job["environment"])
        else:
            with _called(folder) as line:
                train_first(job, log, line)
    except TrainingError as error:
        raise error.__cause__ or error from None
    if dist.is_initialized():
        dist.destroy_process_group()


def train_first(job: Mapping[str, Any], log: Path, line: Line) -> None:
    """Rank 0's training: tell the parent of it, and wait for its word after each step."""

    class Teller(_Silent):
        """Tells the parent."""

        def on_begin(self, total_steps: int, output_dir: Path) -> None:
            line.tell("begin", total_steps, str(output_dir))

        def on_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
            line.tell("metrics", step, dict(metrics))

        def on_step(self, step: int, save: Callable[[Path], object]) -> None:
            line.tell("step", step)
            while (answer := line.hear())[0] == "save":
                save(Path(answer[1]))
                line.tell("saved")

    try:
        line.tell("trained", message_of(training.train(job["argv"], Teller(), log, job["environment"])))
    except RecipeError as error:
        line.tell("refused", error.parameter, str(error.value), error.fault, error.mend)
        raise


class _Silent:
    """Of the other ranks nobody hears."""

    def on_begin(self, total_steps: int, output_dir: Path) -> None: ...

    def on_step(self, step: int, save: Callable[[Path], object]) -> None: ...

    def on_metrics(self, step: int, metrics: Mapping[str, float]) -> None: ...


def _called(folder: Path) -> Line:
    connection = socket.socket(socket.AF_UNIX)
    with address(folder) as path:
        connection.connect(path)
    return Line(connection)


def shared(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The job on several nodes: node 0's, by torchrun's own store, with this node's base model and a copy of the data.

    Raises:
        TrainingError: this node has another base model.
    """
    port = int(os.environ["MASTER_PORT"])
    whole = dist.TCPStore(os.environ["MASTER_ADDR"], port, is_master=False, timeout=_WAIT)
    store = dist.PrefixStore("namesake", whole)
    first = os.environ["LOCAL_RANK"] == "0"
    if os.environ["GROUP_RANK"] == "0":
        if first:
            content = Path(job["data"]).read_bytes()
            pieces = [content[start : start + _PIECE] for start in range(0, len(content), _PIECE)]
            for number, piece in enumerate(pieces):
                store.set(f"data/{number}", piece)
            store.set("job", json.dumps({**job, "pieces": len(pieces)}))
        return job
    given = json.loads(store.get("job"))
    if given["base_digest"] != job["base_digest"]:
        raise TrainingError("The base model of this node is another than node 0's.", mend="Give both the same --model.")
    data = folder / "train.jsonl"
    if first:
        data.write_bytes(b"".join(store.get(f"data/{number}") for number in range(given["pieces"])))
        store.set(f"ready/{os.environ['GROUP_RANK']}", "")
    store.wait([f"ready/{os.environ['GROUP_RANK']}"])
    # Of an argument that is given twice ms-swift takes the last.
    own = ["--model", job["model"], "--dataset", str(data), "--output_dir", str(folder / "output")]
    return {**given, "argv": [*given["argv"], *own], "log": job["log"]}


if __name__ == "__main__":
    if sys.argv[2:]:
        start(Path(sys.argv[1]), sys.argv[2:])
    else:
        work(Path(sys.argv[1]))
