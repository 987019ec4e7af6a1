"""Shared by every test."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ["NAMESAKE_LANG"] = "en"  # whatever the developer's locale


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT
