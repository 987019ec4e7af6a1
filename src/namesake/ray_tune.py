"""A sweep's trials through Ray Tune: what the driving process runs, and what each worker runs (only importer of Ray).

Tune schedules (Liaw et al. 2018, arXiv 1807.05118) and prunes (ASHA, Li et al. 2020, arXiv 1810.05934); what is tried
next is :func:`namesake.search.propose`, as without Ray. Nothing is kept: what came of a trial is written into MLflow by
the worker, so that a sweep goes on from there whatever became of the cluster.
"""

from __future__ import annotations

import importlib
import json
import os
import queue
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from namesake import process, search
from namesake.errors import NamesakeError
from namesake.messages import tr
from namesake.paths import temporary
from namesake.search import Search, Trial
from namesake.terminal import Screen

Tell = Callable[[dict[str, Any]], None]

_KEPT_TO_THEIR_MIDDLE = 2
"""ASHA's reduction factor: of those that were looked at at one point, half go on. The median rule does the same."""

SWIFT_GROUP = "default"
"""ms-swift takes a process of Ray's for one that it has started, and asks for its group: of `swift sft`, this."""

_AGAIN = 1
"""So often a trial is begun anew whose process or node died; a second death is a failure."""


def main() -> None:
    """Run the job on standard input, a JSON object; write an event a line, each a JSON object, to standard output.

    The job: ``plan``, ``parent``, ``search`` and ``results`` as in :mod:`namesake.sweep`; ``trial``, the function that
    runs one, as ``module:name``; ``uri`` and ``folder``, where MLflow and relative paths are; ``deadline``, seconds
    since 1970 after which no trial begins, or null.

    The events: ``{"cluster": address, "nodes": number, "each": resources}`` at the beginning; ``{"began": number,
    "params": …}``; ``{"ended": result}``; ``{"late": true}`` once no trial begins any more; ``{"fatal": {"kind",
    "message", "mend"}}``, what would end every other trial; ``{"elsewhere": [address, …]}``, nodes that do not reach
    a store of files, after which nothing comes.
    """
    job = json.load(sys.stdin)
    # Whatever Ray and its libraries print goes into the log, so that the events have the pipe for themselves.
    events = os.dup(1)
    os.dup2(2, 1)
    os.environ |= {
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # MLflow has the results
        "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a failed trial has no score
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
    }

    def tell(event: dict[str, Any]) -> None:
        os.write(events, (json.dumps(event, ensure_ascii=False) + "\n").encode())

    ray.init(log_to_driver=False)
    nodes = [node for node in ray.nodes() if node["Alive"]]
    elsewhere = {node["NodeManagerAddress"] for node in nodes} - {ray.util.get_node_ip_address()}
    if elsewhere and urlsplit(job["uri"]).scheme in {"", "file", "sqlite"}:
        tell({"elsewhere": sorted(elsewhere)})
    else:
        _tune(job, nodes, tell)
    ray.shutdown()


def _tune(job: Mapping[str, Any], nodes: Sequence[Mapping[str, Any]], tell: Tell) -> None:
    wanted = Search.of_record(job["search"])
    proposals = Proposals(wanted, job["results"], job["deadline"], tell)
    each = share(nodes)
    tell({"cluster": ray.get_runtime_context().gcs_address, "nodes": len(nodes), "each": each})
    work = {key: job[key] for key in ("plan", "parent", "trial", "uri", "folder", "deadline")}
    # Parameters and not configuration: Tune writes configurations to its folder, and the URI may hold a password.
    trainable = tune.with_resources(tune.with_parameters(Worker, work={**work, "at": list(wanted.at)}), each)
    # A folder on this machine is enough: no worker keeps anything there, and nothing is restored from it.
    with tempfile.TemporaryDirectory(prefix=temporary("tune")) as folder:
        tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                search_alg=proposals,
                scheduler=Asha(wanted, proposals.before) if wanted.at else FIFOScheduler(),
                num_samples=proposals.left,
            ),
            run_config=tune.RunConfig(
                name="sweep",
                storage_path=folder,
                callbacks=[_Began(tell)],
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                failure_config=tune.FailureConfig(max_failures=_AGAIN),
                verbose=0,
            ),
        ).fit()


def share(nodes: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What a trial is given: a GPU with its share of the node's processors; without GPUs a whole node's processors, as
    two trainings on the same ones slow each other down twentyfold (docs/lab-notes.md).

    Args:
        nodes: as :func:`ray.nodes` has them; those without processors run nothing.
    """
    offered = [one for one in (node["Resources"] for node in nodes) if one.get("CPU", 0) >= 1]
    with_gpu = [one for one in offered if one.get("GPU", 0) >= 1]
    if with_gpu:
        return {"cpu": max(1, min(one["CPU"] // one["GPU"] for one in with_gpu)), "gpu": 1}
    return {"cpu": min((one["CPU"] for one in offered), default=1)}


class Proposals(Searcher):  # type: ignore[misc]
    """Asks :func:`namesake.search.propose` what is tried next, and tells what came of it.

    Not Tune's ``OptunaSearch``: it keeps a study of its own in which what was pruned counts as complete with the score
    it had then, and neither tries all combinations nor begins with the recipe as it is.
    """

    def __init__(
        self, wanted: Search, results: Sequence[Mapping[str, Any]], deadline: float | None, tell: Tell
    ) -> None:
        super().__init__(metric="score", mode="max")
        self.before = [Trial.of_result(result) for result in results]
        done = {trial.number for trial in self.before}
        self._numbers = [number for number in range(wanted.total) if number not in done]
        self._wanted, self._deadline, self._tell = wanted, deadline, tell
        self._under_way: dict[str, dict[str, Any]] = {}
        self._told_late = False

    @property
    def left(self) -> int:
        """Trials that have not been asked for."""
        return len(self._numbers)

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        """The configuration of the next trial."""
        if self._deadline is not None and time.time() >= self._deadline:
            self._late()
            return str(Searcher.FINISHED)
        if not self._numbers:
            return str(Searcher.FINISHED)
        number = self._numbers.pop(0)
        config = {"number": number, "params": search.propose(self._wanted, self.before, number)}
        self._under_way[trial_id] = {**config, "early": {}}
        return config

    def on_trial_result(self, trial_id: str, result: Mapping[str, Any]) -> None:
        """A look at a training."""
        if "rung" in result:
            self._under_way[trial_id]["early"][f"{result['fraction']:.3f}"] = result["score"]

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        """A trial has ended, or is given up after the look that was the last."""
        self.on_trial_result(trial_id, result or {})
        known = self._under_way.pop(trial_id)
        if result and "fatal" in result:
            self._numbers.clear()
            self._tell({"fatal": json.loads(result["fatal"])})
            return
        if result and "late" in result:
            self._late()
            return
        if result and "result" in result and not error:
            ended = json.loads(result["result"])
        else:
            ended = {**known, "run": "", "score": None, "scores": {}, "gate": ""}
            ended["seconds"] = round(float((result or {}).get("time_total_s", 0.0)), 1)
            ended["state"] = "failed" if error else "pruned"
            ended["error"] = tr("its process or its node died, or could not start") if error else ""
        self.before.append(Trial.of_result(ended))
        self._tell({"ended": ended})

    def save(self, checkpoint_path: str) -> None:
        """Tune keeps what a searcher knows beside its own state; this one knows nothing that MLflow does not."""
        Path(checkpoint_path).touch()

    def _late(self) -> None:
        if not self._told_late:
            self._tell({"late": True})
        self._told_late = True


class Asha(ASHAScheduler):  # type: ignore[misc]
    """ASHA with a rung for each of the space's looks: the n-th has the "time" 2ⁿ, which is where rungs are.

    As the median rule without Ray, it gives nobody up before so many trials have finished.
    """

    def __init__(self, wanted: Search, before: Sequence[Trial]) -> None:
        super().__init__(
            time_attr="rung",
            metric="score",
            mode="max",
            max_t=2 ** len(wanted.at),
            reduction_factor=_KEPT_TO_THEIR_MIDDLE,
        )
        self._after = wanted.after
        self._finished = sum(trial.state == "complete" for trial in before)
        # What was seen of the trials before an interruption.
        for trial in before:
            known = SimpleNamespace(trial_id=f"earlier-{trial.number}")
            self.on_trial_add(None, known)
            for index, fraction in enumerate(sorted(trial.early)):
                super().on_trial_result(None, known, {"rung": 2**index, "score": trial.early[fraction]})

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """A look at a training: whether it goes on."""
        action = str(super().on_trial_result(tune_controller, trial, result))
        return action if self._finished >= self._after else str(TrialScheduler.CONTINUE)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """A training has come to its end."""
        super().on_trial_complete(tune_controller, trial, result)
        self._finished += "score" in result and "rung" not in result


class _Began(tune.Callback):  # type: ignore[misc]
    def __init__(self, tell: Tell) -> None:
        self._tell = tell

    def on_trial_start(self, **info: Any) -> None:
        config = info["trial"].config
        self._tell({"began": config["number"], "params": config["params"]})

    def on_trial_error(self, **info: Any) -> None:
        # Tune's own files about it go with the sweep's folder.
        said = str(info["trial"].get_error() or "").strip().splitlines()
        self._tell({"fault": said[-1][-1000:] if said else "", "of": info["trial"].config["number"]})


class Worker(tune.Trainable):  # type: ignore[misc]
    """One trial on a node. A step is the training up to the next look, or to its end."""

    def setup(self, config: dict[str, Any], work: Mapping[str, Any]) -> None:
        """In the worker's process, which is this trial's alone."""
        process.settle()
        os.environ["MLFLOW_TRACKING_URI"] = work["uri"]
        os.environ["RAY_SWIFT_GROUP"] = SWIFT_GROUP
        with suppress(OSError):  # another machine need not have it
            os.chdir(work["folder"])
        self._late = work["deadline"] is not None and time.time() >= work["deadline"]
        self._said = queue.SimpleQueue[dict[str, Any]]()
        self._answers = queue.SimpleQueue[bool]()
        self._waits = False
        # A training does not return at each look; the thread keeps it where it is.
        self._thread = threading.Thread(target=self._train, args=(config, work), daemon=True)

    def step(self) -> dict[str, Any]:
        if self._late:
            return {"late": True, "done": True}
        if self._waits:
            self._answers.put(True)
        else:
            self._thread.start()
        said = self._said.get()
        self._waits = "rung" in said
        return said

    def cleanup(self) -> None:
        """What waits at a look is given up: its run ends and says so."""
        if self._waits:
            self._answers.put(False)
            self._thread.join()

    def _train(self, config: Mapping[str, Any], work: Mapping[str, Any]) -> None:
        looks = 0

        def go_on(fraction: float, score: float) -> bool:
            nonlocal looks
            self._said.put({"rung": 2**looks, "fraction": fraction, "score": score})
            looks += 1
            return self._answers.get()

        # Tune takes what is nested apart, so the last word is text.
        spec = {**work["plan"], "parent": work["parent"], "at": work["at"], **config}
        module, _, name = work["trial"].partition(":")
        try:
            result = getattr(importlib.import_module(module), name)(spec, go_on, Screen())
        except NamesakeError as error:
            fatal = {"kind": type(error).__name__, "message": error.message, "mend": error.mend}
            self._said.put({"fatal": json.dumps(fatal), "done": True})
        except BaseException as error:
            traceback.print_exc()
            fatal = {"kind": "TrainingError", "message": f"{type(error).__name__}: {error}", "mend": ""}
            self._said.put({"fatal": json.dumps(fatal), "done": True})
        else:
            scored = {} if result["score"] is None else {"score": result["score"]}
            self._said.put({"result": json.dumps(result), **scored, "done": True})
