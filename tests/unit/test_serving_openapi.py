"""What the OpenAPI description allows is taken, what it forbids is refused, and neither fails the gateway."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.config import SchemathesisConfig
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi.checks import RejectedPositiveData

from namesake_serving.requests import FIELDS
from namesake_serving.traces import Traces, Unknown
from tests.unit.test_serving_gateway import BODIES, CHAT, KEY, RESPONSES, TEXT, Front, front

DESCRIPTION = Path(__file__).parents[2] / "docs" / "guide" / "reference" / "openapi.json"
UNSAID = re.compile(r"tool_choice|stream_options|top_logprobs|.+\.(schema|parameters)")
"""Refused for what stands in another field, or within a JSON schema, which the description cannot say."""


@pytest.fixture(scope="module")
def gate() -> Iterator[Front]:
    """The gateway on a free port, in a thread of its own."""
    ready, end, found = threading.Event(), threading.Event(), []

    async def serve() -> None:
        async with front(api_keys=(KEY,), webhook_secret="secret", traces=True, traces_share=0) as one:
            found.append(one)
            ready.set()
            while not end.is_set():
                await asyncio.sleep(0.05)

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    with pytest.MonkeyPatch.context() as patch:
        # What MLflow says is in tests/contract/test_traces.py; here nobody waits for it.
        patch.setattr(Traces, "start", lambda _: None)
        patch.setattr(Traces, "feedback", AsyncMock(side_effect=Unknown))
        thread.start()
        assert ready.wait(20)
        try:
            yield found[0]
        finally:
            end.set()
            thread.join(20)


schema = schemathesis.openapi.from_dict(
    json.loads(DESCRIPTION.read_text(encoding="utf-8")),
    config=SchemathesisConfig.from_dict({"generation": {"mode": "all"}, "auth": {"openapi": {"key": {"bearer": KEY}}}}),
)


@schema.parametrize()
@settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_every_request_that_it_describes_and_every_one_it_forbids_is_answered_as_it_says(
    case: schemathesis.Case, gate: Front
) -> None:
    response = case.call(base_url=f"http://127.0.0.1:{gate.port}", timeout=5)
    try:
        case.validate_response(response)
    except FailureGroup as group:
        unsaid = response.status_code == 400 and UNSAID.fullmatch(response.json()["error"]["param"] or "")
        others = [one for one in group.exceptions if not (unsaid and isinstance(one, RejectedPositiveData))]
        if others:
            raise


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=())),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.parametrize("path", [CHAT, TEXT, RESPONSES])
@given(data=st.data())
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_whatever_is_in_a_field_is_no_failure_of_ours(path: str, data: st.DataObject, gate: Front) -> None:
    more: dict[str, Any] = data.draw(st.dictionaries(st.sampled_from(sorted(FIELDS[path])), JSON, max_size=3))
    body = json.dumps({**BODIES[path], **more}).encode("utf-8", "surrogatepass")
    asked = asyncio.run(gate.ask("POST", path, f"Authorization: Bearer {KEY}", body=body))
    assert asked.status in {200, 400, 404}
