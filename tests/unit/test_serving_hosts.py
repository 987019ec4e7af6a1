"""Engines are started and ended, and none is left behind."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import cast
from unittest.mock import Mock

import pytest

from namesake.errors import ServingError
from namesake_serving import engine, settings
from namesake_serving.engine import Engine
from namesake_serving.hosts import Engines
from tests.unit.loops import within

in_a_loop = within(20)


@in_a_loop
@pytest.mark.parametrize("comes", [True, False])
async def test_a_start_that_is_given_up_while_the_process_is_made_leaves_none(
    comes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go, made = threading.Event(), threading.Event(), Mock(spec=Engine)

    def start(*_: object) -> Engine:
        begun.set()
        assert go.wait(10)
        if not comes:
            raise ServingError("No such thing.", mend="None.")
        return cast("Engine", made)

    monkeypatch.setattr(engine, "start", start)
    engines = Engines(settings.read(), tmp_path)
    starting = asyncio.create_task(engines.start(tmp_path))
    await asyncio.to_thread(begun.wait, 10)
    starting.cancel()
    await asyncio.sleep(0.05)
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert made.kill.called is comes
    assert engines.started == []
