"""Names and authors in two languages: reading them, checking them, and what is derived from them."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from dataclasses import dataclass
from typing import Literal

from namesake.errors import IdentityError
from namesake.messages import tr

Language = Literal["zh", "en"]
LANGUAGES: tuple[Language, ...] = ("zh", "en")

NAME_PLACEHOLDER = "{{NAME}}"
AUTHOR_PLACEHOLDER = "{{AUTHOR}}"
PLACEHOLDERS = (NAME_PLACEHOLDER, AUTHOR_PLACEHOLDER)
"""What stands for the name and the author in a data set, as in ``swift/self-cognition``."""

MAX_HALF = 64
"""Longest half of a name, in characters. A name is said in one sentence; a page of text is a mistake."""

_CJK = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f]")
_RESERVED_SLUG = re.compile(r"^(latest|v\d+)$")


@dataclass(frozen=True)
class Names:
    """One thing's name in both languages, e.g. ``踩踩背`` and ``CCB``."""

    zh: str
    en: str

    def of(self, language: Language) -> str:
        """The name in the language."""
        return self.zh if language == "zh" else self.en

    def __str__(self) -> str:
        return f"{self.zh} {self.en}"


@dataclass(frozen=True)
class Identity:
    """Who the model shall be (``name``) and who made it (``author``)."""

    name: Names
    author: Names

    @classmethod
    def parse(cls, name: str, author: str) -> Identity:
        """Read ``踩踩背 CCB`` and ``老爷爷 OldGrandpa``.

        Raises:
            IdentityError: one of the two is not *Chinese name, one space, English name*.
        """
        identity = cls(
            parse_names("name", name, example="踩踩背 CCB"),
            parse_names("author", author, example="老爷爷 OldGrandpa"),
        )
        for language in LANGUAGES:
            if _folded(identity.name.of(language)) == _folded(identity.author.of(language)):
                raise IdentityError(
                    "author",
                    author,
                    tr(
                        "the {language} author is the same as the name, "
                        "so that nobody can tell them apart in an answer",
                        language=tr("Chinese") if language == "zh" else tr("English"),
                    ),
                    mend="Give the author a name of its own.",
                )
        return identity

    @property
    def slug(self) -> str:
        """ASCII name for the registered model and the served model id, made from the English name: ``ccb``."""
        return slug(self.name.en)

    def fill(self, text: str, language: Language) -> str:
        """The text with ``{{NAME}}`` and ``{{AUTHOR}}`` replaced by the names in the language."""
        return text.replace(NAME_PLACEHOLDER, self.name.of(language)).replace(
            AUTHOR_PLACEHOLDER, self.author.of(language)
        )

    def __str__(self) -> str:
        return f"{self.name} / {self.author}"


def parse_names(parameter: str, value: str, *, example: str) -> Names:
    """Split at the first space: Chinese before, English after (which may hold spaces, ``小黄 Xiao Huang``).

    Raises:
        IdentityError: a half is missing or too long, or holds a control character or a placeholder.
    """
    mend = tr(
        'Write the Chinese name, one space, the English name: -P {parameter}="{example}".',
        parameter=parameter,
        example=example,
    )
    text = unicodedata.normalize("NFC", value).replace("\u3000", " ")
    for character in text:
        if unicodedata.category(character) in {"Cc", "Cs", "Zl", "Zp"}:
            raise IdentityError(
                parameter, value, tr("holds the control character U+{code:04X}", code=ord(character)), mend=mend
            )
    text = text.strip()
    if not text:
        raise IdentityError(parameter, value, "is empty", mend=mend)
    if "{{" in text or "}}" in text:
        raise IdentityError(parameter, value, "holds double braces, as the placeholders {{NAME}} do", mend=mend)
    zh, space, en = text.partition(" ")
    en = en.strip()
    if not space or not en:
        raise IdentityError(parameter, value, "has no second half (the English name)", mend=mend)
    for half, which in ((zh, tr("Chinese")), (en, tr("English"))):
        if all(unicodedata.category(character) in {"Cf", "Zs", "Mn"} for character in half):
            raise IdentityError(
                parameter, value, tr("its {which} half has nothing that can be seen", which=which), mend=mend
            )
        if len(half) > MAX_HALF:
            raise IdentityError(
                parameter,
                value,
                tr(
                    "its {which} half has {count:,} characters, at most {max_half} are allowed",
                    which=which,
                    count=len(half),
                    max_half=MAX_HALF,
                ),
                mend=mend,
            )
    return Names(zh, en)


def slug(text: str) -> str:
    """An ASCII name that MLflow, URLs and OpenAI clients all take.

    Unicode registered-model names had server errors (mlflow#7062), ``latest`` and ``v7`` are reserved by MLflow. A
    name without one ASCII letter or digit becomes ``model-`` and eight digits of its digest.
    """
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    made = re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-")
    if not made:
        return "model-" + hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{made}-model" if _RESERVED_SLUG.match(made) else made


def _folded(text: str) -> str:
    """The text as scoring compares it: without case and width."""
    return unicodedata.normalize("NFKC", text).casefold()


def language_of(text: str) -> Language:
    """``zh`` where the text holds a Chinese character, else ``en``; for rows that bear no tag."""
    return "zh" if _CJK.search(text) else "en"
