"""Requests and tokens a minute, and turns: what one key takes is not taken from the others."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from namesake_serving.keys import Key, Keys
from namesake_serving.limits import Allowance, Allowances, Bucket, Full, Turns, _duration
from tests.unit.loops import within


class Clock:
    """A clock that goes when it is told."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


# --------------------------------------------------------------------------------------------------- buckets


def test_a_bucket_is_full_at_first_and_fills_evenly_within_a_minute() -> None:
    clock = Clock()
    bucket = Bucket(60, clock)
    bucket.take(60)
    assert (bucket.level, bucket.seconds(1), bucket.seconds(60)) == (0, 1, 60)
    clock.seconds += 1.5
    assert (bucket.level, bucket.seconds(1)) == (1.5, 0)
    clock.seconds += 1000
    assert bucket.level == 60


def test_debt_is_paid_before_anything_more_is_given() -> None:
    clock = Clock()
    bucket = Bucket(600, clock)
    bucket.take(1200)
    assert (bucket.level, bucket.seconds(1)) == (-600, 60.1)
    bucket.take(-300)
    assert bucket.level == -300


def test_what_is_put_back_never_makes_more_than_full_and_what_is_larger_than_full_waits_for_full() -> None:
    bucket = Bucket(10, Clock())
    bucket.take(-5)
    assert (bucket.level, bucket.seconds(1_000_000)) == (10, 0)
    bucket.take(1)
    assert bucket.seconds(1_000_000) == 6


@given(st.lists(st.tuples(st.floats(0, 10), st.integers(1, 30)), max_size=60))
def test_in_any_minute_at_most_twice_the_limit_goes_through(steps: list[tuple[float, int]]) -> None:
    clock = Clock()
    bucket, through = Bucket(30, clock), list[tuple[float, int]]()
    for wait, amount in steps:
        clock.seconds += wait
        if not bucket.seconds(amount):
            bucket.take(amount)
            through.append((clock.seconds, amount))
    for start, _ in through:
        assert sum(amount for at, amount in through if start <= at <= start + 60) <= 60.001


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (0.0004, "0s"),
        (0.12, "120ms"),
        (1, "1s"),
        (59.5, "59.5s"),
        (60, "1m0s"),
        (360, "6m0s"),
        (61.5, "1m1.5s"),
    ],
)
def test_a_duration_is_written_as_openai_writes_it(seconds: float, text: str) -> None:
    assert _duration(seconds) == text


def test_only_limits_that_there_are_have_headers() -> None:
    assert dict(Allowance(None, None).headers()) == {}
    bucket = Bucket(60, Clock())
    bucket.take(1.5)
    assert dict(Allowance(None, bucket).headers()) == {
        "x-ratelimit-limit-tokens": "60",
        "x-ratelimit-remaining-tokens": "58",
        "x-ratelimit-reset-tokens": "1.5s",
    }


def test_a_keys_own_limits_win_over_those_for_all_and_keys_of_one_name_share_them() -> None:
    allowances = Allowances(60, 0)
    alice = Key("alice", 5, 100)
    found = allowances.of(alice)
    assert found.requests is not None
    assert found.tokens is not None
    assert (found.requests.most, found.tokens.most) == (5, 100)
    found.requests.take(5)
    assert allowances.of(replace(alice)) is found
    bob = allowances.of(Key("bob"))
    assert (bob.requests and bob.requests.most, bob.tokens) == (60, None)
    changed = allowances.of(Key("alice", 6, None))
    assert changed.requests is not None
    assert (changed.requests.level, changed.tokens) == (6, None)


def test_two_keys_of_one_name_with_limits_of_their_own_do_not_fill_each_others_again() -> None:
    allowances, admitted = Allowances(0, 0), 0
    for number in range(100):
        bucket = allowances.of(Key("alice", 5 + number % 2, None)).requests
        assert bucket is not None
        if not bucket.seconds(1):
            bucket.take(1)
            admitted += 1
    assert admitted == 5 + 6


def test_limits_stand_behind_the_digest_of_a_key_and_a_line_with_a_fault_lets_nobody_in(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    lines = [
        ("alice", "a", "requests=60 tokens=20000"),
        ("bob", "b", "tokens=5"),
        ("", "c", ""),
        ("dan", "d", "requests=0"),
        ("eve", "e", "requests=many"),
        ("fay", "f", "request=1"),
        ("gus", "g", "requests=1 tokens=-1"),
    ]
    digests = {key: sha256(key.encode()).hexdigest() for _, key, _ in lines}
    file.write_text("".join(f"{name} {digests[key]} {more}\n" for name, key, more in lines), encoding="utf-8")
    keys = Keys((), file)
    found = {key: keys.find(f"Bearer {key}") for key in digests}
    assert found == {
        "a": Key("alice", 60, 20000),
        "b": Key("bob", None, 5),
        "c": Key(digests["c"][:8]),
        **dict.fromkeys("defg"),
    }


# --------------------------------------------------------------------------------------------------- turns


class Crowd:
    """Requests that hold their place until they are told to go."""

    def __init__(self, places: int, most: int) -> None:
        self.turns = Turns(places, most)
        self.let_in: list[str] = []
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self._go: dict[str, asyncio.Event] = {}

    async def come(self, *names: str) -> None:
        """Requests of the keys that their first letters are."""
        for name in names:
            self._go[name] = asyncio.Event()
            self.tasks[name] = asyncio.create_task(self._one(name))
            await asyncio.sleep(0)

    async def _one(self, name: str) -> None:
        async with self.turns.take(name[0]):
            self.let_in.append(name)
            await self._go[name].wait()

    async def go(self, *names: str) -> None:
        """They are answered."""
        for name in names:
            self._go[name].set()
            await self.tasks[name]
            await asyncio.sleep(0)

    async def refused(self, name: str) -> bool:
        """Whether it had to go."""
        await asyncio.sleep(0)
        return self.tasks[name].done() and isinstance(self.tasks[name].exception(), Full)


in_a_loop = within(5)


@in_a_loop
async def test_a_key_that_asks_for_much_does_not_make_another_wait_behind_all_of_it() -> None:
    crowd = Crowd(2, 20)
    await crowd.come(*(f"a{number}" for number in range(8)), "b0", "b1")
    assert crowd.let_in == ["a0", "a1"]
    await crowd.go("a0")
    assert crowd.let_in[2:] == ["b0"]
    await crowd.go("a1")
    assert crowd.let_in[3:] == ["a2"]
    await crowd.go("b0")
    assert crowd.let_in[4:] == ["b1"]
    await crowd.go("b1", "a2", "a3", "a4", "a5", "a6", "a7")
    assert crowd.let_in[5:] == ["a3", "a4", "a5", "a6", "a7"]
    assert (crowd.turns.waiting, crowd.turns.room("a")) == (0, True)


@in_a_loop
async def test_when_the_queue_is_full_the_newest_of_the_key_with_most_makes_room() -> None:
    crowd = Crowd(1, 4)
    await crowd.come("a0", "a1", "a2", "a3")
    assert not crowd.turns.room("a")
    await crowd.come("a4")
    assert await crowd.refused("a4")
    await crowd.come("b0")
    assert await crowd.refused("a3")
    assert not await crowd.refused("b0")
    await crowd.come("b1", "b2")  # two of each are there by then
    assert await crowd.refused("a2")
    assert await crowd.refused("b2")
    assert not await crowd.refused("b1")
    await crowd.go("a0", "a1", "b0", "b1")
    assert crowd.let_in == ["a0", "a1", "b0", "b1"]


@in_a_loop
async def test_who_goes_while_it_waits_or_at_the_moment_its_turn_comes_leaves_its_place_to_the_next() -> None:
    crowd = Crowd(1, 10)
    await crowd.come("a0", "b0", "c0", "a1")
    crowd.tasks["b0"].cancel()  # has not yet run when a0 goes
    crowd._go["a0"].set()
    await crowd.tasks["a0"]
    await asyncio.sleep(0)
    assert crowd.let_in == ["a0", "c0"]
    await crowd.go("c0", "a1")
    held = crowd.turns.take("e")
    await held.__aenter__()
    await crowd.come("a2")
    with suppress(StopIteration):
        held.__aexit__(None, None, None).send(None)  # at once: its turn has come, and it has not yet run
    crowd.tasks["a2"].cancel()
    with suppress(asyncio.CancelledError):
        await crowd.tasks["a2"]
    await crowd.come("d0")
    assert crowd.let_in == ["a0", "c0", "a1", "d0"]
    assert crowd.turns.waiting == 0


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["come", "go", "cancel"])), max_size=60))
def test_no_place_is_lost_and_none_is_given_twice(steps: list[tuple[str, str]]) -> None:
    async def play() -> None:
        crowd = Crowd(3, 8)
        for number, (key, what) in enumerate(steps):
            if what == "come":
                await crowd.come(f"{key}{number}")
            for name in [name for name, task in crowd.tasks.items() if not task.done() and name[0] == key][:1]:
                if what == "go":
                    crowd._go[name].set()
                elif what == "cancel":
                    crowd.tasks[name].cancel()
            for _ in range(4):
                await asyncio.sleep(0)
            running = [name for name in crowd.let_in if not crowd.tasks[name].done()]
            waiting = [name for name, task in crowd.tasks.items() if not task.done() and name not in running]
            assert len(running) <= 3
            assert not waiting or len(running) == 3
            assert crowd.turns.waiting == len(waiting)
            assert len(running) + len(waiting) <= 8
        for task in crowd.tasks.values():
            task.cancel()
        await asyncio.gather(*crowd.tasks.values(), return_exceptions=True)
        assert (crowd.turns.waiting, crowd.turns._running.total()) == (0, 0)

    asyncio.run(play())
