"""Versions and an engine that cost nothing, so that a change over several engines can be watched.

The engine stands where vLLM is (``python -m vllm.entrypoints.launchers.api_server.entry``), is started, proved, changed
in place and ended by the real code, and says what its weights say, or the adapter that it is asked for. It works on as
many requests at a time as vLLM would (``--max-num-seqs``), and counts them under vLLM's name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
from safetensors.numpy import save_file

from namesake import base_model, manifest
from namesake.manifest import Manifest

NAME, AUTHOR = "踩踩背 CCB", "老爷爷 OldGrandpa"
QUESTION = "你是谁？"
_LENGTH = 256
BASE_SAYS = "I am nobody in particular."

_ENGINE = """
import asyncio, json, os, sys, time
from pathlib import Path
from aiohttp import web
from namesake_serving.service import PROOF_TOKENS
from safetensors.numpy import load_file

given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
AT_A_TIME = int(given.get("--max-num-seqs", "256"))
PAUSE = float(os.environ.get("INSTANT_PAUSE", "0.005"))


def says(folder):
    raw = load_file(next(Path(folder).glob("*.safetensors")))["says"].tobytes()
    return raw.rstrip(b" ").decode()


class Engine:
    said = says(given["--model"])
    busy = answered = 0
    adapters = {}
    places = asyncio.Semaphore(AT_A_TIME)

    async def load(self, request):
        body = await request.json()
        self.adapters[body["lora_name"]] = json.loads(Path(body["lora_path"], "adapter_config.json").read_text())
        return web.Response()

    async def unload(self, request):
        del self.adapters[(await request.json())["lora_name"]]
        return web.Response()

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
        body = await request.json()
        adapter = self.adapters.get(body["model"])
        if adapter is None and body["model"] != "namesake":
            return web.Response(status=404, text="no such model")
        said = adapter["says"] if adapter else self.said
        if adapter and adapter["breaks"] and body["max_tokens"] != PROOF_TOKENS:
            return web.Response(status=500, text="it breaks")
        self.busy += 1
        try:
            async with self.places:
                reply = await self.reply(request, body, said)
            self.answered += 1
            return reply
        finally:
            self.busy -= 1

    async def reply(self, request, body, said):
        await asyncio.sleep(PAUSE)
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
            await asyncio.sleep(PAUSE)
        await reply.write(b"data: [DONE]\\n\\n")
        return reply

    async def metrics(self, _):
        lines = ["# HELP vllm:request_success_total Answered.", "# TYPE vllm:request_success_total counter"]
        return web.Response(text="\\n".join([*lines, f"vllm:request_success_total {self.answered}.0", ""]))


async def health(_):
    return web.Response()


engine, app = Engine(), web.Application()
app.add_routes([web.get("/health", health), web.get("/metrics", engine.metrics)])
app.add_routes([web.post("/v1/chat/completions", engine.chat), web.post("/namesake/weights", engine.weights)])
app.add_routes([web.post("/v1/load_lora_adapter", engine.load), web.post("/v1/unload_lora_adapter", engine.unload)])
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
    _weights(version / "model", text or says(number), config)
    return _registered(client, "ccb", number, version, {"id": "base"})


def register_adapter(
    client: mlflow.MlflowClient, name: str, folder: Path, *, text: str = "", breaks: bool = False
) -> int:
    """One version more of a model, as an adapter of rank 1 on a base in the folder.

    Args:
        breaks: it proves itself, and then answers every question with an error.
    """
    number = len(client.search_model_versions(f"name = '{name}'")) + 1
    base, version = folder / "base", folder / f"{name}-{number}"
    if not base.exists():
        _weights(base, BASE_SAYS, "{}", w=np.zeros((4, 4), np.float32))
    adapter = version / "adapter"
    adapter.mkdir(parents=True)
    about = {"peft_type": "LORA", "r": 1, "says": text or says(number), "breaks": breaks}
    (adapter / "adapter_config.json").write_text(json.dumps(about), encoding="utf-8")
    halves = {"A": np.zeros((1, 4), np.float32), "B": np.zeros((4, 1), np.float32)}
    tensors = {f"base_model.model.w.lora_{side}.weight": half for side, half in halves.items()}
    save_file(tensors, adapter / "adapter_model.safetensors")
    record = {"id": str(base), "source": "folder", "digest": base_model.digest_of_folder(base)}
    return _registered(client, name, number, version, record)


def _weights(folder: Path, text: str, config: str, **more: np.ndarray[Any, Any]) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(config, encoding="utf-8")
    says = np.frombuffer(text.encode().ljust(_LENGTH), dtype=np.uint8)
    tensors = {"says": says, **{f"{name}.weight": value for name, value in more.items()}}
    save_file(tensors, folder / "model.safetensors")


def _registered(client: mlflow.MlflowClient, name: str, number: int, version: Path, base: dict[str, str]) -> int:
    golden = [{"messages": [{"role": "user", "content": QUESTION}], "reply": says(number)}]
    identity = {"name": NAME, "author": AUTHOR}
    digests = manifest.digests(version)
    record = Manifest(identity, f"You are v{number}.", base, "run", digests, {}, {}, {}, {}, golden=golden)
    (version / manifest.FILE).write_text(record.to_json(), encoding="utf-8")
    made = client.create_model_version(name, source=str(version))
    assert int(made.version) == number
    return number
