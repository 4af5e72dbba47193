"""/v1/messages beyond what its own client shows: histories, places in errors, events, counts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from live_server import LiveServer, serve_model

from localmistral.engine import EngineSettings
from localmistral.errors import BadRequestError
from localmistral.server import events as server_events
from localmistral.server import messages_route
from localmistral.server.messages_request import CountRequest, MessagesRequest

SUM = {"role": "user", "content": "What is 31 + 46?"}
WEATHER = {"role": "user", "content": "What is the weather in Oslo?"}
TOOL: dict[str, Any] = {
    "name": "get_weather",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}
CALL = {"type": "tool_use", "id": "toolu_01", "name": "get_weather", "input": {"city": "Oslo"}}
IMAGE = {
    "type": "image",
    "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="},
}
CALLED: list[Any] = [
    WEATHER,
    {"role": "assistant", "content": [{"type": "text", "text": "Hm."}, CALL]},
]
THINKING = {"type": "enabled", "budget_tokens": 1024}


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with serve_model("demo", EngineSettings(threads=1, parallel=2)) as live:
        yield live


def ask(server: LiveServer, messages: list[Any], **fields: Any) -> httpx2.Response:
    body = {"max_tokens": 40, "messages": messages, **fields}
    return server.http.post("/v1/messages", json=body)


def refuse(server: LiveServer, messages: list[Any], **fields: Any) -> str:
    response = ask(server, messages, **fields)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["type"] == "invalid_request_error"
    return str(response.json()["error"]["message"])


def convert(**fields: Any) -> list[dict[str, Any]]:
    request = CountRequest.model_validate({"messages": [SUM], **fields})
    return [turn.message for turn in request.read_turns()]


def by_user(*blocks: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(blocks)}


def by_model(*blocks: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": list(blocks)}


def result_of(*content: Any, **more: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": "toolu_01", "content": list(content), **more}


def text_of(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def read_events(text: str) -> list[dict[str, Any]]:
    events = []
    for part in text.strip().split("\n\n"):
        name, data = part.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


# Counting


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [SUM, {"role": "assistant", "content": "The answer"}]},
        {"messages": [SUM, {"role": "assistant", "content": "The answer "}], "system": "x"},
        {"messages": [SUM, {"role": "assistant", "content": []}]},
        {"messages": [SUM, {"role": "assistant", "content": ""}], "thinking": THINKING},
        {"messages": [*CALLED, by_user(result_of(text_of("12"), is_error=True))], "tools": [TOOL]},
        {"tools": [TOOL], "tool_choice": {"type": "none"}},
        {"tools": [TOOL], "tool_choice": {"type": "any"}},
        {"thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}},
        {"system": [text_of("a"), {**text_of("b"), "cache_control": {"type": "ephemeral"}}]},
    ],
)
def test_the_count_is_what_an_answer_would_be_charged(
    server: LiveServer, fields: dict[str, Any]
) -> None:
    body = {"messages": [SUM], "max_tokens": 1, **fields}
    counted = server.http.post("/v1/messages/count_tokens", json=body).json()["input_tokens"]
    for streamed in (False, True):
        response = server.http.post("/v1/messages", json={**body, "stream": streamed})
        assert response.status_code == 200, response.text
        usage = read_events(response.text)[-2]["usage"] if streamed else response.json()["usage"]
        assert usage["input_tokens"] + usage["cache_read_input_tokens"] == counted


# What a client sent, in the words in which it sent it


@pytest.mark.parametrize(
    ("messages", "more", "place"),
    [
        ([by_user(IMAGE)], {"system": "x"}, "messages[0].content[0] is an image"),
        ([SUM, SUM, by_user(text_of("a"), IMAGE)], {}, "messages[2].content[1] is an image"),
        ([*CALLED, by_user(result_of(), IMAGE)], {"system": "x"}, "messages[2].content[1] is an"),
        (
            [*CALLED, by_user(result_of(text_of("a"), IMAGE))],
            {},
            "messages[2].content[0].content[1] is an image",
        ),
        (
            [*CALLED, by_user(text_of("t"), {**result_of(), "tool_use_id": "no"})],
            {"system": "x", "tools": [TOOL]},
            "messages[2].content[1].tool_use_id",
        ),
        (
            [WEATHER, by_model(text_of("a"), {**CALL, "name": "a b"}), by_user(result_of())],
            {"system": "x"},
            "messages[1].content[1].name",
        ),
        (
            [WEATHER, by_model(CALL, {"type": "text", "text": None}), SUM],
            {"system": "x"},
            "messages[1].content[1].text",
        ),
        (
            [SUM, by_model({"type": "thinking", "thinking": 5}), SUM],
            {"system": "x"},
            "messages[1].content[0].thinking",
        ),
        ([WEATHER, CALLED[1]], {"tools": [TOOL]}, "messages[1].content[1] is a call without"),
        ([by_user()], {}, "messages[0].content is empty"),
        ([SUM], {"tools": [{**TOOL, "name": "a b"}]}, "tools[0].name"),
        ([SUM], {"tools": [TOOL, {"name": "b", "input_schema": 5}]}, "tools[1].input_schema"),
        ([SUM], {"tools": [TOOL, TOOL]}, "tools[1].name"),
        ([SUM], {"system": [text_of("a"), IMAGE]}, "system[1] is an image"),
    ],
)
def test_what_is_wrong_is_named_by_the_place_it_had(
    server: LiveServer, messages: list[Any], more: dict[str, Any], place: str
) -> None:
    message = refuse(server, messages, **more)
    assert place in message
    assert "function" not in message


def test_a_schema_that_cannot_be_had_is_named_by_its_own_field(server: LiveServer) -> None:
    form = {"type": "json_schema", "schema": {"$ref": "#"}}
    with pytest.raises(BadRequestError) as caught:
        messages_route._start(
            server.chat,
            MessagesRequest.model_validate(
                {"messages": [SUM], "max_tokens": 5, "output_config": {"format": form}}
            ),
        )
    assert caught.value.param == "output_config.format"


# Histories


@pytest.mark.parametrize(
    ("block", "text"),
    [
        (
            {"type": "document", "title": "T", "context": "C",
             "source": {"type": "text", "media_type": "text/plain", "data": "hello"}},
            "T\nC\nhello",
        ),
        (
            {"type": "document",
             "source": {"type": "content", "content": [text_of("a"), text_of("b")]}},
            "a\nb",
        ),
        ({"type": "document", "source": {"type": "content", "content": "a"}}, "a"),
        (
            {"type": "search_result", "source": "http://x", "title": "T",
             "content": [text_of("hello")]},
            "T\nhttp://x\nhello",
        ),
    ],
)  # fmt: skip
def test_documents_are_text_wherever_they_stand(block: dict[str, Any], text: str) -> None:
    said = convert(messages=[{"role": "user", "content": [block, text_of("?")]}])
    assert said[0]["content"] == [text_of(text), text_of("?")]
    answered = convert(messages=[*CALLED, by_user(result_of(block))])
    assert answered[-1]["content"] == text


@pytest.mark.parametrize(
    "source",
    [
        {"type": "base64", "media_type": "application/pdf", "data": "aaaa"},
        {"type": "text", "data": 5},
        {"type": "content", "content": [IMAGE]},
        {"type": "content", "content": 5},
        {"type": "file", "file_id": "x"},
        {"type": "url", "url": "file:///etc/passwd"},
        None,
    ],
)
def test_documents_that_are_no_text_are_refused(server: LiveServer, source: Any) -> None:
    block = {"type": "document", "source": source}
    assert "messages[0].content[0]" in refuse(server, [{"role": "user", "content": [block]}])
    assert "messages[2].content[0].content[0]" in refuse(
        server, [*CALLED, by_user(result_of(block))]
    )


def test_what_was_thought_may_come_back_and_what_is_hidden_is_left_out(
    server: LiveServer,
) -> None:
    first = ask(server, [SUM], thinking=THINKING, max_tokens=500).json()["content"]
    assert first[0]["signature"]
    hidden = {"type": "redacted_thinking", "data": "x"}
    history = [SUM, {"role": "assistant", "content": [hidden, *first]}, SUM]
    assert convert(messages=history)[1]["content"] == [
        {"type": "thinking", "thinking": first[0]["thinking"]},
        first[1],
    ]
    assert ask(server, history, thinking=THINKING).status_code == 200
    only_hidden = [SUM, {"role": "assistant", "content": [hidden]}, SUM]
    assert ask(server, only_hidden).status_code == 200


def test_accounting_at_the_head_of_the_prompt_leaves_the_prefix_alone(server: LiveServer) -> None:
    line = "x-anthropic-billing-header: cc_version=2.1; cc_entrypoint=cli; cch={};"
    agent = text_of("You are an agent who adds numbers and looks up the weather. " * 8)
    assert convert(system=[text_of(line.format("aa")), agent])[0]["content"] == agent["text"]
    assert convert(system=line.format("aa") + "\nBe brief.")[0]["content"] == "Be brief."
    assert [m["role"] for m in convert(system=line.format("aa"))] == ["user"]
    said = {"role": "user", "content": line.format("aa")}
    assert convert(messages=[said]) == [said]
    usages = [
        ask(server, [SUM], system=[text_of(line.format(mark)), agent]).json()["usage"]
        for mark in ("aaaaa", "bbbbb")
    ]
    assert usages[1]["input_tokens"] == 1


def test_a_request_like_an_agents_is_answered(server: LiveServer) -> None:
    cached = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
    tool = {**TOOL, **cached, "defer_loading": False, "eager_input_streaming": True}
    schema = {**TOOL["input_schema"], "$schema": "http://json-schema.org/draft-07/schema#"}
    names = [f"mcp__some_server__tool_number_{number}" for number in range(20)]
    body = {
        "model": "demo", "max_tokens": 32_000, "temperature": 1, "stream": True,
        "system": [text_of("You are an agent."), {**text_of("Be brief."), **cached}],
        "messages": [
            {"role": "user", "content": [text_of("<system-reminder>x</system-reminder>"),
                                         {**text_of(SUM["content"]), **cached}]},
            {"role": "assistant", "content": [{**CALL, "caller": {"type": "direct"}}]},
            {"role": "user", "content": [{**result_of(text_of("12")), **cached},
                                         text_of("And now?")]},
        ],
        "tools": [tool, *({"name": name, "input_schema": schema} for name in names)],
        "metadata": {"user_id": "x"}, "thinking": {"type": "adaptive", "display": "summarized"},
        "output_config": {"effort": "medium"}, "context_management": {"edits": []},
        "service_tier": "auto", "speed": "standard", "unheard_of": [1],
    }  # fmt: skip
    headers = {"anthropic-version": "2023-06-01", "anthropic-beta": "a-2025-01-01,b-2026-01-01"}
    response = server.http.post("/v1/messages?beta=true", json=body, headers=headers)
    assert response.status_code == 200, response.text
    events = read_events(response.text)
    assert events[-1]["type"] == "message_stop"


# Events


@pytest.mark.parametrize(
    "fields",
    [
        {"thinking": THINKING, "max_tokens": 500},
        {"messages": [WEATHER], "tools": [TOOL]},
        {"max_tokens": 1},
        {"stop_sequences": ["="]},
    ],
)
def test_events_come_in_their_order_and_add_up(server: LiveServer, fields: dict[str, Any]) -> None:
    body = {"messages": [SUM], "max_tokens": 60, **fields}
    whole = server.http.post("/v1/messages", json=body).json()
    response = server.http.post("/v1/messages", json={**body, "stream": True})
    events = read_events(response.text)
    assert events[0]["message"]["content"] == []
    blocks: list[dict[str, Any]] = []
    parts: dict[int, list[Any]] = {}
    open_index = None
    for event in events[1:-2]:
        if event["type"] == "content_block_start":
            assert open_index is None
            assert event["index"] == len(blocks)
            open_index = event["index"]
            blocks.append(event["content_block"])
            parts[open_index] = []
        elif event["type"] == "content_block_delta":
            assert event["index"] == open_index
            parts[open_index].append(event["delta"])
        else:
            assert (event["type"], event["index"]) == ("content_block_stop", open_index)
            open_index = None
    assert open_index is None
    for index, block in enumerate(blocks):
        for delta in parts[index]:
            kind = delta["type"].removesuffix("_delta")
            if kind == "input_json":
                block.setdefault("json", []).append(delta["partial_json"])
            else:
                block[kind] += delta[kind]
        if "json" in block:
            block["input"] = json.loads("".join(block.pop("json")))
    for block in (*blocks, *whole["content"]):
        block.pop("id", None)
    assert blocks == whole["content"]
    ending = events[-2]["delta"]
    assert ending == {name: whole[name] for name in ("stop_reason", "stop_sequence")}
    assert events[-1] == {"type": "message_stop"}


@pytest.mark.parametrize(
    ("path", "sign"),
    [
        ("/v1/messages", 'event: ping\ndata: {"type":"ping"}'),
        ("/v1/chat/completions", ": still computing"),
        ("/v1/responses", ": still computing"),
        ("/v1/completions", ": still computing"),
    ],
)
def test_a_long_wait_for_the_first_token_is_filled_with_signs_of_life(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch, path: str, sign: str
) -> None:
    monkeypatch.setattr(server_events, "PING_S", 0.02)
    text = f"{path} " + "one two three " * 1000
    body: dict[str, Any] = {"max_tokens": 8, "stream": True}
    if path == "/v1/responses":
        body = {"input": text, "max_output_tokens": 16, "stream": True}
    elif path == "/v1/completions":
        body["prompt"] = text
    else:
        body["messages"] = [{"role": "user", "content": text}]
    parts = server.http.post(path, json=body).text.split("\n\n")
    assert sign in parts
    quiet = [part for part in parts if part != sign]
    assert all(part.startswith(("event: ", "data: ")) for part in quiet[:-1])
    assert quiet[-1] == ""
    assert parts[-2] != sign
