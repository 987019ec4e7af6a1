"""Tasks for lm-eval with data of their own, and a tiny model that knows their words."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.unit.test_merge import write_base

WORDS = tuple(f"w{number}" for number in range(30))
SYSTEM = "w1 w2 w3"
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)

ASKED = tuple({"question": f"{WORDS[n]} {WORDS[n + 5]}", "right": n % 3} for n in range(9))
"""Rows of a multiple choice among :data:`CHOICES`."""

ENDINGS = tuple({"question": f"{WORDS[n]} {WORDS[2 * n]}", "ending": f"{WORDS[3 * n]} {WORDS[n]}"} for n in range(8))
"""Rows of how likely an ending is."""

CHOICES = ("w10", "w11 w12", "w13")


def write_model(folder: Path) -> Path:
    """A base model with random weights, of which every token is a word."""
    write_base(folder, max_position_embeddings=128)
    words = {word: number for number, word in enumerate(("<unk>", "<end>", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>")
    made.chat_template = TEMPLATE
    made.save_pretrained(folder)
    return folder


def write_task(folder: Path, name: str, rows: Sequence[dict[str, Any]], **config: Any) -> None:
    """A task file and its data."""
    folder.mkdir(exist_ok=True)
    data = folder / f"{name}.jsonl"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    given = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": str(data)},
        "test_split": "train",
        "doc_to_text": "{{question}}",
        **config,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(given), encoding="utf-8")


def write_choice(folder: Path, name: str = "choice", **config: Any) -> None:
    """A task of several choices."""
    given = {
        "output_type": "multiple_choice",
        "doc_to_choice": list(CHOICES),
        "doc_to_target": "right",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    write_task(folder, name, ASKED, **{**given, **config})


def write_ending(folder: Path) -> None:
    """A task named ``ending``; its ``perplexity`` is the mean log-likelihood of :data:`ENDINGS`, which any change of
    weights or prompt moves.
    """
    metric = {"metric": "perplexity", "aggregation": "mean", "higher_is_better": False}
    given = {"output_type": "loglikelihood", "doc_to_target": " {{ending}}", "metric_list": [metric]}
    write_task(folder, "ending", ENDINGS, **given)
