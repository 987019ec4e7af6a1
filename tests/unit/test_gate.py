"""The gate: what passes and what is told of what does not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from namesake.gate import Policy, decide

GOOD = {"identity": 1.0, "swapped": 0.0, "old_identity": 0.0, "placeholder": 0.0, "leak": 0.0, "plain": 0.8}
BASE = {"plain": 0.8}


def test_a_candidate_without_a_fault_passes_without_a_reason() -> None:
    decision = decide(GOOD, BASE, parity=1.0)
    assert decision.passed
    assert decision.reasons == ()


def test_a_candidate_exactly_on_every_bound_passes() -> None:
    policy = Policy()
    candidate = {
        **GOOD,
        "identity": policy.identity,
        "leak": policy.leak,
        "plain": BASE["plain"] * (1 - policy.plain_loss),
    }
    assert decide(candidate, BASE, parity=policy.parity).passed


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"identity": 0.94}, "identity 94.0% right"),
        ({"swapped": 1 / 64}, "swapped 1.6%"),
        ({"old_identity": 1 / 64}, "old_identity 1.6%"),
        ({"placeholder": 1 / 64}, "placeholder 1.6%"),
        ({"leak": 0.04}, "leak 4.0%"),
        ({"plain": 0.6}, "plain questions 60.0% right, 68.0% wanted (the base has 80.0%)"),
    ],
)
def test_each_bound_that_is_not_kept_is_the_one_reason(change: dict[str, float], words: str) -> None:
    decision = decide({**GOOD, **change}, BASE, parity=1.0)
    assert not decision.passed
    assert len(decision.reasons) == 1
    assert words in decision.reasons[0]


def test_a_merged_model_unlike_its_adapter_does_not_pass() -> None:
    decision = decide(GOOD, BASE, parity=0.89)
    assert not decision.passed
    assert decision.reasons == ("merged model and adapter agree on 89% of the replies, 90% wanted",)


def test_everything_wrong_is_told_at_once() -> None:
    candidate = {"identity": 0.0, "swapped": 1.0, "old_identity": 1.0, "placeholder": 1.0, "leak": 1.0, "plain": 0.0}
    assert len(decide(candidate, BASE, parity=0.0).reasons) == 7


def test_the_untrained_base_itself_does_not_pass() -> None:
    assert not decide({**GOOD, "identity": 0.0}, BASE, parity=1.0).passed


def test_a_base_that_knows_nothing_asks_nothing_of_the_candidate() -> None:
    assert decide({**GOOD, "plain": 0.0}, {"plain": 0.0}, parity=1.0).passed


def test_a_policy_of_ones_own_takes_the_place_of_the_bounds() -> None:
    lenient = Policy(identity=0.5, swapped=0.1, plain_loss=1.0, parity=0.0)
    candidate = {**GOOD, "identity": 0.5, "swapped": 0.1, "plain": 0.0}
    assert decide(candidate, BASE, parity=0.0, policy=lenient).passed
    assert not decide(candidate, BASE, parity=0.0).passed


@given(st.integers(0, 108), st.integers(0, 108))
def test_of_the_bases_plain_score_exactly_fifteen_parts_of_a_hundred_may_be_lost(mine: int, base: int) -> None:
    decision = decide({**GOOD, "plain": mine / 108}, {"plain": base / 108}, parity=1.0)
    assert decision.passed == (100 * mine >= 85 * base)


FRACTIONS = st.floats(0, 1)


@given(st.fixed_dictionaries(dict.fromkeys(GOOD, FRACTIONS)), FRACTIONS, FRACTIONS)
def test_a_better_score_never_turns_a_pass_into_a_failure(
    candidate: dict[str, float], base: float, parity: float
) -> None:
    passed = decide(candidate, {"plain": base}, parity=parity).passed
    for key in candidate:
        best = 1.0 if key in {"identity", "plain"} else 0.0
        better = decide({**candidate, key: best}, {"plain": base}, parity=1.0)
        assert better.passed >= passed
        assert len(better.reasons) <= len(decide(candidate, {"plain": base}, parity=parity).reasons)
