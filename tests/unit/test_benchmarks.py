"""The benchmark table: its statistics, what it keeps and shows, and the guide's page that quotes it."""

from __future__ import annotations

import itertools
import json
import random
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import mlflow
import pytest

ROOT = Path(__file__).parents[2]


def _imported(name: str) -> ModuleType:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return __import__(name)
    finally:
        sys.path.pop(0)


measure = _imported("measure")
table = _imported("table")
servers = _imported("servers")

RATIO = measure.Row("speed", "ours ÷ theirs", "我们 ÷ 他们", 2, least=True, unit="tokens/s")
FAILED = measure.Row("failed", "requests failed", "失败的请求", 0, kind="value", unit="requests")
ADDED = measure.Row("added", "added", "增加", kind="difference", unit="ms")
LATE = measure.Row("late", "p95", "p95", 1, kind="value", share=0.95)


def line(*rows: Any, run: Any = None) -> Any:
    """A line of these rows."""
    return measure.Measure("line", rows, run or (lambda _: iter(())), (0.5, 1.0))


# ------------------------------------------------------------------------------------------------------- statistics


def test_the_interval_of_a_median_is_that_of_the_binomial_distribution() -> None:
    # Two-sided confidence of order statistics, n = 5, 10 and 15 (e.g. Conover, table A3).
    assert measure.median_interval([5, 3, 1, 4, 2]) == (1, 5, 0.9375)
    assert measure.median_interval(range(10))[:2] == (2 - 1, 9 - 1)
    assert measure.median_interval(range(10))[2] == pytest.approx(0.9785, abs=1e-4)
    assert measure.median_interval(range(15), 0.95) == (3, 11, pytest.approx(0.9648, abs=1e-4))
    assert measure.median_interval([7]) == (7, 7, 0)
    assert measure.median_interval([7, 8]) == (7, 8, 0.5)


@pytest.mark.parametrize("number", [5, 8])
def test_the_interval_holds_the_median_as_often_as_it_says(number: int) -> None:
    dice = random.Random(number)
    inside, says = 0, 0.0
    for _ in range(4000):
        low, high, says = measure.median_interval([dice.expovariate(1) for _ in range(number)])
        inside += low <= 0.6931472 <= high
    assert says >= 0.9
    assert inside / 4000 == pytest.approx(says, abs=0.015)


def test_ratios_are_taken_pair_by_pair() -> None:
    found = measure.figure(RATIO, [{"speed": (30, 10)}, {"speed": [100, 20]}, {"other": 1}, {"speed": (8, 4)}])
    assert (found.value, found.low, found.high) == (3, 2, 5)
    assert (found.first, found.second, found.number) == (30, 10, 3)
    assert measure.figure(RATIO, [{"other": 1}]) is None


def test_differences_values_and_percentiles() -> None:
    assert measure.figure(ADDED, [{"added": (3, 1)}, {"added": (9, 5)}]).value == 3
    late = measure.figure(LATE, [{"late": value} for value in range(1, 21)])
    assert (late.value, late.low, late.high, late.coverage) == (19, 1, 20, 0)
    assert measure.quantile([1, 2, 3, 4], 0.5) == statistics.median([1, 2, 3, 4])
    assert measure.quantile([1], 0.95) == 1


# -------------------------------------------------------------------------------------------------------- what is shown


def results(tmp_path: Path, *samples: Any) -> Any:
    """A file with a line that has these samples."""
    made = measure.Results(tmp_path / "found.json")
    made.begin("line", {"machine": "two cores", "versions": "x 1", "commit": "abc", "begun": "today", "load": [0.1]})
    for sample in samples:
        made.add("line", sample)
    made.end("line", minutes=2.5, load=[0.1, 0.2])
    return made


def test_a_row_has_its_goal_both_sides_and_whether_it_is_met(tmp_path: Path) -> None:
    found = results(tmp_path, {"speed": (30, 10), "failed": 0}, {"speed": (30, 20), "failed": 3}, {"speed": (50, 20)})
    lines = measure.table([line(RATIO, FAILED, LATE)], found).splitlines()[2:]
    assert lines == [
        "| ours ÷ theirs | 2.50 | 1.50 to 3.00 (75.0%) | 30.0 tokens/s | 20.0 tokens/s | 3 | ≥ 2.00 | yes? |",
        "| requests failed | 1.50 requests | 0 to 3.00 (50.0%) |  |  | 2 | ≤ 0 requests | **no**? |",
    ]
    zh = measure.table([line(RATIO)], found, "zh")
    assert "| 我们 ÷ 他们 | 2.50 | 1.50 至 3.00 (75.0%) |" in zh and "| 是? |" in zh


def test_yes_and_no(tmp_path: Path) -> None:
    row = measure.Row("same", "losses equal", "loss 相等", 1, least=True, kind="value", unit="yes or no")
    assert "| losses equal | yes |  |  |  | 1 | yes | yes |" in measure.table(
        [line(row)], results(tmp_path, {"same": 1})
    )
    found = results(tmp_path, {"same": 0}, {"same": 0}, {"same": 1})
    assert "| loss 相等 | 否 | 0 至 1.00 (75.0%) |  |  | 3 | 是 | **否**? |" in measure.table([line(row)], found, "zh")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.06, "0.0600"), (1.0234, "1.02"), (26.04, "26.0"), (1234.5, "1,234"), (-0.5, "-0.500")],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert measure.number(value) == text


def test_commits_and_machines_are_told_of_the_lines_that_they_hold_for(tmp_path: Path) -> None:
    found = results(tmp_path, {"speed": (1, 1)})
    found.begin("other", {"machine": "two cores", "versions": "x 1", "commit": "def", "begun": "later", "load": [0.3]})
    found.add("other", {"speed": (1, 1)})
    said = measure.stated(found)
    assert "- machine: two cores\n" in said
    assert "- commit: abc (line)\n- commit: def (other)\n" in said
    assert "- line: today UTC, 2.5 minutes, load average 0.1 at the start, 0.2 at the end" in said
    assert "- other: later UTC, ? minutes, load average 0.3 at the start, broken off at the end" in said
    assert "- 提交：def (other)\n" in measure.stated(found, "zh")


def test_the_plot_is_a_picture_and_the_same_each_time(tmp_path: Path) -> None:
    found = results(tmp_path, {"speed": (30, 10)}, {"speed": (30, 20)})
    (png,) = measure.plots([line(RATIO)], found).values()
    assert png.startswith(b"\x89PNG") and [png] == list(measure.plots([line(RATIO)], found).values())
    assert measure.plots([line(FAILED)], found) == {}


# --------------------------------------------------------------------------------------------------------- what is kept


def test_each_sample_is_on_the_disk_at_once_and_comes_back(tmp_path: Path) -> None:
    found = results(tmp_path, {"speed": (30, 10)})
    kept = json.loads(found.path.read_text(encoding="utf-8"))
    assert kept["lines"]["line"]["samples"] == [{"speed": [30, 10]}]
    assert measure.Results.read(found.path).samples("line") == [{"speed": [30, 10]}]
    assert measure.Results.read(tmp_path / "none.json").lines == {}
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"lines": {"a": {}}}', '{"lines": [1]}'])
def test_a_file_of_something_else_is_named_and_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(SystemExit, match=r"other\.json has no results"):
        measure.Results.read(path)
    assert path.read_text() == text


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Three lines in the table's place; what each does may be exchanged."""
    does: dict[str, Any] = {key: lambda _: ({"speed": (4, 2)} for _ in range(2)) for key in ("one", "two", "three")}
    made = [measure.Measure(key, (RATIO,), lambda given, key=key: does[key](given), (0, 1)) for key in does]
    monkeypatch.setattr(table, "MEASURES", tuple(made))
    return does


def main(monkeypatch: pytest.MonkeyPatch, path: Path, *words: str) -> int:
    """The command, its results in the file."""
    monkeypatch.setattr(sys, "argv", ["table.py", "--json", str(path), *words])
    code: int = table.main()
    return code


def test_a_broken_off_run_keeps_what_it_had_and_goes_on(
    lines: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = []

    def broken(_: Any) -> Iterator[dict[str, Any]]:
        try:
            yield {"speed": (9, 3)}
            raise KeyboardInterrupt
        finally:
            ended.append("servers")

    path, good, counted = tmp_path / "found.json", lines["two"], itertools.count()
    lines["one"] = lambda given: (next(counted), good(given))[1]
    lines["two"] = broken
    assert main(monkeypatch, path) == 130
    kept = json.loads(path.read_text())["lines"]
    assert kept["one"]["stated"]["minutes"] == 0 and kept["two"]["samples"] == [{"speed": [9, 3]}]
    assert "minutes" not in kept["two"]["stated"] and "three" not in kept
    assert ended == ["servers"]
    lines["two"] = good
    assert main(monkeypatch, path) == 0
    assert next(counted) == 1, "what the file had was run again"
    assert {key: len(one["samples"]) for key, one in json.loads(path.read_text())["lines"].items()} == {
        "one": 2, "two": 2, "three": 2,
    }  # fmt: skip
    assert "| ours ÷ theirs | 2.00 |" in capsys.readouterr().out
    assert main(monkeypatch, path, "--again", "--only", "one") == 0
    assert next(counted) == 3


def test_one_line_that_fails_does_not_take_the_others_along(
    lines: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(_: Any) -> Iterator[dict[str, Any]]:
        raise SystemExit("vLLM is not there")
        yield {}

    lines["two"] = fails
    assert main(monkeypatch, tmp_path / "found.json") == 1
    assert list(json.loads((tmp_path / "found.json").read_text())["lines"]) == ["one", "three"]
    assert "two failed: SystemExit: vLLM is not there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--only", "nothing"], "--only nothing: there is no such line. There are: help, merge"),
        (["--pairs", "0"], "'0' is no whole number from 1 up"),
        (["--quick", "--smoke"], "give one of them"),
        (["--json", str(ROOT)], "is a folder; give a file"),
    ],
)
def test_bad_arguments_are_named(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["table.py", "--list", *words])
    with pytest.raises(SystemExit) as ended:
        table.main()
    assert said in f"{ended.value} {capsys.readouterr().err}" and ended.value.code != 0


# ------------------------------------------------------------------------------------------------------- the guide


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_guide_quotes_the_committed_results(language: str) -> None:
    page = table.PAGES[language].read_text(encoding="utf-8")
    found = measure.Results.read(table.PUBLISHED)
    assert found.lines, "no results are committed"
    assert table.quoted(page) == table.quote(found, language), "run: python benchmarks/table.py --publish"


def test_every_row_has_a_name_of_its_own_in_both_languages() -> None:
    rows = [(one.key, row) for one in table.MEASURES for row in one.rows]
    assert len({(key, row.key) for key, row in rows}) == len(rows)
    assert len({one.key for one in table.MEASURES}) == len(table.MEASURES)
    assert all(row.what and row.zh and "|" not in row.what + row.zh for _, row in rows)


# --------------------------------------------------------------------------------------------------- the alias moved


@pytest.fixture
def client(tmp_path: Path) -> Iterator[mlflow.MlflowClient]:
    """A registry of the test's own, whatever another test has set."""
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    yield mlflow.MlflowClient()
    mlflow.set_tracking_uri(before)


def test_after_an_odd_number_of_moves_the_next_ones_are_moves_too(client: mlflow.MlflowClient, tmp_path: Path) -> None:
    client.create_registered_model(servers.MODEL)
    for alias in ("champion", "challenger"):
        made = client.create_model_version(servers.MODEL, str(tmp_path))
        client.set_registered_model_alias(servers.MODEL, alias, made.version)
    for _ in range(2):
        with servers.both_versions() as numbers:
            assert numbers == [1, 2]
            client.set_registered_model_alias(servers.MODEL, "champion", "2")
    client.set_registered_model_alias(servers.MODEL, "champion", "2")
    with pytest.raises(SystemExit, match="are version 2"), servers.both_versions():
        pass
