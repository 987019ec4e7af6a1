"""The guide's pictures, taken anew: MLflow's pages, the chat page, the report and the terminal. `make screenshots`.

They show the registered model that was promoted to last in MLFLOW_TRACKING_URI, with the run of its champion; train and
promote first. The chat page is the real one before the real gateway; what the two models say in it are the replies to
these questions that the run has in its scorecard, since a picture of an engine that is still loading helps nobody.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

from PIL import Image
from playwright.sync_api import Browser, Page, ViewportSize, expect, sync_playwright
from tests.browser.conftest import Stage
from tests.mlflow_ui import chromium, make_ui, open_registry

from namesake import registry, run, tracking

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "guide" / "images"
MOST = 150_000
"""Bytes of a picture."""

SCREEN: ViewportSize = {"width": 1280, "height": 800}
TALL: ViewportSize = {"width": 1280, "height": 1200}
PHONE: ViewportSize = {"width": 390, "height": 780}


def save(png: bytes, name: str) -> None:
    """Write a picture in as many colours as fit."""
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    for colours in (128, 64, 32, 16):
        small = io.BytesIO()
        picture.quantize(colours, dither=Image.Dither.NONE).save(small, "png", optimize=True)
        if small.tell() <= MOST:
            break
    (IMAGES / f"{name}.png").write_bytes(small.getvalue())
    print(f"{name}.png {small.tell() / 1000:.0f} kB, {colours} colours", flush=True)


@contextmanager
def opened(browser: Browser, viewport: ViewportSize = SCREEN, **more: Any) -> Iterator[Page]:
    """A fresh profile's tab."""
    context = browser.new_context(viewport=viewport, reduced_motion="reduce", **{"locale": "en-US", **more})
    yield context.new_page()
    context.close()


def mlflow_pages(browser: Browser, url: str, version: registry.Version) -> None:
    """Every page of MLflow that somebody who uses Namesake meets."""
    found = tracking.get_run(version.run_id)
    shown = tracking.Run(found.id, found.experiment)
    at = f"{url}/#/experiments/{found.experiment}/runs/{found.id}"
    with opened(browser) as page:
        page.goto(url)
        page.get_by_role("button", name="Close").last.click()  # the assistant
        open_registry(page, url, version.name)
        page.set_viewport_size(TALL)
        own = page.get_by_role("link", name=f"Version {version.number}", exact=True)
        own.wait_for()
        take(page, "mlflow-model")
        others = page.get_by_role("row").filter(has=page.get_by_role("link", name="Version ")).filter(has_not=own)
        (others if others.count() else page.get_by_role("row").filter(has=own)).last.get_by_role("button").last.click()
        box = page.get_by_role("dialog").get_by_role("combobox")
        box.fill(registry.CHAMPION)
        box.press("Enter")
        take(page, "mlflow-alias")
        page.get_by_role("button", name="Cancel").click()
        page.goto(at)
        page.get_by_text("Show more").first.click()
        take(page, "mlflow-run")
        page.set_viewport_size(SCREEN)
        page.goto(f"{url}/#/models/{version.name}/versions/{version.number}")
        page.get_by_text("Registered At").wait_for()
        take(page, "mlflow-version")
        page.goto(f"{url}/#/models")
        page.get_by_role("link", name=version.name, exact=True).wait_for()
        take(page, "mlflow-models")
        page.goto(f"{url}/{shown.view_page}")
        page.get_by_text(found.name).first.wait_for()
        take(page, "mlflow-runs")
        page.goto(f"{at}/model-metrics")
        page.get_by_text("Search metric charts").or_(page.get_by_placeholder("Search metric charts")).first.wait_for()
        take(page, "mlflow-metrics")
        page.goto(f"{url}/{shown.artifact_page(run.REPORT)}")
        page.frame_locator("iframe").locator("h1").wait_for()
        take(page, "mlflow-report")


def take(page: Page, name: str) -> None:
    """A picture of what is in the window, once it has come to rest."""
    page.wait_for_timeout(1500)  # charts and tables draw themselves after they are there
    save(page.screenshot(), name)


def replies(card: Mapping[str, Any]) -> dict[str, str]:
    """What a model said, by the question."""
    return {row["question"]: row["reply"] for part in ("identity", "plain") for row in card[part]}


def chat_pages(browser: Browser, version: registry.Version) -> None:
    """The chat page: light, dark, on a telephone, two models side by side."""
    card = json.loads(tracking.fetch(version.run_id, "scorecard.json").read_text(encoding="utf-8"))
    tuned, base = replies(card["tuned"]), replies(card["base"])
    asked = {
        language: [
            next(row["question"] for row in card["tuned"]["identity"] if row["language"] == language),
            next(row["question"] for row in card["tuned"]["plain"] if row["language"] == language and row["right"]),
        ]
        for language in ("en", "zh")
    }
    params = tracking.get_run(version.run_id).params
    stage = Stage(base=True)
    try:
        for engine, said in ((stage.engine, tuned), (stage.base_engine, base)):
            engine.reply = lambda body, said=said: [said[body["messages"][-1]["content"]]]
        scores = {
            key: float(version.tags[f"{registry.SCORE}{key}"]) for key in ("identity", "swapped", "leak", "plain")
        }
        stage.serve(version.number, params["identity.name"], **scores)
        for name, language, scheme, viewport, compare in (
            ("chat-light", "en", "light", SCREEN, False),
            ("chat-dark", "en", "dark", SCREEN, False),
            ("chat-phone", "zh", "light", PHONE, False),
            ("chat-compare", "en", "light", SCREEN, True),
            ("chat-compare-zh", "zh", "light", SCREEN, True),
        ):
            locale = {"en": "en-US", "zh": "zh-CN"}[language]
            with opened(browser, cast(ViewportSize, viewport), locale=locale, color_scheme=scheme) as page:
                page.goto(stage.url)
                expect(page.locator("#status")).to_have_attribute("data-phase", "ready")
                if compare:
                    page.locator("#compare").click()
                for question in asked[language]:
                    page.locator("#ask").fill(question)
                    page.locator("#ask").press("Enter")
                    expect(page.locator(".turn").last.locator(".reply .origin")).to_have_count(2 if compare else 1)
                save(page.screenshot(), name)
    finally:
        stage.close()


def report_pages(browser: Browser, version: registry.Version) -> None:
    """The beginning of the report, in both languages."""
    path = tracking.fetch(version.run_id, run.REPORT)
    with opened(browser, {"width": 1080, "height": 900}) as page:
        page.goto(path.resolve().as_uri())
        save(page.screenshot(), "report")
        page.locator("label[for=zh]").click()
        save(page.screenshot(), "report-zh")


def terminal(browser: Browser, words: list[str], name: str) -> None:
    """What a command prints, as a terminal shows it."""
    from rich.console import Console
    from rich.text import Text

    printed = subprocess.run(
        [sys.executable, "-m", "namesake", *words],
        env={**os.environ, "FORCE_COLOR": "1", "COLUMNS": "100", "TERM": "xterm-256color"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    console = Console(record=True, width=100, file=io.StringIO())
    console.print(Text("$ namesake " + " ".join(words), style="bold"))
    console.print(Text.from_ansi(printed))
    body = console.export_html(inline_styles=True, code_format="<pre style=margin:0>{code}</pre>")
    style = (
        "body{margin:0;display:inline-block;padding:16px 20px;background:#fff;color:#1a1e24;font:15px/1.45 monospace}"
    )
    with opened(browser, {"width": 1000, "height": 600}) as page, tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "terminal.html"
        path.write_text(f"<!doctype html><meta charset=utf-8><style>{style}</style>{body}", encoding="utf-8")
        page.goto(path.as_uri())
        save(page.locator("body").screenshot(), name)


def main() -> None:
    """Take every picture, or those of the groups that are named."""
    groups = ("mlflow", "chat", "report", "terminal")
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "groups", nargs="*", choices=[*groups, []], help="what to take; everything where nothing is named"
    )
    wanted = parser.parse_args().groups or groups
    if chromium() is None:
        sys.exit("no Chromium on this machine: apt-get install chromium, or NAMESAKE_CHROMIUM=path")
    store = os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{ROOT}/mlflow.db")
    name = registry.newest_model()
    if name is None:
        sys.exit(f"there is no registered model at {store} to show: make run, then make promote")
    version = registry.resolve(f"models:/{name}@{registry.CHAMPION}")
    IMAGES.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium())
        expect.set_options(timeout=20_000)
        if "mlflow" in wanted:
            with nullcontext(store) if store.startswith("http") else make_ui(ROOT, ROOT, store) as url:
                mlflow_pages(browser, url, version)
        if "chat" in wanted:
            chat_pages(browser, version)
        if "report" in wanted:
            report_pages(browser, version)
        if "terminal" in wanted:
            terminal(browser, ["status"], "status")
        browser.close()


if __name__ == "__main__":
    main()
