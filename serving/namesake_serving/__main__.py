"""``namesake serve``: resolve the version, verify its files, start vLLM, stay until told to go."""

from __future__ import annotations

import signal
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import typer

from namesake import registry
from namesake.errors import NamesakeError, ServingError
from namesake.paths import cache_folder
from namesake.registry import CHAMPION, Version
from namesake_serving import engine, settings, store

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def serve(
    version: Annotated[
        str, typer.Argument(help="models:/NAME@ALIAS or models:/NAME/VERSION; empty: the newest model's champion.")
    ] = "",
    model: Annotated[str, typer.Option(help="The same as an option.")] = "",
    host: Annotated[str | None, typer.Option(help="Address to listen on. [default: 127.0.0.1]")] = None,
    port: Annotated[str | None, typer.Option(help="Port to listen on. [default: 8000]")] = None,
    eager: Annotated[bool | None, typer.Option("--eager", help="Start faster, answer slower.")] = None,
    max_streams: Annotated[
        str | None, typer.Option(help="Requests worked on at a time on a CPU. [default: 32]")
    ] = None,
    shutdown_seconds: Annotated[
        str | None, typer.Option(help="Time for running answers after SIGTERM. [default: 30]")
    ] = None,
    engine_arg: Annotated[
        list[str] | None, typer.Option(help="More for vLLM, once each: --engine-arg=--dtype=float32")
    ] = None,
) -> None:
    """Serve a registered version with vLLM behind an OpenAI-compatible endpoint."""
    given = settings.read(
        model=version or model or None,
        host=host,
        port=port,
        eager=eager,
        max_streams=max_streams,
        shutdown_seconds=shutdown_seconds,
        engine_args=tuple(engine_arg) if engine_arg else None,
    )
    chosen = choose(given.model)
    stored = store.fetch(chosen, cache_folder())
    print(
        f"› serving {chosen.uri}  {stored.manifest.identity['name']} by {stored.manifest.identity['author']}",
        flush=True,
    )
    with tempfile.TemporaryDirectory(prefix="namesake-serve-") as folder:
        _serve(stored, served_names(chosen, given.model), given, Path(folder) / "vllm.log")


def choose(uri: str) -> Version:
    """The version to serve.

    Raises:
        RegistryError: there is none.
    """
    if uri:
        return registry.resolve(uri if uri.startswith("models:/") else f"models:/{uri}")
    name = registry.newest_model()
    if name is None:
        raise ServingError("Nothing has been promoted yet.", mend="Run `namesake promote`.")
    return registry.resolve(f"models:/{name}@{CHAMPION}")


def served_names(version: Version, uri: str) -> list[str]:
    """Model ids the endpoint answers to: ``ccb``, ``ccb@champion`` (the alias it was asked by), ``ccb-v3``."""
    alias = uri.rpartition("@")[2] if "@" in uri else ("" if uri else CHAMPION)
    return [version.name, *([f"{version.name}@{alias}"] if alias else []), f"{version.name}-v{version.number}"]


def _serve(stored: store.Stored, names: list[str], given: settings.Settings, log: Path) -> None:
    told: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        told.append(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    running = engine.start(stored.weights, names, given, log)
    try:
        running.wait_ready(given.start_seconds, tick=_tick)
        print(f"\r  ready at {running.url}/v1  model {names[0]}    (Ctrl-C stops)", flush=True)
        code = running.wait()
    except KeyboardInterrupt:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print("\n  finishing running answers", flush=True)
        return
    finally:
        running.stop()
    # vLLM ends with 0 even when its engine was killed: ended without being told is a failure.
    raise ServingError(
        f"vLLM ended by itself (exit {code}).\n{running.tail()}", mend="Start it again; see its last lines above."
    )


def _tick(waited: float) -> None:
    if sys.stdout.isatty():
        print(f"\r  starting vLLM {waited:3.0f} s", end="", flush=True)


def main() -> NoReturn:
    """Entry point: exit codes as in :mod:`namesake.errors`."""
    try:
        app(prog_name="namesake serve")
    except NamesakeError as error:
        print(f"error: {error.message}", file=sys.stderr)
        if error.mend:
            print(f"  mend: {error.mend}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(0)
    sys.exit(0)


if __name__ == "__main__":
    main()
