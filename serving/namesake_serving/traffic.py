"""Who answers now, and the door that requests pass: held for a moment while weights are changed in place."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from namesake.manifest import Manifest
from namesake.registry import Version
from namesake_serving.engine import Engine
from namesake_serving.store import Stored


@dataclass(eq=False)
class Live:
    """One version in an engine, since when it answers (seconds since 1970), and how many requests it is answering."""

    stored: Stored
    engine: Engine
    since: float = field(default_factory=time.time)
    running: int = 0
    idle: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.idle.set()

    @property
    def version(self) -> Version:
        """The registered version."""
        return self.stored.version

    @property
    def manifest(self) -> Manifest:
        """Its manifest."""
        return self.stored.manifest

    @property
    def label(self) -> str:
        """``ccb-v3``: the immutable model id."""
        return f"{self.version.name}-v{self.version.number}"


class NotReady(Exception):
    """No version can answer at the moment."""


class Traffic:
    """Each request enters once and is answered by the version that was live then, to its last token."""

    def __init__(self) -> None:
        self.live: Live | None = None
        self._open = asyncio.Event()
        self._open.set()

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
        live.running += 1
        live.idle.clear()
        try:
            yield live
        finally:
            live.running -= 1
            if not live.running:
                live.idle.set()

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
