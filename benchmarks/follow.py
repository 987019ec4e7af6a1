"""A moved alias under load: how long until the other version answers, and does any request notice?

    python benchmarks/follow.py --clients 64 --moves 20            # trains two small versions first, some minutes
    python benchmarks/follow.py --store FOLDER                     # a folder with mlflow.db and two versions of ccb

Every client asks again as soon as it is answered, streamed. Counted are requests that failed, streams that were cut,
and streams in which two versions spoke. Seconds are from the call that moves the alias (polling included) to the first
answer begun by the new version, and, from the server's own metrics, from fetched and verified to live.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import aiohttp
from commands import ROOT, environment, namesake, run_id

MODEL = "ccb"


def prepare(store: Path) -> None:
    """Two versions of one model: a few steps each on different data."""
    for number, alias in ((1, "champion"), (2, "challenger")):
        words = ["run", "--dataset=namesake/self-cognition#48", "--replay=0", f"--max_steps={2 + 2 * number}"]
        out = namesake(store, *words, f"--seed={number}", "--output_dir", str(store / "output"))
        namesake(store, "promote", "--run", run_id(out), "--alias", alias, "--override", "benchmark")


class Load:
    """Clients that never rest."""

    def __init__(self, url: str, clients: int, tokens: int) -> None:
        self._url, self._clients, self._tokens = url, clients, tokens
        self.begun: list[tuple[float, str]] = []
        self.ended: Counter[str] = Counter()

    async def run(self, session: aiohttp.ClientSession) -> None:
        """Until cancelled."""
        await asyncio.gather(*(self._client(session) for _ in range(self._clients)))

    async def _client(self, session: aiohttp.ClientSession) -> None:
        body = {
            "messages": [{"role": "user", "content": "Tell me a short story."}],
            "max_tokens": self._tokens,
            "temperature": 0,
            "stream": True,
        }
        while True:
            self.ended[await self._ask(session, body)] += 1

    async def _ask(self, session: aiohttp.ClientSession, body: dict[str, object]) -> str:
        try:
            async with session.post(f"{self._url}/v1/chat/completions", json=body) as response:
                if response.status != 200:
                    return f"failed: {response.status}"
                versions = {response.headers["x-namesake-version"]}
                text = b""
                async for line in response.content:
                    if not text:
                        self.begun.append((time.monotonic(), next(iter(versions))))
                    text = line.strip() or text
                    if line.startswith(b"data: {"):
                        versions.add(json.loads(line[6:])["system_fingerprint"])
                if text != b"data: [DONE]":
                    return "cut"
                return "one version" if len(versions) == 1 else "mixed"
        except aiohttp.ClientError as error:
            return f"failed: {type(error).__name__}"

    async def first(self, version: str, since: float, seconds: float = 120) -> float:
        """Seconds from the moment to the first answer begun by the version."""
        while time.monotonic() < since + seconds:
            found = [when for when, name in self.begun if name == version and when > since]
            if found:
                return found[0] - since
            await asyncio.sleep(0.01)
        raise SystemExit(f"{version} did not answer within {seconds:.0f} s: {self.ended}")


async def measure(url: str, clients: int, moves: int, tokens: int) -> tuple[list[float], Counter[str]]:
    """Move the alias to and fro under load."""
    sys.path.insert(0, str(ROOT / "src"))
    from namesake import registry

    numbers = [
        version.number for version in (registry.resolve(f"models:/{MODEL}@{a}") for a in ("champion", "challenger"))
    ]
    load = Load(url, clients, tokens)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=300)) as session:
        running = asyncio.create_task(load.run(session))
        await asyncio.sleep(5)
        seconds = []
        for move in range(moves):
            number = numbers[(move + 1) % 2]
            moved = time.monotonic()
            await asyncio.to_thread(registry.point, MODEL, "champion", number)
            seconds.append(await load.first(f"{MODEL}-v{number}", moved))
            await asyncio.sleep(2)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    return seconds, load.ended


def served_changes(url: str) -> str:
    """The server's own seconds from fetched and verified to live, on average, by way."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as response:
        text = response.read().decode()
    found = {
        (kind, way): float(value)
        for kind, way, value in re.findall(r'namesake_version_change_seconds_(sum|count){way="([^"]+)"} (\S+)', text)
    }
    ways = sorted({way for _, way in found})
    return ", ".join(
        f"{way}: {found['sum', way] / found['count', way]:.2f} s on average of {found['count', way]:.0f}"
        for way in ways
    )


def quantile(values: Sequence[float], share: float) -> float:
    """The value that the share of them does not exceed."""
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--moves", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=24, help="length of an answer")
    parser.add_argument("--poll", type=float, default=0.2, help="the server's poll_seconds")
    parser.add_argument("--mode", choices=["merged", "adapter"], default="merged", help="the server's mode")
    parser.add_argument("--store", type=Path, help="folder with mlflow.db and two versions of ccb")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        store = (given.store or Path(name)).resolve()
        if given.store is None:
            prepare(store)
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{store}/mlflow.db"
        os.chdir(store)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        words = ["serve", "--port", str(port), "--eager", "--poll-seconds", str(given.poll), "--max-streams", "64"]
        words += ["--mode", given.mode]
        with Path(name, "serve.log").open("wb") as log:
            server = subprocess.Popen(
                [sys.executable, "-m", "namesake", *words],
                cwd=store,
                env=environment(store),
                stdout=log,
                stderr=log,
            )
        url = f"http://127.0.0.1:{port}"
        try:
            for _ in range(600):
                try:
                    urllib.request.urlopen(f"{url}/ready", timeout=2)
                    break
                except OSError:
                    time.sleep(0.5)
            seconds, ended = asyncio.run(measure(url, given.clients, given.moves, given.tokens))
            print(f"{given.moves} moves under {given.clients} streams of {given.tokens} tokens, poll {given.poll:g} s")
            print(f"answers: {sum(ended.values())}, {dict(ended)}")
            middle, most = statistics.median(seconds), quantile(seconds, 0.95)
            print(f"moved -> first new answer: median {middle:.2f} s, p95 {most:.2f} s")
            print(f"fetched and verified -> live: {served_changes(url)}")
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)


if __name__ == "__main__":
    main()
