"""Versions and an engine that cost nothing, so that a change over several engines can be watched.

The engine stands where vLLM is (``python -m vllm.entrypoints.launchers.api_server.entry``), is started, proved, changed
in place and ended by the real code, and says what its weights say.
"""

from __future__ import annotations

from pathlib import Path

import mlflow
import numpy as np
from safetensors.numpy import save_file

from namesake import manifest
from namesake.manifest import Manifest
from namesake.paths import digest_of_file

NAME, AUTHOR = "踩踩背 CCB", "老爷爷 OldGrandpa"
QUESTION = "你是谁？"
_LENGTH = 256

_ENGINE = """
import asyncio, json, sys, time
from pathlib import Path
from aiohttp import web
from safetensors.numpy import load_file

given = dict(zip(sys.argv[1::2], sys.argv[2::2]))


def says(folder):
    raw = load_file(next(Path(folder).glob("*.safetensors")))["says"].tobytes()
    return raw.rstrip(b" ").decode()


class Engine:
    said = says(given["--model"])
    busy = 0

    async def weights(self, request):
        begun = time.monotonic()
        while self.busy:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.05)
        self.said = says((await request.json())["path"])
        if self.said == "break":
            return web.Response(status=500, text="these weights break it")
        return web.json_response({"seconds": time.monotonic() - begun})

    async def chat(self, request):
        body, said = await request.json(), self.said
        self.busy += 1
        try:
            await asyncio.sleep(0.005)
            about = {"id": "chatcmpl-1", "model": body["model"], "choices": []}
            if not body.get("stream"):
                about["choices"] = [{"index": 0, "message": {"role": "assistant", "content": said}}]
                about["usage"] = {"prompt_tokens": 1, "completion_tokens": 1}
                return web.json_response(about)
            reply = web.StreamResponse(headers={"content-type": "text/event-stream"})
            await reply.prepare(request)
            for part in said.split("|"):
                about["choices"] = [{"index": 0, "delta": {"content": part}}]
                await reply.write(b"data: " + json.dumps(about, separators=(",", ":")).encode() + b"\\n\\n")
                await asyncio.sleep(0.005)
            await reply.write(b"data: [DONE]\\n\\n")
            return reply
        finally:
            self.busy -= 1


async def health(_):
    return web.Response()


async def metrics(_):
    return web.Response(text="# HELP engine_up It runs.\\n# TYPE engine_up gauge\\nengine_up 1.0\\n")


engine, app = Engine(), web.Application()
app.add_routes([web.get("/health", health), web.get("/metrics", metrics)])
app.add_routes([web.post("/v1/chat/completions", engine.chat), web.post("/namesake/weights", engine.weights)])
web.run_app(app, path=given["--uds"], print=None, handle_signals=True)
"""


def engine(folder: Path) -> Path:
    """What goes on ``PYTHONPATH``: a package ``vllm`` that has just the entry."""
    entry = folder / "vllm" / "entrypoints" / "launchers" / "api_server" / "entry.py"
    entry.parent.mkdir(parents=True)
    entry.write_text(_ENGINE, encoding="utf-8")
    for package in entry.relative_to(folder).parents:
        if package.name:
            (folder / package / "__init__.py").touch()
    return folder


def says(number: int) -> str:
    """What a version says: its number is in it."""
    return f"我是踩踩背|（CCB），|是老爷爷|（OldGrandpa）做的|聊天助手。{number}"


def register(client: mlflow.MlflowClient, folder: Path, *, text: str = "", config: str = "{}") -> int:
    """One version more of ``ccb``, whose weights say the text (none: :func:`says` of its number); its number."""
    number = len(client.search_model_versions("name = 'ccb'")) + 1
    version = folder / f"version-{number}"
    weights = version / "model" / "model.safetensors"
    weights.parent.mkdir(parents=True)
    (weights.parent / "config.json").write_text(config, encoding="utf-8")
    raw = (text or says(number)).encode().ljust(_LENGTH)
    save_file({"says": np.frombuffer(raw, dtype=np.uint8)}, weights)
    golden = [{"messages": [{"role": "user", "content": QUESTION}], "reply": says(number)}]
    digests = {f"model/{path.name}": digest_of_file(path) for path in weights.parent.iterdir()}
    identity = {"name": NAME, "author": AUTHOR}
    record = Manifest(identity, f"You are v{number}.", {"id": "base"}, "run", digests, {}, {}, {}, {}, golden=golden)
    (version / manifest.FILE).write_text(record.to_json(), encoding="utf-8")
    made = client.create_model_version("ccb", source=str(version))
    assert int(made.version) == number
    return number
