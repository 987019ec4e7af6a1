"""The alias moves and the endpoint answers with the other version: real vLLM, real registry, clients all the while."""

from __future__ import annotations

import http.client
import json
import math
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import mlflow
import psutil
import pytest

from namesake import manifest
from namesake.manifest import Manifest
from namesake.paths import digest_of_file
from tests import mlflow_ui
from tests.e2e.conftest import Way, alive, served, session_of

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
    """Clients that ask without a pause until they are stopped, each with a session of its own.

    Attributes:
        more: what they ask beside.
        each: of each client, when it was answered and by which version.
    """

    url: str
    number: int
    more: dict[str, Any] = field(default_factory=dict)
    answers: list[tuple[float, str, str]] = field(default_factory=list)
    each: list[list[tuple[float, str]]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    stopped: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Clients:
        self.each = [[] for _ in range(self.number)]
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(self.number)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        for thread in self._threads:
            thread.join(120)

    def _ask(self, number: int) -> None:
        while not self.stopped.is_set():
            try:
                version, text = ask(self.url, user=f"client {number}", **self.more)
            except (OSError, http.client.HTTPException, AssertionError, ValueError) as error:
                self.faults.append(repr(error))
                time.sleep(0.05)
            else:
                self.answers.append((time.monotonic(), version, text))
                self.each[number].append((self.answers[-1][0], version))

    def out_of_order(self, moves: Sequence[tuple[float, str]]) -> list[list[str]]:
        """Versions that answered one client in turn between two moves, where they are not the old and then the new.

        Args:
            moves: when the alias was moved, and to which version.
        """
        found = []
        for answers in self.each:
            for (begin, version), (end, _) in pairwise([*moves, (math.inf, "")]):
                seen = [name for name, _ in groupby(name for when, name in answers if begin <= when < end)]
                if len(seen) > 2 or (len(seen) == 2 and seen[1] != version):
                    found.append(seen)
        return found

    def wait_for_each(self, version: str, since: float, seconds: float = 60) -> None:
        """Until each client has an answer by the version."""
        while not all(any(when > since and name == version for when, name in answers) for answers in self.each):
            assert time.monotonic() < since + seconds, f"{version} did not answer each client"
            time.sleep(0.05)

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
    moves: list[tuple[float, str]] = []
    with Clients(endpoint, 8) as clients:
        for move in range(6):
            number = (second, 1)[move % 2]
            moved = time.monotonic()
            moves.append((moved, f"ccb-v{number}"))
            client.set_registered_model_alias("ccb", "champion", str(number))
            assert clients.wait_for(f"ccb-v{number}", moved) < 30
            time.sleep(1)
    assert clients.faults == []
    assert clients.out_of_order(moves) == []
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


LONG = {
    "messages": [
        {"role": "system", "content": "You count."},  # of the client's own, so that it is the same for each version
        {
            "role": "user",
            "content": " ".join(f"{number} and {number + 1} is {2 * number + 1}." for number in range(40)),
        },
    ],
    "max_tokens": 8,
    "temperature": 0,
    "logprobs": True,
}
"""A prompt of more than two of the engine's blocks (128 tokens on a CPU)."""


def test_what_the_old_version_left_in_the_prefix_cache_is_not_used_by_the_new_one(
    endpoint: str, client: mlflow.MlflowClient, second: int
) -> None:
    client.set_registered_model_alias("ccb", "champion", "1")
    until_live(endpoint, 1)
    old, before = certainties(post(endpoint, LONG)), figure(endpoint, "vllm:prefix_cache_hits_total")
    assert certainties(post(endpoint, LONG)) == pytest.approx(old, abs=0.02)
    assert figure(endpoint, "vllm:prefix_cache_hits_total") >= before + 256, "there is a cache"
    client.set_registered_model_alias("ccb", "champion", str(second))
    until_live(endpoint, second)
    before = figure(endpoint, "vllm:prefix_cache_hits_total")
    new = certainties(post(endpoint, LONG))
    assert figure(endpoint, "vllm:prefix_cache_hits_total") == before
    # Past the gateway, with a salt that no block in the cache was made with: all of it is computed.
    cold = certainties(past_the_gateway(endpoint, {**LONG, "model": "namesake", "cache_salt": "cold"}))
    assert new == pytest.approx(cold, abs=1e-3)
    assert new != pytest.approx(old, abs=1e-3)


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """A whole answer."""
    request = urllib.request.Request(
        f"{url}/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        answer: dict[str, Any] = json.load(response)
        return answer


def past_the_gateway(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """A whole answer by the engine itself."""
    (address,) = {
        str(one.laddr)
        for pid in session_of(server_of(url))
        for one in psutil.Process(pid).net_connections("unix")
        if str(one.laddr).endswith(".sock")
    }
    connection = http.client.HTTPConnection("engine", timeout=60)
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(address)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
    answer: dict[str, Any] = json.load(connection.getresponse())
    connection.close()
    return answer


def certainties(answer: dict[str, Any]) -> list[float]:
    """The log-probability of each token of an answer."""
    return [one["logprob"] for one in answer["choices"][0]["logprobs"]["content"]]


def figure(url: str, name: str) -> float:
    """The sum of a metric."""
    with urllib.request.urlopen(url.replace("/v1", "/metrics"), timeout=5) as response:
        return sum(float(one) for one in re.findall(rf"^{name}(?:\{{.*\}})? (\S+)$", response.read().decode(), re.M))


def flipped(weights: Path) -> None:
    """One bit of the last tensor."""
    with weights.open("r+b") as stream:
        stream.seek(-100, os.SEEK_END)
        byte = stream.read(1)[0]
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte ^ 1]))


def cut_short(weights: Path) -> None:
    """A hundred bytes less."""
    os.truncate(weights, weights.stat().st_size - 100)


def not_a_number(weights: Path) -> None:
    """One value of the last tensor, in bfloat16."""
    with weights.open("r+b") as stream:
        stream.seek(-100, os.SEEK_END)
        stream.write(b"\xc0\x7f")


BROKEN: list[tuple[str, Callable[[Path], None] | None, bool, str, str]] = [
    ("flipped", flipped, False, "has changed", "damaged"),
    ("cut", cut_short, True, "cut short", "damaged"),
    ("nan", not_a_number, True, "not a number", "damaged"),
    ("gone", None, False, manifest.FILE, "damaged"),
]
"""Name, what is done to the weights (none: the files are deleted in the store), whether the manifest knows of it, why
it is not served, and what that counts as.
"""


def test_broken_versions_are_not_served_and_the_old_one_stays(
    endpoint: str, way: Way, client: mlflow.MlflowClient
) -> None:
    client.set_registered_model_alias("ccb", "champion", "1")
    until_live(endpoint, 1)
    with Clients(endpoint, 2) as clients:
        for name, harm, known, why, reason in BROKEN:
            before = figure(endpoint, rf'namesake_version_changes_total\{{reason="{reason}",[^}}]*\}}')
            number = str(broken_version(way, client, name, harm, known=known))
            client.set_registered_model_alias("ccb", "champion", number)
            assert why in refused(client, number)
            assert figure(endpoint, rf'namesake_version_changes_total\{{reason="{reason}",[^}}]*\}}') > before
            assert urllib.request.urlopen(endpoint.replace("/v1", "/ready"), timeout=5).status == 200
            assert live_of(endpoint) == "ccb-v1"
            shutil.rmtree(way.place.folder / name, ignore_errors=True)
        client.set_registered_model_alias("ccb", "champion", "1")
    assert clients.faults == []
    assert {version for _, version, _ in clients.answers} == {"ccb-v1"}


def refused(client: mlflow.MlflowClient, number: str, name: str = "ccb") -> str:
    """Why the version is not served, once that is told."""
    for _ in range(150):
        tags: dict[str, str] = client.get_model_version(name, number).tags
        if "namesake.serving_error" in tags:
            return tags["namesake.serving_error"]
        time.sleep(0.2)
    raise AssertionError(f"version {number} is not refused")


def test_a_version_that_is_deleted_while_it_is_served_goes_on_answering(
    endpoint: str, way: Way, client: mlflow.MlflowClient
) -> None:
    number = broken_version(way, client, "deleted", lambda _: None, known=True)  # nothing is wrong with it
    client.set_registered_model_alias("ccb", "champion", str(number))
    until_live(endpoint, number)
    before = figure(endpoint, "namesake_registry_errors_total")
    with Clients(endpoint, 2) as clients:
        client.delete_model_version("ccb", str(number))
        shutil.rmtree(way.place.folder / "deleted")
        for _ in range(50):
            if figure(endpoint, "namesake_registry_errors_total") > before:
                break
            time.sleep(0.2)
        else:
            raise AssertionError("the registry was not asked")
        assert urllib.request.urlopen(endpoint.replace("/v1", "/ready"), timeout=5).status == 200
    assert clients.faults == []
    assert {version for _, version, _ in clients.answers} == {f"ccb-v{number}"}
    client.set_registered_model_alias("ccb", "champion", "1")
    until_live(endpoint, 1)


def test_a_killed_engine_is_started_again_and_every_request_is_answered_or_told_to_come_again(endpoint: str) -> None:
    kill_under_load(endpoint)


def kill_under_load(url: str) -> None:
    """SIGKILL the engine while eight clients ask: each is answered, told to come again or, where its reply had begun,
    cut; and answered again once the engine has been started.
    """
    engine = engines(url)[0]
    ended: list[list[str]] = [[] for _ in range(8)]
    killed = threading.Event()

    def ask_on(number: int) -> None:
        after = False  # whether what was answered was asked after the kill
        while not (after and ended[number][-1] == "answered"):
            after = killed.is_set()
            ended[number].append(end_of(url, stream=number % 2 == 0))
            time.sleep(0 if ended[number][-1] == "answered" else 0.3)

    threads = [threading.Thread(target=ask_on, args=(number,)) for number in range(len(ended))]
    for thread in threads:
        thread.start()
    time.sleep(2)
    os.kill(engine, signal.SIGKILL)
    killed.set()
    for thread in threads:
        thread.join(120)
    assert not [thread for thread in threads if thread.is_alive()], "the engine was not started again within 120 s"
    assert {one for each in ended for one in each} <= {"answered", "told", "cut"}, ended
    assert all("told" in each for each in ended), "the load was there when it was killed"
    assert [each for each in ended[1::2] if "cut" in each] == [], "what has not begun can be told"
    assert [each for each in ended[::2] if each.count("cut") > 1] == []


def end_of(url: str, *, stream: bool) -> str:
    """How a request ends: ``answered``, ``told`` to come again, ``cut`` after its reply had begun, or otherwise."""
    try:
        _ = ask(url) if stream else post(url, {**ASKED})
    except urllib.error.HTTPError as error:
        return "told" if error.code == 503 and error.headers["retry-after"] else repr(error)
    except (http.client.IncompleteRead, AssertionError):  # no whole chunk, or no [DONE]
        return "cut"
    except (OSError, http.client.HTTPException) as error:
        plain = type(error) is ConnectionResetError  # not while the head was waited for
        return "cut" if stream and plain else repr(error)
    return "answered"


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
    # Its own generation settings hold, where the client says nothing else.
    long = post(endpoint, {"messages": ASKED["messages"], **ENDLESS})
    assert long["usage"]["completion_tokens"] == SETTINGS["max_new_tokens"]
    asked = {"messages": ASKED["messages"], "max_tokens": 16}
    free = [post(endpoint, asked) for _ in range(3)]
    greedy = post(endpoint, {**asked, "temperature": 0})
    assert {one["choices"][0]["message"]["content"] for one in free} == {greedy["choices"][0]["message"]["content"]}


def test_on_sigterm_a_stream_ends_whole_and_new_requests_are_told_to_come_again(endpoint: str) -> None:
    server, streamed, begun = server_of(endpoint), list[bytes](), threading.Event()
    below = session_of(server)

    def stream() -> None:
        body = json.dumps({"messages": ASKED["messages"], **ENDLESS, "stream": True}).encode()
        request = urllib.request.Request(f"{endpoint}/chat/completions", body, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as response:
            for line in response:
                streamed.append(line)
                begun.set()

    thread = threading.Thread(target=stream)
    thread.start()
    assert begun.wait(30)
    os.kill(server, signal.SIGTERM)
    time.sleep(0.3)
    assert end_of(endpoint, stream=False) == "told"
    thread.join(60)
    assert streamed[-2:] == [b"data: [DONE]\n", b"\n"]
    for _ in range(500):
        if not alive(server):
            break
        time.sleep(0.1)
    assert [pid for pid in (server, *below) if alive(pid)] == []  # that it exits with 0 is seen by who started it


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


def broken_version(
    way: Way, client: mlflow.MlflowClient, name: str, harm: Callable[[Path], None] | None, *, known: bool
) -> int:
    """Version 1 once more, with harm done to its weights.

    Args:
        harm: none: all its files are deleted, once it is registered.
        known: its manifest has the digest of the harmed file.
    """
    whole = way.place.folder / client.get_model_version("ccb", "1").source.removeprefix("file://")
    folder = way.place.folder / name
    shutil.copytree(whole, folder)
    (weights,) = (folder / "model").glob("*.safetensors")
    if harm is not None:
        harm(weights)
    if known:
        record = vars(Manifest.read(folder))
        record["digests"] = {**record["digests"], f"model/{weights.name}": digest_of_file(weights)}
        (folder / manifest.FILE).write_text(Manifest(**record).to_json(), encoding="utf-8")
    number = int(client.create_model_version("ccb", source=str(folder)).version)
    if harm is None:
        shutil.rmtree(folder)
    return number


SETTINGS = {"top_k": 1, "temperature": 2.0, "max_new_tokens": 150}
ENDLESS = {"logit_bias": {"0": -100, "2": -100}}
"""Without the tokens that end a reply (of the embedded base), so that it is as long as it may be."""


def other_configuration(way: Way, client: mlflow.MlflowClient) -> int:
    """Version 1 once more, with another configuration, as its manifest says."""
    whole = way.place.folder / client.get_model_version("ccb", "1").source.removeprefix("file://")
    folder = way.place.folder / "other-configuration"
    shutil.copytree(whole, folder)
    path = folder / "model" / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **SETTINGS}), encoding="utf-8")
    record = vars(Manifest.read(folder))
    record["digests"] = {**record["digests"], "model/generation_config.json": digest_of_file(path)}
    (folder / manifest.FILE).write_text(Manifest(**record).to_json(), encoding="utf-8")
    return int(client.create_model_version("ccb", source=str(folder)).version)


def server_of(url: str) -> int:
    """The process that serves there; others of this session may serve, too."""
    return children_named(f"namesake_serving --port {urlsplit(url).port}")[0]


def engines(url: str) -> list[int]:
    """The engines' first processes, in the order of their starts."""
    found = [pid for pid in session_of(server_of(url)) if "vllm.entrypoints" in command_of(pid)]
    return sorted(found, key=lambda pid: psutil.Process(pid).create_time())


def children_named(part: str) -> list[int]:
    """Living descendants of this process whose command line holds the text."""
    return [pid for pid in session_of(os.getpid()) if part in command_of(pid)]


def command_of(pid: int) -> str:
    """A process' command line."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
