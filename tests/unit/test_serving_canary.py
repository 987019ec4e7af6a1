"""When a challenger goes back: by its failures at once, by its times when there are enough."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from namesake_serving.canary import LEAST_FAILURES, Judge


def judged(champion: list[float | None], challenger: list[float | None], **given: float) -> str:
    """The verdict after these requests; none is one that failed."""
    judge = Judge(given.get("errors", 0.02), given.get("latency", 1.5), int(given.get("least", 20)))
    for side, answers in ((False, champion), (True, challenger)):
        for seconds in answers:
            judge.note(side, seconds is None, seconds or 0)
    return judge.verdict()


def test_who_is_as_good_may_go_on() -> None:
    assert judged([0.1] * 100, [0.1] * 100) == ""


@pytest.mark.parametrize("asked", [LEAST_FAILURES, 50, 200])
def test_one_that_fails_more_often_than_is_allowed_goes_back_at_once(asked: int) -> None:
    failed: list[float | None] = [None] * LEAST_FAILURES
    assert "failed" in judged([0.1] * 300, [*failed, *[0.1] * (asked - LEAST_FAILURES)])


def test_a_few_failures_tell_nothing() -> None:
    assert judged([0.1] * 300, [None] * (LEAST_FAILURES - 1)) == ""


def test_what_the_champion_fails_at_too_is_not_the_challengers_fault() -> None:
    both: list[float | None] = [None, 0.1] * 50
    assert judged(both, both) == ""


@pytest.mark.parametrize(("slow", "back"), [(0.149, False), (0.16, True)])
def test_one_that_is_slower_than_is_allowed_goes_back(slow: float, back: bool) -> None:
    assert bool(judged([0.1] * 100, [slow] * 20)) == back


def test_times_are_compared_when_there_are_enough_of_both() -> None:
    assert judged([0.1] * 100, [9.0] * 19) == judged([0.1] * 19, [9.0] * 100) == ""


def test_a_slow_failure_is_not_a_slow_answer() -> None:
    assert judged([0.1] * 100, [*[None] * 4, *[0.1] * 300]) == ""


def test_only_the_newest_count_and_another_version_begins_anew() -> None:
    judge = Judge(0.02, 1.5, 20)
    for _ in range(600):
        judge.note(False, False, 0.1)
        judge.note(True, False, 0.3)
    assert "first byte" in judge.verdict()
    judge.begin()
    assert judge.verdict() == ""
    for _ in range(20):
        judge.note(True, True, 0)
    assert judge.verdict()
    for _ in range(500):
        judge.note(True, False, 0.1)
    assert judge.verdict() == ""


@given(st.lists(st.one_of(st.none(), st.floats(0, 100)), max_size=60))
def test_who_does_the_same_as_the_champion_never_goes_back(answers: list[float | None]) -> None:
    assert judged(answers, answers) == ""
