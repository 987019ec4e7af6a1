"""Which of the finished runs is promoted, and what is told when there is no room for it."""

from __future__ import annotations

import errno
import os
import shutil
from dataclasses import replace
from itertools import permutations
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from namesake import promotion, tracking
from namesake.errors import PromotionError
from namesake.promotion import choose
from namesake.tracking import RunRecord


def run(name: str, *, ended: int = 0, **metrics: float) -> RunRecord:
    """A finished run; ``identity``, ``leak`` and ``loss`` stand for the metrics' keys."""
    keys = {"identity": "probe/identity", "leak": "probe/leak", "loss": "eval/loss"}
    return RunRecord(
        id=name,
        name=name,
        params={},
        metrics={keys[key]: value for key, value in metrics.items()},
        tags={},
        ended=ended,
        experiment="0",
    )


def chosen(*runs: RunRecord) -> str:
    """The id of the one that is chosen in whichever order they come."""
    ids = set()
    for order in permutations(runs):
        best = choose(order)
        assert best is not None
        ids.add(best.id)
    assert len(ids) == 1, ids
    return ids.pop()


def test_of_no_runs_none_is_chosen() -> None:
    assert choose([]) is None


def test_a_run_that_was_not_probed_is_not_chosen() -> None:
    assert choose([run("a", loss=0.1), run("b")]) is None


def test_the_runs_may_come_one_after_the_other() -> None:
    best = choose(one for one in (run("a", identity=0.5), run("b", identity=0.6)))
    assert best is not None
    assert best.id == "b"


def test_the_share_of_identity_questions_right_comes_first() -> None:
    assert (
        chosen(
            run("a", identity=0.9, leak=0.0, loss=0.1, ended=9), run("b", identity=0.95, leak=0.5, loss=2.0, ended=1)
        )
        == "b"
    )


def test_between_equal_identities_the_one_that_leaks_less_is_chosen() -> None:
    assert (
        chosen(run("a", identity=1.0, leak=0.1, loss=0.1, ended=9), run("b", identity=1.0, leak=0.0, loss=2.0)) == "b"
    )


def test_between_equal_probes_the_one_with_less_validation_loss_is_chosen() -> None:
    assert (
        chosen(run("a", identity=1.0, leak=0.0, loss=0.4, ended=9), run("b", identity=1.0, leak=0.0, loss=0.3)) == "b"
    )


def test_a_run_without_validation_comes_after_one_with_it() -> None:
    assert chosen(run("a", identity=1.0, leak=0.0, ended=9), run("b", identity=1.0, leak=0.0, loss=9.0)) == "b"


def test_a_run_whose_leak_is_not_known_comes_after_one_that_is() -> None:
    assert chosen(run("a", identity=1.0, loss=0.1), run("b", identity=1.0, leak=0.5, loss=2.0)) == "b"


def test_between_equals_in_everything_the_newer_is_chosen() -> None:
    same = {"identity": 1.0, "leak": 0.0, "loss": 0.3}
    assert chosen(run("a", ended=1, **same), run("b", ended=3, **same), run("c", ended=2, **same)) == "b"


def test_a_run_whose_validation_loss_is_not_a_number_comes_after_one_with_a_loss() -> None:
    diverged = run("a", identity=1.0, leak=0.0, loss=float("nan"))
    assert chosen(diverged, run("b", identity=1.0, leak=0.0, loss=0.3)) == "b"


SCORES = st.sampled_from([0.0, 0.5, 0.9, 1.0])


@given(st.lists(st.tuples(SCORES, SCORES, SCORES, st.integers(0, 3)), min_size=1, max_size=8), st.randoms())
def test_the_choice_does_not_depend_on_the_order_of_the_runs_and_none_has_a_better_identity(
    rows: list[tuple[float, float, float, int]], random: Random
) -> None:
    runs = [
        run(str(number), identity=identity, leak=leak, loss=loss, ended=ended)
        for number, (identity, leak, loss, ended) in enumerate(rows)
    ]
    best = choose(runs)
    assert best is not None
    assert best.metrics["probe/identity"] == max(identity for identity, *_ in rows)
    random.shuffle(runs)
    again = choose(runs)
    assert again is not None
    assert (again.metrics, again.ended) == (best.metrics, best.ended)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        shutil.Error([("a", "b", f"[Errno 28] {os.strerror(errno.ENOSPC)}")]),
        RuntimeError("(sqlite3.OperationalError) database or disk is full"),
    ],
)
def test_a_full_disk_is_told_as_one(error: Exception) -> None:
    with pytest.raises(PromotionError, match="no room left"), promotion._told_when_full():
        raise error


def test_another_fault_is_not_taken_for_a_full_disk() -> None:
    with pytest.raises(OSError, match="denied"), promotion._told_when_full():
        raise PermissionError("denied")


def finished(name: str, author: str, *, ended: int, **metrics: float) -> RunRecord:
    """A finished run of 踩踩背 CCB by an author."""
    tags = {tracking.TAG_NAME: "踩踩背 CCB", tracking.TAG_AUTHOR: author, tracking.TAG_KIND: "train"}
    return replace(run(name, ended=ended, **metrics), tags=tags)


def test_runs_of_another_author_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [
        finished("new", "李雷 Li Lei", ended=3, identity=0.9),
        finished("better", "李雷 Li Lei", ended=2, identity=0.95),
        finished("former", "老爷爷 OldGrandpa", ended=1, identity=1.0),
    ]
    monkeypatch.setattr(tracking, "finished_runs", lambda: runs)
    for name in ("", "踩踩背 CCB"):
        assert promotion._find(promotion.Request(name=name)).id == "better"


@pytest.mark.parametrize("status", ["RUNNING", "FAILED", "KILLED"])
def test_a_run_that_has_not_finished_is_not_promoted_though_it_was_probed(
    monkeypatch: pytest.MonkeyPatch, status: str
) -> None:
    one = finished("a", "李雷 Li Lei", ended=0, identity=1.0)
    monkeypatch.setattr(tracking, "get_run", lambda _id: one)
    assert promotion._find(promotion.Request(run="a")).id == "a"
    monkeypatch.setattr(tracking, "get_run", lambda _id: replace(one, status=status))
    with pytest.raises(PromotionError, match="is no finished training run"):
        promotion._find(promotion.Request(run="a"))
