"""The distance of two models' weights against torch's own norms."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from namesake import weights
from namesake.errors import RegistryError

SHAPES = st.lists(st.integers(1, 7), min_size=0, max_size=3).map(tuple)


def write(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 1) -> Path:
    """The tensors in so many files."""
    folder.mkdir(parents=True)
    names = sorted(tensors)
    for number in range(shards):
        part = {name: tensors[name].contiguous() for name in names[number::shards]}
        if part:
            save_file(part, folder / f"model-{number}.safetensors")
    return folder


@settings(deadline=None, max_examples=30)
@given(
    st.dictionaries(st.sampled_from("abcdef"), SHAPES, min_size=1),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(1, 3),
    st.integers(1, 20),
)
def test_distances_are_torchs(
    shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, shards: int, elements: int
) -> None:
    torch.manual_seed(0)
    a = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    b = {name: (tensor.float() + torch.randn(tensor.shape) * 0.1).to(dtype) for name, tensor in a.items()}
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "_ELEMENTS", elements)  # many pieces of each tensor
        found = weights.distance(write(Path(name) / "a", a), write(Path(name) / "b", b, shards))
    own = {key: float((b[key].double() - a[key].double()).norm() / a[key].double().norm()) for key in a}
    assert dict(found.tensors) == pytest.approx(own, rel=1e-5)
    apart = sum(float((b[key].double() - a[key].double()).norm()) ** 2 for key in a)
    whole = sum(float(a[key].double().norm()) ** 2 for key in a)
    assert found.total == pytest.approx(math.sqrt(apart / whole), rel=1e-5)
    assert [value for _, value in found.tensors] == sorted((value for _, value in found.tensors), reverse=True)


def test_the_same_numbers_in_other_files_are_equal(tmp_path: Path) -> None:
    tensors = {name: torch.arange(6.0).view(2, 3) for name in "abc"}
    found = weights.distance(write(tmp_path / "a", tensors), write(tmp_path / "b", tensors, 3))
    assert found.equal
    assert found.total == 0.0


def test_what_only_one_has_is_named_and_is_not_equal(tmp_path: Path) -> None:
    one, other = torch.ones(2), torch.zeros(3)
    found = weights.distance(
        write(tmp_path / "a", {"a": one, "b": one + 1}), write(tmp_path / "b", {"a": one, "b": other})
    )
    assert (found.others, found.equal, found.total) == (("b",), False, 0.0)
    zero = weights.distance(write(tmp_path / "c", {"a": torch.zeros(2)}), tmp_path / "a")
    assert zero.total == math.inf


def test_what_is_no_safetensors_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text(json.dumps({}))
    with pytest.raises(RegistryError, match="no safetensors file"):
        weights.distance(tmp_path, tmp_path)
