"""``namesake harness`` whole: lm-eval itself, a run and a version on a real MLflow store, a tiny model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlflow
import pytest
import torch
from typer.testing import CliRunner

from namesake import base_model, corpus, manifest, merge, probing, promotion, tracking
from namesake.cli import app
from namesake.identity import Identity
from namesake.manifest import ADAPTER_FOLDER, WEIGHTS_FOLDER, Manifest
from tests.json_page import assert_as_shown
from tests.tasks import ASKED, SYSTEM, write_choice, write_ending, write_model
from tests.unit.test_merge import write_adapter

pytest.importorskip("lm_eval", reason="requirements/harness.txt is not installed")

IDENTITY = Identity.parse("踩踩背 CCB", "老爷爷 OldGrandpa")


@pytest.fixture
def trained(client: mlflow.MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """A training run and a version of it, its base, and a task beside them: their targets."""
    import datasets
    from torch.utils import collect_env

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(collect_env, "get_pretty_env_info", lambda: "")  # a second each time
    write_choice(tmp_path / "tasks")
    write_ending(tmp_path / "tasks")
    base = write_model(tmp_path / "base")
    adapter = write_adapter(base, tmp_path / "adapter", lora_alpha=64)
    run = client.create_run("0", run_name="run", tags={"namesake.base.source": "folder"}).info.run_id
    lineage = {"id": str(base), "digest": base_model.digest_of_folder(base)}
    for key, value in {**{f"base.{k}": v for k, v in lineage.items()}, "sft.system": SYSTEM}.items():
        client.log_param(run, key, value)
    client.log_artifacts(run, str(adapter), tracking.ADAPTER)
    client.set_terminated(run)

    folder = tmp_path / "version"
    merge.merge(base, adapter, folder / WEIGHTS_FOLDER, system=SYSTEM)
    shutil.copytree(adapter, folder / ADAPTER_FOLDER)
    record = Manifest(
        identity={"name": str(IDENTITY.name), "author": str(IDENTITY.author), "slug": "ccb"},
        system=SYSTEM,
        base={**lineage, "source": "folder"},
        run=run,
        digests=manifest.digests(folder),
        data={},
        scores={},
        recipe={},
        tools={},
    )
    asked = corpus.heldout()
    card = probing.scorecard(IDENTITY, ["?"] * len(asked.identity), ["?"] * len(asked.plain))
    promotion.write_beside(folder, record, card)
    version = client.create_model_version("ccb", source=str(folder), run_id=run)
    return run, f"models:/ccb/{version.version}"


def test_a_run_and_its_version_score_the_same_and_the_run_keeps_it(
    client: mlflow.MlflowClient, trained: tuple[str, str], tmp_path: Path
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    printed = {}
    try:
        for target in trained:
            words = ["harness", target, "--tasks", "ending,choice", "--include-path", str(tmp_path / "tasks"), "--json"]
            done = CliRunner().invoke(app, words, catch_exceptions=False)
            assert done.exit_code == 0, done.output
            printed[target] = json.loads(done.stdout)
    finally:
        torch.set_num_threads(threads)
    run = trained[0]
    found, of_version = printed[run], printed[trained[1]]
    assert_as_shown("harness", found)
    assert (found["run"], found["system"], found["chat_template"], found["limit"]) == (run, SYSTEM, True, 0)
    ending, choice = found["results"]
    assert (choice["task"], choice["metric"], choice["samples"]) == ("choice", "acc", len(ASKED))
    assert ending["base"] != pytest.approx(ending["tuned"], rel=1e-3)
    for one, other in zip(found["results"], of_version["results"], strict=True):
        assert one["base"] == other["base"]
        assert one["tuned"] == pytest.approx(other["tuned"], rel=1e-4)  # folded in memory, and merged on disk

    kept = client.get_run(run).data.metrics
    assert kept["harness/ending/perplexity"] == of_version["results"][0]["tuned"]
    assert kept["harness/ending/perplexity_base"] == ending["base"]
    assert kept["harness/choice/acc_stderr"] == pytest.approx(choice["tuned_stderr"])
    assert client.get_run(run).info.status == "FINISHED"
    files = [artifact.path for artifact in client.list_artifacts(run, "harness")]
    for side in ("base", "tuned"):
        path = max(path for path in files if path.endswith(f"_{side}.json"))
        results = json.loads(tracking.fetch(run, path).read_text(encoding="utf-8"))
        assert results["results"]["ending"]["perplexity,none"] == of_version["results"][0][side]
