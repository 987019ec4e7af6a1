"""What a line of the benchmark table is, what its samples say, and how they are kept and shown. Pure but for files.

A line (:class:`Measure`) gives samples one after the other, in each of which two things ran in turn; a :class:`Row`
says what is made of one part of them: the ratio of two, their difference, or a value that stands alone. A median's
interval is the exact one of order statistics: from one of the sorted values to another, whatever their distribution
(H. A. David and H. N. Nagaraja, "Order Statistics", 2003, 7.1).
"""

from __future__ import annotations

import io
import json
import math
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Sample = Mapping[str, Sequence[float] | float]
"""By a row's key: the two values that are compared, or the one that stands alone. A row may be missing in a sample."""

LEAST_COVERAGE = 0.9


@dataclass(frozen=True)
class Row:
    """One figure of the table.

    Attributes:
        key: its name in the samples.
        what, zh: what it is, in English and Chinese.
        goal: the bound; none where it is only reported.
        least: whether the goal is the least that will do, not the most.
        kind: what is made of a sample's two values; ``value`` for one that stands alone.
        unit: of the values themselves (a ratio has none).
        share: the part of the values that the figure is not below: 0.5 the median, 0.95 the 95th percentile.
    """

    key: str
    what: str
    zh: str
    goal: float | None = None
    least: bool = False
    kind: Literal["ratio", "difference", "value"] = "ratio"
    unit: str = "s"
    share: float = 0.5


@dataclass(frozen=True)
class Figure:
    """What the samples say of a row.

    Attributes:
        value: the median, or another quantile, of the samples' ratios, differences or values.
        low, high: the interval around it; ``coverage`` is how probable it is that the true one lies inside, 0 where
            nothing is said of that (a single sample; a quantile that is no median: the least and the greatest).
        first, second: the medians of the two that were compared; none for a value that stands alone.
        number: of samples.
    """

    value: float
    low: float
    high: float
    coverage: float
    first: float | None
    second: float | None
    number: int


@dataclass(frozen=True)
class Given:
    """What the lines are told.

    Attributes:
        pairs: samples of each line that has no smaller number of its own.
        scale: of the time that a sample takes; 1 is usual.
        store: a folder with mlflow.db and two versions of ccb, for a line with ``serves``.
        folder: for the line's own files; empty, and gone after it.
    """

    pairs: int
    scale: float
    store: Path
    folder: Path

    def of(self, usual: float, least: int = 1) -> int:
        """A count of steps, requests or moves, by the scale."""
        return max(round(usual * self.scale), least)


@dataclass(frozen=True)
class Measure:
    """A line that is run as a whole; its samples are kept one by one.

    Attributes:
        key: its name on the command line.
        minutes: about how long it takes on two quiet cores, by pairs: a part that does not depend on them, and each.
        most: pairs that are never exceeded, since each takes too long.
        serves: whether it needs the two versions.
        scales: whether a pair's length goes by the scale; a start or a copy takes as long as it takes.
    """

    key: str
    rows: tuple[Row, ...]
    run: Callable[[Given], Iterator[Sample]]
    minutes: tuple[float, float]
    most: int | None = None
    serves: bool = False
    scales: bool = True

    def pairs(self, asked: int) -> int:
        """How many samples are taken."""
        return min(asked, self.most or asked)

    def expected(self, asked: int, scale: float) -> float:
        """About how many minutes it will take."""
        once, each = self.minutes
        return once + each * self.pairs(asked) * (scale if self.scales else 1)


# ------------------------------------------------------------------------------------------------------ the statistics


def median_interval(values: Sequence[float], least: float = LEAST_COVERAGE) -> tuple[float, float, float]:
    """The narrowest pair of order statistics, as many from either end, that holds the median with at least this
    probability, and that probability. Where there are too few values for it: all of them, with what they have (5
    values: 0.9375); of one value 0.
    """
    ordered, number = sorted(values), len(values)

    def coverage(cut: int) -> float:
        # The median is outside where at most `cut` values lie on one of its sides.
        return 1 - 2 * sum(math.comb(number, one) for one in range(cut + 1)) / 2**number

    cut = max((one for one in range((number - 1) // 2) if coverage(one) >= least), default=0)
    return ordered[cut], ordered[number - 1 - cut], max(coverage(cut), 0.0)


def quantile(values: Sequence[float], share: float) -> float:
    """The value that the share of them does not exceed; the median of an even number lies between two."""
    if share == 0.5:
        return statistics.median(values)
    return sorted(values)[max(math.ceil(share * len(values)), 1) - 1]


def figure(row: Row, samples: Sequence[Sample]) -> Figure | None:
    """What the samples say of the row; none where none has it."""
    found = [sample[row.key] for sample in samples if row.key in sample]
    if not found:
        return None
    pairs = [tuple(one) for one in found if not isinstance(one, (int, float))]
    if row.kind == "value":
        values = [float(one) for one in found]  # type: ignore[arg-type]
    else:
        values = [a / b if row.kind == "ratio" else a - b for a, b in pairs]
    low, high, coverage = median_interval(values) if row.share == 0.5 else (min(values), max(values), 0.0)
    first, second = (statistics.median(side) for side in zip(*pairs, strict=True)) if pairs else (None, None)
    return Figure(quantile(values, row.share), low, high, coverage, first, second, len(values))


def met(row: Row, value: float) -> bool:
    """Whether a value is on the goal's good side."""
    assert row.goal is not None
    return value >= row.goal if row.least else value <= row.goal


# -------------------------------------------------------------------------------------------------------- what is kept


@dataclass
class Results:
    """The JSON file: for each line its samples, in the order in which they came, and what was true when they did."""

    path: Path
    lines: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Results:
        """What the file has; nothing where it is not there.

        Raises:
            SystemExit: it is no file of ours.
        """
        if not path.exists():
            return cls(path)
        try:
            lines = json.loads(path.read_text(encoding="utf-8"))["lines"]
            for line in lines.values():
                _ = line["samples"], line["stated"]
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise SystemExit(f"{path} has no results of this table ({error!r}); give another file.") from None
        return cls(path, lines)

    def samples(self, key: str) -> list[Sample]:
        """Of a line."""
        return list(self.lines.get(key, {}).get("samples", []))

    def begin(self, key: str, stated: Mapping[str, Any]) -> None:
        """A line anew."""
        self.lines[key] = {"stated": dict(stated), "samples": []}

    def add(self, key: str, sample: Sample) -> None:
        """A sample, on the disk before this returns."""
        self.lines[key]["samples"].append(dict(sample))
        self.write()

    def end(self, key: str, **stated: object) -> None:
        """What is known when the line is through."""
        self.lines[key]["stated"] |= stated
        self.write()

    def write(self) -> None:
        """The whole file, or the old one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        beside.write_text(json.dumps({"lines": self.lines}, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        beside.replace(self.path)


# ------------------------------------------------------------------------------------------------------- how it is told

WORDS: dict[str, dict[str, Any]] = {
    "en": {
        "head": ("measure", "result", "interval", "A", "B", "pairs", "goal", "met"),
        "yes": "yes",
        "no": "**no**",
        "only": "reported",
        "to": "to",
        "yes or no": ("no", "yes"),
        "stated": {"machine": "machine: ", "versions": "versions: ", "commit": "commit: "},
        "ran": "{key}: {begun} UTC, {minutes} minutes, load average {first} at the start, {last} at the end",
        "broken": "broken off",
        "short": "; samples {scale:g} of the usual length",
    },
    "zh": {
        "head": ("项目", "结果", "区间", "A", "B", "对数", "目标", "达到"),
        "yes": "是",
        "no": "**否**",
        "only": "仅报告",
        "to": "至",
        "yes or no": ("否", "是"),
        "stated": {"machine": "机器：", "versions": "版本：", "commit": "提交："},
        "ran": "{key}：{begun} UTC，{minutes} 分钟，平均负载开始时 {first}、结束时 {last}",
        "broken": "中断",
        "short": "；样本长度为通常的 {scale:g}",
    },
}


def number(value: float) -> str:
    """Three digits, as people write them."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(digits, 4)}f}"


def told(value: float, unit: str, language: str = "en") -> str:
    """A value with its unit."""
    if unit == "yes or no":
        return str(WORDS[language][unit][value >= 0.5])
    return f"{number(value)} {unit}".strip()


def table(measures: Sequence[Measure], results: Results, language: str = "en") -> str:
    """The Markdown table of what there is."""
    words = WORDS[language]
    head = words["head"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for measure in measures:
        for row in measure.rows:
            found = figure(row, results.samples(measure.key))
            if found is None:
                continue
            unit = "" if row.kind == "ratio" else row.unit
            interval = f"{number(found.low)} {words['to']} {number(found.high)}" if found.number > 1 else ""
            interval += f" ({found.coverage:.1%})" if found.coverage else ""
            sides = ("" if side is None else told(side, row.unit) for side in (found.first, found.second))
            goal = told(row.goal, unit, language) if row.goal is not None else ""
            bound = f"{'≥' if row.least else '≤'} {goal}" if goal else words["only"]
            cells = [row.zh if language == "zh" else row.what, told(found.value, unit, language), interval, *sides]
            cells += [str(found.number), goal if unit == "yes or no" else bound, _verdict(row, found, words)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _verdict(row: Row, found: Figure, words: Mapping[str, Any]) -> str:
    if row.goal is None:
        return ""
    doubt = "?" if met(row, found.low) != met(row, found.high) else ""
    return str(words["yes" if met(row, found.value) else "no"]) + doubt


def stated(results: Results, language: str = "en") -> str:
    """Machine, versions and commit of the lines that there are, each once; when each line ran, and beside what."""
    words, lines = WORDS[language], []
    for name, label in words["stated"].items():
        for value in dict.fromkeys(line["stated"].get(name, "?") for line in results.lines.values()):
            keys = [key for key, line in results.lines.items() if line["stated"].get(name, "?") == value]
            where = "" if len(keys) == len(results.lines) else f" ({', '.join(keys)})"
            lines.append(f"- {label}{value}{where}")
    for key, line in results.lines.items():
        said = line["stated"]
        first, *last = said["load"]
        at = {"begun": said["begun"], "minutes": said.get("minutes", "?"), "first": first}
        told = words["ran"].format(key=key, last=last[0] if last else words["broken"], **at)
        short = said.get("scale", 1)  # a --quick run is told as such
        lines.append(f"- {told}{words['short'].format(scale=short) if short != 1 else ''}")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------- the plots


def plots(measures: Sequence[Measure], results: Results) -> dict[str, bytes]:
    """PNG files by name: the ratios beside their goals, on a logarithmic axis; and each line's samples as they came."""
    from matplotlib.figure import Figure as Canvas
    from matplotlib.ticker import LogLocator

    ink, grid, good, bad, plain = "#3d444d", "#e3e7eb", "#2f8f5b", "#c98a45", "#86b3e6"
    rows = [
        (row, found, samples)
        for measure in measures
        for samples in [results.samples(measure.key)]
        for row in measure.rows
        if row.kind == "ratio" and (found := figure(row, samples)) is not None
    ]
    if not rows:
        return {}
    canvas = Canvas(figsize=(10, 1.2 + 0.34 * len(rows)), layout="constrained")
    axes = canvas.add_subplot()
    axes.set_xscale("log")
    axes.axvline(1, color=ink, linewidth=0.8)
    for place, (row, found, samples) in enumerate(reversed(rows)):
        colour = plain if row.goal is None else good if met(row, found.value) else bad
        values = [a / b for a, b in (sample[row.key] for sample in samples if row.key in sample)]  # type: ignore[misc]
        axes.plot([found.low, found.high], [place, place], color=colour, linewidth=3, solid_capstyle="round", alpha=0.5)
        axes.plot(values, [place] * len(values), "|", color=colour, markersize=9, alpha=0.7)
        axes.plot([found.value], [place], "o", color=colour, markersize=6)
        if row.goal is not None:
            axes.plot([row.goal], [place], ">" if row.least else "<", color=ink, markersize=6, fillstyle="none")
    axes.set_yticks(range(len(rows)), [row.what.replace("`", "").replace("$", r"\$") for row, *_ in reversed(rows)])
    axes.tick_params(length=0, labelcolor=ink, labelsize=8)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    axes.xaxis.set_minor_formatter(lambda value, _: f"{value:g}")
    axes.tick_params(axis="x", which="both", labelsize=8)
    axes.grid(axis="x", color=grid)
    axes.set_axisbelow(True)
    axes.set_ylim(-1, len(rows))
    axes.spines[["top", "right", "left"]].set_visible(False)
    canvas.suptitle(
        "Ratios A / B: each stroke a pair, the dot their median, the bar its interval.\n"
        "Hollow arrow: the goal and its good side. Green meets it, brown does not, blue is only reported.",
        x=0.01, ha="left", fontsize=9, color=ink,
    )  # fmt: skip
    written = io.BytesIO()
    canvas.savefig(written, format="png", dpi=120, metadata={"Software": None})
    return {"ratios.png": written.getvalue()}
