"""A sweep's trials as plots (PNG). Pure: the same trials give the same bytes."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from namesake.search import Parameter, Search, Trial, Value, ranked

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK, _GRID, _PRUNED, _BEST = "#3d444d", "#e3e7eb", "#c98a45", "#2f8f5b"
_TICKS = 5
_LONGEST = 18
"""Characters of a tick; a path of a recipe is longer."""


def plots(search: Search, trials: Sequence[Trial], importances: Mapping[str, float]) -> dict[str, bytes]:
    """PNG files by name: a line for each trial over the parameters to its score, and how much each parameter matters
    (left out where that is not known).
    """
    found = {"parallel-coordinates.png": _parallel(search, trials)}
    if importances:
        found["importances.png"] = _importances(importances)
    return found


def _parallel(search: Search, trials: Sequence[Trial]) -> bytes:
    names = list(search.parameters)
    figure = _figure(width=2.6 + 1.9 * len(names), height=4.8)
    axes = figure.add_subplot()
    axes.set_axis_off()
    axes.set_title(
        "Each line a trial: green the best, the darker the better, dotted pruned",
        loc="left", fontsize=11, color=_INK, pad=26,
    )  # fmt: skip
    axes.set_xlim(-0.35, len(names) + 0.35)
    axes.set_ylim(-0.06, 1.06)
    for place, name in enumerate(names):
        parameter = search.parameters[name]
        _axis(axes, place, name, [(_height(parameter, value), _shown(value)) for value in _ticks(parameter)])
    scores = [trial.score for trial in trials if trial.score is not None]
    low, high = (min(scores), max(scores)) if scores else (0.0, 1.0)
    low, high = (low, high) if high > low else (low - 0.05, low + 0.05)
    ticks = [low + (high - low) * part / (_TICKS - 1) for part in range(_TICKS)]
    _axis(axes, len(names), "score", [((tick - low) / (high - low), f"{tick:.3f}") for tick in ticks])
    order = [trial for trial in ranked(trials) if trial.state != "failed"]
    for trial in reversed(order):  # the best is drawn last, over the others
        heights = [_height(search.parameters[name], trial.params[name]) for name in names]
        if trial.score is None:
            axes.plot(range(len(names)), heights, color=_PRUNED, linewidth=1.4, linestyle=":", marker="x", markersize=4)
            continue
        share = (trial.score - low) / (high - low)
        best = trial is order[0]
        axes.plot(
            range(len(names) + 1),
            [*heights, share],
            color=_BEST if best else str(round(0.78 - 0.55 * share, 3)),
            linewidth=2.6 if best else 1.4,
            marker="o",
            markersize=3.5,
        )
    return _png(figure)


def _axis(axes: Axes, place: int, name: str, ticks: Sequence[tuple[float, str]]) -> None:
    axes.plot([place, place], [0, 1], color=_INK, linewidth=0.8, zorder=1)
    axes.text(place, 1.07, _ascii(name), ha="center", va="bottom", fontsize=9, fontweight="bold", color=_INK)
    for height, text in ticks:
        axes.text(
            place - 0.03, height, _ascii(text), ha="right", va="center", fontsize=7.5, color=_INK, zorder=3,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.6},
        )  # fmt: skip


def _ticks(parameter: Parameter) -> Sequence[Value]:
    if parameter.choices:
        return parameter.choices
    low, high = parameter.low, parameter.high
    parts = [part / (_TICKS - 1) for part in range(_TICKS)]
    if parameter.log:
        return [low * (high / low) ** part for part in parts]
    values = [low + (high - low) * part for part in parts]
    return list(dict.fromkeys(round(value) for value in values)) if parameter.whole else values


def _height(parameter: Parameter, value: Value) -> float:
    """Where a value stands on its axis, 0 to 1."""
    if parameter.choices:
        return (parameter.choices.index(value) + 0.5) / len(parameter.choices)
    number = float(value)
    if parameter.log:
        return math.log(number / parameter.low) / math.log(parameter.high / parameter.low)
    return (number - parameter.low) / (parameter.high - parameter.low)


def _importances(importances: Mapping[str, float]) -> bytes:
    figure = _figure(width=7, height=1.3 + 0.45 * len(importances))
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("How much each parameter moved the score", loc="left", fontsize=11, color=_INK)
    names = sorted(importances, key=lambda name: importances[name])
    axes.barh([_ascii(name) for name in names], [importances[name] for name in names], color="#86b3e6", height=0.6)
    for place, name in enumerate(names):
        axes.text(importances[name] + 0.01, place, f"{importances[name]:.0%}", va="center", fontsize=9, color=_INK)
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of the variance (functional ANOVA over the finished trials)", fontsize=9, color=_INK)
    axes.tick_params(length=0, labelcolor=_INK)
    axes.grid(axis="x", color=_GRID)
    axes.set_axisbelow(True)
    return _png(figure)


def _figure(*, width: float, height: float) -> Any:
    from matplotlib.figure import Figure  # here: it takes half a second, and every command imports this module

    return Figure(figsize=(width, height), layout="constrained")


def _png(figure: Any) -> bytes:
    written = io.BytesIO()
    figure.savefig(written, format="png", dpi=150, metadata={"Software": None})
    return written.getvalue()


def _shown(value: Value) -> str:
    text = f"{value:.3g}" if isinstance(value, float) else str(value)
    return text if len(text) <= _LONGEST else f"...{text[-_LONGEST:]}"


def _ascii(text: str) -> str:
    # The plots' font has no Chinese; matplotlib reads $…$ as a formula.
    return text.encode("ascii", "replace").decode().replace("$", r"\$")
