"""Hooks of MkDocs: the guide is the site's root, with the decisions and the lab notes beside it."""

from __future__ import annotations

import logging
import re
from typing import Any

import jieba
from mkdocs.exceptions import PluginError
from mkdocs.plugins import event_priority
from mkdocs.structure.files import Files

jieba.setLogLevel(logging.WARNING)  # it tells of its dictionary at each start

_FOREIGN = re.compile(r"<(?:script|img|iframe|link)\b[^>]*\b(?:src|href)=[\"']?(?:https?:)?//[^>]*>")
"""Something that a browser would fetch from elsewhere."""


@event_priority(100)  # before the plugin for languages looks at the files
def on_files(files: Files, **_: Any) -> Files:
    """Put ``guide/tutorial.md`` at ``tutorial.html``: links between the files stay as they are in the repository."""
    for file in files:
        file.dest_uri = file.dest_uri.removeprefix("guide/")
    return files


def on_post_page(output: str, *, page: Any, **_: Any) -> str:
    """Refuse a page that would fetch anything from another server.

    Raises:
        PluginError: the page does.
    """
    if found := _FOREIGN.search(output):
        raise PluginError(f"{page.file.src_uri} fetches from elsewhere: {found[0][:200]}")
    return output
