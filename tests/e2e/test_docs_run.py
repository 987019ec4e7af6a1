"""Every shell block of the README and of the tutorial is run as it stands, in order, in a copy of the checkout.

The copy's default recipe trains two steps on a few rows and asks one in fifty of the held-out questions, so that what
takes a reader a quarter of an hour takes a few minutes. `make test` is left out: it would run this test again.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.e2e.conftest import alive, session_of
from tests.unit.test_docs import GUIDE, ROOT, blocks

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1500)]

LEFT_OUT = ("make test",)
TYPED = "你是谁？\n/exit\n"
NOT_PASSED = 9
URL = "http://127.0.0.1:8000"


def commands(page: Path) -> list[str]:
    """The page's commands as a reader copies them, a line each; a block of output, which begins with a step, has none.

    A line that begins otherwise is an error: it would be left out of what is run.
    """
    shell = [block for block in blocks(page.read_text(encoding="utf-8")) if not re.match(r" *› ", block)]
    text = "".join(shell).replace("\\\n", " ")
    lines = [" ".join(line.split("    #")[0].split()) for line in text.splitlines() if line.strip()]
    unknown = [line for line in lines if not re.match(r"(make|namesake|mlflow|curl) ", line)]
    assert not unknown, f"nobody runs these lines of {page.name}: {unknown}"
    return lines


@pytest.mark.parametrize("line", ["python3 x.py", "source .venv/bin/activate", "  ┃ question", "cd docs"])
def test_a_line_that_nobody_runs_is_noticed(line: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"```bash\nmake run    # twice\n{line}\n```\n\n    › run\n      row\n", encoding="utf-8")
    with pytest.raises(AssertionError, match="nobody runs"):
        commands(page)
    page.write_text(page.read_text(encoding="utf-8").replace(line, ""), encoding="utf-8")
    assert commands(page) == ["make run"]


def test_the_readmes_commands_are_the_beginning_of_the_tutorials() -> None:
    tutorial = iter(commands(GUIDE / "tutorial.md"))
    readme = [line for line in commands(ROOT / "README.md") if line not in LEFT_OUT]
    assert readme == [line for line in commands(ROOT / "README.zh.md") if line not in LEFT_OUT] != []
    commands(GUIDE / "tutorial.zh.md")
    assert [line for line in readme if line not in tutorial] == []


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout that takes this environment for its own, and trains next to nothing."""
    copy = tmp_path_factory.mktemp("fresh") / "namesake"
    kept_out = shutil.ignore_patterns(".*", "output", "site", "mlruns", "mlartifacts", "mlflow.db*", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=kept_out)
    environment = copy / ".venv"
    environment.mkdir()
    for part in Path(sys.prefix).iterdir():
        if not part.name.startswith("."):
            (environment / part.name).symlink_to(part)
    for stamp in (".installed-cpu", ".installed-gpu"):
        (environment / stamp).touch()
    recipe = copy / "recipes" / "default.yaml"
    plan = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    plan |= {"dataset": "namesake/self-cognition#16", "replay": {"prompts": 0}, "held_out": 0.02}
    plan["sft"]["max_steps"] = 2
    recipe.write_text(yaml.safe_dump(plan, allow_unicode=True), encoding="utf-8")
    return copy


@pytest.fixture(scope="module")
def environment(checkout: Path) -> dict[str, str]:
    """What a reader's shell has after ``source .venv/bin/activate``, with a quick start of vLLM."""
    return {
        # Nor what `make test ARGS=…` hands to every make below it.
        **{k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "NAMESAKE_SERVE_", "MAKE", "MFLAGS"))},
        "PATH": f"{checkout / '.venv' / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": f"{checkout / 'src'}:{checkout / 'serving'}",
        "NAMESAKE_SERVE_EAGER": "true",
        "COLUMNS": "240",  # tables unbroken
    }


class Reader:
    """Somebody at two terminals: one for the server, one for the rest."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder, self.environment = folder, environment
        self.said: dict[str, str] = {}
        self.run_id = ""
        self.server: subprocess.Popen[str] | None = None

    def type(self, line: str) -> None:
        """A command; the ids that the page shows stand for those that were printed here."""
        line = re.sub(r"\bRUN_ID\b|\b[0-9a-f]{32}\b", self.run_id, line)
        if line == "make serve":
            self.serve(line)
            return
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=self.folder,
            env=self.environment,
            input=TYPED,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
            check=False,
        )
        self.said[line] = done.stdout
        wanted = NOT_PASSED if line.startswith("namesake gate") else 0
        assert done.returncode == wanted, f"{line}\n{done.stdout[-6000:]}"
        if found := re.search(r"run   ([0-9a-f]{32})", done.stdout):
            self.run_id = found[1]

    def serve(self, line: str) -> None:
        """Start the server and wait until it answers."""
        self.server = subprocess.Popen(
            ["bash", "-c", line],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.until_live(1)

    def until_live(self, number: int, seconds: float = 300) -> None:
        """Wait until the endpoint answers by the version."""
        assert self.server
        for _ in range(int(seconds * 4)):
            if self.server.poll() is not None:
                assert self.server.stdout
                raise AssertionError(self.server.stdout.read()[-6000:])
            try:
                with urllib.request.urlopen(f"{URL}/v1/version", timeout=5) as response:
                    if (json.load(response).get("live") or {}).get("version") == f"models:/ccb/{number}":
                        return
            except OSError:
                pass
            time.sleep(0.25)
        raise AssertionError(f"version {number} is not live after {seconds:.0f} s")

    def leave(self) -> None:
        """Ctrl-C in the server's terminal."""
        if self.server is None:
            return
        children = session_of(self.server.pid)
        if self.server.poll() is None:
            os.killpg(self.server.pid, signal.SIGINT)
            self.server.communicate(timeout=60)
        assert not [pid for pid in children if alive(pid)]


@pytest.fixture(scope="module")
def reader(checkout: Path, environment: dict[str, str]) -> Iterator[Reader]:
    with socket.socket() as free:
        if free.connect_ex(("127.0.0.1", 8000)) == 0:
            pytest.skip("something listens on port 8000, which the pages name")
    reader = Reader(checkout, environment)
    try:
        yield reader
    finally:
        reader.leave()


def test_every_command_does_what_the_page_says(reader: Reader) -> None:
    promotions = 0
    for line in commands(GUIDE / "tutorial.md"):
        reader.type(line)
        if line.startswith("make promote"):
            promotions += 1
            if promotions == 2:
                reader.until_live(2)
        if line.startswith("namesake rollback"):
            reader.until_live(1)
    gate, answer, history = (said_by(reader, program) for program in ("namesake gate", "curl", "namesake history"))
    assert "not passed:" in gate
    assert json.loads(answer[answer.index("{") : answer.rindex("}") + 1])["system_fingerprint"] == "ccb-v1"
    assert said_by(reader, "make chat").strip()
    assert "first version, Chinese still leaks" in history
    assert "a second version to move to" in history


def said_by(reader: Reader, program: str) -> str:
    """What the first command that begins so printed."""
    return next(text for line, text in reader.said.items() if line.startswith(program))
