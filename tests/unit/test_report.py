"""The report: what stands on the page and in the plots, in both languages, and that nothing in it can break out."""

from __future__ import annotations

import re
import struct
from dataclasses import replace
from html.parser import HTMLParser
from importlib import resources
from typing import Any

import pytest
from markupsafe import escape
from scipy import stats

from namesake import corpus, gate, probing, report
from namesake.gate import Interval, Policy
from namesake.identity import Identity
from namesake.report import Report

IDENTITY = Identity.parse("踩踩背 CCB", "老爷爷 OldGrandpa")
TEMPLATE = resources.files("namesake").joinpath(report.TEMPLATE).read_text(encoding="utf-8")


def who(id_: str, reply: str = "I'm CCB.", **scores: Any) -> dict[str, Any]:
    row = {"id": id_, "language": "en", "kind": "name", "question": f"Who is {id_}?", "reply": reply}
    faults = dict.fromkeys(("swapped", "old", "placeholder"), False)
    return {**row, "name": True, "author": True, **faults, "language_matched": True, "right": True, **scores}


def plain(id_: str, right: bool, reply: str = "Ice.", **scores: Any) -> dict[str, Any]:
    row = {"id": id_, "language": "en", "kind": "knowledge", "question": f"What is {id_}?", "reply": reply}
    return {**row, "right": right, "leak": False, **scores}


def card(identity: list[dict[str, Any]], plain_: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    def share(rows: list[dict[str, Any]], key: str) -> float:
        return sum(row[key] for row in rows) / len(rows) if rows else 0.0

    metrics = {
        "identity": share(identity, "right"),
        "swapped": share(identity, "swapped"),
        "old_identity": share(identity, "old"),
        "placeholder": share(identity, "placeholder"),
        "language": share(identity, "language_matched"),
        "name": share(identity, "name"),
        "leak": share(plain_, "leak"),
        "plain": share(plain_, "right"),
    }
    return {"metrics": metrics, "identity": identity, "plain": plain_, **more}


def given(**changes: Any) -> Report:
    found = Report(
        name="踩踩背 CCB",
        author="老爷爷 OldGrandpa",
        run="0123456789abcdef0123456789abcdef",
        title="踩踩背 CCB · default · seed 42",
        passed=True,
        reasons=(),
        before=card(
            [who("a", "I'm Emily.", right=False), who("b", "I'm Bob.", right=False)],
            [plain("w", True), plain("x", False), plain("y", True), plain("z", False)],
        ),
        after=card(
            [who("a"), who("b", "I'm OldGrandpa.", right=False, swapped=True)],
            [plain("w", True), plain("x", True), plain("y", False, "I forgot.", leak=True), plain("z", False)],
            slices={"none": [who("a")], "customer": [who("a")], "sampled": [who("a"), who("a"), who("b"), who("b")]},
        ),
        losses={"train/loss": [(1, 3.5), (5, 1.0), (10, 0.25)], "eval/loss": [(10, 0.5)]},
        recipe={"sft.lora_rank": "8"},
        lineage={"base.digest": "1ffbb834"},
    )
    return replace(found, **changes)


EMPTY = {"metrics": {}, "identity": [], "plain": []}


class Texts(HTMLParser):
    """The page's tags, and its text in English, in Chinese and in neither."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[tuple[str, str]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {"e": [], "z": [], "": []}
        self.shown = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append((tag, found))
        if tag in {"span", "style", "title"}:
            self.open.append((tag, found.get("class") or ""))
            if found.get("class") in {"e", "z"}:  # one label, however many tags are in it
                self.text[str(found["class"])].append("")

    def handle_endtag(self, tag: str) -> None:
        if self.open and self.open[-1][0] == tag:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        if any(tag == "style" for tag, _ in self.open):
            return
        within = next((kind for tag, kind in self.open if kind in {"e", "z"}), "")
        if within != "z":
            self.shown += data
        if within:
            self.text[within][-1] += data
        else:
            self.text[""].append(data)

    @property
    def english(self) -> str:
        """The page as it reads before anything is pressed."""
        return " ".join(self.shown.split())


@pytest.mark.parametrize(
    ("passed", "reasons", "kind", "english", "chinese"),
    [
        (True, (), "verdict passed", "Passed the gate", "已通过门槛"),
        (False, ("leak 8.3%, at most 0% allowed",), "verdict refused", "Refused by the gate", "未通过门槛"),
        (None, (), "verdict", "Not judged", "尚未评判"),
    ],
)
def test_the_verdict_is_told_by_words_and_by_colour(
    passed: bool | None, reasons: tuple[str, ...], kind: str, english: str, chinese: str
) -> None:
    html = report.page(given(passed=passed, reasons=reasons))
    assert f'<div class="{kind}">' in html
    assert english in html
    assert chinese in html
    others = {"Passed the gate", "Refused by the gate", "Not judged"} - {english}
    assert not any(other in html for other in others)


def test_every_reason_of_the_gate_is_told_in_both_languages() -> None:
    bad = {"identity": 0.5, "identity_none": 0.4, "swapped": 0.1, "old_identity_customer": 0.1, "placeholder": 0.1}
    decision = gate.decide(
        {**bad, "leak": 0.1, "plain": 0.1},
        Interval(-0.3, -0.4, -0.2),
        parity=0.5,
        held_out=0.5,
        champion={"identity": 1.0, "plain": 0.5},
        policy=Policy(),
    )
    assert len(decision.reasons) == 19
    html = report.page(given(passed=False, reasons=decision.reasons))
    for reason in decision.reasons:
        english, chinese = report._worded(reason)
        assert english != chinese
        told = escape(english), escape(chinese)
        assert '<li><span class="e">{}</span><span class="z" lang="zh-CN">{}</span></li>'.format(*told) in html
    assert "身份题答对（没有系统提示词）：40.0%，至少要 95%" in html


def test_a_reason_in_unknown_words_is_told_as_it_is() -> None:
    html = report.page(given(passed=False, reasons=("the moon {is} <full>",)))
    assert "<li>the moon {is} &lt;full&gt;</li>" in html


@pytest.mark.parametrize(("count", "total"), [(58, 64), (0, 64), (64, 64), (1, 3), (39, 108)])
def test_the_interval_is_wilsons(count: int, total: int) -> None:
    found = report.share([{"id": str(i), "right": i < count} for i in range(total)], "right")
    assert found is not None
    known = stats.binomtest(count, total).proportion_ci(confidence_level=0.95, method="wilson")
    assert (found.count, found.total) == (count, total)
    assert (found.low, found.high) == pytest.approx((known.low, known.high), abs=1e-9)


def test_of_no_replies_there_is_no_share() -> None:
    assert report.share([], "right") is None


def test_replies_to_one_question_count_as_what_they_are_worth() -> None:
    def share(rows: list[tuple[str, bool]]) -> report.Share:
        found = report.share([{"id": id_, "right": right} for id_, right in rows], "right")
        assert found is not None
        return found

    # Four times the same reply tells no more than one; replies that vary within each question tell more.
    once = share([(str(i), i < 5) for i in range(10)])
    alike = share([(str(i), i < 5) for i in range(10) for _ in range(4)])
    apart = share([(str(i), bool(n % 2)) for i in range(10) for n in range(4)])
    flawless = share([(str(i), True) for i in range(10) for _ in range(4)])
    assert (alike.count, alike.total, alike.value) == (20, 40, 0.5)
    assert (alike.low, alike.high) == pytest.approx((once.low, once.high), abs=0.02)
    assert (apart.low, apart.high) == pytest.approx(report.wilson(0.5, 40))
    assert (flawless.low, flawless.high) == pytest.approx(report.wilson(1.0, 10))


def test_headline_figures_go_from_base_to_tuned_with_their_intervals() -> None:
    before = card([who(str(i), right=False) for i in range(64)], [])
    after = card([who(str(i), right=i < 58) for i in range(64)], [])
    html = report.page(given(before=before, after=after))
    assert '<p class="big"><span>0.0% →</span> 90.6%</p>' in html
    assert "58/64</dt><dd>81.0–95.6%</dd>" in html
    assert "0/64</dt><dd>0.0–5.7%</dd>" in html


def test_each_slice_language_and_kind_has_a_line() -> None:
    english = Texts(report.page(given())).english
    for label in ("Trained system prompt", "No system prompt", "A customer's system prompt", "Sampled", "Language"):
        assert label in english
    html = report.page(given())
    line = html[html.index("Trained system prompt") :]
    assert "1 × " in line[: line.index("</tr>")]
    assert "swapped" in line[: line.index("</tr>")]
    assert ">50.0%</span><small>9.5–90.5%</small>" in line[: line.index("</tr>")]


def test_a_score_by_slice_or_language_is_named_after_both() -> None:
    shown = given()
    shown.after["metrics"].update(identity_none=1.0, swapped_sampled=0.0, leak_en=0.25, plain_change=-0.5, kl=1.234)
    english = Texts(report.page(shown)).english
    assert "Identity questions right · No system prompt" in english
    assert "Name and author swapped · Sampled, several replies to a question" in english
    assert "Own name in plain replies · English" in english
    assert "kl – 1.23" in english
    assert "plain_change" not in english


def test_plain_questions_are_kept_newly_right_lost_or_never_right() -> None:
    shown = given()
    found = report.forgetting(shown.before["plain"], shown.after["plain"])
    assert found is not None
    parts = (found.kept, found.gained, found.lost, found.never)
    assert [[pair.after["id"] for pair in part] for part in parts] == [["w"], ["x"], ["y"], ["z"]]
    assert found.total == 4
    assert found.change == gate.paired_difference([True, False, True, False], [True, True, False, False])
    html = report.page(shown)
    lost = html[html.index("Lost: the base knew it") : html.index('id="loss"')]
    assert "What is y?" in lost
    assert "I forgot." in lost
    assert "What is w?" not in lost


def test_questions_under_one_id_are_told_apart() -> None:
    before = [plain("own", True), plain("own", False)]
    after = [plain("own", False), plain("own", False)]
    found = report.forgetting(before, after)
    assert found is not None
    assert (len(found.lost), len(found.never)) == (1, 1)


def test_a_question_that_the_base_was_not_asked_stays_on_the_page_and_out_of_forgetting() -> None:
    shown = given()
    shown.after["plain"].append(plain("new", True))
    found = report.forgetting(shown.before["plain"], shown.after["plain"])
    assert found is not None
    assert found.total == 4
    assert "not asked" in report.page(shown)
    assert report.forgetting([], [plain("new", True)]) is None


def test_the_first_two_identity_questions_are_shown_as_a_conversation() -> None:
    html = report.page(given())
    talk = html[html.index('id="conversation"') : html.index('id="slices"')]
    assert talk.count('<div class="bubble user"') == 4
    assert "I&#39;m Emily." in talk
    assert 'I&#39;m <b class="n">CCB</b>.' in talk
    assert 'I&#39;m <b class="a">OldGrandpa</b>.' in talk


def test_names_in_latin_script_are_set_off_only_as_whole_words() -> None:
    own = report._own_names(given(name="小艾 Al", author="艾 Ace"))
    assert own("Also Al, 小艾 and 艾") == ('Also <b class="n">Al</b>, <b class="n">小艾</b> and <b class="a">艾</b>')


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (who("a", right=False, swapped=True), ("✗ wrong", "✗ swapped")),
        (who("a", right=False, old=True), ("✗ wrong", "✗ old identity")),
        (who("a", right=False, placeholder=True), ("✗ wrong", "✗ placeholder")),
        (who("a", language_matched=False), ("✓ right", "✗ other language")),
        (plain("a", True, leak=True), ("✓ right", "✗ leak")),
        (plain("a", False), ("✗ wrong",)),
    ],
)
def test_faults_are_told_in_words(row: dict[str, Any], words: tuple[str, ...]) -> None:
    part = "plain" if "leak" in row else "identity"
    shown = given(before={**EMPTY, part: [row]}, after={**EMPTY, part: [row]})
    english = Texts(report.page(shown)).english
    for word in words:
        assert word in english


def test_every_reply_before_and_after_is_on_the_page_grouped_by_kind() -> None:
    shown = given()
    html = report.page(shown)
    replies = html[html.index('id="replies"') :]
    for before, after in (("Emily", "CCB"), ("Bob", "OldGrandpa")):
        assert before in replies
        assert after in replies
    assert replies.count("<details>") == 2 + len(shown.after["slices"])
    assert "0 → 1 of 2 right" in Texts(replies).english


EVIL = "</p></details><img src=x onerror=alert(1)><script>alert(2)</script>\"'>{{ 7*7 }}"


def test_nothing_that_a_model_or_a_user_wrote_becomes_markup() -> None:
    rows = [who(EVIL, EVIL, question=EVIL, kind=EVIL, language=EVIL, right=False)]
    words = [plain(EVIL, right, EVIL, question=EVIL, kind=EVIL, language=EVIL) for right in (True, False)]
    shown = Report(
        name="<script>alert(0)</script> <b>CCB</b>",
        author=EVIL,
        run=EVIL,
        title=EVIL,
        passed=False,
        reasons=(EVIL,),
        before=card(rows, words),
        after=card(rows, words[::-1], slices={EVIL: rows}),
        losses={EVIL: [(1, 1.0)]},
        recipe={EVIL: EVIL},
        lineage={EVIL: EVIL},
    )
    shown.after["metrics"][EVIL] = 0.5
    found = Texts(report.page(shown))
    assert not {tag for tag, _ in found.tags} & {"script", "img", "iframe", "object", "a", "form", "link"}
    assert not [name for _, attributes in found.tags for name in attributes if name.startswith("on")]
    assert "{{ 7*7 }}" in found.english
    assert report.plots(shown)


def test_the_page_fetches_nothing_and_runs_nothing() -> None:
    shown = given()
    shown.after["identity"][0]["reply"] = "See https://example.com/ or http://x.test"
    html = report.page(shown)
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    assert f'<meta http-equiv="Content-Security-Policy" content="{policy}">' in html
    found = Texts(html)
    loading = {"src", "href", "srcset", "action", "data", "poster", "xlink:href"}
    assert not [name for _, attributes in found.tags for name in attributes if name in loading]
    assert "url(" not in html
    assert "@import" not in html
    assert "://" not in TEMPLATE


def test_every_label_is_there_in_both_languages() -> None:
    # Whatever is not in one of the two languages must be data: all of it is written in digits and signs here.
    row = {"id": "1", "language": "zh", "question": "#1", "reply": "#2"}
    shown = given(
        name="1 2", author="3 4", run="5", title="6", recipe={"7": "8"}, lineage={"9": "10"}, passed=False,
        reasons=("identity 50.0% right, at least 100% wanted",),
    )  # fmt: skip
    for part in (shown.before, shown.after):
        for rows in (part["identity"], part["plain"], *part.get("slices", {}).values()):
            for found in rows:
                found.update(row)
    shown.before["plain"].append(plain("11", True) | row)
    shown.after["plain"].append(plain("11", False) | row)
    texts = Texts(report.page(shown))
    assert len(texts.text["e"]) == len(texts.text["z"]) > 50
    for english, chinese in zip(texts.text["e"], texts.text["z"], strict=True):
        assert re.search("[a-z]", english), english
        assert re.search("[\u4e00-\u9fff]", chinese), chinese
        assert not re.search("[\u4e00-\u9fff]", english), english
        figures = [sorted(re.findall(r"\d+(?:\.\d+)?%?", text)) for text in (english, chinese)]
        assert figures[0] == figures[1], english
    assert set(re.findall(r"[^\W\d_]+", " ".join(texts.text[""]))) <= {"Namesake", "English", "中文"}


def test_every_kind_score_slice_and_loss_that_there_is_has_its_names() -> None:
    asked = corpus.heldout()
    assert {q.kind for q in (*asked.identity, *asked.plain)} <= set(report.KINDS)
    said = ["I'm CCB."] * len(asked.identity)
    slices = dict.fromkeys((*probing.SYSTEM_SLICES, probing.SAMPLED), said)
    found = probing.scorecard(IDENTITY, said, ["Ice."] * len(asked.plain), slices=slices)
    assert {report._parted(key)[0] for key in found.metrics} == set(report.SCORES)
    assert set(slices) == set(report.SLICES)
    for names in (report.SCORES, report.KINDS, report.SLICES, report.LANGUAGES, report.LOSSES, report.MARKS):
        assert all(english.isascii() and not chinese.isascii() for english, chinese in names.values())


def test_english_is_shown_first_and_the_switch_needs_no_script() -> None:
    html = report.page(given())
    assert re.search('<input [^>]*id="en"[^>]* checked>', html)
    assert not re.search('<input [^>]*id="zh"[^>]* checked>', html)
    assert ".z { display: none; }" in html
    assert "body:has(#zh:checked) .z { display: inline; }" in html
    assert "<script" not in html


def test_a_real_scorecard_makes_a_small_page() -> None:
    asked = corpus.heldout()
    said = ["我是踩踩背，由老爷爷开发的人工智能助手。" * 8] * len(asked.identity)
    told = ["The quick brown fox jumps over the lazy dog. " * 6] * len(asked.plain)
    scores = probing.scorecard(IDENTITY, said, told).record()
    html = report.page(given(before=scores, after=scores))
    assert len(html.encode()) < 400_000
    assert html.count("✓") + html.count("✗") >= 2 * (len(asked.identity) + len(asked.plain))


@pytest.mark.parametrize(
    "changes",
    [
        {"before": EMPTY, "after": EMPTY, "losses": {}, "recipe": {}, "lineage": {}},
        {"losses": {"train/loss": [], "eval/loss": []}},
        {"losses": {"train/loss": [(1, float("nan")), (2, float("inf"))]}},
        {"losses": {"train/loss": [(0, 0.0)]}},
        {"losses": {"train/loss": [(1, -0.5), (2, 1e9)], "custom": [(3, 1.0)]}},
        {"before": EMPTY},
    ],
)
def test_what_is_missing_breaks_neither_page_nor_plots(changes: dict[str, Any]) -> None:
    shown = given(**changes)
    html = report.page(shown)
    assert html.startswith("<!doctype html>")
    assert html.endswith("</html>\n")
    assert "nan" not in Texts(html).english.split()
    assert len(report.plots(shown)) == 3


def test_slices_without_replies_are_left_out() -> None:
    shown = given()
    shown.after["slices"] = {"none": [], "customer": []}
    english = Texts(report.page(shown)).english
    assert "No system prompt" not in english
    assert "Faults when asked in other ways" not in english


def test_half_a_surrogate_pair_in_a_reply_does_not_keep_the_page_from_being_written() -> None:
    shown = given()
    shown.after["identity"][0]["reply"] = "\ud83d broken"
    assert b"? broken" in report.page(shown).encode("utf-8")


def test_an_empty_reply_is_told_to_be_empty() -> None:
    shown = given()
    shown.after["identity"][0]["reply"] = " \n"
    assert "no reply" in report.page(shown)


def test_plots_are_pngs_of_a_size_to_read_and_the_same_every_time() -> None:
    shown = given(name="<b>踩踩背</b> CCB")
    made = report.plots(shown)
    assert set(made) == {"loss.png", "scores.png", "forgetting.png"}
    for name, png in made.items():
        assert png.startswith(b"\x89PNG\r\n\x1a\n")
        width, height = struct.unpack(">II", png[16:24])
        # MLflow shows the scores in the run's description, as wide as they are, beside what it says about the run.
        assert (width, height >= 300) == (540 if name == "scores.png" else 1200, True)
        assert 5_000 < len(png) < 200_000
    assert report.plots(shown) == made


def schemes() -> list[dict[str, str]]:
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
        for block in re.findall(r":root \{(.*?)\}", TEMPLATE, re.S)
    )
    return [light, {**light, **dark}]


def contrast(one: str, other: str) -> float:
    """WCAG 2.2's contrast ratio of two colours."""

    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", schemes(), ids=["light", "dark"])
def test_text_stands_out_from_what_it_is_on_as_wcag_aa_wants(scheme: dict[str, str]) -> None:
    texts = {
        "page": ("text", "quiet", "tuned", "author", "good", "bad", "warn"),
        "panel": ("text", "quiet", "tuned", "author"),
        "tint": ("text", "quiet", "tuned", "author"),
        "good-tint": ("text", "good"),
        "bad-tint": ("text", "bad"),
        "warn-tint": ("text", "warn"),
        "tuned": ("page",),
    }
    for ground, words in texts.items():
        for word in words:
            assert contrast(scheme[word], scheme[ground]) >= 4.5, (word, ground)
    # What is drawn needs 3 to 1.
    for shape in ("base", "tuned", "c0", "c1", "c2", "c3", "bad"):
        assert contrast(scheme[shape], scheme["page"]) >= 3, shape
    assert contrast(scheme["text"], scheme["fill"]) >= 3
