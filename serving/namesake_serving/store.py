"""A verified local copy of a version, before anything parses its files."""

from __future__ import annotations

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

    A local artifact store is read where it lies; from a server the files are copied into ``cache`` once.

    Raises:
        RegistryError: files are missing, changed, or of a kind that may hold code.
    """
    folder = cache / "versions" / f"{version.name}-v{version.number}-{version.source.rpartition('/')[2][:40]}"
    faults: list[str] = []
    if (folder / manifest.FILE).is_file():
        faults = manifest.damaged(folder, Manifest.read(folder).digests)
    if faults or not (folder / manifest.FILE).is_file():
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
