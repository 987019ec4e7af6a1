"""What do replicas on Ray Serve give, what does Ray cost, and does any client notice a moved alias?

    python benchmarks/replicas.py                                  # trains two small versions first, some minutes
    python benchmarks/replicas.py --store FOLDER --rows local 2    # a folder with mlflow.db and two versions of ccb
    python benchmarks/replicas.py --rows 1 2 --pairs 3 --moves 0   # the rows in turn, and the last to the first
    python benchmarks/replicas.py --instant --rows 1 2 --pairs 3 --moves 0 --sessions none -- --max-streams 8

Rows: `local` is `namesake serve`, a number is `--backend ray --replicas N`. Every client asks again as soon as it is
answered, streamed. Printed are seconds until the first answer, tokens a second, requests that each replica answered in
that time, then for moves under the same load: seconds until every client has the new version, requests that failed or
were cut, streams in which two versions spoke, and clients that saw a version again after its successor. A session's
requests go to one replica, those of clients without one to whichever is less busy.

With ``--instant`` an engine that answers by sleeping stands where vLLM is, ``--pause`` seconds before each event: no
core is what bounds it, but how many requests it works on at a time (``--max-streams``), as vLLM does. The gateway lets
in an eighth more for each replica, so take a multiple of eight, and more clients than it lets in.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import aiohttp
from commands import ROOT, environment
from follow import prepare, told_changes

from servers import MODEL, both_versions, namesake_serve

sys.path.insert(0, str(ROOT))

from tests.servers import answered

SESSIONS = {"none": 0, "half": 2, "all": 1}
"""Which clients name one: every N-th."""


class Clients:
    """Clients that never rest.

    Args:
        most: tokens of an answer.
        sessions: which of them have a session: every N-th; 0: none.

    Attributes:
        tokens: how many have come.
        ended: how requests ended.
        saw: the versions that each client saw, in order, repetitions left out.
    """

    def __init__(self, url: str, count: int, most: int, sessions: int) -> None:
        self._url, self._most, self._sessions = url, most, sessions
        self.tokens, self.ended = 0, Counter[str]()
        self.saw: list[list[str]] = [[] for _ in range(count)]

    async def run(self) -> None:
        """Until cancelled."""
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=300)) as http:
            await asyncio.gather(*(self._client(http, number) for number in range(len(self.saw))))

    async def _client(self, http: aiohttp.ClientSession, number: int) -> None:
        question = {"role": "user", "content": f"Tell me story number {number}."}
        body = {"messages": [question], "temperature": 0, "stream": True, "max_tokens": self._most}
        if self._sessions and number % self._sessions == 0:
            body["user"] = f"client {number}"
        while True:
            try:
                ended = await self._ask(http, body, self.saw[number])
            except aiohttp.ClientError as error:
                ended = f"failed: {type(error).__name__}"
            self.ended[ended] += 1

    async def _ask(self, http: aiohttp.ClientSession, body: dict[str, object], saw: list[str]) -> str:
        async with http.post(f"{self._url}/v1/chat/completions", json=body) as response:
            if response.status != 200:
                return f"failed: {response.status}"
            version = response.headers["x-namesake-version"]
            if saw[-1:] != [version]:
                saw.append(version)
            spoke, text = {version}, b""
            async for line in response.content:
                text = line.strip() or text
                if line.startswith(b"data: {"):
                    self.tokens += 1
                    spoke.add(json.loads(line[6:])["system_fingerprint"])
            return "cut" if text != b"data: [DONE]" else "one version" if len(spoke) == 1 else "mixed"


async def measure(url: str, clients: Clients, numbers: Sequence[int], seconds: float, moves: int) -> tuple[float, str]:
    """Tokens a second, and what is told: that, then moves of the alias to and fro under the same load."""
    from namesake import registry

    running = asyncio.create_task(clients.run())
    await asyncio.sleep(5)
    first = await asyncio.to_thread(answered, url)
    before, begun = clients.tokens, time.monotonic()
    await asyncio.sleep(seconds)
    rate, took = (clients.tokens - before) / (time.monotonic() - begun), []
    last = await asyncio.to_thread(answered, url)
    each = " + ".join(str(number - first.get(replica, 0)) for replica, number in sorted(last.items()))
    for move in range(moves):
        wanted, moved = numbers[(move + 1) % 2], time.monotonic()
        await asyncio.to_thread(registry.point, MODEL, "champion", wanted)
        while any(saw[-1] != f"{MODEL}-v{wanted}" for saw in clients.saw):
            if time.monotonic() > moved + 120:
                raise SystemExit(f"version {wanted} did not come to every client: {clients.ended}")
            await asyncio.sleep(0.02)
        took.append(time.monotonic() - moved)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    back = sum(len(saw) > moves + 1 for saw in clients.saw)  # to and fro, so that going back is one version too many
    middle = f"{statistics.median(took):.2f} s (most {max(took):.2f})" if took else "-"
    told = f"{rate:5.0f} tokens/s; answered by each {each}; move to last client {middle}"
    return rate, f"{told}; {dict(clients.ended)}; went back: {back}"


def instant(store: Path) -> str:
    """Two versions and an engine that costs nothing, as the tests have them; what goes on ``PYTHONPATH``."""
    import mlflow
    from tests.contract import instant as made

    from namesake import registry

    client = mlflow.MlflowClient(f"sqlite:///{store}/mlflow.db")
    client.create_registered_model(MODEL, tags={registry.TAG_IDENTITY: made.NAME})
    for alias in ("champion", "challenger"):
        client.set_registered_model_alias(MODEL, alias, str(made.register(client, store)))
    return str(made.engine(store / "engine"))


def main() -> None:
    """Print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=["local", "1", "2"], help="local, or a number of replicas")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--sessions", choices=SESSIONS, default="half", help="how many of them name a session")
    parser.add_argument("--tokens", type=int, default=32, help="length of an answer")
    parser.add_argument("--seconds", type=float, default=20, help="how long throughput is measured")
    parser.add_argument("--moves", type=int, default=10)
    parser.add_argument("--pairs", type=int, default=1, help="how often the rows are measured, in turn")
    parser.add_argument("--instant", action="store_true", help="an engine that costs nothing where vLLM is")
    parser.add_argument("--pause", type=float, default=0.05, help="seconds before each of its events")
    parser.add_argument("--store", type=Path, help="folder with mlflow.db and two versions of ccb")
    parser.add_argument("words", nargs="*", help="more for `namesake serve`, behind --")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        store = (given.store or Path(name)).resolve()
        engine = ""
        if given.instant:
            engine = instant(store)
            os.environ["INSTANT_PAUSE"] = str(given.pause)
        elif given.store is None:
            prepare(store)
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{store}/mlflow.db"
        os.chdir(store)
        print(f"{given.clients} clients, answers of {given.tokens} tokens, {given.moves} moves, {os.cpu_count()} cores")
        env = {"PYTHONPATH": f"{engine}:{environment(store)['PYTHONPATH']}"} if engine else {}
        ratios = []
        for _ in range(given.pairs):
            rates = []
            for row in given.rows:
                several = [] if row == "local" else ["--backend", "ray", "--replicas", row]
                words = ("--eager", "--poll-seconds", "0.2", *several, *given.words)
                with namesake_serve(store, *words, env=env) as made, both_versions() as numbers:
                    clients = Clients(made.url, given.clients, given.tokens, SESSIONS[given.sessions])
                    rate, told = asyncio.run(measure(made.url, clients, numbers, given.seconds, given.moves))
                    rates.append(rate)
                    print(f"{row:>5}: ready after {made.seconds:.0f} s; {told}", flush=True)
                    if given.moves:
                        print(f"       fetched and verified -> live: {told_changes(made.url)}", flush=True)
            ratios.append(rates[-1] / rates[0])
        if len(given.rows) > 1:
            told = ", ".join(f"{ratio:.2f}" for ratio in ratios)
            print(f"{given.rows[-1]} to {given.rows[0]}: {told}; median {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
