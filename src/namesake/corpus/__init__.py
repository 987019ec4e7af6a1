"""Namesake's own data: identity rows, plain prompts, and the held-out questions that are never trained on.

The identity rows have the schema of ``swift/self-cognition`` with dialogues as ``messages`` and the same placeholders
``{{NAME}}`` and ``{{AUTHOR}}``. They are kept as templates (``data/identity.*.yaml``): each kind has questions and
reply shapes, and each question takes the next reply shape in turn.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal

import yaml

from namesake.identity import LANGUAGES, Language

Message = dict[str, str]
"""``{"role": "system" | "user" | "assistant", "content": str}``"""

Fact = Literal["name", "author"]

OTHER_PLACEHOLDER = "{{OTHER}}"
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


def spread(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """``count`` of the prompts, taken at even distances, so that every kind and language keeps its share."""
    if count >= len(prompts):
        return list(prompts)
    return [prompts[index * len(prompts) // count] for index in range(count)]


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
