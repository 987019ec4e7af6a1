"""The shapes of ``docs/guide/howto/json.md``, and whether what a command prints has them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parents[1] / "docs" / "guide" / "howto" / "json.md"

NAMES = frozenset({"aliases", "early", "params", "refused", "scores", "tensors"})
"""Objects whose keys are names of whatever there is."""

METRICS = frozenset({"before", "after", "metrics"})
"""Objects of which the page shows some."""


@cache
def _blocks() -> dict[str, Any]:
    sections = re.split(r"^## namesake (\w+)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    found = {}
    for command, text in zip(sections[::2], sections[1::2], strict=True):
        if block := re.search(r"^```json\n(.*?)^```", text.partition("\n## ")[0], re.MULTILINE | re.DOTALL):
            found[command] = json.loads(block[1])
    return found


def shown(command: str) -> Any:
    """What the page shows of the command."""
    return _blocks()[command]


def commands() -> list[str]:
    """The commands of which it shows something."""
    return [*_blocks()]


def assert_as_shown(command: str, printed: Any) -> None:
    """What was printed has the keys and kinds of values that the page shows."""
    wrong = [*differences(printed, shown(command))]
    assert not wrong, f"namesake {command} --json and json.md: {'; '.join(wrong)}"


def differences(printed: Any, wanted: Any, at: str = "") -> Iterator[str]:
    """Where they differ in keys or kinds; of a list every entry is like the first one shown."""
    if isinstance(printed, dict) and isinstance(wanted, dict):
        name = at.rpartition(".")[2]
        if name not in NAMES:
            strange = {*printed} ^ {*wanted} if name not in METRICS else {*wanted} - {*printed}
            yield from (f"{at}.{key} is in one only" for key in sorted(strange))
        for key in printed.keys() & wanted.keys():
            yield from differences(printed[key], wanted[key], f"{at}.{key}")
    elif isinstance(printed, list) and isinstance(wanted, list):
        for number, one in enumerate(printed if wanted else ()):
            yield from differences(one, wanted[0], f"{at}[{number}]")
    elif printed is not None and wanted is not None and _kind(printed) is not _kind(wanted):
        yield f"{at} is {printed!r}, shown is {wanted!r}"


def _kind(value: Any) -> type:
    return float if isinstance(value, int) and not isinstance(value, bool) else type(value)
