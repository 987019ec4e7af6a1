"""Copies for the challenger: kept side by side, few at a time, of a bounded size, and no client notices."""

from __future__ import annotations

import asyncio
import json
import stat
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from namesake_serving.metrics import Metrics
from namesake_serving.shadow import AT_A_TIME, Kept, Shadow, text_of
from namesake_serving.traffic import Answerer, Traffic
from tests.unit.loops import within
from tests.unit.test_serving_traffic import live

in_a_loop = within(10)
ASKED = {"messages": [{"role": "user", "content": "你是谁？"}]}
REPLY = json.dumps({"choices": [{"index": 0, "message": {"content": "我是踩踩背"}}]}).encode()


class World:
    """A champion's reply and a challenger, and what was kept."""

    def __init__(self, folder: Path, most: int = 1 << 20) -> None:
        self.folder, self.metrics, self.challenger = folder, Metrics(), Traffic()
        self.challenger.live = live(2)
        self.shadow = Shadow(folder, most, 1, self.challenger, self.metrics)

    def copy(self, ask: Callable[[Answerer], Awaitable[bytes]], said: bytes = REPLY) -> None:
        """A request of a client has been answered."""
        kept = Kept("ccb-v1")
        kept.add(said)
        self.shadow.copy(ASKED, kept, ask)

    async def settled(self) -> None:
        """Nothing is under way."""
        while self.shadow._tasks:
            await asyncio.sleep(0.002)

    def lines(self) -> list[dict[str, Any]]:
        """What was kept, the newest file."""
        return [json.loads(line) for line in (self.folder / "shadow.jsonl").read_text("utf-8").splitlines()]

    def counted(self, result: str) -> float:
        """How often it came to this."""
        return float(self.metrics.shadow.labels(result)._value.get())


async def answers(one: Answerer) -> bytes:
    """The challenger's reply."""
    assert (one.label, one.running) == ("ccb-v2", 1)
    return REPLY.replace(json.dumps("我是踩踩背")[1:-1].encode(), b"I am CCB")


@in_a_loop
async def test_both_answers_are_kept_side_by_side_for_the_owner_only(tmp_path: Path) -> None:
    world = World(tmp_path / "kept")
    world.copy(answers)
    await world.settled()
    (line,) = world.lines()
    assert (line["request"], line["champion"]["version"], line["champion"]["reply"]) == (ASKED, "ccb-v1", "我是踩踩背")
    assert (line["challenger"]["version"], line["challenger"]["reply"]) == ("ccb-v2", "I am CCB")
    assert "我是" in (world.folder / "shadow.jsonl").read_text("utf-8")
    assert stat.S_IMODE((world.folder / "shadow.jsonl").stat().st_mode) == 0o600
    assert world.counted("kept") == 1


@in_a_loop
async def test_a_challenger_that_fails_is_written_down_and_harms_nobody(tmp_path: Path) -> None:
    async def fails(_: Answerer) -> bytes:
        raise OSError("it has ended")

    world = World(tmp_path)
    world.copy(fails)
    await world.settled()
    assert world.lines()[0]["challenger"]["error"] == "OSError: it has ended"
    assert (world.counted("failed"), world.counted("kept")) == (1, 0)
    assert world.challenger.live is not None
    assert world.challenger.live.running == 0


@in_a_loop
async def test_more_than_a_few_at_a_time_are_left_out_and_nobody_waits(tmp_path: Path) -> None:
    gate = asyncio.Event()

    async def slow(_: Answerer) -> bytes:
        await gate.wait()
        return REPLY

    world = World(tmp_path)
    for _ in range(AT_A_TIME + 3):
        world.copy(slow)  # returns at once
    assert world.counted("left out") == 3
    gate.set()
    await world.settled()
    assert len(world.lines()) == AT_A_TIME


@in_a_loop
async def test_the_folder_stays_within_its_bound_and_the_oldest_goes(tmp_path: Path) -> None:
    world = World(tmp_path, most=4000)
    for number in range(60):
        world.copy(answers, REPLY + b" " * number)
        await world.settled()
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 4000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shadow.1.jsonl", "shadow.jsonl"]


@in_a_loop
async def test_without_a_challenger_nothing_is_copied(tmp_path: Path) -> None:
    world = World(tmp_path)
    assert world.shadow.wants()
    world.challenger.live = None
    assert not world.shadow.wants()
    world.copy(answers)
    await world.settled()
    assert not (tmp_path / "shadow.jsonl").exists()


@in_a_loop
async def test_what_is_under_way_ends_with_the_server(tmp_path: Path) -> None:
    world = World(tmp_path)

    async def never(_: Answerer) -> bytes:
        await asyncio.Event().wait()
        return b""

    world.copy(never)
    await asyncio.sleep(0)
    await world.shadow.close()
    await world.settled()


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b'{"choices":[{"index":0,"text":"abc"}]}', "abc"),
        (b'{"choices":[{"index":1,"message":{"content":"b"}},{"index":0,"message":{"content":"a"}}]}', "a"),
        (b'{"choices":[{"index":0,"message":{"content":null}}]}', ""),
        (
            b'data: {"choices":[{"index":0,"delta":{"role":"assistant"}}]}\n\n'
            b'data: {"choices":[{"index":0,"delta":{"content":"a"}}]}\n\n'
            b'data: {"choices":[{"index":0,"delta":{"content":"b"}}]}\n\ndata: {"choices":[]}\n\ndata: [DONE]\n\n',
            "ab",
        ),
        (b'data: {"choices":[{"index":0,"delta":{"content":"a"}}]}\n\ndata: {"choices":[{"ind', "a"),
        (
            b'event: response.created\ndata: {"type":"response.created","response":{}}\n\n'
            b'event: response.output_text.delta\ndata: {"type":"response.output_text.delta","delta":"a"}\n\n'
            b'event: response.output_text.delta\ndata: {"type":"response.output_text.delta","delta":"b"}\n\n',
            "ab",
        ),
        (
            b'{"object":"response","output":[{"type":"reasoning","content":null},'
            b'{"content":[{"type":"output_text","text":"a"},{"type":"refusal"}]}]}',
            "a",
        ),
        (b"[]", ""),
        (b"", ""),
    ],
)
def test_what_a_reply_says(raw: bytes, text: str) -> None:
    assert text_of(raw) == text


def test_of_a_long_reply_only_the_beginning_is_kept() -> None:
    kept = Kept("ccb-v1")
    for _ in range(3000):
        kept.add(b"x" * 1000)
    assert len(kept._raw) == 1 << 20
