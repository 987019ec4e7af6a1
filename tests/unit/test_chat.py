"""A conversation in the terminal: what is sent with each question, and what ends it."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from namesake import chat
from namesake.corpus import Message
from namesake.errors import ServingError


class Model:
    """Answers by a number; keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[Message]] = []

    def __call__(self, dialogue: Sequence[Message]) -> Iterator[str]:
        """The reply, in two pieces. Ctrl-C comes between them where the question says so."""
        self.asked.append([dict(message) for message in dialogue])
        question = dialogue[-1]["content"]
        if question == "refuse":
            raise ServingError("It is full.", mend="Wait.")
        yield "reply "
        if question == "interrupt":
            signal.raise_signal(signal.SIGINT)
        yield f"{len(self.asked)}"


class Keyboard(io.StringIO):
    """What somebody types, a line each; ``^C`` is Ctrl-C, and the end is Ctrl-D."""

    def readline(self, size: int | None = -1, /) -> str:
        """The next line."""
        line = super().readline(-1 if size is None else size)
        if line == "^C\n":
            signal.raise_signal(signal.SIGINT)
        return line


@pytest.fixture(autouse=True)
def deaf() -> Iterator[None]:
    """Ctrl-C does nothing unless the conversation sees to it."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


Talk = Callable[..., Model]


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch) -> Talk:
    """Have somebody type the lines; the model that was talked to."""

    def typed(*lines: str, system: str | None = None) -> Model:
        monkeypatch.setattr("sys.stdin", Keyboard("".join(f"{line}\n" for line in lines)))
        model = Model()
        chat.talk(model, system=system)
        return model

    return typed


def texts(dialogue: Sequence[Message]) -> list[str]:
    """What was said, without by whom."""
    return [message["content"] for message in dialogue]


def test_each_question_is_sent_with_all_that_was_said_before(talk: Talk) -> None:
    model = talk("one", "two", "three")
    assert [len(asked) for asked in model.asked] == [1, 3, 5]
    assert [message["role"] for message in model.asked[-1]] == ["user", "assistant", "user", "assistant", "user"]
    assert texts(model.asked[-1]) == ["one", "reply 1", "two", "reply 2", "three"]


def test_new_forgets_what_was_said_and_keeps_the_system_prompt(talk: Talk) -> None:
    model = talk("one", "/new", "two", "three", system="Be brief.")
    assert [texts(asked) for asked in model.asked] == [
        ["Be brief.", "one"],
        ["Be brief.", "two"],
        ["Be brief.", "two", "reply 2", "three"],
    ]
    assert all(asked[0]["role"] == "system" for asked in model.asked)


def test_exit_ends_and_nothing_more_is_asked(talk: Talk) -> None:
    model = talk("one", " /exit ", "two")
    assert [texts(asked) for asked in model.asked] == [["one"]]


def test_an_empty_line_asks_nothing(talk: Talk) -> None:
    model = talk("", "   ", "one", "")
    assert [texts(asked) for asked in model.asked] == [["one"]]


def test_ctrl_c_stops_a_reply_and_the_conversation_goes_on_without_it(talk: Talk) -> None:
    model = talk("one", "interrupt", "two", "interrupt", "three")
    assert texts(model.asked[-1]) == ["one", "reply 1", "two", "reply 3", "three"]
    assert [len(asked) for asked in model.asked] == [1, 3, 3, 5, 5]


def test_ctrl_c_at_the_prompt_only_gives_a_new_one(talk: Talk) -> None:
    model = talk("one", "^C", "two", "^C", "/exit")
    assert [texts(asked) for asked in model.asked] == [["one"], ["one", "reply 1", "two"]]


def test_a_question_that_was_refused_is_told_and_forgotten(talk: Talk) -> None:
    model = talk("one", "refuse", "two")
    assert texts(model.asked[-1]) == ["one", "reply 1", "two"]


def test_replies_are_printed_as_they_come_and_what_stopped_one_too(
    talk: Talk, capsys: pytest.CaptureFixture[str]
) -> None:
    talk("one", "interrupt", "refuse")
    out, err = capsys.readouterr()
    assert out == "> reply 1\n> reply   (stopped)\n> > \n"
    assert "/new" in err
    assert "It is full." in err
    assert "Wait." in err


@contextmanager
def listing(*models: dict[str, Any], cut: bool = False) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """An endpoint with these models, which streams a word; what it was asked. ``cut``: it ends in the middle."""
    asked: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            body = json.dumps({"object": "list", "data": models}).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            self.send_header("transfer-encoding", "chunked")
            self.end_headers()
            choice = {"index": 0, "delta": {"content": "blue"}, "finish_reason": None}
            made = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
            for event in (f"data: {json.dumps(made)}\n\n", *([] if cut else ["data: [DONE]\n\n", ""])):
                self.wfile.write(f"{len(event):x}\r\n{event}\r\n".encode())
            self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/v1", asked
        finally:
            server.shutdown()


def entry(name: str, root: str, owner: str = "namesake", **more: object) -> dict[str, Any]:
    """An entry of /v1/models."""
    return {"id": name, "object": "model", "created": 1, "owned_by": owner, "root": root, **more}


BASE = entry("SmolLM2", "SmolLM2")
HELLO: list[Message] = [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize("models", [[], [BASE]], ids=["none", "the base alone"])
def test_while_no_version_is_there_it_is_said_and_no_base_is_asked_in_its_place(models: list[dict[str, Any]]) -> None:
    with listing(*models) as (url, asked), pytest.raises(ServingError, match="serves no model") as caught:
        list(chat.endpoint(url)(HELLO))
    assert "namesake status" in caught.value.mend
    assert not asked


@pytest.mark.parametrize(
    ("models", "name"),
    [
        ([entry("ccb", "ccb-v1"), entry("ccb-v1", "ccb-v1", namesake={}), BASE], "ccb"),
        ([BASE, entry("ccb-v1", "ccb-v1", namesake={"version": "models:/ccb/1"})], "ccb-v1"),
        ([entry("qwen", "qwen", "vllm")], "qwen"),
        ([{"id": "gpt", "object": "model", "created": 1, "owned_by": "openai"}], "gpt"),
    ],
    ids=lambda given: str(given) if isinstance(given, str) else "",
)
def test_the_first_model_is_asked_and_how_long_it_may_answer_is_the_servers_to_say(
    models: list[dict[str, Any]], name: str
) -> None:
    with listing(*models) as (url, asked):
        assert list(chat.endpoint(url)(HELLO)) == ["blue"]
    assert asked == [{"model": name, "messages": HELLO, "stream": True, "temperature": 0.0}]


def test_a_reply_that_is_cut_is_told_as_such_on_a_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    with (
        listing(entry("ccb", "ccb-v1"), cut=True) as (url, _),
        pytest.raises(ServingError, match="lost in the middle of the reply"),
    ):
        chat.once(chat.endpoint(url), "Hi")
    assert capsys.readouterr().out == "blue\n"


def test_what_is_pasted_is_one_question_whatever_lines_it_has() -> None:
    program = (
        "import sys; from namesake import chat\n"
        "chat.talk(lambda dialogue: iter(['<' + repr(dialogue[-1]['content']) + '>']))"
    )
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    ) as talking:
        os.close(theirs)
        seen = b""

        def until(what: bytes) -> None:
            nonlocal seen
            while what not in seen:
                part = os.read(ours, 4096)
                assert part
                seen += part

        until(b"> ")
        os.write(ours, b"\x1b[200~def f():\n    return 1\n/exit\x1b[201~")
        os.write(ours, b"\r")
        until(b"'>")
        os.write(ours, b"/exit\r")
        with suppress(OSError):
            while part := os.read(ours, 4096):
                seen += part
        assert talking.wait(10) == 0
    os.close(ours)
    assert rb"<'def f():\n    return 1\n/exit'>" in seen
