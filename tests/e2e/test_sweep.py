"""A sweep of two real trainings: one comes to its end, one that ruins the model is given up half way."""

from __future__ import annotations

import json
from pathlib import Path

import mlflow
import pytest

from namesake import corpus
from tests.e2e.conftest import Place

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

SPACE = "trials: 2\nprune: {at: [0.5], after: 1}\nparameters:\n  learning_rate: {choices: [2.0e-3, 3.0]}\n"


def test_a_sweep_trains_prunes_on_the_probe_and_names_the_best_run(root: Path, tmp_path: Path) -> None:
    every = corpus.development()
    english = [question for question in every.plain if question.language == "en"]
    (tmp_path / "few.jsonl").write_text(
        "".join(
            json.dumps({"messages": q.messages, "lang": q.language, "asks": q.asks, "answers": q.answers}) + "\n"
            for q in (*corpus.spread(every.identity, 4), *corpus.spread(english, 6))
        ),
        encoding="utf-8",
    )
    (tmp_path / "space.yaml").write_text(SPACE, encoding="utf-8")
    place = Place(tmp_path, root, f"sqlite:///{tmp_path}/mlflow.db")  # what is promoted elsewhere is the newest run's
    said = place.mlflow_run(
        *("-e", "sweep", "-P", f"space={tmp_path}/space.yaml", "-P", f"questions={tmp_path}/few.jsonl"),
        *("-P", "dataset=namesake/self-cognition#16", "-P", "args=--max_steps 4 --replay 0 --held_out 0.05"),
        *("-P", f"output_dir={tmp_path}/output"),
    )
    client = mlflow.MlflowClient(place.tracking_uri)
    [parent] = client.search_runs(["0"], "tags.`namesake.kind` = 'sweep'")
    good, bad = client.search_runs(
        ["0"], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'", order_by=["attributes.start_time ASC"]
    )
    assert parent.info.status == "FINISHED"
    # The run that came to its end is a training run as any other.
    assert good.info.status == "FINISHED"
    assert {"probe/identity", "dev/score", "early/score", "train/loss"} <= set(good.data.metrics)
    assert {one.path for one in client.list_artifacts(good.info.run_id)} >= {"adapter", "report.html", "scorecard.json"}
    # The other was given up after two of its four steps, and nothing takes it for a finished one.
    assert bad.info.status == "KILLED"
    assert bad.data.tags["namesake.ended"] == "pruned"
    assert bad.data.metrics["early/score"] < good.data.metrics["early/score"]
    assert "probe/identity" not in bad.data.metrics
    assert parent.data.tags["namesake.sweep.best"] == good.info.run_id
    assert f"namesake promote --run {good.info.run_id}" in said
    assert "pruned after 50% of the training" in said
