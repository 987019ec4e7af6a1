"""A standby: the next version comes in beside the live one, nobody is held, and an engine that dies is replaced."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

import pytest

from namesake.errors import InputError, RegistryError, ServingError
from namesake_serving import __main__ as command
from namesake_serving import engine, hosts, rollout, service, settings, store
from namesake_serving.rollout import Step
from namesake_serving.store import Stored
from tests.unit.loops import within
from tests.unit.test_serving_service import LIE, Box, Running, World, is_refused, serving, until, version, world

__all__ = ["world"]

in_a_loop = within(20)

STANDBY = 'namesake_version_changes_total{reason="",result="live",way="standby"}'


@asynccontextmanager
async def standing_by(world: World, folder: Path, **given: object) -> AsyncIterator[Running]:
    """The service at work with version 1 live and a standby on the same weights."""
    async with serving(world, folder, standby=True, **given) as running:
        await until(lambda: ready(running))
        yield running


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "_STANDBY_SECONDS", 0.01)


def ready(running: Running) -> bool:
    """Whether the metrics say that there is a standby."""
    return running.figure("namesake_standby_ready") == 1


def did(world: World) -> list[Sequence[str]]:
    """What was done to each engine."""
    return [box.did for box in world.boxes]


@in_a_loop
async def test_it_is_started_after_the_first_version_is_live(world: World, tmp_path: Path) -> None:
    gate = world.gate("start", 1)
    gate.set()
    async with serving(world, tmp_path, standby=True) as running:
        gate.clear()
        await until(lambda: len(world.boxes) == 2)
        assert await running.is_answered() == 1
        assert not ready(running)
        gate.set()
        await until(lambda: ready(running))
        await asyncio.sleep(0.1)
        assert did(world) == [["start 1", "asked 1"]] * 2
    assert [box.did[-1] for box in world.boxes] == ["stop", "stop"]


@in_a_loop
async def test_without_it_nothing_is_started(world: World, tmp_path: Path) -> None:
    async with serving(world, tmp_path) as running:
        await asyncio.sleep(0.1)
        assert (len(world.boxes), ready(running)) == (1, False)


@in_a_loop
async def test_a_version_comes_in_beside_running_answers_and_nobody_waits(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "namesake.serving")
    gates = [world.gate("change", 2), world.gate("prove", 2)]
    async with standing_by(world, tmp_path) as running:
        async with running.service.traffic.enter() as old:
            running.move(2)
            for what, gate in zip(("change", "prove"), gates, strict=True):
                await running.met(what, 2)
                assert await running.is_answered(0.5) == 1, "held"
                gate.set()
            await until(lambda: running.live.version.number == 2)
            assert await running.is_answered(0.5) == 2
            await until(lambda: running.service.state.step is Step.REST)
            assert not ready(running)
            assert cast(Box, old.engine).did == ["start 1", "asked 1"], "touched under a running answer"
        await until(lambda: running.serves(2) and ready(running))
        assert did(world) == [["start 1", "asked 1"], ["start 1", "asked 1", "change 2", "asked 2"]]
        assert running.figure(STANDBY) == 1
        assert "weights of the standby changed in 0.20 s" in caplog.messages


@in_a_loop
async def test_moving_back_needs_no_loading(world: World, tmp_path: Path) -> None:
    async with standing_by(world, tmp_path) as running:
        for to in (2, 1, 2, 1):
            running.move(to)
            await until(lambda to=to: running.serves(to) and ready(running))  # type: ignore[misc]
        assert did(world) == [["start 1", "asked 1"], ["start 1", "asked 1", "change 2", "asked 2"]]
        running.move(3)
        await until(lambda: running.serves(3))
        assert did(world)[1] == ["start 1", "asked 1", "change 2", "asked 2", "change 3", "asked 3"]
        assert running.figure(STANDBY) == 5


@in_a_loop
async def test_moving_back_while_the_old_answers_are_still_running_needs_nothing(world: World, tmp_path: Path) -> None:
    async with standing_by(world, tmp_path) as running:
        async with running.service.traffic.enter() as old:
            running.move(2)
            await until(lambda: running.serves(2))
            async with running.service.traffic.enter() as new:
                running.move(1)
                await until(lambda: running.serves(1))
                assert running.live is old
                running.move(2)
                await until(lambda: running.serves(2))
                assert running.live is new
        await until(lambda: ready(running))
        assert did(world) == [["start 1", "asked 1"], ["start 1", "asked 1", "change 2", "asked 2"]]


@in_a_loop
async def test_the_copy_of_what_the_standby_holds_stays(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stay: list[Sequence[str]] = []
    monkeypatch.setattr(store, "prune", lambda *given, **_: stay.append(given[-1]) or [])
    async with standing_by(world, tmp_path) as running:
        for to in (2, 3):
            running.move(to)
            await until(lambda to=to: running.serves(to) and ready(running))  # type: ignore[misc]
    one, two = (store.id_of(version(number)) for number in (1, 2))
    assert [set(ids) for ids in stay] == [set(), {one}, {two, one}]


@in_a_loop
async def test_a_third_version_waits_for_the_answers_of_the_first(world: World, tmp_path: Path) -> None:
    async with standing_by(world, tmp_path) as running:
        async with running.service.traffic.enter():
            running.move(2)
            await until(lambda: running.serves(2))
            running.move(3)
            await until(lambda: running.service.state.step is Step.LOADING)
            await asyncio.sleep(0.05)
            assert world.boxes[0].did == ["start 1", "asked 1"], "changed under a running answer"
            assert await running.is_answered(0.5) == 2
        await until(lambda: running.serves(3) and ready(running))
        assert world.boxes[0].did == ["start 1", "asked 1", "change 3", "asked 3"]


@in_a_loop
async def test_a_standby_that_does_not_prove_itself_is_none(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gate = world.gate("start", 1)
    gate.set()
    async with serving(world, tmp_path, standby=True) as running:
        world.says[1] = LIE
        await until(lambda: any(one.startswith("no standby: models:/ccb/1 does not prove") for one in caplog.messages))
        assert await running.is_answered() == 1
        await until(lambda: world.boxes[1].did == ["start 1", "asked 1", "kill"])
        assert not ready(running)
        del world.says[1]
        await until(lambda: ready(running))


@pytest.mark.parametrize("how", ["says", "dies"])
@in_a_loop
async def test_a_version_that_does_not_prove_itself_leaves_the_live_one_untouched(
    world: World, tmp_path: Path, how: str
) -> None:
    if how == "says":
        world.says[2] = LIE
    else:
        world.faults["prove", 2] = ServingError("The engine does not answer.")
    async with standing_by(world, tmp_path) as running:
        if how == "dies":
            gate = world.gate("prove", 2)
            running.move(2)
            await running.met("prove", 2)
            world.boxes[1].die()
            gate.set()
            await is_refused(running, 2, "does not answer", "engine")
        else:
            running.move(2)
            await is_refused(running, 2, "does not prove itself", "proof")
        assert running.serves(1)
        assert did(world)[0] == ["start 1", "asked 1"]
        await until(lambda: ready(running))
        running.move(3)
        await until(lambda: running.serves(3))
        assert did(world)[0] == ["start 1", "asked 1"]


@in_a_loop
async def test_an_engine_that_dies_is_replaced_at_once(world: World, tmp_path: Path) -> None:
    async with standing_by(world, tmp_path) as running:
        gate = world.gate("start", 1)  # no new engine comes up
        world.boxes[0].die()
        await until(lambda: "kill" in world.boxes[0].did and running.serves(1))
        assert await running.is_answered() == 1
        assert running.figure("namesake_engine_restarts_total") == 1
        assert not ready(running)
        gate.set()
        await until(lambda: ready(running))
        assert did(world) == [["start 1", "asked 1", "kill"], ["start 1", "asked 1"], ["start 1", "asked 1"]]


@in_a_loop
async def test_one_that_dies_after_a_move_is_replaced_by_the_standby_with_its_own_weights(
    world: World, tmp_path: Path
) -> None:
    async with standing_by(world, tmp_path) as running:
        running.move(2)
        await until(lambda: running.serves(2) and ready(running))
        world.gate("start", 2)
        world.boxes[1].die()
        await until(lambda: world.boxes[0].did == ["start 1", "asked 1", "change 2"])
        await until(lambda: running.serves(2))


@in_a_loop
async def test_a_standby_that_dies_is_started_again(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with standing_by(world, tmp_path) as running:
        world.boxes[1].die()
        await until(lambda: len(world.boxes) == 3 and ready(running))
        assert did(world) == [["start 1", "asked 1"], ["start 1", "asked 1", "kill"], ["start 1", "asked 1"]]
        assert [one for one in caplog.messages if one.startswith("the standby ended by itself")]
        assert running.figure("namesake_engine_restarts_total") == 0


@in_a_loop
async def test_while_there_is_none_a_version_comes_in_in_place(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(world, tmp_path, standby=True) as running:
        world.faults["start", 1] = ServingError("There is no memory for a second engine.")
        await until(lambda: "no standby: There is no memory for a second engine." in caplog.messages)
        running.move(2)
        await until(lambda: running.serves(2))
        assert world.boxes[0].did == ["start 1", "asked 1", "change 2", "asked 2"]
        del world.faults["start", 1]
        await until(lambda: ready(running))
        assert world.boxes[-1].did == ["start 2", "asked 2"]


@in_a_loop
async def test_a_version_of_another_shape_takes_the_standbys_place(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "namesake.serving")
    world.other.add(2)
    async with standing_by(world, tmp_path) as running:
        running.move(2)
        await until(lambda: running.serves(2) and ready(running))
        assert did(world) == [["start 1", "asked 1"], ["start 1", "asked 1", "kill"], ["start 2", "asked 2"]]
        assert "second engine, since config.json differs" in caplog.messages
        running.move(1)  # the old one is the standby now
        await until(lambda: running.serves(1) and ready(running))
        await asyncio.sleep(0.1)
        assert len(world.boxes) == 3


@pytest.mark.parametrize("dies", [False, True])
@in_a_loop
async def test_a_standby_that_refuses_the_weights_makes_room_for_another_engine(
    world: World, tmp_path: Path, dies: bool
) -> None:
    async with standing_by(world, tmp_path) as running:
        world.faults["change", 2] = ServingError("The engine refused the weights (500).")
        gate = world.gate("change", 2)
        running.move(2)
        await running.met("change", 2)
        if dies:
            world.boxes[1].die()
        gate.set()
        await until(lambda: running.serves(2) and ready(running))
        assert did(world) == [["start 1", "asked 1"], ["start 1", "asked 1", "kill"], ["start 2", "asked 2"]]


@in_a_loop
async def test_an_old_engine_whose_answers_do_not_end_is_stopped_and_another_is_started(
    world: World, tmp_path: Path
) -> None:
    async with standing_by(world, tmp_path, shutdown_seconds=0) as running, running.service.traffic.enter():
        running.move(2)
        await until(lambda: running.serves(2) and ready(running))
        one, two, three = did(world)
        assert (one[-1], two[-1], three) == ("stop", "asked 2", ["start 2", "asked 2"])


@in_a_loop
async def test_a_standby_that_starts_when_a_second_engine_has_become_one_is_stopped(
    world: World, tmp_path: Path
) -> None:
    gate = world.gate("start", 1)
    gate.set()
    world.other.add(2)
    async with serving(world, tmp_path, standby=True) as running:
        gate.clear()
        await until(lambda: len(world.boxes) == 2)
        running.move(2)
        await until(lambda: running.serves(2) and ready(running))
        gate.set()
        await until(lambda: not world.boxes[1].alive())
        assert did(world) == [["start 1", "asked 1"], ["start 1", "asked 1", "stop"], ["start 2", "asked 2"]]


@in_a_loop
async def test_answers_that_do_not_end_hold_up_neither_the_next_version_nor_an_engine_that_has_died(
    world: World, tmp_path: Path
) -> None:
    async with standing_by(world, tmp_path, hold_seconds=0.05) as running:
        async with running.service.traffic.enter():
            running.move(2)
            await until(lambda: running.serves(2))
            running.move(3)
            await until(lambda: running.serves(3), 2)
            assert world.boxes[1].did[-2:] == ["change 3", "asked 3"], "in place, as without a standby"
            world.boxes[1].die()
            await until(lambda: running.serves(3), 2)
            assert did(world)[2] == ["start 3"]
            assert world.boxes[0].did == ["start 1", "asked 1"], "touched under a running answer"
        await until(lambda: ready(running))


@in_a_loop
async def test_an_engine_that_dies_while_the_old_answers_run_is_replaced_when_they_have_ended(
    world: World, tmp_path: Path
) -> None:
    async with standing_by(world, tmp_path) as running:
        async with running.service.traffic.enter():
            running.move(2)
            await until(lambda: running.serves(2))
            world.gate("start", 2)
            world.boxes[1].die()
            await until(lambda: running.service.traffic.live is None)
        await until(lambda: running.serves(2))
        assert world.boxes[0].did == ["start 1", "asked 1", "change 2"]


@in_a_loop
async def test_a_standby_that_has_just_died_is_not_turned_to(world: World, tmp_path: Path) -> None:
    async with standing_by(world, tmp_path) as running:
        running.move(2)
        await until(lambda: running.serves(2) and ready(running))
        monkey = pytest.MonkeyPatch()
        monkey.setattr(hosts, "_STANDBY_SECONDS", 60)  # nobody has noticed
        await asyncio.sleep(0.05)
        world.boxes[0].die()
        running.move(1)
        await until(lambda: running.serves(1))
        monkey.undo()
        assert world.boxes[0].did[-1] == "kill"
        assert world.boxes[1].did[-2:] == ["change 1", "asked 1"]


@in_a_loop
async def test_before_anybody_has_noticed_that_the_live_engine_died_no_other_is_started(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with standing_by(world, tmp_path):
        monkeypatch.setattr(service, "_WATCH_SECONDS", 60)
        await asyncio.sleep(0.05)
        world.boxes[0].die()
        await asyncio.sleep(0.1)
        assert len(world.boxes) == 2, "it would take the memory of the one that replaces it"


@in_a_loop
async def test_when_both_engines_die_one_is_started(world: World, tmp_path: Path) -> None:
    async with standing_by(world, tmp_path) as running:
        for box in world.boxes:
            box.die()
        await until(lambda: running.serves(1) and ready(running))
        assert [box.alive() for box in world.boxes] == [False, False, True, True]


@pytest.mark.parametrize("fault", [RegistryError("its file is cut short"), ValueError("odd"), OSError("no disk")])
@in_a_loop
async def test_a_fault_while_the_standby_takes_a_version_in_leaves_a_standby(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    async with standing_by(world, tmp_path) as running:

        def difference(_live: object, coming: Stored) -> str:
            if coming.version.number == 2:
                raise fault
            return ""

        monkeypatch.setattr(store, "difference", difference)
        running.move(2)
        await until(lambda: bool(world.told) and running.serves(1))
        await until(lambda: ready(running))
        running.move(3)
        await until(lambda: running.serves(3))
        assert running.figure(STANDBY) == 1


@in_a_loop
async def test_a_standby_that_cannot_be_started_for_any_reason_harms_nobody(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gate = world.gate("start", 1)
    gate.set()
    async with serving(world, tmp_path, standby=True) as running:
        world.faults["start", 1] = RuntimeError("can't start new thread")
        await until(lambda: "no standby: can't start new thread" in caplog.messages)
        assert await running.is_answered() == 1
        del world.faults["start", 1]
        await until(lambda: ready(running))


@in_a_loop
async def test_a_version_that_was_refused_is_loaded_anew_when_it_is_tried_again(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollout, "FIRST_WAIT", 0.05)
    world.says[2] = LIE
    async with standing_by(world, tmp_path) as running:
        running.move(2)
        await until(lambda: world.boxes[1].did.count("change 2") == 2)
        del world.says[2]
        await until(lambda: running.serves(2))


@in_a_loop
async def test_after_a_version_of_another_shape_the_next_like_it_needs_no_new_engine_to_go_live(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        store, "difference", lambda one, other: "" if (one.version.number > 1) == (other.version.number > 1) else "odd"
    )
    async with standing_by(world, tmp_path) as running:
        running.move(2)
        await until(lambda: running.serves(2) and ready(running))
        gate = world.gate("start", 3)
        running.move(3)
        await until(lambda: running.serves(3))
        assert did(world)[2] == ["start 2", "asked 2", "change 3", "asked 3"]
        gate.set()
        await until(lambda: ready(running))
        assert did(world)[3] == ["start 3", "asked 3"]


@in_a_loop
async def test_engines_that_start_at_once_do_not_count_on_the_same_memory(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    world.memory, world.challenger = 60, version(2)  # of the 100 that are free
    gate = world.gate("start", 1)
    gate.set()
    world.gate("start", 2)
    async with serving(world, tmp_path, standby=True, canary=0.5):
        gate.clear()
        await until(lambda: len(world.boxes) == 2)
        await asyncio.sleep(0.05)
        assert len(world.boxes) == 2
        told = [*caplog.messages, *(why for _, why in world.told if why)]
        assert [one for one in told if "There is no memory for a second engine" in one]


@in_a_loop
async def test_when_it_stops_no_engine_is_left_whatever_the_standby_is_at(world: World, tmp_path: Path) -> None:
    gate = world.gate("start", 1)
    gate.set()
    async with serving(world, tmp_path, standby=True):
        gate.clear()
        await until(lambda: world.met.count(("start", 1)) == 2)
    assert [box.alive() for box in world.boxes] == [False, False]
    async with standing_by(world, tmp_path, shutdown_seconds=1) as running:
        stack = running.service.traffic.enter()
        await stack.__aenter__()
        running.move(2)
        await until(lambda: running.serves(2))
    assert not [box for box in world.boxes if box.alive()]


@pytest.mark.parametrize(
    ("given", "option"), [({"mode": "adapter"}, "--mode merged"), ({"backend": "ray"}, "--backend local")]
)
def test_it_is_not_ignored_in_silence(given: dict[str, str], option: str) -> None:
    with pytest.raises(InputError, match=f"is of no use without {option}"):
        command._check_needs(settings.read(standby=True, **given))


def test_two_engines_share_a_gpu_unless_told_otherwise() -> None:
    words = engine.command(Path("w"), Path("s"), settings.read(standby=True, engine_args=("--x",)), gpu=True)
    assert words[-3:] == ["--gpu-memory-utilization", "0.45", "--x"]
    assert "--gpu-memory-utilization" not in engine.command(Path("w"), Path("s"), settings.read(), gpu=True)
    assert "--gpu-memory-utilization" not in engine.command(
        Path("w"), Path("s"), settings.read(standby=True), gpu=False
    )
