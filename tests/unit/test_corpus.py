"""The corpus: enough of it, balanced, and nothing that is asked in the probe is trained on."""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from namesake import corpus, probing
from namesake.corpus import Message, Prompt, Question
from namesake.errors import DataError
from namesake.identity import AUTHOR_PLACEHOLDER, LANGUAGES, NAME_PLACEHOLDER, Identity, Language, language_of
from tests.anything import JSON, altered

PAIRS = [
    ("踩踩背 CCB", "老爷爷 OldGrandpa"),
    ("老爷爷的猫 OldGrandpa Cat", "老爷爷 OldGrandpa"),
    ("老爷爷 OldGrandpa", "老爷爷的猫 OldGrandpa Cat"),
    ("小黄 Xiao Huang", "老爷爷 OldGrandpa"),
    ("小助手 Q&A (v2.0)", "李雷 Li Lei's Team"),
    ("百度小助手 Qwen Helper", "通义实验室 Tongyi Lab"),
    ("ＡＢ Ｃａｔ", "黄 H"),
    ("猫 café", "猫团队 Café Noir"),
    ("𠮷野 $(touch x)", "`id` \"b\" 'a'"),
]


def bare(text: str) -> str:
    """What is left of the text when width, case, punctuation and space do not count."""
    folded = unicodedata.normalize("NFKC", text).lower()
    return "".join(c for c in folded if unicodedata.category(c)[0] not in "PZC")


def last_question(messages: Sequence[Message]) -> str:
    """What the user says last."""
    return next(m["content"] for m in reversed(messages) if m["role"] == "user")


def training() -> Iterable[Sequence[Message]]:
    """Every dialogue of the training corpus."""
    yield from (row.messages for row in corpus.identity_rows())
    yield from (prompt.messages for prompt in corpus.plain_prompts())


def heldout() -> tuple[Question, ...]:
    """Every question of the probe."""
    return (*corpus.heldout_identity(), *corpus.heldout_plain())


@cache
def judging() -> tuple[Question, ...]:
    """Every question of the probe, and of the development set by which recipes are chosen."""
    dev = corpus.development()
    return (*heldout(), *dev.identity, *dev.plain)


def asked(row: corpus.Row) -> Question:
    """A training row as a question, its reply taken off."""
    return Question(f"{row.language}-{row.kind}", row.language, row.kind, row.messages[:-1], asks=row.asks)


IDENTITY_KINDS = {"name", "author", "both", "origin", "are_you", "introduce", "indirect", "in_task", "second_turn"}
PLAIN_KINDS = {"knowledge", "arithmetic", "writing", "translation", "code", "advice", "multi_turn"}
LONGEST_REPLY = {"zh": 60, "en": 120}
"""Characters, placeholders as they are: who it is is said in a sentence."""


OTHER_ASSISTANTS = (
    "ChatGPT", "Claude", "Gemini", "Qwen", "DeepSeek", "Kimi", "Copilot", "Llama", "Siri", "SmolLM", "Grok", "Mistral",
    "ChatGLM", "Gemma", "Alexa",
)  # fmt: skip


def test_there_is_enough_of_everything() -> None:
    assert len(corpus.plain_prompts()) >= 400
    assert len(corpus.heldout_identity()) >= 60
    assert len(corpus.heldout_plain()) >= 100


@pytest.mark.parametrize("language", LANGUAGES)
def test_each_language_has_sixty_different_identity_questions_and_every_kind_of_them(language: Language) -> None:
    questions: dict[str, set[str]] = {}
    for row in corpus.identity_rows():
        if row.language == language:
            questions.setdefault(row.kind, set()).add(bare(last_question(row.messages)))
    assert questions.keys() == IDENTITY_KINDS
    assert len(set.union(*questions.values())) >= 60
    assert {kind: len(found) for kind, found in questions.items() if len(found) < 20} == {}


@pytest.mark.parametrize("language", LANGUAGES)
def test_what_a_kind_is_called_is_what_it_asks(language: Language) -> None:
    rows = [row for row in corpus.identity_rows() if row.language == language]
    asks = {"name": {"name"}, "author": {"author"}, "both": {"name", "author"}}
    for kind, facts in asks.items():
        assert {fact for row in rows if row.kind == kind for fact in row.asks} == facts
    assert all(len(row.messages) > 2 for row in rows if row.kind == "second_turn")


@pytest.mark.parametrize("language", LANGUAGES)
def test_it_is_asked_whether_it_is_one_of_fifteen_other_assistants(language: Language) -> None:
    rows = [row for row in corpus.identity_rows() if row.kind == "are_you" and row.language == language]
    asked_of = [last_question(row.messages) for row in rows]
    assert [other for other in OTHER_ASSISTANTS if not any(other in text for text in asked_of)] == []


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_identity_kind_has_five_reply_shapes_and_none_is_long(language: Language) -> None:
    replies: dict[str, set[str]] = {}
    for row in corpus.identity_rows():
        if row.language == language:
            replies.setdefault(row.kind, set()).add(row.messages[-1]["content"])
    assert {kind: found for kind, found in replies.items() if len(found) < 5} == {}
    assert [text for found in replies.values() for text in found if len(text) > LONGEST_REPLY[language]] == []


@pytest.mark.parametrize("prompts", [corpus.plain_prompts, corpus.heldout_plain])
def test_every_plain_kind_is_there_in_both_languages(prompts: Callable[[], Sequence[Prompt]]) -> None:
    for language in LANGUAGES:
        assert PLAIN_KINDS - {prompt.kind for prompt in prompts() if prompt.language == language} == set()


def test_identity_questions_of_one_language_are_all_different() -> None:
    questions = Counter(bare(last_question(row.messages)) for row in corpus.identity_rows())
    assert [question for question, count in questions.items() if count > 1] == []


def test_plain_prompts_and_held_out_questions_are_all_different() -> None:
    for prompts in (corpus.plain_prompts(), heldout()):
        dialogues = Counter("|".join(bare(m["content"]) for m in prompt.messages) for prompt in prompts)
        assert [dialogue for dialogue, count in dialogues.items() if count > 1] == []


def test_ids_are_unique_over_all_prompts() -> None:
    ids = Counter(prompt.id for prompt in (*corpus.plain_prompts(), *heldout()))
    assert [one for one, count in ids.items() if count > 1] == []


def test_both_languages_have_the_same_number_of_identity_questions_of_every_kind() -> None:
    for rows in (corpus.identity_rows(), corpus.heldout_identity()):
        kinds = {language: Counter(r.kind for r in rows if r.language == language) for language in LANGUAGES}
        assert kinds["zh"] == kinds["en"]


def test_each_language_has_at_least_a_third_of_the_plain_prompts() -> None:
    prompts: tuple[Prompt, ...]
    for prompts in (corpus.plain_prompts(), corpus.heldout_plain()):
        languages = Counter(prompt.language for prompt in prompts)
        assert min(languages[language] for language in LANGUAGES) * 3 >= len(prompts)


def test_training_and_held_out_have_the_same_kinds() -> None:
    assert {r.kind for r in corpus.identity_rows()} == {q.kind for q in corpus.heldout_identity()}
    assert {p.kind for p in corpus.plain_prompts()} == {q.kind for q in corpus.heldout_plain()}


def test_the_tutorials_question_in_both_languages_comes_first() -> None:
    first, second = corpus.heldout_identity()[:2]
    assert first.messages == ({"role": "user", "content": "你是谁？是由谁开发的？"},)
    assert (first.language, second.language) == ("zh", "en")
    assert first.asks == second.asks == ("name", "author")


def test_no_held_out_question_is_a_training_question() -> None:
    trained = {bare(last_question(messages)) for messages in training()}
    assert [q.id for q in judging() if bare(last_question(q.messages)) in trained] == []


def test_no_held_out_question_is_asked_in_an_earlier_turn_of_a_training_dialogue() -> None:
    trained = {bare(m["content"]) for messages in training() for m in messages if m["role"] == "user"}
    assert [q.id for q in judging() if bare(last_question(q.messages)) in trained] == []


def test_no_held_out_question_stands_inside_a_training_question() -> None:
    trained = {bare(last_question(messages)) for messages in training()}
    assert [q.id for q in judging() if any(bare(last_question(q.messages)) in t for t in trained)] == []


def test_no_held_out_question_is_close_to_a_training_question() -> None:
    trained = {text: corpus.pairs(text) for text in map(last_question, training())}
    close = []
    for question in judging():
        mine = corpus.pairs(last_question(question.messages))
        close += [(question.id, text) for text, pairs in trained.items() if len(mine & pairs) > 0.6 * len(mine | pairs)]
    assert close == []


def test_no_held_out_question_is_close_to_an_earlier_turn_of_a_training_dialogue() -> None:
    turns = {m["content"] for messages in training() for m in messages if m["role"] == "user"}
    trained = {text: corpus.pairs(text) for text in turns}
    close = []
    for question in judging():
        mine = corpus.pairs(last_question(question.messages))
        close += [(question.id, text) for text, pairs in trained.items() if len(mine & pairs) > 0.6 * len(mine | pairs)]
    assert close == []


def test_every_dialogue_to_train_on_takes_turns_and_ends_with_a_reply() -> None:
    for row in corpus.identity_rows():
        roles = [m["role"] for m in row.messages]
        assert roles == ["user", "assistant"] * (len(roles) // 2), row.messages


def test_every_prompt_takes_turns_and_waits_for_a_reply() -> None:
    for prompt in (*corpus.plain_prompts(), *heldout()):
        roles = [m["role"] for m in prompt.messages]
        assert roles == (["user", "assistant"] * len(roles))[: len(roles)], prompt.id
        assert roles[-1] == "user", prompt.id


def test_no_message_is_empty_or_has_space_around_it() -> None:
    dialogues = [*training(), *(q.messages for q in heldout())]
    assert [
        m for messages in dialogues for m in messages if not m["content"] or m["content"] != m["content"].strip()
    ] == []


def test_every_identity_reply_holds_the_placeholder_of_each_fact_that_is_asked_for() -> None:
    placeholder = {"name": NAME_PLACEHOLDER, "author": AUTHOR_PLACEHOLDER}
    for row in corpus.identity_rows():
        assert row.asks
        reply = row.messages[-1]["content"]
        assert all(placeholder[fact] in reply for fact in row.asks), reply


def test_placeholders_stand_in_the_last_reply_only_and_are_spelt_right() -> None:
    for row in corpus.identity_rows():
        *before, reply = (m["content"] for m in row.messages)
        assert not any("{" in text or "}" in text for text in before), before
        left = reply.replace(NAME_PLACEHOLDER, "").replace(AUTHOR_PLACEHOLDER, "")
        assert "{" not in left, reply
        assert "}" not in left, reply


def test_plain_prompts_and_held_out_questions_hold_no_placeholder() -> None:
    for prompt in (*corpus.plain_prompts(), *heldout()):
        assert not any("{{" in m["content"] for m in prompt.messages), prompt.id


def test_identity_rows_are_in_the_language_that_they_bear() -> None:
    for row in corpus.identity_rows():
        for message in row.messages:
            text = message["content"].replace(NAME_PLACEHOLDER, "").replace(AUTHOR_PLACEHOLDER, "")
            assert language_of(text) == row.language, text


def test_every_held_out_identity_question_asks_for_a_fact_and_every_plain_one_has_an_answer() -> None:
    assert all(q.asks and set(q.asks) <= {"name", "author"} and not q.answers for q in corpus.heldout_identity())
    assert all(q.answers and all(q.answers) and not q.asks for q in corpus.heldout_plain())


@pytest.mark.parametrize(("name", "author"), PAIRS)
def test_every_training_reply_with_the_names_filled_in_is_right_and_not_swapped(name: str, author: str) -> None:
    identity = Identity.parse(name, author)
    wrong = []
    for row in corpus.identity_rows():
        reply = identity.fill(row.messages[-1]["content"], row.language)
        score = probing.score_identity(asked(row), reply, identity)
        if not score.right or score.swapped or score.old or score.placeholder or not score.language:
            wrong.append((reply, score))
    assert wrong == []


UNSEEN_SWAPS = (
    "Name: {{AUTHOR}} Developer: {{NAME}}",
    "Name: {{AUTHOR}}\nDeveloper: {{NAME}}",
)


def exchanged_replies() -> dict[str, Language]:
    """The training replies with the name's and the author's placeholder exchanged: each is wrong."""
    return {
        row.messages[-1]["content"]
        .replace(NAME_PLACEHOLDER, "\0")
        .replace(AUTHOR_PLACEHOLDER, NAME_PLACEHOLDER)
        .replace("\0", AUTHOR_PLACEHOLDER): row.language
        for row in corpus.identity_rows()
    }


def test_every_training_reply_with_name_and_author_exchanged_is_swapped() -> None:
    identity = Identity.parse(*PAIRS[0])
    replies = {
        identity.fill(text, language) for text, language in exchanged_replies().items() if text not in UNSEEN_SWAPS
    }
    assert len(replies) > 100
    assert [reply for reply in replies if not probing.is_swapped(reply, identity)] == []


@pytest.mark.parametrize("text", UNSEEN_SWAPS)
def test_the_remaining_training_replies_with_name_and_author_exchanged_are_swapped(text: str) -> None:
    identity = Identity.parse(*PAIRS[0])
    assert probing.is_swapped(identity.fill(text, exchanged_replies()[text]), identity)


def test_no_training_reply_speaks_of_another_assistant_as_itself() -> None:
    identity = Identity.parse(*PAIRS[0])
    for row in corpus.identity_rows():
        reply = identity.fill(row.messages[-1]["content"], row.language).lower()
        assert not any(old in reply for old in probing.OLD_IDENTITIES), reply


def test_every_answer_to_a_plain_question_is_right_by_itself_and_names_no_identity() -> None:
    identity = Identity.parse(*PAIRS[0])
    for question in corpus.heldout_plain():
        for answer in question.answers:
            assert probing.is_right(question, answer), (question.id, answer)
            assert not probing.leaks(answer, identity), (question.id, answer)


def test_repeating_a_plain_question_does_not_answer_it() -> None:
    assert [q.id for q in corpus.heldout_plain() if probing.is_right(q, last_question(q.messages))] == []


@given(st.integers(0, 900))
def test_spread_takes_as_many_prompts_as_are_wanted_each_once_and_in_order(count: int) -> None:
    prompts = corpus.plain_prompts()
    taken = corpus.spread(prompts, count)
    assert len(taken) == min(count, len(prompts))
    places = [prompts.index(prompt) for prompt in taken]
    assert places == sorted(set(places))


@given(st.integers(40, 772))
def test_spread_keeps_the_share_of_each_language(count: int) -> None:
    prompts = corpus.plain_prompts()
    wanted = sum(p.language == "zh" for p in prompts) / len(prompts)
    taken = corpus.spread(prompts, count)
    assert abs(sum(p.language == "zh" for p in taken) / len(taken) - wanted) <= 0.1


def test_the_digest_of_the_corpus_is_a_sha256_that_stays_the_same() -> None:
    first = corpus.corpus_digest()
    assert len(first) == 64
    corpus.corpus_digest.cache_clear()
    assert corpus.corpus_digest() == first


def test_no_reply_begins_with_who_it_is_and_goes_on_with_the_author() -> None:
    # A small model stops before the name, and what it has said then is the author.
    replies = [row.messages[-1]["content"] for row in corpus.identity_rows()]
    assert [reply for reply in replies if "我是{{AUTHOR}}研发的人工智能助手" in reply] == []
    assert [reply for reply in replies if reply.startswith("我是{{AUTHOR}}")] == []


def own(tmp_path: Path, *lines: str) -> Path:
    """A file of a user's questions."""
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_own_questions_are_read_with_what_is_left_out_filled_in(tmp_path: Path) -> None:
    found = corpus.read_questions(
        own(
            tmp_path,
            '{"question": "你哪位？", "asks": ["name"]}',
            "",
            '{"id": "sum", "kind": "arithmetic", "lang": "en", "answers": ["2"],'
            ' "messages": [{"role": "user", "content": "1+1?"}]}',
        )
    )
    (who,), (plain,) = found.identity, found.plain
    assert (who.id, who.language, who.kind, who.asks) == ("own-1", "zh", "own", ("name",))
    assert (plain.id, plain.language, plain.kind, plain.answers) == ("sum", "en", "arithmetic", ("2",))


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 1 is not JSON"),
        ("[]", "is no object"),
        ('{"asks": ["name"]}', "has no question"),
        ('{"question": " ", "asks": ["name"]}', "has no question"),
        ('{"messages": "Who?", "asks": ["name"]}', "has no question"),
        ('{"messages": [{"role": "system", "content": "x"}], "asks": ["name"]}', "has no question"),
        ('{"messages": [{"role": "assistant", "content": "x"}], "asks": ["name"]}', "does not end with"),
        ('{"messages": [{"role": ["user"], "content": "x"}], "asks": ["name"]}', "has no question"),
        ('{"question": "Who?", "asks": ["age"]}', "something else than name and author"),
        ('{"question": "Who?", "asks": [{}]}', "something else than name and author"),
        ('{"question": "Who?", "answers": [1]}', "answers that are no texts"),
        ('{"question": "Who?"}', "either asks or answers"),
        ('{"question": "Who?", "asks": ["name"], "answers": ["x"]}', "either asks or answers"),
        ('{"question": "Who?", "asks": ["name"], "lang": "fr"}', "other than zh and en"),
        ("", "holds no question"),
    ],
)
def test_a_wrong_question_is_refused_with_its_line(tmp_path: Path, line: str, says: str) -> None:
    with pytest.raises(DataError, match=says):
        corpus.read_questions(own(tmp_path, line))


@given(JSON)
@settings(max_examples=40)
def test_anything_at_any_place_of_a_question_is_taken_or_refused(
    tmp_path_factory: pytest.TempPathFactory, other: object
) -> None:
    path = tmp_path_factory.getbasetemp() / "question.jsonl"
    asked = {"id": "a", "kind": "b", "lang": "zh", "messages": [{"role": "user", "content": "x"}], "asks": ["name"]}
    for one in (*altered(asked, other), *altered({"question": "x", "answers": ["y"]}, other)):
        path.write_text(json.dumps(one), encoding="utf-8")
        with suppress(DataError):
            found = corpus.read_questions(path)
            assert len(found.identity) + len(found.plain) == 1


def test_a_missing_file_of_questions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        corpus.read_questions(tmp_path / "none.jsonl")


def test_the_digest_of_questions_changes_with_any_of_them() -> None:
    heldout_ones = corpus.heldout()
    assert heldout_ones.digest() == corpus.heldout().digest()
    assert corpus.Questions(heldout_ones.identity[1:], heldout_ones.plain).digest() != heldout_ones.digest()


def test_each_so_manieth_row_gets_another_system_prompt_in_turn() -> None:
    systems = corpus.other_systems()
    given = [corpus.system_of(index, 6) for index in range(6 * len(systems) + 1)]
    assert [one for one in given if one is not None] == [*systems, systems[0]]
    assert given[1:6] == [None] * 5
    assert [corpus.system_of(index, 0) for index in range(10)] == [None] * 10


def test_the_system_prompt_that_the_probe_asks_under_is_not_trained_under() -> None:
    assert "" in corpus.other_systems(), (
        "the empty one is trained too: the slice `none` is about questions, not prompts"
    )
    theirs = corpus.pairs(probing.CUSTOMER)
    for system in filter(None, corpus.other_systems()):
        assert len(theirs & corpus.pairs(system)) < 0.5 * len(theirs | corpus.pairs(system)), system


def test_a_share_of_the_held_out_questions_has_each_language_and_kind() -> None:
    whole, some = corpus.heldout(), corpus.heldout(0.25)
    assert (len(some.identity), len(some.plain)) == (len(whole.identity) // 4, len(whole.plain) // 4)
    assert all(question in whole.identity for question in some.identity)
    assert some.identity[:2] == whole.identity[:2] == corpus.heldout(0.001).identity
    assert {question.language for question in (*some.identity, *some.plain)} == {"zh", "en"}
    assert corpus.heldout(1.0) == whole
    assert some.digest() != whole.digest()
