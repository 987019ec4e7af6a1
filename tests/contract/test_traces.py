"""Answers of the real gateway as traces on a real MLflow server, and feedback that lands on them."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import mlflow
import pytest

from namesake import registry
from namesake_serving import traces
from tests.contract.conftest import Point
from tests.servers import free_port
from tests.unit.loops import within
from tests.unit.test_serving_gateway import BODIES, CHAT, STREAM, Front, Reply, event, front, live, whole

pytestmark = pytest.mark.timeout(180)

FEEDBACK, KEY = "/v1/feedback", "sk-alice"
AS_ALICE = f"Authorization: Bearer {KEY}"
USAGE = {"prompt_tokens": 31, "total_tokens": 36, "completion_tokens": 5}
in_a_loop = within(90)


@pytest.fixture
def model(server: str, tracking_at: Point) -> tuple[str, str]:
    """A registered model on the server with one version: its name and the version's LoggedModel."""
    tracking_at(server)
    name = f"t{time.time_ns()}"
    experiment = mlflow.create_experiment(name)
    run = mlflow.MlflowClient().create_run(experiment)
    logged = mlflow.initialize_logged_model(name="model", source_run_id=run.info.run_id, experiment_id=experiment)
    uri = f"models:/{logged.model_id}"
    registry.register(name, uri, run_id=run.info.run_id, identity="踩踩背 CCB", tags={}, description="")
    return name, logged.model_id


async def until(done: Callable[[], bool]) -> None:
    """Wait; the test's time limit ends it."""
    while not done():
        await asyncio.sleep(0.02)


def logged(gate: Front, result: str = "logged") -> float:
    """How many traces have come to that."""
    return gate.figure(f'namesake_traces_total{{result="{result}"}}')


def found(model_id: str) -> dict[str, Any]:
    """The LoggedModel's traces by their ids, as MLflow finds them."""
    experiment = mlflow.MlflowClient().get_logged_model(model_id).experiment_id
    got = mlflow.search_traces(model_id=model_id, locations=[experiment], return_type="list")
    return {one.info.trace_id: one for one in got}


async def say(gate: Front, about: Reply, value: object, **more: object) -> Reply:
    """Feedback on a reply, by its trace."""
    body = {"trace_id": about.headers["x-namesake-trace"], "value": value, **more}
    return await gate.ask("POST", FEEDBACK, AS_ALICE, body=body)


@in_a_loop
async def test_each_answer_is_a_trace_of_its_versions_logged_model_and_feedback_lands_on_it(
    model: tuple[str, str], tmp_path: Path
) -> None:
    name, model_id = model
    keys = tmp_path / "keys.txt"
    keys.write_text(f"alice {sha256(KEY.encode()).hexdigest()}\n")
    async with front(traces=True, api_keys_file=keys) as gate:
        gate.serving.traffic.live = live(gate.upstream, 1, name=name)
        gate.upstream.whole = whole("我是踩踩背。", usage=USAGE)
        gate.upstream.script = (event("我是踩踩背。", usage=USAGE), b"data: [DONE]\n\n")
        before = await gate.ask("POST", CHAT, AS_ALICE)
        await until(lambda: logged(gate) == 1)  # feedback has 15 s: not for the start of writer and server as well
        asked = {**BODIES[CHAT], "temperature": 0.5, "user": "session-1\0"}  # PostgreSQL takes no NUL
        one = await gate.ask("POST", CHAT, AS_ALICE, body=asked)
        good = await say(gate, one, True)  # the trace itself may not be written yet
        assert good.status == 200, good.body
        streamed = await gate.ask("POST", CHAT, AS_ALICE, body=STREAM)
        gate.upstream.status = 500
        failed = await gate.ask("POST", CHAT, AS_ALICE)
        refused = await gate.ask("POST", CHAT, AS_ALICE, body={"messages": []})
        assert [reply.status for reply in (one, streamed, failed, refused)] == [200, 200, 500, 400]
        assert "x-namesake-trace" not in refused.headers  # nothing answered
        await until(lambda: logged(gate) == 4)

        # Every kind of value, by either id; what the same key says again under a name replaces what it said before.
        again = await say(gate, one, False, rationale="错了")
        number = await gate.ask(
            "POST", FEEDBACK, AS_ALICE, body={"request_id": one.headers["x-request-id"], "value": 0.5, "name": "score"}
        )
        text = await say(gate, one, "不是老爷爷吗？", name="comment")
        assert [reply.status for reply in (again, number, text)] == [200, 200, 200]
        none = await gate.ask("POST", FEEDBACK, AS_ALICE, body={"trace_id": f"tr-{'0' * 32}", "value": True})
        assert (none.status, none.error["code"]) == (404, "trace_not_found")
        assert gate.figure('namesake_feedback_total{result="logged"}') == 4
        assert gate.figure('namesake_feedback_total{result="unknown"}') == 1

    kept = found(model_id)
    del kept[before.headers["x-namesake-trace"]]
    assert kept.keys() == {reply.headers["x-namesake-trace"] for reply in (one, streamed, failed)}
    first = kept[one.headers["x-namesake-trace"]]
    assert first.info.client_request_id == one.headers["x-request-id"]
    assert first.info.trace_metadata["mlflow.modelId"] == model_id
    assert first.info.trace_metadata["mlflow.trace.session"] == "session-1\N{REPLACEMENT CHARACTER}"
    assert first.info.trace_metadata["mlflow.trace.user"] == "alice"
    assert json.loads(first.info.trace_metadata["mlflow.trace.tokenUsage"])["output_tokens"] == 5
    assert (first.info.state.value, first.info.tags["namesake.version"]) == ("OK", f"{name}-v1")
    answer, engine = first.data.spans
    told = answer.attributes
    assert (told["namesake.run"], told["namesake.alias"], told["http.response.status_code"]) == (
        "run1",
        "champion",
        200,
    )
    assert (told["gen_ai.usage.input_tokens"], told["gen_ai.request.temperature"]) == (31, 0.5)
    assert engine.parent_id == answer.span_id
    assert 0 < engine.attributes["gen_ai.response.time_to_first_chunk"] < 5
    assert answer.start_time_ns <= engine.start_time_ns <= engine.events[0].timestamp <= engine.end_time_ns
    assert kept[streamed.headers["x-namesake-trace"]].data.spans[0].attributes["gen_ai.usage.output_tokens"] == 5
    assert kept[failed.headers["x-namesake-trace"]].info.state.value == "ERROR"
    for trace in kept.values():
        assert not [text for text in ("你是谁", "踩踩背。") if text in json.dumps(trace.to_dict(), ensure_ascii=False)]

    said = {one.assessment_id: one for one in first.info.assessments}
    assert all((one.source.source_type, one.source.source_id) == ("HUMAN", "alice") for one in said.values())
    assert {one.name: one.value for one in said.values() if one.valid} == {
        "feedback": False,
        "score": 0.5,
        "comment": "不是老爷爷吗？",
    }
    assert said[again.json["id"]].rationale == "错了"
    assert said[again.json["id"]].overrides == good.json["id"]


@in_a_loop
async def test_texts_are_kept_when_asked_for_and_a_writer_that_dies_is_started_again(model: tuple[str, str]) -> None:
    name, model_id = model
    async with front(traces=True, traces_text=True) as gate:
        gate.serving.traffic.live = live(gate.upstream, 1, name=name)
        one = await gate.ask("POST", CHAT, body=STREAM)
        await until(lambda: logged(gate) == 1)
        os.kill(gate.gateway._traces._process.pid, signal.SIGKILL)  # type: ignore[union-attr]
        await until(lambda: gate.gateway._traces._process is None)  # type: ignore[union-attr]
        two = await gate.ask("POST", CHAT)
        await until(lambda: logged(gate) == 2)
        three = await gate.ask("POST", CHAT)
    kept = found(model_id)  # the last was written when the gateway closed
    assert kept.keys() == {reply.headers["x-namesake-trace"] for reply in (one, two, three)}
    first = kept[one.headers["x-namesake-trace"]]
    assert (first.info.request_preview, first.info.response_preview) == ("你是谁？", "我是踩踩背。")
    assert first.data.spans[0].inputs["messages"] == BODIES[CHAT]["messages"]
    assert first.data.spans[0].outputs["choices"][0]["message"]["content"] == "我是踩踩背。"


@in_a_loop
async def test_where_mlflow_is_away_every_answer_comes_and_traces_are_counted_as_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(traces, "MOST", 3)
    async with front(traces=True) as gate:
        replies = [await gate.ask("POST", CHAT) for _ in range(5)]
        assert {reply.status for reply in replies} == {200}
        assert logged(gate, "dropped") == 2  # no more than three wait
        body = {"trace_id": replies[0].headers["x-namesake-trace"], "value": True}
        said = await gate.ask("POST", FEEDBACK, body=body)
        assert (said.status, said.headers["retry-after"], said.error["code"]) == (503, "2", "unavailable")
        await until(lambda: logged(gate, "failed") == 3)
        assert gate.figure('namesake_feedback_total{result="failed"}') == 1


def test_a_writer_whose_gateway_was_killed_ends_by_itself_also_with_something_to_tell(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    words = [sys.executable, "-m", "namesake_serving.trace_writer"]
    writer = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert writer.stdin is not None
    assert writer.stdout is not None
    writer.stdout.close()
    said = {"trace": "tr-1", "name": "feedback", "value": True, "rationale": None, "source": "alice"}
    writer.stdin.write(json.dumps({"feedback": 1, "until": time.time() + 60, **said}).encode() + b"\n")
    writer.stdin.close()
    assert writer.wait(60) == 0


@in_a_loop
async def test_a_share_of_none_traces_none_and_without_traces_there_is_no_feedback() -> None:
    async with front(traces=True, traces_share=0) as gate:
        assert "x-namesake-trace" not in (await gate.ask("POST", CHAT)).headers
        assert "namesake_traces_total{" not in gate.serving.metrics.text().decode()
    async with front() as gate:
        assert "x-namesake-trace" not in (await gate.ask("POST", CHAT)).headers
        assert (await gate.ask("POST", FEEDBACK, body={"value": True})).status == 404


@in_a_loop
async def test_feedback_is_let_in_as_every_other_request_is() -> None:
    body = {"trace_id": f"tr-{'0' * 32}", "value": True}
    async with front(traces=True, api_keys=(KEY,), requests_per_minute=2, max_body_bytes=1024) as gate:
        for headers in ([], ["Authorization: Bearer wrong"], [f"Authorization: Basic {KEY}"], [f"X-Api-Key: {KEY}"]):
            assert (await gate.ask("POST", FEEDBACK, *headers, body=body)).error["code"] == "invalid_api_key"
        assert (await gate.ask("POST", FEEDBACK, AS_ALICE, AS_ALICE, body=body)).status == 400
        assert (await gate.ask("POST", FEEDBACK, AS_ALICE, body=body, host="evil.example")).status == 400
        assert (await gate.ask("GET", FEEDBACK, AS_ALICE)).status == 405
        for target in ("//v1/feedback", "/v1%2ffeedback", "/v1/feedback/", "/V1/feedback"):
            assert (await gate.ask("POST", target, AS_ALICE, body=body)).status == 404
        long = {**body, "rationale": "x" * 1024}
        assert (await gate.ask("POST", FEEDBACK, AS_ALICE, body=long)).error["code"] == "body_too_large"
        assert (await gate.ask("POST", FEEDBACK, AS_ALICE, body={**body, "value": None})).error["param"] == "value"
        assert (await gate.ask("POST", FEEDBACK, AS_ALICE, body=body)).error["code"] == "rate_limit_exceeded"
        assert "namesake_feedback_total{" not in gate.serving.metrics.text().decode()  # none got as far as MLflow
