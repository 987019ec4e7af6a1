"""One run as a page to show around, and as plots: what the model said and scored before and after. Pure.

The page is ``report.html.jinja`` filled in. It is one file that fetches nothing and runs nothing; what models and users
wrote is escaped. Both languages are in it, and a radio button hides one of them.
"""

from __future__ import annotations

import io
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import groupby
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from namesake.gate import Interval, paired_difference

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = Mapping[str, Any]
"""One reply with its scores, as :meth:`namesake.probing.Answered.record` gives it."""

TEMPLATE = "report.html.jinja"

HEADLINES = ("identity", "plain", "swapped", "old_identity", "leak", "language")
"""The scores that stand large on the page, in this order."""

SHOWN_QUESTIONS = 2
"""Identity questions shown as a conversation: the tutorial's own two, which come first."""

FEW_POINTS = 12
"""Below it each point of a curve is marked; a validation loss often is a single one."""

SCORES: dict[str, tuple[str, str]] = {
    "identity": ("Identity questions right", "身份题答对"),
    "plain": ("Plain questions right", "普通题答对"),
    "swapped": ("Name and author swapped", "名字与作者互换"),
    "old_identity": ("Old identity told", "说出旧身份"),
    "leak": ("Own name in plain replies", "普通题里说出自己的名字"),
    "language": ("Answers in the question's language", "以提问的语言作答"),
    "name": ("Name told when asked", "问到时说出名字"),
    "author": ("Author told when asked", "问到时说出作者"),
    "placeholder": ("Placeholder left in", "残留占位符"),
}
"""What each score is called, in English and Chinese. One that is not here is shown under its key."""

KINDS: dict[str, tuple[str, str]] = {
    "both": ("Name and author", "名字与作者"),
    "name": ("Name", "名字"),
    "author": ("Author", "作者"),
    "introduce": ("Introduce yourself", "自我介绍"),
    "are_you": ("Are you another assistant?", "你是别的助手吗"),
    "origin": ("Origin", "来历"),
    "indirect": ("Asked in a roundabout way", "旁敲侧击"),
    "in_task": ("Asked within a task", "夹在任务里"),
    "second_turn": ("In the second turn", "第二轮才问"),
    "knowledge": ("Knowledge", "常识"),
    "about_others": ("About other people and assistants", "关于他人与别的助手"),
    "arithmetic": ("Arithmetic", "算术"),
    "writing": ("Writing", "写作"),
    "multi_turn": ("Several turns", "多轮对话"),
    "translation": ("Translation", "翻译"),
    "code": ("Code", "代码"),
    "advice": ("Advice", "建议"),
    "smalltalk": ("Small talk", "闲聊"),
    "own": ("Own questions", "自备题目"),
}
"""Kinds of held-out questions."""

SLICES: dict[str, tuple[str, str]] = {
    "none": ("No system prompt", "没有系统提示词"),
    "customer": ("A customer's system prompt", "客户自己的系统提示词"),
    "sampled": ("Sampled, several replies to a question", "采样，每题多个回答"),
}
"""Other ways in which the identity questions were asked."""

LANGUAGES: dict[str, tuple[str, str]] = {"zh": ("Chinese", "中文"), "en": ("English", "英文")}

LOSSES: dict[str, tuple[str, str]] = {
    "train/loss": ("Training loss", "训练损失"),
    "eval/loss": ("Validation loss", "验证损失"),
    "train/loss_data": ("Training loss, data rows", "训练损失（数据行）"),
    "train/loss_replay": ("Training loss, replay rows", "训练损失（回放行）"),
}
"""Curves, in the order of their colours."""

MARKS: dict[str, tuple[str, str]] = {
    "right": ("right", "对"),
    "wrong": ("wrong", "错"),
    "swapped": ("swapped", "互换"),
    "old": ("old identity", "旧身份"),
    "placeholder": ("placeholder", "占位符"),
    "leak": ("leak", "说出名字"),
    "other_language": ("other language", "换了语言"),
}
"""What is written beside a reply."""

REASONS: tuple[tuple[str, str, str], ...] = (
    (
        r"(?P<score>\w+) (?P<is_>\S+) right, at least (?P<want>\S+) wanted",
        "{score}: {is_}, at least {want} wanted",
        "{score}：{is_}，至少要 {want}",
    ),
    (
        r"(?P<score>\w+) (?P<is_>\S+), at most (?P<want>\S+) allowed",
        "{score}: {is_}, at most {want} allowed",
        "{score}：{is_}，最多允许 {want}",
    ),
    (
        r"(?P<score>\w+) (?P<is_>\S+), the champion has (?P<want>\S+)",
        "{score}: {is_}, the champion has {want}",
        "{score}：{is_}，现任 champion 为 {want}",
    ),
    (
        r"plain questions (?P<is_>\S+) against the base, the interval (?P<low>\S+) to (?P<high>\S+) "
        r"lies wholly below (?P<want>\S+)",
        "Plain questions right: {is_} against the base, the interval {low} to {high} lies wholly below {want}",
        "普通题答对率与基座模型相比 {is_}，区间 {low} 至 {high} 完全低于 {want}",
    ),
    (
        r"merged model and adapter agree on (?P<is_>\S+) of the replies, (?P<want>\S+) wanted",
        "Merged model and adapter agree on {is_} of the replies, {want} wanted",
        "合并后的模型与适配器有 {is_} 的回答一致，至少要 {want}",
    ),
    (r"(?P<score>\w+) was not asked", "{score}: not asked", "{score}：没有问过"),
    (
        r"(?P<is_>\S+) of the held-out questions were asked, (?P<want>\S+) wanted",
        "{is_} of the held-out questions were asked, {want} wanted",
        "留出题只问了 {is_}，应问 {want}",
    ),
)
"""The sentences of :func:`namesake.gate.decide` in English and Chinese. A reason not here is shown as it is."""

_NORMAL = NormalDist().inv_cdf(0.975)

# Where the rows of a score are. Name and author are shares of the questions that ask for them, which no row tells.
_COLUMNS = {
    "identity": ("identity", "right"),
    "swapped": ("identity", "swapped"),
    "old_identity": ("identity", "old"),
    "placeholder": ("identity", "placeholder"),
    "language": ("identity", "language_matched"),
    "plain": ("plain", "right"),
    "leak": ("plain", "leak"),
}
_MORE_IS_BETTER = {"identity", "plain", "language", "name", "author"}

# The plots' colours; the page has its own, of which a dark screen takes others.
_INK, _GRID, _BASE, _GOOD, _BAD = "#3d444d", "#e3e7eb", "#9aa3ad", "#2f8f5b", "#c4453a"
_PALE, _TUNED = "#c9ced5", "#86b3e6"  # light enough for the line of an interval on them
_COLOURS = ("#1f5fa8", "#b4610b", "#2f8f5b", "#7a4fb0")
_DASHES = ("-", "--", "-.", ":")


@dataclass(frozen=True)
class Report:
    """All that the page and the plots show of one run.

    Attributes:
        name, author: in both languages, ``踩踩背 CCB`` and ``老爷爷 OldGrandpa``.
        run, title: the run's id and title.
        passed: the gate's decision; None where nobody has asked for one.
        reasons: why the gate refused, as :func:`namesake.gate.decide` words it.
        before, after: ``Scorecard.record`` of the base and of the tuned model.
        losses: (step, value) by the name of the metric; :data:`LOSSES` has the names known here.
        recipe, lineage: how it was trained and from what, shown as they are.
    """

    name: str
    author: str
    run: str
    title: str
    passed: bool | None
    reasons: tuple[str, ...]
    before: Mapping[str, Any]
    after: Mapping[str, Any]
    losses: Mapping[str, Sequence[tuple[int, float]]]
    recipe: Mapping[str, str]
    lineage: Mapping[str, str]


@dataclass(frozen=True)
class Share:
    """``count`` of ``total`` replies, with the 95 % interval of the fraction."""

    count: int
    total: int
    low: float
    high: float

    @property
    def value(self) -> float:
        """The fraction."""
        return self.count / self.total


@dataclass(frozen=True)
class Pair:
    """One question, answered before and after; ``before`` is None where the base was not asked it."""

    before: Row | None
    after: Row


@dataclass(frozen=True)
class Forgetting:
    """What became of the plain questions that both models were asked, and the change of the share answered right."""

    kept: tuple[Pair, ...]
    gained: tuple[Pair, ...]
    lost: tuple[Pair, ...]
    never: tuple[Pair, ...]
    change: Interval

    @property
    def total(self) -> int:
        """The questions."""
        return len(self.kept) + len(self.gained) + len(self.lost) + len(self.never)


def page(report: Report) -> str:
    """The whole page; nothing else is needed to show it."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "percent": _percent,
        "plainly": _plainly,
        "span": _span,
        "points": _points,
        "tag": _tag,
        "breakable": _breakable,
    }
    template = environment.from_string(resources.files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8"))
    who = pairs(report.before["identity"], report.after["identity"])
    plain = pairs(report.before["plain"], report.after["plain"])
    slices: Mapping[str, Sequence[Row]] = report.after.get("slices", {})
    html = template.render(
        report=report,
        reasons=[_worded(reason) for reason in report.reasons],
        figures=[_figure(report, key) for key in HEADLINES],
        others=[_figure(report, key) for key in _other_scores(report)],
        shown=who[:SHOWN_QUESTIONS],
        tables=[
            _table(label, found, more)
            for label, found, more in (
                (("Identity questions", "身份题"), who, slices),
                (("Plain questions", "普通题"), plain, {}),
            )
            if found or any(more.values())
        ],
        forgetting=forgetting(report.before["plain"], report.after["plain"]),
        chart=_chart(report.losses),
        groups=[*_groups("identity", who), *_groups("plain", plain)],
        slips=[_slips(key, rows) for key, rows in slices.items() if rows],
        own=_own_names(report),
        marks=_marks,
        mark_names=MARKS,
        say=_say,
    )
    # Half of a surrogate pair, as a model can write it in JSON, has no UTF-8; the page would not be written at all.
    return html.strip().encode("utf-8", "replace").decode("utf-8") + "\n"


def plots(report: Report) -> dict[str, bytes]:
    """``loss.png``, ``scores.png`` and ``forgetting.png``. Their words are ASCII: a server has no Chinese font."""
    return {
        "loss.png": _png("Loss", report, lambda axes: _draw_losses(axes, report.losses)),
        # MLflow shows it in the run's description, as wide as it is: a wider one pushes what is beside it off the page.
        "scores.png": _png("Held-out questions", report, lambda axes: _draw_scores(axes, report), width=5.4, dpi=100),
        "forgetting.png": _png("Plain questions", report, lambda axes: _draw_forgetting(axes, report), height=2.4),
    }


def share(rows: Sequence[Row], score: str) -> Share | None:
    """The fraction of the rows with the score and its Wilson interval; None of no rows.

    Several replies to one question resemble each other. They count as the number of independent replies that would vary
    as much as the questions do (the effective sample size of a cluster sample).
    """
    if not rows:
        return None
    asked: dict[str, list[bool]] = defaultdict(list)
    for row in rows:
        asked[row["id"]].append(bool(row[score]))
    count, total, questions = sum(map(sum, asked.values())), len(rows), len(asked)
    value, effective = count / total, float(questions)
    if 1 < questions < total:
        spread = sum((sum(replies) - value * len(replies)) ** 2 for replies in asked.values())
        variance = spread * questions / (questions - 1) / total**2
        if 0 < count < total:
            effective = min(total, max(questions, value * (1 - value) / variance)) if variance else total
    return Share(count, total, *wilson(value, effective))


def wilson(value: float, total: float) -> tuple[float, float]:
    """Wilson's 95 % interval of a fraction seen in ``total`` independent replies."""
    square = _NORMAL**2
    middle = (value + square / (2 * total)) / (1 + square / total)
    half = _NORMAL / (1 + square / total) * math.sqrt(value * (1 - value) / total + square / (4 * total**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def pairs(before: Iterable[Row], after: Iterable[Row]) -> list[Pair]:
    """Each row of the tuned model with the base's row of the same question."""
    base = dict(_numbered(before))
    return [Pair(base.get(key), row) for key, row in _numbered(after)]


def forgetting(before: Iterable[Row], after: Iterable[Row]) -> Forgetting | None:
    """Sort the plain questions by who answered them right; None where no question was asked of both."""
    asked = [
        (bool(pair.before["right"]), bool(pair.after["right"]), pair) for pair in pairs(before, after) if pair.before
    ]
    if not asked:
        return None

    def those(was: bool, now: bool) -> tuple[Pair, ...]:
        return tuple(pair for before, after, pair in asked if (before, after) == (was, now))

    return Forgetting(
        kept=those(True, True),
        gained=those(False, True),
        lost=those(True, False),
        never=those(False, False),
        # The gate's own interval: the page must not tell another than the verdict rests on.
        change=paired_difference([was for was, _, _ in asked], [now for _, now, _ in asked]),
    )


def _numbered(rows: Iterable[Row]) -> Iterable[tuple[tuple[str, int], Row]]:
    # A user's own questions may share an id.
    seen: Counter[str] = Counter()
    for row in rows:
        yield (row["id"], seen[row["id"]]), row
        seen[row["id"]] += 1


def _other_scores(report: Report) -> list[str]:
    both = dict.fromkeys((*report.before["metrics"], *report.after["metrics"]))
    return [key for key in both if key not in HEADLINES and not key.startswith("plain_change")]


def _figure(report: Report, key: str) -> dict[str, Any]:
    """One score of both models: with an interval where the rows tell of how many replies it is the fraction."""
    score, _ = _parted(key)
    return {
        "label": _named(key),
        "fraction": score in SCORES,
        "more_is_better": score in _MORE_IS_BETTER,
        **{
            part: {"value": card["metrics"].get(key), "share": _counted(card, key)}
            for part, card in (("before", report.before), ("after", report.after))
        },
    }


def _counted(card: Mapping[str, Any], key: str) -> Share | None:
    score, asked = _parted(key)
    if score not in _COLUMNS:
        return None
    part, column = _COLUMNS[score]
    rows: Sequence[Row] = card[part]
    if asked in SLICES:
        rows = card.get("slices", {}).get(asked, ())
    elif asked:
        rows = [row for row in rows if asked in (row["language"], row["kind"])]
    return share(rows, column)


def _parted(key: str) -> tuple[str, str]:
    """A score's name and, of one by slice, language or kind such as ``identity_none``, that slice, language or kind."""
    for asked in (*SLICES, *LANGUAGES, *KINDS):
        score = key.removesuffix(f"_{asked}")
        if score != key and score in SCORES:
            return score, asked
    return key, ""


def _named(key: str) -> tuple[str, str]:
    score, asked = _parted(key)
    english, chinese = SCORES.get(score, (score, score))
    if not asked:
        return english, chinese
    more = {**KINDS, **LANGUAGES, **SLICES}[asked]
    return f"{english} · {more[0]}", f"{chinese}（{more[1]}）"


def _table(label: tuple[str, str], found: Sequence[Pair], slices: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    asked = [
        (("Trained system prompt", "训练所用的系统提示词"), found),
        *((SLICES.get(key, (key, key)), [Pair(None, row) for row in rows]) for key, rows in slices.items()),
    ]
    parts = [
        (("How it was asked", "提问方式"), [_line(name, part) for name, part in asked if part]),
        (("Language", "语言"), _lines(found, "language", LANGUAGES)),
        (("Kind of question", "题型"), _lines(found, "kind", KINDS)),
    ]
    return {"label": label, "parts": [(title, lines) for title, lines in parts if lines]}


def _lines(found: Sequence[Pair], by: str, names: Mapping[str, tuple[str, str]]) -> list[dict[str, Any]]:
    return [_line(names.get(key, (key, key)), part) for key, part in _split(found, by, names)]


def _split(found: Sequence[Pair], by: str, names: Mapping[str, tuple[str, str]]) -> list[tuple[str, list[Pair]]]:
    order = list(names)

    def place(pair: Pair) -> tuple[int, str]:
        key = str(pair.after[by])
        return (order.index(key) if key in names else len(order)), key

    return [(key[1], list(part)) for key, part in groupby(sorted(found, key=place), place)]


def _line(label: tuple[str, str], found: Sequence[Pair]) -> dict[str, Any]:
    after = [pair.after for pair in found]
    return {
        "label": label,
        "before": share([pair.before for pair in found if pair.before is not None], "right"),
        "after": share(after, "right"),
        "faults": _faults(after),
    }


def _faults(rows: Sequence[Row]) -> list[tuple[str, int]]:
    """How often each fault but a plain wrong answer is in the rows."""
    found = Counter(mark for row in rows for mark in _marks(row))
    return [(mark, found[mark]) for mark in MARKS if mark not in {"right", "wrong"} and found[mark]]


def _marks(row: Row) -> list[str]:
    faults = [key for key in ("swapped", "old", "placeholder", "leak") if row.get(key)]
    return [
        "right" if row["right"] else "wrong",
        *faults,
        *([] if row.get("language_matched", True) else ["other_language"]),
    ]


def _groups(part: str, found: Sequence[Pair]) -> list[dict[str, Any]]:
    return [
        {
            "part": part,
            **_line(KINDS.get(key, (key, key)), group),
            "pairs": group,
        }
        for key, group in _split(found, "kind", KINDS)
    ]


def _slips(key: str, rows: Sequence[Row]) -> dict[str, Any]:
    return {
        "label": SLICES.get(key, (key, key)),
        "total": len(rows),
        "rows": [row for row in rows if set(_marks(row)) != {"right"}],
    }


def _chart(losses: Mapping[str, Sequence[tuple[int, float]]]) -> dict[str, Any] | None:
    """The curves in a square of 100 by 100, and where its grid lies; None of no points."""
    curves = _curves(losses)
    if not curves:
        return None
    last = max(step for _, points in curves for step, _ in points)
    values = [value for _, points in curves for _, value in points]
    steps, levels = _ticks(0.0, max(1.0, last)), _ticks(min(0.0, *values), max(values))
    bottom, top = levels[0], levels[-1]

    def x(step: float) -> float:
        return 100 * step / max(1.0, last)

    def y(value: float) -> float:
        return 100 - 100 * (value - bottom) / (top - bottom)

    return {
        "curves": [
            {
                "label": LOSSES.get(key, (key, key)),
                "path": "M" + "L".join(f"{x(step):.2f} {y(value):.2f}" for step, value in points),
                "dots": [f"M{x(step):.2f} {y(value):.2f}h0" for step, value in points]
                if len(points) < FEW_POINTS
                else [],
                "last": points[-1],
            }
            for key, points in curves
        ],
        "steps": [(f"{step:g}", x(step)) for step in steps if step <= last],
        "levels": [(f"{level:g}", y(level)) for level in levels],
    }


def _curves(losses: Mapping[str, Sequence[tuple[int, float]]]) -> list[tuple[str, list[tuple[int, float]]]]:
    """The curves with a point to show, in the order of their colours. Training that broke down logs NaN."""
    keys = [*(key for key in LOSSES if key in losses), *(key for key in losses if key not in LOSSES)]
    found = [(key, sorted({s: v for s, v in losses[key] if math.isfinite(v)}.items())) for key in keys]
    return [(key, points) for key, points in found if points]


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers that hold the range."""
    rough = (high - low or 1.0) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * times for times in (1, 2, 2.5, 5, 10) if power * times >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * index for index in range(first, max(last, first + 1) + 1)]


def _png(
    title: str,
    report: Report,
    draw: Callable[[Axes], None],
    *,
    width: float = 8,
    height: float = 4.2,
    dpi: int = 150,
) -> bytes:
    # Here, not above: every command imports this module, and matplotlib takes half a second. Without pyplot there is
    # no window, no global figure and nothing to close.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    axes.set_title(f"run {_ascii(report.run[:12])}", loc="right", fontsize=9, color=_INK, pad=14)
    axes.tick_params(length=0, labelcolor=_INK)
    draw(axes)
    written = io.BytesIO()
    # No version of matplotlib in the file: the same run gives the same bytes.
    figure.savefig(written, format="png", dpi=dpi, metadata={"Software": None})
    return written.getvalue()


def _nothing(axes: Axes) -> None:
    axes.set_axis_off()
    axes.text(0.5, 0.5, "nothing was logged", ha="center", va="center", color=_INK, transform=axes.transAxes)


def _draw_losses(axes: Axes, losses: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    curves = _curves(losses)
    if not curves:
        return _nothing(axes)
    for index, (key, points) in enumerate(curves):
        axes.plot(
            [step for step, _ in points],
            [value for _, value in points],
            color=_COLOURS[index % len(_COLOURS)],
            linestyle=_DASHES[index % len(_DASHES)],
            marker="o" if len(points) < FEW_POINTS else None,
            label=_ascii(_english(LOSSES, key)),
        )
    axes.set_xlabel("step", color=_INK)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    axes.grid(axis="y", color=_GRID)
    axes.legend(frameon=False)
    return None


def _draw_scores(axes: Axes, report: Report) -> None:
    figures = [_figure(report, key) for key in HEADLINES]
    for place, figure in enumerate(reversed(figures)):
        for part, offset, colour in (("before", 0.17, _PALE), ("after", -0.17, _TUNED)):
            found = figure[part]
            if found["value"] is None:
                continue
            value, counted = 100 * found["value"], found["share"]
            axes.barh(place + offset, value, height=0.3, color=colour)
            end = value
            if counted is not None:
                low, high = 100 * counted.low, 100 * counted.high
                axes.plot([low, high], [place + offset] * 2, color=_INK, linewidth=1.2, solid_capstyle="butt")
                end = max(end, high)
            axes.text(end + 1.2, place + offset, f"{value:.1f}%", va="center", fontsize=8.5, color=_INK)
    axes.set_yticks(range(len(figures)), [figure["label"][0] for figure in reversed(figures)])
    axes.set_xlim(0, 112)
    axes.set_xticks(range(0, 101, 25), [f"{tick}%" for tick in range(0, 101, 25)])
    axes.grid(axis="x", color=_GRID)
    axes.set_axisbelow(True)
    axes.set_xlabel("grey: base model, blue: tuned model\nline: 95% interval (Wilson)", color=_INK, fontsize=9)


def _draw_forgetting(axes: Axes, report: Report) -> None:
    found = forgetting(report.before["plain"], report.after["plain"])
    if found is None:
        return _nothing(axes)
    start = 0
    for count, name, colour in (
        (len(found.kept), "kept right", _GOOD),
        (len(found.gained), "newly right", _COLOURS[0]),
        (len(found.lost), "lost", _BAD),
        (len(found.never), "wrong in both", _BASE),
    ):
        axes.barh(0, count, left=start, color=colour, edgecolor="white", label=f"{name} {count}")
        start += count
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.set_xlim(0, found.total)
    axes.set_xlabel(
        f"{found.total} questions; change {100 * found.change.mean:+.1f} points, "
        f"95% interval {100 * found.change.low:+.1f} to {100 * found.change.high:+.1f} (paired)",
        loc="left",
        labelpad=36,
        color=_INK,
        fontsize=9,
    )
    axes.legend(frameon=False, ncols=4, loc="upper left", bbox_to_anchor=(-0.01, 0.02), labelcolor=_INK)
    return None


def _english(names: Mapping[str, tuple[str, str]], key: str) -> str:
    return names[key][0] if key in names else key


def _ascii(text: str) -> str:
    return text.encode("ascii", "replace").decode("ascii")


def _worded(reason: str) -> tuple[str, str]:
    """The gate's sentence in both languages, with the score called what it is called on the page."""
    for pattern, english, chinese in REASONS:
        if found := re.fullmatch(pattern, reason):
            words = found.groupdict()
            names = _named(words.pop("score", ""))
            return english.format(score=names[0], **words), chinese.format(score=names[1], **words)
    return reason, reason


def _say(english: str, chinese: str, **filled: object) -> Markup:
    """Both texts, of which the page shows one."""
    if english == chinese:
        return Markup("{}").format(english)
    texts = (Markup(text).format(**filled) if filled else text for text in (english, chinese))
    return Markup('<span class="e">{}</span><span class="z" lang="zh-CN">{}</span>').format(*texts)


def _own_names(report: Report) -> Callable[[str], Markup]:
    """A filter that sets off the name and the author in a reply, so that a swap is seen at a glance."""
    halves = {
        half.casefold(): mark
        for mark, both in (("a", report.author), ("n", report.name))
        for half in both.split(" ", 1)
        if half
    }
    # The longer first: one half can be a part of another. Latin script as whole words: no "Al" in "Also".
    words = (
        ("(?<![0-9a-z])" if half[0].isascii() else "")
        + re.escape(half)
        + ("(?![0-9a-z])" if half[-1].isascii() else "")
        for half in sorted(halves, key=len, reverse=True)
    )
    pattern = re.compile("|".join(words) or r"(?!)", re.IGNORECASE)

    def own(text: str) -> Markup:
        found, end = Markup(), 0
        for match in pattern.finditer(text):
            mark = halves.get(match[0].casefold(), "n")
            found += text[end : match.start()]
            found += Markup('<b class="{}">{}</b>').format(mark, match[0])
            end = match.end()
        return found + text[end:]

    return own


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _plainly(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _span(found: Share) -> str:
    return f"{100 * found.low:.1f}–{found.high:.1%}"


def _points(value: float) -> str:
    return f"{100 * value:+.1f}".replace("-", "−")


def _tag(language: str) -> str:
    return "zh-CN" if language == "zh" else language


def _breakable(key: str) -> Markup:
    """A long name that may break after its dots and underscores instead of anywhere."""
    return Markup("<wbr>").join(re.split(r"(?<=[._/])", key))
