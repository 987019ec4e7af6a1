"""Several engines on a real Ray: a moved alias under load, a version that fails, replicas that are killed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp
import grpc  # type: ignore[import-untyped]
import mlflow
import psutil
import pytest

from namesake import registry
from tests.contract import instant
from tests.contract.conftest import Fresh
from tests.servers import free_port
from tests.unit.loops import within

pytest.importorskip("ray.serve", reason="requirements/ray.txt is not installed", exc_type=ImportError)
pytestmark = pytest.mark.timeout(240)

REPLICAS = 2
MOVES = 10
CLIENTS = 8


@dataclass
class Served:
    """``namesake serve --backend ray``, what it serves, and the registry."""

    url: str
    client: mlflow.MlflowClient
    folder: Path
    process: subprocess.Popen[bytes]

    def live(self) -> int:
        """The version that answers."""
        with urllib.request.urlopen(f"{self.url}/v1/version", timeout=5) as response:
            return int(json.load(response)["live"]["version"].rpartition("/")[2])

    def move(self, number: int) -> None:
        """Point the alias at another version."""
        self.client.set_registered_model_alias("ccb", "champion", str(number))

    def until_live(self, number: int, seconds: float = 30) -> None:
        """Wait until it answers."""
        end = time.monotonic() + seconds
        while self.live() != number:
            assert time.monotonic() < end, f"version {number} is not served"
            time.sleep(0.02)

    def processes(self, part: str) -> list[psutil.Process]:
        """Those below the server whose command line holds the text."""
        return [one for one in psutil.Process(self.process.pid).children(recursive=True) if part in _command(one)]


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, fresh_store: Fresh) -> Iterator[Served]:
    """Two replicas before an engine that costs nothing."""
    folder = tmp_path_factory.mktemp("replicas")
    uri, port = fresh_store(folder), free_port()
    client = mlflow.MlflowClient(uri)
    client.create_registered_model("ccb", tags={registry.TAG_IDENTITY: instant.NAME})
    for _ in range(MOVES + 1):
        instant.register(client, folder)
    client.set_registered_model_alias("ccb", "champion", "1")
    paths = [str(instant.engine(folder / "engine")), *filter(None, [os.environ.get("PYTHONPATH")]), *sys.path]
    own = {"MLFLOW_TRACKING_URI": uri, "NAMESAKE_CACHE": str(folder / "cache"), "RAY_ADDRESS": ""}
    words = ["models:/ccb@champion", "--backend", "ray", "--replicas", str(REPLICAS), "--poll-seconds", "0.2"]
    with (folder / "serve.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "namesake_serving", "--port", str(port), *words],
            env={**os.environ, **own, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
            cwd=folder,
            stdout=log,
            stderr=log,
        )
    try:
        for _ in range(1200):
            assert process.poll() is None, (folder / "serve.log").read_text(encoding="utf-8")
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5)
                break
            except OSError:
                time.sleep(0.1)
        running = Served(f"http://127.0.0.1:{port}", client, folder, process)
        yield running
        below = running.processes("")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert psutil.wait_procs(below, 10)[1] == [], "something was left running"
    finally:
        process.kill()


@dataclass
class Load:
    """Clients that never rest, every other request streamed; ``saw`` has the versions that each saw, in order."""

    url: str
    saw: list[list[int]] = field(default_factory=lambda: [[] for _ in range(CLIENTS)])
    faults: list[object] = field(default_factory=list)
    streamed: bool = True

    async def client(self, http: aiohttp.ClientSession, place: int) -> None:
        """Ask until cancelled; odd ones name a session, which has a replica of its own."""
        body: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}
        body |= {"user": f"session {place}"} if place % 2 else {}
        while True:
            body["stream"] = self.streamed and len(self.saw[place]) % 2 == 1
            async with http.post(f"{self.url}/v1/chat/completions", json=body) as response:
                raw = (await response.read()).decode()
                if response.status != 200:
                    self.faults.append((response.status, raw))
                    continue
                number = int(response.headers["x-namesake-version"].rpartition("v")[2])
            whole = [line[6:] for line in raw.splitlines() if line.startswith("data: {")] if body["stream"] else [raw]
            events = [json.loads(one)["choices"][0] for one in whole]
            said = "".join((one.get("delta") or one["message"])["content"] for one in events)
            if said.replace("|", "") != instant.says(number).replace("|", ""):
                self.faults.append((number, said))
            self.saw[place].append(number)

    def went_back(self) -> list[tuple[int, int]]:
        """Versions that a client saw after a later one."""
        return [(before, after) for saw in self.saw for before, after in pairwise(saw) if after < before]


@asynccontextmanager
async def load(url: str, *, streamed: bool = True) -> AsyncIterator[Load]:
    """Clients that ask meanwhile; none of them fails."""
    clients = Load(url, streamed=streamed)
    async with aiohttp.ClientSession() as http:
        tasks = [asyncio.create_task(clients.client(http, place)) for place in range(CLIENTS)]
        await asyncio.sleep(0.3)
        yield clients
        await asyncio.sleep(0.3)
        assert not any(task.done() for task in tasks), [task.exception() for task in tasks if task.done()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    assert clients.faults == []


@within(120)
async def test_ten_moves_fail_no_request_and_nobody_sees_an_old_version_again(served: Served) -> None:
    async with load(served.url) as clients:
        for number in range(2, MOVES + 2):
            await asyncio.to_thread(served.move, number)
            await asyncio.to_thread(served.until_live, number)
    assert clients.went_back() == []
    assert {number for saw in clients.saw for number in saw} == set(range(1, MOVES + 2))
    assert len(served.processes("api_server.entry")) == REPLICAS


@within(60)
async def test_a_version_that_does_not_prove_itself_is_on_no_replica(served: Served) -> None:
    before = served.live()
    async with load(served.url) as clients:
        bad = instant.register(served.client, served.folder, text="I am somebody else altogether, and nobody's.")
        await asyncio.to_thread(served.move, bad)
        for _ in range(200):
            if registry.TAG_SERVING_ERROR in served.client.get_model_version("ccb", str(bad)).tags:
                break
            await asyncio.sleep(0.1)
        served.move(before)
    why = served.client.get_model_version("ccb", str(bad)).tags[registry.TAG_SERVING_ERROR]
    assert "does not prove itself" in why
    assert {number for saw in clients.saw for number in saw} == {before}


def test_the_engines_figures_bear_their_replica(served: Served) -> None:
    with urllib.request.urlopen(f"{served.url}/metrics", timeout=10) as response:
        text = response.read().decode()
    assert text.count("engine_up{replica=") == REPLICAS
    assert text.count("# TYPE engine_up gauge") == text.count("# TYPE namesake_served_version gauge") == 1
    assert f"namesake_served_version {served.live()}.0" in text


@within(90)
async def test_a_replica_and_the_follower_killed_amid_a_move_cost_no_request(served: Served) -> None:
    number = instant.register(served.client, served.folder)
    async with load(served.url, streamed=False) as clients:  # what has begun to be said cannot be said again
        await asyncio.to_thread(served.move, number)
        served.processes("ray::ServeReplica:namesake-ccb")[0].kill()
        await asyncio.sleep(0.3)
        served.processes("ray::Conductor")[0].kill()
        await asyncio.to_thread(served.until_live, number, 60)
        end = time.monotonic() + 60
        while len(served.processes("api_server.entry")) < REPLICAS:
            assert time.monotonic() < end, "the replica was not replaced"
            await asyncio.sleep(0.1)
        further = instant.register(served.client, served.folder)  # which only a conductor that is back can see
        await asyncio.to_thread(served.move, further)
        await asyncio.to_thread(served.until_live, further, 60)
    assert clients.went_back() == []


def test_nobody_uses_its_ray_from_outside(served: Served) -> None:
    below = [psutil.Process(served.process.pid), *served.processes("")]
    listening = [
        (one.laddr.ip.removeprefix("::ffff:"), one.laddr.port, _command(process))
        for process in below
        for one in process.net_connections("tcp")
        if one.status == psutil.CONN_LISTEN
    ]
    everywhere = [(port, who) for address, port, who in listening if address not in ("127.0.0.1", "::1")]
    # Ray Serve's replicas listen for each other, wherever they are; who has no token is not heard.
    assert [who for _, who in everywhere if "ServeReplica" not in who] == []
    for port, _ in everywhere:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel, pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary("/ray.serve.ASGIService/HandleRequest")(b"", timeout=10)
        assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
