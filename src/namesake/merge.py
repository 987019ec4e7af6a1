"""Merging a LoRA adapter into its base, tensor by tensor, straight over safetensors.

``W' = W + scale · B A`` in float32, written in the base's dtype (LoRA, arXiv 2106.09685; rank-stabilised scale
``alpha / sqrt(r)``, arXiv 2312.03732). The merged file has the base file's header, so its tensors are written piece
by piece, hashed on the way, and never held whole. What this does not know (DoRA, biases, modules saved
whole, patterns of ranks, a head that is the embedding) is left to PEFT's own merge.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import shutil
import struct
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from namesake.errors import PromotionError, said
from namesake.messages import tr

TEMPLATE_FILE = "chat_template.jinja"

_ONLY_PEFT = (
    "use_dora",
    "lora_bias",
    "fan_in_fan_out",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "trainable_token_indices",
    "target_parameters",
)
_HEAD = "base_model.model.lm_head."
_A, _B = ".lora_A.weight", ".lora_B.weight"
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


_PIECE = 4 << 20
"""Bytes that are read, changed, hashed and written at a time."""

_PENDING = 4
"""Pieces that wait to be hashed and written, at most."""

_AHEAD = 32 << 20
"""Bytes of the base that the disk is asked for before they are needed."""

_CHANGED = 1 << 17
"""Weights that are changed at a time: in float32 they stay in a core's cache."""


@dataclass(frozen=True)
class Merged:
    """How a merge was made.

    Attributes:
        way: ``streamed`` or ``peft: why``.
        digests: SHA-256 of the weight files that were hashed as they were written, by name.
    """

    way: str
    digests: Mapping[str, str] = field(default_factory=dict)


def merge(base: Path, adapter: Path, target: Path, *, system: str | None = None) -> Merged:
    """Write the merged model into the empty folder ``target``.

    Tokenizer, chat template and generation settings travel along; with ``system`` the chat template puts this system
    prompt where a dialogue has none, so that every loader answers as it was trained.

    Raises:
        PromotionError: the adapter does not fit the base, or cannot be merged at all.
    """
    with _refusing(adapter):
        config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
        unknown = _unknown(base, adapter, config)
        deltas = _Deltas(adapter, config) if not unknown else None
    target.mkdir(parents=True, exist_ok=True)
    if deltas is None:
        from namesake.generate import merge_with_peft

        try:
            merge_with_peft(base, adapter, target)
        except RuntimeError as error:  # so it says that it cannot: biases for layers that have none, …
            raise PromotionError(
                tr("PEFT cannot merge the adapter into {base}: {error}", base=base, error=error),
                mend="Train an adapter of another kind.",
            ) from error
        made = Merged(f"peft: {unknown}")
    else:
        weights = sorted(base.glob("*.safetensors"))
        made = Merged(tr("streamed"), {path.name: _merge_file(path, target / path.name, deltas) for path in weights})
        if deltas.unused:
            raise PromotionError(
                tr(
                    "The adapter changes {count} tensors that {base} lacks: {min} …",
                    count=len(deltas.unused),
                    base=base,
                    min=min(deltas.unused),
                ),
                mend="Merge it into the base it was trained on.",
            )
    for path in sorted(base.iterdir()):
        # The base's own files, but for weights (merged above) and notes of ours.
        beside = path.suffix in {".json", ".jinja", ".txt", ".model"} and path.name != "namesake-digests.json"
        beside = beside and not (unknown and path.name.endswith(".index.json"))  # PEFT writes its own, or one file
        if beside and not (target / path.name).exists():
            shutil.copyfile(path, target / path.name)
    if system is not None:
        pin_system(target, system)
    return made


@contextmanager
def _refusing(adapter: Path) -> Iterator[None]:
    """What cannot be read as an adapter is refused."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, TypeError, LookupError, AttributeError, SafetensorError) as error:
        raise PromotionError(
            tr("{adapter} holds no whole LoRA adapter ({error}).", adapter=adapter, error=said(error)),
            mend="Its files were not all kept: train again, or promote another run.",
        ) from error


def pin_system(folder: Path, system: str) -> None:
    """Make the folder's chat template use the system prompt where a dialogue has none.

    Qwen2.5's and SmolLM2's templates fall back to a prompt that names the old identity there.
    """
    path = folder / TEMPLATE_FILE
    config_path = folder / "tokenizer_config.json"
    config = json.loads(config_path.read_text(encoding="utf-8"))
    template = path.read_text(encoding="utf-8") if path.is_file() else config.get("chat_template")
    if not isinstance(template, str):
        raise PromotionError(
            tr("The base model in {folder} has no chat template.", folder=folder),
            mend="Use a chat model (an -Instruct one) as base.",
        )
    literal = json.dumps(system, ensure_ascii=False)
    pinned = (
        "{%- if not messages or messages[0]['role'] != 'system' -%}"
        "{%- set messages = [{'role': 'system', 'content': " + literal + "}] + messages -%}"
        "{%- endif -%}"
    )
    path.write_text(pinned + template, encoding="utf-8")
    if "chat_template" in config:
        del config["chat_template"]
        config_path.write_text(json.dumps(config, ensure_ascii=False, indent=2), encoding="utf-8")


def _unknown(base: Path, adapter: Path, config: dict[str, Any]) -> str:
    """What of the adapter only PEFT can merge; empty where nothing."""
    from safetensors import safe_open

    if config.get("peft_type") != "LORA":
        return f"{config.get('peft_type')} adapter"
    for key in _ONLY_PEFT:
        if config.get(key):
            return key
    if config.get("bias", "none") != "none":
        return "bias"
    if config.get("init_lora_weights", True) not in {True, False, "gaussian"}:
        return f"init_lora_weights={config['init_lora_weights']}"  # PiSSA, OLoRA … start from a changed base
    with safe_open(adapter / "adapter_model.safetensors", framework="numpy") as weights:
        keys = list(weights.keys())
    others = [key for key in keys if not key.endswith((_A, _B))]
    if not others and any(key.startswith(_HEAD) for key in keys):
        about = json.loads((base / "config.json").read_text(encoding="utf-8"))
        return "tie_word_embeddings" if about.get("tie_word_embeddings") else ""  # no file holds the head then
    return f"{others[0]}" if others else ""


class _Deltas:
    """The adapter's weight changes by the base's tensor name."""

    def __init__(self, adapter: Path, config: dict[str, Any]) -> None:
        from safetensors.torch import load_file

        self._weights = load_file(adapter / "adapter_model.safetensors")
        rank, alpha = config["r"], config["lora_alpha"]
        halves = [{k.removesuffix(end) for k in self._weights if k.endswith(end)} for end in (_A, _B)]
        if alone := halves[0] ^ halves[1]:
            raise LookupError(f"{min(alone)} has one half only")
        self._scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        self.unused = {f"{stem.removeprefix('base_model.model.')}.weight" for stem in halves[0]}

    def of(self, name: str, entry: Mapping[str, Any]) -> _Delta | None:
        """The change of the tensor that the file's header describes so, if there is one.

        Raises:
            PromotionError: it is the change of a tensor of another shape, or of whole numbers.
        """
        if name not in self.unused:
            return None
        self.unused.discard(name)
        stem = "base_model.model." + name.removesuffix(".weight")
        a, b = (self._weights[f"{stem}.lora_{part}.weight"].float() for part in "AB")
        found = [b.shape[0], a.shape[1]]
        if found != entry["shape"] or entry["dtype"] not in _DTYPES:
            raise PromotionError(
                tr(
                    "The adapter's change of {name} has the shape {found}, the base's tensor is {dtype} {shape}.",
                    name=name,
                    found=found,
                    dtype=entry["dtype"],
                    shape=entry["shape"],
                ),
                mend="Merge it into the base it was trained on.",
            )
        return _Delta(a, b, self._scale, _DTYPES[entry["dtype"]])


@dataclass(frozen=True)
class _Delta:
    """``scale · B A``, for a tensor of this dtype."""

    a: Any
    b: Any
    scale: float
    dtype: str

    def add(self, data: memoryview, changed: memoryview, first: int, rows: int) -> None:
        """Add it in float32, rounded once, to the tensor's rows from ``first`` on; the sum goes to ``changed``."""
        import torch

        dtype = getattr(torch, self.dtype)
        weight, total = (torch.frombuffer(of, dtype=dtype).view(rows, -1) for of in (data, changed))
        few = max(_CHANGED // weight.shape[1], 1)
        for start in range(0, rows, few):
            part = weight[start : start + few]
            b = self.b[first + start : first + start + len(part)]
            total[start : start + few].copy_(part.float().addmm_(b, self.a, alpha=self.scale))


def _merge_file(source: Path, target: Path, deltas: _Deltas) -> str:
    """Write the merged file; its SHA-256."""
    with _Mapped(source) as weights, _Hashed(target) as writer, _one_thread():
        (size,) = struct.unpack("<Q", weights.read(0, 8))
        tensors = json.loads(bytes(weights.read(8, 8 + size)))
        writer.write(weights.read(0, 8 + size))
        tensors.pop("__metadata__", None)
        for name, entry in sorted(tensors.items(), key=lambda item: item[1]["data_offsets"][0]):
            start, end = entry["data_offsets"]
            delta = deltas.of(name, entry)
            row = (end - start) // entry["shape"][0] if delta else 1
            piece = max(_PIECE // row, 1) * row
            for at in range(start, end, piece):
                data = weights.read(8 + size + at, 8 + size + min(at + piece, end))
                if delta:
                    changed = writer.room(len(data))
                    delta.add(data, changed, (at - start) // row, len(data) // row)
                    data = changed
                writer.write(data)
        return writer.digest()


class _Mapped(AbstractContextManager["_Mapped"]):
    """A file that is read in order where the kernel keeps it, without a copy of ours."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._size = path.stat().st_size
        self._holds(1)
        self._stream = path.open("rb")
        # A private mapping, since torch takes no memory that cannot be written; nobody writes there.
        self._map = mmap.mmap(self._stream.fileno(), self._size, access=mmap.ACCESS_COPY)
        self._asked = self._passed = 0

    def read(self, start: int, end: int) -> memoryview:
        """The bytes from ``start`` to ``end``.

        Raises:
            PromotionError: the file has fewer.
        """
        self._holds(end)
        if end > self._asked:
            os.posix_fadvise(self._stream.fileno(), end, _AHEAD, os.POSIX_FADV_WILLNEED)
            self._asked = end + _AHEAD // 2
        passed = (start - 2 * _PENDING * _PIECE) // mmap.PAGESIZE * mmap.PAGESIZE
        if passed > self._passed + _PENDING * _PIECE:  # else all that was read would count as memory of ours
            self._map.madvise(mmap.MADV_DONTNEED, self._passed, passed - self._passed)
            self._passed = passed
        return memoryview(self._map)[start:end]

    def _holds(self, size: int) -> None:
        if size > self._size:
            raise PromotionError(
                tr("{source} of the base model ends too early.", source=self._path),
                mend="Download the base model again.",
            )

    def __exit__(self, *_: object) -> None:
        self._stream.close()


@contextmanager
def _one_thread() -> Iterator[None]:
    """The sums are done by one thread: hashing, which cannot be divided, takes another one as long."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Hashed(AbstractContextManager["_Hashed"]):
    """A file that is hashed as it is written, both beside the caller's own work; few pieces wait at a time."""

    def __init__(self, path: Path) -> None:
        self._stream = path.open("wb")
        self._hash = hashlib.sha256()
        self._workers = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._pending: deque[tuple[memoryview, Future[None], Future[int]]] = deque()
        self._free: list[bytearray] = []

    def room(self, size: int) -> memoryview:
        """Memory for a piece, which is used again when the piece is written: fresh memory costs more than the sums."""
        buffer = self._free.pop() if self._free else bytearray()
        if len(buffer) < size:
            buffer = bytearray(max(size, _PIECE))
        return memoryview(buffer)[:size]

    def write(self, data: memoryview) -> None:
        """Append what is in such memory, which the caller does not touch again."""
        hashing, writing = self._workers
        self._pending.append((data, hashing.submit(self._hash.update, data), writing.submit(self._stream.write, data)))
        self._settle(_PENDING)

    def digest(self) -> str:
        """SHA-256 of all that was written."""
        self._settle(0)
        return self._hash.hexdigest()

    def _settle(self, left: int) -> None:
        while len(self._pending) > left:
            data, hashed, written = self._pending.popleft()
            hashed.result()
            written.result()
            if isinstance(data.obj, bytearray):
                self._free.append(data.obj)

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.shutdown(cancel_futures=True)
        self._stream.close()
