"""Targets of ``namesake probe`` and ``namesake gate``, and what is shown of a scorecard."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from namesake import compare, corpus, examine, probing, registry
from namesake.cli import app
from namesake.errors import InputError
from namesake.gate import Decision, Policy
from namesake.identity import Identity
from namesake.manifest import Manifest
from namesake.probing import Scorecard
from namesake.registry import Version
from namesake.terminal import Screen
from tests.json_page import assert_as_shown
from tests.servers import OpenAIServer
from tests.unit.test_probe import Fixed

IDENTITY = Identity.parse("踩踩背 CCB", "老爷爷 OldGrandpa")


@pytest.mark.parametrize("target", ["", "ccb", "a" * 31, "../x", "ftp://x/v1"])
def test_something_that_is_no_target_is_refused(target: str) -> None:
    with pytest.raises(InputError, match="no run id, models:/ reference or URL"):
        examine.examine(examine.Request(target), Screen())
    with pytest.raises(InputError, match="no run id, models:/ reference or URL"):
        examine.judge(target, Policy(), Screen())


def test_an_endpoint_needs_both_names() -> None:
    with pytest.raises(InputError, match="needed for an endpoint"):
        examine.examine(examine.Request("http://127.0.0.1:1/v1", name="踩踩背 CCB"), Screen())


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_share_of_the_questions_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(InputError, match="held_out"):
        examine.examine(examine.Request("http://127.0.0.1:1/v1", held_out=share), Screen())


def test_no_questions_at_all_are_refused_with_the_mend() -> None:
    with pytest.raises(InputError, match=r"held_out=0\.0: leaves nothing to ask\. Give --questions beside it\."):
        examine.examine(examine.Request("http://127.0.0.1:1/v1", held_out=0.0), Screen())
    with pytest.raises(InputError, match=r"sampled=0: asks nothing\. Give 1 or more, or ask without slices\."):
        examine.examine(examine.Request("http://127.0.0.1:1/v1", sampled=0), Screen())


def test_own_questions_are_asked_beside_the_held_out_ones_or_alone(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.jsonl").write_text(
        '{"question": "Who?", "asks": ["name"]}\n{"question": "1+1?", "answers": ["2"]}\n', encoding="utf-8"
    )
    with OpenAIServer(lambda _: "I am CCB.") as server:
        request = examine.Request(
            server.url, "踩踩背 CCB", "老爷爷 OldGrandpa", questions=str(tmp_path / "mine.jsonl"), slices=False
        )
        both = examine.examine(request, Screen(errors=True))
        asked = len(server.asked)
        alone = examine.examine(replace(request, held_out=0.0), Screen(errors=True))
        assert len(server.asked) - asked == 2
    held_out = corpus.heldout()
    assert asked == len(held_out.identity) + len(held_out.plain) + 2
    assert both.own is not None
    assert both.metrics == both.card.metrics
    assert both.record()["own"]["metrics"] == {"identity": 1.0, "plain": 0.0, "leak": 1.0}
    assert (alone.metrics, alone.record()["identity"], alone.own) == ({}, [], both.own)
    examine.shown(alone, Screen())
    out = capfd.readouterr().out
    assert "your questions: identity 1 of 1" in out
    assert "your questions: plain 0 of 1" in out
    assert "1+1?" in out  # what is wrong is shown
    assert "%" not in out


def test_wrong_replies_are_shown_with_their_fault(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "240")
    card = probing.probe(Fixed("我是老爷爷，由踩踩背开发。"), IDENTITY, system=None)
    before = probing.Scorecard((), tuple(replace(a, scores={**a.scores, "right": True}) for a in card.plain))
    examine.shown(examine.Outcome(card, base=before, kl_to_base=0.12345), Screen())
    out = capfd.readouterr().out
    assert "swapped" in out
    assert "leak" in out
    assert "identity" in out
    assert "plain against the base's 100.0%: -100.0%, 95% interval -100.0% to -100.0%" in out
    assert "divergence from the base: 0.1235 nats a token" in out


def test_the_card_as_json_has_metrics_and_every_reply() -> None:
    card = probing.probe(Fixed("?"), IDENTITY, system=None, slices=True)
    data = json.loads(examine.to_json(examine.Outcome(card, own=card, base=card, kl_to_base=0.1)))
    assert_as_shown("probe", data)
    change = {"base_plain": 0.0, "plain_change": 0.0, "plain_change_low": 0.0, "plain_change_high": 0.0}
    assert data["metrics"] == {**card.metrics, **change, "kl_to_base": 0.1}
    assert len(data["base"]) == len(data["plain"])
    assert len(data["slices"]["customer"]) == len(data["identity"])


@pytest.mark.parametrize("words", [["gate"], ["compare"]])
def test_an_alias_that_moves_between_two_questions_mixes_no_two_versions(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = itertools.count(3)

    def resolve(uri: str) -> Version:
        number = next(numbers) if "@" in uri else int(uri.rpartition("/")[2])
        return Version("ccb", number, "run", "source", "READY", {}, 0)

    asked: list[str] = []
    monkeypatch.setattr(registry, "resolve", resolve)
    monkeypatch.setattr(examine, "served", lambda target, *_, **__: asked.append(target) or 1.0)
    monkeypatch.setattr(examine, "judge", lambda target, *_, **__: asked.append(target) or Decision(True, ()))
    monkeypatch.setattr(examine, "ask", lambda target, *_, **__: asked.append(target) or Scorecard((), ()))
    if words == ["gate"]:
        done = CliRunner().invoke(app, ["gate", "models:/ccb@champion", "--served", "http://127.0.0.1:1/v1"])
        assert done.exit_code == 0
    else:
        monkeypatch.setattr(compare, "checked", lambda version, _key: asked.append(version.uri) or Path("/nowhere"))
        record = Manifest(vars(IDENTITY), None, {"id": "b"}, "run", {}, {}, {}, {}, {})
        monkeypatch.setattr(Manifest, "read", lambda _folder: record)
        request = compare.Request("models:/ccb@champion", "models:/ccb/1", ask=True)
        side = compare._side(request.a, request, Screen())
        assert side.name == "models:/ccb/3 (champion)"
    assert asked == ["models:/ccb/3"] * 2
    assert examine.fixed("http://me@host/v1") == "http://me@host/v1"
