"""What each key may have: requests and tokens a minute, and its turn at the engine. Pure but for the clock."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from namesake_serving.keys import Key


class Bucket:
    """A token bucket: full at first, filled again evenly within a minute (https://en.wikipedia.org/wiki/Token_bucket).

    It can be in debt: what a reply costs is known when it has ended.
    """

    def __init__(self, most: int, now: Callable[[], float] = time.monotonic) -> None:
        self.most, self._now = most, now
        self._level, self._stamp = float(most), now()

    @property
    def level(self) -> float:
        """How much is in it."""
        now = self._now()
        self._level = min(self.most, self._level + (now - self._stamp) * self.most / 60)
        self._stamp = now
        return self._level

    def seconds(self, amount: float) -> float:
        """Time until there is so much in it; 0 where there is. More than it holds counts as what it holds."""
        return max(0.0, (min(amount, self.most) - self.level) * 60 / self.most)

    def take(self, amount: float) -> None:
        """Take it out; less than nothing puts back."""
        self._level = min(self.most, self.level - amount)


@dataclass
class Allowance:
    """The buckets of one key; ``None``: no limit."""

    requests: Bucket | None
    tokens: Bucket | None

    def headers(self) -> Iterator[tuple[str, str]]:
        """OpenAI's ``x-ratelimit-`` headers (https://developers.openai.com/api/docs/guides/rate-limits)."""
        for name, bucket in (("requests", self.requests), ("tokens", self.tokens)):
            if bucket is not None:
                yield f"x-ratelimit-limit-{name}", str(bucket.most)
                yield f"x-ratelimit-remaining-{name}", str(max(0, int(bucket.level)))
                yield f"x-ratelimit-reset-{name}", _duration(bucket.seconds(bucket.most))


class Allowances:
    """The allowance of each key, by its name.

    Args:
        requests: requests a minute of a key that has no limit of its own; 0: none.
        tokens: the same of tokens.
    """

    def __init__(self, requests: int, tokens: int) -> None:
        self._requests, self._tokens = requests, tokens
        self._of: dict[tuple[str, int, int], Allowance] = {}

    def of(self, key: Key) -> Allowance:
        """What is left to the key. A limit that was changed starts full."""
        requests = self._requests if key.requests is None else key.requests
        tokens = self._tokens if key.tokens is None else key.tokens
        asked = (key.name, requests, tokens)  # keys of one name with limits of their own must not reset each other's
        if asked not in self._of:
            self._of[asked] = Allowance(*(Bucket(most) if most else None for most in (requests, tokens)))
        return self._of[asked]


class Full(Exception):
    """There is no place in the queue."""


class Turns:
    """A bounded queue that is fair to each key.

    Args:
        places: how many are worked on at a time.
        most: how many there may be, those that wait included.

    The next place goes to the key that has the fewest, among equals to the one that has waited longest since its last.
    When the queue is full, whoever comes takes the place of the newest that waits of the key with the most, if that has
    at least two more.
    """

    def __init__(self, places: int, most: int) -> None:
        self._places, self.most = places, most
        self._running = Counter[str]()
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}

    @property
    def waiting(self) -> int:
        """How many wait."""
        return sum(map(len, self._waiting.values()))

    def room(self, key: str) -> bool:
        """Whether one more of this key would be let in."""
        return self._running.total() + self.waiting < self.most or self._greediest(key) is not None

    @asynccontextmanager
    async def take(self, key: str) -> AsyncIterator[None]:
        """Wait for a place and hold it.

        Raises:
            Full: there is none, or another key had a better claim to the one in the queue.
        """
        if not self.room(key):
            raise Full
        if self._running.total() < self._places:  # then nobody waits
            self._running[key] += 1
        else:
            await self._wait(key)
        try:
            yield
        finally:
            self._leave(key)

    async def _wait(self, key: str) -> None:
        if self._running.total() + self.waiting >= self.most and (greediest := self._greediest(key)) is not None:
            newest = self._waiting[greediest].pop()
            self._tidy(greediest)
            if not newest.done():
                newest.set_exception(Full())
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(key, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self._leave(key)  # the place came at the moment the client went
            elif turn in self._waiting.get(key, ()):
                self._waiting[key].remove(turn)
                self._tidy(key)
            raise

    def _leave(self, key: str) -> None:
        self._running[key] -= 1
        if not self._running[key]:
            del self._running[key]
        while self._waiting:
            following = min(self._waiting, key=lambda name: self._running[name])
            turns = self._waiting.pop(following)
            turn = turns.popleft()
            if turns:
                self._waiting[following] = turns  # at the end: the others are asked first
            if not turn.done():  # else its client has just gone
                self._running[following] += 1
                turn.set_result(None)
                break

    def _greediest(self, key: str) -> str | None:
        """The key that has to give a waiting place to this one."""
        if not self._waiting:
            return None
        most = max(self._waiting, key=self._all)
        return most if self._all(most) > self._all(key) + 1 else None

    def _all(self, key: str) -> int:
        return self._running[key] + len(self._waiting.get(key, ()))

    def _tidy(self, key: str) -> None:
        if not self._waiting[key]:
            del self._waiting[key]


def _duration(seconds: float) -> str:
    """As OpenAI writes it: ``6m0s``, ``1.5s``, ``120ms``."""
    thousandths = round(seconds * 1000)
    if thousandths < 1000:
        return f"{thousandths}ms" if thousandths else "0s"
    minutes, rest = divmod(thousandths, 60_000)
    return (f"{minutes}m" if minutes else "") + f"{rest / 1000:g}s"
