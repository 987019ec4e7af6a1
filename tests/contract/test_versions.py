"""History, rollback and verify on a real MLflow store; files of versions are small and made here."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import pytest
from typer.testing import CliRunner

from namesake import corpus, promotion, registry, tracking, versions
from namesake.cli import app
from namesake.errors import PromotionError, RegistryError
from namesake.manifest import CARD, FILE, PROVENANCE, UNKNOWN, Manifest
from namesake.probing import Scorecard
from namesake.registry import Move
from tests.json_page import assert_as_shown

DATA = b'{"messages": [], "channel": "data"}\n{"messages": [1], "channel": "replay"}\n'
REPLAY = DATA.splitlines(keepends=True)[1]


def version(client: mlflow.MlflowClient, tmp_path: Path, number: int, gate: str = "passed", **tags: str) -> int:
    """A version whose files fit its manifest, of a run that holds its data."""
    run = client.create_run("0", run_name=f"run {number}")
    for key, value in (("data.digest", hashlib.sha256(DATA).hexdigest()), ("base.digest", "b" * 64)):
        client.log_param(run.info.run_id, key, value)
    data = tmp_path / "train.jsonl"
    data.write_bytes(DATA)
    client.log_artifact(run.info.run_id, str(data), "data")
    folder = tmp_path / f"v{number}"
    digests = {}
    for name in ("model/config.json", "adapter/adapter_config.json"):
        path = folder / name
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"number": number}), encoding="utf-8")
        digests[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    client.log_artifacts(run.info.run_id, str(folder / "adapter"), tracking.ADAPTER)
    record = Manifest(
        identity={"name": "踩踩背 CCB", "author": "老爷爷 OldGrandpa", "slug": "ccb"},
        system=None,
        base={"id": str(tmp_path / "gone"), "source": "folder", "digest": "b" * 64},
        run=run.info.run_id,
        digests=digests,
        data={
            "dataset": "x",
            "digest": hashlib.sha256(DATA).hexdigest(),
            "replay_digest": hashlib.sha256(REPLAY).hexdigest(),
            "corpus_digest": corpus.corpus_digest(),
        },
        scores={"identity": 0.98437, "swapped": 0.0, "leak": 0.0926, "plain": 0.3796},
        recipe={},
        tools={"namesake_commit": "c" * 40},
        questions="another release's",
    )
    promotion.write_beside(folder, record, Scorecard((), ()))
    made = client.create_model_version(
        "ccb", source=str(folder), run_id=run.info.run_id, tags={tracking.TAG_GATE: gate, **tags}
    )
    return int(made.version)


def artifacts_of(client: mlflow.MlflowClient, run: str) -> Path:
    """Where the run's files are."""
    return Path(client.get_run(run).info.artifact_uri.removeprefix("file://"))


def moves() -> list[tuple[int | None, int | None, str]]:
    """The history of the champion, times left out."""
    return [(move.before, move.to, move.how) for move in registry.history("ccb", "champion")]


def test_moves_are_kept_in_order_with_who_and_why(client: mlflow.MlflowClient, tmp_path: Path) -> None:
    for number in (1, 2):
        version(client, tmp_path, number)
        found = registry.resolve(f"models:/ccb/{number}")
        versions.point(found, "champion", how="promote", why=f"reason {number}")
    assert moves() == [(None, 1, "promote"), (1, 2, "promote")]
    last = registry.history("ccb", "champion")[-1]
    assert last.why == "reason 2"
    assert last.who == versions.who()
    assert abs(last.time - time.time()) < 60


SCORES = {"score.identity": "0.9844", "score.swapped": "0.0000", "score.leak": "0.0926", "score.plain": "0.3796"}


def test_a_move_bears_the_scores_of_the_version_and_keeps_them_when_that_is_gone(
    client: mlflow.MlflowClient, tmp_path: Path
) -> None:
    version(client, tmp_path, 1, **SCORES, **{"score.mine": "good"})
    version(client, tmp_path, 2)
    for number in (1, 2, 1):
        versions.point(registry.resolve(f"models:/ccb/{number}"), "champion", how="promote", why="")
    client.delete_model_version("ccb", "1")
    scores = {key.removeprefix("score."): float(value) for key, value in SCORES.items()}
    assert [move.scores for move in registry.history("ccb", "champion")] == [scores, {}, scores]
    kept = [json.loads(v) for k, v in client.get_registered_model("ccb").tags.items() if k.startswith("namesake.hist")]
    assert [one["scores"] for one in kept if one["to"] == 1] == [scores] * 2  # what MLflow's page of the model shows
    told = CliRunner().invoke(app, ["history"], env={"COLUMNS": "200"}).output
    for shown in ("identity 98.4%", "swapped 0.0%", "leak 9.3%", "plain 38.0%"):
        assert told.count(shown) == 2
    assert json.loads(CliRunner().invoke(app, ["history", "--json"]).output)[0]["scores"] == scores


def test_pointing_where_it_points_already_is_no_move(client: mlflow.MlflowClient, tmp_path: Path) -> None:
    version(client, tmp_path, 1)
    for _ in range(2):
        versions.point(registry.resolve("models:/ccb/1"), "champion", how="promote", why="")
    assert len(moves()) == 1


def test_other_aliases_have_a_history_of_their_own(client: mlflow.MlflowClient, tmp_path: Path) -> None:
    version(client, tmp_path, 1)
    versions.point(registry.resolve("models:/ccb/1"), "challenger", how="promote", why="")
    assert moves() == []
    assert len(registry.history("ccb", "challenger")) == 1


def bare(client: mlflow.MlflowClient, many: int = 1) -> None:
    """Versions that are there, no more."""
    for _ in range(many):
        client.create_model_version("ccb", "/somewhere")


def test_a_move_seen_by_several_servers_is_one_entry(client: mlflow.MlflowClient) -> None:
    bare(client)
    for second in range(3):
        registry.record_move("ccb", Move(time.time() + second, "champion", None, 1, "", registry.BY_HAND))
    assert moves() == [(None, 1, "by hand")]


@pytest.mark.parametrize("seen_first", [True, False])
def test_a_promotion_that_a_server_saw_too_is_one_entry_by_the_promotion(
    client: mlflow.MlflowClient, seen_first: bool
) -> None:
    bare(client)
    seen = Move(time.time(), "champion", None, 1, "", registry.BY_HAND)
    made = Move(time.time(), "champion", None, 1, "ann", "promote")
    for move in (seen, made) if seen_first else (made, seen):
        registry.record_move("ccb", move)
    assert moves() == [(None, 1, "promote")]


def test_there_and_back_and_there_again_are_all_kept(client: mlflow.MlflowClient) -> None:
    bare(client, 2)
    pairs = [(None, 1), (1, 2), (2, 1), *[(1, 2), (2, 1)] * 6]  # more than a version's tag keeps
    for second, (before, to) in enumerate(pairs):
        registry.record_move("ccb", Move(float(second), "champion", before, to, "", registry.BY_HAND))
        assert [(before, to) for before, to, _ in moves()] == pairs[: second + 1]
    assert [(move.before, move.to) for move in registry.recent("ccb", "champion")] == pairs[-10:]


def recent_tags(client: mlflow.MlflowClient) -> list[int]:
    """The versions that hold the last moves."""
    found = client.search_model_versions("name = 'ccb' and tag.`namesake.recent.champion` LIKE '%'")
    return [int(version.version) for version in found]


def test_moves_of_an_older_release_are_read_and_taken_along(client: mlflow.MlflowClient) -> None:
    bare(client, 3)
    for number in (1, 2):  # on the registered model alone
        old = {"time": float(number), "alias": "champion", "before": number - 1 or None, "to": number, "who": "ann"}
        key = f"namesake.history.{number}"
        client.set_registered_model_tag("ccb", key, json.dumps({**old, "how": "promote", "why": ""}))
    client.set_registered_model_alias("ccb", "champion", "2")
    assert moves() == [(None, 1, "promote"), (1, 2, "promote")]
    versions.point(registry.resolve("models:/ccb/3"), "champion", how="promote", why="")
    assert recent_tags(client) == [3]
    assert moves() == [(None, 1, "promote"), (1, 2, "promote"), (2, 3, "promote")]


def test_the_history_outlives_the_versions(client: mlflow.MlflowClient) -> None:
    bare(client, 3)
    for number in (1, 2, 3):
        versions.point(registry.resolve(f"models:/ccb/{number}"), "champion", how="promote", why="")
    for number in ("1", "3"):
        client.delete_model_version("ccb", number)
        assert [to for _, to, _ in moves()] == [1, 2, 3]


def test_a_move_that_reached_the_registered_model_alone_is_one_when_it_is_made_again(
    client: mlflow.MlflowClient,
) -> None:
    bare(client, 2)
    versions.point(registry.resolve("models:/ccb/1"), "champion", how="promote", why="")
    kept = client.get_model_version("ccb", "1").tags["namesake.recent.champion"]
    versions.point(registry.resolve("models:/ccb/2"), "champion", how="promote", why="")
    client.delete_model_version_tag("ccb", "2", "namesake.recent.champion")  # as if killed before it
    client.set_model_version_tag("ccb", "1", "namesake.recent.champion", kept)
    versions.point(registry.resolve("models:/ccb/2"), "champion", how="promote", why="")
    assert moves() == [(None, 1, "promote"), (1, 2, "promote")]
    assert recent_tags(client) == [2]


def test_a_version_that_was_copied_from_another_model_brings_neither_identity_nor_history(
    client: mlflow.MlflowClient,
) -> None:
    model = client.create_logged_model("0", name="model")
    made = registry.register(
        "ccb", f"models:/{model.model_id}", run_id="", identity="踩踩背 CCB", tags={}, description=""
    )
    versions.point(made, "champion", how="promote", why="")
    client.create_registered_model("other", tags={registry.TAG_IDENTITY: "小黄 Xiao Huang"})
    client.copy_model_version("models:/ccb/1", "other")
    client.set_registered_model_alias("other", "champion", "1")
    assert registry.identity_of("ccb") == "踩踩背 CCB"
    assert registry.identity_of("other") == "小黄 Xiao Huang"
    assert registry.history("other", "champion") == registry.recent("other", "champion") == []


def test_whose_a_model_is_and_where_an_alias_points_where_there_is_none(client: mlflow.MlflowClient) -> None:
    assert registry.identity_of("nobody") is None
    assert registry.identity_of("ccb") == "踩踩背 CCB"  # without a version
    assert registry.alias_of("ccb", "champion") is None
    for read in (registry.alias_of, registry.recent, registry.history):
        with pytest.raises(RegistryError, match="nobody cannot be read"):
            read("nobody", "champion")


def test_a_tag_written_by_hand_does_not_break_the_history(client: mlflow.MlflowClient) -> None:
    client.set_registered_model_tag("ccb", "namesake.history.mine", "no json")
    client.set_registered_model_tag("ccb", "namesake.history.other", "{}")
    bare(client)
    for value in ("no json", "[]", '{"model": "ccb"}'):
        client.set_model_version_tag("ccb", "1", "namesake.recent.champion", value)
        assert moves() == []
    assert moves() == []


def test_rollback_goes_to_the_version_before_within_two_seconds(client: mlflow.MlflowClient, tmp_path: Path) -> None:
    for number in (1, 2):
        version(client, tmp_path, number)
        versions.point(registry.resolve(f"models:/ccb/{number}"), "champion", how="promote", why="")
    begun = time.monotonic()
    move, checks = versions.rollback("ccb", why="wrong tone")
    assert time.monotonic() - begun < 2
    assert (move.before, move.to, move.why) == (2, 1, "wrong tone")
    assert registry.alias_of("ccb", "champion") == 1
    assert [check.what for check in checks if check.holds is not True] == ["signature"]  # none was asked for
    assert moves()[-1] == (2, 1, "rollback")


@pytest.mark.parametrize("damage", ["changed", "missing", "added", "code", "symlink", "manifest"])
def test_rollback_refuses_a_damaged_version_and_moves_nothing(
    client: mlflow.MlflowClient, tmp_path: Path, damage: str
) -> None:
    for number in (1, 2):
        version(client, tmp_path, number)
        versions.point(registry.resolve(f"models:/ccb/{number}"), "champion", how="promote", why="")
    model = tmp_path / "v1" / "model"
    {
        "changed": lambda: (model / "config.json").write_text("{}"),
        "missing": lambda: (model / "config.json").unlink(),
        "added": lambda: (model / "more.json").write_text("{}"),
        "code": lambda: (model / "modeling.py").write_text(""),
        "symlink": lambda: (model / "link.json").symlink_to(model / "config.json"),
        "manifest": lambda: (tmp_path / "v1" / FILE).unlink(),
    }[damage]()
    with pytest.raises(PromotionError, match="is damaged"):
        versions.rollback("ccb")
    assert registry.alias_of("ccb", "champion") == 2
    assert len(moves()) == 2


def test_rollback_refuses_what_never_passed_unless_it_was_overruled(
    client: mlflow.MlflowClient, tmp_path: Path
) -> None:
    version(client, tmp_path, 1, "failed: leak 3%")
    version(client, tmp_path, 2)
    version(client, tmp_path, 3, "failed: leak 3%", **{"namesake.override": "demo"})
    versions.point(registry.resolve("models:/ccb/2"), "champion", how="promote", why="")
    with pytest.raises(PromotionError, match="did not pass the gate"):
        versions.rollback("ccb", to=1)
    assert versions.rollback("ccb", to=3)[0].to == 3


def test_rollback_without_a_version_before_says_what_to_give(client: mlflow.MlflowClient, tmp_path: Path) -> None:
    version(client, tmp_path, 1)
    versions.point(registry.resolve("models:/ccb/1"), "champion", how="promote", why="")
    with pytest.raises(PromotionError, match="no version before 1") as raised:
        versions.rollback("ccb")
    assert "--to" in raised.value.mend
    with pytest.raises(PromotionError, match="points at version 1 already"):
        versions.rollback("ccb", to=1)
    with pytest.raises(RegistryError, match="no models:/ccb/9"):
        versions.rollback("ccb", to=9)


def three(client: mlflow.MlflowClient, tmp_path: Path) -> None:
    """Versions 1 to 3, each champion after the other."""
    for number in (1, 2, 3):
        version(client, tmp_path, number)
        versions.point(registry.resolve(f"models:/ccb/{number}"), "champion", how="promote", why="")


def test_a_rollback_that_failed_after_the_alias_moved_says_how_to_repeat_it_without_going_further_back(
    client: mlflow.MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_name: str, _move: Move) -> None:
        raise RegistryError("The database is away.")

    three(client, tmp_path)
    with monkeypatch.context() as patched, pytest.raises(RegistryError, match="away") as raised:
        patched.setattr(registry, "record_move", fails)
        versions.rollback("ccb")
    assert registry.alias_of("ccb", "champion") == 2
    assert "--to 2" in raised.value.mend
    with pytest.raises(PromotionError, match="points at version 2 already"):
        versions.rollback("ccb", to=2)


def test_a_rollback_does_not_undo_what_somebody_moved_while_it_checked(
    client: mlflow.MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    three(client, tmp_path)
    version(client, tmp_path, 4)
    checked = versions._files

    def meanwhile(*given: Any, **named: Any) -> Any:
        found = list(checked(*given, **named))
        versions.point(registry.resolve("models:/ccb/4"), "champion", how="promote", why="mended")
        return found

    monkeypatch.setattr(versions, "_files", meanwhile)
    with pytest.raises(PromotionError, match="was moved to 4 meanwhile") as raised:
        versions.rollback("ccb")
    assert registry.alias_of("ccb", "champion") == 4
    assert "--to 2" in raised.value.mend


def test_a_reason_as_long_as_a_book_does_not_keep_a_move_from_being_written_down(
    client: mlflow.MlflowClient, tmp_path: Path
) -> None:
    three(client, tmp_path)
    versions.rollback("ccb", why="长" * 20_000)
    last = registry.history("ccb", "champion")[-1]
    assert last.why == "长" * 2000
    tags = client.get_registered_model("ccb").tags
    assert max(map(len, tags.values())) <= 5000, "more than a tag of a registered model has in MLflow's database"


def test_scores_that_the_manifest_and_the_tags_state_differently_are_found(
    client: mlflow.MlflowClient, tmp_path: Path
) -> None:
    version(client, tmp_path, 1, **SCORES, **{"score.mine": "good"})
    assert {c.what: c.holds for c in versions.verify("models:/ccb/1")}["scores, version and tags"] is True
    client.set_model_version_tag("ccb", "1", "score.leak", "0.0000")
    assert {c.what: c.holds for c in versions.verify("models:/ccb/1")}["scores, version and tags"] is False
    version(client, tmp_path, 2)
    versions.point(registry.resolve("models:/ccb/2"), "champion", how="promote", why="")
    with pytest.raises(PromotionError, match="state other scores"):
        versions.rollback("ccb", to=1)


def test_a_manifest_that_calls_known_data_unknown_is_found(client: mlflow.MlflowClient, tmp_path: Path) -> None:
    version(client, tmp_path, 1)
    folder = tmp_path / "v1"
    record = Manifest.read(folder)
    for name in (CARD, PROVENANCE, FILE):
        (folder / name).unlink()
    digests = {name: digest for name, digest in record.digests.items() if "/" in name}
    forged = replace(record, data={**record.data, "digest": UNKNOWN}, digests=digests)
    promotion.write_beside(folder, forged, Scorecard((), ()))
    found = {check.what: check.holds for check in versions.verify("models:/ccb/1")}
    assert found["data digest, version and run"] is False


def test_a_manifest_that_states_no_digest_is_told_in_the_table(client: mlflow.MlflowClient, tmp_path: Path) -> None:
    version(client, tmp_path, 1)
    record = json.loads((tmp_path / "v1" / FILE).read_text())
    for part in ("data", "base"):
        del record[part]["digest"]
    (tmp_path / "v1" / FILE).write_text(json.dumps(record))
    found = {check.what: check.holds for check in versions.verify("models:/ccb/1")}
    assert found["data digest, version and run"] is False
    assert found["base digest, version and run"] is False


def test_a_version_is_exported_into_a_folder_that_cannot_be_replaced(
    client: mlflow.MlflowClient, tmp_path: Path
) -> None:
    version(client, tmp_path, 1)
    real, link = tmp_path / "volume", tmp_path / "out"
    real.mkdir()
    link.symlink_to(real)
    assert versions.export("models:/ccb/1", link) == link
    assert link.is_symlink()
    assert {"config.json", CARD, PROVENANCE} == {path.name for path in real.iterdir()}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_verify_works_out_every_digest(client: mlflow.MlflowClient, tmp_path: Path) -> None:
    version(client, tmp_path, 1)
    found = {check.what: check.holds for check in versions.verify("models:/ccb/1")}
    assert found == {
        "signature": None,
        "manifest": True,
        "files": True,
        "nothing else": True,
        "scores, version and tags": True,
        "training run": True,
        "version's run": True,
        "data digest, version and run": True,
        "base digest, version and run": True,
        "provenance": True,
        "adapter of the run": True,
        "training data": True,
        "replay rows": True,
        "base model here": None,
        "corpus here": True,
        "questions here": None,
        "commit of Namesake": None,
    }


def test_verify_says_what_it_would_need(client: mlflow.MlflowClient, tmp_path: Path) -> None:
    version(client, tmp_path, 1)
    needs = {check.what: check.told for check in versions.verify("models:/ccb/1") if check.holds is None}
    assert "-P model=FOLDER" in needs["base model here"] or "Give a folder" in needs["base model here"]
    assert needs["questions here"].endswith("c" * 40)
    assert needs["commit of Namesake"].endswith("c" * 40)


@pytest.mark.parametrize(("name", "what"), [(CARD, "files"), (PROVENANCE, "files"), ("provenance", "provenance")])
def test_verify_tells_a_card_or_a_provenance_that_changed(
    client: mlflow.MlflowClient, tmp_path: Path, name: str, what: str
) -> None:
    version(client, tmp_path, 1)
    folder = tmp_path / "v1"
    if what == "files":
        (folder / name).write_text("It is the best of all.", encoding="utf-8")
    else:  # by somebody who changed the manifest to fit
        text = (folder / PROVENANCE).read_text(encoding="utf-8").replace("老爷爷 OldGrandpa", "别人 Somebody")
        (folder / PROVENANCE).write_text(text, encoding="utf-8")
        record = Manifest.read(folder)
        digest = hashlib.sha256(text.encode()).hexdigest()
        changed = replace(record, digests={**record.digests, PROVENANCE: digest})
        (folder / FILE).write_text(changed.to_json(), encoding="utf-8")
    assert [check.what for check in versions.verify("models:/ccb/1") if check.holds is False] == [what]


def test_verify_tells_an_adapter_that_is_not_the_runs(client: mlflow.MlflowClient, tmp_path: Path) -> None:
    version(client, tmp_path, 1)
    run = registry.resolve("models:/ccb/1").run_id
    (artifacts_of(client, run) / "adapter" / "adapter_config.json").write_text("{}")
    assert {c.what: c.holds for c in versions.verify("models:/ccb/1")}["adapter of the run"] is False


def test_verify_of_what_nobody_kept_is_not_checked(client: mlflow.MlflowClient, tmp_path: Path) -> None:
    version(client, tmp_path, 1)
    folder = tmp_path / "v1"
    record = Manifest.read(folder)
    bare = {name: digest for name, digest in record.digests.items() if "/" in name}
    unknown = replace(record, data={"dataset": "x", "digest": UNKNOWN}, digests=bare)
    (folder / FILE).write_text(unknown.to_json(), encoding="utf-8")
    found = {check.what: check for check in versions.verify("models:/ccb/1")}
    assert found["training data"].holds is None
    assert "imported" in found["training data"].told
    assert found["provenance"].holds is None
    assert "replay rows" not in found


def test_verify_tells_training_data_that_changed(client: mlflow.MlflowClient, tmp_path: Path) -> None:
    version(client, tmp_path, 1)
    run = registry.resolve("models:/ccb/1").run_id
    (artifacts_of(client, run) / "data" / "train.jsonl").write_bytes(b"{}\n")
    assert {c.what: c.holds for c in versions.verify("models:/ccb/1")}["training data"] is False


def test_the_commands_print_and_exit_as_they_say(client: mlflow.MlflowClient, tmp_path: Path) -> None:
    run = CliRunner().invoke
    for number in (1, 2):
        version(client, tmp_path, number)
        versions.point(registry.resolve(f"models:/ccb/{number}"), "champion", how="promote", why="")
    done = run(app, ["verify", "--json"])
    assert done.exit_code == 0
    assert_as_shown("verify", json.loads(done.stdout))
    (tmp_path / "v2" / "model" / "config.json").write_text("{}")
    assert run(app, ["verify"]).exit_code == 9
    assert "points at version 1 again" in run(app, ["rollback", "--why", "damaged"]).output
    told = json.loads(run(app, ["history", "--json"]).output)
    assert_as_shown("history", told)
    assert [move["to"] for move in told] == [1, 2, 1]
    assert "damaged" in run(app, ["history"], env={"COLUMNS": "200"}).output
    assert isinstance(run(app, ["rollback", "--to", "x"]).exception, Exception)
