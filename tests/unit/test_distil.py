"""The replay loss: cross entropy on data rows, KL to the base on replay rows, against formulas written out."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from namesake import distil
from namesake.distil import ReplayKL
from namesake.recipe import READING

SMALL, LARGE = 40, 300
"""Vocabularies: one that is kept whole, one of which only ``distil.TOP`` tokens are."""


class Mean:
    """As much of ms-swift's MeanMetric as is written to."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def update(self, value: Tensor | list[bool]) -> None:
        """Keep a value, or several."""
        self.values += value.tolist() if isinstance(value, Tensor) else value


def tiny(vocabulary: int, *, tuned: bool = True) -> PeftModel:
    """A Llama of two layers with an adapter that does something (or, untuned, nothing yet)."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = get_peft_model(
        LlamaForCausalLM(config), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    if tuned:
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.3)
    return model


class Trainer:
    """Calls a loss the way ms-swift's Seq2SeqTrainer does: the channel is taken out of the inputs before."""

    def __init__(self, model: Any, rows: list[dict[str, Any]] | None = None) -> None:
        self.model = model
        self.train_dataset = rows
        self.accelerator = SimpleNamespace(unwrap_model=lambda wrapped: wrapped)
        self.custom_metrics: dict[str, dict[str, Mean]] = {"train": defaultdict(Mean), "eval": defaultdict(Mean)}
        self.logged: list[dict[str, float]] = []
        self.log = self.logged.append
        self.loss = ReplayKL(None, self)

    def data_collator(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Rows padded on the left."""
        width = max(len(row["input_ids"]) for row in rows)

        def padded(key: str, fill: int) -> Tensor:
            return torch.tensor([[fill] * (width - len(row[key])) + row[key] for row in rows])

        mask = [{"mask": [1] * len(row["input_ids"])} for row in rows]
        filled = torch.tensor([[0] * (width - len(row["mask"])) + row["mask"] for row in mask])
        return {"input_ids": padded("input_ids", 0), "attention_mask": filled, "labels": padded("labels", -100)}

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return inputs

    def compute_loss(self, model: Any, inputs: dict[str, Any], items: int | None = None) -> Tensor:
        """The loss of the batch."""
        inputs.pop("channel", None)
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        return self.loss(outputs, labels, num_items_in_batch=items)


def batch(vocabulary: int, channels: list[str | None]) -> dict[str, Any]:
    """Rows of 12 tokens, the second half of them to be learnt; the last row is padded."""
    torch.manual_seed(1)
    ids = torch.randint(0, vocabulary, (len(channels), 12))
    mask = torch.ones_like(ids)
    labels = ids.clone()
    labels[:, :6] = -100
    mask[-1, 10:], labels[-1, 10:] = 0, -100
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels[:, -7:],
        "logits_to_keep": 7,
        "channel": channels,
    }


def by_hand(model: PeftModel, given: dict[str, Any]) -> tuple[float, float, int]:
    """Cross entropy of the data rows, KL of the replay rows over the whole vocabulary, and the label tokens' number."""
    with torch.no_grad():
        asked = {key: given[key] for key in ("input_ids", "attention_mask")}
        mine = model(**asked).logits.log_softmax(-1)
        with model.disable_adapter():
            base = model(**asked).logits.log_softmax(-1)
    entropy = divergence = 0.0
    number = 0
    for row, channel in enumerate(given["channel"]):
        for place in range(6, 12):
            label = int(given["labels"][row, place - 5])
            if label == -100:
                continue
            number += 1
            if channel == "replay":
                at = place - 1
                divergence += float((base[row, at].exp() * (base[row, at] - mine[row, at])).sum())
            else:
                entropy -= float(mine[row, place - 1, label])
    return entropy, divergence, number


def test_ms_swift_finds_the_loss_under_its_name() -> None:
    from swift.loss import loss_map

    assert loss_map["replay_kl"] is ReplayKL


def test_it_is_cross_entropy_on_data_and_kl_on_replay() -> None:
    trainer = Trainer(tiny(SMALL))
    given = batch(SMALL, ["data", "replay", None, "replay"])
    entropy, divergence, number = by_hand(trainer.model, given)
    assert divergence > 0.01
    assert float(trainer.compute_loss(trainer.model, given)) == pytest.approx((entropy + divergence) / number, rel=1e-4)


def test_it_divides_by_the_number_it_is_given() -> None:
    trainer = Trainer(tiny(SMALL))
    entropy, divergence, _ = by_hand(trainer.model, batch(SMALL, ["data", "replay"]))
    loss = trainer.compute_loss(trainer.model, batch(SMALL, ["data", "replay"]), 5)
    assert float(loss) == pytest.approx((entropy + divergence) / 5, rel=1e-4)


def test_of_a_large_vocabulary_the_rest_counts_as_one_outcome() -> None:
    trainer = Trainer(tiny(LARGE))
    _, whole, number = by_hand(trainer.model, batch(LARGE, ["replay", "replay"]))
    lumped = float(trainer.compute_loss(trainer.model, batch(LARGE, ["replay", "replay"]))) * number
    assert 0 < lumped <= whole  # lumping outcomes together never adds divergence


def test_an_adapter_that_does_nothing_yet_has_no_divergence_and_gets_no_gradient() -> None:
    trainer = Trainer(tiny(SMALL, tuned=False))
    loss = trainer.compute_loss(trainer.model, batch(SMALL, ["replay", "replay"]))
    loss.backward()
    assert abs(float(loss.detach())) < 1e-5
    steps = [float(p.grad.abs().max()) for p in trainer.model.parameters() if p.grad is not None]
    assert max(steps) < 1e-5


def test_the_gradient_leads_back_to_the_base() -> None:
    trainer = Trainer(tiny(LARGE))
    optimizer = torch.optim.Adam([p for p in trainer.model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(60):
        loss = trainer.compute_loss(trainer.model, batch(LARGE, ["replay", "replay"]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 3


def test_the_base_reads_a_row_once() -> None:
    trainer = Trainer(tiny(SMALL))
    first = float(trainer.compute_loss(trainer.model, batch(SMALL, ["replay", "data"])))
    assert len(trainer.loss._said) == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PeftModel, "disable_adapter", None)  # would be called to ask the base again
        assert float(trainer.compute_loss(trainer.model, batch(SMALL, ["replay", "data"]))) == pytest.approx(first)


def test_both_parts_are_told_by_token() -> None:
    trainer = Trainer(tiny(SMALL))
    given = batch(SMALL, ["data", "replay"])
    entropy, divergence, _ = by_hand(trainer.model, given)
    trainer.compute_loss(trainer.model, given)
    metrics = trainer.custom_metrics["train"]
    assert len(metrics.pop("token_acc").values) == 10
    assert {name: (len(metric.values), sum(metric.values)) for name, metric in metrics.items()} == {
        "loss_data": (6, pytest.approx(entropy, rel=1e-4)),
        "loss_replay": (4, pytest.approx(divergence, rel=1e-4)),
    }


def test_a_batch_of_one_row_has_a_mask_for_logits_to_keep() -> None:
    trainer = Trainer(tiny(SMALL))
    given = batch(SMALL, ["replay"])
    _, divergence, number = by_hand(trainer.model, given)
    learnt = torch.cat([torch.full((6,), -100), given["labels"][0, 1:]]) != -100
    labels = torch.nn.functional.pad(given["input_ids"][:, learnt], (1, 0), value=-100)
    given |= {"labels": labels, "logits_to_keep": torch.nn.functional.pad(learnt[1:], (0, 1), value=True)}
    assert float(trainer.compute_loss(trainer.model, given)) == pytest.approx(divergence / number, rel=1e-4)


def test_without_an_adapter_it_says_what_to_do() -> None:
    trainer = Trainer(tiny(SMALL).get_base_model().eval())
    trainer.model = LlamaForCausalLM(
        LlamaConfig(vocab_size=SMALL, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    )
    with pytest.raises(ValueError, match="tuner_type lora"):
        trainer.compute_loss(trainer.model, batch(SMALL, ["replay"]))


def test_the_base_keeps_only_its_top_tokens() -> None:
    trainer = Trainer(tiny(LARGE))
    trainer.compute_loss(trainer.model, batch(LARGE, ["replay", "data"]))
    ((scores, ids),) = trainer.loss._said.values()
    assert scores.shape == ids.shape == (6, distil.TOP)


def rows_of(given: dict[str, Any]) -> list[dict[str, Any]]:
    """The batch's rows as ms-swift's data set holds them, before they are padded."""
    rows = []
    parts = (given[key] for key in ("input_ids", "attention_mask", "labels", "channel"))
    for ids, mask, labels, channel in zip(*parts, strict=True):
        kept = ids[mask.bool()].tolist()
        wanted = [-100] * 6 + [label for label in labels[1:].tolist() if label != -100]
        rows.append({"input_ids": kept, "labels": wanted, "channel": channel})
    return rows


def test_the_base_reads_every_replay_row_before_the_first_step() -> None:
    given = batch(SMALL, ["data", "replay", "replay"])
    plain, before = Trainer(tiny(SMALL)), Trainer(tiny(SMALL), rows_of(given))
    wanted = float(plain.compute_loss(plain.model, dict(given)))
    before.loss._prepare()
    assert len(before.loss._said) == 2
    ((name, seconds),) = before.logged[0].items()
    assert name == READING
    assert 0 < seconds < 60
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PeftModel, "disable_adapter", None)
        assert float(before.compute_loss(before.model, dict(given))) == pytest.approx(wanted, rel=1e-4)


def test_each_process_reads_its_share_and_knows_all(monkeypatch: pytest.MonkeyPatch) -> None:
    given = batch(SMALL, ["replay", "data", "replay", "replay"])
    alone = Trainer(tiny(SMALL), rows_of(given))
    alone.loss._prepare()
    monkeypatch.setattr(distil, "READ", 1)
    monkeypatch.setattr(distil.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(distil.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(distil.dist, "broadcast_object_list", lambda told: None)
    told: list[bytes] = []
    monkeypatch.setattr(distil, "_told_by_all", lambda content: told.append(content) or told)
    for rank in range(2):
        monkeypatch.setattr(distil.dist, "get_rank", lambda rank=rank: rank)
        one = Trainer(tiny(SMALL), rows_of(given))
        one.loss._prepare()
        # Two of three rows: a model in shards has to go forward as often in each process.
        assert len(distil._unpacked(told[rank])) == 2
    assert one.loss._said.keys() == alone.loss._said.keys()
    for key, (scores, ids) in alone.loss._said.items():
        assert torch.allclose(one.loss._said[key][0], scores, atol=1e-5)
        assert (one.loss._said[key][1] == ids).float().mean() > 0.9  # tokens that are all but equally likely


def test_what_the_base_said_is_kept_for_the_next_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distil, "CACHE", tmp_path / "cache")
    given = batch(SMALL, ["data", "replay", "replay"])
    tiny(SMALL).get_base_model().save_pretrained(tmp_path / "base")
    losses = []
    for _ in range(2):
        model = tiny(SMALL)
        model.get_base_model().config._name_or_path = str(tmp_path / "base")
        trainer = Trainer(model, rows_of(given))
        losses.append(float(trainer.compute_loss(model, dict(given))))
        assert len(list((tmp_path / "cache" / "teacher").glob("*.safetensors"))) == 1
        monkeypatch.setattr(ReplayKL, "_read", None)  # the second run must not ask
    assert losses[0] == losses[1]


def test_other_rows_or_another_base_are_asked_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distil, "CACHE", tmp_path / "cache")
    for number, channels in enumerate((["replay", "data"], ["replay", "replay"], ["replay", "data"])):
        model = tiny(SMALL)
        if number == 2:
            next(model.get_base_model().parameters()).data += 1
        model.get_base_model().save_pretrained(tmp_path / f"base{number}")
        model.get_base_model().config._name_or_path = str(tmp_path / f"base{number}")
        given = batch(SMALL, list(channels))
        Trainer(model, rows_of(given)).compute_loss(model, given)
        assert len(list((tmp_path / "cache" / "teacher").glob("*.safetensors"))) == number + 1


def test_replay_counts_as_much_as_it_is_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Trainer(tiny(SMALL))
    entropy, divergence, number = by_hand(plain.model, batch(SMALL, ["data", "replay"]))
    monkeypatch.setenv("NAMESAKE_REPLAY_WEIGHT", "3")
    weighted = Trainer(tiny(SMALL))
    loss = float(weighted.compute_loss(weighted.model, batch(SMALL, ["data", "replay"])))
    assert loss == pytest.approx((entropy + 3 * divergence) / number, rel=1e-4)


def test_the_first_tokens_of_a_reply_count_more(monkeypatch: pytest.MonkeyPatch) -> None:
    given = batch(SMALL, ["replay"])
    whole = {**given, "labels": given["labels"].clone()}
    given["labels"][:, 1 + distil.OPENING :] = -100
    trainer = Trainer(tiny(SMALL))
    opening = float(trainer.compute_loss(trainer.model, given, 1))
    trainer.loss._said.clear()
    everything = float(trainer.compute_loss(trainer.model, dict(whole), 1))
    monkeypatch.setenv("NAMESAKE_REPLAY_OPENING_WEIGHT", "5")
    weighted = Trainer(tiny(SMALL))
    loss = float(weighted.compute_loss(weighted.model, dict(whole), 1))
    assert loss == pytest.approx(everything + 4 * opening, rel=1e-4)


def test_the_opening_is_counted_anew_in_each_reply_of_a_dialogue() -> None:
    learnt = torch.tensor([[0, 1, 1, 1, 0, 0, 1, 1], [1, 1, 0, 1, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0, 1, 1]]).bool()
    found = distil._within(learnt)
    assert found[learnt].tolist() == [1, 2, 3, 1, 2, 1, 2, 1, 1, 1, 2]


def test_the_base_is_read_without_what_only_training_adds() -> None:
    given = batch(SMALL, ["replay", "replay"])
    calm, noisy = Trainer(tiny(SMALL)), Trainer(tiny(SMALL))

    def noise(module: Any, _given: Any, made: Tensor) -> Tensor:  # as NEFTune does (arXiv 2310.05914)
        return made + torch.randn_like(made) if module.training else made

    noisy.model.get_input_embeddings().register_forward_hook(noise)
    noisy.model.train()
    for one in (calm, noisy):
        one.compute_loss(one.model, dict(given))
    assert noisy.model.training
    for key, (scores, _ids) in calm.loss._said.items():
        assert torch.allclose(noisy.loss._said[key][0], scores, atol=1e-5)


def test_a_base_that_is_held_otherwise_in_memory_is_asked_anew(tmp_path: Path) -> None:
    model, rows = tiny(SMALL), rows_of(batch(SMALL, ["replay"]))
    config = model.get_base_model().config
    config._name_or_path = str(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distil, "CACHE", tmp_path)
        paths = {distil._cache_path(model, rows)}
        config.dtype = torch.bfloat16
        paths.add(distil._cache_path(model, rows))
        config.quantization_config = {"load_in_4bit": True}
        paths.add(distil._cache_path(model, rows))
    assert len(paths) == 3
