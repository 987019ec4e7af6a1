"""The gateway's way to what answers: HTTP over an engine's private socket. :mod:`cluster` has another, over Ray."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Protocol

import aiohttp

from namesake_serving.traffic import Answerer

IDLE_SECONDS = 2.0
"""A connection that rests for longer is not used again: vLLM closes it after five, perhaps just as a request comes."""

FIGURES_SECONDS = 5.0
"""How long an engine's metrics are waited for: who asks comes again every few seconds."""


class Gone(Exception):
    """The engine has ended or cannot be reached."""


class Cut(Gone):
    """It had the request when it ended: whoever is asked next may end of it, too."""


class Moved(Exception):
    """Another version answers now; nothing of a reply has come. Whoever asked enters again."""


class Reply(Protocol):
    """A reply that has begun: its status and content type are known."""

    status: int
    kind: str

    async def read(self) -> bytes:
        """All of it."""

    def chunks(self) -> AsyncIterator[bytes]:
        """Its parts, as they come."""


class Upstream(Protocol):
    """What the gateway needs of it."""

    def post(self, live: Answerer, path: str, body: bytes, session: str = "") -> AbstractAsyncContextManager[Reply]:
        """Ask; a session's requests go to one place where there are several.

        Raises:
            Gone: nothing answers; :class:`Cut`: what was asked has ended.
            Moved: another version answers by now.
        """

    async def figures(self, live: Answerer) -> bytes:
        """The engines' own metrics, in Prometheus' text format.

        Raises:
            Gone: nothing answers.
        """

    async def close(self) -> None:
        """Let go of connections."""


class Sockets:
    """An engine's private socket."""

    def __init__(self) -> None:
        self._sessions: dict[tuple[Path, bool], aiohttp.ClientSession] = {}

    @asynccontextmanager
    async def post(self, live: Answerer, path: str, body: bytes, session: str = "") -> AsyncIterator[Reply]:
        """Ask the engine; there is one, so that every session goes to it.

        Its server may close a connection that has rested just as it is used again: then the request is asked once more,
        on a new one. An engine that has ended refuses that.
        """
        del session
        asked = partial(self._ask, live.engine.socket, path, body)
        try:
            try:
                response = await asked()
            except aiohttp.ClientConnectorError as error:
                raise Gone(str(error)) from error
            except aiohttp.ClientConnectionError:
                response = await asked(anew=True)
            async with response:
                yield _Response(response)
        except aiohttp.ClientError as error:
            raise Cut(str(error)) from error

    async def _ask(self, address: Path, path: str, body: bytes, *, anew: bool = False) -> aiohttp.ClientResponse:
        session = self._session(address, anew=anew)
        return await session.post(f"http://engine{path}", data=body, headers={"content-type": "application/json"})

    async def figures(self, live: Answerer) -> bytes:
        """vLLM's metrics.

        Raises:
            Gone: it tells none, or not soon enough.
        """
        session, most = self._session(live.engine.socket), aiohttp.ClientTimeout(total=FIGURES_SECONDS)
        try:
            async with session.get("http://engine/metrics", timeout=most) as response:
                return await response.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise Gone(str(error)) from error

    async def close(self) -> None:
        """Close every socket."""
        await asyncio.gather(*(session.close() for session in self._sessions.values()))

    def _session(self, address: Path, *, anew: bool = False) -> aiohttp.ClientSession:
        if (address, anew) not in self._sessions:
            kept = {"force_close": True} if anew else {"keepalive_timeout": IDLE_SECONDS}
            self._sessions[address, anew] = aiohttp.ClientSession(
                connector=aiohttp.UnixConnector(str(address), limit=0, **kept),
                timeout=aiohttp.ClientTimeout(total=None),
                auto_decompress=False,
                read_bufsize=1 << 18,
            )
        return self._sessions[address, anew]


class _Response:
    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self.status, self.kind = response.status, response.headers.get("content-type", "application/json")

    async def read(self) -> bytes:
        return await self._response.read()

    def chunks(self) -> AsyncIterator[bytes]:
        return self._response.content.iter_any()
