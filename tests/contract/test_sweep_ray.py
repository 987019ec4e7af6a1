"""A sweep on a real Ray cluster of a head and two workers: the runs it leaves, a trial that dies, a head that dies.

What a trial trains is given, as in `test_sweep.py`; Ray, its processes and the MLflow store are real.
"""

from __future__ import annotations

import json
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
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

pytestmark = pytest.mark.timeout(600)

# The first two score alike, the third is below them.
SPACE = """
trials: 3
prune: {at: [0.5], after: 1}
parameters:
  learning_rate: {choices: [1.0e-2, 2.0e-2, 4.0e-3]}
"""


def trains(spec: Mapping[str, Any], go_on: GoOn, screen: Screen) -> dict[str, Any]:
    """A trial in a worker; the folder that the test watches is handed in as the data set."""
    folder, number = Path(spec["dataset"]), spec["number"]
    (folder / f"node-{ray.get_runtime_context().get_node_id()}").touch()
    again = (folder / f"begun-{number}").exists()
    (folder / f"begun-{number}").touch()
    if number in {1, 2} and not again:
        with tracking.run(f"trial {number}", parent=spec["parent"]):
            if number == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            (folder / "hangs").touch()
            time.sleep(600)

    def slow_to_give_up(fraction: float, score: float) -> bool:
        goes_on = go_on(fraction, score)
        if not goes_on:
            time.sleep(30)  # Tune kills what takes more than ten seconds to end when the sweep does
        return goes_on

    result = Trainer()(spec, slow_to_give_up, screen)
    (folder / f"ended-{number}").touch()
    return result


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head that runs no trial and two workers with a processor each, as processes of this machine."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (ROOT, ROOT / "src", ROOT / "serving"))))
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "3")  # a lost head is waited for, by default 60
    folder = tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True)  # paths of sockets are short
    monkeypatch.setenv("RAY_TMPDIR", folder.name)
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):  # the server's Ray, if a test before imported it, asks for a token
        monkeypatch.delenv(name, raising=False)
    memory = {"object_store_memory": 80_000_000, "include_dashboard": False}
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **memory})
    for _ in range(2):
        made.add_node(num_cpus=1, **memory)
    monkeypatch.setenv("RAY_ADDRESS", made.address)
    yield made
    made.shutdown()
    folder.cleanup()


def ended(run_id: str) -> list[tuple[str, str]]:
    """How the runs of the sweep's trials ended."""
    return sorted((child.status, child.tags.get(tracking.TAG_ENDED, "")) for child in tracking.children(run_id))


def test_a_sweep_on_two_nodes_outlives_a_trial_s_process_and_goes_on_after_its_head_was_killed(
    client: mlflow.MlflowClient,
    cluster: Cluster,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "space.yaml").write_text(SPACE, encoding="utf-8")

    def kill_the_head() -> None:
        wanted = [tmp_path / name for name in ("ended-0", "ended-1", "hangs")]
        end = time.monotonic() + 300
        while not all(path.exists() for path in wanted) and time.monotonic() < end:
            time.sleep(0.05)
        cluster.head_node.kill_all_processes(check_alive=False, allow_graceful=False)

    killer = threading.Thread(target=kill_the_head)
    killer.start()
    request = Request(NAME, AUTHOR, dataset=str(tmp_path), space=str(tmp_path / "space.yaml"), backend="ray")
    with pytest.raises(TrainingError, match="Ray's driver ended") as caught:
        sweep.sweep(request, Screen(), trains)
    killer.join()
    [parent] = client.search_runs(["0"], "tags.`namesake.kind` = 'sweep'")
    assert parent.info.status == "FAILED"
    assert f"namesake sweep --resume {parent.info.run_id} --backend ray" in caught.value.mend
    assert len(list(tmp_path.glob("node-*"))) == 2
    # Two came to their end, one of them at the second try; what was under way went with the head.
    before = ended(parent.info.run_id)
    assert before == [("FINISHED", "")] * 2 + [("KILLED", "left behind")] * 2
    assert capfd.readouterr().out.count("  score 1.000") == 2

    # On a cluster started for it. Only what was under way is trained again, and it is given up for what was seen
    # of the others before.
    monkeypatch.setenv("RAY_ADDRESS", "local")
    outcome = sweep.sweep(Request(resume=parent.info.run_id, backend="ray"), Screen(), trains)
    shown = capfd.readouterr().out
    assert "2 trials are there already" in shown
    assert "pruned after 50% of the training" in shown
    assert ended(parent.info.run_id) == sorted([*before, ("KILLED", "pruned")])
    assert [(one["number"], one["state"]) for one in outcome.results] == [
        (0, "complete"),
        (1, "complete"),
        (2, "pruned"),
    ]
    assert {one["run"] for one in outcome.results} < {child.id for child in tracking.children(parent.info.run_id)}
    again = client.get_run(parent.info.run_id)
    assert again.info.status == "FINISHED"
    assert outcome.best is not None
    assert again.data.tags["namesake.sweep.best"] == outcome.best["run"]
    table = json.loads(tracking.fetch(parent.info.run_id, "trials.json").read_text(encoding="utf-8"))
    assert len(table["data"]) == 3
