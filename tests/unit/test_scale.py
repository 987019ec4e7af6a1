"""benchmarks/scale.py: its arithmetic against figures that are known otherwise, and the page that quotes it."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from namesake_serving import follow, service
from namesake_serving.settings import Settings

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "guide" / "explanation" / "scale.md"


@pytest.fixture(scope="module")
def scale() -> ModuleType:
    """The script."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import scale  # type: ignore[import-not-found]
    finally:
        sys.path.pop(0)
    found: ModuleType = scale
    return found


@pytest.fixture(scope="module")
def tables(scale: ModuleType) -> list[str]:
    """What it prints."""
    found: list[str] = scale.written(scale.Plan()).split("\n\n")
    assert len(found) == 6
    return found


def test_a_pause_between_polls_is_the_followers(scale: ModuleType) -> None:
    assert pytest.approx(1 - follow.JITTER / 2) == scale.PAUSE


@pytest.mark.parametrize("page", [PAGE, PAGE.with_suffix(".zh.md")], ids=["en", "zh"])
def test_the_page_quotes_what_the_script_prints(tables: list[str], page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert [table for table in tables if f"```text\n{table}\n```" not in text] == []


def test_weights_cache_and_adapters_are_those_of_the_models(scale: ModuleType) -> None:
    for model, vocabulary, tied, adapter in (
        (scale.SMALL, 151_936, True, 4_399_104),
        (scale.LARGE, 152_064, False, 20_185_088),
    ):
        kv = model.kv_heads * model.head
        attention = model.hidden * (2 * model.hidden + 2 * kv) + model.hidden + 2 * kv  # biases of q, k and v
        layer = attention + 3 * model.hidden * model.inner + 2 * model.hidden  # norms
        numbers = (1 if tied else 2) * vocabulary * model.hidden + model.layers * layer + model.hidden
        assert model.parameters == pytest.approx(numbers, rel=1e-3)
        assert model.adapter(8) == 2 * adapter  # as PEFT counts them for all linear layers
        assert model.adapter(64) == 8 * model.adapter(8)
    assert (scale.SMALL.kv, scale.LARGE.kv) == (12_288, 57_344)


def test_a_cold_adapter_is_as_frequent_as_is_known_where_all_are_alike(scale: ModuleType) -> None:
    plan = scale.Plan(gpus=1, adapters=100, zipf=0)
    missed, busiest = scale.simulate(plan, 1, 25, 60_000)
    assert missed == pytest.approx(0.75, abs=0.01)  # LRU, independent requests
    assert busiest == 1
    assert scale.simulate(plan, 1, 100, 60_000)[0] == 0


def test_more_places_even_out_the_load_and_make_more_adapters_cold(scale: ModuleType) -> None:
    found = [scale.simulate(scale.Plan(), places, 64, 60_000) for places in (1, 2, 4)]
    assert [missed for missed, _ in found] == sorted(missed for missed, _ in found)
    assert [busiest for _, busiest in found] == sorted((busiest for _, busiest in found), reverse=True)


def test_what_is_assumed_can_be_changed_and_counts(scale: ModuleType) -> None:
    plan = scale.Plan()
    base = scale.throughput(plan)
    assert [float(row[-1]) for row in scale.throughput(replace(plan, price=5))] == pytest.approx(
        [2 * float(row[-1]) for row in base], abs=2e-4
    )
    slow = scale.throughput(replace(plan, host=30))
    assert [row[-2] for row in slow] != [row[-2] for row in base]
    assert scale.distinct(replace(plan, batch=1)) == pytest.approx(1)
    assert [row[-1] for row in scale.registry_load(replace(plan, poll=60))] == ["no"] * 6


def test_what_is_said_of_the_server_is_so(scale: ModuleType, tables: list[str]) -> None:
    plan = scale.Plan()
    assert plan.poll == Settings().poll_seconds
    rows = [line.split() for line in tables[2].splitlines()[2:]]
    assert {row[4] for row in rows} == {f"{service._AT_A_TIME / plan.load:.0f}"}
    Settings(max_adapters=plan.slots)
    with pytest.raises(ValueError, match="256"):
        Settings(max_adapters=plan.slots + 1)
