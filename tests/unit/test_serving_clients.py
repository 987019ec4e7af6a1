"""OpenAI's client for JavaScript, unmodified, against the gateway; LiteLLM is too large to be installed for a test."""

from __future__ import annotations

import pytest
from benchmarks.clients import run


def test_openais_client_for_javascript_does_what_it_does_elsewhere() -> None:
    with run.gateway() as url:
        try:
            found = run.checks("openai-node", url, "ccb", run.KEY)
        except run.Missing as why:
            pytest.skip(str(why))
    assert len(found) == 10
    assert not {name: why for name, why in found.items() if why}
