"""The OpenAI-compatible front: an ASGI application before the engine's private socket.

Deny by default: a request is answered when its exact path is in the table, its ``Host`` is allowed, its key is right
and its body is within bounds (:mod:`requests`). Judged by ``scope["path"]``, never by a URL put together from headers.
Replies pass through as they come; each is by one version, named in ``x-namesake-version`` and ``system_fingerprint``.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import re
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import urlsplit

from namesake_serving import page, webhook
from namesake_serving.canary import HANGS
from namesake_serving.keys import Key, Keys
from namesake_serving.limits import Allowance, Allowances, Full, Turns
from namesake_serving.metrics import Metrics
from namesake_serving.requests import CHAT, FEEDBACK, RESPONSES, TEXT, BadRequest, check, feedback, parse
from namesake_serving.rollout import State
from namesake_serving.settings import Settings
from namesake_serving.shadow import Kept, Shadow
from namesake_serving.traces import Traces, Unknown, Unwritten
from namesake_serving.traffic import Answerer, Live, NotReady, Routing, Traffic, UnknownModel
from namesake_serving.upstream import Gone, Moved, Sockets, Upstream
from namesake_serving.webhook import Webhook

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")

_RETRY_SECONDS = "2"
_OPEN = {"/health", "/ready", webhook.PATH} | page.PATHS
"""Answered without a key: nothing in them is anybody's, or (the webhook) the body is signed."""

_NOBODY = "anonymous"
"""Who gives feedback where no key is needed."""

_TOLD = (
    "stream",
    "temperature",
    "top_p",
    "top_k",
    "n",
    "seed",
    "max_tokens",
    "max_completion_tokens",
    "max_output_tokens",
)
"""What a trace tells of a request without its text."""

_BYTES_A_TOKEN = 4
_EVENTS = (b'data: {"id"', b'data: {"response":{"id"')
"""How an event of a stream begins that says by which model it is; of `/v1/responses` those that hold all of it."""

_FINGERPRINT = re.compile(rb',"system_fingerprint":(?:"[^"\\]*"|null)')
_USAGE = re.compile(rb'"usage":(\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\})')
"""The engine's own; what a model says has its quotes escaped and is never taken for them."""
_LAST_EVENT = re.compile(rb"(?:^|\n)event: response\.(?:completed|incomplete|failed)\ndata: ([^\n]*)")
"""Of `/v1/responses`: the one that tells what was used. Those before repeat the request, a client's tools and all."""
_ONLY_USAGE = re.compile(rb'data: \{"id"[^\n]*"choices":\[\],[^\n]*"usage":\{[^\n]*\n\n')
"""The event that the gateway asks for in any case, to count tokens."""

_log = logging.getLogger("namesake.gateway")


class Refused(Exception):
    """The request ends here: status, OpenAI's error, headers."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        headers: Sequence[tuple[str, str]] = (),
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers
        self.body = json.dumps({"error": {"message": message, "type": kind, "param": param, "code": code}}).encode()


@dataclass
class _Request:
    """What is known of a request while it is answered."""

    method: str
    path: str
    headers: dict[str, str]
    id: str
    begun: float
    session: str = ""
    status: int = 0
    version: str = ""
    first_byte: float = 0.0
    kept: Kept | None = None
    traced: _Traced | None = None
    hung: asyncio.TimerHandle | None = None
    key: Key = field(default_factory=Key)
    allowance: Allowance | None = None


@dataclass
class _Traced:
    """What a trace tells of a request beyond that, once the engine has been asked.

    Attributes:
        live, alias: who answers, and the alias it was chosen by; none before the engine is asked.
        asked_at: when the engine was asked, by the monotonic clock.
        body: the client's request.
    """

    id: str
    body: dict[str, Any]
    session: str
    used: _Used = field(default_factory=lambda: _Used(0))
    live: Answerer | None = None
    alias: str = ""
    asked_at: float = 0.0


class Served(Protocol):
    """What the gateway needs of who follows the registry: :class:`service.Service`, or :class:`cluster.Cluster`."""

    uri: str
    routing: Routing
    metrics: Metrics

    @property
    def traffic(self) -> Traffic:
        """Where what is served answers."""

    @property
    def state(self) -> State:
        """What is going on with what is served."""

    def wake(self) -> None:
        """Ask the registry now."""

    def note(self, answerer: Answerer, failed: bool, seconds: float) -> None:
        """A request for the bare name was answered."""

    async def summon(self, model: object) -> None:
        """Bring in a version that a client asks for, where that is allowed."""


class Gateway:
    """The ASGI application.

    Args:
        upstream: the way to what answers; none: the engines' sockets on this machine.

    Attributes:
        draining: whether it is to stop, so that new requests are told to come again.
        answering: how many requests are under way or waiting.
    """

    def __init__(self, service: Served, settings: Settings, upstream: Upstream | None = None) -> None:
        self._service, self._settings = service, settings
        self._upstream = upstream or Sockets()
        self._keys = Keys(settings.api_keys, settings.api_keys_file)
        self._webhook = Webhook(settings.webhook_secret) if settings.webhook_secret else None
        self._shadow = (
            Shadow(
                settings.shadow_folder,
                settings.shadow_bytes,
                settings.shadow,
                service.routing.challenger,
                service.metrics,
            )
            if settings.shadow and settings.shadow_folder
            else None
        )
        self._traces = Traces(settings.traces_share, service.metrics) if settings.traces else None
        self._allowances = Allowances(settings.requests_per_minute, settings.tokens_per_minute)
        # Its end is then no more the challenger's fault than the champion's.
        self._one_engine = settings.mode == "adapter"
        # A few more than the engine works on, so that it has the next one at hand when one ends. An engine of adapters
        # keeps places of its own for versions that come in: there nobody waits inside.
        ahead = 0 if self._one_engine else settings.streams // 8
        self._turns = Turns(settings.streams + ahead, settings.most_requests)
        self._summoning = 0
        self.draining = False
        self.answering = 0
        self._hosts = {
            host.lower()
            for host in (
                *LOOPBACK,
                settings.host,
                f"[{settings.host}]",
                *settings.allowed_hosts,
                urlsplit(settings.webhook_url).hostname or "",
            )
        } - {"0.0.0.0", "[::]", "::", "[0.0.0.0]", ""}
        self._routes: dict[str, dict[str, Callable[[_Request, Scope, Receive, Send], Awaitable[None]]]] = {
            CHAT: {"POST": self._forward},
            TEXT: {"POST": self._forward},
            RESPONSES: {"POST": self._forward},
            "/v1/models": {"GET": self._models},
            "/v1/version": {"GET": self._version},
            "/health": {"GET": self._health},
            "/ready": {"GET": self._ready},
            "/metrics": {"GET": self._metrics},
            **{path: {"GET": self._page} for path in page.PATHS},
            **({webhook.PATH: {"POST": self._woken}} if self._webhook else {}),
            **({FEEDBACK: {"POST": self._feedback}} if self._traces else {}),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        if self._traces is not None:
            self._traces.start()
        headers: dict[str, str] = {}
        twice = False
        for raw_name, raw_value in scope["headers"]:
            name = raw_name.decode("latin-1").lower()
            twice |= name in headers and name in {"authorization", "host", "content-length"}
            headers[name] = raw_value.decode("latin-1")
        request = _Request(scope["method"], scope["path"], headers, f"req-{uuid.uuid4().hex}", time.monotonic())
        started = False

        async def told(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started, request.status = True, message["status"]
                limits = request.allowance.headers() if request.allowance else ()
                message["headers"] = [
                    *message["headers"],
                    (b"x-request-id", request.id.encode()),
                    *((name.encode(), value.encode()) for name, value in limits),
                ]
            await send(message)

        try:
            await self._admitted(request, scope, twice)(request, scope, receive, told)
        except BadRequest as bad:
            await _answer(told, 400, Refused(400, bad.message, param=bad.param).body)
        except Refused as refused:
            if not started:
                await _answer(told, refused.status, refused.body, *refused.headers)
            else:  # uvicorn cuts the connection, and the client does not take the half for the whole
                request.status = refused.status
        except (ConnectionError, asyncio.IncompleteReadError):
            request.status = 499  # the client has gone
        except Exception:
            _log.exception("%s %s %s", request.id, request.method, request.path)
            if not started:
                body = Refused(500, "The gateway failed; its log says why.", kind="server_error").body
                await _answer(told, 500, body)
        finally:
            route = request.path if request.path in self._routes else "other"
            self._service.metrics.requests.labels(route, str(request.status), request.version).inc()
            _log.log(
                logging.DEBUG if request.method == "GET" and request.status in {200, 503} else logging.INFO,
                "%s %s %s %d %s %s %.3fs",
                *(request.id, request.method, request.path.encode("unicode_escape").decode(), request.status),
                *(request.version or "-", request.key.name or "-", time.monotonic() - request.begun),
                extra={"fields": self._fields(request)},
            )
            if self._traces is not None and request.traced is not None and request.traced.live is not None:
                self._traces.add(self._answer_of(request, request.traced, request.traced.live))

    @staticmethod
    def _fields(request: _Request) -> dict[str, Any]:
        """What the log says of a request, where it is JSON."""
        return {
            "request": request.id,
            "method": request.method,
            "path": request.path,
            "status": request.status,
            "version": request.version,
            "key": request.key.name,
            "seconds": round(time.monotonic() - request.begun, 4),
            "trace": request.traced.id if request.traced is not None and request.traced.live is not None else "",
        }

    def _answer_of(self, request: _Request, traced: _Traced, live: Answerer) -> dict[str, Any]:
        """As :class:`namesake.traces.Answer` has it."""
        now, clock = time.time_ns(), time.monotonic()
        champion = self._service.traffic.live
        text = self._settings.traces_text
        return {
            "trace": traced.id,
            "request": request.id,
            "route": request.path,
            "served": champion.version.uri if champion is not None else "",
            "version": live.version.uri if isinstance(live, Live) else "",
            "run": live.run,
            "model": live.label,
            "alias": traced.alias,
            "status": request.status or 503,
            "begun": now - int((clock - request.begun) * 1e9),
            "asked": now - int((clock - traced.asked_at) * 1e9),
            "ended": now,
            "first": request.first_byte or None,
            "prompt": traced.used.prompt,
            "completion": traced.used.completion,
            "session": traced.session,
            "user": request.key.name,
            "parameters": {key: traced.body[key] for key in _TOLD if traced.body.get(key) is not None},
            "asked_for": traced.body if text else None,
            "said": request.kept.raw.decode("utf-8", "replace") if text and request.kept is not None else None,
        }

    async def close(self) -> None:
        """Let go of the engines."""
        if self._shadow is not None:
            await self._shadow.close()
        if self._traces is not None:
            await self._traces.close()
        await self._upstream.close()

    def _admitted(
        self, request: _Request, scope: Scope, twice: bool
    ) -> Callable[[_Request, Scope, Receive, Send], Awaitable[None]]:
        """The handler of a request that may be answered.

        Raises:
            Refused: it may not.
        """
        host = request.headers.get("host", "").lower()
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if twice or name not in self._hosts:
            raise Refused(400, "This Host is not served here; see allowed_hosts.", code="host_not_allowed")
        methods = self._routes.get(request.path)
        if methods is None or scope.get("raw_path", request.path.encode()) != request.path.encode():
            raise Refused(404, f"There is no {request.path[:200]}.", code="not_found")
        if request.path not in _OPEN:
            authorization = request.headers.get("authorization")
            key = self._keys.find(authorization)
            if key is None:
                raise Refused(
                    401,
                    "Incorrect API key." if authorization else "An API key is needed: Authorization: Bearer KEY.",
                    code="invalid_api_key",
                    headers=(("www-authenticate", "Bearer"),),
                )
            request.key = key
        handler = methods.get(request.method)
        if handler is None:
            allowed = ", ".join(methods)
            raise Refused(405, f"{request.path} takes {allowed}.", headers=(("allow", allowed),))
        return handler

    async def _forward(self, request: _Request, _scope: Scope, receive: Receive, send: Send) -> None:
        if self.draining:
            raise _unavailable("The server is stopping.")
        request.allowance = self._allowances.of(request.key)
        self._spend(request, "requests", 1)
        if not self._turns.room(request.key.name):
            raise self._overloaded()
        body = await self._body(request, receive)  # a body that trickles takes nobody's place
        self._service.metrics.running.inc()
        self.answering += 1
        try:
            # Once the body is read, the only thing that can come is that the client has gone.
            gone = asyncio.ensure_future(receive())
            work = asyncio.ensure_future(self._reply(request, body, send))
            try:
                await asyncio.wait({gone, work}, return_when=asyncio.FIRST_COMPLETED)
                if not work.done():
                    raise ConnectionResetError
                await work
            finally:
                for task in (gone, work):
                    task.cancel()
                    with suppress(asyncio.CancelledError, Exception):
                        await task
        finally:
            self.answering -= 1
            self._service.metrics.running.dec()

    def _overloaded(self) -> Refused:
        return Refused(
            429,
            f"{self._turns.most} requests are under way already.",
            kind="rate_limit_error",
            code="overloaded",
            headers=(("retry-after", _RETRY_SECONDS),),
        )

    def _spend(self, request: _Request, what: str, amount: int) -> None:
        """Take so many requests or tokens out of the key's allowance.

        Raises:
            Refused: 429, they are not there.
        """
        bucket = getattr(request.allowance, what)
        if bucket is None:
            return
        if wait := bucket.seconds(amount):
            raise Refused(
                429,
                f"Rate limit reached on {what} per min: limit {bucket.most}, requested {amount}. "
                f"Please try again in {wait:.3g}s.",
                kind=what,
                code="rate_limit_exceeded",
                headers=(("retry-after", str(math.ceil(wait))),),
            )
        bucket.take(amount)

    async def _reply(self, request: _Request, raw: bytes, send: Send) -> None:
        asked = parse(raw) if raw else {}
        model, user = asked.get("model"), asked.get("user")
        request.session = request.headers.get("x-namesake-session", "") or (user if isinstance(user, str) else "")
        routing = self._service.routing
        await self._summon(model)
        reserved = _reserved(raw, asked)
        if self._traces is not None and self._traces.wants():
            request.traced = _Traced(f"tr-{request.id.removeprefix('req-')}", asked, request.session)
        try:
            async with self._turns.take(request.key.name):
                live, ended = await self._enter(request, asked, len(raw), reserved, send)
                if ended is None:
                    return
                if live is not routing.champion.live and model in (None, routing.name) and not request.status:
                    # The challenger's share: the client has asked for neither, and gets its answer from the champion.
                    _, ended = await self._enter(request, asked, len(raw), 0, send, shared=False)
                if ended is not None:
                    raise ended
        except NotReady:
            raise _unavailable("No version can answer at the moment.") from None
        except Full:
            raise self._overloaded() from None
        except UnknownModel as unknown:
            raise Refused(404, str(unknown), code="model_not_found", param="model") from None

    async def _summon(self, model: object) -> None:
        """Have a version brought in that is asked for, which may take long; as many may wait as for an answer.

        Raises:
            Refused: 429, so many wait already.
        """
        if self._summoning >= self._turns.most:
            raise self._overloaded()
        self._summoning += 1
        try:
            await self._service.summon(model)
        finally:
            self._summoning -= 1

    async def _enter(
        self, request: _Request, asked: dict[str, Any], size: int, reserved: int, send: Send, *, shared: bool = True
    ) -> tuple[Answerer, Refused | None]:
        """Who answered, and what came of it where its engine has ended."""
        while True:
            used = _Used(prompt=size // _BYTES_A_TOKEN)
            if request.traced is not None:
                request.traced.used = used
            with suppress(Moved):
                async with self._service.routing.enter(asked.get("model"), request.session, shared=shared) as (
                    by,
                    alias,
                ):
                    return by, await self._answer_by(by, alias, request, asked, used, reserved, send)

    async def _answer_by(
        self,
        live: Answerer,
        alias: str,
        request: _Request,
        asked: dict[str, Any],
        used: _Used,
        reserved: int,
        send: Send,
    ) -> Refused | None:
        """Have it answered; what came of it where the engine has ended."""
        request.version, begun = live.label, time.monotonic()
        body = check(request.path, asked, max_tokens=self._settings.max_tokens, system=live.system)
        shadow = self._shadow if live is self._service.routing.champion.live else None
        copied = shadow is not None and shadow.wants()
        if copied or (self._settings.traces_text and request.traced is not None):
            request.kept = Kept(live.label)
        body["model"] = live.model
        if reserved:
            self._spend(request, "tokens", reserved)
        used.echoed = bool(body.get("stream")) and request.path == RESPONSES
        if body.get("stream") and not used.echoed:
            options = body.get("stream_options", {})
            used.told = bool(options.get("include_usage"))
            body["stream_options"] = {**options, "include_usage": True}
        routing = self._service.routing
        for_bare_name = asked.get("model") in (None, routing.name)  # who named a version asked for just that one
        spare = for_bare_name and live is not routing.champion.live
        if for_bare_name and body.get("stream"):
            request.hung = asyncio.get_running_loop().call_later(HANGS, self._service.note, live, True, HANGS)
        try:
            await self._pass_through(request, live, alias, json.dumps(body).encode(), used, send, spare=spare)
        except Refused as ended:
            if not (self._one_engine and isinstance(ended.__cause__, Gone)):
                self._service.note(live, True, time.monotonic() - begun)
            used.prompt = used.prompt if request.status else 0
            return ended
        except Moved:
            used.prompt = 0
            raise
        finally:
            if request.hung is not None:
                request.hung.cancel()
            self._settle(request, used, reserved)
        if for_bare_name:
            self._service.note(live, request.status >= 500, request.first_byte)
        if shadow is not None and copied and request.kept is not None and request.status == 200:
            shadow.copy(asked, request.kept, lambda rival: self._ask(rival, request.path, asked))
        return None

    async def _ask(self, live: Answerer, path: str, asked: dict[str, Any]) -> bytes:
        """The whole answer, for nobody who waits for it."""
        body = check(path, asked, max_tokens=self._settings.max_tokens, system=live.system)
        async with self._upstream.post(live, path, json.dumps({**body, "model": live.model}).encode()) as reply:
            if reply.status >= 400:
                raise Gone(f"The engine answers {reply.status}.")
            return await reply.read()

    def _first_byte(self, request: _Request, begun: float) -> None:
        request.first_byte = time.monotonic() - begun
        if request.hung is not None:
            request.hung.cancel()
        self._service.metrics.first_token.labels(request.version).observe(request.first_byte)

    def _settle(self, request: _Request, used: _Used, reserved: int) -> None:
        """What was reserved for a reply becomes what it took."""
        tokens = self._service.metrics.tokens
        tokens.labels("prompt", request.version).inc(used.prompt)
        tokens.labels("completion", request.version).inc(used.completion)
        if request.allowance is not None and request.allowance.tokens is not None:
            request.allowance.tokens.take(used.prompt + used.completion - reserved)

    async def _pass_through(
        self, request: _Request, live: Answerer, alias: str, body: bytes, used: _Used, send: Send, *, spare: bool
    ) -> None:
        """Send the engine's reply on as it comes.

        Raises:
            Refused: the engine has ended; or, where another version can answer (``spare``), it failed.
        """
        begun = time.monotonic()
        mark = b'"system_fingerprint":' + json.dumps(live.label).encode() + b","
        called, own = (b'"model":' + json.dumps(name).encode() for name in (live.model, live.label))
        headers = [
            (b"x-namesake-version", live.label.encode("ascii", "replace")),
            (b"x-namesake-run", live.run.encode()),
            (b"x-namesake-alias", alias.encode()),
        ]
        if request.traced is not None:
            request.traced.live, request.traced.alias, request.traced.asked_at = live, alias, begun
            headers.append((b"x-namesake-trace", request.traced.id.encode()))
        try:
            async with self._upstream.post(live, request.path, body, request.session) as reply:
                kind = reply.kind
                if not kind.startswith("text/event-stream"):
                    whole = await reply.read()
                    if reply.status >= 400 and not _is_openais(whole):
                        whole, kind = _failed(reply.status, whole).body, "application/json"
                    used.count(whole, ok=reply.status == 200)
                    if spare and reply.status >= 500:
                        raise _unavailable("The challenger has failed.")
                    whole = _named(whole, mark, called, own)
                    self._first_byte(request, begun)
                    if request.kept is not None:
                        request.kept.add(whole)
                    headers += [(b"content-type", kind.encode()), (b"content-length", str(len(whole)).encode())]
                    await send({"type": "http.response.start", "status": reply.status, "headers": headers})
                    await send({"type": "http.response.body", "body": whole})
                    return
                headers.append((b"content-type", kind.encode()))
                start = {"type": "http.response.start", "status": reply.status, "headers": headers}
                first, rest = True, b""
                events = [(begin, begin.removesuffix(b'"id"') + mark + b'"id"') for begin in _EVENTS]
                async for chunk in reply.chunks():
                    if first:
                        # The engine sends the head long before; should it end until now, nothing has been said.
                        await send(start)
                        self._first_byte(request, begun)
                        first = False
                    if request.kept is not None:
                        request.kept.add(chunk)
                    # Whole events only: the socket may have cut one in two.
                    chunk, end, rest = (rest + chunk).rpartition(b"\n\n")
                    if not end:
                        continue
                    used.count(chunk + end)
                    if not used.told:
                        chunk, end = _ONLY_USAGE.sub(b"", chunk + end), b""
                    # What a model says stands in the JSON with its quotes escaped, so neither text can be its own.
                    chunk = _FINGERPRINT.sub(b"", chunk)
                    for begin, marked in events:
                        chunk = chunk.replace(begin, marked)
                    await send(
                        {"type": "http.response.body", "body": chunk.replace(called, own) + end, "more_body": True}
                    )
                if first:
                    await send(start)
                await send({"type": "http.response.body", "body": rest})
        except Gone as error:
            # Before the reply began it is a 503 to try again; after, the connection is cut and the client sees it.
            _log.warning("%s engine: %s", request.id, error)
            raise _unavailable("The engine has just ended; it is started again.") from error

    async def _body(self, request: _Request, receive: Receive) -> bytes:
        most = self._settings.max_body_bytes
        declared = request.headers.get("content-length", "")
        if declared.isascii() and declared.isdigit() and int(declared[:20]) > most:
            raise Refused(413, f"The body is longer than {most} bytes.", code="body_too_large")
        # A page of another site may send a body of no type without asking; one of JSON it may not (Fetch, CORS).
        foreign = request.headers.get("sec-fetch-site", "none") not in {"none", "same-origin"}
        kind = request.headers.get("content-type", "" if foreign else "application/json").partition(";")[0]
        if kind.strip().lower() != "application/json":
            raise Refused(415, "The body must be application/json.", code="content_type")
        parts, size = [], 0
        try:
            async with asyncio.timeout(self._settings.read_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ConnectionResetError
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > most:
                        raise Refused(413, f"The body is longer than {most} bytes.", code="body_too_large")
                    if not message.get("more_body"):
                        return b"".join(parts)
        except TimeoutError:
            raise Refused(
                408,
                f"The body did not arrive within {self._settings.read_seconds:g} s.",
                headers=(("connection", "close"),),
            ) from None

    async def _models(self, _request: _Request, _scope: Scope, _receive: Receive, send: Send) -> None:
        data = [_model(name, one) for name, one in self._service.routing.answerers().items()]
        await _answer(send, 200, json.dumps({"object": "list", "data": data}, ensure_ascii=False).encode())

    async def _version(self, _request: _Request, _scope: Scope, _receive: Receive, send: Send) -> None:
        state, live = self._service.state, self._service.traffic.live
        about: dict[str, Any] = {
            "uri": self._service.uri,
            "step": state.step.value,
            "wanted": state.wanted.partition(" ")[0] if state.wanted else None,
            "refused": {key.partition(" ")[0]: refusal.why for key, refusal in state.refused.items()},
            "live": None,
        }
        rival = self._service.routing.challenger.live
        if live is not None:
            about["live"] = _told(live)
        if rival is not None:
            about["challenger"] = {**_told(rival), "canary": self._settings.canary, "shadow": self._settings.shadow}
        await _answer(send, 200, json.dumps(about, ensure_ascii=False).encode())

    async def _page(self, request: _Request, _scope: Scope, _receive: Receive, send: Send) -> None:
        found = page.file(request.path, self._settings.mlflow_url)
        unchanged = found.unchanged(request.headers.get("if-none-match"))
        body = b"" if unchanged else found.body
        await _answer(send, 304 if unchanged else 200, body, ("content-type", found.kind), *found.headers)

    async def _health(self, _request: _Request, _scope: Scope, _receive: Receive, send: Send) -> None:
        await _answer(send, 200, b'{"status":"alive"}')

    async def _ready(self, _request: _Request, _scope: Scope, _receive: Receive, send: Send) -> None:
        if self._service.traffic.live is None or self.draining:
            raise _unavailable("No version can answer at the moment.")
        await _answer(send, 200, b'{"status":"ready"}')

    async def _woken(self, request: _Request, _scope: Scope, receive: Receive, send: Send) -> None:
        assert self._webhook is not None
        try:
            self._webhook.check(request.headers, await self._body(request, receive))
        except ValueError as error:
            raise Refused(401, str(error), code="invalid_signature") from None
        self._service.metrics.webhooks.inc()
        self._service.wake()
        await _answer(send, 200, b'{"status":"woken"}')

    async def _feedback(self, request: _Request, _scope: Scope, receive: Receive, send: Send) -> None:
        assert self._traces is not None
        if self.draining:
            raise _unavailable("The server is stopping.")
        request.allowance = self._allowances.of(request.key)
        self._spend(request, "requests", 1)
        said = feedback(parse(await self._body(request, receive)))
        results, trace = self._service.metrics.feedback, said["trace"]
        try:
            made = await self._traces.feedback(**said, source=request.key.name or _NOBODY)
        except Unknown:
            results.labels("unknown").inc()
            raise Refused(404, f"There is no trace {trace}.", code="trace_not_found", param="trace_id") from None
        except Unwritten as error:
            results.labels("failed").inc()
            _log.warning("%s feedback: %s", request.id, error)
            raise _unavailable("MLflow did not take the feedback.") from None
        results.labels("logged").inc()
        told = {"object": "feedback", "id": made, "trace_id": trace, "request_id": f"req-{trace[3:]}"}
        await _answer(send, 200, json.dumps(told).encode())

    async def _metrics(self, _request: _Request, _scope: Scope, _receive: Receive, send: Send) -> None:
        text, live = self._service.metrics.text(), self._service.traffic.live
        if live is not None:
            with suppress(Gone):
                text += await self._upstream.figures(live)
        await _answer(send, 200, text, ("content-type", "text/plain; version=0.0.4; charset=utf-8"))


@dataclass
class _Used:
    """Tokens of one request: estimated until the engine tells, which it does at the end."""

    prompt: int
    completion: int = 0
    told: bool = True
    """Whether the client asked to be told."""
    echoed: bool = False
    """Whether it is a stream that repeats the request."""

    def count(self, chunk: bytes, *, ok: bool = True) -> None:
        """Take note of a part of the reply, or of the whole."""
        usage = _usage(b"".join(_LAST_EVENT.findall(chunk)) if self.echoed else chunk)
        if not ok:
            self.prompt = 0
        elif usage:
            self.prompt = usage.get("prompt_tokens", usage.get("input_tokens", self.prompt))
            self.completion = usage.get("completion_tokens", usage.get("output_tokens", self.completion))
        else:
            self.completion += chunk.count(b"data: ")


def _usage(chunk: bytes) -> dict[str, int]:
    """The last usage in a part of a reply; a tool's description, which a client writes, may look like one."""
    for text in reversed(_USAGE.findall(chunk)):
        with suppress(ValueError):
            found = {key: value for key, value in json.loads(text).items() if key.endswith("_tokens")}
            if found and all(type(value) is int and value >= 0 for value in found.values()):
                return found
    return {}


def _reserved(raw: bytes, asked: dict[str, Any]) -> int:
    """Tokens that a request may take, by OpenAI's rule: the most it asks for, or an estimate from its length."""
    most = asked.get("max_completion_tokens") or asked.get("max_tokens") or asked.get("max_output_tokens") or 0
    choices = asked.get("n") or 1
    bounded = most * choices if isinstance(most, int) and isinstance(choices, int) else 0
    return max(1, len(raw) // _BYTES_A_TOKEN, bounded)


def _unavailable(message: str) -> Refused:
    return Refused(503, message, kind="server_error", code="unavailable", headers=(("retry-after", _RETRY_SECONDS),))


def _model(name: str, one: Answerer) -> dict[str, Any]:
    """An entry of `/v1/models`: OpenAI's, who answers to the name (`root`), and at a version's own what it is."""
    made = one.version.created // 1000 if isinstance(one, Live) else int(one.since)
    about = {"namesake": _told(one)} if isinstance(one, Live) and name == one.label else {}
    return {"id": name, "object": "model", "created": made, "owned_by": "namesake", "root": one.label, **about}


def _told(live: Live) -> dict[str, Any]:
    """What is told of a version."""
    return {
        "version": live.version.uri,
        "model": live.label,
        "since": live.since,
        "verified": live.verified,
        "run": live.version.run_id,
        "name": live.manifest.identity["name"],
        "author": live.manifest.identity["author"],
        "base": live.manifest.base.get("id"),
        "system": live.manifest.system,
        "scores": dict(live.manifest.scores),
    }


def _is_openais(body: bytes) -> bool:
    """Whether it is an error as OpenAI's are."""
    try:
        said = json.loads(body)
    except ValueError:
        return False
    return isinstance(said, dict) and isinstance(said.get("error"), dict) and "message" in said["error"]


def _failed(status: int, said: bytes) -> Refused:
    """An engine's error of its own shape, in OpenAI's. Of a failure within it clients are told no more than that."""
    if status >= 500:
        _log.error("the engine answers %d: %r", status, said[:500])
        return Refused(status, f"The engine failed ({status}).", kind="server_error")
    return Refused(status, said[:500].decode(errors="replace") or f"The engine answers {status}.")


def _named(body: bytes, mark: bytes, called: bytes, own: bytes) -> bytes:
    """A whole reply with the version in it."""
    if body.startswith(b'{"id"'):
        body = b"{" + mark + _FINGERPRINT.sub(b"", body[1:])
    return body.replace(called, own, 1)


async def _answer(send: Send, status: int, body: bytes, *headers: tuple[str, str]) -> None:
    given = {"content-type": "application/json", "x-content-type-options": "nosniff", **dict(headers)}
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [
                *((name.encode(), value.encode()) for name, value in given.items()),
                *(() if status == 304 else ((b"content-length", str(len(body)).encode()),)),
            ],
        }
    )
    await send({"type": "http.response.body", "body": body})
