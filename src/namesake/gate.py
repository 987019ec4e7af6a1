"""Whether a version may become the champion: scores and a policy in, a decision with every reason out. Pure."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from namesake.errors import InputError
from namesake.messages import joined, tr

_RESAMPLES = 9999


@dataclass(frozen=True)
class Policy:
    """Bounds on the fractions of :class:`namesake.probing.Scorecard`, and on the agreement of adapter and merged model.

    Attributes:
        identity: least share right, greedy, under the trained system prompt.
        identity_slices: the same without a system prompt, under a customer's, and sampled.
        swapped, old_identity, placeholder: most allowed, greedy, under every system prompt.
        leak: most replies to plain questions that name the model or its author.
        plain_loss: how far the 95 % interval of the paired difference to the base's plain score may lie wholly below
            zero; 0 for "not wholly below the base".
        parity: least share of replies in which adapter and merged model state the same; an endpoint and the version
            that it serves, too, where one is asked (``--served``).
        champion_loss: how much worse than the present champion ``identity`` and ``plain`` may be.
        held_out: least share of the held-out questions that were asked.
    """

    identity: float = 1.0
    identity_slices: float = 0.95
    swapped: float = 0.0
    old_identity: float = 0.0
    placeholder: float = 0.0
    leak: float = 0.0
    plain_loss: float = 0.0
    parity: float = 0.95
    champion_loss: float = 0.0
    held_out: float = 1.0


def load_policy(path: str | os.PathLike[str]) -> Policy:
    """A policy file: YAML with any of :class:`Policy`'s bounds; what is left out keeps its default.

    Raises:
        InputError: the file, a name or a value in it is wrong; every fault is named.
    """
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(
            "policy", str(path), tr("cannot be read ({error})", error=error), mend="Give a YAML file."
        ) from error
    known = [f.name for f in dataclasses.fields(Policy)]
    faults = []
    if not isinstance(data, dict):
        data, faults = {}, [tr("is no mapping")]
    for key, value in data.items():
        if key not in known:
            faults.append(tr("{key} is no bound", key=key))
        elif isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            faults.append(tr("{key}={value} is no fraction from 0 to 1", key=key, value=value))
    if faults:
        raise InputError("policy", str(path), joined(faults), mend=tr("Bounds are {known}.", known=", ".join(known)))
    return Policy(**data)


@dataclass(frozen=True)
class Interval:
    """A paired difference of two shares with its 95 % interval."""

    mean: float
    low: float
    high: float

    def metrics(self) -> dict[str, float]:
        """As scores beside the others: ``plain_change`` and its bounds."""
        return {"plain_change": self.mean, "plain_change_low": self.low, "plain_change_high": self.high}

    @classmethod
    def of(cls, scores: Mapping[str, float]) -> Interval:
        """Back from such scores."""
        return cls(scores["plain_change"], scores["plain_change_low"], scores["plain_change_high"])


def paired_difference(before: Sequence[bool], after: Sequence[bool]) -> Interval:
    """How much the share of right answers changed, from the same questions asked twice.

    The interval is a percentile bootstrap over the questions (Efron 1979; ``scipy.stats.bootstrap``), drawn with a
    fixed seed: the same answers give the same interval.

    Raises:
        ValueError: the two are not of one length.
    """
    changes = [int(b) - int(a) for a, b in zip(before, after, strict=True)]
    if len(set(changes)) < 2:  # nothing to resample
        same = float(changes[0]) if changes else 0.0
        return Interval(same, same, same)
    import numpy as np
    from scipy import stats

    found = stats.bootstrap(
        (np.array(changes),), np.mean, n_resamples=_RESAMPLES, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    return Interval(sum(changes) / len(changes), float(found.low), float(found.high))


@dataclass(frozen=True)
class Decision:
    """``reasons`` has one line for every bound that is not kept."""

    passed: bool
    reasons: tuple[str, ...]

    @property
    def told(self) -> str:
        """One line of it."""
        return "passed" if self.passed else "failed: " + "; ".join(self.reasons)


def decide(
    candidate: Mapping[str, float],
    ability: Interval,
    *,
    parity: float | None = None,
    served: float | None = None,
    held_out: float = 1.0,
    champion: Mapping[str, float] | None = None,
    policy: Policy | None = None,
) -> Decision:
    """Judge the candidate's scores against the policy, the base's scores and the present champion's.

    Args:
        candidate: ``Scorecard.metrics`` of the candidate.
        ability: paired difference of its plain answers to the base's, :func:`paired_difference`.
        parity: the share of identity replies that adapter and merged model give alike; none where there is one model.
        served: the same of the version and an endpoint; none where no endpoint was asked.
        held_out: the share of the held-out questions that the scores are about.
        champion: the present champion's ``identity`` and ``plain`` on the same questions; none where there is none.
    """
    policy = policy or Policy()
    reasons = [tr("{key} was not asked", key=key) for key in _ASKED if key not in candidate]
    reasons += [
        tr("{key} {value:.1%} right, at least {least:.0%} wanted", key=key, value=value, least=least)
        for key, value in candidate.items()
        for least in (policy.identity if key == "identity" else policy.identity_slices,)
        if (key == "identity" or key in _SLICES) and not value >= least
    ]
    for bound in ("swapped", "old_identity", "placeholder", "leak"):
        most = getattr(policy, bound)
        reasons += [
            tr("{key} {value:.1%}, at most {most:.0%} allowed", key=key, value=value, most=most)
            for key, value in candidate.items()
            if key in {bound, f"{bound}_none", f"{bound}_customer"} and not value <= most
        ]
    if not ability.high >= -policy.plain_loss:
        reasons.append(
            tr(
                "plain questions {mean:+.1%} against the base, the interval {low:+.1%} to {high:+.1%} lies "
                "wholly below {bound:.0%}",
                mean=ability.mean,
                low=ability.low,
                high=ability.high,
                bound=0 - policy.plain_loss,
            )
        )
    if parity is not None and not parity >= policy.parity:
        reasons.append(
            tr(
                "merged model and adapter agree on {parity:.0%} of the replies, {least:.0%} wanted",
                parity=parity,
                least=policy.parity,
            )
        )
    if served is not None and not served >= policy.parity:
        reasons.append(
            tr(
                "endpoint and version agree on {parity:.0%} of the replies, {least:.0%} wanted",
                parity=served,
                least=policy.parity,
            )
        )
    if not held_out >= policy.held_out:
        reasons.append(
            tr(
                "{share:.0%} of the held-out questions were asked, {least:.0%} wanted",
                share=held_out,
                least=policy.held_out,
            )
        )
    for key in ("identity", "plain"):
        if champion and key in champion and candidate[key] < champion[key] - policy.champion_loss - _ROUNDED:
            reasons.append(
                tr(
                    "{key} {candidate:.1%}, the champion has {champion:.1%}",
                    key=key,
                    candidate=candidate[key],
                    champion=champion[key],
                )
            )
    return Decision(not reasons, tuple(reasons))


def decide_kept(
    scores: Mapping[str, float], *, champion: Mapping[str, float] | None = None, policy: Policy | None = None
) -> Decision:
    """:func:`decide` by scores as a run or a version keeps them: metrics, ``plain_change``, ``parity``, ``held_out``;
    and ``served``, which nobody keeps.

    Raises:
        KeyError: ``plain_change`` is not among them: they were not made by a whole probe.
    """
    metrics = dict(scores)
    kept = {"parity": metrics.pop("parity", None), "served": metrics.pop("served", None)}
    held_out = metrics.pop("held_out", 1.0)
    return decide(metrics, Interval.of(metrics), **kept, held_out=held_out, champion=champion, policy=policy)


_SLICES = ("identity_none", "identity_customer", "identity_sampled")
_ASKED = (
    "identity",
    *_SLICES,
    *(f"{bound}{part}" for bound in ("swapped", "old_identity", "placeholder") for part in ("", "_none", "_customer")),
    "leak",
)
"""What a whole probe has scores of. Where one is missing nothing is known, so nothing passes."""
_ROUNDED = 1e-4
"""A champion's scores are read from its tags, where they have four places."""
