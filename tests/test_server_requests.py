"""Requests that nobody sends on purpose, over real HTTP: each is answered or refused, none is a
server error, and the server still answers after all of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from live_server import LiveServer, serve_model

from localmistral.engine import EngineSettings

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
HELLO = [{"role": "user", "content": "Hello"}]
WEATHER = [{"role": "user", "content": "What is the weather in Oslo?"}]
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
HALF = "\\ud800"
"""Half of a surrogate pair, as JSON writes it."""
BIG = "9" * 400


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with serve_model("demo", EngineSettings(threads=1, parallel=4, queue=16)) as live:
        yield live
        answer = live.http.post(CHAT, json={"messages": HELLO, "max_tokens": 2})
        assert answer.status_code == 200


def post(server: LiveServer, path: str, body: str | bytes | dict[str, Any]) -> httpx2.Response:
    """Send a body, given as JSON text where it holds what Python wouldn't write."""
    content = json.dumps(body) if isinstance(body, dict) else body
    headers = {"content-type": "application/json"}
    return server.http.post(path, content=content, headers=headers)


def with_field(field: str) -> str:
    """A sound request and one field more, as JSON text."""
    return f'{{"messages": {json.dumps(HELLO)}, {field}}}'


def refusal_of(response: httpx2.Response) -> dict[str, Any]:
    assert response.status_code == 400, response.text[:500]
    error: dict[str, Any] = response.json()["error"]
    assert error["message"].endswith(".")
    return error


def make_tool(parameters: Any = CITY, *, name: str = "get_weather", strict: bool = False) -> Any:
    function = {"name": name, "parameters": parameters, "strict": strict}
    return {"type": "function", "function": function}


def nest(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


# Text that isn't


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, '{"messages": [{"role": "user", "content": "a%sb"}], "max_tokens": 2}'),
        (CHAT, '{"messages": [{"role": "user", "content": "x"}], "%s": 1, "max_tokens": 2}'),
        (CHAT, '{"messages": [{"role": "user", "content": "x"}], "stop": "%s", "max_tokens": 2}'),
        (RESPONSES, '{"input": "%s", "max_output_tokens": 2}'),
        (RESPONSES, '{"input": "x", "instructions": "%s", "max_output_tokens": 2}'),
        (RESPONSES, '{"input": "x", "metadata": {"a": "%s"}, "max_output_tokens": 2}'),
        (
            RESPONSES,
            '{"input": "x", "metadata": {"a": "%s"}, "max_output_tokens": 2, "stream": true}',
        ),
        (
            RESPONSES,
            '{"input": "x", "max_output_tokens": 2, "tools": [{"type": "function", "name": "a",'
            ' "description": "%s"}]}',
        ),
        (MESSAGES, '{"max_tokens": 2, "messages": [{"role": "user", "content": "%s"}]}'),
        (
            MESSAGES,
            '{"max_tokens": 2, "system": "%s", "messages": [{"role": "user", "content": "x"}]}',
        ),
    ],
)
def test_half_a_surrogate_pair_in_a_text_is_no_obstacle(
    server: LiveServer, path: str, body: str
) -> None:
    response = post(server, path, body % HALF)
    assert response.status_code == 200, response.text
    response.content.decode("utf-8")


@pytest.mark.parametrize(
    "field",
    [
        '"guided_regex": "%s"',
        '"guided_choice": ["%s"]',
        '"grammar": "root ::= \\"%s\\""',
        '"response_format": {"type": "%s"}',
        '"response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": ["%s"]}}}',
        '"reasoning_effort": "%s"',
        '"reasoning_format": "%s"',
        '"tool_choice": "%s"',
        '"logit_bias": {"%s": 1}',
        '"tools": [{"type": "function", "function": {"name": "%s"}}]',
    ],
)
def test_half_a_surrogate_pair_where_meaning_hangs_on_it_is_refused(
    server: LiveServer, field: str
) -> None:
    refusal_of(post(server, CHAT, with_field(field % HALF)))


@pytest.mark.parametrize("text", ["", "   \n\t ", "a\x00b", "\ufeff", "‮abc", "👩‍👩‍👧", "\r\n"])
def test_odd_texts_are_answered(server: LiveServer, text: str) -> None:
    messages = [{"role": "user", "content": text}]
    assert post(server, CHAT, {"messages": messages, "max_tokens": 2}).status_code == 200


def test_a_byte_order_mark_and_utf_16_are_json_too(server: LiveServer) -> None:
    body = json.dumps({"messages": HELLO, "max_tokens": 2})
    for encoding in ("utf-8-sig", "utf-16", "utf-32"):
        assert post(server, CHAT, body.encode(encoding)).status_code == 200


def test_the_last_of_two_equal_keys_counts(server: LiveServer) -> None:
    body = '{"messages": [], "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}'
    assert post(server, CHAT, body).status_code == 200


# Numbers


@pytest.mark.parametrize("sign", ["", "-"])
@pytest.mark.parametrize(
    "field",
    [
        *("max_tokens", "max_completion_tokens", "seed", "n", "top_k", "temperature"),
        *("top_logprobs", "repeat_last_n", "dry_allowed_length", "min_p"),
    ],
)
def test_numbers_of_400_digits_are_refused_by_name(
    server: LiveServer, field: str, sign: str
) -> None:
    error = refusal_of(post(server, CHAT, with_field(f'"{field}": {sign}{BIG}')))
    assert field.removeprefix("repeat_") in error["message"]


def test_a_number_of_5000_digits_is_no_server_error(server: LiveServer) -> None:
    for field in ("seed", "unheard_of"):
        refusal_of(post(server, CHAT, with_field(f'"{field}": {"9" * 5000}')))


@pytest.mark.parametrize("seed", [0, 7, 2**32, 2**63 - 1, -(2**63), -5])
def test_any_seed_of_64_bits_repeats_itself(server: LiveServer, seed: int) -> None:
    def ask() -> Any:
        body = {"messages": HELLO, "seed": seed, "temperature": 1.5, "max_tokens": 8}
        response = post(server, CHAT, body)
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]["message"]

    assert ask() == ask()


def test_more_tokens_than_the_context_are_cut_to_it(server: LiveServer) -> None:
    body = post(server, CHAT, {"messages": HELLO, "max_tokens": 10**6}).json()
    assert body["choices"][0]["finish_reason"] in ("stop", "length")


def test_true_is_no_number_and_1_is_not_true(server: LiveServer) -> None:
    for field, value in (("n", True), ("stream", 1), ("seed", 5.5), ("max_tokens", "5")):
        error = refusal_of(post(server, CHAT, {"messages": HELLO, field: value}))
        assert error["param"] == field


# Lists, and what is missing or too much


@pytest.mark.parametrize(
    "more",
    [
        {"stop": []},
        {"tools": []},
        {"logit_bias": {}},
        {"stream_options": {"include_usage": True}},
        {"logit_bias": {str(token): 0.5 for token in range(4096)}},
        {"logit_bias": [[5, 1.5], ["6", False], [7, -2]]},
        {"n_predict": -1},
        {"top_p": 0},
        {"stop": [f"never {n}" for n in range(64)]},
        {"top_logprobs": 3},
        {"functions": [{"name": "old"}], "function_call": "auto"},
        {"messages": [{"role": "user", "content": []}]},
        {"messages": [{"role": "system", "content": "Be kind."}]},
        {"messages": [*HELLO, {"role": "assistant", "content": "31"}]},
        {"messages": [*HELLO, *HELLO]},
    ],
)
def test_what_is_unusual_but_sound_is_answered(server: LiveServer, more: dict[str, Any]) -> None:
    response = post(server, CHAT, {"messages": HELLO, "max_tokens": 2, **more})
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, {"stop": ["a"] * 5000}, "stop"),
        (CHAT, {"stop": "a" * 10**6}, "stop"),
        (CHAT, {"logit_bias": {str(token): 1 for token in range(131_072)}}, "logit_bias"),
        (CHAT, {"logit_bias": {"-1": 1}}, "logit_bias"),
        (CHAT, {"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        (CHAT, {"continue_final_message": True}, "continue_final_message"),
        (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, "messages[0]"),
        (CHAT, {"tools": [make_tool(name="")]}, "tools[0].function.name"),
        (CHAT, {"tools": [make_tool(name="a b")]}, "tools[0].function.name"),
        (CHAT, {"tools": [make_tool(), make_tool()]}, "tools[1].function.name"),
        (CHAT, {"tools": [make_tool(nest(450))]}, "tools[0].function.parameters"),
        (CHAT, {"tools": [], "tool_choice": "required"}, "tool_choice"),
        (CHAT, {"tools": [make_tool()], "tool_choice": {"a": 1}}, "tool_choice"),
        (CHAT, {"guided_regex": "(a{1000}){1000}"}, "guided_regex"),
        (CHAT, {"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        (CHAT, {"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.struct"),
        (CHAT, {"min_tokens": -1}, "min_tokens"),
        (CHAT, {"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
        (CHAT, {"stop_token_ids": [-1]}, "stop_token_ids"),
        (CHAT, {"stop_token_ids": [10**40]}, "stop_token_ids"),
        (CHAT, {"stop_token_ids": [1] * 65}, "stop_token_ids"),
        (CHAT, {"n_predict": 0}, "n_predict"),
        (CHAT, {"logit_bias": [[1]]}, "logit_bias[0]"),
        (CHAT, {"logit_bias": [[1, 0], [1, True]]}, "logit_bias[1]"),
        (CHAT, {"logit_bias": [["Oslo", 1]]}, "logit_bias"),
        (CHAT, {"logit_bias": 5}, "logit_bias"),
        (CHAT, {"chat_template_kwargs": {"reasoning_effort": 5}}, "chat_template_kwargs"),
        (CHAT, {"tools": [make_tool({"type": "string"})], "tool_choice": "required"}, "tools.get"),
        (COMPLETIONS, {"prompt": "a", "best_of": 1, "n": 2}, "best_of"),
        (COMPLETIONS, {"prompt": "a", "best_of": 17}, "best_of"),
        (COMPLETIONS, {"prompt": "a", "best_of": 2, "stream": True}, "best_of"),
        (COMPLETIONS, {"prompt": "a", "guided_regex": "("}, "guided_regex"),
        (CHAT, {"reasoning_effort": 5}, "reasoning_effort"),
        (COMPLETIONS, {"prompt": []}, "prompt"),
        (COMPLETIONS, {"prompt": [[]]}, "prompt"),
        (COMPLETIONS, {"prompt": ["a", 5]}, "prompt"),
        (COMPLETIONS, {"prompt": ["a"] * 64, "n": 16}, "prompt"),
        (COMPLETIONS, {"prompt": [10**40]}, "prompt"),
        (COMPLETIONS, {"prompt": "word " * 9000}, "prompt"),
        (RESPONSES, {"input": []}, "input"),
        (RESPONSES, {"input": [5]}, "input"),
        (RESPONSES, {"input": [{"type": "function_call"}]}, "input"),
        (RESPONSES, {"input": "word " * 9000}, "input"),
        (RESPONSES, {"input": [{"type": "function_call_output", "call_id": "a"}]}, "input[0]"),
        ("/tokenize", {"messages": "x"}, "messages"),
        ("/detokenize", {"tokens": [10**40]}, "tokens"),
        ("/detokenize", {"tokens": [1.5]}, "tokens"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(
    server: LiveServer, path: str, body: dict[str, Any], param: str
) -> None:
    base = {"messages": HELLO} if path == CHAT else {}
    error = refusal_of(post(server, path, {**base, **body}))
    assert (error["param"] or "").startswith(param)


def test_a_reasoning_item_of_any_form_is_no_server_error(server: LiveServer) -> None:
    contents: list[Any] = [5, None, "Hm.", {}, [5], [{"type": "reasoning_text", "text": 5}]]
    for content in contents:
        items = [{"type": "reasoning", "content": content}, {"role": "user", "content": "x"}]
        response = post(server, RESPONSES, {"input": items, "max_output_tokens": 2})
        assert response.status_code in (200, 400), content


# Tools


ODD_SCHEMAS: dict[str, Any] = {
    "a loop": {"$ref": "#"},
    "uniqueItems": {"type": "array", "uniqueItems": True},
    "look-ahead": {"type": "object", "properties": {"a": {"type": "string", "pattern": "(?=a)b"}}},
    "no type": {"type": "objekt"},
    "a list": {"type": "object", "properties": [1]},
    "if": {"type": "object", "if": {"required": ["a"]}, "then": {"required": ["b"]}},
    "elsewhere": {"$ref": "https://example.com/x.json"},
    "an odd format": {"type": "object", "properties": {"a": {"type": "string", "format": "zzz"}}},
    "unsatisfiable": {
        "type": "object",
        "properties": {"a": {"type": "integer", "minimum": 5, "maximum": 1}},
        "required": ["a"],
    },
}


@pytest.mark.parametrize("schema", ODD_SCHEMAS.values(), ids=ODD_SCHEMAS)
def test_a_schema_that_cannot_be_enforced_is_refused_only_where_it_must_hold(
    server: LiveServer, schema: Any
) -> None:
    free = {"messages": HELLO, "max_tokens": 2, "tools": [make_tool(schema)]}
    assert post(server, CHAT, free).status_code == 200
    strict = {**free, "tools": [make_tool(schema, strict=True)]}
    for body in (strict, {**free, "tool_choice": "required"}):
        assert refusal_of(post(server, CHAT, body))["param"].startswith("tools")


def test_ten_thousand_tools_are_refused_in_bounded_time(server: LiveServer) -> None:
    tools = [make_tool({"type": "object"}, name=f"t{n}") for n in range(10_000)]
    body = {"messages": HELLO, "max_tokens": 2, "tools": tools}
    for choice in ("auto", "required"):
        error = refusal_of(post(server, CHAT, {**body, "tool_choice": choice}))
        assert error["param"] == "tools"
        assert "10000" in error["message"]
    flat = [{"type": "function", **tool["function"]} for tool in tools]
    assert refusal_of(post(server, RESPONSES, {"input": "x", "tools": flat}))["param"] == "tools"
    huge = make_tool()
    huge["function"]["description"] = "words " * 10**6
    assert refusal_of(post(server, CHAT, {**body, "tools": [huge]}))["param"] == "tools"
    assert post(server, CHAT, {**body, "tool_choice": "none"}).status_code == 200


def read_chunks(response: httpx2.Response) -> list[dict[str, Any]]:
    lines = [line[6:] for line in response.text.splitlines() if line.startswith("data: {")]
    return [json.loads(line)["choices"][0] for line in lines if json.loads(line)["choices"]]


@pytest.mark.parametrize("parallel", [True, False])
def test_several_streamed_answers_with_tools_are_whole_each(
    server: LiveServer, parallel: bool
) -> None:
    body = {
        "messages": WEATHER, "tools": [make_tool()], "n": 3, "stream": True, "temperature": 0,
        "parallel_tool_calls": parallel,
    }  # fmt: skip
    chunks = read_chunks(post(server, CHAT, body))
    for index in range(3):
        own = [chunk for chunk in chunks if chunk["index"] == index]
        deltas = [c for chunk in own for c in chunk["delta"].get("tool_calls", [])]
        assert json.loads("".join(d["function"]["arguments"] for d in deltas)) == {"city": "Oslo"}
        assert [c["finish_reason"] for c in own if c["finish_reason"]] == ["tool_calls"]


def test_any_is_required_and_a_call_cut_off_is_no_server_error(server: LiveServer) -> None:
    body = {"messages": WEATHER, "tools": [make_tool()], "tool_choice": "any"}
    whole = post(server, CHAT, body).json()["choices"][0]
    assert whole["finish_reason"] == "tool_calls"
    cut = post(server, CHAT, {**body, "max_tokens": 7}).json()["choices"][0]
    assert cut["finish_reason"] == "length"
    tools = [{"name": "get_weather", "input_schema": CITY}]
    asked = {
        "messages": WEATHER, "tools": tools, "tool_choice": {"type": "any"}, "max_tokens": 7,
    }  # fmt: skip
    message = post(server, MESSAGES, asked).json()
    assert message["stop_reason"] == "max_tokens"
    assert message["content"][-1]["input"] == {}


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ({"guided_choice": ["yes", "no"]}, ("yes", "no")),
        ({"guided_regex": "(yes|no)"}, ("yes", "no")),
    ],
)
def test_tools_may_be_called_in_place_of_an_answer_of_a_form(
    server: LiveServer, form: dict[str, Any], pattern: tuple[str, ...]
) -> None:
    called = post(server, CHAT, {"messages": WEATHER, "tools": [make_tool()], **form}).json()
    assert called["choices"][0]["finish_reason"] == "tool_calls"
    plain = post(server, CHAT, {"messages": WEATHER, **form}).json()["choices"][0]["message"]
    assert plain["content"] in pattern


@pytest.mark.parametrize("path", [CHAT, RESPONSES])
@pytest.mark.parametrize(("mode", "name"), [("auto", "get_weather"), ("required", "get_time")])
def test_only_allowed_tools_are_called(server: LiveServer, path: str, mode: str, name: str) -> None:
    tools = [make_tool(), make_tool(name="get_time")]
    if path == CHAT:
        only = {"mode": mode, "tools": [make_tool(name=name)]}
        choice = {"type": "allowed_tools", "allowed_tools": only}
        body = {"tools": tools, "messages": WEATHER, "tool_choice": choice}
        message = post(server, path, body).json()["choices"][0]["message"]
        assert {call["function"]["name"] for call in message["tool_calls"]} == {name}
        return
    flat = [{"type": "function", **tool["function"]} for tool in tools]
    named = [{"type": "function", "name": name}]
    flat_choice: Any = {"type": "allowed_tools", "mode": mode, "tools": named}
    made = post(server, path, {"tools": flat, "input": WEATHER, "tool_choice": flat_choice}).json()
    assert {item["name"] for item in made["output"]} == {name}
    assert made["tool_choice"] == flat_choice


@pytest.mark.parametrize(
    "allowed",
    [
        None,
        {"mode": "auto"},
        {"mode": "any", "tools": []},
        {"mode": "auto", "tools": [5]},
        {"mode": "auto", "tools": [{"type": "function", "function": {"name": "other"}}]},
        {"mode": "required", "tools": []},
    ],
)
def test_allowed_tools_that_cannot_be_read_are_refused(server: LiveServer, allowed: Any) -> None:
    choice = {"type": "allowed_tools", "allowed_tools": allowed}
    body = {"messages": WEATHER, "tools": [make_tool()], "tool_choice": choice}
    assert refusal_of(post(server, CHAT, body))["param"] == "tool_choice"


# Anthropic's own


@pytest.mark.parametrize(
    "content",
    [
        [5],
        [{"type": "text", "text": None}],
        [{"type": "image", "source": {}}],
        [{"type": "tool_result", "tool_use_id": "a", "content": 5}],
        [{"type": "document", "source": {"type": "url", "url": "file:///etc/passwd"}}],
        [],
        None,
        5,
    ],
)
def test_blocks_that_make_no_sense_are_refused(server: LiveServer, content: Any) -> None:
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 2}
    response = post(server, MESSAGES, body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["type"] == "invalid_request_error"
