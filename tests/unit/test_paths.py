"""Files that lie elsewhere, and the same file under two names."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from namesake import leftovers, tracking
from namesake.paths import link_or_copy, temporary

FETCH = """
import os, sys
from namesake.paths import fetched_folder
one, other = fetched_folder(), fetched_folder()
(one / "weights").write_text("w")
child = os.fork()
if not child:
    sys.exit(0)
os.waitpid(child, 0)
print(one.parent, one != other, (one / "weights").exists())
if sys.argv[1] == "killed":
    os.kill(os.getpid(), 9)
"""


def fetching(temporary: Path, how: str) -> tuple[Path, str]:
    """A process that fetches a file, forks and ends; its folder and what it said of it."""
    done = subprocess.run(
        [sys.executable, "-c", FETCH, how],
        env={**os.environ, "TMPDIR": str(temporary)},
        capture_output=True,
        text=True,
        check=how == "ends",
    )
    folder, _, said = done.stdout.partition(" ")
    return Path(folder), said.strip()


def test_what_was_fetched_goes_when_the_process_ends_and_not_when_a_fork_of_it_does(tmp_path: Path) -> None:
    folder, said = fetching(tmp_path, "ends")
    assert said == "True True"
    assert folder.parent == tmp_path
    assert not folder.exists()


def test_what_a_killed_process_had_fetched_is_a_leftover_and_a_living_ones_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = fetching(tmp_path, "killed")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(tracking, "models_with", lambda _: [])
    monkeypatch.setenv("NAMESAKE_CACHE", str(tmp_path / "cache"))
    (tmp_path / f"{temporary('serve')}mine").mkdir()
    (tmp_path / "namesake-serve-1-init").mkdir()
    (tmp_path / "namesake-of-somebody-else").mkdir()
    (found,) = leftovers.find(0)
    assert (found.kind, found.where, found.size) == ("folder", str(folder), 1)
    leftovers.remove(found)
    assert leftovers.find(0) == []


def test_a_link_is_the_same_file_and_a_link_to_it_gives_no_symlink(tmp_path: Path) -> None:
    (tmp_path / "weights").write_text("w")
    (tmp_path / "pointer").symlink_to("weights")
    link_or_copy(tmp_path / "pointer", tmp_path / "same")
    assert not (tmp_path / "same").is_symlink()
    assert (tmp_path / "same").stat().st_ino == (tmp_path / "weights").stat().st_ino


def test_where_the_file_system_has_no_links_it_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "link", none)
    (tmp_path / "weights").write_text("w")
    link_or_copy(tmp_path / "weights", tmp_path / "same")
    assert (tmp_path / "same").read_text() == "w"
    assert (tmp_path / "same").stat().st_ino != (tmp_path / "weights").stat().st_ino
