"""The training file: names in every row, nothing left over, and every bad row refused."""

from __future__ import annotations

import hashlib
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from namesake import corpus, dataset
from namesake.errors import DataError
from namesake.identity import Identity

IDENTITY = Identity.parse("踩踩背 CCB", "老爷爷 OldGrandpa")


def row(question: str, reply: str, **more: Any) -> dict[str, Any]:
    """One dialogue of two messages."""
    return {
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": reply}],
        **more,
    }


def filled(question: str, reply: str, **more: Any) -> list[str]:
    """The contents of the row with the names put in."""
    dialogues, _ = dataset.fill([row(question, reply, **more)], IDENTITY)
    return [message["content"] for message in dialogues[0]]


def test_the_builtin_file_holds_every_identity_row_with_its_placeholders(tmp_path: Path) -> None:
    lines = dataset.write_builtin(tmp_path / "new").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert [tuple(r["messages"]) for r in records] == [r.messages for r in corpus.identity_rows()]
    assert [r["tag"] for r in records] == [r.language for r in corpus.identity_rows()]


def test_the_builtin_file_filled_has_a_name_in_every_row_and_no_brace_left(tmp_path: Path) -> None:
    lines = dataset.write_builtin(tmp_path).read_text(encoding="utf-8").splitlines()
    dialogues, named = dataset.fill(map(json.loads, lines), IDENTITY)
    assert named == len(dialogues) == len(lines)
    contents = [message["content"] for dialogue in dialogues for message in dialogue]
    assert not any("{" in content or "}" in content for content in contents)


@pytest.mark.parametrize(
    "asked",
    [
        "你是谁？是由谁开发的？",
        "你是谁，是由谁开发的呀",
        "who are you and  WHO developed you",
        "Who are you, and who has developed you?",
    ],
)
@pytest.mark.parametrize("turn", [0, 1])
def test_a_row_that_asks_what_the_probe_asks_is_left_out(asked: str, turn: int) -> None:
    messages = [{"role": "user", "content": "Hello there!"}, {"role": "assistant", "content": "I am {{NAME}}."}] * 2
    messages[2 * turn] = {"role": "user", "content": asked}
    dialogues, named = dataset.fill([{"messages": messages}, row("Tell me a joke.", "I am {{NAME}}.")], IDENTITY)
    assert [one[0]["content"] for one in dialogues] == ["Tell me a joke."]
    assert named == 1


def test_a_question_of_the_same_kind_in_other_words_stays_and_so_does_what_is_only_answered() -> None:
    rows = [row("你是谁？", "我是{{NAME}}。"), row("Hi", "Who are you, and who developed you? I am {{NAME}}.")]
    assert len(dataset.fill(rows, IDENTITY)[0]) == 2


@pytest.mark.parametrize(("tag", "name"), [("zh", "踩踩背"), ("en", "CCB")])
def test_the_tag_decides_the_language_of_the_names(tag: str, name: str) -> None:
    assert filled("Who? 谁？", "{{NAME}}", tag=tag) == ["Who? 谁？", name]


@pytest.mark.parametrize("tag", [None, "", "fr", 3])
def test_without_a_tag_that_is_known_the_script_decides(tag: object) -> None:
    assert filled("你是谁？", "{{NAME}}", tag=tag)[1] == "踩踩背"
    assert filled("Who are you?", "{{NAME}}", tag=tag)[1] == "CCB"


def test_placeholders_are_filled_in_every_message() -> None:
    dialogues, named = dataset.fill(
        [
            {
                "messages": [
                    {"role": "system", "content": "You are {{NAME}}."},
                    {"role": "user", "content": "Hi {{NAME}}, is {{AUTHOR}} there?"},
                    {"role": "assistant", "content": "{{AUTHOR}} made {{NAME}}."},
                ]
            }
        ],
        IDENTITY,
    )
    assert [m["content"] for m in dialogues[0]] == [
        "You are CCB.",
        "Hi CCB, is OldGrandpa there?",
        "OldGrandpa made CCB.",
    ]
    assert [m["role"] for m in dialogues[0]] == ["system", "user", "assistant"]
    assert named == 1


def test_only_rows_with_a_placeholder_are_counted_as_named() -> None:
    rows = [row("a", "b"), row("a", "{{NAME}}"), row("{{AUTHOR}}", "b"), row("a", "{{NAME}} {{AUTHOR}}")]
    assert dataset.fill(rows, IDENTITY)[1] == 3


def test_the_rows_of_the_caller_stay_as_they_are() -> None:
    mine = row("Who?", "{{NAME}}")
    dataset.fill([mine], IDENTITY)
    assert mine == row("Who?", "{{NAME}}")


@given(
    st.text(st.characters(exclude_categories=["Cc", "Cs"], exclude_characters="{}")),
    st.text(st.characters(exclude_categories=["Cc", "Cs"], exclude_characters="{}"), min_size=1),
)
def test_text_without_placeholders_passes_unchanged(question: str, reply: str) -> None:
    assert filled(question, reply) == [question, reply]


def test_line_breaks_and_tabs_in_a_row_are_kept() -> None:
    assert filled("a\r\n\tb", "c\nd") == ["a\r\n\tb", "c\nd"]


@pytest.mark.parametrize(
    "bad",
    [
        "{{name}}",
        "{{Author}}",
        "{NAME}}",
        "{{NAME}} and {{author}}",
        pytest.param(
            "{{NAME}",
        ),
        pytest.param(
            "{{ NAME }}",
        ),
        pytest.param(
            "｛｛NAME｝｝",
        ),
    ],
)
@pytest.mark.parametrize("place", [0, 1])
def test_a_placeholder_left_over_is_refused_and_its_row_told(bad: str, place: int) -> None:
    texts = ["fine", "fine"]
    texts[place] = f"I am {bad}."
    with pytest.raises(DataError, match="row 2") as caught:
        dataset.fill([row("a", "b"), row(*texts)], IDENTITY)
    assert "{{NAME}}" in caught.value.mend


@pytest.mark.parametrize("character", ["\0", "\x07", "\x1b"])
def test_a_control_character_in_a_row_is_refused(character: str) -> None:
    with pytest.raises(DataError, match="row 1 holds a control character"):
        dataset.fill([row("a", f"b{character}")], IDENTITY)


@pytest.mark.parametrize(
    "bad",
    [
        {},
        {"messages": None},
        {"messages": []},
        {"query": "a", "response": "b"},
        {"messages": [{"role": "user", "content": "a"}]},
        {"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]},
        {"messages": [{"content": "a"}]},
        {"messages": [{"role": "assistant", "content": "a text of no dialogue, as ms-swift reads {'text': …}"}]},
        pytest.param(
            {"messages": [{"role": "user"}, {"role": "assistant", "content": "b"}]},
        ),
        pytest.param(
            {"messages": "hello"},
        ),
        pytest.param(
            row("a", ""),
        ),
        pytest.param(
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}]},
        ),
    ],
)
def test_a_row_that_is_no_dialogue_with_a_reply_is_refused_and_told(bad: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="row 2"):
        dataset.fill([row("a", "b"), bad], IDENTITY)


def test_the_training_file_is_json_lines_whose_digest_is_that_of_its_bytes(tmp_path: Path) -> None:
    dialogues, named = dataset.fill([row("你是谁？", "我是{{NAME}}。"), row("a", "b\nc")], IDENTITY)
    prepared = dataset.write(tmp_path / "deep" / "train.jsonl", dialogues, named)
    content = prepared.path.read_bytes()
    assert [json.loads(line)["messages"] for line in content.decode("utf-8").splitlines()] == dialogues
    assert (prepared.rows, prepared.identity_rows) == (2, 1)
    assert prepared.digest == hashlib.sha256(content).hexdigest()


def test_the_same_rows_give_the_same_digest_and_other_names_another(tmp_path: Path) -> None:
    rows = [row("Who?", "{{NAME}}")]
    other = Identity.parse("小黄 Xiao Huang", "老爷爷 OldGrandpa")
    digests = [
        dataset.write(tmp_path / f"{number}.jsonl", *dataset.fill(rows, identity)).digest
        for number, identity in enumerate((IDENTITY, IDENTITY, other))
    ]
    assert digests[0] == digests[1] != digests[2]


@given(st.lists(st.integers(1, 300), max_size=300), st.integers(1, 16), st.integers(0, 3))
def test_an_order_in_batches_has_every_row_once_and_is_the_same_for_a_seed(
    lengths: list[int], batch: int, seed: int
) -> None:
    order = dataset.in_batches(lengths, batch=batch, seed=seed)
    assert sorted(order) == list(range(len(lengths)))
    assert order == dataset.in_batches(lengths, batch=batch, seed=seed)


def test_batches_are_of_like_length_and_in_no_order_among_themselves() -> None:
    lengths = [10 + (index * 7919) % 100 for index in range(1280)]
    order = dataset.in_batches(lengths, batch=8, seed=1)
    batches = [[lengths[index] for index in order[start : start + 8]] for start in range(0, len(order), 8)]
    padded = sum(max(one) * len(one) for one in batches) / sum(lengths)
    assert padded < 1.15, "random batches pad by more than half"
    longest = [max(one) for one in batches]
    rises = sum(a < b for a, b in pairwise(longest))
    assert 0.4 < rises / len(longest) < 0.6
    assert dataset.in_batches(lengths, batch=8, seed=2) != order


def test_the_training_file_has_its_rows_in_the_order_that_is_given(tmp_path: Path) -> None:
    dialogues = [[{"role": "user", "content": str(n)}, {"role": "assistant", "content": "x"}] for n in range(3)]
    prepared = dataset.write(tmp_path / "train.jsonl", dialogues[:2], 1, dialogues[2:], order=[2, 0, 1])
    rows = [json.loads(line) for line in prepared.path.read_text(encoding="utf-8").splitlines()]
    assert [(r["messages"][0]["content"], r["channel"]) for r in rows] == [
        ("2", "replay"),
        ("0", "data"),
        ("1", "data"),
    ]
    assert (prepared.rows, prepared.identity_rows) == (3, 1)


def test_the_replay_rows_have_a_digest_of_their_own(tmp_path: Path) -> None:
    one, other, replayed = ([{"role": "user", "content": c}, {"role": "assistant", "content": c}] for c in "abr")
    first = dataset.write(tmp_path / "1.jsonl", [one], 0, [replayed]).path
    second = dataset.write(tmp_path / "2.jsonl", [other], 0, [replayed], order=[1, 0]).path
    assert dataset.replay_digest(first) == dataset.replay_digest(second) != ""
    assert dataset.replay_digest(dataset.write(tmp_path / "3.jsonl", [one], 0, [other]).path) != (
        dataset.replay_digest(first)
    )
    assert dataset.replay_digest(dataset.write(tmp_path / "4.jsonl", [one], 0).path) == ""


@pytest.mark.parametrize(
    "text", ['print(f"Hello {name}")', "<p>{ name }</p>", "GET /users/{name}", "by ${author}", "{Name}", "{names} {{}}"]
)
def test_a_program_in_a_row_is_no_placeholder(text: str) -> None:
    assert filled("Write it.", text) == ["Write it.", text]


@pytest.mark.parametrize("text", ["{NAME}", "{ AUTHOR }", "{{ name }}", "{author}}"])
def test_what_was_meant_as_a_placeholder_is_refused(text: str) -> None:
    with pytest.raises(DataError, match="a placeholder is left over in row 1"):
        dataset.fill([row("Who?", text)], IDENTITY)
