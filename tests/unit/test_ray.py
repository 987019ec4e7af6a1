"""What Ray Tune is told and what is made of what it tells, without a cluster; the process that drives it."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.search import Searcher

from namesake import ray_backend, search, sweep
from namesake.errors import InputError, TrainingError
from namesake.ray_tune import SWIFT_GROUP, Asha, Proposals, share
from namesake.search import Parameter, Search, Trial
from namesake.sweep import Request
from namesake.terminal import Screen

RATE = {"learning_rate": Parameter(low=1e-4, high=1e-2, log=True)}


class Told(list[dict[str, Any]]):
    """The events, in their order."""

    def __call__(self, event: Mapping[str, Any]) -> None:
        self.append(json.loads(json.dumps(event)))


def ended(number: int, params: Mapping[str, Any], score: float) -> dict[str, Any]:
    """What a worker says at the end."""
    result = {"number": number, "params": params, "state": "complete", "score": score, "early": {}, "run": "r"}
    return {"result": json.dumps(result), "score": score, "time_total_s": 2.0}


def test_what_is_tried_is_what_would_be_tried_without_ray() -> None:
    wanted, told = Search(RATE, recipe="tutorial", trials=6), Told()
    proposals = Proposals(wanted, [], None, told)
    before: list[Trial] = []
    for number in range(6):
        config = proposals.suggest(f"t{number}")
        assert config == {"number": number, "params": search.propose(wanted, before, number)}
        before.append(Trial(number, config["params"], "complete", number / 10))
        proposals.on_trial_complete(f"t{number}", ended(number, config["params"], number / 10))
    assert proposals.suggest("t6") == Searcher.FINISHED
    assert [event["ended"]["number"] for event in told] == list(range(6))


def test_what_was_given_up_and_whose_process_died_is_told_with_what_was_seen_of_it() -> None:
    told = Told()
    proposals = Proposals(Search(RATE, trials=9), [], None, told)
    for trial in ("a", "b"):
        proposals.suggest(trial)
    look = {"rung": 1, "fraction": 1 / 3, "score": 0.25, "time_total_s": 7.04}
    proposals.on_trial_complete("a", look)
    proposals.on_trial_complete("b", None, error=True)
    pruned, failed = (event["ended"] for event in told)
    assert (pruned["number"], pruned["state"], pruned["early"]) == (0, "pruned", {"0.333": 0.25})
    assert (pruned["score"], pruned["seconds"]) == (None, 7.0)
    assert (failed["number"], failed["state"]) == (1, "failed")
    assert "died" in failed["error"]


def test_what_would_end_every_trial_is_told_and_nothing_more_is_tried() -> None:
    told = Told()
    proposals = Proposals(Search(RATE, trials=9), [], None, told)
    proposals.suggest("a")
    fatal = {"kind": "BaseModelError", "message": "no base", "mend": "Name one."}
    proposals.on_trial_complete("a", {"fatal": json.dumps(fatal)})
    assert told == [{"fatal": fatal}]
    assert proposals.suggest("b") == Searcher.FINISHED


def test_after_the_deadline_nothing_begins_and_that_is_told_once() -> None:
    told = Told()
    proposals = Proposals(Search(RATE, trials=9), [], 1.0, told)
    assert proposals.suggest("a") == proposals.suggest("b") == Searcher.FINISHED
    assert told == [{"late": True}]


def test_a_sweep_that_goes_on_asks_for_what_is_left() -> None:
    known = {"number": 1, "params": {"learning_rate": 1e-3}, "state": "pruned", "score": None, "early": {"0.5": 0.2}}
    proposals = Proposals(Search(RATE, trials=3), [known], None, Told())
    assert proposals.left == 2
    assert [proposals.suggest(name)["number"] for name in ("a", "b")] == [0, 2]  # type: ignore[index]


def looked(asha: Asha, trial: str, *scores: float) -> list[str]:
    """What is decided at each look at a trial."""
    one = SimpleNamespace(trial_id=trial)
    asha.on_trial_add(None, one)
    return [asha.on_trial_result(None, one, {"rung": 2**n, "score": score}) for n, score in enumerate(scores)]


def finish(asha: Asha, trial: str, score: float) -> None:
    asha.on_trial_complete(None, SimpleNamespace(trial_id=trial), {"score": score})


def test_every_look_is_a_rung_and_whoever_is_below_the_middle_of_those_seen_there_goes() -> None:
    asha = Asha(Search(RATE, trials=9, at=(0.2, 0.5, 0.9), after=1), [])
    assert looked(asha, "a", 0.2, 0.5, 0.6) == ["CONTINUE"] * 3
    finish(asha, "a", 0.7)
    assert looked(asha, "b", 0.3, 0.4) == ["CONTINUE", "STOP"]
    assert looked(asha, "c", 0.3, 0.6, 0.5) == ["CONTINUE", "CONTINUE", "STOP"]
    assert looked(asha, "d", 0.1) == ["STOP"]


def test_nobody_is_given_up_before_so_many_have_finished_those_before_an_interruption_counted() -> None:
    wanted = Search(RATE, trials=9, at=(0.5,), after=2)
    asha = Asha(wanted, [])
    assert looked(asha, "a", 0.5) == looked(asha, "b", 0.4) == looked(asha, "c", 0.1) == ["CONTINUE"]
    finish(asha, "a", 0.7)
    finish(asha, "b", 0.7)
    assert looked(asha, "d", 0.2) == ["STOP"]
    before = [Trial(number, {}, "complete", 0.7, {0.5: 0.5}) for number in range(2)]
    assert looked(Asha(wanted, before), "e", 0.2) == ["STOP"]
    assert looked(Asha(wanted, before[:1]), "e", 0.2) == ["CONTINUE"]


@pytest.mark.parametrize(
    ("nodes", "each"),
    [
        ([{"CPU": 0.0}, {"CPU": 8.0}, {"CPU": 4.0}], {"cpu": 4}),
        ([{"CPU": 8.0}, {"CPU": 16.0, "GPU": 2.0}, {"CPU": 32.0, "GPU": 8.0}], {"cpu": 4, "gpu": 1}),
        ([{"CPU": 2.0, "GPU": 4.0}], {"cpu": 1, "gpu": 1}),
        ([{}], {"cpu": 1}),  # workers that are started when they are asked for
    ],
)
def test_a_trial_has_a_gpu_with_its_share_of_processors_or_a_node(
    nodes: list[dict[str, float]], each: dict[str, float]
) -> None:
    assert share([{"Resources": resources} for resources in nodes]) == each


def test_without_ray_and_through_its_client_a_sweep_is_refused_with_the_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    with pytest.raises(InputError, match=r"RAY_ADDRESS='ray://head:10001'.*ray job submit"):
        sweep.sweep(Request(backend="ray"), Screen())
    monkeypatch.setattr(ray_backend.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"backend='ray': Ray is not installed.*requirements/ray.txt"):
        sweep.sweep(Request(backend="ray"), Screen())
    with pytest.raises(InputError, match="backend='rya': is none of local, ray"):
        sweep.sweep(Request(backend="rya"), Screen())


def test_the_driver_has_ended_when_whoever_listens_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    says = 'import json, os, sys, time; print(json.dumps({"pid": os.getpid(), **json.load(sys.stdin)}), flush=True); '
    monkeypatch.setattr(ray_backend, "_DRIVER", says + "time.sleep(60)")
    with closing(ray_backend.events({"x": "踩"}, mend="")) as events:
        said = next(events)
    assert said["x"] == "踩"
    with pytest.raises(ProcessLookupError):
        os.kill(said["pid"], 0)
    monkeypatch.setattr(ray_backend, "_DRIVER", says + "sys.exit('the head is gone')")
    with pytest.raises(TrainingError, match="exit code 1: the head is gone") as caught:
        list(ray_backend.events({}, mend="Go on."))
    assert caught.value.mend == "Go on."


@pytest.mark.parametrize(
    ("address", "runs_here", "closed"),
    [("local", True, True), ("", False, True), ("", True, False), ("10.0.0.1:6379", False, False)],
)
def test_a_ray_of_ones_own_is_for_this_machine_and_takes_only_who_has_its_token(
    address: str, runs_here: bool, closed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"):
        monkeypatch.delenv(name, raising=False)
    if runs_here:
        (tmp_path / "ray").mkdir()
        (tmp_path / "ray" / "ray_current_cluster").touch()
    monkeypatch.setattr(ray_backend, "_DRIVER", "import json, os; print(json.dumps(dict(os.environ)))")
    [environment] = ray_backend.events({}, mend="")
    assert (environment.get("RAY_AUTH_MODE") == "token") is closed
    assert (environment.get("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER") == "0") is closed
    assert len(environment.get("RAY_AUTH_TOKEN", "")) == (64 if closed else 0)


def test_all_of_swift_sft_is_in_the_group_that_a_worker_names() -> None:
    found = importlib.util.find_spec("swift")
    assert found is not None
    assert found.origin is not None
    source = (Path(found.origin).parent / "pipelines" / "train" / "sft.py").read_text(encoding="utf-8")
    groups = re.findall(r"@RayHelper\.\w+\(group=(\S+)\)", source)
    assert len(groups) > 3
    assert {group.strip("[]'") for group in groups} == {SWIFT_GROUP}
