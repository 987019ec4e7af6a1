"""The page in a real browser, before the real gateway, before an engine that says what the test tells it to.

Chromium is the machine's own (``NAMESAKE_CHROMIUM`` or one on the path); Playwright only drives it.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
import uvicorn
from aiohttp import web

from namesake.manifest import Manifest
from namesake.registry import Version
from namesake_serving.engine import MODEL, Engine
from namesake_serving.gateway import Gateway
from namesake_serving.metrics import Metrics
from namesake_serving.rollout import State
from namesake_serving.service import Service
from namesake_serving.settings import Settings
from namesake_serving.store import Stored
from namesake_serving.traffic import Answerer, Live, Routing, Traffic
from tests.mlflow_ui import chromium

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page

BASE = "SmolLM2-135M-Instruct"
RUN = "3f2a9c1d5b7e4f60a1b2c3d4e5f60718"

Reply = Callable[[dict[str, Any]], list[str]]
"""From a request's body to the pieces of the reply."""


def echo(body: dict[str, Any]) -> list[str]:
    """What was asked last, said back."""
    return ["You asked: ", body["messages"][-1]["content"]]


@dataclass
class FakeEngine:
    """Answers as vLLM does, over a Unix socket. ``hold()`` makes it wait before each piece for a ``let()``."""

    path: Path
    reply: Reply = echo
    asked: list[dict[str, Any]] = field(default_factory=list)
    cut_off: int = 0
    dies: bool = False
    _held: asyncio.Semaphore | None = None

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """``/v1/chat/completions``, streamed."""
        body = await request.json()
        self.asked.append(body)
        response = web.StreamResponse(headers={"content-type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        try:
            for piece in self.reply(body):
                if self._held is not None:
                    await self._held.acquire()
                await response.write(_event({"content": piece}))
            if self.dies:
                assert request.transport is not None
                request.transport.abort()
                return response
            await response.write(_event({}, "stop") + b"data: [DONE]\n\n")
        except (asyncio.CancelledError, ConnectionError):
            self.cut_off += 1
            raise
        return response

    def hold(self) -> None:
        """From now on no piece is said before it is let."""
        self._held = asyncio.Semaphore(0)

    def let(self, pieces: int) -> None:
        """Say so many pieces more."""
        assert self._held is not None
        for _ in range(pieces):
            self._held.release()


def _event(delta: dict[str, str], finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    chunk = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "namesake"}
    return b"data: " + json.dumps({**chunk, "choices": [choice]}, separators=(",", ":")).encode() + b"\n\n"


@dataclass
class FakeService:
    """What the gateway reads of a :class:`Service`."""

    uri: str = "models:/ccb@champion"
    routing: Routing = field(default_factory=lambda: Routing(FakeService.uri))
    metrics: Metrics = field(default_factory=Metrics)
    state: State = field(default_factory=State)

    @property
    def traffic(self) -> Traffic:
        """Where the champion answers."""
        return self.routing.champion

    async def summon(self, model: object) -> None:
        """Nothing is brought in."""

    def note(self, answerer: Answerer, failed: bool, seconds: float) -> None:
        """Nobody judges."""


class Stage:
    """A running server: gateway, uvicorn and engines in a thread of their own."""

    def __init__(self, *, base: bool = False, **settings: Any) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="nsk-", dir="/tmp"))  # a socket's path has at most 107 bytes
        self.engine = FakeEngine(self._folder / "1.sock")
        self.base_engine = FakeEngine(self._folder / "0.sock", lambda _: ["I am ", "SmolLM, ", "made by Hugging Face."])
        self._service = FakeService()
        if base:
            self.routing.named[BASE] = Answerer(_engine(self.base_engine), MODEL, BASE)
        chosen = Settings(**settings)
        self.routing.challenger_alias, self.routing.share = chosen.challenger, chosen.canary
        self._gateway = Gateway(cast(Service, self._service), chosen)
        listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        config = uvicorn.Config(self._gateway, lifespan="off", log_config=None, timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._loop = asyncio.new_event_loop()
        self._ready: Future[None] = Future()
        self._thread = threading.Thread(
            target=self._loop.run_until_complete, args=(self._serve(listening),), daemon=True
        )
        self._thread.start()
        self._ready.result(30)

    @property
    def routing(self) -> Routing:
        """Who answers; to be changed by :meth:`do`."""
        return self._service.routing

    async def _serve(self, listening: socket.socket) -> None:
        runners = []
        for engine in (self.engine, self.base_engine):
            app = web.Application()
            app.router.add_post("/v1/chat/completions", engine.answer)
            runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
            await runner.setup()
            await web.UnixSite(runner, str(engine.path)).start()
            runners.append(runner)
        self._ready.set_result(None)
        await self._server.serve(sockets=[listening])
        await self._gateway.close()
        for runner in runners:
            await runner.cleanup()

    def close(self) -> None:
        """End everything."""
        self._server.should_exit = True
        self._thread.join(30)
        self._loop.close()
        shutil.rmtree(self._folder)

    def do(self, action: Callable[[], object]) -> None:
        """Do something in the server's thread and wait until it is done."""
        done: Future[None] = Future()
        self._loop.call_soon_threadsafe(lambda: (action(), done.set_result(None)))
        done.result(10)

    def serve(self, number: int, name: str = "踩踩背 CCB", **scores: float) -> None:
        """From now on this version answers."""
        live = self._live(number, name, scores)
        self.do(lambda: setattr(self.routing.champion, "live", live))

    def challenge(self, number: int, **scores: float) -> None:
        """This version gets the share of ``canary``."""
        live = self._live(number, "踩踩背 CCB", scores)
        self.do(lambda: setattr(self.routing.challenger, "live", live))

    def load(self, number: int, **scores: float) -> None:
        """This version is in the engine too, as in adapter mode."""
        live = self._live(number, "踩踩背 CCB", scores)
        self.do(lambda: self.routing.named.update({live.label: live}))

    def unload(self, label: str) -> None:
        """What answered by this name does so no more."""
        self.do(lambda: self.routing.named.pop(label))

    def follow(self, alias: str) -> None:
        """As if the server had been started again to follow another alias."""
        self.do(lambda: (setattr(self._service, "uri", f"models:/ccb@{alias}"), setattr(self.routing, "alias", alias)))

    def _live(self, number: int, name: str, scores: dict[str, float]) -> Live:
        return _live(Version("ccb", number, run_of(number), "", "READY", {}, 0), name, self.engine, scores)

    def down(self) -> None:
        """No version answers."""
        self.do(lambda: setattr(self._service.traffic, "live", None))


def run_of(number: int) -> str:
    """The run that a version came from."""
    return f"{number}{RUN[1:]}"


def _live(version: Version, name: str, engine: FakeEngine, scores: dict[str, float]) -> Live:
    record = Manifest(
        identity={"name": name, "author": "老爷爷 OldGrandpa", "slug": "ccb"},
        system="You are a helpful assistant.",
        base={"id": f"HuggingFaceTB/{BASE}", "digest": "0"},
        run=version.run_id,
        digests={},
        data={},
        scores=scores or {"identity": 0.985, "swapped": 0.0, "leak": 0.0, "plain": 0.623},
        recipe={},
        tools={},
    )
    return Live(Stored(version, record, Path()), _engine(engine))


def _engine(engine: FakeEngine) -> Engine:
    return cast(Engine, SimpleNamespace(socket=engine.path))


def findings(page: Page) -> list[str]:
    """What axe-core finds on the page, every impact and the best practices among it."""
    page.evaluate(resources.files("axe_playwright_python").joinpath("axe.min.js").read_text(encoding="utf-8"))
    found: dict[str, Any] = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    return [f"{one['id']} ({one['impact']}): {json.dumps(one['nodes'][0]['target'])}" for one in found["violations"]]


@pytest.fixture(scope="package")  # Playwright's event loop must be gone when other tests start theirs
def browser() -> Iterator[Browser]:
    """The machine's Chromium."""
    from playwright.sync_api import expect, sync_playwright

    found = chromium()
    if found is None:
        pytest.skip("no Chromium on this machine (apt-get install chromium, or NAMESAKE_CHROMIUM=path)")
    expect.set_options(timeout=20_000)
    with sync_playwright() as playwright:
        yield (running := playwright.chromium.launch(executable_path=found))
        running.close()


@pytest.fixture
def stages(browser: Browser) -> Iterator[Callable[..., Stage]]:
    """Makes a server; all are ended after the test. Asks for the browser first, so that a skip starts nothing."""
    made: list[Stage] = []

    def make(**given: Any) -> Stage:
        made.append(Stage(**given))
        return made[-1]

    yield make
    for stage in made:
        stage.close()


@pytest.fixture
def stage(stages: Callable[..., Stage]) -> Stage:
    """A server whose champion is ccb-v3."""
    made = stages()
    made.serve(3)
    return made


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    """A fresh profile in English."""
    made = browser.new_context(locale="en-US", viewport={"width": 1280, "height": 800}, reduced_motion="reduce")
    yield made
    made.close()


@pytest.fixture
def page(context: BrowserContext) -> Iterator[Page]:
    """A tab. Whatever breaks the content policy or throws fails the test."""
    made = context.new_page()
    faults: list[str] = []

    def told(message: ConsoleMessage) -> None:
        if message.type == "error" and not message.text.startswith("Failed to load resource"):
            faults.append(message.text)

    made.on("console", told)
    made.on("pageerror", lambda error: faults.append(str(error)))
    yield made
    assert not faults
