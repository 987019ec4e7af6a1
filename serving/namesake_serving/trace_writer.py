"""The process that writes traces and feedback into MLflow, so that the gateway's own loop never waits for it.

Lines of JSON come on standard input and go on standard output (:mod:`traces` is the other end). Feedback goes first:
somebody waits for it. If its trace is still waiting, that is written before it.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, BinaryIO

from namesake import process
from namesake.errors import RegistryError
from namesake_serving.shadow import text_of

AT_ONCE = 50
"""Traces of one call."""

MAX_TEXT_CHARACTERS = 131_072
"""Of a request and of a reply, each, in a trace; what is longer is cut."""

LAST_SECONDS = 5.0
"""What still waits when the gateway ends may take so long."""

_NICE = 5

_log = logging.getLogger("namesake.traces")


class Writer:
    """What waits, and what is told of it."""

    def __init__(self, told: BinaryIO) -> None:
        from namesake.traces import Traces

        self._told, self._traces = told, Traces()
        self._change = threading.Condition()
        self._waiting: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._feedback: deque[dict[str, Any]] = deque()
        self._ended = False

    def read(self, lines: Iterable[bytes]) -> None:
        """Take lines until there are no more."""
        for line in lines:
            item = json.loads(line)
            with self._change:
                if "feedback" in item:
                    self._feedback.append(item)
                else:
                    self._waiting[item["trace"]] = item
                self._change.notify()
        with self._change:
            self._ended = True
            self._change.notify()

    def write(self) -> None:
        """Write what waits until nothing more can come."""
        while True:
            with self._change:
                while not (self._feedback or self._waiting or self._ended):
                    self._change.wait()
                if not (self._feedback or self._waiting):
                    return
                said = self._feedback.popleft() if self._feedback else None
                if said is None:
                    some = [self._waiting.popitem(last=False)[1] for _ in range(min(AT_ONCE, len(self._waiting)))]
                else:
                    own = self._waiting.pop(said["trace"], None)
                    some = [own] if own is not None else []
            if some:
                self._log(some)
            if said is not None:
                self._say(said)

    def _log(self, some: list[dict[str, Any]]) -> None:
        from namesake.traces import Answer

        why = ""
        try:
            self._traces.log([Answer(**_cut(one)) for one in some])
        except RegistryError as error:
            why = error.message
        self._tell({"written": len(some), "why": why})

    def _say(self, said: dict[str, Any]) -> None:
        from namesake.traces import NoTrace

        number, until = said.pop("feedback"), said.pop("until")
        answer: dict[str, Any] = {"feedback": number}
        try:
            if time.time() > until:
                return  # whoever asked has been told that it failed
            answer["id"] = self._traces.feedback(**said)
        except NoTrace:
            answer["none"] = True
        except RegistryError as error:
            answer["why"] = error.message
        self._tell(answer)

    def _tell(self, what: dict[str, Any]) -> None:
        self._told.write(json.dumps(what).encode() + b"\n")
        self._told.flush()


def _cut(one: dict[str, Any]) -> dict[str, Any]:
    """An answer as it came, with the reply read and no text longer than the bound."""
    if one.get("asked_for") is not None:
        text = json.dumps(one["asked_for"], ensure_ascii=False)
        if len(text) > MAX_TEXT_CHARACTERS:
            one["asked_for"] = {"cut": text[:MAX_TEXT_CHARACTERS]}
    if one.get("said") is not None:
        one["said"] = text_of(one["said"].encode())[:MAX_TEXT_CHARACTERS]
    return one


def main() -> None:
    """Write until standard input ends."""
    process.settle()
    # Whatever waits is for MLflow to take soon or not at all: nobody is served by minutes of trying again.
    process.hurry()
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.nice(_NICE)  # the answers themselves come first
    for number in (signal.SIGINT, signal.SIGTERM):  # the gateway ends this by ending its input, when it has finished
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(level=logging.ERROR, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    told = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is not for the gateway
    writer = Writer(told)

    def read() -> None:
        writer.read(sys.stdin.buffer)
        timer = threading.Timer(LAST_SECONDS, os._exit, [0])
        timer.daemon = True
        timer.start()

    threading.Thread(target=read, daemon=True).start()
    with suppress(BrokenPipeError):  # the gateway was killed
        writer.write()
    os._exit(0)  # the other thread may be reading still, which Python's own end would not bear


if __name__ == "__main__":
    main()
