"""What the server is told: flags over environment over defaults, and the wrong one named."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from typer.testing import CliRunner

from namesake import registry
from namesake.errors import InputError
from namesake.registry import Version
from namesake_serving import __main__ as serving
from namesake_serving import settings


def test_the_defaults_listen_on_loopback_port_8000() -> None:
    found = settings.read()
    assert (found.host, found.port) == ("127.0.0.1", 8000)
    assert (found.model, found.eager, found.engine_args) == ("", False, ())


def test_the_defaults_let_everybody_in_on_loopback_only_and_within_bounds() -> None:
    found = settings.read()
    assert (found.allowed_hosts, found.api_keys, found.api_keys_file, found.require_gate) == ((), (), None, False)
    assert (found.max_body_bytes, found.max_tokens) == (1 << 20, 4096)
    assert (found.requests_per_minute, found.tokens_per_minute, found.ssl_certfile) == (0, 0, None)
    assert (found.poll_seconds, found.hold_seconds, found.read_seconds) == (2, 10, 10)


@pytest.mark.parametrize(("gpu", "streams"), [(False, 32), (True, 256)])
def test_eight_times_as_many_may_wait_as_are_worked_on(
    monkeypatch: pytest.MonkeyPatch, gpu: bool, streams: int
) -> None:
    monkeypatch.setattr(settings, "has_gpu", lambda: gpu)
    assert (settings.read().streams, settings.read().most_requests) == (streams, 8 * streams)
    given = settings.read(max_streams=4)
    assert (given.streams, given.most_requests) == (4, 32)
    assert settings.read(max_requests=5).most_requests == 5


def test_a_variable_goes_over_the_default_and_a_flag_over_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NAMESAKE_SERVE_PORT", "8001")
    monkeypatch.setenv("NAMESAKE_SERVE_EAGER", "true")
    assert (settings.read().port, settings.read().eager) == (8001, True)
    assert (settings.read(port="8002", eager=False).port, settings.read(eager=False).eager) == (8002, False)


def test_a_flag_that_was_not_given_leaves_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NAMESAKE_SERVE_MODEL", "models:/ccb@champion")
    assert settings.read(model=None).model == "models:/ccb@champion"


def test_arguments_for_the_engine_come_as_flags_or_as_a_json_list(monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings.read(engine_args=("--dtype=float32", "--x")).engine_args == ("--dtype=float32", "--x")
    monkeypatch.setenv("NAMESAKE_SERVE_ENGINE_ARGS", '["--dtype=float32", "--x=踩 背"]')
    assert settings.read().engine_args == ("--dtype=float32", "--x=踩 背")


def test_hosts_and_keys_come_as_flags_or_as_a_json_list(monkeypatch: pytest.MonkeyPatch) -> None:
    found = settings.read(allowed_hosts=("models.example",), api_keys=("sk-a", "sk-b"), api_keys_file="/etc/keys")
    assert (found.allowed_hosts, found.api_keys) == (("models.example",), ("sk-a", "sk-b"))
    assert found.api_keys_file == Path("/etc/keys")
    monkeypatch.setenv("NAMESAKE_SERVE_ALLOWED_HOSTS", '["models.example"]')
    monkeypatch.setenv("NAMESAKE_SERVE_API_KEYS", '["sk-a", "sk-b"]')
    monkeypatch.setenv("NAMESAKE_SERVE_API_KEYS_FILE", "/etc/keys")
    assert settings.read() == found


@pytest.mark.parametrize("key", ["", " "])
def test_an_empty_key_is_refused(key: str) -> None:
    with pytest.raises(InputError) as caught:
        settings.read(api_keys=("sk-a", key))
    assert caught.value.parameter.startswith("api_keys")


BOUNDS = [
    ("port", 1, 65535),
    ("max_streams", 1, 1024),
    ("max_requests", 1, 100_000),
    ("max_body_bytes", 1024, 1 << 30),
    ("max_tokens", 1, 1 << 20),
    ("requests_per_minute", 0, 1_000_000_000),
    ("tokens_per_minute", 0, 1_000_000_000),
    ("poll_seconds", 0.1, 3600),
    ("hold_seconds", 0, 600),
    ("read_seconds", 0.1, 600),
    ("shutdown_seconds", 0, 3600),
    ("start_seconds", 1, 7200),
]


@pytest.mark.parametrize(("key", "least", "most"), BOUNDS)
def test_each_number_is_taken_up_to_its_bounds_and_not_beyond(key: str, least: float, most: float) -> None:
    for value in (least, most):
        assert getattr(settings.read(**{key: str(value)}), key) == getattr(settings.read(**{key: value}), key) == value
    for value in (least - 1, most + 1):
        with pytest.raises(InputError) as caught:
            settings.read(**{key: str(value)})
        assert (caught.value.parameter, caught.value.value) == (key, str(value))


@given(st.integers(1, 65535))
def test_every_port_there_is_is_taken_as_text_and_as_number(port: int) -> None:
    assert settings.read(port=str(port)).port == settings.read(port=port).port == port


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("port", "0"),
        ("port", "65536"),
        ("port", "-1"),
        ("port", "http"),
        ("port", ""),
        ("port", "80.5"),
        ("eager", "perhaps"),
        ("max_streams", "0"),
        ("max_streams", "100000"),
        ("max_body_bytes", "1M"),
        ("max_tokens", "many"),
        ("poll_seconds", "nan"),
        ("hold_seconds", "inf"),
        ("read_seconds", "0"),
        ("require_gate", "perhaps"),
        ("shutdown_seconds", "-1"),
        ("start_seconds", "0"),
        ("start_seconds", "soon"),
    ],
)
def test_a_wrong_value_is_refused_by_its_name_from_flag_and_variable(
    monkeypatch: pytest.MonkeyPatch, key: str, value: str
) -> None:
    with pytest.raises(InputError) as flag:
        settings.read(**{key: value})
    monkeypatch.setenv(f"NAMESAKE_SERVE_{key.upper()}", value)
    with pytest.raises(InputError) as variable:
        settings.read()
    for caught in (flag, variable):
        assert (caught.value.parameter, caught.value.value) == (key, value)
        assert "--help" in caught.value.mend


def test_engine_arguments_in_the_environment_that_are_no_json_are_refused_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NAMESAKE_SERVE_ENGINE_ARGS", "--dtype=float32")
    with pytest.raises(InputError):
        settings.read()


def test_a_setting_that_does_not_exist_is_refused_by_its_name() -> None:
    with pytest.raises(InputError) as caught:
        settings.read(prot=8001)
    assert caught.value.parameter == "prot"


def test_settings_cannot_be_changed_afterwards() -> None:
    found = settings.read()
    with pytest.raises(ValidationError):
        found.port = 1
    assert found.port == 8000


@pytest.mark.parametrize(
    ("text", "share"), [("10%", 0.1), (" 2.5 % ", 0.025), ("100%", 1), ("0.1", 0.1), (0.5, 0.5), ("0", 0)]
)
def test_a_share_is_percent_or_a_fraction(text: object, share: float) -> None:
    found = settings.read(canary=text, shadow=text, canary_errors=text)
    assert (found.canary, found.shadow, found.canary_errors) == pytest.approx((share,) * 3)


@pytest.mark.parametrize("text", ["101%", "-1%", "%", "ten%", "10", "1.1", "nan", "nan%", ""])
def test_what_is_no_share_is_refused(text: str) -> None:
    with pytest.raises(InputError) as caught:
        settings.read(canary=text)
    assert caught.value.parameter == "canary"


@pytest.mark.parametrize(("key", "value"), [("mode", "both"), ("challenger", "a@b"), ("challenger", "")])
def test_a_mode_and_an_alias_are_checked(key: str, value: str) -> None:
    with pytest.raises(InputError) as caught:
        settings.read(**{key: value})
    assert caught.value.parameter == key


@pytest.mark.parametrize(
    ("words", "parameter"),
    [(["--shadow", "10%"], "shadow_folder"), (["--canary", "10%", "models:/ccb@challenger"], "challenger")],
)
def test_what_cannot_be_compared_is_refused_before_an_engine_starts(
    words: list[str], parameter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "resolve", lambda _uri: Version("ccb", 1, "run", "source", "READY", {}, 0))
    monkeypatch.setattr(serving, "listen", lambda _host, _port: None)
    done = CliRunner().invoke(serving.app, words)
    assert isinstance(done.exception, InputError)
    assert done.exception.parameter == parameter


@pytest.mark.parametrize(
    ("words", "parameter", "option"),
    [
        (["--traces-text"], "traces_text", "--traces"),
        (["--traces-share", "10%"], "traces_share", "--traces"),
        (["--replicas", "2"], "replicas", "--backend ray"),
        (["--ray-options", '{"num_replicas": 2}'], "ray_options", "--backend ray"),
        (["--base", "folder"], "base", "--mode adapter"),
        (["--max-adapters", "8"], "max_adapters", "--mode adapter"),
        (["--max-lora-rank", "64"], "max_lora_rank", "--mode adapter"),
        (["--any-version"], "any_version", "--mode adapter"),
        (["--shadow-folder", "folder"], "shadow_folder", "--shadow 10%"),
    ],
)
def test_what_would_be_ignored_is_refused(words: list[str], parameter: str, option: str) -> None:
    with pytest.raises(InputError, match=f"{parameter}=.* is of no use without {option}") as caught:
        CliRunner().invoke(serving.app, words, catch_exceptions=False)
    assert caught.value.mend == f"Give {option} too."


@pytest.mark.parametrize(("name", "value"), [("canary_errors", 0.1), ("canary_latency", 2), ("canary_least", 20)])
def test_bounds_of_a_canary_that_nobody_asked_for_are_refused(name: str, value: float) -> None:
    with pytest.raises(InputError, match=f"{name}=.* is of no use without --canary 10%"):
        serving._check_needs(settings.read(**{name: value}))
    serving._check_needs(settings.read(canary=0.1, **{name: value}))


@pytest.mark.parametrize("text", ['"sk-secret"', '{"a": "sk-secret"}'])
def test_a_key_of_the_wrong_shape_is_not_repeated(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NAMESAKE_SERVE_API_KEYS", text)
    with pytest.raises(InputError) as caught:
        settings.read()
    assert caught.value.parameter == "api_keys"
    assert "sk-secret" not in caught.value.told()
