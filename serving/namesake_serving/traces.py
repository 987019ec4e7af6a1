"""Traces of answers into MLflow, off the requests' way: a bounded queue into a process of its own.

No request waits for it or fails by it: where MLflow is away or slow, traces are dropped and counted. A process, not a
thread: MLflow's client takes milliseconds of the interpreter for a trace, and may stand still for longer.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import sys
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from namesake_serving.metrics import Metrics

MOST = 1000
"""Traces that may wait."""

MOST_BYTES = 32 << 20
"""The same in bytes, since some have texts."""

FEEDBACK_SECONDS = 15.0
"""How long whoever gives feedback waits for MLflow."""

MOST_FEEDBACK = 64
"""Feedback that may wait."""

_LAST_SECONDS = 6.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0
_LINE = 1 << 20

_log = logging.getLogger("namesake.traces")


class Unwritten(Exception):
    """MLflow did not take it; the text says why."""


class Unknown(Exception):
    """There is no such trace."""


class Traces:
    """The gateway's end of the queue.

    Args:
        share: of the answers that are traced, 0..1.
    """

    def __init__(self, share: float, metrics: Metrics) -> None:
        self._share, self._metrics = share, metrics
        self._sizes: deque[int] = deque()  # of the traces that have not been written, in their order or nearly
        self._bytes = 0
        self._asked: dict[int, asyncio.Future[str]] = {}
        self._number = 0
        self._early: list[bytes] = []
        self._process: asyncio.subprocess.Process | None = None
        self._work: asyncio.Task[None] | None = None
        self._closing = asyncio.Event()

    def start(self) -> None:
        """Start the process, where that has not been done: it takes a second to be of use."""
        if self._work is None:
            self._work = asyncio.create_task(self._run())

    def wants(self) -> bool:
        """Whether the next answer is to be traced."""
        return random.random() < self._share

    def add(self, answer: Mapping[str, Any]) -> None:
        """Have an answer logged; returns at once.

        Args:
            answer: the fields of :class:`namesake.traces.Answer`; ``said`` is the reply as it went out.
        """
        line = json.dumps(answer).encode() + b"\n"
        if len(self._sizes) >= MOST or self._bytes + len(line) > MOST_BYTES or self._closing.is_set():
            self._metrics.traces.labels("dropped").inc()
            return
        self._sizes.append(len(line))
        self._bytes += len(line)
        self._send(line)

    async def feedback(self, **said: Any) -> str:
        """Log what somebody says of an answer; the assessment's id.

        Args:
            said: as :meth:`namesake.traces.Traces.feedback` takes it.

        Raises:
            Unknown: there is no such trace.
            Unwritten: MLflow does not take it, or not in time.
        """
        if len(self._asked) >= MOST_FEEDBACK or self._closing.is_set():
            raise Unwritten("too much feedback is waiting")
        self._number += 1
        number = self._number
        self._asked[number] = asyncio.get_running_loop().create_future()
        until = time.time() + FEEDBACK_SECONDS
        self._send(json.dumps({"feedback": number, "until": until, **said}).encode() + b"\n")
        try:
            async with asyncio.timeout(FEEDBACK_SECONDS):
                return await self._asked[number]
        except TimeoutError:
            raise Unwritten(f"no answer within {FEEDBACK_SECONDS:g} s") from None
        finally:
            del self._asked[number]

    async def close(self) -> None:
        """Write what waits, if that can be done soon."""
        self._closing.set()
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
        if self._work is not None:
            _done, late = await asyncio.wait({self._work}, timeout=_LAST_SECONDS)
            if late:
                self._work.cancel()
                await asyncio.gather(self._work, return_exceptions=True)

    def _send(self, line: bytes) -> None:
        self.start()
        to = self._process.stdin if self._process is not None else None
        if to is None:
            self._early.append(line)
        elif not to.is_closing():
            to.write(line)

    async def _run(self) -> None:
        pause = _FIRST_PAUSE
        while not self._closing.is_set():
            begun, why = time.monotonic(), ""
            try:
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", "namesake_serving.trace_writer"),
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    limit=_LINE,
                )
            except OSError as error:  # no memory or no descriptor at this moment
                why = str(error)
            else:
                try:
                    await self._serve(process)
                finally:
                    self._process = None
                    if process.returncode is None:
                        process.kill()
                        await process.wait()
                    self._lost()
                why = f"status {process.returncode}"
            if self._closing.is_set():
                return
            _log.error("the process that writes traces ended by itself (%s); it is started again", why)
            if time.monotonic() - begun > _LONGEST_PAUSE:
                pause = _FIRST_PAUSE
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._closing.wait()
            pause = min(2 * pause, _LONGEST_PAUSE)
        self._lost()

    async def _serve(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        early, self._early = self._early, []
        process.stdin.writelines(early)
        self._process = process
        if self._closing.is_set():
            process.stdin.close()
        async for line in process.stdout:
            told = json.loads(line)
            if "feedback" in told:
                self._answered(told)
                continue
            self._metrics.traces.labels("failed" if told["why"] else "logged").inc(told["written"])
            if told["why"]:
                _log.warning("%s", told["why"])
            for _ in range(told["written"]):
                self._bytes -= self._sizes.popleft()
        await process.wait()

    def _answered(self, told: Mapping[str, Any]) -> None:
        waits = self._asked.get(told["feedback"])
        if waits is None or waits.done():
            return
        if "id" in told:
            waits.set_result(told["id"])
        else:
            waits.set_exception(Unknown() if told.get("none") else Unwritten(told["why"]))

    def _lost(self) -> None:
        """What waited is gone with the process."""
        self._metrics.traces.labels("failed").inc(len(self._sizes))
        self._sizes.clear()
        self._bytes = 0
        self._early.clear()
        for waits in self._asked.values():
            if not waits.done():
                waits.set_exception(Unwritten("the process that writes traces has ended"))
