"""What a checkpoint says: the same as transformers says of it alone, with no key copied for each token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from transformers.cache_utils import DynamicLayer
from transformers.integrations import sdpa_attention

from namesake.generate import LocalModel, Sampling, _parts, divergence
from tests.tasks import WORDS, write_model
from tests.unit.test_merge import write_adapter

pytestmark = pytest.mark.usefixtures("one_thread")

ASKED = [" ".join(WORDS[i : i + count]) for i, count in ((1, 2), (4, 9), (7, 17), (3, 1), (9, 4))]
SIZES = {"hidden_size": 48, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 512}
KINDS: dict[str, Callable[[], Any]] = {
    "three heads share a key": lambda: transformers.LlamaConfig(**SIZES, num_attention_heads=6, num_key_value_heads=2),
    "a key for each head": lambda: transformers.LlamaConfig(**SIZES, num_attention_heads=4),
    "one key for all, with biases": lambda: transformers.LlamaConfig(
        **SIZES, num_attention_heads=4, num_key_value_heads=1, attention_bias=True
    ),
    "only the last places are seen": lambda: transformers.MistralConfig(
        **SIZES, num_attention_heads=4, num_key_value_heads=2, sliding_window=8
    ),
}


@pytest.fixture(params=sorted(KINDS))
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A tiny checkpoint of one of the kinds, with weights that say more than one thing."""
    write_model(tmp_path)
    config = KINDS[request.param]()
    config.vocab_size = transformers.AutoConfig.from_pretrained(tmp_path).vocab_size
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for weights in model.parameters():
            weights.normal_(std=0.3)
    model.save_pretrained(tmp_path)
    return tmp_path


def dialogues() -> list[list[dict[str, str]]]:
    """The questions, short and long."""
    return [[{"role": "user", "content": question}] for question in ASKED]


@pytest.mark.parametrize(("room", "cost"), [(64, 128), (5, 1)], ids=["one part, room enough", "parts, room is made"])
def test_replies_are_those_of_eager_attention_to_each_question_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch, room: int, cost: int
) -> None:
    monkeypatch.setattr("namesake.generate._ROOM", room)
    monkeypatch.setattr("namesake.generate._PASS", cost)
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    wanted = []
    for dialogue in dialogues():
        given = tokenizer.apply_chat_template(dialogue, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        made = plain.generate(given, max_new_tokens=24, do_sample=False)
        wanted.append(tokenizer.decode(made[0, given.shape[1] :], skip_special_tokens=True).strip())
    assert len({*wanted}) > 1
    with LocalModel(folder) as model:
        assert [reply.text for reply in model.replies(dialogues(), max_new_tokens=24)] == wanted


def test_no_key_is_repeated_for_a_token_that_is_made(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repeated: list[int] = []
    real = sdpa_attention.repeat_kv

    def noted(states: Any, times: int) -> Any:
        repeated.append(times)
        return real(states, times)

    monkeypatch.setattr(sdpa_attention, "repeat_kv", noted)
    with LocalModel(folder) as model:
        model.replies(dialogues(), max_new_tokens=1)
        of_the_prompts = len(repeated)
        model.replies(dialogues(), max_new_tokens=24)
        assert len(repeated) == 2 * of_the_prompts


@pytest.mark.parametrize("folder", ["three heads share a key"], indirect=True)
def test_no_key_is_copied_for_a_token_and_each_prompt_is_read_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[int, int]] = []
    real = DynamicLayer.update

    def noted(layer: Any, keys: Any, *given: Any, **more: Any) -> Any:
        read.append((keys.shape[0], keys.shape[2]))
        return real(layer, keys, *given, **more)

    monkeypatch.setattr(DynamicLayer, "update", noted)
    with LocalModel(folder) as model:
        model.replies(dialogues(), max_new_tokens=24, sampling=Sampling(n=3))
    assert sum(rows for rows, _ in read[:: SIZES["num_hidden_layers"]]) == len(ASKED)
    assert len(read) % SIZES["num_hidden_layers"] == 0


@pytest.mark.parametrize(
    ("lengths", "parts"),
    [
        ([7], [(0, 1)]),
        ([7, 7, 9], [(0, 3)]),
        ([10] * 20 + [16] * 20 + [60] * 3, [(0, 40), (40, 43)]),
        ([10] * 40 + [16] * 20 + [60] * 3 + [400], [(0, 40), (40, 60), (60, 63), (63, 64)]),
    ],
)
def test_prompts_are_divided_where_padding_would_cost_more_than_a_pass(
    lengths: list[int], parts: list[tuple[int, int]]
) -> None:
    assert [(part.start, part.stop) for part in _parts(lengths)] == parts


def test_the_order_of_the_questions_changes_no_reply(folder: Path) -> None:
    with LocalModel(folder) as model:
        one = model.replies(dialogues(), max_new_tokens=8)
        assert model.replies(dialogues()[::-1], max_new_tokens=8)[::-1] == one
        drawn = model.replies(dialogues(), max_new_tokens=8, sampling=Sampling(n=2))
        assert len(drawn) == 2 * len(ASKED)
        assert model.replies(dialogues(), max_new_tokens=8, sampling=Sampling(n=2)) == drawn
        assert model.replies([], max_new_tokens=8) == []


@pytest.mark.parametrize("folder", ["three heads share a key"], indirect=True)
def test_the_divergence_of_an_adapter_and_of_its_merged_weights_is_what_each_reply_alone_gives(
    folder: Path, tmp_path: Path
) -> None:
    adapter, merged = write_adapter(folder, tmp_path / "adapter", lora_alpha=64), tmp_path / "merged"
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tuned = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(folder), adapter
    ).merge_and_unload()
    tuned.save_pretrained(merged)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(merged)
    said = [
        [*one, {"role": "assistant", "content": " ".join(WORDS[at : at + 1 + at])}]
        for at, one in enumerate(dialogues())
    ]
    total, tokens = 0.0, 0
    for dialogue in said:
        asked = tokenizer.apply_chat_template(dialogue[:-1], tokenize=False, add_generation_prompt=True)
        before = len(tokenizer(asked, add_special_tokens=False)["input_ids"])
        ids = tokenizer(asked + dialogue[-1]["content"], add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            was, now = (model(ids).logits[0, before - 1 : -1].log_softmax(-1) for model in (base, tuned))
        total += float(torch.nn.functional.kl_div(now, was, reduction="sum", log_target=True))
        tokens += ids.shape[1] - before
    assert total / tokens > 1e-3
    for given in (adapter, merged):
        assert divergence(folder, given, said) == pytest.approx(total / tokens, rel=1e-3)
    assert divergence(folder, folder, said) == 0.0
    assert divergence(folder, merged, []) == 0.0
