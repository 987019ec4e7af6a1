"""How versions get into engines: merged weights in an engine of their own, or adapters side by side on their base.

Both do the same for the service: a version is loaded unseen by clients, and then kept or undone.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from namesake.errors import ServingError
from namesake.manifest import ADAPTER_FOLDER, WEIGHTS_FOLDER
from namesake.messages import tr
from namesake_serving import engine, store
from namesake_serving.engine import Engine, Preloaded
from namesake_serving.settings import Settings
from namesake_serving.store import Stored
from namesake_serving.traffic import Answerer, Live, Routing, Traffic

Tick = Callable[[float], None]

_IN_PLACE = "in place"
_STANDBY = "standby"
_STANDBY_SECONDS = 0.5
"""Between two looks for the standby."""
_LONGEST_STANDBY_WAIT = 60.0
"""Until one that does not start is tried again; doubled up to this."""
_LOOK_SECONDS = 0.2
"""Between two looks whether an alias points again to what is to go."""

_log = logging.getLogger("namesake.serving")


def no_tick(_seconds: float) -> None:
    """Nobody is told how long it takes."""


@dataclass(frozen=True)
class Loaded:
    """A version in an engine, unseen by clients as yet, and the way it got there."""

    live: Live
    way: str


class Host(Protocol):
    """What the service needs of either."""

    part: str
    """The folder of a version that is loaded."""

    @property
    def changing(self) -> bool:
        """Whether the weights that answer are being changed, so that their engine is nobody else's to mend."""

    async def start(self, stored: Stored, tick: Tick = no_tick) -> Loaded:
        """A version where no engine runs yet."""

    async def load(self, stored: Stored) -> Loaded:
        """A version beside the live one, or in its place with the door held."""

    async def restart(self, stored: Stored) -> Loaded:
        """What was live, whose engine has ended by itself, in another one."""

    async def undo(self, loaded: Loaded) -> None:
        """It is not to be served: back to what was."""

    async def turned(self, loaded: Loaded, old: Sequence[Live]) -> None:
        """It is served now: what answered before finishes and goes."""

    async def retire(self, old: Live) -> None:
        """It answers no more, and nothing takes its place."""

    async def lost(self, dead: Engine) -> None:
        """An engine ended by itself."""


class Engines:
    """Every engine that was started, so that none is left behind.

    Args:
        ready: what the first one is started from, where there is something.
    """

    def __init__(self, settings: Settings, folder: Path, ready: Preloaded | None = None) -> None:
        self._settings, self._folder, self._ready = settings, folder, ready
        self._number = self._coming = 0
        self.started: list[Engine] = []

    async def start(self, weights: Path, tick: Tick = no_tick, adapters: engine.Adapters | None = None) -> Engine:
        """A new engine that answers.

        Raises:
            ServingError: it does not come up, or there is no memory for one more.
        """
        self._check_memory()
        self._number += 1
        name = f"engine-{self._number}"
        ready, self._ready = self._ready, None
        self._coming += 1
        try:
            start = (weights, self._settings, self._folder, name, adapters, ready)
            begun = asyncio.create_task(asyncio.to_thread(engine.start, *start))
            try:
                running = await asyncio.shield(begun)
            except asyncio.CancelledError:  # the thread goes on, and nobody else would know of what it starts
                with suppress(ServingError):
                    await self.end(await begun)
                raise
            self.started.append(running)
            try:
                await asyncio.to_thread(running.wait_ready, self._settings.start_seconds, tick)
            except BaseException:
                await self.end(running)
                raise
        finally:
            self._coming -= 1
        return running

    async def end(self, one: Engine) -> None:
        """Kill an engine that nobody is to be answered by."""
        await asyncio.to_thread(one.kill)
        self._forget(one)

    async def finish(self, live: Live) -> None:
        """End an engine when its answers have ended, or their time is up."""
        await self.idle(live)
        await self.leave(live.engine)

    async def leave(self, one: Engine) -> None:
        """End an engine that is answering nobody any more, or for too long."""
        await asyncio.to_thread(one.stop)
        self._forget(one)

    async def idle(self, live: Live) -> bool:
        """Wait until its answers have ended, or their time is up; whether they did."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._settings.shutdown_seconds):
                await live.idle.wait()
        return not live.running

    async def stop(self) -> None:
        """End them all."""
        await asyncio.gather(*(asyncio.to_thread(one.stop) for one in self.started), return_exceptions=True)

    def _forget(self, one: Engine) -> None:
        with suppress(ValueError):
            self.started.remove(one)

    def _check_memory(self) -> None:
        # Without room for one more the kernel would kill the one that answers. Of a GPU's memory vLLM itself says so.
        each = max((one.memory() for one in self.started if one.alive()), default=0)
        needed = each * (1 + self._coming)  # those that are starting have hardly taken theirs
        free = engine.available_memory()
        if needed > free:
            raise ServingError(
                tr(
                    "There is no memory for a second engine: the first has {needed:.1f} GiB, {free:.1f} GiB are free.",
                    needed=each / 2**30,
                    free=free / 2**30,
                ),
                mend="Give the server more memory, or use --mode adapter, which needs one engine only.",
                kind="memory",
            )


class Merged:
    """Merged weights: changed in place where that can be, else in a second engine beside the first."""

    part = WEIGHTS_FOLDER

    def __init__(self, engines: Engines, traffic: Traffic, settings: Settings) -> None:
        self._engines, self._traffic, self._settings = engines, traffic, settings
        self._ending: set[asyncio.Task[None]] = set()
        self.changing = False

    async def start(self, stored: Stored, tick: Tick = no_tick) -> Loaded:
        """A version in a new engine."""
        return Loaded(Live(stored, await self._engines.start(stored.weights, tick)), "second engine")

    async def load(self, stored: Stored) -> Loaded:
        """Into the live engine, the door held; else into a second one.

        Raises:
            ServingError: neither can be.
        """
        why = await self.hold(stored)
        if not why:
            loaded, why = await self.change(stored)
            if loaded is not None:
                return loaded
        _log.info("second engine, since %s", why)
        await self.gone()
        return await self.start(stored)

    async def restart(self, stored: Stored) -> Loaded:
        """In a new engine."""
        return await self.start(stored)

    async def gone(self) -> None:
        """Wait until the engines that are leaving have made room for one more."""
        if self._ending:
            await asyncio.wait(self._ending)

    async def hold(self, stored: Stored) -> str:
        """Hold the door for a change in place; why that cannot be, empty when nobody is answered any more."""
        live = self._traffic.live
        if live is None:
            return "no engine is running"
        if why := store.difference(live.stored, stored):
            return why
        if not await self._traffic.hold(self._settings.hold_seconds):
            return f"answers were still running after {self._settings.hold_seconds:g} s"
        if self._traffic.live is not live or not live.engine.alive():
            self._traffic.release()
            return "the engine has just died"
        return ""

    async def change(self, stored: Stored) -> tuple[Loaded | None, str]:
        """Other weights into the live engine while the door is held; where that failed it is open again, and why.

        Raises:
            ServingError: the engine died of it.
        """
        live = self._traffic.live
        assert live is not None
        self.changing = True
        try:
            took = await asyncio.to_thread(live.engine.change_weights, stored.weights)
        except ServingError as error:
            # It may hold half of them: back to the old ones, which it must take, or it is started again.
            dead = not live.engine.alive()
            await self._back(live)
            if dead:
                raise
            return None, f"the engine would not change in place ({error.message})"
        _log.info("weights changed in place in %.2f s", took)
        return Loaded(Live(stored, live.engine), _IN_PLACE), ""

    async def _back(self, live: Live | None) -> None:
        """The old weights again, and the door open."""
        try:
            if live is not None:
                await asyncio.to_thread(live.engine.change_weights, live.stored.weights)
        except ServingError:
            assert live is not None
            await asyncio.to_thread(live.engine.kill)  # the watch starts it again on the old weights
        finally:
            self.changing = False
            self._traffic.release()

    async def undo(self, loaded: Loaded) -> None:
        """Back to the old weights, or the second engine ended."""
        if loaded.way == _IN_PLACE:
            await self._back(self._traffic.live)
        else:
            await self._engines.end(loaded.live.engine)

    async def turned(self, loaded: Loaded, old: Sequence[Live]) -> None:
        """Open the door; engines that are not needed any more end while everything goes on."""
        self.changing = False
        self._traffic.release()
        for one in old:
            if one.engine is not loaded.live.engine:
                ending = asyncio.create_task(self._engines.finish(one))
                self._ending.add(ending)
                ending.add_done_callback(self._ending.discard)

    async def retire(self, old: Live) -> None:
        """End its engine."""
        await self._engines.finish(old)

    async def lost(self, dead: Engine) -> None:
        """Leave nothing of it behind."""
        await self._engines.end(dead)


class WithStandby(Merged):
    """Merged weights in two engines by turns: a version is loaded into the one by which nobody is answered, proves
    itself there, and then the traffic turns. Nobody is held, moving back needs no loading, and an engine that has died
    is replaced by the other at once.

    While there is no standby (it is starting, or has died) a version comes in as it does without one.

    Args:
        prove: asks what is in an engine who it is.
    """

    def __init__(
        self, engines: Engines, traffic: Traffic, settings: Settings, prove: Callable[[Live], Awaitable[None]]
    ) -> None:
        super().__init__(engines, traffic, settings)
        self._prove = prove
        self._standby: Live | None = None
        self._leaving: Live | None = None
        self._left: asyncio.Task[None] | None = None
        self._mine: list[Engine] = []
        self._busy = 0

    def ready(self) -> bool:
        """Whether the standby can take a version in."""
        return self._standby is not None and self._standby.engine.alive()

    def held(self) -> list[str]:
        """Ids of the versions in engines by which nobody new is answered: what comes in next is compared with them."""
        return [one.stored.id for one in (self._standby, self._leaving) if one is not None]

    async def keep(self) -> None:
        """Start a standby whenever there is none, until cancelled."""
        wait, again = _STANDBY_SECONDS, 0.0
        while True:
            await asyncio.sleep(_STANDBY_SECONDS)
            await self._bury()
            live = self._traffic.live
            if live is None or not live.engine.alive() or self.changing or time.monotonic() < again:
                continue
            if len(self._mine) + self._busy > 1:  # the other is about to become the standby, or the live one
                continue
            try:
                await self._warm((await self.start(live.stored)).live)
            except Exception as error:  # whatever it is, what is live answers without a standby
                if not isinstance(error, ServingError):
                    _log.exception("while the standby started")
                _log.warning("no standby: %s", error.message if isinstance(error, ServingError) else error)
                wait = min(wait * 2, _LONGEST_STANDBY_WAIT)
                again = time.monotonic() + wait
            else:
                wait = _STANDBY_SECONDS

    async def _warm(self, standby: Live) -> None:
        """It proves itself, so that what an engine does once only is done before it is needed."""
        try:
            await self._prove(standby)
        except BaseException:
            await self._engines.end(standby.engine)
            raise
        _log.info("the standby is ready")
        await self._leave(standby)

    async def _bury(self) -> None:
        standby = self._standby
        if standby is not None and not standby.engine.alive():
            _log.error("the standby ended by itself; starting it again\n%s", standby.engine.tail(5))
            self._standby = None
            await self._engines.end(standby.engine)
        self._mine = [one for one in self._mine if one.alive()]

    async def start(self, stored: Stored, tick: Tick = no_tick) -> Loaded:
        """A version in a new engine."""
        self._busy += 1
        try:
            loaded = await super().start(stored, tick)
        finally:
            self._busy -= 1
        self._mine.append(loaded.live.engine)
        return loaded

    async def load(self, stored: Stored) -> Loaded:
        """Into the standby; without one, or where that cannot take it, as :class:`Merged` does.

        Raises:
            ServingError: neither can be.
        """
        return await self._into_standby(stored) or await super().load(stored)

    async def restart(self, stored: Stored) -> Loaded:
        """In the standby; without one in a new engine."""
        return await self._into_standby(stored) or await super().restart(stored)

    async def _into_standby(self, stored: Stored) -> Loaded | None:
        self._busy += 1
        try:
            return await self._take_in(stored)
        finally:
            self._busy -= 1

    async def _take_in(self, stored: Stored) -> Loaded | None:
        leaving = self._leaving
        if leaving is not None and leaving.stored.id == stored.id and leaving.engine.alive():
            self._stay()  # moved back while its answers were still running
            return Loaded(leaving, _STANDBY)
        if self._left is not None:
            await asyncio.wait([self._left], timeout=self._settings.hold_seconds)
        await self._bury()
        standby, self._standby = self._standby, None
        if standby is None:
            return None
        if standby.proved and standby.stored.id == stored.id:
            back = Live(stored, standby.engine)
            back.proved = True
            return Loaded(back, _STANDBY)
        try:
            if why := store.difference(standby.stored, stored):
                _log.info("not into the standby, since %s", why)
                await self._engines.end(standby.engine)  # the next one is started on what is live then
                return None
            took = await asyncio.to_thread(standby.engine.change_weights, stored.weights)
        except ServingError as error:
            # Not into the live engine either, which might die of them.
            _log.info("second engine, since the standby would not change (%s)", error.message)
            await self._engines.end(standby.engine)
            return await self.start(stored)
        except BaseException:
            await self._engines.end(standby.engine)
            raise
        _log.info("weights of the standby changed in %.2f s", took)
        return Loaded(Live(stored, standby.engine), _STANDBY)

    async def undo(self, loaded: Loaded) -> None:
        """It stays the standby, with weights that nobody is answered by."""
        if loaded.way == _STANDBY:
            self._let_leave(loaded.live)
        else:
            await super().undo(loaded)

    async def turned(self, loaded: Loaded, old: Sequence[Live]) -> None:
        """Open the door; what answered before finishes while everything goes on."""
        self.changing = False
        self._traffic.release()
        for one in old:
            if one.engine is not loaded.live.engine:
                self._let_leave(one)

    def _let_leave(self, old: Live) -> None:
        self._leaving, self._left = old, asyncio.create_task(self._leave(old))

    def _stay(self) -> None:
        assert self._left is not None
        self._left.cancel()
        self._leaving = self._left = None

    async def _leave(self, old: Live) -> None:
        """Its engine is the standby when its answers have ended, unless there is one or they do not end."""
        idle = await self._engines.idle(old)
        if self._leaving is old:
            self._leaving = self._left = None
        if idle and self._standby is None:
            self._standby = old
        else:
            await self._engines.leave(old.engine)


class Adapters:
    """One engine on the base; each version is an adapter in it, under a name that no other version ever has.

    A version whose alias has moved on stays in the engine, and is answered to by its number, until its place is needed:
    then that which was used longest ago goes, unless it is answering or an alias points to it.

    Args:
        folder: private folder for copies of the adapters. An engine that reads an adapter again and finds it gone dies,
            so a copy of our own lies there for as long as the engine knows its name.
    """

    part = ADAPTER_FOLDER
    changing = False

    def __init__(self, engines: Engines, routing: Routing, settings: Settings, folder: Path) -> None:
        self._engines, self._routing, self._settings, self._folder = engines, routing, settings, folder
        self._base: store.Base | None = None
        self._engine: Engine | None = None
        self._rank = settings.max_lora_rank
        self._in: dict[str, Live] = {}
        self._proving: list[Live] = []
        self._one_at_a_time = asyncio.Lock()

    async def load(self, stored: Stored) -> Loaded:
        """A version beside the others."""
        return await self.start(stored)

    async def restart(self, stored: Stored) -> Loaded:
        """The same, in a new engine on the base."""
        return await self.start(stored)

    async def start(self, stored: Stored, tick: Tick = no_tick) -> Loaded:
        """The same, where the engine may have to be started first."""
        async with self._one_at_a_time:
            if self._base is None:
                self._base = await asyncio.to_thread(store.base, stored.manifest, self._settings.base)
                await asyncio.to_thread(store.check_weights, self._base.path)
                self._rank = engine.room_for(self._rank or store.rank(stored))
            await asyncio.to_thread(store.check_adapter, stored, self._base, self._rank)
            if self._engine is None or not self._engine.alive():
                await self._start_engine(self._base, tick)
            if stored.id not in self._in:
                await self._put_in(stored)
            self._proving.append(self._in[stored.id])
            return Loaded(self._in[stored.id], "adapter")

    async def _start_engine(self, base: store.Base, tick: Tick) -> None:
        if self._engine is not None:
            await self.lost(self._engine)
        room = engine.Adapters(self._settings.max_adapters, self._rank)
        self._engine = await self._engines.start(base.path, tick, room)
        self._routing.named[base.name] = Answerer(self._engine, engine.MODEL, base.name)

    async def _put_in(self, stored: Stored) -> None:
        assert self._engine is not None
        while len(self._in) >= self._settings.max_adapters:
            free = [one for one in self._in.values() if not one.running and one not in self._pinned()]
            if not free:
                raise no_place(self._settings)
            await self._put_out(min(free, key=lambda one: one.used))
        folder = self._folder / "adapters" / stored.id
        await asyncio.to_thread(_copy, stored.adapter, folder)
        await asyncio.to_thread(self._engine.load_adapter, stored.id, folder)
        self._in[stored.id] = Live(stored, self._engine, stored.id)

    async def _put_out(self, live: Live) -> None:
        # First out of the names, so that nobody enters while the engine forgets it.
        self._in.pop(live.model, None)
        self._unname(live)
        try:
            if live.engine.alive():
                await asyncio.to_thread(live.engine.unload_adapter, live.model)
        except ServingError as error:  # it may still know the name, so the copy stays
            _log.error("%s", error.message)
        else:
            await asyncio.to_thread(shutil.rmtree, self._folder / "adapters" / live.model, True)
            _log.info("%s is out of the engine", live.label)

    async def _let_go(self, live: Live) -> None:
        """Out of the engine when its answers have ended, unless an alias points to it by then."""
        if live in self._pinned():
            return
        self._unname(live)
        while live.running:
            with suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_SECONDS):
                    await live.idle.wait()
            if live in self._pinned():  # moved back: its alias need not wait for an end that may never come
                return
        async with self._one_at_a_time:
            if live not in self._pinned() and not live.running and self._in.get(live.model) is live:
                await self._put_out(live)

    def _unname(self, live: Live) -> None:
        if self._routing.named.get(live.label) is live:
            del self._routing.named[live.label]

    def _pinned(self) -> Collection[Live]:
        pointed = (self._routing.champion.live, self._routing.challenger.live)
        return [*self._proving, *(live for live in pointed if live is not None)]

    async def undo(self, loaded: Loaded) -> None:
        """Out of the engine, unless an alias points to it already."""
        self._proving.remove(loaded.live)
        await self._let_go(loaded.live)

    async def turned(self, loaded: Loaded, _old: Sequence[Live]) -> None:
        """It is answered to by its number too, and stays so when the alias moves on."""
        self._proving.remove(loaded.live)
        self._routing.named[loaded.live.label] = loaded.live

    async def retire(self, old: Live) -> None:
        """A challenger that was withdrawn is answered to by nothing."""
        await self._let_go(old)

    def answer_to(self, ids: Collection[str]) -> None:
        """Of versions, answer to the numbers of these only."""
        for one in [*self._in.values()]:
            if one.model not in ids:
                self._unname(one)

    async def keep(self, ids: Collection[str], seconds: float = 0) -> bool:
        """Let go of all others that are not answering; whether there is a place then.

        Args:
            seconds: how long to wait, where there is none, for those that are.
        """
        others = [one for one in self._in.values() if one.model not in ids and one not in self._pinned()]
        await self._let_idle_go(others)
        if len(self._in) >= self._settings.max_adapters and others and seconds:
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await asyncio.gather(*(one.idle.wait() for one in others))
            await self._let_idle_go(others)
        return len(self._in) < self._settings.max_adapters

    async def _let_idle_go(self, those: Sequence[Live]) -> None:
        for one in those:
            self._unname(one)
            if not one.running and self._in.get(one.model) is one:
                await self._let_go(one)

    async def lost(self, dead: Engine) -> None:
        """All that was in it is gone."""
        for label in [label for label, one in self._routing.named.items() if one.engine is dead]:
            del self._routing.named[label]
        self._in = {name: one for name, one in self._in.items() if one.engine is not dead}
        await self._engines.end(dead)


def no_place(settings: Settings) -> ServingError:
    """Every adapter that is in the engine has to stay."""
    return ServingError(
        tr(
            "All {count} places for adapters are taken by versions that are answering.",
            count=settings.max_adapters,
        ),
        mend="Serve with a greater --max-adapters.",
        kind="memory",
    )


def _copy(adapter: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for name in store.ADAPTER_FILES:
        shutil.copyfile(adapter / name, target / name)
