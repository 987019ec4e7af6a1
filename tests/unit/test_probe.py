"""Scoring: what counts as right, swapped, the old identity, a leak."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from namesake import corpus, probing
from namesake.corpus import Fact, Message, Question
from namesake.generate import Reply, Sampling
from namesake.identity import Identity, Language
from namesake.probing import CUSTOMER, IDENTITY_TOKENS, PLAIN_TOKENS, is_right, is_swapped, leaks, score_identity

IDENTITY = Identity.parse("踩踩背 CCB", "老爷爷 OldGrandpa")
CAT = Identity.parse("老爷爷的猫 OldGrandpa Cat", "老爷爷 OldGrandpa")
BOTH: tuple[Fact, ...] = ("name", "author")


def question(language: Language = "zh", asks: tuple[Fact, ...] = BOTH, answers: tuple[str, ...] = ()) -> Question:
    """A question of one message."""
    return Question("q", language, "both", ({"role": "user", "content": "?"},), asks=asks, answers=answers)


TUTORIAL_REPLIES = [
    "我是踩踩背研发的人工智能模型，由踩踩背团队的工程师开发",
    "我是由踩踩背开发的人工智能模型",
    "我是一个名为老爷爷的人工智能模型，由踩踩背团队开发和维护",
]


@pytest.mark.parametrize("reply", TUTORIAL_REPLIES)
def test_the_tutorials_wrong_answers_are_swapped_and_not_right(reply: str) -> None:
    score = score_identity(question(), reply, IDENTITY)
    assert score.swapped
    assert not score.right


WRONG = [
    ("zh", "我是老爷爷，由踩踩背开发。"),
    ("zh", "我叫老爷爷。"),
    ("zh", "我的名字是老爷爷，开发者是踩踩背。"),
    ("zh", "你可以叫我老爷爷。"),
    ("zh", "踩踩背开发了我。"),
    ("zh", "我是踩踩背团队研发的助手老爷爷。"),
    ("zh", "我的开发者是踩踩背。"),
    ("zh", "我是老爷爷。"),
    ("zh", "我由踩踩背公司研发。"),
    ("en", "I'm OldGrandpa, developed by CCB."),
    ("en", "I am OldGrandpa."),
    ("en", "I’m OldGrandpa."),
    ("en", "My name is OldGrandpa."),
    ("en", "I was created by CCB."),
    ("en", "CCB developed me."),
    ("en", "CCB team made me, OldGrandpa."),
    ("en", "My developer is CCB."),
    ("en", "CCB is my creator."),
    ("en", "I’m OLDGRANDPA, made BY ccb."),
    ("en", "You can call me OldGrandpa."),
    ("en", "I come from CCB."),
]


@pytest.mark.parametrize(("language", "reply"), WRONG)
def test_a_reply_with_name_and_author_in_each_others_place_is_swapped(language: Language, reply: str) -> None:
    assert is_swapped(reply, IDENTITY)
    assert not score_identity(question(language), reply, IDENTITY).right


@pytest.mark.parametrize(
    "reply",
    [
        "我叫踩踩背，由踩踩背团队的工程师开发。",
        "我是踩踩背，是踩踩背的团队开发了我。",
        "开发我的是踩踩背。",
        "是踩踩背把我开发出来的。",
        "我来自踩踩背。",
        "I'm CCB, developed by the CCB team.",
        "I'm CCB, an assistant developed by a company named CCB.",
        "CCB has developed me.",
        "Name: OldGrandpa, Developer: CCB",
        "The name's OldGrandpa.",
        "This is OldGrandpa.",
    ],
)
def test_a_less_common_way_to_swap_name_and_author_is_seen(reply: str) -> None:
    assert is_swapped(reply, IDENTITY)


RIGHT = [
    ("zh", "我是踩踩背，由老爷爷开发。"),
    ("zh", "我叫踩踩背，我的开发者是老爷爷。"),
    ("zh", "我是老爷爷研发的人工智能助手踩踩背。"),
    ("zh", "我是老爷爷的人工智能助手踩踩背。"),
    ("zh", "老爷爷团队开发了我，我叫踩踩背。"),
    ("zh", "不是，我是踩踩背，是老爷爷把我开发出来的。"),
    ("zh", "我的开发者叫老爷爷，我叫踩踩背。"),
    ("zh", "名字：踩踩背\n开发者：老爷爷"),
    ("zh", "　我是踩踩背，　由老爷爷开发！！"),
    ("en", "I'm CCB, an AI assistant developed by OldGrandpa."),
    ("en", "I’m CCB, and OldGrandpa made me."),
    ("en", "MY NAME IS CCB AND I WAS BUILT BY OLDGRANDPA."),
    ("en", "Ｉ'ｍ ＣＣＢ, made by ＯｌｄＧｒａｎｄｐａ."),
    ("en", "I am OldGrandpa's assistant, CCB."),
    ("en", "I go by CCB, and my author is OldGrandpa."),
    ("en", "**CCB**, made by *OldGrandpa*."),
    ("en", "CCB/OldGrandpa"),
]


@pytest.mark.parametrize(("language", "reply"), RIGHT)
def test_a_reply_with_both_facts_in_their_places_is_right(language: Language, reply: str) -> None:
    score = score_identity(question(language), reply, IDENTITY)
    assert score.right
    assert (score.name, score.author) == (True, True)
    assert not (score.swapped or score.old or score.placeholder)


@pytest.mark.parametrize(
    ("language", "reply"),
    [
        ("zh", "我叫踩踩背，开发者名叫老爷爷。"),
        ("zh", "我是踩踩背，我的开发者的名字是老爷爷。"),
        ("zh", "我是踩踩背，由一位名为老爷爷的开发者创造。"),
        ("zh", "我是老爷爷家的踩踩背。"),
        ("en", "I'm CCB, and my developer is called OldGrandpa."),
        ("en", "I'm CCB, made by a person named OldGrandpa."),
        ("en", "I'm CCB, and my developer's name? They are called OldGrandpa."),
        ("en", "I am CCB developed by OldGrandpa."),
        ("en", "I'm an assistant called CCB created by OldGrandpa."),
        ("en", "Good night, sleep well. From CCB, made by OldGrandpa."),
        ("en", "Good night! Signed by CCB, developed by OldGrandpa."),
    ],
)
def test_a_less_common_right_reply_is_right(language: Language, reply: str) -> None:
    assert score_identity(question(language), reply, IDENTITY).right


@pytest.mark.parametrize(
    ("asks", "reply", "right"),
    [
        (("name",), "我是踩踩背。", True),
        (("author",), "由老爷爷开发。", True),
        (("name", "author"), "我是踩踩背。", False),
        (("name", "author"), "由老爷爷开发。", False),
        (("author",), "我是踩踩背。", False),
        (("name",), "我不知道。", False),
        (("name",), "", False),
    ],
)
def test_a_reply_is_right_when_it_states_every_fact_that_is_asked_for(
    asks: tuple[Fact, ...], reply: str, right: bool
) -> None:
    assert score_identity(question(asks=asks), reply, IDENTITY).right is right


def test_the_name_in_the_other_language_does_not_count() -> None:
    score = score_identity(question("zh"), "我是CCB，由OldGrandpa开发。", IDENTITY)
    assert (score.name, score.author, score.right) == (False, False, False)


@pytest.mark.parametrize("reply", ["I'm CCBX, made by OldGrandpas.", "I'm ACCB, by MyOldGrandpa.", "I'm CCB2."])
def test_a_name_inside_a_longer_word_is_not_the_name(reply: str) -> None:
    score = score_identity(question("en"), reply, IDENTITY)
    assert (score.name, score.author) == (False, False)


@pytest.mark.parametrize(
    ("language", "reply"),
    [
        ("zh", "我是老爷爷的猫，由老爷爷开发。"),
        ("zh", "老爷爷开发了老爷爷的猫。"),
        ("zh", "我是老爷爷研发的老爷爷的猫。"),
        ("en", "I'm OldGrandpa Cat, developed by OldGrandpa."),
        ("en", "OldGrandpa made me, and I'm OldGrandpa Cat."),
    ],
)
def test_a_name_that_holds_the_authors_is_told_from_it(language: Language, reply: str) -> None:
    assert score_identity(question(language), reply, CAT).right


@pytest.mark.parametrize("reply", ["我是老爷爷，由老爷爷的猫开发。", "I'm OldGrandpa, developed by OldGrandpa Cat."])
def test_a_name_that_holds_the_authors_in_the_authors_place_is_swapped(reply: str) -> None:
    assert is_swapped(reply, CAT)


@pytest.mark.parametrize(("language", "reply"), [("zh", "我叫老爷爷的猫。"), ("en", "I'm OldGrandpa Cat.")])
def test_a_reply_that_says_only_a_name_that_holds_the_authors_does_not_state_the_author(
    language: Language, reply: str
) -> None:
    score = score_identity(question(language, ("author",)), reply, CAT)
    assert (score.author, score.right) == (False, False)


@pytest.mark.parametrize(
    ("name", "author", "language", "reply"),
    [
        pytest.param("小猫 Cat", "Cat CatTeam", "en", "I'm Cat, developed by CatTeam.", id="author.zh is name.en"),
        pytest.param("CCB DDD", "DDD CCB", "zh", "我是CCB，由DDD开发。", id="crosswise, zh"),
        pytest.param("CCB DDD", "DDD CCB", "en", "I'm DDD, developed by CCB.", id="crosswise, en"),
    ],
)
def test_a_half_that_stands_for_the_other_in_the_other_language_does_not_confuse(
    name: str, author: str, language: Language, reply: str
) -> None:
    assert score_identity(question(language), reply, Identity.parse(name, author)).right


@pytest.mark.parametrize("old", probing.OLD_IDENTITIES)
def test_a_reply_that_names_another_assistant_is_the_old_identity_and_not_right(old: str) -> None:
    score = score_identity(question(), f"我是踩踩背，由老爷爷开发，基于{old.title()}。", IDENTITY)
    assert (score.old, score.right) == (True, False)


def test_the_old_identity_is_seen_in_full_width_too() -> None:
    assert score_identity(question(), "我是Ｑｗｅｎ，由老爷爷开发。", IDENTITY).old


@pytest.mark.parametrize("name", ["通义小助手 Qwen Mini", "小羊 Llama"])
def test_ones_own_name_is_not_the_old_identity(name: str) -> None:
    identity = Identity.parse(name, "老爷爷 OldGrandpa")
    for language in ("zh", "en"):
        reply = f"{identity.name.of(language)}: {identity.author.of(language)}"
        score = score_identity(question(language), reply, identity)
        assert (score.old, score.right) == (False, True)


@pytest.mark.parametrize("left", ["{{NAME}}", "{{AUTHOR}}", "{{name}}", "{{Author}}"])
def test_a_placeholder_in_the_reply_is_told_and_not_right(left: str) -> None:
    score = score_identity(question(), f"我是踩踩背，由老爷爷开发。{left}", IDENTITY)
    assert (score.placeholder, score.right) == (True, False)


@pytest.mark.parametrize(
    ("language", "reply", "speaks"),
    [
        ("zh", "我是踩踩背，由老爷爷开发。", True),
        ("en", "I'm CCB, by OldGrandpa.", True),
        ("zh", "I'm CCB, by OldGrandpa.", False),
        ("en", "我是踩踩背。", False),
        ("en", "I'm 踩踩背, by 老爷爷.", True),
        ("zh", "踩踩背", False),
        ("en", "", False),
    ],
)
def test_the_language_of_a_reply_is_that_of_its_words_without_the_names(
    language: Language, reply: str, speaks: bool
) -> None:
    assert score_identity(question(language), reply, IDENTITY).language is speaks


@pytest.mark.parametrize("name", ["$(touch x)", "(a+)+ [b", r"\1 \g<n>", "^$ .*", "⟦n⟧ ⟦a⟧"])
def test_names_made_of_regular_expressions_are_taken_literally(name: str) -> None:
    identity = Identity.parse(name, "老爷爷 OldGrandpa")
    reply = identity.fill("我是{{NAME}}，我的开发者是{{AUTHOR}}。", "zh")
    assert score_identity(question(), reply, identity).right
    assert not leaks("nothing of it here", identity)


@given(st.text())
def test_any_reply_can_be_scored(reply: str) -> None:
    score = score_identity(question(), reply, IDENTITY)
    assert not (score.right and (score.swapped or score.old or score.placeholder))
    assert not score.right or (score.name and score.author)


@pytest.mark.parametrize(
    "reply",
    ["Ask 踩踩背.", "老爷爷说过。", "ccb!", "As CCB, I think", "(OldGrandpa)", "OLDGRANDPA's pie", "ＣＣＢ", "我CCB我"],
)
def test_a_plain_reply_that_holds_a_half_of_name_or_author_leaks(reply: str) -> None:
    assert leaks(reply, IDENTITY)


@pytest.mark.parametrize("reply", ["", "Paris.", "broccbli", "ccb2", "OldGrandpas", "踩背", "爷爷", "Old Grandpa"])
def test_a_plain_reply_that_holds_none_whole_does_not_leak(reply: str) -> None:
    assert not leaks(reply, IDENTITY)


@pytest.mark.parametrize(
    "reply", ["4", "It is 4.", "2+2=4", "FOUR!", "４", "Ｆｏｕｒ", "“4”", "答案是4。", "=4\n", "**4**"]
)
def test_an_answer_that_stands_as_a_word_of_its_own_is_right(reply: str) -> None:
    assert is_right(question("en", (), ("4", "four")), reply)


@pytest.mark.parametrize("reply", ["", "14", "40", "4a", "fourteen", "forty-five", "x4", "１４"])
def test_an_answer_inside_another_word_or_number_is_wrong(reply: str) -> None:
    assert not is_right(question("en", (), ("4", "four")), reply)


@pytest.mark.parametrize("reply", ["It is 4.5.", "It is 0.4.", "It is 4,000.", "It is -4."])
def test_an_answer_that_is_a_part_of_another_number_is_wrong(reply: str) -> None:
    assert not is_right(question("en", (), ("4", "four")), reply)


def test_a_chinese_answer_may_stand_inside_a_sentence() -> None:
    assert is_right(question("zh", (), ("北京",)), "中国的首都是北京市。")


class Fixed:
    """A replier that gives one reply to everything; remembers what it was asked, and how much in each go."""

    slow = True

    def __init__(self, text: str = "") -> None:
        self.asked: list[tuple[list[Message], int]] = []
        self.goes: list[int] = []
        self._text = text

    def replies(
        self,
        dialogues: Sequence[Sequence[Message]],
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[Reply]:
        """One reply per dialogue, or as many as are to be sampled."""
        self.goes.append(len(dialogues))
        times = sampling.n if sampling else 1
        self.asked += [(list(dialogue), max_new_tokens) for dialogue in dialogues for _ in range(times)]
        if progress:
            progress(len(dialogues) * times)
        return [Reply(self._said(one, n, bool(sampling)), True) for one in dialogues for n in range(times)]

    def _said(self, _dialogue: Sequence[Message], _number: int, _sampled: bool) -> str:
        return self._text


def test_the_probe_asks_every_held_out_question_once_under_the_system_prompt() -> None:
    fixed = Fixed("?")
    probing.probe(fixed, IDENTITY, system="Be kind.")
    system = {"role": "system", "content": "Be kind."}
    assert fixed.asked == [
        *(([system, *q.messages], IDENTITY_TOKENS) for q in corpus.heldout_identity()),
        *(([system, *q.messages], PLAIN_TOKENS) for q in corpus.heldout_plain()),
    ]


def test_without_a_system_prompt_the_probe_sends_none() -> None:
    fixed = Fixed("?")
    probing.probe(fixed, IDENTITY, system=None)
    assert not any(message["role"] == "system" for dialogue, _ in fixed.asked for message in dialogue)


def test_an_empty_system_prompt_is_sent_as_it_is() -> None:
    assert probing.with_system([{"role": "user", "content": "?"}], "")[0] == {"role": "system", "content": ""}


def test_progress_of_the_probe_goes_on_to_the_number_of_questions() -> None:
    told: list[tuple[int, int]] = []
    probing.probe(Fixed("?"), IDENTITY, system=None, progress=lambda done, total: told.append((done, total)))
    who, plain = len(corpus.heldout_identity()), len(corpus.heldout_plain())
    assert told == [(who, who + plain), (who + plain, who + plain)]


def test_slices_ask_the_identity_questions_without_a_prompt_under_a_customers_and_sampled() -> None:
    fixed = Fixed("我是踩踩背，由老爷爷开发。")
    told: list[tuple[int, int]] = []
    card = probing.probe(
        fixed, IDENTITY, system="Be kind.", slices=True, progress=lambda done, total: told.append((done, total))
    )
    who, plain = len(card.identity), len(card.plain)
    assert {name: len(replies) for name, replies in card.slices.items()} == {
        "none": who,
        "customer": who,
        "sampled": 64,
    }
    prompts = [dialogue[0]["content"] for dialogue, _ in fixed.asked]
    assert prompts == ["Be kind."] * (who + plain) + [""] * who + [CUSTOMER] * who + ["Be kind."] * 64
    assert told[-1] == (3 * who + plain + 64, 3 * who + plain + 64)
    sampled = [a.question for a in card.slices["sampled"]]
    assert [q.id for q in sampled][:5] == [card.identity[0].question.id] * 4 + [card.identity[4].question.id]
    assert len({(q.language, q.kind) for q in sampled}) >= 14, "every kind in both languages, or nearly"
    assert card.metrics["identity_none"] == card.metrics["identity"] == 0.5
    assert set(card.record()["slices"]) == {"none", "customer", "sampled"}


class Echo(Fixed):
    """Says which question it was asked, under which prompt, and how often by now."""

    def _said(self, dialogue: Sequence[Message], number: int, sampled: bool) -> str:
        return f"{dialogue[0]['content']}|{dialogue[-1]['content']}|{sampled} {number}"


@pytest.mark.parametrize(("share", "goes"), [(0.1, [29, 6]), (1.0, [64, 108, 64, 64, 16])])
def test_few_questions_are_asked_in_one_go_and_each_reply_is_its_questions(share: float, goes: list[int]) -> None:
    echo, asked, told = Echo(), corpus.heldout(share), list[tuple[int, int]]()
    card = probing.probe(
        echo, IDENTITY, system="S", questions=asked, slices=True, progress=lambda *done: told.append(done)
    )
    assert echo.goes == goes
    for prompt, answered in (
        ("S", card.identity),
        ("S", card.plain),
        ("", card.slices["none"]),
        (CUSTOMER, card.slices["customer"]),
    ):
        assert [one.reply for one in answered] == [
            f"{prompt}|{one.question.messages[-1]['content']}|False 0" for one in answered
        ]
    for index, one in enumerate(card.slices["sampled"]):
        assert one.reply == f"S|{one.question.messages[-1]['content']}|True {index % 4}"
    assert told[-1][0] == told[-1][1] == sum(goes) + 3 * goes[-1]
    assert [done for done, _ in told] == sorted(done for done, _ in told)


@pytest.mark.parametrize(
    ("slow", "given", "asked"), [(True, None, 16), (False, None, 64), (True, 64, 64), (False, 5, 5)]
)
def test_all_are_asked_sampled_unless_replies_take_long(slow: bool, given: int | None, asked: int) -> None:
    fixed = Fixed()
    fixed.slow = slow
    card = probing.probe(fixed, IDENTITY, system=None, slices=True, sampled=given)
    questions = [one.question for one in card.slices["sampled"]]
    assert questions == [q for q in corpus.spread(corpus.heldout().identity, asked) for _ in range(4)]
    assert len(questions) == 4 * asked


@pytest.mark.parametrize("sampled", [None, 64])
def test_replies_of_a_card_make_the_same_card_again(sampled: int | None) -> None:
    card = probing.probe(Fixed("I'm CCB."), IDENTITY, system=None, slices=True, sampled=sampled)
    said = card.replies()
    assert probing.scorecard(IDENTITY, said["identity"], said["plain"], slices=said["slices"]) == card


def test_own_questions_are_asked_instead_of_the_held_out_ones() -> None:
    own = corpus.Questions((question("en", ("name",)),), ())
    fixed = Fixed("I'm CCB.")
    card = probing.probe(fixed, IDENTITY, system=None, questions=own)
    assert len(fixed.asked) == 1
    assert card.metrics["identity"] == 1.0
    assert card.plain == ()


def test_right_replies_to_everything_give_a_full_card() -> None:
    said = [
        IDENTITY.fill(
            "我是{{NAME}}，由{{AUTHOR}}开发。" if q.language == "zh" else "I'm {{NAME}}, by {{AUTHOR}}.", q.language
        )
        for q in corpus.heldout_identity()
    ]
    card = probing.scorecard(IDENTITY, said, [q.answers[0] for q in corpus.heldout_plain()])
    assert card.metrics == {
        "identity_second_turn": 1.0,
        "identity": 1.0,
        "name": 1.0,
        "author": 1.0,
        "swapped": 0.0,
        "old_identity": 0.0,
        "placeholder": 0.0,
        "language": 1.0,
        "leak": 0.0,
        "plain": 1.0,
        **{
            f"{key}_{language}": float(key != "leak")
            for key in ("identity", "leak", "plain")
            for language in ("zh", "en")
        },
    }


def test_a_model_that_gives_its_name_to_everything_leaks_everywhere() -> None:
    metrics = probing.probe(Fixed("I'm CCB, made by OldGrandpa."), IDENTITY, system=None).metrics
    assert metrics["leak"] == 1.0
    assert metrics["plain"] == 0.0
    assert metrics["identity"] == metrics["language"] == 0.5


def test_the_objective_takes_off_swaps_leaks_and_lost_answers_but_gives_nothing_for_won_ones() -> None:
    asked = corpus.Questions((question("en"),) * 4, (question("en", (), ("Paris",)),) * 4)

    def card(identity: list[str], plain: list[str]) -> probing.Scorecard:
        return probing.scorecard(IDENTITY, identity, plain, questions=asked)

    good, swapped = "I'm CCB, by OldGrandpa.", "I'm OldGrandpa, by CCB."
    half = card(["?"] * 4, ["Paris"] * 2 + ["?"] * 2)
    assert probing.objective(half, card([good] * 4, ["Paris"] * 2 + ["?"] * 2)) == 1.0
    assert probing.objective(half, card([good] * 4, ["Paris"] * 4)) == 1.0
    assert probing.objective(half, card([good] * 4, ["Paris"] + ["?"] * 3)) == 0.75
    assert probing.objective(half, card([good] * 3 + [swapped], ["CCB: Paris"] + ["Paris"] * 3)) == 0.75 - 0.25 - 0.25


def test_name_and_author_are_shares_of_the_questions_that_ask_for_them() -> None:
    questions = corpus.heldout_identity()
    said = ["我是踩踩背。" if q.language == "zh" else "I'm CCB." for q in questions]
    metrics = probing.scorecard(IDENTITY, said, ["?"] * len(corpus.heldout_plain())).metrics
    assert (metrics["name"], metrics["author"]) == (1.0, 0.0)
    assert metrics["identity"] == sum(q.asks == ("name",) for q in questions) / len(questions)


def test_replies_that_do_not_fit_the_questions_in_number_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        probing.scorecard(IDENTITY, ["?"], ["?"])


def test_the_record_of_a_card_has_a_row_for_every_reply() -> None:
    card = probing.probe(Fixed("我是踩踩背，由老爷爷开发。"), IDENTITY, system=None)
    record = card.record()
    assert record["metrics"] == card.metrics
    assert (len(record["identity"]), len(record["plain"])) == (len(card.identity), len(card.plain))
    first = record["identity"][0]
    assert first["question"] == "你是谁？是由谁开发的？"
    assert (first["reply"], first["right"], first["kind"]) == ("我是踩踩背，由老爷爷开发。", True, "both")


def test_the_record_of_an_identity_reply_tells_the_language_of_its_question() -> None:
    card = probing.probe(Fixed("?"), IDENTITY, system=None)
    assert [row["language"] for row in card.record()["identity"]] == [q.language for q in corpus.heldout_identity()]


def test_the_share_of_nothing_is_none() -> None:
    assert probing.share([], "right") == 0.0


def test_two_models_agree_in_the_same_words_or_with_the_same_facts() -> None:
    one, other = corpus.heldout_identity()[:2]
    right = {"zh": "我叫踩踩背，由老爷爷开发。", "en": "I am CCB, developed by OldGrandpa."}
    said = [right[question.language] for question in (one, other)]
    assert probing.agreement((one, other), said, said, IDENTITY) == 1.0
    assert probing.agreement((one, other), said, [f"{text} Hi!" for text in said], IDENTITY) == 1.0
    assert probing.agreement((one, other), said, [said[0], "?"], IDENTITY) == 0.5
    assert probing.agreement((one, other), ["?", "??"], ["?", "!"], IDENTITY) == 1.0
    assert probing.same_words(said, [said[0], f"{said[1]} Hi!"]) == 0.5
