"""A verified local copy of a version, before anything parses its files."""

from __future__ import annotations

import hashlib
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from namesake import manifest, registry
from namesake.errors import RegistryError
from namesake.manifest import WEIGHTS_FOLDER, Manifest
from namesake.registry import Version

_ALLOWED = {".safetensors", ".json", ".jinja", ".txt", ".model", ".md"}


@dataclass(frozen=True)
class Stored:
    """A version on this machine whose files are what its manifest says."""

    version: Version
    manifest: Manifest
    weights: Path


def fetch(version: Version, cache: Path) -> Stored:
    """Get the version's files and check every digest.

    They are copied into ``cache`` once, so that nobody can change them under a running server.

    Raises:
        RegistryError: files are missing, changed, or of a kind that may hold code.
    """
    # A version may be deleted and made anew under its number: the source tells them apart.
    source = hashlib.sha256(version.source.encode()).hexdigest()[:16]
    folder = cache / "versions" / f"{version.name}-v{version.number}-{source}"
    record, faults = _whole(folder), []
    if record is None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        folder = registry.fetch(version, folder)
        record = Manifest.read(folder)
        faults = manifest.damaged(folder, record.digests)
    weights = folder / WEIGHTS_FOLDER
    known = {name for name in record.digests if name.startswith(f"{WEIGHTS_FOLDER}/")}
    for path in sorted(weights.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or (path.is_file() and (name not in known or path.suffix not in _ALLOWED)):
            faults.append(f"{name} does not belong there")
    if faults or not known:
        raise RegistryError(
            f"{version.uri} is not served: {'; '.join(faults[:5]) or 'it has no weights'}.",
            mend="Promote the run again, or point the alias at another version.",
        )
    return Stored(version, record, weights)


def _whole(folder: Path) -> Manifest | None:
    """The manifest of a copy whose every file fits it; none where the copy is not there or not whole."""
    with suppress(RegistryError):
        record = Manifest.read(folder)
        if not manifest.damaged(folder, record.digests):
            return record
    return None
