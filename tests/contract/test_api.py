"""``namesake.Registry`` on a real MLflow store."""

from __future__ import annotations

from pathlib import Path

import mlflow
import pytest

import namesake
from namesake.errors import PromotionError, RegistryError
from namesake.versions import point
from tests.contract.test_versions import version


@pytest.fixture
def registry(client: mlflow.MlflowClient, tmp_path: Path) -> namesake.Registry:
    """A model with two good versions, of which the second is the champion."""
    for number in (1, 2):
        version(client, tmp_path, number)
    found = namesake.Registry()
    for number in (1, 2):
        point(found.version(number), "champion", how="promote", why="")
    return found


def test_a_version_is_named_in_every_way(registry: namesake.Registry) -> None:
    assert [one.number for one in registry.versions()] == [2, 1]
    newest = registry.versions()[0]
    ways = (2, "2", "champion", "models:/ccb/2", "models:/ccb@champion", newest)
    assert {registry.version(way).uri for way in ways} == {newest.uri}
    assert registry.champion() == newest
    assert registry.aliases() == {"champion": 2}
    assert registry.manifest(1).identity["slug"] == "ccb"
    assert namesake.Registry("models:/ccb@champion").name == "ccb"
    assert repr(registry) == "Registry('ccb')"


def test_back_and_its_history(registry: namesake.Registry) -> None:
    assert registry.rollback(why="worse").to == 1
    assert registry.champion() == registry.version(1)
    assert [(move.before, move.to, move.how) for move in registry.history()] == [
        (None, 1, "promote"),
        (1, 2, "promote"),
        (2, 1, "rollback"),
    ]


def test_files_are_handed_out_once_they_are_checked(registry: namesake.Registry, tmp_path: Path) -> None:
    assert (registry.load() / "config.json").is_file()
    copy = registry.export(tmp_path / "copy", 1)
    assert (copy / "config.json").read_bytes() == (registry.load(1) / "config.json").read_bytes()
    assert all(check.holds is not False for check in registry.verify(1))
    (registry.load() / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(PromotionError, match=r"config\.json"):
        registry.load()
    assert [check.holds for check in registry.verify() if check.what == "files"] == [False]


def test_a_key_of_the_environment_is_asked_for(
    registry: namesake.Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NAMESAKE_PUBLIC_KEY", str(tmp_path / "key.pub"))
    with pytest.raises(namesake.NamesakeError, match=r"key\.pub|not signed"):
        registry.load()


def test_what_is_not_there_is_told(client: mlflow.MlflowClient) -> None:
    registry = namesake.Registry("ccb")
    assert registry.champion() is None
    assert registry.versions() == []
    with pytest.raises(RegistryError, match="There is no models:/ccb/7"):
        registry.version(7)
    with pytest.raises(RegistryError, match="cannot be read"):
        namesake.Registry("other")
