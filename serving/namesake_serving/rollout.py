"""What is done when the alias points to another version: a state machine, pure.

::

                  seen (alias moved, not refused)
      REST ────────────────────────────────────────▶ FETCHING ──fetched──▶ LOADING ──loaded──▶ PROVING
       ▲                                               │  ▲ moved on again    │                   │
       │                                               └──┘ (fetch that one)  │                   │ proved
       │                                               │                      │                   ▼
       ├────────────── failed: refused for a while ────┴──────────────────────┴──── undone ◀─ failed
       │                                                                                          │
       └───────────────────────────── retired ◀────────── RETIRING ◀───────── live ───────────────┘

The live version stays live until the next one has proved itself (TensorFlow Serving's availability-preserving policy);
a version that failed is tried again later, each time after twice as long, and at once when the alias leaves and
returns.
Whoever executes a command answers it with :func:`done` or :func:`failed`; only one is under way at a time.
"""

from __future__ import annotations

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
        refused: versions that failed.
    """

    wanted: str | None = None
    live: str | None = None
    coming: str | None = None
    leaving: str | None = None
    step: Step = Step.REST
    refused: Mapping[str, Refusal] = field(default_factory=dict)


class Command(Enum):
    """What is to be done next about ``state.coming`` (RETIRE: about ``state.leaving``).

    ``FETCH``: get and verify its files. ``LOAD``: into an engine, unseen by clients. ``PROVE``: ask it who it is.
    ``TURN_AND_RETIRE``: from now on it answers; let the old one finish and unload it.
    """

    FETCH = "fetch"
    LOAD = "load"
    PROVE = "prove"
    TURN_AND_RETIRE = "turn"


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
        return turned, Command.TURN_AND_RETIRE
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


def _next(state: State, now: float) -> tuple[State, Command | None]:
    if state.step is not Step.REST or state.wanted is None or state.wanted == state.live:
        return state, None
    refusal = state.refused.get(state.wanted)
    if refusal is not None and now < refusal.again:
        return state, None
    return replace(state, step=Step.FETCHING, coming=state.wanted), Command.FETCH
