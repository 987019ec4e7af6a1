"""The same front before several engines, on Ray Serve: one follower for all of them, one moment at which all turn.

::

    gateway ──asks by version──▶ Replica (Ray Serve, n of them): the engine host of merged mode, an engine, its door
       ▲                             ▲
       └── what answers now ── Conductor (one named actor): asks the registry, orders every replica

A change has two phases. *Prepare*: every replica fetches, verifies, loads and proves the version, unseen by clients;
one that fails has it undone everywhere. *Turn*: every replica answers by it. Only then do gateways hear of it. A
gateway asks for an answer by the version it knows, and a replica that has another one does not answer: so whoever has
seen the new version never sees the old one again, whichever replica is asked, and one that missed the change, or joined
late, answers nobody until it has been brought to what is served.

Ray Serve starts, scales, watches and replaces replicas, and routes; none of that is ours. The only importer of Ray.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import secrets
import signal
import tempfile
import threading
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

# Read when ray is imported. Nothing is told to anybody; a call that comes too late joins no other Ray of this machine.
os.environ.update({"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_AUTO_CONNECT": "0"})
if os.environ.get("RAY_ADDRESS", "") in ("", "local"):
    # A Ray of our own is for this machine alone, and whoever may use its ports runs code. Off, this variable (named
    # after systems where that is the default) binds them to loopback, which `_node_ip_address` does not; the one port
    # of each replica that listens everywhere all the same takes only who has the token.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

import ray
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from ray import serve
from ray.exceptions import ActorDiedError, RayError
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica
from ray.serve.schema import ApplicationStatus

from namesake import registry
from namesake.errors import InputError, NamesakeError, ServingError
from namesake.manifest import WEIGHTS_FOLDER
from namesake.messages import tr
from namesake.paths import cache_folder
from namesake.registry import Version
from namesake_serving import logs
from namesake_serving.engine import Engine
from namesake_serving.hosts import Engines, Loaded, Merged, Tick, no_tick
from namesake_serving.metrics import Metrics
from namesake_serving.rollout import State, Step
from namesake_serving.service import Service, key_of, prove, verified
from namesake_serving.settings import Settings, has_gpu
from namesake_serving.store import Stored
from namesake_serving.traffic import Answerer, Live, Routing, Traffic
from namesake_serving.upstream import Cut, Gone, Moved, Reply, Sockets

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
_FIGURES_SECONDS = 5.0
_GONE_SECONDS = 5.0
_OBJECT_STORE_BYTES = 128 << 20
_OURS = ("namesake_version_change", "namesake_served", "namesake_alias", "namesake_registry")
"""Figures that the conductor counts, for every gateway."""

_SHARED = (
    *("public_key", "require_gate", "engine_args", "eager", "max_streams", "max_tokens", "replicas", "ray_options"),
    *("poll_seconds", "hold_seconds", "start_seconds", "shutdown_seconds"),
)
"""Settings of conductor and replicas, who have them from the first gateway."""

_log = logging.getLogger("namesake.serving")


# ------------------------------------------------------------------------------------------------------- a replica


@dataclass(frozen=True)
class Told:
    """What a replica says when it has carried out an order.

    Attributes:
        live: the version that it answers by.
        turned: when it last turned to another one, in seconds since 1970; 0: never since it was started.
        why: why it could not do what was ordered; empty: it did.
    """

    live: Version | None
    turned: float
    why: str = ""


class Replica:
    """One engine and its door: a deployment of Ray Serve around the engine host of merged mode.

    Args:
        follower: name of the conductor, who says which version to begin with.
    """

    async def __init__(self, follower: str, settings: Settings) -> None:  # type: ignore[misc]
        _log_to_stderr(settings)
        self._settings, self._turned = settings, 0.0
        self._folder = tempfile.TemporaryDirectory(prefix="namesake-replica-")
        self._engines = Engines(settings, Path(self._folder.name))
        self._traffic = Traffic()
        self._host = Merged(self._engines, self._traffic, settings)
        self._sockets = Sockets()
        self._one_at_a_time = asyncio.Lock()
        self._coming: Stored | None = None
        self._loaded: Loaded | None = None
        self._retiring: asyncio.Task[None] | None = None
        conductor = ray.get_actor(follower, namespace=NAMESPACE)
        try:
            version = await conductor.version.remote()
            await self._fetch(version)
            await self._load(in_place=False)
            self._turn()
            newest = await conductor.version.remote()
            if key_of(newest) != key_of(version):  # it moved on while the engine started
                await self._go_to(newest)
        except BaseException as error:
            await self._engines.stop()
            if isinstance(error, NamesakeError):
                await conductor.trouble.remote(error.message)
            raise
        self._turned = 0.0

    async def answer(self, key: str, path: str, body: bytes) -> AsyncIterator[object]:
        """A reply by the version of that key: status, content type and its first part (of one that is no stream: all of
        it), then the others; ``None`` where another version answers here.
        """
        async with self._traffic.enter() as live:
            if key_of(live.version) != key:
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
        live = self._traffic.live
        with suppress(Gone):
            return name, await self._sockets.figures(live) if live is not None else b""
        return name, b""

    async def check_health(self) -> None:
        """Ray Serve replaces a replica that raises here.

        Raises:
            ServingError: its engine has ended by itself.
        """
        live = self._traffic.live
        if live is not None and not live.engine.alive() and not self._one_at_a_time.locked():
            raise ServingError(tr("The engine ended by itself.\n{tail}", tail=live.engine.tail(5)))

    async def state(self) -> Told:
        """What it answers by."""
        return self._told()

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

    async def turn(self) -> Told:
        """Answer by what was loaded."""
        return await self._carry_out(self._turned_to)

    async def undo(self) -> Told:
        """Forget what was brought: back to what was."""
        return await self._carry_out(self._undo)

    async def settle(self, version: Version) -> Told:
        """Whatever happened to orders before: answer by this version."""
        return await self._carry_out(lambda: self._settle(version))

    async def __del__(self) -> None:
        """Ray Serve takes it down; its requests have ended."""
        await self._sockets.close()
        await self._engines.stop()
        self._folder.cleanup()

    def _told(self, why: str = "") -> Told:
        live = self._traffic.live
        return Told(live.version if live is not None else None, self._turned, why)

    async def _carry_out(self, order: Callable[[], Awaitable[str | None]]) -> Told:
        async with self._one_at_a_time:
            try:
                return self._told(await order() or "")
            except NamesakeError as error:
                return self._told(error.message)
            except Exception as error:  # whatever it is, it has to be undone here and everywhere
                _log.exception("an order went wrong")
                return self._told(f"{type(error).__name__}: {error}")

    async def _fetch(self, version: Version) -> None:
        if self._retiring is not None:  # the engine before the last has to be gone, or there is no room
            await self._retiring
        cache = cache_folder()
        self._coming = await asyncio.to_thread(verified, version, self._settings, cache, WEIGHTS_FOLDER)

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
        live = self._loaded.live
        await asyncio.to_thread(prove, live.engine, self._coming)
        live.proved = True
        return None

    async def _turned_to(self) -> None:
        self._turn()

    def _turn(self) -> None:
        loaded, old = self._loaded, self._traffic.live
        self._coming = self._loaded = None
        if loaded is None:
            return
        self._traffic.live, self._turned = loaded.live, time.time()
        # It opens the door at once; the end of the old engine's answers is nobody's to wait for.
        self._retiring = asyncio.create_task(self._host.turned(loaded, [old] if old is not None else []))

    async def _undo(self) -> None:
        loaded = self._loaded
        self._coming = self._loaded = None
        if loaded is not None:
            await self._host.undo(loaded)
        self._traffic.release()

    async def _settle(self, version: Version) -> str | None:
        coming, loaded, live = self._coming, self._loaded, self._traffic.live
        if coming is not None:  # whoever ordered that is gone, or the order to turn got lost
            if loaded is not None and loaded.live.proved and key_of(coming.version) == key_of(version):
                self._turn()
                return None
            await self._undo()
        if live is not None and key_of(live.version) == key_of(version):
            return None
        return await self._go_to(version)

    async def _go_to(self, version: Version) -> str | None:
        """A change for this replica alone."""
        try:
            await self._fetch(version)
            in_place = not await self._hold()
            why = await self._load(in_place=in_place)
        except BaseException:
            await self._undo()
            raise
        if why:
            await self._undo()
            return why
        self._turn()
        return None


# ----------------------------------------------------------------------------------------------------- the follower


class _Elsewhere:
    """Stands for the engines of all replicas, which Ray Serve watches."""

    def alive(self) -> bool:
        """For as long as there is Ray."""
        return True


class Fleet:
    """Every replica as one host: a version is in all of their engines, or in none."""

    part = WEIGHTS_FOLDER
    changing = False

    def __init__(self, app: str, settings: Settings, publish: Callable[[Stored], None]) -> None:
        self._app, self._settings, self._publish = app, settings, publish
        self._one_at_a_time = asyncio.Lock()

    async def start(self, stored: Stored, tick: Tick = no_tick) -> Loaded:
        """Every replica answers by it; most do already.

        Raises:
            ServingError: one cannot.
        """
        del tick
        async with self._one_at_a_time:
            await self._all_must("settle", stored.version, seconds=self._settings.start_seconds)
        return self._loaded(stored, "second engine")

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
        return self._loaded(stored, "second engine" if why else "in place")

    async def turned(self, loaded: Loaded, _old: Sequence[Live]) -> None:
        """All answer by it; then the gateways hear of it."""
        async with self._one_at_a_time:
            try:
                await self._all("turn")
            except ServingError as error:  # who missed it answers nobody until it is at what is served
                _log.error("%s", error.message)
            finally:
                self._publish(loaded.live.stored)

    async def undo(self, _loaded: Loaded) -> None:
        """All go back."""
        async with self._one_at_a_time:
            await self._all("undo", seconds=self._settings.start_seconds)

    async def retire(self, _old: Live) -> None:
        """Only a challenger is retired, and there is none."""

    async def lost(self, _dead: Engine) -> None:
        """Ray Serve replaces replicas."""

    async def served(self) -> Version | None:
        """What the replicas answer by: the version that was turned to last; none where there is no replica."""
        told = [one for one in await self._all("state") if one.live is not None]
        return max(told, key=lambda one: one.turned).live if told else None

    async def settle(self, served: Callable[[], Version], at_rest: Callable[[], bool]) -> int:
        """Bring those to what is served that are not at it, unless a change is under way; how many are at it."""
        async with self._one_at_a_time:
            version = served()  # not before: the change that this waited for has made it another one
            if at_rest():
                told = await self._all("settle", version, seconds=self._settings.start_seconds)
            else:
                told = await self._all("state")
            for one in told:
                if one.why:
                    _log.error("a replica does not come to %s: %s", version.uri, one.why)
            return sum(one.live is not None and key_of(one.live) == key_of(version) for one in told)

    def _loaded(self, stored: Stored, way: str) -> Loaded:
        live = Live(stored, cast(Engine, _Elsewhere()))
        live.proved = True  # by each replica, of its own engine
        return Loaded(live, way)

    async def _all_must(self, order: str, *words: object, seconds: float = _ORDER_SECONDS) -> None:
        told = await self._all(order, *words, seconds=seconds)
        why = next((one.why for one in told if one.why), "")
        if why:
            raise ServingError(why)
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


@dataclass(frozen=True)
class News:
    """What gateways are told.

    Attributes:
        number: rises with each version that goes live.
        uri: what is followed.
        live: what answers, files left out; none at the start.
        since: since when, in seconds since 1970.
        replicas: how many answer; none: nobody can be answered.
        state: what is going on.
        figures: the conductor's metrics.
        failed: why it could not begin; empty: all is well.
    """

    number: int
    uri: str
    live: Stored | None
    since: float
    replicas: int
    state: State
    figures: bytes
    failed: str


class Conductor:
    """The one follower, an actor that Ray starts again when it dies: it then takes what the replicas answer by as live.

    Args:
        first: the version that the first replicas begin with.
    """

    def __init__(self, uri: str, first: Version, settings: Settings, app: str) -> None:
        _log_to_stderr(settings)
        self._first, self._trouble, self._failed = first, "", ""
        self._live: Stored | None = None
        self._since, self._number, self._replicas = 0.0, 0, 1
        self._fleet = Fleet(app, settings, self._publish)
        self._settings, self._metrics = settings, Metrics()
        self._service = Service(uri, settings, cache_folder(), Path(), self._metrics, self._fleet)
        self._turned = asyncio.Event()
        self._working: asyncio.Task[None] | None = None
        self._gateways: dict[str, float] = {}

    async def version(self) -> Version:
        """What a new replica is to begin with."""
        return self._served()

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

    async def news(self, gateway: str, seen: int) -> News:
        """What answers, at once when that is new to the gateway, else after a while."""
        await self.join(gateway)
        if self._working is None:  # with the first question, also after a restart: then there are replicas
            self._working = asyncio.create_task(self._work())
        if self._number <= seen:
            with suppress(TimeoutError):
                async with asyncio.timeout(_NEWS_SECONDS):
                    await self._turned.wait()
        state, text, uri = self._service.state, self._metrics.text(), self._service.uri
        return News(self._number, uri, self._live, self._since, self._replicas, state, text, self._failed)

    async def wake(self) -> None:
        """Ask the registry now."""
        self._service.wake()

    async def leave(self, gateway: str) -> bool:
        """A gateway stops; whether it was the last one."""
        self._gateways.pop(gateway, None)
        return all(time.monotonic() - seen > _GONE_SECONDS for seen in self._gateways.values())

    def _publish(self, stored: Stored) -> None:
        self._live, self._since, self._number = stored, time.time(), time.time_ns()  # rises over restarts, too
        self._turned.set()
        self._turned = asyncio.Event()

    def _served(self) -> Version:
        return self._live.version if self._live is not None else self._first

    def _at_rest(self) -> bool:
        return self._service.state.step is Step.REST

    async def _what_to_begin_with(self) -> Version:
        served = await self._fleet.served()
        if served is None:  # started again when no replica is left: the alias may have moved since the first start
            with suppress(NamesakeError):
                self._first = await asyncio.to_thread(registry.resolve, self._service.uri)
        return served or self._first

    async def _work(self) -> None:
        try:
            while self._live is None:
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
                self._replicas = await self._fleet.settle(self._served, self._at_rest)


# ------------------------------------------------------------------------------------------------------- the gateway


class Sessions(RequestRouter):  # type: ignore[misc]
    """A session's requests go to one replica, for its cached prefix, as long as that one takes them; the others to the
    less busy of two.

    Rendezvous hashing: when replicas come or go only their own sessions move.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Replicas in groups; the least busy of the first group that takes the request gets it."""
        session = pending_request.metadata.session_id if pending_request is not None else ""
        if not session:
            return [random.sample(candidate_replicas, min(2, len(candidate_replicas)))]
        return [[one] for one in sorted(candidate_replicas, key=lambda one: _rank(session, one.replica_id.unique_id))]


def _rank(session: str, replica: str) -> bytes:
    return sha256(f"{session} {replica}".encode("utf-8", "surrogatepass")).digest()


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
        self.routing, self.state = Routing(uri), State()
        self.app = f"namesake-{self.routing.name}"
        self.upstream = Handles(self)
        self._id, self._seen = uuid.uuid4().hex, 0
        self._live: Live | None = None
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
        """There is no challenger."""

    async def summon(self, model: object) -> None:
        """Versions that no alias points to are for adapter mode."""

    async def leaves(self, live: Answerer, seconds: float) -> bool:
        """Wait for another version to go live; whether one did within the time."""
        if self.traffic.live is live:
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._news.wait()
        return self.traffic.live is not live

    async def _wake(self) -> None:
        with suppress(RayError):
            await self._conductor.wake.remote()

    async def _hear(self) -> str:
        try:
            news: News = await self._conductor.news.remote(self._id, self._seen)
        except ActorDiedError as error:
            raise _taken_down() from error
        self.state, self._figures.conductor = news.state, news.figures
        if news.live is None:
            return news.failed
        if news.uri != self.uri:
            raise ServingError(
                tr("This cluster serves {uri} under the name {name} already.", uri=news.uri, name=self.routing.name),
                mend="Serve the same, or stop that first.",
            )
        if news.number != self._seen:
            self._live, self._seen = Live(news.live, cast(Engine, _Elsewhere())), news.number
            self._live.since = news.since
            _log.info("%s is live", news.live.version.uri)
        answers = self._live if news.replicas else None
        if answers is not self.traffic.live:
            self.traffic.live = answers
            self._news.set()
            self._news = asyncio.Event()
        return ""

    def _deploy(self, first: Version) -> None:
        _join(self.settings)
        if self._leaving.is_set():
            return
        name = f"{self.app}-follower"
        # What clients authenticate by stays with the gateway.
        theirs = self.settings.model_copy(update={"api_keys": (), "webhook_secret": ""})
        lasting = {"lifetime": "detached", "max_restarts": -1, "max_task_retries": -1, "num_cpus": 0}
        self._conductor = (
            ray.remote(Conductor)
            .options(name=name, namespace=NAMESPACE, get_if_exists=True, **lasting)
            .remote(self.uri, first, theirs, self.app)
        )
        serve.start(proxy_location="Disabled")  # the gateway is the only way in
        _check_same(ray.get(self._conductor.settings.remote()), self.settings)
        if self._is_deployed():
            return
        if self._leaving.is_set():
            return
        application = serve.deployment(Replica).options(**deployment(self.settings)).bind(name, theirs)
        target = serve.RunTarget(application, name=self.app, route_prefix=None)
        serve.run_many([target], wait_for_applications_running=False)  # that would wait for a GPU and say nothing
        if not self._is_deployed() and not self._leaving.is_set():
            raise _taken_down()

    def _is_deployed(self) -> bool:
        """Whether the replicas are there; waits while they come or go, until told to leave, and says what for."""
        under_way = (ApplicationStatus.NOT_STARTED, ApplicationStatus.DEPLOYING, ApplicationStatus.DELETING)
        told = ""
        while (found := serve.status().applications.get(self.app)) is not None and not self._leaving.is_set():
            if found.status == ApplicationStatus.DEPLOY_FAILED:
                why = ray.get(self._conductor.trouble.remote()) or found.message
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
    for name, wanted in (
        ("mode", settings.mode == "adapter"),
        ("canary", settings.canary),
        ("shadow", settings.shadow),
    ):
        if wanted:
            raise InputError(
                name, getattr(settings, name), "does not go with the backend ray", mend="Leave it out, or --backend."
            )
    try:
        serve.deployment(Replica).options(**deployment(settings))
    except (TypeError, ValueError) as error:
        raise InputError(
            "ray_options", settings.ray_options, _in_a_line(error), mend="Ray Serve's documentation has them all."
        ) from error


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
        "request_router_config": RequestRouterConfig(request_router_class=f"{__name__}.{Sessions.__name__}"),
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
    try:
        ray.init(_ADDRESS, **given)
    except (ConnectionError, RayError, RuntimeError, ValueError) as error:
        raise ServingError(
            tr("Ray at {address} cannot be joined: {error}", address=_ADDRESS, error=error),
            mend="`ray status` says whether it runs; RAY_AUTH_TOKEN has to be the cluster's. RAY_ADDRESS= starts one.",
        ) from error


def _log_to_stderr(settings: Settings) -> None:
    logs.begin(settings.log_format)
    logging.getLogger("alembic").setLevel(logging.WARNING)


class Handles:
    """The gateway's way to the replicas, through Ray Serve's router."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    @asynccontextmanager
    async def post(self, live: Answerer, path: str, body: bytes, session: str = "") -> AsyncIterator[Reply]:
        """Ask a replica that answers by this version; another one where the first has just ended."""
        assert isinstance(live, Live)
        stream, head = await self._begin(live, path, body, session)
        try:
            yield _Parts(stream, *head)
        except (RayError, RayServeException) as error:
            raise Gone(str(error)) from error
        finally:
            stream.cancel()  # of no effect where it has ended

    async def _begin(self, live: Live, path: str, body: bytes, session: str) -> tuple[Any, tuple[int, str, bytes]]:
        key, why, cuts = key_of(live.version), "no replica has this version", 0
        for _ in range(_TRIES):  # not by the clock: it may have waited at a door that is held
            asked = self._cluster.handle.options(method_name="answer", stream=True, session_id=session)
            stream = asked.remote(key, path, body)
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
            session = ""  # elsewhere
            await asyncio.sleep(_PAUSE)
        raise Gone(why)

    async def figures(self, live: Answerer) -> bytes:
        """vLLM's metrics of all replicas, each under its name."""
        del live
        asked = self._cluster.handle.broadcast("figures")
        try:
            said = await asked.results_async(timeout_s=_FIGURES_SECONDS, return_exceptions=True)
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
