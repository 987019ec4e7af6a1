"""API keys: who asks, and what that key may have a minute. Kept and compared as SHA-256."""

from __future__ import annotations

import hmac
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

_DIGEST = re.compile(r"[0-9a-f]{64}")
_LIMIT = re.compile(r"(requests|tokens)=([1-9][0-9]{0,11})")

_log = logging.getLogger("namesake.gateway")


@dataclass(frozen=True)
class Key:
    """Who asks.

    Attributes:
        name: what limits, turns and the log go by; keys of one name share them. Empty where no key is needed.
        requests: requests a minute; ``None``: what holds for everybody.
        tokens: tokens a minute, prompts and replies together; ``None``: what holds for everybody.
    """

    name: str = ""
    requests: int | None = None
    tokens: int | None = None


class Keys:
    """Which API keys are let in.

    Args:
        keys: keys themselves.
        file: a line ``name sha256-of-the-key`` for each key, then ``requests=60`` and ``tokens=20000`` (a minute) where
            it has limits of its own. Read again when it changes.
    """

    def __init__(self, keys: Sequence[str], file: Path | None) -> None:
        self._given = {digest: Key(digest[:8]) for digest in (sha256(key.encode()).hexdigest() for key in keys)}
        self._file, self._stamp, self._from_file = file, (0, 0, 0), dict[str, Key]()
        self._read()

    def find(self, authorization: str | None) -> Key | None:
        """Whose key the header ``Authorization`` has; ``None``: nobody's."""
        self._read()
        if not self._given and self._file is None:
            return Key()
        scheme, _, key = (authorization or "").partition(" ")
        digest = sha256(key.strip().encode("utf-8", "surrogateescape")).hexdigest()
        # Every key is compared, so that the time tells nothing.
        known = {**self._given, **self._from_file}
        right = [found for one, found in known.items() if hmac.compare_digest(digest, one)]
        return right[0] if right and scheme.lower() == "bearer" else None

    def _read(self) -> None:
        if self._file is None:
            return
        try:
            found = self._file.stat()
            stamp = (found.st_ino, found.st_mtime_ns, found.st_size)
            if stamp != self._stamp:
                lines = self._file.read_text(encoding="utf-8").splitlines()
                self._from_file = dict(filter(None, map(_line, range(1, len(lines) + 1), lines)))
                self._stamp = stamp
        except (OSError, UnicodeDecodeError) as error:
            _log.error("api_keys_file: %s", error)  # the keys read before stay in force


def _line(number: int, line: str) -> tuple[str, Key] | None:
    """Digest and key of a line; none of a comment, and none of a line with a fault, whose key is not let in."""
    words = line.split()
    if not words or words[0].startswith("#"):
        return None
    at = next((index for index, word in enumerate(words[:2]) if _DIGEST.fullmatch(word.lower())), None)
    limits = [_LIMIT.fullmatch(word) for word in words[at + 1 :]] if at is not None else []
    given = {match[1]: int(match[2]) for match in limits if match}
    if at is None or len(given) < len(limits):
        _log.error("api_keys_file: line %d is no `name sha256 [requests=N] [tokens=N]`; it lets nobody in", number)
        return None
    digest = words[at].lower()
    return digest, Key(words[0] if at else digest[:8], given.get("requests"), given.get("tokens"))
