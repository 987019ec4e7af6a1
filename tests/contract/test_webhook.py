"""A real MLflow server calls the real gateway when an alias moves."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import mlflow
import pytest
import uvicorn

from namesake import registry
from namesake.errors import RegistryError
from namesake_serving import settings
from namesake_serving.gateway import Gateway
from namesake_serving.service import Service
from namesake_serving.webhook import PATH
from tests.unit.test_serving_gateway import Serving

pytestmark = pytest.mark.timeout(180)

SECRET = "s3cret"


@pytest.fixture
def client(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[mlflow.MlflowClient]:
    """On the server, with one version."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(server)
    client = mlflow.MlflowClient(server)
    name = f"m{time.time_ns()}"
    client.create_registered_model(name)
    client.create_model_version(name, source="s3://bucket/x")
    client.model_name = name  # type: ignore[attr-defined]
    yield client
    mlflow.set_tracking_uri(before)


class Listening:
    """The gateway on a free port, in a thread of its own."""

    def __init__(self) -> None:
        self.serving = Serving()
        taken = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        gateway = Gateway(cast(Service, self.serving), settings.read(webhook_secret=SECRET))
        self._server = uvicorn.Server(uvicorn.Config(gateway, lifespan="off", log_config=None))
        self._thread = threading.Thread(target=lambda: asyncio.run(self._server.serve(sockets=[taken])), daemon=True)

    def __enter__(self) -> Listening:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(30)

    def woken(self, number: int, seconds: float = 15) -> bool:
        """Whether it has been woken so often within the time."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.serving.woken < number:
            time.sleep(0.02)
        return self.serving.woken >= number


def test_a_moved_alias_wakes_the_server_until_it_takes_that_back(client: mlflow.MlflowClient) -> None:
    name: str = client.model_name  # type: ignore[attr-defined]
    with Listening() as gate:
        webhook = registry.add_webhook(gate.url + PATH, SECRET)
        moved = time.monotonic()
        client.set_registered_model_alias(name, "champion", "1")
        assert gate.woken(1)
        assert time.monotonic() - moved < 2
        client.delete_registered_model_alias(name, "champion")
        assert gate.woken(2)
        registry.remove_webhook(webhook)
        assert [found for found in client.list_webhooks() if found.webhook_id == webhook] == []


def test_a_webhook_that_a_killed_server_left_is_replaced(client: mlflow.MlflowClient) -> None:
    with Listening() as gate:
        registry.add_webhook(gate.url + PATH, "of the one before")
        last = registry.add_webhook(gate.url + PATH, SECRET)
        assert [found.webhook_id for found in client.list_webhooks() if found.url.startswith(gate.url)] == [last]
        client.set_registered_model_alias(client.model_name, "champion", "1")  # type: ignore[attr-defined]
        assert gate.woken(1)
        registry.remove_webhook(last)


def test_a_webhook_signed_otherwise_wakes_nobody(client: mlflow.MlflowClient) -> None:
    with Listening() as gate:
        webhook = registry.add_webhook(gate.url + PATH, "another secret")
        client.set_registered_model_alias(client.model_name, "champion", "1")  # type: ignore[attr-defined]
        assert not gate.woken(1, seconds=4)
        registry.remove_webhook(webhook)


def test_without_an_mlflow_server_there_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(mlflow, "get_registry_uri", lambda: f"sqlite:///{tmp_path}/mlflow.db")
    with pytest.raises(RegistryError, match="Only an MLflow server"):
        registry.add_webhook("http://127.0.0.1:1", SECRET)
