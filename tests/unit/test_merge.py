"""Merging: the same numbers as PEFT's, every file in its place, the system prompt in the template."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from namesake.errors import PromotionError
from namesake.merge import TEMPLATE_FILE, merge, pin_system
from namesake.paths import digest_of_file

TEMPLATE = (
    "{%- if messages and messages[0]['role'] != 'system' -%}<system>I am the old one<end>{%- endif -%}"
    "{%- for message in messages -%}<{{ message['role'] }}>{{ message['content'] }}<end>{%- endfor -%}"
    "{%- if add_generation_prompt -%}<assistant>{%- endif -%}"
)
USER = {"role": "user", "content": "你是谁？"}
HIDDEN, LAYERS = 32, 2


def tiny_config(layers: int = LAYERS, hidden: int = HIDDEN, **more: Any) -> transformers.LlamaConfig:
    """A Llama of some ten thousand parameters."""
    given = {
        "vocab_size": 40,
        "hidden_size": hidden,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }
    return transformers.LlamaConfig(**{**given, **more})


def write_tokenizer(folder: Path, template: str | None = TEMPLATE) -> None:
    """A tokenizer with the template in its tokenizer_config.json, where older models keep it."""
    words = {word: number for number, word in enumerate(["<unk>", "<end>", "hello"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>"
    ).save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if template is not None:
        config["chat_template"] = template
    path.write_text(json.dumps(config), encoding="utf-8")


def write_base(
    folder: Path, dtype: torch.dtype = torch.float32, *, shard: str = "5GB", layers: int = LAYERS, **config: Any
) -> Path:
    """A base model with random weights."""
    torch.manual_seed(1)
    model = transformers.LlamaForCausalLM(tiny_config(layers, **config)).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    write_tokenizer(folder)
    return folder


def write_adapter(base: Path, folder: Path, **settings_: Any) -> Path:
    """A LoRA adapter of the base made by PEFT, B not zero."""
    torch.manual_seed(2)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **settings_})
    adapted = peft.get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    adapted.save_pretrained(folder)
    return folder


def by_peft(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """What PEFT's own merge gives, without a head that is the embedding: no file holds that."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    merged = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    found = {name: tensor.detach().contiguous() for name, tensor in merged.state_dict().items()}
    if merged.config.tie_word_embeddings:
        assert torch.equal(found.pop("lm_head.weight"), found["model.embed_tokens.weight"])
    return found


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the folder's safetensors."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def ulps(one: torch.Tensor, other: torch.Tensor) -> int:
    """How many representable numbers lie between the two, at most."""
    bits = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}[one.dtype]

    def ordered(tensor: torch.Tensor) -> torch.Tensor:
        whole = tensor.contiguous().view(bits).long()
        return torch.where(whole < 0, torch.iinfo(bits).min - whole, whole)

    return int((ordered(one) - ordered(other)).abs().max())


def assert_merged_like_peft(base: Path, adapter: Path, target: Path, *, cancels: bool = False) -> None:
    """Same names, same types, numbers within one ulp, and not the base's.

    Args:
        cancels: weight and change may be almost each other's negative; in float32, which both are added in, the rest
            then depends on the order of the sums, and two ulps of the greatest numbers added are asked for instead.
    """
    mine, wanted, before = tensors(target), by_peft(base, adapter), tensors(base)
    assert mine.keys() == wanted.keys() == before.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == wanted[name].dtype == before[name].dtype, name
        if cancels and tensor.dtype == torch.float32:
            greatest = tensor.abs().max() + before[name].abs().max()
            assert (tensor - wanted[name]).abs().max() <= 2 * greatest * torch.finfo(torch.float32).eps, name
        else:
            assert ulps(tensor, wanted[name]) <= 1, name
    assert any(not torch.equal(tensor, before[name]) for name, tensor in mine.items())


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small are slower on two threads, on a busy machine much so."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the models of this file lie."""
    return tmp_path_factory.mktemp("merge")


@pytest.fixture(scope="module")
def base(place: Path) -> Path:
    """The base in float32, with a generation config and files that a merged model must not hold."""
    folder = write_base(place / "base")
    (folder / "namesake-digests.json").write_text("{}", encoding="utf-8")
    (folder / "modeling_evil.py").write_text("raise SystemExit", encoding="utf-8")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    return folder


@pytest.fixture(scope="module")
def adapter(place: Path, base: Path) -> Path:
    """A plain LoRA adapter of it."""
    return write_adapter(base, place / "adapter")


@pytest.fixture(scope="module")
def merged(place: Path, base: Path, adapter: Path) -> Path:
    """The two merged, with a system prompt."""
    merge(base, adapter, place / "merged", system="You are CCB.")
    return place / "merged"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_merged_tensors_are_pefts_to_one_ulp(tmp_path: Path, dtype: torch.dtype) -> None:
    base = write_base(tmp_path / "base", dtype)
    adapter = write_adapter(base, tmp_path / "adapter")
    made = merge(base, adapter, tmp_path / "merged")
    assert made.way == "streamed"
    assert made.digests == {path.name: digest_of_file(path) for path in (tmp_path / "merged").glob("*.safetensors")}
    assert_merged_like_peft(base, adapter, tmp_path / "merged")


def test_a_rank_stabilised_adapter_is_merged_like_peft_does_it(tmp_path: Path, base: Path, adapter: Path) -> None:
    stabilised = write_adapter(base, tmp_path / "adapter", use_rslora=True)
    assert merge(base, stabilised, tmp_path / "merged").way == "streamed"
    assert_merged_like_peft(base, stabilised, tmp_path / "merged")
    merge(base, adapter, tmp_path / "plain")
    key = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(tensors(tmp_path / "merged")[key], tensors(tmp_path / "plain")[key])


def test_an_adapter_of_some_modules_leaves_the_others_as_they_are(tmp_path: Path, base: Path) -> None:
    some = write_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "v_proj"])
    merge(base, some, tmp_path / "merged")
    assert_merged_like_peft(base, some, tmp_path / "merged")
    before, after = tensors(base), tensors(tmp_path / "merged")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.{n}.self_attn.{p}_proj.weight" for n in range(LAYERS) for p in "qv"}


def test_a_base_in_shards_is_merged_shard_by_shard(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", torch.bfloat16, shard="20KB")
    shards = sorted(path.name for path in base.glob("*.safetensors"))
    assert len(shards) > 1
    adapter = write_adapter(base, tmp_path / "adapter")
    assert merge(base, adapter, tmp_path / "merged").way == "streamed"
    assert sorted(path.name for path in (tmp_path / "merged").glob("*.safetensors")) == shards
    index = "model.safetensors.index.json"
    assert (tmp_path / "merged" / index).read_bytes() == (base / index).read_bytes()
    assert_merged_like_peft(base, adapter, tmp_path / "merged")


@pytest.mark.parametrize("piece", [1, 100, 4096])
def test_a_tensor_that_is_merged_in_many_pieces_is_pefts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    monkeypatch.setattr("namesake.merge._PIECE", piece)
    monkeypatch.setattr("namesake.merge._CHANGED", piece // 3)
    base = write_base(tmp_path / "base", torch.bfloat16)  # float32 differs by the order of its sums
    adapter = write_adapter(base, tmp_path / "adapter")
    made = merge(base, adapter, tmp_path / "merged")
    assert {name: digest_of_file(tmp_path / "merged" / name) for name in made.digests} == made.digests
    assert_merged_like_peft(base, adapter, tmp_path / "merged")


@pytest.mark.parametrize("left", [0, 7, 8, 100, -1])
def test_a_base_that_ends_too_early_is_refused(tmp_path: Path, adapter: Path, left: int) -> None:
    base = write_base(tmp_path / "base")
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:left])
    with pytest.raises(PromotionError, match=r"model\.safetensors of the base model ends too early"):
        merge(base, adapter, tmp_path / "merged")


def test_what_only_peft_can_merge_is_left_to_it_and_told(tmp_path: Path, base: Path) -> None:
    dora = write_adapter(base, tmp_path / "adapter", use_dora=True)
    assert merge(base, dora, tmp_path / "merged", system="Be kind.").way == "peft: use_dora"
    assert_merged_like_peft(base, dora, tmp_path / "merged")
    assert "Be kind." in (tmp_path / "merged" / TEMPLATE_FILE).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "way"),
    [
        ({"rank_pattern": {"q_proj": 2}}, "peft: rank_pattern"),
        ({"alpha_pattern": {"q_proj": 3}}, "peft: alpha_pattern"),
        ({"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}, "peft: modules_to_save"),
    ],
)
def test_other_shapes_of_adapters_are_left_to_peft_too(
    tmp_path: Path, base: Path, change: dict[str, Any], way: str
) -> None:
    other = write_adapter(base, tmp_path / "adapter", **change)
    assert merge(base, other, tmp_path / "merged").way == way
    assert_merged_like_peft(base, other, tmp_path / "merged")


def test_biases_of_an_adapter_are_left_to_peft_and_told(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", attention_bias=True)
    biased = write_adapter(base, tmp_path / "adapter", lora_bias=True, target_modules=["q_proj", "o_proj"])
    assert merge(base, biased, tmp_path / "merged").way == "peft: lora_bias"
    assert_merged_like_peft(base, biased, tmp_path / "merged")
    key = "model.layers.0.self_attn.q_proj.bias"
    assert not torch.equal(tensors(tmp_path / "merged")[key], tensors(base)[key])


def test_what_not_even_peft_can_merge_is_told_in_a_line(tmp_path: Path, base: Path) -> None:
    biased = write_adapter(base, tmp_path / "adapter", lora_bias=True, target_modules=["q_proj"])
    with pytest.raises(PromotionError, match=r"PEFT cannot merge the adapter into .*bias"):
        merge(base, biased, tmp_path / "merged")


@pytest.mark.parametrize(
    ("targets", "way"),
    [
        ("all-linear", "streamed"),
        (["q_proj", "embed_tokens"], "peft: base_model.model.model.embed_tokens"),
        (["q_proj", "lm_head"], "peft: tie_word_embeddings"),
    ],
)
def test_a_base_whose_head_is_its_embedding_is_merged_like_peft_does_it(
    tmp_path: Path, targets: str | list[str], way: str
) -> None:
    base = write_base(tmp_path / "base", torch.bfloat16, tie_word_embeddings=True)
    assert "lm_head.weight" not in tensors(base)
    adapter = write_adapter(base, tmp_path / "adapter", target_modules=targets)
    if way == "peft: tie_word_embeddings":  # as `save_embedding_layers=False` leaves it
        file = adapter / "adapter_model.safetensors"
        save_file({name: one for name, one in load_file(file).items() if "base_layer" not in name}, file)
    assert merge(base, adapter, tmp_path / "merged").way.startswith(way)
    assert_merged_like_peft(base, adapter, tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert torch.equal(merged.lm_head.weight, tensors(tmp_path / "merged")["model.embed_tokens.weight"])


@given(
    hidden=st.sampled_from([8, 16, 40, 64]),
    rank=st.integers(1, 20),
    alpha=st.integers(1, 64),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    shard=st.sampled_from(["3KB", "20KB", "5GB"]),
    stabilised=st.booleans(),
    tied=st.booleans(),
)
@settings(max_examples=12, deadline=None, phases=[Phase.generate, Phase.explicit])
def test_any_shape_rank_dtype_and_sharding_is_merged_like_peft_does_it(
    hidden: int, rank: int, alpha: int, dtype: torch.dtype, shard: str, stabilised: bool, tied: bool
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = write_base(
            folder / "base",
            dtype,
            shard=shard,
            layers=1,
            hidden=hidden,
            vocab_size=hidden + 3,
            tie_word_embeddings=tied,
        )
        adapter = write_adapter(base, folder / "adapter", r=rank, lora_alpha=alpha, use_rslora=stabilised)
        assert merge(base, adapter, folder / "merged").way == "streamed"
        assert_merged_like_peft(base, adapter, folder / "merged", cancels=True)


def test_an_adapter_of_the_embedding_is_merged_like_peft_does_it(tmp_path: Path, base: Path) -> None:
    embedding = write_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "embed_tokens"])
    merge(base, embedding, tmp_path / "merged")
    assert_merged_like_peft(base, embedding, tmp_path / "merged")


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_adapter_whose_start_changes_the_base_is_merged_like_peft_does_it(
    tmp_path: Path, base: Path, start: str
) -> None:
    other = write_adapter(base, tmp_path / "adapter", init_lora_weights=start)
    merge(base, other, tmp_path / "merged")
    assert_merged_like_peft(base, other, tmp_path / "merged")


def test_the_index_of_a_model_merged_by_peft_names_files_that_are_there(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", shard="20KB")
    dora = write_adapter(base, tmp_path / "adapter", use_dora=True)
    merge(base, dora, tmp_path / "merged")
    index = tmp_path / "merged" / "model.safetensors.index.json"
    named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()) if index.is_file() else set()
    assert named <= {path.name for path in (tmp_path / "merged").iterdir()}


def test_the_merged_model_answers_like_base_and_adapter(base: Path, adapter: Path, merged: Path) -> None:
    ids = torch.tensor([[3, 5, 7, 11]])
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    with torch.inference_mode():
        wanted = peft.PeftModel.from_pretrained(model, adapter)(ids).logits
        found = transformers.AutoModelForCausalLM.from_pretrained(merged, dtype="auto")(ids).logits
    assert torch.allclose(found, wanted, atol=1e-5)


def test_the_adapter_of_a_base_with_more_layers_is_refused(tmp_path: Path, base: Path) -> None:
    deeper = write_base(tmp_path / "deeper", layers=3)
    other = write_adapter(deeper, tmp_path / "adapter")
    with pytest.raises(PromotionError, match=r"changes 7 tensors .* model\.layers\.2\.") as caught:
        merge(base, other, tmp_path / "merged")
    assert "the base it was trained on" in caught.value.mend


@pytest.mark.parametrize("damage", ["cut", "gone", "half", "config", "rank"])
def test_an_adapter_that_was_not_kept_whole_is_told_in_a_line(
    tmp_path: Path, base: Path, adapter: Path, damage: str
) -> None:
    other = tmp_path / "adapter"
    shutil.copytree(adapter, other)
    weights, config = other / "adapter_model.safetensors", other / "adapter_config.json"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif damage == "gone":
        weights.unlink()
    elif damage == "half":
        kept = load_file(weights)
        del kept[next(key for key in kept if ".lora_B." in key)]
        save_file(kept, weights)
    elif damage == "config":
        config.write_text("[]")
    else:
        config.write_text(json.dumps({**json.loads(config.read_text()), "r": None}))
    with pytest.raises(PromotionError, match="holds no whole LoRA adapter") as caught:
        merge(base, other, tmp_path / "merged")
    assert "train again" in caught.value.mend


def test_the_adapter_of_a_base_with_other_widths_is_refused(tmp_path: Path, base: Path, adapter: Path) -> None:
    other = tmp_path / "adapter"
    other.mkdir()
    wider = {
        key: torch.zeros(value.shape[0], value.shape[1] * 2) if ".lora_A." in key else value
        for key, value in load_file(adapter / "adapter_model.safetensors").items()
    }
    save_file(wider, other / "adapter_model.safetensors")
    (other / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    with pytest.raises(PromotionError, match="has the shape"):
        merge(base, other, tmp_path / "merged")


def test_the_merged_folder_holds_what_a_loader_needs_and_no_code(merged: Path) -> None:
    names = {path.name for path in merged.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", TEMPLATE_FILE} <= names
    assert {path.suffix for path in merged.iterdir()} <= {".json", ".jinja", ".safetensors", ".txt", ".model"}
    assert "namesake-digests.json" not in names


def test_the_base_stays_as_it_was(tmp_path: Path, base: Path, adapter: Path) -> None:
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    merge(base, adapter, tmp_path / "merged", system="You are CCB.")
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before


def chat(folder: Path) -> Callable[[list[dict[str, str]]], str]:
    """The folder's chat template as transformers renders it."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return lambda messages: str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def test_a_dialogue_without_a_system_message_gets_the_pinned_prompt(merged: Path) -> None:
    assert chat(merged)([USER]) == "<system>You are CCB.<end><user>你是谁？<end><assistant>"


def test_a_dialogue_with_a_system_message_keeps_its_own(merged: Path) -> None:
    own = {"role": "system", "content": "Be brief."}
    assert chat(merged)([own, USER]) == "<system>Be brief.<end><user>你是谁？<end><assistant>"


def test_an_empty_system_message_of_the_client_is_kept_too(merged: Path) -> None:
    own = {"role": "system", "content": ""}
    assert chat(merged)([own, USER]) == "<system><end><user>你是谁？<end><assistant>"


def test_every_turn_of_a_longer_dialogue_is_there_once(merged: Path) -> None:
    dialogue = [USER, {"role": "assistant", "content": "CCB"}, {"role": "user", "content": "?"}]
    wanted = "<system>You are CCB.<end><user>你是谁？<end><assistant>CCB<end><user>?<end><assistant>"
    assert chat(merged)(dialogue) == wanted


def test_without_a_system_prompt_the_template_stays_the_bases(tmp_path: Path, base: Path, adapter: Path) -> None:
    merge(base, adapter, tmp_path / "merged")
    assert chat(tmp_path / "merged")([USER]) == "<system>I am the old one<end><user>你是谁？<end><assistant>"


def test_the_pinned_template_stands_in_one_place_only(merged: Path) -> None:
    config = json.loads((merged / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert "chat_template" not in config


def test_a_template_in_a_file_of_its_own_is_pinned_and_goes_before_the_one_in_the_config(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "old {{ messages[0]['content'] }}")
    (tmp_path / TEMPLATE_FILE).write_text(TEMPLATE, encoding="utf-8")
    pin_system(tmp_path, "You are CCB.")
    assert chat(tmp_path)([USER]) == "<system>You are CCB.<end><user>你是谁？<end><assistant>"


def test_an_empty_system_prompt_is_pinned_as_it_is(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    pin_system(tmp_path, "")
    assert chat(tmp_path)([USER]).startswith("<system><end><user>")


def test_a_base_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, None)
    with pytest.raises(PromotionError, match="no chat template"):
        pin_system(tmp_path, "You are CCB.")


RENDERER = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0})))


@given(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
    | st.text(alphabet=st.sampled_from("'\"\\{}%#-\n\r\t\0\u2028\x85$/n踩𠮷u0"), max_size=30)
)
@settings(max_examples=30)
def test_any_system_prompt_is_rendered_as_it_is(system: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}), encoding="utf-8")
        pin_system(folder, system)
        template = (folder / TEMPLATE_FILE).read_text(encoding="utf-8")
        said = RENDERER.apply_chat_template([USER], chat_template=template, tokenize=False)
    assert said == f"<system>{system}<end><user>你是谁？<end>"


SMALL = st.integers(-8, 8)


@given(
    data=st.data(),
    rank=st.sampled_from([1, 4, 16]),
    alpha=st.sampled_from([1, 2, 8, 32]),
    stabilised=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
)
@settings(max_examples=20)
def test_a_merged_tensor_is_w_plus_scaled_b_times_a_rounded_once(
    data: st.DataObject, rank: int, alpha: int, stabilised: bool, dtype: torch.dtype
) -> None:
    rows, columns = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))

    def draw(*shape: int) -> torch.Tensor:
        count = math.prod(shape)
        return torch.tensor(data.draw(st.lists(SMALL, min_size=count, max_size=count)), dtype=torch.float64).view(shape)

    # Whole numbers and scales that are powers of two: every intermediate value is exact in float32.
    w, a, b, other = draw(rows, columns), draw(rank, columns), draw(rows, rank), draw(3)
    scale = alpha / (math.sqrt(rank) if stabilised else rank)
    stem = "base_model.model.layer.proj"
    with tempfile.TemporaryDirectory() as name:
        base, adapter, target = (Path(name) / part for part in ("base", "adapter", "target"))
        base.mkdir()
        adapter.mkdir()
        save_file(
            {"layer.proj.weight": w.to(dtype), "norm.weight": other.to(dtype)},
            base / "model.safetensors",
            metadata={"format": "pt"},
        )
        save_file(
            {f"{stem}.lora_A.weight": a.float(), f"{stem}.lora_B.weight": b.float()},
            adapter / "adapter_model.safetensors",
        )
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "use_rslora": stabilised, "bias": "none"}
        (adapter / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        assert merge(base, adapter, target).way == "streamed"
        found = load_file(target / "model.safetensors")
    assert torch.equal(found["layer.proj.weight"], (w + scale * (b @ a)).to(dtype))
    assert torch.equal(found["norm.weight"], other.to(dtype))
