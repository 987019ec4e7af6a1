"""LoRA in vLLM on a CPU: one product for each adapter in the batch, and none for rows that have no adapter.

vLLM's own (``vllm/lora/ops/torch_ops``, 0.32) copies an adapter's weights for every token, and takes its index -1, "no
adapter", for the last place: asked together with an adapter, the base answered by the adapter that lies there. Prompt
log-probabilities, where the head has a row for every token and not for every request, ended the engine (vLLM #16668).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

Group = tuple[int, Tensor | slice]
"""An adapter's place among those that are loaded, and the rows that it answers."""


class GroupedLora(PunicaWrapperCPU):  # type: ignore[misc]
    """Named by :func:`namesake_serving.vllm_plugin.better_adapters`. Sums are in float32, as in what it replaces."""

    def __init__(self, *given: Any, **more: Any) -> None:
        super().__init__(*given, **more)
        self._tokens: list[Group] = []
        self._sampled: list[Group] = []

    def update_metadata(self, *given: Any, **more: Any) -> None:
        """Which adapter answers which row of the next step."""
        super().update_metadata(*given, **more)
        self._tokens, self._sampled = groups(self.token_lora_indices), groups(self.sampler_indices)

    def add_shrink(
        self, y: Sequence[Tensor], x: Tensor, lora_a_stacked: Sequence[Tensor], scale: float, **_: Any
    ) -> None:
        """``y[i] = scale · x Aᵢᵀ`` in the rows that have an adapter."""
        x = x.view(-1, x.shape[-1])
        for place, rows in self._tokens:
            given = x[rows].float()
            for to, weights in zip(y, lora_a_stacked, strict=True):
                _put(to, scale * _product(given, weights, place), rows, False)

    def add_expand(
        self,
        y: Tensor,
        x: Sequence[Tensor],
        lora_b_stacked: Sequence[Tensor],
        output_slices: Sequence[int],
        offset_start: int = 0,
        add_inputs: bool = True,
        **_: Any,
    ) -> None:
        """``y[:, sliceᵢ] += x[i] Bᵢᵀ`` in the rows that have an adapter."""
        y = y.view(-1, y.shape[-1])
        for place, rows in self._tokens:
            begin = offset_start
            for given, weights, width in zip(x, lora_b_stacked, output_slices, strict=True):
                _put(y[:, begin : begin + width], _product(given[rows], weights, place), rows, add_inputs)
                begin += width

    def add_lora_embedding(
        self, y: Tensor, x: Tensor, lora_b_stacked: Tensor, add_inputs: bool = True, **_: Any
    ) -> None:
        """``y += x Bᵀ`` in the rows that have an adapter."""
        for place, rows in self._tokens:
            _put(y, _product(x[rows], lora_b_stacked, place), rows, add_inputs)

    def add_lora_logits(
        self, y: Tensor, x: Tensor, lora_a_stacked: Tensor, lora_b_stacked: Tensor, scale: float, **_: Any
    ) -> None:
        """``y += scale · x Aᵀ Bᵀ``, the head's; of a prompt's tokens the head's adapter is left out (vLLM #51594)."""
        x = x.view(-1, x.shape[-1])
        if len(x) != len(self.sampler_indices):
            return
        for place, rows in self._sampled:
            small = scale * _product(x[rows], lora_a_stacked, place)
            if small.any():  # adapters of the head are rare, and its columns many
                _put(y.view(-1, y.shape[-1]), _product(small, lora_b_stacked, place), rows, True)


def groups(places: Tensor) -> list[Group]:
    """The rows of each adapter; those of -1 have none."""
    found = sorted(set(places.tolist()))
    if len(found) == 1:
        return [(found[0], slice(None))] if found[0] >= 0 else []
    return [(place, (places == place).nonzero().squeeze(1)) for place in found if place >= 0]


def _product(x: Tensor, weights: Tensor, place: int) -> Tensor:
    """``x Wᵀ`` with the weights of the adapter in that place, in float32."""
    return x.float() @ weights[place].flatten(0, -2).float().T


def _put(y: Tensor, found: Tensor, rows: Tensor | slice, add: bool) -> None:
    """Into the rows, as far as either reaches: adapter and model may be padded otherwise."""
    width = min(found.shape[1], y.shape[1])
    found = found[:, :width]
    y[rows, :width] = ((y[rows, :width] + found) if add else found).to(y.dtype)
