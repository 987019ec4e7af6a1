"""What the challenger would have said: a copy of some requests, asked when the client has its answer, and kept.

No client waits for it or sees it: the copy is sent after the last byte of the champion's reply, few at a time, and
left out where enough are under way. Both answers are lines of JSON in one folder, of a bounded size.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from namesake_serving.metrics import Metrics
from namesake_serving.traffic import Answerer, NotReady, Traffic

AT_A_TIME = 2
"""Copies under way at once: they share the machine with the requests of clients."""

_MOST_KEPT = 1 << 20
_PRIVATE = 0o600

Ask = Callable[[Answerer], Awaitable[bytes]]

_log = logging.getLogger("namesake.serving")


class Shadow:
    """Asks the challenger and keeps what it said.

    Args:
        folder: gets ``shadow.jsonl`` and, when that is full, ``shadow.1.jsonl``, the older half.
        most: bytes of both together.
        share: of the requests that are copied, 0..1.
    """

    def __init__(self, folder: Path, most: int, share: float, challenger: Traffic, metrics: Metrics) -> None:
        self._file, self._most, self._share = folder / "shadow.jsonl", most, share
        self._challenger, self._metrics = challenger, metrics
        self._tasks: set[asyncio.Task[None]] = set()
        self._one_at_a_time = asyncio.Lock()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def wants(self) -> bool:
        """Whether this request is to be copied."""
        return self._challenger.live is not None and random.random() < self._share

    def copy(self, asked: Mapping[str, Any], said: Kept, ask: Ask) -> None:
        """Ask the challenger the same; returns at once.

        Args:
            asked: the client's request.
            said: the champion's reply.
            ask: sends the request to whom it is given and returns the whole reply.
        """
        if len(self._tasks) >= AT_A_TIME:
            self._metrics.shadow.labels("left out").inc()
            return
        task = asyncio.create_task(self._copy(asked, said, ask))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Let go of what is under way."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _copy(self, asked: Mapping[str, Any], said: Kept, ask: Ask) -> None:
        line: dict[str, Any] = {"time": time.time(), "request": asked, "champion": said.told()}
        theirs = Kept()
        try:
            async with self._challenger.enter() as live:
                theirs.label = live.label
                theirs.add(await ask(live))
        except NotReady:
            return
        except Exception as error:  # whatever it is, it is the challenger's trouble and nobody else's
            line["challenger"] = {**theirs.told(), "error": f"{type(error).__name__}: {error}"}
            self._metrics.shadow.labels("failed").inc()
        else:
            line["challenger"] = theirs.told()
            self._metrics.shadow.labels("kept").inc()
        raw = json.dumps(line, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        if len(raw) > self._most // 2:
            return
        try:
            async with self._one_at_a_time:
                await asyncio.to_thread(self._keep, raw)
        except OSError as error:
            _log.error("shadow: %s", error)

    def _keep(self, raw: bytes) -> None:
        if self._file.exists() and self._file.stat().st_size + len(raw) > self._most // 2:
            self._file.replace(self._file.with_name("shadow.1.jsonl"))
        with self._file.open("ab") as stream:
            self._file.chmod(_PRIVATE)
            stream.write(raw)


class Kept:
    """A reply as it passed by, and how long it took."""

    def __init__(self, label: str = "") -> None:
        self.label, self._begun, self._seconds = label, time.monotonic(), 0.0
        self._raw = bytearray()

    @property
    def raw(self) -> bytes:
        """The reply as it came."""
        return bytes(self._raw)

    def add(self, chunk: bytes) -> None:
        """One part more, as it came; what goes beyond a megabyte is left out."""
        self._raw += chunk[: max(_MOST_KEPT - len(self._raw), 0)]
        self._seconds = time.monotonic() - self._begun

    def told(self) -> dict[str, Any]:
        """Version, seconds, and what was said (the first choice)."""
        return {"version": self.label, "seconds": round(self._seconds, 3), "reply": text_of(self.raw)}


def text_of(raw: bytes) -> str:
    """What a reply says, whole or streamed; empty where it is neither."""
    streamed = raw.startswith((b"data:", b"event:"))
    events = [line[5:] for line in raw.split(b"\n") if line.startswith(b"data:")] if streamed else [raw]
    said = ""
    with suppress(ValueError, TypeError, LookupError, AttributeError):  # [DONE], or an event that was cut
        for event in events:
            said += _said(json.loads(event))
    return said


def _said(event: Mapping[str, Any]) -> str:
    if event.get("type") == "response.output_text.delta":  # OpenAI's responses, streamed and whole
        return str(event["delta"])
    if event.get("object") == "response":
        parts = [part for item in event["output"] for part in item.get("content") or ()]
        return "".join(str(part["text"]) for part in parts if part["type"] == "output_text")
    for choice in event.get("choices", ()):
        if choice["index"] == 0:
            part = choice.get("message") or choice.get("delta") or choice
            return str(part.get("content") or part.get("text") or "")
    return ""
