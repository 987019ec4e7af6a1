"""Copies of versions on this machine: one that was broken off is taken up where it was, one that is whole is sealed."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

from namesake import registry
from namesake.errors import RegistryError
from namesake.manifest import FILE, SIGNATURE, Manifest
from namesake.paths import digest_of_file
from namesake.registry import Version


def complete(version: Version, folder: Path, part: str = "", *, anew: bool = False) -> Path:
    """Get what the folder lacks of a version: files that have their digest stay, and what the manifest does not know
    goes. Nothing is trusted by that; whoever calls checks the signature and the digests afterwards.

    Args:
        part: folder of the version that is wanted; empty: all of it.
        anew: what is there goes, unread: to know what may stay the manifest is read, and where there is a signature to
            check nothing is before that.

    Returns:
        Where the files are.

    Raises:
        RegistryError: they cannot be had.
    """
    if anew:
        remove(folder)
    if not folder.is_dir() or not any(folder.iterdir()):
        folder.mkdir(parents=True, exist_ok=True)
        if not part:
            return registry.fetch(version, folder)
        for name in (FILE, part):
            registry.fetch(version, folder, name)
        return folder
    unseal(folder)
    registry.fetch(version, folder, FILE)
    # A name that leads out of the folder is not ours to remove or fetch.
    known = {name: digest for name, digest in Manifest.read(folder).digests.items() if _is_inside(folder, name)}
    stay = {FILE, SIGNATURE, *known}
    for path in [*folder.rglob("*")]:
        if path.is_symlink() or (path.is_file() and path.relative_to(folder).as_posix() not in stay):
            path.unlink()
    for name, digest in sorted(known.items()):
        path = folder / name
        if not name.startswith(f"{part}/" if part else "") or (path.is_file() and digest_of_file(path) == digest):
            continue
        path.unlink(missing_ok=True)
        registry.fetch(version, folder, name)
    if not part:
        with suppress(RegistryError):  # it is not signed; who wants that says so
            registry.fetch(version, folder, SIGNATURE)
    return folder


def _is_inside(folder: Path, name: str) -> bool:
    return (folder / name).resolve().is_relative_to(folder.resolve())


def seal(folder: Path) -> None:
    """Nobody is to write to the copy: files 0444, folders 0555, as far as they are ours."""
    with suppress(OSError):
        for path in (*folder.rglob("*"), folder):
            if not path.is_symlink():
                path.chmod(0o555 if path.is_dir() else 0o444)


def remove(folder: Path) -> None:
    """Remove a copy, where there is one."""
    if folder.is_dir():
        unseal(folder)
        shutil.rmtree(folder)


def unseal(folder: Path) -> None:
    """The owner may write to it again, so that it can be mended or removed."""
    folder.chmod(folder.stat().st_mode | 0o700)
    for path in folder.rglob("*"):  # a folder before what is in it
        if not path.is_symlink():
            path.chmod(path.stat().st_mode | (0o700 if path.is_dir() else 0o600))
