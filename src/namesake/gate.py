"""Whether a version may become the champion: scores and a policy in, a decision with every reason out. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Policy:
    """Bounds on the fractions of :class:`namesake.probe.Scorecard`, and on the agreement of adapter and merged model.

    ``plain_loss``: how much of the base model's own score on plain questions may be lost.
    """

    identity: float = 0.95
    swapped: float = 0.0
    old_identity: float = 0.0
    placeholder: float = 0.0
    leak: float = 0.03
    plain_loss: float = 0.15
    parity: float = 0.9


@dataclass(frozen=True)
class Decision:
    """``reasons`` has one line for every bound that is not kept."""

    passed: bool
    reasons: tuple[str, ...]


def decide(
    candidate: Mapping[str, float], base: Mapping[str, float], *, parity: float, policy: Policy | None = None
) -> Decision:
    """Judge the merged candidate's scores against the policy and the base's own scores.

    Args:
        candidate: ``Scorecard.metrics`` of the candidate.
        base: the same of its base model.
        parity: the fraction of held-out replies that adapter and merged model give word for word alike.
    """
    policy = policy or Policy()
    reasons = []
    if candidate["identity"] < policy.identity:
        reasons.append(f"identity {candidate['identity']:.1%} right, at least {policy.identity:.0%} wanted")
    reasons += [
        f"{key} {candidate[key]:.1%}, at most {getattr(policy, key):.0%} allowed"
        for key in ("swapped", "old_identity", "placeholder", "leak")
        if candidate[key] > getattr(policy, key)
    ]
    least = base["plain"] * (1 - policy.plain_loss)
    if candidate["plain"] < least:
        reasons.append(
            f"plain questions {candidate['plain']:.1%} right, {least:.1%} wanted (the base has {base['plain']:.1%})"
        )
    if parity < policy.parity:
        reasons.append(f"merged model and adapter agree on {parity:.0%} of the replies, {policy.parity:.0%} wanted")
    return Decision(not reasons, tuple(reasons))
