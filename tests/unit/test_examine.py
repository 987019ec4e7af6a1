"""Targets of ``namesake probe`` and ``namesake gate``, and what is shown of a scorecard."""

from __future__ import annotations

import json

import pytest

from namesake import examine, probing
from namesake.errors import InputError
from namesake.gate import Policy
from namesake.identity import Identity
from namesake.terminal import Screen
from tests.json_page import assert_as_shown
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


def test_wrong_replies_are_shown_with_their_fault(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "240")
    card = probing.probe(Fixed("我是老爷爷，由踩踩背开发。"), IDENTITY, system=None)
    examine.shown(card, Screen())
    out = capfd.readouterr().out
    assert "swapped" in out
    assert "leak" in out
    assert "identity" in out


def test_the_card_as_json_has_metrics_and_every_reply() -> None:
    card = probing.probe(Fixed("?"), IDENTITY, system=None, slices=True)
    data = json.loads(examine.to_json(card))
    assert_as_shown("probe", data)
    assert data["metrics"] == card.metrics
    assert len(data["slices"]["customer"]) == len(data["identity"])
