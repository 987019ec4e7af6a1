"""The use cases over versions that exist: history, rollback, verify, export.

All of them read what MLflow and the version itself hold; only ``rollback`` writes there: the alias, and the history.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from namesake import base_model, corpus, dataset, model_card, provenance, registry, tracking
from namesake.errors import InputError, NamesakeError, PromotionError, RegistryError
from namesake.manifest import (
    ADAPTER_FOLDER,
    CARD,
    FILE,
    PROVENANCE,
    SIGNATURE,
    UNKNOWN,
    WEIGHTS_FOLDER,
    Manifest,
    check_signature,
    damaged,
    digests,
    strange,
)
from namesake.messages import Message, joined, tr
from namesake.paths import digest_of_file
from namesake.registry import CHAMPION, SCORE, Move, Version


@dataclass(frozen=True)
class Check:
    """One thing that was looked at; ``holds`` is none where it could not be looked at here, as ``told`` says."""

    what: str
    holds: bool | None
    told: str = ""


def champions_scores(
    name: str, run_id: str, questions: str, warn: Callable[[Message], None] | None = None
) -> dict[str, float] | None:
    """The present champion's scores on the same questions; none where there is no champion, or it is this very run's,
    or it was judged by others, which is told.

    Args:
        name: the registered model.
        questions: digest of what was asked.
        warn: told why there is nothing to compare with.

    Raises:
        RegistryError: the registry does not answer.
    """
    champion = registry.champion_beside(name, run_id) if name else None
    if champion is None:
        return None
    if champion.tags.get(registry.TAG_QUESTIONS) != questions:
        if warn is not None:
            warn(tr("the champion {uri} was judged by other questions: not compared with it", uri=champion.uri))
        return None
    return champion.scores


def contradicted(version: Version, record: Manifest) -> list[Message]:
    """What the version's tags state otherwise than its manifest: that lies in the artifact store and they in the
    database, and one alone is not believed.
    """
    stated = {f"{SCORE}{metric}": f"{value:.4f}" for metric, value in record.scores.items()}
    if any(stated.get(tag, value) != value for tag, value in version.tags.items()):
        return [tr("{file} and the tags state other scores", file=FILE)]
    return []


def point(version: Version, alias: str, *, how: str, why: str) -> Move:
    """Move the alias to the version and keep the move.

    Raises:
        RegistryError: MLflow failed; a move that is not in the history yet is written when the follower sees it.
    """
    before = registry.alias_of(version.name, alias)
    registry.point(version.name, alias, version.number)
    if before == version.number:
        # It may have been moved by a process that died before it wrote that down.
        moves = registry.recent(version.name, alias)
        before = moves[-1].to if moves else None
    move = Move(time.time(), alias, before, version.number, who(), how, why, scores=version.scores)
    if before != version.number:
        registry.record_move(version.name, move)
    return move


def rollback(
    name: str, *, to: int | None = None, alias: str = CHAMPION, why: str = "", public_key: Path | None = None
) -> tuple[Move, list[Check]]:
    """Point the alias back at the version before, or at ``to``, once its files are what its manifest says (and, with a
    public key, its signature).

    Raises:
        PromotionError: there is nothing to go back to, that version is damaged or never passed the gate, or somebody
            else moved the alias meanwhile.
        RegistryError: MLflow failed.
    """
    now = registry.alias_of(name, alias)
    number = to if to is not None else _before(name, alias, now)
    if number == now:
        raise PromotionError(
            tr("{alias} of {name} points at version {number} already.", alias=alias, name=name, number=number),
            mend="Give another one: --to N.",
        )
    version = registry.resolve(f"models:/{name}/{number}")
    checks = list(_files(version, public_key=public_key))
    faults = [tr("{what}: {told}", what=check.what, told=check.told) for check in checks if check.holds is False]
    if faults:
        raise PromotionError(
            tr("{uri} is damaged: {faults}.", uri=version.uri, faults=joined(faults)), mend="Give another one: --to N."
        )
    verdict = version.tags.get(tracking.TAG_GATE, "")
    if not verdict.startswith("passed") and registry.TAG_OVERRIDE not in version.tags:
        raise PromotionError(
            tr("{uri} did not pass the gate ({verdict}).", uri=version.uri, verdict=verdict or "it was never judged"),
            mend='Promote its run with --override "reason" first.',
        )
    if (there := registry.alias_of(name, alias)) != now:  # checking may take minutes
        raise PromotionError(
            tr(
                "{alias} of {name} was moved to {there} meanwhile; it stays there.", alias=alias, name=name, there=there
            ),
            mend=tr("Look at `namesake history`. To move it all the same: --to {number}.", number=number),
        )
    try:
        return point(version, alias, how="rollback", why=why), checks
    except RegistryError as error:
        # The alias may have moved: asked again for the version before, that would be one further back.
        again = tr("Check that MLFLOW_TRACKING_URI answers, then roll back --to {number}.", number=number)
        raise RegistryError(error.message, mend=again) from error


def verify(uri: str, public_key: Path | None = None) -> list[Check]:
    """Work out again every digest that a version states, and compare; with a public key, check its signature too.

    Raises:
        InputError, RegistryError: there is no such version.
    """
    return list(_verify(registry.resolve(uri), public_key))


def export(uri: str, target: Path, *, adapter: bool = False, public_key: Path | None = None) -> Path:
    """Copy a version's merged model, or its adapter, into a new folder in Hugging Face layout, once it is checked.

    The model card and the statement of provenance go along, where the version has them.

    Raises:
        InputError: the folder is there already, or there is no such version.
        PromotionError: the version is damaged or not signed by the key; nothing is written.
        RegistryError: MLflow failed.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError("folder", str(target), "is there already", mend="Give a new or an empty folder.")
    version = registry.resolve(uri)
    folder = checked(version, public_key=public_key)
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as part:
        whole = Path(part) / "whole"
        shutil.copytree(folder / (ADAPTER_FOLDER if adapter else WEIGHTS_FOLDER), whole)
        record = Manifest.read(folder)
        if {CARD, PROVENANCE} <= set(record.digests):  # what the manifest does not name may be anybody's
            shutil.copy(folder / PROVENANCE, whole)
            card = model_card.card(record, adapter=True) if adapter else (folder / CARD).read_text("utf-8")
            (whole / CARD).write_text(card, encoding="utf-8")
        with suppress(OSError):  # a mount, or a link to a folder, stays and is filled
            target.rmdir()
        if target.is_dir():
            for path in whole.iterdir():
                shutil.move(path, target)
        else:
            whole.rename(target)
    return target


def checked(version: Version, public_key: Path | None = None) -> Path:
    """The folder of a version, once its files are what its manifest says (and, with a public key, its signature).

    Raises:
        PromotionError: it is damaged or not signed by the key.
        RegistryError: MLflow failed.
    """
    folder = registry.fetch(version)
    faults = [c.told for c in _files(version, folder, public_key=public_key) if c.holds is False]
    if faults:
        raise PromotionError(
            tr("{uri} is damaged: {faults}.", uri=version.uri, faults=joined(faults)), mend="Give another version."
        )
    return folder


def who() -> str:
    """Who is at work, as far as known."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # no entry for the user, as in many containers
        return ""


def _before(name: str, alias: str, now: int | None) -> int:
    recent = registry.recent(name, alias)
    if recent and recent[-1].to == now and recent[-1].before is not None:
        return recent[-1].before
    for move in reversed(registry.history(name, alias)):  # some of the last ones are missing
        if move.to == now and move.before is not None:
            return move.before
    raise PromotionError(
        tr("The history of {name} knows no version before {now}.", name=name, now=now),
        mend="Give the version to go back to: --to N.",
    )


def _verify(version: Version, public_key: Path | None) -> Iterator[Check]:
    folder = registry.fetch(version)
    checks = list(_files(version, folder, public_key=public_key))
    yield from checks
    if any(check.what in {"signature", "manifest"} and check.holds is False for check in checks):
        return
    record = Manifest.read(folder)
    try:
        run = tracking.get_run(record.run)
    except NamesakeError as error:
        yield Check("training run", None, error.message)
        return
    yield Check("training run", True, run.name)
    told = tr("{run_id} and {run}", run_id=version.run_id, run=record.run)
    yield Check("version's run", version.run_id == record.run, told)
    for what, digest, kept in (
        ("data digest, version and run", record.data.get("digest", ""), "data.digest"),
        ("base digest, version and run", record.base.get("digest", ""), "base.digest"),
    ):
        if kept in run.params:
            yield _same(what, digest, run.params[kept])
    yield _provenance(folder, record)
    yield from _recomputed(
        "adapter of the run",
        _digest_of_adapter(record.digests),
        lambda: _digest_of_adapter({f"{ADAPTER_FOLDER}/{k}": v for k, v in digests(_adapter_of(run.id)).items()}),
    )
    data = record.data
    yield from _recomputed("training data", data.get("digest", ""), lambda: digest_of_file(_rows_of(run.id)))
    if "replay_digest" in data:
        yield from _recomputed(
            "replay rows", data["replay_digest"], lambda: dataset.replay_digest(_rows_of(run.id)) or "none"
        )
    yield from _recomputed("base model here", record.base.get("digest", ""), lambda: _base_digest(record))
    commit = record.tools.get("namesake_commit", "")
    for what, stated, here in (
        (tr("corpus here"), data.get("corpus_digest"), corpus.corpus_digest()),
        (tr("questions here"), record.questions, corpus.heldout(record.scores.get("held_out", 1.0)).digest()),
    ):
        if stated and stated != here:
            others = tr(
                "this release has others; that needs Namesake at commit {commit}", commit=commit or tr("unknown")
            )
            yield Check(what, None, others)
        elif stated:
            yield Check(what, True, stated[:16])
    if commit:
        yield Check("commit of Namesake", None, tr("needs a clone of Namesake that has {commit}", commit=commit))


def _provenance(folder: Path, record: Manifest) -> Check:
    if PROVENANCE not in record.digests:
        older = tr("made by a release that wrote no {file}; promote the run again", file=PROVENANCE)
        return Check("provenance", None, older)
    try:
        faults = provenance.faults(json.loads((folder / PROVENANCE).read_text(encoding="utf-8")), record)
    except ValueError as error:
        return Check("provenance", None, error.args[0] if isinstance(error.args[0], Message) else str(error))
    return Check("provenance", not faults, joined(faults[:5]) if faults else "says what the manifest says")


def _recomputed(what: str, stated: str, found: Callable[[], str]) -> Iterator[Check]:
    """Work a digest out, or say what that would need."""
    if stated == UNKNOWN:
        yield Check(what, None, "unknown: the checkpoint was made elsewhere and imported")
        return
    try:
        yield _same(what, stated, found())
    except NamesakeError as error:
        yield Check(what, None, joined(filter(None, (error.message, error.mend)), " "))


def _adapter_of(run_id: str) -> Path:
    return tracking.fetch(run_id, tracking.ADAPTER)


def _rows_of(run_id: str) -> Path:
    return tracking.fetch(run_id, "data/train.jsonl")


def _digest_of_adapter(files: Mapping[str, str]) -> str:
    own = {name: digest for name, digest in files.items() if name.startswith(f"{ADAPTER_FOLDER}/")}
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()


def _base_digest(record: Manifest) -> str:
    if record.base.get("source") == "embedded":
        return base_model.digest_of_folder(base_model.embedded(lambda _: None))
    return base_model.resolve(record.base["id"]).digest()


def _files(version: Version, folder: Path | None = None, *, public_key: Path | None = None) -> Iterator[Check]:
    folder = folder or registry.fetch(version)
    if public_key:
        try:
            check_signature(folder, public_key)
        except RegistryError as error:
            yield Check("signature", False, error.message)
            return
        yield Check("signature", True, tr("by the key {name}", name=public_key.name))
    else:
        signed = (folder / SIGNATURE).is_file()
        yield Check("signature", None, "signed; give --public-key to check it" if signed else "not signed")
    try:
        record = Manifest.read(folder)
    except RegistryError as error:
        yield Check("manifest", False, error.message)
        return
    yield Check("manifest", True, tr("{file}, {count} files", file=FILE, count=len(record.digests)))
    faults = damaged(folder, record.digests)
    yield Check("files", not faults, joined(faults[:5]) if faults else "every digest is right")
    faults = strange(folder, record)
    yield Check("nothing else", not faults, joined(faults[:5]) if faults else "no further file, no code")
    others = contradicted(version, record)
    yield Check("scores, version and tags", not others, joined(others) if others else "the same")
    if record.format == 1:
        older = tr("made by a release that neither digested nor signed them; promote the run again")
        yield Check("MLflow's own files", None, older)


def _same(what: str, stated: str, found: str) -> Check:
    differ = tr("stated {stated}, found {found}", stated=stated[:16], found=found[:16])
    return Check(what, stated == found, stated[:16] if stated == found else differ)
