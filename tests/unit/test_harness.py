"""What ``namesake harness`` makes of two models' scores, and which targets and tasks it refuses."""

from __future__ import annotations

import inspect
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow.utils.validation import _validate_metric_name

from namesake import cli, harness
from namesake.errors import HarnessError, InputError
from namesake.evaluation import Score
from namesake.harness import Outcome, Pair, Request, metrics, paired
from namesake.terminal import Screen
from tests.json_page import assert_as_shown

PAIRS = (
    Pair("arc_easy", "acc", True, 0.5, 0.03, 0.625, 0.04, 200),
    Pair("gsm8k", "exact_match/strict-match", True, 0.25, None, 0.125, None, 8),
)


def test_metrics_that_both_have_stand_side_by_side() -> None:
    base = (Score("a", "acc", True, 0.5, 0.03, 200), Score("a", "f1", True, 0.5, None, 200))
    tuned = (Score("b", "acc", True, 0.1, None, 9), Score("a", "acc", True, 0.625, 0.04, 200))
    (pair,) = paired(base, tuned)
    assert pair == Pair("a", "acc", True, 0.5, 0.03, 0.625, 0.04, 200)
    assert pair.difference == pytest.approx(0.125)
    assert pair.difference_stderr == pytest.approx(0.05)  # 3, 4, 5
    assert PAIRS[1].difference_stderr is None


def test_metrics_of_both_are_named_beside_each_other() -> None:
    assert metrics(PAIRS) == {
        "harness/arc_easy/acc": 0.625,
        "harness/arc_easy/acc_stderr": 0.04,
        "harness/arc_easy/acc_base": 0.5,
        "harness/arc_easy/acc_base_stderr": 0.03,
        "harness/arc_easy/samples": 200,
        "harness/gsm8k/exact_match/strict-match": 0.125,
        "harness/gsm8k/exact_match/strict-match_base": 0.25,
        "harness/gsm8k/samples": 8,
    }


ANY = st.text() | st.sampled_from(["..", ".", "/", "a//b", "../x", "a" * 300, "任务"])


@given(task=ANY, metric=ANY)
def test_mlflow_takes_the_metrics_of_any_task(task: str, metric: str) -> None:
    for name in metrics((Pair(task, metric, None, 0.0, 0.0, 0.0, 0.0, 1),)):
        _validate_metric_name(name)


@pytest.mark.parametrize(
    ("outcome", "told"),
    [
        (Outcome("r" * 32, PAIRS, True, "Be kind.", 0), "under the system prompt 'Be kind.'"),
        (Outcome("r" * 32, PAIRS, True, None, 0), "no system prompt given"),
        (Outcome("r" * 32, PAIRS, False, None, 0), "without chat template and system prompt"),
    ],
)
def test_the_table_has_both_their_difference_and_how_they_were_asked(
    outcome: Outcome, told: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    harness.show(outcome, Screen())
    out = capfd.readouterr().out
    for cell in ("acc ↑", "0.5000 ± 0.0300", "0.6250 ± 0.0400", "+0.1250 ± 0.0500", "-0.1250", "200", told, "r" * 32):
        assert cell in out
    monkeypatch.setenv("NAMESAKE_LANG", "zh")
    harness.show(outcome, Screen())
    assert "± 为一个标准误" in capfd.readouterr().out


def test_the_json_is_as_the_guide_shows_it() -> None:
    record = json.loads(json.dumps(Outcome("r" * 32, PAIRS[:1], True, "Be kind.", 200).record()))
    assert_as_shown("harness", record)
    assert record["results"][0]["difference"] == 0.125


@pytest.mark.parametrize(
    ("target", "tasks", "fault"),
    [
        ("http://127.0.0.1:8000/v1", "a", "is an endpoint"),
        ("ccb", "a", "is no run id"),
        ("a" * 32, " , ", "names no task"),
    ],
)
def test_what_cannot_be_asked_is_refused(target: str, tasks: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "check", lambda: None)  # also where lm-eval is not installed
    with pytest.raises(InputError, match=fault):
        harness.run(Request(target, tasks), Screen())


def test_the_command_asks_as_many_prompts_at_a_time_as_the_use_case() -> None:
    assert inspect.signature(cli.harness).parameters["batch_size"].default == Request("", "").batch_size


def test_without_lm_eval_nothing_else_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise HarnessError("not installed")

    monkeypatch.setattr(harness, "check", missing)
    with pytest.raises(HarnessError):
        harness.run(Request("", ""), Screen())
