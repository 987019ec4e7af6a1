"""The front with more than one answerer behind it: the base, adapters, a challenger that has a share, and copies."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from pathlib import Path

import aiohttp
import pytest

from namesake_serving.traffic import Answerer, Live
from tests.unit.loops import within
from tests.unit.test_serving_gateway import (
    BODIES,
    CHAT,
    DIE,
    END,
    HEAD,
    STREAM,
    Front,
    event,
    front,
    live,
    said,
    upstream,
    whole,
)

in_a_loop = within(20)


def as_adapter(one: Live, model: str) -> Live:
    """The same version under its name in an engine of adapters."""
    return Live(one.stored, one.engine, model)


def with_challenger(gate: Front, engine: object, share: float = 1) -> Live:
    """Version 4 has a share of the requests."""
    gate.serving.routing.share = share
    gate.serving.routing.challenger.live = rival = live(engine, 4, system="Be brief.")  # type: ignore[arg-type]
    return rival


@pytest.mark.parametrize("body", [BODIES[CHAT], STREAM], ids=["whole", "streamed"])
@in_a_loop
async def test_an_adapter_is_asked_by_its_name_and_clients_see_the_versions(body: dict[str, object]) -> None:
    async with front() as gate:
        gate.serving.traffic.live = as_adapter(gate.live, "v3-0a1b")
        gate.upstream.whole = gate.upstream.whole.replace(b'"namesake"', b'"v3-0a1b"')
        gate.upstream.script = [event("我是").replace(b'"namesake"', b'"v3-0a1b"'), END]
        reply = await gate.ask("POST", CHAT, body=body)
        assert gate.upstream.asked[0][1]["model"] == "v3-0a1b"
        assert reply.headers["x-namesake-version"] == "ccb-v3"
        assert b'"model":"ccb-v3"' in reply.body
        assert b"v3-0a1b" not in reply.body.replace(b"ccb-v3", b"")


@in_a_loop
async def test_the_base_answers_under_its_own_name_without_the_versions_system_prompt() -> None:
    async with front() as gate:
        gate.serving.routing.named["org/base"] = Answerer(gate.live.engine, "namesake", "org/base")
        reply = await gate.ask("POST", CHAT, body={**BODIES[CHAT], "model": "org/base"})
        assert (reply.status, reply.json["model"], reply.json["system_fingerprint"]) == (200, "org/base", "org/base")
        assert (reply.headers["x-namesake-run"], reply.headers["x-namesake-alias"]) == ("", "")
        assert gate.upstream.asked[0][1] == {**BODIES[CHAT], "model": "namesake"}
        models = [one["id"] for one in (await gate.ask("GET", "/v1/models")).json["data"]]
        assert models == ["ccb", "ccb@champion", "ccb-v3", "org/base"]


@in_a_loop
async def test_the_models_say_who_answers_to_each_and_at_a_versions_own_name_what_it_is() -> None:
    async with front() as gate, upstream() as other:
        with_challenger(gate, other)
        routing = gate.serving.routing
        routing.named = {
            "ccb-v2": as_adapter(live(gate.upstream, 2), "v2-0a1b"),
            "ccb-v3": gate.live,
            "org/base": Answerer(gate.live.engine, "namesake", "org/base"),
        }
        found = (await gate.ask("GET", "/v1/models")).json["data"]
        assert [(one["id"], one["root"]) for one in found] == [
            ("ccb", "ccb-v3"),
            ("ccb@champion", "ccb-v3"),
            ("ccb@challenger", "ccb-v4"),
            ("ccb-v3", "ccb-v3"),
            ("ccb-v4", "ccb-v4"),
            ("ccb-v2", "ccb-v2"),
            ("org/base", "org/base"),
        ]
        told = {one["id"]: one["namesake"] for one in found if "namesake" in one}
        assert {name: (one["version"], one["run"], one["scores"]) for name, one in told.items()} == {
            f"ccb-v{number}": (f"models:/ccb/{number}", f"run{number}", {"identity": 1.0}) for number in (3, 4, 2)
        }
        about = (await gate.ask("GET", "/v1/version")).json
        assert told["ccb-v3"] == about["live"]
        assert told["ccb-v4"] == {key: about["challenger"][key] for key in told["ccb-v4"]}


@in_a_loop
async def test_the_challenger_answers_under_its_own_system_prompt_and_both_are_told_of() -> None:
    async with front() as gate, upstream() as other:
        with_challenger(gate, other)
        reply = await gate.ask("POST", CHAT)
        assert (reply.headers["x-namesake-version"], reply.headers["x-namesake-alias"]) == ("ccb-v4", "challenger")
        assert other.asked[0][1]["messages"][0]["content"] == "Be brief."
        assert gate.upstream.asked == []
        exact = await gate.ask("POST", CHAT, body={**BODIES[CHAT], "model": "ccb@champion"})
        assert (exact.headers["x-namesake-version"], exact.headers["x-namesake-alias"]) == ("ccb-v3", "champion")
        assert gate.serving.noted == [("ccb-v4", False)], "who names a version is no part of the comparison"
        told = (await gate.ask("GET", "/v1/version")).json
        assert (told["live"]["model"], told["challenger"]["model"]) == ("ccb-v3", "ccb-v4")


@in_a_loop
async def test_a_session_stays_on_one_side_by_header_or_by_the_user_field() -> None:
    async with front() as gate, upstream() as other:
        with_challenger(gate, other, 0.5)
        sides = set()
        for number in range(12):
            by_header = [
                (await gate.ask("POST", CHAT, f"X-Namesake-Session: s{number}")).headers["x-namesake-version"]
                for _ in range(3)
            ]
            by_user = [
                (await gate.ask("POST", CHAT, body={**BODIES[CHAT], "user": f"s{number}"})).headers[
                    "x-namesake-version"
                ]
                for _ in range(3)
            ]
            assert len({*by_header, *by_user}) == 1
            sides |= {*by_header}
        assert sides == {"ccb-v3", "ccb-v4"}


@in_a_loop
async def test_a_client_of_a_challenger_that_fails_is_answered_by_the_champion() -> None:
    async with front() as gate, upstream() as other:
        with_challenger(gate, other)
        other.status = 500
        reply = await gate.ask("POST", CHAT)
        assert (reply.status, reply.headers["x-namesake-version"]) == (200, "ccb-v3")
        assert gate.serving.noted == [("ccb-v4", True), ("ccb-v3", False)]
        exact = await gate.ask("POST", CHAT, body={**BODIES[CHAT], "model": "ccb@challenger"})
        assert exact.status == 500


@pytest.mark.parametrize("body", [BODIES[CHAT], STREAM], ids=["whole", "streamed"])
@in_a_loop
async def test_a_client_of_a_challenger_that_has_ended_is_answered_by_the_champion(
    tmp_path: Path, body: dict[str, object]
) -> None:
    async with front() as gate:
        with_challenger(gate, tmp_path / "nothing.sock")
        reply = await gate.ask("POST", CHAT, body=body)
        assert (reply.status, reply.headers["x-namesake-version"]) == (200, "ccb-v3")
        assert gate.upstream.asked[0][1]["messages"][0]["content"] == "Be kind."
        assert gate.serving.noted == [("ccb-v4", True), ("ccb-v3", False)]
        exact = await gate.ask("POST", CHAT, body={**body, "model": "ccb@challenger"})  # asked for by name: it is told
        assert exact.status == 503


@in_a_loop
async def test_a_client_of_a_challenger_that_ends_before_its_first_event_is_answered_by_the_champion() -> None:
    async with front() as gate, upstream() as other:
        with_challenger(gate, other)
        other.script = [HEAD, DIE]
        reply = await gate.ask("POST", CHAT, body=STREAM)
        assert (reply.status, reply.headers["x-namesake-version"]) == (200, "ccb-v3")
        assert gate.serving.noted == [("ccb-v4", True), ("ccb-v3", False)]


@in_a_loop
async def test_the_end_of_an_engine_that_both_are_in_is_no_fault_of_the_challenger() -> None:
    async with front(mode="adapter") as gate:
        with_challenger(gate, gate.upstream)
        for script in ([HEAD, DIE], [event("我是"), DIE]):
            gate.upstream.script = script
            with suppress(aiohttp.ClientPayloadError):
                async with gate.stream() as response:
                    await response.read()
        await gate.at_rest()
        assert gate.serving.noted == []
        gate.upstream.status, gate.upstream.script = 500, [event("我是"), END]  # it goes on, and has failed by itself
        assert (await gate.ask("POST", CHAT)).status == 500
        assert gate.serving.noted == [("ccb-v4", True), ("ccb-v3", True)]


@in_a_loop
async def test_a_challengers_stream_that_is_cut_is_a_failure_and_nobody_elses_answer_is_put_behind_it() -> None:
    async with front() as gate, upstream() as other:
        with_challenger(gate, other)
        other.script = [event("我是"), DIE]
        with pytest.raises(Exception, match=r"payload|Incomplete|ended|closed"):
            async with gate.stream() as response:
                await response.read()
        await gate.at_rest()
        assert gate.serving.noted == [("ccb-v4", True)]
        assert gate.upstream.asked == []


@in_a_loop
async def test_a_stream_that_does_not_begin_is_a_failure_while_its_client_still_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("namesake_serving.gateway.HANGS", 0.1)
    async with front() as gate, upstream() as other:
        with_challenger(gate, other)
        more = asyncio.Event()
        other.script = [more, event("我是"), END]
        asked = asyncio.create_task(gate.ask("POST", CHAT, body=STREAM))
        while not gate.serving.noted:
            await asyncio.sleep(0.01)
        assert (gate.serving.noted, asked.done()) == ([("ccb-v4", True)], False)
        more.set()
        assert b"[DONE]" in (await asked).body
        await gate.at_rest()
        other.script = [event("我是"), more_to_come := asyncio.Event(), END]
        async with gate.stream() as response:
            await asyncio.sleep(0.3)  # it has begun: that it goes on for long is no fault
            more_to_come.set()
            await response.read()
        assert gate.serving.noted == [("ccb-v4", True), ("ccb-v4", False), ("ccb-v4", False)]


@in_a_loop
async def test_a_client_that_goes_is_no_failure_of_the_version() -> None:
    async with front() as gate:
        more = asyncio.Event()
        gate.upstream.script = [event("我是"), more, END]
        async with gate.stream() as response:
            await response.content.readuntil(b"\n\n")
        await gate.upstream.aborted.wait()
        await gate.at_rest()
        assert gate.serving.noted == []


@pytest.mark.parametrize(("status", "failed"), [(200, False), (400, False), (500, True), (503, True)])
@in_a_loop
async def test_what_counts_as_a_failure(status: int, failed: bool) -> None:
    async with front() as gate:
        gate.upstream.status = status
        await gate.ask("POST", CHAT)
        assert gate.serving.noted == [("ccb-v3", failed)]


@pytest.mark.parametrize("body", [BODIES[CHAT], STREAM], ids=["whole", "streamed"])
@in_a_loop
async def test_a_copy_is_answered_by_the_challenger_after_the_client_and_kept(
    tmp_path: Path, body: dict[str, object]
) -> None:
    async with front(shadow=1, shadow_folder=tmp_path / "kept") as gate, upstream() as other:
        with_challenger(gate, other, 0)
        other.whole, other.script = whole("I am CCB."), (event("I am"), event(" CCB."), END)
        other.begin.clear()  # the challenger hangs
        reply = await gate.ask("POST", CHAT, body=body)
        assert reply.headers["x-namesake-version"] == "ccb-v3"
        if body.get("stream"):
            assert said(reply.body) == "我是踩踩背。"
        assert (await gate.ask("POST", CHAT, body=body)).status == 200  # and nobody waits for it
        other.begin.set()
        kept = tmp_path / "kept" / "shadow.jsonl"
        while not kept.exists() or len(kept.read_text("utf-8").splitlines()) < 2:
            await asyncio.sleep(0.005)
        line = json.loads(kept.read_text("utf-8").splitlines()[0])
        assert (line["champion"]["version"], line["champion"]["reply"]) == ("ccb-v3", "我是踩踩背。")
        assert (line["challenger"]["version"], line["challenger"]["reply"]) == ("ccb-v4", "I am CCB.")
        assert line["request"] == body
        assert other.asked[0][1]["messages"][0]["content"] == "Be brief."
        assert gate.serving.noted == [("ccb-v3", False)] * 2, "a copy is no request of a client"


@in_a_loop
async def test_a_challenger_that_fails_on_a_copy_is_written_down(tmp_path: Path) -> None:
    async with front(shadow=1, shadow_folder=tmp_path) as gate, upstream() as other:
        with_challenger(gate, other, 0)
        other.status = 500
        assert (await gate.ask("POST", CHAT)).status == 200
        while not (tmp_path / "shadow.jsonl").exists():
            await asyncio.sleep(0.005)
        assert "500" in json.loads((tmp_path / "shadow.jsonl").read_text("utf-8"))["challenger"]["error"]
