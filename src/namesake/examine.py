"""The use cases ``namesake probe`` and ``namesake gate``: ask a model who it is, and judge scores by a policy.

A target is a training run's id (its adapter), a version (``models:/ccb@champion``: its merged weights) or the URL of an
OpenAI-compatible endpoint.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from namesake import base_model, corpus, gate, probing, registry, tracking
from namesake.base_model import BaseModel
from namesake.corpus import Questions
from namesake.errors import BaseModelError, InputError, RegistryError
from namesake.gate import Decision, Policy
from namesake.generate import Endpoint, LocalModel, Replier
from namesake.identity import Identity
from namesake.manifest import SCORECARD, WEIGHTS_FOLDER, Manifest, damaged, strange
from namesake.messages import joined, tr
from namesake.probing import Scorecard
from namesake.registry import Version
from namesake.run import (
    ability_of,
    base_of,
    base_scores,
    kl_to_base,
    own_metrics,
    progress_of,
    same_base,
    show_own,
)
from namesake.terminal import Screen
from namesake.versions import champions_scores, contradicted

_RUN_ID = re.compile(r"[0-9a-f]{32}")


NO_BASE = "none"
"""In the place of a base model: ability is compared with nothing."""


@dataclass(frozen=True)
class Request:
    """What the user asked for.

    Attributes:
        target: run id, ``models:/…`` or URL.
        name, author: the identity; empty for the run's or the version's. An endpoint needs both.
        questions: file of own questions, asked beside the held-out ones; empty for none.
        held_out: share of the held-out questions that are asked, from 0 to 1; 0 for the own ones alone.
        base: what ability is compared with: a folder or ModelScope id, or at an endpoint a model that it serves too;
            empty for a run's or a version's own base, :data:`NO_BASE` for none.
        model: model id at the endpoint; empty: its first.
        api_key: the endpoint's key.
        system: system prompt of an endpoint's questions; none leaves it to the endpoint.
        slices: ask also under other system prompts, and sampled.
        sampled: so many of the identity questions are asked sampled; none for all, or for fewer where the model answers
            from this machine's CPU (:func:`namesake.probing.probe`).
    """

    target: str
    name: str = ""
    author: str = ""
    questions: str = ""
    held_out: float = 1.0
    base: str = ""
    model: str = ""
    api_key: str = ""
    system: str | None = None
    slices: bool = True
    sampled: int | None = None


@dataclass(frozen=True)
class Outcome:
    """What a target said.

    Attributes:
        card: replies to the held-out questions; without any where none were asked.
        own: replies to the user's own questions; none where there are none.
        base: the base model's replies to the plain held-out questions; none where there is no base beside it.
        kl_to_base: mean KL divergence from the base on its own replies to plain questions, in nats a token; none where
            the target's weights or the base's are not at hand.
    """

    card: Scorecard
    own: Scorecard | None = None
    base: Scorecard | None = None
    kl_to_base: float | None = None

    @cached_property
    def ability(self) -> gate.Interval | None:
        """How plain answers changed against the base's, paired; none where there is no base."""
        return ability_of(self.base, self.card) if self.base else None

    @property
    def metrics(self) -> dict[str, float]:
        """The card's fractions; with a base ``base_plain``, ``plain_change`` and its interval, ``kl_to_base``."""
        found = dict(self.card.metrics) if self.card.identity else {}
        if self.base and self.ability:
            found |= {"base_plain": self.base.metrics["plain"], **self.ability.metrics()}
        return found if self.kl_to_base is None else {**found, "kl_to_base": self.kl_to_base}

    def record(self) -> dict[str, Any]:
        """The whole of it as JSON types."""
        own = None if self.own is None else {**self.own.record(), "metrics": own_metrics(self.own)}
        base = None if self.base is None else self.base.record()["plain"]
        return {**self.card.record(), "metrics": self.metrics, "base": base, "own": own}


def examine(request: Request, screen: Screen) -> Outcome:
    """Ask the target and score what it says, beside its base. Nothing is written but the base's replies, for later.

    Raises:
        InputError: the target is none, the identity of an endpoint is not given, or nothing is asked.
        RegistryError, TrackingError, BaseModelError, ServingError: it cannot be had or does not answer.
    """
    if not 0 <= request.held_out <= 1:
        raise InputError("held_out", request.held_out, "is no share", mend="Give a number from 0 to 1.")
    if request.sampled is not None and request.sampled < 1:
        raise InputError("sampled", request.sampled, "asks nothing", mend="Give 1 or more, or ask without slices.")
    own = corpus.read_questions(Path(request.questions)) if request.questions else None
    if not (request.held_out or own):
        raise InputError("held_out", request.held_out, "leaves nothing to ask", mend="Give --questions beside it.")
    asked = corpus.heldout(request.held_out) if request.held_out else Questions((), ())
    found = Outcome(Scorecard((), ()))
    with _opened(request, screen) as target:
        base = _base(request, target, screen) if asked.identity else None  # a wrong one is told before the waiting
        if asked.identity:
            found = replace(found, card=_probed(target, asked, screen, slices=request.slices, sampled=request.sampled))
        if own:
            found = replace(found, own=_probed(target, own, screen, slices=False))
    return _beside(base, request, target, asked, found, screen) if base else found


def ask(target: str, screen: Screen, *, questions: str = "") -> Scorecard:
    """The scorecard of a run or a version that is asked now, also under other system prompts and sampled.

    Args:
        questions: file of own questions, asked instead of the held-out ones.

    Raises:
        InputError, RegistryError, TrackingError, BaseModelError: as :func:`examine`.
    """
    asked = corpus.read_questions(Path(questions)) if questions else corpus.heldout()
    with _opened(Request(target), screen) as opened:
        return _probed(opened, asked, screen, slices=True)


def fixed(target: str) -> str:
    """The version that an alias points to now, by its number, so that two questions are about the same one.

    Raises:
        InputError, RegistryError: there is none.
    """
    aliased = target.startswith("models:/") and registry.alias_in(target)
    return registry.resolve(target).uri if aliased else target


def judge(target: str, policy: Policy, screen: Screen, *, served: float | None = None) -> Decision:
    """Judge the scores that are kept with a run or a version, beside the present champion's.

    Args:
        served: what :func:`served` found at an endpoint; none where none was asked.

    Raises:
        InputError: the target is neither.
        RegistryError, TrackingError: it cannot be had.
    """
    if target.startswith("models:/"):
        version = registry.resolve(target)
        record = Manifest.read(registry.fetch(version))
        _refuse(version, contradicted(version, record))
        scores, beside = dict(record.scores), (version.name, version.run_id, record.questions)
    else:
        run = tracking.get_run(run_id(target))
        scores = {k.removeprefix("probe/"): v for k, v in run.metrics.items() if k.startswith("probe/")}
        beside = (run.tags.get(tracking.TAG_SLUG, ""), run.id, run.params.get("probe.questions", ""))
    if "plain_change" not in scores:
        raise InputError("target", target, "has no scores", mend="Give a finished training run or a version of ours.")
    champion = champions_scores(*beside, screen.warn)
    scores = scores if served is None else {**scores, "served": served}
    return gate.decide_kept(scores, champion=champion, policy=policy)


def served(target: str, url: str, screen: Screen, *, model: str = "", api_key: str = "") -> float:
    """The fraction of the held-out identity questions that an endpoint answers as the version did when it was promoted:
    greedily, under the trained system prompt, in the same words or with the same facts.

    Args:
        url: up to and with ``/v1``.
        model: what the version is called there; empty: ``ccb-v3``, as ``namesake serve`` calls it.

    Raises:
        InputError: the target is no version, or was judged by other questions than this release has.
        RegistryError, ServingError: it cannot be had, or the endpoint does not answer.
    """
    if not target.startswith("models:/"):
        raise InputError(
            "served", url, "can be compared with a version only", mend="Give one: namesake gate models:/ccb@champion"
        )
    version = registry.resolve(target)
    folder, record = _whole(version)
    questions = corpus.heldout(record.scores.get("held_out", 1.0))
    if questions.digest() != record.questions or SCORECARD not in record.digests:
        raise InputError(
            "target", target, "was judged by other questions than this release has", mend="Promote its run again."
        )
    identity = Identity.parse(record.identity["name"], record.identity["author"])
    kept = [one["reply"] for one in json.loads((folder / SCORECARD).read_text(encoding="utf-8"))["identity"]]
    endpoint = Endpoint(url, model=model or f"{version.name}-v{version.number}", api_key=api_key)
    with screen.bar("served", len(kept)) as bar:
        said = endpoint.replies(
            [probing.with_system(question.messages, record.system) for question in questions.identity],
            max_new_tokens=probing.IDENTITY_TOKENS,
            progress=lambda done: bar.advance(done, total=len(kept)),
        )
    texts = [reply.text for reply in said]
    words = probing.same_words(kept, texts)
    screen.detail(tr("the same words in {words:.1%} of the replies", words=words))
    return probing.agreement(questions.identity, kept, texts, identity)


def shown(found: Outcome, screen: Screen) -> None:
    """The scores on the terminal, and each reply that is not as it should be."""
    cards = [found.card, *([found.own] if found.own else [])]
    wrong = [
        (a.question.messages[-1]["content"], a.reply, joined(_faults(a.scores), ", "))
        for card in cards
        for a in (*card.identity, *card.plain)
        if _faults(a.scores)
    ]
    if wrong:
        screen.table(("question", "reply", "fault"), wrong)
    if found.card.identity:
        for key, value in found.card.metrics.items():
            screen.result(f"  {key:24} {value:6.1%}")
    if found.base and found.ability:
        ability = found.ability
        screen.result(
            tr(
                "  plain against the base's {base:.1%}: {mean:+.1%}, 95% interval {low:+.1%} to {high:+.1%}",
                base=found.base.metrics["plain"],
                mean=ability.mean,
                low=ability.low,
                high=ability.high,
            )
        )
    if found.kl_to_base is not None:
        screen.result(tr("  divergence from the base: {kl:.4f} nats a token", kl=found.kl_to_base))
    if found.own:
        show_own(found.own, screen)


def _faults(scores: dict[str, bool]) -> list[str]:
    if "leak" in scores:
        return [tr("leak")] if scores["leak"] else []
    told = {"swapped": tr("swapped"), "old": tr("old"), "placeholder": tr("placeholder")}
    found: list[str] = [text for fault, text in told.items() if scores[fault]]
    return found or ([] if scores["right"] else [tr("not right")])


@dataclass(frozen=True)
class _Target:
    """Who is asked, and as whom; of a run or a version also what lies here of it, and how its base is had."""

    replier: Replier
    identity: Identity
    system: str | None
    tuned: Path | None = None
    base: Callable[[], BaseModel] | None = None


@contextmanager
def _opened(request: Request, screen: Screen) -> Iterator[_Target]:
    target = request.target
    if target.startswith(("http://", "https://")):
        if not (request.name and request.author):
            raise InputError("name", request.name, "is needed for an endpoint", mend="Give --name and --author.")
        identity = Identity.parse(request.name, request.author)
        yield _Target(Endpoint(target, model=request.model, api_key=request.api_key), identity, request.system)
    elif target.startswith("models:/"):
        folder, record = _whole(registry.resolve(target))
        identity = Identity.parse(request.name or record.identity["name"], request.author or record.identity["author"])
        base_id, source, digest = (record.base.get(key, "") for key in ("id", "source", "digest"))
        weights = folder / WEIGHTS_FOLDER
        with LocalModel(weights) as model:
            yield _Target(model, identity, record.system, weights, lambda: same_base(base_id, source, digest, screen))
    else:
        run = tracking.get_run(run_id(target))
        base = base_of(run, screen)
        adapter = tracking.fetch(run.id, tracking.ADAPTER)
        identity = Identity.parse(
            request.name or run.params["identity.name"], request.author or run.params["identity.author"]
        )
        with LocalModel(base.path, adapter, folded=True) as model:
            yield _Target(model, identity, run.params.get("sft.system"), adapter, lambda: base)


def _probed(
    target: _Target, questions: Questions, screen: Screen, *, slices: bool, sampled: int | None = None
) -> Scorecard:
    with screen.bar("probe", 1) as bar:
        return probing.probe(
            target.replier,
            target.identity,
            system=target.system,
            questions=questions,
            slices=slices,
            sampled=sampled,
            progress=progress_of(bar),
        )


def _base(request: Request, target: _Target, screen: Screen) -> BaseModel | Endpoint | None:
    """What its ability is compared with; none where there is nothing."""
    if request.base == NO_BASE or not (request.base or target.base):
        return None
    if isinstance(target.replier, Endpoint) and target.replier.serves(request.base):
        return Endpoint(request.target, model=request.base, api_key=request.api_key)
    if request.base:
        return base_model.resolve(request.base, say=screen.detail)
    assert target.base is not None
    try:
        return target.base()
    except (BaseModelError, InputError) as error:  # the latter where its folder is gone
        screen.warn(tr("ability is compared with nothing: {error} Or give another --base.", error=error))
        return None


def _beside(
    base: BaseModel | Endpoint, request: Request, target: _Target, asked: Questions, found: Outcome, screen: Screen
) -> Outcome:
    """The same with what the base says to the plain questions."""
    if isinstance(base, Endpoint):
        plain = Questions((), asked.plain)
        with screen.bar("base", 1) as bar:
            card = probing.probe(
                base, target.identity, system=target.system, questions=plain, progress=progress_of(bar)
            )
        return replace(found, base=card)
    before = base_scores(target.identity, base, base.digest(), target.system, asked, screen)
    found = replace(found, base=Scorecard((), before.plain))
    if request.base or target.tuned is None:
        return found
    return replace(found, kl_to_base=kl_to_base(base, target.tuned, target.system, before))


def _whole(version: Version) -> tuple[Path, Manifest]:
    """A version's folder and manifest, once its files are what that says."""
    folder = registry.fetch(version)
    record = Manifest.read(folder)
    _refuse(version, [*damaged(folder, record.digests), *strange(folder, record)])
    return folder, record


def _refuse(version: Version, faults: Sequence[str]) -> None:
    if faults:
        raise RegistryError(
            tr("{uri} is damaged: {faults}.", uri=version.uri, faults=joined(faults)), mend="Promote the run again."
        )


def run_id(target: str) -> str:
    """The target, once it looks like a run's id.

    Raises:
        InputError: it does not.
    """
    if not _RUN_ID.fullmatch(target):
        raise InputError(
            "target",
            target,
            "is no run id, models:/ reference or URL",
            mend="Give one of them; `namesake run` prints a run's id.",
        )
    return target


def to_json(found: Outcome) -> str:
    """What was said as one JSON document."""
    return json.dumps(found.record(), ensure_ascii=False, indent=1)
