"""ms-swift's training in several processes, on one node or on more, started by torchrun as plain ``swift sft`` does.

The use case stays in one process: this starts the ranks (:mod:`namesake.worker`), hears from rank 0 what
:class:`namesake.training.Listener` hears of a training in this process, and ends all of them with it. Of several nodes
node 0 does that; the others give their processes (:func:`join`).
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from namesake import process
from namesake.errors import InputError, RecipeError, TrainingError
from namesake.messages import Message, tr
from namesake.training import Listener, Trained, end_of

PROCESSES, NODES, NODE, ADDRESS, PORT = "NPROC_PER_NODE", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"
"""Variables that ``swift`` starts torchrun by."""

JOB, SOCKET, FAILURE = "job.json", "rank0", "failure.json"
"""In the folder shared with the ranks: what they do, where rank 0 tells of it, and which of them failed."""

_DEFAULT_PORT = 29500
_WAIT = 3600
"""Seconds in which all nodes have to be there: node 0 prepares the data first, and the base may answer prompts."""

_LOOK = 0.5
_END = 10
"""Seconds from SIGTERM to SIGKILL."""

_LEAVE = 60
"""Seconds in which the ranks of all nodes leave when they have trained."""


class Gone(Exception):
    """The other end has died."""


class Line:
    """What this process and rank 0 tell each other: a line of JSON a message."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._heard = connection.makefile("r", encoding="utf-8")

    def __enter__(self) -> Line:
        return self

    def __exit__(self, *_: object) -> None:
        self._heard.close()  # the connection stays open as long as this is
        self._connection.close()

    def tell(self, *words: Any) -> None:
        """One message to the other end.

        Raises:
            Gone: nobody is there.
        """
        try:
            self._connection.sendall(json.dumps(words).encode() + b"\n")
        except ConnectionError as error:
            raise Gone from error

    def hear(self) -> list[Any]:
        """One message from the other end.

        Raises:
            Gone: it says nothing more, or died over a word.
        """
        try:
            message = self._heard.readline()
        except ConnectionError as error:
            raise Gone from error
        if not message.endswith("\n"):
            raise Gone
        words: list[Any] = json.loads(message)
        return words


@dataclass(frozen=True)
class Layout:
    """Which processes train.

    Attributes:
        nodes, node: how many machines, and which of them this is, from 0 on.
        per_node: processes on each.
        address, port: where node 0 is met.
    """

    nodes: int
    node: int
    per_node: int
    address: str
    port: int

    @property
    def processes(self) -> int:
        """All of them: torch's world size."""
        return self.nodes * self.per_node

    @property
    def environment(self) -> dict[str, str]:
        """What ``swift`` has to be told for the same, on node 0."""
        alone = {PROCESSES: str(self.per_node)}
        more = {NODES: str(self.nodes), NODE: "0", ADDRESS: self.address, PORT: str(self.port)}
        return alone | more if self.nodes > 1 else alone


def layout(environment: Mapping[str, str] = os.environ) -> Layout | None:
    """What the environment asks for; none where the training is one process, this one.

    Raises:
        InputError: a value is no number, too large or missing.
    """
    given = {key: environment.get(key, "").strip() for key in (PROCESSES, NODES, NODE, ADDRESS, PORT)}
    if not given[PROCESSES] and not given[NODES]:
        return None
    nodes = _whole(NODES, given[NODES] or "1", 1)
    node = _whole(NODE, given[NODE] or "0", 0)
    per_node = _per_node(given[PROCESSES] or "1")
    if node >= nodes:
        raise InputError(
            NODE, given[NODE], tr("there are {nodes} nodes", nodes=nodes), mend="Count the nodes from 0 on."
        )
    if nodes > 1:
        for key in (NODE, ADDRESS):
            if not given[key]:
                mend = tr("Set {key} on each node: docs/guide/howto/distributed.md.", key=key)
                raise InputError(NODES, nodes, tr("{key} is not set", key=key), mend=mend)
    port = _whole(PORT, given[PORT], 1) if given[PORT] else _DEFAULT_PORT if nodes > 1 else process.free_port()
    return Layout(nodes, node, per_node, given[ADDRESS] or "127.0.0.1", port)


def train(
    argv: Sequence[str],
    listener: Listener,
    log: Path,
    environment: Mapping[str, str],
    layout: Layout,
    *,
    data: Path,
    base_digest: str,
) -> Trained:
    """:func:`namesake.training.train`, in the processes of the layout.

    Args:
        data: the training file, which other nodes are sent.
        base_digest: of the base model, which other nodes have to have, too.

    Raises:
        RecipeError: ms-swift refuses the arguments.
        TrainingError: a rank failed or was killed; the message names it.
        Stopped: the listener raised it.
    """
    job = {"argv": [*argv], "environment": {**environment}, "data": str(data), "base_digest": base_digest}
    with _started(layout, job, log) as (folder, ranks, line):
        trained = follow(line, listener) if line else None
        with suppress(subprocess.TimeoutExpired):
            # What it has trained is whole by now: a rank that stumbles on its way out takes nothing back.
            ranks.wait(_LEAVE if trained else None)
        if trained is None:
            raise _failed(folder, ranks.returncode, log)
        return trained


def follow(line: Line, listener: Listener) -> Trained | None:
    """Hand on to the listener what rank 0 tells, until it ends; what it has trained, if it got so far.

    Raises:
        RecipeError: ms-swift refuses the arguments.
        Stopped: the listener raised it.
    """

    def save(path: Path) -> None:
        line.tell("save", str(path))
        line.hear()

    with suppress(Gone):
        while True:
            kind, *values = line.hear()
            if kind == "begin":
                listener.on_begin(values[0], Path(values[1]))
            elif kind == "metrics":
                listener.on_metrics(values[0], values[1])
            elif kind == "step":
                listener.on_step(values[0], save)
                line.tell("on")
            elif kind == "refused":
                raise RecipeError(values[0], values[1], values[2], mend=values[3])
            else:
                paths = {key: Path(values[0][key]) for key in _PATHS}
                return Trained(**{**values[0], **paths})
    return None


def join(layout: Layout, model: Path, base_digest: str, log: Path) -> None:
    """Give the processes of this node, which is not node 0, to the training that node 0 leads.

    Raises:
        TrainingError: node 0 was not there in time, or a rank failed; the message names it.
    """
    with _started(layout, {"model": str(model), "base_digest": base_digest}, log) as (folder, ranks, _):
        if ranks.wait():
            raise _failed(folder, ranks.returncode, log)


_PATHS = ("output_dir", "last_checkpoint", "best_checkpoint")


def message_of(trained: Trained) -> dict[str, Any]:
    """As rank 0 tells it."""
    return {key: str(value) if key in _PATHS else value for key, value in asdict(trained).items()}


@contextmanager
def _started(layout: Layout, job: Mapping[str, Any], log: Path) -> Iterator[tuple[Path, Any, Line | None]]:
    """The ranks; they have ended when this has. Their shared folder, torchrun's process, and what rank 0 tells."""
    import torch

    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if not torch.cuda.is_available():  # torchrun gives each rank one thread
        cores = len(os.sched_getaffinity(0))
        environment.setdefault("OMP_NUM_THREADS", str(max(cores // layout.per_node, 1)))
    with tempfile.TemporaryDirectory(prefix="namesake-") as name, socket.socket(socket.AF_UNIX) as server:
        folder = Path(name)
        (folder / JOB).write_text(json.dumps({**job, "log": str(log)}), encoding="utf-8")
        with address(folder) as path:
            server.bind(path)
        server.listen(1)
        server.settimeout(_LOOK)
        with log.open("ab") as output:
            ranks = subprocess.Popen(
                _command(layout, folder),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches this process alone, which ends them in their order
                preexec_fn=process.end_with_parent,
            )
        try:
            with (_connected(server, ranks) if layout.node == 0 else None) or nullcontext() as line:
                yield folder, ranks, line
        finally:
            _end(ranks)


@contextmanager
def address(folder: Path) -> Iterator[str]:
    """Where rank 0 tells of its work; a socket's path has 108 bytes at most, and ``TMPDIR`` may be longer."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        yield f"/proc/self/fd/{opened}/{SOCKET}"
    finally:
        os.close(opened)


def _command(layout: Layout, folder: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "namesake.worker", str(folder)),
        *("--nnodes", str(layout.nodes), "--node_rank", str(layout.node), "--nproc_per_node", str(layout.per_node)),
        *("--master_addr", layout.address, "--master_port", str(layout.port)),
        *("--rdzv_conf", f"timeout={_WAIT}", "--shutdown_timeout", str(_END), "--log_dir", str(folder)),
        *("-m", "namesake.worker", str(folder)),
    ]


def _connected(server: socket.socket, ranks: subprocess.Popen[bytes]) -> Line | None:
    """The line to rank 0; none where it ended before it called."""
    while ranks.poll() is None:
        with suppress(TimeoutError):
            return Line(server.accept()[0])
    return None


def _end(ranks: subprocess.Popen[bytes]) -> None:
    """torchrun hands SIGTERM on, and SIGKILL after a while. Were it dead, the kernel would have ended the ranks."""
    if ranks.poll() is None:
        ranks.terminate()
        try:
            ranks.wait(2 * _END)
        except subprocess.TimeoutExpired:
            ranks.kill()
            ranks.wait()


def _failed(folder: Path, code: int | None, log: Path) -> TrainingError:
    """What torchrun has seen: which rank failed first."""
    why: Message = tr("torchrun ended with exit code {code}", code=code)
    if code is not None and code < 0:
        why = tr("torchrun was killed ({signal})", signal=signal.Signals(-code).name)
    with suppress(OSError):
        seen = json.loads((folder / FAILURE).read_text(encoding="utf-8"))
        if seen["signal"]:
            why = tr("rank {rank} was killed ({signal})", rank=seen["rank"], signal=seen["signal"])
        elif seen["error"]:
            why = tr("rank {rank}: {error}", rank=seen["rank"], error=seen["error"].rstrip("."))
        else:
            why = tr("rank {rank} ended with exit code {code}", rank=seen["rank"], code=seen["code"])
    return TrainingError(
        tr("Training failed: {error}.\n{log}", error=why, log=end_of(log)),
        mend=tr("The whole log is {log}.", log=log),
    )


def _whole(key: str, text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        mend = tr("Write a whole number, at least {least}.", least=least)
        raise InputError(key, text, "is no whole number", mend=mend)
    return int(text)


def _per_node(text: str) -> int:
    import torch
    from torch.distributed.run import determine_local_world_size

    mend = "Write a whole number, gpu, cpu or auto."
    try:
        count = int(determine_local_world_size(text))
    except ValueError as error:
        raise InputError(PROCESSES, text, "is no number of processes", mend=mend) from error
    if count < 1:
        raise InputError(PROCESSES, text, "is no number of processes", mend=mend)
    gpus = torch.cuda.device_count()
    if gpus % count:
        fault = tr("the {gpus} GPUs here cannot be shared out evenly", gpus=gpus)
        raise InputError(
            PROCESSES, text, fault, mend="Write a divisor of the number of GPUs, or set CUDA_VISIBLE_DEVICES."
        )
    return count
