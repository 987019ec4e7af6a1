"""What the OpenAPI description allows and forbids fails no real engine, and is answered in the shapes that it has."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.config import SchemathesisConfig
from schemathesis.specs.openapi.checks import positive_data_acceptance

from namesake_serving.requests import FIELDS
from namesake_serving.settings import Settings
from tests.anything import altered
from tests.e2e.conftest import Way, served
from tests.e2e.test_follow import ask, engines
from tests.unit.test_serving_gateway import BODIES, CHAT, RESPONSES, TEXT
from tests.unit.test_serving_openapi import DESCRIPTION, JSON
from tests.unit.test_serving_requests import RICH

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

MOST = 8
"""Tokens of a reply; the usual bound would have the engine talk for a minute where a request names none."""


def _here(one: dict[str, Any]) -> dict[str, Any]:
    """A part of the description as it holds for a server with that bound and without keys."""
    if one.get("maximum") == Settings.model_fields["max_tokens"].default:
        one["maximum"] = MOST
    one.pop("security", None)
    return one


schema = schemathesis.openapi.from_dict(
    json.loads(DESCRIPTION.read_text(encoding="utf-8"), object_hook=_here),
    config=SchemathesisConfig.from_dict({"generation": {"mode": "all"}}),
).include(path=[CHAT, TEXT, RESPONSES])
SETTINGS = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def endpoint(way: Way) -> Iterator[str]:
    """A server whose replies are short; in the end the same engine says what it said at first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NAMESAKE_SERVE_MAX_TOKENS", str(MOST))
        with served(way.place, "--eager") as url:
            before = engines(url), ask(url, max_tokens=MOST)
            yield url
            assert (engines(url), ask(url, max_tokens=MOST)) == before


@schema.parametrize()
@settings(SETTINGS, max_examples=40, phases=[Phase.explicit, Phase.generate])
def test_what_it_describes_is_answered_or_refused_in_its_shapes_and_what_it_forbids_is_refused(
    case: schemathesis.Case, endpoint: str
) -> None:
    response = case.call(base_url=endpoint.removesuffix("/v1"), timeout=60)
    # vLLM refuses more than a description can say (a token that its vocabulary lacks): with 400, never 5xx.
    case.validate_response(response, excluded_checks=[positive_data_acceptance])
    assert response.status_code < 500


@pytest.mark.parametrize("path", [CHAT, TEXT, RESPONSES])
@given(data=st.data())
@settings(SETTINGS, max_examples=60)
def test_whatever_is_in_a_field_is_no_failure_of_the_engine(path: str, data: st.DataObject, endpoint: str) -> None:
    more: dict[str, Any] = data.draw(st.dictionaries(st.sampled_from(sorted(FIELDS[path])), JSON, max_size=3))
    is_no_failure(endpoint, path, {**BODIES[path], **more})


@pytest.mark.parametrize("path", [CHAT, TEXT, RESPONSES])
@given(data=st.data())
@settings(SETTINGS, max_examples=60)
def test_whatever_is_at_any_place_is_no_failure_of_the_engine(path: str, data: st.DataObject, endpoint: str) -> None:
    # The embedded model has no parser of calls, for whose lack the engine would refuse all else.
    whole = {key: value for key, value in RICH[path].items() if key not in {"tools", "tool_choice"}}
    bodies = [body for body in altered(whole, data.draw(JSON)) if isinstance(body, dict)]
    is_no_failure(endpoint, path, data.draw(st.sampled_from(bodies)))


@pytest.mark.parametrize("value", [{"maxLength": ["踩踩背" * 20]}, {"x": 1 << 64}], ids=["long Chinese", "65 bits"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_that_llguidance_fails_at_is_refused(value: dict[str, Any], stream: bool, endpoint: str) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": value}}
    body = {**BODIES[CHAT], "response_format": schema, "stream": stream}
    assert httpx.post(f"{endpoint}/chat/completions", json=body, timeout=60).status_code == 400


def is_no_failure(endpoint: str, path: str, body: dict[str, Any]) -> None:
    """It is answered or refused; within a stream, too, where an error comes as an event."""
    content = json.dumps(body).encode("utf-8", "surrogatepass")
    headers = {"content-type": "application/json"}
    response = httpx.post(f"{endpoint.removesuffix('/v1')}{path}", content=content, headers=headers, timeout=60)
    assert response.status_code in {200, 400, 404}, response.text
    assert '"code": 5' not in response.text
