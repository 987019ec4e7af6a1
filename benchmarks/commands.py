"""namesake's commands as a benchmark calls them: this checkout, in a folder with a tracking store of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def environment(store: Path, uri: str = "") -> dict[str, str]:
    """Environment of namesake's commands with the store in the folder, or at the address."""
    return {
        **os.environ,
        "MLFLOW_TRACKING_URI": uri or f"sqlite:///{store}/mlflow.db",
        "PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'serving'}",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "COLUMNS": "200",
        "NAMESAKE_LANG": "en",
    }


def namesake(store: Path, *words: str, uri: str = "") -> str:
    """A command's output; ends the benchmark with it when the command fails."""
    done = subprocess.run(
        [sys.executable, "-m", "namesake", *words],
        cwd=store,
        env=environment(store, uri),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done.stdout


def seconds_of(command: Callable[[], object]) -> float:
    """Wall time."""
    start = time.perf_counter()
    command()
    return time.perf_counter() - start


def run_id(output: str) -> str:
    """The run that `namesake run` tells of."""
    found = re.search(r"run   ([0-9a-f]{32})", output)
    assert found, output
    return found[1]
