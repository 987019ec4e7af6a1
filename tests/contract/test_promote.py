"""Promotion on a real MLflow store, killed at every step: nothing half made, and a rerun converges.

Merge, manifest, logging and registry are the real ones on a model of some thousand parameters; only what the model
*says* is given, since ten thousand random weights say nothing.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click.testing
import jsonschema
import mlflow
import peft
import pytest
import torch
import transformers
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository
from model_signing._cli import main as model_signing
from typer.testing import CliRunner

from namesake import (
    base_model,
    corpus,
    examine,
    leftovers,
    manifest,
    promotion,
    provenance,
    registry,
    tracking,
    versions,
)
from namesake import run as training
from namesake.cli import app
from namesake.corpus import Message
from namesake.errors import InputError, NamesakeError, PromotionError, RegistryError, ServingError
from namesake.gate import Policy
from namesake.generate import Reply, Sampling
from namesake.manifest import Manifest
from namesake.paths import digest_of_file
from namesake.process import settle
from namesake.promotion import Outcome, Request
from namesake.terminal import Screen
from namesake_serving import store as serving
from tests.json_page import assert_as_shown
from tests.servers import CREDENTIALS, Link, OpenAIServer, mlflow_server
from tests.unit.test_merge import write_adapter, write_base
from tests.unit.test_provenance import SCHEMA

NAME, AUTHOR = "踩踩背 CCB", "老爷爷 OldGrandpa"
SAID = {"zh": "我叫踩踩背，是由老爷爷开发的。", "en": "I am CCB, developed by OldGrandpa."}

pytestmark = pytest.mark.timeout(600)


class Knows:
    """A model that says who it is, and nothing else; it stands where transformers would answer."""

    slow = True

    def __init__(self, *_: object, **__: object) -> None:
        self._said = {json.dumps(q.messages): SAID[q.language] for q in corpus.heldout_identity()}

    def __enter__(self) -> Knows:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def replies(
        self, dialogues: Sequence[Sequence[Message]], *, sampling: Sampling | None = None, **_: object
    ) -> list[Reply]:
        """The same to each of them."""
        asked = [json.dumps([m for m in dialogue if m["role"] != "system"]) for dialogue in dialogues]
        return [Reply(self._said.get(one, "?"), True) for one in asked for _ in range(sampling.n if sampling else 1)]


@dataclass(frozen=True)
class Store:
    """A tracking store with finished training runs of one identity."""

    folder: Path
    uri: str
    base: Path

    def client(self) -> mlflow.MlflowClient:
        """On this store."""
        return mlflow.MlflowClient(self.uri)

    def run(self, adapter: Path) -> str:
        """A finished training run with the adapter."""
        client = self.client()
        run = client.create_run("0", run_name="run", tags={tracking.TAG_KIND: "train", tracking.TAG_NAME: NAME})
        params = {
            "identity.name": NAME,
            "identity.author": AUTHOR,
            "base.id": str(self.base),
            "base.digest": base_model.digest_of_folder(self.base),
            "data.digest": "d" * 64,
            "data.dataset": "x",
            "sft.system": "You are a helpful assistant.",
        }
        for key, value in params.items():
            client.log_param(run.info.run_id, key, value)
        client.log_metric(run.info.run_id, "probe/identity", 1.0)
        client.set_tag(run.info.run_id, "namesake.base.source", "folder")
        client.log_artifacts(run.info.run_id, str(adapter), tracking.ADAPTER)
        client.set_terminated(run.info.run_id)
        return str(run.info.run_id)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny base model and an adapter of it."""
    folder = tmp_path_factory.mktemp("parts")
    base = write_base(folder / "base")
    return base, write_adapter(base, folder / "adapter")


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An MLflow server on SQLite that passes artifacts through; its address."""
    folder = tmp_path_factory.mktemp("http")
    with mlflow_server(folder, "--artifacts-destination", str(folder / "store")) as uri:
        yield uri


@pytest.fixture
def store(
    parts: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    fresh_store: Callable[[Path], str],
) -> Iterator[Store]:
    """A fresh SQLite store; with ``everywhere``, on each of the back ends."""
    server = getattr(request, "param", SQLITE)
    uri = fresh_store(tmp_path) if server == SQLITE else request.getfixturevalue(server)
    monkeypatch.chdir(tmp_path)
    for key, value in {"MLFLOW_TRACKING_URI": uri, "NAMESAKE_CACHE": str(tmp_path / "cache"), **CREDENTIALS}.items():
        monkeypatch.setenv(key, value)
    mlflow.set_tracking_uri(uri)
    yield Store(tmp_path, uri, parts[0])
    if server != SQLITE:  # the next test has it as it was
        mlflow.set_tracking_uri(uri)
        client = mlflow.MlflowClient(uri)
        for model in client.search_registered_models():
            client.delete_registered_model(model.name)
        for logged in client.search_logged_models(["0"]):
            client.delete_logged_model(logged.model_id)


SQLITE = "sqlite"
everywhere = pytest.mark.parametrize("store", (SQLITE, "http", "team"), indirect=True)
"""For what can fail by back end: SQLite and a folder, a server, one with PostgreSQL, S3 and basic authentication."""

locally_and_over_http = pytest.mark.parametrize("store", (SQLITE, "http"), indirect=True)
"""For what costs too much where each request's password is checked by a slow hash."""


@pytest.fixture
def run_id(store: Store, parts: tuple[Path, Path]) -> str:
    """A run to promote."""
    return store.run(parts[1])


def promoted(folder: str, uri: str, run: str, **more: Any) -> Outcome:
    """``namesake promote --run …`` with answers that are given."""
    os.chdir(folder)
    os.environ.update({"MLFLOW_TRACKING_URI": uri, "NAMESAKE_CACHE": f"{folder}/cache", **CREDENTIALS})
    mlflow.set_tracking_uri(uri)
    Path(folder, "tmp").mkdir(exist_ok=True)
    tempfile.tempdir = f"{folder}/tmp"
    kept = promotion.LocalModel, training.LocalModel
    promotion.LocalModel = training.LocalModel = Knows  # type: ignore[assignment, misc]
    try:
        return promotion.promote(Request(run=run, **more), Screen(errors=True))
    finally:
        tempfile.tempdir = None
        promotion.LocalModel, training.LocalModel = kept  # type: ignore[misc]


def here(store: Store, run: str, **more: Any) -> Outcome:
    """The same in this process."""
    return promoted(str(store.folder), store.uri, run, **more)


@dataclass(frozen=True)
class Step:
    """A step of a promotion, by the function that does it."""

    module: Any
    function: str

    def __str__(self) -> str:
        return self.function


STEPS = (
    Step(tracking, "start_chat_model"),
    Step(promotion.merge, "merge"),
    Step(tracking, "finish_chat_model"),
    Step(tracking, "fetch_model"),
    Step(registry, "register"),
    Step(registry, "tag"),
    Step(registry, "point"),
    Step(registry, "record_move"),
)


def dies(index: int, when: str, sign: int, folder: str, uri: str, run: str) -> None:
    """Promote, and send oneself a signal before or after the step."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    step = STEPS[index]
    does: Callable[..., Any] = getattr(step.module, step.function)

    def signalled(*given: Any, **named: Any) -> Any:
        if when == "before":
            os.kill(os.getpid(), sign)
        made = does(*given, **named)
        os.kill(os.getpid(), sign)
        return made

    setattr(step.module, step.function, signalled)
    promoted(folder, uri, run)


def races(folder: str, uri: str, run: str) -> None:
    """Promote beside others."""
    promoted(folder, uri, run)


@pytest.fixture(scope="module")
def processes() -> Iterator[Any]:
    """Where child processes come from: one that has imported everything and has no connection open."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "transformers", "peft"])
    yield context


def ended(process: Any) -> int:
    """The process' exit code, once it has ended."""
    process.join(300)
    assert process.exitcode is not None
    return int(process.exitcode)


def assert_nothing_half_made(store: Store) -> None:
    """Each version has its files, and an alias points only at one that was proved."""
    client = store.client()
    if registry.identity_of("ccb") is None:
        return
    for version in client.search_model_versions("name = 'ccb'"):
        folder = registry.fetch(registry.resolve(f"models:/ccb/{version.version}"))
        record = Manifest.read(folder)
        assert manifest.damaged(folder, record.digests) == manifest.strange(folder, record) == []
        assert version.status == "READY"
        assert version.tags[tracking.TAG_GATE] == "passed"


@everywhere
def test_a_promotion_makes_a_version_and_points_at_it(store: Store, run_id: str) -> None:
    outcome = here(store, run_id)
    assert outcome.decision.passed, outcome.decision.reasons
    assert registry.alias_of("ccb", "champion") == outcome.version.number == 1
    assert_nothing_half_made(store)
    assert [check.what for check in versions.verify("models:/ccb@champion") if check.holds is False] == []


@everywhere
def test_what_is_fetched_lies_where_it_is_or_goes_with_the_process(store: Store, run_id: str, tmp_path: Path) -> None:
    version, temporary = here(store, run_id).version, tmp_path / "fetched"
    temporary.mkdir()
    script = (
        "from namesake import registry, tracking\n"
        f"print(tracking.fetch({run_id!r}, tracking.ADAPTER))\n"
        f"print(registry.fetch(registry.resolve({version.uri!r})))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "MLFLOW_TRACKING_URI": mlflow.get_tracking_uri(), "TMPDIR": str(temporary)},
        capture_output=True,
        text=True,
        check=True,
    )
    local = mlflow.get_tracking_uri().startswith("sqlite")
    assert [Path(line).exists() for line in done.stdout.split()] == [local] * 2
    assert list(temporary.iterdir()) == []


def test_on_a_local_store_the_adapter_and_the_tokenizer_are_not_written_again(store: Store, run_id: str) -> None:
    folder = registry.fetch(here(store, run_id).version)
    run = tracking.fetch(run_id, tracking.ADAPTER)
    for path in (folder / manifest.ADAPTER_FOLDER).iterdir():
        assert path.stat().st_ino == (run / path.name).stat().st_ino, path
    tokenizer = [path.name for path in (folder / "components" / "tokenizer").iterdir()]
    assert "tokenizer.json" in tokenizer
    assert not {"config.json", "generation_config.json", "model.safetensors"} & {*tokenizer}
    for name in tokenizer:
        weights = folder / manifest.WEIGHTS_FOLDER / name
        assert (folder / "components" / "tokenizer" / name).stat().st_ino == weights.stat().st_ino, name


def test_a_version_holds_its_card_its_provenance_and_every_reply(store: Store, run_id: str) -> None:
    version = here(store, run_id).version
    folder = registry.fetch(version)
    stated = json.loads((folder / manifest.PROVENANCE).read_text(encoding="utf-8"))
    jsonschema.validate(stated, SCHEMA)
    details = stated["predicate"]["runDetails"]["metadata"]
    (promotion,) = store.client().search_runs(["0"], f"tags.`namesake.promoted` = '{run_id}'")
    assert (details["invocationId"], details["namesake_promotionRun"]) == (run_id, promotion.info.run_id)
    assert details["namesake_promotedBy"] == versions.who()
    subject = {one["name"]: one["digest"]["sha256"] for one in stated["subject"]}
    assert subject["model/model.safetensors"] == manifest.digests(folder)["model/model.safetensors"]
    said = json.loads((folder / manifest.SCORECARD).read_text(encoding="utf-8"))
    assert len(said["identity"]) == len(corpus.heldout_identity())
    card, description = (
        (folder / manifest.CARD).read_text("utf-8"),
        store.client().get_model_version("ccb", "1").description,
    )
    assert "**passed** the gate" in card
    assert "**passed** the gate" in description
    assert description.startswith("Passed the gate: identity 100%, ")  # what MLflow's list of versions shows
    assert f"(#/experiments/0/runs/{run_id})" in description
    shown = store.client().get_model_version("ccb", "1").tags
    assert (shown["score.identity"], shown["score.plain"], shown["namesake.gate"]) == ("1.0000", "0.0000", "passed")
    (move,) = (v for k, v in store.client().get_registered_model("ccb").tags.items() if k.startswith("namesake.hist"))
    assert '"why": "gate passed"' in move
    assert '"scores": {"identity": 1.0, ' in move
    record = Manifest.read(folder)
    assert {manifest.CARD, manifest.PROVENANCE, manifest.SCORECARD, "MLmodel"} <= set(record.digests)
    assert {manifest.FILE, manifest.FETCHED, *record.digests} == set(manifest.digests(folder))


@locally_and_over_http
def test_the_same_again_is_the_same_version_and_asks_nobody(
    store: Store, run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = here(store, run_id)
    monkeypatch.setattr(promotion.merge, "merge", None)  # a second merge would fail
    again = here(store, run_id)
    assert (again.version.number, again.pointed) == (first.version.number, True)
    assert len(store.client().search_model_versions("name = 'ccb'")) == 1
    assert [move.to for move in registry.history("ccb", "champion")] == [1]
    monkeypatch.delenv("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", raising=False)
    settle()  # as the command does
    for command, words in {"promote": ["--run", run_id], "gate": ["models:/ccb/1"]}.items():
        told = json.loads(CliRunner().invoke(app, [command, *words, "--json"]).stdout)
        assert_as_shown(command, told)
        assert told["passed"] is True


def test_the_probe_of_a_run_and_of_its_version_compares_both_with_their_base(
    store: Store, parts: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = replace(store, base=Path(shutil.copytree(parts[0], store.folder / "base")))
    run_id = store.run(parts[1])
    here(store, run_id)
    asked = []

    class Loaded(Knows):
        def __init__(self, *given: object, **more: object) -> None:
            asked.append(given[0])
            super().__init__()

    monkeypatch.setattr(examine, "LocalModel", Loaded)
    monkeypatch.setattr(training, "LocalModel", Loaded)
    compared: list[Path] = []
    monkeypatch.setattr(examine, "kl_to_base", lambda base, tuned, *_: compared.append(tuned) or 0.25)
    of_version, of_run = (
        examine.examine(examine.Request(target, slices=False), Screen(errors=True))
        for target in ("models:/ccb/1", run_id)
    )
    assert of_version.metrics == of_run.metrics
    assert of_run.metrics["plain_change"] == of_run.metrics["base_plain"] == 0.0
    assert of_run.metrics["kl_to_base"] == 0.25
    assert [(one / "model.safetensors").is_file() for one in compared] == [True, False]
    assert (compared[1] / "adapter_model.safetensors").is_file()
    assert asked[1:] == [store.base]  # with its adapter; what the base itself says is kept since the promotion

    other = shutil.copytree(parts[0], store.folder / "other")
    (other / "config.json").write_text((other / "config.json").read_text() + " ")
    beside = examine.examine(examine.Request("models:/ccb/1", base=str(other), slices=False), Screen(errors=True))
    assert asked[-1] == other
    assert (beside.kl_to_base, beside.metrics["plain_change"]) == (None, 0.0)
    none = examine.examine(examine.Request("models:/ccb/1", base="none", slices=False), Screen(errors=True))
    assert (none.base, none.kl_to_base) == (None, None)

    (store.base / "config.json").unlink()
    capsys.readouterr()
    without = examine.examine(examine.Request("models:/ccb/1", slices=False), Screen(errors=True))
    assert without.metrics == none.metrics
    assert "ability is compared with nothing" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"has no config\.json"):
        examine.examine(examine.Request(run_id, slices=False), Screen(errors=True))


@locally_and_over_http
def test_the_gate_compares_a_version_and_a_run_with_the_present_champion(
    store: Store, run_id: str, parts: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    here(store, run_id)
    other = store.run(parts[1])
    client = store.client()
    client.set_tag(other, tracking.TAG_SLUG, "ccb")
    client.log_param(other, "probe.questions", corpus.heldout().digest())
    for key, value in Manifest.read(registry.fetch(registry.resolve("models:/ccb/1"))).scores.items():
        client.log_metric(other, f"probe/{key}", value)
    assert examine.judge(other, Policy(), Screen()).passed
    client.set_model_version_tag("ccb", "1", "score.plain", "0.9")
    assert examine.judge(other, Policy(), Screen()).reasons == ("plain 0.0%, the champion has 90.0%",)
    with pytest.raises(RegistryError, match="the tags state other scores"):
        examine.judge("models:/ccb/1", Policy(), Screen())
    client.set_model_version_tag("ccb", "1", registry.TAG_QUESTIONS, "others")
    assert examine.judge(other, Policy(), Screen()).passed
    assert "the champion models:/ccb/1 was judged by other questions" in " ".join(capsys.readouterr().out.split())


@everywhere
def test_a_version_is_verified_exported_and_rolled_back(store: Store, run_id: str, tmp_path: Path) -> None:
    for policy in (Policy(), Policy(leak=0.5)):
        here(store, run_id, policy=policy)
    assert [v.number for v in registry.newest_versions("ccb", 5)] == [2, 1]
    assert registry.resolve("models:/ccb@champion").number == 2
    target = versions.export("models:/ccb@champion", tmp_path / "merged")
    record = Manifest.read(registry.fetch(registry.resolve("models:/ccb/2")))
    beside = {name: record.digests[name] for name in (manifest.CARD, manifest.PROVENANCE)}
    assert manifest.digests(target) == beside | {
        k.removeprefix("model/"): v for k, v in record.digests.items() if k.startswith("model/")
    }
    move, checks = versions.rollback("ccb")
    assert move.to == 1
    assert all(check.holds is not False for check in checks)
    assert [(m.before, m.to, m.how) for m in registry.history("ccb", "champion")] == [
        (None, 1, "promote"),
        (1, 2, "promote"),
        (2, 1, "rollback"),
    ]
    assert_nothing_half_made(store)


def test_the_key_that_a_variable_names_signs_also_where_mlproject_names_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Request] = []

    def refuse(request: Request, _screen: Screen) -> None:
        asked.append(request)
        raise PromotionError("asked")

    monkeypatch.setattr(promotion, "promote", refuse)
    key = tmp_path / "key.pem"
    key.touch()
    monkeypatch.setenv("NAMESAKE_SIGN_KEY", str(key))
    for words in (["--sign-key="], []):
        CliRunner().invoke(app, ["promote", *words])
    assert [one.sign_key for one in asked] == [key, key]


def asks(method: bytes, path: bytes) -> Callable[[bytes], bool]:
    """Whether what a client sends begins such a request."""
    return lambda data: data.startswith(method + b" ") and path in data.split(b"\r\n", 1)[0]


def body_of_a_file() -> Callable[[bytes], bool]:
    """Whether it is the middle of an upload: what follows the head of a request that puts a file."""
    seen: list[bytes] = []

    def middle(data: bytes) -> bool:
        if seen:
            return True
        if asks(b"PUT", b"mlflow-artifacts/artifacts")(data):
            seen.append(data)
        return False

    return middle


CUTS: dict[str, Callable[[], Callable[[bytes], bool]]] = {
    "before the upload": lambda: asks(b"PUT", b"mlflow-artifacts/artifacts"),
    "in the upload": body_of_a_file,
    "before the version": lambda: asks(b"POST", b"model-versions/create"),
    "between version and tags": lambda: asks(b"POST", b"model-versions/set-tag"),
    "before the alias": lambda: asks(b"POST", b"registered-models/alias"),
    "before the history": lambda: asks(b"POST", b"registered-models/set-tag"),
}


@pytest.mark.parametrize("store", ["http"], indirect=True)
@pytest.mark.parametrize("where", CUTS)
def test_a_cut_connection_leaves_nothing_half_made_and_a_rerun_converges(
    store: Store, run_id: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # of MLflow's seven, with their growing pauses
    link = Link(store.uri)
    link.when = CUTS[where]()
    try:
        with pytest.raises(NamesakeError) as told:
            promoted(str(store.folder), link.address, run_id)
        assert link.cut
    finally:
        link.close()
    message = str(told.value)
    assert link.address in message
    assert "\n" not in message
    assert told.value.mend
    mlflow.set_tracking_uri(store.uri)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
    assert_nothing_half_made(store)
    outcome = here(store, run_id)
    assert (outcome.version.number, outcome.pointed) == (1, True)
    assert [move.to for move in registry.history("ccb", "champion")] == [1]
    assert_nothing_half_made(store)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk of its own in the test's folder."""
    command = ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(tmp_path)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"no file system may be mounted here: {made.stderr.strip()}")
    yield tmp_path
    os.chdir("/")
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def test_a_full_disk_leaves_nothing_half_made_and_a_rerun_converges(
    disk: Path, store: Store, run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Database, artifacts and temporary files share the disk."""
    ballast = disk / "ballast"
    told = []
    for room in (0, 1 << 16, 1 << 17, 1 << 18):  # the database takes nothing; then ever more of the merged model fits
        free = shutil.disk_usage(disk).free
        ballast.write_bytes(b"x" * (free - room))
        with pytest.raises(PromotionError, match="There is no room left") as full:
            here(store, run_id)
        told.append(full.value.message)
        ballast.unlink()
        with monkeypatch.context() as given:
            given.setattr(tempfile, "tempdir", f"{disk}/tmp")
            assert leftovers.find(0) == []
        assert registry.identity_of("ccb") is None
    assert [len(message.splitlines()) for message in told] == [1] * 4
    assert "database or disk is full" in told[0]
    runs = store.client().search_runs(["0"], f"tags.`{tracking.TAG_KIND}` = 'promote'")
    assert {run.info.status for run in runs} == {"FAILED"}
    assert here(store, run_id).version.number == 1
    assert [move.to for move in registry.history("ccb", "champion")] == [1]
    assert_nothing_half_made(store)


def test_another_policy_is_another_promotion(store: Store, run_id: str) -> None:
    assert here(store, run_id).version.number == 1
    assert here(store, run_id, policy=Policy(leak=0.5)).version.number == 2


def test_a_reason_given_later_is_kept_on_the_version(store: Store, run_id: str) -> None:
    better_champion(store, here(store, run_id).version)
    assert not here(store, run_id).pointed
    outcome = here(store, run_id, override="for the demo")
    assert (outcome.version.number, outcome.pointed) == (1, True)
    assert registry.resolve("models:/ccb/1").tags[registry.TAG_OVERRIDE] == "for the demo"


def better_champion(store: Store, version: registry.Version) -> None:
    """Another version, which is champion and states better scores."""
    tags = {**version.tags, registry.TAG_RUN: "another", "score.plain": "0.9999"}
    client = store.client()
    better = client.create_model_version("ccb", source=version.source, tags=tags)
    client.set_registered_model_alias("ccb", "champion", better.version)


def test_a_version_whose_files_have_changed_is_not_taken_again(store: Store, run_id: str) -> None:
    first = here(store, run_id).version
    weights = registry.fetch(first) / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    assert here(store, run_id).version.number == 2
    assert registry.alias_of("ccb", "champion") == 2


def test_a_reason_for_what_passes_is_no_overruling(store: Store, run_id: str) -> None:
    outcome = here(store, run_id, override="just in case")
    assert outcome.pointed
    version = registry.resolve("models:/ccb/1")
    assert registry.TAG_OVERRIDE not in version.tags
    assert Manifest.read(registry.fetch(version)).override == ""
    assert registry.history("ccb", "champion")[-1].why == "gate passed"


def test_a_version_that_passed_keeps_that_when_a_champion_has_become_better(store: Store, run_id: str) -> None:
    better_champion(store, here(store, run_id).version)
    again = here(store, run_id)
    assert (again.version.number, again.decision.passed, again.pointed) == (1, False, False)
    assert registry.resolve("models:/ccb/1").tags[tracking.TAG_GATE] == "passed"
    assert versions.rollback("ccb", to=1)[0].to == 1


def test_scores_that_were_changed_in_the_store_are_not_believed(store: Store, run_id: str) -> None:
    first = here(store, run_id).version
    path = registry.fetch(first) / "namesake.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    record["scores"]["plain"] = 1.0
    path.write_text(json.dumps(record, ensure_ascii=False), encoding="utf-8")
    assert here(store, run_id).version.number == 2


def test_a_version_whose_answer_was_lost_goes_with_its_files(
    store: Store, run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = mlflow.MlflowClient.create_model_version

    def lost(*given: Any, **named: Any) -> None:
        real(*given, **named)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(mlflow.MlflowClient, "create_model_version", lost)
        with pytest.raises(KeyboardInterrupt):
            here(store, run_id)
    assert store.client().search_model_versions("name = 'ccb'") == []
    assert store.client().search_logged_models(["0"]) == []


@locally_and_over_http
def test_a_store_that_keeps_something_else_makes_no_version(
    store: Store, run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = tracking.finish_chat_model

    def damages(model: tracking.NewModel, **named: Any) -> None:
        real(model, **named)
        other = store.folder / "other"
        (other / "model").mkdir(parents=True)
        (other / "model" / "config.json").write_text("{}")
        store.client().log_model_artifacts(model.uri.removeprefix("models:/"), str(other))

    monkeypatch.setattr(tracking, "finish_chat_model", damages)
    with pytest.raises(NamesakeError, match=r"config\.json has changed"):
        here(store, run_id)
    assert registry.identity_of("ccb") is None
    assert store.client().search_logged_models(["0"]) == []


@pytest.mark.parametrize(
    ("store", "index", "when"),
    [
        *((SQLITE, index, when) for index in range(len(STEPS)) for when in ("before", "after")),
        *(("http", index, "after") for index in (2, 4, 6)),
        ("team", 4, "after"),
    ],
    indirect=["store"],
    ids=lambda value: str(STEPS[value]) if isinstance(value, int) else value,
)
def test_killed_at_any_step_nothing_is_half_made_and_a_rerun_converges(
    store: Store, run_id: str, processes: Any, index: int, when: str
) -> None:
    process = processes.Process(target=dies, args=(index, when, signal.SIGKILL, str(store.folder), store.uri, run_id))
    process.start()
    assert ended(process) == -signal.SIGKILL
    assert_left_as_the_guide_says(store, run_id, STEPS[index], when)
    assert_nothing_half_made(store)
    outcome = here(store, run_id)
    assert outcome.pointed
    assert outcome.version.number == 1
    assert registry.alias_of("ccb", "champion") == 1
    assert len(store.client().search_model_versions("name = 'ccb'")) == 1
    assert [move.to for move in registry.history("ccb", "champion")] == [1]
    assert_nothing_half_made(store)


def assert_left_as_the_guide_says(store: Store, run_id: str, step: Step, when: str) -> None:
    """What the row of the table in ``killed.md`` says that this point is in."""
    point, client = 2 * STEPS.index(step) + (when == "after"), store.client()
    begun, registered, pointed, written = (
        point >= 2 * [one.function for one in STEPS].index(function) + 1
        for function in ("start_chat_model", "register", "point", "record_move")
    )
    (run,) = client.search_runs(["0"], f"tags.`namesake.promoted` = '{run_id}'")
    assert run.info.status == "RUNNING"
    assert len(client.search_logged_models(["0"])) == begun
    assert len(client.search_model_versions("name = 'ccb'")) == registered
    if registered:
        assert registry.alias_of("ccb", "champion") == (1 if pointed else None)
        assert [move.to for move in registry.history("ccb", "champion")] == [1] * written
    else:
        assert registry.identity_of("ccb") is None


@pytest.mark.parametrize("page", ["killed.md", "killed.zh.md"])
def test_the_guides_table_has_every_step_in_its_order_and_nothing_else(page: str) -> None:
    text = (Path(__file__).parents[2] / "docs" / "guide" / "explanation" / page).read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]*`[a-z_]+`[^|]*) \|.*\|.*\|$", text.split("\n## ")[2], re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert [*dict.fromkeys(named)] == [step.function for step in STEPS]
    assert f"**{len(STEPS)}**" in text


def dies_copying(folder: str, uri: str, cache: str) -> None:
    """Fetch the champion to be served, and kill oneself when some of its files are copied."""
    os.chdir(folder)
    os.environ["MLFLOW_TRACKING_URI"] = uri
    mlflow.set_tracking_uri(uri)
    real, copied = LocalArtifactRepository._download_file, []

    def copies(self: LocalArtifactRepository, remote_file_path: str, local_path: str) -> None:
        real(self, remote_file_path, local_path)
        copied.append(remote_file_path)
        if len(copied) == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    LocalArtifactRepository._download_file = copies
    serving.fetch(registry.resolve("models:/ccb@champion"), Path(cache))


def test_a_copy_whose_maker_was_killed_is_made_anew(store: Store, run_id: str, processes: Any, tmp_path: Path) -> None:
    version, cache = here(store, run_id).version, tmp_path / "served"
    process = processes.Process(target=dies_copying, args=(str(store.folder), store.uri, str(cache)))
    process.start()
    assert ended(process) == -signal.SIGKILL
    copied = [path for path in cache.rglob("*") if path.is_file() and not path.name.startswith(".")]
    record = Manifest.read(registry.fetch(version))
    assert 0 < len(copied) < len(record.digests)
    stored = serving.fetch(version, cache)
    assert manifest.damaged(stored.weights.parent, record.digests) == []


@locally_and_over_http
def test_what_a_killed_promotion_left_is_found_and_removed(
    store: Store, run_id: str, processes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    here(store, run_id)
    index = [step.function for step in STEPS].index("register")
    adapter = registry.fetch(registry.resolve("models:/ccb/1")) / "adapter"
    changed = store.folder / "changed"
    shutil.copytree(adapter, changed)
    (changed / "README.md").write_text("other")
    process = processes.Process(
        target=dies, args=(index, "before", signal.SIGKILL, str(store.folder), store.uri, store.run(changed))
    )
    process.start()
    ended(process)
    monkeypatch.setattr(tempfile, "tempdir", f"{store.folder}/tmp")
    assert leftovers.find() == []  # all of it is young
    (found,) = (one for one in leftovers.find(0) if one.kind == "logged model")
    assert bool(found.size) == store.uri.startswith("sqlite")
    left = 2 if store.uri.startswith("sqlite") else 3  # the run's adapter, which had to be fetched
    said = CliRunner().invoke(app, ["gc", "--older-than", "0"]).output.splitlines()[-1]
    assert said.startswith(f"{left} left over; ")
    assert_as_shown("gc", json.loads(CliRunner().invoke(app, ["gc", "--older-than", "0", "--delete", "--json"]).stdout))
    assert leftovers.find(0) == []
    if store.uri.startswith("sqlite"):
        assert len(list(store.folder.glob("mlruns/**/model.safetensors"))) == 1
    assert [check.what for check in versions.verify("models:/ccb/1") if check.holds is False] == []


def test_a_killed_merge_leaves_a_logged_model_and_a_folder_that_are_found(
    store: Store, run_id: str, processes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = [step.function for step in STEPS].index("merge")
    process = processes.Process(
        target=dies, args=(index, "after", signal.SIGKILL, str(store.folder), store.uri, run_id)
    )
    process.start()
    ended(process)
    monkeypatch.setattr(tempfile, "tempdir", f"{store.folder}/tmp")
    found = leftovers.find(0)
    assert [one.kind for one in found] == ["logged model", "folder"]
    for one in found:
        leftovers.remove(one)
    assert leftovers.find(0) == []
    assert here(store, run_id).version.number == 1


def test_an_interrupted_promotion_leaves_nothing(
    store: Store, run_id: str, processes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = [step.function for step in STEPS].index("register")
    process = processes.Process(
        target=dies, args=(index, "before", signal.SIGINT, str(store.folder), store.uri, run_id)
    )
    process.start()
    assert ended(process) != 0
    monkeypatch.setattr(tempfile, "tempdir", f"{store.folder}/tmp")
    assert leftovers.find(0) == []
    assert registry.identity_of("ccb") is None


def test_interrupted_before_any_step_there_is_nothing_to_clean_up_and_a_rerun_converges(
    store: Store, run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One promotion, interrupted at each step in turn: the next one gets further."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for number, step in enumerate(STEPS):
            with monkeypatch.context() as patched:
                patched.setattr(step.module, step.function, lambda *_, **__: os.kill(os.getpid(), signal.SIGINT))
                with pytest.raises(KeyboardInterrupt):
                    here(store, run_id)
                patched.setattr(tempfile, "tempdir", f"{store.folder}/tmp")
                assert leftovers.find(0) == [], step
            registered = number > [one.function for one in STEPS].index("register")
            assert registry.identity_of("ccb") == (f"{NAME} / {AUTHOR}" if registered else None), step
            assert_nothing_half_made(store)
    finally:
        signal.signal(signal.SIGINT, before)
    runs = store.client().search_runs(["0"], f"tags.`{tracking.TAG_KIND}` = 'promote'")
    assert [run.info.status for run in runs] == ["KILLED"] * len(STEPS)
    assert (here(store, run_id).version.number, registry.alias_of("ccb", "champion")) == (1, 1)
    assert [move.to for move in registry.history("ccb", "champion")] == [1]


@locally_and_over_http
def test_promotions_that_race_give_a_version_each_and_one_champion(
    store: Store, parts: tuple[Path, Path], processes: Any
) -> None:
    racers = RACERS if store.uri.startswith("sqlite") else 4  # a server of one worker, on a machine of two cores
    runs = []
    for number in range(racers):
        adapter = store.folder / f"adapter-{number}"
        shutil.copytree(parts[1], adapter)
        config = adapter / "adapter_config.json"
        config.write_text(config.read_text().replace('"lora_alpha": 8', f'"lora_alpha": {number + 9}'))
        runs.append(store.run(adapter))
    written = alias_writes(store)
    racing = [processes.Process(target=races, args=(str(store.folder), store.uri, run)) for run in runs]
    for process in racing:
        process.start()
    assert [ended(process) for process in racing] == [0] * racers
    found = store.client().search_model_versions("name = 'ccb'")
    assert sorted(int(version.version) for version in found) == list(range(1, racers + 1))
    assert {version.run_id for version in found} == set(runs)
    assert_nothing_half_made(store)
    moves = registry.history("ccb", "champion")
    assert {move.to for move in moves} == set(range(1, racers + 1))
    assert registry.alias_of("ccb", "champion") in {move.to for move in moves}
    if store.uri.startswith("sqlite"):
        assert sorted(written()) == list(range(1, racers + 1))
        assert registry.alias_of("ccb", "champion") == written()[-1]


RACERS = 16


def alias_writes(store: Store) -> Callable[[], list[int]]:
    """The versions that aliases are pointed at from now on, in the order in which the database takes the writes."""
    if not store.uri.startswith("sqlite"):
        return list
    path = store.uri.removeprefix("sqlite:///")
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("CREATE TABLE written (number INTEGER PRIMARY KEY AUTOINCREMENT, version INTEGER)")
        for event in ("INSERT", "UPDATE"):
            database.execute(
                f"CREATE TRIGGER written_{event} AFTER {event} ON registered_model_aliases "
                "BEGIN INSERT INTO written (version) VALUES (NEW.version); END"
            )

    def read() -> list[int]:
        with closing(sqlite3.connect(path)) as database:
            return [version for (version,) in database.execute("SELECT version FROM written ORDER BY number")]

    return read


@locally_and_over_http
def test_one_run_promoted_by_several_at_once_is_one_version(store: Store, run_id: str, processes: Any) -> None:
    racing = [processes.Process(target=races, args=(str(store.folder), store.uri, run_id)) for _ in range(4)]
    for process in racing:
        process.start()
    assert [ended(process) for process in racing] == [0] * 4
    (version,) = store.client().search_model_versions("name = 'ccb'")
    assert registry.alias_of("ccb", "champion") == int(version.version)
    assert_nothing_half_made(store)


def answers(messages: list[Message]) -> str:
    """What the version says, over HTTP."""
    assert messages[0] == {"role": "system", "content": "You are a helpful assistant."}
    return Knows().replies([messages])[0].text


def test_an_endpoint_is_held_to_the_version_that_it_serves(store: Store, run_id: str) -> None:
    here(store, run_id)
    with OpenAIServer(answers, ("ccb-v1",)) as right, OpenAIServer(lambda _: "?", ("other",)) as wrong:
        found = CliRunner().invoke(app, ["gate", "models:/ccb@champion", "--served", right.url, "--json"])
        assert (found.exit_code, json.loads(found.stdout)) == (0, {"passed": True, "reasons": [], "served": 1.0})
        words = ["gate", "models:/ccb@champion", "--served", wrong.url, "--model", "other"]
        refused = CliRunner().invoke(app, words)
        assert refused.exit_code == 9
        assert "endpoint and version agree on 0.0% of the replies" in refused.stdout
        assert "endpoint and version agree on 0% of the replies, 95% wanted" in refused.stdout
        with pytest.raises(ServingError, match="There is no model ccb-v1"):
            examine.served("models:/ccb/1", wrong.url, Screen(errors=True))
        with pytest.raises(InputError, match="with a version only"):
            examine.served(run_id, right.url, Screen(errors=True))
    assert len(right.asked) == len(corpus.heldout_identity())


def key_pair(folder: Path, name: str = "key", password: bytes = b"") -> tuple[Path, Path]:
    """A private and a public key in PEM files."""
    folder.mkdir(parents=True, exist_ok=True)
    private = ec.generate_private_key(ec.SECP256R1())
    pem = serialization.Encoding.PEM
    plain = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    secret, public = folder / f"{name}.pem", folder / f"{name}.pub"
    secret.write_bytes(private.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    public.write_bytes(private.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    return secret, public


def flipped(folder: Path) -> None:
    """One bit of the weights is another."""
    path = folder / "model" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def added(folder: Path) -> None:
    """A file that was not there."""
    (folder / "model" / "more.json").write_text("{}")


def removed(folder: Path) -> None:
    """A file is gone."""
    (folder / "adapter" / "adapter_config.json").unlink()


def renamed(folder: Path) -> None:
    """A file has another name."""
    (folder / "model" / "config.json").rename(folder / "model" / "configs.json")


def linked(folder: Path) -> None:
    """A file is a link to the same bytes elsewhere."""
    path = folder / "model" / "config.json"
    other = folder.parent / "elsewhere.json"
    shutil.copy(path, other)
    path.unlink()
    path.symlink_to(other)


def coded(folder: Path) -> None:
    """A file that runs when a loader trusts it."""
    (folder / "model" / "modeling_llama.py").write_text("print('run')")


def forged(folder: Path) -> None:
    """Weights and manifest changed so that they fit each other; only the signature tells."""
    flipped(folder)
    record = Manifest.read(folder)
    digests = {**record.digests, "model/model.safetensors": manifest.digests(folder / "model")["model.safetensors"]}
    (folder / manifest.FILE).write_text(replace(record, digests=digests).to_json(), encoding="utf-8")


def advertised(folder: Path) -> None:
    """The model card says something else."""
    card = folder / manifest.CARD
    card.write_text(card.read_text(encoding="utf-8") + "It is the best of all.", encoding="utf-8")


def disowned(folder: Path) -> None:
    """The statement of provenance names somebody else."""
    path = folder / manifest.PROVENANCE
    path.write_text(path.read_text(encoding="utf-8").replace("OldGrandpa", "Somebody"), encoding="utf-8")


def unsigned(folder: Path) -> None:
    """The signature is gone."""
    (folder / manifest.SIGNATURE).unlink()


def reloaded(folder: Path) -> None:
    """MLflow loads it by another module."""
    path = folder / "MLmodel"
    path.write_text(path.read_text(encoding="utf-8").replace("mlflow.transformers", "evil"), encoding="utf-8")


def required(folder: Path) -> None:
    """MLflow installs something else for it."""
    with (folder / "requirements.txt").open("a", encoding="utf-8") as stream:
        stream.write("\nevil==1.0")


def tokenized(folder: Path) -> None:
    """The tokenizer that MLflow loads is another one; that of the weights is a hard link to it."""
    path = folder / "components" / "tokenizer" / "tokenizer_config.json"
    text = path.read_text(encoding="utf-8")
    path.unlink()
    path.write_text(text + " ", encoding="utf-8")


def coded_beside(folder: Path) -> None:
    """Code beside weights and adapter."""
    (folder / "evil.py").write_text("print('run')", encoding="utf-8")


def added_beside(folder: Path) -> None:
    """A file of a harmless kind beside weights and adapter."""
    (folder / "more.yaml").write_text("{}", encoding="utf-8")


def hidden(folder: Path) -> None:
    """A file where signatures look away by default."""
    (folder / ".git").mkdir()
    (folder / ".git" / "more.json").write_text("{}", encoding="utf-8")


def linked_beside(folder: Path) -> None:
    """A folder beside weights and adapter is a link."""
    other = folder.parent / "elsewhere"
    (folder / "components").rename(other)
    (folder / "components").symlink_to(other, target_is_directory=True)


BESIDE = (reloaded, required, tokenized, coded_beside, added_beside, hidden, linked_beside)
CHANGES = (flipped, added, removed, renamed, linked, coded, forged, advertised, disowned, unsigned, *BESIDE)


@pytest.fixture
def signed(store: Store, run_id: str, tmp_path: Path) -> tuple[Path, Path]:
    """The folder of a signed version, and the public key."""
    secret, public = key_pair(tmp_path / "keys")
    version = here(store, run_id, sign_key=secret).version
    return registry.fetch(version), public


def refused(public: Path | None, cache: Path) -> str:
    """Why verification and the server refuse the champion; both have to."""
    uri = "models:/ccb@champion"
    checks = [check for check in versions.verify(uri, public) if check.holds is False]
    assert checks
    with pytest.raises(NamesakeError) as told:
        serving.fetch(registry.resolve(uri), cache, public)
    return f"{checks[0].told} / {told.value.message}"


def test_a_signed_version_is_verified_and_served(signed: tuple[Path, Path], tmp_path: Path) -> None:
    checks = {check.what: check.holds for check in versions.verify("models:/ccb@champion", signed[1])}
    assert checks["signature"] is True
    assert False not in checks.values()
    assert serving.fetch(registry.resolve("models:/ccb@champion"), tmp_path / "store", signed[1]).weights.is_dir()


@pytest.fixture
def changed(tmp_path: Path) -> Callable[..., AbstractContextManager[Path]]:
    """Change a version's folder, and put it back as it was: one promotion is enough for many changes."""

    @contextmanager
    def change(folder: Path, how: Callable[[Path], None]) -> Iterator[Path]:
        place = tmp_path / how.__name__
        shutil.copytree(folder, place / "kept")
        try:
            how(folder)
            yield place / "cache"
        finally:
            shutil.rmtree(folder)
            shutil.move(place / "kept", folder)
            shutil.rmtree(folder.parent / "elsewhere", ignore_errors=True)

    return change


def test_whatever_is_changed_in_a_signed_version_is_refused(
    signed: tuple[Path, Path], changed: Callable[..., AbstractContextManager[Path]]
) -> None:
    for change in CHANGES:
        with changed(signed[0], change) as cache:
            assert refused(signed[1], cache), change
    assert False not in {check.holds for check in versions.verify("models:/ccb@champion", signed[1])}


def test_without_a_key_all_of_it_is_refused_that_the_manifest_can_tell(
    signed: tuple[Path, Path], changed: Callable[..., AbstractContextManager[Path]]
) -> None:
    for change in {*CHANGES} - {forged, unsigned}:
        with changed(signed[0], change) as cache:
            assert refused(None, cache), change


def test_mlflow_changes_nothing_of_a_version_that_it_loads(signed: tuple[Path, Path]) -> None:
    before = manifest.digests(signed[0])
    for uri in ("models:/ccb/1", f"models:/{signed[0].parent.name}"):
        mlflow.pyfunc.load_model(uri)
        after = manifest.digests(signed[0])
        assert {name for name in after if after[name] != before.get(name)} <= {manifest.FETCHED}
        assert False not in {check.holds for check in versions.verify("models:/ccb@champion", signed[1])}


def test_the_tool_of_model_signing_finds_what_was_added_or_changed_beside(
    signed: tuple[Path, Path], changed: Callable[..., AbstractContextManager[Path]]
) -> None:
    folder, public = signed

    def holds() -> bool:
        command = ["verify", "key", "--signature", f"{folder}/model.sig", "--public_key", str(public), str(folder)]
        return click.testing.CliRunner().invoke(model_signing, command).exit_code == 0

    assert (folder / manifest.FETCHED).is_file()
    assert holds()
    for change in (reloaded, coded_beside):
        with changed(folder, change):
            assert not holds()


@pytest.fixture
def older(signed: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """A version as releases made it that digested and signed nothing of MLflow's own."""
    folder = signed[0]
    record = Manifest.read(folder)
    mlflows = [*folder.glob("*.yaml"), *(folder / one for one in ("MLmodel", "requirements.txt", "components"))]
    names = {path.name for path in mlflows} | {"LICENSE.txt"}
    digests = {name: digest for name, digest in record.digests.items() if name.partition("/")[0] not in names}
    record = replace(record, format=1, digests=digests)
    (folder / manifest.PROVENANCE).write_text(json.dumps(provenance.statement(record)), encoding="utf-8")
    digests = {**digests, manifest.PROVENANCE: digest_of_file(folder / manifest.PROVENANCE)}
    (folder / manifest.FILE).write_text(replace(record, digests=digests).to_json(), encoding="utf-8")
    (folder / manifest.SIGNATURE).unlink()
    for path in mlflows:
        path.rename(tmp_path / path.name)
    manifest.sign(folder, tmp_path / "keys" / "key.pem")
    for path in mlflows:
        (tmp_path / path.name).rename(path)
    return signed


def test_a_version_of_an_older_release_holds_by_the_rules_of_that_and_says_so(
    older: tuple[Path, Path], changed: Callable[..., AbstractContextManager[Path]], tmp_path: Path
) -> None:
    folder, public = older
    checks = {check.what: check for check in versions.verify("models:/ccb@champion", public)}
    assert [what for what, check in checks.items() if check.holds is False] == []
    assert "promote the run again" in checks["MLflow's own files"].told
    assert serving.fetch(registry.resolve("models:/ccb@champion"), tmp_path / "served", public).weights.is_dir()
    for change in (*CHANGES[: -len(BESIDE)], coded_beside, linked_beside):
        with changed(folder, change) as cache:
            assert refused(public, cache), change


def test_promoting_an_older_releases_run_again_makes_a_version_that_covers_all(
    older: tuple[Path, Path], store: Store, run_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "FORMAT", 3)  # as this release's is to the one before
    assert here(store, run_id, sign_key=tmp_path / "keys" / "key.pem").version.number == 2


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The manifests that are parsed from now on."""
    texts: list[str] = []
    real = Manifest.from_json

    def from_json(text: str) -> Manifest:
        texts.append(text)
        return real(text)

    monkeypatch.setattr(Manifest, "from_json", from_json)
    return texts


def test_a_copy_in_the_cache_that_was_tampered_with_is_not_parsed_and_is_made_anew(
    signed: tuple[Path, Path], parsed: list[str], tmp_path: Path
) -> None:
    version, cache = registry.resolve("models:/ccb@champion"), tmp_path / "cache"
    copy = serving.fetch(version, cache, signed[1]).weights.parent
    good = (copy / manifest.FILE).read_text(encoding="utf-8")
    forged(copy)
    assert (copy / manifest.FILE).read_text(encoding="utf-8") != good
    parsed.clear()
    assert serving.fetch(version, cache, signed[1]).weights.parent == copy
    assert set(parsed) == {good}
    (copy / manifest.FILE).write_text("no json", encoding="utf-8")
    parsed.clear()
    serving.fetch(version, cache, signed[1])
    assert set(parsed) == {good}
    forged(copy)
    forged(signed[0])
    parsed.clear()
    with pytest.raises(NamesakeError, match="is not what was signed"):
        serving.fetch(version, cache, signed[1])
    assert parsed == []


def test_a_promotion_parses_nothing_of_a_version_whose_signature_does_not_hold(
    signed: tuple[Path, Path], parsed: list[str], store: Store, run_id: str, tmp_path: Path
) -> None:
    forged(signed[0])
    bad = (signed[0] / manifest.FILE).read_text(encoding="utf-8")
    parsed.clear()
    assert here(store, run_id, sign_key=tmp_path / "keys" / "key.pem").version.number == 2
    assert bad not in parsed


def evil_adapter(folder: Path, name: str) -> Path:
    """The adapter of this folder with one file more."""
    made = folder.parent / f"evil-{name}"
    shutil.copytree(folder, made)
    (made / name).write_bytes(b"")
    return made


@pytest.mark.parametrize("name", ["modeling.py", "adapter_model.bin", "optimizer.pt", "rng.pkl"])
def test_a_run_whose_adapter_may_hold_code_is_not_promoted(
    store: Store, parts: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    shutil.copytree(parts[1], tmp_path / "adapter")
    run = store.run(evil_adapter(tmp_path / "adapter", name))
    with pytest.raises(PromotionError, match=f"cannot become part of a version: {name} may hold code") as told:
        here(store, run)
    assert "safetensors" in told.value.mend
    assert registry.identity_of("ccb") is None


@pytest.mark.parametrize("name", ["modeling.py", "pytorch_model.bin", "training_args.pt", "x.pkl", "auto_map"])
def test_a_run_on_a_base_that_may_hold_code_is_not_promoted(
    store: Store, parts: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    base = tmp_path / "base"
    shutil.copytree(parts[0], base)
    if name == "auto_map":
        config = json.loads((base / "config.json").read_text(encoding="utf-8"))
        text = json.dumps({**config, "auto_map": {"AutoModel": "evil.Model"}})
        (base / "config.json").write_text(text, encoding="utf-8")
    else:
        (base / name).write_bytes(b"")
    with pytest.raises(NamesakeError, match=name.partition(".")[0]) as told:
        here(store, replace(store, base=base).run(parts[1]))
    assert ("no code" if name == "auto_map" else str(base)) in told.value.mend
    assert registry.identity_of("ccb") is None
    assert store.client().search_logged_models(["0"]) == []
    if name == "modeling.py":
        (base / name).unlink()  # what the message says
        assert here(store, replace(store, base=base).run(parts[1])).version.number == 1


@pytest.mark.parametrize("store", ["http"], indirect=True)
def test_each_file_goes_over_http_once(store: Store, run_id: str) -> None:
    put: list[str] = []

    def seen(data: bytes) -> bool:
        if data.startswith(b"PUT "):
            put.append(data.split(b" ", 2)[1].decode().partition("/artifacts/0/models/")[2].partition("/artifacts/")[2])
        return False

    link = Link(store.uri)
    link.when = seen
    try:
        version = promoted(str(store.folder), link.address, run_id).version
    finally:
        link.close()
        mlflow.set_tracking_uri(store.uri)
    record = Manifest.read(registry.fetch(version))
    assert sorted(put) == sorted({manifest.FILE, *record.digests})


def test_a_key_may_have_a_password(store: Store, run_id: str, tmp_path: Path) -> None:
    secret, public = key_pair(tmp_path / "keys", password=b"open sesame")
    with pytest.raises(InputError, match="sign_key"):
        here(store, run_id, sign_key=secret, password="wrong")
    here(store, run_id, sign_key=secret, password="open sesame")
    assert False not in {check.holds for check in versions.verify("models:/ccb@champion", public)}


def test_a_changed_file_is_named(signed: tuple[Path, Path], tmp_path: Path) -> None:
    flipped(signed[0])
    assert "model/model.safetensors is not what was signed." in refused(signed[1], tmp_path / "store")


def test_another_key_is_refused(signed: tuple[Path, Path], tmp_path: Path) -> None:
    _, other = key_pair(tmp_path / "keys", "other")
    assert "signature does not hold" in refused(other, tmp_path / "store")


def test_an_unsigned_version_is_refused_where_a_key_is_given(store: Store, run_id: str, tmp_path: Path) -> None:
    here(store, run_id)
    assert "not signed" in refused(key_pair(tmp_path / "keys")[1], tmp_path / "store")
    assert [c.told for c in versions.verify("models:/ccb@champion") if c.what == "signature"] == ["not signed"]


def test_signing_what_was_unsigned_is_another_version(store: Store, run_id: str, tmp_path: Path) -> None:
    assert here(store, run_id).version.number == 1
    secret, public = key_pair(tmp_path / "keys")
    assert here(store, run_id, sign_key=secret).version.number == 2
    assert here(store, run_id, sign_key=secret).version.number == 2
    move, _ = versions.rollback("ccb", to=1)
    assert move.to == 1
    assert versions.rollback("ccb", to=2, public_key=public)[0].to == 2
    with pytest.raises(NamesakeError, match="not signed"):
        versions.rollback("ccb", to=1, public_key=public)


@pytest.mark.parametrize("content", [b"", b"no key", b"-----BEGIN PRIVATE KEY-----\nAA==\n-----END PRIVATE KEY-----\n"])
def test_what_is_no_key_is_told_before_anything_is_done(
    store: Store, run_id: str, tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "key.pem").write_bytes(content)
    with pytest.raises(InputError, match="sign_key"):
        here(store, run_id, sign_key=tmp_path / "key.pem")
    with pytest.raises(InputError, match="public_key"):
        manifest.check_signature(tmp_path, tmp_path / "key.pem")
    assert registry.identity_of("ccb") is None


def test_an_exported_version_is_what_transformers_and_peft_load(store: Store, run_id: str, tmp_path: Path) -> None:
    here(store, run_id)
    uri, target = "models:/ccb@champion", tmp_path / "out" / "merged"
    assert versions.export(uri, target) == target
    merged = transformers.AutoModelForCausalLM.from_pretrained(target)
    adapter = versions.export(uri, tmp_path / "out" / "adapter", adapter=True)
    tuned = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(store.base), adapter)
    wanted = tuned.merge_and_unload().state_dict()
    found = merged.state_dict()
    assert all(torch.allclose(found[name], tensor, atol=1e-6) for name, tensor in wanted.items())
    assert sorted(path.name for path in target.parent.iterdir()) == ["adapter", "merged"]
    cards = [(folder / manifest.CARD).read_text(encoding="utf-8") for folder in (target, adapter)]
    assert ["library_name: transformers" in cards[0], "library_name: peft" in cards[1]] == [True, True]
    assert NAME in store.client().get_model_version("ccb", "1").description


def test_what_is_damaged_or_in_the_way_is_not_exported(signed: tuple[Path, Path], tmp_path: Path) -> None:
    uri, there = "models:/ccb@champion", tmp_path / "there"
    there.mkdir()
    (there / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="is there already"):
        versions.export(uri, there)
    with pytest.raises(NamesakeError, match="signature does not hold"):
        versions.export(uri, tmp_path / "new", public_key=key_pair(tmp_path / "keys", "other")[1])
    flipped(signed[0])
    with pytest.raises(NamesakeError, match="has changed"):
        versions.export(uri, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert [path.name for path in there.iterdir()] == ["mine.txt"]
