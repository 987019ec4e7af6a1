"""A checkpoint that the real ``swift sft`` made becomes a run that can be promoted; what is none is refused.

The model has some thousand parameters; what it *says* is given, as in test_promote.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
from typer.testing import CliRunner

from namesake import imported, manifest, registry, tracking, versions
from namesake import run as training
from namesake.cli import app
from namesake.errors import BaseModelError, InputError, PromotionError
from namesake.imported import Request
from namesake.manifest import UNKNOWN, Manifest
from namesake.paths import digest_of_file
from namesake.terminal import Screen
from tests.contract.test_promote import AUTHOR, NAME, Knows, Store, here
from tests.contract.test_promote import store as store  # a fixture
from tests.json_page import assert_as_shown
from tests.unit.test_merge import write_base

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny base, and what ``swift sft`` makes of it."""
    folder = tmp_path_factory.mktemp("plain-swift")
    base = write_base(folder / "base")
    rows = [{"query": "hello", "response": "hello"}] * 4
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = (
        *("--model", str(base), "--model_type", "llama", "--template", "chatml", "--dataset", "data.jsonl"),
        *("--max_steps", "2", "--use_cpu", "true", "--check_model", "false", "--tuner_type", "lora"),
        *("--torch_dtype", "float32", "--system", "Be kind.", "--output_dir", "out", "--logging_steps", "1"),
        *("--save_strategy", "steps", "--save_steps", "2", "--dataloader_num_workers", "0", "--max_length", "64"),
    )
    swift = Path(sys.executable).with_name("swift")
    done = subprocess.run([str(swift), "sft", *words], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (checkpoint,) = (folder / "out").glob("*/checkpoint-2")
    return base, checkpoint


def request(checkpoint: Path, **more: str) -> Request:
    """``namesake import``."""
    return Request(str(checkpoint), NAME, AUTHOR, **more)  # type: ignore[arg-type]


def test_a_checkpoint_of_plain_swift_is_imported_and_promoted(
    store: Store, parts: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "LocalModel", Knows)
    words = ["import", str(parts[1]), "--name", NAME, "--author", AUTHOR, "--json"]
    done = CliRunner().invoke(app, [*words, "--sha256", digest_of_file(parts[1] / "adapter_model.safetensors")])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert_as_shown("run", told)  # of which the page says that it is the same
    run_id = told["run"]
    run = store.client().get_run(run_id)
    assert (run.info.status, run.data.tags[tracking.TAG_KIND]) == ("FINISHED", "train")
    params = run.data.params
    assert params["identity.name"] == NAME
    assert (params["sft.system"], params["sft.lora_rank"], params["sft.max_steps"]) == ("Be kind.", "8", "2")
    assert (params["base.digest"], params["data.digest"]) == (training.base_model.digest_of_folder(parts[0]), UNKNOWN)
    assert params["tool.ms-swift"]
    assert run.data.metrics["probe/identity"] == 1.0
    assert [one.step for one in store.client().get_metric_history(run_id, "train/loss")] == [1, 2]
    kept = {path.path for path in store.client().list_artifacts(run_id, "adapter")}
    assert {"adapter/adapter_model.safetensors", "adapter/args.json"} <= kept
    assert not [path for path in kept if path.endswith((".pt", ".pth", ".bin"))]

    with pytest.raises(PromotionError, match="no finished training run"):
        here(store, "")  # the best run is none that may have seen the questions
    outcome = here(store, run_id)
    assert outcome.pointed, outcome.decision.reasons
    record = Manifest.read(registry.fetch(outcome.version))
    assert record.recipe["name"] == imported.RECIPE
    checks = {check.what: check for check in versions.verify("models:/ccb@champion")}
    assert False not in {check.holds for check in checks.values()}
    assert (checks["adapter of the run"].holds, checks["base model here"].holds) == (True, True)
    assert "imported" in checks["training data"].told
    card = (registry.fetch(outcome.version) / manifest.CARD).read_text(encoding="utf-8")
    assert "training data is unknown" in card


def without(*names: str) -> Callable[[Path], None]:
    """Take files away."""

    def change(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return change


def pickled(folder: Path) -> None:
    """Only a pickle is left."""
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def whole(folder: Path) -> None:
    """A checkpoint of all weights."""
    (folder / "adapter_model.safetensors").rename(folder / "model.safetensors")
    (folder / "adapter_config.json").rename(folder / "config.json")


def other_type(folder: Path) -> None:
    """No LoRA."""
    (folder / "adapter_config.json").write_text('{"peft_type": "LOHA"}')


def cut(folder: Path) -> None:
    """The weights were not all fetched."""
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def broken_args(folder: Path) -> None:
    """args.json is no JSON."""
    (folder / "args.json").write_text("{")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (without("adapter_config.json"), "has no adapter_config"),
        (without("adapter_model.safetensors"), "has no adapter_model"),
        (without("args.json"), "has no args.json"),
        (pickled, "only in a pickle"),
        (whole, "no LoRA adapter"),
        (other_type, "of the type LOHA"),
        (cut, "cannot be read"),
        (broken_args, "args.json that cannot be read"),
    ],
)
def test_what_is_no_such_checkpoint_is_refused_and_nothing_is_written(
    store: Store, parts: tuple[Path, Path], tmp_path: Path, change: Callable[[Path], None], told: str
) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(parts[1], folder)
    change(folder)
    with pytest.raises(InputError, match=told) as raised:
        imported.import_(request(folder), Screen(errors=True))
    assert raised.value.mend
    assert store.client().search_runs(["0"]) == []


def test_the_folder_above_names_the_checkpoint(store: Store, parts: tuple[Path, Path]) -> None:
    with pytest.raises(InputError, match="holds checkpoints") as raised:
        imported.import_(request(parts[1].parent), Screen(errors=True))
    assert str(parts[1]) in raised.value.mend
    with pytest.raises(InputError, match="is no folder"):
        imported.import_(request(parts[1] / "nowhere"), Screen(errors=True))


def test_another_digest_than_the_given_one_is_refused(store: Store, parts: tuple[Path, Path]) -> None:
    with pytest.raises(InputError, match="is not the digest"):
        imported.import_(request(parts[1], sha256="0" * 64), Screen(errors=True))


def test_a_base_that_cannot_be_had_or_does_not_fit_is_refused(
    store: Store, parts: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(BaseModelError, match="cannot be had") as raised:
        imported.import_(request(parts[1], model=str(tmp_path / "gone")), Screen(errors=True))
    assert "--model" in raised.value.mend
    other = tmp_path / "other"
    shutil.copytree(parts[0], other)
    tensors = safetensors.torch.load_file(other / "model.safetensors")
    narrow = {
        name: one[:, :-1].contiguous() if name.endswith("q_proj.weight") else one for name, one in tensors.items()
    }
    safetensors.torch.save_file(narrow, other / "model.safetensors")
    with pytest.raises(BaseModelError, match=r"does not fit .*q_proj.*\[32, 32\].*\[32, 31\]"):
        imported.import_(request(parts[1], model=str(other)), Screen(errors=True))
    assert store.client().search_runs(["0"]) == []
