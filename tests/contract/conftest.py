"""A tracking store of its own for each test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import pytest

from namesake import registry

Point = Callable[[str], None]


@pytest.fixture
def tracking_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[Point]:
    """Point MLflow at a store, until the test ends."""

    def point(uri: str) -> None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        mlflow.set_tracking_uri(uri)

    yield point
    mlflow.set_tracking_uri(None)


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracking_at: Point) -> mlflow.MlflowClient:
    """A fresh SQLite store with an identity of one registered model."""
    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    tracking_at(uri)
    client = mlflow.MlflowClient(uri)
    client.create_registered_model("ccb", tags={registry.TAG_IDENTITY: "踩踩背 CCB"})
    return client
