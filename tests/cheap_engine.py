"""A server that stands for vLLM where hundreds of tokens a second are not the point: ``--model FOLDER --uds SOCKET``.

It answers every chat with the text that its weights hold, and changes them as vLLM with our plugin does, so that an
answer tells which version's weights are in.
"""

from __future__ import annotations

import argparse
import json
import socketserver
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from safetensors import safe_open

from namesake_serving import vllm_plugin

PAUSE = 0.002
"""Seconds between two events of a stream."""


def compact(kind: str, model: str, choice: dict[str, Any]) -> bytes:
    """JSON as vLLM writes it."""
    head = {"id": "chatcmpl-1", "object": kind, "created": 1, "model": model}
    return json.dumps({**head, "choices": [choice]}, ensure_ascii=False, separators=(",", ":")).encode()


def said_by(weights: Path) -> str:
    """The text in the weights."""
    with safe_open(weights / "model.safetensors", framework="numpy") as tensors:
        return bytes(tensors.get_tensor("says")).rstrip(b"\0").decode()


class Engine(socketserver.ThreadingUnixStreamServer):
    """One model."""

    daemon_threads = True
    request_queue_size = 2048  # as vLLM's; Python's 5 refuse a burst of clients

    def __init__(self, socket: str, weights: Path) -> None:
        super().__init__(socket, Handler)
        self.says = said_by(weights)


class Handler(BaseHTTPRequestHandler):
    """vLLM's routes, as far as the gateway and its follower use them."""

    protocol_version = "HTTP/1.1"
    server: Engine

    def do_GET(self) -> None:
        """`/health` and `/metrics`."""
        self._answer(b"")

    def do_POST(self) -> None:
        """A chat, or other weights."""
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path == vllm_plugin.ROUTE:
            self.server.says = said_by(Path(body["path"]))
            self._answer(b'{"seconds": 0.0}')
            return
        if body.get("stream"):
            self._stream(body)
            return
        choice = {"index": 0, "message": {"role": "assistant", "content": self.server.says}, "finish_reason": "stop"}
        self._answer(compact("chat.completion", body["model"], choice))

    def _stream(self, body: dict[str, Any]) -> None:
        """As many events as tokens may be answered, each for itself, as an engine has them."""
        self.send_response(200)
        self.send_header("content-type", "text/event-stream; charset=utf-8")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        choice = {"index": 0, "delta": {"content": "我"}, "finish_reason": None}
        event = b"data: " + compact("chat.completion.chunk", body["model"], choice) + b"\n\n"
        for part in [event] * body["max_tokens"] + [b"data: [DONE]\n\n", b""]:
            self.wfile.write(b"%x\r\n%b\r\n" % (len(part), part))
            time.sleep(PAUSE if part is event else 0)

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing."""


def main() -> None:
    """Until killed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--uds", required=True)
    given = parser.parse_args()
    Engine(given.uds, given.model).serve_forever()


if __name__ == "__main__":
    main()
