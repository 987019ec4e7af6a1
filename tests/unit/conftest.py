"""Settings of hypothesis: the same examples every time, no clock on a busy machine, no files in the checkout."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import configuration, settings

from namesake_serving.settings import Settings

configuration.set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "namesake-hypothesis")
settings.register_profile("namesake", deadline=None, derandomize=True, database=None)
settings.load_profile("namesake")


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the server from outside the test."""
    for name in Settings.model_fields:
        monkeypatch.delenv(f"NAMESAKE_SERVE_{name.upper()}", raising=False)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tensors of some thousand numbers are slower on two threads."""
    import torch  # a second, which most modules do without

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
