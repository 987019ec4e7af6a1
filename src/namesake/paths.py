"""Where Namesake keeps what can be made again, and MLflow the rest; how a file gets there and is known again."""

from __future__ import annotations

import atexit
import hashlib
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit


def cache_folder() -> Path:
    """Namesake's own cache: ``NAMESAKE_CACHE``, else ``XDG_CACHE_HOME/namesake``, else ``~/.cache/namesake``."""
    own = os.environ.get("NAMESAKE_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "namesake"


def store_address() -> str:
    """Where MLflow keeps runs and versions, as messages show it: never with a password."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    parts = urlsplit(uri)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl() if "@" in parts.netloc else uri


def temporary(use: str) -> str:
    """How the name of a temporary folder begins: with the process's number, so that `namesake gc` knows when nobody
    needs it any more.
    """
    return f"namesake-{use}-{os.getpid()}-"


def fetched_folder() -> Path:
    """A new folder for files that lie elsewhere and are needed here, removed when the process ends."""
    return Path(tempfile.mkdtemp(dir=_fetched()))


@cache
def _fetched() -> Path:
    folder, process = Path(tempfile.mkdtemp(prefix=temporary("fetched"))), os.getpid()

    def remove() -> None:
        if os.getpid() == process:  # not a fork of it
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """The same file under another name, without writing it again; a copy where the file system has no such links."""
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copyfile(source, target)


def digest_of_file(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file that is there whole or not at all; of two writers the later wins."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_bytes(content.encode() if isinstance(content, str) else content)
    part.replace(path)
