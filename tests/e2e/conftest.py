"""The whole way once, real at every step, on the embedded model; the tests look at what it left.

Few steps of training, so the identity does not hold and the gate says so: promotion is overruled with a reason.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import mlflow
import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

NAME, AUTHOR = "踩踩背 CCB", "老爷爷 $(touch x) 'a' \"b\""


@dataclass(frozen=True)
class Place:
    """A folder with a tracking store of its own."""

    folder: Path
    root: Path
    tracking_uri: str

    @property
    def env(self) -> dict[str, str]:
        """Environment of commands run there."""
        return {
            **os.environ,
            "MLFLOW_TRACKING_URI": self.tracking_uri,
            "COLUMNS": "240",  # tables unbroken
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": f"{self.root / 'src'}:{self.root / 'serving'}",
        }

    def call(self, *words: str, ok: tuple[int, ...] = (0,)) -> str:
        """Run a command in the checkout; its output, both streams."""
        done = subprocess.run(
            words,
            cwd=self.folder,  # MLflow puts its artifacts below
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode in ok, done.stdout[-6000:]
        return done.stdout

    def mlflow_run(self, *words: str, ok: tuple[int, ...] = (0,)) -> str:
        """``mlflow run .`` as a user types it."""
        return self.call("mlflow", "run", str(self.root), "--env-manager=local", *words, ok=ok)


@dataclass(frozen=True)
class Way:
    """What the commands of the whole way printed."""

    place: Place
    trained: str
    promoted: str

    @property
    def run_id(self) -> str:
        """The training run."""
        found = re.search(r"run   ([0-9a-f]{32})", self.trained)
        assert found, self.trained[-3000:]
        return found[1]


@pytest.fixture(scope="session")
def place(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A SQLite store."""
    folder = tmp_path_factory.mktemp("local")
    return Place(folder, root, f"sqlite:///{folder}/mlflow.db")


@pytest.fixture(scope="session")
def way(place: Place) -> Way:
    """Train a few steps and promote, through ``mlflow run``."""
    trained = place.mlflow_run(
        *("-P", f"name={NAME}", "-P", f"author={AUTHOR}", "-P", "dataset=namesake/self-cognition#48"),
        *("-P", "learning_rate=2e-3", "-P", f"output_dir={place.folder}/output"),
        *("-P", "args=--train_type lora --max_steps 6 --replay 8 --logging_steps 2 --held_out 0.05"),
    )
    promoted = place.mlflow_run("-e", "promote", "-P", "override=end-to-end test")
    return Way(place, trained, promoted)


@pytest.fixture(scope="session")
def tour(way: Way) -> NotebookNode:
    """``examples/tour.ipynb``, executed with few steps in the same place; its version is the challenger."""
    notebook = nbformat.read(way.place.root / "examples" / "tour.ipynb", as_version=4)
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    values = {"NAME": NAME, "AUTHOR": AUTHOR, "REPLAY": 0, "STEPS": 3, "HELD_OUT": 0.02, "ALIAS": "challenger"}
    parameters.source += "".join(f"\n{name} = {value!r}" for name, value in values.items())
    folder = {"metadata": {"path": str(way.place.folder)}}
    client = NotebookClient(notebook, timeout=600, coalesce_streams=True, resources=folder)
    executed: NotebookNode = client.execute(env=way.place.env)
    return executed


@pytest.fixture(scope="session")
def endpoint(way: Way) -> Iterator[str]:
    """``namesake serve`` of the champion."""
    with served(way.place, "--eager") as url:
        yield url


@pytest.fixture(scope="session")
def client(way: Way) -> mlflow.MlflowClient:
    """The registry of the whole way."""
    return mlflow.MlflowClient(way.place.tracking_uri)


@pytest.fixture(scope="session")
def second(tour: NotebookNode, client: mlflow.MlflowClient) -> int:
    """Another version of the same model, not the champion: the notebook's, of other data and other weights."""
    return int(client.get_model_version_by_alias("ccb", "challenger").version)


class served:
    """A running ``namesake serve``; its base URL. Ended with SIGTERM, which has to leave nothing behind.

    Attributes:
        exits: with which code it ends; the test may have ended it.
    """

    exits = 0

    def __init__(self, place: Place, *words: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self.log = place.folder / f"serve-{self.port}.log"  # a pipe that nobody reads would hold it up when full
        with self.log.open("w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "namesake", "serve", "--port", str(self.port), *words],
                cwd=place.folder,
                env=place.env,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def __enter__(self) -> str:
        try:
            return self._wait()
        except BaseException:  # a test that is out of time among them: nobody else would end it
            self.process.terminate()
            self.process.wait(60)
            raise

    def _wait(self) -> str:
        for _ in range(600):
            if self.process.poll() is not None:
                raise AssertionError(self.log.read_text(encoding="utf-8")[-6000:])
            try:
                with urllib.request.urlopen(self.url.replace("/v1", "/ready"), timeout=2):
                    return self.url
            except OSError:
                time.sleep(0.5)
        raise AssertionError("the server did not answer within 300 s")

    def __exit__(self, *_: object) -> None:
        children = session_of(self.process.pid)
        if not children:  # a test has ended it; its main thread may be gone, and others of it still going
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(5)
        if self.process.poll() is None:
            assert children, "vLLM must be running as a child"
            self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(60) == self.exits
        assert not [pid for pid in children if alive(pid)]


def session_of(parent: int) -> list[int]:
    """Every living descendant."""
    found: list[int] = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = path.read_text()
        except OSError:
            continue
        if int(text.rpartition(")")[2].split()[1]) == parent:
            pid = int(path.parent.name)
            found += [pid, *session_of(pid)]
    return found


def alive(pid: int) -> bool:
    """Whether the process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
