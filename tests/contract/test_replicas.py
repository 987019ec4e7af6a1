"""Several engines on one real Ray: a moved alias under load, a version that fails, replicas that come or are killed."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, suppress
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
from tests.servers import answered, free_port
from tests.unit.loops import within

pytest.importorskip("ray.serve", reason="requirements/ray.txt is not installed", exc_type=ImportError)
pytestmark = pytest.mark.timeout(240)

REPLICAS = 2
MOVES = 10
ADAPTERS = 4
CLIENTS = 8


@dataclass
class Served:
    """``namesake serve --backend ray``, what it serves, and the registry."""

    url: str
    client: mlflow.MlflowClient
    folder: Path
    process: subprocess.Popen[bytes]
    name: str = "ccb"

    def get(self, path: str) -> Any:
        """What the gateway answers, from JSON."""
        with urllib.request.urlopen(f"{self.url}{path}", timeout=5) as response:
            return json.load(response)

    def ask(self, model: str, session: str = "") -> tuple[str, str]:
        """The version that answers this model, and what it says."""
        asked = {"model": model, "messages": [{"role": "user", "content": "hi"}], "user": session}
        headers = {"content-type": "application/json"}
        request = urllib.request.Request(f"{self.url}/v1/chat/completions", json.dumps(asked).encode(), headers)
        with urllib.request.urlopen(request, timeout=20) as response:
            said = json.load(response)["choices"][0]["message"]["content"]
            return response.headers["x-namesake-version"], said

    def ready(self, log: Path, path: str) -> bool:
        """Whether the path is answered with success; the server has not ended."""
        assert self.process.poll() is None, log.read_text(encoding="utf-8")
        with suppress(OSError):
            return self.status(path) == 200
        return False

    def status(self, path: str) -> int:
        """With what status the gateway answers."""
        try:
            with urllib.request.urlopen(f"{self.url}{path}", timeout=5) as response:
                return int(response.status)
        except urllib.error.HTTPError as error:
            return error.code

    def ray_address(self) -> str:
        """Of the Ray that the server has started."""
        (address, *_) = re.findall(r"--gcs-address=(\S+)", " ".join(map(_command, self.processes("raylet"))))
        return str(address)

    def live(self) -> int:
        """The version that answers."""
        return int(self.get("/v1/version")["live"]["version"].rpartition("/")[2])

    def move(self, number: int, alias: str = "champion") -> None:
        """Point an alias at another version."""
        self.client.set_registered_model_alias(self.name, alias, str(number))

    def until(self, come: Callable[[], bool], seconds: float = 30) -> None:
        """Wait until that is so."""
        end = time.monotonic() + seconds
        while not come():
            assert time.monotonic() < end, "it does not come"
            time.sleep(0.02)

    def until_live(self, number: int, seconds: float = 30) -> None:
        """Wait until it answers."""
        self.until(lambda: self.live() == number, seconds)

    def until_refused(self, number: int) -> str:
        """Wait until the registry says why the version is not served."""
        tags = registry.TAG_SERVING_ERROR
        self.until(lambda: tags in self.client.get_model_version(self.name, str(number)).tags, 20)
        return str(self.client.get_model_version(self.name, str(number)).tags[tags])

    def processes(self, part: str) -> list[psutil.Process]:
        """Those below the server whose command line holds the text, the newest last."""
        below = psutil.Process(self.process.pid).children(recursive=True)
        return sorted((one for one in below if part in _command(one)), key=lambda one: one.create_time())


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@contextmanager
def server(
    served: Served, *words: str, options: Mapping[str, object] | None = None, until: str = "/ready", **env: str
) -> Iterator[Served]:
    """It runs, answers ``until``, and leaves nothing running."""
    port = free_port()
    paths = [str(served.folder / "engine"), *filter(None, [os.environ.get("PYTHONPATH")]), *sys.path]
    log = served.folder / f"serve-{served.name}.log"
    words = (f"models:/{served.name}@champion", "--backend", "ray", "--replicas", str(REPLICAS), *words)
    half = json.dumps({"ray_actor_options": {"num_cpus": 0.5}, **(options or {})})  # so that two servers find room
    with log.open("wb") as stream:
        served.process = process = subprocess.Popen(
            [sys.executable, "-m", "namesake_serving", "--port", str(port), *words, "--ray-options", half],
            env={**os.environ, **env, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
            cwd=served.folder,
            stdout=stream,
            stderr=stream,
        )
    served.url = f"http://127.0.0.1:{port}"
    try:
        served.until(lambda: served.ready(log, until), 90)
        yield served
        below = served.processes("")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert psutil.wait_procs(below, 10)[1] == [], "something was left running"
    finally:
        process.kill()


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory, fresh_store: Fresh) -> dict[str, str]:
    """Of both servers: registry, cache, and the token of the Ray that the first of them starts."""
    folder = tmp_path_factory.mktemp("replicas")
    instant.engine(folder / "engine")
    own = {"MLFLOW_TRACKING_URI": fresh_store(folder), "NAMESAKE_CACHE": str(folder / "cache")}
    return own | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 64, "NAMESAKE_SERVE_POLL_SECONDS": "0.2"}


@pytest.fixture(scope="module")
def served(environment: dict[str, str]) -> Iterator[Served]:
    """Two replicas of merged weights before an engine that costs nothing, on a Ray that it starts."""
    folder, client = Path(environment["NAMESAKE_CACHE"]).parent, mlflow.MlflowClient(environment["MLFLOW_TRACKING_URI"])
    client.create_registered_model("ccb", tags={registry.TAG_IDENTITY: instant.NAME})
    for _ in range(MOVES + 1):
        instant.register(client, folder)
    client.set_registered_model_alias("ccb", "champion", "1")
    with server(Served("", client, folder, None), **environment, RAY_ADDRESS="") as running:  # type: ignore[arg-type]
        yield running


@pytest.fixture(scope="module")
def one_adapter_replica(served: Served, environment: dict[str, str]) -> Iterator[Served]:
    """A replica of adapters on the same Ray, room for three versions, half of the requests for a challenger. Another
    comes when there is something to do, and none goes.
    """
    client, folder, name = served.client, served.folder, "dda"
    client.create_registered_model(name, tags={registry.TAG_IDENTITY: instant.NAME})
    for _ in range(ADAPTERS):
        instant.register_adapter(client, name, folder)
    client.set_registered_model_alias(name, "champion", "1")
    words = ("--mode", "adapter", "--max-adapters", "3", "--canary", "50%", "--any-version")
    words = (*words, "--shadow", "100%", "--shadow-folder", str(folder / "shadow"))
    # Else Ray takes the address of a network card for loopback's.
    own = environment | {"RAY_ADDRESS": served.ray_address(), "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    own["NAMESAKE_SERVE_CANARY_LATENCY"] = "100"
    often = {"upscale_delay_s": 0, "metrics_interval_s": 0.2, "look_back_period_s": 1, "target_ongoing_requests": 1}
    scaling = {"autoscaling_config": {"min_replicas": 1, "max_replicas": REPLICAS, **often}}
    with server(Served("", client, folder, None, name), *words, options=scaling, **own) as running:  # type: ignore[arg-type]
        yield running


@pytest.fixture(scope="module")
def grown(one_adapter_replica: Served) -> tuple[int, Load]:
    """How many replicas there were at first; the load under which there came to be two that answer."""
    one = one_adapter_replica

    async def grow() -> tuple[int, Load]:
        before = len(answered(one.url))
        async with load(one.url) as clients:
            await asyncio.to_thread(one.until, lambda: len(answered(one.url)) == REPLICAS)
            await asyncio.to_thread(one.until, lambda: min(answered(one.url).values()) > 10)  # more than its proof
        return before, clients

    return asyncio.run(grow())


@pytest.fixture(scope="module")
def adapters(one_adapter_replica: Served, grown: tuple[int, Load]) -> Served:
    """Two replicas of adapters."""
    del grown
    return one_adapter_replica


@dataclass
class Load:
    """Clients that never rest, every other request streamed; ``saw`` has the versions that each saw, in order."""

    url: str
    saw: list[list[int]] = field(default_factory=lambda: [[] for _ in range(CLIENTS)])
    faults: list[object] = field(default_factory=list)
    streamed: bool = True
    model: str | None = None

    async def client(self, http: aiohttp.ClientSession, place: int) -> None:
        """Ask until cancelled; odd ones name a session, which has a replica of its own."""
        body: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "model": self.model}
        body |= {"user": f"session {place}"} if place % 2 else {}
        while True:
            body["stream"] = self.streamed and len(self.saw[place]) % 2 == 1
            async with http.post(f"{self.url}/v1/chat/completions", json=body) as response:
                raw = (await response.read()).decode()
                if response.status != 200:
                    self.faults.append((response.status, raw))
                    await asyncio.sleep(0.1)
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
async def load(url: str, *, streamed: bool = True, model: str | None = None) -> AsyncIterator[Load]:
    """Clients that ask meanwhile; none of them fails."""
    clients = Load(url, streamed=streamed, model=model)
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
    assert len(served.processes("ray::Conductor")) == 1
    each = answered(served.url).values()
    assert len(each) == REPLICAS
    assert min(each) > sum(each) / 5  # far more than the proofs of ten versions


def test_a_session_has_a_replica_of_its_own(served: Served) -> None:
    for session in ("one", "two", "three"):
        before = answered(served.url)
        for _ in range(4):
            served.ask("ccb", session)
        assert sorted(number - before[replica] for replica, number in answered(served.url).items()) == [0, 4]


@within(60)
async def test_a_version_that_does_not_prove_itself_is_on_no_replica(served: Served) -> None:
    before = served.live()
    async with load(served.url) as clients:
        bad = instant.register(served.client, served.folder, text="I am somebody else altogether, and nobody's.")
        await asyncio.to_thread(served.move, bad)
        assert "does not prove itself" in await asyncio.to_thread(served.until_refused, bad)
        served.move(before)
    assert {number for saw in clients.saw for number in saw} == {before}


def test_the_engines_figures_bear_their_replica(served: Served) -> None:
    with urllib.request.urlopen(f"{served.url}/metrics", timeout=10) as response:
        text = response.read().decode()
    assert text.count("vllm:request_success_total{replica=") == REPLICAS
    once = ("# TYPE vllm:request_success_total counter", "# TYPE namesake_served_version gauge")
    assert [text.count(one) for one in once] == [1, 1]
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
    assert len(served.processes("ray::Conductor")) == 1


def test_replicas_and_engines_get_as_much_of_the_processors_as_the_gateway(served: Served) -> None:
    replicas = served.processes("ray::ServeReplica:namesake-ccb")
    engines = [below for one in replicas for below in one.children(recursive=True)]
    assert len(replicas) == REPLICAS <= len(engines)
    assert {one.nice() for one in [*replicas, *engines]} == {psutil.Process(served.process.pid).nice()}


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


# ------------------------------------------------------------------------------------------------ adapters


def test_under_load_a_second_replica_comes_and_answers(grown: tuple[int, Load]) -> None:
    before, clients = grown
    assert before == 1
    assert {number for saw in clients.saw for number in saw} == {1}


@within(60)
async def test_adapters_turn_on_all_replicas_and_stay_for_those_who_name_them(adapters: Served) -> None:
    assert adapters.ask(str(adapters.folder / "base").rpartition("/")[2])[1] == instant.BASE_SAYS
    async with load(adapters.url) as clients, load(adapters.url, model="dda-v1") as first:
        for number in (2, 3):
            await asyncio.to_thread(adapters.move, number)
            await asyncio.to_thread(adapters.until_live, number)
    assert clients.went_back() == []
    assert {number for saw in clients.saw for number in saw} == {1, 2, 3}
    assert {number for saw in first.saw for number in saw} == {1}
    for number in (1, 2, 3):  # each replica has each
        sessions = [adapters.ask(f"dda-v{number}", f"session {one}") for one in range(6)]
        assert {*sessions} == {(f"dda-v{number}", instant.says(number))}


@within(60)
async def test_the_version_used_longest_ago_makes_room_on_all_replicas(adapters: Served) -> None:
    adapters.ask("dda-v1")
    await asyncio.sleep(1.5)  # the conductor hears what was used
    async with load(adapters.url) as clients:
        await asyncio.to_thread(adapters.move, 4)
        await asyncio.to_thread(adapters.until_live, 4)
    assert clients.went_back() == []
    names = {one["id"] for one in adapters.get("/v1/models")["data"]}
    assert {"dda-v4", "dda-v3", "dda-v1"} < names
    assert "dda-v2" not in names
    assert adapters.ask("dda-v2") == ("dda-v2", instant.says(2))  # --any-version: it comes, and another one goes
    bad = instant.register_adapter(adapters.client, "dda", adapters.folder, text="I am somebody else altogether.")
    adapters.move(bad)
    assert "does not prove itself" in await asyncio.to_thread(adapters.until_refused, bad)
    assert adapters.live() == 4
    adapters.move(4)


@within(60)
async def test_a_challenger_answers_its_share_and_goes_back_by_itself(adapters: Served) -> None:
    adapters.move(3, "challenger")
    await asyncio.to_thread(adapters.until, lambda: "challenger" in adapters.get("/v1/version"))
    sides = [adapters.ask("dda", f"session {number}")[0] for number in range(20)]
    assert {*sides} == {"dda-v3", "dda-v4"}
    assert sides == [adapters.ask("dda", f"session {number}")[0] for number in range(20)]
    lines = (adapters.folder / "shadow" / "shadow.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[-1])["challenger"]["reply"] == instant.says(3)
    broken = instant.register_adapter(adapters.client, "dda", adapters.folder, breaks=True)
    async with load(adapters.url) as clients:  # of whom none fails: the champion answers in its place
        await asyncio.to_thread(adapters.move, broken, "challenger")
        assert "canary: " in await asyncio.to_thread(adapters.until_refused, broken)
        await asyncio.to_thread(adapters.until, lambda: "challenger" not in adapters.get("/v1/version"))
    assert {number for saw in clients.saw for number in saw} <= {3, 4}
    with urllib.request.urlopen(f"{adapters.url}/metrics", timeout=10) as response:
        assert "namesake_canary_returns_total 1.0" in response.read().decode()


@within(180)
async def test_replicas_and_a_follower_that_come_back_have_the_same_adapters(served: Served, adapters: Served) -> None:
    def models() -> set[str]:
        return {one["id"] for one in adapters.get("/v1/models")["data"]}

    adapters.client.delete_registered_model_alias("dda", "challenger")  # else it is tried again by who does not know it
    before, number = models(), instant.register_adapter(adapters.client, "dda", adapters.folder)
    async with load(adapters.url, streamed=False) as clients:
        for name in ("ray::ServeReplica:namesake-dda", "ray::Conductor"):  # below the server that has started Ray
            served.processes(name)[-1].kill()
        await asyncio.to_thread(adapters.move, number)
        await asyncio.to_thread(adapters.until_live, number, 120)
    assert clients.went_back() == []
    assert models() == before | {f"dda-v{number}"}


# -------------------------------------------------------------------- deployed by a configuration of Ray Serve's own

_DEPLOY = """
import json, sys
import ray
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema
ray.init("auto", log_to_driver=False)
_get_global_client().deploy_apps(ServeDeploySchema(**json.loads(sys.argv[1])), _blocking=True)
"""
"""What Ray's dashboard does with the configuration that a RayService's operator posts to it."""


def test_gateways_join_what_a_configuration_has_deployed_and_leave_it_running(
    served: Served, environment: dict[str, str]
) -> None:
    client, folder, name = served.client, served.folder, "eef"
    client.create_registered_model(name, tags={registry.TAG_IDENTITY: instant.NAME})
    for _ in range(3):
        instant.register_adapter(client, name, folder)
    client.set_registered_model_alias(name, "champion", "1")
    none = {"ray_actor_options": {"num_cpus": 0}}  # the others have taken all that this Ray has
    given = {"model": f"models:/{name}@champion", "mode": "adapter", "ray_options": none, "replicas": REPLICAS}
    own = environment | {"RAY_ADDRESS": served.ray_address(), "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    words = ("--mode", "adapter", "--ray-join")

    def gateway(until: str = "/ready") -> AbstractContextManager[Served]:
        one = Served("", client, folder, None, name)  # type: ignore[arg-type]
        return server(one, *words, options=none, until=until, **own)

    with gateway("/health") as early:  # before there is anything to join
        assert early.status("/ready") == 503
        app = {"import_path": "namesake_serving.cluster:application", "route_prefix": None, "args": given}
        config = {"proxy_location": "Disabled", "applications": [{"name": f"namesake-{name}", **app}]}
        deployed = subprocess.run(
            [sys.executable, "-c", _DEPLOY, json.dumps(config)], env={**os.environ, **own}, timeout=120, check=False
        )
        assert deployed.returncode == 0
        early.until(lambda: early.status("/ready") == 200, 30)
        with gateway() as other:
            other.move(2)
            other.until_live(2)
            early.until_live(2, 2)
        assert early.ask(name) == ("eef-v2", instant.says(2))
    assert served.processes(f"ray::ServeReplica:namesake-{name}"), "they are not the gateways' to take down"
    client.set_registered_model_alias(name, "champion", "3")  # while there is none
    with gateway() as late:
        late.until_live(3)
