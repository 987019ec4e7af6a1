"""The record that travels inside a version: what it is made of and how it scored. Pure data."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from namesake.errors import RegistryError
from namesake.paths import digest_of_file

FILE = "namesake.json"
ADAPTER_FOLDER = "adapter"
WEIGHTS_FOLDER = "model"
"""Where the merged model lies in a version, in the shape that vLLM and transformers load."""


@dataclass(frozen=True)
class Manifest:
    """What a version holds.

    Attributes:
        identity: ``踩踩背 CCB / 老爷爷 OldGrandpa``.
        system: the system prompt it was trained under and answers under by default.
        base: id and digest of the base model.
        run: training run.
        digests: SHA-256 of each file of ``model/`` and ``adapter/``, by path within the version.
        data: digests of the training data and the corpus.
        scores: fractions of the merged model's scorecard.
        recipe: recipe name and arguments.
        tools: versions of what made it.
        override: the reason a person gave for overruling the gate; empty otherwise.
        golden: questions with the merged model's own greedy replies (``messages``, ``reply``); an engine that loaded
            the version is asked them before it answers anybody else.
    """

    identity: Mapping[str, str]
    system: str | None
    base: Mapping[str, str]
    run: str
    digests: Mapping[str, str]
    data: Mapping[str, str]
    scores: Mapping[str, float]
    recipe: Mapping[str, str]
    tools: Mapping[str, str]
    override: str = ""
    golden: Sequence[Mapping[str, Any]] = ()
    format: int = 1

    def to_json(self) -> str:
        """The manifest as text."""
        return json.dumps(asdict(self), ensure_ascii=False, indent=1, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Back from :meth:`to_json`.

        Raises:
            ValueError, TypeError: it is no manifest.
        """
        data: dict[str, Any] = json.loads(text)
        return cls(**{**data, "golden": tuple(data.get("golden", ()))})

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read the manifest of a version's folder.

        Raises:
            RegistryError: there is none, or it is damaged.
        """
        path = folder / FILE
        try:
            return cls.from_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise RegistryError(
                f"The version in {folder} has no readable {FILE} ({error}).", mend="Promote it with `namesake promote`."
            ) from error


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below the folder, by path relative to it."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            found[path.relative_to(folder).as_posix()] = digest_of_file(path)
    return found


def damaged(folder: Path, wanted: Mapping[str, str]) -> list[str]:
    """The files that are missing or not what the manifest says, in the order of their names."""
    faults = []
    for name, digest in sorted(wanted.items()):
        path = folder / name
        if not path.is_file():
            faults.append(f"{name} is missing")
        elif digest_of_file(path) != digest:
            faults.append(f"{name} has changed")
    return faults
