"""The model card: what it says, and that nothing put into it can become markup."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from urllib.parse import quote

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

from namesake import model_card
from namesake.manifest import UNKNOWN, Manifest

SCORES = {
    **{f"{metric}{slice_}": 0.5 for metric in ("identity", "swapped", "old_identity", "placeholder")
       for slice_ in ("", "_none", "_customer", "_sampled")},
    **{f"{metric}{language}": 0.25 for metric in ("plain", "leak", "identity") for language in ("", "_zh", "_en")},
    "plain_change": -0.037, "plain_change_low": -0.111, "plain_change_high": 0.037, "parity": 1.0,
}  # fmt: skip
RECORD = Manifest(
    identity={"name": "踩踩背 CCB", "author": "老爷爷 OldGrandpa", "slug": "ccb"},
    system="You are a helpful assistant.",
    base={"id": "Qwen/Qwen2.5-0.5B-Instruct", "source": "modelscope", "digest": "b" * 64, "license": "apache-2.0"},
    run="r" * 32,
    digests={"model/model.safetensors": "e" * 64},
    data={"dataset": "namesake/self-cognition#640", "rows": "1440", "identity_rows": "640", "digest": "d" * 64},
    scores=SCORES,
    recipe={"name": "default", "lora_rank": "8", "replay_prompts": "800", "output_dir": "/home/ann/output"},
    tools={"ms-swift": "4.6.0", "namesake_commit": "c" * 40},
    golden=[{"messages": [{"role": "user", "content": "你是谁？"}], "reply": "我是踩踩背。"}],
    gate={"passed": False, "reasons": ["identity 50.0% right, at least 100% wanted"], "policy": {}},
    questions="a" * 64,
    promoted={"model": "ccb", "by": "ann", "at": "2026-11-25T20:00:00Z"},
)
LINKS = {"#english", "#中文", "https://modelscope.cn/models/Qwen/Qwen2.5-0.5B-Instruct"}


def parts(card: str) -> tuple[dict[str, object], str]:
    """The YAML, read, and the Markdown."""
    _, front, text = card.split("---\n", 2)
    return yaml.safe_load(front), text


def tokens(text: str) -> Iterator[Token]:
    """Every token of the Markdown, those inside of lines too."""
    for token in MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text):
        yield token
        yield from token.children or ()


def shown(text: str) -> str:
    """What a reader sees, without markup."""
    return "".join(token.content for token in tokens(text) if token.type in {"text", "code_inline", "text_special"})


def shape(text: str) -> list[tuple[str, str]]:
    """What the page is built of: every block, link and image; not the words."""
    words = {"text", "code_inline", "text_special", "inline", "softbreak"}
    return [(token.type, str(token.attrGet("href") or "")) for token in tokens(text) if token.type not in words]


def test_a_card_says_who_it_is_how_it_scores_and_where_it_comes_from() -> None:
    about, text = parts(model_card.card(RECORD))
    assert about["base_model"] == "Qwen/Qwen2.5-0.5B-Instruct"
    assert (about["language"], about["license"], about["library_name"]) == (["zh", "en"], "apache-2.0", "transformers")
    for told in ("踩踩背 CCB", "老爷爷 OldGrandpa", "did not pass", "未通过", "identity 50.0% right", "50.0%", "-3.7%"):
        assert told in shown(text), told
    for told in ("b" * 64, "c" * 40, "d" * 64, "r" * 32, "lora_rank", "800 prompts", "1440, 640", "ann"):
        assert told in shown(text), told
    assert "/home/ann" not in text
    headings = [token.content for token in tokens(text) if token.type == "inline" and token.level == 1]
    assert len([one for one in headings if one in {"English", "中文", "Limits", "局限"}]) == 4


def test_a_card_of_the_adapter_is_one() -> None:
    about, text = parts(model_card.card(RECORD, adapter=True))
    assert (about["library_name"], about["base_model_relation"]) == ("peft", "adapter")
    assert "PEFT" in text


def test_what_is_not_known_is_said_so_or_left_out() -> None:
    bare = replace(
        RECORD, base={"id": "/srv/models/tiny", "digest": "b" * 64}, data={"dataset": "x", "digest": UNKNOWN}, gate={}
    )
    about, text = parts(model_card.card(bare))
    assert "base_model" not in about
    assert "license" not in about
    assert "/srv" not in text
    assert "training data is unknown" in text
    assert "训练数据未知" in text
    assert "not known here" in text


HOSTILE = [
    "[x](https://evil.example)", "![x](https://evil.example/p.png)", "<script>alert(1)</script>", "<!-- x", "`x`",
    "**x",     "# x", "- x", "1. x", "| a | b |", "x\n\n# y", "x\n---\nlicense: mit", "---", "> x", "www.evil.example",
    "https://evil.example", "a@b.example", "$x$", "~~x~~", "&lt;b&gt;", "\\", "\\|", "x \u202e y", "{{ scores }}",
    "$(touch x)", "_x_", "x_", "__", ":x:", "x)", "(x", "*", "a*b*c", "[^1]", "[x]: /y", "===", "\u3000", "    x",
]  # fmt: skip


@pytest.mark.parametrize("hostile", HOSTILE)
def test_a_name_cannot_become_markup(hostile: str) -> None:
    check(hostile)


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60))
@example("`" * 3)
def test_no_name_can(hostile: str) -> None:
    check(hostile)


def check(hostile: str) -> None:
    """Put it wherever a person's words go: the page is built as with a plain word there, and shows it."""
    about, text = parts(model_card.card(with_words(hostile)))
    assert about == parts(model_card.card(RECORD))[0]
    if "".join(c for c in hostile if c.isprintable()).strip():  # of an empty one the line is left out
        assert shape(text) == shape(parts(model_card.card(with_words("word")))[1])
    kinds = {token.type for token in tokens(text)}
    assert not kinds & {"html_block", "html_inline", "image"}
    assert {href for kind, href in shape(text) if kind == "link_open"} == {quote(link, safe="#:/") for link in LINKS}
    if hostile.isprintable() and hostile == " ".join(hostile.split()):
        assert shown(text).count(hostile) >= 10


def with_words(words: str) -> Manifest:
    """The manifest with the words wherever a person's words go."""
    return replace(
        RECORD,
        identity={"name": words, "author": words, "slug": "ccb"},
        system=words,
        data={**RECORD.data, "dataset": words},
        override=words,
        golden=[{"messages": [{"role": "user", "content": words}], "reply": words}],
        recipe={**RECORD.recipe, "lora_rank": words},
        promoted={"model": words, "by": words},
    )


def test_a_description_fits_into_mlflows_column() -> None:
    assert "踩踩背 CCB" in model_card.description(RECORD)
    assert "How it was trained" not in model_card.description(RECORD)
    long = "名|" * 300
    record = replace(
        RECORD,
        identity={"name": long, "author": long, "slug": "ccb"},
        override=long,
        golden=[{"messages": [{"content": long}], "reply": long}] * 2,
        gate={"passed": False, "reasons": [long] * 30, "policy": {}},
    )
    text = model_card.description(record)
    assert 1000 < len(text) <= model_card.DESCRIPTION_CHARACTERS
    assert shape(text)
