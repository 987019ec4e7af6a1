"""What ``namesake status`` reads off an endpoint and off a version's tags, and how it tells it."""

from __future__ import annotations

import json
import socket
from typing import Any

import pytest

from namesake import status, tracking
from namesake.errors import InputError, RegistryError
from namesake.registry import Model, Move, Version
from namesake.status import Judged, Registered, Served, Status, Stored
from namesake.terminal import Screen
from tests.unit.answers import answering

ABOUT: dict[str, Any] = {
    "uri": "models:/ccb@champion",
    "step": "rest",
    "wanted": "models:/ccb/3",
    "refused": {"models:/ccb/4": "it is broken"},
    "live": {"version": "models:/ccb/3", "model": "ccb-v3", "since": 1000.5},
}
HERE = Stored("sqlite:///mlflow.db", made=True)
CHAMPION = Judged(3, "run3", "passed", "", "", {"identity": 1.0, "swapped": 0.0, "leak": 0.0, "plain": 0.4})


def asked(body: bytes, code: int = 200, path: str = "/v1/version") -> Served:
    """What is made of such an answer."""
    with answering({path: (code, body)}) as port:
        return status.served(f"http://127.0.0.1:{port}")


def told(found: Status, capfd: pytest.CaptureFixture[str]) -> str:
    """What is shown of it."""
    status.show(found, Screen())
    return capfd.readouterr().out


def test_a_serving_endpoint_says_what_since_when_and_what_it_follows() -> None:
    found = asked(json.dumps(ABOUT).encode())
    assert (found.state, found.version, found.since, found.follows) == (
        "serving",
        "models:/ccb/3",
        1000.5,
        "models:/ccb@champion",
    )
    assert found.refused == {"models:/ccb/4": "it is broken"}


def test_an_endpoint_that_does_not_say_since_when_is_understood() -> None:
    found = asked(json.dumps({**ABOUT, "live": {"version": "models:/ccb/3"}}).encode())
    assert (found.state, found.since) == ("serving", None)


def test_an_endpoint_without_a_version_yet_waits() -> None:
    found = asked(json.dumps({**ABOUT, "live": None}).encode())
    assert (found.state, found.version, found.follows) == ("waiting", "", "models:/ccb@champion")


@pytest.mark.parametrize(
    ("body", "code", "state"),
    [
        (b"", 401, "locked"),
        (b"", 404, "foreign"),
        (b"<html>", 200, "foreign"),
        (b"[]", 200, "foreign"),
        (b'{"version": "3.17.2"}', 200, "foreign"),
        (b'{"uri": "x", "refused": {}, "live": 7}', 200, "foreign"),
        (b'{"uri": "x", "refused": {}, "live": {"version": "y", "since": "noon"}}', 200, "foreign"),
    ],
)
def test_what_is_not_ours_is_told_apart(body: bytes, code: int, state: str) -> None:
    assert asked(body, code).state == state


def test_nothing_listening_is_no_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert status.served(f"http://127.0.0.1:{port}").state == "silent"


def test_something_mute_is_given_up_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert status.served(f"http://127.0.0.1:{server.getsockname()[1]}", seconds=0.2).state == "silent"


def test_the_key_is_sent_and_the_url_may_end_with_v1() -> None:
    keys: list[str | None] = []
    with answering({"/v1/version": (200, json.dumps(ABOUT).encode())}, asked=keys) as port:
        for url, key in ((f"http://127.0.0.1:{port}/v1/", "secret"), (f"http://localhost:{port}", "")):
            assert status.served(url, api_key=key).state == "serving"
    assert keys == ["Bearer secret", None]


def test_an_endpoint_here_is_asked_past_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert asked(json.dumps(ABOUT).encode()).state == "serving"


@pytest.mark.parametrize(
    "url", ["", "ccb", "127.0.0.1:8000", "file:///etc/passwd", "http://", "http://[::1", "http://x:y"]
)
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(InputError, match="no URL of an endpoint"):
        status.served(url)


def test_a_version_is_judged_by_its_tags_and_tags_by_hand_do_no_harm() -> None:
    tags = {"namesake.gate": "passed", "score.identity": "0.9531", "score.plain": "x", "namesake.override": "demo"}
    found = Judged.of(Version("ccb", 3, "run3", "", "READY", tags, 0))
    assert found == Judged(3, "run3", "passed", "demo", "", {"identity": 0.9531})


@pytest.mark.parametrize(
    ("follows", "wanted", "behind"),
    [
        ("models:/ccb@champion", "models:/ccb/4", True),
        ("models:/ccb@old", "models:/ccb/3", False),
        ("models:/ccb@gone", "", None),
        ("models:/ccb/3", "", None),
        ("models:/other@champion", "", None),
    ],
)
def test_an_endpoint_is_behind_where_its_alias_points_elsewhere(
    monkeypatch: pytest.MonkeyPatch, follows: str, wanted: str, behind: bool | None
) -> None:
    model = Model("ccb", "踩踩背 CCB", {"champion": 4, "old": 3})
    monkeypatch.setattr(tracking, "store", lambda: tracking.Store("sqlite", True, "", ""))
    monkeypatch.setattr(status.registry, "models", lambda: [model])
    monkeypatch.setattr(status, "_registered", lambda one: Registered(one.name, one.identity, None, None, {}, ()))
    with answering({"/v1/version": (200, json.dumps({**ABOUT, "uri": follows}).encode())}) as port:
        found = status.status(url=f"http://127.0.0.1:{port}")
    assert (found.endpoint.wanted, found.endpoint.behind) == (wanted, behind)
    assert found.record()["endpoint"]["behind"] is behind


def test_a_model_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "store", lambda: tracking.Store("sqlite", True, "", ""))
    monkeypatch.setattr(status.registry, "models", list)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://ann:secret@mlflow.example:5000")
    with pytest.raises(RegistryError, match=r"no registered model ccc of ours in http://mlflow\.example:5000\."):
        status.status("ccc", url="http://127.0.0.1:1")


def test_a_store_that_is_not_there_yet_is_named_and_not_made(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracking, "store", lambda: tracking.Store("sqlite", False, "", ""))
    monkeypatch.setattr(status.registry, "models", lambda: pytest.fail("the registry was asked"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////nowhere/else.db")
    found = status.status(url="http://127.0.0.1:1")
    assert found.models == ()
    assert found.record()["store"] == {"address": "sqlite:////nowhere/else.db", "made": False}
    out = told(found, capfd)
    assert "sqlite:////nowhere/else.db" in out
    assert "no such store yet" in out
    assert "promoted" not in out


def test_everything_is_told_in_lines(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "moment", lambda seconds: f"<{seconds:g}>")
    moved = Move(5.0, "champion", 2, 3, "ann", "promote", "gate passed")
    older = Judged(2, "run2", "failed: leak 3%", "demo", "", {})
    model = Registered("ccb", "踩踩背 CCB", CHAMPION, moved, {"challenger": 2}, (CHAMPION, older))
    endpoint = Served(
        "http://x", "serving", "models:/ccb/3", 7.0, "models:/ccb@champion", "models:/ccb/4", {"u": "bad"}
    )
    assert told(Status(HERE, (model,), endpoint), capfd).splitlines() == [
        "› sqlite:///mlflow.db",
        "› ccb  踩踩背 CCB",
        "  champion  version 3 since <5>, promote by ann: gate passed",
        "  gate      passed",
        "  scores    identity 100.0%  swapped 0.0%  leak 0.0%  plain 40.0%",
        "  aliases   challenger version 2",
        "  newest    version 3  gate passed",
        "            version 2  gate failed, overruled",
        "› http://x",
        "  serves models:/ccb/3 since <7>, behind models:/ccb@champion, which points at models:/ccb/4",
        "! u is not served: bad",
    ]


@pytest.mark.parametrize(
    ("endpoint", "words"),
    [
        (Served("http://x", "silent"), "nothing answers there"),
        (Served("http://x", "locked"), "--api-key"),
        (Served("http://x", "foreign"), "no `namesake serve`"),
        (Served("http://x", "waiting", follows="models:/ccb@champion"), "no version answers yet"),
        (Served("http://x", "serving", "models:/ccb/3", follows="models:/ccb/3"), "and stays there"),
        (Served("http://x", "serving", "models:/ccb/3", follows="models:/ccb@a"), "follows models:/ccb@a"),
    ],
)
def test_each_state_of_an_endpoint_has_its_words(
    capfd: pytest.CaptureFixture[str], endpoint: Served, words: str
) -> None:
    out = told(Status(HERE, (), endpoint), capfd)
    assert out.startswith("› sqlite:///mlflow.db\n")
    assert "Nothing has been promoted yet." in out
    assert words in out


def test_a_champion_that_nobody_wrote_down_or_that_is_none_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    models = (Registered("a", "", CHAMPION, None, {}, ()), Registered("b", "", None, None, {}, ()))
    out = told(Status(HERE, models, Served("http://x", "silent")), capfd)
    assert "version 3; since when is not in the history" in out
    assert "champion points nowhere" in out
