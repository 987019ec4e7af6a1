"""The use case ``namesake harness``: public tasks, or the user's own, asked of a base and of what was tuned from it.

Both get the same questions in the same form: chat template, system prompt of the training, limit. What they score
goes to the training run as metrics, with the harness's own result files.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from namesake import examine, registry, tracking
from namesake.base_model import BaseModel
from namesake.errors import InputError
from namesake.evaluation import BATCH, Evaluation, Harness, Score, check
from namesake.generate import LocalModel
from namesake.manifest import WEIGHTS_FOLDER, Manifest
from namesake.messages import Message, tr
from namesake.run import base_of, progress_of
from namesake.terminal import Screen
from namesake.tracking import RunRecord
from namesake.versions import checked

FOLDER = "harness"
"""Of metrics and artifacts of a run."""

_PART = 70
"""Characters of a task's or a metric's name in MLflow, which takes 250 altogether."""

_AT_ONCE = 500
"""Metrics that are logged in one call; MLflow takes 1000."""


@dataclass(frozen=True)
class Request:
    """What the user asked for.

    Attributes:
        target: run id, or ``models:/…``.
        tasks: names of tasks, groups or tags, with commas between.
        include_path: folder of further task files; empty for none.
        limit: at most so many questions of each task; 0 for all.
        batch_size: prompts that are asked at a time.
        chat_template: whether questions are put into the chat template, under the training's system prompt.
    """

    target: str
    tasks: str
    include_path: str = ""
    limit: int = 0
    batch_size: int = BATCH
    chat_template: bool = True


@dataclass(frozen=True)
class Pair:
    """A metric of both models. Standard errors are the harness's, none where it states none."""

    task: str
    metric: str
    higher_is_better: bool | None
    base: float
    base_stderr: float | None
    tuned: float
    tuned_stderr: float | None
    samples: int

    @property
    def difference(self) -> float:
        """How much more the tuned model has."""
        return self.tuned - self.base

    @property
    def difference_stderr(self) -> float | None:
        """As of two independent samples, as lm-eval's ``scripts/model_comparator.py`` takes it. Both answer the same
        questions, so it errs on the wide side.
        """
        if self.base_stderr is None or self.tuned_stderr is None:
            return None
        return math.hypot(self.base_stderr, self.tuned_stderr)


@dataclass(frozen=True)
class Outcome:
    """What came of it.

    Attributes:
        run: the training run that it is kept with.
        system: the system prompt both were asked under; none where none was given.
        limit: 0 where all questions were asked.
    """

    run: str
    pairs: tuple[Pair, ...]
    chat_template: bool
    system: str | None
    limit: int

    def record(self) -> dict[str, Any]:
        """As it goes into JSON."""
        return {
            "run": self.run,
            "chat_template": self.chat_template,
            "system": self.system,
            "limit": self.limit,
            "results": [
                {**vars(pair), "difference": pair.difference, "difference_stderr": pair.difference_stderr}
                for pair in self.pairs
            ],
        }


def run(request: Request, screen: Screen) -> Outcome:
    """Ask base and tuned model, and keep the scores with the training run. Nothing is written before both are asked.

    Raises:
        InputError: the target is none, a task is unknown or its data cannot be had.
        HarnessError: lm-eval is not installed, or failed.
        BaseModelError, PromotionError, RegistryError, TrackingError: the models cannot be had, or MLflow failed.
    """
    check()
    names = tuple(dict.fromkeys(filter(None, (part.strip() for part in request.tasks.split(",")))))
    if not names:
        raise InputError("tasks", request.tasks, "names no task", mend="Write --tasks arc_easy,hellaswag.")
    record, folder, system = _target(request.target)
    base = base_of(record, screen)
    screen.step("looking for the tasks and their data")
    harness = Harness(names, include_path=Path(request.include_path).expanduser() if request.include_path else None)
    system = system if request.chat_template else None
    found = {}
    for side, told in (("base", tr("asking the base model")), ("tuned", tr("asking the tuned model"))):
        screen.step(told)
        with _loaded(side, record, base, folder) as model, screen.bar(side, 1) as bar:
            found[side] = harness.evaluate(
                model,
                system=system,
                chat_template=request.chat_template,
                limit=request.limit or None,
                batch=request.batch_size,
                progress=progress_of(bar),
            )
    pairs = paired(found["base"].scores, found["tuned"].scores)
    _keep(record.id, pairs, found)
    return Outcome(record.id, pairs, request.chat_template, system, request.limit)


def paired(base: tuple[Score, ...], tuned: tuple[Score, ...]) -> tuple[Pair, ...]:
    """The metrics that both have, in the tuned model's order."""
    before = {(score.task, score.metric): score for score in base}
    return tuple(
        Pair(
            score.task,
            score.metric,
            score.higher_is_better,
            was.value,
            was.stderr,
            score.value,
            score.stderr,
            score.samples,
        )
        for score in tuned
        if (was := before.get((score.task, score.metric)))
    )


def metrics(pairs: tuple[Pair, ...]) -> dict[str, float]:
    """``harness/TASK/METRIC`` of the tuned model, ``…_base`` of its base, both with their ``…_stderr``, and how many
    questions it was: ``harness/TASK/samples``.
    """
    found: dict[str, float] = {}
    for pair in pairs:
        name = _key(pair.task, *pair.metric.split("/"))
        for suffix, value, stderr in (
            ("", pair.tuned, pair.tuned_stderr),
            ("_base", pair.base, pair.base_stderr),
        ):
            found[f"{name}{suffix}"] = value
            if stderr is not None:
                found[f"{name}{suffix}_stderr"] = stderr
        found[_key(pair.task, "samples")] = pair.samples
    return found


def show(outcome: Outcome, screen: Screen) -> None:
    """The scores on the terminal, side by side."""
    arrows = {True: " ↑", False: " ↓", None: ""}
    screen.table(
        ("task", "metric", "questions", "base", "tuned", "difference"),
        [
            (
                pair.task,
                f"{pair.metric}{arrows[pair.higher_is_better]}",
                str(pair.samples),
                _with_error(pair.base, pair.base_stderr),
                _with_error(pair.tuned, pair.tuned_stderr),
                _with_error(pair.difference, pair.difference_stderr, "+"),
            )
            for pair in outcome.pairs
        ],
    )
    screen.line(_form(outcome))
    screen.line(tr("  kept with run {id}: metrics and files under {folder}/", id=outcome.run, folder=FOLDER))


def _key(*parts: str) -> str:
    """A metric's name as MLflow takes it: letters, digits and ``_-.``, never a path that leads elsewhere."""
    clean = (re.sub(r"[^\w.-]", "_", part).lstrip(".")[:_PART] or "_" for part in parts)
    return "/".join((FOLDER, *clean))


def _with_error(value: float, stderr: float | None, sign: str = "") -> str:
    return f"{value:{sign}.4f}" + (f" ± {stderr:.4f}" if stderr is not None else "")


def _form(outcome: Outcome) -> Message:
    if not outcome.chat_template:
        return tr("  ± is one standard error; both asked without chat template and system prompt")
    if outcome.system is None:
        return tr("  ± is one standard error; both asked in their chat template, no system prompt given")
    return tr(
        "  ± is one standard error; both asked in their chat template under the system prompt {system}",
        system=repr(outcome.system),
    )


def _target(target: str) -> tuple[RunRecord, Path | None, str | None]:
    """The training run, a version's folder, and the system prompt of the training."""
    if target.startswith(("http://", "https://")):
        raise InputError(
            "target",
            target,
            "is an endpoint, where no base stands beside the tuned model",
            mend="Give a run's id or models:/NAME@ALIAS.",
        )
    if target.startswith("models:/"):
        version = registry.resolve(target)
        folder = checked(version)
        made = Manifest.read(folder)
        return tracking.get_run(made.run), folder, made.system
    record = tracking.get_run(examine.run_id(target))
    return record, None, record.params.get("sft.system")


@contextmanager
def _loaded(side: str, record: RunRecord, base: BaseModel, folder: Path | None) -> Iterator[LocalModel]:
    if side == "base":
        model = LocalModel(base.path)
    elif folder:
        model = LocalModel(folder / WEIGHTS_FOLDER)
    else:
        model = LocalModel(base.path, tracking.fetch(record.id, tracking.ADAPTER), folded=True)
    with model:
        yield model


def _keep(run_id: str, pairs: tuple[Pair, ...], found: Mapping[str, Evaluation]) -> None:
    tracked = tracking.Run(run_id, "")
    at = datetime.now(UTC).strftime("%Y-%m-%dT%H-%M-%SZ")
    for side, evaluation in found.items():
        tracked.text(json.dumps(evaluation.results, ensure_ascii=False, indent=1), f"{FOLDER}/results_{at}_{side}.json")
    values = [*metrics(pairs).items()]
    for first in range(0, len(values), _AT_ONCE):
        tracked.metrics(dict(values[first : first + _AT_ONCE]))
