"""The files of the chat page: what is in them, what may not be, and the headers they are served under."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from namesake_serving import page


class Tags(HTMLParser):
    """Every start tag with its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def text(path: str) -> str:
    """One file as text."""
    return page.file(path).body.decode()


def test_all_files_together_are_at_most_100_kilobytes() -> None:
    assert sum(len(page.file(path).body) for path in page.PATHS) <= 100_000


@pytest.mark.parametrize(
    ("path", "kind", "begins"),
    [
        ("/", "text/html; charset=utf-8", b"<!doctype html>"),
        ("/chat.css", "text/css; charset=utf-8", b"/*"),
        ("/chat.js", "text/javascript; charset=utf-8", b'"use strict";'),
        ("/favicon.svg", "image/svg+xml", b"<svg"),
    ],
)
def test_each_path_gives_its_type_its_bytes_and_the_strict_headers(path: str, kind: str, begins: bytes) -> None:
    found_kind, body, headers = page.file(path)
    assert found_kind == kind
    assert body.startswith(begins)
    given = dict(headers)
    assert given["content-security-policy"].startswith("default-src 'none'; script-src 'self'; style-src 'self'; ")
    assert given["x-content-type-options"] == "nosniff"
    assert given["referrer-policy"] == "no-referrer"
    assert given["cache-control"] == "no-cache"
    assert re.fullmatch(r'"[0-9a-f]{32}"', given["etag"])


def test_a_path_that_is_not_of_the_page_is_a_key_error() -> None:
    for path in ("/chat.js.map", "/../page.py", "", "//"):
        with pytest.raises(KeyError):
            page.file(path)


def test_a_file_is_read_once() -> None:
    assert page.file("/chat.js") is page.file("/chat.js")


@pytest.mark.parametrize("given", ["{tag}", "W/{tag}", '"other", {tag}', "*"])
def test_who_has_the_file_already_is_told_so(given: str) -> None:
    one = page.file("/chat.css")
    assert one.unchanged(given.format(tag=dict(one.headers)["etag"]))


@pytest.mark.parametrize("given", [None, "", '"other"', "etag"])
def test_who_has_another_file_gets_this_one(given: str | None) -> None:
    assert not page.file("/chat.css").unchanged(given)


def test_the_page_knows_no_mlflow_unless_told() -> None:
    assert ("meta", {"name": "namesake-mlflow", "content": ""}) in Tags(text("/")).found
    assert page.file("/", "javascript:alert(1)").body == page.file("/").body


def test_the_address_of_mlflow_stands_in_the_page_and_cannot_break_out_of_it() -> None:
    address = 'https://mlflow.example/a"><script>alert(1)</script>'
    told = page.file("/", address)
    tags = Tags(told.body.decode()).found
    assert ("meta", {"name": "namesake-mlflow", "content": address}) in tags
    assert [attributes for tag, attributes in tags if tag == "script"] == [{"src": "/chat.js"}]
    assert dict(told.headers)["etag"] != dict(page.file("/").headers)["etag"]


def test_the_page_loads_only_its_own_files_and_has_nothing_inline() -> None:
    tags = Tags(text("/")).found
    loaded = {
        value
        for tag, attributes in tags
        for name, value in attributes.items()
        if name == "src" or (name == "href" and tag == "link")
    }
    assert loaded == page.PATHS - {"/"}
    assert not [tag for tag, _ in tags if tag == "style"]
    assert not [name for _, attributes in tags for name in attributes if name == "style" or name.startswith("on")]
    assert not re.search(r"<script[^>]*>[^<]", text("/"))


def test_the_style_loads_nothing() -> None:
    assert not re.search(r"url\(|@import", text("/chat.css"))


def test_the_script_makes_no_markup_and_no_code_out_of_text() -> None:
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|createContextualFragment|DOMParser|srcdoc|\beval\b"
        r"|new Function|setTimeout\(\s*[\"'`]",
        text("/chat.js"),
    )


def test_every_element_that_the_script_looks_for_is_in_the_page() -> None:
    there = {attributes["id"] for _, attributes in Tags(text("/")).found if "id" in attributes}
    wanted = set(re.findall(r'\$\("([\w-]+)"\)', text("/chat.js")))
    assert wanted <= there
    assert {f"i-{name}" for name in re.findall(r'icon\("(\w+)"\)', text("/chat.js"))} <= there


def test_every_text_of_the_page_is_there_in_both_languages() -> None:
    script = text("/chat.js")
    table = re.search(r"const TEXTS = \{\n  en: \{\n(.*?)\n  \},\n  zh: \{\n(.*?)\n  \},\n\};", script, re.DOTALL)
    assert table
    english, chinese = (dict(re.findall(r'^    (\w+): "(.*)",$', part, re.MULTILINE)) for part in table.groups())
    assert english.keys() == chinese.keys()
    for key, said in english.items():
        assert set(re.findall(r"\{\w+\}", said)) == set(re.findall(r"\{\w+\}", chinese[key])), key
    asked = set(re.findall(r'\bt\("(\w+)"', script))
    for _, attributes in Tags(text("/")).found:
        asked |= {str(value) for name, value in attributes.items() if name in {"data-t", "data-t-name", "data-t-label"}}
    assert asked <= english.keys()
