"""A loss for ms-swift that keeps the tuned model what its base was: KL to the base on the replay rows.

A plugin in ms-swift's own sense: importing it registers the loss ``replay_kl``, in this process by
:mod:`namesake.train`, in plain ``swift sft`` by ``--external_plugins …/distil.py --loss_type replay_kl``.

Cross entropy on the base's replies pulls the model towards single tokens, makes it surer than its base is, and teaches
it to stop where a reply was cut. The divergence from the base's own distribution does neither, and starts at zero
(knowledge distillation, arXiv 1503.02531; the student's own base as the teacher, arXiv 2402.13669).
"""

from __future__ import annotations

from typing import Any

import torch
from swift.loss import loss_map
from swift.loss.base import BaseLoss
from torch import Tensor

from namesake.dataset import DATA, REPLAY
from namesake.recipe import KL_LOSS_TYPE

TOP = 64
"""Tokens kept of the base's distribution at each place; the rest of the vocabulary is one more outcome."""


class ReplayKL(BaseLoss):  # type: ignore[misc]
    """Cross entropy on the data rows, KL divergence of the base's distribution from the model's on replay rows.

    The base is the model with its adapter switched off. It reads each replay row once; what it says is kept for later
    epochs (``TOP`` × 12 bytes a token).

    Raises:
        ValueError: there is no adapter to switch off (``tuner_type`` full).
    """

    def __init__(self, args: Any, trainer: Any) -> None:
        super().__init__(args, trainer)
        self._said: dict[bytes, tuple[Tensor, Tensor]] = {}
        self._inputs: dict[str, Any] = {}
        self._ready = False
        inner = trainer.compute_loss

        def compute_loss(model: Any, inputs: dict[str, Any], *more: Any, **named: Any) -> Any:
            # ms-swift hands a loss neither the tokens nor the channel; this is where they pass by.
            self._inputs = dict(inputs)
            if not self._ready:
                self._prepare()
            return inner(model, inputs, *more, **named)

        trainer.compute_loss = compute_loss

    def _prepare(self) -> None:
        self._ready = True
        model = self._model()
        if not hasattr(model, "disable_adapter"):
            raise ValueError(f"loss {KL_LOSS_TYPE} needs an adapter: use tuner_type lora, or replay loss cross_entropy")
        # A slice of the hidden states is not contiguous, and torch then copies the head's weights once for every row
        # of the batch: a third of a training step (docs/lab-notes.md).
        model.get_output_embeddings().register_forward_pre_hook(lambda _module, given: (given[0].contiguous(),))

    def _model(self) -> Any:
        return self.trainer.accelerator.unwrap_model(self.trainer.model)

    def __call__(
        self,
        outputs: Any,
        labels: Tensor,
        *,
        num_items_in_batch: Any = None,
        **_: Any,
    ) -> Tensor:
        """The loss of one batch: the sum over its label tokens, divided by their number.

        ``outputs.logits`` are (rows, places, vocabulary), ``labels`` (rows, places) with -100 where nothing is learnt.
        """
        logits, wanted = outputs.logits[:, :-1], labels[:, 1:]
        learnt = wanted != -100
        channels = self._inputs.get("channel") or [None] * len(labels)
        replay = torch.tensor([channel == REPLAY for channel in channels], device=labels.device)
        own, kept = learnt & ~replay[:, None], learnt & replay[:, None]
        entropy = torch.nn.functional.cross_entropy(logits[own].float(), wanted[own], reduction="sum")
        divergence = (
            _divergence(logits[kept].float(), *self._teacher(replay, learnt)) if replay.any() else entropy.new_zeros(())
        )
        self._record(DATA, entropy, own)
        self._record(REPLAY, divergence, kept)
        total = num_items_in_batch if num_items_in_batch is not None else learnt.sum()
        return (entropy + divergence) / total

    def _record(self, channel: str, loss: Tensor, places: Tensor) -> None:
        if places.any():
            mode = "train" if self.trainer.model.training else "eval"
            self.trainer.custom_metrics[mode][f"loss_{channel}"].update(loss.detach() / places.sum())

    def _teacher(self, replay: Tensor, learnt: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities and ids of the base's top tokens, both (label tokens of the replay rows, TOP)."""
        given = {
            key: value[replay]
            for key in ("input_ids", "attention_mask", "position_ids")
            if (value := self._inputs.get(key)) is not None
        }
        keys = [
            row[mask.bool()].cpu().numpy().tobytes()
            for row, mask in zip(given["input_ids"], given["attention_mask"], strict=True)
        ]
        if any(key not in self._said for key in keys):
            model = self._model()
            if (keep := self._inputs.get("logits_to_keep")) is not None:
                given["logits_to_keep"] = keep
            with torch.no_grad(), model.disable_adapter():
                logits = model(**given).logits[:, :-1]
            for key, row, places in zip(keys, logits, learnt[replay], strict=True):
                scores = row[places]
                top = scores.topk(min(TOP, scores.shape[-1]), -1)
                self._said[key] = (
                    top.values.float() - scores.float().logsumexp(-1, keepdim=True),
                    top.indices,
                )
        said = [self._said[key] for key in keys]
        return torch.cat([row[0] for row in said]), torch.cat([row[1] for row in said])


def _divergence(scores: Tensor, base: Tensor, ids: Tensor) -> Tensor:
    """Sum over tokens of KL(base ‖ model) on the base's top tokens and, as one outcome, all others."""
    model = scores.gather(-1, ids) - scores.logsumexp(-1, keepdim=True)
    rest_base = (1 - base.exp().sum(-1)).clamp_min(1e-6)
    rest_model = (1 - model.exp().sum(-1)).clamp_min(1e-6)
    return (base.exp() * (base - model)).sum() + (rest_base * (rest_base.log() - rest_model.log())).sum()


loss_map[KL_LOSS_TYPE] = ReplayKL
