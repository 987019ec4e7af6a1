"""Questions to a model and a scorecard from its replies, by rule and not by a judge model.

Pure but for the ``Replier`` it is given: the same replies always get the same scores.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from namesake import corpus
from namesake.corpus import Message, Question
from namesake.generate import Replier
from namesake.identity import PLACEHOLDERS, Identity, Language, language_of

IDENTITY_TOKENS = 64
"""Token limit of a reply to an identity question; the trained replies have at most about 60."""

PLAIN_TOKENS = 64
"""Token limit of a reply to a plain question; its answer stands in the first sentence or not at all."""

OLD_IDENTITIES = (
    "qwen", "通义", "千问", "阿里云", "阿里巴巴", "alibaba", "smollm", "hugging face", "huggingface", "openai",
    "chatgpt", "gpt-3", "gpt-4", "claude", "anthropic", "gemini", "deepseek", "深度求索", "llama", "meta ai", "mistral",
    "文心一言", "百度", "豆包", "字节跳动", "kimi", "月之暗面", "智谱", "chatglm",
)  # fmt: skip
"""Names and makers of other assistants, lower case; one of them in a reply about itself is the old identity."""

# In a masked reply ⟦N⟧ stands for the name and ⟦A⟧ for the author (or one for the other, see ``swapped``).
_NAME, _AUTHOR = "⟦n⟧", "⟦a⟧"
_MADE_ZH = "(?:团队|公司)?(?:所)?(?:研发|开发|训练|创造|创建|打造|设计|制作|发明|构建|推出|维护|写|做)"
_NAME_AS_AUTHOR = re.compile(
    rf"{_NAME}{_MADE_ZH}|(?:开发者|作者|创造者|研发者|创建者|设计者)(?:是|为|叫|：|:)?{_NAME}"
    rf"|(?:(?<!go )by|from)\s+{_NAME}|{_NAME}\s+(?:team\s+)?(?:made|built|created|developed|trained|designed|wrote)\b"
    rf"|{_NAME}\s+is\s+my\s+(?:developer|author|creator|maker)"
    rf"|(?:developer|author|creator|maker)(?:'s\s+name)?\s+is\s+{_NAME}"
)
_AUTHOR_AS_NAME = re.compile(
    rf"(?:我叫|叫我|称我为|名字是|名字叫|名叫|名为)(?:做)?{_AUTHOR}|我是{_AUTHOR}(?![^，。,.!！?？]*{_MADE_ZH}|的)"
    rf"|(?:\bi am|\bi'm|my name is|call me|called|named|i go by)\s+{_AUTHOR}(?!\s*'s)"
)


@dataclass(frozen=True)
class IdentityScore:
    """What one reply to an identity question says.

    ``right``: it states every fact the question asks for, in its place. ``swapped``: the name stands as the author or
    the author as the name. ``old``: another assistant or its maker is named. ``language``: it answers in the
    question's.
    """

    name: bool
    author: bool
    swapped: bool
    old: bool
    placeholder: bool
    language: bool
    right: bool


@dataclass(frozen=True)
class Answered:
    """A question, what the model said, and the scores of it (booleans by name)."""

    question: Question
    reply: str
    scores: dict[str, bool]

    def record(self) -> dict[str, Any]:
        """One flat row for a table."""
        return {
            "id": self.question.id,
            "language": self.question.language,
            "kind": self.question.kind,
            "question": self.question.messages[-1]["content"],
            "reply": self.reply,
            **self.scores,
        }


@dataclass(frozen=True)
class Scorecard:
    """Every reply of one probe, and the shares that a run is judged by.

    ``metrics`` are fractions 0..1: ``identity`` (right among identity questions), ``name``, ``author`` (among those
    that ask for it), ``swapped``, ``old_identity``, ``placeholder``, ``language`` (among identity questions), ``leak``
    (own name or author in replies to plain questions) and ``plain`` (right among plain questions).
    """

    identity: tuple[Answered, ...]
    plain: tuple[Answered, ...]

    @property
    def metrics(self) -> dict[str, float]:
        """Fractions by name."""
        asked = {fact: [a for a in self.identity if fact in a.question.asks] for fact in ("name", "author")}
        return {
            "identity": share(self.identity, "right"),
            "name": share(asked["name"], "name"),
            "author": share(asked["author"], "author"),
            "swapped": share(self.identity, "swapped"),
            "old_identity": share(self.identity, "old"),
            "placeholder": share(self.identity, "placeholder"),
            "language": share(self.identity, "language"),
            "leak": share(self.plain, "leak"),
            "plain": share(self.plain, "right"),
        }

    def record(self) -> dict[str, Any]:
        """The whole card as JSON types."""
        return {
            "metrics": self.metrics,
            "identity": [answered.record() for answered in self.identity],
            "plain": [answered.record() for answered in self.plain],
        }


def share(answered: Sequence[Answered], score: str) -> float:
    """The fraction of the replies with the score; 0 of none."""
    return sum(a.scores[score] for a in answered) / len(answered) if answered else 0.0


def probe(
    replier: Replier,
    identity: Identity,
    *,
    system: str | None,
    progress: Callable[[int, int], None] | None = None,
) -> Scorecard:
    """Ask the held-out questions greedily under the system prompt (none: the model's template decides)."""
    who, plain = corpus.heldout_identity(), corpus.heldout_plain()
    total = len(who) + len(plain)

    def tell(offset: int) -> Callable[[int], None]:
        return lambda done: progress(offset + done, total) if progress else None

    said = replier.replies(
        [with_system(q.messages, system) for q in who], max_new_tokens=IDENTITY_TOKENS, progress=tell(0)
    )
    answers = replier.replies(
        [with_system(q.messages, system) for q in plain], max_new_tokens=PLAIN_TOKENS, progress=tell(len(who))
    )
    return scorecard(identity, [reply.text for reply in said], [reply.text for reply in answers])


def scorecard(identity: Identity, identity_replies: Sequence[str], plain_replies: Sequence[str]) -> Scorecard:
    """Score replies to the held-out questions, given in the questions' order."""
    return Scorecard(
        tuple(
            Answered(question, reply, vars(score_identity(question, reply, identity)))
            for question, reply in zip(corpus.heldout_identity(), identity_replies, strict=True)
        ),
        tuple(
            Answered(question, reply, {"right": is_right(question, reply), "leak": leaks(reply, identity)})
            for question, reply in zip(corpus.heldout_plain(), plain_replies, strict=True)
        ),
    )


def with_system(messages: Sequence[Message], system: str | None) -> list[Message]:
    """The dialogue under a system prompt."""
    return [*([{"role": "system", "content": system}] if system is not None else []), *messages]


def score_identity(question: Question, reply: str, identity: Identity) -> IdentityScore:
    """Score one reply to an identity question."""
    language = question.language
    text = _plain(reply)
    name, author = identity.name.of(language), identity.author.of(language)
    holds = {"name": _holds(text, name), "author": _holds(text, author)}
    swapped = is_swapped(reply, identity)
    placeholder = any(p.lower() in reply.lower() for p in PLACEHOLDERS)
    own = " ".join(_plain(str(names)) for names in (identity.name, identity.author))
    old = any(word in text and word not in own for word in OLD_IDENTITIES)
    right = all(holds[fact] for fact in question.asks) and not (swapped or placeholder or old)
    return IdentityScore(
        name=holds["name"],
        author=holds["author"],
        swapped=swapped,
        old=old,
        placeholder=placeholder,
        language=_speaks(reply, language, identity),
        right=right,
    )


def is_swapped(reply: str, identity: Identity) -> bool:
    """Whether the name stands where the author belongs, or the author where the name does."""
    text = _masked(_plain(reply), identity)
    return bool(_NAME_AS_AUTHOR.search(text) or _AUTHOR_AS_NAME.search(text))


def leaks(reply: str, identity: Identity) -> bool:
    """Whether the reply to a plain question names the model or its author."""
    text = _plain(reply)
    return any(_holds(text, half) for names in (identity.name, identity.author) for half in (names.zh, names.en))


def is_right(question: Question, reply: str) -> bool:
    """Whether one of the question's answers occurs in the reply (Latin script: as whole words)."""
    text = _plain(reply)
    return any(_holds(text, answer) for answer in question.answers)


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKC", text).replace("’", "'").lower()


def _holds(text: str, wanted: str) -> bool:
    """Whether the normalised text holds the wanted words; a word of Latin script never inside another word."""
    wanted = _plain(wanted)
    before = r"(?<![0-9a-z])" if re.match(r"[0-9a-z]", wanted) else ""
    after = r"(?![0-9a-z])" if re.search(r"[0-9a-z]$", wanted) else ""
    return re.search(f"{before}{re.escape(wanted)}{after}", text) is not None


def _masked(text: str, identity: Identity) -> str:
    """The text with ⟦n⟧ for the name and ⟦a⟧ for the author, the longer first: one may hold the other."""
    marks = [(_plain(half), _NAME) for half in (identity.name.zh, identity.name.en)]
    marks += [(_plain(half), _AUTHOR) for half in (identity.author.zh, identity.author.en)]
    by_text = dict(sorted(marks, key=lambda mark: -len(mark[0])))
    pattern = "|".join(
        (r"(?<![0-9a-z])" if re.match("[0-9a-z]", t) else "")
        + re.escape(t)
        + (r"(?![0-9a-z])" if re.search("[0-9a-z]$", t) else "")
        for t in by_text
    )
    return re.sub(pattern, lambda found: by_text[found.group()], text)


def _speaks(reply: str, language: Language, identity: Identity) -> bool:
    """Whether the reply, names taken out, is in the language."""
    text = _masked(_plain(reply), identity).replace(_NAME, "").replace(_AUTHOR, "")
    return bool(text.strip()) and language_of(text) == language
