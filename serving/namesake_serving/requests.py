"""What a client may send: bounds and an allow-list of fields, before anything reaches the engine. Pure."""

from __future__ import annotations

import json
import math
from typing import Any

MAX_MESSAGES = 256
MAX_CHOICES = 8
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_LOGIT_BIAS = 300
MAX_TOP_LOGPROBS = 20
MAX_SCHEMA_CHARACTERS = 16_384
MAX_DEPTH = 32

ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})

_BOTH = frozenset(
    [
        "model",
        "stream",
        "stream_options",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "max_tokens",
        "n",
        "stop",
        "seed",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "logit_bias",
        "logprobs",
        "user",
        "metadata",
    ]
)
FIELDS = {
    "/v1/chat/completions": _BOTH
    | frozenset(
        [
            "messages",
            "max_completion_tokens",
            "top_logprobs",
            "response_format",
            "tools",
            "tool_choice",
            "parallel_tool_calls",
            "reasoning_effort",
            "store",
            "service_tier",
        ]
    ),
    "/v1/completions": _BOTH | frozenset(["prompt", "echo", "suffix", "best_of"]),
}
"""The fields that each route takes. All others are refused: a client's own chat template, prompt embeddings, media
and whatever vLLM may learn to read tomorrow.
"""

_DROPPED = frozenset({"store", "service_tier", "metadata", "user", "reasoning_effort"})
"""OpenAI's bookkeeping: taken, and not handed on."""


class BadRequest(Exception):
    """The request is refused with 400 in OpenAI's shape; ``param`` names the field."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.message, self.param = message, param


def parse(raw: bytes) -> dict[str, Any]:
    """The body as a JSON object.

    Raises:
        BadRequest: it is none, or nested too deeply.
    """
    try:
        body = json.loads(raw, parse_constant=_no_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise BadRequest("The body is no JSON.") from error
    if not isinstance(body, dict):
        raise BadRequest("The body is no JSON object.")
    if _depth(body) > MAX_DEPTH:
        raise BadRequest(f"The body is nested more than {MAX_DEPTH} deep.")
    return body


def check(route: str, body: dict[str, Any], *, max_tokens: int, system: str | None) -> dict[str, Any]:
    """The body as the engine may have it: bounded, and with the version's system prompt where the client has none.

    Raises:
        BadRequest: the first thing wrong with it.
    """
    for key in body:
        if key not in FIELDS[route]:
            raise BadRequest(f"Unrecognized request argument: {key[:100]}", key[:100])
    for key, least, most in (
        ("max_tokens", 1, max_tokens),
        ("max_completion_tokens", 1, max_tokens),
        ("n", 1, MAX_CHOICES),
        ("best_of", 1, MAX_CHOICES),
        ("top_logprobs", 0, MAX_TOP_LOGPROBS),
        ("top_k", -1, 1 << 20),
        ("seed", -(1 << 63), (1 << 63) - 1),
    ):
        value = body.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most):
            raise BadRequest(f"{key} must be a whole number from {least} to {most}.", key)
    for key, low, high in (
        ("temperature", 0, 2),
        ("top_p", 0, 1),
        ("min_p", 0, 1),
        ("presence_penalty", -2, 2),
        ("frequency_penalty", -2, 2),
        ("repetition_penalty", 0.01, 10),
    ):
        value = body.get(key)
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high
        ):
            raise BadRequest(f"{key} must be a number from {low} to {high}.", key)
    if body.get("top_p") == 0:
        raise BadRequest("top_p must be more than 0.", "top_p")
    for key in ("stream", "echo", "parallel_tool_calls"):
        if not isinstance(body.get(key, False), bool | None):
            raise BadRequest(f"{key} must be true or false.", key)
    _stops(body.get("stop"))
    _bias(body.get("logit_bias"))
    _stream_options(body)
    logprobs = body.get("logprobs")
    if route == "/v1/completions":
        if logprobs is not None and (
            isinstance(logprobs, bool) or not isinstance(logprobs, int) or not 0 <= logprobs <= MAX_TOP_LOGPROBS
        ):
            raise BadRequest(f"logprobs must be a whole number from 0 to {MAX_TOP_LOGPROBS}.", "logprobs")
    elif not isinstance(logprobs, bool | None):
        raise BadRequest("logprobs must be true or false.", "logprobs")
    if body.get("top_logprobs") is not None and not logprobs:
        raise BadRequest("top_logprobs needs logprobs to be true.", "top_logprobs")
    for key in ("response_format", "tools", "tool_choice"):
        value = body.get(key)
        if value is not None:
            if not isinstance(value, dict | list | str) or (key == "tools" and not isinstance(value, list)):
                raise BadRequest(f"{key} has the wrong type.", key)
            if len(json.dumps(value)) > MAX_SCHEMA_CHARACTERS:
                raise BadRequest(f"{key} is longer than {MAX_SCHEMA_CHARACTERS} characters.", key)
    kept = {key: value for key, value in body.items() if key not in _DROPPED and value is not None}
    if route == "/v1/chat/completions":
        kept["messages"] = _messages(body.get("messages"), system)
    else:
        _prompt(body.get("prompt"))
    return kept


def _messages(messages: Any, system: str | None) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not 1 <= len(messages) <= MAX_MESSAGES:
        raise BadRequest(f"messages must be a list of 1 to {MAX_MESSAGES} messages.", "messages")
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, dict) or str(message.get("role")) not in ROLES:
            raise BadRequest(f"{where} needs a role, one of {', '.join(sorted(ROLES))}.", f"{where}.role")
        _fields(message, where)
        content = message.get("content")
        if isinstance(content, list):
            if not content or not all(
                isinstance(part, dict)
                and set(part) == {"type", "text"}
                and part["type"] == "text"
                and isinstance(part["text"], str)
                for part in content
            ):
                raise BadRequest(f"{where}.content may only have parts of type text.", f"{where}.content")
        elif not (isinstance(content, str) or (content is None and message["role"] == "assistant")):
            raise BadRequest(f"{where}.content must be a text.", f"{where}.content")
    if system is not None and not any(message["role"] in {"system", "developer"} for message in messages):
        return [{"role": "system", "content": system}, *messages]
    return messages


def _fields(message: dict[str, Any], where: str) -> None:
    for key, value in message.items():
        if key in {"role", "content"} or value is None:
            continue
        if key == "tool_calls":
            right = isinstance(value, list) and all(isinstance(call, dict) for call in value)
        else:
            right = key in {"name", "tool_call_id", "refusal"} and isinstance(value, str)
        if not right:
            raise BadRequest(f"{where}.{key[:100]} is unknown or of the wrong type.", f"{where}.{key[:100]}")


def _prompt(prompt: Any) -> None:
    tokens = isinstance(prompt, list) and all(isinstance(p, int) and not isinstance(p, bool) and p >= 0 for p in prompt)
    texts = isinstance(prompt, list) and all(isinstance(p, str) and p for p in prompt) and len(prompt) <= MAX_CHOICES
    if not (isinstance(prompt, str) or tokens or texts) or not prompt:
        raise BadRequest(f"prompt must be a text, up to {MAX_CHOICES} texts, or a list of token ids.", "prompt")


def _stops(stop: Any) -> None:
    stops = [stop] if isinstance(stop, str) else stop
    if stops is None:
        return
    if (
        not isinstance(stops, list)
        or len(stops) > MAX_STOPS
        or not all(isinstance(s, str) and 0 < len(s) <= MAX_STOP_CHARACTERS for s in stops)
    ):
        raise BadRequest(
            f"stop must be a text or up to {MAX_STOPS} of them, each of 1 to {MAX_STOP_CHARACTERS} characters.", "stop"
        )


def _bias(bias: Any) -> None:
    if bias is None:
        return
    if (
        not isinstance(bias, dict)
        or len(bias) > MAX_LOGIT_BIAS
        or not all(
            key.isascii()
            and key.isdigit()
            and len(key) <= 9
            and isinstance(value, int | float)
            and not isinstance(value, bool)
            and -100 <= value <= 100
            for key, value in bias.items()
        )
    ):
        raise BadRequest(f"logit_bias must map up to {MAX_LOGIT_BIAS} token ids to -100..100.", "logit_bias")


def _stream_options(body: dict[str, Any]) -> None:
    options = body.get("stream_options")
    if options is None:
        return
    if not body.get("stream"):
        raise BadRequest("stream_options needs stream to be true.", "stream_options")
    if not isinstance(options, dict) or not all(
        key in {"include_usage", "continuous_usage_stats", "include_obfuscation"} and isinstance(value, bool)
        for key, value in options.items()
    ):
        raise BadRequest("stream_options takes include_usage.", "stream_options")
    options.pop("include_obfuscation", None)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is too great")
    return number


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _depth(value: object) -> int:
    deepest, level = 0, [value]
    while level:
        deepest += 1
        if deepest > MAX_DEPTH:
            break
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer if isinstance(outer, list) else ())
        ]
    return deepest
