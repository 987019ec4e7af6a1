"""The use case ``namesake compare``: two versions or runs side by side.

What they say, how they score, how far their weights lie apart, and what they are made of. Kept scores and replies are
used where both were asked the same questions; nobody is asked anew unless the user says so.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from namesake import examine, gate, registry, tracking, weights
from namesake.errors import NamesakeError
from namesake.manifest import SCORECARD, WEIGHTS_FOLDER, Manifest
from namesake.messages import joined, tr, translated
from namesake.promotion import lineage
from namesake.terminal import Screen
from namesake.versions import checked
from namesake.weights import Distance

_SLICES = ("none", "customer")
"""Slices whose replies are shown beside those under the trained prompt; of sampled ones two differ anyway."""

_PAIRED = {"identity": ("identity", "right"), "plain": ("plain", "right"), "leak": ("plain", "leak")}
"""Metrics whose difference gets an interval: part of the scorecard, and the score."""

_FAULTS = {"swapped": tr("swapped"), "old": tr("old"), "placeholder": tr("placeholder"), "leak": tr("leak")}
_SHOWN_TENSORS = 5
_CHARACTERS = 160


@dataclass(frozen=True)
class Request:
    """What the user asked for.

    Attributes:
        a, b: ``models:/…`` or a run's id.
        ask: ask both anew instead of taking what they kept.
        questions: file of own questions to ask; empty for the held-out ones.
        public_key: the key that both versions must be signed by; none for unsigned ones.
    """

    a: str
    b: str
    ask: bool = False
    questions: str = ""
    public_key: Path | None = None


@dataclass(frozen=True)
class Side:
    """One of the two.

    Attributes:
        name: the version or run that was found.
        facts: what it is made of, by name.
        scores: fractions by metric.
        card: ``Scorecard.record``; none where no replies were kept.
        questions: digest of what it was asked; empty where that is not known.
        folder: the version's files; none for a run.
    """

    name: str
    facts: Mapping[str, str]
    scores: Mapping[str, float]
    card: Mapping[str, Any] | None
    questions: str
    folder: Path | None = None
    digests: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Score:
    """A metric of both; ``low`` and ``high`` are the 95 % interval of the paired difference, where replies are kept."""

    metric: str
    a: float
    b: float
    low: float | None = None
    high: float | None = None

    @property
    def difference(self) -> float:
        """How much more ``b`` has."""
        return self.b - self.a


@dataclass(frozen=True)
class Said:
    """A question that they answer differently, and what was found in each reply."""

    slice: str
    id: str
    question: str
    a: str
    b: str
    a_found: str
    b_found: str


@dataclass(frozen=True)
class Comparison:
    """All of it.

    Attributes:
        replies: where they differ, first those that are right on one side only.
        asked: how many replies each gave; 0 where they cannot be compared.
        distance: none where one is a run.
        facts: name and both values, where they differ.
        notes: what could not be compared, and what that would need.
    """

    a: str
    b: str
    scores: tuple[Score, ...]
    replies: tuple[Said, ...]
    asked: int
    distance: Distance | None
    facts: tuple[tuple[str, str, str], ...]
    notes: tuple[str, ...]

    def record(self) -> dict[str, Any]:
        """As it goes into JSON."""
        apart = self.distance
        return {
            "a": self.a,
            "b": self.b,
            "scores": [{**vars(score), "difference": score.difference} for score in self.scores],
            "asked": self.asked,
            "replies": [vars(said) for said in self.replies],
            "weights": apart
            and {
                "equal": apart.equal,
                "distance": _finite(apart.total),
                "tensors": {name: _finite(value) for name, value in apart.tensors if value},
                "others": apart.others,
            },
            "differences": [{"what": what, "a": a, "b": b} for what, a, b in self.facts],
            "notes": self.notes,
        }


def compare(request: Request, screen: Screen) -> Comparison:
    """Put the two side by side. Nothing is written.

    Raises:
        InputError: one of them is neither a run nor a version.
        PromotionError: a version is damaged, or not signed by the key.
        RegistryError, TrackingError, BaseModelError: one cannot be had.
    """
    a, b = (_side(target, request, screen) for target in (request.a, request.b))
    notes: list[str] = []
    scores: list[Score] = []
    replies: list[Said] = []
    asked = 0
    if not _same_questions(a, b):
        notes.append("they were asked different questions, so scores and replies are left out; --ask asks both anew")
    else:
        scores = [*_scores(a, b)]
        if a.card and b.card:
            asked, replies = _replies(a.card, b.card)
        else:
            without = _and([side.name for side in (a, b) if not side.card])
            notes.append(tr("{sides} kept no replies; --ask asks both anew", sides=without))
    apart = None
    if a.folder and b.folder:
        apart = _distance(a, b, screen)
    else:
        runs = _and([side.name for side in (a, b) if not side.folder])
        notes.append(tr("weights are compared of versions; promote {runs}", runs=runs))
    return Comparison(
        a.name, b.name, tuple(scores), tuple(replies), asked, apart, tuple(_facts(a.facts, b.facts)), tuple(notes)
    )


def show(found: Comparison, screen: Screen, limit: int) -> None:
    """All of it on the terminal, at most ``limit`` replies (0: all)."""
    if found.replies:
        few = found.replies[: limit or None]
        screen.table(
            ("question", found.a, found.b),
            [(_asked(said), _told(said.a, said.a_found), _told(said.b, said.b_found)) for said in few],
        )
        if len(few) < len(found.replies):
            more = len(found.replies) - len(few)
            screen.result(tr("  {count} more differ; --limit 0 shows them", count=more))
    if found.asked:
        screen.result(tr("  replies  {differ} of {asked} differ", differ=len(found.replies), asked=found.asked))
    if found.scores:
        shown = [score for score in found.scores if score.difference or score.metric in _PAIRED]
        screen.table(("score", found.a, found.b, "difference"), [_score_row(score) for score in shown])
        if len(shown) < len(found.scores):
            screen.result(tr("  {count} more scores are the same", count=len(found.scores) - len(shown)))
    if found.distance:
        _show_distance(found.distance, screen)
    if found.facts:
        screen.table(("made of", found.a, found.b), [(what, _short(a), _short(b)) for what, a, b in found.facts])
    for note in found.notes:
        screen.warn(note)


def _side(target: str, request: Request, screen: Screen) -> Side:
    asked_for, target = target, examine.fixed(target)
    if target.startswith("models:/"):
        version = registry.resolve(target)
        folder = checked(version, request.public_key)
        record = Manifest.read(folder)
        kept = folder / SCORECARD
        card = json.loads(kept.read_text(encoding="utf-8")) if SCORECARD in record.digests else None
        name = version.uri if asked_for == target else f"{version.uri} ({registry.alias_in(asked_for)})"
        questions = record.questions or version.tags.get(registry.TAG_QUESTIONS, "")
        side = Side(name, _of_manifest(record), record.scores, card, questions, folder, record.digests)
    else:
        run = tracking.get_run(examine.run_id(target))
        scores = {k.removeprefix("probe/"): v for k, v in run.metrics.items() if k.startswith("probe/")}
        try:
            card = json.loads(tracking.fetch(run.id, "scorecard.json").read_text(encoding="utf-8"))["tuned"]
        except (NamesakeError, KeyError):  # it ended before it was asked
            card = None
        identity = {f"identity.{key}": run.params.get(f"identity.{key}", "") for key in ("name", "author")}
        made = {**identity, "system": run.params.get("sft.system", ""), **_flat(lineage(run)), "run": run.id}
        side = Side(tr("run {id}", id=run.id[:8]), made, scores, card, run.params.get("probe.questions", ""))
    if not (request.ask or request.questions):
        return side
    screen.step(tr("asking {side}", side=side.name))
    asked = examine.ask(target, screen, questions=request.questions)
    return Side(side.name, side.facts, asked.metrics, asked.record(), "asked now", side.folder, side.digests)


def _of_manifest(record: Manifest) -> dict[str, str]:
    parts = {"base": record.base, "data": record.data, "recipe": record.recipe, "tools": record.tools}
    return {
        "identity.name": record.identity["name"],
        "identity.author": record.identity["author"],
        "system": record.system or "",
        **_flat(parts),
        "run": record.run,
        "policy": json.dumps(record.gate.get("policy", {}), sort_keys=True),
        "override": record.override,
    }


def _flat(parts: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    return {f"{part}.{key}": str(value) for part, values in parts.items() for key, value in values.items()}


def _facts(a: Mapping[str, str], b: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    for what in sorted({*a, *b}):
        # A run has no policy and no override: what only one kind of side has is no difference between them.
        if a.get(what, "") != b.get(what, "") and not (what in {"policy", "override"} and (what in a) != (what in b)):
            yield what, a.get(what, ""), b.get(what, "")


def _scores(a: Side, b: Side) -> Iterator[Score]:
    for metric, value in a.scores.items():
        if metric not in b.scores:
            continue
        low = high = None
        if metric in _PAIRED and a.card and b.card:
            part, score = _PAIRED[metric]
            one, other = ([bool(row[score]) for row in side.card[part]] for side in (a, b) if side.card)
            if len(one) == len(other) and one:
                interval = gate.paired_difference(one, other)
                low, high = interval.low, interval.high
        yield Score(metric, value, b.scores[metric], low, high)


def _same_questions(a: Side, b: Side) -> bool:
    if a.questions and b.questions:
        return a.questions == b.questions
    # Runs of older releases kept no digest of what they were asked; their replies have the questions beside them.
    return bool(a.card and b.card) and _asked_of(a) == _asked_of(b)


def _asked_of(side: Side) -> list[tuple[str, str]]:
    card = side.card or {}
    return [(row["id"], row["question"]) for part in ("identity", "plain") for row in card.get(part, ())]


def _replies(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[int, list[Said]]:
    asked, found = 0, []
    for part, ours, theirs in (
        ("", a["identity"], b["identity"]),
        ("plain", a["plain"], b["plain"]),
        *((name, *(card.get("slices", {}).get(name, []) for card in (a, b))) for name in _SLICES),
    ):
        others = {row["id"]: row for row in theirs}
        for row in ours:
            other = others.get(row["id"])
            if other is None:
                continue
            asked += 1
            if row["reply"] != other["reply"]:
                found.append(
                    Said(part, row["id"], row["question"], row["reply"], other["reply"], _found(row), _found(other))
                )
    return asked, sorted(found, key=lambda said: said.a_found == said.b_found)


def _found(row: Mapping[str, Any]) -> str:
    faults = [fault for name, fault in _FAULTS.items() if row.get(name)]
    return joined([tr("right") if row["right"] else tr("not right"), *faults], ", ")


def _distance(a: Side, b: Side, screen: Screen) -> Distance:
    ours, theirs = (
        {k: v for k, v in side.digests.items() if k.startswith(f"{WEIGHTS_FOLDER}/") and k.endswith(".safetensors")}
        for side in (a, b)
    )
    if ours and ours == theirs:
        return Distance(0.0, (), ())
    screen.step("comparing the weights")
    assert a.folder is not None
    assert b.folder is not None
    return weights.distance(a.folder / WEIGHTS_FOLDER, b.folder / WEIGHTS_FOLDER)


def _show_distance(apart: Distance, screen: Screen) -> None:
    if apart.equal:
        screen.result("  weights  equal")
        return
    screen.result(tr("  weights  {total:.3e} apart (‖B - A‖ / ‖A‖ over all tensors); farthest:", total=apart.total))
    for name, value in apart.tensors[:_SHOWN_TENSORS]:
        screen.result(f"    {value:.3e}  {name}")
    if apart.others:
        screen.warn(
            tr(
                "{count} tensors are in one only or differ in shape: {names} …",
                count=len(apart.others),
                names=", ".join(apart.others[:3]),
            )
        )


def _score_row(score: Score) -> Sequence[str]:
    difference = f"{score.difference:+.1%}"
    if score.low is not None:
        difference = tr(
            "{difference} ({low:+.1%} to {high:+.1%})", difference=difference, low=score.low, high=score.high
        )
    return score.metric, f"{score.a:.1%}", f"{score.b:.1%}", difference


def _asked(said: Said) -> str:
    return f"{said.question}\n({said.slice})" if said.slice else said.question


def _told(reply: str, found: str) -> str:
    return f"{_short(reply)}\n[{translated(found)}]"


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else tr("{one} and {other}", one=names[0], other=names[1])


def _short(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= _CHARACTERS else f"{flat[:_CHARACTERS]}…"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
