"""A conversation in the terminal: what is sent with each question, and what ends it."""

from __future__ import annotations

import io
import signal
from collections.abc import Callable, Iterator, Sequence

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
