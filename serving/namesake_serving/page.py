"""The chat page: four files of ours, read once from the package, with the headers that they are served under."""

from __future__ import annotations

import html
from functools import cache
from hashlib import sha256
from importlib import resources
from typing import NamedTuple

POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
)
"""Content-Security-Policy: what the page loads and speaks to is this server, and nothing is inline."""

_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/chat.css": ("chat.css", "text/css; charset=utf-8"),
    "/chat.js": ("chat.js", "text/javascript; charset=utf-8"),
    "/favicon.svg": ("favicon.svg", "image/svg+xml"),
}
PATHS = frozenset(_FILES)
"""The paths of the page. They hold nothing secret: they are answered without a key, which the page itself asks for."""

_MLFLOW = b'<meta name="namesake-mlflow" content="">'


class File(NamedTuple):
    """One file of the page; ``headers`` are all but the content's type and length."""

    kind: str
    body: bytes
    headers: tuple[tuple[str, str], ...]

    def unchanged(self, if_none_match: str | None) -> bool:
        """Whether the client has it already (304)."""
        tags = [tag.strip().removeprefix("W/") for tag in (if_none_match or "").split(",")]
        return "*" in tags or dict(self.headers)["etag"] in tags


@cache
def file(path: str, mlflow: str = "") -> File:
    """What is answered at one of :data:`PATHS`.

    Args:
        mlflow: address of MLflow's pages as a browser reaches them, ``http://127.0.0.1:5000``; replies then link to the
            run and the version they came from. Anything but http and https is left out.

    Raises:
        KeyError: the page has no such path.
    """
    name, kind = _FILES[path]
    body = (resources.files("namesake_serving") / "web" / name).read_bytes()
    if path == "/" and mlflow.startswith(("http://", "https://")):
        body = body.replace(_MLFLOW, _MLFLOW.replace(b'""', f'"{html.escape(mlflow)}"'.encode()))
    return File(
        kind,
        body,
        (
            ("etag", f'"{sha256(body).hexdigest()[:32]}"'),
            ("cache-control", "no-cache"),  # kept, and asked about each time: no old script under a new page
            ("content-security-policy", POLICY),
            ("x-content-type-options", "nosniff"),
            ("referrer-policy", "no-referrer"),
        ),
    )
