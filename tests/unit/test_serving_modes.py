"""Adapters side by side, a challenger that answers a share, and engines that do not fit beside each other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

import pytest

from namesake.errors import NamesakeError, RegistryError, ServingError
from namesake_serving import store
from namesake_serving.hosts import Adapters
from namesake_serving.rollout import Step
from namesake_serving.traffic import Live, UnknownModel
from tests.unit.loops import within
from tests.unit.test_serving_service import (
    LIE,
    Box,
    Running,
    World,
    is_refused,
    made,
    serving,
    until,
    version,
    world,
)

in_a_loop = within(20)
__all__ = ["world"]  # a fixture
BASE = "the base"


@asynccontextmanager
async def adapters(world: World, folder: Path, **given: object) -> AsyncIterator[Running]:
    """Adapter mode with version 1 live."""
    async with serving(world, folder, mode="adapter", **given) as running:
        yield running


def answers(running: Running, which: int) -> bool:
    """Whether this version is what the alias stands for, and nothing is under way."""
    live = running.service.traffic.live
    return live is not None and live.version.number == which and running.service.state.step is Step.REST


async def moved(running: Running, *numbers: int) -> None:
    """The alias has moved to each of them, one after the other."""
    for which in numbers:
        running.move(which)
        await until(lambda which=which: answers(running, which))  # type: ignore[misc]


async def label(running: Running, model: str | None, session: str = "") -> str:
    """Who answers this model."""
    async with asyncio.timeout(2), running.service.routing.enter(model, session) as (one, _):
        return one.label


def did(world: World, engine: int = 0) -> list[str]:
    """What was done to an engine after it started."""
    return world.boxes[engine].did[1:]


# ------------------------------------------------------------------------------------------------------- adapters


@in_a_loop
async def test_one_engine_on_the_base_has_the_versions_side_by_side(world: World, tmp_path: Path) -> None:
    async with adapters(world, tmp_path, base="elsewhere") as running:
        assert world.boxes[0].did == ["start 0", "load 1", "asked 1"]
        running.move(2)
        await until(lambda: answers(running, 2))
        assert (did(world), len(world.boxes)) == (["load 1", "asked 1", "load 2", "asked 2"], 1)
        for model, who in ((None, 2), ("ccb", 2), ("ccb@champion", 2), ("ccb-v2", 2), ("ccb-v1", 1)):
            assert await label(running, model) == f"ccb-v{who}"
        assert await label(running, BASE) == BASE
        assert running.service.routing.names() == ["ccb", "ccb@champion", "ccb-v2", BASE, "ccb-v1"]
        assert running.figure('namesake_version_changes_total{reason="",result="live",way="adapter"}') == 1


@in_a_loop
async def test_requests_are_not_held_while_an_adapter_comes(world: World, tmp_path: Path) -> None:
    gates = [world.gate("change", 2), world.gate("prove", 2)]
    async with adapters(world, tmp_path) as running:
        running.move(2)
        for what, gate in zip(("change", "prove"), gates, strict=True):
            await running.met(what, 2)
            assert await running.is_answered() == 1
            with pytest.raises(UnknownModel):
                await label(running, "ccb-v2")
            gate.set()
        await until(lambda: answers(running, 2))


@in_a_loop
async def test_the_adapter_used_longest_ago_gives_way_but_none_that_answers_or_has_an_alias(
    world: World, tmp_path: Path
) -> None:
    async with adapters(world, tmp_path, max_adapters=3) as running:
        await moved(running, 2, 3)
        async with running.service.routing.enter("ccb-v1"):  # it answers: 2 has to go
            running.move(4)
            await until(lambda: answers(running, 4))
        assert did(world)[-3:] == ["unload 2", "load 4", "asked 4"]
        assert running.service.routing.names() == ["ccb", "ccb@champion", "ccb-v4", BASE, "ccb-v1", "ccb-v3"]
        running.move(3)  # still there: nothing is loaded or asked again
        await until(lambda: answers(running, 3))
        assert did(world)[-1:] == ["asked 4"]
        assert len(list((tmp_path / "run" / "adapters").iterdir())) == 3


@in_a_loop
async def test_what_is_not_to_stay_is_answered_to_no_more_and_goes_when_its_answers_have_ended(
    world: World, tmp_path: Path
) -> None:
    async with adapters(world, tmp_path, max_adapters=3) as running:
        await moved(running, 2, 3)
        host = cast(Adapters, running.service.champion.host)
        lives = {one.label: cast(Live, one) for one in running.service.routing.named.values()}
        stay = {lives["ccb-v3"].model}
        with lives["ccb-v1"].answering():
            host.answer_to({*stay, lives["ccb-v1"].model})
            assert running.service.routing.names()[2:] == ["ccb-v3", BASE, "ccb-v1"]
            assert await host.keep(stay)  # there is a place, so that nobody is waited for
            assert did(world)[-1] == "unload 2"
            assert running.service.routing.names()[2:] == ["ccb-v3", BASE]
        assert await host.keep(stay)
        assert did(world)[-1] == "unload 1"


@in_a_loop
async def test_where_no_place_is_free_those_that_are_to_go_are_waited_for(world: World, tmp_path: Path) -> None:
    async with adapters(world, tmp_path, max_adapters=3) as running:
        await moved(running, 2, 3)
        host = cast(Adapters, running.service.champion.host)
        first = cast(Live, running.service.routing.named["ccb-v1"])
        stay = {one.model for one in running.service.routing.named.values() if one is not first}
        with first.answering():
            assert not await host.keep(stay, 0.02)
            waits = asyncio.create_task(host.keep(stay, 5))
            await asyncio.sleep(0.02)
            assert not waits.done()
        assert await waits
        assert did(world)[-1] == "unload 1"


@in_a_loop
async def test_where_every_place_is_taken_the_version_waits(world: World, tmp_path: Path) -> None:
    async with adapters(world, tmp_path, max_adapters=3) as running:
        await moved(running, 2, 3)
        routing = running.service.routing
        async with routing.enter("ccb-v1"), routing.enter("ccb-v2"):
            running.move(4)
            await until(lambda: bool(running.service.state.refused))
            assert "All 3 places" in next(iter(running.service.state.refused.values())).why
        assert await running.is_answered() == 3


@in_a_loop
async def test_the_engines_copy_of_an_adapter_outlives_the_store(world: World, tmp_path: Path) -> None:
    async with adapters(world, tmp_path) as running:
        live = cast(Live, running.live)
        (copy,) = world.boxes[0].adapters.values()
        assert tmp_path / "run" in copy.parents
        assert not copy.is_relative_to(live.stored.adapter)


@pytest.mark.parametrize("where", ["fetch", "check", "change", "prove"])
@in_a_loop
async def test_a_broken_adapter_leaves_the_old_one(world: World, tmp_path: Path, where: str) -> None:
    world.faults[where, 2] = (RegistryError if where in ("fetch", "check") else ServingError)("it is no good")
    async with adapters(world, tmp_path) as running:
        running.move(2)
        await is_refused(running, 2, "it is no good", "damaged" if where in ("fetch", "check") else "engine")
        assert running.service.routing.names() == ["ccb", "ccb@champion", "ccb-v1", BASE]
        assert did(world)[2:] == (["load 2", "unload 2"] if where == "prove" else [])
        running.move(3)
        await until(lambda: answers(running, 3))


@in_a_loop
async def test_an_adapter_that_says_something_else_is_not_served(world: World, tmp_path: Path) -> None:
    world.says[2] = LIE
    async with adapters(world, tmp_path) as running:
        running.move(2)
        await is_refused(running, 2, "does not prove itself", "proof")
        assert did(world)[2:] == ["load 2", "asked 2", "unload 2"]


@in_a_loop
async def test_an_engine_of_adapters_that_died_is_started_again_with_what_the_alias_points_to(
    world: World, tmp_path: Path
) -> None:
    async with adapters(world, tmp_path) as running:
        running.move(2)
        await until(lambda: answers(running, 2))
        world.boxes[0].die()
        await until(lambda: len(world.boxes) == 2 and running.service.traffic.live is not None)
        assert await running.is_answered() == 2
        assert world.boxes[1].did == ["start 0", "load 2"]
        assert running.service.routing.names() == ["ccb", "ccb@champion", "ccb-v2", BASE]
        assert {one.engine for one in running.service.routing.named.values()} == {running.live.engine}
        running.move(1)
        await until(lambda: answers(running, 1))


@in_a_loop
async def test_ten_moves_in_a_row_end_at_the_last_one_and_load_no_more_than_two(world: World, tmp_path: Path) -> None:
    gate = world.gate("fetch", 2)
    async with adapters(world, tmp_path) as running:
        running.move(2)
        await running.met("fetch", 2)
        for which in range(3, 12):
            running.move(which)
            await until(lambda which=which: running.figure("namesake_alias_version") == which)  # type: ignore[misc]
        gate.set()
        await until(lambda: answers(running, 11))
        assert did(world) == ["load 1", "asked 1", "load 11", "asked 11"]


@in_a_loop
async def test_a_base_that_cannot_be_had_is_an_error_at_the_start(world: World, tmp_path: Path) -> None:
    world.faults["base", 0] = RegistryError("it is not to be had here")
    running = made(world, tmp_path, mode="adapter")
    with pytest.raises(NamesakeError, match="not to be had"):
        await running.service.start(version(1), lambda _: None)
    assert world.boxes == []


@in_a_loop
async def test_a_version_that_no_alias_points_to_comes_when_it_is_asked_for_once_for_all_who_ask(
    world: World, tmp_path: Path
) -> None:
    gate = world.gate("prove", 7)
    async with adapters(world, tmp_path, any_version=True) as running:
        service = running.service
        asking = [asyncio.create_task(service.summon("ccb-v7")) for _ in range(5)]
        await running.met("prove", 7)
        with pytest.raises(UnknownModel):
            await label(running, "ccb-v7")
        asking[0].cancel()  # the first to ask goes
        gate.set()
        await asyncio.gather(*asking[1:])
        assert (await label(running, "ccb-v7"), await label(running, None)) == ("ccb-v7", "ccb-v1")
        await service.summon("ccb-v7")
        assert did(world) == ["load 1", "asked 1", "load 7", "asked 7"]


@pytest.mark.parametrize("where", ["resolve", "fetch", "check", "change", "prove"])
@in_a_loop
async def test_a_version_that_is_asked_for_and_broken_stays_unknown_and_is_not_tried_at_once_again(
    world: World, tmp_path: Path, where: str
) -> None:
    world.faults[where, 7] = (
        RegistryError("it is no good") if where in ("resolve", "fetch", "check") else ServingError("x")
    )
    async with adapters(world, tmp_path, any_version=True) as running:
        for _ in range(3):
            await running.service.summon("ccb-v7")
            with pytest.raises(UnknownModel):
                await label(running, "ccb-v7")
        assert world.met.count((where, 7)) == 1
        assert did(world)[2:] == (["load 7", "unload 7"] if where == "prove" else [])
        assert world.told == [], "nobody but this client asked for it"


@pytest.mark.parametrize(
    ("mode", "allowed", "model"),
    [
        ("adapter", False, "ccb-v7"),
        ("merged", True, "ccb-v7"),
        *(
            ("adapter", True, model)
            for model in (None, "ccb", "ccb-v1", "ccb-v0", "ccb-v07", "ccb-v7 ", "x-v7", "ccb-v" + "9" * 10)
        ),
        *(("adapter", True, model) for model in (BASE, "ccb-v７", "ccb-v7/../8", 7, [])),
    ],
)
@in_a_loop
async def test_nothing_else_is_brought_in(
    world: World, tmp_path: Path, mode: str, allowed: bool, model: object
) -> None:
    async with serving(world, tmp_path, mode=mode, any_version=allowed) as running:
        await running.service.summon(model)
        assert world.fetched == [1]


# ------------------------------------------------------------------------------------------------------- challenger


@asynccontextmanager
async def compared(world: World, folder: Path, mode: str, **given: object) -> AsyncIterator[Running]:
    """Version 1 serves, version 2 is its challenger and answers half of the requests."""
    world.challenger = version(2)
    async with serving(world, folder, mode=mode, **{"canary": "50%", "canary_least": 10, **given}) as running:
        await until(lambda: running.service.routing.challenger.live is not None and running.service.at_rest())
        yield running


@pytest.mark.parametrize("mode", ["merged", "adapter"])
@in_a_loop
async def test_copies_of_versions_go_but_those_of_champion_and_challenger_are_known_to_every_server(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    asked = list[tuple[str, int]]()
    monkeypatch.setattr(store, "prune", lambda _cache, name, keep, _stay, **_: asked.append((name, keep)) or [])
    async with compared(world, tmp_path, mode, keep_versions=7) as running:
        assert store.recall(running.cache, "models:/ccb@champion") == version(1)
        assert store.recall(running.cache, "models:/ccb@challenger") == version(2)
    assert asked == [("ccb", 7)] * 2


@in_a_loop
async def test_two_aliases_that_change_places_need_not_wait_for_the_end_of_an_answer(
    world: World, tmp_path: Path
) -> None:
    async with compared(world, tmp_path, "adapter") as running:
        routing = running.service.routing
        async with routing.enter("ccb-v2", "") as (one, _):
            world.challenger = version(1)  # what is champion still: there is nothing to compare with, and 2 is to go
            running.service.wake()
            await until(lambda: routing.challenger.live is None)
            running.move(2)
            await until(lambda: running.live.version.number == 2)
            await until(lambda: routing.challenger.live is not None and running.service.at_rest(), 3)
            assert one.running
        assert [await label(running, model) for model in ("ccb@champion", "ccb@challenger")] == ["ccb-v2", "ccb-v1"]
        assert "unload 2" not in world.boxes[0].did
        assert await label(running, "ccb-v2") == "ccb-v2"


@pytest.mark.parametrize("mode", ["merged", "adapter"])
@in_a_loop
async def test_a_challenger_answers_its_share_and_a_session_stays_on_one_side(
    world: World, tmp_path: Path, mode: str
) -> None:
    async with compared(world, tmp_path, mode) as running:
        assert len(world.boxes) == (1 if mode == "adapter" else 2)
        seen = [await label(running, None, f"session {number}") for number in range(200)]
        assert 70 < seen.count("ccb-v2") < 130
        assert seen == [await label(running, "ccb", f"session {number}") for number in range(200)]
        for model, who in (("ccb@champion", 1), ("ccb-v1", 1), ("ccb@challenger", 2), ("ccb-v2", 2)):
            assert {await label(running, model, str(n)) for n in range(20)} == {f"ccb-v{who}"}
        assert running.figure("namesake_challenger_version") == 2
        assert running.figure("namesake_served_version") == 1


@pytest.mark.parametrize("mode", ["merged", "adapter"])
@pytest.mark.parametrize("what", ["fails", "is slow"])
@in_a_loop
async def test_a_challenger_that_leaves_the_bounds_answers_no_more(
    world: World, tmp_path: Path, mode: str, what: str
) -> None:
    async with compared(world, tmp_path, mode) as running:
        service, rival = running.service, running.service.routing.challenger.live
        assert rival is not None
        for _ in range(40):
            service.note(running.live, False, 0.1)
        for _ in range(5 if what == "fails" else 10):
            assert service.routing.challenger.live is rival
            service.note(rival, what == "fails", 0.2)
        assert service.routing.challenger.live is None
        assert {await label(running, None, str(n)) for n in range(50)} == {"ccb-v1"}
        await until(lambda: bool(world.told) and world.told[-1][1] is not None)
        assert world.told[-1][0] == 2
        assert (world.told[-1][1] or "").startswith("canary: ")
        assert running.figure("namesake_canary_returns_total") == 1
        assert running.figure("namesake_challenger_version") == 0
        gone = (lambda: did(world)[-1] == "unload 2") if mode == "adapter" else (lambda: did(world, 1)[-1] == "stop")
        await until(gone)
        for _ in range(3):  # it stays so
            running.service.wake()
            await asyncio.sleep(0.02)
        assert service.routing.challenger.live is None
        world.challenger = version(3)
        running.service.wake()
        await until(lambda: service.routing.challenger.live is not None)
        assert await label(running, "ccb@challenger") == "ccb-v3"


@pytest.mark.parametrize("mode", ["merged", "adapter"])
@pytest.mark.parametrize("how", ["its alias is gone", "it becomes champion"])
@in_a_loop
async def test_a_challenger_ends_with_its_alias_or_as_champion(
    world: World, tmp_path: Path, mode: str, how: str
) -> None:
    async with compared(world, tmp_path, mode) as running:
        if how == "its alias is gone":
            world.challenger = None
        else:
            running.move(2)
            await until(lambda: answers(running, 2))
        await until(lambda: running.service.routing.challenger.live is None)
        who = 1 if how == "its alias is gone" else 2
        assert {await label(running, None, str(n)) for n in range(50)} == {f"ccb-v{who}"}
        assert world.told in ([(2, None)], [(2, None)] * 2)
        if mode == "merged":
            await until(lambda: not world.boxes[1].alive())
            assert world.boxes[0].alive()
        else:
            assert ("load 2" in did(world), did(world).count("load 2")) == (True, 1)


@in_a_loop
async def test_a_challenger_that_is_answering_leaves_the_engine_when_it_has_answered(
    world: World, tmp_path: Path
) -> None:
    async with compared(world, tmp_path, "adapter") as running:
        async with running.service.routing.enter("ccb@challenger"):
            world.challenger = None
            running.service.wake()
            await until(lambda: running.service.routing.challenger.live is None)
            with pytest.raises(UnknownModel):
                await label(running, "ccb-v2")
            await asyncio.sleep(0.02)
            assert did(world)[-1] == "asked 2"
            running.move(2)  # and it becomes champion meanwhile: it stays
            await until(lambda: answers(running, 2))
        await asyncio.sleep(0.05)
        assert did(world)[-1] == "asked 2"
        assert await label(running, "ccb-v2") == "ccb-v2"


@pytest.mark.parametrize("dead", [False, True])
@in_a_loop
async def test_an_engine_that_will_not_forget_an_adapter_keeps_its_copy_and_the_alias_is_followed_on(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dead: bool
) -> None:
    def refuses(box: Box, _name: str) -> None:
        if dead:
            box.die()
        raise ServingError("The engine refused.")

    monkeypatch.setattr(Box, "unload_adapter", refuses)
    world.says[2] = LIE
    async with adapters(world, tmp_path) as running:
        running.move(2)
        await until(lambda: bool(world.told) or len(world.boxes) > 1)
        assert len(list((tmp_path / "run" / "adapters").iterdir())) == 2
        running.move(3)
        await until(lambda: answers(running, 3))


@in_a_loop
async def test_a_registry_that_is_away_does_not_end_a_challenger(world: World, tmp_path: Path) -> None:
    async with compared(world, tmp_path, "adapter") as running:
        world.challenger = RegistryError("away")
        running.service.wake()
        await until(lambda: running.figure("namesake_registry_errors_total") >= 1)
        assert await label(running, "ccb@challenger") == "ccb-v2"


@in_a_loop
async def test_a_challenger_that_is_broken_never_answers(world: World, tmp_path: Path) -> None:
    world.challenger = version(2)
    world.says[2] = LIE
    async with serving(world, tmp_path, mode="adapter", canary=0.5) as running:
        await until(lambda: bool(world.told))
        assert "does not prove itself" in (world.told[0][1] or "")
        assert {await label(running, None, str(n)) for n in range(50)} == {"ccb-v1"}


@in_a_loop
async def test_a_challengers_engine_that_died_is_started_again_and_the_champion_goes_on(
    world: World, tmp_path: Path
) -> None:
    async with compared(world, tmp_path, "merged") as running:
        gate = world.gate("start", 2)
        world.boxes[1].die()
        await until(lambda: running.service.routing.challenger.live is None)
        assert {await label(running, None, str(n)) for n in range(50)} == {"ccb-v1"}
        gate.set()
        await until(lambda: running.service.routing.challenger.live is not None)
        assert cast(Box, running.live.engine) is world.boxes[0]


@in_a_loop
async def test_one_engine_that_died_brings_back_champion_and_challenger(world: World, tmp_path: Path) -> None:
    async with compared(world, tmp_path, "adapter") as running:
        world.boxes[0].die()
        routing = running.service.routing
        await until(lambda: len(world.boxes) == 2 and bool(routing.champion.live and routing.challenger.live))
        assert world.boxes[1].did == ["start 0", "load 1", "load 2"]
        assert running.figure("namesake_engine_restarts_total") == 1


@in_a_loop
async def test_without_canary_or_shadow_no_challenger_is_asked_for(world: World, tmp_path: Path) -> None:
    world.challenger = version(2)
    async with serving(world, tmp_path) as running:
        assert running.service.challenger is None
        running.service.note(running.live, True, 0)


# ------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("needed", [100, 101])
@in_a_loop
async def test_no_second_engine_is_started_where_there_is_no_memory_for_it(
    world: World, tmp_path: Path, needed: int
) -> None:
    world.other.add(2)
    async with serving(world, tmp_path) as running:
        world.memory = needed  # 100 are free
        running.move(2)
        if needed > 100:
            await is_refused(running, 2, "no memory for a second engine", "memory")
            assert len(world.boxes) == 1
        else:
            await until(lambda: running.serves(2))
