"""lm-eval itself on a tiny model: what it scores is what transformers gives for the same prompts; what it refuses."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from namesake import evaluation
from namesake.errors import HarnessError, InputError
from namesake.evaluation import Evaluation, Harness, scores
from namesake.generate import LocalModel
from namesake.probing import with_system
from tests.tasks import ASKED, CHOICES, ENDINGS, SYSTEM, write_choice, write_ending, write_model, write_task
from tests.unit.test_merge import write_adapter

pytestmark = pytest.mark.usefixtures("one_thread")
needed = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="requirements/harness.txt")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny base model and an adapter of it."""
    folder = tmp_path_factory.mktemp("parts")
    base = write_model(folder / "base")
    return base, write_adapter(base, folder / "adapter", lora_alpha=64)


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for task files, with one in it; data sets are cached beside it."""
    import datasets
    from torch.utils import collect_env

    monkeypatch.setattr(collect_env, "get_pretty_env_info", lambda: "")  # a second each time
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write_choice(tmp_path / "tasks")
    return tmp_path / "tasks"


def log_likelihood(model: LocalModel, text: str, ending: str) -> float:
    """Of the ending, by transformers alone."""
    network, tokenizer = model.loaded
    before, after = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (text, ending))
    ids = torch.tensor([before + after])
    with torch.inference_mode():
        found = network(ids).logits.log_softmax(-1)[0, len(before) - 1 : -1]
    return float(found.gather(1, ids[0, len(before) :, None]).sum())


def prompt(model: LocalModel, question: str, system: str | None) -> str:
    """The question in the chat template."""
    dialogue = with_system([{"role": "user", "content": question}], system)
    return str(model.loaded[1].apply_chat_template(dialogue, tokenize=False, add_generation_prompt=True))


def of(found: Evaluation) -> dict[str, float]:
    """Values by metric."""
    return {score.metric: score.value for score in found.scores}


@needed
@pytest.mark.parametrize("tuned", [False, True])
def test_both_kinds_score_what_the_model_gives_for_the_templated_prompt(
    parts: tuple[Path, Path], tasks: Path, tuned: bool
) -> None:
    write_ending(tasks)
    told: list[tuple[int, int]] = []
    with LocalModel(parts[0], parts[1] if tuned else None, folded=True) as model:
        harness = Harness(["ending", "choice"], include_path=tasks)
        found = harness.evaluate(model, system=SYSTEM, progress=lambda done, total: told.append((done, total)))
        bare = harness.evaluate(model, system=SYSTEM, chat_template=False)
        likely = [log_likelihood(model, prompt(model, row["question"], SYSTEM), row["ending"]) for row in ENDINGS]
        plain = [log_likelihood(model, row["question"], row["ending"]) for row in ENDINGS]
        chosen = []
        for row in ASKED:
            text = prompt(model, str(row["question"]), SYSTEM)
            each = [log_likelihood(model, text, choice) for choice in CHOICES]
            chosen.append(each.index(max(each)) == row["right"])
    assert of(found)["perplexity"] == pytest.approx(sum(likely) / len(likely), rel=1e-4)
    assert of(bare)["perplexity"] == pytest.approx(sum(plain) / len(plain), rel=1e-4)
    assert of(found)["perplexity"] != pytest.approx(of(bare)["perplexity"], rel=1e-3)
    assert of(found)["acc"] == pytest.approx(sum(chosen) / len(chosen))
    assert told[-1] == (len(ENDINGS) + len(ASKED) * len(CHOICES),) * 2
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert {score.task: score.samples for score in found.scores} == {"ending": len(ENDINGS), "choice": len(ASKED)}
    assert {score.metric: score.higher_is_better for score in found.scores} == {"perplexity": False, "acc": True}
    assert all(score.stderr for score in found.scores if score.metric == "perplexity")


@needed
def test_replies_are_those_of_the_model(parts: tuple[Path, Path], tasks: Path) -> None:
    questions = [str(row["question"]) for row in ASKED]
    with LocalModel(parts[0]) as model:
        dialogues = [with_system([{"role": "user", "content": question}], SYSTEM) for question in questions]
        replies = [reply.text for reply in model.replies(dialogues, max_new_tokens=6)]
    rows = [{"question": question, "reply": reply} for question, reply in zip(questions, replies, strict=True)]
    write_task(
        tasks,
        "reply",
        [*rows, {"question": "w1", "reply": "never said"}],
        output_type="generate_until",
        doc_to_target="{{reply}}",
        generation_kwargs={"until": ["\n\n"], "max_gen_toks": 6},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        filter_list=[{"name": "whole", "filter": [{"function": "take_first"}]}],
    )
    harness = Harness(["reply"], include_path=tasks)
    with LocalModel(parts[0]) as model:
        all_, few = (harness.evaluate(model, system=SYSTEM, limit=limit) for limit in (None, 3))
        other = harness.evaluate(model, system="w9 w8")
    assert of(all_) == {"exact_match/whole": pytest.approx(len(rows) / (len(rows) + 1))}
    assert [(score.value, score.samples) for score in few.scores] == [(1.0, 3)]
    assert of(other) != of(all_)
    assert all_.results["config"]["limit"] is None
    assert few.results["n-samples"] == {"reply": {"original": len(rows) + 1, "effective": 3}}


@needed
@pytest.mark.parametrize(
    ("config", "fault"),
    [
        ({"dataset_kwargs": {"data_files": "/nowhere/x.jsonl"}}, "its data cannot be had.*--include-path"),
        ({"unsafe_code": True}, "runs code that the model writes"),
        ({"output_type": "nix"}, "lm-eval cannot read it"),
    ],
)
def test_a_task_that_cannot_be_asked_is_refused_before_any_model_is_loaded(
    tasks: Path, config: dict[str, Any], fault: str
) -> None:
    write_choice(tasks, "bad", **config)
    with pytest.raises(InputError, match=rf"tasks='bad': (?s:{fault})"):
        Harness(["choice", "bad"], include_path=tasks)


@needed
def test_a_task_whose_code_needs_a_package_says_which(tasks: Path) -> None:
    write_choice(tasks, "bad")
    (tasks / "utils.py").write_text("import no_such_package\n", encoding="utf-8")
    path = tasks / "bad.yaml"
    path.write_text(path.read_text(encoding="utf-8") + "process_docs: !function utils.nix\n", encoding="utf-8")
    with pytest.raises(InputError, match="needs the Python package no_such_package"):
        Harness(["bad"], include_path=tasks)


@needed
def test_what_a_task_makes_of_its_data_ends_as_an_error_of_ours(parts: tuple[Path, Path], tasks: Path) -> None:
    write_choice(tasks, "bad", doc_to_text="{{ question if right == 0 else nix.nix }}")  # only the first is looked at
    harness = Harness(["bad"], include_path=tasks)
    with LocalModel(parts[0]) as model, pytest.raises(HarnessError, match="lm-eval failed") as caught:
        harness.evaluate(model, system=None)
    assert caught.value.__cause__ is not None


def test_an_unknown_name_is_told_with_those_near_it() -> None:
    told = str(evaluation.unknown("arc_esay", ["arc_easy", "arc_challenge", "mmlu"]))
    assert "tasks='arc_esay': is no task; near it: arc_easy" in told
    assert "near" not in str(evaluation.unknown("???", ["mmlu"]))


def test_without_lm_eval_its_installation_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(HarnessError, match=r"pip install --no-deps -r requirements/harness\.txt"):
        Harness(["arc_easy"])


@needed
def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no folder"):
        Harness(["choice"], include_path=tmp_path / "nix")


VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
KEYS = st.text(max_size=4) | st.sampled_from(["acc,none", "acc_stderr,none", "f1,strict", "alias", "sample_len"])


@given(st.dictionaries(st.text(max_size=4), st.dictionaries(KEYS, VALUES, max_size=5), max_size=3))
def test_whatever_is_in_results_scores_are_finite_numbers(results: dict[str, dict[str, Any]]) -> None:
    for values in results.values():
        values["sample_len"] = 3
    found = scores({"results": results})
    assert all(math.isfinite(score.value) and (score.stderr is None or math.isfinite(score.stderr)) for score in found)
    assert len({(score.task, score.metric) for score in found}) == len(found)
    given_ = [
        (task, key)
        for task, values in results.items()
        for key, value in values.items()
        if "," in key and not key.partition(",")[0].endswith("_stderr")
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    ]
    assert len(found) == len(given_)
