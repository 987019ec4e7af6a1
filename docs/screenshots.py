"""The guide's pictures, taken anew: MLflow's pages, the chat page, the report and the terminal. `make screenshots`.

They show the registered model that was promoted to last in MLFLOW_TRACKING_URI, with the run of its champion; train and
promote first. Everything in them is real: the chat page speaks with `namesake serve`, which has the version and its
base. The pictures of a sweep want a finished sweep in the same store; where there is none, the old ones stay.
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
from functools import cache
from pathlib import Path
from typing import Any, cast

import mlflow
from PIL import Image
from playwright.sync_api import Browser, Page, ViewportSize, expect, sync_playwright
from rich.console import Console
from rich.text import Text
from tests.mlflow_ui import chromium, make_ui, open_registry

import namesake
from namesake import examine, gate, probing, registry, run, tracking
from namesake.messages import cells
from namesake.terminal import Screen

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "guide" / "images"
MOST = 80_000
"""Bytes of a picture."""

GROUPS = ("mlflow", "sweep", "chat", "report", "terminal")
LOCALES = {"en": "en-US", "zh": "zh-CN"}
SCREEN: ViewportSize = {"width": 1280, "height": 800}
WIDE: ViewportSize = {"width": 1600, "height": 480}
LOW: ViewportSize = {"width": 1280, "height": 420}
SQUARE: ViewportSize = {"width": 1280, "height": 1000}
TALL: ViewportSize = {"width": 1280, "height": 1200}
PHONE: ViewportSize = {"width": 390, "height": 780}

UI = "http://127.0.0.1:5000"
"""Where a reader has MLflow's pages."""


def save(png: bytes, name: str) -> None:
    """Write a picture as it is, or in as many colours as fit."""
    whole = Image.open(io.BytesIO(png)).convert("RGB")
    for colours in (0, 128, 64, 32):
        shown = whole.quantize(colours, dither=Image.Dither.NONE).convert("RGB") if colours else whole
        small = io.BytesIO()
        shown.save(small, "webp", lossless=True, quality=100, method=6)
        if small.tell() <= MOST:
            break
    (IMAGES / f"{name}.webp").write_bytes(small.getvalue())
    print(f"{name}.webp {small.tell() / 1000:.0f} kB{f', {colours} colours' if colours else ''}", flush=True)


@contextmanager
def opened(browser: Browser, viewport: ViewportSize = SCREEN, **more: Any) -> Iterator[Page]:
    """A fresh profile's tab."""
    context = browser.new_context(viewport=viewport, reduced_motion="reduce", **{"locale": "en-US", **more})
    yield context.new_page()
    context.close()


def take(page: Page, name: str) -> None:
    """A picture of what is in the window, once it has come to rest."""
    page.wait_for_timeout(1500)  # charts and tables draw themselves after they are there
    page.evaluate(
        """(places) => {
            const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
            while (texts.nextNode()) for (const [place, name] of places)
                if (texts.currentNode.data.includes(place))
                    texts.currentNode.data = texts.currentNode.data.replaceAll(place, name);
        }""",
        places(),
    )
    save(page.screenshot(), name)


@cache
def places() -> list[tuple[str, str]]:
    """Where things lie on this machine, which is nobody's business, and what is shown instead."""
    folders = {ROOT, Path(sys.prefix).parent}
    store = os.environ["MLFLOW_TRACKING_URI"]
    if store.startswith("sqlite:///"):
        folders.add(Path(store.removeprefix("sqlite:///")).parent)
        folders |= {
            Path(one.artifact_location.removeprefix("file://")).parent.parent for one in mlflow.search_experiments()
        }
    found = sorted((str(folder) for folder in folders if folder != Path("/")), key=len, reverse=True)
    return [*((place, "~/namesake") for place in found), (str(Path.home()), "~")]


def mlflow_pages(browser: Browser, url: str, version: registry.Version) -> None:
    """Every page of MLflow that somebody who uses Namesake meets."""
    found = tracking.get_run(version.run_id)
    shown = tracking.Run(found.id, found.experiment)
    at = f"{url}/{shown.page}"
    with opened(browser) as page:
        greeted(page, url)
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
        page.goto(f"{url}/#/models/{version.name}/versions/{version.number}")
        page.get_by_text("Registered At").wait_for()
        take(page, "mlflow-version")
        page.set_viewport_size(LOW)
        page.goto(f"{url}/#/models")
        page.get_by_role("link", name=version.name, exact=True).wait_for()
        take(page, "mlflow-models")
        page.set_viewport_size(SCREEN)
        page.goto(f"{at}/model-metrics")
        page.get_by_placeholder("Search metric charts").fill("train/")
        take(page, "mlflow-metrics")
        page.goto(f"{url}/{shown.artifact_page(run.REPORT)}")
        page.frame_locator("iframe").locator("h1").wait_for()
        take(page, "mlflow-report")
        page.set_viewport_size(WIDE)
        page.goto(f"{url}/{shown.view_page}")
        page.get_by_text(found.name).first.wait_for()
        take(page, "mlflow-runs")


def sweep_pages(browser: Browser, url: str) -> None:
    """The newest finished sweep: its runs in the list, and the parent's own page."""
    asked = f"tags.`{tracking.TAG_KIND}` = 'sweep' and attributes.status = 'FINISHED'"
    runs = mlflow.search_runs(search_all_experiments=True, filter_string=asked, max_results=1, output_format="list")
    if not runs:
        print("no finished sweep in this store: its pictures stay as they are", flush=True)
        return
    (parent,) = runs
    shown = tracking.Run(parent.info.run_id, parent.info.experiment_id)
    with opened(browser) as page:
        greeted(page, url)
        page.get_by_text("Model training", exact=True).click()
        page.goto(f"{url}/{shown.page}")
        page.get_by_text(parent.info.run_name).first.wait_for()
        take(page, "mlflow-sweep")
        page.set_viewport_size(WIDE)
        page.goto(f"{url}/{shown.view_page}")
        search = page.get_by_placeholder("metrics.rmse")
        search.fill("")
        search.press("Enter")
        page.get_by_text("Created", exact=True).click()  # trials stand below their sweep in this order only
        name = page.get_by_role("gridcell").filter(has=page.get_by_role("link", name=parent.info.run_name))
        name.first.get_by_role("button").first.click()
        take(page, "mlflow-sweep-runs")


def greeted(page: Page, url: str) -> None:
    """Past what MLflow shows to a newcomer."""
    page.goto(url)
    page.get_by_role("button", name="Close").last.click()  # the assistant


def asked(card: Mapping[str, Any], language: str) -> list[str]:
    """A question about the identity, and a plain one: that the tuned model answers rightly, if it does any."""
    identity, plain = ([row for row in card[part] if row["language"] == language] for part in ("identity", "plain"))
    return [identity[0]["question"], max(plain, key=lambda row: bool(row["right"]))["question"]]


def chat_pages(browser: Browser, version: registry.Version) -> None:
    """The chat page before a real server: light, dark, on a telephone, version and base side by side."""
    card = json.loads(tracking.fetch(version.run_id, "scorecard.json").read_text(encoding="utf-8"))["tuned"]
    champion = f"models:/{version.name}@{registry.CHAMPION}"
    served = namesake.serve(champion, port=0, mode="adapter", eager=True, mlflow_url=UI)
    with served as server:
        for name, language, scheme, viewport, compare in (
            ("chat-light", "en", "light", SCREEN, False),
            ("chat-light-zh", "zh", "light", SCREEN, False),
            ("chat-dark", "en", "dark", SCREEN, False),
            ("chat-dark-zh", "zh", "dark", SCREEN, False),
            ("chat-phone", "en", "light", PHONE, False),
            ("chat-phone-zh", "zh", "light", PHONE, False),
            ("chat-compare", "en", "light", SCREEN, True),
            ("chat-compare-zh", "zh", "light", SCREEN, True),
        ):
            told = {"locale": LOCALES[language], "color_scheme": scheme}
            with opened(browser, cast(ViewportSize, viewport), **told) as page:
                page.add_init_script("localStorage['namesake.settings'] = '{\"tokens\": 80}'")  # the base finds no end
                page.goto(server.url)
                expect(page.locator("#status")).to_have_attribute("data-phase", "ready")
                if compare:
                    page.locator("#compare").click()
                for question in asked(card, language):
                    page.locator("#ask").fill(question)
                    page.locator("#ask").press("Enter")
                    expect(page.locator(".turn").last.locator(".reply .origin")).to_have_count(2 if compare else 1)
                page.mouse.move(0, 0)
                save(page.screenshot(), name)


def report_pages(browser: Browser, version: registry.Version) -> None:
    """The beginning of the report, in both languages."""
    path = tracking.fetch(version.run_id, run.REPORT)
    with opened(browser, {"width": 1080, "height": 900}) as page:
        page.goto(path.resolve().as_uri())
        save(page.screenshot(), "report")
        page.locator("label[for=zh]").click()
        save(page.screenshot(), "report-zh")


def terminal_pages(browser: Browser, version: registry.Version) -> None:
    """What commands print, in both languages."""
    for language, mark in (("en", ""), ("zh", "-zh")):
        os.environ["NAMESAKE_LANG"] = language
        for command in ("status", "doctor"):
            told = {**os.environ, "FORCE_COLOR": "1", "COLUMNS": "110", "TERM": "xterm-256color"}
            words = [sys.executable, "-m", "namesake", command]
            # The doctor ends with 1 where it finds a fault, and that may be shown too.
            printed = subprocess.run(words, env=told, stdout=subprocess.PIPE, text=True, check=False).stdout
            for place, name in places():
                printed = printed.replace(place, name)
            console = _console()
            console.print(Text.from_ansi(printed))
            terminal(browser, f"namesake {command}", console, f"{command}{mark}")
        screen = Screen()
        screen.console = _console()
        shown(version, screen)
        terminal(browser, "make run", screen.console, f"run{mark}")
    del os.environ["NAMESAKE_LANG"]


def shown(version: registry.Version, screen: Screen) -> None:
    """What `namesake run` said at its end."""
    found = tracking.get_run(version.run_id)
    kept = json.loads(tracking.fetch(version.run_id, "scorecard.json").read_text(encoding="utf-8"))
    identity = namesake.Identity.parse(found.params["identity.name"], found.params["identity.author"])
    before, after = (
        probing.scorecard(
            identity,
            *([row["reply"] for row in kept[which][part]] for part in ("identity", "plain")),
            slices={name: [row["reply"] for row in rows] for name, rows in kept[which]["slices"].items()},
        )
        for which in ("base", "tuned")
    )
    decision = examine.judge(version.run_id, gate.Policy())
    run.show(tracking.Run(found.id, found.experiment), before, after, decision, screen)


def _console() -> Console:
    return Console(record=True, width=110, file=io.StringIO(), force_terminal=True, highlight=False)


def terminal(browser: Browser, command: str, console: Console, name: str) -> None:
    """What a command printed, as a terminal shows it: a Chinese character takes two columns."""
    body = console.export_html(inline_styles=True, code_format="{code}")
    body = "".join(f"<i>{one}</i>" if cells(one) == 2 else one for one in body)
    style = (
        "body{margin:0;display:inline-block;background:#fff;color:#1a1e24}"
        "pre{margin:0;padding:16px 20px;font:15px/1.45 monospace;max-width:110ch;white-space:pre-wrap}"
        "i{display:inline-block;width:2ch;font-style:normal;text-align:center}"
    )
    text = f"<!doctype html><meta charset=utf-8><style>{style}</style><pre><b>$ {command}</b>\n{body}</pre>"
    with opened(browser, {"width": 1200, "height": 300}) as page, tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "terminal.html"
        path.write_text(text, encoding="utf-8")
        page.goto(path.as_uri())
        save(page.locator("body").screenshot(), name)


def main() -> None:
    """Take every picture, or those of the groups that are named."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("groups", nargs="*", choices=[*GROUPS, []], help="what to take; everything where none is named")
    wanted = parser.parse_args().groups or GROUPS
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
        expect.set_options(timeout=60_000)
        if {"mlflow", "sweep"} & {*wanted}:
            with (
                tempfile.TemporaryDirectory() as log,
                nullcontext(store) if store.startswith("http") else make_ui(ROOT, Path(log), store) as url,
            ):
                if "mlflow" in wanted:
                    mlflow_pages(browser, url, version)
                if "sweep" in wanted:
                    sweep_pages(browser, url)
        for group, pages in (("chat", chat_pages), ("report", report_pages), ("terminal", terminal_pages)):
            if group in wanted:
                pages(browser, version)
        browser.close()


if __name__ == "__main__":
    main()
