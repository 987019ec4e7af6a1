"""What does a trace of each answer cost the answers?

    python benchmarks/traces.py

The gateway as `namesake serve` runs it, before an upstream that answers at once, so that nothing hides what is added:
without traces, with them, and with texts in them, a real MLflow server beside it. The three take turns, round by round,
first at a rate that a small service has, then with clients that ask again as soon as they are answered. Printed are p50
and p99 in milliseconds, the medians over the rounds of what was added to each, and what became of the traces.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import aiohttp

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src"), str(ROOT / "serving")]

from benchmarks.trickle import BODY, ask  # noqa: E402
from tests.servers import mlflow_server  # noqa: E402

WAYS = {"none": {}, "traces": {"traces": True}, "with text": {"traces": True, "traces_text": True}}


async def serve(way: str) -> None:
    """The gateway until standard input ends; its port is printed."""
    from tests.unit.test_serving_gateway import front

    async with front(**WAYS[way]) as gate:
        print(gate.port, flush=True)
        await asyncio.to_thread(sys.stdin.read)


async def paced(port: int, rate: float, seconds: float) -> list[float]:
    """Milliseconds of requests that come at an even rate, whether the one before is answered or not."""
    took: list[float] = []

    async def one(session: aiohttp.ClientSession) -> None:
        begun = time.monotonic()
        async with session.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=BODY) as response:
            await response.read()
        took.append((time.monotonic() - begun) * 1000)

    async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as tasks:
        begun = time.monotonic()
        for number in range(int(rate * seconds)):
            await asyncio.sleep(begun + number / rate - time.monotonic())
            tasks.create_task(one(session))
    return took


def counted(port: int) -> str:
    """What became of the traces."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response:
        lines = [line for line in response.read().decode().splitlines() if line.startswith("namesake_traces_total")]
    return ", ".join(line.partition("{")[2].replace('result="', "").replace('"}', "") for line in lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rate", type=float, default=20, help="requests a second of the first half")
    parser.add_argument("--clients", type=int, default=4, help="of the second half; 0: without it")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5, help="of each round")
    parser.add_argument("--part", choices=WAYS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part:
        asyncio.run(serve(given.part))
        return
    with tempfile.TemporaryDirectory() as folder, mlflow_server(Path(folder)) as url:
        found: dict[tuple[str, str], list[tuple[float, float]]] = {}
        servers: dict[str, subprocess.Popen[str]] = {}
        ports = {}
        for way in WAYS:
            servers[way] = subprocess.Popen(
                [sys.executable, __file__, "--part", way],
                env={**os.environ, "MLFLOW_TRACKING_URI": url},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            assert servers[way].stdout is not None
            ports[way] = int(servers[way].stdout.readline())  # type: ignore[union-attr]
            asyncio.run(ask(ports[way], 1, 1))  # warm; the writer starts
        time.sleep(5)
        try:
            for load in (f"{given.rate:g} a second", *([f"{given.clients} clients"] if given.clients else [])):
                for _ in range(given.rounds):
                    for way, port in ports.items():
                        if load.endswith("second"):
                            took = asyncio.run(paced(port, given.rate, given.seconds))
                        else:
                            took = asyncio.run(ask(port, given.clients, given.seconds))
                        hundredths = statistics.quantiles(took, n=100)
                        found.setdefault((load, way), []).append((hundredths[49], hundredths[98]))
                        if not load.endswith("second"):
                            time.sleep(1)
                for way in WAYS:
                    base, own = found[load, "none"], found[load, way]
                    p50, p99 = (statistics.median(one[part] for one in own) for part in (0, 1))
                    added = [
                        statistics.median(one[part] - without[part] for one, without in zip(own, base, strict=True))
                        for part in (0, 1)
                    ]
                    print(
                        f"{load:14} {way:10} p50 {p50:6.2f}  p99 {p99:6.2f} ms   "
                        f"added p50 {added[0]:+.2f}  p99 {added[1]:+.2f} ms   {counted(ports[way])}",
                        flush=True,
                    )
        finally:
            for server in servers.values():
                server.communicate("")


if __name__ == "__main__":
    main()
