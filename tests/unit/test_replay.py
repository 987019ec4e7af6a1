"""Replay: the base model's replies to plain prompts, asked for once, cut where a reply may end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from namesake.corpus import Message, Prompt
from namesake.generate import Reply
from namesake.replay import Dialogue, replay_rows, usable


class Parrot:
    """A replier that says the last message back; remembers what it was asked."""

    slow = True

    def __init__(self, replies: Sequence[Reply] | None = None) -> None:
        self.asked: list[list[Message]] = []
        self.limits: list[int] = []
        self._replies = replies

    def replies(
        self,
        dialogues: Sequence[Sequence[Message]],
        *,
        max_new_tokens: int,
        progress: Callable[[int], None] | None = None,
    ) -> list[Reply]:
        """One reply per dialogue."""
        self.asked += [list(dialogue) for dialogue in dialogues]
        self.limits.append(max_new_tokens)
        if progress:
            progress(len(dialogues))
        if self._replies is not None:
            return list(self._replies)
        return [Reply(f"You said: {dialogue[-1]['content']}", True) for dialogue in dialogues]


def prompts(*questions: str) -> list[Prompt]:
    """Plain prompts of one message."""
    return [
        Prompt(f"p{number}", "en", "smalltalk", ({"role": "user", "content": question},))
        for number, question in enumerate(questions)
    ]


def rows(
    parrot: Parrot,
    asked: Sequence[Prompt],
    cache: Path,
    *,
    system: str | None = None,
    tokens: int = 64,
    digest: str = "d",
    progress: Callable[[int, int], None] | None = None,
) -> list[Dialogue]:
    """Replay rows from the parrot."""
    return replay_rows(
        lambda: parrot,
        asked,
        systems=[system] * len(asked),
        max_new_tokens=tokens,
        base_digest=digest,
        cache=cache,
        progress=progress,
    )


def test_every_prompt_becomes_a_dialogue_that_ends_with_the_models_reply(tmp_path: Path) -> None:
    assert rows(Parrot(), prompts("Hi", "你好"), tmp_path) == [
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "You said: Hi"}],
        [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "You said: 你好"}],
    ]


def test_the_model_is_asked_under_the_system_prompt_that_the_rows_do_not_hold(tmp_path: Path) -> None:
    parrot = Parrot()
    made = rows(parrot, prompts("Hi"), tmp_path, system="Be kind.", tokens=17)
    assert parrot.asked == [[{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]]
    assert parrot.limits == [17]
    assert [message["role"] for message in made[0]] == ["user", "assistant"]


@pytest.mark.parametrize(
    "text",
    [
        'Hello.\n\r\n你好 {{x}} \\ "q" 🐈',
        pytest.param(
            "One.\u2028Two.",
        ),
        pytest.param(
            "One.\u2029Two.",
        ),
        pytest.param(
            "One.\x85Two.",
        ),
    ],
)
def test_the_model_is_not_opened_again_for_replies_that_are_there(tmp_path: Path, text: str) -> None:
    first = rows(Parrot([Reply(text, True)]), prompts("Hi"), tmp_path)

    def refuse() -> Parrot:
        raise AssertionError("the model was opened")

    again = replay_rows(refuse, prompts("Hi"), systems=[None], max_new_tokens=64, base_digest="d", cache=tmp_path)
    assert again == first


@pytest.mark.parametrize(
    "change",
    [{"digest": "other"}, {"tokens": 65}, {"system": "Be kind."}],
    ids=["base", "token limit", "system prompt"],
)
def test_replies_of_another_base_or_other_settings_are_asked_for_anew(
    tmp_path: Path, change: dict[str, object]
) -> None:
    rows(Parrot(), prompts("Hi"), tmp_path)
    parrot = Parrot()
    rows(parrot, prompts("Hi"), tmp_path, **change)  # type: ignore[arg-type]
    assert len(parrot.asked) == 1


def test_other_prompts_are_asked_for_anew(tmp_path: Path) -> None:
    rows(Parrot(), prompts("Hi"), tmp_path)
    assert rows(Parrot(), prompts("Hello"), tmp_path)[0][-1]["content"] == "You said: Hello"


def test_a_prompt_whose_reply_cannot_be_used_leaves_its_place_empty(tmp_path: Path) -> None:
    parrot = Parrot([Reply("Fine.", True), Reply("an endless", False), Reply("One. Two", False)])
    made = rows(parrot, prompts("a", "b", "c"), tmp_path)
    assert [row and (row[0]["content"], row[-1]["content"]) for row in made] == [("a", "Fine."), [], ("c", "One.")]


def test_progress_is_told_with_the_number_of_prompts(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    rows(Parrot(), prompts("a", "b", "c"), tmp_path, progress=lambda done, total: told.append((done, total)))
    assert told == [(3, 3)]


def test_no_half_written_file_stays_beside_the_kept_replies(tmp_path: Path) -> None:
    rows(Parrot(), prompts("a"), tmp_path)
    assert [path.suffix for path in tmp_path.rglob("*") if path.is_file()] == [".jsonl"]


@given(st.text())
def test_a_finished_reply_is_used_whole(text: str) -> None:
    assert usable(Reply(text, True)) == text


@given(st.text(alphabet="ab .,!?;:。！？，、；：\n3", max_size=40))
def test_of_a_cut_reply_only_its_beginning_is_used(text: str) -> None:
    kept = usable(Reply(text, False))
    assert text.strip().startswith(kept)


@given(st.text(alphabet="ab ", max_size=20), st.text(alphabet="ab ", max_size=20))
def test_of_a_cut_reply_whole_sentences_are_used(first: str, second: str) -> None:
    assert usable(Reply(f"x{first}. {second}", False)) == f"x{first}."
    assert usable(Reply(f"x{first}。{second}", False)) == f"x{first}。"


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("The sun is a star. The moon is", "The sun is a star."),
        ("Really! Is it? Well, I", "Really! Is it?"),
        ("太阳是恒星。月亮是", "太阳是恒星。"),
        ("Pi is 3.14 and so", ""),
        ("Pi is 3.14, and so", "Pi is 3.14"),
        ("red, green, and bl", "red, green"),
        ("红色、绿色、蓝", "红色、绿色"),
        ("first line\nsecond", "first line"),
        ("no end in sight", ""),
        ("", ""),
        pytest.param(
            "1. Solar power\n2. Wind power\n3.",
            "1. Solar power\n2. Wind power",
        ),
        pytest.param(
            "Sources:\n1. The sun and",
            "Sources:",
        ),
    ],
)
def test_a_cut_reply_ends_where_a_sentence_or_else_a_clause_ends(text: str, kept: str) -> None:
    assert usable(Reply(text, False)) == kept


def test_each_prompt_is_answered_under_its_own_system_prompt(tmp_path: Path) -> None:
    parrot = Parrot()
    replay_rows(
        lambda: parrot,
        prompts("One", "Two", "Three"),
        systems=["Be kind.", None, ""],
        max_new_tokens=8,
        base_digest="d",
        cache=tmp_path,
    )
    assert [d[0]["content"] if d[0]["role"] == "system" else None for d in parrot.asked] == ["Be kind.", None, ""]
