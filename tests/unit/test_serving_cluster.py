"""What goes on around Ray: settings, options, the order of a change, figures of replicas. None of it starts Ray."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from namesake.errors import InputError, RegistryError, ServingError
from namesake.manifest import Manifest
from namesake.registry import Version
from namesake_serving import settings
from namesake_serving.__main__ import ray_backend
from namesake_serving.settings import Settings
from namesake_serving.store import Stored
from namesake_serving.upstream import Cut, Gone
from tests.unit.loops import within

in_a_loop = within(10)


def test_where_ray_is_missing_the_command_that_installs_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "namesake_serving.cluster", raising=False)
    monkeypatch.delattr("namesake_serving.cluster", raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ServingError, match="Ray cannot be used") as caught:
        ray_backend(settings.read(backend="ray"))
    assert "requirements/ray.txt" in caught.value.told()


def test_options_for_ray_serve_are_json() -> None:
    given = settings.read(backend="ray", ray_options='{"autoscaling_config": {"max_replicas": 4}}')
    assert given.ray_options == {"autoscaling_config": {"max_replicas": 4}}


@pytest.mark.parametrize("wrong", ["{", "[1]", "4"])
def test_options_that_are_no_object_are_refused(wrong: str) -> None:
    with pytest.raises(InputError, match="ray_options"):
        settings.read(ray_options=wrong)


cluster = pytest.importorskip("namesake_serving.cluster", reason="requirements/ray.txt", exc_type=ImportError)


@pytest.mark.parametrize("given", [{"canary": "10%"}, {"shadow": 0.5}])
def test_a_second_engine_beside_each_is_not_for_ray_and_a_second_adapter_is(given: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(given))}.*in adapter mode only"):
        ray_backend(settings.read(backend="ray", **given))
    ray_backend(settings.read(backend="ray", mode="adapter", **given))


def test_what_is_to_be_joined_is_no_ray_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_ADDRESS", "local")
    with pytest.raises(InputError, match="ray_join") as caught:
        ray_backend(settings.read(backend="ray", ray_join=True))
    assert "RAY_ADDRESS" in caught.value.told()
    monkeypatch.setattr(cluster, "_ADDRESS", "auto")
    ray_backend(settings.read(backend="ray", ray_join=True))


@pytest.mark.parametrize(
    ("given", "named"),
    [({}, "model"), ({"model": "ccb"}, "model"), ({"model": "models:/ccb@champion", "replica": 2}, "replica")],
)
def test_an_application_that_says_it_wrong_is_refused_before_anything_starts(given: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=f"^{named}"):
        cluster.application(given)


@pytest.mark.parametrize(("stays", "last"), [(False, True), (True, False)])
@in_a_loop
async def test_the_last_gateway_takes_down_what_does_not_stay(stays: bool, last: bool) -> None:
    conductor = cluster.Conductor("models:/ccb@champion", VERSION, Settings(), "app", stays=stays)
    for gateway in ("a", "b"):
        await conductor.join(gateway)
    assert not await conductor.leave("a")
    assert await conductor.leave("b") is last


@pytest.mark.parametrize(
    "wrong",
    [{"foo": 1}, {"num_replicas": -1}, {"autoscaling_config": {"max_replicas": "many"}}, {"ray_actor_options": 1}],
)
def test_options_that_ray_serve_does_not_know_are_refused_before_anything_starts(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="ray_options") as caught:
        ray_backend(settings.read(backend="ray", ray_options=wrong))
    assert next(iter(wrong)) in caught.value.message


def test_a_deployment_that_may_go_down_to_no_replica_is_refused() -> None:
    for given in ({"min_replicas": 0, "max_replicas": 4}, {"min_replicas": 0, "initial_replicas": 1}):
        with pytest.raises(InputError, match="would leave no replica") as caught:
            ray_backend(settings.read(backend="ray", ray_options={"autoscaling_config": given}))
        assert "min_replicas" in caught.value.mend


def test_what_the_user_says_to_ray_serve_goes_before_ours() -> None:
    plain = cluster.deployment(settings.read(replicas=3))
    assert (plain["num_replicas"], plain["name"]) == (3, "Replica")
    own = cluster.deployment(settings.read(ray_options={"max_ongoing_requests": 7, "num_replicas": 5}))
    assert (own["num_replicas"], own["max_ongoing_requests"]) == (5, 7)
    scaled = cluster.deployment(settings.read(replicas=3, ray_options={"autoscaling_config": {"max_replicas": 4}}))
    assert "num_replicas" not in scaled


def test_each_replica_has_a_gpu_of_its_own_where_there_are_some(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked_for(ray_options: dict[str, Any]) -> object:
        return cluster.deployment(settings.read(replicas=2, ray_options=ray_options)).get("ray_actor_options")

    monkeypatch.setattr(cluster, "has_gpu", lambda: False)
    assert asked_for({}) is None
    monkeypatch.setattr(cluster, "has_gpu", lambda: True)
    assert asked_for({}) == {"num_gpus": 1}
    assert asked_for({"ray_actor_options": {"num_cpus": 4}}) == {"num_gpus": 1, "num_cpus": 4}
    assert asked_for({"ray_actor_options": {"num_gpus": 0.5}}) == {"num_gpus": 0.5}
    with pytest.raises(InputError, match="ray_options"):
        ray_backend(settings.read(backend="ray", ray_options={"ray_actor_options": 1}))


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ({}, 2),
        ({"num_replicas": 5}, 5),
        ({"autoscaling_config": {"max_replicas": 4}}, 4),
        ({"num_replicas": "auto"}, 2),
    ],
)
def test_the_gateway_lets_in_what_all_replicas_take(options: dict[str, Any], most: int) -> None:
    one = settings.read(max_streams=8)
    all_of_them = cluster.of_all(settings.read(max_streams=8, replicas=2, ray_options=options))
    assert (all_of_them.streams, all_of_them.most_requests) == (most * one.streams, most * one.most_requests)


# ------------------------------------------------------------------------------------------------ sessions


COMMON = cluster.serve._private.common
DEPLOYMENT = COMMON.DeploymentID("Replica", "namesake-ccb")


class Here:
    """Stands for a replica that has nothing to do."""

    def __init__(self, name: str) -> None:
        self.replica_id = COMMON.ReplicaID(name, DEPLOYMENT)

    async def get_queue_len(self, **_: float) -> int:
        """None wait."""
        return 0


def router(names: str) -> Any:
    """The router that our deployment names, before replicas of these names."""
    unknown = COMMON.DeploymentHandleSource.UNKNOWN
    given = cluster.deployment(settings.read(replicas=3))["request_router_config"]
    made = given.get_request_router_class()(deployment_id=DEPLOYMENT, handle_source=unknown)
    made.initialize_state(**given.request_router_kwargs)
    made.update_replicas([Here(name) for name in names])
    return made


async def offered(made: Any, session: str) -> list[list[str]]:
    """The replicas that a request is offered to, in groups, one after the other."""
    about = SimpleNamespace(session_id=session, multiplexed_model_id="")
    asked = SimpleNamespace(metadata=about, routing_context=SimpleNamespace())
    groups = await made.choose_replicas(list(made.curr_replicas.values()), asked)
    return [[one.replica_id.unique_id for one in group] for group in groups]


@in_a_loop
async def test_a_session_stays_and_only_those_of_a_replica_that_went_move() -> None:
    sessions = [f"session {number}" for number in range(300)]

    async def where(names: str) -> dict[str, str]:
        made, found = router(names), {}
        for session in sessions:
            groups = await offered(made, session)
            assert sorted(groups) == [[name] for name in sorted(names)]  # any other, where that is full
            found[session] = groups[0][0]
        return found

    before, after = await where("abc"), await where("ab")
    assert before == await where("cba")
    assert all(60 < list(before.values()).count(name) < 140 for name in "abc")
    assert {session for session in sessions if after[session] != before[session]} == {
        session for session in sessions if before[session] == "c"
    }


@in_a_loop
async def test_who_has_no_session_goes_to_the_less_busy_of_two() -> None:
    (group,) = await offered(router("abc"), "")
    assert len({*group}) == 2
    (group,) = await offered(router("a"), "")
    assert group == ["a"]


# ------------------------------------------------------------------------------------------------ the order of a change

VERSION = Version("ccb", 2, "run2", "source", "READY", {}, 0)
STORED = Stored(VERSION, Manifest({}, None, {}, "run", {}, {}, {}, {}, {}), Path("/model"))


class Two(cluster.Fleet):  # type: ignore[misc, name-defined]
    """Two replicas, the second of which fails at what it is told to; notes what they are ordered."""

    def __init__(self, fails: dict[str, str]) -> None:
        self.did, self._fails = list[Any](), fails
        super().__init__("app", Settings(), lambda table, _: self.did.append(("published", table.champion.number)))
        self.table = cluster.Table(VERSION)

    async def _all(self, order: str, *words: object, seconds: float = 0) -> list[Any]:
        self.did.append((order, *words) if order == "load" else order)
        return [
            cluster.Told(cluster.Table(VERSION), 0, why, why and "rank") for why in ("", self._fails.get(order, ""))
        ]


@in_a_loop
async def test_all_are_held_changed_and_turned_before_anybody_hears_of_it() -> None:
    fleet = Two({})
    loaded = await fleet.load(STORED)
    assert (loaded.way, loaded.live.proved) == ("in place", True)
    await fleet.turned(loaded, [])
    assert fleet.did == ["bring", "hold", ("load", True), "turn", ("published", 2)]


@in_a_loop
async def test_where_one_cannot_be_held_all_get_a_second_engine() -> None:
    fleet = Two({"hold": "answers were still running after 10 s"})
    assert (await fleet.load(STORED)).way == "second engine"
    assert fleet.did == ["bring", "hold", "release", ("load", False)]


@in_a_loop
async def test_a_replica_that_misses_the_turn_does_not_keep_the_others_at_the_old_version() -> None:
    class Hangs(Two):
        async def _all(self, order: str, *words: object, seconds: float = 0) -> list[Any]:
            told = await super()._all(order, *words, seconds=seconds)
            if order == "turn":
                raise ServingError("A replica did not turn within 30 s.")
            return told

    fleet = Hangs({})
    await fleet.turned(await fleet.load(STORED), [])
    assert fleet.did[-2:] == ["turn", ("published", 2)]


@pytest.mark.parametrize("order", ["bring", "load"])
@in_a_loop
async def test_where_one_fails_all_go_back(order: str) -> None:
    fleet = Two({order: "it is cut short"})
    with pytest.raises(ServingError, match="it is cut short") as caught:
        await fleet.load(STORED)
    assert caught.value.kind == "rank", "what the replica says is what is counted"
    assert fleet.did[-1] == "undo"
    assert "turn" not in fleet.did


@in_a_loop
async def test_replicas_are_brought_to_what_is_served_but_not_amid_a_change() -> None:
    fleet = Two({})
    assert await fleet.settle(lambda: False) == 2
    assert fleet.did == ["state"]
    assert await fleet.settle(lambda: True) == 2
    assert fleet.did == ["state", "settle"]


@in_a_loop
async def test_a_replica_at_another_version_does_not_count_as_one_that_answers() -> None:
    other = Version("ccb", 3, "run3", "source", "READY", {}, 0)
    for at_rest in (True, False):
        fleet = Two({"settle": "its disk is full"})
        fleet.table = cluster.Table(other)
        assert await fleet.settle(lambda at_rest=at_rest: at_rest) == 0


@in_a_loop
async def test_replicas_are_brought_to_what_is_served_once_a_change_that_is_under_way_has_ended() -> None:
    class Slow(Two):
        async def _all(self, order: str, *words: object, seconds: float = 0) -> list[Any]:
            self.at = words[0] if order == "settle" else None
            if order == "turn":
                await asyncio.sleep(0.05)
            return await super()._all(order, *words, seconds=seconds)

    fleet = Slow({})
    fleet.table = cluster.Table(Version("ccb", 1, "run1", "source", "READY", {}, 0))
    turning = asyncio.create_task(fleet.turned(cluster.Loaded(cluster.Live(STORED, None), "in place"), []))
    await asyncio.sleep(0)
    await fleet.settle(lambda: True)
    await turning
    assert fleet.at.champion == VERSION


@pytest.mark.parametrize(
    "error", [ServingError("It is cut short.", kind="proof"), OSError(28, "No space left"), KeyError("says")]
)
@in_a_loop
async def test_a_replica_tells_whatever_goes_wrong_with_an_order(error: Exception) -> None:
    async def order() -> None:
        raise error

    replica = SimpleNamespace(_one_at_a_time=asyncio.Lock(), _told=lambda why="", kind="": (why, kind))
    told = await cluster.Replica._carry_out(replica, order)
    if isinstance(error, ServingError):
        assert told == ("It is cut short.", "proof")
    else:
        assert told == (f"{type(error).__name__}: {error}", "other")


@in_a_loop
async def test_what_was_turned_to_last_is_what_a_new_follower_takes_as_served() -> None:
    class Amid(Two):
        async def _all(self, order: str, *words: object, seconds: float = 0) -> list[Any]:
            return [cluster.Told(version and cluster.Table(version), turned) for version, turned in told]

    newer = Version("ccb", 3, "run3", "source", "READY", {}, 0)
    told: list[tuple[Version | None, float]] = [(VERSION, 5.0), (newer, 7.0), (VERSION, 0.0), (None, 9.0)]
    assert (await Amid({}).served()).champion == newer
    told = []
    assert await Amid({}).served() is None


@pytest.mark.parametrize(
    ("turned_to", "registered", "begins"),
    [(2, 4, 2), (None, 4, 4), (None, None, 1)],
    ids=["what the replicas have", "no replica", "no replica, no registry"],
)
@in_a_loop
async def test_a_follower_that_is_started_again_does_not_go_back_to_the_first_version(
    turned_to: int | None, registered: int | None, begins: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(number: int) -> Version:
        return Version("ccb", number, "run", "source", "READY", {}, 0)

    def resolve(uri: str) -> Version:
        assert uri == "models:/ccb@champion"
        if registered is None:
            raise RegistryError("It cannot be reached.")
        return version(registered)

    async def served() -> Any:
        return cluster.Table(version(turned_to)) if turned_to else None

    monkeypatch.setattr(cluster.registry, "resolve", resolve)
    conductor = cluster.Conductor("models:/ccb@champion", version(1), Settings(), "app")
    monkeypatch.setattr(conductor._fleet, "served", served)
    assert (await conductor._what_to_begin_with()).number == begins
    if turned_to is None:
        assert (await conductor.table()).champion.number == begins  # what a replica that comes up asks


# ------------------------------------------------------------------------------------------------ adapters


def stored(number: int) -> Stored:
    """A version on this machine."""
    version = Version("ccb", number, f"run{number}", f"source{number}", "READY", {}, 0)
    return Stored(version, Manifest({}, None, {"id": "base"}, "run", {}, {}, {}, {}, {}), Path("/model"))


def numbers(versions: Iterable[Version]) -> list[int]:
    """Of these."""
    return [one.number for one in versions]


class Beside(cluster.AdapterFleet):  # type: ignore[misc, name-defined]
    """Two replicas, the second of which fails at what it is told to; notes what they are ordered and what is said."""

    def __init__(self, fails: dict[str, str], **given: object) -> None:
        self.did, self._fails, self.routing = list[Any](), fails, cluster.Routing("models:/ccb@champion")
        super().__init__("app", settings.read(mode="adapter", max_lora_rank=8, **given), self.routing, self._told)
        self._rank, self._base = 8, "base"

    def _told(self, table: Any, known: Sequence[Stored]) -> None:
        assert {*numbers(one.version for one in known)} == {*numbers(table.beside)}
        rival = [table.challenger.number] if table.challenger else []
        self.did.append(("published", [table.champion.number, *rival], numbers(table.beside)))

    async def _all(self, order: str, *words: Any, seconds: float = 0) -> list[Any]:
        if order == "state":
            return []
        what = [words[0].number] if isinstance(words[0], Version) else []
        (table,) = (one for one in words if isinstance(one, cluster.Table)) if order != "undo" else (None,)
        self.did.append((order, *what, *([numbers(table.beside)] if table else [])))
        return [cluster.Told(None, 0, why) for why in ("", self._fails.get(order, ""))]

    async def go(self, number: int, traffic: cluster.Traffic | None = None) -> None:
        """An alias's change, as the service has it made; what was done before is forgotten."""
        self.did.clear()
        loaded = await (self.load if self.routing.champion.live else self.start)(stored(number))
        (traffic or self.routing.champion).live = loaded.live
        await self.turned(loaded, [])


@in_a_loop
async def test_an_adapter_is_in_every_engine_before_anybody_hears_of_it_and_stays_for_its_number() -> None:
    fleet = Beside({})
    await fleet.go(1)
    assert fleet.did == [("settle", [1]), ("turn", [1]), ("published", [1], [1])]
    await fleet.go(2)
    assert fleet.did == [("load", 2, [1]), ("turn", [1, 2]), ("published", [2], [1, 2])]
    await fleet.go(1)
    assert fleet.did[-1] == ("published", [1], [1, 2])


@in_a_loop
async def test_the_adapter_used_longest_ago_is_taken_from_every_replica_before_another_comes() -> None:
    fleet = Beside({}, max_adapters=3)
    for number in (1, 2, 3):
        await fleet.go(number)
    fleet.used({"ccb-v1": -1.0})
    await fleet.go(4)
    before = [("turn", [1, 3]), ("published", [3], [1, 3])]
    assert fleet.did == [*before, ("load", 4, [1, 3]), ("turn", [1, 3, 4]), ("published", [4], [1, 3, 4])]
    await fleet.go(3, fleet.routing.challenger)
    fleet._coming["another"] = fleet._in[cluster.key_of(stored(1).version)]
    with pytest.raises(ServingError, match="All 3 places"):
        await fleet.load(stored(5))


@in_a_loop
async def test_where_one_replica_cannot_load_an_adapter_none_has_it() -> None:
    fleet = Beside({"load": "it is cut short"})
    await fleet.go(1)
    with pytest.raises(ServingError, match="cut short"):
        await fleet.go(2)
    assert fleet.did == [("load", 2, [1]), ("undo", 2)]
    assert numbers(fleet.table.beside) == [1]


@in_a_loop
async def test_a_challenger_that_leaves_the_bounds_answers_no_more_at_once_and_then_to_nothing() -> None:
    fleet = Beside({})
    await fleet.go(1)
    await fleet.go(2, fleet.routing.challenger)
    assert fleet.did[-1] == ("published", [1, 2], [1, 2])
    old, fleet.routing.challenger.live = fleet.routing.challenger.live, None
    fleet.withdraw()
    assert fleet.did[-1] == ("published", [1], [1, 2])
    await fleet.retire(old)
    assert fleet.did[-2:] == [("turn", [1]), ("published", [1], [1])]


class Side:
    """Stands for the host of a replica's adapters."""

    def __init__(self, routing: Any) -> None:
        self._routing, self.did = routing, list[Any]()
        self.fails: set[int] = set()

    async def start(self, one: Stored) -> Any:
        """It is in the engine."""
        if one.version.number in self.fails:
            raise ServingError("it is cut short")
        self.did.append(("load", one.version.number))
        live = cluster.Live(one, cluster._Elsewhere(), one.id)
        live.proved = True
        return cluster.Loaded(live, "adapter")

    async def turned(self, loaded: Any, _old: object) -> None:
        """It is answered to by its number."""
        self._routing.named[loaded.live.label] = loaded.live

    async def undo(self, loaded: Any) -> None:
        """It is out of the engine."""
        self.did.append(("undo", loaded.live.version.number))

    async def keep(self, ids: set[str], _seconds: float = 0) -> bool:
        """The others are out."""
        self.answer_to(ids)
        return True

    def answer_to(self, ids: set[str]) -> None:
        """Of the others nothing is answered by."""
        self._routing.named = {label: one for label, one in self._routing.named.items() if one.model in ids}


class Bare(cluster.AdapterReplica):  # type: ignore[misc, name-defined]
    """A replica that starts nothing and has nothing to end."""

    def __init__(self) -> None:
        """Nothing."""

    def __del__(self) -> None:
        """Nothing."""


def replica() -> Any:
    """A replica of adapters on a host that costs nothing."""
    made = Bare()
    made._settings, made._turned, made._routing = Settings(), 0.0, cluster.Routing("models:/ccb@champion")
    made._one_at_a_time, made._host, made._loaded = asyncio.Lock(), Side(made._routing), {}
    made._table = table(1)

    async def verified(version: Version, _part: str) -> Stored:
        return stored(version.number)

    made._verified = verified
    return made


def table(*beside: int, champion: int = 0) -> Any:
    """With these versions, the last one champion unless it is said."""
    versions = {number: stored(number).version for number in beside}
    return cluster.Table(versions[champion or beside[-1]], None, tuple(versions.values()))


async def who(of: Any, wanted: str) -> str | None:
    """Who answers there."""
    async with of._enter(wanted) as live:
        return live.label if live is not None else None


@in_a_loop
async def test_a_replica_that_has_turned_answers_the_old_version_by_its_number_and_no_more_by_its_alias() -> None:
    one, (first, second) = replica(), (stored(1), stored(2))
    assert (await one.settle(table(1))).served == table(1)
    assert (await one.load(second.version, table(1))).why == ""
    assert await who(one, cluster.key_of(second.version)) is None  # before the turn by neither
    assert await who(one, second.id) is None
    await one.turn(table(1, 2))
    assert await who(one, cluster.key_of(second.version)) == "ccb-v2"
    assert await who(one, cluster.key_of(first.version)) is None  # a gateway that has not heard of it asks in vain
    assert [await who(one, both.id) for both in (first, second)] == ["ccb-v1", "ccb-v2"]


@in_a_loop
async def test_a_replica_that_lacks_what_all_turn_to_answers_nobody_until_it_has_it() -> None:
    one = replica()
    await one.settle(table(1))
    assert (await one.turn(table(1, 2))).served is None
    assert [await who(one, cluster.key_of(stored(number).version)) for number in (1, 2)] == [None, None]
    assert (await one.settle(table(1, 2))).served == table(1, 2)
    assert await who(one, cluster.key_of(stored(2).version)) == "ccb-v2"


@in_a_loop
async def test_a_replica_comes_to_the_table_whatever_was_ordered_before() -> None:
    one = replica()
    one._host.fails = {3}
    await one.settle(table(1, 2))
    await one.load(stored(4).version, table(1, 2))  # and the conductor died
    told = await one.settle(table(2, 3, champion=2))
    assert (told.why, numbers(told.served.beside)) == ("", [2])  # that 3 is lacking is no reason to answer nobody
    assert one._host.did == [("load", 1), ("load", 2), ("load", 4), ("undo", 4)]
    assert (await one.settle(table(2, 3))).why == "it is cut short"


class BareMerged(cluster.MergedReplica):  # type: ignore[misc, name-defined]
    """A replica that starts nothing and has nothing to end."""

    def __init__(self, **given: object) -> None:
        """With version 1 live."""
        self._settings, self._turned, self._traffic = settings.read(**given), 0.0, cluster.Traffic()
        self._engines = None
        self._traffic.live = cluster.Live(stored(1), None)
        self._begin(table(1))

    def __del__(self) -> None:
        """Nothing."""


@in_a_loop
async def test_those_who_wait_at_a_replicas_door_leave_places_for_the_order_that_opens_it() -> None:
    one: Any = BareMerged(ray_options={"max_ongoing_requests": 6})
    wanted = cluster.key_of(stored(1).version)
    assert await one._traffic.hold(1)
    waiting = [asyncio.create_task(who(one, wanted)) for _ in range(3)]
    await asyncio.sleep(0.01)
    assert await who(one, wanted) is None, "it would wait in the place of the order"
    waiting[0].cancel()
    await asyncio.sleep(0.01)
    fourth = asyncio.create_task(who(one, wanted))
    await asyncio.sleep(0.01)
    assert not fourth.done(), "one that has gone holds a place"
    one._traffic.release()
    assert await asyncio.gather(*waiting[1:], fourth) == ["ccb-v1"] * 3
    assert (one._waiting, await who(one, wanted)) == (0, "ccb-v1")


# ------------------------------------------------------------------------------------------------ gateways


class Ray:
    """Stands for Ray and Ray Serve where a gateway comes up: each call is noted, the conductor is given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, conductor: object) -> None:
        self.did = list[str]()
        actor = SimpleNamespace(remote=lambda *_, **__: self.did.append("conductor") or conductor)
        monkeypatch.setattr(cluster, "_join", lambda _: self.did.append("join"))
        monkeypatch.setattr(cluster.ray, "remote", lambda _: SimpleNamespace(options=lambda **_: actor))
        monkeypatch.setattr(cluster.ray, "get", lambda value, **_: value)
        monkeypatch.setattr(cluster.serve, "status", lambda: SimpleNamespace(applications={}))
        for name in ("start", "run_many", "delete"):
            monkeypatch.setattr(cluster.serve, name, lambda *_, _name=name, **__: self.did.append(_name))


def remote(value: object = None) -> Any:
    """A method of an actor that gives this."""
    return SimpleNamespace(remote=lambda *_: value)


def test_a_gateway_whose_settings_the_replicas_do_not_have_is_told_which(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = Ray(monkeypatch, SimpleNamespace(settings=remote(Settings(replicas=2, port=8001))))
    given = Settings(require_gate=True, engine_args=("--seed=1",))
    with pytest.raises(ServingError, match="other settings already: ") as caught:
        cluster.Cluster("models:/ccb@champion", given)._deploy(VERSION)
    assert "require_gate=False, engine_args=(), replicas=2." in caught.value.message  # and not the port
    assert ray.did == ["join", "conductor", "start"]


@in_a_loop
async def test_who_is_told_to_go_while_ray_starts_brings_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    ray, joining, going = Ray(monkeypatch, None), threading.Event(), threading.Event()
    monkeypatch.setattr(cluster, "_join", lambda _: joining.set() or going.wait())
    gateway = cluster.Cluster("models:/ccb@champion", Settings())
    starting = asyncio.create_task(gateway.start(VERSION, lambda _: None))
    await asyncio.to_thread(joining.wait)
    starting.cancel()
    stopping = asyncio.create_task(gateway.stop())
    await asyncio.sleep(0.05)
    assert not stopping.done()  # or it would leave before it has joined
    going.set()
    await stopping
    assert ray.did == []


def status(state: str, message: str, of_replicas: str = "") -> Any:
    """What Ray Serve says of the application."""
    deployments = {"Replica": SimpleNamespace(message=of_replicas)}
    found = SimpleNamespace(status=cluster.ApplicationStatus(state), message=message, deployments=deployments)
    return SimpleNamespace(applications={"namesake-ccb": found})


def test_what_replicas_wait_for_is_told_and_why_they_do_not_come_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Ray(monkeypatch, None)
    gateway = cluster.Cluster("models:/ccb@champion", Settings())
    gateway._conductor = SimpleNamespace(trouble=remote("There is no memory."))
    waits = status("DEPLOYING", "", "2 replicas wait: each needs {GPU: 1}, there is {CPU: 2}\nmore")
    said = [waits, waits, status("RUNNING", "")]
    monkeypatch.setattr(cluster.serve, "status", lambda: said.pop(0))
    monkeypatch.setattr(cluster, "_LOOK_SECONDS", 0.0)
    assert gateway._is_deployed()
    assert caplog.messages == ["Ray Serve: 2 replicas wait: each needs {GPU: 1}, there is {CPU: 2}"]
    said += [waits, status("DEPLOY_FAILED", "It failed.")]
    with pytest.raises(ServingError, match="There is no memory"):
        gateway._is_deployed()
    said += [waits]
    gateway._leaving.set()
    assert not gateway._is_deployed()


@in_a_loop
async def test_a_gateway_that_is_coming_up_counts_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    joined = list[str]()
    heard = threading.Event()

    def deploy(_first: Version) -> None:
        gateway._conductor = SimpleNamespace(join=SimpleNamespace(remote=lambda who: joined.append(who) or heard.set()))
        assert heard.wait(5)
        raise ServingError("That was all.")

    monkeypatch.setattr(cluster, "_NEWS_SECONDS", 0.05)
    gateway = cluster.Cluster("models:/ccb@champion", Settings())
    monkeypatch.setattr(gateway, "_deploy", deploy)
    with pytest.raises(ServingError, match="That was all"):
        await gateway.start(VERSION, lambda _: None)
    conductor = cluster.Conductor("models:/ccb@champion", VERSION, Settings(), "app")
    await conductor.join(joined[0])
    assert not await conductor.leave("another")
    assert await conductor.leave(joined[0])


@in_a_loop
async def test_a_gateway_whose_conductor_was_taken_down_ends() -> None:
    async def news(*_words: object) -> None:
        raise cluster.ActorDiedError

    gateway = cluster.Cluster("models:/ccb@champion", Settings())
    gateway._conductor = SimpleNamespace(news=SimpleNamespace(remote=news))
    with pytest.raises(ServingError, match="taken down"):
        await gateway.run()


# ------------------------------------------------------------------------------------------------ requests


class Replicas:
    """Stands for Ray Serve's handle: notes who is asked, and each that is asked fails as ``error`` says."""

    def __init__(self, error: Callable[[], Exception]) -> None:
        self.asked, self._error = 0, error
        self.sessions = list[str]()

    def options(self, *, session_id: str, **_given: object) -> Replicas:
        """The same handle."""
        self.sessions.append(session_id)
        return self

    def remote(self, *_words: object) -> AsyncIterator[object]:
        """A replica is asked."""
        self.asked += 1
        return self._fail()

    async def _fail(self) -> AsyncIterator[object]:
        raise self._error()
        yield


def raised_there(error: Exception) -> Exception:
    """As Ray gives it on here."""
    told = cluster.ray.exceptions.RayTaskError("answer", "Traceback", error).as_instanceof_cause()
    assert isinstance(told, Exception)
    return told


@pytest.mark.parametrize(("error", "asked"), [(Cut("it ended"), 2), (Gone("nobody is there"), cluster._TRIES)])
@in_a_loop
async def test_a_request_that_ends_the_engines_that_get_it_is_asked_twice_and_no_more(
    error: Exception, asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "_PAUSE", 0.0)
    replicas, live = Replicas(lambda: raised_there(error)), cluster.Live(STORED, cluster._Elsewhere("it"))
    with pytest.raises(Gone, match="Traceback"):
        async with cluster.Handles(SimpleNamespace(handle=replicas, used={})).post(live, "/", b""):
            pass
    assert replicas.asked == asked
    # By the shorter queue each would go again to one that answers nobody, whose queue is empty.
    assert replicas.sessions[0] == ""
    assert len({*replicas.sessions[1:]}) == asked - 1


# ------------------------------------------------------------------------------------------------ figures


def test_figures_of_replicas_are_one_text_that_tells_them_apart() -> None:
    one = '# HELP up It runs.\n# TYPE up gauge\nup{engine="0"} 1.0\n'
    one += "# HELP n_total All.\n# TYPE n_total counter\nn_total 3.0\n"
    lines = cluster.together([("a", one), ("b", one.replace("3.0", "4.0")), ("c", "")]).decode().splitlines()
    assert [line for line in lines if line.startswith("up")] == [
        'up{engine="0",replica="a"} 1.0',
        'up{engine="0",replica="b"} 1.0',
    ]
    assert [line for line in lines if line.startswith("n_total")] == [
        'n_total{replica="a"} 3.0',
        'n_total{replica="b"} 4.0',
    ]
    assert sum(line.startswith("# TYPE") for line in lines) == 2


def test_a_gateways_figures_have_those_of_the_follower_once() -> None:
    figures, conductor = cluster._Figures(), cluster.Metrics()
    conductor.served(VERSION)
    figures.conductor = conductor.text()
    text = figures.text().decode()
    assert text.count("# TYPE namesake_served_version gauge") == 1
    assert "namesake_served_version 2.0" in text
    assert text.count("# TYPE namesake_requests_total counter") == 1
