"""The use case ``namesake promote``: the best run becomes the next version, proved before it ships.

choose → merge → compare and score → gate → log → register → alias. Nothing is visible in the registry before the merged
model has been scored; the alias is moved last. Promoting the same run again gives the same version.
"""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from namesake import corpus, gate, manifest, merge, probe, registry, tracking
from namesake.base_model import BaseModel
from namesake.errors import PromotionError
from namesake.gate import Policy
from namesake.generate import LocalModel
from namesake.identity import Identity
from namesake.manifest import ADAPTER_FOLDER, FILE, WEIGHTS_FOLDER, Manifest
from namesake.probe import Scorecard
from namesake.registry import CHAMPION, SCORE, TAG_KEY, Version
from namesake.run import ability_of, base_of, base_scores, progress_of
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
    """

    run: str = ""
    name: str = ""
    model_name: str = ""
    alias: str = CHAMPION
    override: str = ""
    policy: Policy = field(default_factory=Policy)


@dataclass(frozen=True)
class Outcome:
    """The version, and whether the alias points at it now."""

    version: Version
    decision: gate.Decision
    pointed: bool


def choose(runs: Iterable[RunRecord]) -> RunRecord | None:
    """The best run: by identity questions right, then least leak, then validation loss, then the newer one."""
    candidates = [run for run in runs if "probe/identity" in run.metrics]
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
        PromotionError: there is no run to promote, or the registered model stands for another identity.
        BaseModelError: the base that the run was trained on cannot be had here.
        RegistryError, TrackingError: MLflow failed; nothing half made is left in the registry.
    """
    with tracking.run("promote") as tracked:
        run = _find(request)
        identity = Identity.parse(run.params["identity.name"], run.params["identity.author"])
        name = request.model_name or identity.slug
        _check_free(name, identity)
        screen.step(f"promoting {run.name} ({run.id}) to {name}")
        tracked.tags({tracking.TAG_KIND: "promote", tracking.TAG_SLUG: identity.slug, "namesake.promoted": run.id})
        base = base_of(run, screen)
        adapter = tracking.fetch(run.id, tracking.ADAPTER)
        system = run.params.get("sft.system")
        before = base_scores(identity, base, run.params["base.digest"], system, corpus.heldout(), screen)
        with tempfile.TemporaryDirectory(prefix="namesake-promote-") as folder:
            merged = Path(folder) / WEIGHTS_FOLDER
            way = merge.merge(base.path, adapter, merged, system=system)
            screen.line(f"  merged ({way})")
            parity, scores = _compare(identity, base, adapter, merged, system, screen)
            ability = ability_of(before, scores)
            decision = gate.decide(
                scores.metrics,
                ability,
                parity=parity,
                champion=_champions_scores(name, run.id),
                policy=request.policy,
            )
            tracked.metrics({**{f"probe/{k}": v for k, v in scores.metrics.items()}, "probe/parity": parity})
            version = _make_version(
                *(name, identity, run, base, adapter, merged, system),
                {**scores.metrics, **ability.metrics(), "parity": parity},
                decision,
                request.override,
                golden(scores),
                screen,
            )
        pointed = decision.passed or bool(request.override)
        if pointed:
            point(version, request.alias, how="promote", why=request.override or "gate passed")
        tracked.tags({"namesake.version": version.uri, tracking.TAG_GATE: decision.told})
    _show(version, decision, scores, pointed, request, screen)
    return Outcome(version, decision, pointed)


def _find(request: Request) -> RunRecord:
    if request.run:
        run = tracking.get_run(request.run)
        if run.tags.get(tracking.TAG_KIND) != "train" or "probe/identity" not in run.metrics:
            raise PromotionError(f"Run {request.run} is no finished training run.", mend="`make ui` lists them.")
        return run
    runs = tracking.finished_runs()
    wanted = request.name or (runs[0].tags.get(tracking.TAG_NAME, "") if runs else "")
    best = choose(run for run in runs if run.tags.get(tracking.TAG_NAME) == wanted)
    if best is None:
        of = f" of {wanted}" if wanted else ""
        raise PromotionError(
            f"There is no finished training run{of}.",
            mend='Train one first: mlflow run . --env-manager=local -P name="踩踩背 CCB"',
        )
    return best


def _check_free(name: str, identity: Identity) -> None:
    owner = registry.identity_of(name)
    if owner is not None and owner != str(identity):
        raise PromotionError(
            f"The registered model {name} stands for {owner or 'something that is not ours'}, not for {identity}.",
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


def _make_version(
    name: str,
    identity: Identity,
    run: RunRecord,
    base: BaseModel,
    adapter: Path,
    merged: Path,
    system: str | None,
    scores: Mapping[str, float],
    decision: gate.Decision,
    override: str,
    questions: list[dict[str, Any]],
    screen: Screen,
) -> Version:
    digests = {f"{WEIGHTS_FOLDER}/{path}": digest for path, digest in manifest.digests(merged).items()}
    digests |= {f"{ADAPTER_FOLDER}/{path}": digest for path, digest in manifest.digests(adapter).items()}
    key = hashlib.sha256("\n".join(f"{path} {digest}" for path, digest in sorted(digests.items())).encode()).hexdigest()
    tags = {
        TAG_KEY: key,
        tracking.TAG_NAME: str(identity.name),
        tracking.TAG_AUTHOR: str(identity.author),
        tracking.TAG_BASE: base.id,
        "namesake.data_digest": run.params["data.digest"],
        TAG_QUESTIONS: corpus.heldout().digest(),
        tracking.TAG_GATE: decision.told,
        **{f"{SCORE}{metric}": f"{scores[metric]:.4f}" for metric in _SHOWN_SCORES},
    }
    if override:
        tags[registry.TAG_OVERRIDE] = override
    ready = (
        [v for v in registry.versions_with(name, TAG_KEY, key) if v.status == "READY"]
        if registry.identity_of(name)
        else []
    )
    if ready:
        screen.line(f"  this run is version {ready[-1].number} already")
        return ready[-1]
    record = Manifest(
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
    screen.step("logging the merged model")
    model_uri = tracking.log_chat_model(
        merged, extras={ADAPTER_FOLDER: adapter}, texts={FILE: record.to_json()}, tags=tags
    )
    return registry.register(
        name,
        model_uri,
        run_id=run.id,
        identity=str(identity),
        tags=tags,
        description=_card(identity, run, base, scores, decision),
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
    shown = ", ".join(f"{key} {scores[key]:.0%}" for key in ("identity", "swapped", "leak", "plain"))
    verdict = "passed the gate" if decision.passed else "did not pass the gate: " + "; ".join(decision.reasons)
    return f"**{identity.name}** by **{identity.author}**, `{base.id}` tuned in run `{run.id}`; {verdict}. {shown}."


def _show(
    version: Version, decision: gate.Decision, scores: Scorecard, pointed: bool, request: Request, screen: Screen
) -> None:
    screen.line()
    for answered in scores.identity[:2]:
        screen.result(f"  {answered.question.messages[-1]['content']}  {answered.reply}")
    if decision.passed:
        screen.result(f"  gate    passed (identity {scores.metrics['identity']:.1%})", "green")
    else:
        screen.warn("gate    not passed: " + "; ".join(decision.reasons))
    screen.result(f"  version {version.uri}" + (f", alias {request.alias} points at it" if pointed else ""))
    if pointed:
        at = "" if request.alias == CHAMPION else f" models:/{version.name}@{request.alias}"
        screen.result(f"  next    namesake serve{at}    (or: make serve; mlflow run . --env-manager=local -e serve)")
    else:
        screen.result(
            f'  {request.alias} stays where it is; overrule: namesake promote --run {version.run_id} --override "why"'
        )
