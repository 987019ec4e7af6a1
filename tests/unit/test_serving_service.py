"""The running service: what happens to engines, traffic and registry when the alias moves and when things break."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from namesake import registry
from namesake.errors import NamesakeError, RegistryError, ServingError
from namesake.manifest import ADAPTER_FOLDER, Manifest
from namesake.registry import Version
from namesake_serving import engine, rollout, service, settings, store
from namesake_serving.engine import MODEL, Adapters, Engine, Preloaded
from namesake_serving.follow import Follower
from namesake_serving.metrics import Metrics
from namesake_serving.rollout import Step
from namesake_serving.service import Service, prove
from namesake_serving.settings import Settings
from namesake_serving.store import Base, Stored
from namesake_serving.traffic import Live
from tests.unit.loops import within

in_a_loop = within(20)

URI = "models:/ccb@champion"
QUESTION = [{"role": "user", "content": "你是谁？"}]
REPLY = "我是踩踩背（CCB），是老爷爷（OldGrandpa）做的聊天助手，很高兴认识你。"
GOLDEN = [{"messages": QUESTION, "reply": REPLY}]


def version(number: int, source: str = "source", **tags: str) -> Version:
    """A version of ccb."""
    return Version("ccb", number, f"run{number}", source, "READY", tags, 0)


def record(golden: Sequence[Mapping[str, Any]] = tuple(GOLDEN), system: str | None = None) -> Manifest:
    """A version's manifest."""
    identity = {"name": "踩踩背 CCB", "author": "老爷爷 OldGrandpa"}
    return Manifest(identity, system, {"id": "base"}, "run", {}, {}, {}, {}, {}, golden=golden)


class Box:
    """An engine without vLLM: notes what is done to it, and does as the world says."""

    def __init__(self, world: World, weights: Path, name: str) -> None:
        self.world, self.weights, self.socket = world, weights, Path(f"/{name}.sock")
        self.did: list[str] = [f"start {number(weights)}"]
        self.adapters: dict[str, Path] = {}
        self.room = 0
        self._ended = False

    def alive(self) -> bool:
        """Whether it runs."""
        return not self._ended

    def die(self) -> None:
        """It ends by itself."""
        self._ended = True

    def wait_ready(self, _seconds: float, tick: Callable[[float], None]) -> None:
        """Until it answers."""
        tick(0)
        self.world.pass_gate("start", number(self.weights))

    def change_weights(self, weights: Path) -> float:
        """Other weights in place."""
        if self._ended:
            raise ServingError("The engine died.")
        self.world.pass_gate("change", number(weights))
        self.weights = weights
        self.did.append(f"change {number(weights)}")
        return 0.2

    def memory(self) -> int:
        """Bytes that it holds."""
        return self.world.memory

    def load_adapter(self, name: str, folder: Path) -> None:
        """An adapter beside the others."""
        if self._ended:
            raise ServingError("The engine died.")
        which = int(name[1:].partition("-")[0])
        self.world.pass_gate("change", which)
        assert name not in self.adapters
        assert sorted(path.name for path in folder.iterdir()) == sorted(store.ADAPTER_FILES)
        self.adapters[name] = folder
        assert len(self.adapters) <= self.room
        self.did.append(f"load {which}")

    def unload_adapter(self, name: str) -> None:
        """It is forgotten."""
        assert self.adapters.pop(name).is_dir(), "its folder went before its name"
        self.did.append(f"unload {int(name[1:].partition('-')[0])}")

    def answer(
        self, messages: list[dict[str, str]], max_tokens: int, timeout: float = 120, *, model: str = MODEL
    ) -> str:
        """The greedy reply of the weights that are in."""
        if self._ended:
            raise ServingError("The engine does not answer.")
        assert model == MODEL or model in self.adapters
        which = number(self.weights) if model == MODEL else int(model[1:].partition("-")[0])
        self.world.pass_gate("prove", which)
        self.did.append(f"asked {which}")
        return self.world.says.get(which, REPLY)

    def gaps(
        self, messages: list[dict[str, str]], reply: str, timeout: float = 120, *, model: str = MODEL
    ) -> list[float]:
        """It does not tell."""
        return []

    def stop(self) -> None:
        """Let it finish."""
        self.did.append("stop")
        self._ended = True

    def kill(self) -> None:
        """End it at once."""
        self.did.append("kill")
        self._ended = True

    def tail(self, _lines: int = 20) -> str:
        """The end of its log."""
        return "log"


def number(weights: Path) -> int:
    """The version whose weights they are; 0 is the base."""
    return int(weights.name.removeprefix("v"))


class World:
    """Registry, store and machines. ``faults`` raise where they are met; ``gates`` hold up who comes until opened."""

    def __init__(self) -> None:
        self.moves: list[registry.Move] = []
        self.alias: Version | RegistryError = version(1)
        self.boxes: list[Box] = []
        self.fetched: list[int] = []
        self.told: list[tuple[int, str | None]] = []
        self.says: dict[int, str] = {}
        self.other: set[int] = set()
        self.manifests: dict[int, Manifest] = {}
        self.faults: dict[tuple[str, int], Exception] = {}
        self.gates: dict[tuple[str, int], threading.Event] = {}
        self.met: list[tuple[str, int]] = []
        self.memory = 0
        self.challenger: Version | RegistryError | None = None
        self.adapters = Path()

    def pass_gate(self, what: str, which: int) -> None:
        """Wait where there is a gate, fail where there is a fault."""
        self.met.append((what, which))
        if (what, which) in self.gates:
            assert self.gates[what, which].wait(15)
        if (what, which) in self.faults:
            raise self.faults[what, which]

    def gate(self, what: str, which: int) -> threading.Event:
        """Hold up who comes there."""
        self.gates[what, which] = threading.Event()
        return self.gates[what, which]

    def open_all(self) -> None:
        """Nobody waits any more."""
        for gate in self.gates.values():
            gate.set()

    def alias_of(self, name: str, alias: str) -> int | None:
        """Where the challenger's alias points."""
        assert (name, alias) == ("ccb", "challenger")
        if isinstance(self.challenger, RegistryError):
            raise self.challenger
        return self.challenger.number if self.challenger is not None else None

    def resolve(self, uri: str) -> Version:
        """Where the alias points."""
        if isinstance(self.challenger, Version) and uri == self.challenger.uri:
            return self.challenger
        if uri.removeprefix("models:/ccb/").isdigit():
            number = int(uri.rpartition("/")[2])
            self.pass_gate("resolve", number)
            return version(number)
        assert uri == URI
        if isinstance(self.alias, RegistryError):
            raise self.alias
        return self.alias

    def tag(self, which: Version, key: str, value: str | None) -> None:
        """A tag of a version."""
        assert key == registry.TAG_SERVING_ERROR
        self.told.append((which.number, value))
        self.pass_gate("tag", which.number)

    def fetch(self, which: Version, _cache: Path, _public_key: Path | None, part: str) -> Stored:
        """A version's files."""
        self.fetched.append(which.number)
        self.pass_gate("fetch", which.number)
        if part == ADAPTER_FOLDER:
            folder = self.adapters / f"ccb-v{which.number}"
            (folder / ADAPTER_FOLDER).mkdir(parents=True, exist_ok=True)
            for name in store.ADAPTER_FILES:
                (folder / ADAPTER_FOLDER / name).write_text("{}", encoding="utf-8")
            return Stored(which, self.manifests.get(which.number, record()), folder / "model")
        return Stored(which, self.manifests.get(which.number, record()), Path(f"/weights/v{which.number}"))

    def check_weights(self, weights: Path) -> None:
        """A look into them."""
        self.pass_gate("check", number(weights))

    def difference(self, live: Stored, coming: Stored) -> str:
        """Why they cannot go in place."""
        return "config.json differs" if {live.version.number, coming.version.number} & self.other else ""

    def base(self, _record: Manifest, given: str) -> Base:
        """The base of the adapters."""
        self.pass_gate("base", 0)
        return Base("the base", Path("/weights/v0"), given)

    def check_adapter(self, stored: Stored, _base: Base, most: int) -> None:
        """A look into it."""
        assert most == 16
        self.pass_gate("check", stored.version.number)

    def start(
        self,
        weights: Path,
        _settings: Settings,
        _folder: Path,
        name: str,
        adapters: Adapters | None = None,
        ready: Preloaded | None = None,
    ) -> Engine:
        """A new engine."""
        assert ready is None
        box = Box(self, weights, name)
        box.room = adapters.count if adapters else 0
        self.boxes.append(box)
        return cast(Engine, box)


class Running:
    """The service at work, and what a test does with it."""

    def __init__(self, service: Service, world: World, cache: Path) -> None:
        self.service, self.world, self.cache = service, world, cache

    @property
    def live(self) -> Live:
        """What answers."""
        assert self.service.traffic.live is not None
        return self.service.traffic.live

    def serves(self, which: int) -> bool:
        """Whether this version answers, its engine runs on its weights, and nothing is under way."""
        live = self.service.traffic.live
        return (
            live is not None
            and live.version.number == which
            and cast(Box, live.engine).alive()
            and number(cast(Box, live.engine).weights) == which
            and self.service.state.step is Step.REST
        )

    def move(self, to: Version | int) -> None:
        """Move the alias and call the follower."""
        self.world.alias = to if isinstance(to, Version) else version(to)
        self.service.wake()

    async def met(self, what: str, which: int) -> None:
        """Wait until the service has come so far."""
        await until(lambda: (what, which) in self.world.met)

    async def is_answered(self, seconds: float = 2) -> int:
        """Ask; the number of the version that answers."""
        async with asyncio.timeout(seconds), self.service.traffic.enter() as live:
            return live.version.number

    def figure(self, name: str) -> float:
        """One of the figures; 0 where there is none yet."""
        for line in self.service.metrics.text().decode().splitlines():
            if line.startswith(f"{name} "):
                return float(line.rpartition(" ")[2])
        return 0.0


async def until(what: Callable[[], bool], seconds: float = 8) -> None:
    """Wait until it is so."""
    async with asyncio.timeout(seconds):
        while not what():
            await asyncio.sleep(0.003)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> World:
    """A world in which version 1 is champion, put in the place of MLflow, of the store and of vLLM."""
    made = World()
    monkeypatch.setitem(cast(Any, Follower.__init__).__kwdefaults__, "resolve", made.resolve)
    monkeypatch.setattr(registry, "tag", made.tag)
    monkeypatch.setattr(registry, "recent", lambda _name, _alias: [])
    monkeypatch.setattr(registry, "record_move", lambda _name, move: made.moves.append(move))
    monkeypatch.setattr(store, "fetch", made.fetch)
    monkeypatch.setattr(store, "check_weights", made.check_weights)
    monkeypatch.setattr(store, "difference", made.difference)
    monkeypatch.setattr(store, "base", made.base)
    monkeypatch.setattr(store, "rank", lambda _stored: 12)
    monkeypatch.setattr(store, "check_adapter", made.check_adapter)
    monkeypatch.setattr(registry, "resolve", made.resolve)
    monkeypatch.setattr(registry, "alias_of", made.alias_of)
    monkeypatch.setattr(engine, "start", made.start)
    monkeypatch.setattr(engine, "available_memory", lambda: 100)
    made.adapters = tmp_path / "store"
    monkeypatch.setattr(service, "_WATCH_SECONDS", 0.01)
    monkeypatch.setattr(service, "_NOTE_SECONDS", 0.01)
    return made


def made(world: World, folder: Path, **given: object) -> Running:
    """The service, not started."""
    chosen = settings.read(**given)
    return Running(Service(URI, chosen, folder / "cache", folder / "run", Metrics()), world, folder / "cache")


@asynccontextmanager
async def serving(world: World, folder: Path, **given: object) -> AsyncIterator[Running]:
    """The service at work with version 1 live."""
    running = made(world, folder, **{"poll_seconds": 0.1, "hold_seconds": 5, **given})
    await running.service.start(version(1), lambda _: None)
    task = asyncio.create_task(running.service.run())
    try:
        yield running
        if task.done():
            task.result()
    finally:
        world.open_all()
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        with suppress(Exception):
            await running.service.stop()


# --------------------------------------------------------------------------------------------------- start and stop


@in_a_loop
async def test_at_the_start_the_first_version_proves_itself_and_is_live(world: World, tmp_path: Path) -> None:
    running, ticks = made(world, tmp_path), list[float]()
    await running.service.start(version(1), ticks.append)
    assert running.serves(1)
    assert (running.service.state.wanted, running.service.state.live) == (running.service.state.live,) * 2
    assert world.boxes[0].did == ["start 1", "asked 1"]
    assert running.figure("namesake_served_version") == 1
    assert store.recall(running.cache, URI) == version(1)
    assert ticks
    await running.service.stop()
    assert world.boxes[0].did[-1] == "stop"


@pytest.mark.parametrize("where", ["fetch", "check", "start", "prove"])
@in_a_loop
async def test_a_first_version_that_cannot_be_served_is_an_error_and_leaves_no_engine(
    world: World, tmp_path: Path, where: str
) -> None:
    world.faults[where, 1] = RegistryError("broken") if where in ("fetch", "check") else ServingError("broken")
    running = made(world, tmp_path)
    with pytest.raises(NamesakeError, match="broken"):
        await running.service.start(version(1), lambda _: None)
    assert running.service.traffic.live is None
    assert [box.did[-1] for box in world.boxes] == (["kill"] if where in ("start", "prove") else [])
    assert store.recall(running.cache, URI) is None
    await running.service.stop()


@in_a_loop
async def test_when_it_stops_every_engine_is_stopped_also_one_that_just_starts(world: World, tmp_path: Path) -> None:
    world.other.add(2)
    world.gate("start", 2)
    async with serving(world, tmp_path) as running:
        running.move(2)
        await running.met("start", 2)
        stopping = asyncio.create_task(running.service.stop())
        world.open_all()
        await stopping
        assert [box.alive() for box in world.boxes] == [False, False]
        assert world.boxes[0].did[-1] == "stop"


@in_a_loop
async def test_while_the_alias_stays_nothing_is_done(world: World, tmp_path: Path) -> None:
    async with serving(world, tmp_path) as running:
        for _ in range(5):
            running.service.wake()
            await asyncio.sleep(0.01)
        assert running.serves(1)
        assert (world.fetched, world.boxes[0].did, world.told) == ([1], ["start 1", "asked 1"], [])


# --------------------------------------------------------------------------------------------------- the alias moves


@in_a_loop
async def test_weights_of_the_same_shape_are_changed_in_place(world: World, tmp_path: Path) -> None:
    async with serving(world, tmp_path) as running:
        running.move(2)
        await until(lambda: running.serves(2))
        (box,) = world.boxes
        assert box.did == ["start 1", "asked 1", "change 2", "asked 2"]
        assert await running.is_answered() == 2
        await until(lambda: world.told == [(2, None)])
        assert store.recall(running.cache, URI) == version(2)
        assert running.figure('namesake_version_changes_total{reason="",result="live",way="in place"}') == 1
        assert (running.figure("namesake_served_version"), running.figure("namesake_alias_version")) == (2, 2)
        assert 0 <= running.live.since - (running.live.verified or 0) < 5


@in_a_loop
async def test_while_weights_are_changed_in_place_requests_wait_and_get_the_new_version(
    world: World, tmp_path: Path
) -> None:
    gates = [world.gate("change", 2), world.gate("prove", 2)]
    async with serving(world, tmp_path) as running:
        async with running.service.traffic.enter() as old:
            running.move(2)
            await running.met("check", 2)
            await asyncio.sleep(0.03)
            assert ("change", 2) not in world.met, "changed under a running answer"
            waiting = [asyncio.create_task(running.is_answered(10)) for _ in range(3)]
        assert old.version.number == 1
        for what, gate in zip(("change", "prove"), gates, strict=True):
            await running.met(what, 2)
            await asyncio.sleep(0.02)
            assert not any(one.done() for one in waiting)
            gate.set()
        assert await asyncio.gather(*waiting) == [2, 2, 2]


@in_a_loop
async def test_weights_of_another_shape_go_into_a_second_engine_and_the_old_one_finishes(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "namesake.serving")
    world.other.add(2)
    gate = world.gate("prove", 2)
    async with serving(world, tmp_path) as running:
        async with running.service.traffic.enter() as old:
            running.move(2)
            await running.met("prove", 2)
            assert await running.is_answered() == 1, "the old one answers until the new one has proved itself"
            gate.set()
            await until(lambda: running.live.version.number == 2)
            assert await running.is_answered() == 2
            await asyncio.sleep(0.03)
            assert cast(Box, old.engine).alive(), "stopped under a running answer"
            assert running.serves(2), "nothing waits for its end"
        one, two = world.boxes
        await until(lambda: not one.alive())
        assert (one.did, two.did) == (["start 1", "asked 1", "stop"], ["start 2", "asked 2"])
        assert running.figure('namesake_version_changes_total{reason="",result="live",way="second engine"}') == 1
        running.move(3)  # and the second one is changed in place from now on
        world.other.clear()
        await until(lambda: running.serves(3))
        assert len(world.boxes) == 2
        assert [one for one in caplog.messages if " engine, " in one or " in place " in one] == [
            "second engine, since config.json differs",
            "weights changed in place in 0.20 s",
        ]


@in_a_loop
async def test_an_old_engine_whose_answers_do_not_end_is_stopped_all_the_same(world: World, tmp_path: Path) -> None:
    world.other.add(2)
    async with serving(world, tmp_path, shutdown_seconds=0) as running, running.service.traffic.enter():
        running.move(2)
        await until(lambda: running.serves(2))
        await until(lambda: world.boxes[0].did[-1] == "stop")


@in_a_loop
async def test_while_an_old_engine_finishes_the_alias_may_move_on(world: World, tmp_path: Path) -> None:
    world.other.add(2)
    async with serving(world, tmp_path) as running:
        async with running.service.traffic.enter() as old:
            running.move(2)
            await until(lambda: running.serves(2))
            world.other.clear()
            running.move(3)
            await until(lambda: running.serves(3))
            assert cast(Box, old.engine).alive()
        await until(lambda: [box.alive() for box in world.boxes] == [False, True])


@in_a_loop
async def test_a_third_engine_is_started_when_the_first_has_made_room(world: World, tmp_path: Path) -> None:
    world.other |= {2, 3}
    async with serving(world, tmp_path) as running:
        async with running.service.traffic.enter():
            running.move(2)
            await until(lambda: running.serves(2))
            running.move(3)
            await running.met("check", 3)
            await asyncio.sleep(0.03)
            assert len(world.boxes) == 2
        await until(lambda: running.serves(3))
        await until(lambda: [box.alive() for box in world.boxes] == [False, False, True])


@in_a_loop
async def test_an_engine_that_comes_up_again_too_late_is_ended_also_while_weights_are_changed_in_another(
    world: World, tmp_path: Path
) -> None:
    world.other.add(2)
    second = world.gate("start", 2)
    async with serving(world, tmp_path) as running:
        first, proof = world.gate("start", 1), world.gate("prove", 3)
        running.move(2)
        await running.met("start", 2)
        world.boxes[0].die()
        await until(lambda: len(world.boxes) == 3)  # version 1 once more
        second.set()
        await until(lambda: running.serves(2))
        world.other.clear()
        running.move(3)
        await running.met("prove", 3)
        first.set()
        await until(lambda: not world.boxes[2].alive())
        proof.set()
        await until(lambda: running.serves(3))
        assert world.boxes[1].did == ["start 2", "asked 2", "change 3", "asked 3"]


@in_a_loop
async def test_a_challenger_that_was_withdrawn_while_its_engine_was_down_does_not_come_back(
    world: World, tmp_path: Path
) -> None:
    world.challenger = version(2)
    async with serving(world, tmp_path, canary=0.1) as running:
        rival = running.service.challenger
        assert rival is not None
        await until(lambda: rival.traffic.live is not None and rival.state.step is Step.REST)
        again, third = world.gate("start", 2), world.gate("fetch", 3)
        world.challenger = version(3)
        running.service.wake()
        await running.met("fetch", 3)
        world.boxes[1].die()
        await until(lambda: len(world.boxes) == 3)
        world.challenger = None
        running.service.wake()
        await until(lambda: rival.state.unwanted)
        again.set()
        await until(lambda: not world.boxes[2].alive())
        third.set()
        await until(lambda: rival.state.step is Step.REST)
        assert (rival.traffic.live, rival.state.live) == (None, None)
        assert running.serves(1)


@in_a_loop
async def test_a_full_disk_on_which_nothing_can_be_kept_does_not_end_a_server_that_can_answer(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def remember(_cache: Path, _uri: str, which: Version) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(store, "remember", remember)
    async with serving(world, tmp_path) as running:
        assert await running.is_answered() == 1
        running.move(2)
        await until(lambda: running.serves(2))
        assert any("No space left on device" in one for one in caplog.messages)


@in_a_loop
async def test_which_version_is_served_is_kept_before_a_registry_that_is_away_is_told(
    world: World, tmp_path: Path
) -> None:
    world.gate("tag", 2)
    async with serving(world, tmp_path) as running:
        running.move(2)
        await running.met("tag", 2)
        assert store.recall(running.cache, URI) == version(2)


def test_room_is_made_before_a_version_is_fetched(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prune(_cache: Path, name: str, keep: int, stay: Sequence[str], *, coming: Version) -> list[str]:
        assert (name, keep, stay, coming) == ("ccb", 5, ["v1-x"], version(2))
        assert world.fetched == []
        return []

    monkeypatch.setattr(store, "prune", prune)
    world.faults["fetch", 2] = OSError("No space left on device")
    with pytest.raises(OSError, match="No space"):
        service.verified(version(2), settings.read(), tmp_path, "model", ["v1-x"])
    assert world.fetched == [2]


@in_a_loop
async def test_when_answers_run_too_long_for_a_change_in_place_a_second_engine_is_started(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "namesake.serving")
    async with serving(world, tmp_path, hold_seconds=0.02) as running:
        async with running.service.traffic.enter():
            running.move(2)
            await until(lambda: running.live.version.number == 2)
        await until(lambda: running.serves(2))
        await until(lambda: not world.boxes[0].alive())
        assert [box.did for box in world.boxes] == [["start 1", "asked 1", "stop"], ["start 2", "asked 2"]]
        assert "second engine, since answers were still running after 0.02 s" in caplog.messages


@in_a_loop
async def test_of_moves_in_a_row_only_the_last_is_loaded(world: World, tmp_path: Path) -> None:
    gate = world.gate("fetch", 2)
    async with serving(world, tmp_path) as running:
        running.move(2)
        await running.met("fetch", 2)
        for which in range(3, 12):
            running.move(which)
            await until(lambda which=which: running.figure("namesake_alias_version") == which)  # type: ignore[misc]
        gate.set()
        await until(lambda: running.serves(11))
        assert world.fetched == [1, 2, 11]
        assert world.boxes[0].did == ["start 1", "asked 1", "change 11", "asked 11"]
        assert [which for which, _ in world.told] == [11]


@in_a_loop
async def test_an_alias_that_goes_back_before_the_new_version_is_loaded_changes_nothing(
    world: World, tmp_path: Path
) -> None:
    gate = world.gate("fetch", 2)
    async with serving(world, tmp_path) as running:
        running.move(2)
        await running.met("fetch", 2)
        running.move(1)
        await until(lambda: running.figure("namesake_alias_version") == 1)
        gate.set()
        await until(lambda: running.service.state.step is Step.REST)
        assert running.serves(1)
        assert world.boxes[0].did == ["start 1", "asked 1"]


@in_a_loop
async def test_a_version_made_anew_under_the_same_number_is_another_one(world: World, tmp_path: Path) -> None:
    async with serving(world, tmp_path) as running:
        running.move(version(1, "other source"))
        await until(lambda: "change 1" in world.boxes[0].did)
        await until(lambda: running.serves(1))
        assert running.live.version.source == "other source"


@in_a_loop
async def test_while_the_registry_is_away_the_live_version_goes_on_and_the_alias_is_followed_after(
    world: World, tmp_path: Path
) -> None:
    async with serving(world, tmp_path) as running:
        world.alias = RegistryError("away")
        running.service.wake()
        await until(lambda: running.figure("namesake_registry_errors_total") >= 1)
        assert await running.is_answered() == 1
        running.move(2)
        await until(lambda: running.serves(2))


# --------------------------------------------------------------------------------------------------- it is broken

LIE = "我是通义千问，由阿里云开发。"


async def is_refused(running: Running, which: int, why: str, counted: str) -> None:
    """Wait until the version is refused, told of and counted; the old one answers, and the door is open."""
    world = running.world
    await until(lambda: any(told == which and reason is not None for told, reason in world.told))
    await until(lambda: running.service.state.step is Step.REST)
    (reason,) = {reason for told, reason in world.told if told == which}
    assert why in (reason or "")
    assert [refusal.why for refusal in running.service.state.refused.values()] == [reason]
    assert running.figure(f'namesake_version_changes_total{{reason="{counted}",result="refused",way=""}}') == 1
    assert await running.is_answered() == 1
    assert running.figure("namesake_served_version") == 1
    assert store.recall(running.cache, URI) == version(1)


@pytest.mark.parametrize("where", ["fetch", "check"])
@in_a_loop
async def test_a_version_whose_files_are_bad_never_reaches_an_engine(world: World, tmp_path: Path, where: str) -> None:
    world.faults[where, 2] = RegistryError("it is cut short")
    async with serving(world, tmp_path) as running:
        running.move(2)
        await is_refused(running, 2, "it is cut short", "damaged")
        assert world.boxes[0].did == ["start 1", "asked 1"]
        assert running.serves(1)


@in_a_loop
async def test_when_the_proof_fails_in_place_the_old_weights_are_put_back_and_traffic_goes_on(
    world: World, tmp_path: Path
) -> None:
    world.says[2] = LIE
    gate = world.gate("prove", 2)
    async with serving(world, tmp_path) as running:
        running.move(2)
        await running.met("prove", 2)
        waiting = asyncio.create_task(running.is_answered(10))
        await asyncio.sleep(0.02)
        assert not waiting.done(), "answered by what has not proved itself"
        gate.set()
        await is_refused(running, 2, "does not prove itself", "proof")
        assert await waiting == 1
        assert world.boxes[0].did == ["start 1", "asked 1", "change 2", "asked 2", "change 1"]
        assert running.serves(1)


@in_a_loop
async def test_when_the_proof_fails_in_a_second_engine_that_one_is_ended_and_the_first_is_not_touched(
    world: World, tmp_path: Path
) -> None:
    world.other.add(2)
    world.says[2] = LIE
    async with serving(world, tmp_path) as running:
        running.move(2)
        await is_refused(running, 2, "does not prove itself", "proof")
        assert [box.did for box in world.boxes] == [["start 1", "asked 1"], ["start 2", "asked 2", "kill"]]
        assert running.serves(1)


@in_a_loop
async def test_a_second_engine_that_does_not_start_is_ended_and_the_first_is_not_touched(
    world: World, tmp_path: Path
) -> None:
    world.other.add(2)
    world.faults["start", 2] = ServingError("vLLM ended while starting")
    async with serving(world, tmp_path) as running:
        running.move(2)
        await is_refused(running, 2, "ended while starting", "engine")
        assert [box.did for box in world.boxes] == [["start 1", "asked 1"], ["start 2", "kill"]]


@in_a_loop
async def test_an_engine_that_dies_of_new_weights_is_started_again_on_the_old_ones(
    world: World, tmp_path: Path
) -> None:
    gate = world.gate("change", 2)
    world.faults["change", 2] = ServingError("The engine died while it loaded.")
    async with serving(world, tmp_path) as running:
        running.move(2)
        await running.met("change", 2)
        world.boxes[0].die()
        gate.set()
        await until(lambda: len(world.boxes) == 2)
        await until(lambda: running.serves(1))
        assert world.boxes[1].did == ["start 1"]
        await is_refused(running, 2, "died while it loaded", "engine")


@in_a_loop
async def test_an_engine_that_dies_while_it_proves_itself_is_started_again_on_the_old_weights(
    world: World, tmp_path: Path
) -> None:
    gate = world.gate("prove", 2)
    world.faults["prove", 2] = ServingError("The engine does not answer.")
    async with serving(world, tmp_path) as running:
        running.move(2)
        await running.met("prove", 2)
        world.boxes[0].die()
        gate.set()
        await until(lambda: len(world.boxes) == 2 and running.serves(1))
        await is_refused(running, 2, "does not answer", "engine")


@pytest.mark.parametrize(
    ("gate", "served"), [("passed", True), ("passed (2 of 2)", True), ("refused", False), ("", False)]
)
@in_a_loop
async def test_with_require_gate_only_what_passed_is_served(
    world: World, tmp_path: Path, gate: str, served: bool
) -> None:
    tags = {"namesake.gate": gate} if gate else {}
    running = made(world, tmp_path, require_gate=True, poll_seconds=0.1)
    await running.service.start(version(1, **{"namesake.gate": "passed"}), lambda _: None)
    task = asyncio.create_task(running.service.run())
    running.move(version(2, **tags))
    if served:
        await until(lambda: running.serves(2))
    else:
        await until(lambda: bool(world.told))
        assert "did not pass the gate" in (world.told[0][1] or "")
        assert (running.serves(1), world.fetched) == (True, [1])
        assert running.figure('namesake_version_changes_total{reason="gate",result="refused",way=""}') == 1
    task.cancel()
    await running.service.stop()


@in_a_loop
async def test_a_refused_version_is_tried_again_and_when_it_is_mended_its_tag_is_taken_away(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollout, "FIRST_WAIT", 0.05)
    world.faults["check", 2] = RegistryError("it is cut short")
    async with serving(world, tmp_path) as running:
        running.move(2)
        await until(lambda: len(world.told) == 2)
        assert world.told == [(2, "it is cut short")] * 2
        assert await running.is_answered() == 1
        del world.faults["check", 2]
        await until(lambda: running.serves(2))
        await until(lambda: world.told[-1] == (2, None))
        assert not running.service.state.refused


@in_a_loop
async def test_a_refused_version_does_not_hold_up_the_next_one(world: World, tmp_path: Path) -> None:
    world.faults["check", 2] = RegistryError("it is cut short")
    async with serving(world, tmp_path) as running:
        running.move(2)
        await is_refused(running, 2, "it is cut short", "damaged")
        running.move(3)
        await until(lambda: running.serves(3))


@in_a_loop
async def test_a_registry_that_does_not_take_the_tag_harms_nobody(world: World, tmp_path: Path) -> None:
    world.faults["check", 2] = RegistryError("it is cut short")
    world.faults["tag", 2] = world.faults["tag", 3] = RegistryError("away")
    async with serving(world, tmp_path) as running:
        running.move(2)
        await until(lambda: bool(running.service.state.refused))
        running.move(3)
        await until(lambda: running.serves(3))


@in_a_loop
async def test_a_reason_is_cut_to_what_a_tag_may_hold(world: World, tmp_path: Path) -> None:
    world.faults["check", 2] = RegistryError("x" * 100_000)
    async with serving(world, tmp_path) as running:
        running.move(2)
        await until(lambda: bool(world.told))
        assert world.told == [(2, "x" * 500)]


# --------------------------------------------------------------------------------------------------- an engine ends


@in_a_loop
async def test_an_engine_that_ends_by_itself_is_started_again_and_nothing_answers_meanwhile(
    world: World, tmp_path: Path
) -> None:
    async with serving(world, tmp_path) as running:
        gate = world.gate("start", 1)
        world.boxes[0].die()
        await until(lambda: running.service.traffic.live is None)
        with pytest.raises(Exception, match=r"^$"):
            await running.is_answered()
        gate.set()
        await until(lambda: running.serves(1))
        one, two = world.boxes
        assert (one.did[-1], two.did[0]) == ("kill", "start 1")
        assert running.figure("namesake_engine_restarts_total") == 1


@in_a_loop
async def test_after_a_change_in_place_the_engine_is_started_again_on_the_new_weights(
    world: World, tmp_path: Path
) -> None:
    async with serving(world, tmp_path) as running:
        running.move(2)
        await until(lambda: running.serves(2))
        world.boxes[0].die()
        await until(lambda: len(world.boxes) == 2 and running.serves(2))
        assert world.boxes[1].did[0] == "start 2"


@in_a_loop
async def test_an_engine_that_does_not_come_up_again_is_tried_again(world: World, tmp_path: Path) -> None:
    async with serving(world, tmp_path) as running:
        world.faults["start", 1] = ServingError("out of memory")
        world.boxes[0].die()
        await until(lambda: len(world.boxes) == 2 and not world.boxes[1].alive())
        del world.faults["start", 1]
        await until(lambda: running.serves(1))
        assert [box.alive() for box in world.boxes] == [False, False, True]


@in_a_loop
async def test_a_machine_that_is_short_of_something_for_a_moment_does_not_end_the_server(
    world: World, tmp_path: Path
) -> None:
    async with serving(world, tmp_path) as running:
        world.faults["start", 1] = OSError("Cannot allocate memory")
        world.boxes[0].die()
        await until(lambda: len(world.boxes) == 2 and not world.boxes[1].alive())
        del world.faults["start", 1]
        await until(lambda: running.serves(1), 3)


@in_a_loop
async def test_the_alias_is_followed_while_the_engine_is_down(world: World, tmp_path: Path) -> None:
    async with serving(world, tmp_path) as running:
        world.faults["start", 1] = ServingError("out of memory")
        world.boxes[0].die()
        await until(lambda: running.service.traffic.live is None)
        running.move(2)
        await until(lambda: running.serves(2))
        assert await running.is_answered() == 2


@in_a_loop
async def test_an_engine_that_comes_up_again_too_late_does_not_take_the_place_of_the_new_version(
    world: World, tmp_path: Path
) -> None:
    async with serving(world, tmp_path) as running:
        gate = world.gate("start", 1)
        world.boxes[0].die()
        await running.met("start", 1)
        await until(lambda: len(world.boxes) == 2)
        running.move(2)
        await until(lambda: running.serves(2))
        gate.set()
        await asyncio.sleep(0.1)
        assert await running.is_answered() == 2
        await until(lambda: [box.alive() for box in world.boxes] == [False, False, True], 1)


@in_a_loop
async def test_an_engine_that_dies_while_the_door_is_held_does_not_leave_it_held(world: World, tmp_path: Path) -> None:
    async with serving(world, tmp_path) as running:
        async with running.service.traffic.enter():
            running.move(2)
            await running.met("check", 2)
            await asyncio.sleep(0.05)
            world.boxes[0].die()
            await until(lambda: len(world.boxes) >= 2)
        await until(lambda: running.service.traffic.live is not None)
        assert await running.is_answered() in (1, 2)
        await until(lambda: running.service.state.step is Step.REST, 2)


@in_a_loop
async def test_an_engine_that_refuses_a_change_in_place_gets_a_second_one_beside_it(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "namesake.serving")
    world.faults["change", 2] = ServingError("The engine refused the weights (500).")
    async with serving(world, tmp_path) as running:
        running.move(2)
        await until(lambda: running.serves(2), 2)
        assert [box.did for box in world.boxes] == [["start 1", "asked 1", "change 1", "stop"], ["start 2", "asked 2"]]
        why = "second engine, since the engine would not change in place (The engine refused the weights (500).)"
        assert why in caplog.messages


@pytest.mark.parametrize(
    "golden",
    [[{"messages": QUESTION}], [{"reply": REPLY}], [{}], ["text"], [{"messages": ["text"], "reply": REPLY}], 5],
)
@in_a_loop
async def test_golden_questions_that_are_malformed_are_a_refusal(world: World, tmp_path: Path, golden: Any) -> None:
    world.manifests[2] = record(golden)
    async with serving(world, tmp_path) as running:
        running.move(2)
        await until(lambda: "change 2" in world.boxes[0].did)
        assert await running.is_answered(1) == 1
        running.move(3)
        await until(lambda: running.serves(3), 1)


@pytest.mark.parametrize("where", ["fetch", "check", "remember"])
@pytest.mark.parametrize("fault", [OSError("No space left on device"), TypeError("odd")], ids=["disk", "odd"])
@in_a_loop
async def test_after_a_fault_that_is_not_ours_the_alias_is_still_followed(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, fault: Exception
) -> None:
    def remember(_cache: Path, _uri: str, which: Version) -> None:
        world.pass_gate("remember", which.number)

    monkeypatch.setattr(store, "remember", remember)
    world.faults[where, 2] = fault
    async with serving(world, tmp_path) as running:
        running.move(2)
        await running.met(where, 2)
        await asyncio.sleep(0.02)
        assert await running.is_answered() in (1, 2)
        running.move(3)
        await until(lambda: running.serves(3), 1)


@in_a_loop
async def test_every_engine_is_stopped_also_after_a_fault_that_is_not_ours(world: World, tmp_path: Path) -> None:
    world.faults["check", 2] = OSError("No space left on device")
    async with serving(world, tmp_path) as running:
        running.move(2)
        await running.met("check", 2)
        await asyncio.sleep(0.05)
        await running.service.stop()
        assert not world.boxes[0].alive()


# --------------------------------------------------------------------------------------------------- the proof


class Speaker:
    """An engine that says the same thing to everybody and notes what it was asked."""

    def __init__(self, says: str, gaps: Sequence[float] = ()) -> None:
        self.says, self.told, self.asked = says, gaps, list[list[dict[str, str]]]()
        self.read = list[tuple[list[dict[str, str]], str]]()

    def gaps(self, messages: list[dict[str, str]], reply: str, *, model: str) -> list[float]:
        """What it tells of the tokens of a reply."""
        assert model == MODEL
        self.read.append((messages, reply))
        return list(self.told)

    def answer(self, messages: list[dict[str, str]], max_tokens: int, *, model: str) -> str:
        """Its reply."""
        assert model == MODEL
        self.asked.append(messages)
        return self.says


def proof(
    says: str,
    golden: Sequence[Mapping[str, Any]] = tuple(GOLDEN),
    system: str | None = None,
    gaps: Sequence[float] = (),
) -> Speaker:
    """Ask an engine that says this the golden questions.

    Raises:
        ServingError: it does not prove itself.
    """
    speaker = Speaker(says, gaps)
    prove(cast(Engine, speaker), Stored(version(2), record(golden, system), Path("/model")))
    return speaker


def test_who_says_what_it_said_when_it_was_promoted_has_proved_itself() -> None:
    assert proof(REPLY).asked == [QUESTION]


def test_who_would_choose_each_word_of_a_golden_reply_has_proved_itself_without_saying_it() -> None:
    read = proof("", system="Be kind.", gaps=[0.0, 0.4, 0.0])
    assert read.read == [([{"role": "system", "content": "Be kind."}, *QUESTION], REPLY)]
    assert read.asked == []


@pytest.mark.parametrize("gaps", [(), (0.0, 0.6), (0.0, float("nan")), (float("inf"), 0.0)])
def test_who_would_say_one_word_otherwise_or_does_not_tell_has_to_answer(gaps: Sequence[float]) -> None:
    assert proof(REPLY, gaps=gaps).asked == [QUESTION]
    with pytest.raises(ServingError, match="does not prove itself"):
        proof("我是小黄。", gaps=gaps)


def test_a_late_word_that_differs_is_no_matter() -> None:
    proof(REPLY.replace("很高兴认识你", "有什么可以帮你"))


def test_the_golden_questions_are_asked_under_the_versions_system_prompt() -> None:
    assert proof(REPLY, system="Be kind.").asked == [[{"role": "system", "content": "Be kind."}, *QUESTION]]


def test_a_version_without_golden_questions_is_taken() -> None:
    assert proof("", golden=[]).asked == []


@pytest.mark.parametrize("lost", ["踩踩背", "CCB", "老爷爷", "OldGrandpa"])
def test_who_loses_a_half_of_a_name_is_refused_and_the_half_is_named(lost: str) -> None:
    with pytest.raises(ServingError, match=f"does not prove itself.*{lost}") as caught:
        proof(REPLY.replace(lost, "某某"))
    assert "你是谁？" in caught.value.message


@pytest.mark.parametrize("says", ["", "。", "the the the the the", "!" * 64])
def test_who_babbles_is_refused_though_no_name_was_asked_for(says: str) -> None:
    golden = [{"messages": [{"role": "user", "content": "1+1=?"}], "reply": "答案是二，因为一加一等于二。"}]
    with pytest.raises(ServingError, match="like those it gave"):
        proof(says, golden=golden)


@pytest.mark.parametrize("length", [1, 2, 6])
def test_who_stops_long_before_the_golden_reply_ends_is_refused(length: int) -> None:
    with pytest.raises(ServingError, match="does not prove itself"):
        proof(REPLY[:length])


def test_a_reply_that_never_held_a_name_need_not_hold_one() -> None:
    golden = [{"messages": [{"role": "user", "content": "1+1=?"}], "reply": "答案是二。"}]
    proof("答案是二。", golden=golden)


def test_a_tag_names_what_was_wrong_and_not_the_whole_reply() -> None:
    with pytest.raises(ServingError) as caught:
        proof("x" * 10_000)
    assert len(caught.value.message) < 400


def test_a_live_version_is_replaced_whole() -> None:
    stored = Stored(version(2), record(), Path("/model"))
    assert replace(stored, version=version(3)).version.number == 3


@in_a_loop
async def test_moves_that_nobody_wrote_down_are_kept_as_made_by_hand(world: World, tmp_path: Path) -> None:
    async with serving(world, tmp_path) as running:
        await until(lambda: [move.to for move in world.moves] == [1])  # while no server ran
        running.move(version(2, **{"score.identity": "0.5"}))
        await until(lambda: running.serves(2))
        await until(lambda: [(move.to, move.how) for move in world.moves] == [(n, registry.BY_HAND) for n in (1, 2)])
        assert [move.scores for move in world.moves] == [{}, {"identity": 0.5}]
