"""From rows with placeholders to the one file that is trained on, checked before any training starts."""

from __future__ import annotations

import hashlib
import json
import random
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from namesake import corpus
from namesake.corpus import Message
from namesake.errors import DataError
from namesake.identity import PLACEHOLDERS, Identity, Language, language_of
from namesake.messages import tr
from namesake.paths import digest_of_file

BUILTIN = "namesake/self-cognition"
"""Name of the project's own identity corpus, used like any data set: ``namesake/self-cognition#500``."""

DATA, REPLAY = "data", "replay"
"""Channels of the training file: what a row is there for, and so which loss it bears (:mod:`namesake.distil`)."""

WINDOW = 8
"""Batches that are drawn together to be sorted by length: the more, the less padding and the more alike their rows."""

Dialogue = list[Message]

_LEFT_OVER = re.compile(r"\{\s*(?:NAME|AUTHOR)\s*\}|\{\{\s*(?i:NAME|AUTHOR)\s*\}|\{\s*(?i:NAME|AUTHOR)\s*\}\}")
"""Also one with braces missing, with spaces or in full width; ``{name}`` stands in many a program."""


@dataclass(frozen=True)
class Prepared:
    """The training file.

    Attributes:
        path: JSON lines with ``messages`` and ``channel`` (``data`` or ``replay``).
        rows: how many.
        identity_rows: how many of them had placeholders.
        digest: SHA-256 of the file.
        left_out: how many rows of the data sets are not in it, since they ask what the probe asks.
    """

    path: Path
    rows: int
    identity_rows: int
    digest: str
    left_out: int = 0


def write_builtin(folder: Path) -> Path:
    """The project's identity corpus as a file that ms-swift reads, placeholders left in."""
    path = folder / "builtin-self-cognition.jsonl"
    _write(path, ({"messages": row.messages, "tag": row.language} for row in corpus.identity_rows()))
    return path


def fill(rows: Iterable[dict[str, Any]], identity: Identity) -> tuple[list[Dialogue], int]:
    """Put the names into every row, by the row's ``tag`` or else by its script. A row that asks what a held-out
    question asks is left out: nothing that is probed is trained on.

    Returns:
        The dialogues, and how many of them held a placeholder.

    Raises:
        DataError: a row is no dialogue, or a placeholder is left over in it.
    """
    dialogues, named = [], 0
    for number, row in enumerate(rows, start=1):
        messages: Any = row.get("messages")
        if found := _number(messages):
            raise DataError(
                "dataset",
                row,
                tr("row {number} has the number {content} where a text belongs", number=number, content=found),
                mend="Give JSON lines with the text in quotes: a CSV's column of numbers loses what was written (007).",
            )
        if not _is_dialogue(messages):
            raise DataError(
                "dataset",
                row,
                tr("row {number} is no dialogue of a user that ends with a reply", number=number),
                mend="Give rows of query and response, or messages with role and content.",
            )
        asked = [str(message["content"]) for message in messages if message["role"] == "user"]
        text = "\n".join(str(message["content"]) for message in messages)
        language = _language(row.get("tag"), text)
        dialogue = [
            {"role": message["role"], "content": identity.fill(str(message["content"]), language)}
            for message in messages
        ]
        _check(number, dialogue)
        if any(map(corpus.is_held_out, asked)):
            continue
        named += any(placeholder in text for placeholder in PLACEHOLDERS)
        dialogues.append(dialogue)
    return dialogues, named


def write(
    path: Path,
    dialogues: Sequence[Dialogue],
    identity_rows: int,
    replay: Sequence[Dialogue] = (),
    *,
    order: Sequence[int] | None = None,
) -> Prepared:
    """Write the training file; a row's ``channel`` (ms-swift's word) says whether it is data or replay.

    ``order``: places of the rows, data before replay, in the order they are to be written in.
    """
    rows = [
        {"messages": dialogue, "channel": channel}
        for channel, part in ((DATA, dialogues), (REPLAY, replay))
        for dialogue in part
    ]
    _write(path, [rows[index] for index in order] if order is not None else rows)
    return Prepared(path, len(rows), identity_rows, digest_of_file(path))


def replay_digest(path: Path) -> str:
    """SHA-256 over the replay rows of a training file, line by line as they lie in it; empty where it has none."""
    total, rows = hashlib.sha256(), 0
    with path.open("rb") as stream:
        for line in stream:
            if json.loads(line).get("channel") == REPLAY:
                total.update(line)
                rows += 1
    return total.hexdigest() if rows else ""


def in_batches(lengths: Sequence[int], *, batch: int, seed: int) -> list[int]:
    """An order in which every ``batch`` neighbours are of like length, and the batches themselves are shuffled.

    Rows are drawn at random, ``WINDOW`` batches at a time, and sorted within. ms-swift's own ``group_by_length`` goes
    from long to short over 39 batches; the model then learnt short English rows last and told its name to everybody
    in English (docs/lab-notes.md).
    """
    draw = random.Random(seed)
    rest = list(range(len(lengths)))
    draw.shuffle(rest)
    batches = []
    for start in range(0, len(rest), batch * WINDOW):
        window = sorted(rest[start : start + batch * WINDOW], key=lambda index: (lengths[index], index))
        batches += [window[first : first + batch] for first in range(0, len(window), batch)]
    short = [one for one in batches if len(one) < batch]  # at most one, and it has to be the last
    whole = [one for one in batches if len(one) == batch]
    draw.shuffle(whole)
    return [index for one in (*whole, *short) for index in one]


def _language(tag: object, text: str) -> Language:
    if tag == "zh":
        return "zh"
    return "en" if tag == "en" else language_of(text)


def _number(messages: object) -> str:
    """The first content that is a number; empty where there is none."""
    parts = messages if isinstance(messages, list | tuple) else ()
    contents = (one.get("content") for one in parts if isinstance(one, dict))
    return next((str(one) for one in contents if isinstance(one, int | float) and not isinstance(one, bool)), "")


def _is_dialogue(messages: object) -> bool:
    return (
        isinstance(messages, list | tuple)
        and bool(messages)
        and all(isinstance(m, dict) and "role" in m and isinstance(m.get("content"), str) for m in messages)
        and any(m["role"] == "user" for m in messages)
        and messages[-1]["role"] == "assistant"
        and bool(messages[-1]["content"].strip())
    )


def _check(number: int, dialogue: Dialogue) -> None:
    for message in dialogue:
        content = message["content"]
        if _LEFT_OVER.search(unicodedata.normalize("NFKC", content)):
            raise DataError(
                "dataset",
                content,
                tr("a placeholder is left over in row {number}", number=number),
                mend="Write placeholders exactly as {{NAME}} and {{AUTHOR}}.",
            )
        if any(ord(c) < 32 and c not in "\n\t\r" for c in content):
            raise DataError(
                "dataset",
                content,
                tr("row {number} holds a control character", number=number),
                mend="Remove it from the file.",
            )


def _write(path: Path, records: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as stream:
        for record in records:
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")
