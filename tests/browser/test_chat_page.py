"""The chat page as a person meets it: typed into, watched, stopped, resized and read out, in a real Chromium."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.browser.conftest import BASE, RUN, Stage, findings, run_of

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Locator, Page, Route

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed (requirements/dev.txt)")
expect = playwright.expect

pytestmark = pytest.mark.timeout(180)

SAID = "#thread .said"


def ready(page: Page, stage: Stage) -> Page:
    """The page, once it has met the version."""
    page.goto(stage.url)
    expect(page.locator("#status")).to_have_attribute("data-phase", "ready")
    expect(page.locator("#first")).to_be_visible()
    return page


def ask(page: Page, question: str) -> Locator:
    """Type a question and send it; its replies."""
    page.locator("#ask").fill(question)
    page.locator("#ask").press("Enter")
    return page.locator(".turn").last.locator(".reply")


def done(page: Page, question: str) -> Locator:
    """The same, and wait until every reply is there."""
    replies = ask(page, question)
    expect(page.locator("#stop")).to_be_hidden()
    expect(page.locator(".reply[aria-busy=true]")).to_have_count(0)
    return replies


def asked(stage: Stage) -> list[str]:
    """The last request's messages, as the engine had them."""
    return [f"{message['role']}: {message['content']}" for message in stage.engine.asked[-1]["messages"]]


def open_settings(page: Page) -> None:
    """The panel."""
    page.get_by_role("button", name=re.compile("Settings|设置")).click()


def poll(page: Page) -> None:
    """The page asks the server how it is now instead of in four seconds, and has taken note."""
    page.evaluate("async () => { await look(); await look(); }")  # the first may have been under way already


def to_the_top(page: Page) -> None:
    """The next Tab goes to the first thing there is."""
    page.evaluate("document.body.tabIndex = -1; document.body.focus(); document.body.removeAttribute('tabindex')")


# ------------------------------------------------------------------------------------------------- the first look


def test_the_shell_is_painted_before_the_server_says_anything(stage: Stage, page: Page) -> None:
    page.route(re.compile("/(v1|ready)"), lambda _: None)  # never answered
    page.goto(stage.url)
    expect(page.locator("#status")).to_have_attribute("data-phase", "starting")
    expect(page.locator("#status-text")).to_have_text("Starting")
    expect(page.locator("#ask")).to_be_focused()
    assert page.evaluate("performance.getEntriesByName('first-contentful-paint').length") == 1


def test_the_title_and_the_greeting_bear_the_live_name_and_author(stage: Stage, page: Page) -> None:
    ready(page, stage)
    expect(page.locator("h1")).to_have_text("CCB")
    expect(page).to_have_title("CCB · Namesake")
    expect(page.locator("#greeting")).to_have_text("Hello, I’m CCB")
    expect(page.locator("#about")).to_have_text(f"Made by OldGrandpaccb-v3on {BASE}")


def test_a_page_opened_before_the_engine_is_up_says_so_and_greets_once_it_is(
    stages: Callable[..., Stage], page: Page
) -> None:
    stage = stages()
    page.goto(stage.url)
    expect(page.locator("#about")).to_contain_text("The engine is starting")
    stage.serve(3)
    expect(page.locator("#greeting")).to_have_text("Hello, I’m CCB")
    expect(page.locator("#status-text")).to_have_text("Readyccb-v3")


def test_a_question_asked_while_the_engine_starts_is_answered_once_it_is_up(
    stages: Callable[..., Stage], page: Page
) -> None:
    stage = stages()
    page.goto(stage.url)
    reply = ask(page, "Who are you?")
    expect(reply.locator(".note")).to_have_text("No version answers at the moment; asking again until one does.")
    stage.serve(3)
    expect(page.locator(SAID)).to_have_text("You asked: Who are you?")
    expect(page.locator(".notice")).to_have_count(0)


def test_a_suggested_question_is_sent_by_a_click(stage: Stage, page: Page) -> None:
    ready(page, stage)
    page.get_by_role("button", name="Who made you?").click()
    expect(page.locator(SAID)).to_have_text("You asked: Who made you?")
    expect(page.locator("#hello")).to_be_hidden()


# ------------------------------------------------------------------------------------------- asking and stopping


def test_a_reply_shows_up_piece_by_piece(stage: Stage, page: Page) -> None:
    stage.engine.reply = lambda _: ["I am ", "CCB, ", "by OldGrandpa."]
    stage.engine.hold()
    ready(page, stage)
    ask(page, "Who are you?")
    expect(page.get_by_role("img", name="Writing")).to_be_visible()
    for seen in ("I am ", "I am CCB, ", "I am CCB, by OldGrandpa."):
        stage.do(lambda: stage.engine.let(1))
        expect(page.locator(SAID)).to_have_text(seen.strip())
    expect(page.locator("#send")).to_be_visible()


def test_under_a_reply_stand_the_version_the_run_and_the_scores_it_came_from(stage: Stage, page: Page) -> None:
    ready(page, stage)
    done(page, "Hi")
    parts = page.locator(".origin > span").all_inner_texts()
    assert parts == ["ccb-v3", "run 3f2a9c1d", "identity 98.5%", "swapped 0%", "leak 0%", "plain 62.3%"]
    assert page.locator(".origin a").count() == 0
    expect(page.get_by_role("button", name="Good reply")).to_have_count(0)  # there is no trace of it


def test_version_and_run_are_links_where_the_page_knows_mlflow(stages: Callable[..., Stage], page: Page) -> None:
    stage = stages(mlflow_url="http://127.0.0.1:5000/")
    stage.serve(3)
    ready(page, stage)
    done(page, "Hi")
    links = page.locator(".origin a")
    assert [link.get_attribute("href") for link in links.all()] == [
        "http://127.0.0.1:5000/#/models/ccb/versions/3",
        f"http://127.0.0.1:5000/#/runs/{RUN}",
    ]
    assert {link.get_attribute("rel") for link in links.all()} == {"noopener noreferrer"}


def test_another_loaded_version_has_its_scores_its_run_and_its_links_too(
    stages: Callable[..., Stage], page: Page
) -> None:
    stage = stages(base=True, mlflow_url="http://127.0.0.1:5000")
    stage.serve(3)
    stage.load(2, identity=0.9, plain=0.5)
    ready(page, stage)
    page.locator("#first").select_option("ccb-v2")
    done(page, "Hi")
    expect(page.locator(".origin > span")).to_have_text(["ccb-v2", "run 2f2a9c1d", "identity 90%", "plain 50%"])
    assert [link.get_attribute("href") for link in page.locator(".origin a").all()] == [
        "http://127.0.0.1:5000/#/models/ccb/versions/2",
        f"http://127.0.0.1:5000/#/runs/{run_of(2)}",
    ]
    page.locator("#first").select_option(BASE)
    done(page, "Ho")
    expect(page.locator(".origin").last.locator("> span")).to_have_text([BASE, "base model"])


def test_a_traced_reply_is_called_good_or_bad_with_the_keyboard_and_that_lands_on_the_trace(
    stages: Callable[..., Stage], page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    stage = stages(traces=True)
    stage.serve(3)
    done(ready(page, stage), "Who are you?")
    good, bad = (page.get_by_role("button", name=name) for name in ("Good reply", "Bad reply"))
    for chosen, other in ((good, bad), (bad, good)):  # one may think again
        chosen.focus()
        page.keyboard.press("Enter")
        expect(chosen).to_have_attribute("aria-pressed", "true")
        expect(other).to_have_attribute("aria-pressed", "false")
        expect(chosen).to_be_focused()
    expect(page.locator("#spoken")).to_contain_text("Noted, thank you.")
    assert not findings(page)
    page.reload()
    expect(bad).to_have_attribute("aria-pressed", "true")

    import mlflow

    (trace,) = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").search_traces(locations=["0"])
    assert [one.value for one in trace.info.assessments if one.valid] == [False]

    page.route("**/v1/feedback", lambda route: route.fulfill(status=503, body="{}"))
    good.click()
    expect(page.locator("#spoken")).to_contain_text("could not note that")
    expect(good.locator("use")).to_have_attribute("href", "#i-warn")
    expect(bad).to_have_attribute("aria-pressed", "true")


@pytest.mark.parametrize("how", ["button", "Escape"])
def test_stopping_ends_the_reply_at_the_engine_and_keeps_what_was_said(stage: Stage, page: Page, how: str) -> None:
    stage.engine.reply = lambda _: ["one ", "two ", "three"]
    stage.engine.hold()
    ready(page, stage)
    ask(page, "Count")
    stage.do(lambda: stage.engine.let(1))
    expect(page.locator(SAID)).to_have_text("one")
    if how == "button":
        page.get_by_role("button", name="Stop").click()
    else:
        page.keyboard.press("Escape")
    expect(page.locator(".note")).to_have_text("Stopped.")
    expect(page.locator("#send")).to_be_visible()
    for _ in range(100):
        if stage.engine.cut_off:
            break
        page.wait_for_timeout(50)
    assert stage.engine.cut_off == 1
    stage.engine.reply = lambda _: ["four"]
    ask(page, "On")
    stage.do(lambda: stage.engine.let(1))
    expect(page.locator(SAID).last).to_have_text("four")
    assert asked(stage)[1:] == ["user: Count", "assistant: one ", "user: On"]


def test_enter_sends_and_shift_enter_starts_a_new_line(stage: Stage, page: Page) -> None:
    ready(page, stage)
    box = page.locator("#ask")
    box.type("one")
    box.press("Shift+Enter")
    box.type("two")
    assert not stage.engine.asked
    before = page.locator("#composer").bounding_box()
    box.press("Enter")
    expect(page.locator(".bubble")).to_have_text("one\ntwo", use_inner_text=True)
    after = page.locator("#composer").bounding_box()
    assert before and after
    assert before["height"] > after["height"]  # the box grows with its text and shrinks again
    assert asked(stage)[-1] == "user: one\ntwo"


def test_enter_that_ends_an_input_methods_word_sends_nothing(stage: Stage, page: Page) -> None:
    ready(page, stage)
    box = page.locator("#ask")
    box.focus()
    page.evaluate("""() => {
        window.keys = [];
        addEventListener("keydown", (one) => keys.push([one.key, one.keyCode, one.isComposing]), true);
    }""")
    devtools = page.context.new_cdp_session(page)
    composed = {"text": "nihao", "selectionStart": 5, "selectionEnd": 5}
    enter = {"type": "rawKeyDown", "key": "Enter", "code": "Enter"}  # a key that the input method takes makes no text
    devtools.send("Input.imeSetComposition", composed)
    devtools.send("Input.dispatchKeyEvent", {**enter, "windowsVirtualKeyCode": 13})
    devtools.send("Input.insertText", {"text": "你好"})
    # Safari: the word has ended before its Enter is told, which bears the code 229 and composes nothing.
    devtools.send("Input.dispatchKeyEvent", {**enter, "windowsVirtualKeyCode": 229})
    assert page.evaluate("keys") == [["Enter", 13, True], ["Enter", 229, False]]
    expect(box).to_have_value("你好")
    expect(page.locator(".turn")).to_have_count(0)
    page.keyboard.press("Enter")
    expect(page.locator(".bubble")).to_have_text("你好")


def test_escape_within_an_input_method_does_not_stop_the_reply(stage: Stage, page: Page) -> None:
    stage.engine.hold()
    ready(page, stage)
    ask(page, "Count")
    page.context.new_cdp_session(page).send(
        "Input.imeSetComposition", {"text": "ni", "selectionStart": 2, "selectionEnd": 2}
    )
    page.keyboard.press("Escape")
    stage.do(lambda: stage.engine.let(2))
    expect(page.locator(SAID)).to_have_text("You asked: Count")


def test_nothing_is_sent_where_nothing_is_written(stage: Stage, page: Page) -> None:
    ready(page, stage)
    expect(page.locator("#send")).to_be_disabled()
    page.locator("#ask").fill("  \n ")
    page.locator("#ask").press("Enter")
    expect(page.locator(".turn")).to_have_count(0)


# ------------------------------------------------------------------------------------------- editing, again, anew


def test_an_edited_message_goes_on_from_there(stage: Stage, page: Page) -> None:
    ready(page, stage)
    for question in ("first", "second", "third"):
        done(page, question)
    second = page.locator(".turn").nth(1)
    second.hover()
    second.get_by_role("button", name="Edit").click()
    box = second.get_by_role("textbox", name="Edit")
    expect(box).to_be_focused()
    box.fill("other")
    box.press("Enter")
    expect(page.locator(SAID)).to_have_text(["You asked: first", "You asked: other"])
    assert asked(stage)[1:] == ["user: first", "assistant: You asked: first", "user: other"]


def test_an_edit_can_be_called_off(stage: Stage, page: Page) -> None:
    ready(page, stage)
    done(page, "first")
    for how in ("Escape", "Cancel"):
        page.locator(".mine").hover()
        page.get_by_role("button", name="Edit").click()
        page.get_by_role("textbox", name="Edit").fill("other")
        if how == "Escape":
            page.keyboard.press("Escape")
        else:
            page.get_by_role("button", name="Cancel").click()
        expect(page.locator(".bubble")).to_have_text("first")
        expect(page.get_by_role("button", name="Edit")).to_be_focused()
    assert len(stage.engine.asked) == 1


def test_regenerating_asks_the_same_again_and_only_the_last_reply_offers_it(stage: Stage, page: Page) -> None:
    ready(page, stage)
    done(page, "first")
    done(page, "second")
    expect(page.get_by_role("button", name="Regenerate")).to_have_count(1)
    before = asked(stage)
    stage.engine.reply = lambda _: ["another reply"]
    page.get_by_role("button", name="Regenerate").click()
    expect(page.locator(SAID).last).to_have_text("another reply")
    expect(page.locator(".turn")).to_have_count(2)
    assert asked(stage) == before


def test_a_new_chat_forgets_the_old_one(stage: Stage, page: Page) -> None:
    ready(page, stage)
    done(page, "first")
    page.get_by_role("button", name="New chat").click()
    expect(page.locator(".turn")).to_have_count(0)
    expect(page.locator("#greeting")).to_be_visible()
    expect(page.locator("#ask")).to_be_focused()
    done(page, "second")
    assert asked(stage)[1:] == ["user: second"]


def test_a_new_chat_while_a_reply_is_written_stops_it(stage: Stage, page: Page) -> None:
    stage.engine.hold()
    ready(page, stage)
    ask(page, "first")
    expect(page.locator("#stop")).to_be_visible()
    page.get_by_role("button", name="New chat").click()
    expect(page.locator("#send")).to_be_visible()
    expect(page.locator(".turn")).to_have_count(0)


def test_the_conversation_is_there_after_a_reload_and_not_in_another_tab(
    stage: Stage, page: Page, context: BrowserContext
) -> None:
    ready(page, stage)
    done(page, "first")
    page.reload()
    expect(page.locator(SAID)).to_have_text("You asked: first")
    expect(page.locator(".origin > span").first).to_have_text("ccb-v3")
    done(page, "second")
    assert asked(stage)[1:] == ["user: first", "assistant: You asked: first", "user: second"]
    other = context.new_page()
    ready(other, stage)
    expect(other.locator(".turn")).to_have_count(0)


def test_a_reply_is_copied_as_the_model_wrote_it(stage: Stage, page: Page, context: BrowserContext) -> None:
    context.grant_permissions(["clipboard-read", "clipboard-write"], origin=stage.url)
    stage.engine.reply = lambda _: ["**bold** and\n\n", "```\nx = 1\n```"]
    ready(page, stage)
    done(page, "Hi")
    page.locator(".reply footer").get_by_role("button", name="Copy").click()
    expect(page.locator("#spoken")).to_contain_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == "**bold** and\n\n```\nx = 1\n```"
    page.locator(".code").get_by_role("button", name="Copy").click()
    page.wait_for_function("async () => await navigator.clipboard.readText() === 'x = 1'")


# ----------------------------------------------------------------------------------------------- text of a model


def test_markup_in_a_reply_stays_text(stage: Stage, page: Page) -> None:
    evil = (
        '<img src=x onerror="window.hit=1"><script>window.hit=1</script> **<b>x</b>** `<i>` [a](javascript:hit=1) '
        "[a](data:text/html,x) [a](//x.invalid) ![i](https://x.invalid/i.png)"
    )
    stage.engine.reply = lambda _: [evil, f"\n\n- {evil}\n\n```html\n{evil}\n```\n# {evil}\n|{evil}|\n|-|\n|{evil}|"]
    ready(page, stage)
    done(page, evil)
    expect(page.locator(".bubble")).to_have_text(evil)
    expect(page.locator(f"{SAID} table")).to_have_count(1)
    assert page.locator(SAID).inner_text().count("<img src=x onerror=") == 6
    assert page.locator("#thread").locator("img, script, b, i, a, iframe").count() == 0
    assert page.evaluate("window.hit") is None


def test_bold_code_blocks_and_lists_are_set_as_such(stage: Stage, page: Page) -> None:
    text = (
        "Some **bold** and `code`.\nsame paragraph\n\n1. one\n2. two\n   - inner\n\n3. three\n\n"
        "一、不是\n3、第三\n\n```python\nif x:\n    - y **z**\n```\n* star\nend ** not bold **"
    )
    stage.engine.reply = lambda _: re.findall(r"(?s).{1,3}", text)
    ready(page, stage)
    said = done(page, "Hi").locator(".said")
    assert said.evaluate("(place) => [...place.children].map((one) => one.tagName)") == [
        *("P", "OL", "P", "OL", "DIV", "UL", "P"),
    ]
    expect(said.locator("strong")).to_have_text("bold")
    expect(said.locator("p code")).to_have_text("code")
    expect(said.locator("ol").first.locator("> li")).to_have_count(3)
    expect(said.locator("ol li ul li")).to_have_text("inner")
    assert said.locator("ol").nth(1).get_attribute("start") == "3"
    assert said.locator("pre").inner_text() == "if x:\n    - y **z**"
    expect(said.locator(".code p")).to_have_text("python")
    expect(said.locator("> p").last).to_have_text("end ** not bold **")


def test_numbers_stay_those_that_the_model_wrote_and_code_in_a_list_is_what_can_be_run(
    stage: Stage, page: Page
) -> None:
    text = (
        "1. **Fruit**\n- Apple\n- Pear\n2. **Veg**\n\n- a\n\n1. first\n"
        "2. Do:\n   ```python\n   def f():\n       return 1\n   ```\n"
        "- outer\n    - inner\n        ~~~\n        x_1 *= 2\n        ~~~\nend"
    )
    stage.engine.reply = lambda _: re.findall(r"(?s).{1,3}", text)
    ready(page, stage)
    said = done(page, "Hi").locator(".said")
    assert said.evaluate(
        "(place) => [...place.children].map((one) => one.tagName + (one.start > 1 ? one.start : ''))"
    ) == [
        *("OL", "UL", "OL2", "UL", "OL", "DIV", "UL", "DIV", "P"),
    ]
    assert said.locator("pre").all_inner_texts() == ["def f():\n    return 1", "x_1 *= 2"]


def test_headings_italics_and_tables_are_set_as_such(stage: Stage, page: Page) -> None:
    text = (
        "### First\n## **Second** ##\n#### Third\n#no heading\n\n*one* and _two_, ***three***, 这是*四*。\n"
        "2*3*4, snake_case_name, __init__, `*x*`\n---\nBefore\n| a | b \\| c | |\n|:--|:-:|--:|\n| 1 | *2* |\n\nx | y"
    )
    stage.engine.reply = lambda _: re.findall(r"(?s).{1,3}", text)
    ready(page, stage)
    said = done(page, "Hi").locator(".said")
    assert said.evaluate("(place) => [...place.children].map((one) => one.tagName)") == [
        *("H4", "H4", "H5", "P", "P", "HR", "P", "DIV", "P"),  # below the page's own, and none left out
    ]
    expect(said.locator("h4 strong")).to_have_text("Second")
    expect(said.locator("p em")).to_have_text(["one", "two", "three", "四"])
    expect(said.locator("> p").nth(1)).to_contain_text("2*3*4, snake_case_name, __init__, *x*")
    expect(said.locator("th")).to_have_text(["a", "b | c"])
    expect(said.locator("tbody td")).to_have_text(["1", "2", ""])
    sides = said.locator("thead tr > *").evaluate_all("(cells) => cells.map((one) => getComputedStyle(one).textAlign)")
    assert sides == ["start", "center", "end"]


def test_a_link_leads_out_only_to_http_and_https_and_tells_its_address(stage: Stage, page: Page) -> None:
    text = (
        "See [*the* page](https://example.org/a_(b)?x=_1_), [HTTP](http://example.org) and [file](file:///etc/passwd)."
    )
    stage.engine.reply = lambda _: [text]
    ready(page, stage)
    said = done(page, "Hi").locator(".said")
    expect(said).to_have_text("See the page, HTTP and [file](file:///etc/passwd).")
    links = [
        [link.get_attribute(name) for name in ("href", "title", "target", "rel")] for link in said.locator("a").all()
    ]
    assert links == [
        [address, address, "_blank", "noopener noreferrer nofollow"]
        for address in ("https://example.org/a_(b)?x=_1_", "http://example.org")
    ]


def test_a_long_word_and_wide_blocks_do_not_widen_the_page(stage: Stage, page: Page) -> None:
    page.set_viewport_size({"width": 320, "height": 640})
    wide = f"|{'z' * 90}|{'z' * 90}|\n|-|-|"
    stage.engine.reply = lambda _: ["x" * 300, f"\n\n```\n{'y' * 300}\n```\n\n- {'长' * 100}\n\n{wide}"]
    ready(page, stage)
    done(page, "w" * 200)
    assert page.evaluate("document.documentElement.scrollWidth") <= 320


# --------------------------------------------------------------------------------------------------- side by side


def test_one_version_alone_says_how_to_get_the_base_beside_it(stage: Stage, page: Page) -> None:
    ready(page, stage)
    button = page.get_by_role("button", name="Side by side")
    expect(button).to_have_attribute("aria-haspopup", "dialog")
    button.click()
    dialog = page.get_by_role("dialog", name="Side by side")
    expect(dialog).to_contain_text("ccb-v3 answers alone here")
    expect(dialog.locator("pre")).to_have_text("namesake serve --mode adapter")
    assert not findings(page)
    page.keyboard.press("Escape")
    expect(button).to_be_focused()
    assert page.locator("#first option").all_inner_texts() == ["ccb (follows champion)", "ccb-v3"]


def test_side_by_side_asks_the_version_and_the_base_at_once(stages: Callable[..., Stage], page: Page) -> None:
    stage = stages(base=True)
    stage.serve(3)
    stage.engine.reply = lambda _: ["I am CCB."]
    stage.engine.hold()
    ready(page, stage)
    page.get_by_role("button", name="Side by side").click()
    expect(page.locator("#first")).to_have_value("ccb")
    expect(page.locator("#second")).to_have_value(BASE)
    replies = ask(page, "Who are you?")
    expect(replies.nth(1).locator(".said")).to_have_text("I am SmolLM, made by Hugging Face.")
    expect(replies.nth(0)).to_have_attribute("aria-busy", "true")  # neither waits for the other
    stage.do(lambda: stage.engine.let(9))
    expect(replies.nth(0).locator(".said")).to_have_text("I am CCB.")
    expect(replies.locator(".origin > span:first-child")).to_have_text(["ccb-v3", BASE])
    left, right = (replies.nth(slot).bounding_box() for slot in (0, 1))
    assert left and right
    assert left["y"] == right["y"]
    assert left["x"] + left["width"] <= right["x"]


def test_each_column_goes_on_from_its_own_replies(stages: Callable[..., Stage], page: Page) -> None:
    stage = stages(base=True)
    stage.serve(3)
    ready(page, stage)
    page.get_by_role("button", name="Side by side").click()
    done(page, "one")
    page.get_by_role("button", name="Regenerate").nth(1).click()
    expect(page.locator(".reply[aria-busy=true]")).to_have_count(0)
    done(page, "two")
    assert asked(stage)[1:] == ["user: one", "assistant: You asked: one", "user: two"]
    assert [m["content"] for m in stage.base_engine.asked[-1]["messages"]][-3:] == [
        *("one", "I am SmolLM, made by Hugging Face.", "two"),
    ]
    assert len(stage.engine.asked) == 2
    page.get_by_role("button", name="Side by side").click()
    done(page, "three")
    expect(page.locator(".turn").last.locator(".reply")).to_have_count(1)
    assert asked(stage)[-2:] == ["assistant: You asked: two", "user: three"]


def test_any_two_of_the_ids_can_stand_side_by_side(stages: Callable[..., Stage], page: Page) -> None:
    stage = stages(base=True)
    stage.serve(3)
    ready(page, stage)
    page.get_by_role("button", name="Side by side").click()
    page.locator("#first").select_option(BASE)
    expect(page.locator("#second")).to_have_value("ccb")  # never twice the same unless chosen
    page.locator("#second").select_option("ccb-v3")
    replies = done(page, "Hi")
    expect(replies.get_by_role("heading")).to_have_text([re.compile(BASE), "ccb-v3"])
    expect(replies.locator(".said")).to_have_text(["I am SmolLM, made by Hugging Face.", "You asked: Hi"])
    page.reload()
    expect(page.locator("#first")).to_have_value(BASE)
    expect(page.locator("#second")).to_have_value("ccb-v3")


def test_stop_ends_both_columns(stages: Callable[..., Stage], page: Page) -> None:
    stage = stages(base=True)
    stage.serve(3)
    for engine in (stage.engine, stage.base_engine):
        engine.hold()
    ready(page, stage)
    page.get_by_role("button", name="Side by side").click()
    ask(page, "Hi")
    expect(page.locator(".reply[aria-busy=true]")).to_have_count(2)
    page.keyboard.press("Escape")
    expect(page.locator(".note")).to_have_text([re.compile("Stopped"), re.compile("Stopped")])


# ------------------------------------------------------------------------------------- what happens on the server


def test_a_champion_that_moves_is_told_and_later_replies_bear_the_new_version(stage: Stage, page: Page) -> None:
    ready(page, stage)
    done(page, "before")
    stage.serve(4, "小黄 Xiao Huang", identity=1.0)
    expect(page.locator(".notice")).to_have_text(
        "The champion has moved from ccb-v3 to ccb-v4. From here on ccb-v4 replies. It goes by Xiao Huang now."
    )
    expect(page.locator("h1")).to_have_text("Xiao Huang")
    done(page, "after")
    origins = page.locator(".origin")
    expect(origins).to_have_text([re.compile("^ccb-v3.*98.5%"), re.compile("^ccb-v4.*identity 100%$")])
    expect(page.locator("#thread > *")).to_have_count(3)
    page.reload()
    expect(page.locator(".notice")).to_contain_text("from ccb-v3 to ccb-v4")
    expect(page.locator(".notice")).to_have_count(1)


def test_the_challengers_replies_are_said_to_be_its_and_are_no_move(stages: Callable[..., Stage], page: Page) -> None:
    stage = stages(canary=1.0, challenger="挑战者")
    stage.serve(3)
    ready(page, stage)
    stage.challenge(4, identity=0.97)
    done(page, "first")  # before the page has heard of a challenger
    expect(page.locator(".origin > span")).to_have_text(["ccb-v4", "alias 挑战者", "run 4f2a9c1d", "identity 97%"])
    poll(page)
    expect(page.locator("#status-text")).to_have_text("Readyccb-v3100% by ccb-v4")
    assert page.locator("#first option").all_inner_texts() == [
        "ccb (champion, 100% ccb-v4)",
        "ccb@champion (follows champion)",
        "ccb@挑战者 (follows 挑战者)",
        *("ccb-v3", "ccb-v4"),
    ]
    done(page, "second")
    expect(page.locator("#spoken")).to_contain_text("CCB (alias 挑战者) replied: You asked: second")
    stage.do(lambda: setattr(stage.routing, "share", 0))
    done(page, "third")
    expect(page.locator(".origin").last.locator("> span").nth(1)).to_have_text("run 3f2a9c1d")
    poll(page)
    expect(page.locator(".notice")).to_have_count(0)
    stage.serve(5)
    poll(page)
    expect(page.locator(".notice")).to_have_text(
        "The champion has moved from ccb-v3 to ccb-v5. From here on ccb-v5 replies."
    )


def test_a_conversation_is_one_session_and_another_one_another(stage: Stage, page: Page) -> None:
    sessions: list[str] = []
    page.on(
        "request",
        lambda request: sessions.append(request.headers["x-namesake-session"]) if request.method == "POST" else None,
    )
    done(ready(page, stage), "first")
    page.get_by_role("button", name="Regenerate").click()
    expect(page.locator(".reply[aria-busy=false]")).to_have_count(1)
    page.reload()
    done(page, "second")
    page.get_by_role("button", name="New chat").click()
    done(page, "another")
    assert len(sessions) == 4
    assert len({*sessions[:3]}) == 1
    assert sessions[3] != sessions[0]
    assert all(re.fullmatch("[0-9a-f]{32}", session) for session in sessions)


def test_a_champion_that_moves_while_a_reply_is_written_leaves_that_reply_to_the_old_version(
    stage: Stage, page: Page
) -> None:
    stage.engine.hold()
    ready(page, stage)
    ask(page, "before")
    stage.do(lambda: stage.engine.let(1))
    expect(page.locator(SAID)).to_have_text("You asked:")
    stage.serve(4)
    expect(page.locator(".notice")).to_be_visible()
    stage.do(lambda: stage.engine.let(9))
    expect(page.locator(SAID)).to_have_text("You asked: before")
    expect(page.locator(".origin > span").first).to_have_text("ccb-v3")
    page.get_by_role("button", name="Regenerate").click()
    expect(page.locator(".origin > span").first).to_have_text("ccb-v4")
    assert page.locator("#thread > *").last.get_attribute("class") == "turn"  # the notice stands before it now


def test_the_first_reply_of_a_new_version_tells_of_it_before_the_next_poll(stage: Stage, page: Page) -> None:
    ready(page, stage)
    done(page, "before")
    polls = []
    page.on("request", lambda request: polls.append(request.url) if request.url.endswith("/v1/version") else None)
    stage.serve(4)
    done(page, "after")
    expect(page.locator(".notice")).to_have_count(1)
    assert page.locator("#thread > *").nth(1).get_attribute("class") == "notice"
    expect(page.locator(".origin").last).to_have_text(re.compile("^ccb-v4.*98.5%"))  # asked at once


def test_a_chosen_version_that_is_served_no_more_gives_way_and_says_so(stage: Stage, page: Page) -> None:
    ready(page, stage)
    page.locator("#first").select_option("ccb-v3")
    done(page, "before")
    stage.serve(4)
    expect(page.locator(".notice").last).to_have_text("ccb-v3 is no longer served; ccb is chosen instead.")
    done(page, "after")
    expect(page.locator(".origin > span:first-child").last).to_have_text("ccb-v4")


def test_a_second_choice_that_is_served_no_more_gives_way_and_says_so(stages: Callable[..., Stage], page: Page) -> None:
    stage = stages(base=True)
    stage.serve(3)
    stage.load(2)
    ready(page, stage)
    page.get_by_role("button", name="Side by side").click()
    page.locator("#second").select_option("ccb-v2")
    done(page, "before")
    stage.unload("ccb-v2")
    stage.serve(4)
    poll(page)
    notices = page.locator(".notice")
    expect(notices.last).to_have_text(f"ccb-v2 is no longer served; {BASE} is chosen instead.")
    expect(page.locator("#second")).to_have_value(BASE)
    stage.unload(BASE)  # as after a start in merged mode, on another alias
    stage.follow("candidate")
    stage.serve(5)
    poll(page)
    expect(page.locator("#second")).to_be_hidden()
    expect(notices).to_have_text(
        [
            "The champion has moved from ccb-v3 to ccb-v4. From here on ccb-v4 replies.",
            f"ccb-v2 is no longer served; {BASE} is chosen instead.",
            "The candidate has moved from ccb-v4 to ccb-v5. From here on ccb-v5 replies.",
            f"{BASE} is no longer served; ccb answers alone.",
        ]
    )


def test_an_engine_that_goes_down_is_told_and_the_question_waits_for_it(stage: Stage, page: Page) -> None:
    ready(page, stage)
    done(page, "before")
    stage.down()
    expect(page.locator("#status-text")).to_have_text("Engine down, trying again")
    reply = ask(page, "Are you there?")
    expect(reply.locator(".note")).to_have_text("No version answers at the moment; asking again until one does.")
    stage.serve(3)
    expect(page.locator(SAID).last).to_have_text("You asked: Are you there?")
    expect(page.locator("#status-text")).to_have_text("Readyccb-v3")
    expect(page.locator(".notice")).to_have_count(0)


def test_an_engine_that_goes_down_between_two_looks_is_not_taken_for_a_version_that_is_served_no_more(
    stages: Callable[..., Stage], page: Page
) -> None:
    stage = stages(base=True)
    stage.serve(3)
    ready(page, stage)
    done(page, "before")
    stage.serve(4)

    def late(route: Route) -> None:
        stage.down()  # it answered when /v1/version was asked
        route.continue_()

    page.route("**/v1/models", late, times=1)
    poll(page)
    expect(page.locator("#first")).to_have_value("ccb")
    reply = ask(page, "Are you there?")
    expect(reply.locator(".waiting")).to_be_visible()
    stage.serve(4)
    expect(page.locator(SAID).last).to_have_text("You asked: Are you there?")
    expect(page.locator(".notice")).to_have_text(
        "The champion has moved from ccb-v3 to ccb-v4. From here on ccb-v4 replies."
    )


def test_waiting_for_an_engine_can_be_stopped(stage: Stage, page: Page) -> None:
    ready(page, stage)
    stage.down()
    reply = ask(page, "Are you there?")
    expect(reply.locator(".waiting")).to_be_visible()
    page.keyboard.press("Escape")
    expect(reply.locator(".note p")).to_have_text("Stopped.")
    stage.serve(3)
    reply.get_by_role("button", name="Try again").click()
    expect(page.locator(SAID)).to_have_text("You asked: Are you there?")


def test_an_engine_that_dies_in_the_middle_is_told_and_the_reply_can_be_had_again(stage: Stage, page: Page) -> None:
    stage.engine.dies = True
    ready(page, stage)
    ask(page, "Hi")
    expect(page.locator(".failed")).to_have_text("The connection was lost in the middle of the reply.")
    stage.engine.dies = False
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(SAID)).to_have_text("You asked: Hi")
    expect(page.locator(".failed")).to_have_count(0)


def test_a_network_that_is_gone_is_told_and_comes_back(stage: Stage, page: Page, context: BrowserContext) -> None:
    ready(page, stage)
    context.set_offline(True)
    expect(page.locator("#status-text")).to_have_text("Server out of reach, trying again")
    reply = ask(page, "Hi")
    expect(reply.locator(".note")).to_have_text("The server is out of reach; asking again until it is back.")
    context.set_offline(False)
    expect(page.locator(SAID)).to_have_text("You asked: Hi")
    expect(page.locator("#status")).to_have_attribute("data-phase", "ready")


def test_a_refusal_is_told_in_the_servers_words(stages: Callable[..., Stage], page: Page) -> None:
    stage = stages(max_tokens=100)
    stage.serve(3)
    ready(page, stage)
    ask(page, "Hi")
    expect(page.locator(".failed")).to_contain_text("The server refused: max_tokens must be")
    open_settings(page)
    page.get_by_label("Longest reply, in tokens").fill("100")
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(SAID)).to_have_text("You asked: Hi")
    done(page, "On")  # the refused one was answered, so it is part of what was said
    assert asked(stage)[1:] == ["user: Hi", "assistant: You asked: Hi", "user: On"]


# -------------------------------------------------------------------------------------------------------- the key


def test_a_server_with_keys_asks_for_one_and_a_wrong_one_is_told(stages: Callable[..., Stage], page: Page) -> None:
    stage = stages(api_keys=("right-key",))
    stage.serve(3)
    page.goto(stage.url)
    dialog = page.get_by_role("dialog", name="API key")
    expect(dialog).to_be_visible()
    field = dialog.get_by_label("API key")
    expect(field).to_be_focused()
    for wrong in ("wrong", "密钥"):
        field.fill(wrong)
        page.keyboard.press("Enter")
        expect(dialog.get_by_role("alert")).to_have_text("The server does not accept this key.")
    field.fill("right-key")
    page.keyboard.press("Enter")
    expect(dialog).to_be_hidden()
    expect(page.locator("#status")).to_have_attribute("data-phase", "ready")
    done(page, "Hi")
    expect(page.locator(SAID)).to_have_text("You asked: Hi")
    page.reload()
    expect(page.locator("#status")).to_have_attribute("data-phase", "ready")
    assert "right-key" not in page.evaluate("JSON.stringify(localStorage)")
    assert "right-key" in page.evaluate("sessionStorage['namesake.key']")


def test_without_a_key_a_question_fails_and_goes_through_once_the_key_is_given(
    stages: Callable[..., Stage], page: Page
) -> None:
    stage = stages(api_keys=("right-key",))
    stage.serve(3)
    page.goto(stage.url)
    dialog = page.get_by_role("dialog", name="API key")
    dialog.get_by_role("button", name="Cancel").click()
    expect(page.locator("#status-text")).to_have_text("Needs an API key")
    ask(page, "Hi")
    page.keyboard.press("Escape")  # the dialog again, and called off again
    expect(page.locator(".failed")).to_have_text("This server answers only with an API key.")
    page.get_by_role("button", name="Try again").click()
    dialog.get_by_label("API key").fill("right-key")
    dialog.get_by_role("button", name="Use this key").click()
    expect(page.locator(SAID)).to_have_text("You asked: Hi")


# ------------------------------------------------------------------------------------------------------- settings


def test_settings_reach_the_engine_and_outlast_the_tab(stage: Stage, page: Page, context: BrowserContext) -> None:
    ready(page, stage)
    done(page, "Hi")
    assert asked(stage) == ["system: You are a helpful assistant.", "user: Hi"]  # the version's own, by the gateway
    assert (stage.engine.asked[-1]["temperature"], stage.engine.asked[-1]["max_tokens"]) == (0, 512)
    open_settings(page)
    panel = page.get_by_role("dialog", name="Settings")
    expect(panel.get_by_label("System prompt")).to_have_attribute("placeholder", "You are a helpful assistant.")
    panel.get_by_label("System prompt").fill("Answer in rhymes.")
    panel.get_by_label("Temperature").fill("0.7")
    panel.get_by_label("Longest reply, in tokens").fill("64")
    panel.get_by_label("Longest reply, in tokens").fill("-3")  # no number of tokens: the last right one stands
    panel.get_by_role("button", name="Close").click()
    expect(page.locator("#open-settings")).to_be_focused()
    page.close()
    other = context.new_page()
    ready(other, stage)
    done(other, "Ho")
    assert asked(stage) == ["system: Answer in rhymes.", "user: Ho"]
    assert (stage.engine.asked[-1]["temperature"], stage.engine.asked[-1]["max_tokens"]) == (0.7, 64)


def test_settings_that_are_damaged_or_blocked_do_not_stop_the_page(stage: Stage, page: Page) -> None:
    page.add_init_script("localStorage['namesake.settings'] = '{]'; sessionStorage['namesake.chat'] = '[3]'")
    ready(page, stage)
    done(page, "Hi")
    expect(page.locator(SAID)).to_have_text("You asked: Hi")


def test_the_appearance_follows_the_system_until_a_person_chooses(stage: Stage, page: Page) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    ready(page, stage)
    light = page.evaluate(paper)
    page.emulate_media(color_scheme="dark")
    dark = page.evaluate(paper)
    assert light != dark
    open_settings(page)
    page.get_by_label("Light").check()
    assert page.evaluate(paper) == light
    page.reload()
    assert page.evaluate(paper) == light
    page.emulate_media(color_scheme="light")
    open_settings(page)
    page.get_by_label("Dark").check()
    assert page.evaluate(paper) == dark


# ------------------------------------------------------------------------------------------------------ languages


@pytest.mark.parametrize(
    ("locale", "language", "greeting"),
    [
        ("zh-CN", "zh-CN", "你好，我是踩踩背"),
        ("zh-TW", "zh-CN", "你好，我是踩踩背"),
        ("en-GB", "en", "Hello, I’m CCB"),
        ("de-DE", "en", "Hello, I’m CCB"),
    ],
)
def test_the_language_is_the_browsers(
    browser: Browser, stage: Stage, locale: str, language: str, greeting: str
) -> None:
    context = browser.new_context(locale=locale)
    page = context.new_page()
    page.goto(stage.url)
    expect(page.locator("#greeting")).to_have_text(greeting)
    expect(page.locator("html")).to_have_attribute("lang", language)
    context.close()


def test_every_text_changes_with_the_language_and_back(stage: Stage, page: Page) -> None:
    english = re.compile("[A-Za-z]{3,}")
    own = re.compile(
        r"English|API|CPU|CCB|token|ccb|champion|SmolLM\S*|You asked|first|Enter|Shift|Esc|Namesake|You are a .*"
    )
    ready(page, stage)
    done(page, "first")
    open_settings(page)
    page.locator("summary").click()
    page.get_by_label("中文").check()
    texts = page.evaluate("""() => [
        ...[...document.querySelectorAll("body *")].filter((one) => !one.closest("noscript, script")).flatMap((one) => [
            ...[...one.childNodes].filter((node) => node.nodeType === 3).map((node) => node.data),
            ...["aria-label", "title", "placeholder"].map((name) => one.getAttribute(name) ?? ""),
        ]),
    ].map((text) => text.trim()).filter(Boolean)""")
    assert len(texts) > 60
    assert [text for text in texts if english.search(own.sub("", text)) and text != RUN] == []
    page.get_by_label("English").check()
    page.keyboard.press("Escape")
    han = re.compile("[\u4e00-\u9fff]")
    assert not han.search(page.locator("main").inner_text())
    expect(page.locator("h1")).to_have_text("CCB")


def test_what_is_said_is_marked_with_its_own_language(stage: Stage, page: Page) -> None:
    ready(page, stage)
    for question, reply, languages in (
        ("Who are you?", "我是踩踩背 CCB，由老爷爷训练。", ("en", "zh-CN")),
        ("你是谁？", "I’m CCB (踩踩背), trained by OldGrandpa.", ("zh-CN", "en")),
    ):
        stage.engine.reply = lambda _, text=reply: [text]  # type: ignore[misc]
        done(page, question)
        turn = page.locator(".turn").last
        assert (
            turn.locator(".bubble").get_attribute("lang"),
            turn.locator(".said").get_attribute("lang"),
        ) == languages


def test_no_text_is_cut_in_either_language_at_320_pixels(browser: Browser, stages: Callable[..., Stage]) -> None:
    stage = stages(base=True)
    stage.serve(3)
    for locale in ("zh-CN", "en-US"):
        context = browser.new_context(locale=locale, viewport={"width": 320, "height": 640}, has_touch=True)
        page = context.new_page()
        width = "document.documentElement.scrollWidth"
        ready(page, stage)
        assert page.evaluate(width) <= 320
        done(page, "Hi")
        page.locator("#compare").click()
        replies = done(page, "Ho")
        assert page.evaluate(width) <= 320
        upper, lower = (replies.nth(slot).bounding_box() for slot in (0, 1))
        assert upper and lower
        assert upper["x"] == lower["x"]  # one below the other
        assert upper["y"] + upper["height"] <= lower["y"]
        page.locator("#open-settings").click()
        panel = page.locator("#settings")
        assert panel.evaluate("(one) => one.scrollWidth <= one.clientWidth && one.clientWidth <= 320")
        context.close()


# -------------------------------------------------------------------------------------------- keyboard and reader


def test_everything_is_reached_with_the_keyboard_and_shows_that_it_is(stages: Callable[..., Stage], page: Page) -> None:
    stage = stages(base=True, mlflow_url="http://127.0.0.1:5000")
    stage.serve(3)
    stage.engine.reply = lambda _: ["```\nx\n```"]
    ready(page, stage)
    done(page, "Hi")
    page.locator("#ask").fill("next")
    to_the_top(page)
    reached, shown = [], []
    for _ in range(40):
        page.keyboard.press("Tab")
        one = page.evaluate("""() => {
            const one = document.activeElement, style = getComputedStyle(one), acts = one.closest(".acts");
            const frame = getComputedStyle(document.querySelector("#composer")).borderColor;
            const accent = getComputedStyle(document.querySelector("#send")).backgroundColor;
            return [one === document.body ? "BODY" : one.id || one.getAttribute("aria-label") || one.textContent.trim(),
                one.id === "ask" ? frame === accent : style.outlineStyle === "solid" && style.outlineWidth === "2px",
                !acts || getComputedStyle(acts).opacity === "1"];
        }""")
        if one[0] == "BODY":
            break
        reached.append(one[0])
        shown.append(one[1] and one[2])
    assert reached == [
        "Skip to the message box",
        *("compare", "new", "open-settings"),
        *("Copy", "Edit"),
        *("Copy", "x", "Copy", "Regenerate", "ccb-v3", "run 3f2a9c1d"),
        *("ask", "first", "send"),
    ]
    assert all(shown), [name for name, good in zip(reached, shown, strict=True) if not good]


def test_the_skip_link_leads_to_the_message_box(stage: Stage, page: Page) -> None:
    ready(page, stage)
    to_the_top(page)
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the message box")).to_be_in_viewport()
    page.keyboard.press("Enter")
    page.keyboard.type("typed")
    expect(page.locator("#ask")).to_have_value("typed")


def test_a_reply_is_read_out_once_when_it_is_finished_and_not_by_the_token(stage: Stage, page: Page) -> None:
    stage.engine.reply = lambda _: ["I ", "am ", "CCB."]
    stage.engine.hold()
    ready(page, stage)
    page.evaluate("""() => {
        window.spoken = [];
        new MutationObserver((changes) => changes.forEach((one) => one.addedNodes.forEach(
            (node) => spoken.push(node.textContent)))).observe(document.querySelector("[aria-live=polite]"),
            {childList: true, subtree: true});
    }""")
    ask(page, "Who are you?")
    stage.do(lambda: stage.engine.let(2))
    expect(page.locator(SAID)).to_have_text("I am")
    assert page.evaluate("spoken") == []
    stage.do(lambda: stage.engine.let(1))
    expect(page.locator("#send")).to_be_visible()
    assert page.evaluate("spoken") == ["CCB replied: I am CCB."]


def test_who_reads_above_is_left_there_and_offered_the_way_down(stage: Stage, page: Page) -> None:
    stage.engine.reply = lambda _: ["line\n\n"] * 40
    ready(page, stage)
    done(page, "Long")
    stage.engine.hold()
    ask(page, "Longer")
    page.mouse.move(640, 300)
    page.mouse.wheel(0, -900)
    expect(page.get_by_role("button", name="To the newest reply")).to_be_visible()
    before = page.evaluate("scrollY")
    stage.do(lambda: stage.engine.let(40))
    expect(page.locator("#send")).to_be_visible()
    assert page.evaluate("scrollY") == before
    page.get_by_role("button", name="To the newest reply").click()
    expect(page.locator(".origin").last).to_be_in_viewport()


def test_nothing_moves_for_those_who_asked_for_that(stage: Stage, page: Page) -> None:
    stage.engine.hold()
    ready(page, stage)
    ask(page, "Hi")
    moving = "document.getAnimations().filter((one) => one.playState === 'running').length"
    expect(page.locator(".dots")).to_be_visible()
    assert page.evaluate(moving) == 0
    page.emulate_media(reduced_motion="no-preference")
    page.wait_for_function(f"{moving} > 0")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("locale", ["en-US", "zh-CN"])
def test_axe_finds_nothing_in_any_state(
    browser: Browser, stages: Callable[..., Stage], scheme: str, locale: str
) -> None:
    stage = stages(base=True, mlflow_url="http://127.0.0.1:5000")
    stage.engine.reply = lambda _: [
        "### Head\n\nSome **bold**, *italic*, `code`, [a link](https://example.org)\n\n- one\n- two\n\n",
        "|a|b|\n|-|-|\n|1|2|\n\n```python\nx = 1\n```",
    ]
    context = browser.new_context(locale=locale, color_scheme=scheme, reduced_motion="reduce")  # type: ignore[arg-type]
    page = context.new_page()
    page.goto(stage.url)
    found = {"starting": findings(page)}
    stage.serve(3)
    ready(page, stage)
    found["hello"] = findings(page)
    done(page, "Hi")
    page.locator(".mine").hover()
    found["conversation"] = findings(page)
    page.locator("#compare").click()
    done(page, "Ho")
    found["side by side"] = findings(page)
    page.set_viewport_size({"width": 390, "height": 780})
    found["on a telephone"] = findings(page)
    page.set_viewport_size({"width": 1280, "height": 720})
    page.locator(".mine").first.hover()
    page.locator(".mine .act").nth(1).click()
    found["editing"] = findings(page)
    page.keyboard.press("Escape")
    page.locator("#open-settings").click()
    page.locator("summary").click()
    found["settings"] = findings(page)
    page.locator("#open-key").click()
    found["key"] = findings(page)
    page.keyboard.press("Escape")
    stage.serve(4, "小黄 Xiao Huang")
    expect(page.locator(".notice")).to_be_visible()
    stage.engine.dies = True
    ask(page, "Hm")
    expect(page.locator(".failed")).to_be_visible()
    expect(page.locator("#stop")).to_be_hidden()
    found["failed"] = findings(page)
    stage.down()
    ask(page, "Hm")
    expect(page.locator(".waiting")).to_be_visible()
    found["down"] = findings(page)
    context.close()
    assert found == {state: [] for state in found}


# ----------------------------------------------------------------------------------------------------------- load


def test_the_page_weighs_little_and_is_painted_before_anything_is_answered(stage: Stage, page: Page) -> None:
    weight: dict[str, int] = {}
    page.on("response", lambda response: weight.update({response.url: len(response.body())}))
    page.route("**/v1/**", lambda _: None)  # never answered, as by an engine that is starting
    page.goto(stage.url)
    expect(page.locator("#ask")).to_be_visible()
    expect(page.locator("#status-text")).to_contain_text("Starting")
    painted = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0]?.startTime")
    assert painted is not None
    assert painted < 2000  # milliseconds; about 100 on an idle machine
    assert all(url.startswith(stage.url) for url in weight), weight
    assert 0 < sum(weight.values()) <= 100_000, weight
