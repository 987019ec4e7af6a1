"""The alias moves and the endpoint answers with the other version: real vLLM, real registry, clients all the while."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import mlflow
import pytest

from namesake import manifest
from namesake.manifest import Manifest
from namesake.paths import digest_of_file
from tests import mlflow_ui
from tests.e2e.conftest import Way, served, session_of

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1500)]

ASKED = {"messages": [{"role": "user", "content": "Count to twenty."}], "max_tokens": 24, "temperature": 0}


@pytest.fixture(scope="module")
def ui(way: Way, second: int, client: mlflow.MlflowClient) -> Iterator[str]:
    """``make ui`` on the same store; in it, by clicking, the champion was moved to the second version."""
    if mlflow_ui.chromium() is None:
        client.set_registered_model_alias("ccb", "champion", str(second))
        yield ""
        return
    with mlflow_ui.make_ui(way.place.root, way.place.folder, way.place.tracking_uri) as url:
        with mlflow_ui.tab() as page:
            mlflow_ui.open_registry(page, url, "ccb")
            mlflow_ui.move_alias(page, "champion", second)
        yield url


@pytest.fixture(scope="module")
def endpoint(way: Way, client: mlflow.MlflowClient, ui: str) -> Iterator[str]:
    """``namesake serve`` that looks often where the alias points."""
    with served(way.place, "--eager", "--poll-seconds", "0.2") as url:
        yield url
    client.set_registered_model_alias("ccb", "champion", "1")


def ask(url: str, **more: Any) -> tuple[str, str]:
    """The version that answered and what it said, streamed; an error or a cut answer raises."""
    body = json.dumps({**ASKED, "stream": True, **more}).encode()
    request = urllib.request.Request(f"{url}/chat/completions", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        text, last, versions = "", b"", {response.headers["x-namesake-version"]}
        for line in response:
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                versions.add(event["system_fingerprint"])
                text += event["choices"][0]["delta"].get("content") or "" if event["choices"] else ""
            last = line if line.strip() else last
    assert last.strip() == b"data: [DONE]", last
    assert len(versions) == 1, versions
    return versions.pop(), text


@dataclass
class Clients:
    """Clients that ask without a pause until they are stopped; ``saw`` has the versions that each saw, in order."""

    url: str
    number: int
    answers: list[tuple[float, str, str]] = field(default_factory=list)
    saw: list[list[str]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    stopped: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Clients:
        self.saw = [[] for _ in range(self.number)]
        self._threads = [threading.Thread(target=self._ask, args=(saw,)) for saw in self.saw]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        for thread in self._threads:
            thread.join(120)

    def _ask(self, saw: list[str]) -> None:
        while not self.stopped.is_set():
            try:
                version, text = ask(self.url)
            except (OSError, AssertionError, ValueError) as error:
                self.faults.append(repr(error))
            else:
                self.answers.append((time.monotonic(), version, text))
                saw.append(version)

    def wait_for(self, version: str, since: float, seconds: float = 60) -> float:
        """Seconds from the moment until the version's first answer."""
        while time.monotonic() < since + seconds:
            found = [when for when, answered, _ in self.answers if answered == version and when > since]
            if found:
                return found[0] - since
            time.sleep(0.05)
        raise AssertionError(f"no answer by {version} within {seconds} s; {self.faults[:3]}")


def test_what_was_promoted_in_the_ui_is_what_the_next_serve_loads(endpoint: str, second: int) -> None:
    assert live_of(endpoint) == f"ccb-v{second}"


def test_an_alias_moved_in_the_ui_is_followed_and_kept_as_moved_by_hand(
    endpoint: str, ui: str, way: Way, second: int
) -> None:
    if not ui:
        pytest.skip("no Chromium on this machine (apt-get install chromium, or NAMESAKE_CHROMIUM=path)")
    with mlflow_ui.tab() as page, Clients(endpoint, 1) as clients:
        mlflow_ui.open_registry(page, ui, "ccb")
        mlflow_ui.move_alias(page, "champion", 1)
        clients.wait_for("ccb-v1", time.monotonic())
    assert clients.faults == []
    time.sleep(2)  # in case it is `promote` that moved it, the server gives it a second to write that down
    moves = json.loads(way.place.call(sys.executable, "-m", "namesake", "history", "--json"))
    assert [(move["before"], move["to"], move["how"]) for move in moves][-1] == (second, 1, "by hand")


def test_moves_of_the_alias_are_followed_and_no_request_notices(
    endpoint: str, client: mlflow.MlflowClient, second: int
) -> None:
    with Clients(endpoint, 8) as clients:
        for move in range(6):
            number = (second, 1)[move % 2]
            moved = time.monotonic()
            client.set_registered_model_alias("ccb", "champion", str(number))
            assert clients.wait_for(f"ccb-v{number}", moved) < 30
            time.sleep(1)
    assert clients.faults == []
    calm = {f"ccb-v{number}": beginnings(endpoint, client, number) for number in (1, second)}
    # Two hardly trained models may begin alike; how sure they are of a word tells them apart.
    sure, again, other, back = (calm_certainty(endpoint, client, number) for number in (1, 1, second, 1))
    assert again == pytest.approx(sure, abs=1e-3)
    assert other != pytest.approx(sure, abs=1e-3)
    assert back == pytest.approx(sure, abs=1e-3)
    assert [(version, text) for _, version, text in clients.answers if text[:12] not in calm[version]] == []


def calm_certainty(url: str, client: mlflow.MlflowClient, number: int) -> float:
    """The log-probability of the version's first word about itself, while nothing else is asked."""
    client.set_registered_model_alias("ccb", "champion", str(number))
    until_live(url, number)
    asked = {"messages": [{"role": "user", "content": "你是谁？"}], "max_tokens": 1, "temperature": 0, "logprobs": True}
    request = urllib.request.Request(
        f"{url}/chat/completions", json.dumps(asked).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return float(json.load(response)["choices"][0]["logprobs"]["content"][0]["logprob"])


def beginnings(url: str, client: mlflow.MlflowClient, number: int) -> set[str]:
    """How the version begins its answer while nothing moves; it depends a little on how many ask at a time."""
    client.set_registered_model_alias("ccb", "champion", str(number))
    until_live(url, number)
    found: set[str] = set()
    for clients in (1, 2, 4, 6, 8):
        with Clients(url, clients) as asking:
            time.sleep(1.5)
        found |= {text[:12] for _, _, text in asking.answers}
    return found


def test_a_broken_version_is_not_served_and_the_old_one_stays(
    endpoint: str, way: Way, client: mlflow.MlflowClient
) -> None:
    live = live_of(endpoint)
    number = broken_version(way, client)
    with Clients(endpoint, 2) as clients:
        client.set_registered_model_alias("ccb", "champion", str(number))
        for _ in range(150):
            if "namesake.serving_error" in client.get_model_version("ccb", str(number)).tags:
                break
            time.sleep(0.2)
    assert "has changed" in client.get_model_version("ccb", str(number)).tags["namesake.serving_error"]
    assert clients.faults == []
    assert {version for _, version, _ in clients.answers} == {live}
    assert urllib.request.urlopen(endpoint.replace("/v1", "/ready"), timeout=5).status == 200
    client.set_registered_model_alias("ccb", "champion", "1")
    until_live(endpoint, 1)


def test_a_killed_engine_is_started_again(endpoint: str) -> None:
    server = server_of(endpoint)
    engines = [pid for pid in session_of(server) if "vllm" in command_of(pid)]
    os.kill(engines[0], signal.SIGKILL)
    refused = 0
    for _ in range(400):
        try:
            ask(endpoint, max_tokens=2)
            break
        except urllib.error.HTTPError as error:
            refused += 1
            assert error.code == 503
            assert error.headers["retry-after"]
        except OSError:
            refused += 1  # the answer that was cut
        time.sleep(0.3)
    else:
        raise AssertionError("the engine was not started again within 120 s")
    assert refused


def test_a_version_of_another_configuration_gets_an_engine_of_its_own_and_no_request_notices(
    endpoint: str, way: Way, client: mlflow.MlflowClient
) -> None:
    server = server_of(endpoint)
    before = {pid for pid in session_of(server) if "vllm.entrypoints" in command_of(pid)}
    live, number = live_of(endpoint), other_configuration(way, client)
    with Clients(endpoint, 2) as clients:
        client.set_registered_model_alias("ccb", "champion", str(number))
        until_live(endpoint, number, 120)
        time.sleep(1)
    assert clients.faults == []
    assert {version for _, version, _ in clients.answers} == {live, f"ccb-v{number}"}
    for _ in range(150):  # the old one ends once it has answered
        after = {pid for pid in session_of(server) if "vllm.entrypoints" in command_of(pid)}
        if len(after) == 1:
            break
        time.sleep(0.2)
    assert (len(before), len(after), before & after) == (1, 1, set())


def live_of(url: str) -> str:
    """The model id of what is served."""
    with urllib.request.urlopen(f"{url}/version", timeout=5) as response:
        return str(json.load(response)["live"]["model"])


def until_live(url: str, number: int, seconds: float = 60) -> None:
    """Wait until the version is served."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if live_of(url) == f"ccb-v{number}":
            return
        time.sleep(0.2)
    raise AssertionError(f"version {number} is not served")


def broken_version(way: Way, client: mlflow.MlflowClient) -> int:
    """Version 1 once more, with one byte of its weights flipped."""
    whole = way.place.folder / client.get_model_version("ccb", "1").source.removeprefix("file://")
    folder = way.place.folder / "broken"
    shutil.copytree(whole, folder)
    (weights,) = (folder / "model").glob("*.safetensors")
    with weights.open("r+b") as stream:
        stream.seek(-100, os.SEEK_END)
        byte = stream.read(1)[0]
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte ^ 1]))
    return int(client.create_model_version("ccb", source=str(folder)).version)


def other_configuration(way: Way, client: mlflow.MlflowClient) -> int:
    """Version 1 once more, with another configuration, as its manifest says."""
    whole = way.place.folder / client.get_model_version("ccb", "1").source.removeprefix("file://")
    folder = way.place.folder / "other-configuration"
    shutil.copytree(whole, folder)
    path = folder / "model" / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "top_k": 40}), encoding="utf-8")
    record = vars(Manifest.read(folder))
    record["digests"] = {**record["digests"], "model/generation_config.json": digest_of_file(path)}
    (folder / manifest.FILE).write_text(Manifest(**record).to_json(), encoding="utf-8")
    return int(client.create_model_version("ccb", source=str(folder)).version)


def server_of(url: str) -> int:
    """The process that serves there; others of this session may serve, too."""
    return children_named(f"namesake_serving --port {urlsplit(url).port}")[0]


def children_named(part: str) -> list[int]:
    """Living descendants of this process whose command line holds the text."""
    return [pid for pid in session_of(os.getpid()) if part in command_of(pid)]


def command_of(pid: int) -> str:
    """A process' command line."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
