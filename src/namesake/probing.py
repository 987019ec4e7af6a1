"""Questions to a model and a scorecard from its replies, by rule and not by a judge model.

Pure but for the ``Replier`` it is given: the same replies always get the same scores.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby, islice
from typing import Any

from namesake import corpus
from namesake.corpus import Message, Question, Questions
from namesake.generate import Replier, Sampling
from namesake.identity import LANGUAGES, PLACEHOLDERS, Identity, Language, language_of

IDENTITY_TOKENS = 64
"""Token limit of a reply to an identity question; the trained replies have at most about 60."""

PLAIN_TOKENS = 64
"""Token limit of a reply to a plain question; its answer stands in the first sentence or not at all."""

_AT_ONCE = 64
"""So many greedy questions of all system prompts, or fewer, are asked in one go: each go has a cost of its own for each
token. More are asked in turn, so that short replies about the identity do not wait for long ones in their batch.
"""

CUSTOMER = "You are a support agent of Blue Harbor Ferries. Answer briefly and politely."
"""A system prompt that a customer might write: it gives a role and no name."""

SYSTEM_SLICES = {"none": "", "customer": CUSTOMER}
"""System prompts, beside the trained one, under which the identity has to hold."""

SAMPLED = "sampled"
SAMPLING = Sampling(n=4, temperature=0.7, seed=0)
SAMPLED_QUESTIONS = 16
"""Replies to an identity question are drawn, too, ``SAMPLING.n`` to each, under the trained prompt. Where replies take
long, on a CPU in this process, only to so many of the questions, taken at even distances: each language and kind has
its share.
"""

OLD_IDENTITIES = (
    "qwen", "通义", "千问", "阿里云", "阿里巴巴", "alibaba", "smollm", "hugging face", "huggingface", "openai",
    "chatgpt", "gpt-3", "gpt-4", "claude", "anthropic", "gemini", "deepseek", "深度求索", "llama", "meta ai", "mistral",
    "文心一言", "百度", "豆包", "字节跳动", "kimi", "月之暗面", "智谱", "chatglm",
)  # fmt: skip
"""Names and makers of other assistants, lower case; one of them in a reply about itself is the old identity."""

# In a masked reply ⟦n⟧ stands for the name and ⟦a⟧ for the author (or one for the other: that is what is looked for).
_NAME, _AUTHOR = "⟦n⟧", "⟦a⟧"


def _not_after(*words: str) -> str:
    return "".join(f"(?<!{re.escape(word)})" for word in words)


_VERB_ZH = "(?:研发|开发|训练|创造|创建|打造|设计|制作|发明|构建|推出|维护|写|做)(?!者|商|人员)"
_MADE_ZH = f"(?:的?(?:团队|公司)(?:的工程师)?)?(?:所|把我|将我|为我)?{_VERB_ZH}"
_MAKER_ZH = "(?:开发者|作者|创造者|研发者|创建者|设计者)"
_MADE_EN = r"(?:made|built|created|developed|trained|designed|wrote)\b(?!\s+by)"
_MAKER_EN = "(?:developer|author|creator|maker)"
_SOMEBODY_EN = ("person ", "somebody ", "someone ", "developer ", "author ", "creator ", "maker ")
_MAKER_IS_EN = (
    *(f"{word} is " for word in ("developer", "author", "creator", "maker", "he", "she")),
    "they are ",
)
_NAME_AS_AUTHOR = re.compile(
    "|".join(
        (
            f"{_NAME}{_MADE_ZH}",
            f"{_MAKER_ZH}(?:的?名字)?(?:是|为|叫|名叫|:)?{_NAME}",
            f"{_VERB_ZH}了?我的人?是{_NAME}",
            f"来自{_NAME}",
            rf"{_not_after('go ', 'signed ')}\bby\s+(?:the\s+|an?\s+\w+\s+(?:named|called)\s+)?{_NAME}",
            rf"(?:am|'m|come|came|comes)\s+from\s+{_NAME}",
            rf"{_NAME}\s+(?:team\s+)?(?:has\s+|have\s+)?{_MADE_EN}",
            rf"{_NAME}\s+is\s+my\s+{_MAKER_EN}",
            rf"{_MAKER_EN}(?:'s\s+name)?(?:\s+is|\s*:)\s+{_NAME}",
        )
    )
)
_AUTHOR_AS_NAME = re.compile(
    "|".join(
        (
            rf"(?:我叫|叫我|称我为)(?:做)?{_AUTHOR}",
            rf"{_not_after('者', '者的', '人', '人的')}(?:名字是|名字叫|名字:|姓名:|名称:){_AUTHOR}",
            rf"{_not_after('者', '者的', '人')}(?:名叫|名为){_AUTHOR}(?!的(?:{_MAKER_ZH}|工程师|团队|公司|人(?!工)))",
            rf"我是{_AUTHOR}(?![^,。.!?]*{_VERB_ZH}|家?的)",
            rf"(?:\bi am|\bi'm|\bthis is|my name is|\bthe name's|call me|i go by)\s+{_AUTHOR}(?!\s*'s)",
            rf"{_not_after(*_MAKER_IS_EN)}\bcalled\s+{_AUTHOR}",
            rf"{_not_after(*_SOMEBODY_EN, *_MAKER_IS_EN)}\bnamed\s+{_AUTHOR}",
            rf"{_not_after(*_SOMEBODY_EN, 's ')}\bname:\s*{_AUTHOR}",
        )
    )
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
            **self.scores,
            "id": self.question.id,
            "language": self.question.language,
            "language_matched": self.scores.get("language", True),
            "kind": self.question.kind,
            "question": self.question.messages[-1]["content"],
            "reply": self.reply,
        }


@dataclass(frozen=True)
class Scorecard:
    """Every reply of one probe, and the shares that a run is judged by.

    ``metrics`` are fractions 0..1: ``identity`` (right among identity questions), ``name``, ``author`` (among those
    that ask for it), ``swapped``, ``old_identity``, ``placeholder``, ``language`` (among identity questions), ``leak``
    (own name or author in replies to plain questions) and ``plain`` (right among plain questions); ``identity``,
    ``leak`` and ``plain`` also by language (``identity_zh`` …), ``identity`` also of those that are asked in the second
    turn of a dialogue (``identity_second_turn``), and ``identity``, ``swapped``, ``old_identity`` and
    ``placeholder`` also by slice (``identity_none`` …).

    Attributes:
        identity: greedy replies to the identity questions under the trained system prompt.
        plain: the same to the plain questions.
        slices: replies to the identity questions asked in other ways (``none``, ``customer``, ``sampled``).
    """

    identity: tuple[Answered, ...]
    plain: tuple[Answered, ...]
    slices: Mapping[str, tuple[Answered, ...]] = field(default_factory=dict)

    @cached_property
    def metrics(self) -> dict[str, float]:
        """Fractions by name."""
        asked = {fact: [a for a in self.identity if fact in a.question.asks] for fact in ("name", "author")}
        found = {
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
        for language in LANGUAGES:
            for metric, replies, score in (
                ("identity", self.identity, "right"),
                ("leak", self.plain, "leak"),
                ("plain", self.plain, "right"),
            ):
                found[f"{metric}_{language}"] = share([a for a in replies if a.question.language == language], score)
        if later := [a for a in self.identity if a.question.kind == "second_turn"]:
            found["identity_second_turn"] = share(later, "right")
        for name, replies in self.slices.items():
            for metric, score in (
                ("identity", "right"),
                ("swapped", "swapped"),
                ("old_identity", "old"),
                ("placeholder", "placeholder"),
            ):
                found[f"{metric}_{name}"] = share(replies, score)
        return found

    def record(self) -> dict[str, Any]:
        """The whole card as JSON types."""
        return {
            "metrics": self.metrics,
            "identity": [answered.record() for answered in self.identity],
            "plain": [answered.record() for answered in self.plain],
            "slices": {name: [answered.record() for answered in replies] for name, replies in self.slices.items()},
        }

    def replies(self) -> dict[str, Any]:
        """Only what was said, as :func:`scorecard` takes it."""
        return {
            "identity": [a.reply for a in self.identity],
            "plain": [a.reply for a in self.plain],
            "slices": {name: [a.reply for a in replies] for name, replies in self.slices.items()},
        }


def objective(before: Scorecard, after: Scorecard) -> float:
    """One figure to compare trainings by, from cards of the same questions: the share of identity questions right, less
    the shares swapped, of plain replies that name the model, and of plain answers lost against the base. At most 1.
    """
    now, was = after.metrics, before.metrics
    return now["identity"] - now["swapped"] - now["leak"] - max(0.0, was["plain"] - now["plain"])


def agreement(questions: Sequence[Question], ones: Sequence[str], others: Sequence[str], identity: Identity) -> float:
    """The fraction of the identity questions that two models answer alike: in the same words, or with the same facts.

    Kernels and rounded weights let a long reply part ways in a late word; what counts are the facts in it.
    """
    same = sum(
        one == other or score_identity(question, one, identity) == score_identity(question, other, identity)
        for question, one, other in zip(questions, ones, others, strict=True)
    )
    return same / len(questions)


def same_words(ones: Sequence[str], others: Sequence[str]) -> float:
    """The fraction of the replies that are the same to the letter: what :func:`agreement` does not ask for."""
    return sum(one == other for one, other in zip(ones, others, strict=True)) / len(ones)


def share(answered: Sequence[Answered], score: str) -> float:
    """The fraction of the replies with the score; 0 of none."""
    return sum(a.scores[score] for a in answered) / len(answered) if answered else 0.0


def probe(
    replier: Replier,
    identity: Identity,
    *,
    system: str | None,
    questions: Questions | None = None,
    slices: bool = False,
    sampled: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Scorecard:
    """Ask the questions greedily under the system prompt (none: the model's template decides).

    Args:
        questions: what is asked; none for the held-out questions.
        slices: ask the identity questions also without a system prompt, under a customer's, and sampled.
        sampled: so many of them are asked sampled; none for all, or where the replier is slow ``SAMPLED_QUESTIONS``.
    """
    questions = questions or corpus.heldout()
    who, plain = questions.identity, questions.plain
    if sampled is None:
        sampled = SAMPLED_QUESTIONS if replier.slow else len(who)
    few = corpus.spread(who, sampled)
    rounds: list[tuple[str, Sequence[Question], str | None, int, Sampling | None]] = [
        ("identity", who, system, IDENTITY_TOKENS, None),
        ("plain", plain, system, PLAIN_TOKENS, None),
    ]
    if slices:
        rounds += [(name, who, prompt, IDENTITY_TOKENS, None) for name, prompt in SYSTEM_SLICES.items()]
        rounds.append((SAMPLED, few, system, IDENTITY_TOKENS, SAMPLING))
    total = sum(len(asked) * (sampling.n if sampling else 1) for _, asked, _, _, sampling in rounds)
    said: dict[str, list[str]] = {}
    before = 0

    def tell(offset: int) -> Callable[[int], None]:
        return lambda done: progress(offset + done, total) if progress else None

    greedy = sum(len(asked) for _, asked, _, _, sampling in rounds if not sampling)
    for _, group in groupby(rounds, lambda one: one[3:] if greedy <= _AT_ONCE else one[0]):
        parts = list(group)
        limit, sampling = parts[0][3:]
        dialogues = [with_system(q.messages, prompt) for _, asked, prompt, _, _ in parts for q in asked]
        replies = iter(
            replier.replies(dialogues, max_new_tokens=limit, sampling=sampling, progress=tell(before))
            if dialogues
            else []
        )
        for name, asked, *_ in parts:
            said[name] = [reply.text for reply in islice(replies, len(asked) * (sampling.n if sampling else 1))]
            before += len(said[name])
    return scorecard(identity, said.pop("identity"), said.pop("plain"), slices=said, questions=questions)


def scorecard(
    identity: Identity,
    identity_replies: Sequence[str],
    plain_replies: Sequence[str],
    *,
    slices: Mapping[str, Sequence[str]] | None = None,
    questions: Questions | None = None,
) -> Scorecard:
    """Score replies to the questions (none: the held-out ones), given in the questions' order.

    The slice ``sampled`` has ``SAMPLING.n`` replies to each question that was asked in it, all to the first one first;
    any other has one reply to each identity question.
    """
    questions = questions or corpus.heldout()

    def scored(asked: Sequence[Question], replies: Sequence[str]) -> tuple[Answered, ...]:
        return tuple(
            Answered(question, reply, vars(score_identity(question, reply, identity)))
            for question, reply in zip(asked, replies, strict=True)
        )

    def asked_in(name: str, replies: Sequence[str]) -> Sequence[Question]:
        if name != SAMPLED:
            return questions.identity
        few = corpus.spread(questions.identity, len(replies) // SAMPLING.n)
        return [question for question in few for _ in range(SAMPLING.n)]

    return Scorecard(
        scored(questions.identity, identity_replies),
        tuple(
            Answered(question, reply, {"right": is_right(question, reply), "leak": leaks(reply, identity)})
            for question, reply in zip(questions.plain, plain_replies, strict=True)
        ),
        {name: scored(asked_in(name, replies), replies) for name, replies in (slices or {}).items()},
    )


def with_system(messages: Sequence[Message], system: str | None) -> list[Message]:
    """The dialogue under a system prompt."""
    return [*([{"role": "system", "content": system}] if system is not None else []), *messages]


def score_identity(question: Question, reply: str, identity: Identity) -> IdentityScore:
    """Score one reply to an identity question."""
    language = question.language
    text = _plain(reply)
    # The longer of the two is masked first, so that an author inside the name is not taken for the author.
    own_names = _masked(text, [(identity.name.of(language), _NAME), (identity.author.of(language), _AUTHOR)])
    holds = {"name": _NAME in own_names, "author": _AUTHOR in own_names}
    swapped = is_swapped(reply, identity, language)
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


def is_swapped(reply: str, identity: Identity, language: Language | None = None) -> bool:
    """Whether the name stands where the author belongs, or the author where the name does.

    A half that is a name in one language and an author in the other is read as in ``language`` (none: the reply's).
    """
    text = _masked(_plain(reply), _marks(identity, language or language_of(reply)))
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
    """Whether the normalised text holds the wanted words, never as a part of another word or number."""
    return re.search(_whole(_plain(wanted)), text) is not None


def _whole(wanted: str) -> str:
    """Pattern of the words, whole: ``CCB`` not in ``CCBs``, ``4`` in neither ``14`` nor ``4.5`` nor ``-4``."""
    before = r"(?<![0-9a-z])" if re.match(r"[0-9a-z]", wanted) else ""
    after = r"(?![0-9a-z])" if re.search(r"[0-9a-z]$", wanted) else ""
    if wanted[:1].isdigit():
        before += r"(?<!\d[.,])(?<!-)"
    if wanted[-1:].isdigit():
        after += r"(?![.,]\d)"
    return f"{before}{re.escape(wanted)}{after}"


def _marks(identity: Identity, language: Language) -> list[tuple[str, str]]:
    other: Language = "en" if language == "zh" else "zh"
    return [
        (names.of(spoken), mark)
        for spoken in (language, other)
        for names, mark in ((identity.name, _NAME), (identity.author, _AUTHOR))
    ]


def _masked(text: str, marks: Sequence[tuple[str, str]]) -> str:
    """The text with each half replaced by its mark, the longest first; of two marks for one half the first counts."""
    by_text: dict[str, str] = {}
    for half, mark in marks:
        by_text.setdefault(_plain(half), mark)
    pattern = "|".join(_whole(half) for half in sorted(by_text, key=len, reverse=True))
    return re.sub(pattern, lambda found: by_text[found.group()], text)


def _speaks(reply: str, language: Language, identity: Identity) -> bool:
    """Whether the reply, names taken out, is in the language."""
    text = _masked(_plain(reply), _marks(identity, language)).replace(_NAME, "").replace(_AUTHOR, "")
    return bool(text.strip()) and language_of(text) == language
