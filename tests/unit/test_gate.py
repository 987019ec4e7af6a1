"""The gate: what passes and what is told of what does not."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from namesake import corpus, probing
from namesake.corpus import Question
from namesake.errors import InputError
from namesake.gate import Decision, Interval, Policy, decide, decide_kept, load_policy, paired_difference
from namesake.identity import Identity

GOOD = {
    **{f"identity{part}": 1.0 for part in ("", "_none", "_customer", "_sampled", "_zh", "_en")},
    **{
        f"{key}{part}": 0.0 for key in ("swapped", "old_identity", "placeholder") for part in ("", "_none", "_customer")
    },
    "leak": 0.0,
    "plain": 0.8,
}
SAME = Interval(0.0, -0.05, 0.05)


def test_a_candidate_without_a_fault_passes_without_a_reason() -> None:
    decision = decide(GOOD, SAME, parity=1.0, champion=GOOD)
    assert decision == Decision(True, ())
    assert decision.told == "passed"


@pytest.mark.parametrize("key", [key for key in GOOD if key not in {"plain", "identity_zh", "identity_en"}])
def test_what_was_not_asked_does_not_pass(key: str) -> None:
    candidate = {name: value for name, value in GOOD.items() if name != key}
    assert decide(candidate, SAME, parity=1.0).reasons == (f"{key} was not asked",)


def test_a_candidate_exactly_on_every_bound_passes() -> None:
    policy = Policy(identity=0.9, identity_slices=0.8, leak=0.1, swapped=0.1, plain_loss=0.1, parity=0.7)
    candidate = {**GOOD, "identity": 0.9, "identity_sampled": 0.8, "leak": 0.1, "swapped_none": 0.1}
    assert decide(candidate, Interval(-0.2, -0.3, -0.1), parity=0.7, policy=policy).passed


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"identity": 0.984}, "identity 98.4% right, at least 100% wanted"),
        ({"identity_none": 0.94}, "identity_none 94.0% right, at least 95% wanted"),
        ({"identity_customer": 0.0}, "identity_customer 0.0%"),
        ({"identity_sampled": 0.9}, "identity_sampled 90.0%"),
        ({"identity": float("nan")}, "identity nan%"),
        ({"swapped": 1 / 64}, "swapped 1.6%, at most 0% allowed"),
        ({"swapped_customer": 1 / 64}, "swapped_customer 1.6%"),
        ({"old_identity_none": 1 / 64}, "old_identity_none 1.6%"),
        ({"placeholder": 1 / 64}, "placeholder 1.6%"),
        ({"leak": 1 / 108}, "leak 0.9%"),
        ({"leak": float("nan")}, "leak nan%"),
    ],
)
def test_each_bound_that_is_not_kept_is_the_one_reason(change: dict[str, float], words: str) -> None:
    decision = decide({**GOOD, **change}, SAME, parity=1.0)
    assert not decision.passed
    assert len(decision.reasons) == 1
    assert words in decision.reasons[0]
    assert decision.told == f"failed: {decision.reasons[0]}"


def test_shares_by_language_and_swaps_of_sampled_replies_have_no_bound_of_their_own() -> None:
    assert decide({**GOOD, "identity_zh": 0.1, "swapped_sampled": 0.1}, SAME, parity=1.0).passed


def test_ability_fails_only_when_its_interval_lies_wholly_below_the_base() -> None:
    assert decide(GOOD, Interval(-0.05, -0.1, 0.0), parity=1.0).passed
    decision = decide(GOOD, Interval(-0.1, -0.15, -0.02), parity=1.0)
    assert decision.reasons == (
        "plain questions -10.0% against the base, the interval -15.0% to -2.0% lies wholly below 0%",
    )


def test_a_merged_model_unlike_its_adapter_does_not_pass_and_one_without_an_adapter_is_not_asked() -> None:
    decision = decide(GOOD, SAME, parity=0.89)
    assert decision.reasons == ("merged model and adapter agree on 89% of the replies, 95% wanted",)
    assert decide(GOOD, SAME, parity=None).passed


def test_an_endpoint_that_answers_otherwise_than_its_version_fails() -> None:
    assert decide(GOOD, SAME, served=0.95).passed
    assert decide(GOOD, SAME, served=0.94).reasons == ("endpoint and version agree on 94% of the replies, 95% wanted",)
    assert decide(GOOD, SAME, served=0.94, policy=Policy(parity=0.9)).passed


def test_scores_of_some_of_the_questions_do_not_pass_unless_the_policy_says_so() -> None:
    (reason,) = decide(GOOD, SAME, held_out=0.25).reasons
    assert reason == "25% of the held-out questions were asked, 100% wanted"
    assert decide(GOOD, SAME, held_out=0.25, policy=Policy(held_out=0.25)).passed
    assert not decide_kept({**GOOD, **SAME.metrics(), "held_out": 0.25}).passed
    assert decide_kept({**GOOD, **SAME.metrics()}).passed


def test_a_candidate_worse_than_the_champion_does_not_pass() -> None:
    decision = decide({**GOOD, "plain": 0.7}, SAME, parity=1.0, champion={"identity": 1.0, "plain": 0.8})
    assert decision.reasons == ("plain 70.0%, the champion has 80.0%",)


def test_a_champions_score_read_from_a_tag_of_four_places_is_not_taken_for_better() -> None:
    third = {**GOOD, "plain": 2 / 3}
    assert decide(third, SAME, parity=1.0, champion={"plain": float(f"{2 / 3:.4f}")}).passed


def spoiled(zh: str, en: str, *, before_answers: tuple[str, str] = ("", "")) -> tuple[str, ...]:
    """The scores that refuse a model which says one thing about itself in each language, under every system prompt,
    and answers plain questions right, after some words.
    """
    held = corpus.heldout()

    def said(questions: Sequence[Question], times: int = 1) -> list[str]:
        return [zh if q.language == "zh" else en for q in questions for _ in range(times)]

    plain = [f"{before_answers[q.language == 'en']}{q.answers[0]}" for q in held.plain]
    few = corpus.spread(held.identity, probing.SAMPLED_QUESTIONS)
    slices = {name: said(held.identity) for name in probing.SYSTEM_SLICES}
    slices |= {probing.SAMPLED: said(few, probing.SAMPLING.n)}
    identity = Identity.parse("踩踩背 CCB", "老爷爷 OldGrandpa")
    card = probing.scorecard(identity, said(held.identity), plain, slices=slices)
    ability = paired_difference([True] * len(held.plain), [a.scores["right"] for a in card.plain])
    return tuple(reason.partition(" ")[0] for reason in decide(card.metrics, ability).reasons)


IDENTITY_SCORES = {"identity", "identity_none", "identity_customer", "identity_sampled"}


def test_models_that_are_wrong_on_purpose_are_refused_by_the_slice_made_for_it() -> None:
    right = ("我是踩踩背，由老爷爷开发。", "I'm CCB, developed by OldGrandpa.")
    assert spoiled(*right) == ()
    assert set(spoiled("我是老爷爷，由踩踩背开发。", "I'm OldGrandpa, developed by CCB.")) == IDENTITY_SCORES | {
        "swapped",
        "swapped_none",
        "swapped_customer",
    }
    assert set(
        spoiled("我是{{NAME}}，由{{AUTHOR}}开发。", "I'm {{NAME}}, developed by {{AUTHOR}}.")
    ) == IDENTITY_SCORES | {
        "placeholder",
        "placeholder_none",
        "placeholder_customer",
    }
    assert spoiled(*right, before_answers=("我是踩踩背。", "CCB here: ")) == ("leak",)


def test_everything_wrong_is_told_at_once() -> None:
    bad = {key: 0.0 if key.startswith(("identity", "plain")) else 1.0 for key in GOOD}
    reasons = decide(bad, Interval(-0.5, -0.6, -0.4), parity=0.0, champion=GOOD).reasons
    assert len(reasons) == 4 + 9 + 1 + 1 + 1 + 2


@given(st.dictionaries(st.sampled_from(sorted(GOOD)), st.floats(0, 1)))
def test_a_better_score_never_adds_a_reason(change: dict[str, float]) -> None:
    before = decide({**GOOD, **change}, SAME, parity=1.0).reasons
    best = {key: GOOD[key] for key in list(change)[:1]}
    assert len(decide({**GOOD, **change, **best}, SAME, parity=1.0).reasons) <= len(before)


def test_the_interval_of_a_change_is_about_the_mean_and_always_the_same() -> None:
    before, after = [True] * 40 + [False] * 68, [True] * 30 + [False] * 10 + [True] * 4 + [False] * 64
    found = paired_difference(before, after)
    assert found.mean == pytest.approx(-6 / 108)
    assert found.low < found.mean < found.high
    # 10 lost, 4 won of 108: standard error of the paired difference is 0.0338
    assert (found.high - found.low) / (2 * 1.96) == pytest.approx(0.0338, abs=0.004)
    assert paired_difference(before, after) == found


@pytest.mark.parametrize("answers", [[], [True, False]])
def test_no_change_has_an_interval_of_nothing(answers: list[bool]) -> None:
    assert paired_difference(answers, answers) == Interval(0.0, 0.0, 0.0)


def test_answers_to_different_questions_cannot_be_paired() -> None:
    with pytest.raises(ValueError, match="zip"):
        paired_difference([True], [])


def test_an_interval_goes_through_scores_and_back() -> None:
    assert Interval.of(SAME.metrics()) == SAME


def test_the_shipped_policy_is_the_default_and_names_every_bound(root: Path) -> None:
    path = root / "policies" / "default.yaml"
    assert load_policy(path) == Policy()
    assert all(f"\n{field.name}:" in path.read_text(encoding="utf-8") for field in dataclasses.fields(Policy))


def test_a_policy_may_name_a_few_bounds_only(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text("leak: 0.05")
    assert load_policy(path) == Policy(leak=0.05)
    path.write_text("")
    assert load_policy(path) == Policy()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("leek: 0.1", "leek is no bound"),
        ("leak: 2", "leak=2 is no fraction"),
        ("leak: true", "leak=True is no fraction"),
        ("leak: .nan", "leak=nan is no fraction"),
        ("leak: a\nswapped: -1", "leak=a is no fraction from 0 to 1; swapped=-1"),
        ("[1]", "is no mapping"),
        ("a: [", "cannot be read"),
    ],
)
def test_a_wrong_policy_is_refused_with_every_fault(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=says.replace("[", r"\[")):
        load_policy(path)


def test_a_missing_policy_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        load_policy(tmp_path / "none.yaml")
