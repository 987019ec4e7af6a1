"""``namesake serve``: the gateway, the follower and vLLM, until told to go."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import nullcontext, suppress
from pathlib import Path
from types import ModuleType
from typing import Annotated, NoReturn, TypeVar
from urllib.parse import urlsplit

import typer
import uvloop

from namesake import helptext, registry, tracking
from namesake.errors import InputError, NamesakeError, RegistryError, ServingError
from namesake.messages import tr, translated
from namesake.paths import cache_folder, temporary
from namesake.process import hurry
from namesake.registry import CHAMPION, Version
from namesake_serving import engine, logs, settings, store
from namesake_serving.front import Server, Tls, tls
from namesake_serving.gateway import Gateway
from namesake_serving.metrics import Metrics
from namesake_serving.service import Service
from namesake_serving.traffic import Live
from namesake_serving.webhook import PATH

Answer = TypeVar("Answer")

_ASKING_SECONDS = 60.0
"""For the registry's answers before a start: MLflow waits for four minutes, a probe of Kubernetes for two."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def serve(
    version: Annotated[
        str, typer.Argument(help="models:/NAME@ALIAS or models:/NAME/VERSION; empty: the newest model's champion.")
    ] = "",
    model: Annotated[str, typer.Option(help="The same as an option.")] = "",
    mode: Annotated[
        str | None, typer.Option(help="merged, or adapter: several versions live on one base. [default: merged]")
    ] = None,
    standby: Annotated[
        bool | None,
        typer.Option("--standby", help="In merged mode: a second engine takes the next version in; nobody is held."),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="In adapter mode: the base's folder or id. [default: what the version says]")
    ] = None,
    max_adapters: Annotated[str | None, typer.Option(help="Versions in the engine at a time. [default: 4]")] = None,
    any_version: Annotated[
        bool | None, typer.Option("--any-version", help="In adapter mode: also versions that no alias points to.")
    ] = None,
    max_lora_rank: Annotated[
        str | None, typer.Option(help="Greatest rank of an adapter. [default: the first version's]")
    ] = None,
    canary: Annotated[
        str | None, typer.Option(help="Share of the requests that the challenger answers: 10%. [default: none]")
    ] = None,
    shadow: Annotated[
        str | None, typer.Option(help="Share of the requests that it gets a copy of. [default: none]")
    ] = None,
    shadow_folder: Annotated[Path | None, typer.Option(help="Where both answers to them are kept.")] = None,
    traces: Annotated[
        bool | None, typer.Option("--traces", help="Log an MLflow trace of each answer, without texts; take feedback.")
    ] = None,
    traces_text: Annotated[
        bool | None, typer.Option("--traces-text", help="Requests and replies in the traces too.")
    ] = None,
    traces_share: Annotated[
        str | None, typer.Option(help="Share of the answers that are traced: 10%. [default: all]")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on. [default: 127.0.0.1]")] = None,
    port: Annotated[str | None, typer.Option(help="Port to listen on. [default: 8000]")] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="A further name in the Host header that is answered.")
    ] = None,
    api_keys_file: Annotated[
        Path | None, typer.Option(help="File with a line `name sha256-of-the-key` for each API key.")
    ] = None,
    requests_per_minute: Annotated[
        str | None, typer.Option(help="What each API key may ask, unless its line says otherwise. [default: no limit]")
    ] = None,
    tokens_per_minute: Annotated[
        str | None, typer.Option(help="The same of tokens, prompts and replies together. [default: no limit]")
    ] = None,
    ssl_certfile: Annotated[
        Path | None, typer.Option(help="PEM file with certificate and chain: the server speaks TLS.")
    ] = None,
    ssl_keyfile: Annotated[
        Path | None, typer.Option(help="PEM file with its key, where that is a file of its own.")
    ] = None,
    eager: Annotated[bool | None, typer.Option("--eager", help="Start faster, answer slower.")] = None,
    max_streams: Annotated[
        str | None, typer.Option(help="Requests worked on at a time. [default: 32 on a CPU, 256 on a GPU]")
    ] = None,
    mlflow_url: Annotated[
        str | None,
        typer.Option(help="Address of MLflow's pages, for links from the chat page. [default: MLflow's server]"),
    ] = None,
    poll_seconds: Annotated[
        str | None,
        typer.Option(help="Seconds at most until the registry is asked again where the alias points. [default: 2]"),
    ] = None,
    webhook_url: Annotated[
        str | None,
        typer.Option(help="This server as the MLflow server reaches it: MLflow then calls when an alias moves."),
    ] = None,
    public_key: Annotated[
        Path | None, typer.Option(help="PEM file; serve only versions that were signed by its private half.")
    ] = None,
    require_gate: Annotated[
        bool | None, typer.Option("--require-gate", help="Serve only versions that passed the gate.")
    ] = None,
    shutdown_seconds: Annotated[
        str | None, typer.Option("--shutdown-timeout", help="Time for running answers after SIGTERM. [default: 30]")
    ] = None,
    engine_arg: Annotated[
        list[str] | None, typer.Option(help="More for vLLM, once each: --engine-arg=--dtype=float32")
    ] = None,
    log_format: Annotated[str | None, typer.Option(help="text, or json: an object a line. [default: text]")] = None,
    backend: Annotated[
        str | None, typer.Option(help="local, or ray: several engines on Ray Serve. [default: local]")
    ] = None,
    replicas: Annotated[str | None, typer.Option(help="How many engines, on Ray. [default: 1]")] = None,
    ray_options: Annotated[
        str | None,
        typer.Option(help="More for Ray Serve's deployment, as JSON: autoscaling_config, ray_actor_options."),
    ] = None,
    ray_join: Annotated[
        bool | None, typer.Option("--ray-join", help="Join replicas that a RayService has deployed; never start any.")
    ] = None,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print only results, warnings and errors.")] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Let through what libraries warn and log.")] = False,
) -> None:
    """Serve the version an alias points to, behind an OpenAI-compatible endpoint, and follow the alias."""
    hurry()
    if quiet and verbose:
        raise typer.BadParameter(translated("-q and -v exclude each other."))
    given = settings.read(
        model=version or model or None,
        mode=mode,
        standby=standby,
        base=base,
        max_adapters=max_adapters,
        any_version=any_version,
        max_lora_rank=max_lora_rank,
        canary=canary,
        shadow=shadow,
        shadow_folder=shadow_folder,
        traces=traces,
        traces_text=traces_text,
        traces_share=traces_share,
        host=host or None,  # MLproject names every parameter, those that nobody gave too
        port=port or None,
        allowed_hosts=tuple(allow_host) if allow_host else None,
        api_keys_file=api_keys_file,
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        ssl_certfile=ssl_certfile,
        ssl_keyfile=ssl_keyfile,
        eager=eager,
        max_streams=max_streams,
        mlflow_url=mlflow_url if mlflow_url is not None else tracking_url(),
        poll_seconds=poll_seconds,
        webhook_url=webhook_url,
        public_key=public_key,
        require_gate=require_gate,
        shutdown_seconds=shutdown_seconds,
        engine_args=tuple(engine_arg) if engine_arg else None,
        log_format=log_format,
        backend=backend,
        replicas=replicas,
        ray_options=ray_options,
        ray_join=ray_join,
    )
    if given.webhook_url and not given.webhook_secret:
        given = given.model_copy(update={"webhook_secret": secrets.token_urlsafe(32)})
    if given.shadow and given.shadow_folder is None:
        raise InputError("shadow_folder", "", "is needed with shadow", mend="Say where: --shadow-folder FOLDER.")
    _check_needs(given)
    cluster = ray_backend(given) if given.backend == "ray" else None
    certificate = tls(given)
    listening = listen(given.host, given.port)
    engine.make_room_for_sockets()
    with (
        tempfile.TemporaryDirectory(prefix=temporary("serve")) as folder,
        # Before anything is asked of the registry: vLLM takes seconds to import, and so does MLflow.
        engine.preloaded(given, Path(folder)) if cluster is None else nullcontext() as ready,
    ):
        uri, first = choose(given.model)
        if (given.canary or given.shadow) and registry.alias_in(uri) == given.challenger:
            raise InputError(
                "challenger",
                given.challenger,
                tr("is what is served ({uri}); it cannot be compared with itself", uri=uri),
                mend="Serve another alias, or name another one: NAMESAKE_SERVE_CHALLENGER=candidate.",
            )
        logs.begin(given.log_format, "quiet" if quiet else "verbose" if verbose else "normal")
        with tracking.project_run(f"{first.name} · serve", {tracking.TAG_KIND: "serve"}):
            uvloop.run(_serve(uri, first, given, certificate, listening, Path(folder), cluster, ready))


def _check_needs(given: settings.Settings) -> None:
    """Nothing that was asked for is ignored in silence.

    Raises:
        InputError: it needs an option that is not there.
    """
    adapter = given.mode == "adapter"
    for name, there, option in (
        ("base", adapter, "--mode adapter"),
        ("max_adapters", adapter, "--mode adapter"),
        ("max_lora_rank", adapter, "--mode adapter"),
        ("any_version", adapter, "--mode adapter"),
        ("shadow_folder", bool(given.shadow), "--shadow 10%"),
        ("canary_errors", bool(given.canary), "--canary 10%"),
        ("canary_latency", bool(given.canary), "--canary 10%"),
        ("canary_least", bool(given.canary), "--canary 10%"),
        ("traces_text", given.traces, "--traces"),
        ("traces_share", given.traces, "--traces"),
        ("replicas", given.backend == "ray", "--backend ray"),
        ("ray_options", given.backend == "ray", "--backend ray"),
        ("ray_join", given.backend == "ray", "--backend ray"),
        ("standby", given.mode == "merged", "--mode merged"),
        ("standby", given.backend == "local", "--backend local"),
    ):
        value = getattr(given, name)
        if not there and value != settings.Settings.model_fields[name].default:
            raise InputError(
                name,
                value,
                tr("is of no use without {option}", option=option),
                mend=tr("Give {option} too.", option=option),
            )


def ray_backend(given: settings.Settings) -> ModuleType:
    """The module that serves on Ray.

    Raises:
        InputError: something was asked for that does not go with it.
        ServingError: Ray is not installed.
    """
    try:
        from namesake_serving import cluster
    except ImportError as error:
        raise ServingError(
            tr("Ray cannot be used in this environment ({error}).", error=error),
            mend="Install it: pip install --no-deps -r requirements/ray.txt",
        ) from error
    cluster.check(given)
    return cluster


def tracking_url() -> str | None:
    """The MLflow server's address where there is one, so that nobody has to say it twice; never with a password."""
    if "NAMESAKE_SERVE_MLFLOW_URL" in os.environ:
        return None
    parts = urlsplit(os.environ.get("MLFLOW_TRACKING_URI", ""))
    if parts.scheme not in {"http", "https"}:
        return None
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def choose(uri: str) -> tuple[str, Version]:
    """What is followed, and the version it stands for now; the one served last where the registry does not answer.

    Raises:
        RegistryError, ServingError: there is none.
    """
    try:
        if not uri:
            name = _in_time(registry.newest_model)
            if name is None:
                raise ServingError("Nothing has been promoted yet.", mend="Run `namesake promote`.")
            uri = f"models:/{name}@{CHAMPION}"
        uri = uri if uri.startswith("models:/") else f"models:/{uri}"
        return uri, _in_time(lambda: registry.resolve(uri))
    except RegistryError as error:
        last = store.recall(cache_folder(), uri) if uri else None
        if last is None:
            raise
        told = tr("! {error} Serving {uri}, which was served last.", error=error.message, uri=last.uri)
        print(translated(told), file=sys.stderr)
        return uri, last


def _in_time(ask: Callable[[], Answer]) -> Answer:
    """What the registry says, as long as somebody waits for it who may give up on this server.

    Raises:
        RegistryError: it says nothing.
    """
    said: Future[Answer] = Future()

    def wait() -> None:
        try:
            said.set_result(ask())
        except BaseException as error:
            said.set_exception(error)

    threading.Thread(target=wait, daemon=True).start()
    try:
        return said.result(_ASKING_SECONDS)
    except TimeoutError as error:
        told = tr("MLflow's registry has not answered for {seconds:g} s.", seconds=_ASKING_SECONDS)
        raise RegistryError(told, mend="Check MLFLOW_TRACKING_URI, and that its server is up.") from error


def listen(host: str, port: int) -> socket.socket:
    """The socket that clients connect to.

    Raises:
        InputError: the port is taken, or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        # Named, since asyncio turns Nagle's delay (40 ms a reply) off for sockets only that say they are TCP.
        listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    except OSError as error:
        raise InputError(
            "host", host, tr("is of no use here ({strerror})", strerror=error.strerror), mend="Give an IPv4 address."
        ) from error
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        # At once, though nobody is answered yet: two sockets may be bound to one port as long as neither listens.
        listening.listen(2048)
    except OSError as error:
        listening.close()
        raise InputError(
            "port",
            port,
            tr("cannot be listened on at {host} ({strerror})", host=host, strerror=error.strerror),
            mend="Give another one: --port 8001.",
        ) from error
    return listening


async def _serve(
    uri: str,
    first: Version,
    given: settings.Settings,
    certificate: Tls | None,
    listening: socket.socket,
    folder: Path,
    cluster: ModuleType | None,
    ready: engine.Preloaded | None,
) -> None:
    if cluster is None:
        service = Service(uri, given, cache_folder(), folder, Metrics(), ready=ready)
        gateway = Gateway(service, given)
    else:
        service = cluster.Cluster(uri, given)
        gateway = Gateway(service, cluster.of_all(given), service.upstream)
    server = Server(gateway, given, certificate)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        # Uvicorn raises the signal again when it has stopped; by then it must not end the process before the engines.
        loop.add_signal_handler(number, lambda: None)
    # The front answers from the start: the chat page, /health, and 503 where a version is needed.
    fronting = asyncio.create_task(server.serve(sockets=[listening]))
    working = asyncio.create_task(_follow(service, first, given))
    try:
        await asyncio.wait({fronting, working}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            server.handle_exit(signal.SIGTERM, None)
            await fronting
            working.result()
    finally:
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
        await gateway.close()
        await service.stop()


async def _follow(service: Service, first: Version, given: settings.Settings) -> None:
    await service.start(first, _tick)
    live = service.traffic.live
    assert live is not None
    running = asyncio.create_task(service.run())
    # Beside it: MLflow may be away, and the engine has to be watched meanwhile.
    asking = asyncio.create_task(asyncio.to_thread(_ask_for_calls, given)) if given.webhook_url else None
    try:
        if asking is not None:
            await asyncio.shield(asking)
        _tell_ready(live, service.uri, given)
        await running
    finally:
        running.cancel()
        if asking is not None:
            await asyncio.shield(_ask_for_no_more(asking))


async def _ask_for_no_more(asking: asyncio.Task[str | None]) -> None:
    webhook = await asking
    if webhook is not None:
        with suppress(RegistryError):  # the next start on this address takes it back
            await asyncio.to_thread(registry.remove_webhook, webhook)


def _tell_ready(live: Live, uri: str, given: settings.Settings) -> None:
    host = f"[{given.host}]" if ":" in given.host else given.host
    scheme = "https" if given.ssl_certfile else "http"
    told = tr(
        "\r› {version}  {name} by {author}\n"
        "  ready at {url}/v1  model {model}, follows {uri}\n"
        "  chat  {url}/    (Ctrl-C stops)",
        version=live.version.uri,
        **live.manifest.identity,
        url=f"{scheme}://{host}:{given.port}",
        model=live.version.name,
        uri=uri,
    )
    print(translated(told), flush=True)


def _ask_for_calls(given: settings.Settings) -> str | None:
    """Have MLflow call when an alias moves; its id. Where it cannot, polling has to do."""
    try:
        return registry.add_webhook(f"{given.webhook_url.rstrip('/')}{PATH}", given.webhook_secret)
    except RegistryError as error:
        told = tr("\r! no webhook: {error} The registry is polled.", error=error.message)
        print(translated(told), file=sys.stderr)
        return None


def _tick(waited: float) -> None:
    if sys.stdout.isatty():
        print(translated(tr("\r  starting vLLM {waited:3.0f} s", waited=waited)), end="", flush=True)


def main() -> NoReturn:
    """Entry point: exit codes as in :mod:`namesake.errors`."""
    try:
        helptext.run(app, "namesake serve")
    except NamesakeError as error:
        print(error.told(), file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(0)
    sys.exit(0)


if __name__ == "__main__":
    main()
