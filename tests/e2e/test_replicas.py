"""Real vLLM on a real Ray: two engines, one alias that moves under clients. What else can happen there,
``tests/contract/test_replicas.py`` has with engines that cost nothing.
"""

from __future__ import annotations

import time
from itertools import groupby

import mlflow
import pytest

from tests.e2e.conftest import Way, served
from tests.e2e.test_follow import Clients, live_of
from tests.servers import answered

pytest.importorskip("ray.serve", reason="requirements/ray.txt is not installed", exc_type=ImportError)
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

CLIENTS = 12
"""Each is a session, and goes to one engine by its hash: that all go to the same one is less likely than 1 in 2,000."""


def test_an_alias_that_moves_over_two_engines_fails_no_request_and_nobody_goes_back(
    way: Way, client: mlflow.MlflowClient, second: int
) -> None:
    client.set_registered_model_alias("ccb", "champion", "1")
    words = ("--backend", "ray", "--replicas", "2", "--eager", "--poll-seconds", "0.2")
    try:
        with served(way.place, *words) as url:
            assert live_of(url) == "ccb-v1"
            front = url.removesuffix("/v1")
            with Clients(url, CLIENTS) as clients:
                clients.wait_for("ccb-v1", time.monotonic())
                moved = time.monotonic()
                client.set_registered_model_alias("ccb", "champion", str(second))
                clients.wait_for(f"ccb-v{second}", moved)
                each = before = answered(front)  # the proofs of both among them
                until = time.monotonic() + 60
                while min(each[one] - before[one] for one in before) == 0 and time.monotonic() < until:
                    time.sleep(0.5)
                    each = answered(front)
    finally:
        client.set_registered_model_alias("ccb", "champion", "1")
    assert clients.faults == []
    assert [[version for version, _ in groupby(name for _, name in one)] for one in clients.each] == [
        ["ccb-v1", f"ccb-v{second}"]
    ] * CLIENTS
    assert len(before) == 2
    assert min(each[one] - before[one] for one in before) > 0, "one of them answers nobody"
