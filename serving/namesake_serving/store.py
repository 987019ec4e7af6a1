"""A verified local copy of a version, before anything parses its files."""

from __future__ import annotations

import hashlib
import json
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from namesake import manifest, registry
from namesake.errors import RegistryError
from namesake.manifest import WEIGHTS_FOLDER, Manifest
from namesake.messages import joined, tr
from namesake.paths import write_whole
from namesake.registry import Version

_LONGEST_HEADER = 100_000_000
_CHUNK = 1 << 22
_EXPONENTS: dict[str, tuple[np.dtype[Any], int]] = {
    "F64": (np.dtype("<u8"), 0x7FF0000000000000),
    "F32": (np.dtype("<u4"), 0x7F800000),
    "F16": (np.dtype("<u2"), 0x7C00),
    "BF16": (np.dtype("<u2"), 0x7F80),
}
"""Floating types, read as whole numbers, and the bits that are all set in an infinite value or NaN (IEEE 754)."""


@dataclass(frozen=True)
class Stored:
    """A version on this machine whose files are what its manifest says."""

    version: Version
    manifest: Manifest
    weights: Path


def fetch(version: Version, cache: Path, public_key: Path | None = None) -> Stored:
    """Get the version's files and check every digest; with a public key, first the signature.

    They are copied into ``cache`` once, so that nobody can change them under a running server.

    Raises:
        RegistryError: files are missing, changed, not signed by the key, or of a kind that may hold code.
    """
    # A version may be deleted and made anew under its number: the source tells them apart.
    source = hashlib.sha256(version.source.encode()).hexdigest()[:16]
    folder = cache / "versions" / f"{version.name}-v{version.number}-{source}"
    record, faults = _whole(folder), []
    if record is None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        folder = registry.fetch(version, folder)
    if public_key:
        manifest.check_signature(folder, public_key)
    if record is None:
        record = Manifest.read(folder)
        faults = manifest.damaged(folder, record.digests)
    faults += manifest.strange(folder, record.digests)
    weights = folder / WEIGHTS_FOLDER
    if not any(name.startswith(f"{WEIGHTS_FOLDER}/") for name in record.digests):
        faults.append("it has no weights")
    if faults:
        raise RegistryError(
            tr("{uri} is not served: {faults}.", uri=version.uri, faults=joined(faults[:5])),
            mend="Promote the run again, or point the alias at another version.",
        )
    return Stored(version, record, weights)


def check_weights(weights: Path) -> None:
    """Look into the safetensors files, so that no engine dies of them: whole, and every number finite.

    Raises:
        RegistryError: they are cut short, malformed, or hold an infinite value or none (NaN).
    """
    for path in sorted(weights.glob("*.safetensors")):
        header, start = _header(path)
        for name, tensor in header.items():
            begin, end = tensor["data_offsets"]
            kind = _EXPONENTS.get(tensor["dtype"])
            if kind is None or begin == end:
                continue
            dtype, exponent = kind
            count = (end - begin) // dtype.itemsize
            values = np.memmap(path, dtype=dtype, mode="r", offset=start + begin, shape=(count,))
            for first in range(0, len(values), _CHUNK):
                if ((values[first : first + _CHUNK] & exponent) == exponent).any():
                    raise RegistryError(
                        tr(
                            "{file}: {tensor} holds a value that is infinite or not a number.",
                            file=path.name,
                            tensor=name,
                        )
                    )


def difference(live: Stored, coming: Stored) -> str:
    """Why the coming version's weights cannot go into the live one's engine in place; empty where they can.

    Everything that an engine reads once, at its start, has to be the same: configuration, tokenizer, template, and the
    names, shapes and types of the tensors.
    """
    ours, theirs = _kept(live), _kept(coming)
    for path in sorted({*ours, *theirs}):
        if ours.get(path) != theirs.get(path):
            return tr("{file} differs", file=path.rpartition("/")[2])
    for one, other in zip(
        sorted(live.weights.glob("*.safetensors")), sorted(coming.weights.glob("*.safetensors")), strict=True
    ):
        if _shapes(one) != _shapes(other):
            return tr("the tensors of {name} differ in name, shape or type", name=other.name)
    return ""


def remember(cache: Path, uri: str, version: Version) -> None:
    """Keep which version was served, for a start while the registry is away."""
    write_whole(_memory(cache, uri), json.dumps(vars(version), ensure_ascii=False))


def recall(cache: Path, uri: str) -> Version | None:
    """The version that was served last under the reference; none where there was none."""
    with suppress(OSError, ValueError, TypeError):
        return Version(**json.loads(_memory(cache, uri).read_text(encoding="utf-8")))
    return None


def _memory(cache: Path, uri: str) -> Path:
    return cache / "versions" / f"last-{hashlib.sha256(uri.encode()).hexdigest()[:16]}.json"


def _kept(stored: Stored) -> dict[str, str]:
    return {
        path: digest if not path.endswith(".safetensors") else ""
        for path, digest in stored.manifest.digests.items()
        if path.startswith(f"{WEIGHTS_FOLDER}/")
    }


def _shapes(path: Path) -> dict[str, tuple[str, list[int]]]:
    return {name: (tensor["dtype"], tensor["shape"]) for name, tensor in _header(path)[0].items()}


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The tensors' entries, and where their bytes start (format: huggingface/safetensors, README).

    Raises:
        RegistryError: the safetensors library would refuse the file, or it is cut short.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= _LONGEST_HEADER:
            raise RegistryError(tr("{name} is no safetensors file.", name=path.name))
        try:
            header: dict[str, Any] = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            for name, tensor in header.items():
                begin, end = tensor["data_offsets"]
                if not (type(begin) is int and type(end) is int and 0 <= begin <= end <= size - 8 - length):
                    raise RegistryError(
                        tr("{file} is cut short: {tensor} ends after the file.", file=path.name, tensor=name)
                    )
                _kind, _shape = tensor["dtype"], tensor["shape"]
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise RegistryError(tr("{name} has a malformed header.", name=path.name)) from error
    try:
        with safe_open(path, framework="numpy"):  # reads the header only
            pass
    except (SafetensorError, OSError) as error:
        raise RegistryError(tr("{name} is refused by safetensors: {error}.", name=path.name, error=error)) from error
    return header, 8 + length


def _whole(folder: Path) -> Manifest | None:
    """The manifest of a copy whose every file fits it; none where the copy is not there or not whole."""
    with suppress(RegistryError):
        record = Manifest.read(folder)
        if not manifest.damaged(folder, record.digests):
            return record
    return None
