"""A loss for ms-swift that keeps the tuned model what its base was: KL to the base on the replay rows.

A plugin in ms-swift's own sense: importing it registers the loss ``replay_kl``, in this process by
:mod:`namesake.training`, in plain ``swift sft`` by ``--external_plugins …/distil.py --loss_type replay_kl``.

Cross entropy on the base's replies pulls the model towards single tokens, makes it surer than its base is, and teaches
it to stop where a reply was cut. The divergence from the base's own distribution does neither, and starts at zero
(knowledge distillation, arXiv 1503.02531; the student's own base as the teacher, arXiv 2402.13669).
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from swift.loss import loss_map
from swift.loss.base import BaseLoss
from torch import Tensor

from namesake.dataset import DATA, REPLAY
from namesake.paths import digest_of_file, write_whole
from namesake.recipe import KL_LOSS_TYPE, READING

TOP = 64
"""Tokens kept of the base's distribution at each place; the rest of the vocabulary is one more outcome."""

OPENING = 4
"""First tokens of a reply; ``NAMESAKE_REPLAY_OPENING_WEIGHT`` is how much more than the others they count."""

READ = 32
"""Replay rows that the base reads at a time: without a backward pass there is room for more than a training batch."""

CACHE: Path | None = None
"""Folder where what the base said is kept for later runs with the same rows; none keeps it for this run only."""

Said = tuple[Tensor, Tensor]
"""Log-probabilities and ids of the base's top tokens, both (label tokens of a row, TOP)."""


class ReplayKL(BaseLoss):  # type: ignore[misc]
    """Cross entropy on the data rows, KL divergence of the base's distribution from the model's on replay rows.

    The base is the model with its adapter switched off. It reads all replay rows before the first step, many at a time
    (a row that was not among them when it comes), and what it says is kept for every epoch. Of several processes each
    reads its share.

    Raises:
        ValueError: there is no adapter to switch off (``tuner_type`` full).
    """

    def __init__(self, args: Any, trainer: Any) -> None:
        super().__init__(args, trainer)
        self._weight = float(os.environ.get("NAMESAKE_REPLAY_WEIGHT", "1"))
        self._opening_weight = float(os.environ.get("NAMESAKE_REPLAY_OPENING_WEIGHT", "1"))
        self._said: dict[bytes, Said] = {}
        self._inputs: dict[str, Any] = {}
        self._places: Tensor | None = None
        self._ready = False
        inner = trainer.compute_loss

        def compute_loss(model: Any, inputs: dict[str, Any], *more: Any, **named: Any) -> Any:
            # ms-swift hands a loss neither the tokens nor the channel; this is where they pass by.
            if not self._ready:
                self._prepare()
            self._inputs = dict(inputs)
            self._places = _places(inputs["labels"])
            try:
                return inner(model, inputs, *more, **named)
            finally:
                self._places = None

        trainer.compute_loss = compute_loss

    def _prepare(self) -> None:
        self._ready = True
        model = self._model()
        if not hasattr(model, "disable_adapter"):
            raise ValueError(f"loss {KL_LOSS_TYPE} needs an adapter: use tuner_type lora")
        model.get_output_embeddings().register_forward_pre_hook(self._only_labelled)
        self._read_all()

    def _only_labelled(self, _module: Any, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Only hidden states that a label follows go through the head, as one row (1, label tokens, hidden).

        The head and the passes over its 49,152 columns are a quarter of a step. A slice of the hidden states would
        moreover not be contiguous, and torch then copies the head's weights once for every row of the batch: another
        third (docs/lab-notes.md).
        """
        hidden = given[0]
        if self._places is None or hidden.shape[:2] != self._places.shape:
            return (hidden.contiguous(),)
        return (hidden[self._places.to(hidden.device)].unsqueeze(0),)

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
        """The loss of one batch: the weighted sum over its label tokens, divided by their number.

        ``outputs.logits`` are (1, label tokens, vocabulary), as the head was given; ``labels`` (rows, places) with -100
        where nothing is learnt.
        """
        learnt = labels[:, 1:] != -100
        wanted, logits = labels[:, 1:][learnt], outputs.logits[0]
        channels = self._inputs.get("channel") or [None] * len(labels)
        replay = torch.tensor([channel == REPLAY for channel in channels], device=labels.device)
        kept = replay[:, None].expand_as(learnt)[learnt]
        # One gather for both losses: of a data token its label, of a replay token the base's top tokens.
        ids = wanted[:, None].repeat(1, min(TOP, logits.shape[-1]))
        if replay.any():
            base, top = self._teacher(replay, labels)
            ids[kept] = top
        scores = logits.float()
        model = scores.gather(-1, ids) - scores.logsumexp(-1, keepdim=True)
        surprise = -model[~kept, 0]
        entropy = surprise.sum()
        counted = entropy.new_zeros(())
        if replay.any():
            each = _divergence(model[kept], base)
            opening = _within(learnt[replay])[learnt[replay]] <= OPENING
            counted = self._weight * (each * torch.where(opening, self._opening_weight, 1.0)).sum()
            self._record(f"loss_{REPLAY}", each)
        self._record(f"loss_{DATA}", surprise)
        self._metrics()["token_acc"].update((logits.detach().argmax(-1) == wanted).tolist())
        outputs.logits = None  # ms-swift would compare them with labels of another shape
        total = num_items_in_batch if num_items_in_batch is not None else learnt.sum()
        return (entropy + counted) / total

    def _record(self, name: str, each: Tensor) -> None:
        # Token by token, so that the mean is the same however many processes and batches they were spread over.
        if len(each):
            self._metrics()[name].update(each.detach())

    def _metrics(self) -> Any:
        return self.trainer.custom_metrics["train" if self.trainer.model.training else "eval"]

    def _teacher(self, replay: Tensor, labels: Tensor) -> Said:
        """What the base says to the replay rows of the batch, one row after the other."""
        given = _asked(self._inputs, replay)
        keys = _keys(given)
        if any(key not in self._said for key in keys):
            self._read(given, labels[replay], keys)
        scores, ids = zip(*(self._said[key] for key in keys), strict=True)
        return torch.cat(scores).to(labels.device), torch.cat(ids).to(labels.device)

    def _read(self, given: dict[str, Any], labels: Tensor, keys: Sequence[bytes]) -> None:
        """Ask the base about rows."""
        model, before = self._model(), self._places
        training = model.training
        model.eval()  # no dropout, no noise on its embeddings: what it says is kept
        self._places = _places(labels)
        sizes = self._places.sum(1).tolist()
        try:
            with torch.no_grad(), model.disable_adapter():
                scores = model(**given).logits[0]
        finally:
            self._places = before
            model.train(training)
        top = scores.topk(min(TOP, scores.shape[-1]), -1)
        found = top.values.float() - scores.float().logsumexp(-1, keepdim=True)
        self._said |= dict(zip(keys, zip(found.split(sizes), top.indices.split(sizes), strict=True), strict=True))

    def _read_all(self) -> None:
        """Every replay row of the data sets, in batches of like length, or from the cache."""
        rows = [
            row
            for name in ("train_dataset", "eval_dataset")
            for row in getattr(self.trainer, name, None) or ()
            if row.get("channel") == REPLAY and "input_ids" in row
        ]
        if not rows:
            return
        first = not dist.is_initialized() or dist.get_rank() == 0
        # The first process alone looks: all have to read, or none, and their caches may lie on different disks.
        path = _cache_path(self._model(), rows) if first else None
        kept = _told_by_first(path.read_bytes() if path and path.is_file() else None)
        if kept:
            self._said = _unpacked(kept)
            return
        begun = time.monotonic()
        rows.sort(key=lambda row: len(row["input_ids"]))
        for batch in _share([rows[start : start + READ] for start in range(0, len(rows), READ)]):
            inputs = self.trainer._prepare_inputs(self.trainer.data_collator(batch))
            given = _asked(inputs)
            self._read(given, inputs["labels"], _keys(given))
        if dist.is_initialized():
            parts = _told_by_all(_packed(self._said))
            self._said = {key: said for part in parts for key, said in _unpacked(part).items()}
        if path:
            write_whole(path, _packed(self._said))
        self.trainer.log({READING: time.monotonic() - begun})


def _share(batches: list[Any]) -> list[Any]:
    """What this process reads of the batches; as many in each, since a sharded model goes forward in all at once."""
    if not dist.is_initialized():
        return batches
    rank, world = dist.get_rank(), dist.get_world_size()
    return [batches[(start + rank) % len(batches)] for start in range(0, len(batches), world)]


def _told_by_first(content: bytes | None) -> bytes | None:
    """What the first process has."""
    told = [content]
    if dist.is_initialized():
        dist.broadcast_object_list(told)
    return told[0]


def _told_by_all(content: bytes) -> list[bytes]:
    """What each process has."""
    told = [b""] * dist.get_world_size()
    dist.all_gather_object(told, content)
    return told


def _asked(inputs: dict[str, Any], rows: Tensor | slice = slice(None)) -> dict[str, Any]:
    """What the base is given of a batch, or of some of its rows."""
    given = {
        key: value[rows]
        for key in ("input_ids", "attention_mask", "position_ids")
        if (value := inputs.get(key)) is not None
    }
    if (keep := inputs.get("logits_to_keep")) is not None:
        given["logits_to_keep"] = keep
    return given


def _places(labels: Tensor) -> Tensor:
    """The places (rows, places) whose next token bears a label."""
    return torch.nn.functional.pad(labels[:, 1:] != -100, (0, 1), value=False)


def _within(learnt: Tensor) -> Tensor:
    """The number, from one on, of each label token in its own reply: a dialogue has several (rows, places)."""
    count = learnt.cumsum(1)
    return count - torch.where(learnt, 0, count).cummax(1).values


def _keys(given: dict[str, Any]) -> list[bytes]:
    """What a row is known by: its tokens without the padding."""
    return [
        row[mask.bool()].cpu().numpy().tobytes()
        for row, mask in zip(given["input_ids"], given["attention_mask"], strict=True)
    ]


def _divergence(model: Tensor, base: Tensor) -> Tensor:
    """KL(base ‖ model) of each token, on the base's top tokens and, as one outcome, all others.

    Both are log-probabilities (tokens, TOP).
    """
    rest_base = (1 - base.exp().sum(-1)).clamp_min(1e-6)
    rest_model = (1 - model.exp().sum(-1)).clamp_min(1e-6)
    return (base.exp() * (base - model)).sum(-1) + rest_base * (rest_base.log() - rest_model.log())


def _cache_path(model: Any, rows: Sequence[dict[str, Any]]) -> Path | None:
    """Where what this base says to these rows is kept: by the model's own files, how they are held in memory, and the
    rows' tokens and labels.
    """
    config = model.get_base_model().config
    source = Path(str(getattr(config, "_name_or_path", "")))
    if CACHE is None or not source.is_dir():
        return None
    held = [TOP, str(getattr(config, "dtype", "")), str(getattr(config, "quantization_config", ""))]
    total = hashlib.sha256(json.dumps(held).encode())
    for path in sorted(source.glob("*.safetensors")):
        total.update(digest_of_file(path).encode())
    for row in sorted(json.dumps([list(row["input_ids"]), list(row["labels"])]) for row in rows):
        total.update(row.encode())
    return CACHE / "teacher" / f"{total.hexdigest()[:32]}.safetensors"


def _packed(said: dict[bytes, Said]) -> bytes:
    """As it lies in the cache: safetensors."""
    content: bytes = save(
        {
            "keys": torch.frombuffer(bytearray(b"".join(said)), dtype=torch.uint8),
            "lengths": torch.tensor([len(key) for key in said]),
            "sizes": torch.tensor([len(ids) for _, ids in said.values()]),
            "scores": torch.cat([scores.cpu() for scores, _ in said.values()]),
            "ids": torch.cat([ids.cpu().int() for _, ids in said.values()]),
        }
    )
    return content


def _unpacked(content: bytes) -> dict[bytes, Said]:
    kept = load(content)
    whole, sizes = kept["keys"].numpy().tobytes(), kept["sizes"].tolist()
    ends = kept["lengths"].cumsum(0).tolist()
    keys = [whole[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    said = zip(kept["scores"].split(sizes), kept["ids"].long().split(sizes), strict=True)
    return dict(zip(keys, said, strict=True))


loss_map[KL_LOSS_TYPE] = ReplayKL
