"""Does anybody notice 500 clients that send a byte a second and never a whole request?

    python benchmarks/trickle.py

The gateway as `namesake serve` runs it, with the default deadlines, before an upstream that answers at once, so that
nothing hides what the gateway adds. Rounds without and with the trickling connections take turns; each trickle that is
cut comes again. Printed are the others' p50 and p99 in milliseconds, the ratio of the p99's medians (at most 1.2), and
how long a trickle lived at most (at most 15 s).
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import aiohttp

ROOT = Path(__file__).resolve().parents[1]
HEADS = (
    b"",  # a connection and nothing more
    b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nX: ",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n",
)
DROPS = (b"", b"x", b" ", b"1\r\n \r\n")
BODY = {"messages": [{"role": "user", "content": "Who are you?"}]}


async def serve() -> None:
    """The gateway until standard input ends; its port is printed."""
    sys.path[:0] = [str(ROOT), str(ROOT / "src"), str(ROOT / "serving")]
    from tests.unit.test_serving_gateway import front

    async with front() as gate:
        print(gate.port, flush=True)
        await asyncio.to_thread(sys.stdin.read)


async def trickle(port: int, number: int) -> None:
    """So many slow connections until cancelled; each one's life is printed in seconds."""

    async def one(kind: int) -> None:
        while True:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            begun = time.monotonic()
            writer.write(HEADS[kind])

            async def drip(writer: asyncio.StreamWriter = writer) -> None:
                while True:
                    await asyncio.sleep(1)
                    writer.write(DROPS[kind])

            dripping = asyncio.create_task(drip())
            with suppress(ConnectionError):
                await reader.read()
            print(time.monotonic() - begun, flush=True)
            dripping.cancel()
            writer.close()

    async def late(index: int) -> None:
        await asyncio.sleep(index / number)  # not all in one moment
        await one(index % len(HEADS))

    await asyncio.gather(*(late(index) for index in range(number)))


async def ask(port: int, clients: int, seconds: float) -> list[float]:
    """Milliseconds of each request of clients that ask again as soon as they are answered."""
    took: list[float] = []
    until = time.monotonic() + seconds

    async def client(session: aiohttp.ClientSession) -> None:
        while time.monotonic() < until:
            begun = time.monotonic()
            async with session.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=BODY) as response:
                await response.read()
                if response.status != 200:
                    raise SystemExit(f"status {response.status}")
            took.append((time.monotonic() - begun) * 1000)

    async with aiohttp.ClientSession() as session:
        await asyncio.gather(*(client(session) for _ in range(clients)))
    return took


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trickles", type=int, default=500)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=13, help="of each round; a trickle lives for ten")
    parser.add_argument("--part", choices=["serve", "trickle"], help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part:
        asyncio.run(serve() if given.part == "serve" else trickle(given.port, given.trickles))
        return
    words = [sys.executable, __file__, "--trickles", str(given.trickles), "--part"]
    server = subprocess.Popen([*words, "serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    port = int(server.stdout.readline())
    p99: dict[bool, list[float]] = {False: [], True: []}
    lives: list[float] = []
    try:
        asyncio.run(ask(port, given.clients, 2))  # warm
        for _ in range(given.rounds):
            for slow in (False, True):
                words_now = [*words, "trickle", "--port", str(port)]
                trickling = subprocess.Popen(words_now, stdout=subprocess.PIPE, text=True) if slow else None
                time.sleep(2)  # the same for both
                took = asyncio.run(ask(port, given.clients, given.seconds))
                if trickling is not None:
                    trickling.kill()
                    lives += [float(line) for line in trickling.communicate()[0].splitlines()]
                hundredths = statistics.quantiles(took, n=100)
                p99[slow].append(hundredths[98])
                name = f"{given.trickles} trickles" if slow else "alone"
                print(f"{name:14} {len(took):6} requests  p50 {hundredths[49]:6.2f}  p99 {hundredths[98]:6.2f} ms")
    finally:
        server.communicate("")
    ratio = statistics.median(p99[True]) / statistics.median(p99[False])
    print(f"p99 with ÷ alone {ratio:.2f}; {len(lives)} trickles cut, after {min(lives):.1f} to {max(lives):.1f} s")


if __name__ == "__main__":
    main()
