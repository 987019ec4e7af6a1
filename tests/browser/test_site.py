"""The guide as `make docs` builds it, in a real browser. Skipped where there is none; the pipeline builds it first."""

from __future__ import annotations

import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.browser.conftest import findings

if TYPE_CHECKING:
    from playwright.sync_api import Browser

SITE = Path(__file__).resolve().parents[2] / "site"
PAGES = ("tutorial.html", "zh/tutorial.html", "reference/settings.html")
SERIOUS = ("(serious)", "(critical)")

pytestmark = pytest.mark.timeout(120)


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files and logs nothing."""

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def url() -> Iterator[str]:
    """Where the site is served."""
    if not (SITE / "index.html").is_file():
        pytest.skip("there is no site/ (make docs)")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(SITE)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious_in_the_guide(browser: Browser, url: str, scheme: str) -> None:
    found = {}
    context = browser.new_context(color_scheme=scheme, reduced_motion="reduce")  # type: ignore[arg-type]
    page = context.new_page()
    for name in PAGES:
        page.goto(f"{url}/{name}")
        found[name] = [one for one in findings(page) if any(impact in one for impact in SERIOUS)]
    context.close()
    assert found == {name: [] for name in PAGES}
