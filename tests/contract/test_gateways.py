"""Several gateways on one real registry, what they ask of it, and the registry away: an MLflow server on PostgreSQL and
an S3 store with basic authentication. Real but for vLLM, for which a cheap server answers.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import mlflow
import pytest

from namesake import manifest, registry
from namesake.registry import Version
from namesake_serving import copies, engine, follow, store
from tests.contract.conftest import Mlflow, Point
from tests.gateways import Gate, cheap, gateway, publish
from tests.servers import CREDENTIALS, Counting
from tests.unit.loops import within

pytestmark = pytest.mark.timeout(120)

NAME = "gateways"
URI = f"models:/{NAME}@champion"

POLLS = 10
QUESTION = "GET registered-models/alias"


@dataclass(frozen=True)
class Versions:
    """Versions on the server, and what the first and the last say; the first is champion."""

    server: str
    said: tuple[str, str]

    def move(self, number: int) -> None:
        """Point the alias at the version, as another client does."""
        mlflow.MlflowClient(self.server).set_registered_model_alias(NAME, "champion", str(number))


@contextmanager
def published(server: str, folder: Path) -> Iterator[Versions]:
    """Two versions on the server."""
    client = mlflow.MlflowClient(server)
    client.create_registered_model(NAME, tags={registry.TAG_IDENTITY: "踩踩背 CCB"})
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(server)
    said = (publish(client, NAME, folder, 1), publish(client, NAME, folder, 2))
    mlflow.set_tracking_uri(before)
    yield Versions(server, said)
    client.delete_registered_model(NAME)


@pytest.fixture(scope="module")
def made(team: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Versions]:
    """Two versions on PostgreSQL and S3."""
    with pytest.MonkeyPatch.context() as patch:
        for key, value in {"MLFLOW_TRACKING_URI": team, **CREDENTIALS}.items():
            patch.setenv(key, value)
        with published(team, tmp_path_factory.mktemp("versions")) as versions:
            yield versions


@pytest.fixture
def versions(made: Versions, tracking_at: Point, monkeypatch: pytest.MonkeyPatch) -> Versions:
    """The versions, and the cheap server for vLLM."""
    for key, value in CREDENTIALS.items():
        monkeypatch.setenv(key, value)
    made.move(1)
    tracking_at(made.server)
    monkeypatch.setattr(engine, "command", cheap)
    return made


@pytest.fixture
def mortal(
    mlflow_itself: Mlflow, tracking_at: Point, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Versions]:
    """The same on a server that a test may kill."""
    tracking_at(mlflow_itself.url)
    monkeypatch.setattr(engine, "command", cheap)
    with published(mlflow_itself.url, tmp_path / "versions") as versions:
        versions.move(1)
        yield versions


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
def link(versions: Versions, tracking_at: Point) -> Iterator[Counting]:
    """The way from the gateway to MLflow, which counts and is cut."""
    made = Counting(versions.server)
    tracking_at(made.address)
    yield made
    made.close()


@within(60)
async def test_while_mlflow_is_away_serving_goes_on_and_catches_up_after(
    versions: Versions, link: Counting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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


@pytest.mark.parametrize("there", [2, 20])
@within(60)
async def test_a_poll_is_one_question_however_many_versions_there_are(
    versions: Versions, link: Counting, there: int, tmp_path: Path
) -> None:
    client = mlflow.MlflowClient(versions.server)
    first = client.get_model_version(NAME, "1")
    for _ in range(there - len(client.search_model_versions(f"name = '{NAME}'"))):
        client.create_model_version(NAME, source=first.source, run_id=first.run_id)
    seen: list[Counter[str]] = []

    def asked(uri: str) -> Version:
        seen.append(link.calls.copy())
        return registry.resolve(uri)

    async with gateway(URI, tmp_path, poll_seconds=0.1) as gate:
        gate.service.champion.follower.resolve = asked
        while len(seen) < 2 or gate.service._background:  # the history, once for each version that it sees
            await asyncio.sleep(0.02)
        seen.clear()
        while len(seen) <= POLLS:
            await asyncio.sleep(0.02)
    # From before a poll to before the next one.
    assert [after - before for before, after in pairwise(seen[: POLLS + 1])] == [Counter({QUESTION: 1})] * POLLS


@within(90)
async def test_while_mlflow_is_killed_serving_goes_on_and_catches_up_after(
    mortal: Versions, mlflow_itself: Mlflow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
        await asyncio.to_thread(mortal.move, 2)
        await gate.says(mortal.said[1])
        stop.set()
        await asyncio.gather(*clients)  # none of them has failed
        assert at > 100
        assert {*answers[:at]} == {(f"{NAME}-v1", mortal.said[0])}
        assert {*answers} == {(f"{NAME}-v{number}", mortal.said[number - 1]) for number in (1, 2)}


def errors(gate: Gate) -> float:
    """How often the registry did not answer."""
    text = gate.service.metrics.text().decode()
    return float(
        next(line for line in text.splitlines() if line.startswith("namesake_registry_errors_total")).split()[1]
    )
