"""What the alias points to now: the registry is polled; a webhook only wakes the poll."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

from namesake import registry
from namesake.errors import RegistryError
from namesake.registry import Version

LONGEST_PAUSE = 60.0
"""Seconds between two questions to a registry that does not answer."""

JITTER = 0.4
"""What a pause may be shorter by, so that many servers do not ask at the same moment; never longer, so that any two of
them are apart by one ``poll_seconds`` at most."""


def where_it_points(uri: str) -> Version | None:
    """The version of an alias that there need not be.

    Raises:
        RegistryError: the registry does not answer.
    """
    name, alias = uri.removeprefix("models:/").split("@")
    number = registry.alias_of(name, alias)
    return None if number is None else registry.resolve(f"models:/{name}/{number}")


class Follower:
    """Asks where ``models:/ccb@champion`` points, for as long as the server runs.

    Args:
        uri: the alias; a fixed version (``models:/ccb/3``) is asked for like one and never moves.
        seconds: between two questions, at most.
        tell: called with each answer.
        trouble: called with each error; the pause then doubles up to ``LONGEST_PAUSE``.
        resolve: who is asked; none: the alias is gone, where that is no error.
    """

    def __init__(
        self,
        uri: str,
        seconds: float,
        tell: Callable[[Version | None], Awaitable[None]],
        trouble: Callable[[RegistryError], None],
        *,
        resolve: Callable[[str], Version | None] = registry.resolve,
    ) -> None:
        self._uri, self._seconds, self._tell, self._trouble = uri, seconds, tell, trouble
        self.resolve = resolve
        self._woken = asyncio.Event()

    def wake(self) -> None:
        """Ask now."""
        self._woken.set()

    async def follow(self) -> None:
        """Ask until cancelled."""
        pause = self._seconds
        while True:
            self._woken.clear()
            try:
                version = await asyncio.to_thread(self.resolve, self._uri)
            except RegistryError as error:
                self._trouble(error)
                pause = max(min(pause * 2, LONGEST_PAUSE), self._seconds)
            else:
                pause = self._seconds
                await self._tell(version)
            try:
                async with asyncio.timeout(pause * random.uniform(1 - JITTER, 1)):
                    await self._woken.wait()
            except TimeoutError:
                pass
