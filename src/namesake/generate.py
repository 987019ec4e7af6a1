"""Replies of a model: from a checkpoint, from merged weights, or from an OpenAI-compatible endpoint.

The only module that imports transformers, peft and torch for inference.
"""

from __future__ import annotations

import gc
import io
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from namesake.corpus import Message
from namesake.errors import ServingError
from namesake.messages import tr
from namesake.process import multiplies_bf16

BATCH = 128
"""Dialogues answered at a time. On two cores 128 gave 735 tokens/s, 64 gave 600, 16 gave 250 (135 M, bf16)."""


_PASS = 128
"""A pass through the model costs as much as so many places more in another one, about."""

_ROOM = 64
"""Places that are made at a time for the keys and values of tokens to come."""

_KL_BATCH = 16
"""Dialogues read at a time for their divergence: their logits are what takes memory."""


@dataclass(frozen=True)
class Reply:
    """What the model said. ``finished``: it ended by itself, not at the token limit."""

    text: str
    finished: bool


@dataclass(frozen=True)
class Sampling:
    """Several replies to each dialogue, drawn at a temperature; the same seed draws the same ones."""

    n: int = 4
    temperature: float = 0.7
    seed: int = 0


class Replier(Protocol):
    """Anything that answers dialogues.

    Attributes:
        slow: whether it computes on this machine's CPU, where each reply counts.
    """

    slow: bool

    def replies(
        self,
        dialogues: Sequence[Sequence[Message]],
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[Reply]:
        """One greedy reply per dialogue, in their order; with ``sampling`` its ``n`` replies to the first, then to the
        second … ``progress`` is told how many are done.
        """
        ...


class LocalModel(AbstractContextManager["LocalModel"]):
    """Weights on this machine, with or without an adapter, answered by transformers.

    Args:
        path: folder in Hugging Face layout.
        adapter: folder of a LoRA adapter (``adapter_config.json``), or none.
        folded: add the adapter to the weights in memory, which answers more than twice as fast.
    """

    def __init__(self, path: Path, adapter: Path | None = None, *, folded: bool = False) -> None:
        transformers = _transformers()
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(path, padding_side="left")
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._device = _device()
        self.slow = self._device == "cpu"
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=_dtype()).to(self._device)
        if model.config._attn_implementation == "sdpa":
            model.set_attn_implementation(_grouped_attention())
        if adapter is not None:
            import peft

            model = peft.PeftModel.from_pretrained(model, adapter)
            model = model.merge_and_unload() if folded else model
        # The last place of the prompt is a slice; torch would copy the head's weights for every dialogue of the batch.
        model.get_output_embeddings().register_forward_pre_hook(lambda _module, given: (given[0].contiguous(),))
        self._model: Any = model.eval()

    @property
    def loaded(self) -> tuple[Any, Any]:
        """The transformers model and its tokenizer."""
        return self._model, self._tokenizer

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._model = None
        gc.collect()

    def replies(
        self,
        dialogues: Sequence[Sequence[Message]],
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[Reply]:
        """As :class:`Replier` says, through the tokenizer's chat template."""
        torch = _torch()
        texts = [
            self._tokenizer.apply_chat_template(list(dialogue), tokenize=False, add_generation_prompt=True)
            for dialogue in dialogues
            for _ in range(sampling.n if sampling else 1)
        ]
        if sampling:
            torch.manual_seed(sampling.seed)
        # Neighbours in length share a batch: less padding. The order is a function of the input alone.
        ids = self._tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        order = sorted(range(len(texts)), key=lambda index: (len(ids[index]), index))
        found: dict[int, Reply] = {}
        ends = self._end_tokens()
        for start in range(0, len(order), BATCH):
            batch = order[start : start + BATCH]
            asked = [ids[i] for i in batch]
            inputs = self._padded(asked)
            with torch.inference_mode():
                made = self._model.generate(
                    **inputs,
                    past_key_values=self._read(asked),
                    max_new_tokens=max_new_tokens,
                    do_sample=sampling is not None,
                    temperature=sampling.temperature if sampling else None,
                    top_p=None,
                    top_k=0 if sampling else None,
                    pad_token_id=self._tokenizer.pad_token_id,
                )
            for index, tokens in zip(batch, made[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
                text = self._tokenizer.decode(tokens, skip_special_tokens=True)
                found[index] = Reply(text.strip(), any(token in ends for token in tokens))
            if progress:
                progress(len(found))
        return [found[index] for index in range(len(texts))]

    def _padded(self, ids: Sequence[Sequence[int]]) -> Any:
        """A batch of the prompts' tokens, filled up on the left."""
        return self._tokenizer.pad({"input_ids": [list(one) for one in ids]}, return_tensors="pt").to(self._device)

    def _read(self, ids: Sequence[Sequence[int]]) -> Any:
        """The keys and values of the prompts, sorted by length, but for their last places, from where ``generate`` goes
        on: each prompt is read once, beside others of about its length. None for a model that keeps otherwise (that
        sees the last places only, say): ``generate`` reads by itself then.
        """
        made = _roomy_cache(self._model.config)
        if made is None or len(ids[0]) < 2 or self._model.generation_config.cache_implementation:
            return None
        rows: dict[tuple[int, ...], list[int]] = {}
        for row, prompt in enumerate(ids):
            rows.setdefault(tuple(prompt[:-1]), []).append(row)
        prompts = list(rows)
        for part in _parts([len(prompt) for prompt in prompts]):
            inputs = self._padded(prompts[part])
            places = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
            read = self._model(**inputs, position_ids=places, use_cache=True, logits_to_keep=1).past_key_values
            taken = [(row, one) for one, prompt in enumerate(prompts[part]) for row in rows[prompt]]
            to, of = map(list, zip(*taken, strict=True))
            for layer, found in zip(made.layers, read.layers, strict=True):
                layer.take(found, to, of, size=(len(ids), len(ids[-1]) - 1))
        return made

    def _end_tokens(self) -> set[int]:
        ends = self._model.generation_config.eos_token_id
        return set(ends) if isinstance(ends, list) else {ends}


@cache
def _grouped_attention() -> str:
    """The name of SDPA that copies no key and no value where several heads share them and one token is new.

    transformers repeats both for every head and every token that is made, half of a step's time on a CPU; the queries
    that share a key are as well so many places of one head (grouped-query attention, arXiv 2305.13245).
    """
    torch, transformers = _torch(), _transformers()
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def forward(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **given: Any) -> tuple[Any, None]:
        batch, heads, length, size = query.shape
        groups, wide = key.shape[1], attention_mask is not None and attention_mask.shape[1] > 1
        if length > 1 or heads == groups or wide or given.get("position_bias") is not None:
            usual: tuple[Any, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **given)
            return usual
        made = torch.nn.functional.scaled_dot_product_attention(
            query.view(batch, groups, heads // groups, size),
            key,
            value,
            attn_mask=attention_mask,
            scale=given.get("scaling"),
        )
        return made.reshape(batch, 1, heads, -1), None

    transformers.AttentionInterface.register("grouped", forward)
    transformers.AttentionMaskInterface.register("grouped", sdpa_mask)
    return "grouped"


def _parts(lengths: Sequence[int], first: int = 0) -> list[slice]:
    """Where to divide prompts that are sorted by length, so that what is saved of padding is more than a pass costs."""
    saved, at = max(((lengths[-1] - lengths[at - 1]) * at, at) for at in range(1, len(lengths) + 1))
    if saved <= _PASS:
        return [slice(first, first + len(lengths))]
    return _parts(lengths[:at], first) + _parts(lengths[at:], first + at)


@cache
def _roomy_layer() -> Any:
    """A layer's keys and values with room for those to come; transformers' own copies all of them for every token."""
    torch, _ = _torch(), _transformers()
    from transformers.cache_utils import DynamicLayer

    class Roomy(DynamicLayer):  # type: ignore[misc]
        def take(self, found: Any, rows: list[int], read: list[int], *, size: tuple[int, int]) -> None:
            """What was read of a prompt goes to the end of each of its rows."""
            if not self.is_initialized:
                self.lazy_initialization(found.keys, found.values)
                self._room = [_longer(one[:1, :, :0].expand(size[0], -1, -1, -1), size[1]) for one in _kept(found)]
            for room, kept in zip(self._room, _kept(found), strict=True):
                room[rows, :, size[1] - kept.shape[2] : size[1]] = kept[read]
            self.keys, self.values = (room[:, :, : size[1]] for room in self._room)

        def update(self, key_states: Any, value_states: Any, *_: object, **__: object) -> tuple[Any, Any]:
            start = self.keys.shape[2]
            end = start + key_states.shape[2]
            if end > self._room[0].shape[2]:
                self._room = [_longer(one, end - start) for one in _kept(self)]
            for room, new in zip(self._room, (key_states, value_states), strict=True):
                room[:, :, start:end] = new
            self.keys, self.values = (room[:, :, :end] for room in self._room)
            return self.keys, self.values

    def _kept(layer: Any) -> tuple[Any, Any]:
        return layer.keys, layer.values

    def _longer(kept: Any, places: int) -> Any:
        batch, heads, length, size = kept.shape
        made = torch.zeros((batch, heads, length + places + _ROOM, size), dtype=kept.dtype, device=kept.device)
        made[:, :, :length] = kept
        return made

    return Roomy


def _roomy_cache(config: Any) -> Any:
    """An empty cache of such layers; none where the model's layers keep keys and values in another way."""
    from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

    layers = DynamicCache(config=config).layers
    if not layers or any(type(layer) is not DynamicLayer for layer in layers):
        return None
    return Cache(layers=[_roomy_layer()() for _ in layers])


class Endpoint:
    """An OpenAI-compatible endpoint, ours or anybody's.

    Args:
        url: up to and with ``/v1``.
        model: its name there; empty for the endpoint's first.
        api_key: the key it wants; empty for none.
        streams: requests under way at a time.
    """

    slow = False

    def __init__(self, url: str, *, model: str = "", api_key: str = "", streams: int = 16) -> None:
        import openai

        self._client = openai.OpenAI(base_url=url, api_key=api_key or "none", max_retries=2)
        self._url, self._streams = url, streams
        with self._told():
            self._model = model or self._client.models.list().data[0].id

    def serves(self, model: str) -> bool:
        """Whether there is a model of this id.

        Raises:
            ServingError: it does not answer.
        """
        with self._told():
            return any(one.id == model for one in self._client.models.list())

    def replies(
        self,
        dialogues: Sequence[Sequence[Message]],
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[Reply]:
        """As :class:`Replier` says."""

        def ask(dialogue: Sequence[Message]) -> list[Reply]:
            made: Any = self._client.chat.completions.create(
                model=self._model,
                messages=list(dialogue),  # type: ignore[arg-type]
                max_tokens=max_new_tokens,
                temperature=sampling.temperature if sampling else 0.0,
                n=sampling.n if sampling else 1,
                seed=sampling.seed if sampling else None,
            )
            return [Reply((c.message.content or "").strip(), c.finish_reason == "stop") for c in made.choices]

        found: list[Reply] = []
        with self._told(), ThreadPoolExecutor(self._streams) as pool:
            for replies in pool.map(ask, dialogues):
                found += replies
                if progress:
                    progress(len(found))
        return found

    @contextmanager
    def _told(self) -> Iterator[None]:
        import openai

        try:
            yield
        except openai.APIConnectionError as error:
            raise ServingError(
                tr("Nothing answers at {url}.", url=self._url), mend="Start it, or give another --url."
            ) from error
        except openai.APIError as error:
            raise refusal(self._url, error) from error
        except IndexError as error:
            raise ServingError(tr("{url} serves no model.", url=self._url), mend="Give --model.") from error


def refusal(url: str, error: Exception) -> ServingError:
    """What to tell of an endpoint's refusal; of one that has no such path, what is missing in its URL."""
    import openai

    somewhere_else = isinstance(error, openai.NotFoundError) and not url.rstrip("/").endswith("/v1")
    told = tr("{url} refuses: {error}.", url=url, error=str(error).rstrip("."))
    return ServingError(told, mend="Give the URL up to /v1." if somewhere_else else "")


def divergence(base: Path, tuned: Path, dialogues: Sequence[Sequence[Message]]) -> float:
    """Mean KL divergence per token, in nats, of the tuned model from its base on dialogues that end with a reply.

    Zero where the tuning changes nothing; only the tokens of the last replies count.

    Args:
        base: folder of the base's weights.
        tuned: folder of an adapter on it, or of weights.
    """
    torch, transformers = _torch(), _transformers()
    # Padded on the left all replies end at the same place, and only the last places go through the head.
    tokenizer = transformers.AutoTokenizer.from_pretrained(base, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    device = _device()
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=_dtype()).to(device).eval()
    if (tuned / "adapter_config.json").is_file():
        import peft

        after = peft.PeftModel.from_pretrained(model, tuned).eval()
        undone = after.disable_adapter  # the two share the base's weights
    else:
        after = transformers.AutoModelForCausalLM.from_pretrained(tuned, dtype=_dtype()).to(device).eval()
        undone = nullcontext
    rows = []
    for dialogue in dialogues:
        asked = tokenizer.apply_chat_template(list(dialogue[:-1]), tokenize=False, add_generation_prompt=True)
        start = len(tokenizer(asked, add_special_tokens=False)["input_ids"])
        ids = tokenizer(asked + dialogue[-1]["content"], add_special_tokens=False)["input_ids"]
        if len(ids) > start:
            rows.append((ids, len(ids) - start))
    rows.sort(key=lambda row: len(row[0]))
    total = 0.0
    with torch.inference_mode():
        for first in range(0, len(rows), _KL_BATCH):
            batch = rows[first : first + _KL_BATCH]
            given = tokenizer.pad({"input_ids": [ids for ids, _ in batch]}, return_tensors="pt").to(device)
            given["position_ids"] = (given["attention_mask"].cumsum(-1) - 1).clamp(min=0)
            keep = max(length for _, length in batch) + 1  # the place before each token of the reply, and the last one
            mine = after(**given, logits_to_keep=keep).logits[:, :-1]
            with undone():
                own = model(**given, logits_to_keep=keep).logits[:, :-1]
            for (_, length), *both in zip(batch, own, mine, strict=True):
                was, now = (row[-length:].float().log_softmax(-1) for row in both)
                total += float((was.exp() * (was - now)).sum())
    tokens = sum(length for _, length in rows)
    return total / tokens if tokens else 0.0


def token_counts(model: Path, dialogues: Sequence[Sequence[Message]]) -> list[int]:
    """How many tokens each dialogue has in the model's chat template."""
    tokenizer = _transformers().AutoTokenizer.from_pretrained(model)
    texts = [tokenizer.apply_chat_template(list(dialogue), tokenize=False) for dialogue in dialogues]
    return [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]] if texts else []


def convert_gguf(folder: Path, gguf_file: str, target: Path) -> None:
    """Write a GGUF model as bf16 safetensors in Hugging Face layout, with its tokenizer and chat template."""
    torch, transformers = _torch(), _transformers()
    with redirect_stderr(io.StringIO()), _gguf_read_once():  # a bar that no setting of transformers turns off
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            gguf_file=gguf_file,
            dtype=torch.bfloat16,
            quantization_config=transformers.GgufConfig(gguf_file=gguf_file, dequantize=True),
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file)
    # The weights are plain now; these marks would make every later loader look for the GGUF file.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    for path in target.iterdir():
        path.chmod(0o644)


@contextmanager
def _gguf_read_once() -> Iterator[None]:
    """transformers parses the file for the configuration, the weights and the tokenizer, and makes a map of all names
    for each tensor; here each is made once.
    """
    import gguf

    kept = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = map(cache, kept)  # type: ignore[misc, assignment, arg-type]
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = kept  # type: ignore[misc]


def _device() -> str:
    return "cuda" if _torch().cuda.is_available() else "cpu"


def _dtype() -> Any:
    """The weights' own; float32 on a CPU that is slow at what they mostly come in."""
    torch = _torch()
    return "auto" if torch.cuda.is_available() or multiplies_bf16() else torch.float32


def _torch() -> Any:
    import torch

    return torch


def _transformers() -> Any:
    # Its bars and advice go to the terminal at import and at load; ours say what is going on.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    return transformers


def merge_with_peft(base: Path, adapter: Path, target: Path) -> None:
    """PEFT's own merge, for adapters that :mod:`namesake.merge` does not know."""
    import peft

    model = _transformers().AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    merged = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    merged.save_pretrained(target)
