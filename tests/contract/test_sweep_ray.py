"""A sweep on a real Ray cluster of a head and two workers: the runs it leaves, a trial that dies, a head that dies.

What a trial trains is given, as in `test_sweep.py`; Ray, its processes and the MLflow store are real.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import mlflow
import pytest
import ray
from ray.cluster_utils import Cluster

from namesake import sweep, tracking
from namesake.errors import TrainingError
from namesake.sweep import GoOn, Request
from namesake.terminal import Screen
from tests.conftest import ROOT
from tests.contract.test_sweep import AUTHOR, NAME, Trainer

pytestmark = pytest.mark.timeout(180)

NODE = "test.node"
# From the best to the worst, so that what comes later is given up.
SPACE = """
trials: 6
prune: {at: [0.5], after: 2}
parameters:
  learning_rate: {choices: [9.e-3, 8.e-3, 5.e-3, 4.e-3, 3.e-3, 2.e-3]}
"""


def trains(spec: Mapping[str, Any], go_on: GoOn, screen: Screen) -> dict[str, Any]:
    """A trial in a worker; the folder that the test watches is handed in as the data set."""
    folder, number = Path(spec["dataset"]), spec["number"]
    begun = folder / f"begun-{number}"
    first = not begun.exists()
    begun.touch()
    if first and (folder / f"dies-{number}").exists():
        with tracking.run(f"trial {number}", parent=spec["parent"]):
            os.kill(os.getpid(), signal.SIGKILL)
    if first and (folder / f"hangs-{number}").exists():
        with tracking.run(f"trial {number}", parent=spec["parent"]):
            time.sleep(600)
    result = Trainer()(spec, go_on, screen)
    tracking.tag(result["run"], {NODE: ray.get_runtime_context().get_node_id()})
    return result


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head that runs no trial and two workers with a processor each, as processes of this machine."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (ROOT, ROOT / "src", ROOT / "serving"))))
    monkeypatch.setenv(
        "RAY_gcs_rpc_server_reconnect_timeout_s", "3"
    )  # 60 by default: how long a lost head is waited for
    memory = {"object_store_memory": 80_000_000, "include_dashboard": False}
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **memory})
    for _ in range(2):
        made.add_node(num_cpus=1, **memory)
    monkeypatch.setenv("RAY_ADDRESS", made.address)
    yield made
    made.shutdown()


@pytest.fixture
def request_(client: mlflow.MlflowClient, tmp_path: Path) -> Request:
    """A sweep of six trials, through Ray, on a fresh store."""
    (tmp_path / "space.yaml").write_text(SPACE, encoding="utf-8")
    return Request(NAME, AUTHOR, dataset=str(tmp_path), space=str(tmp_path / "space.yaml"), backend="ray")


def test_trials_run_on_both_nodes_under_one_parent_and_one_whose_process_dies_is_begun_anew(
    request_: Request,
    client: mlflow.MlflowClient,
    cluster: Cluster,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "dies-1").touch()
    outcome = sweep.sweep(request_, Screen(), trains)
    shown = capfd.readouterr().out
    assert outcome.results[0]["number"] == 0
    assert sorted(one["number"] for one in outcome.results) == list(range(6))
    states = [one["state"] for one in outcome.results]
    assert set(states) == {"complete", "pruned"}
    assert all(one["early"] for one in outcome.results)
    children = tracking.children(outcome.run_id)
    assert len({child.tags[NODE] for child in children if NODE in child.tags}) == 2
    ended = [(child.status, child.tags.get(tracking.TAG_ENDED, "")) for child in children]
    assert ended.count(("FINISHED", "")) == states.count("complete")
    assert ended.count(("KILLED", "pruned")) == states.count("pruned")
    assert ended.count(("KILLED", "left behind")) == 1
    assert len(ended) == 7
    assert {one["run"] for one in outcome.results} < {child.id for child in children}
    parent = client.get_run(outcome.run_id)
    assert parent.info.status == "FINISHED"
    assert outcome.best is not None
    assert parent.data.tags["namesake.sweep.best"] == outcome.best["run"]
    assert len(json.loads(tracking.fetch(outcome.run_id, "trials.json").read_text(encoding="utf-8"))["data"]) == 6
    assert "pruned after 50% of the training" in shown
    assert f"namesake promote --run {outcome.best['run']}" in shown


def until(there: Callable[[], bool]) -> None:
    """Wait, at most a minute."""
    end = time.monotonic() + 60
    while not there():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_sweep_whose_head_is_killed_says_so_and_goes_on_without_what_was_under_way(
    request_: Request,
    client: mlflow.MlflowClient,
    cluster: Cluster,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for number in (2, 3):
        (tmp_path / f"hangs-{number}").touch()

    def kill() -> None:
        until(lambda: all((tmp_path / f"begun-{number}").exists() for number in (2, 3)))
        cluster.head_node.kill_all_processes(check_alive=False, allow_graceful=False)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(TrainingError, match="Ray's driver ended") as caught:
        sweep.sweep(request_, Screen(), trains)
    killer.join()
    [parent] = client.search_runs(["0"], "tags.`namesake.kind` = 'sweep'")
    assert parent.info.status == "FAILED"
    assert f"namesake sweep --resume {parent.info.run_id} --backend ray" in caught.value.mend
    kept = [child.id for child in tracking.children(parent.info.run_id) if sweep.TAG_RESULT in child.tags]
    lost = [child for child in tracking.children(parent.info.run_id) if child.id not in kept]
    assert len(kept) == len(lost) == 2
    assert all(child.status == "KILLED" for child in lost)
    # No cluster is named any more: the driver starts one on this machine.
    cluster.shutdown()
    monkeypatch.delenv("RAY_ADDRESS")
    outcome = sweep.sweep(Request(resume=parent.info.run_id, backend="ray"), Screen(), trains)
    assert sorted(one["number"] for one in outcome.results) == list(range(6))
    assert set(kept) < {one["run"] for one in outcome.results}
    assert len(tracking.children(parent.info.run_id)) == 6 + 2
    assert client.get_run(parent.info.run_id).info.status == "FINISHED"
