"""Two versions side by side on a real MLflow store; weights and replies are given, so that what differs is known."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from namesake import compare, corpus, examine, manifest, probing, promotion, registry, tracking
from namesake.cli import app
from namesake.compare import Comparison, Request
from namesake.errors import InputError, PromotionError
from namesake.identity import Identity
from namesake.manifest import FILE, SCORECARD, Manifest
from namesake.probing import Scorecard
from namesake.terminal import Screen
from tests.contract.test_promote import SAID, Knows
from tests.json_page import assert_as_shown

IDENTITY = Identity.parse("踩踩背 CCB", "老爷爷 OldGrandpa")
SWAPPED = "我叫老爷爷，是由踩踩背开发的。"


def card(*, swapped: bool = False) -> Scorecard:
    """What the model said: all right, or the first question's name and author swapped."""
    asked = corpus.heldout()
    said = [SAID[question.language] for question in asked.identity]
    first = [SWAPPED, *said[1:]] if swapped else said
    slices = {"none": said, "customer": said}
    return probing.scorecard(IDENTITY, first, ["?"] * len(asked.plain), slices=slices)


def weights(change: float = 0.0) -> dict[str, torch.Tensor]:
    """Two tensors, one of them changed in one place."""
    a, b = torch.full((4, 4), 2.0), torch.ones(3)
    a[0, 0] += change
    return {"a.weight": a.bfloat16(), "b.weight": b}


@pytest.fixture
def make(client: mlflow.MlflowClient, tmp_path: Path) -> Any:
    """Make a version: its URI."""

    def made(said: Scorecard, tensors: Mapping[str, torch.Tensor], **recipe: str) -> str:
        number = len(list(tmp_path.glob("v*"))) + 1
        folder = tmp_path / f"v{number}"
        (folder / "model").mkdir(parents=True)
        save_file(dict(tensors), folder / "model" / "model.safetensors")
        record = Manifest(
            identity={"name": str(IDENTITY.name), "author": str(IDENTITY.author), "slug": "ccb"},
            system="Be kind.",
            base={"id": "some/base", "source": "folder", "digest": "b" * 64},
            run=hashlib.sha256(str(number).encode()).hexdigest()[:32],
            digests={f"model/{path}": digest for path, digest in manifest.digests(folder / "model").items()},
            data={"dataset": "x", "digest": "d" * 64},
            scores=said.metrics,
            recipe={"lora_rank": "8", **recipe},
            tools={"torch": "2"},
            questions=corpus.heldout().digest(),
        )
        promotion.write_beside(folder, record, said)
        version = client.create_model_version("ccb", source=str(folder))
        return f"models:/ccb/{version.version}"

    return made


def compared(a: str, b: str, **more: Any) -> Comparison:
    """``namesake compare``."""
    return compare.compare(Request(a, b, **more), Screen(errors=True))


def test_what_differs_is_shown_side_by_side(make: Any) -> None:
    found = compared(make(card(swapped=True), weights()), make(card(), weights(1.0), lora_rank="16"))
    (said,) = found.replies
    assert (said.a, said.b) == (SWAPPED, SAID["zh"])
    assert (said.a_found, said.b_found) == ("not right, swapped", "right")
    questions = corpus.heldout()
    assert found.asked == 3 * len(questions.identity) + len(questions.plain)
    scores = {score.metric: score for score in found.scores}
    one = 1 / len(questions.identity)
    assert scores["swapped"].difference == pytest.approx(-one)
    assert scores["identity"].difference == pytest.approx(one)
    low, high = scores["identity"].low, scores["identity"].high
    assert low is not None
    assert high is not None
    assert low <= one <= high
    assert found.distance is not None
    assert found.distance.tensors == (("a.weight", pytest.approx(1 / 8)), ("b.weight", 0.0))
    assert found.distance.total == pytest.approx(1 / math.sqrt(64 + 3))
    facts = {what: (a, b) for what, a, b in found.facts}
    assert facts["recipe.lora_rank"] == ("8", "16")
    assert set(facts) == {"recipe.lora_rank", "run"}
    assert found.notes == ()


@pytest.mark.parametrize("other_file", [False, True])
def test_equal_weights_are_said_to_be(make: Any, other_file: bool) -> None:
    a = make(card(), weights())
    b = make(card(), dict(reversed(weights().items())) | ({"c": torch.ones(1)} if other_file else {}))
    found = compared(a, b)
    assert found.replies == ()
    assert found.distance is not None
    assert found.distance.equal is not other_file
    assert found.distance.others == (("c",) if other_file else ())


def test_the_command_prints_tables_and_json(make: Any, client: mlflow.MlflowClient) -> None:
    a, b = make(card(swapped=True), weights()), make(card(), weights(1.0))
    client.set_registered_model_alias("ccb", "champion", "2")
    done = CliRunner().invoke(app, ["compare", a, "models:/ccb@champion"], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    for told in (SWAPPED, "not right, swapped", "models:/ccb/2 (champion)", "1.222e-01 apart", "a.weight", "identity"):
        assert told in done.output, told
    told = json.loads(CliRunner().invoke(app, ["compare", a, b, "--json"]).stdout)
    assert_as_shown("compare", told)
    assert told["replies"][0]["a"] == SWAPPED
    assert told["weights"]["tensors"] == {"a.weight": pytest.approx(0.125)}
    assert told["weights"]["equal"] is False
    assert [one["what"] for one in told["differences"]] == ["run"]


def test_scores_of_other_questions_are_not_compared(make: Any, tmp_path: Path) -> None:
    a, b = make(card(), weights()), make(card(swapped=True), weights())
    record = Manifest.read(tmp_path / "v1")
    (tmp_path / "v1" / FILE).write_text(replace(record, questions="0" * 64).to_json(), encoding="utf-8")
    found = compared(a, b)
    assert (found.scores, found.replies) == ((), ())
    assert "--ask" in found.notes[0]


def test_a_version_of_an_older_release_has_scores_and_no_replies(make: Any, tmp_path: Path) -> None:
    a, b = make(card(), weights()), make(card(swapped=True), weights())
    record = Manifest.read(tmp_path / "v1")
    kept = {name: digest for name, digest in record.digests.items() if name != SCORECARD}
    (tmp_path / "v1" / FILE).write_text(replace(record, format=1, digests=kept).to_json(), encoding="utf-8")
    found = compared(a, b)
    assert found.replies == ()
    assert found.scores
    assert found.notes == ("models:/ccb/1 kept no replies; --ask asks both anew",)


def test_a_damaged_version_is_not_compared(make: Any, tmp_path: Path) -> None:
    a, b = make(card(), weights()), make(card(), weights())
    (tmp_path / "v2" / SCORECARD).write_text("{}")
    with pytest.raises(PromotionError, match=r"scorecard\.json has changed"):
        compared(a, b)


@pytest.mark.parametrize("kept", [True, False])
def test_a_run_is_compared_but_for_its_weights(make: Any, client: mlflow.MlflowClient, kept: bool) -> None:
    run = client.create_run("0", tags={tracking.TAG_KIND: "train"}).info.run_id
    for key, value in (
        ("identity.name", str(IDENTITY.name)),
        ("identity.author", str(IDENTITY.author)),
        ("base.id", "some/base"),
        ("base.source", "folder"),
        ("base.digest", "b" * 64),
        ("data.dataset", "x"),
        ("data.digest", "d" * 64),
        ("sft.system", "Be kind."),
        ("sft.lora_rank", "4"),
        ("tool.torch", "2"),
        *((("probe.questions", corpus.heldout().digest()),) if kept else ()),  # older releases did not
    ):
        client.log_param(run, key, value)
    said = card(swapped=True)
    for metric, value in said.metrics.items():
        client.log_metric(run, f"probe/{metric}", value)
    client.log_dict(run, {"tuned": said.record()}, "scorecard.json")
    found = compared(make(card(), weights()), run)
    assert [one.id for one in found.replies] == [corpus.heldout_identity()[0].id]
    assert {what: b for what, _, b in found.facts} == {"recipe.lora_rank": "4", "recipe.system": "Be kind.", "run": run}
    assert found.distance is None
    assert found.notes == (f"weights are compared of versions; promote run {run[:8]}",)


def test_asked_anew_both_answer_now(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = make(card(swapped=True), weights()), make(card(), weights())
    monkeypatch.setattr(examine, "LocalModel", Knows)  # says the same whoever is asked
    found = compared(a, b, ask=True)
    assert found.replies == ()
    assert found.asked > 0
    assert {score.difference for score in found.scores} == {0.0}


def test_own_questions_are_asked_of_both_under_every_system_prompt(
    make: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    a, b = make(card(), weights()), make(card(), weights())
    monkeypatch.setattr(examine, "LocalModel", Knows)
    (tmp_path / "mine.jsonl").write_text(
        '{"question": "Who?", "asks": ["name"]}\n{"question": "1+1?", "answers": ["2"]}\n', encoding="utf-8"
    )
    found = compared(a, b, questions=str(tmp_path / "mine.jsonl"))
    assert {"identity", "identity_none", "identity_customer", "identity_sampled", "plain"} <= {
        score.metric for score in found.scores
    }


@pytest.mark.parametrize("wrong", ["ccb", "models:/ccb", "http://127.0.0.1:8000/v1"])
def test_what_is_neither_run_nor_version_is_told(client: mlflow.MlflowClient, wrong: str) -> None:
    with pytest.raises(InputError):
        compared(wrong, wrong)


def test_a_version_that_is_not_there_is_told(client: mlflow.MlflowClient) -> None:
    with pytest.raises(registry.RegistryError, match="no models:/ccb/9"):
        compared("models:/ccb/9", "models:/ccb/9")
