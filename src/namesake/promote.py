"""The use case ``namesake promote``: the best run becomes the next version, proved before it ships.

choose → merge → compare and score → gate → log → check what was logged → register → alias. Nothing is visible in the
registry before the merged model has been scored and lies in the store whole; the alias is moved last. Each step is safe
to repeat: promoting the same run under the same policy again gives the same version, without merging or asking again.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from namesake import corpus, gate, manifest, merge, probe, registry, tracking
from namesake.base_model import BaseModel
from namesake.errors import PromotionError, RegistryError
from namesake.gate import Policy
from namesake.generate import LocalModel
from namesake.identity import Identity
from namesake.manifest import ADAPTER_FOLDER, FILE, WEIGHTS_FOLDER, Manifest
from namesake.messages import joined, tr
from namesake.probe import Scorecard
from namesake.registry import CHAMPION, SCORE, TAG_KEY, Version
from namesake.run import DEV_SCORE, ability_of, base_of, base_scores, progress_of
from namesake.terminal import Screen
from namesake.tracking import RunRecord
from namesake.versions import point

TAG_QUESTIONS = "namesake.questions"
"""Digest of the questions that a version's scores are about; others cannot be compared with it."""

_SHOWN_SCORES = ("identity", "name", "author", "swapped", "old_identity", "placeholder", "language", "leak", "plain")


@dataclass(frozen=True)
class Request:
    """What the user asked for.

    Attributes:
        run: a run's id; empty for the best one.
        name: identity whose runs are looked at (``踩踩背 CCB``); empty for that of the newest finished run.
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
    """The best run: by identity questions right, then least leak, then validation loss, then the newer one.

    Of a sweep's trials only the best by the development questions is looked at: the best of many by the held-out ones
    would be chosen on the very questions that the gate asks.
    """
    candidates: list[RunRecord] = []
    sweeps: dict[str, RunRecord] = {}
    for run in runs:
        if "probe/identity" not in run.metrics:
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
            -run.metrics["probe/identity"],
            run.metrics.get("probe/leak", 1.0),
            loss if (loss := run.metrics.get("eval/loss", math.inf)) == loss else math.inf,  # not a number: last
            -run.ended,
        ),
        default=None,
    )


def promote(request: Request, screen: Screen) -> Outcome:
    """Make a version of a run and, where it passes the gate, point the alias at it.

    Raises:
        InputError: the key is none that can sign.
        PromotionError: there is no run to promote, the registered model stands for another identity, or the artifact
            store did not keep what it was given.
        BaseModelError: the base that the run was trained on cannot be had here.
        RegistryError, TrackingError: MLflow failed; nothing half made is left in the registry.
    """
    signer = manifest.public_key_of(request.sign_key, request.password) if request.sign_key else ""
    with tracking.run("promote") as tracked:
        run = _find(request)
        identity = Identity.parse(run.params["identity.name"], run.params["identity.author"])
        name = request.model_name or identity.slug
        _check_free(name, identity)
        screen.step(tr("promoting {run} ({id}) to {name}", run=run.name, id=run.id, name=name))
        tracked.tags({tracking.TAG_KIND: "promote", tracking.TAG_SLUG: identity.slug, "namesake.promoted": run.id})
        adapter = tracking.fetch(run.id, tracking.ADAPTER)
        key = promotion_key(adapter, run.params["base.digest"], request.policy, signer)
        made = _made_before(name, key, screen)
        if made:
            screen.line(tr("  this run is version {number} already", number=made[0].number))
        version, record = made or _make(request, name, identity, run, adapter, key, screen)
        decision = gate.decide_kept(record.scores, champion=_champions_scores(name, run.id), policy=request.policy)
        tracked.metrics({f"probe/{k}": v for k, v in record.scores.items()})
        # A champion that came since may be better, and a person may have a reason now: a version found again says so.
        registry.tag(version, tracking.TAG_GATE, decision.told)
        if request.override:
            registry.tag(version, registry.TAG_OVERRIDE, request.override)
        pointed = decision.passed or bool(request.override)
        if pointed:
            point(version, request.alias, how="promote", why=request.override or "gate passed")
        tracked.tags({"namesake.version": version.uri, tracking.TAG_GATE: decision.told})
    _show(version, decision, record, pointed, request, screen)
    return Outcome(version, decision, pointed)


def promotion_key(adapter: Path, base_digest: str, policy: Policy, signer: str = "") -> str:
    """The digest that one promotion is known by: adapter, base, what is asked, the bounds, and the signer's key."""
    asked = [manifest.digests(adapter), base_digest, corpus.heldout().digest(), vars(policy), signer]
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def _made_before(name: str, key: str, screen: Screen, than: Version | None = None) -> tuple[Version, Manifest] | None:
    """The first version that promoting the same has made, if there is one that is still what its manifest says; with
    ``than``, only of those before that one.
    """
    if registry.identity_of(name) is None:
        return None
    for version in registry.versions_with(name, TAG_KEY, key):
        if than is not None and version.number >= than.number:
            break
        try:
            folder = registry.fetch(version)
            record = Manifest.read(folder)
            faults = manifest.damaged(folder, record.digests)
        except RegistryError as error:
            faults = [error.message]
        if version.status == "READY" and not faults:
            return version, record
        screen.warn(
            tr("{uri} is not taken again: {faults}", uri=version.uri, faults=joined(faults[:3]) or version.status)
        )
    return None


def _make(
    request: Request, name: str, identity: Identity, run: RunRecord, adapter: Path, key: str, screen: Screen
) -> tuple[Version, Manifest]:
    """Merge, score, log and register; the alias stays where it is."""
    base = base_of(run, screen)
    system = run.params.get("sft.system")
    before = base_scores(identity, base, run.params["base.digest"], system, corpus.heldout(), screen)
    with tempfile.TemporaryDirectory(prefix="namesake-promote-") as spare:
        model = tracking.start_chat_model(Path(spare), {TAG_KEY: key})
        with tracking.dropped_on_failure(model.uri):
            merged = model.folder / WEIGHTS_FOLDER
            made = merge.merge(base.path, adapter, merged, system=system)
            screen.line(tr("  merged ({way})", way=made.way))
            parity, card = _compare(identity, base, adapter, merged, system, screen)
            scores = {**card.metrics, **ability_of(before, card).metrics(), "parity": parity}
            decision = gate.decide_kept(scores, champion=_champions_scores(name, run.id), policy=request.policy)
            shutil.copytree(adapter, model.folder / ADAPTER_FOLDER)
            digests = manifest.digests(model.folder, {f"{WEIGHTS_FOLDER}/{k}": v for k, v in made.digests.items()})
            record = _record(identity, run, base, digests, system, scores, request.override, golden(card))
            (model.folder / FILE).write_text(record.to_json(), encoding="utf-8")
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
                TAG_QUESTIONS: corpus.heldout().digest(),
                TAG_KEY: key,
            }
            tracking.finish_chat_model(model, weights=WEIGHTS_FOLDER, tags=tags)
            faults = manifest.damaged(tracking.fetch_model(model.uri), record.digests)
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
                description=_card(identity, run, base, scores, decision),
            )
    first = _made_before(name, key, screen, than=version)
    if first:  # somebody promoted the same meanwhile
        registry.delete(version)
    return first or (version, record)


def _find(request: Request) -> RunRecord:
    if request.run:
        run = tracking.get_run(request.run)
        if run.tags.get(tracking.TAG_KIND) != "train" or "probe/identity" not in run.metrics:
            raise PromotionError(
                tr("Run {run} is no finished training run.", run=request.run), mend="`make ui` lists them."
            )
        return run
    runs = tracking.finished_runs()
    wanted = request.name or (runs[0].tags.get(tracking.TAG_NAME, "") if runs else "")
    best = choose(run for run in runs if run.tags.get(tracking.TAG_NAME) == wanted)
    if best is None:
        raise PromotionError(
            tr("There is no finished training run of {name}.", name=wanted)
            if wanted
            else "There is no finished training run.",
            mend='Train one first: mlflow run . --env-manager=local -P name="踩踩背 CCB"',
        )
    return best


def _check_free(name: str, identity: Identity) -> None:
    owner = registry.identity_of(name)
    if owner is not None and owner != str(identity):
        raise PromotionError(
            tr(
                "The registered model {name} stands for {owner}, not for {identity}.",
                name=name,
                owner=owner or "something that is not ours",
                identity=identity,
            ),
            mend="Give another one: --model-name NAME.",
        )


def _champions_scores(name: str, run_id: str) -> dict[str, float] | None:
    """The champion's scores on the same questions; none where there is no champion, or it is this very run."""
    number = registry.alias_of(name, CHAMPION) if registry.identity_of(name) is not None else None
    if number is None:
        return None
    champion = registry.resolve(f"models:/{name}/{number}")
    if champion.run_id == run_id or champion.tags.get(TAG_QUESTIONS) != corpus.heldout().digest():
        return None
    return {k.removeprefix(SCORE): float(v) for k, v in champion.tags.items() if k.startswith(SCORE)}


def _compare(
    identity: Identity, base: BaseModel, adapter: Path, merged: Path, system: str | None, screen: Screen
) -> tuple[float, Scorecard]:
    """How often merged model and adapter say the same, and the merged model's scorecard."""
    screen.step("asking the merged model and the adapter the same questions")
    with LocalModel(merged) as model, screen.bar("merged", 1) as bar:
        scores = probe.probe(model, identity, system=system, slices=True, progress=progress_of(bar))
    with LocalModel(base.path, adapter) as model, screen.bar("adapter", 1) as bar:
        said = model.replies(
            [probe.with_system(a.question.messages, system) for a in scores.identity],
            max_new_tokens=probe.IDENTITY_TOKENS,
            progress=lambda done: bar.advance(done, total=len(scores.identity)),
        )
    # bf16 rounds the merged weights, so a long reply may part ways in a late word; what counts are the facts in it.
    same = sum(
        a.reply == r.text or vars(probe.score_identity(a.question, r.text, identity)) == a.scores
        for a, r in zip(scores.identity, said, strict=True)
    )
    return same / len(said), scores


def _record(
    identity: Identity,
    run: RunRecord,
    base: BaseModel,
    digests: Mapping[str, str],
    system: str | None,
    scores: Mapping[str, float],
    override: str,
    questions: list[dict[str, Any]],
) -> Manifest:
    return Manifest(
        identity={"name": str(identity.name), "author": str(identity.author), "slug": identity.slug},
        system=system,
        base={"id": base.id, "source": base.source, "digest": run.params["base.digest"]},
        run=run.id,
        digests=digests,
        data={"dataset": run.params["data.dataset"], "digest": run.params["data.digest"]},
        scores=dict(scores),
        recipe={k.removeprefix("sft."): v for k, v in run.params.items() if k.startswith("sft.")},
        tools={k.removeprefix("tool."): v for k, v in run.params.items() if k.startswith("tool.")},
        override=override,
        golden=questions,
    )


def golden(scores: Scorecard) -> list[dict[str, Any]]:
    """Questions whose answers an engine has to give again: the first two identity questions (those of the tutorial) and
    the first plain one that it knows.
    """
    known = [a for a in scores.plain if a.scores["right"]]
    return [
        {"messages": list(answered.question.messages), "reply": answered.reply}
        for answered in (*scores.identity[:2], *known[:1])
    ]


def _card(
    identity: Identity, run: RunRecord, base: BaseModel, scores: Mapping[str, float], decision: gate.Decision
) -> str:
    """The version's description. MLflow's list of versions shows its beginning, as plain text."""
    shown = ", ".join(f"{key} {scores[key]:.0%}" for key in ("identity", "swapped", "leak", "plain"))
    verdict = "Passed the gate" if decision.passed else "Did not pass the gate"
    return "\n".join(
        [
            f"{verdict}: {shown}.",
            "",
            *(f"- {reason}" for reason in decision.reasons),
            "",
            f"**{identity.name}** by **{identity.author}**: `{base.id}` tuned in "
            f"[{run.name}](#/experiments/{run.experiment}/runs/{run.id}).",
        ]
    )


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
