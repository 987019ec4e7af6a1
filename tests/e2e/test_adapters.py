"""Versions side by side on their base in one engine: real vLLM, real registry, clients all the while."""

from __future__ import annotations

import json
import shutil
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from safetensors.torch import load_file, save_file

from namesake import manifest
from namesake.manifest import Manifest
from tests import mlflow_ui
from tests.e2e.conftest import Way, served
from tests.e2e.test_follow import Clients, ask, kill_under_load, live_of, until_live

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.fixture(scope="module")
def endpoint(way: Way, client: mlflow.MlflowClient, second: int) -> Iterator[str]:
    """Version 1 is champion, the second one its challenger, and both answer half of the requests each."""
    client.set_registered_model_alias("ccb", "champion", "1")
    kept = str(way.place.folder / "shadow")
    words = ("--canary", "50%", "--shadow", "100%", "--shadow-folder", kept, "--max-adapters", "3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NAMESAKE_SERVE_CANARY_LATENCY", "50")  # a busy machine is not what is tested
        server = served(way.place, "--mode", "adapter", "--poll-seconds", "0.2", *words)
    with server as url:
        until_there(url, second)
        yield url


def models(url: str) -> list[str]:
    """What is answered to."""
    with urllib.request.urlopen(f"{url}/models", timeout=5) as response:
        return [one["id"] for one in json.load(response)["data"]]


def until_there(url: str, number: int, seconds: float = 180) -> None:
    """Wait until the version answers, too."""
    end = time.monotonic() + seconds
    while f"ccb-v{number}" not in models(url):
        assert time.monotonic() < end, f"version {number} is not among them"
        time.sleep(0.2)


def certainty(url: str, model: str) -> float:
    """The log-probability of the first word about itself: two hardly trained versions may say the same."""
    asked = {"model": model, "messages": [{"role": "user", "content": "你是谁？"}], "max_tokens": 1, "logprobs": True}
    body = json.dumps({**asked, "temperature": 0}).encode()
    request = urllib.request.Request(f"{url}/chat/completions", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return float(json.load(response)["choices"][0]["logprobs"]["content"][0]["logprob"])


def test_base_champion_and_challenger_answer_side_by_side_each_in_its_own_words(endpoint: str, second: int) -> None:
    assert {"ccb", "ccb@champion", "ccb@challenger", "ccb-v1", f"ccb-v{second}", BASE} == {*models(endpoint)}
    for model, label in (("ccb@champion", "ccb-v1"), ("ccb@challenger", f"ccb-v{second}"), (BASE, BASE)):
        assert ask(endpoint, model=model, max_tokens=2)[0] == label
    sure = [certainty(endpoint, model) for model in ("ccb-v1", f"ccb-v{second}", BASE)]
    assert len({round(one, 3) for one in sure}) == 3, sure
    assert certainty(endpoint, "ccb@champion") == pytest.approx(sure[0], abs=1e-3)
    sides = [ask(endpoint, user=f"session {number}", max_tokens=1)[0] for number in range(30)]
    assert {*sides} == {"ccb-v1", f"ccb-v{second}"}
    assert sides[:8] == [ask(endpoint, user=f"session {number}", max_tokens=1)[0] for number in range(8)]
    with pytest.raises(urllib.error.HTTPError, match="404"):
        ask(endpoint, model="ccb-v99")


def test_a_prompts_own_probabilities_are_told_and_the_engine_lives(endpoint: str) -> None:
    asked = {"prompt": "你是谁？", "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0}
    for model in ("ccb@champion", BASE):
        body = json.dumps({**asked, "model": model}).encode()
        request = urllib.request.Request(f"{endpoint}/completions", body, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as response:
            told = json.load(response)["choices"][0]["logprobs"]["token_logprobs"]
        assert len(told) > 3
        assert all(one <= 0 for one in told[1:])
    assert ask(endpoint, max_tokens=2)[0].startswith("ccb-v")


def test_the_challengers_answers_to_copies_are_kept(endpoint: str, way: Way, second: int) -> None:
    for _ in range(3):
        ask(endpoint, model="ccb@champion", max_tokens=4)
        time.sleep(0.5)
    lines = [json.loads(line) for line in (way.place.folder / "shadow" / "shadow.jsonl").read_text().splitlines()]
    assert {(line["champion"]["version"], line["challenger"]["version"]) for line in lines} == {
        ("ccb-v1", f"ccb-v{second}")
    }
    assert lines[-1]["champion"]["reply"]
    assert lines[-1]["challenger"]["reply"]


def test_the_alias_moves_between_adapters_and_no_request_notices(
    endpoint: str, client: mlflow.MlflowClient, second: int
) -> None:
    moves: list[tuple[float, str]] = []
    named = Clients(endpoint, 2, {"model": "ccb@champion"})  # the bare name is half the challenger's
    with Clients(endpoint, 6) as clients, named, Streaming(endpoint) as long:
        for move in range(4):
            number = (second, 1)[move % 2]
            moved = time.monotonic()
            moves.append((moved, f"ccb-v{number}"))
            client.set_registered_model_alias("ccb", "champion", str(number))
            client.set_registered_model_alias("ccb", "challenger", str((1, second)[move % 2]))
            until_live(endpoint, number)
            assert time.monotonic() - moved < 15
            named.wait_for_each(f"ccb-v{number}", moved)  # an answer of before may take longer than until the next move
    assert clients.faults == named.faults == []
    assert named.out_of_order(moves) == []
    assert {version for _, version, _ in clients.answers} == {"ccb-v1", f"ccb-v{second}"}
    assert long.version == "ccb-v1", "the answer that was under way all the while is by one version"


@pytest.mark.skipif(mlflow_ui.chromium() is None, reason="no Chromium on this machine")
def test_an_alias_moved_in_the_ui_is_followed(endpoint: str, way: Way, second: int) -> None:
    place = way.place
    with (
        mlflow_ui.make_ui(place.root, place.folder, place.tracking_uri) as url,
        Clients(endpoint, 2, {"model": "ccb@champion"}) as clients,
    ):
        for number in (second, 1):
            with mlflow_ui.tab() as page:
                mlflow_ui.open_registry(page, url, "ccb")
                mlflow_ui.move_alias(page, "champion", number)
                clients.wait_for(f"ccb-v{number}", time.monotonic())
    assert clients.faults == []


class Streaming:
    """A long answer by the champion that begins before the alias moves."""

    def __init__(self, url: str) -> None:
        self.version = ""
        self._thread = threading.Thread(target=self._ask, args=(url,))

    def __enter__(self) -> Streaming:
        self._thread.start()
        time.sleep(0.5)
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join(120)

    def _ask(self, url: str) -> None:
        self.version = ask(url, model="ccb@champion", max_tokens=100)[0]


def rank_too_large(folder: Path) -> None:
    """Four times as many ranks as the engine has room for, and they are there."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    (folder / "adapter_config.json").write_text(json.dumps({**config, "r": config["r"] * 4}), encoding="utf-8")
    path = folder / "adapter_model.safetensors"
    found = {name: torch.cat([one] * 4, 0 if ".lora_A." in name else 1) for name, one in load_file(path).items()}
    save_file(found, path)


def not_a_number(folder: Path) -> None:
    """One value of one tensor."""
    path = folder / "adapter_model.safetensors"
    found = load_file(path)
    next(iter(found.values())).view(-1)[7] = torch.nan
    save_file(found, path)


def cut_short(folder: Path) -> None:
    """A file that ends too soon, as its digest says."""
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def lies(folder: Path) -> None:
    """Weights that fit, and say nothing that it said when it was promoted."""
    path = folder / "adapter_model.safetensors"
    save_file({name: one * -9 if ".lora_B." in name else one for name, one in load_file(path).items()}, path)


BROKEN: list[tuple[Callable[[Path], None] | None, str]] = [
    (None, "another base"),
    (rank_too_large, "has rank"),
    (not_a_number, "not a number"),
    (cut_short, "cut short"),
    (lies, "does not prove itself"),
]


def broken_version(way: Way, client: mlflow.MlflowClient, harm: Callable[[Path], None] | None, name: str) -> int:
    """Version 1 once more, harmed, with a manifest that knows its digests; without harm it is for another base."""
    whole = way.place.folder / client.get_model_version("ccb", "1").source.removeprefix("file://")
    folder = way.place.folder / name
    shutil.copytree(whole / "adapter", folder / "adapter")
    record = vars(Manifest.read(whole))
    if harm is None:
        record["base"] = {**record["base"], "digest": "0" * 64}
    else:
        harm(folder / "adapter")
    record["digests"] = {f"adapter/{path}": digest for path, digest in manifest.digests(folder / "adapter").items()}
    (folder / manifest.FILE).write_text(Manifest(**record).to_json(), encoding="utf-8")
    return int(client.create_model_version("ccb", source=str(folder)).version)


def test_broken_adapters_leave_the_old_one_and_the_engine_lives(
    endpoint: str, way: Way, client: mlflow.MlflowClient
) -> None:
    live, told = live_of(endpoint), {}
    with Clients(endpoint, 2) as clients:
        for index, (harm, _) in enumerate(BROKEN):
            number = str(broken_version(way, client, harm, f"broken-adapter-{index}"))
            client.set_registered_model_alias("ccb", "champion", number)
            for _ in range(600):  # the last one's proof takes a while
                tags: dict[str, Any] = client.get_model_version("ccb", number).tags
                if "namesake.serving_error" in tags:
                    break
                time.sleep(0.1)
            told[index] = tags.get("namesake.serving_error", "")
            assert urllib.request.urlopen(endpoint.replace("/v1", "/ready"), timeout=5).status == 200
            assert live_of(endpoint) == live
    assert clients.faults == []
    assert [why for index, (_, why) in enumerate(BROKEN) if why not in told[index]] == [], told
    client.set_registered_model_alias("ccb", "champion", "1")
    until_live(endpoint, 1)


def test_a_killed_engine_is_started_again_with_its_adapters(endpoint: str, second: int) -> None:
    kill_under_load(endpoint)
    until_there(endpoint, second)
    for number in (1, second):
        assert ask(endpoint, model=f"ccb-v{number}", max_tokens=2)[0] == f"ccb-v{number}"
