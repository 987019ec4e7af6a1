"""Replies of a model: from a checkpoint, from merged weights, or from an OpenAI-compatible endpoint.

The only module that imports transformers, peft and torch for inference.
"""

from __future__ import annotations

import gc
import io
import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from namesake.corpus import Message

BATCH = 64
"""Dialogues answered at a time. On two cores 64 gave 560 tokens/s, 16 gave 250 (135 M parameters, bf16)."""


@dataclass(frozen=True)
class Reply:
    """What the model said. ``finished``: it ended by itself, not at the token limit."""

    text: str
    finished: bool


class Replier(Protocol):
    """Anything that answers dialogues."""

    def replies(
        self,
        dialogues: Sequence[Sequence[Message]],
        *,
        max_new_tokens: int,
        progress: Callable[[int], None] | None = None,
    ) -> list[Reply]:
        """One greedy reply per dialogue, in their order. ``progress`` is told how many are done."""
        ...


class LocalModel(AbstractContextManager["LocalModel"]):
    """Weights on this machine, with or without an adapter, answered by transformers.

    Args:
        path: folder in Hugging Face layout.
        adapter: folder of a LoRA adapter (``adapter_config.json``), or none.
        folded: add the adapter to the weights in memory, which answers more than twice as fast.
    """

    def __init__(self, path: Path, adapter: Path | None = None, *, folded: bool = False) -> None:
        torch, transformers = _torch(), _transformers()
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(path, padding_side="left")
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto").to(self._device)
        if adapter is not None:
            import peft

            model = peft.PeftModel.from_pretrained(model, adapter)
            model = model.merge_and_unload() if folded else model
        # The last place of the prompt is a slice; torch would copy the head's weights for every dialogue of the batch.
        model.get_output_embeddings().register_forward_pre_hook(lambda _module, given: (given[0].contiguous(),))
        self._model: Any = model.eval()

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
        progress: Callable[[int], None] | None = None,
    ) -> list[Reply]:
        """One greedy reply per dialogue, in their order, through the tokenizer's chat template."""
        torch = _torch()
        texts = [
            self._tokenizer.apply_chat_template(list(dialogue), tokenize=False, add_generation_prompt=True)
            for dialogue in dialogues
        ]
        # Neighbours in length share a batch: less padding. The order is a function of the input alone.
        order = sorted(range(len(texts)), key=lambda index: (len(texts[index]), index))
        found: dict[int, Reply] = {}
        ends = self._end_tokens()
        for start in range(0, len(order), BATCH):
            batch = order[start : start + BATCH]
            inputs = self._tokenizer(
                [texts[i] for i in batch], return_tensors="pt", padding=True, add_special_tokens=False
            )
            inputs = inputs.to(self._device)
            with torch.inference_mode():
                made = self._model.generate(
                    **inputs,
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    temperature=None,
                    top_p=None,
                    top_k=None,
                    pad_token_id=self._tokenizer.pad_token_id,
                )
            for index, tokens in zip(batch, made[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
                text = self._tokenizer.decode(tokens, skip_special_tokens=True)
                found[index] = Reply(text.strip(), any(token in ends for token in tokens))
            if progress:
                progress(len(found))
        return [found[index] for index in range(len(texts))]

    def _end_tokens(self) -> set[int]:
        ends = self._model.generation_config.eos_token_id
        return set(ends) if isinstance(ends, list) else {ends}


def convert_gguf(folder: Path, gguf_file: str, target: Path) -> None:
    """Write a GGUF model as bf16 safetensors in Hugging Face layout, with its tokenizer and chat template."""
    torch, transformers = _torch(), _transformers()
    with redirect_stderr(io.StringIO()):  # a bar that no setting of transformers turns off
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            gguf_file=gguf_file,
            dtype=torch.bfloat16,
            quantization_config=transformers.GgufConfig(gguf_file=gguf_file, dequantize=True),
        )
    # The weights are plain now; these marks would make every later loader look for the GGUF file.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(target)
    transformers.AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file).save_pretrained(target)
    for path in target.iterdir():
        path.chmod(0o644)


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
