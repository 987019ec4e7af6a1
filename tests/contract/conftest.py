"""A tracking store of its own for each test."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import mlflow
import pytest
from werkzeug.security import generate_password_hash

from namesake import registry
from tests.servers import CREDENTIALS, free_port, mlflow_server, object_store, postgres

Point = Callable[[str], None]


@pytest.fixture
def tracking_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[Point]:
    """Point MLflow at a store, until the test ends."""

    def point(uri: str) -> None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        mlflow.set_tracking_uri(uri)

    yield point
    mlflow.set_tracking_uri(None)


class Mlflow:
    """A real ``mlflow server`` that may call loopback; killed and started again it is at the same address."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._port, self._running = folder, free_port(), ExitStack()
        self.url = ""

    def start(self) -> None:
        """Start it and wait until it answers."""
        made = mlflow_server(
            self._folder,
            port=self._port,
            MLFLOW_WEBHOOK_ALLOWED_SCHEMES="http",
            MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS="true",
            MLFLOW_WEBHOOK_CACHE_TTL="0",
            MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY="hLC9bfeTVn8tJTAB2yTVDSyLlO-Jbw3jHYTW3Mh1fGk=",
        )
        self.url = self._running.enter_context(made)

    def kill(self) -> None:
        """SIGKILL for all its processes."""
        self._running.close()


@pytest.fixture(scope="session")
def mlflow_itself(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mlflow]:
    """It runs, with models of many tests in it."""
    made = Mlflow(tmp_path_factory.mktemp("webhooks"))
    made.start()
    yield made
    made.kill()


@pytest.fixture(scope="session")
def server(mlflow_itself: Mlflow) -> str:
    """Its address."""
    return mlflow_itself.url


@pytest.fixture(scope="package")
def team(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An MLflow server on PostgreSQL and S3 that asks for :data:`tests.servers.CREDENTIALS`; its address."""
    folder = tmp_path_factory.mktemp("team")
    with postgres() as database, object_store(folder) as s3:
        secrets = {
            "MLFLOW_FLASK_SERVER_SECRET_KEY": "secret",
            "MLFLOW_AUTH_ADMIN_PASSWORD": CREDENTIALS["MLFLOW_TRACKING_PASSWORD"],
        }
        words = ("--artifacts-destination", "s3://mlflow/namesake", "--app-name", "basic-auth")
        with mlflow_server(folder, *words, store=database, **secrets, **s3) as uri:
            # Each request's password is hashed, for 0.15 s; the same check by a quick hash.
            quick = generate_password_hash(CREDENTIALS["MLFLOW_TRACKING_PASSWORD"], "pbkdf2:sha256:1")
            with closing(sqlite3.connect(folder / "basic_auth.db")) as users, users:
                users.execute("UPDATE users SET password_hash = ?", (quick,))
            yield uri


Fresh = Callable[[Path], str]


@pytest.fixture(scope="session")
def fresh_store(tmp_path_factory: pytest.TempPathFactory) -> Fresh:
    """Make a fresh SQLite store in a folder: its URI. MLflow takes 1.4 s for the tables, a copy of them none."""
    template = tmp_path_factory.mktemp("tables") / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{template}").search_experiments()

    def made(folder: Path) -> str:
        database = folder / "mlflow.db"
        shutil.copy(template, database)
        with closing(sqlite3.connect(database)) as connection, connection:
            connection.execute("UPDATE experiments SET artifact_location = ?", (f"{folder}/mlruns/0",))
        return f"sqlite:///{database}"

    return made


@pytest.fixture
def client(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracking_at: Point, fresh_store: Fresh
) -> mlflow.MlflowClient:
    """A fresh SQLite store with an identity of one registered model."""
    monkeypatch.chdir(tmp_path)
    uri = fresh_store(tmp_path)
    tracking_at(uri)
    client = mlflow.MlflowClient(uri)
    client.create_registered_model("ccb", tags={registry.TAG_IDENTITY: "踩踩背 CCB"})
    return client
