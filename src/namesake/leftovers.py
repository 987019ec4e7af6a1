"""The use case ``namesake gc``: what killed processes left behind, listed, and removed when asked.

A promotion that is killed leaves a logged model that no version uses, and a temporary folder. Nothing of it is visible
in the registry and nothing is in the way of the next promotion; it only takes room.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from namesake import registry, tracking
from namesake.paths import cache_folder

OLDER_THAN = 24 * 3600.0
"""Seconds: what is younger may still be at work; a promotion's logged model is written to at start and end only."""

_FOLDER = re.compile(r"namesake-[a-z]+-([0-9]+)-[^-]+")
"""Temporary folders by :func:`namesake.paths.temporary`, with the number of the process that made it."""


@dataclass(frozen=True)
class Leftover:
    """Something that nobody needs any more.

    Attributes:
        kind: ``logged model``, ``folder`` or ``file``.
        where: its id (``models:/m-…``) or path.
        age: seconds since it was last written.
        size: bytes; none where it does not lie on this machine.
    """

    kind: str
    where: str
    age: float
    size: int | None


def find(older_than: float = OLDER_THAN) -> list[Leftover]:
    """What is left over and at least so many seconds old.

    Raises:
        TrackingError, RegistryError: MLflow failed.
    """
    return [one for one in (*_models(), *_paths()) if one.age >= older_than]


def remove(leftover: Leftover) -> None:
    """Remove it, files and all.

    Raises:
        TrackingError: MLflow failed.
    """
    if leftover.kind == "logged model":
        tracking.drop_model(leftover.where)
    elif leftover.kind == "folder":
        shutil.rmtree(leftover.where, ignore_errors=True)
    else:
        Path(leftover.where).unlink(missing_ok=True)


def _models() -> Iterator[Leftover]:
    models = tracking.models_with(registry.TAG_KEY)
    used = registry.sources() if models else set()
    for uri, location, written in models:
        if location not in used and uri not in used:
            path = Path(location.removeprefix("file://"))
            yield Leftover("logged model", uri, _age(written), _size(path) if path.is_dir() else None)


def _paths() -> Iterator[Leftover]:
    temporary = Path(tempfile.gettempdir())
    for path in sorted(temporary.glob("namesake-*-*-*")):
        made = _FOLDER.fullmatch(path.name)
        if made and not _lives(int(made[1])):
            written = max((one.lstat().st_mtime for one in (path, *path.rglob("*"))), default=0.0)
            yield Leftover("folder", str(path), _age(written), _size(path))
    for path in sorted(cache_folder().rglob("*.part")):
        yield Leftover("file", str(path), _age(path.lstat().st_mtime), path.lstat().st_size)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (OverflowError, ProcessLookupError):
        return False
    except PermissionError:
        pass  # somebody else's
    return True


def _age(written: float) -> float:
    return max(time.time() - written, 0.0)


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
