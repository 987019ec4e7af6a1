"""The use cases ``namesake probe`` and ``namesake gate``: ask a model who it is, and judge scores by a policy.

A target is a training run's id (its adapter), a version (``models:/ccb@champion``: its merged weights) or the URL of an
OpenAI-compatible endpoint.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from namesake import corpus, gate, probing, registry, tracking
from namesake.errors import InputError, RegistryError
from namesake.gate import Decision, Policy
from namesake.generate import Endpoint, LocalModel, Replier
from namesake.identity import Identity
from namesake.manifest import SCORECARD, WEIGHTS_FOLDER, Manifest, damaged, strange
from namesake.messages import joined, tr
from namesake.probing import Scorecard
from namesake.registry import Version
from namesake.run import base_of, progress_of
from namesake.terminal import Screen
from namesake.versions import champions_scores

_RUN_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class Request:
    """What the user asked for.

    Attributes:
        target: run id, ``models:/…`` or URL.
        name, author: the identity; empty for the run's or the version's. An endpoint needs both.
        questions: file of own questions; empty for the held-out ones.
        model: model id at the endpoint; empty for its first.
        api_key: the endpoint's key.
        system: system prompt of an endpoint's questions; none leaves it to the endpoint.
        slices: ask also under other system prompts, and sampled.
    """

    target: str
    name: str = ""
    author: str = ""
    questions: str = ""
    model: str = ""
    api_key: str = ""
    system: str | None = None
    slices: bool = True


def examine(request: Request, screen: Screen) -> Scorecard:
    """Ask the target and score what it says. Nothing is written.

    Raises:
        InputError: the target is none, or the identity of an endpoint is not given.
        RegistryError, TrackingError, BaseModelError, ServingError: it cannot be had or does not answer.
    """
    questions = corpus.read_questions(Path(request.questions)) if request.questions else None
    with (
        _opened(request, screen) as (replier, identity, system),
        screen.bar("probe", 1) as bar,
    ):
        return probing.probe(
            replier,
            identity,
            system=system,
            questions=questions,
            slices=request.slices,
            progress=progress_of(bar),
        )


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
    return probing.agreement(questions.identity, kept, [reply.text for reply in said], identity)


def shown(card: Scorecard, screen: Screen) -> None:
    """The scores on the terminal, and each reply that is not as it should be."""
    wrong = [
        (a.question.messages[-1]["content"], a.reply, joined(_faults(a.scores), ", "))
        for a in (*card.identity, *card.plain)
        if _faults(a.scores)
    ]
    if wrong:
        screen.table(("question", "reply", "fault"), wrong)
    for key, value in card.metrics.items():
        screen.result(f"  {key:24} {value:6.1%}")


def _faults(scores: dict[str, bool]) -> list[str]:
    if "leak" in scores:
        return [tr("leak")] if scores["leak"] else []
    told = {"swapped": tr("swapped"), "old": tr("old"), "placeholder": tr("placeholder")}
    found: list[str] = [text for fault, text in told.items() if scores[fault]]
    return found or ([] if scores["right"] else [tr("not right")])


@contextmanager
def _opened(request: Request, screen: Screen) -> Iterator[tuple[Replier, Identity, str | None]]:
    target = request.target
    if target.startswith(("http://", "https://")):
        if not (request.name and request.author):
            raise InputError("name", request.name, "is needed for an endpoint", mend="Give --name and --author.")
        identity = Identity.parse(request.name, request.author)
        yield Endpoint(target, model=request.model, api_key=request.api_key), identity, request.system
    elif target.startswith("models:/"):
        folder, record = _whole(registry.resolve(target))
        identity = Identity.parse(request.name or record.identity["name"], request.author or record.identity["author"])
        with LocalModel(folder / WEIGHTS_FOLDER) as model:
            yield model, identity, record.system
    else:
        run = tracking.get_run(run_id(target))
        base = base_of(run, screen)
        adapter = tracking.fetch(run.id, tracking.ADAPTER)
        identity = Identity.parse(
            request.name or run.params["identity.name"], request.author or run.params["identity.author"]
        )
        with LocalModel(base.path, adapter, folded=True) as model:
            yield model, identity, run.params.get("sft.system")


def _whole(version: Version) -> tuple[Path, Manifest]:
    """A version's folder and manifest, once its files are what that says."""
    folder = registry.fetch(version)
    record = Manifest.read(folder)
    if faults := [*damaged(folder, record.digests), *strange(folder, record)]:
        raise RegistryError(
            tr("{uri} is damaged: {faults}.", uri=version.uri, faults=joined(faults)), mend="Promote the run again."
        )
    return folder, record


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


def to_json(card: Scorecard) -> str:
    """The card as one JSON document."""
    return json.dumps(card.record(), ensure_ascii=False, indent=1)
