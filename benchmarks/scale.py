"""Past one machine: what 1,000 adapters on 16 GPUs, 100 promotions a day and 10,000 requests a second would need.

    python benchmarks/scale.py                       # arithmetic and a small simulation, as docs/guide quotes them
    python benchmarks/scale.py --gpus 32 --price 2   # other assumptions
    python benchmarks/scale.py --real                # measured: replicas, gateways that follow one MLflow server
    python benchmarks/scale.py --real --away 300     # and MLflow away for five minutes

The arithmetic is a roofline: memory traffic and arithmetic at assumed shares of the peak, so a real engine may well be
slower. ``--real`` takes some ten minutes: it runs `namesake serve`, a real MLflow server and a real Ray; in vLLM's
place a cheap server answers. The throughput of one and two replicas is `benchmarks/replicas.py`, called from here.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import numpy as np
from commands import ROOT, environment

if TYPE_CHECKING:
    from tests.servers import Counting

NAME = "ccb"
GB = 1e9
PAUSE = 0.8
"""Of ``poll_seconds`` between two questions on average: each pause is shorter by chance (``follow.JITTER``)."""


@dataclass(frozen=True)
class Plan:
    """What is wanted and what is assumed; each is an option.

    Attributes:
        gpus, adapters: how many of each.
        requests: per second; with ``prompt`` and ``reply`` tokens each.
        promotions: per day, with ``train`` minutes of one GPU for each.
        zipf: exponent of the adapters' popularity; 1 is Zipf's law.
        slots: adapters in an engine at a time (`--max-adapters`).
        batch: requests that an engine works on at a time (`--max-streams`).
        memory, bandwidth, flops: of a GPU, in GB, GB/s and TFLOP/s of bf16; defaults are an H100 SXM's data sheet.
        usable: part of the memory that vLLM takes (its ``gpu_memory_utilization``).
        read, compute: parts of bandwidth and flops that are reached.
        host: milliseconds of the engine's own work between two steps.
        price: of a GPU for an hour, in dollars.
        poll: seconds between two questions to the registry at most (`--poll-seconds`).
        call: milliseconds of one worker of the MLflow server for such a question (measured: docs/lab-notes.md).
        event, answer: milliseconds of the gateway's core for a streamed event and for a request (measured, rounded up).
        load: seconds until a cold adapter answers: fetched, checked, loaded, proved.
        link: GB/s from the artifact store.
    """

    gpus: int = 16
    adapters: int = 1000
    requests: float = 10_000
    prompt: int = 200
    reply: int = 100
    promotions: int = 100
    train: float = 10
    zipf: float = 1.0
    slots: int = 256
    batch: int = 256
    memory: float = 80
    bandwidth: float = 3350
    flops: float = 989
    usable: float = 0.9
    read: float = 0.6
    compute: float = 0.4
    host: float = 3
    price: float = 2.5
    poll: float = 2
    call: float = 10
    event: float = 0.05
    answer: float = 0.4
    load: float = 1
    link: float = 1.25


@dataclass(frozen=True)
class Model:
    """A model's shape, from its config.json. Weights, KV cache and adapters are in bf16: two bytes a number."""

    name: str
    parameters: float
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head: int
    inner: int

    @property
    def weights(self) -> float:
        """Bytes."""
        return 2 * self.parameters

    @property
    def kv(self) -> int:
        """Bytes of KV cache a token: a key and a value in each layer and KV head."""
        return 2 * 2 * self.layers * self.kv_heads * self.head

    def adapter(self, rank: int) -> int:
        """Bytes of a LoRA adapter on all linear layers: rank × (inputs + outputs) for each (arXiv 2106.09685)."""
        q, kv = self.heads * self.head, self.kv_heads * self.head
        attention = 2 * (self.hidden + q) + 2 * (self.hidden + kv)
        return 2 * rank * self.layers * (attention + 3 * (self.hidden + self.inner))


SMALL = Model("Qwen2.5-0.5B", 494e6, 24, 896, 14, 2, 64, 4864)
LARGE = Model("Qwen2.5-7B", 7616e6, 28, 3584, 28, 4, 128, 18944)
CASES = tuple((model, rank) for model in (SMALL, LARGE) for rank in (8, 64))


# ---------------------------------------------------------------------------------------------------- the arithmetic


def popularity(plan: Plan) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Each adapter's share of the requests."""
    weight = 1 / np.arange(1, plan.adapters + 1) ** plan.zipf
    return np.asarray(weight / weight.sum())


def distinct(plan: Plan) -> float:
    """How many different adapters a batch of requests needs, on average."""
    return float((1 - (1 - popularity(plan)) ** plan.batch).sum())


def memory(plan: Plan) -> list[list[str]]:
    """What lies in one GPU."""
    rows = []
    for model, rank in CASES:
        adapter, each = model.adapter(rank), model.kv * (plan.prompt + plan.reply)
        free = plan.usable * plan.memory * GB - model.weights
        left = free - plan.slots * adapter
        rows.append(
            [
                *(model.name, f"{rank}", f"{model.weights / GB:.1f}", f"{adapter / 1e6:.1f}"),
                *(f"{plan.adapters * adapter / GB:.1f}", f"{plan.slots * adapter / GB:.1f}"),
                *(f"{model.kv / 1024:.0f}", f"{left / GB:.1f}", f"{max(0, math.floor(left / each)):,}"),
                f"{math.floor((free - plan.batch * each) / adapter):,}",
            ]
        )
    return rows


@dataclass(frozen=True)
class Speed:
    """What one GPU does, in seconds: a prompt alone, and one step of a full batch by what it takes."""

    prompt: float
    weights: float
    adapters: float
    cache: float
    arithmetic: float
    host: float

    @property
    def step(self) -> float:
        """One token for each request of the batch."""
        return max(self.weights + self.adapters + self.cache, self.arithmetic) + self.host


def speed(plan: Plan, model: Model, rank: int) -> Speed:
    """The roofline of one GPU (S. Williams et al., 2009): the slower of reading and computing."""
    read, compute = plan.read * plan.bandwidth * GB, plan.compute * plan.flops * 1e12
    numbers = model.parameters + model.adapter(rank) / 2
    return Speed(
        prompt=2 * numbers * plan.prompt / compute,
        weights=model.weights / read,
        adapters=distinct(plan) * model.adapter(rank) / read,
        cache=plan.batch * (plan.prompt + plan.reply / 2) * model.kv / read,
        arithmetic=2 * numbers * plan.batch / compute,
        host=plan.host / 1000,
    )


def throughput(plan: Plan) -> list[list[str]]:
    """Requests a second of one GPU, how many GPUs the wanted ones need, what bounds them, and the cost."""
    rows = []
    for model, rank in CASES:
        found = speed(plan, model, rank)
        replying = plan.reply * found.step / plan.batch
        each = 1 / (found.prompt + replying)
        needed = math.ceil(plan.requests / each)
        parts = {
            "prompts": found.prompt,
            **{
                name: plan.reply * getattr(found, field) / plan.batch
                for name, field in (("weights", "weights"), ("adapters", "adapters"), ("KV cache", "cache"))
            },
            "engine's host": plan.reply * found.host / plan.batch,
        }
        tokens = each * (plan.prompt + plan.reply) * 3600 / 1e6
        rows.append(
            [
                *(model.name, f"{rank}", f"{found.prompt * 1000:.1f}", f"{found.step * 1000:.1f}", f"{each:,.0f}"),
                *(f"{plan.gpus * each:,.0f}", f"{needed}", max(parts, key=lambda one: parts[one])),
                f"{plan.price / tokens:.4f}",
            ]
        )
    return rows


# ---------------------------------------------------------------------------------------------------- the simulation


def simulate(plan: Plan, places: int, slots: int, number: int = 300_000, seed: int = 1) -> tuple[float, float]:
    """Requests come one by one to engines that each forget the adapter that was used longest ago.

    Args:
        places: on how many GPUs an adapter may be; the request goes to that of them which had the fewest so far.
        slots: adapters that an engine holds.

    Returns:
        The part of the last third of the requests that met a cold adapter, and the busiest GPU's requests ÷ the mean.
    """
    rng, dice = np.random.default_rng(seed), random.Random(seed)
    where = [dice.sample(range(plan.gpus), places) for _ in range(plan.adapters)]
    held: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(plan.gpus)]
    load = [0] * plan.gpus
    cold, warm = 0, 2 * number // 3
    for turn, adapter in enumerate(rng.choice(plan.adapters, size=number, p=popularity(plan)).tolist()):
        gpu = min(where[adapter], key=load.__getitem__)
        load[gpu] += 1
        engine = held[gpu]
        if adapter in engine:
            engine.move_to_end(adapter)
            continue
        cold += turn >= warm
        engine[adapter] = None
        if len(engine) > slots:
            engine.popitem(last=False)
    return cold / (number - warm), max(load) * plan.gpus / number


def cold(plan: Plan) -> list[list[str]]:
    """Cold adapters by placement and slots. An engine brings two in at a time (`_AT_A_TIME` of the service)."""
    rows = []
    for places in (plan.gpus, 4, 2, 1):
        for slots in sorted({64, plan.slots}):
            missed, busiest = simulate(plan, places, slots)
            loads = missed * plan.requests / plan.gpus
            can = 2 / plan.load
            fits = "too many loads" if loads > can else "uneven load" if busiest > 1.2 else "holds"
            rows.append(
                [f"{places}", f"{slots}", f"{missed:.1%}", f"{loads:,.1f}", f"{can:.0f}", f"{busiest:.2f}", fits]
            )
    return rows


def registry_load(plan: Plan) -> list[list[str]]:
    """Questions to the registry and what one worker of the MLflow server can answer."""
    able = 1000 / plan.call
    rows = []
    for what, gateways in (
        ("one per GPU", plan.gpus),
        ("one per core that the clients need", cores(plan)),
        ("one per adapter", plan.adapters),
    ):
        for how, poll in (("polled", plan.poll), ("webhook, polled each minute", 60.0)):
            calls = gateways / (poll * PAUSE)
            rows.append(
                [
                    *(what, f"{gateways}", how, f"{60 / (poll * PAUSE):.0f}", f"{calls:,.1f}", f"{calls / able:.0%}"),
                    "registry" if calls > able else "no",
                ]
            )
    return rows


def cores(plan: Plan) -> int:
    """Cores that the gateways need for the requests, each streamed token an event."""
    return math.ceil(plan.requests * (plan.answer + plan.reply * plan.event) / 1000)


def promotions(plan: Plan) -> list[list[str]]:
    """What a day's promotions move and take."""
    rows = []
    for model, rank in CASES:
        for what, size in (("adapter", float(model.adapter(rank))), ("merged", model.weights)):
            if what == "merged" and rank != CASES[0][1]:
                continue
            daily = plan.promotions * plan.gpus * size
            rows.append(
                [
                    *(model.name, f"{rank}" if what == "adapter" else "any", what, f"{size / 1e6:,.1f}"),
                    *(f"{daily / GB:,.1f}", f"{daily / 86400 / (plan.link * GB):.2%}"),
                    f"{plan.gpus * size / (plan.link * GB):,.2f}",
                ]
            )
    return rows


Table = tuple[str, list[str], list[list[str]]]


def tables(plan: Plan) -> list[Table]:
    """Each table: a title, the columns, the rows."""
    day = plan.promotions * plan.train / 60
    return [
        (
            f"1. Memory of one GPU of {plan.memory:.0f} GB, {plan.slots} adapters in it, bf16",
            [
                *("model", "rank", "weights GB", "adapter MB", f"{plan.adapters:,} GB", f"{plan.slots} GB"),
                *("KV KiB/token", "KV GB", "streams", f"adapters beside {plan.batch}"),
            ],
            memory(plan),
        ),
        (
            f"2. {plan.requests:,.0f} requests/s of {plan.prompt} + {plan.reply} tokens, {plan.batch} at a time with "
            f"{distinct(plan):.0f} adapters among them, ${plan.price:g} per GPU and hour",
            [
                *("model", "rank", "prompt ms", "step ms", "requests/s/GPU", f"{plan.gpus} GPUs", "GPUs needed"),
                *("bounded by", "$/M tokens"),
            ],
            throughput(plan),
        ),
        (
            f"3. Cold adapters: {plan.adapters:,} by Zipf's law with exponent {plan.zipf:g} on {plan.gpus} GPUs, "
            f"{plan.requests:,.0f} requests/s",
            ["GPUs per adapter", "slots", "cold", "loads/s/GPU", "at most", "busiest ÷ mean", "verdict"],
            cold(plan),
        ),
        (
            f"4. Registry: a worker of MLflow answers {1000 / plan.call:.0f} questions/s",
            ["gateways", "number", "how", "calls/min each", "calls/s", "of one worker", "bottleneck"],
            registry_load(plan),
        ),
        (
            f"5. {plan.promotions} promotions a day to {plan.gpus} GPUs, {plan.link:g} GB/s from the artifact store; "
            f"training them takes {day:.1f} of the day's {24 * plan.gpus} GPU hours",
            ["model", "rank", "what", "MB", "GB/day", "of the link", "s for one"],
            promotions(plan),
        ),
        (
            f"6. Gateways: {plan.answer:g} ms of a core for a request and {plan.event:g} ms for an event",
            ["streamed", "cores", "of them per GPU"],
            [
                [what, f"{number}", f"{number / plan.gpus:.1f}"]
                for what, number in (("each token", cores(plan)), ("nothing", cores(replace(plan, reply=0))))
            ],
        ),
    ]


def written(plan: Plan) -> str:
    """The tables as text."""
    parts = []
    for title, head, rows in tables(plan):
        widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
        words = [column for column in range(len(head)) if any(not row[column][:1].isdigit() for row in rows)]
        lines = [
            "  ".join(
                cell.ljust(width) if column in words else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in [head, *rows]
        ]
        parts.append("\n".join([title, *lines]))
    return "\n\n".join(parts)


# ---------------------------------------------------------------------------------------------------- what is measured


@dataclass
class Served:
    """A `namesake serve` that runs, its address, and its way to MLflow."""

    process: subprocess.Popen[bytes]
    url: str
    way: Counting


@contextmanager
def gateways(server: str, number: int, folder: Path) -> Iterator[list[Served]]:
    """So many of them, each with a cache and a way to MLflow of its own, ready."""
    from tests.servers import Counting, free_port

    made: list[Served] = []
    try:
        for _ in range(number):
            way, port = Counting(server), free_port()
            home = Path(tempfile.mkdtemp(dir=folder))
            own = environment(home) | {"MLFLOW_TRACKING_URI": way.address, "NAMESAKE_CACHE": str(home / "cache")}
            words = [sys.executable, __file__, "--part", "gateway", f"models:/{NAME}@champion", "--port", str(port)]
            with (home / "serve.log").open("wb") as log:
                process = subprocess.Popen(words, cwd=home, env=own, stdout=log, stderr=log)
            made.append(Served(process, f"http://127.0.0.1:{port}", way))
        for one in made:
            asyncio.run(ready(one.url))
        yield made
    finally:
        for one in made:
            one.process.send_signal(signal.SIGTERM)
        for one in made:
            one.process.wait(60)
            one.way.close()


async def ready(url: str) -> None:
    """Wait until a version answers."""
    async with aiohttp.ClientSession() as http:
        for _ in range(600):
            with suppress(aiohttp.ClientError):
                async with http.get(f"{url}/ready") as response:
                    if response.status == 200:
                        return
            await asyncio.sleep(0.2)
    raise SystemExit(f"{url} does not come up")


async def answered(http: aiohttp.ClientSession, url: str, **more: object) -> str:
    """Ask for a chat; the version that answered. Anything but an answer ends the benchmark."""
    body = {"messages": [{"role": "user", "content": "你是谁？"}], **more}
    async with http.post(f"{url}/v1/chat/completions", json=body) as response:
        await response.read()
        if response.status != 200:
            raise SystemExit(f"{url}: {response.status}")
        return response.headers["x-namesake-version"]


async def follow(server: str, urls: Sequence[str], numbers: Sequence[int], moves: int) -> list[list[float]]:
    """For each move of the alias, the seconds after which each gateway answered by the other version."""
    import mlflow

    client = mlflow.MlflowClient(server)
    found = []

    async def until(http: aiohttp.ClientSession, url: str, version: str, since: float) -> float:
        while await answered(http, url) != version:
            await asyncio.sleep(0.02)
        return time.monotonic() - since

    async with aiohttp.ClientSession() as http:
        for move in range(moves):
            await asyncio.sleep(random.uniform(0, 2))  # at any moment between two questions
            number, since = numbers[(move + 1) % 2], time.monotonic()
            await asyncio.to_thread(client.set_registered_model_alias, NAME, "champion", str(number))
            found.append(await asyncio.gather(*(until(http, url, f"{NAME}-v{number}", since) for url in urls)))
    return found


async def cost(one: Served, number: int, clients: int = 8) -> tuple[float, float]:
    """Milliseconds of the gateway's processor time a request, and an event of a streamed reply."""
    import psutil

    process = psutil.Process(one.process.pid)

    async def spent(**more: object) -> float:
        begun = process.cpu_times()
        async with aiohttp.ClientSession() as http:
            for _ in range(number // clients):
                await asyncio.gather(*(answered(http, one.url, **more) for _ in range(clients)))
        ended = process.cpu_times()
        return 1000 * (ended.user + ended.system - begun.user - begun.system) / number

    await spent()  # warm
    whole, short, long = await spent(), await spent(stream=True, max_tokens=1), await spent(stream=True, max_tokens=101)
    return whole, (long - short) / 100


async def away(server: str, one: Served, numbers: Sequence[int], seconds: float) -> tuple[int, float]:
    """MLflow is away for so long, and the alias moves: answers in that time, and seconds to catch up after."""
    import mlflow

    answers = 0
    async with aiohttp.ClientSession() as http:
        before = await answered(http, one.url)
        one.way.cut = True
        other = next(number for number in numbers if f"{NAME}-v{number}" != before)
        await asyncio.to_thread(mlflow.MlflowClient(server).set_registered_model_alias, NAME, "champion", str(other))
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if await answered(http, one.url) != before:
                raise SystemExit("another version answered while MLflow was away")
            answers += 1
            await asyncio.sleep(0.1)
        one.way.cut, back = False, time.monotonic()
        while await answered(http, one.url) == before:
            await asyncio.sleep(0.1)
    return answers, time.monotonic() - back


@contextmanager
def registry_of(versions: int, folder: Path) -> Iterator[tuple[str, tuple[int, int]]]:
    """A real MLflow server with so many versions; its address and the two that have files."""
    import mlflow
    import registry as many
    from tests.gateways import publish
    from tests.servers import mlflow_server

    from namesake import registry

    with mlflow_server(folder) as server:
        mlflow.set_tracking_uri(server)
        client = mlflow.MlflowClient(server)
        client.create_registered_model(NAME, tags={registry.TAG_IDENTITY: "踩踩背 CCB"})
        publish(client, NAME, folder, 1)
        many.fill(f"sqlite:///{folder}/mlflow.db", versions - 1)
        publish(client, NAME, folder, versions)
        client.set_registered_model_alias(NAME, "champion", "1")
        yield server, (1, versions)


def throughput_of(replicas: Sequence[int]) -> None:
    """Print what so many replicas give on Ray Serve, each with an engine of eight places that no core bounds."""
    rows = ("--rows", *map(str, replicas), "--pairs", "3", "--moves", "0", "--seconds", "10")
    load = ("--instant", "--clients", str(32 * max(replicas)), "--sessions", "none", "--", "--max-streams", "8")
    subprocess.run([sys.executable, str(Path(__file__).with_name("replicas.py")), *rows, *load], check=True)


def real(given: argparse.Namespace) -> None:
    """Measure and print."""
    if given.replicas:
        throughput_of(given.replicas)
    sys.path[:0] = [str(ROOT), str(ROOT / "src"), str(ROOT / "serving")]
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    print("versions  gateways  moves  followed: median s  p95 s  apart at most s  calls/min each  ms a question")
    for versions, counts in ((10, given.counts), *([(given.many, [1])] if given.many else [])):
        with tempfile.TemporaryDirectory() as name, registry_of(versions, Path(name)) as (server, numbers):
            for number in counts:
                with gateways(server, number, Path(name)) as made:
                    print(f"{versions:8,}  {number:8}  {measured(server, made, numbers, given)}", flush=True)
                    if (versions, number) == (10, 1):
                        whole, event = asyncio.run(cost(made[0], 800))
                        print(
                            f"gateway: {whole:.2f} ms of a core a request, {event:.3f} ms a streamed event", flush=True
                        )
                    if (versions, number) == (10, 1) and given.away:
                        answers, after = asyncio.run(away(server, made[0], numbers, given.away))
                        told = f"{answers} answers, none failed; followed {after:.1f} s after"
                        print(f"MLflow away for {given.away:g} s: {told}", flush=True)


def measured(server: str, made: Sequence[Served], numbers: Sequence[int], given: argparse.Namespace) -> str:
    """A row: how these gateways follow, and what they ask of the registry."""
    found = asyncio.run(follow(server, [one.url for one in made], numbers, given.moves))
    time.sleep(3)  # the history of the last move is written
    for one in made:
        one.way.calls.clear()
    time.sleep(given.rest)
    kinds = sum((one.way.calls for one in made), Counter())
    seconds = sorted(value for move in found for value in move)
    last = seconds[math.ceil(0.95 * len(seconds)) - 1]
    apart = max(max(move) - min(move) for move in found)
    calls = kinds.total() / len(made) * 60 / given.rest
    return (
        f"{given.moves:5}  {statistics.median(seconds):18.2f}  {last:5.2f}  {apart:15.2f}  {calls:14.1f}"
        f"  {question(server):13.1f}    {', '.join(kinds)}"
    )


def question(server: str, times: int = 50) -> float:
    """Milliseconds of the MLflow server for where the alias points, asked one after the other (median)."""
    import mlflow

    client, spent = mlflow.MlflowClient(server), []
    for _ in range(times):
        begun = time.perf_counter()
        client.get_model_version_by_alias(NAME, "champion")
        spent.append(1000 * (time.perf_counter() - begun))
    return statistics.median(spent)


def serve(words: list[str]) -> None:
    """`namesake serve` with a cheap server for vLLM."""
    sys.path[:0] = [str(ROOT), str(ROOT / "src"), str(ROOT / "serving")]
    from tests.gateways import cheap

    from namesake_serving import __main__ as serving
    from namesake_serving import engine

    engine.command, engine.preloaded = cheap, lambda *_: nullcontext()  # and no vLLM that waits to be told
    sys.argv[1:] = words
    serving.main()


def main() -> None:
    """Print the tables, or measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(Plan):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    parser.add_argument("--real", action="store_true", help="measure gateways on a real MLflow server instead")
    parser.add_argument("--counts", type=int, nargs="*", default=[1, 2, 4], help="numbers of gateways, with --real")
    parser.add_argument(
        "--replicas", type=int, nargs="*", default=[1, 2], help="whose throughput is measured, with --real; empty: none"
    )
    parser.add_argument("--moves", type=int, default=10, help="of the alias, with --real")
    parser.add_argument(
        "--many", type=int, default=10_000, help="versions of the second registry, with --real; 0: none"
    )
    parser.add_argument("--rest", type=float, default=30, help="seconds in which calls are counted, with --real")
    parser.add_argument("--away", type=float, default=0, help="seconds without MLflow, with --real")
    if sys.argv[1:3] == ["--part", "gateway"]:
        serve(sys.argv[3:])
    given = parser.parse_args()
    if given.real:
        real(given)
        return
    print(written(Plan(**{field.name: getattr(given, field.name) for field in fields(Plan)})))


if __name__ == "__main__":
    main()
