"""Names and authors: what is read as what, and what is refused."""

from __future__ import annotations

import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from namesake import dataset
from namesake.errors import IdentityError
from namesake.identity import MAX_HALF, PLACEHOLDERS, Identity, Names, language_of, parse_names, slug

AUTHOR = "老爷爷 OldGrandpa"
EXAMPLE = "踩踩背 CCB"


def parse(value: str) -> Names:
    """The value as a name."""
    return parse_names("name", value, example=EXAMPLE)


# Text that a user may type, and text in which the two halves and what is refused are frequent.
ANY_TEXT = st.text(max_size=200) | st.text(
    alphabet=st.sampled_from("踩背Aé́ \u3000\u00a0\t\n\0{}$(-'\"\u200b\U00020bb7ｅ"), max_size=12
)


@given(ANY_TEXT)
def test_any_text_is_two_halves_that_survive_being_written_and_read_again_or_is_refused(text: str) -> None:
    try:
        names = parse(text)
    except IdentityError:
        return
    assert names.zh
    assert names.en
    assert " " not in names.zh
    assert max(len(names.zh), len(names.en)) <= MAX_HALF
    assert parse(str(names)) == names


@given(ANY_TEXT)
def test_what_is_accepted_holds_no_control_character_and_no_placeholder(text: str) -> None:
    try:
        said = str(parse(text))
    except IdentityError:
        return
    assert not {unicodedata.category(character) for character in said} & {"Cc", "Cs", "Zl", "Zp"}
    assert not any(placeholder in said for placeholder in PLACEHOLDERS)


@given(ANY_TEXT)
def test_nothing_is_lost_of_what_is_accepted_but_outer_space_and_one_separator(text: str) -> None:
    try:
        said = str(parse(text))
    except IdentityError:
        return
    squeezed = "".join(unicodedata.normalize("NFC", text).replace("\u3000", " ").split())
    assert "".join(said.split()) == squeezed


def test_the_tutorials_names_are_split_at_the_space() -> None:
    identity = Identity.parse(EXAMPLE, AUTHOR)
    assert identity.name == Names("踩踩背", "CCB")
    assert identity.author == Names("老爷爷", "OldGrandpa")
    assert str(identity) == "踩踩背 CCB / 老爷爷 OldGrandpa"


def test_the_english_half_may_hold_spaces() -> None:
    assert parse("小黄 Xiao Huang") == Names("小黄", "Xiao Huang")


def test_an_ideographic_space_separates_the_halves() -> None:
    assert parse("踩踩背\u3000CCB") == Names("踩踩背", "CCB")


def test_space_around_and_between_the_halves_is_dropped() -> None:
    assert parse("  踩踩背   CCB ") == Names("踩踩背", "CCB")


def test_decomposed_letters_are_composed() -> None:
    assert parse("咖啡 Cafe\u0301") == parse("咖啡 Café")


@pytest.mark.parametrize(
    ("value", "zh", "en"),
    [
        ("$(touch x)", "$(touch", "x)"),
        ("'a' \"b\"", "'a'", '"b"'),
        ("--evil --name=x", "--evil", "--name=x"),
        ("{name} {0}", "{name}", "{0}"),
        ("%s ${HOME}", "%s", "${HOME}"),
        ("`id` ;rm", "`id`", ";rm"),
        ("𠮷野家 Yoshinoya", "𠮷野家", "Yoshinoya"),
        ("猫 🐈", "猫", "🐈"),
    ],
)
def test_hostile_text_with_two_halves_arrives_intact(value: str, zh: str, en: str) -> None:
    assert parse(value) == Names(zh, en)


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        ("", "is empty"),
        ("   ", "is empty"),
        ("\u3000", "is empty"),
        ("踩踩背", "has no second half"),
        ("踩踩背 ", "has no second half"),
        (" 踩踩背", "has no second half"),
        ("踩踩背CCB", "has no second half"),
        ("踩踩背\u00a0CCB", "has no second half"),
        ("--evil", "has no second half"),
        ("{name}", "has no second half"),
        ("踩踩背\nCCB", "U+000A"),
        ("踩踩背 CCB\n", "U+000A"),
        ("踩踩背\tCCB", "U+0009"),
        ("踩踩背 C\0B", "U+0000"),
        ("踩踩背 C\x85B", "U+0085"),
        ("踩踩背 C\x1b[31mB", "U+001B"),
        ("踩踩背 C\u2028B", "U+2028"),
        ("踩踩背 \udce8", "U+DCE8"),
        ("{{NAME}} x", "{{NAME}}"),
        ("踩踩背 the {{AUTHOR}}", "{{AUTHOR}}"),
        ("x" * 10_000, "has no second half"),
        ("x" * 10_000 + " y", "10,000 characters"),
        ("y " + "x" * 10_000, "10,000 characters"),
        ("字" * (MAX_HALF + 1) + " y", f"at most {MAX_HALF}"),
    ],
)
def test_hostile_text_without_two_clean_halves_is_refused_with_its_fault(value: str, fault: str) -> None:
    with pytest.raises(IdentityError) as caught:
        parse(value)
    assert fault in caught.value.message
    assert len(caught.value.message) < 300
    assert f'-P name="{EXAMPLE}"' in caught.value.mend


def test_halves_of_the_greatest_length_are_accepted() -> None:
    assert parse("字" * MAX_HALF + " " + "x" * MAX_HALF) == Names("字" * MAX_HALF, "x" * MAX_HALF)


@pytest.mark.parametrize("value", ["", "老爷爷", "老爷爷\nOldGrandpa"])
def test_a_bad_author_is_refused_as_the_author(value: str) -> None:
    with pytest.raises(IdentityError) as caught:
        Identity.parse(EXAMPLE, value)
    assert caught.value.parameter == "author"


@pytest.mark.parametrize("author", ["踩踩背 OldGrandpa", "老爷爷 CCB", EXAMPLE])
def test_an_author_that_bears_the_name_is_refused(author: str) -> None:
    with pytest.raises(IdentityError, match="same as the name"):
        Identity.parse(EXAMPLE, author)


@pytest.mark.parametrize(
    "author",
    [
        pytest.param("老爷爷 ccb"),
        pytest.param(
            "老爷爷 ＣＣＢ",
        ),
    ],
)
def test_an_author_that_differs_from_the_name_only_in_case_or_width_is_refused(author: str) -> None:
    with pytest.raises(IdentityError, match="same as the name"):
        Identity.parse(EXAMPLE, author)


@pytest.mark.parametrize(
    "value",
    [
        pytest.param("\u200b CCB"),
        pytest.param("踩踩背 \u200b"),
        pytest.param("踩踩背 \u2060\ufeff"),
    ],
)
def test_a_half_that_nobody_can_see_is_refused(value: str) -> None:
    with pytest.raises(IdentityError):
        parse(value)


@pytest.mark.parametrize(
    "value",
    [
        pytest.param("踩踩背 CCB", id="plain"),
        pytest.param("$(touch x)", id="hostile"),
        pytest.param(
            "{{name}} x",
            id="lower-case placeholder",
        ),
        pytest.param(
            "NAME}} x",
            id="end of a placeholder",
        ),
    ],
)
def test_an_accepted_name_can_be_put_into_a_row(value: str) -> None:
    try:
        identity = Identity.parse(value, AUTHOR)
    except IdentityError:
        return
    row = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "{{NAME}}"}], "tag": "zh"}
    dialogues, named = dataset.fill([row], identity)
    assert dialogues[0][-1]["content"] == identity.name.zh
    assert named == 1


def test_placeholders_are_filled_in_the_language_of_the_row() -> None:
    identity = Identity.parse(EXAMPLE, AUTHOR)
    assert identity.fill("我是{{NAME}}，由{{AUTHOR}}开发，{{NAME}}。", "zh") == "我是踩踩背，由老爷爷开发，踩踩背。"
    assert identity.fill("I'm {{NAME}}, made by {{AUTHOR}}.", "en") == "I'm CCB, made by OldGrandpa."


@pytest.mark.parametrize("hostile", [r"\1 \g<0>", "{0} {1}", "%s %d", "$& $1"])
def test_a_name_that_looks_like_a_replacement_pattern_is_put_in_as_it_is(hostile: str) -> None:
    identity = Identity.parse(hostile, AUTHOR)
    assert identity.fill("<{{NAME}}>", "zh") == f"<{identity.name.zh}>"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("CCB", "ccb"),
        ("Xiao Huang", "xiao-huang"),
        ("Café Noir", "cafe-noir"),
        ("ＣＣＢ", "ccb"),
        ("my_bot.2", "my-bot-2"),
        ("--evil", "evil"),
        ("../../etc/passwd", "etc-passwd"),
        ("$(touch x)", "touch-x"),
        ("a@b/c", "a-b-c"),
        ("latest", "latest-model"),
        ("Latest!", "latest-model"),
        ("v7", "v7-model"),
        ("V 7", "v-7"),
        ("v7b", "v7b"),
    ],
)
def test_slugs_are_made_from_the_words_and_reserved_ones_avoided(text: str, wanted: str) -> None:
    assert slug(text) == wanted


def test_the_slug_of_an_identity_is_that_of_the_english_name() -> None:
    assert Identity.parse("小黄 Xiao Huang", AUTHOR).slug == "xiao-huang"


def test_names_without_an_ascii_letter_have_slugs_that_differ() -> None:
    slugs = {slug("踩踩背"), slug("老爷爷"), slug("🤖"), slug("…")}
    assert len(slugs) == 4
    assert all(re.fullmatch(r"model-[0-9a-f]{8}", one) for one in slugs)


@given(st.text(min_size=1, max_size=MAX_HALF))
def test_every_slug_is_a_plain_ascii_name_that_mlflow_does_not_reserve(text: str) -> None:
    made = slug(text)
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", made)
    assert not re.fullmatch(r"latest|v\d+", made)
    assert slug(text) == made


@pytest.mark.parametrize(
    ("text", "language"),
    [("你是谁？", "zh"), ("Who are you?", "en"), ("Who is 踩踩背?", "zh"), ("𠮷", "zh"), ("？！", "en"), ("", "en")],
)
def test_text_with_a_chinese_character_is_chinese_and_all_else_english(text: str, language: str) -> None:
    assert language_of(text) == language
