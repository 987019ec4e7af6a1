"""What the server is told: flags over environment over defaults, and the wrong one named."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from namesake.errors import InputError
from namesake_serving import settings


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting from outside the test."""
    for name in settings.Settings.model_fields:
        monkeypatch.delenv(f"NAMESAKE_SERVE_{name.upper()}", raising=False)


def test_the_defaults_listen_on_loopback_port_8000() -> None:
    found = settings.read()
    assert (found.host, found.port) == ("127.0.0.1", 8000)
    assert (found.model, found.eager, found.engine_args) == ("", False, ())


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
