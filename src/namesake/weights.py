"""How far two models' weights lie apart, tensor by tensor, straight over safetensors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from namesake.errors import RegistryError
from namesake.messages import tr

_ELEMENTS = 1 << 22
"""Elements held at a time, of each model, in float32 (16 MB); the difference is summed up in float64."""


@dataclass(frozen=True)
class Distance:
    """``‖B − A‖ / ‖A‖`` by the Frobenius norm.

    Attributes:
        total: over all tensors that both have in one shape; 0 where they are equal; infinite where A is all zero.
        tensors: the same of each such tensor, the farthest first.
        others: tensors that only one of them has, or that differ in shape.
    """

    total: float
    tensors: tuple[tuple[str, float], ...]
    others: tuple[str, ...]

    @property
    def equal(self) -> bool:
        """Whether every tensor of one is in the other, number by number."""
        return self.total == 0.0 and not self.others


def distance(a: Path, b: Path) -> Distance:
    """Compare the safetensors of two folders. Never more than a few megabytes of each are held.

    Raises:
        RegistryError: a file is no safetensors file.
    """
    ours, theirs = _tensors(a), _tensors(b)
    both = [name for name in ours if name in theirs and ours[name][1] == theirs[name][1]]
    apart, whole, found = 0.0, 0.0, []
    for name in both:
        change, norm = _squares(ours[name][0], theirs[name][0], name)
        apart, whole = apart + change, whole + norm
        found.append((name, _ratio(change, norm)))
    found.sort(key=lambda one: (-one[1], one[0]))
    return Distance(_ratio(apart, whole), tuple(found), tuple(sorted({*ours, *theirs} - {*both})))


def _ratio(change: float, norm: float) -> float:
    if change == 0.0:
        return 0.0
    return math.sqrt(change / norm) if norm else math.inf


def _tensors(folder: Path) -> dict[str, tuple[Path, tuple[int, ...]]]:
    """File and shape of each tensor by its name."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with _opened(path) as weights:
            for name in weights.keys():  # noqa: SIM118
                found[name] = (path, tuple(weights.get_slice(name).get_shape()))
    return found


def _squares(a: Path, b: Path, name: str) -> tuple[float, float]:
    """``‖B − A‖²`` and ``‖A‖²`` of one tensor."""
    change = norm = 0.0
    with _opened(a) as ours, _opened(b) as theirs:
        for one, other in zip(_pieces(ours, name), _pieces(theirs, name), strict=True):
            change += float((other.float() - one.float()).double().square().sum())
            norm += float(one.double().square().sum())
    return change, norm


def _pieces(weights: Any, name: str) -> Iterator[Any]:
    piece = weights.get_slice(name)
    shape = piece.get_shape()
    if not shape:
        yield weights.get_tensor(name)
        return
    rows = max(_ELEMENTS // max(math.prod(shape[1:]), 1), 1)
    for start in range(0, shape[0], rows):
        yield piece[start : start + rows]


def _opened(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise RegistryError(
            tr("{path} is no safetensors file ({error}).", path=path, error=error), mend="Promote the run again."
        ) from error
