"""What a person sees: plain lines where the output is piped, a bar where it is a terminal."""

from __future__ import annotations

import logging
import os
import pty
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

from namesake.messages import tr
from namesake.terminal import Loudness, Screen, loudness, moment, padded

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


def test_quiet_leaves_results_and_warnings(capfd: pytest.CaptureFixture[str]) -> None:
    with loudness(Loudness.QUIET):
        screen = Screen()
        screen.step("step")
        screen.line("line")
        with screen.bar("train", 1) as bar:
            bar.advance(1)
        screen.warn("warning")
        screen.result("result")
    Screen().line("loud again")
    assert capfd.readouterr().out == "! warning\nresult\nloud again\n"


def test_what_a_screen_says_is_in_the_users_language_and_what_models_say_is_not(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NAMESAKE_LANG", "zh")
    screen = Screen()
    screen.step("training")
    screen.warn(tr("{uri} is not served: {why}", uri="models:/ccb/3", why="damaged"))
    screen.result(tr("  version {uri}", uri="models:/ccb/3"))
    screen.table(("question", "reply", "fault"), [("training", "passed", tr("leak"))])
    said = capfd.readouterr().out
    assert said.startswith("› 训练\n! models:/ccb/3 没有被服务：damaged\n  版本    models:/ccb/3\n")
    assert [*re.findall(r"[│┃] (\S+)", said)] == ["问题", "回答", "故障", "training", "passed", "泄漏"]


def test_columns_are_lined_up_by_what_the_terminal_shows() -> None:
    assert padded("问题", 6) + "|" == "问题  |"
    assert padded("question", 6) == "question"


def test_a_table_is_a_result(capfd: pytest.CaptureFixture[str]) -> None:
    with loudness(Loudness.QUIET):
        Screen().table(("question",), [("谁？",)])
    assert "谁？" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("wanted", "told"),
    [
        (Loudness.QUIET, {"an error"}),
        (Loudness.NORMAL, {"an error", "a warning", "a user warning"}),
        (Loudness.VERBOSE, {"an error", "a warning", "a user warning", "some news", "a deprecation"}),
    ],
)
def test_what_libraries_say_is_let_through_by_loudness(wanted: Loudness, told: set[str]) -> None:
    program = """
import logging, sys, types, warnings
from namesake.terminal import Loudness, loudness
with loudness(Loudness[sys.argv[1]]):
    log = logging.getLogger("library")
    log.info("some news")
    log.warning("a warning")
    log.error("an error")
    warnings.warn("a user warning")
    warnings.warn_explicit("a deprecation", DeprecationWarning, "library.py", 1)
"""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONWARNINGS"}
    said = subprocess.run(
        [sys.executable, "-c", program, wanted.name],
        env={**environment, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    every = {"an error", "a warning", "a user warning", "some news", "a deprecation"}
    assert {text for text in every if f"{text}\n" in said} == told


def test_loudness_ends_with_its_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_LOGGING_LEVEL", raising=False)

    def state() -> object:
        last = logging.lastResort
        root = logging.getLogger()
        return root.level, list(root.handlers), last and last.level, list(warnings.filters), dict(os.environ)

    before = state()
    for wanted in Loudness:
        with loudness(wanted):
            assert (state() == before) is (wanted is Loudness.NORMAL)
            assert os.environ.get("MLFLOW_LOGGING_LEVEL") == ("ERROR" if wanted is Loudness.QUIET else None)
        assert state() == before


def test_a_moment_is_told_with_its_zone() -> None:
    assert moment(0.9)[10:19] in moment(0.0)
    assert moment(0.0)[-6] in "+-"


def printed(program: str, **environment: str) -> str:
    """What the program prints on a terminal."""
    leader, follower = pty.openpty()
    kept = {k: v for k, v in os.environ.items() if k not in {"NO_COLOR", "FORCE_COLOR", "TERM"}}
    try:
        subprocess.run(
            [sys.executable, "-c", program],
            env={**kept, "PYTHONPATH": os.pathsep.join(sys.path), "TERM": "xterm", "COLUMNS": "120", **environment},
            stdout=follower,
            stderr=follower,
            check=True,
        )
        return os.read(leader, 1 << 16).decode("utf-8")
    finally:
        os.close(leader)
        os.close(follower)


def test_colours_are_for_terminals_whose_user_wants_them() -> None:
    program = 'from namesake.terminal import Screen; Screen().warn("no row has a name")'
    assert "\x1b[1;33m" in printed(program)
    said = printed(program, NO_COLOR="1")
    assert "no row has a name" in said
    assert "33m" not in said


def test_on_a_terminal_the_bar_shows_title_count_and_note() -> None:
    said = printed("""
from namesake.terminal import Screen
with Screen().bar("train", 1) as bar:
    bar.advance(2, "loss 0.125", total=4)
    bar.advance(4, "loss 0.0625")
""")
    for text in ("train", "4/4", "loss 0.0625"):
        assert text in said
