"""A verified local copy of a version, before anything parses its files."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from namesake import base_model, manifest
from namesake.errors import BaseModelError, InputError, RegistryError
from namesake.manifest import ADAPTER_FOLDER, WEIGHTS_FOLDER, Manifest
from namesake.messages import joined, tr
from namesake.paths import write_whole
from namesake.registry import Version
from namesake_serving import copies

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")

_CHANGED_BASES = ("pissa", "olora", "corda", "loftq")
"""What PEFT's ``init_lora_weights`` begins with where the adapter belongs to a base that it changed at its start."""

_NO_LORA = (
    *("use_dora", "lora_bias", "modules_to_save", "alora_invocation_tokens", "layer_replication", "use_bdlora"),
    *("use_qalora", "trainable_token_indices", "target_parameters", "fan_in_fan_out"),
)
"""What of an adapter's configuration vLLM does not do, or does without saying so (``vllm/lora/peft_helper.py``)."""

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

    @property
    def adapter(self) -> Path:
        """Where its adapter lies."""
        return self.weights.parent / ADAPTER_FOLDER

    @property
    def id(self) -> str:
        """A name that no other version of the model ever has, one made anew under the same number included."""
        return id_of(self.version)


@dataclass(frozen=True)
class Base:
    """The base that adapters are trained on, on this machine: what clients call it, its folder, its digest."""

    name: str
    path: Path
    digest: str


def fetch(version: Version, cache: Path, public_key: Path | None = None, part: str = WEIGHTS_FOLDER) -> Stored:
    """Get the version's files and check them: with a public key first the signature, before anything parses them, then
    every digest, and that there is nothing else.

    They are copied into ``cache`` once and are read-only there, so that nobody can change them under a running server;
    a copy that was broken off is taken up where it was, unless there is a signature to check: it is made anew then.
    Where only the adapter is wanted the merged weights stay where they are, unless there is a signature, which is over
    all of it.

    Args:
        part: ``model`` or ``adapter``, what an engine is to load.

    Raises:
        RegistryError: files are missing, changed, not signed by the key, or of a kind that may hold code.
    """
    folder = cache / "versions" / f"{version.name}-{id_of(version)}"
    with _alone(folder):  # champion, challenger, a client, another server here may want one at one moment
        stored = _fetch(version, folder, public_key, part)
        copies.seal(folder)
        os.utime(_lock(folder))
        return stored


def prune(cache: Path, name: str, keep: int, stay: Collection[str] = (), *, coming: Version | None = None) -> list[str]:
    """Remove copies of the model's versions but the ``keep`` that were fetched last, or the disk fills move by move.

    One that a server of this machine answers with stays too, by what :func:`remember` wrote: it is loaded from there
    again when its engine has died, also while the registry is away.

    Args:
        stay: ids of versions that stay, too.
        coming: a version that is about to be fetched, one of the ``keep``: there has to be room for it before.

    Returns:
        Names of the folders that are gone.
    """
    versions = cache / "versions"
    pattern = re.compile(rf"{re.escape(name)}-v\d+-[0-9a-f]{{16}}")
    copied = [path for path in versions.glob("*") if path.is_dir() and pattern.fullmatch(path.name)]
    served = {f"{one.name}-{id_of(one)}" for one in map(_remembered, versions.glob("last-*.json")) if one}
    served |= {f"{name}-{one}" for one in stay}
    if coming is not None:
        own = f"{name}-{id_of(coming)}"
        copied, keep = [path for path in copied if path.name != own], keep - 1
    gone = []
    for folder in sorted(copied, key=_used, reverse=True)[keep:]:
        if folder.name in served:
            continue
        with suppress(OSError), _alone(folder, wait=False):  # else somebody is at it, or may not remove it
            copies.remove(folder)
            gone.append(folder.name)
    return gone


def _used(folder: Path) -> float:
    try:
        return _lock(folder).stat().st_mtime
    except OSError:  # an older release made it
        return 0.0


def _lock(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")


@contextmanager
def _alone(folder: Path, *, wait: bool = True) -> Iterator[None]:
    """No other thread or process of this machine is at the folder meanwhile: the lock is the open file's (flock(2)).

    Raises:
        BlockingIOError: another is, and is not waited for.
    """
    folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)  # private: what is in it everybody may read
    with _lock(folder).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield


def _fetch(version: Version, folder: Path, public_key: Path | None, part: str) -> Stored:
    partly = part if part == ADAPTER_FOLDER and public_key is None else ""
    if folder.is_dir():
        with suppress(RegistryError):
            return _checked(version, folder, public_key, part, partly)
    folder = copies.complete(version, folder, partly, anew=public_key is not None)
    return _checked(version, folder, public_key, part, partly)


def _checked(version: Version, folder: Path, public_key: Path | None, part: str, partly: str) -> Stored:
    """The copy in the folder, once it is what was signed and what its manifest says; ``partly`` names the folder of the
    version that alone was copied, if not all were.
    """
    if public_key:
        manifest.check_signature(folder, public_key)
    record = Manifest.read(folder)
    faults = [*manifest.damaged(folder, _of(record, partly)), *manifest.strange(folder, record)]
    weights = folder / WEIGHTS_FOLDER
    if not _of(record, part):
        faults.append("it has no weights" if part == WEIGHTS_FOLDER else "it has no adapter")
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


def base(record: Manifest, given: str, say: Callable[[str], None] = lambda _: None) -> Base:
    """The base that a version's adapter was trained on.

    Args:
        given: a folder or a ModelScope id where it is to be had; empty: where the manifest says.

    Raises:
        RegistryError: it is not to be had here, or is another one.
    """
    known, source = record.base.get("id", ""), record.base.get("source", "")
    mend = tr("Give the base that the version was trained on: --base FOLDER.")
    try:
        if source == "embedded" and not given:
            path = base_model.embedded(say)
        else:
            path = base_model.resolve(given or known, say=say).path
    except (BaseModelError, InputError) as error:
        told = tr("The base {base} is not to be had here: {error}", base=known, error=error.message)
        raise RegistryError(told, mend=mend, kind="base") from error
    digest = base_model.digest_of_folder(path)
    if digest != record.base.get("digest"):
        told = tr("{folder} is not the base {base} that the version was trained on.", folder=path, base=known)
        raise RegistryError(told, mend=mend, kind="base")
    return Base(base_name(record), path, digest)


def base_name(record: Manifest) -> str:
    """What clients call the base that a version was trained on."""
    known = str(record.base.get("id", ""))
    # A folder's name is enough for clients: where it lies is nobody's business.
    return Path(known).name if record.base.get("source") == "folder" else known


def rank(stored: Stored) -> int:
    """The greatest rank in the adapter.

    Raises:
        RegistryError: its configuration is none.
    """
    config = _config(stored)
    return int(max(config["r"], *(config.get("rank_pattern") or {}).values(), 0))


def check_adapter(stored: Stored, base: Base, most: int) -> None:
    """Look at the version's adapter, so that no engine dies of it and none answers wrongly by it.

    Args:
        most: greatest rank that the engine has room for.

    Raises:
        RegistryError: it is for another base, too large, of a kind that vLLM does not do, cut short, or not finite.
    """
    uri, record = stored.version.uri, stored.manifest
    if record.base.get("digest") != base.digest:
        raise RegistryError(
            tr(
                "{uri} was trained on another base ({theirs}, digest {digest}) than the engine runs on ({base}, digest "
                "{ours}).",
                uri=uri,
                theirs=record.base.get("id"),
                digest=record.base.get("digest", "")[:12],
                base=base.name,
                ours=base.digest[:12],
            ),
            mend="Serve it merged: --mode merged.",
            kind="base",
        )
    config = _config(stored)
    found = rank(stored)
    if found > most:
        raise RegistryError(
            tr("{uri} has rank {rank}, the engine has room for {most}.", uri=uri, rank=found, most=most),
            mend=tr("Serve with --max-lora-rank {rank}.", rank=found),
            kind="rank",
        )
    wrong = [key for key in _NO_LORA if config.get(key)]
    wrong += ["bias"] if config.get("bias", "none") != "none" else []
    if str(config.get("init_lora_weights", True)).lower().startswith(_CHANGED_BASES):
        wrong.append(f"init_lora_weights={config['init_lora_weights']}")
    if wrong:
        told = tr("{uri} is an adapter of a kind that vLLM does not serve ({what}).", uri=uri, what=", ".join(wrong))
        raise RegistryError(told, kind="adapter")
    check_weights(stored.adapter)
    shapes = {name: shape for path in base.path.glob("*.safetensors") for name, (_, shape) in _shapes(path).items()}
    adapter = _shapes(stored.adapter / ADAPTER_FILES[1])
    for name, (_, shape) in adapter.items():
        stem, _, side = name.removeprefix("base_model.model.").rpartition(".lora_")
        target = shapes.get(f"{stem}.weight")
        # A goes from the module's inputs to the rank, B from the rank to its outputs (arXiv 2106.09685).
        if target is None or side not in {"A.weight", "B.weight"} or len(shape) != 2 or len(target) != 2:
            raise RegistryError(tr("{uri}: the base has nothing that {tensor} would change.", uri=uri, tensor=name))
        if (shape[1] if side[0] == "A" else shape[0]) != (target[1] if side[0] == "A" else target[0]):
            raise RegistryError(
                tr(
                    "{uri}: {tensor} has the shape {shape}, the base's tensor {target}.",
                    uri=uri,
                    tensor=name,
                    shape=shape,
                    target=target,
                )
            )
        other = adapter.get(name.replace(f".lora_{side[0]}.", ".lora_B." if side[0] == "A" else ".lora_A."))
        inner = shape[0] if side[0] == "A" else shape[1]
        if other is None or inner != (other[1][1] if side[0] == "A" else other[1][0]) or inner > found:
            raise RegistryError(
                tr(
                    "{uri}: {tensor} of shape {shape} does not fit its other half or the rank {rank}.",
                    uri=uri,
                    tensor=name,
                    shape=shape,
                    rank=found,
                )
            )


def _config(stored: Stored) -> dict[str, Any]:
    path = stored.adapter / ADAPTER_FILES[0]
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if config["peft_type"] != "LORA":
            raise ValueError(f"peft_type is {config['peft_type']}")
        ranks = [config["r"], *(config.get("rank_pattern") or {}).values()]
        if not all(type(one) is int and one > 0 for one in ranks):
            raise ValueError(f"the ranks are {ranks}")
        if not (stored.adapter / ADAPTER_FILES[1]).is_file():
            raise ValueError(f"{ADAPTER_FILES[1]} is missing")
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise RegistryError(
            tr("{uri} holds no LoRA adapter that can be served ({error}).", uri=stored.version.uri, error=error)
        ) from error
    return dict(config)


def difference(live: Stored, coming: Stored) -> str:
    """Why the coming version's weights cannot go into the live one's engine in place; empty where they can.

    Everything that an engine reads once, at its start, has to be the same: configuration, tokenizer, template, and the
    names, shapes and types of the tensors.
    """
    ours, theirs = _kept(live), _kept(coming)
    for path in sorted({*ours, *theirs}):
        if ours.get(path) != theirs.get(path):
            return tr("{file} differs", file=path.rpartition("/")[2])
    files = [sorted(one.weights.glob("*.safetensors")) for one in (live, coming)]
    if len(files[0]) != len(files[1]):  # somebody has removed a copy
        return tr("the number of files differs")
    for one, other in zip(*files, strict=True):
        if _shapes(one) != _shapes(other):
            return tr("the tensors of {name} differ in name, shape or type", name=other.name)
    return ""


def remember(cache: Path, uri: str, version: Version) -> None:
    """Keep which version was served, for a start while the registry is away."""
    write_whole(_memory(cache, uri), json.dumps(vars(version), ensure_ascii=False))


def recall(cache: Path, uri: str) -> Version | None:
    """The version that was served last under the reference; none where there was none."""
    return _remembered(_memory(cache, uri))


def _remembered(path: Path) -> Version | None:
    with suppress(OSError, ValueError, TypeError):
        return Version(**json.loads(path.read_text(encoding="utf-8")))
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


def id_of(version: Version) -> str:
    """A name that no other version of the model ever has."""
    # A version may be deleted and made anew under its number: the source tells them apart.
    return f"v{version.number}-{hashlib.sha256(version.source.encode()).hexdigest()[:16]}"


def _of(record: Manifest, part: str) -> dict[str, str]:
    """The digests of what lies below one folder of the version; of all of it where none is named."""
    return {name: digest for name, digest in record.digests.items() if not part or name.startswith(f"{part}/")}
