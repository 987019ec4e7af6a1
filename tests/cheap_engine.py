"""A server that stands for vLLM where hundreds of tokens a second are not the point: ``--model FOLDER --uds SOCKET``.

It answers every chat with the text that its weights hold, and changes them as vLLM with our plugin does, so that an
answer tells which version's weights are in.
"""

from __future__ import annotations

import argparse
import json
import socketserver
from http.server import BaseHTTPRequestHandler
from pathlib import Path

from safetensors import safe_open

from namesake_serving import vllm_plugin


def said_by(weights: Path) -> str:
    """The text in the weights."""
    with safe_open(weights / "model.safetensors", framework="numpy") as tensors:
        return bytes(tensors.get_tensor("says")).rstrip(b"\0").decode()


class Engine(socketserver.ThreadingUnixStreamServer):
    """One model."""

    daemon_threads = True

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
        choice = {"index": 0, "message": {"role": "assistant", "content": self.server.says}, "finish_reason": "stop"}
        kind = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": body["model"]}
        self._answer(json.dumps({**kind, "choices": [choice]}, ensure_ascii=False, separators=(",", ":")).encode())

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
