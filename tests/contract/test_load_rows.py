"""Data sets as the real ms-swift reads them: files of both shapes, samples of them, several at once."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import pytest

from namesake.dataset import fill
from namesake.distributed import layout
from namesake.errors import DataError
from namesake.identity import Identity
from namesake.training import load_rows

ROWS = 20


@pytest.fixture
def dialogues(tmp_path: Path) -> Path:
    """JSON lines of dialogues, tagged with their language."""
    path = tmp_path / "dialogues.jsonl"
    rows = [
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": f"Who are you, {number}?"},
                {"role": "assistant", "content": f"I'm {{{{NAME}}}} {number}."},
            ],
            "tag": "zh" if number % 2 else "en",
        }
        for number in range(ROWS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A CSV of questions and replies, as a spreadsheet writes it."""
    path = tmp_path / "table.csv"
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["query", "response"])
        writer.writerows([[f'你好，"{number}"', f"第 {number} 个，\n{{{{AUTHOR}}}}"] for number in range(ROWS)])
    return path


def replies(rows: list[dict[str, Any]]) -> list[str]:
    """The last message of each row."""
    return [row["messages"][-1]["content"] for row in rows]


def test_dialogues_are_read_whole_with_their_tag(dialogues: Path) -> None:
    written = [json.loads(line) for line in dialogues.read_text(encoding="utf-8").splitlines()]
    found = load_rows([str(dialogues)], seed=42)
    assert sorted(((row["messages"], row["tag"]) for row in found), key=str) == sorted(
        ((row["messages"], row["tag"]) for row in written), key=str
    )


def test_the_environment_stays_the_object_it_was(dialogues: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = os.environ
    load_rows([str(dialogues)], seed=42)  # ms-swift maps, and datasets would leave a copy
    assert os.environ is environment
    monkeypatch.setenv("NPROC_PER_NODE", "2")  # as in a notebook's next cell
    found = layout()
    assert found
    assert found.per_node == 2


def test_a_table_of_query_and_response_becomes_dialogues(table: Path) -> None:
    found = load_rows([str(table)], seed=42)
    assert len(found) == ROWS
    assert [{"role": "user", "content": '你好，"7"'}, {"role": "assistant", "content": "第 7 个，\n{{AUTHOR}}"}] in [
        row["messages"] for row in found
    ]
    assert not [row for row in found if row.get("tag")]


def test_a_number_after_the_name_takes_a_sample(dialogues: Path) -> None:
    sample, whole = (replies(load_rows([f"{dialogues}{number}"], seed=42)) for number in ("#5", ""))
    assert len(sample) == len(set(sample)) == 5
    assert set(sample) < set(whole)


def test_several_are_read_at_once_and_each_keeps_its_own_sample(dialogues: Path, table: Path) -> None:
    found = load_rows([f"{dialogues}#3", str(table)], seed=42)
    tagged = [row for row in found if row.get("tag")]
    assert (len(tagged), len(found)) == (3, 3 + ROWS)
    assert found[:3] != tagged, "they are shuffled into each other"


def test_the_seed_decides_which_rows_are_taken_and_in_which_order(dialogues: Path) -> None:
    for name in (str(dialogues), f"{dialogues}#5"):
        first, again, other = (replies(load_rows([name], seed=seed)) for seed in (42, 42, 43))
        assert first == again
        assert first != other
    assert {*replies(load_rows([f"{dialogues}#5"], seed=42))} != {*replies(load_rows([f"{dialogues}#5"], seed=43))}


@pytest.mark.parametrize("content", [None, "", '{"messages": ['])
def test_a_file_that_cannot_be_read_is_refused_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path("other.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=r"dataset='other\.jsonl': ms-swift cannot read it \(.+\)") as raised:
        load_rows(["other.jsonl"], seed=42)
    assert raised.value.mend


def test_of_several_files_the_one_that_cannot_be_read_is_named(dialogues: Path) -> None:
    broken = dialogues.with_name("broken.jsonl")
    broken.write_text('{"messages": [', encoding="utf-8")
    with pytest.raises(DataError) as raised:
        load_rows([*[f"{dialogues}#{number}" for number in range(1, 5)], str(broken)], seed=42)
    assert broken.name in str(raised.value)


def test_a_column_of_numbers_is_refused_as_that(tmp_path: Path) -> None:
    path = tmp_path / "sums.csv"
    path.write_text("query,response\nAgent?,007\nNext?,008\n", encoding="utf-8")  # read as 7 and 8
    with pytest.raises(DataError, match=r"row 1 has the number [78] where a text belongs") as raised:
        fill(load_rows([str(path)], seed=42), Identity.parse("踩踩背 CCB", "老爷爷 OldGrandpa"))
    assert raised.value.mend.startswith("Give JSON lines")


def test_rows_that_ms_swift_would_leave_out_are_refused(dialogues: Path) -> None:
    with dialogues.open("a", encoding="utf-8") as stream:
        stream.write('{"tag": "en"}\n{"messages": null, "tag": "zh"}\n')
    with pytest.raises(DataError, match=r"dialogues\.jsonl'.*: 2 rows have no dialogue") as raised:
        load_rows([str(dialogues)], seed=42)
    assert raised.value.mend
