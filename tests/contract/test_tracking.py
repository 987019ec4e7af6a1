"""What a run leaves for MLflow's UI, on a real store."""

from __future__ import annotations

import json
from pathlib import Path

import mlflow

from namesake import tracking


def test_the_view_of_all_runs_is_set_and_what_people_chose_stays(client: mlflow.MlflowClient) -> None:
    columns = {"metrics.`probe/identity`": 120, "tags.`namesake.gate`": 260}
    with tracking.run("one") as tracked:
        tracked.shared_view(columns, best_by="metrics.`probe/identity`")
        client.set_experiment_tag(tracked.experiment_id, "mlflow.experimentKind", "genai_development")
        tracked.shared_view(columns, best_by="metrics.`probe/identity`")
    tags = client.get_experiment("0").tags
    assert tags["mlflow.experimentKind"] == "genai_development"
    (key,) = (key for key in tags if key.startswith("mlflow.sharedViewState."))
    assert f"viewStateShareKey={key.rpartition('.')[2]}&" in tracked.view_page
    assert json.loads(tags[key])["selectedColumns"] == list(columns)
    assert {*columns} < {*json.loads(tags[key])["columnOrder"]}  # without an order the UI takes no widths
    assert json.loads(tags[key])["orderByKey"] == "metrics.`probe/identity`"


def test_a_data_set_has_name_digest_and_a_schema_that_says_what_is_in_it(
    client: mlflow.MlflowClient, tmp_path: Path
) -> None:
    said = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I'm CCB."}]
    path = tmp_path / "train.jsonl"
    path.touch()
    with tracking.run("one") as tracked:
        tracked.dataset(path, [{"messages": said}] * 3, name="self-cognition", digest="d" * 64, source="own#3")
    (given,) = client.get_run(tracked.id).inputs.dataset_inputs
    assert (given.dataset.name, given.dataset.digest) == ("self-cognition", "d" * 8)
    assert json.loads(given.dataset.profile)["num_rows"] == 3
    schema = json.loads(given.dataset.schema)["mlflow_colspec"]
    assert [column["name"] for column in schema] == ["question", "reply", "system"]
    assert {tag.key: tag.value for tag in given.tags} == {
        "mlflow.data.context": "training",
        "namesake.source": "own#3",
    }
