"""The OpenAI-compatible front over real HTTP, before a real server on a Unix socket that stands for vLLM."""

from __future__ import annotations

import asyncio
import base64
import hmac
import http.client
import io
import json
import re
import shutil
import ssl
import subprocess
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import AsyncMock

import aiohttp
import httpx
import openai
import pytest
import vllm.envs
from aiohttp import web

from namesake.errors import InputError
from namesake.manifest import Manifest
from namesake.registry import Version
from namesake_serving import front as front_module
from namesake_serving import page, settings, webhook
from namesake_serving import upstream as upstream_module
from namesake_serving.__main__ import listen
from namesake_serving.engine import Engine
from namesake_serving.front import Server, Tls
from namesake_serving.front import tls as front_tls
from namesake_serving.gateway import Gateway
from namesake_serving.metrics import Metrics
from namesake_serving.requests import FEEDBACK
from namesake_serving.rollout import Refusal, State, Step
from namesake_serving.service import Service
from namesake_serving.store import Stored
from namesake_serving.traces import Traces
from namesake_serving.traffic import Answerer, Live, Routing
from namesake_serving.upstream import Cut, Gone, Sockets
from tests.unit.loops import within

in_a_loop = within(20)

CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
EVERY: dict[str, Any] = {"webhook_secret": "secret", "traces": True, "traces_share": 0}
"""The settings that every route is there with."""

OPEN = {"/health", "/ready", webhook.PATH, *page.PATHS}
"""What anybody may ask: two that tell of health, one that is signed, and the page, which has no secret."""

BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "你是谁？"}]},
    TEXT: {"prompt": "我是"},
    RESPONSES: {"input": "你是谁？"},
    FEEDBACK: {"trace_id": f"tr-{0:032x}", "value": True},
}
ENGINES = (CHAT, TEXT, RESPONSES)
STREAM = {**BODIES[CHAT], "stream": True}
KEY = "sk-right"
DIE = "die"
HEAD = "head"


def compact(value: object) -> bytes:
    """JSON as vLLM writes it."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def whole(text: str, **more: object) -> bytes:
    """A whole reply as vLLM writes it."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    kind = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "namesake"}
    return compact({**kind, "choices": [choice], **more})


def event(text: str, **more: object) -> bytes:
    """An event of a streamed reply as vLLM writes it."""
    kind = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "namesake"}
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
    return b"data: " + compact({**kind, "choices": [choice], **more}) + b"\n\n"


END = b"data: [DONE]\n\n"


class Upstream:
    """A real HTTP server on a Unix socket that answers as vLLM does, or worse, and notes what it is asked.

    ``whole`` is a reply in one piece, where ``of_path`` has none; ``script`` is what it does for a streamed reply:
    bytes are sent, an event is waited for, ``HEAD`` sends the head, as vLLM does long before its first event, ``DIE``
    cuts the connection. ``begin`` is waited for before any reply.
    ``drop`` is for how many requests the connection is closed, as if it had rested for too long.
    """

    def __init__(self, socket: Path) -> None:
        self.socket = socket
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.headers: list[dict[str, str]] = []
        self.connections: list[object] = []
        self.arrived, self.aborted, self.begin = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.begin.set()
        self.drop = 0
        self.status, self.whole = 200, whole("我是踩踩背。")
        self.of_path: dict[str, bytes] = {}
        self.script: Sequence[bytes | asyncio.Event | str] = (event("我是"), event("踩踩背。"), END)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """One reply."""
        body = await request.json()
        self.asked.append((request.path, body))
        self.headers.append({name.lower(): value for name, value in request.headers.items()})
        self.connections.append(request.transport)
        self.arrived.set()
        if self.drop:
            self.drop -= 1
            assert request.transport is not None
            request.transport.abort()
            raise ConnectionResetError
        try:
            await self.begin.wait()
            if not body.get("stream"):
                return await self._whole(request)
            return await self._streamed(request)
        except (asyncio.CancelledError, ConnectionResetError):
            self.aborted.set()
            raise

    async def _whole(self, request: web.Request) -> web.StreamResponse:
        if self.script[0] != DIE:
            body = self.of_path.get(request.path, self.whole)
            return web.Response(body=body, status=self.status, content_type="application/json")
        if len(self.script) > 1:  # a part of the body, then the end
            response = web.StreamResponse(headers={"content-type": "application/json", "content-length": "1000"})
            await response.prepare(request)
            await response.write(self.whole)
        assert request.transport is not None
        request.transport.abort()
        raise ConnectionResetError

    async def _streamed(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream; charset=utf-8"})
        for what in self.script:
            if isinstance(what, asyncio.Event):
                await what.wait()
                continue
            if what == DIE:
                assert request.transport is not None
                request.transport.abort()
                raise ConnectionResetError
            if not response.prepared:
                writer = await response.prepare(request)
                assert writer is not None
                writer.send_headers()
            if isinstance(what, bytes):
                await response.write(what)
        return response

    async def figures(self, _request: web.Request) -> web.Response:
        """vLLM's own metrics."""
        return web.Response(text="# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running 7.0\n")


@asynccontextmanager
async def upstream() -> AsyncIterator[Upstream]:
    """A server that answers as vLLM does."""
    folder = Path(tempfile.mkdtemp(dir="/tmp", prefix="nsk-"))  # a socket's path may have about 100 bytes
    made = Upstream(folder / "engine.sock")
    app = web.Application()
    app.router.add_post(CHAT, made.answer)
    app.router.add_post(TEXT, made.answer)
    app.router.add_post(RESPONSES, made.answer)
    app.router.add_get("/metrics", made.figures)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1, access_log=None)
    await runner.setup()
    await web.UnixSite(runner, str(made.socket)).start()
    try:
        yield made
    finally:
        made.begin.set()
        await runner.cleanup()
        shutil.rmtree(folder)


def live(engine: Upstream | Path, number: int = 3, *, name: str = "ccb", system: str | None = "Be kind.") -> Live:
    """A version of ccb in that engine."""
    record = Manifest(
        identity={"name": "踩踩背 CCB", "author": "老爷爷 OldGrandpa"},
        system=system,
        base={"id": "Qwen/Qwen3-0.6B"},
        run="run",
        digests={},
        data={},
        scores={"identity": 1.0},
        recipe={},
        tools={},
    )
    version = Version(name, number, f"run{number}", "source", "READY", {}, 1_700_000_000_123)
    socket = engine if isinstance(engine, Path) else engine.socket
    return Live(Stored(version, record, Path("/model")), Engine(cast(Any, None), socket, Path("/log"), 0))


class Serving:
    """What the gateway sees of the service."""

    def __init__(self) -> None:
        self.uri, self.metrics = "models:/ccb@champion", Metrics()
        self.routing = Routing(self.uri, "challenger")
        self.traffic = self.routing.champion
        self.noted: list[tuple[str, bool]] = []
        self.state = State(wanted="models:/ccb/3 source", live="models:/ccb/3 source")
        self.woken = 0
        self.summoned, self.brought_in = 0, asyncio.Event()

    def wake(self) -> None:
        """Once more."""
        self.woken += 1

    async def summon(self, model: object) -> None:
        """A version that is brought in when the test says so; nothing else is."""
        if model == "ccb-v9":
            self.summoned += 1
            await self.brought_in.wait()

    def note(self, answerer: Answerer, failed: bool, seconds: float) -> None:
        """How a request went."""
        assert seconds >= 0
        self.noted.append((answerer.label, failed))


ROUTES = sorted(
    (method, path)
    for path, methods in Gateway(cast(Service, Serving()), settings.read(**EVERY))._routes.items()
    for method in methods
)
"""Every route that there can be, by the gateway's own table."""


@pytest.fixture(autouse=True)
def no_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """What MLflow says to feedback is in tests/contract/test_traces.py; here it takes all."""
    monkeypatch.setattr(Traces, "start", lambda _: None)
    monkeypatch.setattr(Traces, "feedback", AsyncMock(return_value="a-1"))


def signature(body: bytes) -> list[str]:
    """Headers of a call of MLflow's webhook."""
    delivery, stamp = uuid.uuid4().hex, str(int(time.time()))
    digest = hmac.digest(EVERY["webhook_secret"].encode(), f"{delivery}.{stamp}.".encode() + body, "sha256")
    signed = base64.b64encode(digest).decode()
    return [f"x-mlflow-delivery-id: {delivery}", f"x-mlflow-timestamp: {stamp}", f"x-mlflow-signature: v1,{signed}"]


@dataclass
class Reply:
    """What came back."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """OpenAI's error, its shape and the request's id checked."""
        assert self.headers["content-type"] == "application/json"
        assert self.headers["x-request-id"].startswith("req-")
        assert set(self.json) == {"error"}
        error: dict[str, Any] = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]
        assert error["type"] in ("invalid_request_error", "rate_limit_error", "server_error", "requests", "tokens")
        return error


def read(raw: bytes) -> Reply:
    """A reply from what came over the wire.

    Raises:
        http.client.IncompleteRead: it is cut short.
    """
    response = http.client.HTTPResponse(cast(Any, SimpleNamespace(makefile=lambda _: io.BytesIO(raw))))
    response.begin()
    return Reply(response.status, response.msg, response.read())


def head(method: str, target: str, *headers: str, host: str | None = "127.0.0.1") -> bytes:
    """The head of a request, of which no client would make some."""
    lines = [f"{method} {target} HTTP/1.1", *([f"Host: {host}"] if host is not None else []), *headers]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


@dataclass
class Front:
    """The gateway as a client finds it."""

    port: int
    gateway: Gateway
    serving: Serving
    upstream: Upstream
    http: aiohttp.ClientSession

    @property
    def live(self) -> Live:
        """What answers."""
        assert self.serving.traffic.live is not None
        return self.serving.traffic.live

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A bare connection."""
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def raw(self, sent: bytes) -> bytes:
        """What comes back until the server ends the connection."""
        reader, writer = await self.connect()
        writer.write(sent)
        try:
            return await reader.read()
        finally:
            writer.close()

    async def ask(
        self,
        method: str,
        target: str,
        *headers: str,
        body: dict[str, Any] | bytes | None = None,
        host: str | None = "127.0.0.1",
    ) -> Reply:
        """One request on a connection of its own; POST has a good body if none is given, the webhook's is signed."""
        if body is None and method == "POST":
            body = BODIES.get(target, {})
        sent = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        more = [f"Content-Length: {len(sent)}"] if body is not None else []
        if method == "POST" and webhook.PATH in target and "x-mlflow-signature" not in " ".join(headers).lower():
            more += signature(sent)
        raw = head(method, target, *headers, *more, "Connection: close", host=host) + sent
        answer = await self.raw(raw)
        if method == "HEAD":
            answer = answer.replace(b"\r\nContent-Length", b"\r\nx-length").replace(
                b"\r\ncontent-length", b"\r\nx-length"
            )
        return read(answer)

    def stream(self, body: dict[str, Any] | None = None) -> Any:
        """A streamed reply, for ``async with``."""
        return self.http.post(f"http://127.0.0.1:{self.port}{CHAT}", json=body or STREAM)

    def figure(self, name: str) -> float:
        """One of the gateway's figures; 0 where there is none yet."""
        for line in self.serving.metrics.text().decode().splitlines():
            if line.startswith(f"{name} "):
                return float(line.rpartition(" ")[2])
        return 0.0

    async def at_rest(self) -> None:
        """Wait until no request is counted anywhere; fails by the test's time limit."""
        while self.figure("namesake_requests_running") or (self.serving.traffic.live and self.live.running):
            await asyncio.sleep(0.005)


@asynccontextmanager
async def front(*, keep_alive: float = 5, tls: Tls | None = None, **given: object) -> AsyncIterator[Front]:
    """The gateway under uvicorn on a free port, with version 3 live."""
    chosen = settings.read(**given)
    async with upstream() as engine:
        serving = Serving()
        serving.traffic.live = live(engine)
        gateway = Gateway(cast(Service, serving), chosen)
        server = Server(gateway, chosen, tls, keep_alive=keep_alive)  # type: ignore[arg-type]
        server.config.load()
        server.lifespan = server.config.lifespan_class(server.config)
        listening = listen("127.0.0.1", 0)
        await server.startup([listening])
        following = asyncio.create_task(tls.follow(0.05)) if tls else None
        state = server.server_state
        try:
            async with aiohttp.ClientSession() as http:
                yield Front(listening.getsockname()[1], gateway, serving, engine, http)
        finally:
            if following is not None:
                following.cancel()
            for one in server.servers:
                one.close()
            for connection in list(state.connections):
                connection.transport.abort()  # type: ignore[union-attr]
            if state.tasks:
                await asyncio.wait(state.tasks, timeout=5)
            await gateway.close()


def events(raw: bytes) -> list[dict[str, Any]]:
    """The events of a streamed reply that is whole."""
    lines = raw.decode().split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def said(raw: bytes) -> str:
    """The text of a streamed reply that is whole."""
    return "".join(one["choices"][0]["delta"]["content"] for one in events(raw))


# --------------------------------------------------------------------------------------------------- who is let in


@pytest.mark.parametrize(("method", "path"), ROUTES)
@in_a_loop
async def test_with_keys_a_route_is_answered_to_those_who_have_one(method: str, path: str) -> None:
    async with front(**EVERY, api_keys=(KEY, "sk-other")) as gate:
        for given in (f"Bearer {KEY}", f"bearer {KEY}", f"BEARER {KEY}", f"Bearer   {KEY}  ", "Bearer sk-other"):
            assert (await gate.ask(method, path, f"Authorization: {given}")).status == 200, given
        assert (await gate.ask(method, path, f"aUTHORIZATION: Bearer {KEY}")).status == 200


@pytest.mark.parametrize(("method", "path"), ROUTES)
@in_a_loop
async def test_with_keys_a_route_is_closed_to_all_others_but_for_those_that_anybody_may_ask(
    method: str, path: str
) -> None:
    digest = sha256(KEY.encode()).hexdigest()
    async with front(**EVERY, api_keys=(KEY,)) as gate:
        for headers in (
            [],
            ["Authorization: "],
            ["Authorization: Bearer"],
            ["Authorization: Bearer wrong"],
            [f"Authorization: Bearer {KEY}x"],
            [f"Authorization: Bearer {KEY[:-1]}"],
            [f"Authorization: Bearer {KEY.upper()}"],
            [f"Authorization: Bearer {digest}"],
            [f"Authorization: Bearer {KEY} {KEY}"],
            [f"Authorization: Basic {KEY}"],
            ["Authorization: Basic dTpzay1yaWdodA=="],
            [f"Authorization: {KEY}"],
            [f"Authorization: Bearer,{KEY}"],
            ["Authorization: Bearer \xe8\xb8\xa9"],
            [f"X-Api-Key: {KEY}"],
            [f"Api-Key: {KEY}"],
            [f"Cookie: Authorization=Bearer {KEY}"],
            [f"X-Authorization: Bearer {KEY}"],
        ):
            reply = await gate.ask(method, path, *headers)
            if path in OPEN:
                assert reply.status == 200, headers
                continue
            assert (reply.status, reply.headers["www-authenticate"]) == (401, "Bearer"), headers
            assert (reply.error["code"], reply.error["type"]) == ("invalid_api_key", "invalid_request_error")
        assert not gate.upstream.asked


@pytest.mark.parametrize(("method", "path"), ROUTES)
@in_a_loop
async def test_a_header_that_decides_and_comes_twice_is_refused(method: str, path: str) -> None:
    right, wrong = f"Authorization: Bearer {KEY}", "authorization: Bearer wrong"
    async with front(**EVERY, api_keys=(KEY,)) as gate:
        for headers in ([right, wrong], [wrong, right], [right, right], [right, "Host: 127.0.0.1"]):
            reply = await gate.ask(method, path, *headers)
            assert reply.status == 400, headers
            assert reply.error
        assert not gate.upstream.asked


@in_a_loop
async def test_without_keys_everybody_is_let_in_also_with_one() -> None:
    async with front(**EVERY) as gate:
        for method, path in ROUTES:
            assert (await gate.ask(method, path)).status == 200
            assert (await gate.ask(method, path, "Authorization: Bearer any")).status == 200


@in_a_loop
async def test_a_key_is_not_told_to_the_engine() -> None:
    async with front(api_keys=(KEY,)) as gate:
        await gate.ask("POST", CHAT, f"Authorization: Bearer {KEY}", "Cookie: a=b", "X-Forwarded-For: 1.2.3.4")
        assert set(gate.upstream.headers[0]) <= {
            *("host", "accept", "accept-encoding", "user-agent", "content-length", "content-type")
        }


@pytest.mark.parametrize("target", ["/v1/nothing", "/docs", "/chat"])
@in_a_loop
async def test_a_path_that_there_is_not_is_not_there_for_anybody(target: str) -> None:
    async with front(api_keys=(KEY,)) as gate:
        for headers in ([], [f"Authorization: Bearer {KEY}"]):
            assert (await gate.ask("GET", target, *headers)).status == 404


def line(name: str, key: str) -> str:
    """A line of the file of keys."""
    return f"{name} {sha256(key.encode()).hexdigest()}\n"


async def lets_in(gate: Front, *keys: str) -> list[bool]:
    """Which of the keys are let in."""
    replies = [await gate.ask("GET", "/v1/models", f"Authorization: Bearer {key}") for key in keys]
    assert {reply.status for reply in replies} <= {200, 401}
    return [reply.status == 200 for reply in replies]


@in_a_loop
async def test_keys_come_from_a_file_and_from_the_settings(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    comment = "# " + line("old", "sk-old").strip()
    file.write_text(f"{comment}\n\n{line('a', 'sk-a')}{line('b', 'sk-b').upper()}broken line\n", encoding="utf-8")
    async with front(api_keys=("sk-c",), api_keys_file=file) as gate:
        assert await lets_in(gate, "sk-a", "sk-b", "sk-c", "sk-old", "sk-d", "line") == [True] * 3 + [False] * 3


@in_a_loop
async def test_keys_are_changed_without_a_restart(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(line("a", "sk-a"), encoding="utf-8")
    async with front(api_keys_file=file) as gate:
        assert await lets_in(gate, "sk-a", "sk-b") == [True, False]
        file.write_text(line("a", "sk-a") + line("b", "sk-b"), encoding="utf-8")
        assert await lets_in(gate, "sk-a", "sk-b") == [True, True]
        other = tmp_path / "other"
        other.write_text(line("b", "sk-b"), encoding="utf-8")
        other.replace(file)
        assert await lets_in(gate, "sk-a", "sk-b") == [False, True]
        file.write_text("", encoding="utf-8")
        assert await lets_in(gate, "sk-a", "sk-b", "") == [False, False, False]


@in_a_loop
async def test_a_file_of_keys_that_cannot_be_read_any_more_leaves_the_keys_as_they_were(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(line("a", "sk-a"), encoding="utf-8")
    async with front(api_keys_file=file) as gate:
        file.write_bytes(b"\xff\xfe\xff" * 100)
        assert await lets_in(gate, "sk-a", "sk-b") == [True, False]
        file.unlink()
        assert await lets_in(gate, "sk-a", "sk-b") == [True, False]


@in_a_loop
async def test_with_a_file_of_keys_that_is_not_there_nobody_is_let_in(tmp_path: Path) -> None:
    async with front(api_keys_file=tmp_path / "missing") as gate:
        assert await lets_in(gate, "sk-a", "") == [False, False]
        assert (await gate.ask("GET", "/health")).status == 200


@in_a_loop
async def test_a_line_of_the_file_that_is_no_digest_harms_nobody(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"{'踩' * 64}\n{line('a', 'sk-a')}", encoding="utf-8")
    async with front(api_keys_file=file) as gate:
        assert await lets_in(gate, "sk-a", "sk-b") == [True, False]


def spellings(path: str) -> list[str]:
    """Other ways to write a path, which some servers take for the same."""
    name = path.rpartition("/")[2]
    return [
        f"/{path}",
        f"{path}/",
        f"{path}//",
        f"{path}%2f",
        f"{path}%00",
        f"/.{path}",
        f"/%2e{path}",
        f"/x/..{path}",
        f"/x/%2e%2e{path}",
        path.replace("/", "%2F"),
        f"{path}/%2e",
        f"{path}/x/%2e%2e",
        *([f"/{path[1:].upper()}"] if name else []),
        *([f"{path[: -len(name)]}%{ord(name[0]):02x}{name[1:]}"] if name else []),
        f"{path};x",
        f"http://127.0.0.1{path}",
    ]


@pytest.mark.parametrize(("method", "path"), ROUTES)
@in_a_loop
async def test_no_other_spelling_of_a_route_and_no_other_host_gets_past_the_key(method: str, path: str) -> None:
    async with front(**EVERY, api_keys=(KEY,)) as gate:
        for target in spellings(path):
            absolute = target.startswith("http")  # a proxy's way to say it: the same path, and so the same answer
            for headers in ([], ["Authorization: Bearer wrong"], [f"Authorization: Bearer {KEY}"]):
                reply = await gate.ask(method, target, *headers, body=BODIES.get(path))
                right = bool(headers) and KEY in headers[0]
                expected = 404 if target.startswith("/") else 400
                if absolute:
                    expected = 200 if right or path in OPEN else 401
                assert reply.status == expected, (target, headers)
                assert reply.status in {200, 400} or reply.error
        for host in ("evil.example", "127.0.0.1/health", "127.0.0.1/health?", "127.0.0.1#", "localhost\\health"):
            for headers in ([], [f"Authorization: Bearer {KEY}"]):
                reply = await gate.ask(method, path, *headers, host=host)
                assert (reply.status, reply.error["code"]) == (400, "host_not_allowed")
        assert len(gate.upstream.asked) == (path in ENGINES)


@pytest.mark.parametrize(
    "raw",
    [
        b"nonsense\r\n\r\n",
        b"GET /health HTTP/9.9\r\nHost: localhost\r\n\r\n",
        b"GET  /health\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost : localhost\r\n\r\n",
        b"POST /v1/models HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST /v1/models HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
)
@in_a_loop
async def test_what_is_no_http_is_refused_in_openais_shape(raw: bytes) -> None:
    async with front() as gate:
        reply = read(await gate.raw(raw))
        assert (reply.status, reply.json["error"]["type"]) == (400, "invalid_request_error")
        assert reply.headers["content-type"] == "application/json"


# --------------------------------------------------------------------------------------------------- limits of a key


def limited(folder: Path, **limits: str) -> Path:
    """A file of keys, each with its limits."""
    file = folder / "limited"
    file.write_text("".join(f"{line(key, f'sk-{key}').strip()} {limits[key]}\n" for key in limits), encoding="utf-8")
    return file


def of(key: str) -> str:
    """The header of a key."""
    return f"Authorization: Bearer sk-{key}"


@in_a_loop
async def test_requests_a_minute_are_counted_for_each_key(tmp_path: Path) -> None:
    file = limited(tmp_path, a="requests=2", b="requests=2", c="")
    async with front(api_keys_file=file) as gate:
        for left in (1, 0):
            reply = await gate.ask("POST", CHAT, of("a"))
            assert (reply.status, reply.headers["x-ratelimit-limit-requests"]) == (200, "2")
            assert reply.headers["x-ratelimit-remaining-requests"] == str(left)
            assert re.fullmatch(r"(1m0s|[0-9.]+s)", reply.headers["x-ratelimit-reset-requests"])
            assert reply.headers["x-ratelimit-limit-tokens"] is None
        for path in (CHAT, TEXT, RESPONSES):
            reply = await gate.ask("POST", path, of("a"))
            assert (reply.status, reply.error["type"], reply.error["code"]) == (429, "requests", "rate_limit_exceeded")
            assert 28 <= int(reply.headers["retry-after"]) <= 30
            assert reply.headers["x-ratelimit-remaining-requests"] == "0"
        assert (await gate.ask("GET", "/v1/models", of("a"))).status == 200
        assert (await gate.ask("POST", CHAT, of("b"))).status == 200
        assert [(await gate.ask("POST", CHAT, of("c"))).status for _ in range(4)] == [200] * 4
        assert len(gate.upstream.asked) == 7
        limited(tmp_path, a="requests=3")
        assert (await gate.ask("POST", CHAT, of("a"))).headers["x-ratelimit-remaining-requests"] == "2"


@pytest.mark.parametrize("path", [CHAT, RESPONSES])
@in_a_loop
async def test_a_reply_costs_the_tokens_that_the_engine_tells(tmp_path: Path, path: str) -> None:
    names = ("prompt_tokens", "completion_tokens") if path == CHAT else ("input_tokens", "output_tokens")
    async with front(api_keys_file=limited(tmp_path, a="tokens=100")) as gate:
        details = {"cached_tokens": 1, "input_tokens_per_turn": []}
        gate.upstream.whole = whole("我", usage={names[0]: 30, "x_details": details, names[1]: 90, "total_tokens": 120})
        assert (await gate.ask("POST", path, of("a"))).status == 200
        reply = await gate.ask("POST", path, of("a"))
        assert (reply.status, reply.error["type"], reply.error["code"]) == (429, "tokens", "rate_limit_exceeded")
        assert reply.headers["x-ratelimit-remaining-tokens"] == "0"
        assert int(reply.headers["retry-after"]) >= 12  # 20 of debt, at 100 a minute
        assert gate.figure('namesake_tokens_total{kind="prompt",version="ccb-v3"}') == 30
        assert gate.figure('namesake_tokens_total{kind="completion",version="ccb-v3"}') == 90


USAGE = event("", choices=[], usage={"prompt_tokens": 7, "total_tokens": 12, "completion_tokens": 5})


@pytest.mark.parametrize("asked", [True, False])
@in_a_loop
async def test_a_streams_tokens_are_counted_and_told_to_those_who_asked(tmp_path: Path, asked: bool) -> None:
    async with front(api_keys_file=limited(tmp_path, a="tokens=100")) as gate:
        gate.upstream.script = [event("我是"), event("踩踩背。") + USAGE, END]
        more = {"stream_options": {"include_usage": True}} if asked else {}
        reply = await gate.ask("POST", CHAT, of("a"), body={**STREAM, **more})
        assert gate.upstream.asked[0][1]["stream_options"] == {"include_usage": True}
        assert [one.get("usage") is not None for one in events(reply.body)] == [
            False,
            False,
            *([True] if asked else []),
        ]
        assert "".join(one["choices"][0]["delta"]["content"] for one in events(reply.body)[:2]) == "我是踩踩背。"
        again = await gate.ask("POST", CHAT, of("a"), body=STREAM)
        assert 60 < int(again.headers["x-ratelimit-remaining-tokens"]) <= 88


@in_a_loop
async def test_what_a_client_asks_for_is_reserved_until_the_reply_has_ended(tmp_path: Path) -> None:
    async with front(api_keys_file=limited(tmp_path, a="tokens=1000")) as gate:
        gate.upstream.whole = whole("我", usage={"prompt_tokens": 3, "completion_tokens": 2})
        gate.upstream.begin.clear()
        big = {**BODIES[CHAT], "max_tokens": 300, "n": 2}
        first = asyncio.create_task(gate.ask("POST", CHAT, of("a"), body=big))
        await gate.upstream.arrived.wait()
        reply = await gate.ask("POST", CHAT, of("a"), body=big)
        assert (reply.status, reply.error["type"]) == (429, "tokens")
        gate.upstream.begin.set()
        assert (await first).status == 200
        assert (await gate.ask("POST", CHAT, of("a"), body=big)).status == 200


@pytest.mark.parametrize(
    ("status", "said", "message"),
    [
        (400, b"no such thing", "no such thing"),
        (422, b'{"detail": [{"msg": "odd"}]}', '{"detail": [{"msg": "odd"}]}'),
        (404, b"", "The engine answers 404."),
        (500, b"Traceback of the engine", "The engine failed (500)."),
        (502, b'{"error": "a word"}', "The engine failed (502)."),
        (400, b'{"error": {"message": "its own", "type": "x"}}', "its own"),
    ],
)
@in_a_loop
async def test_an_engines_error_has_openais_shape(status: int, said: bytes, message: str) -> None:
    async with front() as gate:
        gate.upstream.status, gate.upstream.whole = status, said
        reply = await gate.ask("POST", CHAT)
        assert (reply.status, reply.headers["content-type"]) == (status, "application/json")
        assert reply.json["error"]["message"] == message
        assert int(reply.headers["content-length"]) == len(reply.body)


@in_a_loop
async def test_a_client_that_goes_pays_for_what_it_had_and_one_that_is_refused_for_nothing(tmp_path: Path) -> None:
    async with front(api_keys_file=limited(tmp_path, a="tokens=1000")) as gate:
        for body in (b"{", b'{"messages": []}'):
            reply = await gate.ask("POST", CHAT, of("a"), body=body)
            assert (reply.status, reply.headers["x-ratelimit-remaining-tokens"]) == (400, "1000")
        gate.upstream.status = 400
        await gate.ask("POST", CHAT, of("a"))
        gate.upstream.status = 200
        gate.upstream.script = [event("我")] * 3 + [asyncio.Event()]
        reader, writer = await gate.connect()
        body = json.dumps({**STREAM, "max_tokens": 900}).encode()
        writer.write(head("POST", CHAT, of("a"), f"Content-Length: {len(body)}") + body)
        for _ in range(3):
            await reader.readuntil(b"\n\n")
        writer.transport.abort()
        await gate.at_rest()
        reply = await gate.ask("POST", CHAT, of("a"), body=b"{")
        assert 950 <= int(reply.headers["x-ratelimit-remaining-tokens"]) < 1000


@in_a_loop
async def test_without_keys_the_limits_hold_for_all_together() -> None:
    async with front(requests_per_minute=1) as gate:
        assert [(await gate.ask("POST", CHAT)).status for _ in range(2)] == [200, 429]


@in_a_loop
async def test_a_key_that_fills_the_queue_does_not_shut_another_out(tmp_path: Path) -> None:
    async with front(api_keys_file=limited(tmp_path, a="", b=""), max_streams=1, max_requests=3) as gate:
        gate.upstream.begin.clear()
        greedy = [asyncio.create_task(gate.ask("POST", CHAT, of("a"))) for _ in range(3)]
        while gate.figure("namesake_requests_running") < 3:
            await asyncio.sleep(0.005)
        assert (await gate.ask("POST", CHAT, of("a"))).status == 429
        other = asyncio.create_task(gate.ask("POST", CHAT, of("b")))
        while not any(task.done() for task in greedy):
            await asyncio.sleep(0.005)
        assert len(gate.upstream.asked) == 1
        gate.upstream.begin.set()
        assert (await other).status == 200
        assert sorted(reply.status for reply in await asyncio.gather(*greedy)) == [200, 200, 429]
        await gate.at_rest()


# --------------------------------------------------------------------------------------------------- TLS


EC = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1")
RSA = ("-newkey", "rsa:2048")


def certificate(folder: Path, name: str = "localhost", kind: tuple[str, ...] = EC) -> tuple[Path, Path]:
    """A certificate of our own making and its key."""
    made, key = folder / f"{name}.pem", folder / f"{name}.key"
    subprocess.run(
        [
            *("openssl", "req", "-x509", *kind, "-nodes"),
            *("-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name},IP:127.0.0.1"),
            *("-keyout", str(key), "-out", str(made), "-days", "2"),
        ],
        check=True,
        capture_output=True,
    )
    return made, key


@pytest.mark.parametrize("kind", [pytest.param(EC, id="as before"), pytest.param(RSA, id="another kind of key")])
@in_a_loop
async def test_openais_client_talks_tls_and_a_renewed_certificate_is_taken_while_running(
    tmp_path: Path, kind: tuple[str, ...]
) -> None:
    made, key = certificate(tmp_path)
    renewed = certificate(tmp_path, "renewed", kind)
    async with front(api_keys=(KEY,), tls=Tls(made, key)) as gate:

        async def says(trusted: Path) -> str:
            context = ssl.create_default_context(cafile=str(trusted))
            async with openai.AsyncOpenAI(
                base_url=f"https://127.0.0.1:{gate.port}/v1",
                api_key=KEY,
                max_retries=0,
                http_client=httpx.AsyncClient(verify=context),
            ) as client:
                found = await client.chat.completions.create(model="ccb", messages=[{"role": "user", "content": "?"}])
                return str(found.choices[0].message.content)

        authority = tmp_path / "authority.pem"
        authority.write_bytes(made.read_bytes())
        assert await says(authority) == "我是踩踩背。"
        made.write_bytes(renewed[0].read_bytes())  # half of a pair: the old one stays
        await asyncio.sleep(0.15)
        assert await says(authority) == "我是踩踩背。"
        key.write_bytes(renewed[1].read_bytes())
        await asyncio.sleep(0.15)
        assert await says(renewed[0]) == "我是踩踩背。"
        with pytest.raises(openai.APIConnectionError):
            await says(authority)
        assert b"HTTP/1.1 200" not in await gate.raw(head("GET", "/health"))


@in_a_loop
async def test_a_handshake_that_does_not_come_is_cut_in_time(tmp_path: Path) -> None:
    async with front(tls=Tls(*certificate(tmp_path)), read_seconds=0.3) as gate:
        for first in (b"", b"\x16\x03\x01"):
            begun = asyncio.get_running_loop().time()
            with suppress(ConnectionError):
                assert await gate.raw(first) == b""
            assert 0.2 < asyncio.get_running_loop().time() - begun < 2


def test_a_certificate_that_cannot_be_used_is_told_before_anything_starts(tmp_path: Path) -> None:
    made, key = certificate(tmp_path)
    other = certificate(tmp_path, "other")[1]
    locked = tmp_path / "locked.key"
    words = ["openssl", "pkey", "-in", str(key), "-aes256", "-passout", "pass:x", "-out", str(locked)]
    subprocess.run(words, check=True, capture_output=True)
    for wrong in [(tmp_path / "no.pem", None), (made, other), (made, None), (key, key), (made, locked)]:
        with pytest.raises(InputError) as caught:
            Tls(*wrong)
        assert caught.value.parameter == "ssl_certfile"
    both = tmp_path / "both.pem"
    both.write_bytes(made.read_bytes() + key.read_bytes())
    assert Tls(both, None)
    assert front_tls(settings.read(ssl_certfile=both))
    assert front_tls(settings.read()) is None
    with pytest.raises(InputError) as caught:
        front_tls(settings.read(ssl_keyfile=key))
    assert caught.value.parameter == "ssl_keyfile"


# --------------------------------------------------------------------------------------------------- Host and path


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "127.0.0.1:8000", "localhost", "LOCALHOST", "LocalHost:9", "[::1]", "[::1]:8000", "127.0.0.1:"],
)
@in_a_loop
async def test_loopbacks_names_are_served_with_any_port(host: str) -> None:
    async with front(**EVERY) as gate:
        for method, path in ROUTES:
            assert (await gate.ask(method, path, host=host)).status == 200


@pytest.mark.parametrize(
    "host",
    [
        None,
        "",
        ":8000",
        "evil.example",
        "evil.example:8000",
        "localhost.evil.example",
        "evil.localhost",
        "127.0.0.1.evil.example",
        "localhost@evil.example",
        "127.0.0.2",
        "0.0.0.0",
        "[::]",
        "::1",
        "[::1",
        "[::1].evil.example",
        "localhost, evil.example",
        "localhost/",
        "2130706433",
        "\xe8\xb8\xa9",
    ],
)
@in_a_loop
async def test_another_host_or_none_is_refused_on_every_route(host: str | None) -> None:
    async with front(**EVERY, host="0.0.0.0") as gate:
        for method, path in [*ROUTES, ("GET", "/nothing")]:
            reply = await gate.ask(method, path, host=host)
            assert (reply.status, reply.error["code"]) == (400, "host_not_allowed")
        assert not gate.upstream.asked


@pytest.mark.parametrize(
    ("given", "host", "status"),
    [
        ({"host": "192.168.0.7"}, "192.168.0.7:8000", 200),
        ({"host": "192.168.0.7"}, "192.168.0.8", 400),
        ({"host": "fe80::7"}, "[fe80::7]:8000", 200),
        ({"host": "::"}, "[::]", 400),
        ({"host": "::"}, "[::1]", 200),
        ({"host": "0.0.0.0"}, "localhost", 200),
        ({"host": "0.0.0.0", "allowed_hosts": ("Models.Example",)}, "models.example:443", 200),
        ({"host": "0.0.0.0", "allowed_hosts": ("Models.Example",)}, "MODELS.example", 200),
        ({"host": "0.0.0.0", "allowed_hosts": ("models.example",)}, "x.models.example", 400),
        ({"allowed_hosts": ("0.0.0.0",)}, "0.0.0.0", 400),
    ],
)
@in_a_loop
async def test_the_address_that_is_listened_on_and_those_allowed_are_served_unless_it_is_every_address(
    given: dict[str, Any], host: str, status: int
) -> None:
    async with front(**given) as gate:
        assert (await gate.ask("GET", "/v1/models", host=host)).status == status


@pytest.mark.parametrize("forward", ["X-Forwarded-Host: evil.example", "Forwarded: host=evil.example"])
@in_a_loop
async def test_what_a_proxy_says_of_the_host_is_not_heard(forward: str) -> None:
    async with front() as gate:
        assert (await gate.ask("GET", "/v1/models", forward)).status == 200
        says = forward.replace("evil.example", "localhost")
        assert (await gate.ask("GET", "/v1/models", says, host="evil.example")).status == 400


@pytest.mark.parametrize(
    "target",
    [
        "//v1/models",
        "/v1//models",
        "/v1/models/",
        "/v1/models/ccb",
        "/v1/%6dodels",
        "/%76%31/models",
        "/v1%2fmodels",
        "/v1/models%2f",
        "/v1/models%00",
        "/v1/models%3fx",
        "/v1/models%20",
        "/v1/models;x=1",
        "/v1/../v1/models",
        "/v1/%2e%2e/v1/models",
        "/v1/./models",
        "/./v1/models",
        "/v1\\models",
        "/V1/models",
        "/v1/Models",
        "/v1",
        "/health/",
        "/%68ealth",
        "//health",
        "/docs",
        "/openapi.json",
        "/redoc",
        "/namesake/weights",
        "/v1/responses/1",
        "/v1/embeddings",
        "/tokenize",
        "/pause",
        "/sleep",
        "/collective_rpc",
        "/v1/load_lora_adapter",
        "/invocations",
        "/%E8%B8%A9",
        "/%ff",
    ],
)
@in_a_loop
async def test_a_path_that_is_not_on_the_list_letter_for_letter_is_not_there(target: str) -> None:
    async with front() as gate:
        for method in ("GET", "POST", "OPTIONS"):
            reply = await gate.ask(method, target)
            assert (reply.status, reply.error["code"]) == (404, "not_found")
        assert not gate.upstream.asked


@pytest.mark.parametrize("target", ["/v1/models?", "/v1/models?a=b", "/v1/models?/../x", "/v1/models#x"])
@in_a_loop
async def test_what_follows_the_path_does_not_matter(target: str) -> None:
    async with front() as gate:
        assert (await gate.ask("GET", target)).status == 200


@in_a_loop
async def test_a_target_with_a_host_in_it_does_not_change_which_host_is_checked() -> None:
    async with front() as gate:
        assert (await gate.ask("GET", "http://localhost/v1/models", host="evil.example")).status == 400
        assert (await gate.ask("GET", "http://evil.example/v1/models", host="evil.example")).status == 400


@pytest.mark.parametrize(("right", "path"), ROUTES)
@in_a_loop
async def test_another_method_is_refused_and_the_right_one_told(right: str, path: str) -> None:
    async with front(**EVERY, api_keys=(KEY,)) as gate:
        for method in {"GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD"} - {right}:
            reply = await gate.ask(method, path, f"Authorization: Bearer {KEY}")
            assert (reply.status, reply.headers["allow"]) == (405, right)
            assert method == "HEAD" or right in reply.error["message"]
            if path not in OPEN:
                assert (await gate.ask(method, path)).status == 401
        assert not gate.upstream.asked


@in_a_loop
async def test_each_reply_has_an_id_of_its_own_and_no_client_gives_it() -> None:
    async with front(**EVERY) as gate:
        replies = [await gate.ask(method, path, "x-request-id: mine") for method, path in [*ROUTES, ("GET", "/no")]]
        found = [reply.headers.get_all("x-request-id") for reply in replies]
        assert all(len(ids or []) == 1 for ids in found)
        assert len({ids[0] for ids in found if ids}) == len(replies)


@in_a_loop
async def test_what_is_no_http_request_is_none_of_ours() -> None:
    async with front() as gate:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        await gate.gateway({"type": "websocket", "path": CHAT, "headers": []}, cast(Any, None), send)
        assert not sent


# --------------------------------------------------------------------------------------------------- which version


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize("model", ["ccb", "ccb@champion", "ccb-v3", None])
@in_a_loop
async def test_a_version_answers_to_its_names_and_to_none(path: str, model: str | None) -> None:
    async with front() as gate:
        for body in [{**BODIES[path], "model": model}, *([BODIES[path]] if model is None else [])]:
            assert (await gate.ask("POST", path, body=body)).status == 200
            assert gate.upstream.asked[-1][1]["model"] == "namesake"


@pytest.mark.parametrize(
    "model",
    ["", "namesake", "CCB", "ccb ", "ccb-v2", "ccb@candidate", "ccb@", "gpt-4", "x" * 100_000, "踩", 3, True, [], {}],
)
@in_a_loop
async def test_another_model_is_not_found_in_openais_shape(model: object) -> None:
    async with front() as gate:
        for path in (CHAT, TEXT):
            reply = await gate.ask("POST", path, body={**BODIES[path], "model": model})
            assert (reply.status, reply.error["code"], reply.error["param"]) == (404, "model_not_found", "model")
            assert reply.error["type"] == "invalid_request_error"
            assert "ccb@champion" in reply.error["message"]
            assert len(reply.error["message"]) < 500
        assert not gate.upstream.asked


@in_a_loop
async def test_the_models_are_the_names_that_are_answered_to() -> None:
    async with front() as gate:
        found = (await gate.ask("GET", "/v1/models")).json
        assert [model["id"] for model in found["data"]] == ["ccb", "ccb@champion", "ccb-v3"]
        assert {(model["object"], model["created"], model["root"]) for model in found["data"]} == {
            ("model", 1_700_000_000, "ccb-v3")
        }
        gate.serving.routing.alias = ""  # models:/ccb/3
        found = (await gate.ask("GET", "/v1/models")).json
        assert [model["id"] for model in found["data"]] == ["ccb", "ccb-v3"]
        gate.serving.traffic.live = None
        assert (await gate.ask("GET", "/v1/models")).json == {"object": "list", "data": []}


@in_a_loop
async def test_a_version_that_is_served_by_its_number_has_no_alias() -> None:
    async with front() as gate:
        gate.serving.routing.alias = ""  # models:/ccb/3
        reply = await gate.ask("POST", CHAT)
        assert (reply.status, reply.headers["x-namesake-alias"]) == (200, "")
        assert (await gate.ask("POST", CHAT, body={**BODIES[CHAT], "model": "ccb@champion"})).status == 404


@in_a_loop
async def test_the_version_tells_of_itself_and_of_what_was_refused() -> None:
    async with front() as gate:
        about = (await gate.ask("GET", "/v1/version")).json
        assert abs(about["live"].pop("since") - time.time()) < 60
        assert about["live"].pop("verified") is None
        assert about == {
            "uri": "models:/ccb@champion",
            "step": "rest",
            "wanted": "models:/ccb/3",
            "refused": {},
            "live": {
                "version": "models:/ccb/3",
                "model": "ccb-v3",
                "run": "run3",
                "name": "踩踩背 CCB",
                "author": "老爷爷 OldGrandpa",
                "base": "Qwen/Qwen3-0.6B",
                "system": "Be kind.",
                "scores": {"identity": 1.0},
            },
        }
        refused = {"models:/ccb/4 source": Refusal("it is broken", 1, 9.0)}
        gate.serving.state = State(wanted=None, step=Step.LOADING, refused=refused)
        gate.serving.traffic.live = None
        about = (await gate.ask("GET", "/v1/version")).json
        assert about["refused"] == {"models:/ccb/4": "it is broken"}
        assert (about["step"], about["wanted"], about["live"]) == ("loading", None, None)


@in_a_loop
async def test_the_engine_gets_what_is_allowed_with_the_versions_system_prompt() -> None:
    async with front() as gate:
        body = {**BODIES[CHAT], "model": "ccb", "max_tokens": 5, "user": "me", "store": True, "seed": None}
        await gate.ask("POST", CHAT, body=body)
        await gate.ask("POST", TEXT)
        system = {"role": "system", "content": "Be kind."}
        assert gate.upstream.asked == [
            (CHAT, {"messages": [system, *BODIES[CHAT]["messages"]], "model": "namesake", "max_tokens": 5}),
            (TEXT, {"prompt": "我是", "model": "namesake"}),
        ]


# --------------------------------------------------------------------------------------------------- what is answered


def marked(headers: Any) -> tuple[str, str, str]:
    """Version, run and alias from a reply's headers."""
    return headers["x-namesake-version"], headers["x-namesake-run"], headers["x-namesake-alias"]


@in_a_loop
async def test_a_whole_reply_says_which_version_gave_it_and_is_else_as_it_was() -> None:
    async with front() as gate:
        reply = await gate.ask("POST", CHAT)
        assert (reply.status, reply.headers.get_content_type()) == (200, "application/json")
        assert marked(reply.headers) == ("ccb-v3", "run3", "champion")
        named = {"model": "ccb-v3", "system_fingerprint": "ccb-v3"}
        assert reply.json == {**json.loads(gate.upstream.whole), **named}


@in_a_loop
async def test_each_event_of_a_stream_says_which_version_gave_it_and_is_else_as_it_was() -> None:
    async with front() as gate, gate.stream() as response:
        raw = await response.read()
        assert (response.status, response.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
        assert marked(response.headers) == ("ccb-v3", "run3", "champion")
        named = {"model": "ccb-v3", "system_fingerprint": "ccb-v3"}
        given = events(b"".join(cast(Sequence[bytes], gate.upstream.script)))
        assert events(raw) == [{**one, **named} for one in given]


@in_a_loop
async def test_events_that_come_in_one_piece_are_each_marked() -> None:
    async with front() as gate:
        gate.upstream.script = [b"".join(event(letter) for letter in "我是踩踩背") + END]
        async with gate.stream() as response:
            raw = await response.read()
        assert said(raw) == "我是踩踩背"
        assert {(one["model"], one["system_fingerprint"]) for one in events(raw)} == {("ccb-v3", "ccb-v3")}


@pytest.mark.parametrize("at", [1, 8, event("我").index(b'"model"') + 3, event("我").index(b"namesake") + 4])
@in_a_loop
async def test_an_event_that_comes_in_two_pieces_is_marked(at: int) -> None:
    async with front() as gate:
        more = asyncio.Event()
        gate.upstream.script = [event("我")[:at], more, event("我")[at:], END]
        async with gate.stream() as response:
            asyncio.get_running_loop().call_later(0.05, more.set)
            raw = await response.read()
        assert said(raw) == "我"
        assert {(one["model"], one.get("system_fingerprint")) for one in events(raw)} == {("ccb-v3", "ccb-v3")}


@pytest.mark.parametrize("own", ["vllm-0.25.0-1a2b3c4d", None])
@in_a_loop
async def test_the_engines_own_fingerprint_does_not_hide_the_version_in_a_whole_reply(own: str | None) -> None:
    async with front() as gate:
        gate.upstream.whole = whole("我", service_tier=None, system_fingerprint=own, usage={"total_tokens": 3})
        reply = await gate.ask("POST", CHAT)
        assert reply.json["system_fingerprint"] == "ccb-v3"
        assert reply.body.count(b'"system_fingerprint"') == 1


@in_a_loop
async def test_the_engines_own_fingerprint_does_not_hide_the_version_in_a_stream() -> None:
    async with front() as gate:
        gate.upstream.script = [event("我"), event("", system_fingerprint="vllm-0.25.0-1a2b3c4d"), END]
        async with gate.stream() as response:
            raw = await response.read()
        assert [one["system_fingerprint"] for one in events(raw)] == ["ccb-v3", "ccb-v3"]


@in_a_loop
async def test_the_events_of_a_response_that_hold_all_of_it_say_which_version_gave_it() -> None:
    async with front() as gate:
        response = {"id": "resp_1", "model": "namesake", "object": "response", "output": []}
        tool = {"tools": [{"name": "f", "parameters": {"response": {"id": {"type": "string"}}}}]}  # a client's words
        told: list[tuple[str, dict[str, Any]]] = [
            ("response.created", {"response": {**response, **tool}, "sequence_number": 0, "type": "response.created"}),
            ("response.output_text.delta", {"delta": 'data: {"response":{"id"', "item_id": "msg_1"}),
            ("response.completed", {"response": response, "sequence_number": 2, "type": "response.completed"}),
        ]
        gate.upstream.script = [f"event: {name}\ndata: ".encode() + compact(one) + b"\n\n" for name, one in told]
        asked = {**BODIES[RESPONSES], "stream": True}
        async with gate.http.post(f"http://127.0.0.1:{gate.port}{RESPONSES}", json=asked) as reply:
            raw = (await reply.read()).decode()
        got = [json.loads(one.partition("data: ")[2]) for one in raw.split("\n\n") if one]
        named = {"model": "ccb-v3", "system_fingerprint": "ccb-v3"}
        want = [{**one, **({"response": {**one["response"], **named}} if "response" in one else {})} for _, one in told]
        assert got == want


NASTY = 'data: {"id":"x","model":"namesake"}\n\ndata: {"id" "model":"namesake", "system_fingerprint":"y" \\" 踩'


@in_a_loop
async def test_what_the_model_says_is_not_changed_though_it_looks_like_the_wire() -> None:
    async with front() as gate:
        gate.upstream.whole = whole(NASTY)
        assert (await gate.ask("POST", CHAT)).json["choices"][0]["message"]["content"] == NASTY
        gate.upstream.script = [event(NASTY) + event(NASTY), END]
        async with gate.stream() as response:
            assert said(await response.read()) == NASTY * 2


@in_a_loop
async def test_a_name_with_a_quote_in_it_leaves_the_json_whole() -> None:
    async with front() as gate:
        gate.serving.traffic.live = live(gate.upstream, name='the "ccb"')
        assert (await gate.ask("POST", CHAT)).json["model"] == 'the "ccb"-v3'


@in_a_loop
async def test_a_stream_comes_event_by_event_and_not_at_its_end() -> None:
    async with front() as gate:
        more = asyncio.Event()
        gate.upstream.script = [event("我是"), more, event("踩踩背。"), END]
        async with gate.stream() as response:
            first = await response.content.readuntil(b"\n\n")
            assert not more.is_set()
            more.set()
            assert said(first + await response.read()) == "我是踩踩背。"


@pytest.mark.parametrize("status", [400, 404, 422, 500, 503])
@in_a_loop
async def test_an_error_of_the_engine_comes_through(status: int) -> None:
    async with front() as gate:
        gate.upstream.status = status
        gate.upstream.whole = compact({"error": {"message": "too long", "type": "x", "param": "input", "code": 400}})
        reply = await gate.ask("POST", CHAT)
        assert (reply.status, reply.body) == (status, gate.upstream.whole)
        assert marked(reply.headers) == ("ccb-v3", "run3", "champion")


@in_a_loop
async def test_one_version_answers_a_stream_to_its_end_though_another_is_live_by_then() -> None:
    async with front() as gate, upstream() as other:
        more = asyncio.Event()
        gate.upstream.script = [event("我是"), more, event("踩踩背。"), END]
        async with gate.stream() as response:
            first = await response.content.readuntil(b"\n\n")
            old = gate.live
            gate.serving.traffic.live = live(other, 4, system="Be brief.")
            assert (await gate.ask("POST", CHAT)).headers["x-namesake-version"] == "ccb-v4"
            assert (old.running, old.idle.is_set()) == (1, False)
            more.set()
            raw = first + await response.read()
        assert {one["model"] for one in events(raw)} == {"ccb-v3"}
        await old.idle.wait()
        assert other.asked[0][1]["messages"][0]["content"] == "Be brief."


@in_a_loop
async def test_who_comes_while_the_door_is_held_waits_and_is_answered_by_the_new_version() -> None:
    async with front() as gate:
        assert await gate.serving.traffic.hold(1)
        waiting = [asyncio.create_task(gate.ask("POST", CHAT, body={"messages": [{"role": "user", "content": "x"}]}))]
        waiting += [asyncio.create_task(gate.ask("POST", TEXT)) for _ in range(3)]
        while gate.figure("namesake_requests_running") < 4:
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.03)
        assert not gate.upstream.asked
        assert (await gate.ask("GET", "/ready")).status == 200
        gate.serving.traffic.live = live(gate.upstream, 4, system="Be brief.")
        gate.serving.traffic.release()
        replies = await asyncio.gather(*waiting)
        assert {(reply.status, reply.headers["x-namesake-version"]) for reply in replies} == {(200, "ccb-v4")}
        chats = [body["messages"][0]["content"] for path, body in gate.upstream.asked if path == CHAT]
        assert chats == ["Be brief."]


# --------------------------------------------------------------------------------------------------- bounds


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"", "messages"),
        (b"{", None),
        (b"[]", None),
        (b'{"messages": []}', "messages"),
        (b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}', None),
        (b'{"messages": [{"role": "user", "content": "x"}], "n": 9}', "n"),
        (b'{"messages": [{"role": "user", "content": "x"}], "chat_template": "x"}', "chat_template"),
        (b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', "messages[0].content"),
        (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", None),
    ],
)
@in_a_loop
async def test_a_body_out_of_bounds_is_refused_in_openais_shape(body: bytes, param: str | None) -> None:
    async with front() as gate:
        reply = await gate.ask("POST", CHAT, body=body)
        assert (reply.status, reply.error["type"], reply.error["param"]) == (400, "invalid_request_error", param)
        assert not gate.upstream.asked
        await gate.at_rest()


@in_a_loop
async def test_a_field_whose_name_is_no_unicode_is_refused_too() -> None:
    async with front() as gate:
        reply = await gate.ask("POST", CHAT, body=b'{"messages": [{"role": "user", "content": "x"}], "\\ud800": 1}')
        assert (reply.status, reply.error["type"]) == (400, "invalid_request_error")


@in_a_loop
async def test_half_a_surrogate_pair_in_a_text_or_a_models_name_is_no_failure_of_ours() -> None:
    async with front() as gate:
        for body in (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', b'{"model": "\\ud800"}'):
            assert (await gate.ask("POST", CHAT, body=body)).status == 400
        assert not gate.upstream.asked


def padded(size: int) -> bytes:
    """A good body of so many bytes."""
    return json.dumps(BODIES[CHAT]).encode().ljust(size)


def in_chunks(body: bytes, size: int) -> bytes:
    """The body in HTTP's chunks."""
    parts = [body[start : start + size] for start in range(0, len(body), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


@in_a_loop
async def test_a_body_as_long_as_allowed_is_taken_and_a_longer_one_not_however_it_comes() -> None:
    async with front(max_body_bytes=2048) as gate:
        for size, status in ((2048, 200), (2049, 413), (100_000, 413)):
            reply = await gate.ask("POST", CHAT, body=padded(size))
            assert reply.status == status
            start = head("POST", CHAT, "Transfer-Encoding: chunked", "Connection: close")
            for chunk in (100, 1_000_000):
                reply = read(await gate.raw(start + in_chunks(padded(size), chunk)))
                assert reply.status == status
                assert status == 200 or reply.error["code"] == "body_too_large"
        await gate.at_rest()


@in_a_loop
async def test_a_body_that_is_said_to_be_too_long_is_refused_before_it_comes() -> None:
    async with front(max_body_bytes=2048, read_seconds=600) as gate:
        for length in ("2049", "99999999999", "9" * 18):
            reader, writer = await gate.connect()
            writer.write(head("POST", CHAT, f"Content-Length: {length}"))
            assert (await reader.readline()).startswith(b"HTTP/1.1 413 ")
            writer.close()


@pytest.mark.parametrize("kind", ["application/json", "Application/JSON; charset=utf-8", "application/json ;x", None])
@in_a_loop
async def test_json_is_taken_and_so_is_a_body_of_no_declared_type(kind: str | None) -> None:
    async with front() as gate:
        assert (await gate.ask("POST", CHAT, *([f"Content-Type: {kind}"] if kind else []))).status == 200


@pytest.mark.parametrize(
    "kind",
    [
        *("text/plain", "multipart/form-data; boundary=x", "application/x-www-form-urlencoded", "application/jsonp"),
        *("application/json, text/plain", "text/json", ""),
    ],
)
@in_a_loop
async def test_another_type_of_body_is_refused(kind: str) -> None:
    async with front() as gate:
        reply = await gate.ask("POST", CHAT, f"Content-Type: {kind}")
        assert (reply.status, reply.error["code"]) == (415, "content_type")
        assert not gate.upstream.asked
        await gate.at_rest()


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
@in_a_loop
async def test_a_page_of_another_site_may_not_send_what_its_browser_would_not_ask_about(site: str) -> None:
    async with front() as gate:
        reply = await gate.ask("POST", CHAT, f"Sec-Fetch-Site: {site}")
        assert (reply.status, reply.error["code"]) == (415, "content_type")
        assert not gate.upstream.asked
        json_too = ["Content-Type: application/json", f"Sec-Fetch-Site: {site}"]  # asked about: a preflight (CORS)
        assert (await gate.ask("POST", CHAT, *json_too)).status == 200
        assert (await gate.ask("POST", CHAT, "Sec-Fetch-Site: same-origin")).status == 200


@pytest.mark.parametrize("more", [b"a:b\r\n" * 20_000, b"a: " + b"x" * 100_000])
@in_a_loop
async def test_what_comes_behind_a_body_is_bounded_as_a_head_is(more: bytes) -> None:
    async with front(read_seconds=600, keep_alive=600, api_keys=("k",)) as gate:
        reader, writer = await gate.connect()
        writer.write(head("POST", CHAT, "Transfer-Encoding: chunked") + b"2\r\n{}\r\n0\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 401 ")
        async with asyncio.timeout(5):
            with suppress(ConnectionError):
                while True:
                    writer.write(more)
                    await writer.drain()
                    if not await reader.read(65536):
                        break
        writer.close()


@in_a_loop
async def test_a_trailer_is_no_header() -> None:
    async with front(api_keys=(KEY,)) as gate:
        sent = head("POST", CHAT, "Transfer-Encoding: chunked", "Connection: close")
        body = in_chunks(json.dumps(BODIES[CHAT]).encode(), 100)[:-2]
        reply = read(await gate.raw(sent + body + f"Authorization: Bearer {KEY}\r\n\r\n".encode()))
        assert reply.status == 401


@in_a_loop
async def test_a_client_that_sends_the_next_request_too_early_and_goes_is_noticed() -> None:
    async with front() as gate:
        gate.upstream.script = [event("我是"), asyncio.Event()]
        body = json.dumps(STREAM).encode()
        reader, writer = await gate.connect()
        writer.write(head("POST", CHAT, f"Content-Length: {len(body)}") + body + head("GET", "/health") * 3)
        await gate.upstream.arrived.wait()
        await reader.readuntil("我是".encode())
        writer.close()
        async with asyncio.timeout(2):
            await gate.upstream.aborted.wait()
        await gate.at_rest()


@in_a_loop
async def test_a_request_that_comes_before_the_last_answer_has_ended_is_left_to_be_sent_again() -> None:
    async with front() as gate:
        gate.upstream.begin.clear()
        body = json.dumps(BODIES[CHAT]).encode()
        reader, writer = await gate.connect()
        whole = head("POST", CHAT, f"Content-Length: {len(body)}") + body
        writer.write(whole + whole)
        await gate.upstream.arrived.wait()
        await asyncio.sleep(0.05)
        gate.upstream.begin.set()
        async with asyncio.timeout(5):
            came = await reader.read()
        writer.close()
        assert came.count(b"HTTP/1.1 200 OK") == 1
        assert read(came).headers["connection"] == "close"
        assert len(gate.upstream.asked) == 1
        await gate.at_rest()


def response_event(kind: str, **more: object) -> bytes:
    """An event of a streamed reply of /v1/responses as vLLM writes it."""
    about = {"id": "resp_1", "object": "response", "model": "namesake", **more}
    return (
        f"event: response.{kind}\ndata: ".encode() + compact({"response": about, "type": f"response.{kind}"}) + b"\n\n"
    )


FORGED = [{"type": "function", "name": "f", "parameters": {"type": "object", "usage": {"input_tokens": 1 << 60}}}]
"""A client's tool, which vLLM repeats."""


@pytest.mark.parametrize("whole", [True, False])
@in_a_loop
async def test_of_a_response_that_repeats_the_request_the_clients_own_figures_are_not_believed(
    tmp_path: Path, whole: bool
) -> None:
    async with front(api_keys_file=limited(tmp_path, a="tokens=100000")) as gate:
        usage = {"input_tokens": 30, "output_tokens": 90, "total_tokens": 120}
        last = response_event("completed", tools=FORGED, usage=usage)
        wait = asyncio.Event()
        gate.upstream.script = [response_event("created", tools=FORGED, usage=None), *([last] if whole else [wait])]
        body = json.dumps({**BODIES[RESPONSES], "tools": FORGED, "stream": True}).encode()
        reader, writer = await gate.connect()
        writer.write(head("POST", RESPONSES, of("a"), f"Content-Length: {len(body)}", "Connection: close") + body)
        await reader.readuntil(b"response.completed" if whole else b"response.created")
        if whole:
            await reader.read()
        writer.close()
        await gate.at_rest()
        told = gate.figure('namesake_tokens_total{kind="prompt",version="ccb-v3"}')
        assert told == 30 if whole else 0 < told < 1000
        assert (await gate.ask("POST", RESPONSES, of("a"))).status == 200


@in_a_loop
async def test_figures_of_an_engine_that_hangs_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("namesake_serving.upstream.FIGURES_SECONDS", 0.1)

    async def hang(_self: Upstream, _request: web.Request) -> web.Response:
        await asyncio.sleep(60)
        raise AssertionError

    monkeypatch.setattr(Upstream, "figures", hang)
    async with front() as gate, asyncio.timeout(5):
        reply = await gate.ask("GET", "/metrics")
        assert reply.status == 200
        assert b"namesake_requests_running" in reply.body


async def trickle(gate: Front, first: bytes, drops: bytes, every: float = 0.05) -> tuple[float, bytes]:
    """Send the first bytes, then one at a time for ever; seconds until the server ended it, and what came back."""
    reader, writer = await gate.connect()
    loop = asyncio.get_running_loop()
    begun = loop.time()

    async def drip() -> None:
        while True:
            for drop in drops:
                writer.write(bytes([drop]))
                await asyncio.sleep(every)

    writer.write(first)
    dripping = asyncio.create_task(drip())
    came = b""
    try:
        with suppress(ConnectionError):
            while part := await reader.read(65536):
                came += part
        return loop.time() - begun, came
    finally:
        dripping.cancel()
        writer.close()


@pytest.mark.parametrize(
    ("first", "drops"),
    [(b"", b"\r\n"), (b"GET /", b"a"), (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: ", b"x")],
)
@in_a_loop
async def test_a_head_that_trickles_is_cut_in_time(first: bytes, drops: bytes) -> None:
    async with front(read_seconds=0.3) as gate:
        seconds, came = await trickle(gate, first, drops)
        assert 0.2 < seconds < 2
        assert not came


@pytest.mark.parametrize("more", [b"x" * 66_000, b"\r\nX: y" * 11_000])
@in_a_loop
async def test_a_head_that_does_not_end_is_refused_before_it_fills_the_memory(more: bytes) -> None:
    async with front(read_seconds=10) as gate:
        reader, writer = await gate.connect()
        writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: ")
        await asyncio.sleep(0.05)
        writer.write(more)
        reply = read(await reader.read())
        writer.close()
        assert (reply.status, reply.json["error"]["message"]) == (431, "The head is too long.")
        long = head("GET", "/health", "X: " + "y" * 60_000, "Connection: close")
        assert read(await gate.raw(long)).status == 200


@in_a_loop
async def test_a_client_that_does_not_read_is_cut_and_its_place_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front_module, "STALLED_SECONDS", 0.3)
    async with front() as gate:
        gate.upstream.script = [event("x" * 100_000)] * 200 + [END]
        reader, writer = await gate.connect()
        cast(asyncio.Transport, writer.transport).pause_reading()
        body = json.dumps(STREAM).encode()
        writer.write(head("POST", CHAT, f"Content-Length: {len(body)}") + body)
        await gate.upstream.arrived.wait()
        assert gate.figure("namesake_requests_running") == 1
        await gate.upstream.aborted.wait()
        await gate.at_rest()
        writer.close()
        del reader


@in_a_loop
async def test_a_connection_on_which_nothing_comes_is_cut_in_time() -> None:
    async with front(read_seconds=0.3) as gate:
        begun = asyncio.get_running_loop().time()
        assert await gate.raw(b"") == b""
        assert 0.2 < asyncio.get_running_loop().time() - begun < 2


@in_a_loop
async def test_a_second_head_that_trickles_is_cut_in_time_too() -> None:
    async with front(read_seconds=0.3) as gate:
        seconds, came = await trickle(gate, head("GET", "/health") + b"GET /hea", b"a")
        assert seconds < 2
        assert came.count(b"HTTP/1.1 200 OK") == 1


@pytest.mark.parametrize("kind", ["Content-Length: 1000", "Transfer-Encoding: chunked"])
@in_a_loop
async def test_a_body_that_trickles_is_cut_in_time(kind: str) -> None:
    async with front(read_seconds=0.3) as gate:
        drops = b" " if "Length" in kind else b"1\r\n \r\n"
        seconds, came = await trickle(gate, head("POST", CHAT, kind), drops, 0.02)
        assert 0.2 < seconds < 2
        reply = read(came)
        assert (reply.status, reply.error["type"]) == (408, "invalid_request_error")
        assert reply.headers["connection"] == "close"
        assert not gate.upstream.asked
        await gate.at_rest()


@in_a_loop
async def test_a_stream_may_take_longer_than_a_request() -> None:
    async with front(read_seconds=0.1) as gate:
        more = asyncio.Event()
        gate.upstream.script = [event("我是"), more, event("踩踩背。"), END]
        async with gate.stream() as response:
            asyncio.get_running_loop().call_later(0.4, more.set)
            assert said(await response.read()) == "我是踩踩背。"


@in_a_loop
async def test_a_body_that_trickles_after_an_early_reply_is_cut_in_time() -> None:
    async with front(read_seconds=0.3, keep_alive=0.3) as gate:
        early = head("POST", "/nothing", "Content-Length: 100000")
        async with asyncio.timeout(1.5):
            _, came = await trickle(gate, early, b" ")
        assert came.startswith(b"HTTP/1.1 404 ")


@in_a_loop
async def test_a_connection_that_is_kept_awake_by_empty_lines_is_cut_in_time() -> None:
    async with front(read_seconds=0.3, keep_alive=0.3) as gate:
        async with asyncio.timeout(1.5):
            _, came = await trickle(gate, head("GET", "/health"), b"\r\n")
        assert came.startswith(b"HTTP/1.1 200 ")


@in_a_loop
async def test_a_stream_is_not_cut_by_the_deadline_of_what_came_before_it_on_its_connection() -> None:
    async with front(read_seconds=0.2) as gate:
        more = asyncio.Event()
        gate.upstream.script = [event("我是"), more, event("踩踩背。"), END]
        reader, writer = await gate.connect()
        writer.write(head("POST", "/nothing", "Content-Length: 2"))
        first = await reader.readuntil(b"}}")
        writer.write(b"{}")  # the rest of a body that was answered early
        await asyncio.sleep(0.05)
        body = json.dumps(STREAM).encode()
        writer.write(head("POST", CHAT, f"Content-Length: {len(body)}", "Connection: close") + body)
        asyncio.get_running_loop().call_later(0.4, more.set)
        assert b" 404 " in first
        assert said(read(await reader.read()).body) == "我是踩踩背。"
        writer.close()


@in_a_loop
async def test_more_requests_than_allowed_are_told_to_come_again() -> None:
    async with front(**EVERY, max_requests=2) as gate:
        gate.upstream.begin.clear()
        waiting = [asyncio.create_task(gate.ask("POST", path)) for path in (CHAT, TEXT)]
        while len(gate.upstream.asked) < 2:
            await asyncio.sleep(0.005)
        for _ in range(3):
            reply = await gate.ask("POST", CHAT)
            assert (reply.status, reply.error["type"], reply.error["code"]) == (429, "rate_limit_error", "overloaded")
            assert int(reply.headers["retry-after"]) > 0
        for method, path in ROUTES:
            if path in ENGINES:
                continue
            assert (await gate.ask(method, path)).status == 200
        gate.upstream.begin.set()
        assert {reply.status for reply in await asyncio.gather(*waiting)} == {200}
        await gate.at_rest()
        assert (await gate.ask("POST", CHAT)).status == 200


@in_a_loop
async def test_as_many_wait_for_a_version_that_is_brought_in_as_may_wait_at_all() -> None:
    async with front(max_requests=2) as gate:
        wanted = {**BODIES[CHAT], "model": "ccb-v9"}
        waiting = [asyncio.create_task(gate.ask("POST", CHAT, body=wanted)) for _ in range(2)]
        while gate.serving.summoned < 2:
            await asyncio.sleep(0.005)
        reply = await gate.ask("POST", CHAT, body=wanted)
        assert (reply.status, reply.error["code"], gate.serving.summoned) == (429, "overloaded", 2)
        gate.serving.brought_in.set()
        assert {reply.status for reply in await asyncio.gather(*waiting)} == {404}
        assert (await gate.ask("POST", CHAT)).status == 200


@in_a_loop
async def test_bodies_that_trickle_take_nobodys_place() -> None:
    async with front(max_requests=2, read_seconds=5) as gate:
        slow = [await gate.connect() for _ in range(2)]
        for _, writer in slow:
            writer.write(head("POST", CHAT, "Content-Length: 1000") + b" ")
        await asyncio.sleep(0.1)
        status = (await gate.ask("POST", CHAT)).status
        for _, writer in slow:
            writer.close()
        assert status == 200


# --------------------------------------------------------------------------------------------------- when things end


def told_to_come_again(reply: Reply) -> bool:
    """Whether it is a 503 that says when to try again."""
    return (
        reply.status == 503
        and reply.error["type"] == "server_error"
        and reply.error["code"] == "unavailable"
        and int(reply.headers["retry-after"]) > 0
    )


@in_a_loop
async def test_with_nothing_live_the_gateway_is_alive_and_not_ready() -> None:
    async with front() as gate:
        gate.serving.traffic.live = None
        for method, path in [("POST", CHAT), ("POST", TEXT), ("GET", "/ready")]:
            assert told_to_come_again(await gate.ask(method, path))
        for path in ("/health", "/v1/models", "/v1/version", "/metrics"):
            assert (await gate.ask("GET", path)).status == 200
        await gate.at_rest()


@in_a_loop
async def test_a_gateway_that_stops_lets_answers_finish_and_takes_no_more() -> None:
    async with front() as gate:
        more = asyncio.Event()
        gate.upstream.script = [event("我是"), more, event("踩踩背。"), END]
        async with gate.stream() as response:
            first = await response.content.readuntil(b"\n\n")
            gate.gateway.draining = True
            for method, path in [("POST", CHAT), ("POST", TEXT), ("GET", "/ready")]:
                assert told_to_come_again(await gate.ask(method, path))
            assert (await gate.ask("GET", "/health")).status == 200
            more.set()
            assert said(first + await response.read()) == "我是踩踩背。"
        assert len(gate.upstream.asked) == 1


@pytest.mark.parametrize("ends", [True, False])
@in_a_loop
async def test_a_server_that_is_told_to_stop_listens_until_running_answers_have_ended_or_their_time_is_up(
    ends: bool,
) -> None:
    async with upstream() as engine:
        more = asyncio.Event()
        engine.script = [event("我是"), more, event("踩踩背。"), END]
        serving, chosen = Serving(), settings.read(shutdown_seconds=10 if ends else 1)
        serving.traffic.live = live(engine)
        gateway = Gateway(cast(Service, serving), chosen)
        server, listening = Server(gateway, chosen), listen("127.0.0.1", 0)
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        fronting = asyncio.create_task(server.serve(sockets=[listening]))
        async with aiohttp.ClientSession() as http, http.post(f"{url}{CHAT}", json=STREAM) as response:
            first = await response.content.readuntil(b"\n\n")
            gateway.draining = server.should_exit = True  # what a signal does
            await asyncio.sleep(0.3)
            for _ in range(3):
                async with aiohttp.ClientSession() as other, other.post(f"{url}{CHAT}", json=STREAM) as refused:
                    assert (refused.status, int(refused.headers["retry-after"]) > 0) == (503, True)
            assert not fronting.done()
            if ends:
                more.set()
                assert said(first + await response.read()) == "我是踩踩背。"
            else:
                with pytest.raises(aiohttp.ClientError):
                    await response.read()
            await asyncio.wait_for(fronting, 5)
        await gateway.close()


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("begun", [True, False])
@in_a_loop
async def test_when_the_client_has_gone_the_engine_is_told_to_stop(streamed: bool, begun: bool) -> None:
    async with front() as gate:
        never = asyncio.Event()
        gate.upstream.script = [event("我是"), never]
        if not (streamed and begun):
            gate.upstream.begin.clear()
        reader, writer = await gate.connect()
        body = json.dumps({**BODIES[CHAT], "stream": streamed}).encode()
        writer.write(head("POST", CHAT, f"Content-Length: {len(body)}") + body)
        await gate.upstream.arrived.wait()
        if streamed and begun:
            await reader.readuntil(b"data: ")
        assert (gate.live.running, gate.figure("namesake_requests_running")) == (1, 1)
        writer.transport.abort() if begun else writer.close()
        await gate.upstream.aborted.wait()
        await gate.at_rest()


@in_a_loop
async def test_a_client_that_goes_before_its_body_is_there_or_while_the_door_is_held_leaves_nothing_behind() -> None:
    async with front() as gate:
        for held in (False, True):
            if held:
                assert await gate.serving.traffic.hold(1)
            _, writer = await gate.connect()
            body = json.dumps(BODIES[CHAT]).encode()
            writer.write(head("POST", CHAT, f"Content-Length: {len(body)}") + body[: None if held else 10])
            while held and not gate.figure("namesake_requests_running"):
                await asyncio.sleep(0.005)
            await asyncio.sleep(0.03)
            writer.transport.abort()
            await gate.at_rest()
        gate.serving.traffic.release()
        await asyncio.sleep(0.03)
        assert not gate.upstream.asked


@pytest.mark.parametrize("script", [[DIE], [DIE, DIE]], ids=["before its reply", "in the middle of a whole reply"])
@in_a_loop
async def test_when_the_engine_ends_before_the_client_has_anything_it_is_told_to_come_again(script: list[str]) -> None:
    async with front() as gate:
        gate.upstream.script = script
        assert told_to_come_again(await gate.ask("POST", CHAT))
        assert told_to_come_again(await gate.ask("POST", TEXT))
        await gate.at_rest()


@in_a_loop
async def test_when_the_engine_ends_before_the_first_event_the_client_is_told_to_come_again() -> None:
    async with front() as gate:
        for script in ([DIE], [HEAD, DIE]):
            gate.upstream.script = script
            assert told_to_come_again(await gate.ask("POST", CHAT, body=STREAM))
        await gate.at_rest()


@in_a_loop
async def test_a_stream_of_no_event_is_passed_on() -> None:
    async with front() as gate:
        gate.upstream.script = [HEAD]
        reply = await gate.ask("POST", CHAT, body=STREAM)
        assert (reply.status, reply.body) == (200, b"")
        await gate.at_rest()


@in_a_loop
async def test_an_engine_that_is_not_there_is_told_of_in_the_same_way(tmp_path: Path) -> None:
    async with front() as gate:
        gate.serving.traffic.live = live(tmp_path / "nothing.sock")
        for path in (CHAT, TEXT):
            assert told_to_come_again(await gate.ask("POST", path))
        assert (await gate.ask("GET", "/metrics")).status == 200
        await gate.at_rest()


@in_a_loop
async def test_a_connection_that_has_rested_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    assert upstream_module.IDLE_SECONDS < vllm.envs.VLLM_HTTP_TIMEOUT_KEEP_ALIVE  # else it may just be closed
    monkeypatch.setattr(upstream_module, "IDLE_SECONDS", 0.3)
    async with front() as gate:
        for rest in (0, 0.6, 0):
            await asyncio.sleep(rest)
            assert (await gate.ask("POST", CHAT)).status == 200
        first, second, third = gate.upstream.connections
    assert first is not second
    assert second is third


@in_a_loop
@pytest.mark.parametrize("body", [BODIES[CHAT], STREAM], ids=["whole", "streamed"])
async def test_a_connection_that_is_closed_just_as_it_is_used_again_costs_no_request(body: dict[str, Any]) -> None:
    async with front() as gate:
        assert (await gate.ask("POST", CHAT)).status == 200
        gate.upstream.drop = 1
        assert (await gate.ask("POST", CHAT, body=body)).status == 200
        gate.upstream.drop = 2  # no accident: the engine takes no request
        assert told_to_come_again(await gate.ask("POST", CHAT, body=body))
        assert len(gate.upstream.asked) == 5
        await gate.at_rest()


@in_a_loop
async def test_an_engine_that_had_the_request_when_it_ended_is_told_from_one_that_is_not_there(tmp_path: Path) -> None:
    async with upstream() as engine:
        engine.script, sockets = [DIE], Sockets()
        body = json.dumps(BODIES[CHAT]).encode()
        with pytest.raises(Cut):
            async with sockets.post(live(engine), CHAT, body):
                pass
        with pytest.raises(Gone) as caught:
            async with sockets.post(live(tmp_path / "nothing.sock"), CHAT, body):
                pass
        assert not isinstance(caught.value, Cut)
        await sockets.close()


@in_a_loop
async def test_when_the_engine_ends_in_the_middle_of_a_stream_the_client_sees_that_it_is_cut() -> None:
    async with front() as gate:
        more = asyncio.Event()
        gate.upstream.script = [event("我是"), more, DIE]
        body = json.dumps(STREAM).encode()
        reader, writer = await gate.connect()
        writer.write(head("POST", CHAT, f"Content-Length: {len(body)}") + body)
        came = await reader.readuntil(b"\n\n\r\n")
        more.set()
        came += await reader.read()
        writer.close()
        assert b"HTTP/1.1 200 OK" in came
        assert "我是".encode() in came
        assert not came.endswith(b"0\r\n\r\n")
        with pytest.raises(http.client.IncompleteRead):
            read(came)
        await gate.at_rest()
        assert gate.figure(f'namesake_requests_total{{route="{CHAT}",status="503",version="ccb-v3"}}') == 1
        async with gate.stream() as response:
            with pytest.raises(aiohttp.ClientPayloadError):
                await response.read()


@in_a_loop
async def test_a_fault_of_the_gateway_itself_is_a_500_in_openais_shape_that_tells_no_secret() -> None:
    async with front() as gate:
        broken = live(gate.upstream)
        broken.system = cast(str, {"secret"})  # no JSON
        gate.serving.traffic.live = broken
        reply = await gate.ask("POST", CHAT)
        assert (reply.status, reply.error["type"]) == (500, "server_error")
        assert b"secret" not in reply.body
        await gate.at_rest()


async def wrong_model(gate: Front) -> None:
    """Refused by the model's name, once the request is let in."""
    assert (await gate.ask("POST", CHAT, body={"model": "x"})).status == 404


async def wrong_body(gate: Front) -> None:
    """Refused by its body, or failed by it."""
    assert (await gate.ask("POST", CHAT, body=b"{")).status in (400, 500)


async def well(gate: Front) -> None:
    """Answered, whole and streamed."""
    assert (await gate.ask("POST", CHAT)).status == 200
    async with gate.stream() as response:
        await response.read()


async def cut(gate: Front) -> None:
    """The engine dies in the middle of a stream."""
    gate.upstream.script = [event("我"), DIE]
    async with gate.stream() as response:
        with pytest.raises(aiohttp.ClientPayloadError):
            await response.read()


async def gone(gate: Front) -> None:
    """The client goes in the middle of a stream."""
    gate.upstream.script = [event("我"), asyncio.Event()]
    async with gate.stream() as response:
        await response.content.readuntil(b"\n\n")
        response.close()


@pytest.mark.parametrize("end", [well, wrong_model, wrong_body, cut, gone])
@in_a_loop
async def test_after_every_kind_of_end_nothing_is_counted_and_the_place_is_free(
    end: Callable[[Front], Awaitable[None]],
) -> None:
    async with front(max_requests=1) as gate:
        for _ in range(3):
            await end(gate)
            await gate.at_rest()
        gate.upstream.script = [event("我"), END]
        assert (await gate.ask("POST", CHAT)).status == 200
        await gate.at_rest()
        assert gate.live.idle.is_set()


@in_a_loop
async def test_many_requests_on_one_connection_are_answered_each() -> None:
    async with front() as gate:
        url = f"http://127.0.0.1:{gate.port}"
        for _ in range(20):
            async with gate.http.post(url + CHAT, json=BODIES[CHAT]) as response:
                assert (await response.json())["model"] == "ccb-v3"
            async with gate.http.get(url + "/nothing") as response:
                assert response.status == 404
        await gate.at_rest()


@in_a_loop
async def test_no_reply_waits_for_the_clients_acknowledgement_of_its_head() -> None:
    async with front() as gate:
        took = []
        for _ in range(10):
            begun = time.perf_counter()
            async with gate.http.post(f"http://127.0.0.1:{gate.port}{CHAT}", json=BODIES[CHAT]) as response:
                await response.read()
            took.append(time.perf_counter() - begun)
        assert sorted(took)[len(took) // 2] < 0.03  # Linux acknowledges after 40 ms


@in_a_loop
async def test_a_client_that_asks_before_it_sends_its_body_is_told_to_send_it() -> None:
    async with front() as gate:
        body = json.dumps(BODIES[CHAT]).encode()
        reader, writer = await gate.connect()
        writer.write(head("POST", CHAT, f"Content-Length: {len(body)}", "Expect: 100-continue", "Connection: close"))
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(body)
        assert read(await reader.read()).status == 200
        writer.close()


@in_a_loop
async def test_sixty_four_streams_at_once_each_get_their_own_events() -> None:
    async with front() as gate:
        gate.upstream.script = [*(event(letter) for letter in "踩踩背是老爷爷做的"), END]

        async def one() -> str:
            async with gate.stream() as response:
                return said(await response.read())

        async with asyncio.TaskGroup() as tasks:
            streams = [tasks.create_task(one()) for _ in range(64)]
        assert {stream.result() for stream in streams} == {"踩踩背是老爷爷做的"}
        await gate.at_rest()


# --------------------------------------------------------------------------------------------------- figures


@in_a_loop
async def test_the_figures_count_requests_by_route_status_and_version_and_have_the_engines() -> None:
    async with front() as gate:
        await gate.ask("POST", CHAT)
        await gate.ask("POST", CHAT, body=STREAM)
        await gate.ask("POST", TEXT, body={"model": "x", "prompt": "x"})
        for target in ("/a", "/b", "/v1/models/"):
            await gate.ask("GET", target)
        await gate.ask("GET", "/health", host="evil.example")
        reply = await gate.ask("GET", "/metrics")
        assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
        text = reply.body.decode()
        for figure in (
            f'namesake_requests_total{{route="{CHAT}",status="200",version="ccb-v3"}} 2.0',
            f'namesake_requests_total{{route="{TEXT}",status="404",version=""}} 1.0',
            'namesake_requests_total{route="other",status="404",version=""} 3.0',
            'namesake_requests_total{route="/health",status="400",version=""} 1.0',
            'namesake_time_to_first_token_seconds_count{version="ccb-v3"} 2.0',
            "namesake_requests_running 0.0",
            "vllm:num_requests_running 7.0",
        ):
            assert figure in text.splitlines(), figure


@in_a_loop
async def test_a_client_that_has_gone_is_counted_as_such() -> None:
    async with front() as gate:
        gate.upstream.begin.clear()
        _, writer = await gate.connect()
        body = json.dumps(BODIES[CHAT]).encode()
        writer.write(head("POST", CHAT, f"Content-Length: {len(body)}") + body)
        await gate.upstream.arrived.wait()
        writer.transport.abort()
        await gate.upstream.aborted.wait()
        await gate.at_rest()
        await asyncio.sleep(0.01)
        assert gate.figure(f'namesake_requests_total{{route="{CHAT}",status="499",version="ccb-v3"}}') == 1


@in_a_loop
async def test_the_figures_are_there_when_the_engine_has_none() -> None:
    async with front() as gate:
        gate.serving.traffic.live = None
        reply = await gate.ask("GET", "/metrics")
        assert reply.status == 200
        assert b"namesake_requests_running" in reply.body
        assert b"vllm:" not in reply.body
