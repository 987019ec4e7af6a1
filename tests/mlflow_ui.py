"""MLflow's own UI in a real browser, used the way a person uses it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tests.servers import free_port, running

if TYPE_CHECKING:
    from playwright.sync_api import Page


def chromium() -> str | None:
    """The machine's Chromium: ``NAMESAKE_CHROMIUM`` or one on the path."""
    return os.environ.get("NAMESAKE_CHROMIUM") or next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )


@contextmanager
def make_ui(root: Path, folder: Path, tracking_uri: str) -> Iterator[str]:
    """What ``make ui`` runs in a folder with such a store, on another port; its address."""
    port = free_port()
    told = subprocess.run(
        ["make", "--no-print-directory", "-n", "-C", str(root), "ui", f"UI_PORT={port}"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    command = told[told.index("MLFLOW_SERVER_") :]  # what comes before it installs the environment
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with running(["bash", "-c", command], folder, port, MLFLOW_TRACKING_URI=tracking_uri, PATH=path) as url:
        yield url


def open_registry(page: Page, url: str, model: str) -> None:
    """From the first page to the registered model's, past what greets a newcomer."""
    page.goto(url)
    page.get_by_text("Model training", exact=True).click()  # the other half of the UI has no registry
    page.get_by_role("link", name="Model registry").click()
    page.get_by_role("button", name="Try it now").click()
    page.get_by_role("link", name=model, exact=True).click()


def move_alias(page: Page, alias: str, version: int) -> None:
    """On a registered model's page: give the alias to the version."""
    row = page.get_by_role("row").filter(has=page.get_by_role("link", name=f"Version {version}", exact=True))
    other = row.get_by_text("@")
    add = row.get_by_role("button", name="Add")
    add.or_(other).first.wait_for()
    (add if add.count() else row.get_by_role("button").last).click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_role("combobox").fill(alias)
    dialog.get_by_role("combobox").press("Enter")
    dialog.get_by_text(re.compile(f'The "{alias}" alias is also being used on version')).wait_for()
    dialog.get_by_role("button", name="Save aliases").click()
    dialog.wait_for(state="hidden")


@contextmanager
def tab() -> Iterator[Page]:
    """A browser with one tab, gone afterwards: Playwright's event loop must not meet another test's."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium())
        yield browser.new_page(viewport={"width": 1440, "height": 900}, locale="en-US")
        browser.close()
