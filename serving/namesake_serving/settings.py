"""What the server is told: flags and ``NAMESAKE_SERVE_*`` variables become frozen settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StringConstraints, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from namesake.errors import InputError
from namesake.process import has_gpu


def _share(value: object) -> object:
    """``10%`` as 0.1; a number stays one."""
    if isinstance(value, str) and value.strip().endswith("%"):
        try:
            return float(value.strip()[:-1]) / 100
        except ValueError:
            raise ValueError("a share is a number with % or a number from 0 to 1") from None
    return value


def _json(value: object) -> object:
    """JSON as what it says; anything else stays as it is."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except ValueError as error:
            raise ValueError(f"this is no JSON ({error})") from None
    return value


_SECRET = {("api_keys",), ("webhook_secret",)}
"""What no message repeats."""

Share = Annotated[float, BeforeValidator(_share), Field(ge=0, le=1)]


class Settings(BaseSettings):
    """Settings of one server.

    Attributes:
        model: version to serve, ``models:/ccb@champion``; empty: the champion of the newest registered model.
        mode: ``merged``, the registered weights, changed in place; or ``adapter``, one engine on the base in which
            versions are adapters side by side, so that several answer at a time, the base among them.
        standby: in merged mode, keep a second engine beside the one that answers. A version is loaded and proved there,
            so that no request is held and none waits for long answers to end; moving back needs no loading. It replaces
            an engine that has died: at once where it holds the same version, else as soon as it has loaded it. Takes
            the memory of two; on a GPU each gets 45 % of it unless ``engine_args`` say otherwise.
        base: in adapter mode, where the base is to be had: a folder or a ModelScope id; empty: what the version's
            manifest says.
        max_adapters: how many versions may be in the engine at a time, in adapter mode.
        any_version: in adapter mode, a version that no alias points to is brought in when a client asks for it by its
            number, and checked as any other.
        max_lora_rank: greatest rank of an adapter; 0: that of the version served first.
        challenger: alias of the version that is compared with the one served, for ``canary`` and ``shadow``.
        canary: share of the requests for the bare name that the challenger answers, ``10%`` or ``0.1``; requests of one
            session stay on one side. In merged mode it has an engine of its own.
        canary_errors: how much greater the challenger's part of failed requests may be than the champion's.
        canary_latency: how many times as long as the champion the challenger may take to the first byte (median).
        canary_least: requests of either side before their times are compared.
        shadow: share of the champion's requests that the challenger gets a copy of when they have been answered; no
            client sees its answers.
        shadow_folder: where both answers are kept, as lines of JSON, requests included; needed with ``shadow``.
        shadow_bytes: how much may lie there; the oldest goes.
        traces: log an MLflow trace of each answer, linked to the version's LoggedModel: version, run, alias, tokens,
            times, status, session and key, no text. Replies then have ``x-namesake-trace``, and ``/v1/feedback`` is
            answered.
        traces_text: requests and replies too.
        traces_share: share of the answers that are traced, ``10%`` or ``0.1``.
        host: address to listen on; loopback unless asked.
        port: port to listen on.
        allowed_hosts: names in the ``Host`` header that are answered, beside loopback's and ``host``.
        api_keys_file: file with a line ``name sha256-of-the-key`` for each key, and ``requests=60`` or ``tokens=20000``
            behind it for limits of its own; read again when it changes.
        api_keys: keys themselves; with neither everybody is answered.
        requests_per_minute: how many requests each key may make a minute, unless its line says otherwise; without keys:
            all clients together. 0: no limit.
        tokens_per_minute: the same of tokens, prompts and replies together.
        ssl_certfile: PEM file with the certificate and its chain; the server then speaks TLS only. Read again when it
            changes.
        ssl_keyfile: PEM file with its private key; empty: in ``ssl_certfile`` too.
        eager: start without compiling, answer slower.
        max_streams: how many requests the engine works on at a time; empty: 32 on a CPU, 256 on a GPU. The others wait
            in a queue that is fair to each key.
        max_requests: how many requests may be under way or waiting; more get 429. Empty: eight times ``max_streams``.
        max_body_bytes: longest request body.
        max_tokens: most tokens of one reply, also of one for which the client names no bound.
        mlflow_url: address of MLflow's pages as a browser reaches them; the chat page then links to runs and versions.
        poll_seconds: how long at most until the registry is asked again where the alias points; up to two fifths less
            by chance, so that servers do not ask together.
        webhook_url: this server's address as the MLflow server reaches it (``http://serving.example:8000``); the server
            then has MLflow call it when an alias moves, and takes that back when it stops. It goes on polling.
        webhook_secret: what MLflow signs those calls with; empty: made anew at each start.
        hold_seconds: how long new requests may be held while running answers finish before weights are changed in
            place; after that a second engine is started instead.
        read_seconds: how long the head, and then the body, of a request may take to arrive.
        keep_versions: how many copies of the model's versions lie on this machine; of more, the one that was fetched
            longest ago goes, unless it answers.
        require_gate: serve only versions that passed the gate.
        public_key: PEM file; serve only versions that were signed by its private half (``promote --sign-key``).
        shutdown_seconds: how long running answers may take to finish after SIGTERM.
        start_seconds: how long the engine may take to answer.
        backend: ``local``, engines on this machine; or ``ray``, replicas on Ray Serve, all of which turn at once, in
            the cluster that ``RAY_ADDRESS`` names, else in one of their own on this machine.
        replicas: how many of them, on Ray.
        ray_options: more for Ray Serve's deployment, as JSON and as Ray Serve names them:
            ``{"autoscaling_config": {"max_replicas": 4}, "ray_actor_options": {"num_gpus": 1}}``.
        ray_join: with Ray, join the replicas that a configuration of Ray Serve's own has deployed (a RayService of
            KubeRay), once they are there, and leave them running; never start any.
        engine_args: more arguments for vLLM, as it names them.
        log_format: ``text``, or ``json``: each line of the log is an object; a request's has its id, status, version,
            key and seconds.
    """

    model_config = SettingsConfigDict(env_prefix="NAMESAKE_SERVE_", frozen=True, extra="forbid")

    model: str = ""
    mode: Literal["merged", "adapter"] = "merged"
    standby: bool = False
    base: str = ""
    max_adapters: Annotated[int, Field(ge=3, le=256)] = 4
    any_version: bool = False
    max_lora_rank: Annotated[int, Field(ge=0, le=512)] = 0
    challenger: Annotated[str, StringConstraints(pattern=r"^[^/@\s]+$")] = "challenger"
    canary: Share = 0.0
    canary_errors: Share = 0.02
    canary_latency: Annotated[float, Field(ge=1, le=100)] = 1.5
    canary_least: Annotated[int, Field(ge=10, le=500)] = 50
    shadow: Share = 0.0
    shadow_folder: Path | None = None
    shadow_bytes: Annotated[int, Field(ge=1 << 16, le=1 << 40)] = 100 << 20
    traces: bool = False
    traces_text: bool = False
    traces_share: Share = 1.0
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    allowed_hosts: tuple[str, ...] = ()
    api_keys_file: Path | None = None
    api_keys: tuple[Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)], ...] = ()
    requests_per_minute: Annotated[int, Field(ge=0, le=1_000_000_000)] = 0
    tokens_per_minute: Annotated[int, Field(ge=0, le=1_000_000_000)] = 0
    ssl_certfile: Path | None = None
    ssl_keyfile: Path | None = None
    eager: bool = False
    max_streams: Annotated[int, Field(ge=1, le=1024)] | None = None
    max_requests: Annotated[int, Field(ge=1, le=100_000)] | None = None
    max_body_bytes: Annotated[int, Field(ge=1024, le=1 << 30)] = 1 << 20
    max_tokens: Annotated[int, Field(ge=1, le=1 << 20)] = 4096
    mlflow_url: str = ""
    poll_seconds: Annotated[float, Field(ge=0.1, le=3600)] = 2.0
    webhook_url: Annotated[str, StringConstraints(pattern=r"^(https?://[^/?#\s]+/?)?$")] = ""
    webhook_secret: str = ""
    hold_seconds: Annotated[float, Field(ge=0, le=600)] = 10.0
    read_seconds: Annotated[float, Field(ge=0.1, le=600)] = 10.0
    keep_versions: Annotated[int, Field(ge=1, le=1_000_000)] = 5
    require_gate: bool = False
    public_key: Path | None = None
    shutdown_seconds: Annotated[int, Field(ge=0, le=3600)] = 30
    start_seconds: Annotated[int, Field(ge=1, le=7200)] = 900
    backend: Literal["local", "ray"] = "local"
    replicas: Annotated[int, Field(ge=1, le=1000)] = 1
    ray_options: Annotated[dict[str, Any], BeforeValidator(_json)] = {}
    ray_join: bool = False
    engine_args: tuple[str, ...] = ()
    log_format: Literal["text", "json"] = "text"

    @property
    def streams(self) -> int:
        """How many requests the engine works on at a time here."""
        return self.max_streams or (256 if has_gpu() else 32)

    @property
    def most_requests(self) -> int:
        """How many requests may be under way or waiting here."""
        return self.max_requests or 8 * self.streams


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
            "…" if first["loc"][:1] in _SECRET else first.get("input"),
            first["msg"].removeprefix("Value error, "),
            mend="`namesake serve --help` says what is allowed.",
        ) from error
