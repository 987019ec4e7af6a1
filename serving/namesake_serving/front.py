"""Uvicorn with what it lacks: deadlines for handshakes and heads, renewed certificates, errors in OpenAI's shape."""

from __future__ import annotations

import asyncio
import logging
import math
import socket
import ssl
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from namesake.errors import InputError
from namesake.messages import tr
from namesake_serving.gateway import Gateway, Refused
from namesake_serving.settings import Settings

MAX_HEAD_BYTES = 65_536
STALLED_SECONDS = 30.0
"""A client that takes nothing of its reply for so long is cut: it holds a place at the engine."""
KEEP_ALIVE_SECONDS = 20
"""A resting connection is kept for longer than clients keep theirs (httpx 5 s, aiohttp 15 s): else it may be closed
just as the next request comes.
"""

_CLOSE_SECONDS = 2.0
_DRAIN_SECONDS = 0.05
_LOOK_SECONDS = 2.0

_log = logging.getLogger("namesake.gateway")


def tls(settings: Settings) -> Tls | None:
    """What the settings say of TLS; ``None``: plain HTTP.

    Raises:
        InputError: the files cannot be used.
    """
    if settings.ssl_certfile:
        return Tls(settings.ssl_certfile, settings.ssl_keyfile)
    if settings.ssl_keyfile:
        file = str(settings.ssl_keyfile)
        raise InputError("ssl_keyfile", file, "has no certificate", mend="Give --ssl-certfile too.")
    return None


class Tls:
    """A certificate and its key, read again when they change; connections there are keep the old one.

    Raises:
        InputError: they cannot be used.
    """

    def __init__(self, certificate: Path, key: Path | None) -> None:
        self._certificate, self._key = certificate, key
        self._stamp = self._now()
        try:
            self.context = self._newest = self._read()
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            raise InputError(
                "ssl_certfile",
                str(certificate),
                tr("cannot be used with {key} ({error})", key=key or "the key in it", error=error),
                mend="Give PEM files of a certificate and of its key, which no password guards.",
            ) from error
        # Asked at each handshake. Loaded into the same context a key of another kind would stand beside the old one.
        self.context.sni_callback = self._use_newest

    async def follow(self, seconds: float = _LOOK_SECONDS) -> None:
        """Look for changed files until cancelled."""
        while True:
            await asyncio.sleep(seconds)
            stamp = self._now()
            if stamp == self._stamp or not all(stamp):
                continue
            self._stamp = stamp
            try:
                self._newest = self._read()
            except (OSError, ValueError) as error:
                _log.error("ssl_certfile: %s; the certificate before stays in use", error)
            else:
                _log.info("ssl_certfile: new certificate in use")

    def _read(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)  # TLS 1.2 or newer
        context.load_cert_chain(self._certificate, self._key, password=_no_password)
        return context

    def _use_newest(
        self, connection: ssl.SSLObject | ssl.SSLSocket, _name: str | None, _context: ssl.SSLContext
    ) -> None:
        connection.context = self._newest

    def _now(self) -> list[tuple[int, int, int] | None]:
        return [_stamp(file) for file in (self._certificate, self._key or self._certificate)]


class Server(uvicorn.Server):
    """The gateway's server. It tells the gateway when it is asked to stop."""

    def __init__(
        self, gateway: Gateway, settings: Settings, tls: Tls | None = None, *, keep_alive: int = KEEP_ALIVE_SECONDS
    ) -> None:
        self._gateway, self._settings, self._tls = gateway, settings, tls
        super().__init__(
            uvicorn.Config(
                gateway,
                http=deadline_protocol(settings.read_seconds, STALLED_SECONDS),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=keep_alive,
                timeout_graceful_shutdown=settings.shutdown_seconds,
            )
        )

    def handle_exit(self, sig: int, frame: Any) -> None:
        """A signal to stop."""
        self._gateway.draining = True
        super().handle_exit(sig, frame)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen on the sockets; uvicorn's own way would leave a minute for a TLS handshake."""
        await super().startup(sockets=[])
        for listening in sockets or []:
            self.servers.append(
                await asyncio.get_running_loop().create_server(
                    self._connection,
                    sock=listening,
                    backlog=self.config.backlog,
                    ssl=self._tls.context if self._tls else None,
                    ssl_handshake_timeout=self._settings.read_seconds if self._tls else None,
                    ssl_shutdown_timeout=_CLOSE_SECONDS if self._tls else None,
                )
            )

    async def main_loop(self) -> None:
        """Until told to stop; certificates are looked after meanwhile."""
        following = asyncio.create_task(self._tls.follow()) if self._tls else None
        try:
            await super().main_loop()
            await self._drained()
        finally:
            if following is not None:
                following.cancel()

    async def _drained(self) -> None:
        """Until running answers have ended, or their time is up. Whoever comes meanwhile is told to come again, where
        uvicorn's own way would refuse the connection.
        """
        most = self._settings.shutdown_seconds
        end = time.monotonic() + most
        while self._gateway.answering and not self.force_exit and time.monotonic() < end:
            await asyncio.sleep(_DRAIN_SECONDS)
        left = math.ceil(end - time.monotonic())
        self.config.timeout_graceful_shutdown = min(most, max(left, 1))

    def _connection(self) -> asyncio.Protocol:
        made: asyncio.Protocol = self.config.http_protocol_class(  # type: ignore[call-arg, assignment]
            config=self.config, server_state=self.server_state, app_state={}
        )
        return made


def deadline_protocol(seconds: float, stalled: float) -> type[HttpToolsProtocol]:
    """Uvicorn's protocol with bounds: a client is cut whose head trickles or never ends, or that does not read."""

    class Protocol(HttpToolsProtocol):  # type: ignore[misc]
        _late: asyncio.TimerHandle | None = None
        _stalled: asyncio.TimerHandle | None = None
        _head: int | None = None
        """Bytes of the head that is coming, but for those that came with something before it; none: another part is."""
        _beside: int = 0
        """Bytes since the last part of a body, of what is none of it: the sizes of chunks, trailers."""
        _deaf = False
        """Whether nothing more is read: the connection ends with the answer under way."""

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._arm()

        def connection_lost(self, exc: Exception | None) -> None:
            self._disarm()
            if self._stalled is not None:
                self._stalled.cancel()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self._deaf:
                return
            # Also the rest of a body whose request has been answered early, and empty lines between requests.
            if self.cycle is None or self.cycle.response_complete:
                self._arm()
            if self._head is not None:
                self._head += len(data)
            self._beside += len(data)
            super().data_received(data)
            if self._head is None and self._beside > MAX_HEAD_BYTES:
                self.transport.close()
            if self._head is not None and self._head > MAX_HEAD_BYTES:
                self._refuse(b"431 Request Header Fields Too Large", Refused(431, "The head is too long."))

        def on_message_begin(self) -> None:
            self._head = 0
            super().on_message_begin()

        def on_header(self, name: bytes, value: bytes) -> None:
            if self._head is not None:  # else it is a trailer, which nobody reads
                super().on_header(name, value)

        def on_headers_complete(self) -> None:
            self._head, self._beside = None, 0
            self._disarm()
            if self._deaf:
                return
            running = self.cycle
            super().on_headers_complete()
            if self.pipeline:
                # Uvicorn would read no more, and never notice that the client goes. Who sends a request before the
                # answer to the last one has to be ready to send it again (RFC 9112, 9.3.2).
                self.pipeline.clear()
                self.cycle, self._deaf = running, True
                self.cycle.keep_alive = False
                self.flow.resume_reading()

        def on_body(self, body: bytes) -> None:
            self._beside = 0
            if not self._deaf:
                super().on_body(body)

        def on_message_complete(self) -> None:
            if not self._deaf:
                super().on_message_complete()

        def send_400_response(self, msg: str) -> None:
            self._refuse(b"400 Bad Request", Refused(400, msg))

        def pause_writing(self) -> None:
            self._stalled = asyncio.get_running_loop().call_later(stalled, self.transport.abort)
            super().pause_writing()

        def resume_writing(self) -> None:
            if self._stalled is not None:
                self._stalled.cancel()
                self._stalled = None
            super().resume_writing()

        def _refuse(self, status: bytes, refused: Refused) -> None:
            self.transport.write(
                b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%b"
                % (status, len(refused.body), refused.body)
            )
            self.transport.close()

        def _arm(self) -> None:
            if self._late is None:
                self._late = asyncio.get_running_loop().call_later(seconds, self.transport.close)

        def _disarm(self) -> None:
            if self._late is not None:
                self._late.cancel()
                self._late = None

    return Protocol


def _stamp(file: Path) -> tuple[int, int, int] | None:
    with suppress(OSError):
        found = file.stat()
        return found.st_ino, found.st_mtime_ns, found.st_size
    return None


def _no_password() -> str:
    raise ValueError("the key is guarded by a password")
