"""What make would do: the commands that it prints with ``-n``, in a copy of what it reads."""

from __future__ import annotations

import fnmatch
import os
import re
import shlex
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from namesake import process

ROOT = Path(__file__).resolve().parents[2]
INSTALLS = re.compile(r"\b(pip|uv)\b")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout whose environment is installed: the stamps are newer than all that they depend on."""
    copy = tmp_path / "namesake"
    shutil.copytree(ROOT / "requirements", copy / "requirements")
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, copy)
    (copy / ".venv").mkdir()
    for path in (path for path in copy.rglob("*") if path.is_file()):
        os.utime(path, (1_000_000_000, 1_000_000_000))
    for processor in ("cpu", "gpu"):
        (copy / ".venv" / f".installed-{processor}").touch()
    return copy


def printed(folder: Path, *words: str, **given: str) -> str:
    """What ``make -n`` prints there; nothing of a make that runs this test is handed on to it."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS", "NAME", "WSL"))} | given
    command = ["make", "--no-print-directory", "-n", *words]
    return subprocess.run(command, cwd=folder, env=kept, capture_output=True, text=True, check=True).stdout


def test_a_second_setup_installs_nothing(checkout: Path) -> None:
    assert not INSTALLS.search(printed(checkout, "setup"))


@pytest.mark.parametrize("changed", ["requirements/{}.txt", "pyproject.toml"])
def test_setup_installs_again_when_what_it_installs_has_changed(checkout: Path, changed: str) -> None:
    for processor in ("cpu", "gpu"):
        os.utime(checkout / changed.format(processor), (4_000_000_000, 4_000_000_000))
    assert INSTALLS.search(printed(checkout, "setup"))


@pytest.mark.parametrize("target", ["run", "sweep"])
@pytest.mark.parametrize(
    ("name", "author"),
    [
        ("$(touch x)", "a'b"),
        ("$(shell touch x)", "${HOME} `touch x`"),
        ('"; touch x; "', "'; touch x; '"),
        ("踩踩背 C C  B", "100 % \\ # $$ *"),
    ],
)
def test_names_go_through_make_to_the_shell_as_they_are(checkout: Path, target: str, name: str, author: str) -> None:
    line = printed(checkout, target, f"NAME={name}", f"AUTHOR={author}")
    words = shlex.split(line)
    assert words[:4] == ["mlflow", "run", ".", "--env-manager=local"]
    assert [word for before, word in pairwise(words) if before == "-P"] == [f"name={name}", f"author={author}"]
    assert not (checkout / "x").exists()


def test_the_name_that_wsl_gives_a_machine_is_nobodys_identity(checkout: Path) -> None:
    def name(*words: str, **given: str) -> str:
        return next(one for one in shlex.split(printed(checkout, "run", *words, **given)) if one.startswith("name="))

    assert name(NAME="小黄 Xiao Huang") == "name=小黄 Xiao Huang"
    on_wsl = {"NAME": "DESKTOP-1", "WSL_DISTRO_NAME": "Ubuntu"}
    assert name(**on_wsl) == "name=踩踩背 CCB"
    assert name("NAME=小黄 Xiao Huang", **on_wsl) == "name=小黄 Xiao Huang"


def test_an_environment_that_was_broken_off_before_it_had_pip_is_made_again(checkout: Path) -> None:
    for stamp in (checkout / ".venv").glob(".installed-*"):
        stamp.unlink()
    binaries = checkout / ".venv" / "bin"
    binaries.mkdir()
    (binaries / "python").symlink_to(sys.executable)
    make = printed(checkout, "setup")
    line = next(line for line in make.splitlines() if "-m venv" in line)
    asked = line.partition("||")[0]
    assert subprocess.run(["bash", "-c", asked], cwd=checkout, check=False).returncode == 1, "it is taken as whole"
    (binaries / "pip").symlink_to(sys.executable)
    assert subprocess.run(["bash", "-c", asked], cwd=checkout, check=False).returncode == 0


@pytest.mark.parametrize("device", ["nvidia0", "nvidia3"])
def test_make_looks_for_a_gpu_as_the_rest_does(device: str) -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    line = next(line for line in text.splitlines() if line.startswith("GPU :="))
    assert str(process.WSL) in line
    pattern = re.search(r"/dev/(nvidia\S+)", line)
    assert pattern is not None
    assert fnmatch.fnmatch(device, pattern[1])
