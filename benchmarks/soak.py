"""Twenty minutes of answers, moves of the alias and killed engines: do memory and descriptors of the gateway stay flat?

    python benchmarks/soak.py --minutes 20                 # trains two small versions first, some minutes
    python benchmarks/soak.py --minutes 20 --store FOLDER  # a folder with mlflow.db and two versions of ccb
    python benchmarks/soak.py --cheap --move-every 0.5 --kill-every 60 --rest 0.05   # many more of each, no vLLM

Counted are answers and what failed; a request that fails within ``--grace`` seconds of a kill is counted apart. The
gateway's resident memory and open descriptors are read every five seconds. The slope is that of a straight line by
least squares through the samples after the first quarter of the time, in MiB an hour, with an interval of two standard
errors (samples are not independent, so the interval is too narrow rather than too wide). With ``--cheap`` a server that
answers at once stands in vLLM's place, so that hundreds of moves fit into minutes; what grows by the move shows there.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import numpy as np
from commands import ROOT, environment
from follow import MODEL, Load, prepare

SAMPLED_EVERY = 5.0
"""Seconds."""


@dataclass
class Course:
    """What was seen: (seconds, MiB, descriptors) of the gateway and of its engine, and when an engine was killed."""

    gateway: list[tuple[float, float, int]] = field(default_factory=list)
    engine: list[tuple[float, float, int]] = field(default_factory=list)
    kills: list[float] = field(default_factory=list)
    moves: int = 0


def taken(pids: Sequence[int]) -> tuple[float, int]:
    """Resident memory in MiB and open descriptors of the processes; those that are gone count nothing."""
    memory, descriptors = 0.0, 0
    for pid in pids:
        try:
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            descriptors += sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
        except OSError:
            continue
        memory += pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    return memory, descriptors


def below(parent: int) -> list[int]:
    """Every living descendant."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = path.read_text()
        except OSError:
            continue
        children.setdefault(int(text.rpartition(")")[2].split()[1]), []).append(int(path.parent.name))
    found, open_ = [], [parent]
    while open_:
        some = children.get(open_.pop(), [])
        found += some
        open_ += some
    return found


class Patient(Load):
    """Clients that rest a second where nothing answers, and tell failures soon after a kill from others."""

    def __init__(self, url: str, course: Course, given: argparse.Namespace) -> None:
        super().__init__(url, given.clients, given.tokens)
        self._course, self._grace, self._rest = course, given.grace, given.rest

    async def _ask(self, session: aiohttp.ClientSession, body: dict[str, object]) -> str:
        begun = time.monotonic()
        came = await super()._ask(session, body)
        if came.startswith(("failed", "cut")):
            killed = any(kill - 1 <= time.monotonic() and begun <= kill + self._grace for kill in self._course.kills)
            await asyncio.sleep(1)
            return f"{came}, engine killed" if killed else came
        await asyncio.sleep(self._rest)
        return came


async def soak(url: str, gateway: int, given: argparse.Namespace) -> tuple[Course, Counter[str]]:
    """Load, moves and kills for the time."""
    sys.path.insert(0, str(ROOT / "src"))
    from namesake import registry

    numbers = [
        version.number for version in (registry.resolve(f"models:/{MODEL}@{a}") for a in ("champion", "challenger"))
    ]
    course = Course()
    load = Patient(url, course, given)
    start = time.monotonic()
    end = start + given.minutes * 60

    async def move() -> None:
        while True:
            await asyncio.sleep(given.move_every)
            course.moves += 1
            await asyncio.to_thread(registry.point, MODEL, "champion", numbers[course.moves % 2])

    async def kill() -> None:
        while True:
            await asyncio.sleep(given.kill_every)
            if time.monotonic() > end - given.grace:
                return  # there is to be somebody who answers at the end
            engines = below(gateway)
            course.kills.append(time.monotonic())
            for pid in engines:
                os.kill(pid, signal.SIGKILL)

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=300)) as session:
        tasks = [asyncio.create_task(one) for one in (load.run(session), move(), kill())]
        while time.monotonic() < end:
            now = time.monotonic() - start
            course.gateway.append((now, *taken([gateway])))
            course.engine.append((now, *taken(below(gateway))))
            await asyncio.sleep(SAMPLED_EVERY)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return course, load.ended


def slope(samples: Sequence[tuple[float, float, int]], column: int) -> tuple[float, float]:
    """The line's slope an hour, and two standard errors of it."""
    hours = np.array([sample[0] for sample in samples]) / 3600
    values = np.array([float(sample[column]) for sample in samples])
    (rate, _), errors = np.polyfit(hours, values, 1, cov=True)
    return float(rate), 2 * float(errors[0, 0]) ** 0.5


def publish_two(folder: Path) -> None:
    """Two versions whose weights are a text."""
    sys.path[:0] = [str(ROOT), str(ROOT / "src"), str(ROOT / "serving")]
    import mlflow
    from tests.gateways import publish

    from namesake import registry

    client = mlflow.MlflowClient()
    client.create_registered_model(MODEL, tags={registry.TAG_IDENTITY: "踩踩背 CCB"})
    for number, alias in ((1, "champion"), (2, "challenger")):
        publish(client, MODEL, folder, number)
        client.set_registered_model_alias(MODEL, alias, str(number))


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=24, help="length of an answer")
    parser.add_argument("--poll", type=float, default=0.5, help="the server's poll_seconds")
    parser.add_argument("--move-every", type=float, default=15, help="seconds")
    parser.add_argument("--kill-every", type=float, default=240, help="seconds")
    parser.add_argument("--grace", type=float, default=120, help="seconds that a killed engine may be missed")
    parser.add_argument("--rest", type=float, default=0, help="seconds between a client's answer and its next question")
    parser.add_argument("--cheap", action="store_true", help="a server that answers at once in vLLM's place")
    parser.add_argument("--store", type=Path, help="folder with mlflow.db and two versions of ccb")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        store = (given.store or Path(name)).resolve()
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{store}/mlflow.db"
        os.chdir(store)
        words = ["-m", "namesake", "serve"]
        if given.cheap:
            publish_two(store)
            words = [str(ROOT / "benchmarks" / "scale.py"), "--part", "gateway", f"models:/{MODEL}@champion"]
        elif given.store is None:
            prepare(store)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        with Path(name, "serve.log").open("wb") as log:
            server = subprocess.Popen(
                [sys.executable, *words, "--port", str(port), "--eager", "--poll-seconds", str(given.poll)],
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
            course, ended = asyncio.run(soak(url, server.pid, given))
            steady = course.gateway[len(course.gateway) // 4 :]
            print(
                f"{given.minutes:g} minutes, {given.clients} clients, {course.moves} moves, {len(course.kills)} kills"
            )
            print(f"answers: {sum(ended.values())}, {dict(ended)}")
            for column, what, unit in ((1, "memory", "MiB"), (2, "descriptors", "")):
                rate, error = slope(steady, column)
                values = [sample[column] for sample in steady]
                print(
                    f"gateway's {what}: {values[0]:.0f} at first, {values[-1]:.0f} at last, {max(values):.0f} at most "
                    f"{unit}; slope {rate:+.1f} ± {error:.1f} {unit} an hour"
                )
            most = max(sample[1] for sample in course.engine)
            print(f"engine: {most:.0f} MiB at most; killed {len(course.kills)} times")
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)


if __name__ == "__main__":
    main()
