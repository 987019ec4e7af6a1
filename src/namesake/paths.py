"""Where Namesake keeps what can be made again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Namesake's own cache: ``NAMESAKE_CACHE``, else ``XDG_CACHE_HOME/namesake``, else ``~/.cache/namesake``."""
    own = os.environ.get("NAMESAKE_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "namesake"
