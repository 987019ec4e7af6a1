"""A registry of many versions beside one of few: seconds of what promotion, serving and `namesake status` ask of it.

One registered model has 10 versions, then 10,000 of them with the tags of real ones, written by SQL and otherwise as
MLflow writes them. Each call runs in turn on both, warm; printed are medians in milliseconds and their ratio.

    python benchmarks/registry.py
    python benchmarks/registry.py --http        # through an MLflow server
"""

from __future__ import annotations

import argparse
import os
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path

from commands import ROOT

sys.path.insert(0, str(ROOT))
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

import mlflow
from tests.servers import mlflow_server

from namesake import registry, versions

IDENTITY = "踩踩背 CCB / 老爷爷 OldGrandpa"
TAGS = {f"score.{number}": "0.9375" for number in range(9)}


def fill(database: Path, name: str, number: int) -> None:
    """Give the registered model so many versions: the first one again and again, each with a key of its own."""
    with closing(sqlite3.connect(database)) as connection, connection:

        def again(table: str, where: str, **given: object) -> None:
            """The first version's rows once more for each version, but for its number and what else is given."""
            columns = [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]
            kept = ", ".join(f":{column}" if column in {"version", *given} else column for column in columns)
            connection.executemany(
                f"INSERT INTO {table} ({', '.join(columns)}) SELECT {kept} FROM {table} "
                f"WHERE name = :name_ AND {table}.version = 1 {where}",
                (
                    {"version": version, "name_": name, **{k: f"{v}{version}" for k, v in given.items()}}
                    for version in range(2, number + 1)
                ),
            )

        again("model_versions", "")
        again("model_version_tags", f"AND key != '{registry.TAG_KEY}'")
        again("model_version_tags", f"AND key = '{registry.TAG_KEY}'", value="key-")


def make(name: str, key: str) -> registry.Version:
    """The part of a promotion that the registry sees."""
    model = mlflow.MlflowClient().create_logged_model("0", name="model")
    uri = f"models:/{model.model_id}"
    version = registry.register(
        name, uri, run_id="", identity=IDENTITY, tags={**TAGS, registry.TAG_KEY: key}, description="A version."
    )
    versions.point(version, "champion", how="promote", why="gate passed")
    return version


def calls(name: str, number: int) -> dict[str, Callable[[], object]]:
    """What is measured."""
    made = iter(range(number + 1, number + 1000))
    return {
        "the alias's version (`serve`, each poll)": lambda: registry.resolve(f"models:/{name}@champion"),
        "a version by number": lambda: registry.resolve(f"models:/{name}/{number // 2}"),
        "the newest ten (`status`)": lambda: registry.newest_versions(name, 10),
        "the version of a promotion key (`promote`)": lambda: registry.versions_with(
            name, registry.TAG_KEY, f"key-{number // 2}"
        ),
        "whose it is (`promote`)": lambda: registry.identity_of(name),
        "history": lambda: registry.history(name, "champion"),
        "the registered models": registry.models,
        "register, tag, point, history (`promote`)": lambda: make(name, f"new-{next(made)}"),
    }


@contextmanager
def store(number: int, http: bool) -> Iterator[str]:
    """A fresh registry with so many versions; its address."""
    with tempfile.TemporaryDirectory() as folder:
        uri = f"sqlite:///{folder}/mlflow.db"
        mlflow.set_tracking_uri(uri)
        make("ccb", "key-1")
        fill(Path(folder, "mlflow.db"), "ccb", number)
        with mlflow_server(Path(folder)) if http else nullcontext(uri) as address:
            yield address


def main() -> None:
    """Print one line a call."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--many", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--http", action="store_true", help="through an MLflow server")
    given = parser.parse_args()
    with store(10, given.http) as few, store(given.many, given.http) as many:
        asked = {few: calls("ccb", 10), many: calls("ccb", given.many)}
        print(f"| what | 10 versions, ms | {given.many:,}, ms | ratio | goal |\n|---|---|---|---|---|")
        for what in asked[few]:
            spent: dict[str, list[float]] = {few: [], many: []}
            for _ in range(given.rounds):
                for address in (few, many):
                    mlflow.set_tracking_uri(address)
                    start = time.perf_counter()
                    asked[address][what]()
                    spent[address].append(1000 * (time.perf_counter() - start))
            small, large = (statistics.median(spent[address]) for address in (few, many))
            print(f"| {what} | {small:.1f} | {large:.1f} | {large / small:.2f} | 1.2 |", flush=True)


if __name__ == "__main__":
    main()
