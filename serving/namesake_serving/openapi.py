"""The gateway as an OpenAPI description, made from the tables and bounds that requests are checked by.

``docs/generate.py`` writes it into the guide; tests send what it allows and what it forbids.
"""

from __future__ import annotations

from typing import Any

from namesake_serving import requests
from namesake_serving.requests import CHAT, FEEDBACK, FIELDS, NUMBERS, RESPONSES, SWITCHES, TEXT, WHOLE

Schema = dict[str, Any]

ERRORS = {
    400: "What is wrong with the request; `param` names the field.",
    401: "The API key is missing or wrong.",
    404: "There is no such path, no such model, or no such trace.",
    405: "Another method than the path takes.",
    408: "The body did not arrive in time.",
    413: "The body is too long.",
    415: "The body is no application/json.",
    429: "The key's limit is reached, or the queue is full; `retry-after` says when to try again.",
    500: "The gateway failed.",
    503: "No version can answer at the moment; `retry-after` says when to try again.",
}
_ANY: Schema = {}
_NULL: Schema = {"type": "null"}
_NAME: Schema = {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,64}$"}
_TEXT: Schema = {"type": "string", "maxLength": requests.MAX_TEXT_CHARACTERS}
_ERROR: Schema = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "integer", "null"]},
            },
        }
    },
}


def describe(summaries: dict[str, str], routes: dict[str, list[str]], open_to_all: set[str], max_tokens: int) -> Schema:
    """The description.

    Args:
        summaries: what each path answers.
        routes: methods by path.
        open_to_all: paths that need no key.
        max_tokens: the setting of that name.
    """
    return {
        "openapi": "3.1.0",
        "info": {"title": "Namesake", "version": "1", "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"}},
        "components": {
            "schemas": {"Error": _ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "paths": {
            path: {
                method.lower(): {
                    "summary": summaries[path],
                    **({} if path in open_to_all else {"security": [{"key": []}]}),
                    **({"requestBody": _body(path, max_tokens)} if path in FIELDS else {}),
                    **({"requestBody": _needed(_feedback())} if path == FEEDBACK else {}),
                    "responses": _responses(path),
                }
                for method in methods
            }
            for path, methods in routes.items()
        },
    }


def _body(path: str, max_tokens: int) -> Schema:
    needed = {CHAT: "messages", TEXT: "prompt", RESPONSES: "input"}[path]
    properties = {name: _field(path, name, max_tokens) for name in sorted(FIELDS[path])}
    schema = {"type": "object", "required": [needed], "additionalProperties": False, "properties": properties}
    return _needed(schema)


def _needed(schema: Schema) -> Schema:
    return {"required": True, "content": {"application/json": {"schema": schema}}}


def _feedback() -> Schema:
    most, number = requests.MAX_FEEDBACK_CHARACTERS, requests.MAX_FEEDBACK_NUMBER
    value = [
        {"type": "boolean"},
        {"type": "number", "minimum": -number, "maximum": number},
        {"type": "string", "minLength": 1, "maxLength": most},
    ]
    common = {
        "value": {"anyOf": value},
        "name": _or_null(_NAME),
        "rationale": _or_null({"type": "string", "maxLength": most}),
    }
    ids = {
        "trace_id": "As `x-namesake-trace` gave it.",
        "request_id": "As `x-request-id` gave it, instead.",
    }
    return {
        "oneOf": [
            _closed(
                {
                    name: {"type": "string", "pattern": f"^{prefix}-[0-9a-f]{{32}}$", "description": ids[name]},
                    **common,
                },
                name,
                "value",
            )
            for name, prefix in (("trace_id", "tr"), ("request_id", "req"))
        ]
    }


def _field(path: str, name: str, max_tokens: int) -> Schema:
    if path == TEXT and name == "logprobs":
        return {"type": ["integer", "null"], "minimum": 0, "maximum": requests.MAX_TOP_LOGPROBS}
    if name in WHOLE:
        least, most = WHOLE[name]
        return {"type": ["integer", "null"], "minimum": least, "maximum": max_tokens if most is None else most}
    if name in NUMBERS:
        low, high = NUMBERS[name]
        least_key = "exclusiveMinimum" if name == "top_p" else "minimum"
        return {"type": ["number", "null"], least_key: low, "maximum": high}
    if name in SWITCHES or name == "logprobs":
        return {"type": ["boolean", "null"]}
    if name in requests.DROPPED:
        return {"description": "Taken and not handed on."}
    made = {
        "model": {"type": ["string", "null"]},
        "stop": _or_null(_stop(), _list(_stop(), requests.MAX_STOPS, least=0)),
        "logit_bias": _or_null(_bias()),
        "stream_options": _or_null(_stream_options()),
        "messages": _list(_message(), requests.MAX_MESSAGES),
        "prompt": {"anyOf": [_some(), _list(_some(), requests.MAX_CHOICES), _list(_token(), None)]},
        "input": {"anyOf": [_TEXT, _list(_item(), requests.MAX_MESSAGES)]},
        "instructions": _or_null(_TEXT),
        "response_format": _or_null(*_formats("json_schema")),
        "text": _or_null(_closed({"format": _or_null(*_formats(None)), "verbosity": _ANY})),
        "tools": _or_null(_list(_tool(path), requests.MAX_TOOLS, least=0)),
        "tool_choice": _or_null({"enum": ["none", "auto", "required"]}, _choice(path)),
    }
    return made[name]


def _closed(properties: Schema, *needed: str) -> Schema:
    return {"type": "object", "additionalProperties": False, "properties": properties, "required": [*needed]}


def _list(of: Schema, most: int | None, *, least: int = 1) -> Schema:
    return {"type": "array", "items": of, "minItems": least, **({"maxItems": most} if most else {})}


def _or_null(*schemas: Schema) -> Schema:
    return {"anyOf": [*schemas, _NULL]}


def _some() -> Schema:
    return {**_TEXT, "minLength": 1}


def _token() -> Schema:
    return {"type": "integer", "minimum": 0}


def _stop() -> Schema:
    return {"type": "string", "minLength": 1, "maxLength": requests.MAX_STOP_CHARACTERS}


def _bias() -> Schema:
    return {
        "type": "object",
        "maxProperties": requests.MAX_LOGIT_BIAS,
        "additionalProperties": False,
        "patternProperties": {"^[0-9]{1,9}$": {"type": "number", "minimum": -100, "maximum": 100}},
    }


def _stream_options() -> Schema:
    names = ("include_usage", "continuous_usage_stats", "include_obfuscation")
    return {**_closed({name: {"type": "boolean"} for name in names}), "description": "Only with `stream`."}


def _content(*types: str, more: tuple[str, ...] = ()) -> Schema:
    part = _closed({"type": {"enum": [*types]}, "text": _TEXT, **dict.fromkeys(more, _ANY)}, "type", "text")
    return {"anyOf": [_TEXT, _list(part, None)]}


def _message() -> Schema:
    text, content = {"type": ["string", "null"]}, _content("text")
    string: Schema = {"type": "string"}
    function = _closed({"name": string, "arguments": string}, "name", "arguments")
    call = {"id": string, "index": _ANY, "type": {"const": "function"}, "function": function}
    calls = _or_null(_list(_closed(call, "id", "type", "function"), requests.MAX_TOOLS, least=0))
    fields = {"name": text, "tool_call_id": text, "refusal": text, "tool_calls": calls}
    others = {"enum": sorted(requests.ROLES - {"assistant"})}
    assistant = {**fields, "role": {"const": "assistant"}, "content": {"anyOf": [*content["anyOf"], _NULL]}}
    return {
        "anyOf": [
            _closed({**fields, "role": others, "content": content}, "role", "content"),
            _closed(assistant, "role"),
        ]
    }


def _item() -> Schema:
    text: Schema = {"type": "string"}
    kept = {"id": text, "status": text}
    content = _content("input_text", "output_text", more=("annotations", "logprobs"))
    role = {"enum": sorted(requests.INPUT_ROLES)}
    return {
        "anyOf": [
            _closed({**kept, "type": {"const": "message"}, "role": role, "content": content}, "role", "content"),
            *(
                _closed(
                    {**kept, "type": {"const": kind}, **dict.fromkeys(sorted(needed), text)}, "type", *sorted(needed)
                )
                for kind, needed in requests.TOOL_ITEMS.items()
            ),
        ]
    }


def _schema() -> Schema:
    return {
        "type": "object",
        "description": f"A JSON schema: at most {requests.MAX_SCHEMA_DEPTH} deep, patterns of at most "
        f"{requests.MAX_PATTERN_CHARACTERS} characters, counts up to {requests.MAX_SCHEMA_COUNT}.",
    }


def _formats(within: str | None) -> list[Schema]:
    held = {
        "name": _NAME,
        "schema": _schema(),
        "description": {"type": ["string", "null"]},
        "strict": {"type": ["boolean", "null"]},
    }
    kind = {"type": {"const": "json_schema"}}
    return [
        _closed({"type": {"enum": ["text", "json_object"]}}, "type"),
        _closed({**kind, within: _closed(held, "name", "schema")}, "type", within)
        if within
        else _closed({**kind, **held}, "type", "name", "schema"),
    ]


def _tool(path: str) -> Schema:
    function = {
        "name": _NAME,
        "description": {"type": ["string", "null"]},
        "parameters": _or_null(_schema()),
        "strict": {"type": ["boolean", "null"]},
    }
    kind = {"type": {"const": "function"}}
    if path == CHAT:
        return _closed({**kind, "function": _closed(function, "name")}, "type", "function")
    return _closed({**kind, **function}, "type", "name")


def _choice(path: str) -> Schema:
    kind = {"type": {"const": "function"}}
    named = {**kind, "function": _closed({"name": _NAME}, "name")} if path == CHAT else {**kind, "name": _NAME}
    return {**_closed(named, *named), "description": "One of `tools`."}


def _responses(path: str) -> Schema:
    kinds = {
        "/metrics": "text/plain",
        "/": "text/html",
        "/chat.css": "text/css",
        "/chat.js": "text/javascript",
        "/favicon.svg": "image/svg+xml",
    }
    content: Schema = {kinds.get(path, "application/json"): {}}
    if path in FIELDS:
        content["text/event-stream"] = {}
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {
        "200": {"description": "The answer.", "content": content},
        **({"304": {"description": "The client has it already."}} if path in kinds and path != "/metrics" else {}),
        **{str(status): {"description": text, "content": error} for status, text in ERRORS.items()},
    }
