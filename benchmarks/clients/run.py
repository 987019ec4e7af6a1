"""Do clients that people have answer to the gateway, unmodified?

    python benchmarks/clients/run.py                                   # the gateway before an upstream of the tests
    python benchmarks/clients/run.py --url http://127.0.0.1:8000/v1 --model ccb --key sk-...    # a running one

OpenAI's client for JavaScript and LiteLLM (60 packages, so not in our environment) are installed into a folder that is
thrown away. A client that cannot be installed is skipped with the reason. Exit status 1 where a check fails.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
KEY = "sk-right"
OPENAI_NODE = "openai@6.49.0"
LITELLM = "litellm==1.110.2"


class Missing(Exception):
    """A client cannot be had here; the text says why."""


def openai_node(folder: Path) -> list[str]:
    """The command that runs OpenAI's client for JavaScript."""
    npm, node = shutil.which("npm"), shutil.which("node")
    if npm is None or node is None:
        raise Missing("no Node.js with npm on this machine")
    _do([npm, "install", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", str(folder), OPENAI_NODE])
    program = shutil.copy(HERE / "openai_node.mjs", folder)
    return [node, str(program)]


def litellm(folder: Path) -> list[str]:
    """The command that runs LiteLLM."""
    venv.create(folder / "venv", with_pip=True)
    python = str(folder / "venv" / "bin" / "python")
    _do([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", LITELLM])
    return [python, str(HERE / "with_litellm.py")]


CLIENTS = {"openai-node": openai_node, "litellm": litellm}


def checks(client: str, url: str, model: str, key: str) -> dict[str, str]:
    """Why each check of a client failed; empty where it did not.

    Raises:
        Missing: it cannot be had here.
    """
    with tempfile.TemporaryDirectory(prefix="namesake-client-") as folder:
        command = CLIENTS[client](Path(folder))
        # LiteLLM would otherwise ask for a table of prices first.
        told = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "PYTHONPATH": "", "PYTHONUTF8": "1"}
        done = subprocess.run(
            [*command, url, model, key], env=told, capture_output=True, text=True, timeout=300, check=False
        )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"check"')]
    found = {line["check"]: line["why"] for line in lines}
    return found if done.returncode == 0 and found else {**found, "the client": done.stderr[-2000:] or "ended early"}


@contextmanager
def gateway() -> Iterator[str]:
    """The gateway before the upstream of the tests: its URL."""
    sys.path[:0] = [str(ROOT), str(ROOT / "src"), str(ROOT / "serving")]
    from tests.unit.test_serving_gateway import END, RESPONSES, TEXT, compact, event, front

    text = {"type": "output_text", "text": "我是踩踩背。", "annotations": []}
    message = {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed", "content": [text]}
    kind = {"id": "resp_1", "object": "response", "created_at": 1, "status": "completed", "model": "namesake"}
    reply = {**kind, "output": [message], "parallel_tool_calls": True, "tool_choice": "auto", "tools": []}
    choice = {"index": 0, "text": "踩踩背。", "finish_reason": "stop"}
    text_reply = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "namesake", "choices": [choice]}
    first = event("").replace(b'"content":""', b'"role":"assistant","content":""')
    last = event("").replace(b'"finish_reason":null', b'"finish_reason":"stop"')
    ready, end = threading.Event(), threading.Event()
    port: list[int] = []

    async def serve() -> None:
        async with front(api_keys=(KEY,)) as one:
            one.upstream.of_path = {RESPONSES: compact(reply), TEXT: compact(text_reply)}
            one.upstream.script = (first, event("我是"), event("踩踩背。"), last, END)
            port.append(one.port)
            ready.set()
            while not end.is_set():
                await asyncio.sleep(0.05)

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    try:
        if not ready.wait(20):
            raise SystemExit("the gateway does not come up")
        yield f"http://127.0.0.1:{port[0]}/v1"
    finally:
        end.set()
        thread.join(20)


def _do(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    except subprocess.TimeoutExpired:
        raise Missing(f"{Path(command[0]).name} took more than 240 s") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or ["no reason given"]
        raise Missing(f"{Path(command[0]).name}: {said[-1]}")


def main() -> None:
    """Run the clients and print what each of them says."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--url", help="of a running gateway, with /v1")
    parser.add_argument("--model", default="ccb")
    parser.add_argument("--key", default=KEY)
    parser.add_argument("--only", choices=CLIENTS, action="append")
    given = parser.parse_args()
    failed = False

    def run(url: str) -> bool:
        failed = False
        for client in given.only or CLIENTS:
            try:
                found = checks(client, url, given.model, given.key)
            except Missing as why:
                print(f"{client:12} skipped: {why}")
                continue
            for name, why_not in found.items():
                print(f"{client:12} {name:14} {why_not or 'ok'}")
                failed |= bool(why_not)
        return failed

    if given.url:
        failed = run(given.url)
    else:
        with gateway() as url:
            failed = run(url)
    sys.exit(failed)


if __name__ == "__main__":
    main()
