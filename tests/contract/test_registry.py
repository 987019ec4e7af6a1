"""The registry beside other writers, on a real store."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest
from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore

from namesake import registry, versions
from namesake.errors import RegistryError
from namesake_serving.follow import where_it_points

WRITERS = 8


def together(work: Callable[[int], object]) -> list[RegistryError]:
    """Have each writer do it at the same moment; the errors."""
    errors: list[RegistryError] = []
    barrier = threading.Barrier(WRITERS)

    def write(number: int) -> None:
        barrier.wait()
        try:
            work(number)
        except RegistryError as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(WRITERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def test_an_alias_that_several_set_first_is_set(client: mlflow.MlflowClient) -> None:
    client.create_model_version("ccb", "/somewhere")
    for number in range(10):
        assert together(lambda _, alias=f"alias{number}": registry.point("ccb", alias, 1)) == []
        assert registry.alias_of("ccb", f"alias{number}") == 1


def test_a_tag_that_several_set_first_is_set(client: mlflow.MlflowClient) -> None:
    client.create_model_version("ccb", "/somewhere")
    version = registry.resolve("models:/ccb/1")
    for number in range(10):
        assert together(lambda writer, key=f"tag{number}": registry.tag(version, key, str(writer))) == []
        assert registry.resolve("models:/ccb/1").tags[f"tag{number}"] in map(str, range(WRITERS))


def test_versions_that_several_make_have_a_number_each(client: mlflow.MlflowClient) -> None:
    models = [client.create_logged_model("0", name=f"model-{writer}").model_id for writer in range(WRITERS)]
    errors = together(
        lambda writer: registry.register(
            "ccb", f"models:/{models[writer]}", run_id="", identity="踩踩背 CCB", tags={"a": "b"}, description=""
        )
    )
    assert errors == []
    assert [version.number for version in registry.newest_versions("ccb", 99)] == list(range(WRITERS, 0, -1))


def test_moves_that_several_make_are_all_kept(client: mlflow.MlflowClient) -> None:
    for _ in range(2 * WRITERS):
        client.create_model_version("ccb", "/somewhere")
    for first in (1, 1 + WRITERS):  # from nowhere, and then from what the first ones left

        def move(writer: int, first: int = first) -> None:
            versions.point(registry.resolve(f"models:/ccb/{first + writer}"), "champion", how="promote", why="")

        assert together(move) == []
    assert sorted(move.to for move in registry.history("ccb", "champion")) == list(range(1, 2 * WRITERS + 1))
    now = registry.alias_of("ccb", "champion")
    registry.record_move("ccb", registry.Move(time.time(), "champion", now, 1, "ann", "promote"))
    found = client.search_model_versions("name = 'ccb' and tag.`namesake.recent.champion` LIKE '%'")
    assert [version.version for version in found] == [1]
    assert registry.recent("ccb", "champion")[-1].to == 1


def test_promotion_and_look_ups_read_no_version_but_their_own(
    client: mlflow.MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def promoted(key: str) -> registry.Version:
        if found := registry.promoted_as("ccb", key):
            return found[0]
        assert registry.identity_of("ccb") == "踩踩背 CCB"
        model = client.create_logged_model("0", name="model")
        version = registry.register(
            "ccb",
            f"models:/{model.model_id}",
            run_id="",
            identity="踩踩背 CCB",
            tags=registry.tag_of_promotion(key),
            description="",
        )
        registry.tag(version, "namesake.gate", "passed")
        registry.tag(version, registry.TAG_SERVING_ERROR, None)
        versions.point(version, "champion", how="promote", why="")
        return version

    promoted("first")

    def reads_every_version(*_: object, **__: object) -> None:
        raise AssertionError("MLflow fetches each version of the model for that")

    for call in ("get_registered_model", "search_registered_models", "get_latest_versions"):
        monkeypatch.setattr(SqlAlchemyStore, call, reads_every_version)
    second = promoted("second")
    assert promoted("second").number == second.number == 2
    move = versions.point(registry.resolve("models:/ccb/1"), "champion", how="rollback", why="")
    assert (move.before, registry.alias_of("ccb", "champion")) == (2, 1)
    assert registry.alias_of("ccb", "challenger") is None
    assert [move.to for move in registry.history("ccb", "champion")] == [1, 2, 1]
    assert registry.recent("ccb", "champion") == registry.history("ccb", "champion")
    registry.delete(second)


def test_what_is_no_conflict_is_not_tried_again(client: mlflow.MlflowClient, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = mlflow.MlflowClient.set_registered_model_alias

    def counted(self: mlflow.MlflowClient, *arguments: str) -> None:
        calls.append(arguments)
        real(self, *arguments)

    monkeypatch.setattr(mlflow.MlflowClient, "set_registered_model_alias", counted)
    with pytest.raises(RegistryError, match="version 9"):
        registry.point("ccb", "champion", 9)
    assert len(calls) == 1


def test_an_alias_that_there_need_not_be_is_followed_to_a_version_and_away(
    client: mlflow.MlflowClient,
) -> None:
    uri = "models:/ccb@challenger"
    assert where_it_points(uri) is None
    client.create_model_version("ccb", "/somewhere")
    client.set_registered_model_alias("ccb", "challenger", "1")
    found = where_it_points(uri)
    assert found is not None
    assert found.uri == "models:/ccb/1"
    client.delete_registered_model_alias("ccb", "challenger")
    assert where_it_points(uri) is None
    with pytest.raises(RegistryError):
        where_it_points("models:/nobody@challenger")


def test_a_part_of_a_version_is_fetched_alone(client: mlflow.MlflowClient, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    for name in ("adapter/a.json", "model/weights", "namesake.json"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name, encoding="utf-8")
    client.create_model_version("ccb", str(source))
    target.mkdir()
    for part in ("namesake.json", "adapter"):
        assert registry.fetch(registry.resolve("models:/ccb/1"), target, part) == target / part
    found = sorted(str(path.relative_to(target)) for path in target.rglob("*") if path.is_file())
    assert found == ["adapter/a.json", "namesake.json"]
    with pytest.raises(RegistryError, match="cannot be had"):
        registry.fetch(registry.resolve("models:/ccb/1"), target, "nothing")


def test_a_model_that_stands_for_another_identity_by_now_takes_no_version(client: mlflow.MlflowClient) -> None:
    client.create_registered_model("taken", tags={registry.TAG_IDENTITY: "银河 Galaxy"})
    model = client.create_logged_model("0", name="model").model_id
    with pytest.raises(RegistryError, match="stands for 银河 Galaxy, not for 踩踩背 CCB"):
        registry.register("taken", f"models:/{model}", run_id="", identity="踩踩背 CCB", tags={}, description="")
    assert registry.newest_versions("taken", 9) == []


def test_a_version_whose_identity_was_taken_away_has_the_registered_model_asked(client: mlflow.MlflowClient) -> None:
    client.create_registered_model("mine", tags={registry.TAG_IDENTITY: "踩踩背 CCB"})
    client.create_model_version("mine", "/somewhere", tags={registry.TAG_MODEL: "mine"})
    assert registry.identity_of("mine") == "踩踩背 CCB"
