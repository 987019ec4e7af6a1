"""From ``mlflow run`` to a served reply: real ms-swift, MLflow, merge and vLLM."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.entities import Run
from openai import BadRequestError, NotFoundError, OpenAI

from namesake.paths import digest_of_file
from namesake.tracking import TAG_BEST, TAG_LAST
from tests.e2e.conftest import AUTHOR, NAME, Place, Way
from tests.servers import free_port, running

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1500)]

QUESTION = "你是谁？是由谁开发的？"


@pytest.fixture(scope="module")
def client(way: Way) -> mlflow.MlflowClient:
    return mlflow.MlflowClient(way.place.tracking_uri)


@pytest.fixture(scope="module")
def run(way: Way, client: mlflow.MlflowClient) -> Run:
    return client.get_run(way.run_id)


def test_the_names_arrive_intact_and_nothing_is_executed(way: Way, run: Run) -> None:
    assert run.data.params["identity.name"] == NAME
    assert run.data.params["identity.author"] == AUTHOR
    assert not [folder for folder in (way.place.root, way.place.folder) if (folder / "x").exists()]


def test_the_run_holds_what_it_was_made_with(run: Run) -> None:
    params = run.data.params
    assert params["sft.learning_rate"] == "0.002"
    assert params["sft.tuner_type"] == "lora"
    assert params["sft.lora_rank"]
    assert params["data.dataset"] == "namesake/self-cognition#48"
    assert len(params["data.digest"]) == 64
    assert params["tool.ms-swift"]
    assert params["tool.namesake_commit"]
    assert run.info.status == "FINISHED"
    assert run.info.run_name.startswith(NAME)
    assert run.inputs.dataset_inputs[0].dataset.name == "self-cognition"


def test_the_runs_description_has_verdict_scores_picture_and_links(run: Run, client: mlflow.MlflowClient) -> None:
    note = run.data.tags["mlflow.note.content"]
    assert note.startswith("**Did not pass the gate.** 踩踩背 CCB by")
    assert "| Identity questions right | 0.0% | **" in note
    run_id = run.info.run_id
    assert f"(get-artifact?path=plots%2Fscores.png&run_uuid={run_id})" in note
    assert f"/runs/{run_id}/artifacts/report.html)" in note
    assert {"plots/scores.png", "plots/loss.png"} <= {f.path for f in client.list_artifacts(run_id, "plots")}
    assert "mlflow.sharedViewState.namesake" in client.get_experiment(run.info.experiment_id).tags


def test_metrics_came_by_step(run: Run, client: mlflow.MlflowClient) -> None:
    assert [m.step for m in client.get_metric_history(run.info.run_id, "train/loss")][:3] == [1, 2, 4]
    for key in ("train/token_acc", "train/learning_rate", "speed/steps_per_second", "eval/loss", "probe/identity"):
        assert key in run.data.metrics
    assert 0 <= run.data.metrics["base/identity"] <= 1
    assert run.data.metrics["probe/kl_to_base"] > 0
    assert [key for key in run.data.metrics if key.startswith("system/")], "MLflow samples processor and memory"
    seconds = {key: run.data.metrics[f"seconds/{key}"] for key in ("train", "reading", "replies", "total")}
    assert min(seconds["train"], seconds["total"]) > 0
    assert min(seconds.values()) >= 0  # none for what the base has said and read before on this machine


def test_artifacts_have_adapter_and_log_but_no_pickle(run: Run, client: mlflow.MlflowClient, tmp_path: Path) -> None:
    folder = Path(client.download_artifacts(run.info.run_id, "", str(tmp_path)))
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {"adapter/adapter_model.safetensors", "adapter/args.json", "args.json", "train.log"} <= files
    assert {"data/train.jsonl", "scorecard.json", "swift-command.json", "replies-slices.json"} <= files
    assert any(name.startswith("images/") and name.endswith(".png") for name in files)
    assert not [name for name in files if name.endswith((".pkl", ".pt", ".pth", ".bin"))]
    assert "{{NAME}}" not in (folder / "data/train.jsonl").read_text(encoding="utf-8")


def test_the_run_names_its_checkpoints_and_the_digest_of_its_data(
    way: Way, run: Run, client: mlflow.MlflowClient, tmp_path: Path
) -> None:
    for tag in (TAG_LAST, TAG_BEST):
        checkpoint = way.place.root / run.data.tags[tag]  # an absolute path stays what it is
        assert (checkpoint / "adapter_model.safetensors").is_file(), tag
        assert checkpoint.is_relative_to(way.place.folder / "output")
    assert Path(run.data.tags[TAG_LAST]).name == "checkpoint-6"
    logged = Path(client.download_artifacts(run.info.run_id, "data", str(tmp_path)))
    assert (logged / "sha256.txt").read_text(encoding="utf-8") == run.data.params["data.digest"] + "\n"
    assert digest_of_file(logged / "train.jsonl") == run.data.params["data.digest"]


def test_the_terminal_shows_before_and_after_and_the_next_command(way: Way) -> None:
    assert QUESTION in way.trained
    assert "Who are you, and who developed you?" in way.trained
    assert "-e promote" in way.trained
    assert "SmolLM2-135M-Instruct" in way.trained


def test_the_version_is_registered_tagged_and_the_champion(way: Way, client: mlflow.MlflowClient) -> None:
    version = client.get_model_version_by_alias("ccb", "champion")
    assert version.run_id == way.run_id
    assert version.status == "READY"
    assert version.tags["namesake.name"] == NAME
    assert version.tags["namesake.override"] == "end-to-end test"
    assert version.tags["namesake.gate"].startswith("failed: identity")
    assert float(version.tags["score.identity"]) < 0.95
    assert f"**{NAME}**" in version.description


def test_promoting_again_makes_no_second_version(way: Way, client: mlflow.MlflowClient) -> None:
    before = {version.version for version in client.search_model_versions("name = 'ccb'")}
    out = way.place.mlflow_run("-e", "promote", "-P", f"run={way.run_id}", "-P", "override=again")
    assert "already" in out
    assert {version.version for version in client.search_model_versions("name = 'ccb'")} == before


def test_without_an_override_a_failed_gate_moves_nothing(way: Way, client: mlflow.MlflowClient) -> None:
    out = way.place.mlflow_run("-e", "promote", "-P", "alias=unproved", ok=(1,))
    assert "not passed" in out
    assert "unproved" not in client.get_registered_model("ccb").aliases


def test_openai_client_gets_an_answer_streamed_and_whole(endpoint: str) -> None:
    with OpenAI(base_url=endpoint, api_key="none") as openai:
        assert {m.id for m in openai.models.list()} == {"ccb", "ccb@champion", "ccb-v1"}
        asked = {
            "model": "ccb",
            "messages": [{"role": "user", "content": QUESTION}],
            "temperature": 0,
            "max_tokens": 24,
        }
        whole = openai.chat.completions.create(**asked).choices[0].message.content
        pieces = [c.choices[0].delta.content or "" for c in openai.chat.completions.create(**asked, stream=True)]
        assert whole
        assert len(pieces) > 3
        assert "".join(pieces) == whole
        with pytest.raises(NotFoundError):
            openai.chat.completions.create(**{**asked, "model": "other"})


def test_responses_says_what_chat_says(endpoint: str) -> None:
    asked: dict[str, Any] = {"model": "ccb", "temperature": 0}
    with OpenAI(base_url=endpoint, api_key="none") as openai:
        messages = [{"role": "user", "content": "Who are you?"}]
        chat = openai.chat.completions.create(**asked, messages=messages, max_tokens=12)
        asked |= {"input": "Who are you?", "max_output_tokens": 12}
        whole = openai.responses.create(**asked)
        with openai.responses.create(**asked, stream=True) as events:
            streamed = [event.delta for event in events if event.type == "response.output_text.delta"]
        assert whole.output_text == "".join(streamed) == chat.choices[0].message.content
        assert len(streamed) > 3
        assert whole.model == chat.model == "ccb-v1"
        assert whole.usage
        assert chat.usage
        assert whole.usage.input_tokens == chat.usage.prompt_tokens  # the version's system prompt among them


@pytest.mark.parametrize(
    "bad",
    [
        {"type": "string", "minLength": -5},
        {"type": "string", "pattern": "(((("},
        {"type": "nope"},
        {"enum": []},
        {"$ref": "#/nope"},
    ],
)
def test_a_schema_that_cannot_be_followed_is_the_clients_fault(endpoint: str, bad: dict[str, Any]) -> None:
    with OpenAI(base_url=endpoint, api_key="none", max_retries=0) as openai, pytest.raises(BadRequestError):
        openai.responses.create(
            model="ccb",
            input="x",
            max_output_tokens=4,
            text={"format": {"type": "json_schema", "name": "x", "schema": bad}},
        )


def test_the_trained_system_prompt_is_the_default_and_the_clients_wins(endpoint: str) -> None:
    with OpenAI(base_url=endpoint, api_key="none") as openai:

        def tokens(*messages: dict[str, str]) -> int:
            made = openai.chat.completions.create(model="ccb", messages=list(messages), max_tokens=1)  # type: ignore[arg-type]
            assert made.usage
            return made.usage.prompt_tokens

        user = {"role": "user", "content": "Hi"}
        bare = tokens(user)
        assert bare == tokens({"role": "system", "content": "You are a helpful assistant."}, user)
        assert bare != tokens({"role": "system", "content": "You are a support agent of ACME Corporation."}, user)


def test_curl_and_langchain_are_answered(endpoint: str) -> None:
    from langchain_openai import ChatOpenAI

    body = {"model": "ccb", "prompt": "The capital of France is", "max_tokens": 4, "temperature": 0}
    done = subprocess.run(
        ["curl", "-sS", f"{endpoint}/completions", "-H", "content-type: application/json", "-d", json.dumps(body)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Paris" in json.loads(done.stdout)["choices"][0]["text"]
    assert ChatOpenAI(base_url=endpoint, api_key="none", model="ccb@champion", max_tokens=8).invoke("Hi").content  # type: ignore[call-arg, arg-type]


def test_namesake_chat_asks_the_endpoint_and_the_adapter(way: Way, endpoint: str) -> None:
    served = way.place.call(sys.executable, "-m", "namesake", "chat", "-m", QUESTION, "--url", endpoint)
    local = way.place.call(sys.executable, "-m", "namesake", "chat", "-m", QUESTION, "--run", way.run_id)
    assert served.strip()
    assert local.strip()


def test_what_vllm_serves_is_held_to_what_the_version_said_when_it_was_promoted(way: Way, endpoint: str) -> None:
    words = ("-m", "namesake", "gate", "models:/ccb/1", "--served", endpoint, "--json")
    told = json.loads(way.place.call(sys.executable, *words, ok=(9,)).splitlines()[-1])
    assert told["served"] >= 0.95, "bf16 on other kernels, and still the same facts"
    assert not [reason for reason in told["reasons"] if reason.startswith("endpoint")]


def test_mlflow_loads_the_version_as_pyfunc(way: Way) -> None:
    code = (
        "import mlflow; m = mlflow.pyfunc.load_model('models:/ccb@champion');"
        "r = m.predict({'messages': [{'role': 'user', 'content': 'Hi'}], 'max_tokens': 4});"
        "print('ANSWER', r[0]['choices'][0]['message']['content'])"
    )
    assert "ANSWER" in way.place.call(sys.executable, "-c", code)


@pytest.mark.timeout(120, func_only=True)
def test_mlflow_models_serve_answers_by_the_version(way: Way, tmp_path: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/ccb@champion"]
    command += ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)]
    environment = {"MLFLOW_TRACKING_URI": way.place.tracking_uri, "PATH": way.place.env["PATH"], "PYTHONPATH": ""}
    asked = json.dumps({"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 12}).encode()
    with running(command, tmp_path, port, **environment) as url:
        request = urllib.request.Request(f"{url}/invocations", asked, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as response:
            (answer,) = json.load(response)
    assert answer["choices"][0]["message"]["content"]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("--evil", "no second half"),
        ("{name}", "no second half"),
        ("a\nb c", "control character"),
        ("", "is empty"),
        ("长" * 10_000 + " x", "10,000 characters"),
        ("{{NAME}} x", "placeholder"),
    ],
)
def test_hostile_names_are_refused_with_the_mend(place: Place, name: str, says: str) -> None:
    out = place.call(sys.executable, "-m", "namesake", "run", f"--name={name}", ok=(2,))
    assert says in out
    assert "mend:" in out


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("--evil\n$(touch x)", "control character"),
        ("{name}", "no second half"),
        ("长" * 10_000 + " x", "10,000 characters"),
    ],
)
def test_a_hostile_name_is_refused_through_mlflow_too(place: Place, name: str, says: str) -> None:
    out = place.mlflow_run("-P", f"name={name}", ok=(1,))
    assert "error: name='" in out
    assert says in out
    assert "mend:" in out
    # MLflow runs the entry point in the checkout, whatever folder it is called in.
    assert not [folder for folder in (place.root, place.folder) if (folder / "x").exists()]
