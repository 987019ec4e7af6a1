"""The use case ``namesake sweep``: several training runs under one parent, the best named by development questions.

search space → parameters → :func:`run_trial` → scores → parameters …; each trial is an ordinary training run that
``promote`` can take. Which trial is best, and which is given up early, is decided on the development questions; the
held-out ones are the gate's alone. All state lies in MLflow: a sweep that was interrupted goes on from its parent run.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from namesake import base_model, corpus, plots, ray_backend, recipe, run, search, tracking
from namesake.corpus import Questions
from namesake.errors import (
    BaseModelError,
    DataError,
    InputError,
    NamesakeError,
    Stopped,
    TrackingError,
    TrainingError,
)
from namesake.gate import Policy
from namesake.identity import Identity
from namesake.messages import tr
from namesake.paths import store_address, temporary
from namesake.search import Search, Trial
from namesake.terminal import Screen
from namesake.tracking import RunRecord

PLAN = "sweep.json"
"""Artifact of the parent: what was asked for, from which the sweep goes on."""

TABLE = "trials.json"
TAG_RESULT = "namesake.sweep.result"
TAG_TRIAL = "namesake.sweep.trial"
TAG_BEST = "namesake.sweep.best"

BACKENDS = ("local", "ray")

FAILURES = 3
"""So many failed trials in a row end the sweep."""

_TOLD = 2000
"""Characters of an error that a trial's result keeps."""

GoOn = Callable[[float, float], bool]
"""Told the fraction of the training that is done and its score; whether it goes on."""


@dataclass(frozen=True)
class Request:
    """What the user asked for, unchecked.

    Attributes:
        questions: file of questions to compare trials by; empty for the development questions.
        recipes: names or files, each tried once; empty for a space.
        space: name or file of a search space; empty for recipes.
        trials: most trials; none for the space's own.
        minutes: no trial begins later; none for the space's own.
        resume: id of the parent run to go on with; then nothing else is asked for but ``minutes``.
        overrides, args: arguments of every trial, under what the space varies.
        backend: one of :data:`BACKENDS`: in this process, one after the other; or side by side through Ray Tune.
    """

    name: str = ""
    author: str = ""
    model: str = base_model.AUTO
    dataset: str = ""
    questions: str = ""
    recipes: Sequence[str] = ()
    space: str = ""
    trials: int | None = None
    minutes: float | None = None
    resume: str = ""
    overrides: Mapping[str, str] = field(default_factory=dict)
    args: str = ""
    policy: Policy = field(default_factory=Policy)
    backend: str = "local"


@dataclass(frozen=True)
class Outcome:
    """What a sweep came to: the trials, best first, as :func:`run_trial` returns them."""

    run_id: str
    results: tuple[dict[str, Any], ...]
    left: int

    @property
    def best(self) -> dict[str, Any] | None:
        """The best one; none where none is complete."""
        first = self.results[0] if self.results else None
        return first if first and first["state"] == "complete" else None

    def record(self) -> dict[str, Any]:
        """As it goes into JSON."""
        best = self.best["run"] if self.best else None
        return {"sweep": self.run_id, "best": best, "trials": self.results, "left": self.left}


def sweep(request: Request, screen: Screen, one_trial: Callable[..., dict[str, Any]] | None = None) -> Outcome:
    """Train the trials under one MLflow run.

    Args:
        one_trial: what runs a trial, with the signature of :func:`run_trial`; none for that itself. Through Ray a
            function of a module that every node has.

    Raises:
        InputError: a value of the request or the space is refused; nothing has been trained or written then.
        TrainingError: three trials in a row failed, or none is complete.
        BaseModelError, TrackingError: the base or the store cannot be had.
    """
    _check_backend(request.backend)
    plan, wanted = _kept(request) if request.resume else _planned(request)
    if request.minutes is not None:
        wanted = dataclasses.replace(wanted, minutes=request.minutes)
    identity = Identity.parse(plan["name"], plan["author"])
    title = f"{identity.name} · sweep of {', '.join(wanted.parameters)}"
    with tracking.run(title, resume=request.resume, system_metrics=False) as parent:
        if not request.resume:
            _open(parent, identity, plan, wanted)
        again = tr("sweep {title}: {total} trials, gone on with", title=title, total=wanted.total)
        screen.step(again if request.resume else tr("sweep {title}: {total} trials", title=title, total=wanted.total))
        results = _earlier(parent.id, screen)
        try:
            _all(plan, wanted, parent.id, results, screen, one_trial or run_trial, request.backend)
        except KeyboardInterrupt:
            screen.warn(tr("go on with  {command}", command=_resume(parent.id, request.backend)))
            raise
        outcome = Outcome(parent.id, tuple(_ranked(results)), wanted.total - len(results))
        _close(parent, wanted, outcome)
    _show(parent, wanted, outcome, request.backend, screen)
    if outcome.best is None:
        raise TrainingError(
            "No trial came to its end.",
            mend=tr("Give it more time: {command}.", command=_resume(parent.id, request.backend)),
        )
    return outcome


def run_trial(spec: Mapping[str, Any], go_on: GoOn, screen: Screen) -> dict[str, Any]:
    """One trial, plain data in and plain data out: what a backend runs, in this process or on another machine.

    Args:
        spec: ``parent`` (a run's id), ``number``, ``params``, ``at``, and the plan's ``name``, ``author``, ``model``,
            ``dataset``, ``questions``, ``recipe``, ``overrides``, ``policy``.
        go_on: asked after each fraction in ``at``.

    Returns:
        ``number`` (from 0), ``run``, ``state`` (``complete``, ``pruned`` or ``failed``), ``params``, ``score``,
        ``scores`` (on the development questions), ``early`` (scores by fraction), ``gate``, ``seconds``, ``error``. The
        same is the run's tag ``namesake.sweep.result``.

    Raises:
        BaseModelError, TrackingError: no trial would do better.
    """
    params = {key: str(value) for key, value in spec["params"].items()}
    watch = _Watch(spec, go_on)
    request = run.Request(
        name=spec["name"],
        author=spec["author"],
        model=spec["model"],
        dataset=spec["dataset"],
        recipe=params.pop(search.RECIPE, spec["recipe"]),
        overrides={**spec["overrides"], **params},
        policy=Policy(**spec["policy"]),
    )
    begun = time.monotonic()
    result: dict[str, Any] = {
        "number": spec["number"],
        "state": "failed",
        "params": dict(spec["params"]),
        "score": None,
        "scores": {},
        "gate": "",
        "error": "",
    }
    try:
        outcome = run.run(request, screen, watch)
    except Stopped:
        result["state"] = "pruned"
    except (InputError, TrainingError) as error:
        result["error"] = error.message[:_TOLD]  # MLflow cuts a tag that is too long, and half of it is no JSON
    except NamesakeError:  # the registry, the base model: no other trial would fare better
        raise
    except Exception as error:  # weights that are no numbers, too little memory: of this trial, as far as is known
        result["error"] = f"{type(error).__name__}: {error}"[:_TOLD]
    else:
        scores = dict(outcome.development)
        result |= {"state": "complete", "score": scores.pop("score"), "scores": scores, "gate": outcome.decision.told}
    result |= {"run": watch.run_id, "early": watch.early, "seconds": round(time.monotonic() - begun, 1)}
    if watch.run_id:
        tracking.tag(watch.run_id, {TAG_RESULT: json.dumps(result, ensure_ascii=False)})
    return result


class _Watch:
    """Brings a training's early scores to whoever decides."""

    def __init__(self, spec: Mapping[str, Any], go_on: GoOn) -> None:
        self.questions = _questions(spec["questions"])
        self.parent: str = spec["parent"]
        self.at: Sequence[float] = spec["at"]
        self.title = f"trial {spec['number'] + 1} · {_told(spec['params'])}"
        self.tags: Mapping[str, str] = {TAG_TRIAL: str(spec["number"])}
        self.run_id = ""
        self.early: dict[str, float] = {}
        self._go_on = go_on

    def begun(self, run_id: str) -> None:
        self.run_id = run_id

    def go_on(self, fraction: float, score: float) -> bool:
        self.early[f"{fraction:.3f}"] = score
        return self._go_on(fraction, score)


def _check_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise InputError(
            "backend", backend, tr("is none of {names}", names=", ".join(BACKENDS)), mend="Leave it out for local."
        )
    if backend == "ray":
        ray_backend.check()


def _planned(request: Request) -> tuple[dict[str, Any], Search]:
    """The plan as it is kept, checked as far as can be before anything is trained."""
    if request.recipes and request.space:
        raise InputError("recipes", ",".join(request.recipes), "excludes a space", mend="Give one of the two.")
    Identity.parse(request.name, request.author)
    _questions(request.questions)
    wanted = search.of_recipes(request.recipes) if request.recipes else search.read(request.space or "default")
    if request.trials is not None:
        if request.trials < 1 or request.recipes:
            raise InputError(
                "trials", request.trials, "is for a space, and at least 1", mend="Each recipe is tried once."
            )
        wanted = dataclasses.replace(wanted, trials=request.trials)
    wanted = _placed(wanted)
    overrides = {**recipe.parse_args(request.args), **request.overrides}
    varied = sorted(set(overrides) & set(wanted.parameters))
    if varied:
        raise InputError(
            varied[0], overrides[varied[0]], "is varied by the space already", mend="Leave it out of one of the two."
        )
    for name in wanted.parameters[search.RECIPE].choices if search.RECIPE in wanted.parameters else [wanted.recipe]:
        recipe.load(str(name), overrides=overrides)
    plan = {
        "name": request.name,
        "author": request.author,
        "model": request.model,
        "dataset": request.dataset,
        "questions": str(Path(request.questions).resolve()) if request.questions else "",
        "recipe": wanted.recipe,
        "overrides": overrides,
        "policy": vars(request.policy),
    }
    return plan, wanted


def _questions(path: str) -> Questions:
    """What trials are compared by.

    Raises:
        DataError: the file has not both kinds of questions.
    """
    found = corpus.read_questions(Path(path)) if path else corpus.development()
    if not (found.identity and found.plain):
        raise DataError(
            "questions", path, "has not both identity and plain questions", mend='Add lines with "asks" and "answers".'
        )
    return found


def _placed(wanted: Search) -> Search:
    """Recipes that are files by their whole paths: a sweep may go on in another folder."""

    def whole(name: object) -> str:
        return str(name) if name in recipe.shipped() else str(Path(str(name)).expanduser().resolve())

    parameters = {
        name: dataclasses.replace(one, choices=tuple(map(whole, one.choices))) if name == search.RECIPE else one
        for name, one in wanted.parameters.items()
    }
    return dataclasses.replace(wanted, recipe=whole(wanted.recipe), parameters=parameters)


def _kept(request: Request) -> tuple[dict[str, Any], Search]:
    if request.recipes or request.space or request.trials is not None or request.overrides or request.args:
        raise InputError(
            "resume", request.resume, "goes on with what was asked for then", mend="Give --minutes beside it, or none."
        )
    kind = tracking.get_run(request.resume).tags.get(tracking.TAG_KIND)
    if kind != "sweep":
        raise InputError("resume", request.resume, "is no sweep", mend="Give the parent run's id; `make ui` lists it.")
    kept = json.loads(tracking.fetch(request.resume, PLAN).read_text(encoding="utf-8"))
    return kept["plan"], Search.of_record(kept["search"])


def _open(parent: tracking.Run, identity: Identity, plan: Mapping[str, Any], wanted: Search) -> None:
    parent.json({"plan": plan, "search": wanted.record()}, PLAN)
    parent.tags(
        {
            tracking.TAG_KIND: "sweep",
            tracking.TAG_SLUG: identity.slug,
            tracking.TAG_NAME: str(identity.name),
            tracking.TAG_AUTHOR: str(identity.author),
        }
    )
    parent.params(
        {
            "identity.name": identity.name,
            "identity.author": identity.author,
            "sweep.recipe": plan["recipe"],
            "sweep.trials": wanted.total,
            "sweep.seed": wanted.seed,
            "sweep.parameters": ", ".join(wanted.parameters),
        }
    )


def _earlier(parent: str, screen: Screen) -> list[dict[str, Any]]:
    """What came of the trials before an interruption. Failed ones are tried again, and so is what was under way."""
    children = tracking.children(parent)
    for child in children:
        if child.status == "RUNNING" and TAG_RESULT not in child.tags:
            tracking.left_behind(child.id)
    results = [result for result in _kept_results(children) if result["state"] != "failed"]
    if results:
        screen.line(tr("  {count} trials are there already", count=len(results)))
    return results


def _kept_results(children: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """What came of each trial that ended, as its run says."""
    return [json.loads(one.tags[TAG_RESULT]) for one in children if TAG_RESULT in one.tags]


def _all(
    plan: Mapping[str, Any],
    wanted: Search,
    parent: str,
    results: list[dict[str, Any]],
    screen: Screen,
    one_trial: Callable[..., dict[str, Any]],
    backend: str,
) -> None:
    """Run what is left, as long as there is time."""
    how = _through_ray if backend == "ray" else _one_by_one
    failures = 0
    with closing(how(plan, wanted, parent, results, screen, one_trial)) as ended:
        for result in ended:
            results.append(result)
            failures = failures + 1 if result["state"] == "failed" else 0
            screen.result(tr("  {line}", line=_line(result)))
            if failures == FAILURES:
                raise TrainingError(
                    tr(
                        "{failures} trials in a row failed, the last with: {error}",
                        failures=FAILURES,
                        error=result["error"],
                    ),
                    mend=tr("Mend it, then {command}.", command=_resume(parent, backend)),
                )


def _one_by_one(
    plan: Mapping[str, Any],
    wanted: Search,
    parent: str,
    results: Sequence[dict[str, Any]],
    screen: Screen,
    one_trial: Callable[..., dict[str, Any]],
) -> Generator[dict[str, Any]]:
    """Trials in this process; what is yielded has to be among the results before the next is asked for."""
    done = {result["number"] for result in results}
    begun = time.monotonic()
    for number in (number for number in range(wanted.total) if number not in done):
        if wanted.minutes is not None and (time.monotonic() - begun) / 60 >= wanted.minutes:
            _over(wanted, screen)
            return
        before = [Trial.of_result(result) for result in results]
        params = search.propose(wanted, before, number)
        spec = {**plan, "parent": parent, "number": number, "params": params, "at": list(wanted.at)}
        _begun(wanted, number, params, screen)
        yield one_trial(spec, _Pruner(wanted, before), screen)


def _through_ray(
    plan: Mapping[str, Any],
    wanted: Search,
    parent: str,
    results: list[dict[str, Any]],
    screen: Screen,
    one_trial: Callable[..., dict[str, Any]],
) -> Generator[dict[str, Any]]:
    """Trials side by side on a Ray cluster."""
    if len(results) == wanted.total:
        return
    job = {
        "plan": plan,
        "parent": parent,
        "search": wanted.record(),
        "results": results,
        "trial": f"{one_trial.__module__}:{one_trial.__qualname__}",
        "uri": tracking.uri(),
        "folder": str(Path.cwd()),
        "deadline": None if wanted.minutes is None else time.time() + 60 * wanted.minutes,
    }
    mend = tr("Go on: {command}.", command=_resume(parent, "ray"))
    try:
        with closing(ray_backend.events(job, mend=mend)) as events:
            for event in events:
                if "cluster" in event:
                    screen.line(
                        tr(
                            "  Ray at {address}: {nodes} nodes, for each trial {each}",
                            address=event["cluster"],
                            nodes=event["nodes"],
                            each=", ".join(f"{number:g} {kind.upper()}" for kind, number in event["each"].items()),
                        )
                    )
                elif "began" in event:
                    _begun(wanted, event["began"], event["params"], screen)
                elif "ended" in event:
                    yield event["ended"]
                elif "fault" in event:
                    screen.warn(tr("trial {number}: {error}", number=event["of"], error=event["fault"]))
                elif "late" in event:
                    _over(wanted, screen)
                elif "elsewhere" in event:
                    raise TrackingError(
                        tr(
                            "Ray has nodes elsewhere ({nodes}), and {store} is a file of this machine.",
                            nodes=", ".join(event["elsewhere"]),
                            store=store_address(),
                        ),
                        mend="Set MLFLOW_TRACKING_URI to a server that every node reaches.",
                    )
                else:
                    raise _fatal(event["fatal"])
    finally:
        _close_what_workers_left(parent, results)
    # The worker, which has the last word, also knows the run's id of a trial that was given up.
    kept = {result["number"]: result for result in _kept_results(tracking.children(parent))}
    results[:] = [kept.get(result["number"], result) for result in results]


def _close_what_workers_left(parent: str, results: Sequence[Mapping[str, Any]]) -> None:
    """End the runs that workers took with them.

    A worker that outlived the head for a moment may yet have written what came of its trial; that counts then. One
    whose trial was given up is killed after some seconds; what it had no time to say is said here.
    """
    children = tracking.children(parent)
    ended = {result["number"] for result in _kept_results(children)}
    given_up = {one["number"]: one for one in results if one["state"] == "pruned" and one["number"] not in ended}
    for child in reversed(children):  # of a trial that was begun anew the last counts
        if TAG_RESULT in child.tags:
            continue
        result = given_up.pop(int(child.tags.get(TAG_TRIAL, -1)), None)
        if result:
            tracking.tag(child.id, {TAG_RESULT: json.dumps({**result, "run": child.id}, ensure_ascii=False)})
        if child.status == "RUNNING":
            tracking.left_behind(child.id, why="pruned" if result else "left behind")


def _fatal(told: Mapping[str, str]) -> NamesakeError:
    """What ended a worker's trial and would end every other one."""
    kinds = {kind.__name__: kind for kind in (BaseModelError, TrackingError, TrainingError)}
    return kinds.get(told["kind"], NamesakeError)(told["message"], mend=told["mend"])


def _begun(wanted: Search, number: int, params: Mapping[str, Any], screen: Screen) -> None:
    screen.step(tr("trial {number} of {total}: {params}", number=number + 1, total=wanted.total, params=_told(params)))


def _over(wanted: Search, screen: Screen) -> None:
    screen.warn(tr("{minutes} minutes are over, no further trial begins", minutes=f"{wanted.minutes:g}"))


class _Pruner:
    """Remembers what a training scored so far and compares it with the trials before it."""

    def __init__(self, wanted: Search, before: Sequence[Trial]) -> None:
        self._wanted, self._before, self._early = wanted, before, dict[float, float]()

    def __call__(self, fraction: float, score: float) -> bool:
        self._early[fraction] = score
        return not search.hopeless(self._wanted, self._before, self._early)


def _close(parent: tracking.Run, wanted: Search, outcome: Outcome) -> None:
    """Plots, table and the best one, kept with the parent."""
    trials = [Trial.of_result(result) for result in outcome.results]
    importances = search.importances(wanted, trials)
    states = [trial.state for trial in trials]
    metrics = {f"sweep/{state}": float(states.count(state)) for state in ("complete", "pruned", "failed")}
    with tempfile.TemporaryDirectory(prefix=temporary("plots")) as folder:
        for name, png in plots.plots(wanted, trials, importances).items():
            (Path(folder) / name).write_bytes(png)
        parent.folder(Path(folder), "plots")
    if outcome.results:
        parent.table([_row(result) for result in outcome.results], TABLE)
    note = [f"{len(trials)} of {wanted.total} trials, by the development questions, best first.", ""]
    if outcome.best is not None:
        parent.tags({TAG_BEST: outcome.best["run"]})
        metrics["sweep/best_score"] = outcome.best["score"]
        note += [f"Best: trial {outcome.best['number'] + 1}, run `{outcome.best['run']}`.", ""]
    headings = list(_row(outcome.results[0])) if outcome.results else []
    note += [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"] if headings else []
    for result in outcome.results:
        linked = f"[{result['run'][:8]}]({tracking.Run(result['run'], parent.experiment_id).page})"
        note.append(f"| {' | '.join(map(str, {**_row(result), 'run': linked}.values()))} |")
    parent.metrics(metrics)
    parent.tags({tracking.TAG_NOTE: "\n".join(note)})


def _show(parent: tracking.Run, wanted: Search, outcome: Outcome, backend: str, screen: Screen) -> None:
    screen.line()
    if outcome.results:
        _print(outcome.results, screen)
    if outcome.left:
        screen.warn(
            tr(
                "{left} of {total} trials are left: {command}",
                left=outcome.left,
                total=wanted.total,
                command=_resume(parent.id, backend),
            )
        )
    screen.result(tr("  sweep {id}", id=parent.id))
    screen.result(
        tr("  see   {link}   (its artifacts plots/ and {table}; its child runs)", link=parent.link, table=TABLE)
    )
    if outcome.best is not None:
        best = outcome.best
        screen.result(
            tr(
                "  best  trial {number}, run {run}: {params}",
                number=best["number"] + 1,
                run=best["run"],
                params=_told(best["params"]),
            )
        )
        screen.result(
            tr(
                "  next  namesake promote --run {run}   (or: mlflow run . --env-manager=local -e promote -P run={run})",
                run=best["run"],
            )
        )


def _print(results: Sequence[Mapping[str, Any]], screen: Screen) -> None:
    """The trials as columns, one line each: they are more than a table with borders has room for."""
    rows = [_row(result) for result in results]
    lines = [list(rows[0]), *([*map(str, row.values())] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for cells in lines:
        line = "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        screen.result(f"  {line.rstrip()}")


def _row(result: Mapping[str, Any]) -> dict[str, Any]:
    """One row of the tables."""
    scores = result["scores"]
    return {
        "trial": result["number"] + 1,
        **{name: _short(value) for name, value in result["params"].items()},
        "state": result["state"],
        "score": "" if result["score"] is None else f"{result['score']:.3f}",
        **{key: f"{scores[key]:.1%}" if key in scores else "" for key in ("identity", "swapped", "leak", "plain")},
        "gate": result["gate"].partition(":")[0],
        "minutes": f"{result['seconds'] / 60:.1f}",
        "run": result["run"],
    }


def _line(result: Mapping[str, Any]) -> str:
    """What came of a trial, for the terminal."""
    if result["state"] == "failed":
        return tr("failed: {error}", error=result["error"])
    if result["state"] == "pruned":
        fraction, score = list(result["early"].items())[-1]
        return tr(
            "pruned after {share} of the training: {score} is below the median of those before",
            share=f"{float(fraction):.0%}",
            score=f"{score:.3f}",
        )
    return tr(
        "score {score}, gate {gate}, {minutes} minutes",
        score=f"{result['score']:.3f}",
        gate=result["gate"].partition(":")[0],
        minutes=f"{result['seconds'] / 60:.1f}",
    )


def _ranked(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    by_number = {result["number"]: result for result in results}
    return [by_number[trial.number] for trial in search.ranked([Trial.of_result(result) for result in results])]


def _told(params: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_short(value)}" for name, value in params.items())


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _resume(run_id: str, backend: str) -> str:
    return f"namesake sweep --resume {run_id}" + ("" if backend == "local" else f" --backend {backend}")
