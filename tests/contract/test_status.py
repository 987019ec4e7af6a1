"""Status and the store's own facts on a real MLflow store."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import mlflow
import pytest
from typer.testing import CliRunner

from namesake import doctor, registry, status, tracking, versions
from namesake.cli import app
from namesake.errors import TrackingError
from tests.contract.conftest import Point
from tests.contract.test_versions import version
from tests.json_page import assert_as_shown
from tests.unit.answers import answering

NOWHERE = "http://127.0.0.1:1"


def test_status_tells_champion_move_verdict_scores_and_the_newest(client: mlflow.MlflowClient, tmp_path: Path) -> None:
    for number in range(1, 8):
        version(client, tmp_path, number, "failed: leak 3%", **{"score.identity": "0.5", "namesake.override": "demo"})
    versions.point(registry.resolve("models:/ccb/6"), "champion", how="promote", why="demo")
    versions.point(registry.resolve("models:/ccb/7"), "challenger", how="promote", why="")
    (model,) = status.status(url=NOWHERE).models
    assert (model.name, model.identity, model.aliases) == ("ccb", "踩踩背 CCB", {"challenger": 7})
    assert model.champion is not None
    assert (model.champion.number, model.champion.gate, model.champion.override) == (6, "failed: leak 3%", "demo")
    assert model.champion.scores == {"identity": 0.5}
    assert model.moved is not None
    assert (model.moved.to, model.moved.how, model.moved.why) == (6, "promote", "demo")
    assert [one.number for one in model.newest] == [7, 6, 5, 4, 3]


def test_a_champion_moved_by_hand_has_no_time_of_another_move(client: mlflow.MlflowClient, tmp_path: Path) -> None:
    for number in (1, 2):
        version(client, tmp_path, number)
    versions.point(registry.resolve("models:/ccb/1"), "champion", how="promote", why="")
    client.set_registered_model_alias("ccb", "champion", "2")
    (model,) = status.status(url=NOWHERE).models
    assert model.champion is not None
    assert (model.champion.number, model.moved) == (2, None)


def test_models_of_others_are_left_out_and_the_newest_promotion_is_first(
    client: mlflow.MlflowClient, tmp_path: Path
) -> None:
    client.create_registered_model("not-ours")
    client.create_registered_model("aaa", tags={registry.TAG_IDENTITY: "小明 Ming"})
    assert registry.newest_model() == "aaa"
    version(client, tmp_path, 1)
    assert [model.name for model in registry.models()] == ["ccb", "aaa"]
    assert registry.newest_model() == "ccb"


def test_the_command_prints_lines_and_json(client: mlflow.MlflowClient, tmp_path: Path) -> None:
    run = CliRunner().invoke
    version(client, tmp_path, 1)
    versions.point(registry.resolve("models:/ccb/1"), "champion", how="promote", why="gate passed")
    about = {"uri": "models:/ccb@champion", "refused": {}, "live": {"version": "models:/ccb/1", "since": 7}}
    with answering({"/v1/version": (200, json.dumps(about).encode())}) as port:
        told = json.loads(
            run(app, ["status", "models:/ccb@champion", "--json", "--url", f"http://127.0.0.1:{port}"]).output
        )
    assert_as_shown("status", told)
    assert told["store"] == {"address": f"sqlite:///{tmp_path}/mlflow.db", "made": True}
    assert told["models"][0]["champion"]["number"] == 1
    assert told["models"][0]["moved"]["why"] == "gate passed"
    assert (told["endpoint"]["version"], told["endpoint"]["behind"]) == ("models:/ccb/1", False)
    found = run(app, ["status", "--url", NOWHERE])
    assert found.exit_code == 0
    assert "nothing answers there" in found.output
    assert run(app, ["status", "other", "--url", NOWHERE]).exit_code != 0


def test_quiet_and_verbose_exclude_each_other_and_rollback_has_json(
    client: mlflow.MlflowClient, tmp_path: Path
) -> None:
    run = CliRunner().invoke
    assert run(app, ["-q", "-v", "status"]).exit_code == 2
    for number in (1, 2):
        version(client, tmp_path, number)
        versions.point(registry.resolve(f"models:/ccb/{number}"), "champion", how="promote", why="")
    told = json.loads(run(app, ["-q", "rollback", "--json"]).output)
    assert_as_shown("rollback", told)
    assert (told["model"], told["move"]["to"]) == ("ccb", 1)
    assert [check["what"] for check in told["checks"] if check["holds"] is not True] == ["signature"]


def test_a_store_that_is_there_says_its_kind_release_and_artifacts(client: mlflow.MlflowClient) -> None:
    found = tracking.store()
    assert (found.kind, found.made, found.version) == ("sqlite", True, mlflow.__version__)
    assert found.artifacts == client.get_experiment("0").artifact_location
    assert [(check.name, check.state) for check in doctor.store()][:2] == [
        ("tracking store", "ok"),
        ("model registry", "ok"),
    ]


def test_asking_for_the_store_makes_none(tmp_path: Path, tracking_at: Point) -> None:
    tracking_at(f"sqlite:///{tmp_path}/not/yet.db")
    assert not tracking.store().made
    assert status.status(url=NOWHERE).models == ()
    assert list(tmp_path.iterdir()) == []


def test_tables_of_another_release_are_told_and_left_as_they_are(client: mlflow.MlflowClient, tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        database.execute("UPDATE alembic_version SET version_num = 'older'")
    with pytest.raises(TrackingError, match="another release") as raised:
        tracking.store()
    assert "mlflow db upgrade sqlite:///" in raised.value.mend
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        assert database.execute("SELECT version_num FROM alembic_version").fetchall() == [("older",)]


def test_a_file_that_is_no_database_is_a_fault(tmp_path: Path, tracking_at: Point) -> None:
    (tmp_path / "mlflow.db").write_text("no database at all, but longer than a header of one hundred bytes " * 4)
    tracking_at(f"sqlite:///{tmp_path}/mlflow.db")
    (check,) = doctor.store()
    assert check.state == "fault"


def test_a_server_that_is_not_there_is_a_fault_at_once(tracking_at: Point) -> None:
    tracking_at("http://ann:secret@127.0.0.1:1")
    (check,) = doctor.store()
    assert check.state == "fault"
    assert "secret" not in check.found + check.mend
