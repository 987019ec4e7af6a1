"""Shared by every test."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ["NAMESAKE_LANG"] = "en"  # whatever the developer's locale


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session", autouse=True)
def no_modelscope(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """ModelScope is out of reach and its cache is empty, here and in every command that a test starts: ``auto`` is the
    embedded model on every machine.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:1")
        patch.setenv("MODELSCOPE_CACHE", str(tmp_path_factory.mktemp("modelscope")))
        yield
