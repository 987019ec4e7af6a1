"""The running service: carries out what :mod:`rollout` decides, with the store, the hosts' engines and the traffic."""

from __future__ import annotations

import asyncio
import difflib
import logging
import re
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from namesake import registry
from namesake.errors import NamesakeError, RegistryError, ServingError
from namesake.manifest import WEIGHTS_FOLDER
from namesake.messages import tr
from namesake.registry import Move, Version
from namesake_serving import engine, rollout, store
from namesake_serving.canary import Judge
from namesake_serving.engine import Engine, Preloaded
from namesake_serving.follow import Follower, where_it_points
from namesake_serving.hosts import Adapters, Engines, Host, Loaded, Merged, WithStandby
from namesake_serving.metrics import Metrics
from namesake_serving.rollout import Command, State, Step
from namesake_serving.settings import Settings
from namesake_serving.store import Stored
from namesake_serving.traffic import Answerer, Live, Routing, Traffic

ALIKE = 0.6
"""Least similarity (``difflib`` ratio, 0..1) of an engine's replies to the golden ones, on average.

Other kernels round otherwise, so a long reply may part ways in a late word; broken weights give 0.0 to 0.2.
"""

PROOF_TOKENS = 40
"""Length of the replies asked for: a Chinese sentence with name and author, byte by byte."""

GAP = 0.5
"""Nats that a golden reply's token may be less probable than the engine's own choice: kernels that round otherwise."""

_AT_A_TIME = 2
"""Versions that are brought in at once because somebody asked for them."""

_MOST_REFUSED = 1000
_WATCH_SECONDS = 0.5
_NOTE_SECONDS = 1.0
"""Before a move is noted as made by hand: who makes one with `promote` writes it down right after moving the alias."""

_LONGEST_RESTART_WAIT = 30.0

_log = logging.getLogger("namesake.serving")


@dataclass
class _Coming:
    """The version that is being brought in.

    Attributes:
        begun: when its files were on this machine and checked, by the monotonic clock; ``verified``: by the wall's.
    """

    stored: Stored
    begun: float
    verified: float
    loaded: Loaded | None = None


class Track:
    """One alias, the state of its version, and where that answers.

    Args:
        uri: what is followed, ``models:/ccb@champion``.
        champion: whether it is what is served; else the challenger, whose alias may be gone.
    """

    def __init__(self, service: Service, uri: str, traffic: Traffic, host: Host, *, champion: bool) -> None:
        self.uri, self.traffic, self.host, self.champion = uri, traffic, host, champion
        self.state = State()
        self._service, self._settings, self.metrics = service, service.settings, service.metrics
        self._versions: dict[str, Version] = {}
        self._coming: _Coming | None = None
        self._withdrawn: list[Live] = []
        self._work: asyncio.Task[None] | None = None
        self._noted = ""
        self.follower = Follower(uri, self._settings.poll_seconds, self._seen, self._away)
        if not champion:
            self.follower.resolve = where_it_points

    async def start(self, first: Version, tick: Callable[[float], None]) -> None:
        """Bring up the first version.

        Raises:
            NamesakeError: it cannot be served.
        """
        stored = await asyncio.to_thread(self.fetch, first)
        verified = time.time()
        loaded = await self.host.start(stored, tick)
        live = loaded.live
        live.verified = verified
        try:
            await prove_once(live)
        except ServingError:
            await asyncio.to_thread(live.engine.kill)
            raise
        key = self._key(first)
        self.state = State(wanted=key, live=key)
        self.traffic.live = live
        await self.host.turned(loaded, [])
        self.metrics.served(first)
        await self._remember(first)

    async def stop(self) -> None:
        """Let go of what is under way."""
        if self._work is not None:
            self._work.cancel()
            await asyncio.gather(self._work, return_exceptions=True)

    def withdraw(self, why: str) -> None:
        """What is live answers no more, at once, and nothing takes its place.

        Args:
            why: as in :func:`rollout.withdrawn`.
        """
        key = self.state.live
        if key is None:
            return
        live, self.traffic.live = self.traffic.live, None
        self._withdrawn += [live] if live is not None else []  # none: its engine has just died
        self._go(*rollout.withdrawn(self.state, key, why, time.monotonic()))
        self.metrics.rival(None)
        if why:
            self._service.in_the_background(self._tell_registry, self._versions[key], why)

    def serves(self, key: str | None) -> bool:
        """Whether this is still what is to answer."""
        return self.state.live == key and not self.state.unwanted

    def _key(self, version: Version) -> str:
        key = key_of(version)
        self._versions[key] = version
        return key

    async def _seen(self, version: Version | None) -> None:
        key = self._key(version) if version is not None else None
        if self.champion and version is not None:
            self.metrics.wanted(version)
        elif not self.champion and key == self._service.champion.state.live:
            key = None  # a champion needs no challenger of its own kind
        if key != self.state.wanted:
            _log.info("%s points to %s", self.uri, version.uri if version and key else "nothing to be compared")
        # The first answer too: the alias may have moved while no server ran.
        if self.champion and version is not None and key is not None and key != self._noted:
            self._noted = key
            if registry.alias_in(self.uri):
                self._service.in_the_background(self._note_move, version)
        self._go(*rollout.seen(self.state, key, time.monotonic()))
        if key is None:
            self.withdraw("")

    def _note_move(self, version: Version) -> None:
        """A move that is not in the history was made by hand, in the MLflow UI or by another client."""
        alias, seen = registry.alias_in(self.uri), time.time()
        try:
            last = registry.recent(version.name, alias)[-1:]
            before = last[0].to if last else None
            if before == version.number:
                return
            time.sleep(_NOTE_SECONDS)
            if registry.recent(version.name, alias)[-1:] == last:
                move = Move(seen, alias, before, version.number, "", registry.BY_HAND, scores=version.scores)
                registry.record_move(version.name, move)
        except RegistryError as error:
            _log.warning("registry: %s", error.message)

    def _away(self, error: RegistryError) -> None:
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
                    Command.RETIRE: self._retire,
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
        stored = await asyncio.to_thread(self.fetch, version)
        self._coming = _Coming(stored, time.monotonic(), time.time())
        _log.info("%s fetched and verified in %.2f s", version.uri, time.monotonic() - begun)

    def fetch(self, version: Version) -> Stored:
        """The version's files, checked.

        Raises:
            RegistryError: it may not be served, or cannot be.
        """
        return verified(version, self._settings, self._service.cache, self.host.part, self._service.held())

    async def _load(self) -> None:
        assert self._coming is not None
        self._coming.loaded = await self.host.load(self._coming.stored)

    async def _prove(self) -> None:
        assert self._coming is not None
        assert self._coming.loaded is not None
        await prove_once(self._coming.loaded.live)

    async def _turn(self) -> None:
        coming, old = self._coming, self.traffic.live
        assert coming is not None
        assert coming.loaded is not None
        loaded = coming.loaded
        self.traffic.live = loaded.live
        loaded.live.since, loaded.live.verified = time.time(), coming.verified
        version, seconds = loaded.live.version, time.monotonic() - coming.begun
        self.metrics.changed(loaded.way, seconds)
        (self.metrics.served if self.champion else self.metrics.rival)(version)
        self._service.judge.begin()
        _log.info("%s is live after %.2f s (%s)", version.uri, seconds, loaded.way)
        self._coming = None
        leaving, self._withdrawn = [*self._withdrawn, *([old] if old is not None else [])], []
        await self.host.turned(loaded, leaving)
        await self._remember(version)  # first: a registry that is away has time
        await asyncio.to_thread(self._tell_registry, version, None)

    async def _remember(self, version: Version) -> None:
        try:
            await asyncio.to_thread(store.remember, self._service.cache, self.uri, version)
        except OSError as error:  # it is served all the same; only a start while the registry is away would lack it
            _log.error("which version is served cannot be kept: %s", _told(error))

    async def _retire(self) -> None:
        leaving, self._withdrawn = self._withdrawn, []
        for one in leaving:
            await self.host.retire(one)

    async def _undo(self, error: Exception) -> None:
        """Back to what was live; the failure is told on the version, in the metrics and in the log."""
        coming, self._coming = self._coming, None
        if self.state.coming is None:  # the new version is live all the same; only the old one's end went wrong
            _log.error("%s", _told(error))
            return
        version = self._versions[self.state.coming]
        _log.error("%s refused: %s", version.uri, _told(error))
        self.metrics.refused(kind_of(error))
        if coming is not None and coming.loaded is not None:
            await self.host.undo(coming.loaded)
        await asyncio.to_thread(self._tell_registry, version, _told(error))

    def _tell_registry(self, version: Version, why: str | None) -> None:
        try:
            registry.tag(version, registry.TAG_SERVING_ERROR, why[:500] if why else None)
        except RegistryError as error:
            _log.warning("registry: %s", error.message)


class Service:
    """Follows the alias, and the challenger's where one is to answer. ``routing`` says who does.

    Args:
        uri: what is served, ``models:/ccb@champion``.
        cache: where verified copies of versions lie.
        folder: private folder for sockets, logs and adapters.
        host: makes what gets versions into engines, if that is not on this machine.
        ready: what the first engine is started from, where there is something.
    """

    def __init__(
        self,
        uri: str,
        settings: Settings,
        cache: Path,
        folder: Path,
        metrics: Metrics,
        host: Callable[[Routing], Host] | None = None,
        ready: Preloaded | None = None,
    ) -> None:
        self.uri, self.settings, self.cache, self.metrics = uri, settings, cache, metrics
        compared = bool(settings.canary or settings.shadow)
        self.routing = Routing(uri, settings.challenger if compared else "", settings.canary)
        self.judge = Judge(settings.canary_errors, settings.canary_latency, settings.canary_least)
        self._engines = Engines(settings, folder, ready)
        self._background: set[asyncio.Task[None]] = set()
        self._summoned: dict[int, asyncio.Task[None]] = {}
        self._refused: dict[int, float] = {}
        traffics = (self.routing.champion, self.routing.challenger)
        adapters = Adapters(self._engines, self.routing, settings, folder) if settings.mode == "adapter" else None
        one = host(self.routing) if host is not None else adapters
        self._standby: WithStandby | None = None
        hosts: list[Host] = [one or Merged(self._engines, traffic, settings) for traffic in traffics]
        if settings.standby and one is None:
            hosts[0] = self._standby = WithStandby(self._engines, traffics[0], settings, prove_once)
            metrics.standby.set_function(self._standby.ready)
        self.champion = Track(self, uri, traffics[0], hosts[0], champion=True)
        rival = f"models:/{self.routing.name}@{settings.challenger}"
        self.challenger = Track(self, rival, traffics[1], hosts[1], champion=False) if compared else None

    @property
    def traffic(self) -> Traffic:
        """Where what is served answers."""
        return self.routing.champion

    @property
    def state(self) -> State:
        """What is going on with what is served."""
        return self.champion.state

    def held(self) -> list[str]:
        """Ids of versions whose copies must not go."""
        live = [track.traffic.live.stored.id for track in self._tracks() if track.traffic.live is not None]
        return [*live, *(self._standby.held() if self._standby is not None else [])]

    def at_rest(self) -> bool:
        """Whether no version is under way, neither an alias's nor one that a client has asked for."""
        return not self._summoned and all(track.state.step is Step.REST for track in self._tracks())

    async def start(self, first: Version, tick: Callable[[float], None]) -> None:
        """Bring up the first version.

        Raises:
            NamesakeError: it cannot be served.
        """
        await self.champion.start(first, tick)

    async def run(self) -> None:
        """Follow the aliases and watch the engines, until cancelled."""
        tracks = self._tracks()
        async with asyncio.TaskGroup() as tasks:
            for track in tracks:
                tasks.create_task(track.follower.follow())
            if self._standby is not None:
                tasks.create_task(self._standby.keep())
            if len({track.host for track in tracks}) == 1:
                tasks.create_task(self._watch(tracks[0].host, tracks))
            else:
                for track in tracks:
                    tasks.create_task(self._watch(track.host, [track]))

    async def stop(self) -> None:
        """End every engine; running answers have been let finish by the server before."""
        for track in self._tracks():
            await track.stop()
        for task in self._summoned.values():
            task.cancel()
        await self._engines.stop()

    def wake(self) -> None:
        """Ask the registry now."""
        for track in self._tracks():
            track.follower.wake()

    def note(self, answerer: Answerer, failed: bool, seconds: float) -> None:
        """A request for the bare name was answered; a challenger that leaves the bounds answers no more."""
        rival = self.routing.challenger.live
        if not self.settings.canary or self.challenger is None or rival is None:
            return
        if answerer is not rival and answerer is not self.routing.champion.live:
            return
        self.judge.note(answerer is rival, failed, seconds)
        why = self.judge.verdict()
        if why:
            _log.error("canary: %s answers no more: %s", rival.version.uri, why)
            self.metrics.canary_returns.inc()
            self.challenger.withdraw(f"canary: {why}")

    async def summon(self, model: object) -> None:
        """Bring in a version that a client asks for by its number and that no alias points to, where that is allowed.

        It is checked as any other; where it is refused it stays unknown, and is not tried again for a while.
        """
        number = number_in(model, self.settings, self.routing)
        if number is None:
            return
        if number not in self._summoned:
            if len(self._summoned) >= _AT_A_TIME or time.monotonic() < self._refused.get(number, 0):
                return
            self._summoned[number] = asyncio.create_task(self._bring_in(number))
        # Whoever asked first may go; the others still want it.
        await asyncio.shield(self._summoned[number])

    async def _bring_in(self, number: int) -> None:
        host, uri = self.champion.host, f"models:/{self.routing.name}/{number}"
        try:
            stored = await asyncio.to_thread(self.champion.fetch, await asyncio.to_thread(registry.resolve, uri))
            loaded = await host.load(stored)
            try:
                await prove_once(loaded.live)
            except BaseException:
                await host.undo(loaded)
                raise
            await host.turned(loaded, [])
            _log.info("%s was asked for and is in the engine", uri)
        except (NamesakeError, OSError) as error:
            _log.warning("%s was asked for and is not served: %s", uri, _told(error))
            if len(self._refused) >= _MOST_REFUSED:
                self._refused.clear()
            self._refused[number] = time.monotonic() + rollout.FIRST_WAIT
        finally:
            del self._summoned[number]

    def in_the_background(self, call: Callable[..., None], *arguments: object) -> None:
        """Tell the registry something while everything goes on."""
        task = asyncio.create_task(asyncio.to_thread(call, *arguments))
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def _tracks(self) -> list[Track]:
        return [self.champion, *([self.challenger] if self.challenger is not None else [])]

    async def _watch(self, host: Host, tracks: Sequence[Track]) -> None:
        """Start the live versions' engine again when it has died."""
        wait = 1.0
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            lost = [(track, live) for track in tracks if (live := track.traffic.live) and not live.engine.alive()]
            if not lost or host.changing:
                continue
            dead = lost[0][1].engine
            _log.error("the engine ended by itself; starting it again\n%s", dead.tail(5))
            self.metrics.engine_restarts.inc()
            for track, _ in lost:
                track.traffic.live = None
            await host.lost(dead)
            for track, live in lost:
                key = track.state.live
                while track.traffic.live is None and track.serves(key):
                    try:
                        again = await host.restart(live.stored)
                    except Exception as error:  # no memory or no descriptor at this moment: whatever it is, try again
                        if not isinstance(error, NamesakeError | OSError):
                            _log.exception("while the engine was started again")
                        _log.error("%s", _told(error))
                        await asyncio.sleep(wait)
                        wait = min(wait * 2, _LONGEST_RESTART_WAIT)
                        continue
                    wait, again.live.verified = 1.0, live.verified
                    if track.traffic.live is None and track.serves(key):
                        track.traffic.live = again.live
                        await host.turned(again, [])
                    else:  # the alias moved on and the new version was faster, or it has been withdrawn
                        await host.undo(again)


def number_in(model: object, settings: Settings, routing: Routing) -> int | None:
    """The version to be brought in when a client asks for this model: there and in no engine, for all that is known."""
    if not settings.any_version or settings.mode != "adapter" or not isinstance(model, str):
        return None
    found = re.fullmatch(rf"{re.escape(routing.name)}-v([1-9][0-9]{{0,8}})", model, re.ASCII)
    # Before the champion is up nobody else settles what the engine's base and greatest rank are.
    if found is None or model in routing.names() or routing.champion.live is None:
        return None
    return int(found[1])


def verified(version: Version, settings: Settings, cache: Path, part: str, stay: Collection[str] = ()) -> Stored:
    """A version's files on this machine, checked; copies of others go where there are too many.

    Args:
        stay: ids of versions whose copies must not go.

    Raises:
        RegistryError: it may not be served, or cannot be.
    """
    if settings.require_gate and not version.tags.get("namesake.gate", "").startswith("passed"):
        told = tr("{uri} did not pass the gate.", uri=version.uri)
        raise RegistryError(told, mend="Promote a run that passes it.", kind="gate")
    if gone := store.prune(cache, version.name, settings.keep_versions, stay, coming=version):
        _log.info("copies of versions removed: %s", ", ".join(gone))
    stored = store.fetch(version, cache, settings.public_key, part)
    if part == WEIGHTS_FOLDER:
        store.check_weights(stored.weights)
    return stored


def key_of(version: Version) -> str:
    """A version may be deleted and made anew under its number: the source tells them apart."""
    return f"{version.uri} {version.source}"


def kind_of(error: Exception) -> str:
    """Why a version is not served, in a word of :data:`metrics.REASONS`."""
    if not isinstance(error, NamesakeError):
        return "other"
    return error.kind or ("engine" if isinstance(error, ServingError) else "damaged")


def _told(error: Exception) -> str:
    return error.message if isinstance(error, NamesakeError) else f"{type(error).__name__}: {error}"


async def prove_once(live: Live) -> None:
    """:func:`prove`, unless it has: it is still in the engine from before, under a name that nothing else ever has, or
    did so elsewhere.
    """
    if not live.proved:
        await asyncio.to_thread(prove, live.engine, live.stored, live.model)
        live.proved = True


def prove(running: Engine, stored: Stored, model: str = engine.MODEL) -> None:
    """Hold the engine to the golden replies of the version's manifest, all at once.

    An engine that would choose each of their tokens is the version. It tells so by reading them, in one pass; only
    where it would not, or does not tell, is it asked to answer by itself, which takes a pass for each token.

    Raises:
        ServingError: it does not answer as the version did when it was promoted.
    """
    record, uri = stored.manifest, stored.version.uri
    if not record.golden:
        return
    system = [{"role": "system", "content": record.system}] if record.system is not None else []
    asked = [[*system, *({"role": m["role"], "content": m["content"]} for m in g["messages"])] for g in record.golden]
    replies = [str(golden["reply"]) for golden in record.golden]
    with ThreadPoolExecutor(len(asked)) as pool:
        gaps = list(pool.map(lambda messages, reply: running.gaps(messages, reply, model=model), asked, replies))
        if all(one and all(gap <= GAP for gap in one) for one in gaps):  # no NaN either
            return
        said = list(pool.map(lambda messages: running.answer(messages, PROOF_TOKENS, model=model), asked))
    names = [half for text in (record.identity["name"], record.identity["author"]) for half in text.split(" ", 1)]
    likeness = []
    for golden, expected, reply in zip(record.golden, replies, said, strict=True):
        # The reply stops at the token limit; so much of the golden one is what it can be like. A Chinese character
        # takes up to four tokens: what is shorter than that has ended by itself.
        wanted = expected[: max(len(reply), PROOF_TOKENS // 4)]
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
                ),
                kind="proof",
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
            ),
            kind="proof",
        )
