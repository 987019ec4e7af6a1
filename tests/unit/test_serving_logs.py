"""What the server's log is like, and how much of it there is."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from typing import Literal

import pytest
import typer
from typer.testing import CliRunner

from namesake import cli
from namesake_serving import __main__ as serving
from namesake_serving import logs
from tests.unit.loops import within
from tests.unit.test_serving_gateway import CHAT, front


@pytest.fixture
def quiet() -> object:
    """The loggers as they were, afterwards."""
    root, alembic = logging.getLogger(), logging.getLogger("alembic")
    handlers, levels = root.handlers[:], (root.level, alembic.level)
    with warnings.catch_warnings():
        yield
        logging.captureWarnings(False)
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    alembic.setLevel(levels[1])


@pytest.mark.parametrize("form", ["text", "json"])
@pytest.mark.usefixtures("quiet")
@within(20)
async def test_each_request_is_a_line_with_its_id(
    form: Literal["text", "json"], capsys: pytest.CaptureFixture[str]
) -> None:
    logs.begin(form)
    async with front() as gate:
        reply = await gate.ask("POST", CHAT)
        await gate.at_rest()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if CHAT in line]
    if form == "text":
        assert f"INFO {reply.headers['x-request-id']} POST {CHAT} 200 ccb-v3" in line
        return
    found = json.loads(line)
    assert (found["level"], found["logger"], found["request"]) == (
        "info",
        "namesake.gateway",
        reply.headers["x-request-id"],
    )
    assert (found["method"], found["path"], found["status"], found["version"]) == ("POST", CHAT, 200, "ccb-v3")
    assert 0 < found["seconds"] < 5


@pytest.mark.parametrize(
    ("loudness", "told"),
    [
        ("quiet", ["a refusal"]),
        ("normal", ["a request", "a refusal"]),
        ("verbose", ["a request", "a refusal", "a migration", "an old way"]),
    ],
)
@pytest.mark.usefixtures("quiet")
def test_it_is_as_loud_as_was_asked(
    loudness: Literal["quiet", "normal", "verbose"], told: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    logs.begin("text", loudness)
    logging.getLogger("namesake.gateway").info("a request")
    logging.getLogger("namesake.gateway").warning("a refusal")
    logging.getLogger("alembic.runtime.migration").info("a migration")
    warnings.warn("an old way", DeprecationWarning, stacklevel=1)
    said = capsys.readouterr().err
    assert [one for one in ("a request", "a refusal", "a migration", "an old way") if one in said] == told


@pytest.mark.parametrize(("flag", "name"), [("-q", "quiet"), ("-v", "verbose")])
def test_namesake_hands_on_how_loud_it_is(flag: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str] = []
    monkeypatch.setattr(os, "execv", lambda _program, words: given.extend(words))
    CliRunner().invoke(cli.app, [flag, "serve", "models:/ccb/1", "--port", "8001"])
    assert given[:3] == [sys.executable, "-m", "namesake_serving"]
    params = typer.main.get_command(serving.app).make_context("serve", given[3:]).params
    assert (params["version"], params["port"]) == ("models:/ccb/1", "8001")
    assert {one: params[one] for one in ("quiet", "verbose")} == {"quiet": False, "verbose": False, name: True}


def test_quiet_and_verbose_exclude_each_other_also_on_either_side_of_serve() -> None:
    assert CliRunner().invoke(serving.app, ["--quiet", "-v"]).exit_code == 2


def test_an_exception_and_line_breaks_stay_within_their_line() -> None:
    try:
        raise ValueError("a\nb")
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, "", 0, "über\n%s", ("踩",), __import__("sys").exc_info())
    line = logs.Json().format(record)
    assert "\n" not in line
    found = json.loads(line)
    assert found["message"] == "über\n踩"
    assert found["exception"].endswith("ValueError: a\nb")
