"""A search space and what is tried next: a YAML file and the trials so far in, parameters out.

The only importer of Optuna (arXiv 1907.10902). No study is kept anywhere: each time one is made again from the trials,
which lie in MLflow, and each trial draws with a seed of its own. So the trial of a number is a function of the space,
the seed and the trials before it, and a sweep that was interrupted asks for what it would have asked for.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from namesake import recipe
from namesake.errors import InputError, RecipeError
from namesake.messages import joined, tr

RECIPE = "recipe"
"""The parameter whose values are recipes; every other one is an argument of `namesake run`."""

AT: tuple[float, ...] = (1 / 3, 2 / 3)
AFTER = 3
"""Finished trials, at least, before any is pruned."""

_COUNTED = 1000
"""Values of a parameter, at most, for all of them to be tried."""

Value = str | int | float | bool
State = Literal["complete", "pruned", "failed"]


@dataclass(frozen=True)
class Parameter:
    """What a parameter may be: one of ``choices``, or a number from ``low`` to ``high``, both included.

    Attributes:
        log: drawn evenly by magnitude.
        step: distance of the values; none for any number between (whole numbers: 1).
    """

    choices: tuple[Value, ...] = ()
    low: float = 0
    high: float = 0
    log: bool = False
    step: float | None = None

    @property
    def whole(self) -> bool:
        """Whether it is a whole number."""
        return all(isinstance(one, int) for one in (self.low, self.high, self.step or 0))

    def values(self) -> tuple[Value, ...] | None:
        """All of them; none where they are too many to be counted."""
        if self.choices:
            return self.choices
        step = self.step or (1 if self.whole else None)
        if step is None or self.log:
            return None
        count = math.floor((self.high - self.low) / step + 1e-9) + 1
        return tuple(round(self.low + index * step, 12) for index in range(count)) if count <= _COUNTED else None

    def holds(self, value: object) -> bool:
        """Whether it may be the value."""
        every = self.values()
        if every is not None:
            return value in every
        return isinstance(value, int | float) and not isinstance(value, bool) and self.low <= value <= self.high


@dataclass(frozen=True)
class Search:
    """What is searched, and how long.

    Attributes:
        recipe: what every trial starts from.
        parameters: what is varied.
        trials: how many at most.
        minutes: no trial begins later than that; none for no limit.
        seed: of the drawing, not of the trainings.
        at: fractions of a training after which it is compared with the trials before it; empty: nothing is pruned.
        after: so many finished trials before one is pruned.
    """

    parameters: Mapping[str, Parameter]
    recipe: str = "default"
    trials: int = 8
    minutes: float | None = None
    seed: int = 42
    at: tuple[float, ...] = AT
    after: int = AFTER

    def grid(self) -> list[dict[str, Value]] | None:
        """Every combination, where there are no more of them than trials."""
        every = [parameter.values() for parameter in self.parameters.values()]
        counted = [one for one in every if one is not None]
        if len(counted) < len(every) or math.prod(len(one) for one in counted) > self.trials:
            return None
        return [dict(zip(self.parameters, values, strict=True)) for values in itertools.product(*counted)]

    @property
    def total(self) -> int:
        """How many trials there will be."""
        grid = self.grid()
        return self.trials if grid is None else len(grid)

    def record(self) -> dict[str, Any]:
        """As JSON types."""
        return dataclasses.asdict(self)

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Search:
        """Back from them."""
        parameters = {
            name: Parameter(**{**one, "choices": tuple(one["choices"])}) for name, one in record["parameters"].items()
        }
        return cls(**{**record, "parameters": parameters, "at": tuple(record["at"])})


@dataclass(frozen=True)
class Trial:
    """One training run of a sweep that has ended.

    Attributes:
        score: :func:`namesake.probing.objective` on the development questions; none unless complete.
        early: the same on a few of them, by the fraction of the training.
    """

    number: int
    params: Mapping[str, Value]
    state: State
    score: float | None = None
    early: Mapping[float, float] = field(default_factory=dict)

    @classmethod
    def of_result(cls, result: Mapping[str, Any]) -> Trial:
        """From what :func:`namesake.sweep.run_trial` returns."""
        early = {float(fraction): score for fraction, score in result["early"].items()}
        return cls(result["number"], result["params"], result["state"], result["score"], early)


def shipped() -> dict[str, Path]:
    """The spaces that come with the project, by name."""
    return {path.stem: path for path in sorted((recipe.folder() / "sweeps").glob("*.yaml"))}


def of_recipes(names: Sequence[str], *, minutes: float | None = None) -> Search:
    """Each of the recipes once.

    Raises:
        InputError: there is none, or one comes twice.
        RecipeError: one is none.
    """
    if not names or len(set(names)) < len(names):
        raise InputError(
            "recipes", ",".join(names), "wants different recipes", mend="Write --recipes default,tutorial."
        )
    for name in names:
        recipe.load(name)
    return Search({RECIPE: Parameter(choices=tuple(names))}, trials=len(names), minutes=minutes)


def read(name_or_path: str) -> Search:
    """A space by name (``recipes/sweeps/``) or from a YAML file.

    Raises:
        InputError: with every fault of the file.
    """
    path = shipped().get(name_or_path)
    with suppress(OSError, ValueError):
        path = path or (Path(name_or_path) if Path(name_or_path).is_file() else None)
    if path is None:
        raise InputError(
            "space",
            name_or_path,
            "there is no such space or file",
            mend=tr("Use {names}, or a YAML file.", names=", ".join(shipped())),
        )
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(
            "space", str(path), tr("cannot be read ({error})", error=error), mend="Give a YAML file."
        ) from error
    faults: list[str] = []
    search = _parsed(data, faults)
    if faults or search is None:
        raise InputError("space", str(path), joined(faults), mend="See recipes/sweeps/default.yaml.")
    return search


def propose(search: Search, before: Sequence[Trial], number: int) -> dict[str, Value]:
    """The parameters of the trial of the number.

    Every combination in turn where they are few enough. Else first the recipe as it is, where the space holds it, then
    values drawn evenly, then by a tree-structured Parzen estimator (Bergstra et al. 2011) over the trials before.
    """
    grid = search.grid()
    if grid is not None:
        return grid[number]
    own = _own(search)
    if number == 0 and own is not None:
        return own
    optuna = _optuna()
    drawn_evenly = max(3, search.trials // 3)
    study = _study(search, [one for one in before if one.number < number])
    study.sampler = optuna.samplers.TPESampler(seed=search.seed + number, n_startup_trials=drawn_evenly)
    params: dict[str, Value] = study.ask(_distributions(search)).params
    return params


def hopeless(search: Search, before: Sequence[Trial], early: Mapping[float, float]) -> bool:
    """Whether a training that scored so is given up: its best score so far is below the median that the finished trials
    had after the same fraction (the median stopping rule, Golovin et al. 2017).
    """
    optuna = _optuna()
    study = _study(search, before)
    study.pruner = optuna.pruners.MedianPruner(n_startup_trials=search.after)
    trial = study.ask()
    for fraction, score in early.items():
        trial.report(score, _step(fraction))
    return bool(early) and bool(trial.should_prune())


def ranked(trials: Sequence[Trial]) -> list[Trial]:
    """The best first; of equals the earlier; pruned and failed ones last."""
    places = {"complete": 0, "pruned": 1, "failed": 2}

    def latest(trial: Trial) -> float:
        if trial.score is not None:
            return trial.score
        return trial.early[max(trial.early)] if trial.early else -math.inf

    return sorted(trials, key=lambda trial: (places[trial.state], -latest(trial), trial.number))


def importances(search: Search, trials: Sequence[Trial]) -> dict[str, float]:
    """The share of each parameter in how much the scores differ, most first (functional ANOVA, Hutter et al. 2014);
    empty where fewer than four trials are complete or all score alike.
    """
    optuna = _optuna()
    scores = {trial.score for trial in trials if trial.state == "complete"}
    if sum(trial.state == "complete" for trial in trials) < 4 or len(scores) < 2:
        return {}
    found = optuna.importance.get_param_importances(
        _study(search, trials), evaluator=optuna.importance.FanovaImportanceEvaluator(seed=search.seed)
    )
    return {name: float(share) for name, share in found.items()}


def _parsed(data: Any, faults: list[str]) -> Search | None:
    known = {"about", "recipe", "trials", "minutes", "seed", "prune", "parameters"}
    if not isinstance(data, dict) or not isinstance(data.get("parameters"), dict) or not data["parameters"]:
        faults.append("has no parameters")
        return None
    faults += [f"{key} is none of {', '.join(sorted(known))}" for key in data if key not in known]
    numbers: dict[str, Any] = {}
    for key, least, kind in (("trials", 1, int), ("seed", 0, int), ("minutes", 0, float)):
        value = data.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, kind)) or not least <= value < math.inf:
            faults.append(_no_number(key, value, least, whole=kind is int))
        numbers[key] = value
    prune = data.get("prune", {})
    at, after = AT, AFTER
    if prune is False:
        at = ()
    elif isinstance(prune, dict) and set(prune) <= {"at", "after"}:
        rungs, after = prune.get("at", AT), prune.get("after", AFTER)
        at = tuple(rungs) if isinstance(rungs, list | tuple) else (rungs,)
        if not all(isinstance(one, float) and 0 < one < 1 for one in at) or list(at) != sorted(set(at)):
            faults.append(tr("prune.at={at} is no rising row of fractions between 0 and 1", at=list(at)))
        if isinstance(after, bool) or not isinstance(after, int) or after < 1:
            faults.append(tr("prune.after={after} is no whole number from 1 on", after=after))
    else:
        faults.append(tr("prune={prune} is neither false nor at and after", prune=prune))
    base = str(data.get("recipe", "default"))
    parameters = {str(name): _parameter(str(name), spec, faults) for name, spec in data["parameters"].items()}
    whole = {name: parameter for name, parameter in parameters.items() if parameter is not None}
    for name, parameter in whole.items():
        tried = parameter.choices or (parameter.low, parameter.high)
        for value in dict.fromkeys(tried):
            try:
                recipe.load(str(value)) if name == RECIPE else recipe.load(base, overrides={name: str(value)})
            except RecipeError as error:
                faults.append(error.fault)
    return Search(whole, recipe=base, at=at, after=after, **numbers)


def _parameter(name: str, spec: Any, faults: list[str]) -> Parameter | None:
    if not isinstance(spec, dict) or ("choices" in spec) == ("range" in spec):
        faults.append(tr("{name} needs either choices or a range", name=name))
        return None
    if "choices" in spec:
        choices = spec["choices"]
        if set(spec) != {"choices"} or not isinstance(choices, list) or not choices:
            faults.append(tr("{name}: choices is an empty list, or stands beside something else", name=name))
            return None
        # A list is one value of an argument that takes several words.
        texts = tuple(" ".join(map(str, one)) if isinstance(one, list) else one for one in choices)
        if len(set(map(str, texts))) < len(texts) or not all(isinstance(one, Value) for one in texts):
            faults.append(
                tr("{name}: choices {choices} are not different texts and numbers", name=name, choices=choices)
            )
            return None
        return Parameter(choices=texts)
    ends, log, step = spec["range"], spec.get("log", False), spec.get("step")
    if set(spec) - {"range", "log", "step"} or not isinstance(log, bool):
        faults.append(tr("{name}: beside a range stand log (true or false) and step only", name=name))
        return None
    if not (isinstance(ends, list) and len(ends) == 2 and all(_is_number(one) for one in ends)):
        faults.append(tr("{name}: range {ends} is not two numbers (YAML wants 1.0e-3, not 1e-3)", name=name, ends=ends))
        return None
    low, high = ends
    if not low < high:
        faults.append(tr("{name}: range {ends} is empty", name=name, ends=ends))
    elif log and low <= 0:
        faults.append(tr("{name}: range {ends} with log has to begin above 0", name=name, ends=ends))
    elif step is not None and (not _is_number(step) or step <= 0 or log):
        faults.append(tr("{name}: step {step} is no number above 0, or stands beside log", name=name, step=step))
    elif step is not None and step > high - low:
        faults.append(tr("{name}: step {step} is wider than the range {ends}", name=name, step=step, ends=ends))
    else:
        return Parameter(low=low, high=high, log=log, step=step)
    return None


def _no_number(key: str, value: object, least: int, *, whole: bool) -> str:
    given = {"key": key, "value": value, "least": least}
    if whole:
        return tr("{key}={value} is no whole number from {least} on", **given)
    return tr("{key}={value} is no number from {least} on", **given)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _own(search: Search) -> dict[str, Value] | None:
    """The recipe's own values, where the space holds them all."""
    if RECIPE in search.parameters:
        return None
    plan = recipe.load(search.recipe)
    own: dict[str, Value] = {}
    for name, parameter in search.parameters.items():
        value = recipe.setting(plan, name)
        value = " ".join(value) if isinstance(value, list) else value
        if value is None or not parameter.holds(value):
            return None
        own[name] = value
    return own


def _step(fraction: float) -> int:
    return round(100 * fraction)


def _optuna() -> Any:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    return optuna


def _distributions(search: Search) -> dict[str, Any]:
    optuna = _optuna()
    found = {}
    for name, one in search.parameters.items():
        if one.choices:
            found[name] = optuna.distributions.CategoricalDistribution(one.choices)
        elif one.whole:
            found[name] = optuna.distributions.IntDistribution(one.low, one.high, log=one.log, step=one.step or 1)
        else:
            found[name] = optuna.distributions.FloatDistribution(one.low, one.high, log=one.log, step=one.step)
    return found


def _study(search: Search, trials: Sequence[Trial]) -> Any:
    """The trials as Optuna sees them, in memory."""
    optuna = _optuna()
    study = optuna.create_study(direction="maximize")
    states = {"complete": "COMPLETE", "pruned": "PRUNED", "failed": "FAIL"}
    distributions = _distributions(search)
    for trial in sorted(trials, key=lambda one: one.number):
        study.add_trial(
            optuna.trial.create_trial(
                state=optuna.trial.TrialState[states[trial.state]],
                value=trial.score if trial.state == "complete" else None,
                params=dict(trial.params),
                distributions=distributions,
                intermediate_values={_step(fraction): score for fraction, score in trial.early.items()},
            )
        )
    return study
