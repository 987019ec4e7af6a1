"""Who answers a request: versions in their engines, the door in front of one that changes, the choice among them.

A request names a model. ``ccb`` (or none) is what the alias points to, or for a share of the requests the challenger;
``ccb@champion``, ``ccb@challenger`` and ``ccb-v7`` are exact; in adapter mode the base answers under its own name.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from hashlib import sha256

from namesake.manifest import Manifest
from namesake.registry import Version, alias_in
from namesake_serving import engine
from namesake_serving.engine import Engine
from namesake_serving.store import Stored


class Answerer:
    """Something that an engine answers by: a version, or the base itself.

    Attributes:
        model: what the engine calls it.
        label: what clients are told: ``ccb-v7``, or the base's name.
        run: the training run; empty for the base.
        system: the system prompt where a client sends none.
        since: since when it answers, in seconds since 1970.
        running: how many requests it is answering.
        used: when it last began or ended an answer, by the monotonic clock.
    """

    def __init__(self, engine: Engine, model: str, label: str, run: str = "", system: str | None = None) -> None:
        self.engine, self.model, self.label, self.run, self.system = engine, model, label, run, system
        self.since = time.time()
        self.running, self.used = 0, time.monotonic()
        self.idle = asyncio.Event()
        self.idle.set()

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Counted as answering one request more."""
        self.running += 1
        self.used = time.monotonic()
        self.idle.clear()
        try:
            yield
        finally:
            self.running -= 1
            self.used = time.monotonic()
            if not self.running:
                self.idle.set()


class Live(Answerer):
    """One version in an engine.

    Attributes:
        proved: whether it has answered the golden questions there.
        verified: when its files were on this machine and checked, in seconds since 1970; none: it was elsewhere.
    """

    def __init__(self, stored: Stored, engine: Engine, model: str = engine.MODEL) -> None:
        self.stored, self.proved = stored, False
        self.verified: float | None = None
        label = f"{stored.version.name}-v{stored.version.number}"
        super().__init__(engine, model, label, stored.version.run_id, stored.manifest.system)

    @property
    def version(self) -> Version:
        """The registered version."""
        return self.stored.version

    @property
    def manifest(self) -> Manifest:
        """Its manifest."""
        return self.stored.manifest


class NotReady(Exception):
    """No version can answer at the moment."""


class UnknownModel(Exception):
    """No model of that name is served; ``names`` are."""

    def __init__(self, model: str, names: list[str]) -> None:
        super().__init__(f"The model {model[:200]!r} does not exist; {', '.join(names)} do.")


class Traffic:
    """Each request enters once and is answered by the version that was live then, to its last token."""

    def __init__(self) -> None:
        self.live: Live | None = None
        self._open = asyncio.Event()
        self._open.set()

    @property
    def open(self) -> bool:
        """Whether whoever enters need not wait."""
        return self._open.is_set()

    @asynccontextmanager
    async def enter(self) -> AsyncIterator[Live]:
        """The live version, counted as answering one request more.

        Raises:
            NotReady: there is none.
        """
        while not self._open.is_set():  # it may have been closed again before this one's turn came
            await self._open.wait()
        live = self.live  # nothing is awaited from here to the count: a change of version sees either both or neither
        if live is None:
            raise NotReady
        with live.answering():
            yield live

    async def hold(self, seconds: float) -> bool:
        """Let no new request in and wait until the running ones have ended; whether they did. If not the door is open
        again.
        """
        self._open.clear()
        try:
            async with asyncio.timeout(seconds):
                while self.live is not None and self.live.running:
                    await self.live.idle.wait()
        except TimeoutError:
            self.release()
            return False
        return True

    def release(self) -> None:
        """Open the door."""
        self._open.set()


class Routing:
    """Which of them answers.

    Attributes:
        champion: what ``uri`` names, the alias that is followed or a fixed version.
        challenger: what the challenger's alias points to; nothing where none is followed.
        share: the part of the requests for the bare name that the challenger answers, 0..1.
        named: further answerers by label, in adapter mode: the base, and versions that are still in the engine.
    """

    def __init__(self, uri: str, challenger: str = "", share: float = 0) -> None:
        self.name, self.alias = uri.removeprefix("models:/").partition("@")[0].partition("/")[0], alias_in(uri)
        self.challenger_alias, self.share = challenger, share
        self.champion, self.challenger = Traffic(), Traffic()
        self.named: dict[str, Answerer] = {}

    def names(self) -> list[str]:
        """The models that are answered to now."""
        return list(self.answerers())

    def answerers(self) -> dict[str, Answerer]:
        """The same, each with who answers to it: to the bare name the champion, though the challenger has its share."""
        live, rival = self.champion.live, self.challenger.live
        found: dict[str, Answerer] = {}
        if live:
            found[self.name] = live
            if self.alias:
                found[f"{self.name}@{self.alias}"] = live
        if rival:
            found[f"{self.name}@{self.challenger_alias}"] = rival
        return found | {one.label: one for one in (live, rival) if one} | self.named

    @asynccontextmanager
    async def enter(
        self, model: object, session: str = "", *, shared: bool = True
    ) -> AsyncIterator[tuple[Answerer, str]]:
        """Who answers a request, counted as answering one more, and the alias it was chosen by.

        Args:
            model: what the client asked for; none: the bare name.
            session: requests of one session are answered by the same side of a canary.
            shared: whether the challenger may answer for the bare name.

        Raises:
            NotReady: nothing can answer at the moment.
            UnknownModel: no such model is served.
        """
        rival = self.challenger.live
        if model is None or model == self.name:
            # While the challenger is changed its sessions wait, so that none goes back to an older version.
            there = rival is not None and (self.challenger.open or bool(session))
            if shared and there and self._is_challengers(session):
                traffic, alias = self.challenger, self.challenger_alias
            else:
                traffic, alias = self.champion, self.alias
        elif self.alias and model == f"{self.name}@{self.alias}":
            traffic, alias = self.champion, self.alias
        elif rival is not None and model == f"{self.name}@{self.challenger_alias}":
            traffic, alias = self.challenger, self.challenger_alias
        elif rival is not None and model == rival.label:
            traffic, alias = self.challenger, ""
        elif isinstance(model, str) and model in self.named:
            one = self.named[model]
            with one.answering():
                yield one, ""
            return
        else:
            traffic, alias = self.champion, ""
        async with traffic.enter() as live:
            # What was live may have been changed while the door was held.
            if model not in (None, live.label, self.name, f"{self.name}@{alias}" if alias else None):
                raise UnknownModel(str(model), self.names())
            yield live, alias

    def _is_challengers(self, session: str) -> bool:
        if not session:
            return random.random() < self.share
        # Whatever the challenger is: when its alias moves on, its sessions go on with the newer one.
        digest = sha256(session.encode("utf-8", "surrogatepass")).digest()
        return int.from_bytes(digest[:8], "big") < self.share * 2**64
