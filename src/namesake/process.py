"""What this process asks of the libraries it loads, and of the kernel for the processes it starts."""

from __future__ import annotations

import ctypes
import os
import re
import secrets
import signal
import socket
from contextlib import suppress
from pathlib import Path

SPIN_COUNT = "20000"
"""Threads that spin long while they wait make training twenty times slower as soon as anything runs beside it; not
spinning at all costs a quarter (docs/lab-notes.md).
"""

CPU = Path("/proc/cpuinfo")
DEVICES = Path("/dev")
WSL = Path("/usr/lib/wsl/lib/libcuda.so.1")

_PR_SET_PDEATHSIG = 1
_AVX512 = {"avx512f", "avx512bw", "avx512vl", "avx512dq"}


def settle() -> None:
    """Tell libraries, before they are loaded, what suits our work; what the user has set stays."""
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # It prints a run's address, with a server, among what `--json` prints; ours is on the terminal.
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")


def hurry() -> None:
    """Have MLflow try a request once more and no oftener: its seven tries take four minutes, in which whoever serves
    would neither start from its own store nor hear that the server is back. What the user has set stays.

    Its time limit stays too: a server that hands artifacts on reads a whole file before it sends the first byte.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")


def own_ray() -> dict[str, str]:
    """Environment of a Ray of our own: for this machine alone, and for who has its token, since whoever may use its
    ports runs code. What it starts gets as much of the processors as who starts it, where Ray's own default would have
    replicas and trials wait for every other process. What the user has set stays.
    """
    # Off, this variable (named after systems where that is the default) binds Ray to loopback, which
    # `_node_ip_address` does not; the one port of each replica of Ray Serve that listens everywhere all the same takes
    # only who has the token.
    wanted = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "token", "RAY_worker_niceness": "0"}
    if "RAY_AUTH_TOKEN_PATH" not in os.environ:
        wanted["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    return {name: value for name, value in wanted.items() if name not in os.environ}


def multiplies_bf16() -> bool:
    """Whether this CPU has what oneDNN multiplies bfloat16 by: AVX-512, on Arm ``bf16`` (torch's own
    ``mkldnn_bf16_device_check``). Where it has not, torch does it number by number: a step of training took 20 times as
    long as in float32 (docs/lab-notes.md). Where nobody says what the CPU has, it is taken to have it.
    """
    try:
        text = CPU.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return True
    found = re.search(r"^(flags|Features)\s*:(.*)$", text, re.MULTILINE)
    if found is None:
        return True
    has = set(found[2].split())
    return has >= _AVX512 if found[1] == "flags" else "bf16" in has


def has_gpu() -> bool:
    """Whether an NVIDIA device is there, without importing torch. The Makefile asks the same."""
    # A container has the devices it was given, under the numbers that they have on their machine.
    return any(DEVICES.glob("nvidia[0-9]*")) or WSL.exists()


def end_with_parent() -> None:
    """In a child, before its program starts: SIGTERM when the thread that started it is gone (Linux only)."""
    # kill -9 of the parent must not leave a server behind that holds the memory.
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def free_port(host: str = "127.0.0.1") -> int:
    """A port of the host that nothing listens on at this moment."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as free:
        free.bind((host, 0))
        return int(free.getsockname()[1])
