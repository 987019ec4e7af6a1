"""A standby with real vLLM: versions come in beside running answers, and an engine that is killed is replaced."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator

import mlflow
import pytest

from tests.e2e.conftest import Way, served
from tests.e2e.test_follow import Clients, calm_certainty, end_of, engines, figure, live_of

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

CHANGES = r'namesake_version_changes_total\{reason="",result="live",way="standby"\}'


@pytest.fixture(scope="module")
def endpoint(way: Way, second: int, client: mlflow.MlflowClient) -> Iterator[str]:
    """``namesake serve --standby`` of the first version, its standby ready."""
    client.set_registered_model_alias("ccb", "champion", "1")
    with served(way.place, "--eager", "--poll-seconds", "0.2", "--standby") as url:
        until_ready(url)
        yield url
    client.set_registered_model_alias("ccb", "champion", "1")


def until_ready(url: str, seconds: float = 180) -> None:
    """Wait until there is a standby."""
    end = time.monotonic() + seconds
    while figure(url, "namesake_standby_ready") != 1:
        assert time.monotonic() < end, "there is no standby"
        time.sleep(0.2)


def test_versions_change_under_load_and_each_came_in_by_the_standby(
    endpoint: str, client: mlflow.MlflowClient, second: int
) -> None:
    before, there, moves = figure(endpoint, CHANGES), engines(endpoint), []
    with Clients(endpoint, 8, {"max_tokens": 48}) as clients:
        for number in (second, 1, second, 1):
            moved = time.monotonic()
            moves.append((moved, f"ccb-v{number}"))
            client.set_registered_model_alias("ccb", "champion", str(number))
            clients.wait_for(f"ccb-v{number}", moved)
            until_ready(endpoint)
    assert clients.faults == []
    assert clients.out_of_order(moves) == []
    assert figure(endpoint, CHANGES) == before + 4
    assert engines(endpoint) == there
    assert len(there) == 2
    # What is said, not only what is told: two hardly trained models are apart by how sure they are of a word.
    sure = [calm_certainty(endpoint, client, number) for number in (1, second, 1)]
    assert sure[1] != pytest.approx(sure[0], abs=1e-3)
    assert sure[2] == pytest.approx(sure[0], abs=1e-3)
    until_ready(endpoint)


def test_a_killed_engine_is_replaced_within_seconds(endpoint: str) -> None:
    until_ready(endpoint)
    version, (live, standby) = live_of(endpoint), engines(endpoint)
    ended: list[tuple[float, str]] = []
    stopped = threading.Event()

    def ask_on() -> None:
        while not stopped.is_set():
            ended.append((time.monotonic(), end_of(endpoint, stream=False)))
            time.sleep(0 if ended[-1][1] == "answered" else 0.1)

    threads = [threading.Thread(target=ask_on) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(2)
    os.kill(live, signal.SIGKILL)
    killed = time.monotonic()
    while not any(begun > killed and how == "answered" for begun, how in ended):
        assert time.monotonic() < killed + 15, "an engine that is started again takes longer than 15 s"
        time.sleep(0.05)
    stopped.set()
    for thread in threads:
        thread.join(60)
    assert {how for _, how in ended} <= {"answered", "told"}, ended
    assert live_of(endpoint) == version
    until_ready(endpoint)
    after = engines(endpoint)
    assert after[0] == standby
    assert len(after) == 2
