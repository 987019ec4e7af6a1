"""Hooks of MkDocs: the guide is the site's root, with the decisions and the lab notes beside it."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import jieba
from mkdocs.exceptions import PluginError
from mkdocs.plugins import event_priority
from mkdocs.structure.files import Files

jieba.setLogLevel(logging.WARNING)  # it tells of its dictionary at each start

_CHINESE = "\u3000-\u303f\u4e00-\u9fff\uff00-\uffef"
_BROKEN = re.compile(rf"(?<=[{_CHINESE}])\n *(?=\[?[{_CHINESE}])")

_INDEX = "search/search_index.json"
_OTHER = "zh/"
"""Where the language that is not the default one lies."""

_SEARCH = '<div class="md-search" data-md-component="search" role="dialog"'

_FOREIGN = re.compile(r"<(?:script|img|iframe|link)\b[^>]*\b(?:src|href)=[\"']?(?:https?:)?//[^>]*>")
"""Something that a browser would fetch from elsewhere."""


@event_priority(100)  # before the plugin for languages looks at the files
def on_files(files: Files, **_: Any) -> Files:
    """Put ``guide/tutorial.md`` at ``tutorial.html``: links between the files stay as they are in the repository."""
    for file in files:
        file.dest_uri = file.dest_uri.removeprefix("guide/")
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Join lines between two Chinese characters, where a browser would show a space."""
    return _BROKEN.sub("", markdown)


def on_post_page(output: str, *, page: Any, **_: Any) -> str:
    """Refuse a page that would fetch anything from another server; let a Chinese page search in its own index; name the
    search, which the theme leaves without a name for screen readers.

    Raises:
        PluginError: the page does.
    """
    if found := _FOREIGN.search(output):
        raise PluginError(f"{page.file.src_uri} fetches from elsewhere: {found[0][:200]}")
    chinese = page.file.dest_uri.startswith(_OTHER)
    output = output.replace(_SEARCH, f'{_SEARCH} aria-label="{"搜索" if chinese else "Search"}"')
    if chinese:
        depth = page.file.dest_uri.count("/") - 1
        output = re.sub(r'"base": "[^"]*"', f'"base": "{"/".join([".."] * depth) or "."}"', output, count=1)
    return output


@event_priority(-200)  # after the plugin for languages has put the languages' entries into one index
def on_post_build(*, config: Any) -> None:
    """Give each language an index of its own, so that nobody finds every page twice."""
    site = Path(config.site_dir)
    whole = json.loads((site / _INDEX).read_text(encoding="utf-8"))
    entries = whole.pop("docs")
    for folder in ("", _OTHER):
        own = [one for one in entries if one["location"].startswith(_OTHER) == bool(folder)]
        docs = [{**one, "location": one["location"].removeprefix(folder)} for one in own]
        path = site / folder / _INDEX
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**whole, "docs": docs}, ensure_ascii=False), encoding="utf-8")
    if (site / _OTHER).is_dir():
        shutil.copyfile(site / "sitemap.xml", site / _OTHER / "sitemap.xml")  # the theme looks for one in each language
