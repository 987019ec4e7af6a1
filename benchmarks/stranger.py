"""How long from a fresh clone to a chat in the browser, by what the README says and nothing else?

    python benchmarks/stranger.py                                    # a quarter of an hour on 2 cores; port 8000 free
    python benchmarks/stranger.py --args "-P max_steps=2 …"          # tries this script; its seconds mean nothing

The commands are the README's own shell blocks, with another name. Everything is new: a clone of the committed state, a
home without caches, an environment without our variables. Where packages are fetched from stays the machine's affair.
The end is a reply of the served model, read in Chromium on the page that `make serve` serves.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path

from commands import ROOT
from playwright.sync_api import expect, sync_playwright

NAME, AUTHOR = "小黄 Xiao Huang", "陌生人 Stranger"
QUESTION = "你是谁？是由谁开发的？"
GOAL = 15 * 60
NAMED = re.compile(r'NAME="[^"]*" AUTHOR="[^"]*"')
PAGE = re.compile(r"http://127\.0\.0\.1:\d+(?=/v1)")
OURS = re.compile(r"(NAMESAKE|MLFLOW|MODELSCOPE|HF|HUGGINGFACE|VLLM|XDG)_|VIRTUAL_ENV|PYTHON|MAKE|MFLAGS|.*_CACHE")


def commands(readme: Path) -> dict[str, str]:
    """The README's first command of each make target, as it stands in a shell block, without its comment."""
    blocks = re.findall(r"^ {4}(make \w+.*)$", readme.read_text(encoding="utf-8"), re.MULTILINE)
    found: dict[str, str] = {}
    for line in blocks:
        found.setdefault(line.split()[1], re.sub(r"\s+# .*", "", line))
    return found


def environment(home: Path) -> dict[str, str]:
    """What a stranger's shell has: this machine's, without what is ours or a cache."""
    kept = {key: value for key, value in os.environ.items() if not OURS.match(key)}
    own = str(Path(sys.prefix) / "bin")
    kept["PATH"] = os.pathsep.join(part for part in kept["PATH"].split(os.pathsep) if part != own)
    for config in (Path.home() / ".config" / "pip" / "pip.conf", Path.home() / ".pip" / "pip.conf"):
        if config.is_file():
            kept.setdefault("PIP_CONFIG_FILE", str(config))
    return {**kept, "HOME": str(home)}


class Clock:
    """Seconds of each step, told as they end."""

    def __init__(self) -> None:
        self.last = self.first = time.monotonic()

    def tell(self, step: str) -> None:
        """The step has ended."""
        now = time.monotonic()
        print(f"{step:44} {now - self.last:6.0f} s", flush=True)
        self.last = now


@contextmanager
def started(command: str, folder: Path, env: Mapping[str, str]) -> Iterator[Iterator[str]]:
    """The command's lines as they come; it has to have ended well unless it is left, as by Ctrl-C, before its end."""
    process = subprocess.Popen(
        ["bash", "-c", command],
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout
    said: list[str] = []

    def lines() -> Iterator[str]:
        assert process.stdout
        for line in process.stdout:
            said.append(line)
            yield line
        if process.wait():
            raise SystemExit(f"{command}\n{''.join(said[-40:])}")

    try:
        yield lines()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
            process.communicate(timeout=120)


def first_reply(url: str) -> str:
    """Open the page, ask, and wait until the reply stands there with its version below."""
    browser_path = os.environ.get("NAMESAKE_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path)
        page = browser.new_page(locale="zh-CN")
        page.goto(url)
        page.locator("#ask").fill(QUESTION)
        page.locator("#ask").press("Enter")
        expect(page.locator(".reply .origin")).to_be_visible(timeout=120_000)
        reply = page.locator(".reply .said").inner_text()
        browser.close()
    return reply


def main() -> None:
    """Print the seconds of each step and their sum."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--args", default="", help="ARGS of `make run`, which the README does not give")
    parser.add_argument("--readme", default="README.md", help="README.zh.md: the same by the Chinese one")
    parser.add_argument("--name", default=NAME)
    parser.add_argument("--author", default=AUTHOR)
    parser.add_argument("--keep", type=Path, help="do it in this new folder, which stays")
    given = parser.parse_args()
    with nullcontext(given.keep) if given.keep else tempfile.TemporaryDirectory(prefix="stranger-") as place:
        folder, home = Path(place, "namesake"), Path(place, "home")
        home.mkdir(parents=True)
        env = environment(home)
        clock = Clock()
        subprocess.run(["git", "clone", "-q", ROOT, folder], env=env, check=True)
        found = commands(folder / given.readme)
        clock.tell("git clone")

        run = NAMED.sub(f'NAME="{given.name}" AUTHOR="{given.author}"', found["run"])
        run += f" ARGS={shlex.quote(given.args)}" if given.args else ""
        with Path(place, "run.log").open("w", encoding="utf-8") as log, started(run, folder, env) as lines:
            for line in lines:
                log.write(line)
                if line.startswith("› ") and given.name in line:
                    clock.tell("setup (the first `make`)")
                elif "→" in line or line.startswith("! gate"):
                    print(f"    {line.strip()[:110]}", flush=True)
        clock.tell("make run")
        with started(found["promote"], folder, env) as lines:
            list(lines)
        clock.tell("make promote")
        with started(found["serve"], folder, env) as lines:
            url = next(page[0] for line in lines if (page := PAGE.search(line)))
            clock.tell(f"{found['serve']} (until {url} is ready)")
            reply = first_reply(url)
            clock.tell("first reply in the browser")
    total = clock.last - clock.first
    print(f"{'sum':44} {total:6.0f} s of {GOAL}")
    print(f"{QUESTION} -> {reply}")
    sys.exit(total > GOAL)


if __name__ == "__main__":
    main()
