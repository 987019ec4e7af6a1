"""Whether a challenger may go on answering a share of the requests, judged by what it and the champion did. Pure."""

from __future__ import annotations

import statistics
from collections import deque

WINDOW = 500
"""Requests of each side that are looked at, the newest."""

LEAST_FAILURES = 5
"""One that fails as often as that is judged at once, however few requests there were."""

HANGS = 30.0
"""Seconds after which a stream that has not begun is a failure of the version that is to answer, though it may still
come: one that hangs would never be judged otherwise."""


class Judge:
    """Counts what either side answered.

    Args:
        errors: how much greater the challenger's part of failed requests may be, 0.02 for two in a hundred.
        latency: how many times as long as the champion the challenger may take to the first byte of a reply (median).
        least: requests of either side before their times are compared.
    """

    def __init__(self, errors: float, latency: float, least: int) -> None:
        self._errors, self._latency, self._least = errors, latency, least
        self.begin()

    def begin(self) -> None:
        """Either side is another version now: nothing is known."""
        self._failed: dict[bool, deque[bool]] = {side: deque(maxlen=WINDOW) for side in (False, True)}
        self._seconds: dict[bool, deque[float]] = {side: deque(maxlen=WINDOW) for side in (False, True)}

    def note(self, challenger: bool, failed: bool, seconds: float) -> None:
        """One request was answered; ``seconds`` to the first byte count where it did not fail."""
        self._failed[challenger].append(failed)
        if not failed:
            self._seconds[challenger].append(seconds)

    def verdict(self) -> str:
        """Why the challenger has to go back; empty: it may go on."""
        failures = sum(self._failed[True])
        theirs, ours = (sum(self._failed[side]) / max(len(self._failed[side]), 1) for side in (True, False))
        if failures >= LEAST_FAILURES and theirs > ours + self._errors:
            return (
                f"{theirs:.1%} of its {len(self._failed[True])} requests failed, {ours:.1%} of the champion's; "
                f"{self._errors:.1%} more are allowed"
            )
        if min(len(self._seconds[side]) for side in (True, False)) >= self._least:
            slow, usual = (statistics.median(self._seconds[side]) for side in (True, False))
            if slow > usual * self._latency:
                return (
                    f"it takes {slow:.3f} s to the first byte (median), the champion {usual:.3f} s; "
                    f"{self._latency:g} times as long is allowed"
                )
        return ""
