"""LoRA on a CPU: our products against the formula, row by row, in the shapes that vLLM calls them with."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from namesake_serving import vllm_plugin
from namesake_serving.vllm_lora import GroupedLora

RANK, HIDDEN, WIDTHS, PLACES = 4, 12, (6, 5), 3
MIXES = [
    [0, 0, 0],
    [-1, -1],
    [2, -1, 0, 0, 2, -1],
    [-1, 1],
    [1],
]


def wrapper(rows: list[int], sampled: list[int] | None = None, kind: type[PunicaWrapperCPU] = GroupedLora) -> Any:
    """As vLLM makes it, told which adapter's place answers each row."""
    made = kind(64, 16, "cpu")
    ids = [7, 8, 9]  # of the adapters in the places; 0 is none
    mapping = SimpleNamespace(
        index_mapping=tuple(ids[row] if row >= 0 else 0 for row in rows),
        prompt_mapping=tuple(ids[row] if row >= 0 else 0 for row in (rows if sampled is None else sampled)),
        is_prefill=False,
    )
    made.update_metadata(mapping, ids, PLACES, 32)
    return made


def stacks(*widths: int, seed: int = 0) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Weights of a layer with so many slices, as vLLM stacks them: places, 1, …"""
    random = torch.Generator().manual_seed(seed)
    a = tuple(torch.randn(PLACES, 1, RANK, HIDDEN, generator=random, dtype=torch.bfloat16) for _ in widths)
    b = tuple(torch.randn(PLACES, 1, width, RANK, generator=random, dtype=torch.bfloat16) for width in widths)
    return a, b


def wanted(y: Tensor, x: Tensor, rows: list[int], a: tuple[Tensor, ...], b: tuple[Tensor, ...], scale: float) -> Tensor:
    """The formula, a row at a time."""
    found = y.clone()
    for row, place in enumerate(rows):
        if place >= 0:
            parts = [scale * (x[row].float() @ one[place, 0].float().T) for one in a]
            added = torch.cat([part @ one[place, 0].float().T for part, one in zip(parts, b, strict=True)])
            found[row] = (found[row].float() + added).to(y.dtype)
    return found


@pytest.mark.parametrize("rows", MIXES)
def test_each_row_gets_its_own_adapters_change_and_one_without_an_adapter_none(rows: list[int]) -> None:
    a, b = stacks(*WIDTHS)
    x, y = torch.randn(len(rows), HIDDEN).bfloat16(), torch.randn(len(rows), sum(WIDTHS)).bfloat16()
    expected = wanted(y, x, rows, a, b, 0.5)
    wrapper(rows).add_lora_linear(y, x, a, b, 0.5, WIDTHS)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("rows", MIXES)
def test_an_embeddings_change_is_added_by_row_too(rows: list[int]) -> None:
    _, (b,) = stacks(HIDDEN)
    x, y = torch.randn(len(rows), RANK).bfloat16(), torch.zeros(len(rows), HIDDEN).bfloat16()
    wrapper(rows).add_lora_embedding(y, x, b, add_input=True)  # vLLM writes it so
    for row, place in enumerate(rows):
        change = x[row].float() @ b[place, 0].float().T if place >= 0 else torch.zeros(HIDDEN)
        torch.testing.assert_close(y[row], change.bfloat16())


@pytest.mark.parametrize("rows", MIXES)
@pytest.mark.parametrize("head", [False, True])
def test_the_heads_change_is_that_of_the_rows_that_are_sampled(rows: list[int], head: bool) -> None:
    (a,), (b,) = stacks(32)
    a = a if head else torch.zeros_like(a)  # no adapter of the head, as is usual
    x, y = torch.randn(len(rows), HIDDEN).bfloat16(), torch.randn(len(rows), 32)
    expected = wanted(y, x, rows, (a,), (b,), 1.0)
    wrapper([-1, *rows], sampled=rows).add_lora_logits(y, x, a, b, 1.0)
    torch.testing.assert_close(y, expected)


def test_a_prompts_own_probabilities_do_not_end_the_engine() -> None:
    (a,), (b,) = stacks(32)
    x, y = torch.randn(5, HIDDEN).bfloat16(), torch.randn(5, 32)
    before = y.clone()
    wrapper([0] * 6, sampled=[0, 0]).add_lora_logits(y, x, a, b, 1.0)
    assert torch.equal(y, before)


def test_what_it_replaces_is_still_wrong() -> None:
    """When this fails vLLM has mended it: :mod:`namesake_serving.vllm_lora` can go."""
    (a,), (b,) = stacks(6)
    x, y = torch.randn(2, HIDDEN).bfloat16(), torch.zeros(2, 6).bfloat16()
    wrapper([0, -1], kind=PunicaWrapperCPU).add_lora_linear(y, x, (a,), (b,), 1.0, (6,))
    assert y[1].any(), "the base's row has the change of an adapter that it did not ask for"


def test_only_a_cpu_takes_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm.platforms

    class Platform:
        def __init__(self, cpu: bool) -> None:
            self.is_cpu = lambda: cpu

        @classmethod
        def get_punica_wrapper(cls) -> str:
            return "vllm's own"

    for cpu, name in ((False, "vllm's own"), (True, f"{GroupedLora.__module__}.{GroupedLora.__name__}")):
        monkeypatch.setattr(vllm.platforms, "current_platform", Platform(cpu))
        vllm_plugin.better_adapters()
        vllm_plugin.better_adapters()  # vLLM calls it more than once
        assert Platform.get_punica_wrapper() == name
