"""What Ray costs a sweep beside its trainings: seconds to start, memory, seconds around each trial.

    python benchmarks/ray_cost.py --workers 2 --trials 6

A head that runs no trial and workers of one processor each, as processes of this machine; the trials do nothing. Memory
is what is this cluster's own (PSS: shared pages counted once).
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
import psutil
from ray.cluster_utils import Cluster

from namesake import ray_backend
from namesake.search import Parameter, Search

ROOT = Path(__file__).resolve().parents[1]
_PATHS = os.pathsep.join(map(str, (ROOT / "benchmarks", ROOT / "src", ROOT / "serving")))


def nothing(spec, go_on, screen):  # type: ignore[no-untyped-def]
    """A trial that trains nothing."""
    return {"number": spec["number"], "params": spec["params"], "state": "complete", "score": 0.5, "early": {}}


def memory() -> Counter[str]:
    """MiB by the kind of process, of all that this one has started."""
    found: Counter[str] = Counter()
    for one in psutil.Process().children(recursive=True):
        words = one.cmdline()
        kind = words[0].partition(" ")[0] if words[0].startswith("ray::") else one.name()
        script = next((Path(word).name for word in words[1:] if word.endswith(".py")), "")
        found[f"{kind} {script}".strip()] += one.memory_full_info().pss >> 20
    return found


def main() -> None:
    """Print one JSON object."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--workers", type=int, default=2)
    asked.add_argument("--trials", type=int, default=6)
    wanted = asked.parse_args()
    os.environ["PYTHONPATH"] = _PATHS
    folder = tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True)
    os.environ["RAY_TMPDIR"] = folder.name  # so that nobody else's `ray.init()` finds this cluster
    begun = time.monotonic()
    small = {"object_store_memory": 80_000_000, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **small})
    head = time.monotonic() - begun
    for _ in range(wanted.workers):
        cluster.add_node(num_cpus=1, **small)
    workers = time.monotonic() - begun - head
    idle = memory()
    os.environ["RAY_ADDRESS"] = cluster.address
    space = Search({"lora_rank": Parameter(choices=tuple(range(wanted.trials)))}, trials=wanted.trials)
    job = {
        "plan": {},
        "parent": "",
        "search": space.record(),
        "results": [],
        "trial": "ray_cost:nothing",
        "uri": "sqlite:///unused.db",
        "folder": str(Path.cwd()),
        "deadline": None,
    }
    begun, moments, busy = time.monotonic(), [], Counter[str]()
    for event in ray_backend.events(job, mend=""):
        moments.append((time.monotonic() - begun, next(iter(event))))
        busy = max(busy, memory(), key=Counter.total)
    swept = time.monotonic() - begun
    cluster.shutdown()
    folder.cleanup()
    told = {
        "seconds": {
            "head": round(head, 1),
            "each worker": round(workers / wanted.workers, 1),
            "driver, to the first trial that begins": round(next(at for at, kind in moments if kind == "began"), 1),
            "each trial, of a worker": round((moments[-1][0] - moments[0][0]) * wanted.workers / wanted.trials, 1),
            "the sweep": round(swept, 1),
        },
        "MiB": {"idle": idle.total(), "by process": dict(idle.most_common()), "busy": busy.total()},
    }
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
