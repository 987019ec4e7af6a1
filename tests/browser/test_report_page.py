"""The report of a run in a real browser: read in either language, on either background, by anybody."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from namesake import report
from tests.browser.conftest import findings
from tests.unit.test_report import given

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = pytest.mark.timeout(120)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_in_either_language(browser: Browser, tmp_path: Path, scheme: str) -> None:
    path = tmp_path / "report.html"
    refused = given(passed=False, reasons=("identity 50.0% right, at least 95% wanted",))
    found = {}
    page = browser.new_page(color_scheme=scheme, reduced_motion="reduce")  # type: ignore[arg-type]
    for verdict, made in (("passed", given()), ("refused", refused)):
        path.write_text(report.page(made), encoding="utf-8")
        page.goto(path.as_uri())
        page.locator("details").evaluate_all("all => all.forEach(one => { one.open = true })")
        found[verdict] = findings(page)
        page.locator("label[for=zh]").click()
        found[f"{verdict}, in Chinese"] = findings(page)
    page.close()
    assert found == {state: [] for state in found}
