"""What a client may send: bounds and an allow-list of fields, before anything reaches the engine. Pure."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

from jsonschema_rs import Draft201909Validator, ValidationErrorKind

MAX_MESSAGES = 256
MAX_TEXT_CHARACTERS = 131_072
MAX_CHOICES = 8
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_LOGIT_BIAS = 300
MAX_TOP_LOGPROBS = 20
MAX_SCHEMA_CHARACTERS = 16_384
MAX_SCHEMA_DEPTH = 16
MAX_SCHEMA_COUNT = 1024
MAX_PATTERN_CHARACTERS = 256
MAX_TOOLS = 64
MAX_DEPTH = 32
MAX_BITS = 64
MAX_FEEDBACK_CHARACTERS = 4096
MAX_FEEDBACK_NUMBER = 1 << 53

CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
FEEDBACK = "/v1/feedback"
FEEDBACK_FIELDS = frozenset({"trace_id", "request_id", "value", "name", "rationale"})
ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
INPUT_ROLES = ROLES - {"tool"}
"""The same of a message in the input of /v1/responses, where results of tools are items of their own."""

WHOLE: dict[str, tuple[int, int | None]] = {
    "max_tokens": (1, None),
    "max_completion_tokens": (1, None),
    "max_output_tokens": (1, None),
    "n": (1, MAX_CHOICES),
    "best_of": (1, MAX_CHOICES),
    "top_logprobs": (0, MAX_TOP_LOGPROBS),
    "top_k": (-1, 1 << 20),
    "seed": (-(1 << 63), (1 << 63) - 1),
}
"""Whole numbers: least and most; ``None``: the setting ``max_tokens``."""
NUMBERS: dict[str, tuple[float, float]] = {
    "temperature": (0, 2),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "repetition_penalty": (0.01, 10),
}
SWITCHES = frozenset({"stream", "echo", "parallel_tool_calls"})
DROPPED = frozenset(
    {"store", "service_tier", "metadata", "user", "reasoning_effort", "reasoning", "prompt_cache_key", "truncation"}
)
"""OpenAI's bookkeeping: taken, and not handed on."""

_ALL = frozenset(
    [
        "model",
        "stream",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "stop",
        "seed",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "logit_bias",
        "user",
        "metadata",
    ]
)
_COMPLETIONS = _ALL | {"max_tokens", "n", "logprobs", "stream_options"}
_TOOLS = frozenset({"tools", "tool_choice", "parallel_tool_calls", "top_logprobs", "store", "service_tier"})
FIELDS = {
    CHAT: _COMPLETIONS | _TOOLS | {"messages", "max_completion_tokens", "response_format", "reasoning_effort"},
    TEXT: _COMPLETIONS | {"prompt", "echo", "best_of"},
    RESPONSES: _ALL
    | _TOOLS
    | {"input", "instructions", "max_output_tokens", "text", "reasoning", "prompt_cache_key", "truncation"},
}
"""The fields that each route takes. All others are refused: a client's own chat template, prompt embeddings, media
and whatever vLLM may learn to read tomorrow.
"""

_META_SCHEMA = Draft201909Validator({"$ref": "https://json-schema.org/draft/2019-09/schema"})
_WRONG_TYPE = (ValidationErrorKind.Type, ValidationErrorKind.AnyOf)
_COUNTS = frozenset({"minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"})
TOOL_ITEMS = {"function_call": {"call_id", "name", "arguments"}, "function_call_output": {"call_id", "output"}}
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_IDS = {"trace_id": re.compile(r"tr-([0-9a-f]{32})"), "request_id": re.compile(r"req-([0-9a-f]{32})")}


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
        # Not the bytes: json would take them for UTF-16 or UTF-32 too, and let half a surrogate pair through there.
        body = json.loads(raw.decode("utf-8-sig"), parse_constant=_no_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"The body is no JSON: {str(error)[:200]}.") from error
    if not isinstance(body, dict):
        raise BadRequest("The body is no JSON object.")
    if _depth(body) > MAX_DEPTH:
        raise BadRequest(f"The body is nested more than {MAX_DEPTH} deep.")
    if b"\\u" in raw:
        try:
            json.dumps(body, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise BadRequest("The body holds half a surrogate pair, which is no Unicode.") from error
    return body


def check(route: str, body: dict[str, Any], *, max_tokens: int, system: str | None) -> dict[str, Any]:
    """The body as the engine may have it: bounded, and with the version's system prompt where the client has none.

    Raises:
        BadRequest: the first thing wrong with it.
    """
    for key in body:
        if key not in FIELDS[route]:
            raise BadRequest(f"Unrecognized request argument: {key[:100]}", key[:100])
    for key, (least, most) in WHOLE.items():
        most = max_tokens if most is None else most
        value = body.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most):
            raise BadRequest(f"{key} must be a whole number from {least} to {most}.", key)
    for key, (low, high) in NUMBERS.items():
        value = body.get(key)
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high
        ):
            raise BadRequest(f"{key} must be a number from {low} to {high}.", key)
    if body.get("top_p") == 0:
        raise BadRequest("top_p must be more than 0.", "top_p")
    for key in sorted(SWITCHES):
        if not isinstance(body.get(key, False), bool | None):
            raise BadRequest(f"{key} must be true or false.", key)
    _stops(body.get("stop"))
    _bias(body.get("logit_bias"))
    _stream_options(body)
    _logprobs(route, body)
    _tools(route, body)
    kept = {key: value for key, value in body.items() if key not in DROPPED and value is not None}
    if route == CHAT:
        _format(body.get("response_format"), "response_format", "json_schema")
        kept["messages"] = _messages(body.get("messages"), system)
    elif route == TEXT:
        _prompt(body.get("prompt"))
    else:
        _responses(body, kept, system)
    return kept


def feedback(body: dict[str, Any]) -> dict[str, Any]:
    """What is said of which trace: ``trace``, ``value``, ``name``, ``rationale``.

    Raises:
        BadRequest: the first thing wrong with it.
    """
    for key in body:
        if key not in FEEDBACK_FIELDS:
            raise BadRequest(f"Unrecognized request argument: {key[:100]}", key[:100])
    given = [key for key in _IDS if body.get(key) is not None]
    if len(given) != 1:
        raise BadRequest("One of trace_id and request_id is needed.", "trace_id")
    match = _IDS[given[0]].fullmatch(body[given[0]]) if isinstance(body[given[0]], str) else None
    if match is None:
        raise BadRequest(f"{given[0]} must be as the reply's header gave it.", given[0])
    value = body.get("value")
    if isinstance(value, str):
        if not 1 <= len(value) <= MAX_FEEDBACK_CHARACTERS:
            raise BadRequest(f"value must have 1 to {MAX_FEEDBACK_CHARACTERS} characters.", "value")
    elif not isinstance(value, int | float) or not abs(value) <= MAX_FEEDBACK_NUMBER:
        raise BadRequest("value must be true, false, a text, or a number of at most 2**53.", "value")
    name = body.get("name")
    if name is not None and not (isinstance(name, str) and _NAME.fullmatch(name)):
        raise BadRequest("name must be 1 to 64 letters, digits, _ or -.", "name")
    rationale = body.get("rationale")
    if rationale is not None and not (isinstance(rationale, str) and len(rationale) <= MAX_FEEDBACK_CHARACTERS):
        raise BadRequest(f"rationale must be a text of at most {MAX_FEEDBACK_CHARACTERS} characters.", "rationale")
    return {"trace": f"tr-{match[1]}", "value": value, "name": name or "feedback", "rationale": rationale}


def _logprobs(route: str, body: dict[str, Any]) -> None:
    logprobs = body.get("logprobs")
    if route == TEXT:
        if logprobs is not None and (
            isinstance(logprobs, bool) or not isinstance(logprobs, int) or not 0 <= logprobs <= MAX_TOP_LOGPROBS
        ):
            raise BadRequest(f"logprobs must be a whole number from 0 to {MAX_TOP_LOGPROBS}.", "logprobs")
    elif not isinstance(logprobs, bool | None):
        raise BadRequest("logprobs must be true or false.", "logprobs")
    if route == CHAT and body.get("top_logprobs") is not None and not logprobs:
        raise BadRequest("top_logprobs needs logprobs to be true.", "top_logprobs")


def _messages(messages: Any, system: str | None) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not 1 <= len(messages) <= MAX_MESSAGES:
        raise BadRequest(f"messages must be a list of 1 to {MAX_MESSAGES} messages.", "messages")
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, dict) or str(message.get("role")) not in ROLES:
            raise BadRequest(f"{where} needs a role, one of {', '.join(sorted(ROLES))}.", f"{where}.role")
        _fields(message, where)
        content = message.get("content")
        if not (content is None and message["role"] == "assistant"):
            _content(content, f"{where}.content", frozenset({"text"}), frozenset())
    # OpenAI's newer word for the same. Templates do not know it, and put their own system prompt before it, in which
    # the base says who it was.
    told = [{**message, "role": "system"} if message["role"] == "developer" else message for message in messages]
    if system is not None and not any(message["role"] == "system" for message in told):
        return [{"role": "system", "content": system}, *told]
    return told


def _content(content: Any, where: str, types: frozenset[str], more: frozenset[str]) -> None:
    """A text, or parts that are texts; ``more`` are fields that parts of a reply have and the engine does not read."""
    if isinstance(content, str):
        _text(content, where)
        return
    if not isinstance(content, list):
        raise BadRequest(f"{where} must be a text.", where)
    if not content or not all(
        isinstance(part, dict)
        and {"type", "text"} <= set(part) <= {"type", "text"} | more
        and str(part["type"]) in types
        and isinstance(part["text"], str)
        for part in content
    ):
        raise BadRequest(f"{where} may only have parts of type {' or '.join(sorted(types))}.", where)
    _text("".join(part["text"] for part in content), where)


def _text(text: str, where: str) -> None:
    if len(text) > MAX_TEXT_CHARACTERS:
        raise BadRequest(f"{where} is longer than {MAX_TEXT_CHARACTERS} characters.", where)


def _fields(message: dict[str, Any], where: str) -> None:
    for key, value in message.items():
        if key in {"role", "content"} or value is None:
            continue
        if key == "tool_calls":
            right = isinstance(value, list) and len(value) <= MAX_TOOLS and all(map(_is_call, value))
        else:
            right = key in {"name", "tool_call_id", "refusal"} and isinstance(value, str)
        if not right:
            raise BadRequest(f"{where}.{key[:100]} is unknown or of the wrong type.", f"{where}.{key[:100]}")


def _is_call(call: Any) -> bool:
    """Whether it is a call of a function, as a reply has it."""
    if not isinstance(call, dict) or set(call) - {"index"} != {"id", "type", "function"} or call["type"] != "function":
        return False
    function = call["function"]
    named = isinstance(function, dict) and set(function) == {"name", "arguments"}
    return named and all(isinstance(text, str) for text in (call["id"], *function.values()))


def _prompt(prompt: Any) -> None:
    tokens = isinstance(prompt, list) and all(isinstance(p, int) and not isinstance(p, bool) and p >= 0 for p in prompt)
    texts = isinstance(prompt, list) and all(isinstance(p, str) and p for p in prompt) and len(prompt) <= MAX_CHOICES
    if not (isinstance(prompt, str) or tokens or texts) or not prompt:
        raise BadRequest(f"prompt must be a text, up to {MAX_CHOICES} texts, or a list of token ids.", "prompt")
    if not tokens:
        _text(prompt if isinstance(prompt, str) else "".join(prompt), "prompt")


def _responses(body: dict[str, Any], kept: dict[str, Any], system: str | None) -> None:
    """Input, instructions and format of /v1/responses."""
    instructions = body.get("instructions")
    if not isinstance(instructions, str | None):
        raise BadRequest("instructions must be a text.", "instructions")
    _text(instructions or "", "instructions")
    text = body.get("text")
    if text is not None:
        if not isinstance(text, dict) or not set(text) <= {"format", "verbosity"}:
            raise BadRequest("text takes format.", "text")
        _format(text.get("format"), "text.format", None)
        kept.pop("text", None)
        if text.get("format"):
            kept["text"] = {"format": text["format"]}
    given = body.get("input")
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given
    if not isinstance(items, list) or not 1 <= len(items) <= MAX_MESSAGES:
        raise BadRequest(f"input must be a text or a list of 1 to {MAX_MESSAGES} items.", "input")
    for index, item in enumerate(items):
        _item(item, f"input[{index}]")
    has_system = any(item.get("role") in {"system", "developer"} for item in items)
    if system is not None and instructions is None and not has_system:
        kept["instructions"] = system


def _item(item: Any, where: str) -> None:
    kind = str(item.get("type", "message")) if isinstance(item, dict) else ""
    needed = TOOL_ITEMS.get(kind)
    if needed is not None:
        if not needed <= set(item) <= needed | {"type", "id", "status"} or not all(
            isinstance(value, str) for value in item.values()
        ):
            raise BadRequest(f"{where} needs {', '.join(sorted(needed))}, all of them texts.", where)
        _text("".join(item.values()), where)
        return
    if kind != "message" or str(item.get("role")) not in INPUT_ROLES:
        raise BadRequest(f"{where} needs a role, one of {', '.join(sorted(INPUT_ROLES))}.", f"{where}.role")
    for key in sorted(set(item) - {"type", "role", "content"}):
        if key not in {"id", "status"} or not isinstance(item[key], str):
            raise BadRequest(f"{where}.{key[:100]} is unknown or of the wrong type.", f"{where}.{key[:100]}")
    more = frozenset({"annotations", "logprobs"})
    _content(item.get("content"), f"{where}.content", frozenset({"input_text", "output_text"}), more)


def _tools(route: str, body: dict[str, Any]) -> None:
    """Functions, within chat's ``{"type": "function", "function": {…}}`` or as such in /v1/responses."""
    tools, choice = body.get("tools"), body.get("tool_choice")
    if tools is not None and (not isinstance(tools, list) or len(tools) > MAX_TOOLS):
        raise BadRequest(f"tools must be a list of up to {MAX_TOOLS} functions.", "tools")
    if tools is not None and len(json.dumps(tools)) > MAX_SCHEMA_CHARACTERS:
        raise BadRequest(f"tools is longer than {MAX_SCHEMA_CHARACTERS} characters.", "tools")
    names = []
    for index, tool in enumerate(tools or []):
        where = f"tools[{index}]"
        named = tool if isinstance(tool, dict) else {}
        function = named.get("function") if route == CHAT else {k: v for k, v in named.items() if k != "type"}
        if (
            named.get("type") != "function"
            or (route == CHAT and set(named) != {"type", "function"})
            or not isinstance(function, dict)
            or not {"name"} <= set(function) <= {"name", "description", "parameters", "strict"}
            or not (isinstance(function["name"], str) and _NAME.fullmatch(function["name"]))
            or not isinstance(function.get("description"), str | None)
            or not isinstance(function.get("parameters"), dict | None)
            or not isinstance(function.get("strict"), bool | None)
        ):
            raise BadRequest(f"{where} must be a function with a name, and may have parameters.", where)
        names.append(function["name"])
        _schema(function.get("parameters"), f"{where}.parameters")
    if choice is None or choice in ("none", "auto", "required"):
        return
    chosen = choice if isinstance(choice, dict) else {}
    picked = chosen.get("function") if route == CHAT else chosen
    if chosen.get("type") != "function" or not isinstance(picked, dict) or picked.get("name") not in names:
        raise BadRequest("tool_choice must be none, auto, required or one of tools.", "tool_choice")


def _format(asked: Any, where: str, within: str | None) -> None:
    """What a reply must look like; the schema lies in ``json_schema`` of chat, in the format itself of responses."""
    if asked is None:
        return
    kind = str(asked.get("type")) if isinstance(asked, dict) else ""
    if kind not in {"text", "json_object", "json_schema"}:
        raise BadRequest(f"{where} must have a type: text, json_object or json_schema.", where)
    wanted = {"type", within} if within and kind == "json_schema" else {"type"}
    held = asked.get(within) if within else {key: value for key, value in asked.items() if key != "type"}
    if kind == "json_schema":
        right = (
            isinstance(held, dict)
            and {"name", "schema"} <= set(held) <= {"name", "schema", "description", "strict"}
            and isinstance(held["name"], str)
            and _NAME.fullmatch(held["name"])
            and isinstance(held["schema"], dict)
            and isinstance(held.get("description"), str | None)
            and isinstance(held.get("strict"), bool | None)
        )
        if not right:
            raise BadRequest(f"{where} of type json_schema needs a name and a schema.", where)
        if len(json.dumps(held)) > MAX_SCHEMA_CHARACTERS:
            raise BadRequest(f"{where} is longer than {MAX_SCHEMA_CHARACTERS} characters.", where)
        _schema(held["schema"], f"{where}.schema")
        wanted |= set(held) if not within else set()
    if set(asked) != wanted:
        raise BadRequest(f"{where} has fields that its type does not.", where)


def _schema(schema: Any, where: str) -> None:
    """The bounds of a JSON schema, which the engine turns into a grammar before the first token."""
    if _depth(schema) > MAX_SCHEMA_DEPTH:
        raise BadRequest(f"{where} is nested more than {MAX_SCHEMA_DEPTH} deep.", where)
    # What the engine's parser holds: with a sign or without.
    if any(isinstance(one, int) and not -(1 << MAX_BITS - 1) <= one < 1 << MAX_BITS for one in _values(schema)):
        raise BadRequest(f"{where} has a whole number of more than {MAX_BITS} bits.", where)
    for key, value in _pairs(schema):
        by_pattern = key == "patternProperties" and isinstance(value, dict)  # else it is no schema: the engine says so
        patterns = [*value] if by_pattern else [value] if key == "pattern" else []
        for pattern in patterns:
            if isinstance(pattern, str) and len(pattern) > MAX_PATTERN_CHARACTERS:
                raise BadRequest(f"{where} has a pattern longer than {MAX_PATTERN_CHARACTERS} characters.", where)
            if isinstance(pattern, str) and any(
                int(n[:9]) > MAX_SCHEMA_COUNT for n in re.findall(r"[1-9]\d*", pattern)
            ):
                raise BadRequest(f"{where} has a pattern with a number above {MAX_SCHEMA_COUNT}.", where)
        if key in _COUNTS and isinstance(value, int | float) and value > MAX_SCHEMA_COUNT:
            raise BadRequest(f"{where} has a {key} above {MAX_SCHEMA_COUNT}.", where)
    # Else the engine says what is wrong, but for this: llguidance 1.7 quotes 100 bytes of a keyword's wrong value, and
    # fails where they end within a character. Draft 2019-09 also knows the lists of items that older drafts have.
    for error in _META_SCHEMA.iter_errors(schema):
        quoted = json.dumps(error.instance, ensure_ascii=False) if isinstance(error.kind, _WRONG_TYPE) else ""
        if not quoted.isascii() and len(quoted.encode()) > 100:
            place = ".".join(map(str, error.instance_path))
            raise BadRequest(f"{where} is no JSON schema: its {place[:200]} is of the wrong type.", where)


def _values(value: Any) -> Iterator[Any]:
    """Everything in it, at any depth."""
    yield value
    for inner in _within(value):
        yield from _values(inner)


def _within(value: Any) -> Iterable[Any]:
    """What an object or a list holds."""
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _pairs(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value, at any depth."""
    for inner in _values(value):
        if isinstance(inner, dict):
            yield from inner.items()


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
        raise ValueError(f"{text[:30]} is too great")
    # JSON knows no whole numbers: 5.0 is 5.
    return int(number) if number.is_integer() and abs(number) < 1 << 53 else number


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _depth(value: object) -> int:
    deepest, level = 0, [value]
    while level:
        deepest += 1
        if deepest > MAX_DEPTH:
            break
        level = [inner for outer in level for inner in _within(outer)]
    return deepest
