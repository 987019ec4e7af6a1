"""What the server is told: flags and ``NAMESAKE_SERVE_*`` variables become frozen settings."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from namesake.errors import InputError


class Settings(BaseSettings):
    """Settings of one server.

    Attributes:
        model: version to serve, ``models:/ccb@champion``; empty: the champion of the newest registered model.
        host: address to listen on; loopback unless asked, since vLLM leaves routes open that an API key does not guard.
        port: port to listen on.
        eager: start in 17 s instead of 25 (first time 67) on two cores, answer about a fifth slower.
        max_streams: how many requests are worked on at a time on a CPU.
        shutdown_seconds: how long running answers may take to finish after SIGTERM.
        start_seconds: how long the engine may take to answer.
        engine_args: more arguments for vLLM, as it names them.
    """

    model_config = SettingsConfigDict(env_prefix="NAMESAKE_SERVE_", frozen=True, extra="forbid")

    model: str = ""
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    eager: bool = False
    max_streams: Annotated[int, Field(ge=1, le=1024)] = 32
    shutdown_seconds: Annotated[int, Field(ge=0, le=3600)] = 30
    start_seconds: Annotated[int, Field(ge=1, le=7200)] = 900
    engine_args: tuple[str, ...] = ()


def read(**given: object) -> Settings:
    """Settings from flags over environment over defaults.

    Raises:
        InputError: the first wrong one, named.
    """
    try:
        return Settings(**{key: value for key, value in given.items() if value is not None})  # type: ignore[arg-type]
    except SettingsError as error:
        raise InputError(
            "environment",
            str(error),
            "a NAMESAKE_SERVE_ variable cannot be read",
            mend="Lists are JSON: NAMESAKE_SERVE_ENGINE_ARGS='[\"--dtype=float32\"]'.",
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(
            ".".join(str(part) for part in first["loc"]),
            first.get("input"),
            first["msg"].removeprefix("Value error, "),
            mend="`namesake serve --help` says what is allowed.",
        ) from error
