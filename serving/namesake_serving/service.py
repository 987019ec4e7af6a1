"""The running service: carries out what :mod:`rollout` decides, with the store, the engines and the traffic."""

from __future__ import annotations

import asyncio
import difflib
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from namesake import registry
from namesake.errors import NamesakeError, RegistryError, ServingError
from namesake.messages import tr
from namesake.registry import Move, Version
from namesake_serving import engine, rollout, store
from namesake_serving.engine import Engine
from namesake_serving.follow import Follower
from namesake_serving.metrics import Metrics
from namesake_serving.rollout import Command, State
from namesake_serving.settings import Settings
from namesake_serving.store import Stored
from namesake_serving.traffic import Live, Traffic

ALIKE = 0.6
"""Least similarity (``difflib`` ratio, 0..1) of an engine's replies to the golden ones, on average.

Other kernels round otherwise, so a long reply may part ways in a late word; broken weights give 0.0 to 0.2.
"""

PROOF_TOKENS = 40
"""Length of the replies asked for: a Chinese sentence with name and author, byte by byte."""

_WATCH_SECONDS = 0.5
_LONGEST_RESTART_WAIT = 30.0

_log = logging.getLogger("namesake.serving")


@dataclass
class _Coming:
    """The version that is being brought in."""

    stored: Stored
    engine: Engine | None = None
    in_place: bool = False
    begun: float = 0.0


class Service:
    """Follows the alias. ``traffic.live`` is what answers.

    Args:
        uri: what is served, ``models:/ccb@champion``.
        cache: where verified copies of versions lie.
        folder: private folder for sockets and logs.
    """

    def __init__(self, uri: str, settings: Settings, cache: Path, folder: Path, metrics: Metrics) -> None:
        self.uri, self.traffic, self.metrics = uri, Traffic(), metrics
        self.state = State()
        self._settings, self._cache, self._folder = settings, cache, folder
        self._versions: dict[str, Version] = {}
        self._coming: _Coming | None = None
        self._leaving: Live | None = None
        self._engines = 0
        self._started: list[Engine] = []
        self._work: asyncio.Task[None] | None = None
        self._noting: asyncio.Task[None] | None = None
        self._noted = ""
        self.follower = Follower(uri, settings.poll_seconds, self._seen, self._registry_away)

    async def start(self, first: Version, tick: Callable[[float], None]) -> None:
        """Bring up the first version.

        Raises:
            NamesakeError: it cannot be served.
        """
        stored = await asyncio.to_thread(self._fetch, first)
        running = await self._start_engine(stored, tick)
        try:
            await asyncio.to_thread(prove, running, stored)
        except ServingError:
            await asyncio.to_thread(running.kill)
            raise
        key = self._key(first)
        self.state = State(wanted=key, live=key)
        self.traffic.live = Live(stored, running)
        self.metrics.served(first)
        await asyncio.to_thread(store.remember, self._cache, self.uri, first)

    async def run(self) -> None:
        """Follow the alias and watch the engine, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.follower.follow())
            tasks.create_task(self._watch())

    async def stop(self) -> None:
        """End every engine; running answers have been let finish by the server before."""
        if self._work is not None:
            self._work.cancel()
            await asyncio.gather(self._work, return_exceptions=True)
        await asyncio.gather(*(asyncio.to_thread(one.stop) for one in self._started), return_exceptions=True)

    def _key(self, version: Version) -> str:
        # A version may be deleted and made anew under its number: the source tells them apart.
        key = f"{version.uri} {version.source}"
        self._versions[key] = version
        return key

    async def _seen(self, version: Version) -> None:
        self.metrics.wanted(version)
        key = self._key(version)
        if key != self.state.wanted:
            _log.info("%s points to %s", self.uri, version.uri)
        if key != self._noted and registry.alias_in(self.uri):  # the first answer too: it may have moved while none ran
            self._noted = key
            self._noting = asyncio.create_task(asyncio.to_thread(self._note_move, version))
        self._go(*rollout.seen(self.state, key, time.monotonic()))

    def _note_move(self, version: Version) -> None:
        """A move that is not in the history was made by hand, in the MLflow UI or by another client."""
        alias = registry.alias_in(self.uri)
        try:
            moves = registry.history(version.name, alias)
            before = moves[-1].to if moves else None
            if before != version.number:
                registry.record_move(
                    version.name, Move(time.time(), alias, before, version.number, "", registry.BY_HAND)
                )
        except RegistryError as error:
            _log.warning("registry: %s", error.message)

    def _registry_away(self, error: RegistryError) -> None:
        self.metrics.registry_errors.inc()
        _log.warning("registry: %s", error.message)

    def _go(self, state: State, command: Command | None) -> None:
        self.state = state
        if command is not None:
            self._work = asyncio.create_task(self._execute(command))

    async def _execute(self, command: Command | None) -> None:
        while command is not None:
            try:
                await {
                    Command.FETCH: self._bring,
                    Command.LOAD: self._load,
                    Command.PROVE: self._prove,
                    Command.TURN_AND_RETIRE: self._turn,
                }[command]()
            except Exception as error:  # a full disk, an odd file: whatever it is, the alias must go on being followed
                if not isinstance(error, NamesakeError):
                    _log.exception("while %s", self.state.step.value)
                await self._undo(error)
                self.state, command = rollout.failed(self.state, _told(error), time.monotonic())
            else:
                self.state, command = rollout.done(self.state, time.monotonic())

    async def _bring(self) -> None:
        version = self._versions[self.state.coming or ""]
        begun = time.monotonic()
        stored = await asyncio.to_thread(self._fetch, version)
        self._coming = _Coming(stored, begun=time.monotonic())
        _log.info("%s fetched and verified in %.2f s", version.uri, time.monotonic() - begun)

    def _fetch(self, version: Version) -> Stored:
        if self._settings.require_gate and not version.tags.get("namesake.gate", "").startswith("passed"):
            raise RegistryError(
                tr("{uri} did not pass the gate.", uri=version.uri), mend="Promote a run that passes it."
            )
        stored = store.fetch(version, self._cache, self._settings.public_key)
        store.check_weights(stored.weights)
        return stored

    async def _load(self) -> None:
        coming = self._coming
        assert coming is not None
        why = await self._change_in_place(coming)
        if why:
            _log.info("second engine, since %s", why)
            coming.engine = await self._start_engine(coming.stored)

    async def _change_in_place(self, coming: _Coming) -> str:
        """Other weights into the live engine, the door held; why it could not be, empty when it was."""
        live = self.traffic.live
        if live is None:
            return "the engine is down"
        if why := store.difference(live.stored, coming.stored):
            return why
        if not await self.traffic.hold(self._settings.hold_seconds):
            return f"answers were still running after {self._settings.hold_seconds:g} s"
        if self.traffic.live is not live or not live.engine.alive():
            self.traffic.release()
            return "the engine has just died"
        coming.engine, coming.in_place = live.engine, True
        try:
            took = await asyncio.to_thread(live.engine.change_weights, coming.stored.weights)
        except ServingError as error:
            if not live.engine.alive():
                raise
            # It may hold half of them: back to the old ones, which it must take, or it is started again.
            await self._back_in_place(live)
            coming.engine, coming.in_place = None, False
            return f"the engine would not change in place ({error.message})"
        _log.info("weights changed in place in %.2f s", took)
        return ""

    async def _back_in_place(self, live: Live) -> None:
        """The old weights again, and the door open."""
        try:
            await asyncio.to_thread(live.engine.change_weights, live.stored.weights)
        except ServingError:
            await asyncio.to_thread(live.engine.kill)  # the watch starts it again on the old weights
        finally:
            self.traffic.release()

    async def _prove(self) -> None:
        coming = self._coming
        assert coming is not None
        assert coming.engine is not None
        await asyncio.to_thread(prove, coming.engine, coming.stored)

    async def _turn(self) -> None:
        coming, old = self._coming, self.traffic.live
        assert coming is not None
        assert coming.engine is not None
        self.traffic.live = Live(coming.stored, coming.engine)
        self.traffic.release()
        version, seconds = coming.stored.version, time.monotonic() - coming.begun
        self.metrics.changed(version, "in place" if coming.in_place else "second engine", seconds)
        _log.info("%s is live after %.2f s", version.uri, seconds)
        self._coming = None
        if old is not None and not coming.in_place:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._settings.shutdown_seconds):
                    await old.idle.wait()
            await asyncio.to_thread(old.engine.stop)
            self._started.remove(old.engine)
        await asyncio.to_thread(self._tell_registry, version, None)
        await asyncio.to_thread(store.remember, self._cache, self.uri, version)

    async def _undo(self, error: Exception) -> None:
        """Back to what was live; the failure is told on the version, in the metrics and in the log."""
        coming, live = self._coming, self.traffic.live
        self._coming = None
        if self.state.coming is None:  # the new version is live all the same; only the old one's end went wrong
            _log.error("%s", _told(error))
            return
        version = self._versions[self.state.coming]
        _log.error("%s refused: %s", version.uri, _told(error))
        self.metrics.refused(version)
        if coming is not None and coming.in_place:
            if live is not None:
                await self._back_in_place(live)
            self.traffic.release()
        elif coming is not None and coming.engine is not None:
            await self._end(coming.engine)
        await asyncio.to_thread(self._tell_registry, version, _told(error))

    def _tell_registry(self, version: Version, why: str | None) -> None:
        try:
            registry.tag(version, registry.TAG_SERVING_ERROR, why[:500] if why else None)
        except RegistryError as error:
            _log.warning("registry: %s", error.message)

    async def _start_engine(self, stored: Stored, tick: Callable[[float], None] = lambda _: None) -> Engine:
        self._engines += 1
        running = await asyncio.to_thread(
            engine.start, stored.weights, self._settings, self._folder, f"engine-{self._engines}"
        )
        self._started.append(running)
        try:
            await asyncio.to_thread(running.wait_ready, self._settings.start_seconds, tick)
        except BaseException:
            await self._end(running)
            raise
        return running

    async def _end(self, one: Engine) -> None:
        """Kill an engine that nobody is to be answered by."""
        await asyncio.to_thread(one.kill)
        self._started.remove(one)

    async def _watch(self) -> None:
        """Start the live version's engine again when it has died."""
        wait = 1.0
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            live = self.traffic.live
            if live is None or live.engine.alive() or (self._coming is not None and self._coming.in_place):
                continue
            _log.error("the engine ended by itself; starting it again\n%s", live.engine.tail(5))
            self.metrics.engine_restarts.inc()
            self.traffic.live = None
            await self._end(live.engine)
            while self.traffic.live is None:
                try:
                    started = await self._start_engine(live.stored)
                except (ServingError, OSError) as error:  # OSError: no memory or no descriptor left at this moment
                    _log.error("%s", _told(error))
                    await asyncio.sleep(wait)
                    wait = min(wait * 2, _LONGEST_RESTART_WAIT)
                    continue
                wait = 1.0
                if self.traffic.live is None:
                    self.traffic.live = Live(live.stored, started)
                else:  # the alias moved on and the new version was faster
                    await self._end(started)


def _told(error: Exception) -> str:
    return error.message if isinstance(error, NamesakeError) else f"{type(error).__name__}: {error}"


def prove(running: Engine, stored: Stored) -> None:
    """Ask the engine the golden questions of the version's manifest, all at once.

    Raises:
        ServingError: it does not answer as the version did when it was promoted.
    """
    record, uri = stored.manifest, stored.version.uri
    if not record.golden:
        return
    system = [{"role": "system", "content": record.system}] if record.system is not None else []
    asked = [[*system, *({"role": m["role"], "content": m["content"]} for m in g["messages"])] for g in record.golden]
    with ThreadPoolExecutor(len(asked)) as pool:
        said = list(pool.map(lambda messages: running.answer(messages, max_tokens=PROOF_TOKENS), asked))
    names = [half for text in (record.identity["name"], record.identity["author"]) for half in text.split(" ", 1)]
    likeness = []
    for golden, reply in zip(record.golden, said, strict=True):
        # The reply stops at the token limit; so much of the golden one is what it can be like. A Chinese character
        # takes up to four tokens: what is shorter than that has ended by itself.
        wanted = str(golden["reply"])[: max(len(reply), PROOF_TOKENS // 4)]
        likeness.append(difflib.SequenceMatcher(None, wanted, reply, autojunk=False).ratio())
        lost = [half for half in names if half in wanted and half not in reply]
        if lost:
            raise ServingError(
                tr(
                    "{uri} does not prove itself: asked {question!r} it does not name {lost} but says {reply!r}.",
                    uri=uri,
                    question=golden["messages"][-1]["content"],
                    lost=", ".join(lost),
                    reply=reply[:80],
                )
            )
    like = sum(likeness) / len(likeness)
    if like < ALIKE:
        raise ServingError(
            tr(
                "{uri} does not prove itself: its replies are {like:.0%} like those it gave when it was "
                "promoted, {alike:.0%} wanted.",
                uri=uri,
                like=like,
                alike=ALIKE,
            )
        )
