"""A sweep's trials on a Ray cluster, seen from here: a process that drives Ray Tune is started and listened to.

A process of its own, because Ray ends the one that drives it when the cluster's head is gone, in C++ and without a word
to Python; the MLflow run that is open here has to outlive that. It also keeps Ray's own output away from the terminal.
:mod:`namesake.ray_tune` is what runs there.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Generator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from namesake.errors import InputError, TrainingError
from namesake.messages import tr
from namesake.process import end_with_parent, own_ray

_DRIVER = "from namesake.ray_tune import main; main()"

_PATIENCE = 15.0
"""Seconds that the driver has to leave the cluster, or to end the one it started, before it is killed."""

_TOLD = 1000
"""Characters of the driver's last words that an error repeats."""


def check() -> None:
    """Whether Ray can be driven from here, as far as can be told without starting anything.

    Raises:
        InputError: it is not installed, or only a Ray Client address is given.
    """
    if importlib.util.find_spec("ray") is None:
        raise InputError(
            "backend",
            "ray",
            "Ray is not installed",
            mend="Install it: pip install --no-deps -r requirements/ray.txt, on every node of the cluster.",
        )
    address = os.environ.get("RAY_ADDRESS", "")
    if address.startswith("ray://"):
        raise InputError(
            "RAY_ADDRESS",
            address,
            "is a Ray Client's address, through which a sweep is not driven",
            mend="Run the sweep on a node of the cluster (RAY_ADDRESS=auto), or by `ray job submit`.",
        )


def events(job: Mapping[str, Any], *, mend: str) -> Generator[dict[str, Any]]:
    """What the driver says, as it says it; the events are those of :func:`namesake.ray_tune.main`.

    However this ends, the driver has ended then, and Ray has taken the job's trials with it.

    Args:
        job: plain data, see :func:`namesake.ray_tune.main`.
        mend: what to do when the driver dies.

    Raises:
        TrainingError: the driver ended before its work was done, as when the head of the cluster is gone.
    """
    environment = {"RAY_USAGE_STATS_ENABLED": "0", **os.environ, **(own_ray() if _starts_its_own() else {})}
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log,
        subprocess.Popen(
            [sys.executable, "-c", _DRIVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            encoding="utf-8",
            env=environment,
            start_new_session=True,  # Ctrl-C is for this process, which then ends that one
            preexec_fn=end_with_parent,
        ) as driver,
    ):
        assert driver.stdin is not None and driver.stdout is not None
        try:
            with suppress(BrokenPipeError), driver.stdin:
                json.dump(job, driver.stdin)
            for line in driver.stdout:
                yield json.loads(line)
            code = driver.wait()
        finally:
            _end(driver)
        if code:
            log.seek(0)
            said = [line for line in log.read().splitlines() if line.strip()]
            raise TrainingError(
                tr(
                    "Ray's driver ended with exit code {code}: {said}",
                    code=code,
                    said=said[-1][-_TOLD:] if said else "",
                ),
                mend=mend,
            )


def _starts_its_own() -> bool:
    """Whether Ray will find no cluster to join, as Ray itself looks for one."""
    address = os.environ.get("RAY_ADDRESS", "")
    temporary = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    return address == "local" or not (address or Path(temporary, "ray", "ray_current_cluster").exists())


def _end(driver: subprocess.Popen[str]) -> None:
    if driver.poll() is None:
        driver.terminate()
        try:
            driver.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            driver.kill()
