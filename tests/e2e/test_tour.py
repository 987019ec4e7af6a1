"""The notebook, executed; and what it leaves running when it is killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import urllib.request

import pytest
from nbformat import NotebookNode

from tests.e2e.conftest import Way, alive, session_of

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1500)]


def printed(cell: NotebookNode) -> str:
    """What a cell shows, library's warnings left out."""
    shown = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in cell.outputs]
    return "".join(text for text, output in zip(shown, cell.outputs, strict=True) if output.get("name") != "stderr")


def test_every_cell_of_the_notebook_shows_what_it_should(tour: NotebookNode) -> None:
    shown = {cell.source: printed(cell) for cell in tour.cells if cell.cell_type == "code"}

    def of(words: str) -> str:
        return next(text for source, text in shown.items() if words in source)

    assert "› training" in of("namesake.train(")
    assert "name and author swapped" in of("namesake.train(")
    assert "swift" not in of("namesake.train(")  # ms-swift's own output is in its log
    assert not any("\x1b" in text for text in shown.values())
    assert "你是谁？是由谁开发的？" in of("trained.compared()")
    assert re.search(r"identity +\d+% +\d+%", of("trained.before.metrics"))
    version = re.search(r"models:/ccb/(\d+)', False, True", of("namesake.promote("))
    assert version
    assert "every digest is right" in of("registry.verify(")
    assert "'a tour with few rows'" in of("registry.history(")
    assert f"ccb-v{version[1]}: " in of("namesake.serve(")


def test_a_killed_python_leaves_no_server(way: Way) -> None:
    program = (
        "import namesake, time\n"
        "server = namesake.serve('models:/ccb/1', port=0, eager=True)\n"
        "print(server.pid, server.url, flush=True)\n"
        "time.sleep(600)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=way.place.folder, env=way.place.env, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout
        pid, url = process.stdout.readline().split()
        until(lambda: answers(f"{url}/health"), 60)
        until(lambda: len(session_of(int(pid))) > 0, 60)  # vLLM
        started = [int(pid), *session_of(int(pid))]
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    until(lambda: not [one for one in started if alive(one)], 60)


def until(holds: object, seconds: float) -> None:
    """Wait until it holds."""
    assert callable(holds)
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.2)


def answers(url: str) -> bool:
    """Whether there is an answer."""
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except OSError:
        return False
