"""What a person sees: plain lines where the output is piped, a bar where it is a terminal."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from namesake.terminal import Screen

NASTY = "[bold]not bold[/bold] [red] {x} $(touch x) \\[ 踩踩背 :smile: https://x.y/z 'a' 3.14"


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the terminal's clock shows, in seconds; the test moves it."""
    shown = [0.0]
    monkeypatch.setattr("namesake.terminal.time", SimpleNamespace(monotonic=lambda: shown[0]))
    return shown


def test_a_line_is_shown_as_it_is_and_never_read_as_markup(capfd: pytest.CaptureFixture[str]) -> None:
    Screen().line(NASTY)
    assert capfd.readouterr().out == f"{NASTY}\n"


def test_a_long_line_is_not_broken(capfd: pytest.CaptureFixture[str]) -> None:
    text = " ".join(["models:/ccb/3"] * 60)
    Screen().line(text)
    assert capfd.readouterr().out == f"{text}\n"


def test_steps_and_warnings_bear_their_marks_and_no_colour_where_the_output_is_piped(
    capfd: pytest.CaptureFixture[str],
) -> None:
    screen = Screen()
    screen.step(f"training {NASTY}")
    screen.warn(f"no row has a name {NASTY}")
    assert capfd.readouterr().out == f"› training {NASTY}\n! no row has a name {NASTY}\n"


def test_what_is_printed_before_a_screen_is_opened_comes_before_it(capfd: pytest.CaptureFixture[str]) -> None:
    print("first")
    Screen().line("second")
    assert capfd.readouterr().out == "first\nsecond\n"


def test_a_table_holds_its_title_headings_and_cells_as_they_are(capfd: pytest.CaptureFixture[str]) -> None:
    Screen().table(("question", "before", "after"), [("[red]谁？", "{{NAME}}", "踩踩背")], title="Replies")
    said = capfd.readouterr().out
    for text in ("Replies", "question", "before", "after", "[red]谁？", "{{NAME}}", "踩踩背"):
        assert text in said


def test_no_character_of_a_long_cell_is_lost(capfd: pytest.CaptureFixture[str]) -> None:
    reply = "我是踩踩背，由老爷爷开发，" * 40
    Screen().table(("before", "after"), [("x", reply)])
    said = capfd.readouterr().out
    assert "".join(c for c in said if c in "我是踩背，由老爷开发") == reply


def test_a_screen_goes_on_when_the_standard_output_is_sent_elsewhere(tmp_path: Path) -> None:
    program = """
import os, sys
from namesake.terminal import Screen
screen = Screen()
log = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
os.dup2(log, 1)
print("347 arguments", flush=True)
screen.line(chr(0x8E29))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "log")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "LC_ALL": "C", "PYTHONUTF8": "0"},
        capture_output=True,
        check=True,
    )
    assert done.stdout.decode("utf-8") == "踩\n"
    assert (tmp_path / "log").read_text(encoding="utf-8") == "347 arguments\n"


def test_a_piped_bar_is_silent_while_it_is_quick(capfd: pytest.CaptureFixture[str]) -> None:
    with Screen().bar("train", 3) as bar:
        for done in range(4):
            bar.advance(done)
    assert capfd.readouterr().out == ""


def test_a_piped_bar_is_a_line_every_ten_seconds(capfd: pytest.CaptureFixture[str], now: list[float]) -> None:
    now[0] = 100.0
    with Screen().bar("train", 40) as bar:
        for done in range(41):
            bar.advance(done, "loss [0.5]")
            now[0] += 1
    assert capfd.readouterr().out == "".join(f"  train {done}/40 loss [0.5]\n" for done in (10, 20, 30, 40))


def test_a_bar_takes_a_total_that_becomes_known_later(capfd: pytest.CaptureFixture[str], now: list[float]) -> None:
    with Screen().bar("train", 1) as bar:
        bar.advance(0, total=90)
        now[0] = 10.0
        bar.advance(30)
    assert capfd.readouterr().out == "  train 30/90\n"


def test_on_a_terminal_the_bar_shows_title_count_and_note() -> None:
    program = """
from namesake.terminal import Screen
with Screen().bar("train", 1) as bar:
    bar.advance(2, "loss 0.125", total=4)
    bar.advance(4, "loss 0.0625")
"""
    leader, follower = pty.openpty()
    environment = {k: v for k, v in os.environ.items() if k not in {"NO_COLOR", "TERM"}}
    try:
        subprocess.run(
            [sys.executable, "-c", program],
            env={**environment, "PYTHONPATH": os.pathsep.join(sys.path), "TERM": "xterm", "COLUMNS": "120"},
            stdout=follower,
            stderr=follower,
            check=True,
        )
        said = os.read(leader, 1 << 16).decode("utf-8")
    finally:
        os.close(leader)
        os.close(follower)
    for text in ("train", "4/4", "loss 0.0625"):
        assert text in said
