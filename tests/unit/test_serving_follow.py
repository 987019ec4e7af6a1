"""Where the alias points: asked again and again, at once when woken, seldom while the registry is away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest

from namesake.errors import RegistryError
from namesake.registry import Version
from namesake_serving import follow
from namesake_serving.follow import Follower
from tests.unit.loops import within

URI = "models:/ccb@champion"
in_a_loop = within(10)


def version(number: int) -> Version:
    """A version of ccb."""
    return Version("ccb", number, "run", "source", "READY", {}, 0)


class Registry:
    """A registry that answers from a list, its last answer for ever; an error is raised."""

    def __init__(self, *answers: int | RegistryError) -> None:
        self.answers, self.asked = list(answers), list[str]()

    def resolve(self, uri: str) -> Version:
        """The next answer."""
        self.asked.append(uri)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, RegistryError):
            raise answer
        return version(answer)


class Told:
    """What the follower told, in order: a version's number or an error's message."""

    def __init__(self) -> None:
        self.all: list[int | str] = []
        self._more = asyncio.Event()

    async def tell(self, version: Version) -> None:
        """A version."""
        self._add(version.number)

    def trouble(self, error: RegistryError) -> None:
        """An error."""
        self._add(error.message)

    def _add(self, what: int | str) -> None:
        self.all.append(what)
        self._more.set()

    async def until(self, count: int) -> list[int | str]:
        """Wait for so many."""
        while len(self.all) < count:
            self._more.clear()
            await self._more.wait()
        return self.all[:count]


@asynccontextmanager
async def following(registry: Registry, seconds: float) -> AsyncIterator[tuple[Follower, Told]]:
    """A follower at work."""
    told = Told()
    follower = Follower(URI, seconds, told.tell, told.trouble, resolve=registry.resolve)
    task = asyncio.create_task(follower.follow())
    try:
        yield follower, told
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


@in_a_loop
async def test_each_answer_is_told_the_same_one_too() -> None:
    registry = Registry(1, 1, 2, 3)
    async with following(registry, 0.001) as (_, told):
        assert await told.until(5) == [1, 1, 2, 3, 3]
    assert set(registry.asked) == {URI}


@in_a_loop
async def test_the_first_question_is_asked_at_once() -> None:
    async with following(Registry(1), 3600) as (_, told):
        assert await told.until(1) == [1]


@in_a_loop
async def test_an_error_is_told_and_does_not_end_the_following() -> None:
    away = RegistryError("away")
    async with following(Registry(1, away, away, 2), 0.001) as (_, told):
        assert await told.until(4) == [1, "away", "away", 2]


@in_a_loop
async def test_who_is_woken_asks_now_also_while_the_registry_is_away() -> None:
    registry = Registry(1, RegistryError("away"), 2)
    async with following(registry, 3600) as (follower, told):
        await told.until(1)
        follower.wake()
        assert await told.until(2) == [1, "away"]
        follower.wake()
        assert await told.until(3) == [1, "away", 2]


@in_a_loop
async def test_a_call_that_comes_while_the_registry_is_asked_is_not_lost() -> None:
    follower: Follower | None = None

    class Waking(Registry):
        """Somebody moves the alias between the registry's answer and its arrival."""

        def resolve(self, uri: str) -> Version:
            found = super().resolve(uri)
            if len(self.asked) == 1:
                assert follower is not None
                loop.call_soon_threadsafe(follower.wake)
            return found

    loop = asyncio.get_running_loop()
    async with following(Waking(1, 2), 3600) as (made, told):
        follower = made
        assert await told.until(2) == [1, 2]


@in_a_loop
async def test_many_calls_at_once_are_one_question() -> None:
    registry = Registry(1)
    async with following(registry, 3600) as (follower, told):
        await told.until(1)
        await asyncio.sleep(0)
        for _ in range(10):
            follower.wake()
        await told.until(2)
        await asyncio.sleep(0.02)
    assert len(registry.asked) == 2


@in_a_loop
async def test_what_the_listener_cannot_take_is_not_hidden() -> None:
    async def tell(_version: Version) -> None:
        raise ZeroDivisionError

    follower = Follower(URI, 3600, tell, lambda _: None, resolve=Registry(1).resolve)
    with pytest.raises(ZeroDivisionError):
        await follower.follow()


class Pauses:
    """Stands for ``asyncio.timeout``: notes how long the follower would wait, and does not wait."""

    def __init__(self) -> None:
        self.all: list[float] = []
        self.enough = asyncio.Event()

    def timeout(self, seconds: float) -> asyncio.Timeout:
        """Note the pause."""
        self.all.append(seconds)
        if len(self.all) == 12:
            self.enough.set()
        return asyncio.timeout(0)


async def pauses(monkeypatch: pytest.MonkeyPatch, registry: Registry, seconds: float) -> list[float]:
    """How long the follower waits after each of its first dozen questions."""
    noted = Pauses()

    class Asyncio:
        """The module as the follower sees it."""

        Event, to_thread, timeout = asyncio.Event, asyncio.to_thread, noted.timeout

    monkeypatch.setattr(follow, "asyncio", Asyncio)
    async with following(registry, seconds):
        await noted.enough.wait()
    return noted.all[:12]


@in_a_loop
async def test_the_pauses_differ_and_none_is_longer_than_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    found = await pauses(monkeypatch, Registry(1), 2)
    assert all(1.2 <= pause <= 2 for pause in found)
    assert len(set(found)) > 6


@in_a_loop
async def test_the_pause_doubles_up_to_a_minute_while_the_registry_is_away_and_is_short_again_after(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(follow.random, "uniform", lambda _low, high: high)
    away = [RegistryError("away")] * 8
    found = await pauses(monkeypatch, Registry(1, *away, 1), 2)
    assert found == [2, 4, 8, 16, 32, 60, 60, 60, 60, 2, 2, 2]


@in_a_loop
async def test_a_registry_that_is_away_is_never_asked_more_often_than_one_that_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(follow.random, "uniform", lambda _low, high: high)
    found = await pauses(monkeypatch, Registry(RegistryError("away")), 600)
    assert min(found) >= 600
