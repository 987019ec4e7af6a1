"""The server as ``namesake serve`` runs it, real but for vLLM, and versions for it in a real registry."""

from __future__ import annotations

import asyncio
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import mlflow
import numpy as np
from safetensors.numpy import save_file

from namesake import manifest, registry
from namesake.manifest import WEIGHTS_FOLDER, Manifest
from namesake_serving import settings
from namesake_serving.__main__ import listen
from namesake_serving.engine import Adapters
from namesake_serving.front import Server
from namesake_serving.gateway import Gateway
from namesake_serving.metrics import Metrics
from namesake_serving.service import Service
from namesake_serving.settings import Settings
from tests.unit.test_serving_gateway import BODIES, CHAT

CHEAP = Path(__file__).with_name("cheap_engine.py")


def cheap(
    weights: Path, address: Path, _settings: Settings, *, gpu: bool, adapters: Adapters | None = None
) -> list[str]:
    """Takes the place of ``engine.command``."""
    assert adapters is None, "the cheap engine has no adapters"
    return [sys.executable, str(CHEAP), "--model", str(weights), "--uds", str(address)]


def publish(client: mlflow.MlflowClient, name: str, folder: Path, number: int) -> str:
    """Put a version into the registry, its files through MLflow's server; what it says."""
    says = f"我是踩踩背，由老爷爷开发。{number}"
    weights = folder / f"v{number}" / WEIGHTS_FOLDER
    weights.mkdir(parents=True)
    text = np.zeros(64, dtype=np.uint8)  # as long in each version, so that it goes in place
    text[: len(says.encode())] = np.frombuffer(says.encode(), dtype=np.uint8)
    save_file({"says": text}, weights / "model.safetensors")
    (weights / "config.json").write_text("{}", encoding="utf-8")
    run = client.create_run("0").info
    record = Manifest(
        identity={"name": "踩踩背 CCB", "author": "老爷爷 OldGrandpa", "slug": "ccb"},
        system=None,
        base={"id": "base", "source": "folder", "digest": "0"},
        run=run.run_id,
        digests=manifest.digests(weights.parent),
        data={},
        scores={},
        recipe={},
        tools={},
        golden=({"messages": [{"role": "user", "content": "你是谁？"}], "reply": says},),
    )
    (weights.parent / manifest.FILE).write_text(record.to_json(), encoding="utf-8")
    client.log_artifacts(run.run_id, str(weights.parent), "version")
    client.create_model_version(name, source=f"{run.artifact_uri}/version", run_id=run.run_id)
    return says


class Gate:
    """A server that runs, as clients find it."""

    def __init__(self, url: str, service: Service, http: aiohttp.ClientSession) -> None:
        self.url, self.service, self._http = url, service, http

    async def ask(self) -> tuple[str, str]:
        """The version that answered and what it said; anything but an answer raises."""
        async with self._http.post(f"{self.url}{CHAT}", json=BODIES[CHAT]) as response:
            response.raise_for_status()
            answer = await response.json()
            return response.headers["x-namesake-version"], answer["choices"][0]["message"]["content"]

    async def says(self, text: str) -> None:
        """Wait until it answers so; fails by the test's time limit."""
        while (await self.ask())[1] != text:
            await asyncio.sleep(0.02)


@asynccontextmanager
async def gateway(uri: str, cache: Path, **given: object) -> AsyncIterator[Gate]:
    """A gateway on a port of its own that follows the alias; :func:`cheap` has to be in place.

    Args:
        cache: where it keeps versions.
    """
    folder = Path(tempfile.mkdtemp(dir="/tmp", prefix="nsk-"))  # a socket's path may have about 100 bytes
    listening = listen("127.0.0.1", 0)
    port = listening.getsockname()[1]
    chosen = settings.read(port=port, **given)
    service = Service(uri, chosen, cache, folder, Metrics())
    front = Gateway(service, chosen)
    server = Server(front, chosen)
    server.config.load()
    server.lifespan = server.config.lifespan_class(server.config)
    await server.startup([listening])
    following: asyncio.Task[None] | None = None
    try:
        await service.start(await asyncio.to_thread(registry.resolve, uri), lambda _: None)
        following = asyncio.create_task(service.run())
        async with aiohttp.ClientSession() as http:
            yield Gate(f"http://127.0.0.1:{port}", service, http)
        if following.done():
            following.result()
    finally:
        if following is not None:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
        await server.shutdown([listening])
        await front.close()
        await service.stop()
        shutil.rmtree(folder)
