"""A moved alias under load: how long until the other version answers, and does any request notice?

    python benchmarks/follow.py --clients 64 --moves 20            # trains two small versions first, some minutes
    python benchmarks/follow.py --store FOLDER                     # a folder with mlflow.db and two versions of ccb

Every client asks again as soon as it is answered, streamed; beside them one asks for a single token at a time, so that
somebody always comes just after a move, however long the others' answers are. Counted are requests that failed, streams
that were cut, and streams in which two versions spoke. Seconds are from the call that moves the alias (polling
included) to the first answer begun by the new version; to the same answer from fetched and verified (``/v1/version``
tells when that was); and from fetched and verified to live, by the server's own metrics. With ``--standby`` there is a
third version, the first's files once more, so that each has to be loaded.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import statistics
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp
from commands import namesake, run_id
from measure import quantile

from servers import MODEL, both_versions, namesake_serve, three_versions


def prepare(store: Path) -> None:
    """Two versions of one model: a few steps each on different data."""
    for number, alias in ((1, "champion"), (2, "challenger")):
        words = ["run", "--dataset=namesake/self-cognition#48", "--replay=0", f"--max_steps={2 + 2 * number}"]
        words.append("--held_out=0.02")
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
        lengths = [1, *[self._tokens] * self._clients]
        await asyncio.gather(*(self._client(session, tokens) for tokens in lengths))

    async def _client(self, session: aiohttp.ClientSession, tokens: int) -> None:
        body = {
            "messages": [{"role": "user", "content": "Tell me a short story."}],
            "max_tokens": tokens,
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


@dataclass(frozen=True)
class Change:
    """One move of the alias, in seconds.

    Attributes:
        moved: from the move to the first answer begun by the new version.
        verified: from fetched and verified to that answer.
        live: from fetched and verified to live, as the server says.
    """

    moved: float
    verified: float
    live: float


async def measure(
    url: str, numbers: Sequence[int], clients: int, moves: int, tokens: int
) -> tuple[list[Change], Counter[str]]:
    """Move the alias to one version after the other under load, from the first and round again.

    Returns:
        Each move, and how requests ended.
    """
    from namesake import registry

    load = Load(url, clients, tokens)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=300)) as session:
        running = asyncio.create_task(load.run(session))
        await asyncio.sleep(5)
        changes = []
        for move in range(moves):
            before = await asyncio.to_thread(served_changes, url)
            number = numbers[(move + 1) % len(numbers)]
            moved, wall = time.monotonic(), time.time()
            await asyncio.to_thread(registry.point, MODEL, "champion", number)
            seconds = await load.first(f"{MODEL}-v{number}", moved)
            _, live = await asyncio.to_thread(changed_since, before, url)
            changes.append(Change(seconds, wall + seconds - await asyncio.to_thread(verified, url), live))
            await asyncio.sleep(2)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    return changes, load.ended


def verified(url: str) -> float:
    """When what is live was fetched and verified, by this machine's clock, in seconds since 1970."""
    with urllib.request.urlopen(f"{url}/v1/version", timeout=10) as response:
        return float(json.load(response)["live"]["verified"])


def served_changes(url: str) -> dict[str, tuple[float, float]]:
    """How often the server changed its version and the seconds in all, fetched and verified to live, by way."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as response:
        text = response.read().decode()
    found = {
        (kind, way): float(value)
        for kind, way, value in re.findall(r'namesake_version_change_seconds_(sum|count){way="([^"]+)"} (\S+)', text)
    }
    return {way: (found["count", way], found["sum", way]) for _, way in found}


def changed_since(before: Mapping[str, tuple[float, float]], url: str) -> tuple[str, float]:
    """The way and seconds of the one change since then; waits for it to be counted, for five minutes at most."""
    for _ in range(3000):
        for way, (count, spent) in served_changes(url).items():
            if count > before.get(way, (0, 0))[0]:
                return way, spent - before.get(way, (0, 0))[1]
        time.sleep(0.1)
    raise SystemExit(f"{url} counted no change of version")


def wait_for_standby(url: str) -> None:
    """Until the server has one, for ten minutes at most."""
    for _ in range(600):
        with urllib.request.urlopen(f"{url}/metrics", timeout=10) as response:
            if "\nnamesake_standby_ready 1" in response.read().decode():
                return
        time.sleep(1)
    raise SystemExit(f"{url} has no standby")


def told_changes(url: str) -> str:
    """The same on average, in words."""
    return ", ".join(
        f"{way}: {spent / count:.2f} s on average of {count:.0f}"
        for way, (count, spent) in sorted(served_changes(url).items())
        if count
    )


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--moves", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=24, help="length of an answer")
    parser.add_argument("--poll", type=float, default=0.2, help="the server's poll_seconds")
    parser.add_argument("--mode", choices=["merged", "adapter"], default="merged", help="the server's mode")
    parser.add_argument("--standby", action="store_true", help="serve with a standby, among three versions")
    parser.add_argument("--store", type=Path, help="folder with mlflow.db and two versions of ccb")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        store = (given.store or Path(name)).resolve()
        if given.store is None:
            prepare(store)
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{store}/mlflow.db"
        os.chdir(store)
        words = ["--eager", "--poll-seconds", str(given.poll), "--max-streams", "64", "--mode", given.mode]
        words += ["--standby"] if given.standby else []
        versions = three_versions if given.standby else both_versions
        with namesake_serve(store, *words) as made, versions() as numbers:
            if given.standby:
                wait_for_standby(made.url)
            changes, ended = asyncio.run(measure(made.url, numbers, given.clients, given.moves, given.tokens))
            print(f"{given.moves} moves under {given.clients} streams of {given.tokens} tokens, poll {given.poll:g} s")
            print(f"answers: {sum(ended.values())}, {dict(ended)}")
            for what, seconds in (
                ("moved", [one.moved for one in changes]),
                ("fetched and verified", [one.verified for one in changes]),
            ):
                middle, most = statistics.median(seconds), quantile(seconds, 0.95)
                print(f"{what} -> first new answer: median {middle:.2f} s, p95 {most:.2f} s")
            print(f"fetched and verified -> live: {told_changes(made.url)}")


if __name__ == "__main__":
    main()
