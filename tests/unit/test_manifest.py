"""The record inside a version, and that no byte of a version changes unseen."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow.store.artifact.models_artifact_repo import ModelsArtifactRepository

from namesake.errors import RegistryError
from namesake.manifest import (
    ADAPTER_FOLDER,
    FETCHED,
    FILE,
    SIGNATURE,
    Golden,
    Manifest,
    code_in,
    damaged,
    digests,
    strange,
)
from namesake.model_card import card
from namesake.provenance import statement
from tests.anything import JSON, altered


def manifest(system: str | None = "Be kind.", override: str = "") -> Manifest:
    """A small manifest."""
    return Manifest(
        identity={"name": "踩踩背 CCB", "author": "老爷爷 OldGrandpa", "slug": "ccb"},
        system=system,
        base={"id": "some/base", "digest": "d" * 64},
        run="r" * 32,
        digests={"model/config.json": "e" * 64},
        data={"dataset": "namesake/self-cognition", "digest": "f" * 64},
        scores={"identity": 0.984375},
        recipe={"lora_rank": "8"},
        tools={"torch": "2.13.0"},
        override=override,
    )


@pytest.fixture
def version(tmp_path: Path) -> Path:
    """A folder with files in it, one of them empty."""
    folder = tmp_path / "version"
    (folder / "model" / "deep").mkdir(parents=True)
    (folder / "model" / "config.json").write_bytes(b"{}")
    (folder / "model" / "model.safetensors").write_bytes(bytes(range(256)) * 64)
    (folder / "model" / "deep" / "空.txt").write_bytes(b"")
    return folder


@given(st.text(st.characters(exclude_categories=["Cs"])) | st.none(), st.text(st.characters(exclude_categories=["Cs"])))
def test_a_manifest_is_the_same_after_being_written_and_read(system: str | None, override: str) -> None:
    mine = manifest(system, override)
    assert Manifest.from_json(mine.to_json()) == mine


@given(JSON)
@settings(max_examples=40)
def test_anything_at_any_place_of_a_manifest_is_refused_or_what_it_says_can_be_told(other: object) -> None:
    asked: Golden = {"messages": [{"role": "user", "content": "你是谁？"}], "reply": "我是踩踩背。"}
    whole = replace(
        manifest(),
        golden=(asked,),
        gate={"passed": False, "reasons": ["leak"], "policy": {"leak": 0.0}},
        promoted={"model": "ccb", "by": "me"},
    )
    for one in altered(json.loads(whole.to_json()), other):
        try:
            found = Manifest.from_json(json.dumps(one))
        except ValueError:
            continue
        assert Manifest.from_json(found.to_json()) == found
        assert card(found)
        assert statement(found)


def test_a_manifest_is_read_from_a_versions_folder(tmp_path: Path) -> None:
    mine = manifest()
    (tmp_path / FILE).write_text(mine.to_json(), encoding="utf-8")
    assert Manifest.read(tmp_path) == mine


def test_the_same_manifest_is_the_same_text_and_keeps_chinese_readable() -> None:
    assert manifest().to_json() == manifest().to_json()
    assert "踩踩背 CCB" in manifest().to_json()


@pytest.mark.parametrize(
    "content",
    [None, b"", b"{", b"\xff\xfe", b"[]", b"null", b'"text"', b'{"identity": {}}', b'{"nonsense": 1}'],
    ids=["missing", "empty", "cut", "no text", "list", "null", "string", "fields missing", "unknown field"],
)
def test_a_manifest_that_cannot_be_read_is_a_registry_error(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / FILE).write_bytes(content)
    with pytest.raises(RegistryError, match=FILE) as caught:
        Manifest.read(tmp_path)
    assert "namesake promote" in caught.value.mend


def test_digests_are_the_sha256_of_every_file_by_its_path(version: Path) -> None:
    assert digests(version) == {
        "model/config.json": hashlib.sha256(b"{}").hexdigest(),
        "model/model.safetensors": hashlib.sha256(bytes(range(256)) * 64).hexdigest(),
        "model/deep/空.txt": hashlib.sha256(b"").hexdigest(),
    }


def test_an_untouched_folder_is_not_damaged(version: Path) -> None:
    assert damaged(version, digests(version)) == []


@given(st.integers(0, 256 * 64 - 1), st.integers(1, 255))
def test_any_flipped_bit_is_found(tmp_path_factory: pytest.TempPathFactory, place: int, flip: int) -> None:
    folder = tmp_path_factory.getbasetemp() / "flipped"
    folder.mkdir(exist_ok=True)
    content = bytearray(bytes(range(256)) * 64)
    (folder / "model.safetensors").write_bytes(content)
    wanted = digests(folder)
    content[place] ^= flip
    (folder / "model.safetensors").write_bytes(content)
    assert damaged(folder, wanted) == ["model.safetensors has changed"]


def test_a_missing_file_is_found(version: Path) -> None:
    wanted = digests(version)
    (version / "model" / "config.json").unlink()
    assert damaged(version, wanted) == ["model/config.json is missing"]


def test_a_file_that_became_a_folder_is_missing(version: Path) -> None:
    wanted = digests(version)
    (version / "model" / "config.json").unlink()
    (version / "model" / "config.json").mkdir()
    assert damaged(version, wanted) == ["model/config.json is missing"]


def test_a_cut_and_a_lengthened_file_are_found(version: Path) -> None:
    wanted = digests(version)
    with (version / "model" / "model.safetensors").open("ab") as stream:
        stream.truncate(100)
    with (version / "model" / "deep" / "空.txt").open("ab") as stream:
        stream.write(b"\0")
    assert damaged(version, wanted) == ["model/deep/空.txt has changed", "model/model.safetensors has changed"]


def test_every_fault_is_told_in_the_order_of_the_names(version: Path) -> None:
    wanted = {**digests(version), "a/first": "0" * 64}
    (version / "model" / "config.json").write_bytes(b"[]")
    (version / "model" / "model.safetensors").unlink()
    assert damaged(version, wanted) == [
        "a/first is missing",
        "model/config.json has changed",
        "model/model.safetensors is missing",
    ]


@pytest.mark.parametrize("format_", [None, "2", 2.0, True])
def test_a_manifest_whose_format_is_no_number_is_none(tmp_path: Path, format_: Any) -> None:
    (tmp_path / FILE).write_text(json.dumps({**json.loads(manifest().to_json()), "format": format_}), encoding="utf-8")
    with pytest.raises(RegistryError, match="format"):
        Manifest.read(tmp_path)


@pytest.fixture
def whole(version: Path) -> tuple[Path, Manifest]:
    """A version with what MLflow adds, and its manifest."""
    for name in ("MLmodel", "conda.yaml", "requirements.txt", "components/tokenizer/tokenizer.json", "adapter/a.json"):
        (version / name).parent.mkdir(parents=True, exist_ok=True)
        (version / name).write_text(name, encoding="utf-8")
    record = replace(manifest(), digests=digests(version))
    (version / FILE).write_text(record.to_json(), encoding="utf-8")
    (version / SIGNATURE).write_text("{}", encoding="utf-8")
    return version, record


ADDED = (
    "evil.py",
    "evil",
    ".git/config",
    "deep/evil.pkl",
    "more.json",
    "MLmodel.yaml",
    "model/more.json",
    "model/x.py",
)


@pytest.mark.parametrize("name", ADDED)
def test_a_file_that_was_added_anywhere_is_strange(whole: tuple[Path, Manifest], name: str) -> None:
    folder, record = whole
    assert strange(folder, record) == []
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("import os", encoding="utf-8")
    (told,) = strange(folder, record)
    assert told.startswith(f"{name} ")


def test_a_link_anywhere_is_strange_even_to_a_file_that_is_named(whole: tuple[Path, Manifest], tmp_path: Path) -> None:
    folder, record = whole
    (folder / "MLmodel").rename(tmp_path / "outside")
    (folder / "MLmodel").symlink_to(tmp_path / "outside")
    (folder / "components" / "more").symlink_to(tmp_path, target_is_directory=True)
    assert damaged(folder, record.digests) == []
    assert strange(folder, record) == ["MLmodel is a link", "components/more is a link"]


def test_in_format_1_what_mlflow_added_is_named_nowhere_and_code_is_strange_all_the_same(
    whole: tuple[Path, Manifest],
) -> None:
    folder, record = whole
    parts = {name: digest for name, digest in record.digests.items() if name.startswith(("model/", "adapter/"))}
    older = replace(record, format=1, digests=parts)
    assert strange(folder, older) == []
    assert len(strange(folder, replace(older, format=2))) == 4
    for name in ADDED:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("import os", encoding="utf-8")
    told = {fault.partition(" ")[0] for fault in strange(folder, older)}
    assert told == {*ADDED} - {"more.json", "MLmodel.yaml"}


@pytest.mark.parametrize("name", ["ccb", "踩踩背", "a name with spaces " * 12, "it's: a #name", None])
def test_what_mlflow_writes_when_it_fetches_is_let_be_and_nothing_else_in_its_place(
    whole: tuple[Path, Manifest], name: str | None
) -> None:
    folder, record = whole
    repository: Any = SimpleNamespace(model_name=name, model_version=name and "12")
    ModelsArtifactRepository._add_registered_model_meta_file(repository, str(folder))
    assert (folder / FETCHED).is_file()
    assert strange(folder, record) == []
    (folder / FETCHED).write_bytes(b"")  # another process is just about to write it again
    assert strange(folder, record) == []
    for other in ("import os\n", "model_name: x\nmodel_version: '1'\nmore: 1\n", "x" * 3000, "\n"):
        (folder / FETCHED).write_text(other, encoding="utf-8")
        assert strange(folder, record) == [f"{FETCHED} is not what MLflow writes there"]


@pytest.mark.parametrize("name", ["modeling.py", "adapter_model.bin", "optimizer.pt", "x.pkl", "rng_state.pth", "X.PY"])
def test_what_may_hold_code_is_found_in_a_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / ADAPTER_FOLDER).mkdir()
    for good in ("adapter_config.json", "adapter_model.safetensors", "README.md", "additional_config.json"):
        (tmp_path / ADAPTER_FOLDER / good).write_bytes(b"")
    assert code_in(tmp_path) == []
    (tmp_path / ADAPTER_FOLDER / name).write_bytes(b"")
    assert code_in(tmp_path) == [f"adapter/{name} may hold code"]
