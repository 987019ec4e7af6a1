"""The use case ``namesake promote``: the best run becomes the next version, proved before it ships.

choose → merge → compare and score → gate → sign → log → check what was logged → register → alias. Nothing is visible in
the registry before the merged model has been scored and lies in the store whole; the alias is moved last. Each step is
safe to repeat: promoting the same run under the same policy again gives the same version, without merging or asking
again.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from namesake import corpus, gate, manifest, merge, model_card, probing, provenance, registry, tracking
from namesake.base_model import BaseModel
from namesake.corpus import Questions
from namesake.errors import PromotionError, RegistryError, said
from namesake.gate import Policy
from namesake.generate import LocalModel
from namesake.identity import Identity
from namesake.manifest import ADAPTER_FOLDER, CARD, FILE, PROVENANCE, SCORECARD, WEIGHTS_FOLDER, Golden, Manifest
from namesake.messages import joined, tr
from namesake.paths import digest_of_file, link_or_copy, temporary
from namesake.probing import Scorecard
from namesake.registry import CHAMPION, SCORE, TAG_KEY, TAG_QUESTIONS, Version
from namesake.run import DEV_SCORE, ability_of, base_of, base_scores, git_commit, progress_of
from namesake.terminal import Screen
from namesake.tracking import RunRecord
from namesake.versions import champions_scores, contradicted, point, who

_FULL = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT), "database or disk is full")
"""What the system and SQLite say of a full disk."""

_SHOWN_SCORES = ("identity", "name", "author", "swapped", "old_identity", "placeholder", "language", "leak", "plain")


@dataclass(frozen=True)
class Request:
    """What the user asked for.

    Attributes:
        run: a run's id; empty for the best one.
        name: name whose runs are looked at (``踩踩背 CCB``), those by the author of the newest one; empty for that of
            the newest finished run.
        model_name: registered model; empty for the identity's slug.
        alias: alias that is pointed at the version when the gate passes.
        override: reason to point it there although the gate does not pass.
        policy: the gate's bounds.
        sign_key: PEM file of the private key that signs the version; none leaves it unsigned.
        password: the key's password.
    """

    run: str = ""
    name: str = ""
    model_name: str = ""
    alias: str = CHAMPION
    override: str = ""
    policy: Policy = field(default_factory=Policy)
    sign_key: Path | None = None
    password: str = ""


@dataclass(frozen=True)
class Outcome:
    """The version, and whether the alias points at it now."""

    version: Version
    decision: gate.Decision
    pointed: bool


def choose(runs: Iterable[RunRecord]) -> RunRecord | None:
    """The best run: by the share of held-out questions asked, then identity right, then least leak, then validation
    loss, then the newer one.

    Of a sweep's trials only the best by the development questions is looked at: the best of many by the held-out ones
    would be chosen on the very questions that the gate asks. A run whose training data nobody kept is left to be named:
    it may have seen those questions.
    """
    candidates: list[RunRecord] = []
    sweeps: dict[str, RunRecord] = {}
    for run in runs:
        if "probe/identity" not in run.metrics or run.params.get("data.digest") == manifest.UNKNOWN:
            continue
        if DEV_SCORE not in run.metrics or tracking.TAG_PARENT not in run.tags:
            candidates.append(run)
            continue
        best = sweeps.setdefault(run.tags[tracking.TAG_PARENT], run)
        if (run.metrics[DEV_SCORE], -run.ended) > (best.metrics[DEV_SCORE], -best.ended):
            sweeps[run.tags[tracking.TAG_PARENT]] = run
    candidates += sweeps.values()
    return min(
        candidates,
        key=lambda run: (
            -run.metrics.get("probe/held_out", 1.0),
            -run.metrics["probe/identity"],
            run.metrics.get("probe/leak", 1.0),
            loss if (loss := run.metrics.get("eval/loss", math.inf)) == loss else math.inf,  # not a number: last
            -run.ended,
        ),
        default=None,
    )


@contextmanager
def _told_when_full() -> Iterator[None]:
    """A full disk stops whoever comes to write next: merge, copy, MLflow or its database. It is told as what it is."""
    try:
        yield
    except Exception as error:
        if not any(sign in str(error) for sign in _FULL):
            raise
        many = isinstance(error, shutil.Error)  # of a whole folder: one for each file
        raise PromotionError(
            tr("There is no room left ({error}).", error=error.args[0][0][2] if many else said(error)),
            mend="Make room, then promote again: what is not whole is deleted, what is whole is taken.",
        ) from error


@_told_when_full()
def promote(request: Request, screen: Screen) -> Outcome:
    """Make a version of a run and, where it passes the gate, point the alias at it.

    Raises:
        InputError: the key is none that can sign.
        PromotionError: there is no run to promote, the registered model stands for another identity, the disk is full,
            or the artifact store did not keep what it was given.
        BaseModelError: the base that the run was trained on cannot be had here.
        RegistryError, TrackingError: MLflow failed; nothing half made is left in the registry.
    """
    signer = manifest.public_key_of(request.sign_key, request.password) if request.sign_key else ""
    with tracking.run("promote", system_metrics=False) as tracked:
        run = _find(request)
        identity = Identity.parse(run.params["identity.name"], run.params["identity.author"])
        name = request.model_name or identity.slug
        registry.check_owner(name, registry.identity_of(name), str(identity), PromotionError)
        screen.step(tr("promoting {run} ({id}) to {name}", run=run.name, id=run.id, name=name))
        tracked.tags({tracking.TAG_KIND: "promote", tracking.TAG_SLUG: identity.slug, "namesake.promoted": run.id})
        adapter = tracking.fetch(run.id, tracking.ADAPTER)
        if code := manifest.code_in(adapter):
            raise PromotionError(
                tr(
                    "The adapter of run {run} cannot become part of a version: {faults}.",
                    run=run.id,
                    faults=joined(code[:5]),
                ),
                mend="A version holds safetensors, tokenizer, template and text. Remove the rest from the run's files.",
            )
        questions = corpus.heldout(_share(run))
        key = promotion_key(adapter, run.params["base.digest"], request.policy, signer, questions)
        made = _made_before(name, key, signer, screen)
        if made:
            screen.line(tr("  this run is version {number} already", number=made[0].number))
        version, record = made or _make(
            request, name, identity, run, questions, adapter, key, signer, tracked.id, screen
        )
        champion = champions_scores(name, run.id, questions.digest(), screen.warn)
        decision = gate.decide_kept(record.scores, champion=champion, policy=request.policy)
        tracked.metrics({f"probe/{k}": v for k, v in record.scores.items()})
        # A champion that came since may be better, and a person may have a reason now: a version found again says so.
        # But a pass is kept: `rollback` goes back to what was good enough once.
        if decision.passed or not version.tags.get(tracking.TAG_GATE, "").startswith("passed"):
            registry.tag(version, tracking.TAG_GATE, decision.told)
        override = "" if decision.passed else request.override
        if override:
            registry.tag(version, registry.TAG_OVERRIDE, override)
        pointed = decision.passed or bool(override)
        if pointed:
            point(version, request.alias, how="promote", why=override or "gate passed")
        tracked.tags({"namesake.version": version.uri, tracking.TAG_GATE: decision.told})
    _show(version, decision, record, pointed, request, screen)
    return Outcome(version, decision, pointed)


def promotion_key(
    adapter: Path, base_digest: str, policy: Policy, signer: str = "", questions: Questions | None = None
) -> str:
    """The digest that one promotion is known by: adapter, base, what is asked (none: all held-out questions), the
    bounds, the signer's key, and what a manifest covers: a release that covers more makes another version.
    """
    questions = questions or corpus.heldout()
    asked = [manifest.digests(adapter), base_digest, questions.digest(), vars(policy), signer, manifest.FORMAT]
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def _made_before(
    name: str, key: str, signer: str, screen: Screen, than: Version | None = None
) -> tuple[Version, Manifest] | None:
    """The first version that promoting the same has made, if there is one that is still what its manifest, its tags and
    (with the public key of a signer) its signature say; with ``than``, only of those before that one.
    """
    if registry.identity_of(name) is None:
        return None
    for version in registry.promoted_as(name, key):
        if than is not None and version.number >= than.number:
            break
        try:
            folder = registry.fetch(version)
            if signer:  # before anything is parsed
                with tempfile.NamedTemporaryFile("w", suffix=".pub") as public_key:
                    public_key.write(signer)
                    public_key.flush()
                    manifest.check_signature(folder, Path(public_key.name))
            record = Manifest.read(folder)
            faults = [*manifest.damaged(folder, record.digests), *manifest.strange(folder, record)]
            faults += contradicted(version, record)
        except RegistryError as error:
            faults = [error.message]
        if version.status == "READY" and not faults:
            return version, record
        screen.warn(
            tr("{uri} is not taken again: {faults}", uri=version.uri, faults=joined(faults[:3]) or version.status)
        )
    return None


def _make(
    request: Request,
    name: str,
    identity: Identity,
    run: RunRecord,
    questions: Questions,
    adapter: Path,
    key: str,
    signer: str,
    promotion: str,
    screen: Screen,
) -> tuple[Version, Manifest]:
    """Merge, score, log and register; the alias stays where it is."""
    base = base_of(run, screen)
    if base.code:
        raise PromotionError(
            tr(
                "The base model {base} has files that may hold code: {files}.",
                base=base.id,
                files=joined(base.code[:5], ", "),
            ),
            mend=tr(
                "Remove them from {folder}: safetensors are enough, and the base's digest stays.", folder=base.path
            ),
        )
    system = run.params.get("sft.system")
    before = base_scores(identity, base, run.params["base.digest"], system, questions, screen)
    with tempfile.TemporaryDirectory(prefix=temporary("promote")) as spare:
        model = tracking.start_chat_model(Path(spare), {TAG_KEY: key})
        with tracking.dropped_on_failure(model.uri):
            merged = model.folder / WEIGHTS_FOLDER
            made = merge.merge(base.path, adapter, merged, system=system)
            screen.line(tr("  merged ({way})", way=made.way))
            parity, card = _compare(identity, base, adapter, merged, system, questions, screen)
            scores = {**card.metrics, **ability_of(before, card).metrics(), **parity, "held_out": _share(run)}
            champion = champions_scores(name, run.id, questions.digest())
            decision = gate.decide_kept(scores, champion=champion, policy=request.policy)
            shutil.copytree(adapter, model.folder / ADAPTER_FOLDER, copy_function=link_or_copy)
            tracking.add_flavor(model, WEIGHTS_FOLDER)
            digests = manifest.digests(model.folder, {f"{WEIGHTS_FOLDER}/{k}": v for k, v in made.digests.items()})
            record = _record(
                request, name, identity, run, promotion, digests, scores, decision, questions, golden(card)
            )
            record = write_beside(model.folder, record, card)
            if request.sign_key:
                manifest.sign(model.folder, request.sign_key, request.password)
            unsigned = tr("logging the merged model, not signed (no --sign-key)")
            screen.step("logging the merged model, signed" if request.sign_key else unsigned)
            tags = {  # in the order in which MLflow's list of versions shows them
                tracking.TAG_GATE: decision.told,
                **{f"{SCORE}{metric}": f"{scores[metric]:.4f}" for metric in _SHOWN_SCORES},
                tracking.TAG_NAME: str(identity.name),
                tracking.TAG_AUTHOR: str(identity.author),
                tracking.TAG_BASE: base.id,
                "namesake.data_digest": run.params["data.digest"],
                TAG_QUESTIONS: questions.digest(),
                **registry.tag_of_promotion(key),
            }
            tracking.finish_chat_model(model, tags=tags)
            kept = tracking.fetch_model(model.uri)
            faults = [*manifest.damaged(kept, record.digests), *manifest.strange(kept, record)]
            if faults:
                raise PromotionError(
                    tr("What the artifact store holds is not what was logged: {faults}.", faults=joined(faults[:3])),
                    mend="Check the store and promote again; no version was made.",
                )
            version = registry.register(
                name,
                model.uri,
                run_id=run.id,
                identity=str(identity),
                tags=tags,
                description=_description(record, run),
            )
    first = _made_before(name, key, signer, screen, than=version)
    if first:  # somebody promoted the same meanwhile
        registry.delete(version)
    return first or (version, record)


def _find(request: Request) -> RunRecord:
    if request.run:
        run = tracking.get_run(request.run)
        ended = run.status == "FINISHED" and "probe/identity" in run.metrics
        if run.tags.get(tracking.TAG_KIND) != "train" or not ended:
            raise PromotionError(
                tr("Run {run} is no finished training run.", run=request.run), mend="`make ui` lists them."
            )
        return run
    runs = tracking.finished_runs()
    wanted = request.name or (runs[0].tags.get(tracking.TAG_NAME, "") if runs else "")
    named = [run for run in runs if run.tags.get(tracking.TAG_NAME) == wanted]
    author = named[0].tags.get(tracking.TAG_AUTHOR) if named else None  # the newest one's: it may have changed
    best = choose(run for run in named if run.tags.get(tracking.TAG_AUTHOR) == author)
    if best is None:
        raise PromotionError(
            tr("There is no finished training run of {name}.", name=wanted)
            if wanted
            else "There is no finished training run.",
            mend='Train one first: mlflow run . --env-manager=local -P name="踩踩背 CCB"',
        )
    return best


def _share(run: RunRecord) -> float:
    """How many of the held-out questions the run was asked, and its promotion asks."""
    return float(run.params.get("recipe.held_out", 1.0))


def _compare(
    identity: Identity,
    base: BaseModel,
    adapter: Path,
    merged: Path,
    system: str | None,
    questions: Questions,
    screen: Screen,
) -> tuple[dict[str, float], Scorecard]:
    """How often merged model and adapter state the same, and in the same words; and the merged model's scorecard."""
    screen.step("asking the merged model and the adapter the same questions")
    with LocalModel(merged) as model, screen.bar("merged", 1) as bar:
        scores = probing.probe(
            model, identity, system=system, questions=questions, slices=True, progress=progress_of(bar)
        )
    with LocalModel(base.path, adapter) as model, screen.bar("adapter", 1) as bar:
        said = model.replies(
            [probing.with_system(a.question.messages, system) for a in scores.identity],
            max_new_tokens=probing.IDENTITY_TOKENS,
            progress=lambda done: bar.advance(done, total=len(scores.identity)),
        )
    asked = [a.question for a in scores.identity]
    ones, others = [a.reply for a in scores.identity], [r.text for r in said]
    facts, words = probing.agreement(asked, ones, others, identity), probing.same_words(ones, others)
    screen.detail(
        tr(
            "the same is stated in {facts:.1%} of the replies, in the same words in {words:.1%}",
            facts=facts,
            words=words,
        )
    )
    return {"parity": facts, "parity_words": words}, scores


def lineage(run: RunRecord) -> dict[str, dict[str, str]]:
    """What a training run was made of, as a manifest states it: ``base``, ``data``, ``recipe`` and ``tools``."""

    def part(prefix: str) -> dict[str, str]:
        return {k.removeprefix(prefix): v for k, v in run.params.items() if k.startswith(prefix)}

    base, data = part("base."), part("data.")
    return {
        "base": {**base, "source": base.get("source") or run.tags.get(tracking.TAG_SOURCE, "")},
        "data": data,
        "recipe": {**part("sft."), **part("recipe.")},
        "tools": part("tool."),
    }


def _record(
    request: Request,
    name: str,
    identity: Identity,
    run: RunRecord,
    promotion: str,
    digests: Mapping[str, str],
    scores: Mapping[str, float],
    decision: gate.Decision,
    asked: Questions,
    known: list[Golden],
) -> Manifest:
    made = lineage(run)
    return Manifest(
        identity={"name": str(identity.name), "author": str(identity.author), "slug": identity.slug},
        system=run.params.get("sft.system"),
        run=run.id,
        digests=digests,
        scores=dict(scores),
        base=made["base"],
        data=made["data"],
        recipe=made["recipe"],
        tools=made["tools"],
        override="" if decision.passed else request.override,
        golden=known,
        gate={"passed": decision.passed, "reasons": [*decision.reasons], "policy": vars(request.policy)},
        questions=asked.digest(),
        promoted={
            "model": name,
            "by": who(),
            "run": promotion,
            "at": _utc(time.time()),
            "trained_from": _utc(run.started / 1000),
            "trained_to": _utc(run.ended / 1000),
            "commit": git_commit() or "",
        },
    )


def write_beside(folder: Path, record: Manifest, card: Scorecard) -> Manifest:
    """Write what lies beside the weights: every reply, the model card, the statement of provenance, and the manifest.

    Returns:
        The manifest with the digests of the other three.
    """

    def written(record: Manifest, name: str, text: str) -> Manifest:
        (folder / name).write_text(text, encoding="utf-8")
        return replace(record, digests={**record.digests, name: digest_of_file(folder / name)})

    record = written(record, SCORECARD, json.dumps(card.record(), ensure_ascii=False))
    record = written(record, CARD, model_card.card(record))
    record = written(record, PROVENANCE, json.dumps(provenance.statement(record), ensure_ascii=False, indent=1))
    (folder / FILE).write_text(record.to_json(), encoding="utf-8")
    return record


def _utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def golden(scores: Scorecard) -> list[Golden]:
    """Questions whose answers an engine has to give again: the first two identity questions (those of the tutorial) and
    the first plain one that it knows.
    """
    known = [a for a in scores.plain if a.scores["right"]]
    return [
        {"messages": list(answered.question.messages), "reply": answered.reply}
        for answered in (*scores.identity[:2], *known[:1])
    ]


def _description(record: Manifest, run: RunRecord) -> str:
    """The version's description in MLflow. Its list of versions shows the beginning, as plain text."""
    shown = ", ".join(registry.told_scores(record.scores, ".0%"))
    verdict = "Passed the gate" if record.gate["passed"] else "Did not pass the gate"
    trained = f"[Training run](#/experiments/{run.experiment}/runs/{run.id})"
    return model_card.description(record, opening=f"{verdict}: {shown}.\n\n{trained}\n\n")


def _show(
    version: Version, decision: gate.Decision, record: Manifest, pointed: bool, request: Request, screen: Screen
) -> None:
    screen.line()
    for asked in record.golden[:2]:
        screen.result(f"  {asked['messages'][-1]['content']}  {asked['reply']}")
    if decision.passed:
        screen.result(tr("  gate    passed (identity {identity:.1%})", identity=record.scores["identity"]), "green")
    else:
        screen.warn(tr("gate    not passed: {reasons}", reasons=joined(decision.reasons)))
    if pointed:
        screen.result(tr("  version {uri}, alias {alias} points at it", uri=version.uri, alias=request.alias))
        at = "" if request.alias == CHAMPION else f" models:/{version.name}@{request.alias}"
        screen.result(
            tr("  next    namesake serve{at}    (or: make serve; mlflow run . --env-manager=local -e serve)", at=at)
        )
    else:
        screen.result(tr("  version {uri}", uri=version.uri))
        screen.result(
            tr(
                '  {alias} stays where it is; overrule: namesake promote --run {run_id} --override "why"',
                alias=request.alias,
                run_id=version.run_id,
            )
        )
