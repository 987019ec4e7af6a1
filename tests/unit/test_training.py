"""What is settled before ms-swift is asked for rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from namesake import training
from namesake.errors import DataError


@pytest.mark.parametrize(
    "name",
    ["swift/self-cognition", "swift/self-cognition#100", "AI-ModelScope/x:default#5", "ms::owner/name", "no/x.csv"],
)
def test_an_id_is_refused_at_once_where_the_hub_cannot_be_reached(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "hub_answers", lambda: False)
    monkeypatch.setattr(training, "_quiet", None)  # ms-swift is not asked
    with pytest.raises(DataError, match="is no file here, and ModelScope cannot be reached") as raised:
        training.load_rows([str(tmp_path), name], seed=1)
    assert name in raised.value.message


@pytest.mark.parametrize(
    "name", ["my.jsonl#3", "data/my.jsonl", "data/my.jsonl#3", "/nowhere/x.jsonl", "hf::a/b", "./x.csv"]
)
def test_a_file_and_what_is_on_another_hub_need_no_hub(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "my.jsonl").touch()
    assert not training._is_on_the_hub(name)
