"""A registry of many versions beside one of few: what promotion, serving and `namesake status` ask of it.

One registered model has 10 versions, others 1,000 and 10,000, each with the tags of a real one and a move of `champion`
to it; all but the first and the last are written by SQL, otherwise as MLflow writes them. Each call runs in turn on all
of them, warm; printed are the milliseconds of the quickest round, and the ratio of the last to the first: of processor
time without a server, as all of it is this process', else of the clock.

    python benchmarks/registry.py
    python benchmarks/registry.py --http        # through an MLflow server on SQLite
    python benchmarks/registry.py --postgres    # through one on PostgreSQL
    python benchmarks/registry.py --http --command --versions 10 10000 --rounds 5

With ``--command`` it is the whole command ``namesake promote`` that is timed, of a run of few steps that asks one in
twenty of the questions: median seconds, and the median of the ratios.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from commands import ROOT, namesake, run_id

sys.path.insert(0, str(ROOT))
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

import mlflow
import sqlalchemy
from tests.servers import mlflow_server, postgres

from namesake import registry, versions

NAME = "ccb"
IDENTITY = "踩踩背 CCB / 老爷爷 OldGrandpa"
FEW = ("--dataset", "namesake/self-cognition#16", "--max_steps", "1", "--replay", "0", "--held_out", "0.05")
TAGS = {f"score.{number}": "0.9375" for number in range(9)}


def fill(database: str, number: int) -> None:
    """Give the registered model so many versions: the first one again and again, each with a promotion's key and a move
    of its own.
    """
    engine = sqlalchemy.create_engine(database)
    tables = sqlalchemy.MetaData()
    tables.reflect(engine, only=["model_versions", "model_version_tags", "registered_model_tags"])

    def again(table: str, where: str, **given: Callable[[int], object]) -> None:
        """The first version's rows once more for each version, but for its number and what else is given."""
        found = connection.execute(tables.tables[table].select().where(sqlalchemy.text(where))).mappings().all()
        rows = [
            {**row, **{column: value(version) for column, value in given.items()}}
            for version in range(2, number + 1)
            for row in found
        ]
        if rows:
            connection.execute(tables.tables[table].insert(), rows)

    def move(version: int) -> str:
        told = {"time": float(version), "alias": "champion", "before": version - 1, "to": version, "who": "ann"}
        return json.dumps({**told, "how": "promote", "why": "gate passed"})

    key = registry.TAG_KEY
    recent = f"key LIKE '{registry.RECENT}%'"
    with engine.begin() as connection:
        again("model_versions", "version = 1", version=int)
        again("model_version_tags", f"NOT key LIKE '{key}%' AND NOT {recent}", version=int)
        again("model_version_tags", f"key LIKE '{key}%'", version=int, key=lambda version: f"{key}.key-{version}")
        again("registered_model_tags", "key LIKE '%history%'", key="namesake.history.{}".format, value=move)
        connection.execute(sqlalchemy.text(f"DELETE FROM model_version_tags WHERE {recent}"))
        connection.execute(sqlalchemy.text(f"UPDATE registered_model_aliases SET version = {number}"))
    engine.dispose()


def make(key: str) -> registry.Version:
    """The part of a promotion that the registry sees."""
    registry.identity_of(NAME)
    registry.promoted_as(NAME, key)
    model = mlflow.MlflowClient().create_logged_model("0", name="model")
    tags = {**TAGS, **registry.tag_of_promotion(key)}
    version = registry.register(
        NAME, f"models:/{model.model_id}", run_id="", identity=IDENTITY, tags=tags, description="A version."
    )
    registry.promoted_as(NAME, key)
    registry.tag(version, "namesake.gate", "passed")
    versions.point(version, "champion", how="promote", why="gate passed")
    return version


def calls(number: int) -> dict[str, Callable[[], object]]:
    """What is measured, for a registry of so many versions."""
    made = iter(range(number + 1, number + 1000))
    return {
        "the alias's version (`serve`, each poll)": lambda: registry.resolve(f"models:/{NAME}@champion"),
        "where an alias points": lambda: registry.alias_of(NAME, "champion"),
        "a version by number": lambda: registry.resolve(f"models:/{NAME}/{number // 2}"),
        "the newest ten (`status`)": lambda: registry.newest_versions(NAME, 10),
        "the version of a promotion key": lambda: registry.promoted_as(NAME, f"key-{number // 2}"),
        "whose it is": lambda: registry.identity_of(NAME),
        "the last moves (`rollback`, `status`, `serve`)": lambda: registry.recent(NAME, "champion"),
        "history of an alias that moved once": lambda: registry.history(NAME, "challenger"),
        "all of that (`promote`), a version made and pointed at": lambda: make(f"new-{next(made)}"),
        "history of an alias that moved to each version": lambda: registry.history(NAME, "champion"),
        "the registered models and their aliases (`status`)": registry.models,
    }


@contextmanager
def store(number: int, given: argparse.Namespace) -> Iterator[str]:
    """A fresh registry with so many versions; its address."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as servers:
        database = servers.enter_context(postgres()) if given.postgres else f"sqlite:///{folder}/mlflow.db"
        address = database
        if given.http or given.postgres:
            address = servers.enter_context(mlflow_server(Path(folder), store=database))
        mlflow.set_tracking_uri(address)
        make("key-1")
        fill(database, number)
        versions.point(registry.resolve(f"models:/{NAME}/1"), "challenger", how="promote", why="")
        make("last")
        yield address


def rounds(sizes: Sequence[int], number: int, given: argparse.Namespace) -> Iterator[tuple[str, list[float]]]:
    """Each call, asked so often of registries of these sizes in turn; milliseconds by size, one round at a time."""
    now = time.perf_counter if given.http or given.postgres else time.process_time
    with ExitStack() as stores:
        asked = {stores.enter_context(store(size, given)): calls(size) for size in sizes}
        for what in next(iter(asked.values())):
            for _ in range(number):
                spent = []
                for address, does in asked.items():
                    mlflow.set_tracking_uri(address)
                    start = now()
                    does[what]()
                    spent.append(1000 * (now() - start))
                yield what, spent


def promotions(sizes: Sequence[int], number: int, given: argparse.Namespace) -> Iterator[list[float]]:
    """The whole command, in turn with registries of these sizes; seconds by size, one round at a time."""
    with ExitStack() as stores:
        folder = Path(stores.enter_context(tempfile.TemporaryDirectory()))
        policy = folder / "policy.yaml"
        name, author = IDENTITY.split(" / ")
        addresses = [stores.enter_context(store(size, given)) for size in sizes]
        runs = {
            one: run_id(namesake(folder, "run", "--name", name, "--author", author, *FEW, uri=one)) for one in addresses
        }
        for turn in range(number):
            policy.write_text(f"parity: {0.9 + turn / 1000}\n", encoding="utf-8")  # else it is the version of before
            spent = {}
            for address in addresses if turn % 2 == 0 else addresses[::-1]:
                words = ("--run", runs[address], "--model-name", NAME, "--policy", str(policy), "--override", "a bench")
                start = time.perf_counter()
                namesake(folder, "promote", *words, uri=address)
                spent[address] = time.perf_counter() - start
            yield [spent[address] for address in addresses]


def main() -> None:
    """Print one line a call."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", type=int, nargs="+", default=[10, 1_000, 10_000])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--http", action="store_true", help="through an MLflow server on SQLite")
    parser.add_argument("--postgres", action="store_true", help="through an MLflow server on PostgreSQL")
    parser.add_argument("--command", action="store_true", help="time the whole of `namesake promote` instead")
    given = parser.parse_args()
    sizes = " | ".join(f"{number:,}" for number in given.versions)
    unit = "s" if given.command else "ms"
    print(f"| {unit} with so many versions | {sizes} | ratio |\n|---|{'---|' * len(given.versions)}---|")
    if given.command:
        found = list(promotions(given.versions, given.rounds, given))
        told = " | ".join(f"{statistics.median(one):.1f}" for one in zip(*found, strict=True))
        ratios = [one[-1] / one[0] for one in found]
        between = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"| `namesake promote`, the whole command | {told} | {between} |")
        return
    for what, lines in itertools.groupby(rounds(given.versions, given.rounds, given), key=lambda one: one[0]):
        quickest = [min(spent) for spent in zip(*(spent for _, spent in lines), strict=True)]
        told = " | ".join(f"{one:.1f}" for one in quickest)
        print(f"| {what} | {told} | {quickest[-1] / quickest[0]:.2f} |", flush=True)


if __name__ == "__main__":
    main()
