"""The same front before several engines, on Ray Serve: one follower for all of them, one moment at which all turn.

::

    gateway ──asks by version──▶ Replica (Ray Serve, n of them): an engine host of :mod:`hosts`, and its engine
       ▲                             ▲
       └── what answers now ── Conductor (one named actor): asks the registry, orders every replica

A change has two phases. *Prepare*: every replica fetches, verifies, loads and proves the version, unseen by clients;
one that fails has it undone everywhere. *Turn*: every replica answers by it. Only then do gateways hear of it. A
gateway asks for an answer by the version it knows, and a replica that has another one does not answer: so whoever has
seen the new version never sees the old one again, whichever replica is asked, and one that missed the change, or joined
late, answers nobody until it has been brought to what is served. With adapters a version stays in the engines for those
who ask for it by its number; which of them do is settled by the conductor, and is the same on every replica.

Ray Serve starts, scales, watches and replaces replicas, and routes, by two routers of its own; none of that is ours but
which of the two a request goes by (:class:`Sessions`). The only importer of Ray.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import tempfile
import threading
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from namesake.process import has_gpu, hurry, own_ray

# Read when ray is imported. Nothing is told to anybody; a call that comes too late joins no other Ray of this machine.
os.environ.update({"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_AUTO_CONNECT": "0"})
if os.environ.get("RAY_ADDRESS", "") in ("", "local"):
    os.environ.update(own_ray())

import ray
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from ray import serve
from ray.exceptions import ActorDiedError, RayError
from ray.serve._private.request_router import PowerOfTwoChoicesRequestRouter
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import RayServeException
from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import LocalityMixin, PendingRequest, RunningReplica
from ray.serve.schema import ApplicationStatus

from namesake import registry
from namesake.errors import InputError, NamesakeError, ServingError
from namesake.manifest import ADAPTER_FOLDER, WEIGHTS_FOLDER
from namesake.messages import tr
from namesake.paths import cache_folder, temporary
from namesake.registry import Version
from namesake_serving import engine, logs, store
from namesake_serving.engine import Engine
from namesake_serving.hosts import Adapters, Engines, Loaded, Merged, Tick, no_place, no_tick
from namesake_serving.metrics import Metrics
from namesake_serving.rollout import State
from namesake_serving.service import Service, key_of, kind_of, number_in, prove_once, verified
from namesake_serving.settings import Settings, read
from namesake_serving.store import Stored, id_of
from namesake_serving.traffic import Answerer, Live, Routing, Traffic
from namesake_serving.upstream import FIGURES_SECONDS, Cut, Gone, Moved, Reply, Sockets

_ADDRESS = os.environ.get("RAY_ADDRESS") or "local"

NAMESPACE = "namesake"
"""Of the named actor, in Ray."""

_DEPLOYMENT = "Replica"
_NEWS_SECONDS = 1.0
_LOOK_SECONDS = 0.2
_TRIES, _PAUSE = 80, 0.1
"""How often a request looks for a replica that can answer it before the client gets a 503, and the seconds between."""
_CUTS = 2
"""How many engines may end while they have a request: it may be what they end of."""
_ORDER_SECONDS = 30.0
_GONE_SECONDS = 5.0
_OBJECT_STORE_BYTES = 128 << 20
_OURS = (
    *("namesake_version_change", "namesake_served", "namesake_alias", "namesake_registry"),
    *("namesake_challenger", "namesake_canary"),
)
"""Figures that the conductor counts, for every gateway."""

_SHARED = (
    *("public_key", "require_gate", "engine_args", "eager", "max_streams", "max_tokens", "replicas", "ray_options"),
    *("poll_seconds", "hold_seconds", "start_seconds", "shutdown_seconds", "keep_versions"),
    *("mode", "base", "max_adapters", "max_lora_rank", "any_version"),
    *("challenger", "canary", "canary_errors", "canary_latency", "canary_least", "shadow"),
)
"""Settings of conductor and replicas, who have them from the first gateway."""

_log = logging.getLogger("namesake.serving")

hurry()  # conductor and replicas are processes of Ray's


# ------------------------------------------------------------------------------------------------------- a replica


@dataclass(frozen=True)
class Table:
    """What answers, as the conductor tells it.

    Attributes:
        champion: what is served.
        challenger: what is compared with it; none where nothing is.
        beside: in adapter mode, every version that is answered to by its number, those two among them.
        rank: in adapter mode, the rank that every engine makes room for: that of the version served first, not that of
            whichever an engine happens to be started with.
        base: in adapter mode, what clients call the base.
    """

    champion: Version
    challenger: Version | None = None
    beside: tuple[Version, ...] = ()
    rank: int = 0
    base: str = ""

    def has(self, version: Version) -> bool:
        """Whether it is answered to by its number."""
        return key_of(version) in map(key_of, self.beside)


@dataclass(frozen=True)
class Told:
    """What a replica says when it has carried out an order.

    Attributes:
        served: what it answers by, without versions that it does not have; none: by nothing.
        turned: when it last turned to another table, in seconds since 1970; 0: never since it was started.
        why: why it could not do what was ordered; empty: it did.
        kind: the same in a word, as metrics count it.
    """

    served: Table | None
    turned: float
    why: str = ""
    kind: str = ""


class Replica:
    """One engine and its door: a deployment of Ray Serve around an engine host of :mod:`hosts`.

    Args:
        follower: name of the conductor, who says what to begin with.
    """

    async def __init__(self, follower: str, settings: Settings) -> None:  # type: ignore[misc]
        _log_to_stderr(settings)
        self._settings, self._turned = settings, 0.0
        self._folder = tempfile.TemporaryDirectory(prefix=temporary("replica"))
        self._engines = Engines(settings, Path(self._folder.name))
        self._sockets = Sockets()
        self._one_at_a_time = asyncio.Lock()
        conductor = ray.get_actor(follower, namespace=NAMESPACE)
        try:
            table: Table = await conductor.table.remote()
            self._routing = Routing(table.champion.uri)
            self._traffic = self._routing.champion
            self._begin(table)
            if why := await self._settle(table):
                raise ServingError(why)
            newest: Table = await conductor.table.remote()
            if newest != table:  # it moved on while the engine started
                await self._settle(newest)
        except BaseException as error:
            await self._engines.stop()
            if isinstance(error, NamesakeError):
                await conductor.trouble.remote(error.message)
            raise
        self._turned = 0.0

    async def answer(self, wanted: str, path: str, body: bytes) -> AsyncIterator[object]:
        """A reply by what is wanted: status, content type and its first part (of one that is no stream: all of it),
        then the others; ``None`` where it is not here.

        Args:
            wanted: what an alias stands for, as :func:`key_of` names it; else what the engine calls it.
        """
        async with self._enter(wanted) as live:
            if live is None:
                yield None
                return
            async with self._sockets.post(live, path, body) as reply:
                # Nothing is said before there is a part of the answer: until then another replica can give it.
                if not reply.kind.startswith("text/event-stream"):
                    yield reply.status, reply.kind, await reply.read()
                    return
                parts = reply.chunks()
                yield reply.status, reply.kind, await anext(parts, b"")
                async for part in parts:
                    yield part

    async def figures(self) -> tuple[str, bytes]:
        """The name of the replica, and vLLM's metrics."""
        name = str(serve.get_replica_context().replica_id.unique_id)
        with suppress(Gone):
            for one in self._answerers():
                return name, await self._sockets.figures(one)
        return name, b""

    async def check_health(self) -> None:
        """Ray Serve replaces a replica that raises here.

        Raises:
            ServingError: its engine has ended by itself.
        """
        for one in self._answerers():
            if not one.engine.alive() and not self._one_at_a_time.locked():
                raise ServingError(tr("The engine ended by itself.\n{tail}", tail=one.engine.tail(5)))

    async def state(self) -> Told:
        """What it answers by."""
        return self._told()

    async def turn(self, table: Table) -> Told:
        """Answer by that, as far as it is loaded."""
        return await self._carry_out(lambda: self._turn(table))

    async def settle(self, table: Table) -> Told:
        """Whatever happened to orders before: answer by that."""
        return await self._carry_out(lambda: self._settle(table))

    async def __del__(self) -> None:
        """Ray Serve takes it down; its requests have ended."""
        await self._sockets.close()
        await self._engines.stop()
        self._folder.cleanup()

    def _told(self, why: str = "", kind: str = "") -> Told:
        return Told(self._served(), self._turned, why, kind)

    async def _carry_out(self, order: Callable[[], Awaitable[str | None]]) -> Told:
        async with self._one_at_a_time:
            try:
                return self._told(await order() or "")
            except NamesakeError as error:
                return self._told(error.message, kind_of(error))
            except Exception as error:  # whatever it is, it has to be undone here and everywhere
                _log.exception("an order went wrong")
                return self._told(f"{type(error).__name__}: {error}", kind_of(error))

    async def _verified(self, version: Version, part: str) -> Stored:
        stay = [one.stored.id for one in self._answerers() if isinstance(one, Live)]
        return await asyncio.to_thread(verified, version, self._settings, cache_folder(), part, stay)

    def _answerers(self) -> Sequence[Answerer]:
        """Whatever its engine answers by."""
        raise NotImplementedError

    def _begin(self, table: Table) -> None:
        """Before the first engine is started."""
        raise NotImplementedError

    def _enter(self, wanted: str) -> AbstractAsyncContextManager[Answerer | None]:
        """What is wanted, counted as answering one request more; none where it is not here."""
        raise NotImplementedError

    def _served(self) -> Table | None:
        raise NotImplementedError

    async def _turn(self, table: Table) -> str | None:
        raise NotImplementedError

    async def _settle(self, table: Table) -> str | None:
        raise NotImplementedError


class MergedReplica(Replica):
    """Merged weights, changed in place where that can be."""

    def _begin(self, table: Table) -> None:
        del table
        self._host = Merged(self._engines, self._traffic, self._settings)
        self._coming: Stored | None = None
        self._loaded: Loaded | None = None
        # Orders have to get in, too: one that is to open the door must not wait behind those who wait at it.
        self._waiting, self._most_waiting = 0, deployment(self._settings)["max_ongoing_requests"] // 2

    async def bring(self, version: Version) -> Told:
        """Get the version's files and check them."""
        return await self._carry_out(lambda: self._fetch(version))

    async def hold(self) -> Told:
        """Hold the door, once running answers have ended; why the change cannot be made in place."""
        return await self._carry_out(self._hold)

    async def release(self) -> Told:
        """Open the door again: the change is to be made with a second engine."""
        return await self._carry_out(self._release)

    async def load(self, in_place: bool) -> Told:
        """Load what was brought, unseen by clients, and prove it."""
        return await self._carry_out(lambda: self._load(in_place=in_place))

    async def undo(self) -> Told:
        """Forget what was brought: back to what was."""
        return await self._carry_out(self._undo)

    def _answerers(self) -> Sequence[Answerer]:
        return [self._traffic.live] if self._traffic.live is not None else []

    @asynccontextmanager
    async def _enter(self, wanted: str) -> AsyncIterator[Answerer | None]:
        if not self._traffic.open and self._waiting >= self._most_waiting:
            yield None
            return
        async with AsyncExitStack() as stack:
            self._waiting += 1
            try:
                live = await stack.enter_async_context(self._traffic.enter())
            finally:
                self._waiting -= 1
            yield live if key_of(live.version) == wanted else None

    def _served(self) -> Table | None:
        live = self._traffic.live
        return Table(live.version) if live is not None else None

    async def _fetch(self, version: Version) -> None:
        await self._host.gone()  # the engine before the last, or there is no room
        self._coming = await self._verified(version, WEIGHTS_FOLDER)

    async def _hold(self) -> str:
        # Where the engine has just died the others need no second one for that.
        return await self._host.hold(self._coming) if self._coming is not None and self._runs() else ""

    def _runs(self) -> bool:
        live = self._traffic.live
        return live is not None and live.engine.alive()

    async def _release(self) -> None:
        self._traffic.release()

    async def _load(self, *, in_place: bool) -> str | None:
        if self._coming is None:  # it has joined after the others were told what comes
            return None
        if in_place and self._runs():
            self._loaded, why = await self._host.change(self._coming)
            if self._loaded is None:
                return why
        else:
            self._loaded = await self._host.start(self._coming)
        await prove_once(self._loaded.live)
        return None

    async def _turn(self, table: Table) -> None:
        del table  # there is one version only that it can be
        loaded, old = self._loaded, self._traffic.live
        self._coming = self._loaded = None
        if loaded is None:
            return
        self._traffic.live, self._turned = loaded.live, time.time()
        await self._host.turned(loaded, [old] if old is not None else [])

    async def _undo(self) -> None:
        loaded = self._loaded
        self._coming = self._loaded = None
        if loaded is not None:
            await self._host.undo(loaded)
        self._traffic.release()

    async def _settle(self, table: Table) -> str | None:
        version, coming, loaded, live = table.champion, self._coming, self._loaded, self._traffic.live
        if coming is not None:  # whoever ordered that is gone, or the order to turn got lost
            if loaded is not None and loaded.live.proved and key_of(coming.version) == key_of(version):
                await self._turn(table)
                return None
            await self._undo()
        if live is not None and key_of(live.version) == key_of(version):
            return None
        try:  # a change for this replica alone
            await self._fetch(version)
            in_place = not await self._hold()
            why = await self._load(in_place=in_place)
        except BaseException:
            await self._undo()
            raise
        if why:
            await self._undo()
            return why
        await self._turn(table)
        return None


class AdapterReplica(Replica):
    """The base, and versions side by side on it, each an adapter under a name that no other version ever has."""

    def _begin(self, table: Table) -> None:
        given = self._settings.model_copy(update={"max_lora_rank": table.rank})
        self._host = Adapters(self._engines, self._routing, given, Path(self._folder.name))
        self._table = replace(table, beside=())
        self._loaded: dict[str, Loaded] = {}

    async def load(self, version: Version, table: Table) -> Told:
        """Load a version, unseen by clients, and prove it; what is not in the table makes room."""
        return await self._carry_out(lambda: self._load(version, table, self._settings.hold_seconds))

    async def undo(self, version: Version) -> Told:
        """Forget what was loaded."""
        return await self._carry_out(lambda: self._undo(key_of(version)))

    def _answerers(self) -> Sequence[Answerer]:
        return list(self._routing.named.values())

    @asynccontextmanager
    async def _enter(self, wanted: str) -> AsyncIterator[Answerer | None]:
        aliased = (self._routing.champion.live, self._routing.challenger.live)
        one: Answerer | None = next((live for live in aliased if live and key_of(live.version) == wanted), None)
        one = one or next((one for one in self._routing.named.values() if one.model == wanted), None)
        with one.answering() if one is not None else nullcontext():
            yield one

    def _find(self, version: Version | None) -> Live | None:
        for one in self._routing.named.values():
            if version is not None and isinstance(one, Live) and key_of(one.version) == key_of(version):
                return one
        return None

    def _served(self) -> Table | None:
        if self._find(self._table.champion) is None:
            return None
        return replace(self._table, beside=tuple(one for one in self._table.beside if self._find(one)))

    async def _load(self, version: Version, table: Table, seconds: float = 0) -> None:
        key = key_of(version)
        if key in self._loaded or self._find(version) is not None:
            return
        if not await self._host.keep(_ids(table), seconds):
            raise no_place(self._settings)
        stored = await self._verified(version, ADAPTER_FOLDER)
        self._loaded[key] = loaded = await self._host.start(stored)
        try:
            await prove_once(loaded.live)
        except BaseException:
            await self._undo(key)
            raise

    async def _undo(self, key: str) -> None:
        if key in self._loaded:
            await self._host.undo(self._loaded.pop(key))

    async def _turn(self, table: Table) -> None:
        # Nothing is waited for from here on: a request finds the table before, or this one.
        for one in table.beside:
            if key_of(one) in self._loaded:
                await self._host.turned(self._loaded.pop(key_of(one)), [])
        self._host.answer_to(_ids(table))
        self._routing.champion.live = self._find(table.champion)
        self._routing.challenger.live = self._find(table.challenger)
        if table != self._table:
            self._table, self._turned = table, time.time()

    async def _settle(self, table: Table) -> str | None:
        why = ""
        for one in table.beside:
            try:
                await self._load(one, table)
            except NamesakeError as error:
                _log.error("%s", error.message)
                if one in (table.champion, table.challenger):
                    why = error.message
        await self._turn(table)
        for key in list(self._loaded):  # whoever ordered that is gone
            await self._undo(key)
        await self._host.keep(_ids(table))
        return why


def _ids(table: Table) -> set[str]:
    return {id_of(one) for one in table.beside}


# ----------------------------------------------------------------------------------------------------- the follower


class _Elsewhere:
    """Stands for the engines of all replicas, which Ray Serve watches.

    Attributes:
        wanted: what a replica is asked by, as :meth:`Replica.answer` takes it.
    """

    def __init__(self, wanted: str = "") -> None:
        self.wanted = wanted

    def alive(self) -> bool:
        """For as long as there is Ray."""
        return True


Publish = Callable[[Table, Sequence[Stored]], None]
"""Told a table that all replicas have turned to, and the versions in it."""


class Fleet:
    """Every replica as one host: a version is in all of their engines, or in none.

    Attributes:
        table: what was published last; none before.
    """

    part = WEIGHTS_FOLDER
    changing = False

    def __init__(self, app: str, settings: Settings, publish: Publish) -> None:
        self._app, self._settings, self._publish = app, settings, publish
        self._one_at_a_time = asyncio.Lock()
        self.table: Table | None = None

    async def first(self, version: Version) -> Table:
        """What the first replicas begin with.

        Raises:
            NamesakeError: they cannot.
        """
        return Table(version)

    async def start(self, stored: Stored, tick: Tick = no_tick) -> Loaded:
        """Every replica answers by it; most do already.

        Raises:
            ServingError: one cannot.
        """
        del tick
        async with self._one_at_a_time:
            await self._all_must("settle", Table(stored.version), seconds=self._settings.start_seconds)
        return _loaded(stored, "second engine")

    async def restart(self, stored: Stored) -> Loaded:
        """As any other version: Ray has replaced the replicas by then."""
        return await self.load(stored)

    async def load(self, stored: Stored) -> Loaded:
        """Into all, the doors held; where one cannot be changed in place, into a second engine beside each.

        Raises:
            ServingError: one replica failed; all are back at what they had.
        """
        async with self._one_at_a_time:
            try:
                await self._all_must("bring", stored.version, seconds=self._settings.start_seconds)
                held = await self._all("hold", seconds=self._settings.hold_seconds + _ORDER_SECONDS)
                why = next((told.why for told in held if told.why), "")
                if why:
                    _log.info("second engines, since %s", why)
                    await self._all_must("release")
                await self._all_must("load", not why, seconds=self._settings.start_seconds)
            except BaseException:
                await self._all("undo", seconds=self._settings.start_seconds)
                raise
        return _loaded(stored, "second engine" if why else "in place")

    async def turned(self, loaded: Loaded, _old: Sequence[Live]) -> None:
        """All answer by it; then the gateways hear of it."""
        async with self._one_at_a_time:
            await self._turn(Table(loaded.live.version), [loaded.live.stored])

    async def undo(self, _loaded: Loaded) -> None:
        """All go back."""
        async with self._one_at_a_time:
            await self._all("undo", seconds=self._settings.start_seconds)

    async def retire(self, _old: Live) -> None:
        """Only a challenger is retired, and there is none."""

    async def lost(self, _dead: Engine) -> None:
        """Ray Serve replaces replicas."""

    async def served(self) -> Table | None:
        """What the replicas turned to last; none where there is no replica."""
        told = [one for one in await self._all("state") if one.served is not None]
        return max(told, key=lambda one: one.turned).served if told else None

    async def settle(self, at_rest: Callable[[], bool]) -> int:
        """Bring those to what is served that are not at it, unless a change is under way; how many are at it."""
        async with self._one_at_a_time:
            table = self.table  # not before: the change that this waited for has made it another one
            if table is None:
                return 0
            if at_rest():
                told = await self._all("settle", table, seconds=self._settings.start_seconds)
            else:
                told = await self._all("state")
            for one in told:
                if one.why:
                    _log.error("a replica does not come to %s: %s", table.champion.uri, one.why)
            there = [one.served for one in told if one.served is not None]
            return sum(key_of(one.champion) == key_of(table.champion) for one in there)

    async def _turn(self, table: Table, stored: Sequence[Stored]) -> None:
        try:
            await self._all("turn", table)
        except ServingError as error:  # who missed it answers nobody until it is at what is served
            _log.error("%s", error.message)
        finally:
            self.table = table
            self._publish(table, stored)

    async def _all_must(self, order: str, *words: object, seconds: float = _ORDER_SECONDS) -> None:
        told = await self._all(order, *words, seconds=seconds)
        failed = next((one for one in told if one.why), None)
        if failed is not None:
            raise ServingError(failed.why, kind=failed.kind)
        if not told:
            raise ServingError("No replica answers.")

    async def _all(self, order: str, *words: object, seconds: float = _ORDER_SECONDS) -> list[Told]:
        """What each replica says to the order; one that has died says nothing."""
        handle = serve.get_deployment_handle(_DEPLOYMENT, self._app)
        try:
            said = await handle.broadcast(order, *words).results_async(timeout_s=seconds, return_exceptions=True)
        except RayServeException:  # none is there
            return []
        except TimeoutError as error:
            raise ServingError(
                tr("A replica did not {order} within {seconds:g} s.", order=order, seconds=seconds)
            ) from error
        for one in said:
            if not isinstance(one, Told):
                _log.error("a replica did not %s: %s", order, one)
        return [one for one in said if isinstance(one, Told)]


def _loaded(stored: Stored, way: str, model: str = engine.MODEL) -> Loaded:
    live = Live(stored, cast(Engine, _Elsewhere()), model)
    live.proved = True  # by each replica, of its own engine
    return Loaded(live, way)


class AdapterFleet(Fleet):
    """The same of adapters side by side. Which of them stay is settled here, so that all replicas have the same.

    Args:
        routing: what the aliases stand for, once all replicas have it.
    """

    part = ADAPTER_FOLDER

    def __init__(self, app: str, settings: Settings, routing: Routing, publish: Publish) -> None:
        super().__init__(app, settings, publish)
        self._routing, self._rank, self._base = routing, 0, ""
        self._in: dict[str, Live] = {}
        self._coming: dict[str, Live] = {}

    async def first(self, version: Version) -> Table:
        """What the first replicas begin with; settles what rank they make room for.

        Raises:
            NamesakeError: they cannot.
        """
        if not self._rank:
            stored = await self._fetch(version)
            rank = await asyncio.to_thread(store.rank, stored)
            self._base = store.base_name(stored.manifest)
            self._rank = engine.room_for(self._settings.max_lora_rank or rank)
        return Table(version, None, (version,), self._rank, self._base)

    async def start(self, stored: Stored, tick: Tick = no_tick) -> Loaded:
        """Every replica answers by it; most do already, and by more.

        Raises:
            ServingError: one cannot.
        """
        del tick
        async with self._one_at_a_time:
            table = await self.served() or await self.first(stored.version)
            self._rank, self._base = table.rank, table.base
            for version in table.beside:
                with suppress(NamesakeError):
                    self._in[key_of(version)] = self._live(await self._fetch(version))
            live = self._in.setdefault(key_of(stored.version), self._live(stored))
            # The challenger's alias is asked for in a moment; what it stands for stays in the engines until then.
            await self._all_must("settle", self._table(stored.version, None), seconds=self._settings.start_seconds)
        return Loaded(live, "adapter")

    async def load(self, stored: Stored) -> Loaded:
        """Into all, beside the others.

        Raises:
            ServingError: one replica failed; it is in none.
        """
        key = key_of(stored.version)
        async with self._one_at_a_time:
            live = self._in.get(key) or self._coming.get(key) or self._live(stored)
            if key not in self._in and key not in self._coming:
                await self._make_room()
            self._coming[key] = live
            try:
                seconds = self._settings.start_seconds
                await self._all_must("load", stored.version, self.table, seconds=seconds)
            except BaseException:
                await self._forget(live)
                raise
        return Loaded(live, "adapter")

    async def turned(self, loaded: Loaded, _old: Sequence[Live]) -> None:
        """All answer by it; then the gateways hear of it."""
        key = key_of(loaded.live.version)
        async with self._one_at_a_time:
            self._in[key] = self._coming.pop(key, loaded.live)
            await self._tell()

    async def undo(self, loaded: Loaded) -> None:
        """It is in none."""
        async with self._one_at_a_time:
            await self._forget(loaded.live)

    async def retire(self, old: Live) -> None:
        """A challenger that was withdrawn is answered to by nothing."""
        async with self._one_at_a_time:
            if old is not self._routing.champion.live:
                self._in.pop(key_of(old.version), None)
            await self._tell()

    def withdraw(self) -> None:
        """The challenger answers no more, at once; replicas are told when it is retired."""
        if self.table is not None:
            self.table = replace(self.table, challenger=None)
            self._publish(self.table, [one.stored for one in self._in.values()])

    def used(self, ago: Mapping[str, float]) -> None:
        """These were asked for so many seconds ago."""
        for one in self._in.values():
            if one.label in ago:
                one.used = max(one.used, time.monotonic() - ago[one.label])

    async def _fetch(self, version: Version) -> Stored:
        return await asyncio.to_thread(verified, version, self._settings, cache_folder(), self.part)

    def _live(self, stored: Stored) -> Live:
        return _loaded(stored, "", stored.id).live

    def _table(self, champion: Version, challenger: Version | None) -> Table:
        beside = tuple(one.version for one in self._in.values())
        return Table(champion, challenger, beside, self._rank, self._base)

    async def _tell(self) -> None:
        champion, challenger = self._routing.champion.live, self._routing.challenger.live
        if champion is None:
            return
        # The alias's next version may be in all engines, with this turn the first to come after that.
        for live in (champion, challenger):
            if live is not None:
                self._in.setdefault(key_of(live.version), live)
        table = self._table(champion.version, challenger.version if challenger is not None else None)
        await self._turn(table, [one.stored for one in self._in.values()])

    async def _make_room(self) -> None:
        pinned = [self._routing.champion.live, self._routing.challenger.live, *self._coming.values()]
        if len({*self._in, *self._coming}) < self._settings.max_adapters:
            return
        free = [one for one in self._in.values() if one not in pinned]
        if not free:
            raise no_place(self._settings)
        del self._in[key_of(min(free, key=lambda one: one.used).version)]
        await self._tell()

    async def _forget(self, live: Live) -> None:
        key = key_of(live.version)
        self._coming.pop(key, None)
        if key not in self._in:
            await self._all("undo", live.version, seconds=self._settings.start_seconds)


@dataclass(frozen=True)
class Seen:
    """What a gateway tells with its question.

    Attributes:
        number: of the news that it has.
        used: seconds since a version was asked for, by label, of those that were since the last question.
        notes: of requests for the bare name: who answered, whether that failed, seconds to the first byte.
    """

    number: int = 0
    used: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[tuple[str, bool, float], ...] = ()


@dataclass(frozen=True)
class News:
    """What gateways are told.

    Attributes:
        number: rises with each table.
        uri: what is followed.
        table: what answers; none at the start.
        stored: the versions in it, files left out.
        since: since when the champion answers, in seconds since 1970.
        replicas: how many answer; none: nobody can be answered.
        state: what is going on.
        figures: the conductor's metrics.
        failed: why it could not begin; empty: all is well.
    """

    number: int
    uri: str
    table: Table | None
    stored: Sequence[Stored]
    since: float
    replicas: int
    state: State
    figures: bytes
    failed: str


class Conductor:
    """The one follower, an actor that Ray starts again when it dies: it then takes what the replicas answer by as live.

    Args:
        first: the version that the first replicas begin with.
        stays: somebody else takes it and the replicas down, whatever gateways come and go.
    """

    def __init__(self, uri: str, first: Version, settings: Settings, app: str, *, stays: bool = False) -> None:
        _log_to_stderr(settings)
        self._first, self._trouble, self._failed, self._stays = first, "", "", stays
        self._published: tuple[Table | None, Sequence[Stored]] = (None, ())
        self._since, self._number, self._replicas = 0.0, 0, 1
        self._settings, self._metrics = settings, Metrics()

        def fleet(routing: Routing) -> Fleet:
            if settings.mode == "adapter":
                return AdapterFleet(app, settings, routing, self._publish)
            return Fleet(app, settings, self._publish)

        self._service = Service(uri, settings, cache_folder(), Path(), self._metrics, fleet)
        self._fleet = cast(Fleet, self._service.champion.host)
        self._turned = asyncio.Event()
        self._working: asyncio.Task[None] | None = None
        self._gateways: dict[str, float] = {}

    async def table(self) -> Table:
        """What a new replica is to begin with.

        Raises:
            NamesakeError: it cannot be.
        """
        return self._fleet.table or await self._fleet.first(self._first)

    async def settings(self) -> Settings:
        """What it was started with, as the replicas were."""
        return self._settings

    async def trouble(self, why: str | None = None) -> str:
        """A replica does not come up; what was said last."""
        self._trouble = why or self._trouble
        return self._trouble

    async def join(self, gateway: str) -> None:
        """A gateway is there, if only coming up: whoever leaves meanwhile is not the last one."""
        self._gateways[gateway] = time.monotonic()

    async def news(self, gateway: str, seen: Seen) -> News:
        """What answers, at once when that is new to the gateway, else after a while."""
        await self.join(gateway)
        if self._working is None:  # with the first question, also after a restart: then there are replicas
            self._working = asyncio.create_task(self._work())
        self._take(seen)
        if self._number <= seen.number:
            with suppress(TimeoutError):
                async with asyncio.timeout(_NEWS_SECONDS):
                    await self._turned.wait()
        state, text, uri = self._service.state, self._metrics.text(), self._service.uri
        return News(self._number, uri, *self._published, self._since, self._replicas, state, text, self._failed)

    async def summon(self, model: str) -> int:
        """Bring in a version that a client has asked for, where it can be; the number of the news that tell of it."""
        await self._service.summon(model)
        return self._number

    async def wake(self) -> None:
        """Ask the registry now."""
        self._service.wake()

    async def leave(self, gateway: str) -> bool:
        """A gateway stops; whether it was the last one, which takes down what does not stay."""
        self._gateways.pop(gateway, None)
        return not self._stays and all(time.monotonic() - seen > _GONE_SECONDS for seen in self._gateways.values())

    def _take(self, seen: Seen) -> None:
        if not isinstance(self._fleet, AdapterFleet):
            return
        self._fleet.used(seen.used)
        routing = self._service.routing
        for label, failed, seconds in seen.notes:
            for live in (routing.champion.live, routing.challenger.live):
                if live is not None and live.label == label:
                    self._service.note(live, failed, seconds)
        table = self._fleet.table
        if table is not None and table.challenger is not None and routing.challenger.live is None:
            self._fleet.withdraw()

    def _publish(self, table: Table, stored: Sequence[Stored]) -> None:
        before = self._published[0]
        if before is None or key_of(before.champion) != key_of(table.champion):
            self._since = time.time()
        self._published, self._number = (table, stored), time.time_ns()  # rises over restarts, too
        self._turned.set()
        self._turned = asyncio.Event()

    async def _what_to_begin_with(self) -> Version:
        served = await self._fleet.served()
        if served is None:  # started again when no replica is left: the alias may have moved since the first start
            with suppress(NamesakeError):
                self._first = await asyncio.to_thread(registry.resolve, self._service.uri)
        return served.champion if served is not None else self._first

    async def _work(self) -> None:
        try:
            while self._published[0] is None:
                try:
                    await self._service.start(await self._what_to_begin_with(), no_tick)
                except NamesakeError as error:
                    _log.error("%s", error.message)
                    self._failed = error.message
                    await asyncio.sleep(_NEWS_SECONDS)
            self._failed = ""
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._service.run())
                tasks.create_task(self._settle())
        except Exception:
            _log.exception("the conductor ends, and is started again")
            os._exit(1)

    async def _settle(self) -> None:
        while True:
            await asyncio.sleep(self._settings.poll_seconds)
            with suppress(ServingError):
                self._replicas = await self._fleet.settle(self._service.at_rest)


# ------------------------------------------------------------------------------------------------------- the gateway


class Sessions(LocalityMixin, ConsistentHashRouter):  # type: ignore[misc]
    """A session's requests go by Ray Serve's consistent hashing to one replica, for its cached prefix, as long as that
    one takes them; the others as Ray Serve does by default, to the less busy of two.

    Consistent hashing alone would send the others to any replica, however busy. The mixin is what the default needs.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Replicas in groups; the least busy of the first group that takes the request gets it."""
        by = ConsistentHashRouter
        if pending_request is None or not pending_request.metadata.session_id:
            by = PowerOfTwoChoicesRequestRouter
        return cast(list[list[RunningReplica]], await by.choose_replicas(self, candidate_replicas, pending_request))


class _Figures(Metrics):
    """A gateway's; those of the follower come from the conductor."""

    conductor = b""

    def text(self) -> bytes:
        """Everything, as ``/metrics`` gives it."""
        return _lines(super().text(), ours=False) + _lines(self.conductor, ours=True)


def _lines(text: bytes, *, ours: bool) -> bytes:
    """Those lines of the metrics that the conductor counts, or the others."""
    names = [line.split(b" ")[2] if line.startswith(b"#") else line for line in text.splitlines()]
    ask = tuple(name.encode() for name in _OURS)
    kept = [line for name, line in zip(names, text.splitlines(), strict=True) if name.startswith(ask) is ours]
    return b"".join(line + b"\n" for line in kept)


class Cluster:
    """What the gateway asks who answers: it hears that from the conductor. Starts what is not there.

    Args:
        uri: what is served, ``models:/ccb@champion``.
    """

    def __init__(self, uri: str, settings: Settings) -> None:
        self.uri, self.settings, self._figures = uri, settings, _Figures()
        compared = bool(settings.canary or settings.shadow)
        self.routing = Routing(uri, settings.challenger if compared else "", settings.canary)
        self.state = State()
        self.app = _app(self.routing.name)
        self.upstream = Handles(self)
        self._id, self._seen = uuid.uuid4().hex, 0
        self._answerers: dict[str, Answerer] = {}
        self._notes: list[tuple[str, bool, float]] = []
        self.used: dict[str, float] = {}
        self._news = asyncio.Event()
        self._conductor: Any = None
        self._deploying: asyncio.Task[None] | None = None
        self._leaving = threading.Event()
        self._background: set[asyncio.Task[None]] = set()

    @property
    def metrics(self) -> Metrics:
        """The gateway's figures, with the conductor's among them."""
        return self._figures

    @property
    def traffic(self) -> Traffic:
        """Where what is served answers."""
        return self.routing.champion

    @property
    def handle(self) -> DeploymentHandle[Any]:
        """The replicas."""
        return self._handle

    async def start(self, first: Version, tick: Callable[[float], None]) -> None:
        """Join Ray, and bring up conductor and replicas where they are not there yet.

        Raises:
            NamesakeError: it cannot be served.
        """
        begun = time.monotonic()
        self._deploying = asyncio.create_task(asyncio.to_thread(self._deploy, first))
        while not self._deploying.done():
            tick(time.monotonic() - begun)
            if self._conductor is not None:
                self._conductor.join.remote(self._id)
            await asyncio.wait({self._deploying}, timeout=_NEWS_SECONDS)
            for number in (signal.SIGTERM, signal.SIGINT):  # Ray puts its own in the way, which tell of a crash
                signal.signal(number, signal.getsignal(number))
        self._deploying.result()
        self._handle = serve.get_deployment_handle(_DEPLOYMENT, self.app)
        # Its router has to be there before it is copied for each request, or each copy would start one.
        with suppress(RayServeException, TimeoutError):
            await self._handle.broadcast("state").results_async(timeout_s=_ORDER_SECONDS, return_exceptions=True)
        while self.traffic.live is None:
            if failed := await self._hear():
                raise ServingError(failed)

    async def run(self) -> None:
        """Hear what answers, until cancelled.

        Raises:
            ServingError: there is nobody to hear it from any more.
        """
        told = ""
        while True:
            try:
                failed = await self._hear()
            except RayError as error:  # Ray starts it again
                failed = str(error)
                await asyncio.sleep(_PAUSE)
            if failed and failed != told:
                _log.warning("conductor: %s", failed)
            told = failed

    async def stop(self) -> None:
        """Leave; the last gateway takes replicas and conductor down."""
        for task in self._background:
            task.cancel()
        self._leaving.set()
        if self._deploying is not None:  # in the middle of it there is nothing yet to take down, and then there is
            await asyncio.wait({self._deploying}, timeout=_ORDER_SECONDS)
        await asyncio.to_thread(self._leave)

    def wake(self) -> None:
        """Ask the registry now."""
        task = asyncio.create_task(self._wake())
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def note(self, answerer: Answerer, failed: bool, seconds: float) -> None:
        """A request for the bare name was answered; the conductor hears of it with the next question."""
        if self.settings.canary and self.routing.challenger.live is not None:
            self._notes.append((answerer.label, failed, seconds))

    async def summon(self, model: object) -> None:
        """Have a version brought in that a client asks for by its number, where that is allowed."""
        if number_in(model, self.settings, self.routing) is None:
            return
        with suppress(RayError, TimeoutError):
            number = await self._conductor.summon.remote(model)
            async with asyncio.timeout(_ORDER_SECONDS):
                while self._seen < number:
                    await self._news.wait()

    async def leaves(self, live: Answerer, seconds: float) -> bool:
        """Wait for news by which this answers no more; whether there were any within the time."""
        if self._answers(live):
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._news.wait()
        return not self._answers(live)

    def _answers(self, live: Answerer) -> bool:
        return any(one is live for one in self._answerers.values())

    async def _wake(self) -> None:
        with suppress(RayError):
            await self._conductor.wake.remote()

    async def _hear(self) -> str:
        now = time.monotonic()
        told = Seen(self._seen, {label: now - when for label, when in self.used.items()}, tuple(self._notes))
        self.used, self._notes = {}, []
        try:
            news: News = await self._conductor.news.remote(self._id, told)
        except ActorDiedError as error:
            raise _taken_down() from error
        self.state, self._figures.conductor = news.state, news.figures
        if news.table is None:
            return news.failed
        if news.uri != self.uri:
            raise ServingError(
                tr("This cluster serves {uri} under the name {name} already.", uri=news.uri, name=self.routing.name),
                mend="Serve the same, or stop that first.",
            )
        if news.number != self._seen or bool(news.replicas) is not bool(self._answerers):
            self._take(news, news.table)
        return ""

    def _take(self, news: News, table: Table) -> None:
        """From now on requests are answered by that, as far as anything answers."""
        stored = {key_of(one.version): one for one in news.stored} if news.replicas else {}
        before, self._answerers, self._seen = self._answerers, {}, news.number

        def answerer(wanted: str, made: Answerer) -> Answerer:
            self._answerers[wanted] = before.get(wanted, made)
            return self._answerers[wanted]

        def aliased(version: Version | None) -> Live | None:
            found = stored.get(key_of(version)) if version is not None else None
            return cast(Live, answerer(key_of(found.version), self._live(found))) if found is not None else None

        champion, old = aliased(table.champion), self.traffic.live
        if champion is not None:
            champion.since = news.since
        self.traffic.live, self.routing.challenger.live = champion, aliased(table.challenger)
        # By its number a version is asked for as what the engine calls it: it answers, whatever aliases stand for.
        named: list[Answerer] = [self._live(one, by_number=True) for one in stored.values() if table.has(one.version)]
        named += [_there(engine.MODEL, engine.MODEL, table.base)] if named and table.base else []
        self.routing.named = {one.label: answerer(one.model, one) for one in named}
        if champion is not None and champion is not old:
            _log.info("%s is live", champion.version.uri)
        self._news.set()
        self._news = asyncio.Event()

    def _live(self, stored: Stored, *, by_number: bool = False) -> Live:
        model = stored.id if self.settings.mode == "adapter" else engine.MODEL
        wanted = model if by_number else key_of(stored.version)
        return Live(stored, cast(Engine, _Elsewhere(wanted)), model)

    def _deploy(self, first: Version) -> None:
        _join(self.settings)
        if self._leaving.is_set():
            return
        if self.settings.ray_join:
            self._await()
            return
        self._conductor = _conductor(self.uri, first, self.settings, self.app)
        serve.start(proxy_location="Disabled")  # the gateway is the only way in
        _check_same(ray.get(self._conductor.settings.remote()), self.settings)
        if self._is_deployed():
            return
        if self._leaving.is_set():
            return
        target = serve.RunTarget(_replicas(self.settings, self.app), name=self.app, route_prefix=None)
        serve.run_many([target], wait_for_applications_running=False)  # that would wait for a GPU and say nothing
        if not self._is_deployed() and not self._leaving.is_set():
            raise _taken_down()

    def _await(self) -> None:
        """Until somebody has deployed conductor and replicas."""
        _log.info("joins %s, as soon as it is deployed", self.app)
        while not self._leaving.is_set() and not self._is_deployed():
            self._leaving.wait(_LOOK_SECONDS)
        if not self._leaving.is_set():
            self._conductor = ray.get_actor(_follower(self.app), namespace=NAMESPACE)
            _check_same(ray.get(self._conductor.settings.remote()), self.settings)

    def _is_deployed(self) -> bool:
        """Whether the replicas are there; waits while they come or go, until told to leave, and says what for."""
        under_way = (ApplicationStatus.NOT_STARTED, ApplicationStatus.DEPLOYING, ApplicationStatus.DELETING)
        told = ""
        while (found := serve.status().applications.get(self.app)) is not None and not self._leaving.is_set():
            if found.status == ApplicationStatus.DEPLOY_FAILED:
                why = (self._conductor is not None and ray.get(self._conductor.trouble.remote())) or found.message
                raise ServingError(tr("The replicas do not come up: {why}", why=why))
            if found.status not in under_way:
                return True
            waits = found.deployments[_DEPLOYMENT].message if _DEPLOYMENT in found.deployments else ""
            if waits and waits != told:
                _log.warning("Ray Serve: %s", waits.partition("\n")[0])
            told = waits
            self._leaving.wait(_LOOK_SECONDS)
        return False

    def _leave(self) -> None:
        if not ray.is_initialized():
            return
        with suppress(RayError, RayServeException, TimeoutError):
            if self._conductor is not None and ray.get(self._conductor.leave.remote(self._id), timeout=_ORDER_SECONDS):
                serve.delete(self.app)
                ray.kill(self._conductor)
        ray.shutdown()


def _follower(app: str) -> str:
    """The conductor's name."""
    return f"{app}-follower"


def _conductor(uri: str, first: Version, settings: Settings, app: str, *, stays: bool = False) -> Any:
    """The one conductor of the application, made where there is none."""
    lasting = {"lifetime": "detached", "max_restarts": -1, "max_task_retries": -1, "num_cpus": 0}
    return (
        ray.remote(Conductor)
        .options(name=_follower(app), namespace=NAMESPACE, get_if_exists=True, **lasting)
        .remote(uri, first, _theirs(settings), app, stays=stays)
    )


def _replicas(settings: Settings, app: str) -> serve.Application:
    """What Ray Serve deploys."""
    made = serve.deployment(_kind(settings)).options(**deployment(settings))
    return made.bind(_follower(app), _theirs(settings))


def _theirs(settings: Settings) -> Settings:
    """Without what clients authenticate by, which stays with the gateway."""
    return settings.model_copy(update={"api_keys": (), "webhook_secret": ""})


def application(given: Mapping[str, object]) -> serve.Application:
    """Conductor and replicas for a configuration of Ray Serve's own, as KubeRay's RayService submits it; gateways join
    them (``--ray-join``) and come and go as they like::

        applications:
        - name: namesake-ccb
          import_path: namesake_serving.cluster:application
          route_prefix: null
          args: {model: models:/ccb@champion, replicas: 2}

    Args:
        given: settings by their names; the application's name is ``namesake-`` and the registered model's.

    Raises:
        InputError: a setting is wrong.
        NamesakeError: the registry does not answer, or the conductor that is there has other settings.
    """
    settings = read(**{**given, "backend": "ray"})
    check(settings)
    if not settings.model.startswith("models:/"):
        raise InputError("model", settings.model, "has to say what is served", mend="Give model: models:/ccb@champion.")
    first = registry.resolve(settings.model)
    app = _app(first.name)
    conductor = _conductor(settings.model, first, settings, app, stays=True)
    _check_same(ray.get(conductor.settings.remote()), settings)
    return _replicas(settings, app)


def _app(name: str) -> str:
    """The application that serves a registered model."""
    return f"namesake-{name}"


def _there(wanted: str, model: str, label: str) -> Answerer:
    return Answerer(cast(Engine, _Elsewhere(wanted)), model, label)


def _taken_down() -> ServingError:
    return ServingError(
        "Conductor and replicas have been taken down.",
        mend="The last gateway that stops does that, or somebody by hand: serve again.",
    )


def _check_same(found: Settings, given: Settings) -> None:
    """A gateway must not think its settings hold where another's do: ``--require-gate``, say.

    Raises:
        ServingError: conductor and replicas were started with others.
    """
    others = [f"{name}={getattr(found, name)}" for name in _SHARED if getattr(found, name) != getattr(given, name)]
    if others:
        raise ServingError(
            tr("This cluster serves with other settings already: {settings}.", settings=", ".join(others)),
            mend="Serve the same, or stop that first.",
        )


def check(settings: Settings) -> None:
    """What does not go with Ray.

    Raises:
        InputError: it was asked for.
    """
    for name in ("canary", "shadow"):
        if getattr(settings, name) and settings.mode != "adapter":
            raise InputError(
                name,
                getattr(settings, name),
                "goes with the backend ray in adapter mode only",
                mend="Give --mode adapter, or leave it out.",
            )
    scaling = settings.ray_options.get("autoscaling_config")
    if isinstance(scaling, dict) and scaling.get("min_replicas") == 0:
        raise InputError(
            "ray_options",
            settings.ray_options,
            "would leave no replica, and no request reaches Ray Serve then that would start one",
            mend="Give min_replicas of 1 or more.",
        )
    if settings.ray_join and _ADDRESS == "local":
        raise InputError(
            "ray_join", "", "needs a Ray that runs", mend="Say which: RAY_ADDRESS=auto, or the address of its head."
        )
    try:
        serve.deployment(_kind(settings)).options(**deployment(settings))
    except (TypeError, ValueError) as error:
        raise InputError(
            "ray_options", settings.ray_options, _in_a_line(error), mend="Ray Serve's documentation has them all."
        ) from error


def _kind(settings: Settings) -> type[Replica]:
    return AdapterReplica if settings.mode == "adapter" else MergedReplica


def _in_a_line(error: Exception) -> str:
    """Pydantic tells it in three."""
    return "; ".join(line.strip() for line in str(error).splitlines()[:3]).rstrip(".")


def most_replicas(settings: Settings) -> int:
    """How many replicas there may be at a time."""
    scaling = settings.ray_options.get("autoscaling_config")
    given = scaling.get("max_replicas") if isinstance(scaling, dict) else settings.ray_options.get("num_replicas")
    return given if isinstance(given, int) and given > 0 else settings.replicas


def of_all(settings: Settings) -> Settings:
    """The gateway's settings: as many requests at a time as all replicas take together."""
    most, replicas = settings.most_requests, most_replicas(settings)
    return settings.model_copy(update={"max_streams": settings.streams * replicas, "max_requests": most * replicas})


def deployment(settings: Settings) -> dict[str, Any]:
    """Options of the deployment: ours, then what the user gave for Ray Serve."""
    ours: dict[str, Any] = {
        "name": _DEPLOYMENT,
        "num_replicas": settings.replicas,
        "max_ongoing_requests": 2 * settings.streams,
        "health_check_period_s": 2,
        "graceful_shutdown_wait_loop_s": 0.2,
        "graceful_shutdown_timeout_s": settings.shutdown_seconds + 10,
        "request_router_config": RequestRouterConfig(
            request_router_class=f"{__name__}.{Sessions.__name__}",
            # Sessions are spread evenly, and where theirs is full any other takes them.
            request_router_kwargs={"num_virtual_nodes": 1000, "num_fallback_replicas": most_replicas(settings)},
        ),
        "logging_config": {"enable_access_log": False},
    }
    if "autoscaling_config" in settings.ray_options:
        del ours["num_replicas"]
    made = {**ours, **settings.ray_options}
    if has_gpu():  # or Ray would put all of them on the first
        made["ray_actor_options"] = {"num_gpus": 1, **made.get("ray_actor_options", {})}
    return made


def _join(settings: Settings) -> None:
    given: dict[str, Any] = {"namespace": NAMESPACE, "log_to_driver": False, "logging_level": logging.WARNING}
    if _ADDRESS == "local":
        given |= {"include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
        given |= {"num_cpus": max(os.cpu_count() or 1, most_replicas(settings))}
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # of the gateway's lines each is of one format
    try:
        ray.init(_ADDRESS, **given)
    except (ConnectionError, RayError, RuntimeError, ValueError) as error:
        raise ServingError(
            tr("Ray at {address} cannot be joined: {error}", address=_ADDRESS, error=error),
            mend="`ray status` says whether it runs; RAY_AUTH_TOKEN has to be the cluster's. RAY_ADDRESS= starts one.",
        ) from error


def _log_to_stderr(settings: Settings) -> None:
    logs.begin(settings.log_format)


class Handles:
    """The gateway's way to the replicas, through Ray Serve's router."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    @asynccontextmanager
    async def post(self, live: Answerer, path: str, body: bytes, session: str = "") -> AsyncIterator[Reply]:
        """Ask a replica that answers by this version; another one where the first has just ended."""
        self._cluster.used[live.label] = time.monotonic()
        stream, head = await self._begin(live, path, body, session)
        try:
            yield _Parts(stream, *head)
        except (RayError, RayServeException) as error:
            raise Gone(str(error)) from error
        finally:
            stream.cancel()  # of no effect where it has ended

    async def _begin(self, live: Answerer, path: str, body: bytes, session: str) -> tuple[Any, tuple[int, str, bytes]]:
        wanted, why, cuts = cast(_Elsewhere, live.engine).wanted, "no replica has this version", 0
        for _ in range(_TRIES):  # not by the clock: it may have waited at a door that is held
            asked = self._cluster.handle.options(method_name="answer", stream=True, session_id=session)
            stream = asked.remote(wanted, path, body)
            try:
                head = await anext(stream)
            except (RayError, RayServeException) as error:  # it has just ended, its engine has, or it has none yet
                why = str(error)
                cuts += isinstance(error, Cut)  # Ray gives it the class of what was raised there, too
                if cuts == _CUTS:
                    break
            except BaseException:
                stream.cancel()
                raise
            else:
                if head is not None:
                    return stream, head
                if await self._cluster.leaves(live, _PAUSE):
                    raise Moved
            session = (
                uuid.uuid4().hex
            )  # elsewhere: any of them, and not the one whose queue is empty as it answers nobody
            await asyncio.sleep(_PAUSE)
        raise Gone(why)

    async def figures(self, live: Answerer) -> bytes:
        """vLLM's metrics of all replicas, each under its name."""
        del live
        asked = self._cluster.handle.broadcast("figures")
        try:
            said = await asked.results_async(timeout_s=FIGURES_SECONDS, return_exceptions=True)
        except (RayServeException, TimeoutError) as error:
            raise Gone(str(error)) from error
        texts = [(name, text.decode()) for name, text in (one for one in said if isinstance(one, tuple))]
        return await asyncio.to_thread(together, texts)  # megabytes to read, while others stream

    async def close(self) -> None:
        """Ray is left by the cluster."""


class _Parts:
    def __init__(self, stream: Any, status: int, kind: str, first: bytes) -> None:
        self._stream, self.status, self.kind, self._first = stream, status, kind, first

    async def read(self) -> bytes:
        with suppress(RayError, RayServeException):  # the first part is all; that nothing follows need not be heard
            async for _ in self._stream:
                pass
        return self._first

    async def chunks(self) -> AsyncIterator[bytes]:
        yield self._first
        async for part in self._stream:
            yield part


class _Families:
    """Metrics of several replicas as one collector."""

    def __init__(self, texts: Sequence[tuple[str, str]]) -> None:
        self._texts = texts

    def collect(self) -> list[Any]:
        """Each family once, with every replica's samples."""
        families: dict[str, Any] = {}
        for replica, text in self._texts:
            for family in text_string_to_metric_families(text):
                samples = [one._replace(labels={**one.labels, "replica": replica}) for one in family.samples]
                if family.name in families:
                    families[family.name].samples += samples
                else:
                    family.samples, families[family.name] = samples, family
        return list(families.values())


def together(texts: Sequence[tuple[str, str]]) -> bytes:
    """Metrics of replicas, by name, as one text with the label ``replica``."""
    registry = CollectorRegistry()
    registry.register(cast(Any, _Families(texts)))
    return bytes(generate_latest(registry))
