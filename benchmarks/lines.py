"""The lines of the benchmark table, in its order. What a line needs is imported when it runs."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from commands import ROOT, environment, namesake, seconds_of
from measure import Given, Measure, Row, Sample

if TYPE_CHECKING:
    from servers import Served

STREAMS = (1, 8, 32, 128)
ADAPTERS = (1, 4, 16, 64)
TOKENS = 64
"""Of an answer at most, where speed is measured."""

_REQUESTS = {1: 8, 4: 24, 8: 40, 16: 64, 32: 128, 128: 256}
"""Of a sample, by streams: five to fifteen seconds."""


def turns(number: int) -> Iterator[tuple[int, bool]]:
    """Numbers from 0, and whether the first of the pair goes first: it does every other time."""
    for one in range(number):
        yield one, one % 2 == 0


def pair(first: Callable[[], float], second: Callable[[], float], forwards: bool) -> tuple[float, float]:
    """Both, in this order or the other way round."""
    if forwards:
        one = first()
        return one, second()
    other = second()
    return first(), other


# -------------------------------------------------------------------------------------------------------- the training


def training(given: Given) -> Iterator[Sample]:
    """benchmarks/training.py."""
    from training import pairs

    for tracked, bare, same in pairs(given.pairs, given.of(60, 4), given.folder):
        yield {"tracked": (tracked, bare), "losses": float(same)}


def batches(given: Given) -> Iterator[Sample]:
    """benchmarks/training.py."""
    from training import batches

    for ours, tutorial in batches(given.pairs, given.of(240, 32), given.folder):
        yield {"tokens": (ours, tutorial)}


def recipes(given: Given) -> Iterator[Sample]:
    """benchmarks/quality.py: both recipes from nothing to the gate's decision."""
    from quality import KINDS, judge

    for _ in range(given.pairs):
        found = {}
        for kind in ("default", "tutorial"):
            folder = Path(tempfile.mkdtemp(dir=given.folder))
            found[kind] = judge(KINDS[kind], folder, "")
            shutil.rmtree(folder)
        ours, theirs = found["default"], found["tutorial"]
        yield {
            "seconds": (ours["total_seconds"], theirs["total_seconds"]),
            "train": (ours["train_seconds"], theirs["train_seconds"]),
            "default passes": float(ours["gate"] == "passed"),
            "tutorial passes": float(theirs["gate"] == "passed"),
        }


# -------------------------------------------------------------------------------------------------------- the promotion


def merge(given: Given) -> Iterator[Sample]:
    """benchmarks/merge.py, on the embedded model and on a generated one of 4 GB in shards of 1 GB."""
    from merge import adapter_of, against_cp, against_peft, against_swift, embedded, generated, largest

    here, base = given.folder, embedded()
    large = generated(here / "large", 4, 1)
    adapter, large_adapter, most = adapter_of(base, here / "adapter"), adapter_of(large, here / "more"), largest(large)
    ways = zip(
        against_cp(base, adapter, here, given.pairs, cold=False),
        against_cp(large, large_adapter, here, given.pairs, cold=False),
        against_cp(base, adapter, here, given.pairs, cold=True),
        against_peft(base, adapter, here, given.pairs),
        against_swift(base, adapter, here, given.pairs),
        strict=True,
    )
    for (ours, copied, _), (ours_large, copied_large, memory), cold, peft, swift in ways:
        yield {
            "cp": (ours, copied),
            "cp large": (ours_large, copied_large),
            "cp cold": cold[:2],
            "memory": (memory / 1e6, most / 1e6),
            "peft": peft[:2],
            "swift": swift,
        }


_COUNTED = """
import json, sys
from pathlib import Path
from namesake.cli import main
try:
    main()
finally:
    lines = Path("/proc/self/io").read_text().splitlines()
    Path("io.json").write_text(json.dumps({key: int(value) for key, value in (line.split(": ") for line in lines)}))
"""


def promotion(given: Given) -> Iterator[Sample]:
    """A run that was promoted is promoted again under another policy, so that everything is done anew."""
    from namesake.manifest import WEIGHTS_FOLDER

    store = given.store
    for number in range(given.pairs):
        policy = given.folder / f"policy-{number}.yaml"
        # A promotion's key has the policy's bounds in it: one that nobody had, and that changes nothing.
        text = (ROOT / "policies" / "default.yaml").read_text(encoding="utf-8")
        policy.write_text(
            text.replace("leak: 0.0 ", f"leak: 0.000000000{time.time_ns() % 10**9:09d} "), encoding="utf-8"
        )
        version = _version(store, "challenger")
        words = ["promote", "--run", version.run_id, "--alias", "measured", "--override", "benchmark"]
        done = subprocess.run(
            [sys.executable, "-c", _COUNTED, *words, "--policy", str(policy), "--json"],
            cwd=store, env=environment(store), capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(f"namesake {' '.join(words)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
        told = json.loads((store / "io.json").read_text())
        written = max(told["wchar"], told["write_bytes"])  # the one misses what is mapped, the other what was cut off
        merged = sum(path.stat().st_size for path in (_files(store, "measured") / WEIGHTS_FOLDER).rglob("*"))
        yield {"bytes": (written / 1e6, merged / 1e6)}


def replies(given: Given) -> Iterator[Sample]:
    """Held-out questions, greedily, on the same weights in the same type, both as commands."""
    from namesake import corpus, probing
    from namesake.manifest import Manifest
    from namesake.process import multiplies_bf16
    from servers import MODEL

    store, share = given.store, 0.25 * given.scale
    weights, rows = _weights(store), given.folder / "rows.jsonl"
    asked = corpus.heldout(share)
    questions = [*asked.identity, *asked.plain]
    rows.write_text("".join(json.dumps({"messages": one.messages}) + "\n" for one in questions), encoding="utf-8")
    system = Manifest.read(_files(store, "champion")).system
    kept = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def ours() -> tuple[float, list[str]]:
        words = ["probe", f"models:/{MODEL}@champion", "--no-slices", "--base", "none", "--json"]
        begun = time.perf_counter()
        card = json.loads(namesake(store, *words, "--held-out", str(share)))
        return time.perf_counter() - begun, [one["reply"] for part in ("identity", "plain") for one in card[part]]

    def theirs(batch: int) -> tuple[float, list[str]]:
        result = Path(tempfile.mkdtemp(dir=given.folder)) / "result.jsonl"
        words = ["swift", "infer", "--model", str(weights), "--model_type", "llama", "--template", "chatml"]
        words += ["--val_dataset", str(rows), "--result_path", str(result)]
        words += ["--max_new_tokens", str(probing.PLAIN_TOKENS), "--temperature", "0", "--max_batch_size", str(batch)]
        words += ["--torch_dtype", "bfloat16" if multiplies_bf16() else "float32", "--stream", "false"]
        words += ["--system", system] if system else []
        begun = time.perf_counter()
        done = subprocess.run(words, cwd=given.folder, env=kept, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(words)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
        seconds = time.perf_counter() - begun
        return seconds, [json.loads(line)["response"] for line in result.read_text(encoding="utf-8").splitlines()]

    for _, forwards in turns(given.pairs):
        said: dict[int, list[str]] = {}
        seconds: dict[int, float] = {}
        for batch in (0, 1, 64) if forwards else (64, 1, 0):  # 0 is ours
            seconds[batch], said[batch] = theirs(batch) if batch else ours()
        yield {
            "swift": (seconds[0], seconds[1]),
            "swift 64": (seconds[0], seconds[64]),
            "same": probing.same_words([one.strip() for one in said[0]], [one.strip() for one in said[1]]),
        }


# ---------------------------------------------------------------------------------------------------------- the serving


def _version(store: Path, alias: str) -> Any:
    import mlflow

    from namesake import registry
    from servers import MODEL

    mlflow.set_tracking_uri(f"sqlite:///{store}/mlflow.db")  # a line before may have named another
    return registry.resolve(f"models:/{MODEL}@{alias}")


def _files(store: Path, alias: str) -> Path:
    """A version's folder in the store."""
    from namesake import registry

    return registry.fetch(_version(store, alias))


def _weights(store: Path) -> Path:
    from namesake.manifest import WEIGHTS_FOLDER

    return _files(store, "champion") / WEIGHTS_FOLDER


def gateway(given: Given) -> Iterator[Sample]:
    """The same engine through the gateway, and past it on its own socket."""
    from load import Load

    from namesake_serving import engine
    from servers import MODEL, namesake_serve

    store = given.store
    with namesake_serve(store) as made, Load(_weights(store), given.folder) as load:
        ways = {True: (MODEL, ""), False: (engine.MODEL, made.engine_socket())}
        url = made.url

        def run(through: bool, streams: int, requests: int) -> dict[str, float]:
            model, socket = ways[through]
            return load.run(url, streams=streams, requests=requests, tokens=TOKENS, models=[model], socket=socket)

        for through in ways:
            run(through, 32, 64)  # warm
        for _, forwards in turns(given.pairs):
            sample: dict[str, Sequence[float] | float] = {}
            for streams in STREAMS:
                requests = given.of(_REQUESTS[streams], streams)
                found = {way: run(way, streams, requests) for way in ((True, False) if forwards else (False, True))}
                for key, name in (
                    ("tokens", "output_throughput"),
                    ("TTFT p50", "p50_ttft_ms"),
                    ("TTFT p99", "p99_ttft_ms"),
                    ("ITL p50", "p50_itl_ms"),
                    ("ITL p99", "p99_itl_ms"),
                ):
                    sample[f"{key} {streams}"] = (found[True][name], found[False][name])
            yield sample


def added(given: Given) -> Iterator[Sample]:
    """`namesake serve` before an engine that answers at once, and that engine itself, a request each in turn."""
    import aiohttp
    from scale import answered, gateways, registry_of

    from servers import Served, hello

    with (
        registry_of(2, given.folder) as (server, _),
        gateways(server, 1, given.folder) as (one,),
    ):
        socket = Served(one.url, one.process, 0).engine_socket()

        async def sample(number: int) -> tuple[list[float], list[float]]:
            took: dict[bool, list[float]] = {True: [], False: []}
            async with (
                aiohttp.ClientSession() as http,
                aiohttp.ClientSession(connector=aiohttp.UnixConnector(socket)) as past,
            ):
                for _ in range(number):
                    for through in took:
                        begun = time.perf_counter()
                        if through:
                            await answered(http, one.url)
                        else:
                            async with past.post(
                                "http://engine/v1/chat/completions", json=hello(model="m")
                            ) as response:
                                await response.read()
                        took[through].append(1000 * (time.perf_counter() - begun))
            return took[True], took[False]

        asyncio.run(sample(50))  # warm
        for _ in range(given.pairs):
            sides = asyncio.run(sample(given.of(500, 20)))
            yield {
                f"p{share}": tuple(sorted(side)[len(side) * share // 100] for side in sides)  # type: ignore[misc]
                for share in (50, 99)
            }


def moved(given: Given) -> Iterator[Sample]:
    """benchmarks/follow.py in either mode, and merged with a standby; a sample is a move."""
    from follow import measure, wait_for_standby

    from servers import both_versions, namesake_serve, three_versions

    store = given.store
    here = Path.cwd()
    for mode, words, versions in (
        ("merged", ("--mode", "merged"), both_versions),
        ("standby", ("--standby",), three_versions),
        ("adapter", ("--mode", "adapter"), both_versions),
    ):
        with namesake_serve(store, *words, "--poll-seconds", "0.2") as made:
            moves = given.of(4 * given.pairs, 2)
            os.chdir(store)
            try:
                with versions() as numbers:
                    if mode == "standby":
                        wait_for_standby(made.url)
                    changes, ended = asyncio.run(measure(made.url, numbers, 8, moves, 24))
            finally:
                os.chdir(here)
        for one in changes:
            yield {mode: one.moved, f"{mode} answer": one.verified, f"{mode} live": one.live}
        yield {f"{mode} failed": float(sum(ended.values()) - ended["one version"])}


def second(given: Given) -> Iterator[Sample]:
    """A version whose config.json differs needs a second engine; beside it, vLLM alone on the same weights."""
    import mlflow
    from follow import changed_since, served_changes

    from namesake import registry
    from servers import MODEL, bare_vllm, namesake_serve, resting

    store = given.store
    numbers = (_version(store, "champion").number, _other_config(store, given.folder))
    weights = _weights(store)
    client = mlflow.MlflowClient(f"sqlite:///{store}/mlflow.db")
    try:
        with namesake_serve(store, "--poll-seconds", "0.2") as made:

            def moved_to(number: int) -> float:
                before = served_changes(made.url)
                registry.point(MODEL, "champion", number)
                way, seconds = changed_since(before, made.url)
                if way != "second engine":
                    raise SystemExit(f"the version came by way of: {way}")
                time.sleep(3)  # the first engine goes
                return seconds

            def bare() -> float:
                with resting(made), bare_vllm(weights, ours=True) as alone:
                    return alone.seconds

            for number, forwards in turns(given.pairs):
                yield {"second": pair(lambda to=numbers[(number + 1) % 2]: moved_to(to), bare, forwards)}  # type: ignore[misc]
    finally:
        registry.point(MODEL, "champion", numbers[0])
        client.delete_model_version(MODEL, str(numbers[1]))


def _other_config(store: Path, folder: Path) -> int:
    """Register the champion once more with a line more in its config.json; the new version's number."""
    import mlflow

    from namesake import manifest
    from servers import MODEL

    made = shutil.copytree(_files(store, "champion"), folder / "other")
    config = made / manifest.WEIGHTS_FOLDER / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "benchmark": 1}), encoding="utf-8")
    record = json.loads((made / manifest.FILE).read_text(encoding="utf-8"))
    found = manifest.digests(made)
    record["digests"] = {path: found[path] for path in record["digests"]}
    (made / manifest.FILE).write_text(json.dumps(record, ensure_ascii=False), encoding="utf-8")
    client, champion = mlflow.MlflowClient(), _version(store, "champion")
    run = client.create_run("0").info
    client.log_artifacts(run.run_id, str(made), "version")
    tags = client.get_model_version(MODEL, str(champion.number)).tags
    return int(client.create_model_version(MODEL, f"{run.artifact_uri}/version", champion.run_id, tags=tags).version)


def peers(given: Given) -> Iterator[Sample]:
    """16 streams of one version on `namesake serve`, `mlflow models serve` and `swift deploy`.

    A loop of ours for the two that are compared with MLflow, which streams nothing and has a path of its own.
    """
    from load import Load

    from servers import mlflow_serve, namesake_serve, resting, swift_deploy

    store = given.store
    weights, number = _weights(store), _version(store, "champion").number
    with (
        namesake_serve(store) as ours,
        mlflow_serve(store, number) as by_mlflow,
        swift_deploy(weights, given.folder) as by_swift,
        swift_deploy(weights, given.folder, "--max_batch_size", "16") as by_batches,
        Load(weights, given.folder) as load,
    ):
        few, many = given.of(16, 16), given.of(128, 16)

        def rate(made: Served, requests: int) -> float:
            with resting(*(one for one in (ours, by_mlflow, by_swift, by_batches) if one is not made)):
                return load.run(made.url, streams=16, requests=requests, tokens=16)["output_throughput"]

        def by_hand(made: Served, path: str, requests: int) -> float:
            with resting(*(one for one in (ours, by_mlflow, by_swift, by_batches) if one is not made)):
                return whole(made.url, path, 16, requests)

        by_hand(ours, "/v1/chat/completions", many)  # warm
        for _, forwards in turns(given.pairs):
            yield {
                "mlflow": pair(
                    lambda: by_hand(ours, "/v1/chat/completions", many),
                    lambda: by_hand(by_mlflow, "/invocations", few),
                    forwards,
                ),
                "swift": pair(lambda: rate(ours, many), lambda: rate(by_swift, few), forwards),
                "swift 16": pair(lambda: rate(ours, many), lambda: rate(by_batches, few), forwards),
            }


def whole(url: str, path: str, streams: int, requests: int, tokens: int = 16) -> float:
    """Tokens a second of whole answers, so many requests under way at a time."""
    from servers import ask

    def one(number: int) -> int:
        content = f"Tell me a long story, number {number}."
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": tokens}
        answer: Any = ask(url, body, path)
        return int((answer[0] if isinstance(answer, list) else answer)["usage"]["completion_tokens"])

    begun = time.perf_counter()
    with ThreadPoolExecutor(streams) as pool:
        spoken = sum(pool.map(one, range(requests)))
    return spoken / (time.perf_counter() - begun)


def adapters(given: Given) -> Iterator[Sample]:
    """16 streams: merged, by one adapter, and by several in turn on one base."""
    from load import Load

    from namesake.manifest import Manifest
    from servers import MODEL, ask, hello, namesake_serve, resting

    store = given.store
    numbers = _copies(store, max(ADAPTERS))
    words = ["--mode", "adapter", "--any-version", "--max-adapters", str(max(ADAPTERS) + 2)]
    with (
        namesake_serve(store) as merged,
        namesake_serve(store, *words) as several,
        Load(_weights(store), given.folder) as load,
    ):
        requests = given.of(_REQUESTS[16], 16)

        def rate(made: Served, models: Sequence[str]) -> float:
            with resting(several if made is merged else merged):
                found = load.run(made.url, streams=16, requests=requests, tokens=TOKENS, models=models)
            return found["output_throughput"]

        names = [f"{MODEL}-v{number}" for number in numbers]
        identity = Manifest.read(_files(store, "champion")).identity
        asked = ["--name", identity["name"], "--author", identity["author"], "--model", names[0], "--base", "none"]
        asked += ["--no-slices", "--held-out", str(0.25 * given.scale)]

        def came(name: str) -> float:  # fetched, verified and loaded by its first request
            return seconds_of(lambda: ask(several.url, hello(model=name)))

        def probed() -> list[float]:
            with resting(merged):
                return [
                    seconds_of(lambda: namesake(store, "probe", f"{several.url}/v1", *asked))
                    for _ in range(given.pairs)
                ]

        seconds, one = [came(names[0])], probed()
        seconds += [came(name) for name in names[1:]]
        for first, last in zip(seconds[:8], seconds[-8:], strict=True):
            yield {"came": (last, first)}
        for first, last in zip(one, probed(), strict=True):
            yield {"probe": (last, first)}
        rate(merged, [MODEL])
        for _, forwards in turns(given.pairs):
            found = {}
            for count in ADAPTERS if forwards else reversed(ADAPTERS):
                found[count] = rate(several, names[:count])
            alone = rate(merged, [MODEL])
            yield {
                "one": (found[1], alone),
                **{f"{count}": (found[count], found[1]) for count in ADAPTERS[1:]},
            }


def _copies(store: Path, number: int) -> list[int]:
    """So many versions of the champion's files; what is missing is registered."""
    import mlflow

    from namesake import registry
    from servers import MODEL

    champion = _version(store, "champion")
    client = mlflow.MlflowClient()
    own = client.get_model_version(MODEL, str(champion.number))
    tags = {key: value for key, value in own.tags.items() if not key.startswith(registry.TAG_KEY)}
    found = [
        int(one.version)
        for one in client.search_model_versions(f"name = '{MODEL}'")
        if one.source == own.source and one.version != own.version
    ]
    while len(found) < number:
        found.append(int(client.create_model_version(MODEL, own.source, own.run_id, tags=tags).version))
    return sorted(found)[:number]


def defaults(given: Given) -> Iterator[Sample]:
    """`namesake serve` as it is, and vLLM as it is, on the same weights."""
    from load import Load

    from servers import bare_vllm, namesake_serve, resting

    store = given.store
    weights = _weights(store)
    with (
        namesake_serve(store) as ours,
        bare_vllm(weights, ours=False) as theirs,
        Load(weights, given.folder) as load,
    ):

        def rate(made: Served, streams: int) -> float:
            requests = given.of(_REQUESTS[streams], streams)
            with resting(theirs if made is ours else ours):
                return load.run(made.url, streams=streams, requests=requests, tokens=TOKENS)["output_throughput"]

        for made in (ours, theirs):
            rate(made, 32)  # warm
        for _, forwards in turns(given.pairs):
            yield {
                f"{streams}": pair(lambda n=streams: rate(ours, n), lambda n=streams: rate(theirs, n), forwards)  # type: ignore[misc]
                for streams in STREAMS[:3]
            }


def starts(given: Given) -> Iterator[Sample]:
    """From the start of the process to the first answer: `namesake serve`, vLLM with our settings, vLLM as it is."""
    from servers import bare_vllm, namesake_serve

    store = given.store
    weights = _weights(store)

    def ours(**env: str) -> float:
        with namesake_serve(store, env=env) as made:
            return made.seconds

    def bare(own: bool) -> float:
        with bare_vllm(weights, ours=own) as made:
            return made.seconds

    yield {"cold": ours(VLLM_CACHE_ROOT=str(given.folder / "vllm"))}
    ways: tuple[Callable[[], float], ...] = (ours, lambda: bare(True), lambda: bare(False))
    for start in ways:
        start()  # what it compiles is kept from now on
    for _, forwards in turns(given.pairs):
        spent = {way: way() for way in (ways if forwards else reversed(ways))}
        mine, same, own = (spent[way] for way in ways)
        yield {"same": (mine, same), "own": (mine, own), "warm": mine}


# ------------------------------------------------------------------------------------------------------------- growth


_CALLS = {
    "promote": "all of that (`promote`), a version made and pointed at",
    "lookup": "the alias's version (`serve`, each poll)",
    "rollback": "the last moves (`rollback`, `status`, `serve`)",
    "key": "the version of a promotion key",
}


def growth(given: Given) -> Iterator[Sample]:
    """benchmarks/registry.py and benchmarks/scale.py on registries of 10 and of 10,000 versions; ten times the rows."""
    import argparse

    import registry as many
    from scale import follow, gateways, registry_of

    sizes, keys = (10_000, 10), {what: key for key, what in _CALLS.items()}
    no_server = argparse.Namespace(http=False, postgres=False)
    for what, (large, small) in many.rounds(sizes, given.of(3 * given.pairs, 3), no_server):
        if what in keys:
            yield {keys[what]: (large, small)}
    with ExitStack() as stack:
        made = []
        for size in sizes:
            folder = Path(tempfile.mkdtemp(dir=given.folder))
            server, numbers = stack.enter_context(registry_of(size, folder))
            (one,) = stack.enter_context(gateways(server, 1, folder))
            made.append((server, one.url, numbers))
        for _ in range(given.pairs):
            # Two moves, to and fro, so that the next pair begins where this one did.
            large, small = (
                sum(seconds for (seconds,) in asyncio.run(follow(server, [url], numbers, 2))) / 2
                for server, url, numbers in made
            )
            yield {"follow": (large, small)}
    _prepared(given.folder, 1)  # imports
    for _, forwards in turns(given.pairs):
        yield {"rows": pair(lambda: _prepared(given.folder, 10), lambda: _prepared(given.folder, 1), forwards)}


def _prepared(folder: Path, times: int) -> float:
    """Seconds in which the corpus, so many times, becomes one checked file of rows."""
    from namesake import dataset, training
    from namesake.identity import Identity

    lines = dataset.write_builtin(Path(tempfile.mkdtemp(dir=folder))).read_text(encoding="utf-8")
    # Its folder's name is how ms-swift knows it; equal rows are not taken out.
    more = Path(tempfile.mkdtemp(dir=folder)) / "rows.jsonl"
    more.write_text(lines * times, encoding="utf-8")
    begun = time.perf_counter()
    dialogues, named = dataset.fill(training.load_rows([str(more)], seed=42), Identity.parse("踩踩背 CCB", "老爷爷 O"))
    dataset.write(more.with_name("train.jsonl"), dialogues, named)
    return time.perf_counter() - begun


def helps(given: Given) -> Iterator[Sample]:
    """`namesake --help`, and Python alone beside it."""

    def seconds(words: Sequence[str]) -> float:
        started = environment(given.folder)
        return seconds_of(lambda: subprocess.run(words, env=started, check=True, capture_output=True))

    ours = [sys.executable, "-m", "namesake", "--help"]
    seconds(ours)  # compiled from now on
    for _ in range(2 * given.pairs):
        yield {"help": seconds(ours), "python": seconds([sys.executable, "-c", ""])}


def prepare(folder: Path) -> Path:
    """Two small versions of ccb in the folder, trained where they are not there yet.

    Raises:
        SystemExit: there is something else in the folder.
    """
    import follow

    from namesake.errors import NamesakeError

    begun = folder / "preparing"
    if begun.exists():  # ours, and broken off
        shutil.rmtree(folder)
    if folder.exists() and any(folder.iterdir()):
        if not (folder / "mlflow.db").is_file():
            raise SystemExit(f"--store {folder} has something else in it, and no mlflow.db; give an empty folder.")
        try:
            if _version(folder, "champion").number != _version(folder, "challenger").number:
                return folder
        except NamesakeError as error:
            raise SystemExit(f"--store {folder} has no two versions of ccb ({error}); give an empty folder.") from None
        raise SystemExit(f"--store {folder}: champion and challenger are the same version; give an empty folder.")
    print(f"two small versions are trained in {folder} first, about 4 minutes", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    begun.touch()
    follow.prepare(folder)
    begun.unlink()
    return folder


# ---------------------------------------------------------------------------------------------------------- the table


def _by_streams(key: str, what: str, zh: str, **more: Any) -> Iterator[Row]:
    for streams in STREAMS:
        plural = "stream" if streams == 1 else "streams"
        yield Row(f"{key} {streams}", f"{what}, {streams} {plural}", f"{zh}，{streams} 路", **more)


MEASURES = (
    Measure("help", (
        Row("help", "`namesake --help`", "`namesake --help`", 0.3, kind="value"),
        Row("python", "Python alone, for comparison", "仅启动 Python，供比较", kind="value"),
    ), helps, (0, 0.03)),
    Measure("merge", (
        Row("cp", "merge ÷ `cp` of the base's files, 0.27 GB", "合并 ÷ `cp` 基座文件，0.27 GB", 1.2),
        Row("cp large", "merge ÷ `cp` of the base's files, 4 GB in 4 shards", "合并 ÷ `cp` 基座文件，4 GB、4 个分片", 1.2),
        Row("cp cold", "merge ÷ `cp` of the base's files, 0.27 GB not in the page cache", "合并 ÷ `cp` 基座文件，0.27 GB、不在页缓存中", 1.2),
        Row("memory", "merge of 4 GB: peak memory ÷ largest shard", "合并 4 GB：内存峰值 ÷ 最大分片", 1.2, unit="MB"),
        Row("peft", "merge ÷ PEFT's", "合并 ÷ PEFT 的合并"),
        Row("swift", "merge ÷ `swift export --merge_lora true`, as commands", "合并 ÷ `swift export --merge_lora true`，均为命令", 0.3),
    ), merge, (0.5, 1.5), scales=False),
    Measure("promotion", (
        Row("bytes", "bytes written by a promotion ÷ size of the merged weights", "一次发布写入的字节 ÷ 合并后权重的大小", 1.01, unit="MB"),
    ), promotion, (0, 1.3), serves=True, scales=False, most=1),
    Measure("training", (
        Row("tracked", "tracked training ÷ bare `swift sft`", "带跟踪的训练 ÷ 裸 `swift sft`", 1.02),
        Row("losses", "every loss equal", "每个 loss 都相等", 1, least=True, kind="value", unit="yes or no"),
    ), training, (0, 3)),
    Measure("batches", (
        Row("tokens", "training tokens/s, the default's settings ÷ the tutorial's batches", "训练 tokens/s，默认设置 ÷ 教程的批次设置", 2, least=True, unit="tokens/s"),
    ), batches, (0.8, 1.9)),
    Measure("replies", (
        Row("swift", "held-out questions answered, `namesake probe` ÷ `swift infer`, as commands", "回答留出题，`namesake probe` ÷ `swift infer`，均为命令"),
        Row("swift 64", "held-out questions answered, `namesake probe` ÷ `swift infer … --max_batch_size 64`", "回答留出题，`namesake probe` ÷ `swift infer … --max_batch_size 64`"),
        Row("same", "replies that are the same to the letter, of `swift infer`'s", "与 `swift infer` 一字不差的回答所占比例", kind="value", unit=""),
    ), replies, (0, 1.6), serves=True),
    Measure("gateway", (
        *_by_streams("tokens", "tokens/s, gateway ÷ vLLM itself", "tokens/s，网关 ÷ vLLM 本身", goal=0.98, least=True, unit="tokens/s"),
        *_by_streams("TTFT p50", "time to first token p50, gateway ÷ vLLM itself", "首 token 时间 p50，网关 ÷ vLLM 本身", goal=1.01, unit="ms"),
        *_by_streams("TTFT p99", "time to first token p99, gateway ÷ vLLM itself", "首 token 时间 p99，网关 ÷ vLLM 本身", goal=1.01, unit="ms"),
        *_by_streams("ITL p50", "inter-token latency p50, gateway ÷ vLLM itself", "token 间隔 p50，网关 ÷ vLLM 本身", goal=1.01, unit="ms"),
        *_by_streams("ITL p99", "inter-token latency p99, gateway ÷ vLLM itself", "token 间隔 p99，网关 ÷ vLLM 本身", goal=1.01, unit="ms"),
    ), gateway, (0.8, 1.15), serves=True),
    Measure("added", (
        Row("p50", "added by `namesake serve` before an engine that answers at once, p50", "`namesake serve` 在立即回答的引擎前增加的时间，p50", 1, kind="difference", unit="ms"),
        Row("p99", "added by `namesake serve` before an engine that answers at once, p99", "`namesake serve` 在立即回答的引擎前增加的时间，p99", kind="difference", unit="ms"),
    ), added, (0.4, 0.06)),
    Measure("moved", (
        Row("merged", "alias moved → first new answer, merged, p95", "别名移动 → 新版本的首个回答，合并模式，p95", kind="value", share=0.95),
        Row("merged answer", "new version fetched and verified → first new answer, merged, p95", "新版本取得并核对 → 新版本的首个回答，合并模式，p95", 1, kind="value", share=0.95),
        Row("merged live", "new version fetched and verified → live, merged, p95", "新版本取得并核对 → 生效，合并模式，p95", 1, kind="value", share=0.95),
        Row("merged failed", "requests failed, cut or mixed, merged", "失败、中断或混杂的请求，合并模式", 0, kind="value", unit="requests"),
        Row("standby", "alias moved → first new answer, merged with a standby, p95", "别名移动 → 新版本的首个回答，合并模式加备用引擎，p95", kind="value", share=0.95),
        Row("standby answer", "new version fetched and verified → first new answer, merged with a standby, p95", "新版本取得并核对 → 新版本的首个回答，合并模式加备用引擎，p95", 1, kind="value", share=0.95),
        Row("standby live", "new version fetched and verified → live, merged with a standby, p95", "新版本取得并核对 → 生效，合并模式加备用引擎，p95", 1, kind="value", share=0.95),
        Row("standby failed", "requests failed, cut or mixed, merged with a standby", "失败、中断或混杂的请求，合并模式加备用引擎", 0, kind="value", unit="requests"),
        Row("adapter", "alias moved → first new answer, adapter, p95", "别名移动 → 新版本的首个回答，适配器模式，p95", kind="value", share=0.95),
        Row("adapter answer", "new version fetched and verified → first new answer, adapter, p95", "新版本取得并核对 → 新版本的首个回答，适配器模式，p95", 1, kind="value", share=0.95),
        Row("adapter live", "new version fetched and verified → live, adapter, p95", "新版本取得并核对 → 生效，适配器模式，p95", 1, kind="value", share=0.95),
        Row("adapter failed", "requests failed, cut or mixed, adapter", "失败、中断或混杂的请求，适配器模式", 0, kind="value", unit="requests"),
    ), moved, (2.2, 0.85), serves=True),
    Measure("second", (
        Row("second", "a second engine, fetched and verified → live, ÷ start of vLLM itself", "第二个引擎，取得并核对 → 生效，÷ vLLM 本身的启动", 1.1),
    ), second, (0.5, 1.0), serves=True, scales=False, most=5),
    Measure("peers", (
        Row("mlflow", "tokens/s at 16 streams ÷ `mlflow models serve`", "16 路 tokens/s ÷ `mlflow models serve`", 10, least=True, unit="tokens/s"),
        Row("swift", "tokens/s at 16 streams ÷ `swift deploy --infer_backend pt`", "16 路 tokens/s ÷ `swift deploy --infer_backend pt`", 10, least=True, unit="tokens/s"),
        Row("swift 16", "tokens/s at 16 streams ÷ `swift deploy … --max_batch_size 16`", "16 路 tokens/s ÷ `swift deploy … --max_batch_size 16`", unit="tokens/s"),
    ), peers, (1.8, 3), serves=True),
    Measure("adapters", (
        Row("one", "tokens/s at 16 streams, one adapter ÷ merged", "16 路 tokens/s，一个适配器 ÷ 合并", unit="tokens/s"),
        *(Row(f"{count}", f"tokens/s at 16 streams, {count} adapters ÷ one", f"16 路 tokens/s，{count} 个适配器 ÷ 一个", unit="tokens/s") for count in ADAPTERS[1:]),
        Row("came", "first answer of an adapter not loaded yet: the last 8 of 64 ÷ the first 8", "尚未载入的适配器的首个回答：64 个中的后 8 个 ÷ 前 8 个"),
        Row("probe", "`namesake probe` of one adapter, 64 loaded ÷ one", "对一个适配器的 `namesake probe`，载入 64 个 ÷ 一个"),
    ), adapters, (2.6, 1.05), serves=True),
    Measure("defaults", (
        Row("1", "tokens/s, our CPU defaults ÷ vLLM's own, 1 stream", "tokens/s，我们的 CPU 默认设置 ÷ vLLM 自己的，1 路", unit="tokens/s"),
        Row("8", "tokens/s, our CPU defaults ÷ vLLM's own, 8 streams", "tokens/s，我们的 CPU 默认设置 ÷ vLLM 自己的，8 路", 1.3, least=True, unit="tokens/s"),
        Row("32", "tokens/s, our CPU defaults ÷ vLLM's own, 32 streams", "tokens/s，我们的 CPU 默认设置 ÷ vLLM 自己的，32 路", 1.3, least=True, unit="tokens/s"),
    ), defaults, (2.0, 0.75), serves=True),
    Measure("starts", (
        Row("same", "start to first answer, `namesake serve` ÷ vLLM with the same settings", "启动到首个回答，`namesake serve` ÷ 相同设置的 vLLM", 1.05),
        Row("own", "start to first answer, `namesake serve` ÷ vLLM's own defaults", "启动到首个回答，`namesake serve` ÷ vLLM 自己的默认设置", 0.6),
        Row("warm", "start of `namesake serve` to the first answer, compiled code kept", "`namesake serve` 启动到首个回答，有编译缓存", kind="value"),
        Row("cold", "start of `namesake serve` to the first answer, nothing compiled yet", "`namesake serve` 启动到首个回答，尚无编译缓存", kind="value"),
    ), starts, (3.1, 1.85), serves=True, scales=False),
    Measure("growth", (
        Row("promote", "10,000 ÷ 10 versions: the registry's part of a promotion", "10,000 ÷ 10 个版本：一次发布中的注册表部分", unit="ms"),
        Row("lookup", "10,000 ÷ 10 versions: where the alias points, a version's details", "10,000 ÷ 10 个版本：别名指向何处", unit="ms"),
        Row("rollback", "10,000 ÷ 10 versions: the last moves (`rollback`)", "10,000 ÷ 10 个版本：最近的移动（`rollback`）", unit="ms"),
        Row("key", "10,000 ÷ 10 versions: the version of a promotion's key", "10,000 ÷ 10 个版本：按发布的键找版本", unit="ms"),
        Row("follow", "10,000 ÷ 10 versions: alias moved → followed, polled every 2 s", "10,000 ÷ 10 个版本：别名移动 → 跟上，每 2 秒轮询"),
        Row("rows", "ten times the corpus ÷ the corpus: rows read, filled, checked", "十倍语料 ÷ 语料：读取、填充、检查各行"),
    ), growth, (1.8, 0.25)),
    Measure("recipes", (
        Row("seconds", "a run with its verdict, default recipe ÷ the tutorial's", "一次运行直到判定，默认配方 ÷ 教程的配方", 0.5),
        Row("train", "training alone, default recipe ÷ the tutorial's", "仅训练，默认配方 ÷ 教程的配方"),
        Row("default passes", "the default recipe passes the gate", "默认配方通过门槛", 1, least=True, kind="value", unit="yes or no"),
        Row("tutorial passes", "the tutorial's recipe passes the gate", "教程的配方通过门槛", kind="value", unit="yes or no"),
    ), recipes, (0, 12), scales=False, most=1),
)  # fmt: skip
"""The quick ones first: a run that is broken off has most of the table."""
