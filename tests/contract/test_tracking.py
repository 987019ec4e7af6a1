"""What a run leaves for MLflow's UI, on a real store."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import pytest
import transformers

from namesake import tracking
from tests.tasks import write_model


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


def test_the_run_of_a_server_has_a_name_and_is_finished_whatever_mlflow_run_writes(client: mlflow.MlflowClient) -> None:
    run = client.create_run("0", run_name="luminous-cat-599").info.run_id
    server = "from namesake import tracking\nwith tracking.project_run('ccb · serve', {'namesake.kind': 'serve'}): pass"
    as_mlflow_does = (
        "import subprocess, sys\nfrom mlflow import MlflowClient\n"
        "subprocess.run([sys.executable, '-c', sys.argv[2]], check=True)\n"
        "MlflowClient().set_terminated(sys.argv[1], 'FAILED')\n"
    )
    given = {**os.environ, "MLFLOW_RUN_ID": run, "MLFLOW_TRACKING_URI": mlflow.get_tracking_uri()}
    subprocess.run([sys.executable, "-c", as_mlflow_does, run, server], env=given, check=True)
    for _ in range(120):
        if (found := client.get_run(run)).info.status == "FINISHED":
            break
        time.sleep(0.25)
    assert (found.info.run_name, found.info.status) == ("ccb · serve", "FINISHED")
    assert found.data.tags["namesake.kind"] == "serve"


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2"])
def test_the_flavor_names_the_versions_own_tokenizer_and_mlflow_loads_it(
    client: mlflow.MlflowClient, tmp_path: Path, kind: str
) -> None:
    weights = write_model(tmp_path / "made" / "model")
    config = weights / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text(encoding="utf-8")) | {"model_type": kind}), "utf-8")
    model = tracking.NewModel("models:/m-1", weights.parent, local=True)
    tracking.add_flavor(model, weights.name)
    own = transformers.AutoTokenizer.from_pretrained(weights)
    flavor = mlflow.models.Model.load(model.folder).flavors["transformers"]
    assert flavor["tokenizer_type"] == type(own).__name__
    loaded = getattr(transformers, flavor["tokenizer_type"]).from_pretrained(model.folder / "components" / "tokenizer")
    assert loaded.get_vocab() == own.get_vocab()
    assert len(own.get_vocab()) > 20
    assert flavor["pipeline_model_type"] == json.loads(config.read_text(encoding="utf-8"))["architectures"][0]


def test_a_table_that_is_written_again_takes_the_place_of_the_first(client: mlflow.MlflowClient) -> None:
    with tracking.run("sweep") as tracked:
        tracked.table([{"trial": 0, "名": "踩"}], "trials.json")
        tracked.table([{"trial": 0, "名": "踩"}, {"trial": 1, "名": "背"}], "trials.json")
        assert mlflow.load_table("trials.json", run_ids=[tracked.id]).to_dict("list") == {
            "trial": [0, 1],
            "名": ["踩", "背"],
        }
    tags = client.get_run(tracked.id).data.tags
    assert json.loads(tags["mlflow.loggedArtifacts"]) == [{"path": "trials.json", "type": "table"}]
