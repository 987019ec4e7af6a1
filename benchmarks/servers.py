"""The servers that benchmarks compare, each a process of its own on loopback: ours, and its peers unmodified."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from commands import ROOT, environment

sys.path[:0] = [str(ROOT / "src"), str(ROOT / "serving")]

from namesake.process import SPIN_COUNT, end_with_parent, free_port  # noqa: E402
from namesake_serving import engine, settings  # noqa: E402

MODEL = "ccb"
_LONGEST = 600


@contextmanager
def both_versions() -> Iterator[list[int]]:
    """The numbers that ``champion`` and ``challenger`` stand for, to move between; ``champion`` is put back after it.

    After an odd number of moves both aliases would stand for one version, and whoever moved next would not move.
    """
    from namesake import registry

    numbers = [registry.resolve(f"models:/{MODEL}@{alias}").number for alias in ("champion", "challenger")]
    if numbers[0] == numbers[1]:
        raise SystemExit(f"{MODEL}@champion and {MODEL}@challenger are version {numbers[0]}: point one at another")
    try:
        yield numbers
    finally:
        registry.point(MODEL, "champion", numbers[0])


@contextmanager
def three_versions() -> Iterator[list[int]]:
    """The same and the champion's files once more, registered for so long: a standby holds the last version but one, so
    that moves between two need no loading there, and moves among three do.
    """
    import mlflow

    from namesake import registry

    client = mlflow.MlflowClient()
    with both_versions() as numbers:
        first = registry.resolve(f"models:/{MODEL}/{numbers[0]}")
        third = int(client.create_model_version(MODEL, first.source, first.run_id, tags=dict(first.tags)).version)
        try:
            yield [*numbers, third]
        finally:
            registry.point(MODEL, "champion", numbers[0])
            client.delete_model_version(MODEL, str(third))


@dataclass(frozen=True)
class Served:
    """A server that answers.

    Attributes:
        seconds: from its start to its first answer.
    """

    url: str
    process: subprocess.Popen[bytes]
    seconds: float

    def engine_socket(self) -> str:
        """The Unix socket of the engine behind the gateway."""
        for one in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.Error):
                for connection in one.net_connections("unix"):
                    if str(connection.laddr).endswith(".sock"):
                        return str(connection.laddr)
        raise SystemExit("the gateway has no engine")


@contextmanager
def resting(*others: Served) -> Iterator[None]:
    """The other side's processes stand still: what spins while it waits would take a core from the one measured."""
    still: list[psutil.Process] = []
    try:
        for made in others:
            front = psutil.Process(made.process.pid)
            for one in (front, *front.children(recursive=True)):
                with suppress(psutil.Error):
                    one.suspend()
                    still.append(one)
        yield
    finally:
        for one in reversed(still):
            with suppress(psutil.Error):
                one.resume()


def ask(url: str, body: Mapping[str, object], path: str = "/v1/chat/completions", timeout: float = 300) -> object:
    """Post a JSON body; the JSON of the answer. Anything but an answer raises ``OSError``."""
    request = urllib.request.Request(url + path, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=timeout) as response:
        return json.load(response)


def hello(**more: object) -> dict[str, object]:
    """The shortest chat."""
    return {"messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": 1, **more}


@contextmanager
def started(
    command: Sequence[str], cwd: Path, env: Mapping[str, str], url: str, body: Mapping[str, object], path: str
) -> Iterator[Served]:
    """A server's process once it answers the body at the path; ended, its children too, at the end."""
    begun = time.monotonic()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=end_with_parent,
        )
        try:
            while True:
                try:
                    ask(url, body, path)
                    break
                except (OSError, ValueError) as error:
                    if process.poll() is not None or time.monotonic() > begun + _LONGEST:
                        log.seek(0)
                        told = log.read().decode(errors="replace")[-3000:]
                        raise SystemExit(f"{' '.join(command)}: {error}\n{told}") from None
                    time.sleep(0.1)
            yield Served(url, process, time.monotonic() - begun)
        finally:
            process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(60)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


PATIENT = {"GOMP_SPINCOUNT": SPIN_COUNT}
"""As `namesake` has it for itself. Without it two threads that wait for each other spin, and what answers by
them falls to a token a second as soon as the load generator wants a core: no comparison.
"""


@contextmanager
def namesake_serve(store: Path, *words: str, env: Mapping[str, str] | None = None) -> Iterator[Served]:
    """`namesake serve` of what the alias ``champion`` points to."""
    port = free_port()
    command = [sys.executable, "-m", "namesake", "serve", f"models:/{MODEL}@champion", "--port", str(port), *words]
    given = {**environment(store), **(env or {})}
    with started(command, store, given, f"http://127.0.0.1:{port}", hello(), "/v1/chat/completions") as made:
        yield made


@contextmanager
def bare_vllm(weights: Path, *, ours: bool, env: Mapping[str, str] | None = None) -> Iterator[Served]:
    """vLLM's own server on a port, with the settings that we give it or (but for name and address) with none.

    ``VLLM_PLUGINS`` is empty in both: the plugin that ms-swift registers does not load without torchvision. On a CPU
    vLLM's own defaults want 92 % of the memory to be free; bounded, it stands beside ours and the load.
    """
    address = "--uds"
    given = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_PLUGINS": ""}
    if ours:
        command = engine.command(weights, Path(address), settings.read(), gpu=settings.has_gpu())
        with tempfile.TemporaryDirectory() as nowhere:
            wanted = engine.environment({}, Path(nowhere), gpu=settings.has_gpu())
        given = {**PATIENT, **wanted, **given}
        del given["PYTHONPATH"]
        at = command.index(address)
        del command[at : at + 2]
        command[command.index("--served-model-name") + 1] = MODEL
    else:
        command = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry", "--model", str(weights)]
        command += ["--served-model-name", MODEL]
        command += [] if settings.has_gpu() else ["--gpu-memory-utilization", "0.3"]
    port = free_port()
    command += ["--host", "127.0.0.1", "--port", str(port)]
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    body, url = hello(model=MODEL), f"http://127.0.0.1:{port}"
    with started(command, weights, {**inherited, **given, **(env or {})}, url, body, "/v1/chat/completions") as made:
        yield made


@contextmanager
def mlflow_serve(store: Path, number: int) -> Iterator[Served]:
    """`mlflow models serve` of a version, in this environment."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", f"models:/{MODEL}/{number}"]
    command += ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)]
    env = {key: value for key, value in environment(store).items() if key != "PYTHONPATH"} | PATIENT
    with started(command, store, env, f"http://127.0.0.1:{port}", hello(), "/invocations") as made:
        yield made


@contextmanager
def swift_deploy(weights: Path, folder: Path, *words: str) -> Iterator[Served]:
    """`swift deploy --infer_backend pt` of merged weights. By default it answers one request at a time."""
    port = free_port()
    command = [sys.executable, "-m", "swift.cli.deploy", "--model", str(weights), "--infer_backend", "pt"]
    command += ["--model_type", "llama", "--template", "chatml", "--served_model_name", MODEL]
    command += ["--host", "127.0.0.1", "--port", str(port), *words]
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | PATIENT
    body, url = hello(model=MODEL), f"http://127.0.0.1:{port}"
    with started(command, folder, env, url, body, "/v1/chat/completions") as made:
        yield made
