"""What is done when the alias points to another version: a state machine, pure.

::

                  seen (alias moved, not refused)
      REST ────────────────────────────────────────▶ FETCHING ──fetched──▶ LOADING ──loaded──▶ PROVING
       ▲                                               │  ▲ moved on again    │                   │
       │                                               └──┘ (fetch that one)  │                   │ proved
       │                                               │                      │                   ▼
       ├────────────── failed: refused for a while ────┴──────────────────────┴──── undone ◀─ failed
       │                                                                                          │
       ├───────────────────────────── retired ◀────────── RETIRING ◀───────── live ───────────────┘
       │                                                     ▲
       └──────────── withdrawn: it answers no more, nothing takes its place (a challenger)

The live version stays live until the next one has proved itself (TensorFlow Serving's availability-preserving policy);
a version that failed is tried again later, each time after twice as long, and at once when the alias leaves and
returns. A challenger may be withdrawn: its alias is gone, or it left the bounds of the canary and is not tried again
before the alias has left it. One that is withdrawn while another is under way is retired after that.
Whoever executes a command answers it with :func:`done` or :func:`failed`; only one is under way at a time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum

FIRST_WAIT = 5.0
"""Seconds until a version that failed is tried again; doubled each time."""

LONGEST_WAIT = 300.0


class Step(Enum):
    """What is going on."""

    REST = "rest"
    FETCHING = "fetching"
    LOADING = "loading"
    PROVING = "proving"
    RETIRING = "retiring"


@dataclass(frozen=True)
class Refusal:
    """Why a version is not served, how often it was tried, and when it may be tried again (a clock's seconds)."""

    why: str
    tries: int
    again: float


@dataclass(frozen=True)
class State:
    """Versions are any hashable names (``ccb/3``).

    Attributes:
        wanted: what the alias points to; none before it was seen, or when it is gone.
        live: what requests are answered by; none at the start.
        coming: what is being worked on.
        leaving: what was live before and is still to be retired.
        unwanted: what is live has been withdrawn and is to be retired as soon as nothing is under way.
        refused: versions that failed.
    """

    wanted: str | None = None
    live: str | None = None
    coming: str | None = None
    leaving: str | None = None
    step: Step = Step.REST
    unwanted: bool = False
    refused: Mapping[str, Refusal] = field(default_factory=dict)


class Command(Enum):
    """What is to be done next about ``state.coming`` (RETIRE: about ``state.leaving``).

    ``FETCH``: get and verify its files. ``LOAD``: into an engine, unseen by clients. ``PROVE``: ask it who it is.
    ``TURN_AND_RETIRE``: from now on it answers; let the old one finish and unload it. ``RETIRE``: let it finish and
    unload it; nothing answers in its place.
    """

    FETCH = "fetch"
    LOAD = "load"
    PROVE = "prove"
    TURN_AND_RETIRE = "turn"
    RETIRE = "retire"


def seen(state: State, version: str | None, now: float) -> tuple[State, Command | None]:
    """The registry was asked: the alias points to the version (none: the alias or the model is gone)."""
    refused = dict(state.refused)
    if version != state.wanted:
        refused.pop(version or "", None)  # it left and came back: try at once
    return _next(replace(state, wanted=version, refused=refused), now)


def done(state: State, now: float) -> tuple[State, Command | None]:
    """The command under way succeeded."""
    if state.step is Step.FETCHING:
        if state.coming != state.wanted:  # moved on meanwhile: load no more than needed
            return _next(replace(state, step=Step.REST, coming=None), now)
        return replace(state, step=Step.LOADING), Command.LOAD
    if state.step is Step.LOADING:
        return replace(state, step=Step.PROVING), Command.PROVE
    if state.step is Step.PROVING:
        refused = {version: why for version, why in state.refused.items() if version != state.coming}
        turned = replace(state, step=Step.RETIRING, live=state.coming, leaving=state.live, coming=None, refused=refused)
        return replace(turned, unwanted=False), Command.TURN_AND_RETIRE
    if state.step is Step.RETIRING:
        return _next(replace(state, step=Step.REST, leaving=None), now)
    raise ValueError("nothing is under way")


def failed(state: State, why: str, now: float) -> tuple[State, Command | None]:
    """The command under way failed and has been undone; what was live still is."""
    if state.step is Step.REST:
        raise ValueError("nothing is under way")
    if state.coming is None:  # the old one could not be retired; the new one is live all the same
        return _next(replace(state, step=Step.REST, leaving=None), now)
    tries = (state.refused[state.coming].tries if state.coming in state.refused else 0) + 1
    wait = min(FIRST_WAIT * 2 ** (tries - 1), LONGEST_WAIT)
    refused = {**state.refused, state.coming: Refusal(why, tries, now + wait)}
    return _next(replace(state, step=Step.REST, coming=None, refused=refused), now)


def withdrawn(state: State, version: str, why: str, now: float) -> tuple[State, Command | None]:
    """The live version is to answer no more, and nothing takes its place.

    Args:
        why: it is not tried again before the alias has left it; empty: its alias is gone, and nothing is wrong with it.
    """
    if state.live != version or state.unwanted:  # another has taken its place meanwhile, or it was said before
        return state, None
    refused = state.refused
    if why:
        tries = (state.refused[version].tries if version in state.refused else 0) + 1
        refused = {**state.refused, version: Refusal(why, tries, math.inf)}
    return _next(replace(state, unwanted=True, refused=refused), now)


def _next(state: State, now: float) -> tuple[State, Command | None]:
    if state.step is not Step.REST:
        return state, None
    if state.unwanted:
        return replace(state, step=Step.RETIRING, live=None, leaving=state.live, unwanted=False), Command.RETIRE
    if state.wanted is None or state.wanted == state.live:
        return state, None
    refusal = state.refused.get(state.wanted)
    if refusal is not None and now < refusal.again:
        return state, None
    return replace(state, step=Step.FETCHING, coming=state.wanted), Command.FETCH
