"""What the server's log is like."""

from __future__ import annotations

import json
import logging
from typing import Literal

import pytest

from namesake_serving import logs
from tests.unit.loops import within
from tests.unit.test_serving_gateway import CHAT, front


@pytest.fixture
def quiet() -> object:
    """The root logger as it was, afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


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
