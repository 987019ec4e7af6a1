"""A canary and a shadow with merged weights: the challenger in an engine of its own, both real vLLM, under load."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator

import mlflow
import pytest

from tests.e2e.conftest import Way, served
from tests.e2e.test_adapters import until_there
from tests.e2e.test_follow import Clients, engines, figure, live_of

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

CLIENTS = 16
"""Each with a session of its own: about half of them are the challenger's."""


@pytest.fixture(scope="module")
def endpoint(way: Way, second: int, client: mlflow.MlflowClient) -> Iterator[str]:
    """Version 1 is champion, the second one its challenger and answers half of the requests."""
    client.set_registered_model_alias("ccb", "champion", "1")
    client.set_registered_model_alias("ccb", "challenger", str(second))
    kept = str(way.place.folder / "shadow-merged")
    words = ("--canary", "50%", "--shadow", "100%", "--shadow-folder", kept)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NAMESAKE_SERVE_CANARY_LATENCY", "50")  # a busy machine is not what is tested
        server = served(way.place, "--eager", "--poll-seconds", "0.2", *words)
    with server as url:
        until_there(url, second)
        yield url


def test_two_engines_answer_side_by_side_and_copies_are_kept(endpoint: str, way: Way, second: int) -> None:
    with Clients(endpoint, CLIENTS, {"max_tokens": 8}) as clients:
        clients.wait_for("ccb-v1", time.monotonic())
        clients.wait_for(f"ccb-v{second}", time.monotonic())
    assert clients.faults == []
    sides = [{version for _, version in answers} for answers in clients.each if answers]
    assert {len(side) for side in sides} == {1}, "a session stays on its side"
    assert len(engines(endpoint)) == 2
    kept, end = way.place.folder / "shadow-merged" / "shadow.jsonl", time.monotonic() + 60
    while not kept.is_file():
        assert time.monotonic() < end, "no copy was answered"
        time.sleep(0.2)
    for line in map(json.loads, kept.read_text(encoding="utf-8").splitlines()):
        assert (line["champion"]["version"], line["challenger"]["version"]) == ("ccb-v1", f"ccb-v{second}")


def test_a_challenger_whose_engine_is_killed_goes_back_by_itself_and_no_request_of_the_champion_notices(
    endpoint: str, client: mlflow.MlflowClient, second: int
) -> None:
    champion, challenger = engines(endpoint)
    before = figure(endpoint, "namesake_canary_returns_total")
    with Clients(endpoint, CLIENTS, {"max_tokens": 24}) as clients:
        end = time.monotonic() + 120
        while not all(clients.each):
            assert time.monotonic() < end, "not each was answered"
            time.sleep(0.1)
        theirs = sum(answers[0][1] == f"ccb-v{second}" for answers in clients.each)
        os.kill(challenger, signal.SIGKILL)
        end = time.monotonic() + 60
        while figure(endpoint, "namesake_canary_returns_total") == before:
            assert time.monotonic() < end, f"it did not go back; {clients.faults}"
            time.sleep(0.1)
        returned = time.monotonic()
        clients.wait_for_each("ccb-v1", returned)
    assert 0 < theirs < CLIENTS
    assert len(clients.faults) <= theirs, "only streams that had begun there were cut, one a client"
    assert {version for when, version, _ in clients.answers if when > returned + 1} == {"ccb-v1"}
    assert "canary: " in client.get_model_version("ccb", str(second)).tags["namesake.serving_error"]
    assert live_of(endpoint) == "ccb-v1"
    assert champion in engines(endpoint)

    # Once the alias has left it and comes back it is tried again.
    client.delete_registered_model_alias("ccb", "challenger")
    time.sleep(1)
    client.set_registered_model_alias("ccb", "challenger", str(second))
    until_there(endpoint, second)
    with Clients(endpoint, CLIENTS, {"max_tokens": 8}) as clients:
        clients.wait_for(f"ccb-v{second}", time.monotonic())
    assert clients.faults == []
