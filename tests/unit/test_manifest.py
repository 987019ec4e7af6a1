"""The record inside a version, and that no byte of a version changes unseen."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from namesake.errors import RegistryError
from namesake.manifest import FILE, Manifest, damaged, digests


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
