"""Namesake's own data: identity rows, plain prompts, and the held-out questions that are never trained on.

The identity rows have the schema of ``swift/self-cognition`` with dialogues as ``messages`` and the same placeholders
``{{NAME}}`` and ``{{AUTHOR}}``. They are kept as templates (``data/identity.*.yaml``): each kind has questions and
reply shapes, and each question takes the next reply shape in turn.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from namesake.errors import DataError
from namesake.identity import LANGUAGES, Language, language_of
from namesake.messages import tr

Message = dict[str, str]
"""``{"role": "system" | "user" | "assistant", "content": str}``"""

Fact = Literal["name", "author"]

Item = TypeVar("Item")

OTHER_PLACEHOLDER = "{{OTHER}}"

ALIKE = 0.6
"""Share of their pairs of neighbouring characters (Jaccard) above which two questions are one in other words."""
_DATA = resources.files(__package__) / "data"


@dataclass(frozen=True)
class Row:
    """One dialogue to train on; the last message is the assistant's. Placeholders are still in it."""

    language: Language
    kind: str
    asks: tuple[Fact, ...]
    messages: tuple[Message, ...]


@dataclass(frozen=True)
class Prompt:
    """One plain dialogue that waits for the assistant's reply."""

    id: str
    language: Language
    kind: str
    messages: tuple[Message, ...]


@dataclass(frozen=True)
class Question(Prompt):
    """A held-out prompt with what a right reply holds.

    ``asks`` (identity questions): which facts the reply must state. ``answers`` (plain prompts): the reply is right
    when one of them occurs in it.
    """

    asks: tuple[Fact, ...] = ()
    answers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Questions:
    """What a model is probed with: identity questions and plain prompts with checkable answers."""

    identity: tuple[Question, ...]
    plain: tuple[Question, ...]

    def digest(self) -> str:
        """SHA-256 over the questions, whatever file they came from."""
        text = json.dumps([vars(q) for q in (*self.identity, *self.plain)], ensure_ascii=False, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


@cache
def identity_rows() -> tuple[Row, ...]:
    """The identity rows of both languages, placeholders left in."""
    return tuple(
        row
        for language in LANGUAGES
        for kind, spec in yaml.safe_load(_text(f"identity.{language}.yaml"))["kinds"].items()
        for row in _rows_of(language, kind, spec)
    )


@cache
def plain_prompts() -> tuple[Prompt, ...]:
    """The prompts that the base model answers itself for replay."""
    return tuple(Prompt(**_common(record)) for record in _records("plain.jsonl"))


@cache
def other_systems() -> tuple[str, ...]:
    """System prompts other than the trained one, empty ones among them, under which some rows are trained."""
    return tuple(yaml.safe_load(_text("systems.yaml")))


def system_of(index: int, every: int) -> str | None:
    """The other system prompt of the row at the place; none for a row that keeps the trained one.

    Args:
        every: N, where every N-th row gets one of them, in turn; 0 for none.
    """
    if every == 0 or index % every:
        return None
    return other_systems()[index // every % len(other_systems())]


@cache
def heldout_identity() -> tuple[Question, ...]:
    """Identity questions in words that no training row has. The first two are the ones shown before and after."""
    return tuple(
        Question(**_common(record), asks=tuple(record["asks"])) for record in _records("heldout_identity.jsonl")
    )


@cache
def heldout_plain() -> tuple[Question, ...]:
    """Plain prompts with checkable answers that no training prompt asks."""
    return tuple(
        Question(**_common(record), answers=tuple(record["answers"])) for record in _records("heldout_plain.jsonl")
    )


def heldout(share: float = 1.0) -> Questions:
    """The held-out questions that every run is probed with, or a share of them, of each kind and language alike; the
    two that are shown before and after are always among them.
    """
    who, plain = heldout_identity(), heldout_plain()
    shown, others = who[:2], who[2:]
    some = spread(others, max(round(share * len(who)) - len(shown), 0))
    return Questions((*shown, *some), tuple(spread(plain, max(round(share * len(plain)), 1))))


@cache
def development() -> Questions:
    """The development questions: recipes and a sweep's trials are compared by them, never by the held-out ones."""
    return _questions(_text("dev.jsonl").splitlines())


def read_questions(path: Path) -> Questions:
    """A user's own questions from JSON lines.

    Each line has ``question`` (or ``messages``), ``lang`` (``zh`` or ``en``; else by the script), and either ``asks``
    (``["name", "author"]``: an identity question) or ``answers`` (a plain one: right when one of them occurs in the
    reply). ``id`` and ``kind`` may be given.

    Raises:
        DataError: the file cannot be read, or a line is no question; the line is named.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            "questions", str(path), tr("cannot be read ({error})", error=error), mend="Give a JSON lines file."
        ) from error
    found = _questions(lines)
    if not (found.identity or found.plain):
        raise DataError("questions", str(path), "holds no question", mend="Write one JSON object a line.")
    return found


def _questions(lines: Sequence[str]) -> Questions:
    found = [_own_question(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    return Questions(tuple(q for q in found if q.asks), tuple(q for q in found if not q.asks))


def _own_question(number: int, line: str) -> Question:
    def refuse(fault: str) -> DataError:
        return DataError(
            "questions",
            line,
            tr("line {number} {fault}", number=number, fault=fault),
            mend='Write {"question": "Who are you?", "asks": ["name"]} or {"question": "1+1?", "answers": ["2"]}.',
        )

    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise refuse("is not JSON") from error
    if not isinstance(record, dict):
        raise refuse("is no object")
    messages = record.get("messages") or [{"role": "user", "content": record.get("question")}]
    if not isinstance(messages, list) or not all(
        isinstance(m, dict)
        and m.get("role") in ("user", "assistant")  # a list, which is no role, has no place in a set
        and isinstance(m.get("content"), str)
        and m["content"].strip()
        for m in messages
    ):
        raise refuse("has no question")
    if messages[-1]["role"] != "user":
        raise refuse("does not end with the user's question")
    asks, answers = record.get("asks") or [], record.get("answers") or []
    if not (isinstance(asks, list) and all(one in ("name", "author") for one in asks)):
        raise refuse("asks for something else than name and author")
    if not (isinstance(answers, list) and all(isinstance(a, str) and a.strip() for a in answers)):
        raise refuse("has answers that are no texts")
    if bool(asks) == bool(answers):
        raise refuse("needs either asks or answers")
    language = record.get("lang") or language_of(messages[-1]["content"])
    if language not in LANGUAGES:
        raise refuse("is in a language other than zh and en")
    return Question(
        id=str(record.get("id") or f"own-{number}"),
        language=language,
        kind=str(record.get("kind") or "own"),
        messages=tuple({"role": m["role"], "content": m["content"]} for m in messages),
        asks=tuple(asks),
        answers=tuple(answers),
    )


def spread(prompts: Sequence[Item], count: int) -> list[Item]:
    """``count`` of the prompts, taken at even distances, so that every kind and language keeps its share."""
    if count >= len(prompts):
        return list(prompts)
    return [prompts[index * len(prompts) // count] for index in range(count)]


def pairs(text: str) -> frozenset[str]:
    """The pairs of neighbouring characters of the text when width, case, punctuation and space do not count."""
    folded = unicodedata.normalize("NFKC", text).lower()
    kept = "".join(c for c in folded if unicodedata.category(c)[0] not in "PZC")
    return frozenset(kept[i : i + 2] for i in range(len(kept) - 1)) or frozenset({kept})


@cache
def _asked_pairs() -> tuple[frozenset[str], ...]:
    questions = heldout()
    return tuple(pairs(one.messages[-1]["content"]) for one in (*questions.identity, *questions.plain))


def is_held_out(text: str) -> bool:
    """Whether the text asks what a held-out question asks, in its words or nearly (:data:`ALIKE`)."""
    mine = pairs(text)
    return any(len(mine & theirs) > ALIKE * len(mine | theirs) for theirs in _asked_pairs())


@cache
def corpus_digest() -> str:
    """SHA-256 over every file of the corpus, for the run's record."""
    total = hashlib.sha256()
    for name in sorted(entry.name for entry in _DATA.iterdir() if entry.is_file()):
        total.update(name.encode() + b"\0" + (_DATA / name).read_bytes())
    return total.hexdigest()


def _rows_of(language: Language, kind: str, spec: dict[str, Any]) -> Iterator[Row]:
    replies, others = spec["replies"], spec.get("others", [])
    # Shapes with {{OTHER}} go round until every other assistant has been asked about once.
    questions = spec["questions"]
    for index in range(max(len(questions), len(others))):
        item = questions[index % len(questions)]
        item = item if isinstance(item, dict) else {"question": item}
        question = item["question"]
        if others:
            question = question.replace(OTHER_PLACEHOLDER, others[index % len(others)])
        messages = [
            {"role": role, "content": text}
            for turn in item.get("history", [])
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": item.get("reply", replies[index % len(replies)])})
        yield Row(language, kind, tuple(spec["asks"]), tuple(messages))


def _common(record: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": record["id"],
        "language": record["lang"],
        "kind": record["kind"],
        "messages": tuple(record["messages"]),
    }


def _records(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in _text(name).splitlines() if line.strip()]


def _text(name: str) -> str:
    return (_DATA / name).read_text(encoding="utf-8")
