"""Several gateways on one real registry, and the registry away. Real but for vLLM, for which a cheap server answers."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import mlflow
import pytest

from namesake import manifest, registry
from namesake_serving import copies, engine, follow, store
from tests.contract.conftest import Mlflow, Point
from tests.gateways import Gate, cheap, gateway, publish
from tests.servers import Link
from tests.unit.loops import within

pytestmark = pytest.mark.timeout(120)

NAME = "gateways"
URI = f"models:/{NAME}@champion"


@dataclass(frozen=True)
class Versions:
    """Two versions on the server, and what they say; the first is champion."""

    server: str
    said: tuple[str, str]

    def move(self, number: int) -> None:
        """Point the alias at the version, as another client does."""
        mlflow.MlflowClient(self.server).set_registered_model_alias(NAME, "champion", str(number))


@pytest.fixture(scope="module")
def made(server: str, tmp_path_factory: pytest.TempPathFactory) -> Versions:
    """The versions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", server)
        client = mlflow.MlflowClient(server)
        client.create_registered_model(NAME, tags={registry.TAG_IDENTITY: "踩踩背 CCB"})
        folder = tmp_path_factory.mktemp("versions")
        before = mlflow.get_tracking_uri()
        mlflow.set_tracking_uri(server)
        said = (publish(client, NAME, folder, 1), publish(client, NAME, folder, 2))
        mlflow.set_tracking_uri(before)
    return Versions(server, said)


@pytest.fixture
def versions(made: Versions, tracking_at: Point, monkeypatch: pytest.MonkeyPatch) -> Versions:
    """The versions, and the cheap server for vLLM."""
    made.move(1)
    tracking_at(made.server)
    monkeypatch.setattr(engine, "command", cheap)
    return made


@within(60)
async def test_two_gateways_agree_within_two_seconds(versions: Versions, tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        gates = [await stack.enter_async_context(gateway(URI, tmp_path / name)) for name in "ab"]
        apart = []
        for number in (2, 1, 2, 1):

            async def live(gate: Gate, said: str = versions.said[number - 1]) -> float:
                await gate.says(said)
                return time.monotonic()

            await asyncio.to_thread(versions.move, number)
            came = await asyncio.gather(*(live(gate) for gate in gates))
            apart.append(max(came) - min(came))
            for gate in gates:
                assert (await gate.ask())[0] == f"{NAME}-v{number}"
        assert max(apart) < 2, apart


def test_what_a_copy_lacks_is_fetched_file_by_file(versions: Versions, tmp_path: Path) -> None:
    version = registry.resolve(f"models:/{NAME}/1")
    stored = store.fetch(version, tmp_path)
    kept = stored.weights / "config.json"
    whole, before = manifest.digests(stored.weights), kept.stat()
    copies.unseal(stored.weights.parent)
    os.truncate(stored.weights / "model.safetensors", 10)
    (stored.weights.parent / manifest.FILE).unlink()
    again = store.fetch(version, tmp_path)
    assert (again, manifest.digests(again.weights)) == (stored, whole)
    assert (kept.stat().st_ino, kept.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.fixture
def link(versions: Versions, tracking_at: Point) -> Iterator[Link]:
    """The way from the gateway to MLflow, which the test cuts."""
    made = Link(versions.server)
    tracking_at(made.address)
    yield made
    made.close()


@within(60)
async def test_while_mlflow_is_away_serving_goes_on_and_catches_up_after(
    versions: Versions, link: Link, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # of MLflow's seven, with their growing pauses
    monkeypatch.setattr(follow, "LONGEST_PAUSE", 0.5)  # of a minute
    async with gateway(URI, tmp_path, poll_seconds=0.1) as gate:
        assert (await gate.ask())[1] == versions.said[0]
        link.cut = True
        await asyncio.to_thread(versions.move, 2)
        until = time.monotonic() + 2
        while time.monotonic() < until or not errors(gate):
            assert await gate.ask() == (f"{NAME}-v1", versions.said[0])
        link.cut = False
        await gate.says(versions.said[1])
        assert (await gate.ask())[0] == f"{NAME}-v2"


@within(90)
async def test_while_mlflow_is_killed_serving_goes_on_and_catches_up_after(
    versions: Versions, mlflow_itself: Mlflow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setattr(follow, "LONGEST_PAUSE", 0.5)
    async with gateway(URI, tmp_path, poll_seconds=0.1) as gate:
        answers, stop = list[tuple[str, str]](), asyncio.Event()

        async def ask_on() -> None:
            while not stop.is_set():
                answers.append(await gate.ask())
                await asyncio.sleep(0.01)

        clients = [asyncio.create_task(ask_on()) for _ in range(8)]
        await asyncio.sleep(0.5)
        await asyncio.to_thread(mlflow_itself.kill)
        try:
            before = errors(gate)
            while errors(gate) < before + 2:
                await asyncio.sleep(0.05)
            at = len(answers)
        finally:
            await asyncio.to_thread(mlflow_itself.start)
        await asyncio.to_thread(versions.move, 2)
        await gate.says(versions.said[1])
        stop.set()
        await asyncio.gather(*clients)  # none of them has failed
        assert at > 100
        assert {*answers[:at]} == {(f"{NAME}-v1", versions.said[0])}
        assert {*answers} == {(f"{NAME}-v{number}", versions.said[number - 1]) for number in (1, 2)}


def errors(gate: Gate) -> float:
    """How often the registry did not answer."""
    text = gate.service.metrics.text().decode()
    return float(
        next(line for line in text.splitlines() if line.startswith("namesake_registry_errors_total")).split()[1]
    )
