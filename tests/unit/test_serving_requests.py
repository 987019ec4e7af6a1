"""What a client may send: each bound from both sides, and whatever else there is in the world of JSON."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from namesake_serving import requests
from namesake_serving.requests import FIELDS, BadRequest, check, feedback, parse
from tests.anything import JSON, SCALAR, altered

CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
USER = {"role": "user", "content": "你是谁？"}
MOST_TOKENS = 4096
DROPPED = {"store", "service_tier", "metadata", "user", "reasoning_effort"}


def checked(body: dict[str, Any], route: str = CHAT, *, system: str | None = None) -> dict[str, Any]:
    """What the engine gets of the body, which has messages or a prompt if it does not bring its own."""
    least: dict[str, Any] = {CHAT: {"messages": [USER]}, TEXT: {"prompt": "你"}, RESPONSES: {"input": "你"}}[route]
    return check(route, {**least, **body}, max_tokens=MOST_TOKENS, system=system)


def fault(body: dict[str, Any], route: str = CHAT) -> str | None:
    """The field that a refused body is refused for."""
    with pytest.raises(BadRequest) as caught:
        checked(body, route)
    assert caught.value.message == str(caught.value) != ""
    return caught.value.param


def nested(levels: int) -> bytes:
    """A JSON object with lists in it, so many levels altogether."""
    return b'{"a": ' + b"[" * (levels - 1) + b"]" * (levels - 1) + b"}"


# ------------------------------------------------------------------------------------------------ the body as JSON


@pytest.mark.parametrize("raw", [b'{"model": "ccb"}', ' {"model": "踩踩背"}\n'.encode(), b"{}"])
def test_a_json_object_is_read(raw: bytes) -> None:
    assert parse(raw) == json.loads(raw)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b" ",
        b"{",
        b'{"a": }',
        b"{'a': 1}",
        b"{}{}",
        b'{"a": 1,}',
        b"\xff\xfe\xfd",
        b'{"a": "\xff"}',
        b"\x00",
        b"nul",
    ],
)
def test_what_is_no_json_is_refused(raw: bytes) -> None:
    with pytest.raises(BadRequest, match=r"The body is no JSON: .+\."):
        parse(raw)


@pytest.mark.parametrize("raw", [b"[]", b'"text"', b"1", b"null", b"true", b'[{"messages": []}]'])
def test_json_that_is_no_object_is_refused(raw: bytes) -> None:
    with pytest.raises(BadRequest, match=r"The body is no JSON object\."):
        parse(raw)


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity"])
def test_words_for_numbers_that_json_does_not_have_are_refused(word: str) -> None:
    with pytest.raises(BadRequest, match="no JSON"):
        parse(b'{"temperature": %s}' % word.encode())


def test_a_number_with_thousands_of_digits_is_refused_and_not_worked_on() -> None:
    with pytest.raises(BadRequest, match="no JSON"):
        parse(b'{"seed": ' + b"9" * 5000 + b"}")


@pytest.mark.parametrize("levels", [2, 31, 32])
def test_a_body_as_deep_as_allowed_is_read(levels: int) -> None:
    assert parse(nested(levels)) == json.loads(nested(levels))


@pytest.mark.parametrize("levels", [33, 34, 500, 100_000])
@pytest.mark.parametrize("opening", [b"[", b'{"a":'])
def test_a_body_that_is_deeper_is_refused_however_deep_it_is(levels: int, opening: bytes) -> None:
    closing = b"]" if opening == b"[" else b"}"
    inner = b"0" if opening != b"[" else b""
    with pytest.raises(BadRequest, match=r"nested more than 32 deep|no JSON"):
        parse(b'{"a":' + opening * (levels - 1) + inner + closing * (levels - 1) + b"}")


def test_a_body_that_is_wide_and_not_deep_is_read() -> None:
    assert len(parse(json.dumps({"prompt": list(range(100_000))}).encode())["prompt"]) == 100_000


# ------------------------------------------------------------------------------------------------ the fields

FORBIDDEN = [
    *("chat_template", "chat_template_kwargs", "prompt_embeds", "documents", "mm_processor_kwargs", "media_io_kwargs"),
    *(
        "guided_json",
        "guided_regex",
        "guided_choice",
        "guided_grammar",
        "structured_outputs",
        "guided_decoding_backend",
    ),
    *("add_generation_prompt", "continue_final_message", "kv_transfer_params", "vllm_xargs", "logits_processors"),
    *("priority", "request_id", "cache_salt", "ignore_eos", "min_tokens", "return_token_ids", "prompt_logprobs"),
    *("functions", "function_call", "use_beam_search", "stop_token_ids", "Model", "model ", "", "__class__", "信"),
]


@pytest.mark.parametrize("route", [CHAT, TEXT])
@pytest.mark.parametrize("key", FORBIDDEN)
def test_a_field_that_is_not_on_the_list_is_refused_by_its_name_whatever_its_value(route: str, key: str) -> None:
    for value in (None, False, 0, "", [], {}, "x", {"a": 1}):
        assert fault({key: value}, route) == key


@pytest.mark.parametrize(("route", "other"), [(CHAT, TEXT), (TEXT, CHAT)])
def test_a_field_of_the_other_route_is_refused(route: str, other: str) -> None:
    for key in FIELDS[other] - FIELDS[route]:
        assert fault({key: 1}, route) == key


def test_the_name_of_an_unknown_field_is_repeated_in_part_only() -> None:
    name = "x" * 10_000
    assert fault({name: 1}) == "x" * 100


@pytest.mark.parametrize("value", [None, 1, "text", {"a": "b"}, ["x"]])
@pytest.mark.parametrize("key", sorted(DROPPED - {"metadata", "user"}))
def test_openais_bookkeeping_is_taken_and_not_handed_on(key: str, value: object) -> None:
    assert checked({key: value}) == checked({})


@pytest.mark.parametrize("route", [CHAT, TEXT])
@pytest.mark.parametrize("key", ["metadata", "user"])
def test_who_asks_and_why_is_not_handed_on(key: str, route: str) -> None:
    assert checked({key: "me"}, route) == checked({}, route)


def test_what_is_null_is_as_if_it_were_not_there() -> None:
    null = dict.fromkeys(FIELDS[CHAT] - {"messages"})
    assert checked(null) == checked({})
    null = dict.fromkeys(FIELDS[TEXT] - {"prompt"})
    assert checked(null, TEXT) == checked({}, TEXT)


def test_what_is_allowed_is_handed_on_as_it_came() -> None:
    body = {
        "model": "ccb",
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": False},
        "temperature": 0,
        "top_p": 0.5,
        "top_k": 40,
        "min_p": 0.1,
        "max_tokens": 16,
        "max_completion_tokens": 16,
        "n": 2,
        "stop": ["\n", "。"],
        "seed": 7,
        "presence_penalty": -1,
        "frequency_penalty": 1.5,
        "repetition_penalty": 1.1,
        "logit_bias": {"15": -100, "16": 1.5},
        "logprobs": True,
        "top_logprobs": 5,
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}},
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "messages": [{"role": "system", "content": "Be brief."}, USER],
    }
    assert checked(body) == body


def test_what_the_client_sent_is_not_changed_but_for_the_padding_that_vllm_does_not_know() -> None:
    body = {"messages": [USER], "stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}}
    assert checked(body)["stream_options"] == {"include_usage": True}


# ------------------------------------------------------------------------------------------------ numbers

WHOLE = [
    *[(route, "max_tokens", 1, MOST_TOKENS) for route in (CHAT, TEXT)],
    (CHAT, "max_completion_tokens", 1, MOST_TOKENS),
    *[(route, "n", 1, 8) for route in (CHAT, TEXT)],
    (TEXT, "best_of", 1, 8),
    (CHAT, "top_k", -1, 1 << 20),
    (CHAT, "seed", -(1 << 63), (1 << 63) - 1),
    (TEXT, "logprobs", 0, 20),
]


@pytest.mark.parametrize(("route", "key", "least", "most"), WHOLE)
def test_whole_numbers_are_taken_up_to_their_bounds_and_not_beyond(route: str, key: str, least: int, most: int) -> None:
    for value in (least, least + 1, most - 1, most):
        assert checked({key: value}, route)[key] == value
    for value in (least - 1, most + 1, least - 10**30, most + 10**4000):
        assert fault({key: value}, route) == key


@pytest.mark.parametrize(("route", "key", "least", "most"), WHOLE)
@pytest.mark.parametrize("value", [1.0, 1.5, "1", True, False, [], [1], {}, 1e300, math.inf])
def test_what_is_no_whole_number_is_refused(route: str, key: str, least: int, most: int, value: object) -> None:
    assert fault({key: value}, route) == key


def test_the_most_tokens_are_those_of_the_settings() -> None:
    for most in (1, 10):
        assert check(TEXT, {"prompt": "x", "max_tokens": most}, max_tokens=most, system=None)["max_tokens"] == most
        with pytest.raises(BadRequest, match=f"from 1 to {most}"):
            check(TEXT, {"prompt": "x", "max_tokens": most + 1}, max_tokens=most, system=None)


REAL = [
    ("temperature", 0, 2),
    ("min_p", 0, 1),
    ("presence_penalty", -2, 2),
    ("frequency_penalty", -2, 2),
    ("repetition_penalty", 0.01, 10),
]


@pytest.mark.parametrize("route", [CHAT, TEXT])
@pytest.mark.parametrize(("key", "low", "high"), REAL)
def test_numbers_are_taken_up_to_their_bounds_and_not_beyond(route: str, key: str, low: float, high: float) -> None:
    for value in (low, high, (low + high) / 2, math.nextafter(low, high), math.nextafter(high, low), 1):
        assert checked({key: value}, route)[key] == value
    for value in (math.nextafter(low, -math.inf), math.nextafter(high, math.inf), -math.inf, math.inf, 10**400):
        assert fault({key: value}, route) == key


@pytest.mark.parametrize("key", [key for key, _, _ in REAL] + ["top_p"])
@pytest.mark.parametrize("value", ["1", True, False, [], [1], {}, math.nan])
def test_what_is_no_number_is_refused(key: str, value: object) -> None:
    assert fault({key: value}) == key


def test_top_p_is_more_than_0_and_1_at_most() -> None:
    for value in (math.nextafter(0, 1), 0.5, 1, 1.0):
        assert checked({"top_p": value})["top_p"] == value
    for value in (0, 0.0, -0.0, -1e-9, math.nextafter(1, 2)):
        assert fault({"top_p": value}) == "top_p"


@pytest.mark.parametrize("value", [-1, 21, 1.0, "5", True, []])
def test_top_logprobs_are_bounded(value: object) -> None:
    assert fault({"logprobs": True, "top_logprobs": value}) == "top_logprobs"


@pytest.mark.parametrize("value", [0, 1, 20])
def test_top_logprobs_need_logprobs(value: int) -> None:
    assert checked({"logprobs": True, "top_logprobs": value})["top_logprobs"] == value
    for logprobs in (False, None):
        assert fault({"logprobs": logprobs, "top_logprobs": value}) == "top_logprobs"


@pytest.mark.parametrize(
    ("route", "key"),
    [(CHAT, "stream"), (TEXT, "stream"), (TEXT, "echo"), (CHAT, "parallel_tool_calls"), (CHAT, "logprobs")],
)
@pytest.mark.parametrize("value", [0, 1, "true", "", [], {}, 1.0])
def test_what_is_true_or_false_is_nothing_else(route: str, key: str, value: object) -> None:
    assert fault({key: value}, route) == key
    for right in (True, False):
        assert checked({key: right}, route)[key] is right


# ------------------------------------------------------------------------------------------------ texts and lists


@pytest.mark.parametrize("stop", ["x", "x" * 256, [], ["x"], ["x" * 256] * 16])
def test_stops_within_bounds_are_taken(stop: object) -> None:
    assert checked({"stop": stop})["stop"] == stop


@pytest.mark.parametrize(
    "stop", ["", "x" * 257, [""], ["x" * 257], ["x"] * 17, [1], [None], [["x"]], {}, 1, True, {"x": 1}]
)
def test_stops_beyond_bounds_are_refused(stop: object) -> None:
    assert fault({"stop": stop}) == "stop"


@pytest.mark.parametrize(
    "bias", [{}, {"0": 100}, {"999999999": -100}, {"1": 0.5}, {str(token): 1 for token in range(300)}]
)
def test_biases_within_bounds_are_taken(bias: object) -> None:
    assert checked({"logit_bias": bias})["logit_bias"] == bias


@pytest.mark.parametrize(
    "bias",
    [
        {"1": math.nextafter(100, 101)},
        {"1": -101},
        {"1": math.inf},
        {"1": math.nan},
        {"1": True},
        {"1": "1"},
        {"1": None},
        {"1": [1]},
        {"1000000000": 1},
        {"-1": 1},
        {"": 1},
        {"a": 1},
        {"1.0": 1},
        {" 1": 1},
        {"１": 1},
        {"²": 1},
        {str(token): 1 for token in range(301)},
        [],
        [1],
        "1",
        1,
        True,
    ],
)
def test_biases_beyond_bounds_are_refused(bias: object) -> None:
    assert fault({"logit_bias": bias}) == "logit_bias"


@pytest.mark.parametrize("key", ["include_usage", "continuous_usage_stats", "include_obfuscation"])
def test_options_of_a_stream_need_a_stream(key: str) -> None:
    assert fault({"stream_options": {key: True}}) == "stream_options"
    assert fault({"stream": False, "stream_options": {key: True}}) == "stream_options"
    assert checked({"stream": True, "stream_options": {key: True}})["stream"] is True


@pytest.mark.parametrize("options", [[], "x", 1, True, {"x": True}, {"include_usage": 1}, {"include_usage": None}])
def test_other_options_of_a_stream_are_refused(options: object) -> None:
    assert fault({"stream": True, "stream_options": options}) == "stream_options"


def function(**more: object) -> dict[str, Any]:
    """A tool, as chat has it."""
    return {"type": "function", "function": {"name": "f", **more}}


def reply_of(schema: object, **more: object) -> dict[str, Any]:
    """A ``response_format`` with that schema."""
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, **more}}


def padded(make: Callable[[str], object], length: int) -> object:
    """What is so many characters long as JSON."""
    return make("a" * (length - len(json.dumps(make("")))))


@pytest.mark.parametrize(
    ("key", "make", "around"),
    [
        ("tools", lambda text: [function(description=text)], 0),
        ("response_format", lambda text: reply_of({}, description=text), len(json.dumps(reply_of({}))) - 27),
    ],
)
def test_schemas_are_bounded_in_length(key: str, make: Callable[[str], object], around: int) -> None:
    for length in (120, 16_384):
        body = {key: padded(make, length)}
        assert checked(body)[key] == body[key]
    assert fault({key: padded(make, 16_385 + 100)}) == key


BAD_SCHEMAS = [
    {"type": "string", "pattern": "a" * 257},
    {"type": "string", "pattern": "a{1,1025}"},
    {"type": "string", "pattern": "a{99999999999999999999}"},
    {"patternProperties": {"a{1025}": {}}},
    {"properties": {"a": {"anyOf": [{"pattern": "[a-z]{2000}"}]}}},
    {"const": 1 << 64},
    {"properties": {"a": {"enum": [-(1 << 63) - 1]}}},
    *({key: 1025} for key in ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")),
    {"items": {"maxItems": 1e9}},
    {"items": {"items": {"items": {"items": {"items": {"items": {"items": {"items": [[[[[[[[1]]]]]]]]}}}}}}}},
]


@pytest.mark.parametrize("schema", BAD_SCHEMAS, ids=lambda schema: json.dumps(schema)[:40])
def test_a_schema_that_makes_a_grammar_too_large_is_refused_wherever_it_stands(schema: dict[str, Any]) -> None:
    assert fault({"response_format": reply_of(schema)}) == "response_format.schema"
    assert fault({"tools": [function(parameters=schema)]}) == "tools[0].parameters"
    assert fault({"text": {"format": {"type": "json_schema", "name": "x", "schema": schema}}}, RESPONSES) == (
        "text.format.schema"
    )
    assert fault({"tools": [{"type": "function", "name": "f", "parameters": schema}]}, RESPONSES) == (
        "tools[0].parameters"
    )


@pytest.mark.parametrize("value", [["踩踩背" * 20], [{"x": "é" * 60}]], ids=["Chinese", "Latin"])
@pytest.mark.parametrize("key", ["maxLength", "pattern", "patternProperties", "properties", "type", "minimum", "$ref"])
def test_a_wrong_value_that_llguidance_fails_to_quote_is_refused_by_its_place(key: str, value: object) -> None:
    wrong = {"properties": {"名": {key: value}}}
    with pytest.raises(BadRequest, match=rf"is no JSON schema: its properties\.名\.{re.escape(key)} is") as caught:
        checked({"response_format": reply_of(wrong)})
    assert caught.value.param == "response_format.schema"


def test_what_the_engine_itself_can_refuse_or_takes_is_left_to_it() -> None:
    for schema in (
        {"maxLength": ["踩"]},
        {"enum": [(1 << 64) - 1, -(1 << 63)]},
        {"maxLength": "x" * 200},
        {"items": [{"title": "踩踩背" * 20}, {"title": "老爷爷" * 20}]},
        {"description": "踩踩背" * 20, "enum": ["踩踩背" * 20, "踩踩背" * 20]},
        {"properties": {"required": {"description": "踩踩背" * 40}}},
    ):
        assert checked({"response_format": reply_of(schema)})["response_format"] == reply_of(schema)


def test_a_schema_within_its_bounds_is_handed_on() -> None:
    schema = {"type": "object", "properties": {"pattern": {"type": "string", "pattern": "[a-z]{1,1024}" + "a" * 240}}}
    body = {"response_format": reply_of(schema), "tools": [function(parameters=schema)]}
    assert checked(body) == {**checked({}), **body}


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"type": "structural_tag", "format": {"type": "regex", "pattern": "a"}},
        {"type": "regex"},
        {"type": "text", "pattern": "a"},
        {"type": "json_object", "json_schema": {"name": "x", "schema": {}}},
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": {"name": "x"}},
        {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": "{}"}},
        reply_of({}, grammar="root ::= x"),
        [],
        "text",
    ],
)
def test_a_format_that_openai_does_not_have_is_refused(wrong: object) -> None:
    assert fault({"response_format": wrong}) == "response_format"
    assert fault({"text": {"format": wrong}}, RESPONSES) == "text.format"


@pytest.mark.parametrize(
    "wrong",
    [
        {"type": "mcp", "server_url": "http://127.0.0.1"},
        {"type": "web_search"},
        {"type": "function"},
        {"type": "function", "function": {}},
        {"type": "function", "function": {"name": "a b"}},
        {"type": "function", "function": {"name": "f", "parameters": []}},
        {"type": "function", "function": {"name": "f", "strict": 1}},
        {"type": "function", "function": {"name": "f", "code": "x"}},
        {"type": "function", "function": {"name": "f"}, "more": 1},
        "f",
        None,
    ],
)
def test_a_tool_that_is_no_function_is_refused(wrong: object) -> None:
    assert fault({"tools": [wrong]}) == "tools[0]"
    assert fault({"tools": [wrong]}, RESPONSES) == "tools[0]"


def test_so_many_tools_may_be_given_and_one_of_them_chosen() -> None:
    tools = [{"type": "function", "function": {"name": f"f{number}"}} for number in range(65)]
    choice = {"type": "function", "function": {"name": "f63"}}
    assert checked({"tools": tools[:64], "tool_choice": choice})["tool_choice"] == choice
    assert fault({"tools": tools}) == "tools"
    for wrong in ({"type": "function", "function": {"name": "g"}}, {"type": "function"}, {}, [], "f0", 1):
        assert fault({"tools": tools[:2], "tool_choice": wrong}) == "tool_choice"


@pytest.mark.parametrize("number", ["1e400", "-1e400"])
def test_a_number_too_great_for_a_float_does_not_reach_the_engine_as_infinity(number: str) -> None:
    with pytest.raises(BadRequest):
        checked(parse(b'{"tools": [{"maximum": %s}]}' % number.encode()))


# ------------------------------------------------------------------------------------------------ messages


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def test_a_conversation_is_handed_on_as_it_came() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL, {"index": 1, **CALL}]},
        {"role": "tool", "content": "4", "tool_call_id": "1"},
        {"role": "assistant", "content": "四"},
        {"role": "user", "content": [{"type": "text", "text": "谢"}, {"type": "text", "text": "谢"}]},
    ]
    assert checked({"messages": messages})["messages"] == messages


@pytest.mark.parametrize("count", [1, 2, 255, 256])
def test_so_many_messages_are_taken(count: int) -> None:
    assert checked({"messages": [USER] * count})["messages"] == [USER] * count


@pytest.mark.parametrize("messages", [None, [], [USER] * 257, {}, "x", 1, True, {"0": USER}])
def test_no_messages_or_too_many_are_refused(messages: object) -> None:
    assert fault({"messages": messages}) == "messages"


@pytest.mark.parametrize("message", [None, "x", 1, [], {}, {"content": "x"}, {"role": None}, {"role": "USER"}])
def test_what_is_no_message_is_refused_by_its_place(message: object) -> None:
    assert fault({"messages": [USER, message]}) == "messages[1].role"


@pytest.mark.parametrize("role", ["", "user ", "function", "root", 1, True, None, 1.5])
def test_a_role_that_there_is_not_is_refused(role: object) -> None:
    assert fault({"messages": [{"role": role, "content": "x"}]}) == "messages[0].role"


@pytest.mark.parametrize("role", [[], {}, ["user"]])
def test_a_role_that_is_a_list_or_an_object_is_refused(role: object) -> None:
    assert fault({"messages": [{"role": role, "content": "x"}]}) == "messages[0].role"


@pytest.mark.parametrize(
    "content",
    [
        None,
        1,
        True,
        {},
        [],
        [None],
        ["x"],
        [{"type": "text"}],
        [{"type": "text", "text": 1}],
        [{"type": "text", "text": None}],
        [{"text": "x"}],
        [{"type": "TEXT", "text": "x"}],
        [{"type": ["text"], "text": "x"}],
        [{"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}],
        [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}],
        [{"type": "input_audio", "input_audio": {}}],
        [{"type": "video_url", "video_url": {}}],
        [{"type": "image_embeds", "image_embeds": ""}],
        [{"type": "refusal", "refusal": "no"}],
        [{"image_url": {"url": "http://169.254.169.254/"}}],
    ],
)
@pytest.mark.parametrize("role", ["user", "system", "tool"])
def test_content_that_is_no_text_is_refused(role: str, content: object) -> None:
    assert fault({"messages": [USER, {"role": role, "content": content}]}) == "messages[1].content"


def test_only_an_assistant_may_have_said_nothing() -> None:
    for message in ({"role": "assistant"}, {"role": "assistant", "content": None}):
        assert checked({"messages": [USER, message]})["messages"] == [USER, message]
    assert fault({"messages": [{"role": "user"}]}) == "messages[0].content"


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": "x", "prompt_embeds": "AAAA"},
        {"role": "user", "content": "x", "whatever_vllm_learns_tomorrow": {"a": 1}},
        {"role": "user", "content": [{"type": "text", "text": "x", "image_url": {"url": "http://169.254.169.254/"}}]},
        {"role": "assistant", "content": "x", "tool_calls": 5},
        {"role": "assistant", "content": "x", "tool_calls": [1, None, "x"]},
        *(
            {"role": "assistant", "content": None, "tool_calls": [wrong]}
            for wrong in (
                {},
                {"id": "1", "type": "function"},
                {**CALL, "type": "custom"},
                {**CALL, "id": 1},
                {**CALL, "function": {"name": "f"}},
                {**CALL, "function": {"name": "f", "arguments": {}}},
                {**CALL, "more": 1},
            )
        ),
        {"role": "assistant", "content": None, "tool_calls": [CALL] * 65},
        {"role": "tool", "content": "x", "tool_call_id": {"a": 1}},
        {"role": "user", "content": "x", "name": ["a"]},
    ],
)
def test_fields_of_a_message_that_are_unknown_or_of_the_wrong_type_are_refused(message: dict[str, Any]) -> None:
    with pytest.raises(BadRequest):
        checked({"messages": [message]})


def test_the_versions_system_prompt_comes_first_where_the_client_has_none() -> None:
    for messages in ([USER], [USER, {"role": "assistant", "content": "我"}, USER]):
        found = checked({"messages": messages}, system="Be kind.")["messages"]
        assert found == [{"role": "system", "content": "Be kind."}, *messages]


@pytest.mark.parametrize("role", ["system", "developer"])
@pytest.mark.parametrize("first", [True, False])
def test_a_system_prompt_of_the_client_is_kept_wherever_it_stands(role: str, first: bool) -> None:
    own, kept = {"role": role, "content": ""}, {"role": "system", "content": ""}
    messages = [own, USER] if first else [USER, own]
    asked = [kept, USER] if first else [USER, kept]
    assert checked({"messages": messages}, system="Be kind.")["messages"] == asked


def test_a_version_without_a_system_prompt_adds_none_and_an_empty_one_is_one() -> None:
    assert checked({}, system=None)["messages"] == [USER]
    assert checked({}, system="")["messages"] == [{"role": "system", "content": ""}, USER]


def test_a_plain_completion_gets_no_system_prompt() -> None:
    assert checked({}, TEXT, system="Be kind.") == {"prompt": "你"}


@pytest.mark.parametrize("prompt", ["x", ["x"], ["x"] * 8, [0], [1, 2, 3] * 1000])
def test_prompts_within_bounds_are_taken(prompt: object) -> None:
    assert checked({"prompt": prompt}, TEXT)["prompt"] == prompt


@pytest.mark.parametrize(
    "prompt",
    [
        None,
        "",
        [],
        [""],
        ["x"] * 9,
        ["x", 1],
        [-1],
        [1, True],
        [1.0],
        [[1, 2]],
        [None],
        {},
        {"prompt_embeds": "x"},
        1,
        True,
    ],
)
def test_prompts_beyond_bounds_are_refused(prompt: object) -> None:
    assert fault({"prompt": prompt}, TEXT) == "prompt"


# ------------------------------------------------------------------------------------------------ anything at all


def without_odd_roles(value: object) -> bool:
    """Whether no message has a role that is a list or an object, which has a test of its own."""
    return not isinstance(value, list) or not any(
        isinstance(message, dict) and isinstance(message.get("role"), list | dict) for message in value
    )


MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(sorted(requests.ROLES)) | SCALAR},
        optional={"content": st.text() | JSON, "name": JSON},
    )
    | JSON,
    max_size=4,
).filter(without_odd_roles)
BODY = st.fixed_dictionaries({}, optional=dict.fromkeys(sorted(FIELDS[CHAT] | FIELDS[TEXT]), JSON)).flatmap(
    lambda body: st.fixed_dictionaries(
        {}, optional={"messages": MESSAGES, "prompt": st.text() | JSON, "stream": st.booleans()}
    ).map(lambda better: {**body, **better})
)


def judge(route: str, body: dict[str, Any]) -> None:
    """Whatever the body is: refused with a reason, or bounded."""
    try:
        kept = check(route, body, max_tokens=MOST_TOKENS, system="Be kind.")
    except BadRequest as error:
        assert error.message
    else:
        assert set(kept) <= FIELDS[route] - DROPPED
        assert None not in kept.values()
        assert kept.get("n", 1) <= 8
        assert kept.get("max_tokens", 1) <= MOST_TOKENS
        if route == CHAT:
            assert kept["messages"][0]["role"] == "system" or any(
                message["role"] in ("system", "developer") for message in body["messages"]
            )


@given(JSON)
def test_any_json_is_an_object_or_refused(value: object) -> None:
    try:
        found = parse(json.dumps(value).encode())
    except BadRequest as error:
        assert error.message
    else:
        assert isinstance(found, dict)


@given(st.binary(max_size=200))
def test_any_bytes_are_an_object_or_refused(raw: bytes) -> None:
    try:
        assert isinstance(parse(raw), dict)
    except BadRequest as error:
        assert error.message


@given(st.sampled_from([CHAT, TEXT]), st.dictionaries(st.text(max_size=8), JSON, max_size=4))
def test_any_object_is_bounded_or_refused(route: str, body: dict[str, Any]) -> None:
    judge(route, body)


@given(st.sampled_from([CHAT, TEXT]), BODY)
def test_known_fields_with_anything_in_them_are_bounded_or_refused(route: str, body: dict[str, Any]) -> None:
    judge(route, {key: value for key, value in body.items() if key in FIELDS[route]})


@given(st.sampled_from(sorted(FIELDS[CHAT] - {"messages"})), JSON)
def test_one_field_with_anything_in_it_is_bounded_or_refused(key: str, value: object) -> None:
    judge(CHAT, {"messages": [USER], key: value})


SCHEMA = {
    "type": "object",
    "properties": {"a": {"anyOf": [{"pattern": "a", "maxLength": 2}]}},
    "patternProperties": {"b": {"items": {"maxItems": 2}}},
}
RICH: dict[str, dict[str, Any]] = {
    CHAT: {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "x"}]},
            {"role": "assistant", "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "1", "content": "4"},
        ],
        "logit_bias": {"15": -100},
        "response_format": reply_of(SCHEMA),
        "tools": [function(parameters=SCHEMA)],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "stream": True,
        "stream_options": {"include_usage": True},
        "stop": ["x"],
    },
    TEXT: {"prompt": ["x"], "logit_bias": {"15": -100}, "stop": ["x"], "stream": True, "stream_options": {}},
    RESPONSES: {
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
            {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "1", "output": "4"},
        ],
        "text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}},
        "tools": [{"type": "function", "name": "f", "parameters": SCHEMA}],
        "tool_choice": {"type": "function", "name": "f"},
        "reasoning": {"effort": "low"},
    },
}
"""Bodies in which everything that has an inside has one."""


@pytest.mark.parametrize("route", [CHAT, TEXT, RESPONSES])
@given(JSON)
def test_anything_at_any_place_of_a_body_is_bounded_or_refused(route: str, other: object) -> None:
    assert check(route, RICH[route], max_tokens=MOST_TOKENS, system=None)  # or most of it would never be looked at
    for body in altered(RICH[route], other):
        if isinstance(body, dict) and set(body) <= FIELDS[route]:
            judge(route, body)


@given(MESSAGES)
def test_any_messages_are_taken_whole_or_refused(messages: list[Any]) -> None:
    judge(CHAT, {"messages": messages})


# ------------------------------------------------------------------------------------------------ long texts, responses

LONG = "字" * 131_072


@pytest.mark.parametrize(
    ("route", "make", "param"),
    [
        (CHAT, lambda text: {"messages": [USER, {"role": "user", "content": text}]}, "messages[1].content"),
        (
            CHAT,
            lambda text: {"messages": [{"role": "user", "content": [{"type": "text", "text": text}]}]},
            "messages[0].content",
        ),
        (TEXT, lambda text: {"prompt": text}, "prompt"),
        (TEXT, lambda text: {"prompt": [text[:9], text[9:]]}, "prompt"),
        (RESPONSES, lambda text: {"input": text}, "input[0].content"),
        (RESPONSES, lambda text: {"input": [{"role": "user", "content": text}]}, "input[0].content"),
        (RESPONSES, lambda text: {"instructions": text}, "instructions"),
    ],
)
def test_texts_are_bounded_in_length(route: str, make: Callable[[str], dict[str, Any]], param: str) -> None:
    assert checked(make(LONG), route)
    assert fault(make(LONG + "字"), route) == param


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({}, "Be kind."),
        ({"instructions": None}, "Be kind."),
        ({"instructions": "Be brief."}, "Be brief."),
        ({"instructions": ""}, ""),
        ({"input": [{"role": "system", "content": "x"}, USER]}, None),
        ({"input": [{"role": "developer", "content": "x"}, USER]}, None),
        ({"input": [USER]}, "Be kind."),
    ],
)
def test_the_versions_system_prompt_is_the_instructions_unless_the_client_has_some(
    given: dict[str, Any], kept: str | None
) -> None:
    assert checked(given, RESPONSES, system="Be kind.").get("instructions") == kept


def test_what_responses_may_have_is_handed_on_as_it_came() -> None:
    said = {"type": "output_text", "text": "Hello.", "annotations": [], "logprobs": []}
    body = {
        "model": "ccb",
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
            {"type": "message", "id": "msg_1", "status": "completed", "role": "assistant", "content": [said]},
            {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "1", "output": "4"},
        ],
        "max_output_tokens": MOST_TOKENS,
        "stream": True,
        "text": {"format": {"type": "json_schema", "name": "x", "schema": {}}},
        "tools": [{"type": "function", "name": "f", "parameters": {}}],
        "tool_choice": {"type": "function", "name": "f"},
    }
    assert checked(body, RESPONSES) == body
    more = {"store": True, "metadata": {"a": "b"}, "truncation": "auto", "reasoning": {"effort": "low"}}
    assert checked({**body, **more}, RESPONSES) == body
    assert fault({"max_output_tokens": MOST_TOKENS + 1}, RESPONSES) == "max_output_tokens"


@pytest.mark.parametrize(
    "item",
    [
        {"role": "tool", "content": "x"},
        {"role": "user", "content": [{"type": "input_image", "image_url": "http://127.0.0.1"}]},
        {"role": "user", "content": [{"type": "input_file", "file_id": "x"}]},
        {"type": "item_reference", "id": "x"},
        {"type": "function_call", "call_id": "1"},
        {"type": "function_call_output", "call_id": "1", "output": ["x"]},
        {"type": "computer_call_output"},
        {"role": "user"},
        {"role": "user", "content": "x", "partial": True},
        "x",
        None,
    ],
)
def test_an_item_of_another_kind_is_refused(item: object) -> None:
    assert (fault({"input": [item]}, RESPONSES) or "").startswith("input[0]")


@pytest.mark.parametrize("key", ["previous_response_id", "background", "conversation", "prompt", "include"])
def test_what_needs_a_store_is_refused(key: str) -> None:
    assert fault({key: "x"}, RESPONSES) == key


@pytest.mark.parametrize("value", [[], [USER] * 257, {}, None, 1])
def test_an_input_of_the_wrong_length_or_type_is_refused(value: object) -> None:
    assert fault({"input": value}, RESPONSES) == "input"


@pytest.mark.parametrize(("raw", "number"), [(b"5.0", 5), (b"1e3", 1000), (b"-0.0", 0)])
def test_a_whole_number_is_one_however_it_is_written(raw: bytes, number: int) -> None:
    found = parse(b'{"n": %b}' % raw)["n"]
    assert (found, type(found)) == (number, int)


@pytest.mark.parametrize("raw", [b'{"a": "\\ud800"}', b'{"a": {"\\udfff": 1}}'])
def test_half_a_surrogate_pair_is_refused(raw: bytes) -> None:
    with pytest.raises(BadRequest, match="surrogate"):
        parse(raw)
    assert parse('{"a": "\\ud83d\\ude00 한"}'.encode()) == {"a": "😀 한"}


# ------------------------------------------------------------------------------------------------------ feedback

TRACE = "0123456789abcdef" * 2


@pytest.mark.parametrize("value", [True, False, 0, -1.5, 2**53, "很好", "x" * 4096])
def test_feedback_is_a_yes_or_no_a_number_or_a_text_on_a_trace(value: object) -> None:
    taken = {"trace": f"tr-{TRACE}", "value": value, "name": "feedback", "rationale": None}
    assert feedback({"trace_id": f"tr-{TRACE}", "value": value}) == taken
    assert feedback({"request_id": f"req-{TRACE}", "value": value, "name": None}) == taken
    more = {"name": "a" * 64, "rationale": "x" * 4096}
    assert feedback({"trace_id": f"tr-{TRACE}", "value": value, **more}) == {**taken, **more}


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"trace_id": None}, "trace_id"),
        ({"request_id": f"req-{TRACE}"}, "trace_id"),
        ({"trace_id": f"req-{TRACE}"}, "trace_id"),
        ({"trace_id": f"tr-{TRACE}\n"}, "trace_id"),
        ({"trace_id": f"tr-{TRACE.upper()}"}, "trace_id"),
        ({"trace_id": 7}, "trace_id"),
        ({"trace_id": None, "request_id": "req-1"}, "request_id"),
        ({"value": None}, "value"),
        ({"value": ""}, "value"),
        ({"value": "x" * 4097}, "value"),
        ({"value": 2**53 + 1}, "value"),
        ({"value": 10**400}, "value"),
        ({"value": [True]}, "value"),
        ({"name": ""}, "name"),
        ({"name": "a" * 65}, "name"),
        ({"name": "a b"}, "name"),
        ({"name": 1}, "name"),
        ({"rationale": "x" * 4097}, "rationale"),
        ({"rationale": {}}, "rationale"),
        ({"span_id": "1"}, "span_id"),
    ],
)
def test_other_feedback_is_refused_by_the_field_that_is_wrong(more: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as caught:
        feedback({"trace_id": f"tr-{TRACE}", "value": True, **more})
    assert caught.value.param == param


@pytest.mark.parametrize("code", ["utf-16", "utf-16-le", "utf-32", "latin-1"])
def test_a_body_in_another_encoding_than_utf_8_is_refused(code: str) -> None:
    text = '{"messages": [{"role": "user", "content": "é \\ud800"}]}'
    with pytest.raises(BadRequest, match="no JSON"):
        parse(text.encode(code))
    assert parse(b"\xef\xbb\xbf{}") == {}


def test_half_a_surrogate_pair_is_refused_also_where_it_is_written_out() -> None:
    with pytest.raises(BadRequest, match="no JSON: 'utf-8' codec can't decode"):
        parse(b'{"a": "\xed\xa0\x80"}')


@pytest.mark.parametrize("number", ["1025", "0001025", "000000000000001025"])
def test_a_number_in_a_pattern_is_bounded_whatever_it_begins_with(number: str) -> None:
    with pytest.raises(BadRequest, match="has a pattern with a number above"):
        requests._schema({"type": "string", "pattern": f"a{{{number}}}"}, "here")
