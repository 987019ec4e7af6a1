"""Who answers now, and the door: held while weights are changed, and nobody slips through."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from namesake.manifest import Manifest
from namesake.registry import Version
from namesake_serving.engine import Engine
from namesake_serving.store import Stored
from namesake_serving.traffic import Answerer, Live, NotReady, Routing, Traffic, UnknownModel
from tests.unit.loops import within

in_a_loop = within(10)


def live(number: int = 1) -> Live:
    """A version of ccb in an engine that nobody asks."""
    version = Version("ccb", number, "run", "source", "READY", {}, 0)
    identity = {"name": "踩踩背 CCB", "author": "老爷爷 OldGrandpa"}
    record = Manifest(identity, None, {}, "run", {}, {}, {}, {}, {})
    return Live(Stored(version, record, Path("/model")), cast(Engine, None))


async def turns(count: int = 5) -> None:
    """Let every other task go on."""
    for _ in range(count):
        await asyncio.sleep(0)


class Request:
    """A request that stays in until it is told to end."""

    def __init__(self, traffic: Traffic) -> None:
        self.answered_by: Live | None = None
        self.end = asyncio.Event()
        self._traffic = traffic
        self.task = asyncio.create_task(self._pass())

    async def _pass(self) -> None:
        async with self._traffic.enter() as live:
            self.answered_by = live
            await self.end.wait()


def test_a_version_is_named_by_model_and_number() -> None:
    assert live(3).label == "ccb-v3"


@in_a_loop
async def test_with_nothing_live_nobody_is_answered() -> None:
    with pytest.raises(NotReady):
        async with Traffic().enter():
            pass


@in_a_loop
async def test_requests_are_counted_while_they_are_answered_and_not_after() -> None:
    traffic = Traffic()
    traffic.live = one = live()
    assert one.idle.is_set()
    requests = [Request(traffic) for _ in range(3)]
    await turns()
    assert (one.running, one.idle.is_set()) == (3, False)
    requests[0].end.set()
    requests[1].task.cancel()
    await turns()
    assert (one.running, one.idle.is_set()) == (1, False)
    requests[2].end.set()
    await turns()
    assert (one.running, one.idle.is_set()) == (0, True)


@in_a_loop
async def test_a_request_that_fails_is_not_counted_on() -> None:
    traffic = Traffic()
    traffic.live = one = live()
    with pytest.raises(ZeroDivisionError):
        async with traffic.enter():
            raise ZeroDivisionError
    assert (one.running, one.idle.is_set()) == (0, True)


@in_a_loop
async def test_a_request_is_answered_to_its_end_by_the_version_it_began_with() -> None:
    traffic = Traffic()
    traffic.live = one = live(1)
    early = Request(traffic)
    await turns()
    traffic.live = two = live(2)
    late = Request(traffic)
    await turns()
    assert (early.answered_by, late.answered_by) == (one, two)
    assert (one.running, two.running) == (1, 1)
    early.end.set()
    await turns()
    assert (one.idle.is_set(), two.idle.is_set()) == (True, False)
    late.end.set()


@in_a_loop
async def test_the_door_is_held_at_once_when_nothing_runs_and_also_when_nothing_is_live() -> None:
    traffic = Traffic()
    assert await traffic.hold(0)
    traffic.release()
    traffic.live = live()
    assert await traffic.hold(0)


@in_a_loop
async def test_who_holds_the_door_waits_for_those_inside_and_nobody_else_comes_in() -> None:
    traffic = Traffic()
    traffic.live = one = live(1)
    inside = Request(traffic)
    await turns()
    holding = asyncio.create_task(traffic.hold(5))
    await turns()
    outside = Request(traffic)
    await turns()
    assert not holding.done()
    assert (outside.answered_by, one.running) == (None, 1)
    inside.end.set()
    assert await holding
    await turns()
    assert (outside.answered_by, one.running) == (None, 0)
    traffic.live = two = live(2)
    traffic.release()
    await turns()
    assert outside.answered_by is two
    outside.end.set()


@in_a_loop
async def test_when_those_inside_take_too_long_the_door_is_open_again() -> None:
    traffic = Traffic()
    traffic.live = one = live()
    inside = Request(traffic)
    await turns()
    holding = asyncio.create_task(traffic.hold(0.02))
    await turns()
    outside = Request(traffic)
    assert not await holding
    await turns()
    assert (inside.answered_by, outside.answered_by) == (one, one)
    assert not inside.task.done()
    for request in (inside, outside):
        request.end.set()


@in_a_loop
async def test_who_gives_up_at_the_door_is_not_counted() -> None:
    traffic = Traffic()
    traffic.live = one = live()
    assert await traffic.hold(0)
    outside = Request(traffic)
    await turns()
    outside.task.cancel()
    traffic.release()
    await turns()
    assert (outside.answered_by, one.running) == (None, 0)


@in_a_loop
async def test_who_waited_at_the_door_is_told_when_nothing_is_live_behind_it() -> None:
    traffic = Traffic()
    traffic.live = live()
    assert await traffic.hold(0)
    outside = Request(traffic)
    await turns()
    traffic.live = None
    traffic.release()
    await turns()
    with pytest.raises(NotReady):
        await outside.task


@in_a_loop
async def test_who_waited_does_not_slip_through_a_door_that_is_held_again_at_once() -> None:
    traffic = Traffic()
    traffic.live = live()
    assert await traffic.hold(0)
    outside = Request(traffic)
    await turns()
    traffic.release()
    assert await traffic.hold(0)
    await turns()
    assert outside.answered_by is None


@given(st.lists(st.sampled_from(["come", "end", "give up", "move", "hold", "release"]), max_size=60), st.data())
def test_in_any_order_counts_are_right_and_nobody_is_inside_while_the_door_is_held(
    steps: list[str], data: st.DataObject
) -> None:
    @in_a_loop
    async def play() -> None:
        traffic, inside, versions, holding = Traffic(), list[Request](), [live(0)], None
        traffic.live = versions[0]
        for step in steps:
            if step == "come":
                inside.append(Request(traffic))
            elif step in ("end", "give up") and inside:
                one = inside.pop(data.draw(st.integers(0, len(inside) - 1)))
                one.end.set() if step == "end" else one.task.cancel()
            elif step == "move" and holding is None:
                traffic.live = live(len(versions))
                versions.append(traffic.live)
            elif step == "hold" and holding is None:
                holding = asyncio.create_task(traffic.hold(60))
            elif step == "release" and holding is not None:
                holding.cancel()
                traffic.release()
                holding = None
            await turns()
            for version in versions:
                running = sum(request.answered_by is version and not request.task.done() for request in inside)
                assert (version.running, version.idle.is_set()) == (running, not running)
            if holding is not None and holding.done():
                assert traffic.live.running == 0
        for request in inside:
            request.task.cancel()

    play()


# --------------------------------------------------------------------------------------------------- the choice


def routing(share: float = 0.0, uri: str = "models:/ccb@champion") -> Routing:
    """Version 1 serves, 2 is its challenger, and the base and version 0 are beside."""
    made = Routing(uri, "challenger", share)
    made.champion.live, made.challenger.live = live(1), live(2)
    made.named = {one.label: one for one in (live(0), Answerer(cast(Engine, None), "namesake", "org/base"))}
    return made


async def who(made: Routing, model: object, session: str = "", *, shared: bool = True) -> tuple[str, str]:
    """Who answers, and by which alias; counted while it does."""
    async with made.enter(model, session, shared=shared) as (one, alias):
        assert one.running == 1
    assert one.running == 0
    return one.label, alias


@pytest.mark.parametrize(
    ("model", "label", "alias"),
    [
        (None, "ccb-v1", "champion"),
        ("ccb", "ccb-v1", "champion"),
        ("ccb@champion", "ccb-v1", "champion"),
        ("ccb-v1", "ccb-v1", ""),
        ("ccb@challenger", "ccb-v2", "challenger"),
        ("ccb-v2", "ccb-v2", ""),
        ("ccb-v0", "ccb-v0", ""),
        ("org/base", "org/base", ""),
    ],
)
@in_a_loop
async def test_a_model_is_answered_by_whom_it_names(model: object, label: str, alias: str) -> None:
    assert await who(routing(), model) == (label, alias)


@pytest.mark.parametrize("model", ["ccb-v3", "ccb@", "ccb@prod", "base", "", "CCB", 1, ["ccb"], {}, True])
@in_a_loop
async def test_a_model_that_is_not_there_is_told_with_those_that_are(model: object) -> None:
    with pytest.raises(UnknownModel, match="ccb, ccb@champion, ccb@challenger, ccb-v1, ccb-v2, ccb-v0, org/base do"):
        await who(routing(), model)


@in_a_loop
async def test_a_fixed_version_has_no_alias() -> None:
    made = routing(uri="models:/ccb/1")
    assert (made.name, await who(made, "ccb")) == ("ccb", ("ccb-v1", ""))
    with pytest.raises(UnknownModel):
        await who(made, "ccb@champion")


@pytest.mark.parametrize(("share", "shared", "label"), [(1, True, "ccb-v2"), (0, True, "ccb-v1"), (1, False, "ccb-v1")])
@in_a_loop
async def test_only_the_bare_name_is_shared(share: float, shared: bool, label: str) -> None:
    made = routing(share)
    for session in ("", "踩", "\ud800"):
        assert (await who(made, None, session, shared=shared))[0] == label
        assert (await who(made, "ccb@champion", session))[0] == "ccb-v1"


@given(st.floats(0, 1))
def test_a_share_is_what_it_says(share: float) -> None:
    made = routing(share)
    taken = sum(made._is_challengers(f"session {number}") for number in range(1000))
    assert abs(taken / 1000 - share) < 0.06


@in_a_loop
async def test_a_session_of_the_challengers_stays_there_when_that_is_changed_and_is_another() -> None:
    made = routing(0.5)
    before = {f"session {n}": (await who(made, None, f"session {n}"))[0] for n in range(50)}
    theirs = [session for session, label in before.items() if label == "ccb-v2"]
    assert await made.challenger.hold(1)
    waiting = [asyncio.create_task(who(made, None, session)) for session in theirs]
    others = {session: (await who(made, None, session))[0] for session in before if session not in theirs}
    assert set(others.values()) == {"ccb-v1"}
    assert {(await who(made, None))[0] for _ in range(20)} == {"ccb-v1"}, "nobody else waits"
    assert not any(one.done() for one in waiting)
    made.challenger.live = live(3)
    made.challenger.release()
    assert {label for label, _ in await asyncio.gather(*waiting)} == {"ccb-v3"}
    assert {(await who(made, None, session))[0] for session in others} == {"ccb-v1"}


@in_a_loop
async def test_with_nothing_live_no_name_is_told_and_nobody_answers() -> None:
    made = Routing("models:/ccb@champion", "challenger", 1)
    assert made.names() == []
    for model in (None, "ccb", "ccb-v1", "x"):
        with pytest.raises(NotReady):
            await who(made, model)
