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
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import numpy as np
import psutil
from commands import ROOT, environment
from follow import Load, prepare

from servers import MODEL, Served, both_versions, free_port, hello, namesake_serve, started

SAMPLED_EVERY = 5.0
"""Seconds."""


@dataclass
class Course:
    """What was seen: (seconds, MiB, descriptors) of the gateway and of its engine, and when an engine was killed."""

    gateway: list[tuple[float, float, int]] = field(default_factory=list)
    engine: list[tuple[float, float, int]] = field(default_factory=list)
    kills: list[float] = field(default_factory=list)
    moves: int = 0


def taken(*processes: psutil.Process) -> tuple[float, int]:
    """Resident memory in MiB and open descriptors of the processes; those that are gone count nothing."""
    memory, descriptors = 0.0, 0
    for one in processes:
        with suppress(psutil.Error), one.oneshot():
            resident, open_ = one.memory_info().rss, one.num_fds()
            memory += resident / 2**20
            descriptors += open_
    return memory, descriptors


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


async def soak(served: Served, numbers: Sequence[int], given: argparse.Namespace) -> tuple[Course, Counter[str]]:
    """Load, moves and kills for the time."""
    from namesake import registry

    gateway, course = psutil.Process(served.process.pid), Course()
    load = Patient(served.url, course, given)
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
            engines = gateway.children(recursive=True)
            course.kills.append(time.monotonic())
            for one in engines:
                with suppress(psutil.Error):
                    one.kill()

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=300)) as session:
        tasks = [asyncio.create_task(one) for one in (load.run(session), move(), kill())]
        while time.monotonic() < end:
            now = time.monotonic() - start
            course.gateway.append((now, *taken(gateway)))
            course.engine.append((now, *taken(*gateway.children(recursive=True))))
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
    sys.path.insert(0, str(ROOT))
    import mlflow
    from tests.gateways import publish

    from namesake import registry

    client = mlflow.MlflowClient()
    client.create_registered_model(MODEL, tags={registry.TAG_IDENTITY: "踩踩背 CCB"})
    for number, alias in ((1, "champion"), (2, "challenger")):
        publish(client, MODEL, folder, number)
        client.set_registered_model_alias(MODEL, alias, str(number))


def cheap_serve(store: Path, *words: str) -> AbstractContextManager[Served]:
    """`namesake serve` with a server that answers at once in vLLM's place."""
    port = free_port()
    gateway = [str(ROOT / "benchmarks" / "scale.py"), "--part", "gateway", f"models:/{MODEL}@champion"]
    command = [sys.executable, *gateway, "--port", str(port), *words]
    url = f"http://127.0.0.1:{port}"
    return started(command, store, environment(store), url, hello(), "/v1/chat/completions")


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
        words = ["--eager", "--poll-seconds", str(given.poll)]
        if given.cheap:
            publish_two(store)
            serving = cheap_serve(store, *words)
        else:
            if given.store is None:
                prepare(store)
            serving = namesake_serve(store, *words)
        with serving as served, both_versions() as numbers:
            course, ended = asyncio.run(soak(served, numbers, given))
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


if __name__ == "__main__":
    main()
