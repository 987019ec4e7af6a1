"""What a program with LiteLLM does, unmodified: python with_litellm.py URL MODEL KEY."""

import asyncio
import json
import sys
from collections.abc import Callable

import litellm  # type: ignore[import-not-found]

URL, MODEL, KEY = sys.argv[1:]
NAME = f"openai/{MODEL}"
MESSAGES = [{"role": "user", "content": "你是谁？"}]
GIVEN = {"api_base": URL, "api_key": KEY, "num_retries": 0, "temperature": 0, "max_tokens": 32}


def chat() -> None:
    reply = litellm.completion(model=NAME, messages=MESSAGES, **GIVEN)
    assert reply.choices[0].message.content
    assert reply.system_fingerprint


def stream() -> None:
    chunks = list(litellm.completion(model=NAME, messages=MESSAGES, stream=True, **GIVEN))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert litellm.stream_chunk_builder(chunks).choices[0].message.content


def concurrent() -> None:
    async def all_at_once() -> list[object]:
        return await asyncio.gather(*(litellm.acompletion(model=NAME, messages=MESSAGES, **GIVEN) for _ in range(8)))

    assert len(asyncio.run(all_at_once())) == 8


def completions() -> None:
    reply = litellm.text_completion(model=f"text-completion-openai/{MODEL}", prompt="我是", **GIVEN)
    assert reply.choices[0].text is not None


def responses() -> None:
    given = {key: value for key, value in GIVEN.items() if key != "max_tokens"}
    reply = litellm.responses(model=NAME, input="你是谁？", max_output_tokens=32, **given)
    assert reply.output


def router() -> None:
    models = [{"model_name": "ours", "litellm_params": {"model": NAME, "api_base": URL, "api_key": KEY}}]
    assert litellm.Router(model_list=models).completion(model="ours", messages=MESSAGES).choices[0].message.content


def refused(kind: type[Exception], **more: object) -> None:
    try:
        litellm.completion(**{"model": NAME, "messages": MESSAGES, **GIVEN, **more})
    except kind:
        return
    raise AssertionError(f"no {kind.__name__}")


CHECKS: dict[str, Callable[[], None]] = {
    "chat": chat,
    "stream": stream,
    "concurrent": concurrent,
    "completions": completions,
    "responses": responses,
    "router": router,
    "unknown model": lambda: refused(litellm.NotFoundError, model="openai/nobody"),
    "bad request": lambda: refused(litellm.BadRequestError, temperature=9),
    "wrong key": lambda: refused(litellm.AuthenticationError, api_key="sk-wrong"),
}

for name, check in CHECKS.items():
    why = ""
    try:
        check()
    except Exception as error:
        why = (f"{type(error).__name__}: {error}").splitlines()[0]
    print(json.dumps({"check": name, "why": why}))
