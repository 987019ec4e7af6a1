"""A sweep on a real MLflow store: nested runs, going on after an interruption, and what promotion takes of it.

What a trial trains is given (its scores are a function of its parameters); everything that is kept, read and drawn is
real. `tests/e2e/test_over_http.py` trains.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlflow
import pytest

from namesake import promotion, run, sweep, tracking
from namesake.errors import InputError, RegistryError, Stopped, TrackingError, TrainingError
from namesake.sweep import GoOn, Request
from namesake.terminal import Screen
from tests.json_page import assert_as_shown

NAME, AUTHOR = "踩踩背 CCB", "老爷爷 OldGrandpa"
SPACE = "trials: 6\nprune: {at: [0.5], after: 2}\nparameters:\n  learning_rate: {range: [1.0e-4, 1.0e-2], log: true}\n"

Params = Mapping[str, Any]


def better_when_higher(params: Params) -> float:
    """A score, the higher the higher the learning rate."""
    return min(1.0, 100 * float(params["learning_rate"]))


class Trainer:
    """Stands where ms-swift would train; the runs it leaves are as those of :func:`namesake.sweep.run_trial`."""

    def __init__(self, score: Callable[[Params], float] = better_when_higher) -> None:
        self.asked: list[Params] = []
        self._score = score

    def __call__(self, spec: Mapping[str, Any], go_on: GoOn, screen: Screen) -> dict[str, Any]:
        json.dumps(spec)  # plain data
        self.asked.append(spec["params"])
        score = self._score(spec["params"])
        early = {f"{fraction:.3f}": score / 2 for fraction in spec["at"]}
        pruned = True
        with suppress(Stopped), tracking.run(f"trial {spec['number']}", parent=spec["parent"]) as tracked:
            number = str(spec["number"])
            tracked.tags({tracking.TAG_KIND: "train", tracking.TAG_NAME: spec["name"], sweep.TAG_TRIAL: number})
            if not all(go_on(fraction, score / 2) for fraction in spec["at"]):
                raise Stopped("pruned")
            pruned = False
            # The held-out questions tell the trials apart the other way round.
            tracked.metrics({"probe/identity": 1 - score / 2, "probe/leak": 0.0, "dev/score": score})
        result = {
            "number": spec["number"],
            "run": tracked.id,
            "state": "pruned" if pruned else "complete",
            "params": spec["params"],
            "score": None if pruned else score,
            "scores": {} if pruned else {"identity": score},
            "early": early,
            "gate": "failed: x",
            "seconds": 1.0,
            "error": "",
        }
        tracking.tag(tracked.id, {sweep.TAG_RESULT: json.dumps(result)})
        return result


@pytest.fixture
def request_(client: mlflow.MlflowClient, tmp_path: Path) -> Request:
    """A sweep of six trials on a fresh store."""
    (tmp_path / "space.yaml").write_text(SPACE, encoding="utf-8")
    return Request(NAME, AUTHOR, space=str(tmp_path / "space.yaml"))


def test_trials_are_nested_under_one_parent_that_holds_table_plots_and_the_best(
    request_: Request, client: mlflow.MlflowClient, capfd: pytest.CaptureFixture[str]
) -> None:
    outcome = sweep.sweep(request_, Screen(), Trainer())
    parent = client.get_run(outcome.run_id)
    children = tracking.children(outcome.run_id)
    assert len(children) == 6
    ended = {(child.status, child.tags.get(tracking.TAG_ENDED, "")) for child in children}
    assert ended == {("FINISHED", ""), ("KILLED", "pruned")}
    assert outcome.best is not None
    assert outcome.best["score"] == max(one["score"] or 0 for one in outcome.results)
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["namesake.sweep.best"] == outcome.best["run"]
    assert parent.data.tags["namesake.kind"] == "sweep"
    assert outcome.best["run"] in parent.data.tags["mlflow.note.content"]
    states = [one["state"] for one in outcome.results]
    assert parent.data.metrics["sweep/pruned"] == states.count("pruned") > 0
    files = {one.path for one in client.list_artifacts(outcome.run_id)}
    assert {"sweep.json", "trials.json", "plots"} <= files
    assert {one.path for one in client.list_artifacts(outcome.run_id, "plots")} >= {"plots/parallel-coordinates.png"}
    table = json.loads(tracking.fetch(outcome.run_id, "trials.json").read_text(encoding="utf-8"))
    assert len(table["data"]) == 6
    assert_as_shown("sweep", json.loads(json.dumps(outcome.record())))
    shown = capfd.readouterr().out
    assert f"namesake promote --run {outcome.best['run']}" in shown
    assert "pruned after 50% of the training" in shown


@pytest.mark.parametrize(
    "error", [RuntimeError("probability tensor contains either inf, nan or element < 0"), MemoryError()], ids=str
)
def test_a_trial_that_breaks_in_a_way_that_nobody_foresaw_is_one_that_failed(
    client: mlflow.MlflowClient, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def breaks(_request: run.Request, _screen: Screen, _watch: object) -> None:
        raise error

    monkeypatch.setattr(run, "run", breaks)
    spec = {"number": 3, "parent": "p", "at": [], "questions": "", "params": {"learning_rate": 0.1}, "overrides": {}}
    spec |= {"name": NAME, "author": AUTHOR, "model": "auto", "dataset": "", "recipe": "default", "policy": {}}
    result = sweep.run_trial(spec, lambda _fraction, _score: True, Screen())
    assert (result["state"], result["number"]) == ("failed", 3)
    assert result["error"].startswith(type(error).__name__)
    error = RegistryError("The registry is away.")
    with pytest.raises(RegistryError):
        sweep.run_trial(spec, lambda _fraction, _score: True, Screen())


def test_a_sweep_that_is_interrupted_goes_on_and_comes_to_the_same(
    request_: Request, client: mlflow.MlflowClient, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = Trainer()
    sweep.sweep(request_, Screen(), whole)

    def interrupted(spec: Mapping[str, Any], go_on: GoOn, screen: Screen) -> dict[str, Any]:
        if spec["number"] == 3:
            with tracking.run("trial 3", parent=spec["parent"]):
                raise KeyboardInterrupt
        return first(spec, go_on, screen)

    first, second = Trainer(), Trainer()
    with pytest.raises(KeyboardInterrupt):
        sweep.sweep(request_, Screen(), interrupted)
    [parent] = client.search_runs(["0"], "attributes.status = 'KILLED' and tags.`namesake.kind` = 'sweep'")
    assert f"namesake sweep --resume {parent.info.run_id}" in capfd.readouterr().out
    # Killed hard meanwhile: its run is still said to be running.
    left = client.create_run("0", tags={tracking.TAG_PARENT: parent.info.run_id})
    outcome = sweep.sweep(Request(resume=parent.info.run_id), Screen(), second)
    assert outcome.run_id == parent.info.run_id
    assert [*first.asked, *second.asked] == whole.asked
    assert len(outcome.results) == 6
    again = client.get_run(parent.info.run_id)
    assert again.info.status == "FINISHED"
    assert tracking.TAG_ENDED not in again.data.tags
    assert client.get_run(left.info.run_id).info.status == "KILLED"


def test_a_sweep_under_mlflow_run_goes_on_with_the_first_parent_and_says_so_on_the_new_one(
    request_: Request, client: mlflow.MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = sweep.sweep(request_, Screen(), Trainer()).run_id
    new = client.create_run("0").info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", new)
    assert sweep.sweep(Request(resume=parent), Screen(), Trainer()).run_id == parent
    assert client.get_run(new).data.tags["namesake.resumed"] == parent


def test_when_the_time_is_over_no_trial_begins_and_the_rest_can_be_gone_on_with(request_: Request) -> None:
    with pytest.raises(TrainingError, match="No trial came to its end") as caught:
        sweep.sweep(Request(**{**vars(request_), "minutes": 0.0}), Screen(), Trainer())
    parent = caught.value.mend.rpartition(" ")[2].rstrip(".")
    outcome = sweep.sweep(Request(resume=parent, minutes=5.0), Screen(), Trainer())
    assert (len(outcome.results), outcome.left) == (6, 0)


def failing(numbers: set[int]) -> Callable[..., dict[str, Any]]:
    """A trainer whose trials of the numbers fail."""
    trains = Trainer()

    def one(spec: Mapping[str, Any], go_on: GoOn, screen: Screen) -> dict[str, Any]:
        result = trains(spec, go_on, screen)
        failed = {"state": "failed", "score": None, "error": "no memory"}
        return {**result, **failed} if spec["number"] in numbers else result

    return one


def test_failed_trials_are_told_and_the_others_go_on_but_three_in_a_row_end_it(request_: Request) -> None:
    outcome = sweep.sweep(request_, Screen(), failing({0, 2, 3}))
    assert [one["state"] for one in outcome.results].count("failed") == 3
    assert outcome.best is not None
    with pytest.raises(TrainingError, match="3 trials in a row failed, the last with: no memory"):
        sweep.sweep(request_, Screen(), failing({1, 2, 3}))


def test_promotion_takes_of_a_sweep_the_best_by_the_development_questions(request_: Request) -> None:
    outcome = sweep.sweep(request_, Screen(), Trainer())
    best = promotion.choose(tracking.finished_runs())
    assert outcome.best is not None
    assert best is not None
    assert best.id == outcome.best["run"]
    # By the held-out questions another child is better, and a run of its own is judged by those.
    others = [run.metrics["probe/identity"] for run in tracking.finished_runs() if run.id != best.id]
    assert max(others) > best.metrics["probe/identity"]
    with tracking.run("alone") as alone:
        alone.tags({tracking.TAG_KIND: "train", tracking.TAG_NAME: NAME})
        alone.metrics({"probe/identity": best.metrics["probe/identity"] + 0.01, "probe/leak": 0.0})
    chosen = promotion.choose(tracking.finished_runs())
    assert chosen is not None
    assert chosen.id == alone.id


def test_bad_requests_are_refused_before_anything_is_written(request_: Request, client: mlflow.MlflowClient) -> None:
    for change, says in (
        ({"recipes": ("default",)}, "excludes a space"),
        ({"trials": 0}, "at least 1"),
        ({"overrides": {"learning_rate": "1e-3"}}, "is varied by the space already"),
        ({"overrides": {"learning_rat": "1e-3"}}, "no argument of ms-swift"),
        ({"name": "x"}, "no second half"),
        ({"questions": "nowhere.jsonl"}, "cannot be read"),
    ):
        with pytest.raises(InputError, match=says):
            sweep.sweep(Request(**{**vars(request_), **change}), Screen(), Trainer())
    assert client.search_runs(["0"]) == []


def test_going_on_with_something_else_than_a_sweep_is_refused(request_: Request, client: mlflow.MlflowClient) -> None:
    other = client.create_run("0").info.run_id
    with pytest.raises(InputError, match="is no sweep"):
        sweep.sweep(Request(resume=other), Screen(), Trainer())
    with pytest.raises(TrackingError):
        sweep.sweep(Request(resume="0" * 32), Screen(), Trainer())
    with pytest.raises(InputError, match="goes on with what was asked for then"):
        sweep.sweep(Request(resume=other, trials=3), Screen(), Trainer())
