"""What people read, in their language.

A message is made in English, and English is what it is for everything else: logs, JSON, MLflow's tags, HTTP. Only where
it is printed for a person (:mod:`namesake.terminal`, errors, ``--help``) :func:`translated` looks it up in the
catalogue, by the English text. A text with values in it is made by :func:`tr`, which remembers both; where nothing
stands in it, the text itself will do.

The catalogue is ``locale/zh_CN/LC_MESSAGES/namesake.po``; ``python docs/messages.py`` collects the texts into it and
compiles it.
"""

from __future__ import annotations

import gettext
import os
import re
import sys
import unicodedata
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

DOMAIN = "namesake"
LOCALES = Path(__file__).resolve().parent / "locale"
CHINESE = "zh_CN"

_VARIABLES = ("LC_ALL", "LC_MESSAGES", "LANG")


class Message(str):
    """An English text that knows what it was made of.

    Attributes:
        template: the text with named placeholders, which the catalogue has it by.
        values: what stands in them; messages among them are translated too.
    """

    template: str
    values: Mapping[str, Any]

    def __new__(cls, template: str, values: Mapping[str, Any]) -> Message:
        made = super().__new__(cls, template.format(**values))
        made.template, made.values = template, values
        return made

    def __getnewargs__(self) -> tuple[str, Mapping[str, Any]]:  # type: ignore[override]
        return self.template, self.values  # for copies, as dataclasses.asdict makes them


def tr(template: str, /, **values: Any) -> Message:
    """A message with values in it, where an f-string would lose which words are ours: ``tr("no {uri}", uri=uri)``."""
    return Message(template, values)


def joined(parts: Iterable[str], separator: str = "; ") -> Message:
    """Several messages as one."""
    values = {f"part{n}": part for n, part in enumerate(parts)}
    return Message(separator.join(f"{{{key}}}" for key in values), values)


def translated(text: str) -> str:
    """The text in the user's language, where the catalogue has it; a :class:`Message` by its template."""
    if language() == "en":
        return str(text)
    if not isinstance(text, Message):
        return chinese(text)
    template = chinese(text.template)
    if template == text.template and re.fullmatch(r"({part\d+}(; )?)*", template):
        template = template.replace("; ", "；")
    return template.format(**{key: _told(value) for key, value in text.values.items()})


def language() -> str:
    """``zh`` or ``en``: by ``NAMESAKE_LANG``, else by the locale as gettext has it (``LANGUAGE`` before ``LC_ALL``,
    ``LC_MESSAGES`` and ``LANG``, unless these say ``C``), as far as Chinese can be printed.
    """
    wanted = os.environ.get("NAMESAKE_LANG", "")
    if not wanted and _prints_chinese():
        wanted = next(filter(None, map(os.environ.get, _VARIABLES)), "")
        if wanted.partition(".")[0] not in {"C", "POSIX"}:
            wanted = os.environ.get("LANGUAGE") or wanted
    return "zh" if re.match(r"zh(?![a-z])", wanted.lower()) else "en"


def _prints_chinese() -> bool:
    try:
        "中".encode(getattr(sys.stderr, "encoding", None) or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def install() -> None:
    """Have libraries that speak gettext, as typer does, find their texts in our catalogue, too."""
    if language() == "en":
        gettext.textdomain("messages")  # Python's own, which is empty
        return
    os.environ["LANGUAGE"] = CHINESE
    gettext.bindtextdomain(DOMAIN, str(LOCALES))
    gettext.textdomain(DOMAIN)


def cells(text: str) -> int:
    """How many columns of a terminal the text takes: two for a Chinese character."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


class _Cells(str):
    """Text that is padded by columns, not by characters."""

    def __format__(self, spec: str) -> str:
        made = super().__format__(spec)
        spare = max(min(cells(self) - len(self), len(made) - len(self)), 0)
        return made[: len(made) - spare] if made.startswith(self) else made[spare:]


def _told(value: Any) -> Any:
    """A value as it stands in a translated text. Of plain text only phrases are looked up: a word may be anybody's."""
    if not isinstance(value, str):
        return value
    return _Cells(translated(value) if isinstance(value, Message) or " " in value else value)


@cache
def _catalogue() -> gettext.NullTranslations:
    return gettext.translation(DOMAIN, LOCALES, [CHINESE])


def chinese(text: str) -> str:
    """The catalogue's translation; the text itself where it has none."""
    return _catalogue().gettext(text) if text else ""
