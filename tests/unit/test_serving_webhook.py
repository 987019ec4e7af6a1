"""Calls of MLflow's webhook: only what is signed, fresh and new wakes the poll."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow.webhooks.delivery import _generate_hmac_signature

from namesake_serving.webhook import PATH, TOLERANCE, Webhook
from tests.unit.test_serving_gateway import Front, Reply, front, in_a_loop

SECRET, NOW = "s3cret", 1_800_000_000
BODY = json.dumps({"entity": "model_version_alias", "action": "created"}).encode()


class Clock:
    """A time that stands until it is moved."""

    def __init__(self) -> None:
        self.now = float(NOW)

    def __call__(self) -> float:
        return self.now


def call(body: bytes = BODY, *, secret: str = SECRET, delivery: str = "d1", stamp: str = str(NOW)) -> dict[str, str]:
    """The headers that MLflow sends with the body, signed by MLflow's own function."""
    signature = _generate_hmac_signature(secret, delivery, stamp, body.decode())
    return {"x-mlflow-delivery-id": delivery, "x-mlflow-timestamp": stamp, "x-mlflow-signature": signature}


def test_what_mlflow_signs_is_let_in() -> None:
    Webhook(SECRET, Clock()).check(call(), BODY)


def test_the_signature_is_what_mlflows_documentation_says() -> None:
    digest = hmac.new(SECRET.encode(), f"d1.{NOW}.".encode() + BODY, hashlib.sha256).digest()
    Webhook(SECRET, Clock()).check({**call(), "x-mlflow-signature": f"v1,{base64.b64encode(digest).decode()}"}, BODY)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        call(secret="other"),
        {**call(), "x-mlflow-delivery-id": "d2"},
        {**call(), "x-mlflow-timestamp": str(NOW + 1)},
        {**call(), "x-mlflow-signature": call()["x-mlflow-signature"].lower()},
        {**call(), "x-mlflow-signature": call()["x-mlflow-signature"].removeprefix("v1,")},
        {**call(), "x-mlflow-signature": "\udcff"},
        call(delivery=""),
        call(stamp=str(NOW - int(TOLERANCE) - 1)),
        call(stamp=str(NOW + int(TOLERANCE) + 1)),
        call(stamp="-5"),
        call(stamp="½"),
        call(stamp=""),
        call(stamp="9" * 5000),
    ],
)
def test_anything_else_is_not(headers: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"not right|too far off"):
        Webhook(SECRET, Clock()).check(headers, BODY)


def test_another_body_is_not() -> None:
    with pytest.raises(ValueError, match="not right"):
        Webhook(SECRET, Clock()).check(call(), BODY + b" ")


def test_a_delivery_counts_once() -> None:
    clock = Clock()
    webhook = Webhook(SECRET, clock)
    webhook.check(call(), BODY)
    for later in (0.0, TOLERANCE - 1, TOLERANCE):
        clock.now = NOW + later
        with pytest.raises(ValueError, match="before"):
            webhook.check(call(), BODY)
    webhook.check(call(delivery="d2"), BODY)


@given(st.lists(st.tuples(st.integers(0, 5), st.floats(0, 3 * TOLERANCE)), max_size=30))
def test_no_delivery_ever_counts_twice(calls: list[tuple[int, float]]) -> None:
    clock = Clock()
    webhook, taken = Webhook(SECRET, clock), set()
    for delivery, wait in calls:
        clock.now += wait
        try:
            webhook.check(call(delivery=str(delivery)), BODY)
        except ValueError:
            continue
        assert delivery not in taken
        taken.add(delivery)


async def post(gate: Front, headers: dict[str, str], body: bytes = BODY, *more: str) -> Reply:
    """A call of the webhook."""
    return await gate.ask("POST", PATH, *(f"{name}: {value}" for name, value in headers.items()), *more, body=body)


@in_a_loop
async def test_a_signed_call_wakes_the_poll_without_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    async with front(webhook_secret=SECRET, api_keys=("sk-other",)) as gate:
        monkeypatch.setattr("namesake_serving.webhook.time.time", lambda: NOW)
        gate.gateway._webhook = Webhook(SECRET, Clock())
        assert (await post(gate, call())).status == 200
        assert gate.serving.woken == 1
        for refused in (await post(gate, call()), await post(gate, call(secret="other", delivery="d2"))):
            assert refused.status == 401
            assert refused.error["code"] == "invalid_signature"
        assert gate.serving.woken == 1
        assert gate.figure("namesake_webhooks_total") == 1


@in_a_loop
async def test_without_a_secret_there_is_no_such_route() -> None:
    async with front() as gate:
        assert (await post(gate, call())).status == 404


@in_a_loop
async def test_the_host_of_the_webhooks_address_is_answered() -> None:
    async with front(webhook_secret=SECRET, webhook_url="http://serving.example:8000") as gate:
        assert (await gate.ask("GET", "/health", host="serving.example:8000")).status == 200
        assert (await gate.ask("GET", "/health", host="other.example")).status == 400
        assert (await gate.ask("GET", "/health", host="")).status == 400
