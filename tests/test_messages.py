"""Messages and tools from the outside: what is taken, what is refused, and where the fault is."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localmistral.chatformat.messages import (
    Message,
    Part,
    parse_messages,
    parse_tools,
    without_empty_answers,
)
from localmistral.errors import BadRequestError

HI = {"role": "user", "content": "hi"}


def call(arguments: Any = "{}", **more: Any) -> dict[str, Any]:
    function = {"name": "f", "arguments": arguments}
    return {"id": "abcdef123", "type": "function", "function": function} | more


def calling(*calls: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": list(calls)}


REFUSED: list[tuple[object, str]] = [
    (None, "messages"),
    ("", "messages"),
    ("hi", "messages"),
    (5, "messages"),
    ({}, "messages"),
    ([], "messages"),
    ([123], "messages[0]"),
    ([None], "messages[0]"),
    (["hi"], "messages[0]"),
    ([[HI]], "messages[0]"),
    ([{}], "messages[0].role"),
    ([{"content": "hi"}], "messages[0].role"),
    ([HI, {"role": None, "content": "hi"}], "messages[1].role"),
    ([{"role": "alien", "content": "hi"}], "messages[0].role"),
    ([{"role": " user ", "content": "hi"}], "messages[0].role"),
    ([{"role": "User", "content": "hi"}], "messages[0].role"),
    ([{"role": "", "content": "hi"}], "messages[0].role"),
    ([{"role": 1, "content": "hi"}], "messages[0].role"),
    ([{"role": ["user"], "content": "hi"}], "messages[0].role"),
    ([HI, {"role": "user"}], "messages[1].content"),
    ([{"role": "user", "content": None}], "messages[0].content"),
    ([{"role": "system"}], "messages[0].content"),
    ([{"role": "user", "content": 123}], "messages[0].content"),
    ([{"role": "user", "content": {}}], "messages[0].content"),
    ([{"role": "user", "content": True}], "messages[0].content"),
    ([{"role": "user", "content": [5]}], "messages[0].content[0]"),
    ([{"role": "user", "content": ["a"]}], "messages[0].content[0]"),
    ([{"role": "user", "content": [{}]}], "messages[0].content[0].type"),
    ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
    ([{"role": "user", "content": [{"type": "text", "text": 1}]}], "messages[0].content[0].text"),
    ([{"role": "user", "content": [{"type": ["text"]}]}], "messages[0].content[0].type"),
    ([{"role": "user", "content": [{"type": "thinking"}]}], "messages[0].content[0].type"),
    ([{"role": "assistant", "content": ""}], "messages"),
    ([{"role": "assistant", "reasoning": 5}], "messages[0].reasoning"),
    ([{"role": "assistant", "tool_calls": {}}], "messages[0].tool_calls"),
    ([calling(5)], "messages[0].tool_calls[0]"),
    ([calling({})], "messages[0].tool_calls[0].function"),
    ([calling(call(), call())], "messages[0].tool_calls[1].id"),
    ([calling(call(id=5))], "messages[0].tool_calls[0].id"),
    ([calling(call(type="retrieval"))], "messages[0].tool_calls[0].type"),
    ([calling(call("{"))], "messages[0].tool_calls[0].function.arguments"),
    ([calling(call("[1]"))], "messages[0].tool_calls[0].function.arguments"),
    ([calling(call([1]))], "messages[0].tool_calls[0].function.arguments"),
    ([calling(call('{"a": NaN}'))], "messages[0].tool_calls[0].function.arguments"),
    ([calling(call({"a": math.inf}))], "messages[0].tool_calls[0].function.arguments"),
    ([calling(call("[" * 100_000))], "messages[0].tool_calls[0].function.arguments"),
    (
        [calling(call('{"a":' * 300 + "1" + "}" * 300))],
        "messages[0].tool_calls[0].function.arguments",
    ),
    ([calling(call(function={"name": "a b"}))], "messages[0].tool_calls[0].function.name"),
    ([calling(call(function={"name": ""}))], "messages[0].tool_calls[0].function.name"),
    ([calling(call(function={"name": "f\n"}))], "messages[0].tool_calls[0].function.name"),
    ([HI, {"role": "tool", "content": "r", "tool_call_id": "x"}], "messages[1]"),
    ([calling(call()), {"role": "tool", "tool_call_id": "x"}], "messages[1].tool_call_id"),
    ([calling(call()), {"role": "tool", "tool_call_id": 7}], "messages[1].tool_call_id"),
    ([calling(call()), {"role": "tool", "name": "</s>"}], "messages[1].name"),
    ([calling(call()), {"role": "tool"}, {"role": "tool"}], "messages[2]"),
]


@pytest.mark.parametrize(("raw", "param"), REFUSED, ids=[f"{i}" for i in range(len(REFUSED))])
def test_what_is_wrong_is_refused_by_its_place(raw: object, param: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        parse_messages(raw)
    assert caught.value.param == param
    assert caught.value.message.startswith(param)
    assert caught.value.message.count("\n") == 0


@pytest.mark.parametrize("kind", ["image_url", "input_image", "image"])
def test_an_image_is_refused_as_an_image(kind: str) -> None:
    with pytest.raises(BadRequestError, match="image") as caught:
        parse_messages([HI | {"content": [{"type": "text", "text": "a"}, {"type": kind}]}])
    assert caught.value.param == "messages[0].content[1]"


def test_parts_are_the_same_as_their_joined_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "input_text", "text": " b"}]
    assert parse_messages([HI | {"content": parts}]) == (Message(role="user", content="a b"),)


def test_developer_is_system_and_unknown_fields_are_ignored() -> None:
    raw = [{"role": "developer", "content": "x", "cache_control": 5, "name": None, "tool_calls": 1}]
    assert parse_messages(raw) == (Message(role="system", content="x"),)


@pytest.mark.parametrize(
    "fields",
    [
        {"reasoning_content": "why", "content": "so"},
        {"reasoning": "why", "content": "so", "reasoning_content": None},
        {"content": [{"type": "thinking", "thinking": "why"}, {"type": "text", "text": "so"}]},
        {
            "content": [
                {"type": "thinking", "thinking": [{"type": "text", "text": "why"}], "closed": True},
                {"type": "text", "text": "so"},
            ]
        },
    ],
)
def test_thinking_is_taken_in_every_dialect(fields: dict[str, Any]) -> None:
    (message,) = parse_messages([{"role": "assistant", **fields}])
    assert message == Message(role="assistant", content="so", reasoning="why")


@pytest.mark.parametrize("role", ["user", "system", "assistant"])
def test_thinking_tags_within_a_text_stay_text(role: str) -> None:
    for content in ("<think>a</think>b", "[THINK]a[/THINK]b"):
        (message,) = parse_messages([{"role": role, "content": content}])
        assert (message.content, message.reasoning) == (content, "")


def test_parts_keep_their_order_until_the_text_is_replaced() -> None:
    listed = [
        {"type": "text", "text": "a"},
        {"type": "thinking", "thinking": "b", "closed": False},
        {"type": "text", "text": "c"},
    ]
    (message,) = parse_messages([{"role": "assistant", "content": listed}])
    assert (message.content, message.reasoning) == ("ac", "b")
    thinking = Part(text="b", thinking=True, closed=False)
    assert message.parts == (Part(text="a"), thinking, Part(text="c"))
    assert replace(message, content="d").parts == (Part(text="b", thinking=True), Part(text="d"))


def test_a_system_message_may_hold_thinking() -> None:
    content = [{"type": "thinking", "thinking": "so"}, {"type": "text", "text": "x"}]
    (message,) = parse_messages([{"role": "system", "content": content}])
    assert message.parts == (Part(text="so", thinking=True), Part(text="x"))


@pytest.mark.parametrize("arguments", ['{"a": [1, "ü"]}', {"a": [1, "ü"]}])
def test_arguments_are_taken_as_text_and_as_an_object(arguments: Any) -> None:
    (message,) = parse_messages([calling(call(arguments))])
    assert message.tool_calls[0].arguments == {"a": [1, "ü"]}
    assert message.tool_calls[0].arguments_json == '{"a": [1, "ü"]}'


@pytest.mark.parametrize("arguments", ["", None])
def test_missing_arguments_are_an_empty_object(arguments: Any) -> None:
    assert parse_messages([calling(call(arguments))])[0].tool_calls[0].arguments == {}


def test_results_find_their_calls_in_any_order_and_without_ids() -> None:
    raw = [
        calling(call(id="one"), call(id="two"), call(id=None)),
        {"role": "tool", "content": "2", "tool_call_id": "two"},
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": None},
    ]
    parsed = parse_messages(raw)
    assert [message.tool_call_id for message in parsed[1:]] == ["two", "one", "call00002"]
    assert parsed[3].content == ""


@pytest.mark.parametrize("empty", [{}, {"content": None}, {"content": ""}, {"content": []}])
def test_an_empty_assistant_message_is_dropped(empty: dict[str, Any]) -> None:
    assert parse_messages([HI, {"role": "assistant", **empty}, HI]) == parse_messages([HI, HI])
    last = parse_messages([HI, {"role": "assistant", **empty}])  # it may be to be continued
    assert without_empty_answers(last) == parse_messages([HI])


def test_calls_of_neighbouring_messages_are_all_open() -> None:
    raw = [calling(call(id="one")), calling(call(id=None)), {"role": "tool", "tool_call_id": "one"}]
    parsed = parse_messages([*raw, {"role": "tool"}])
    assert [message.tool_call_id for message in parsed[2:]] == ["one", "call00001"]
    with pytest.raises(BadRequestError) as caught:
        parse_messages([calling(call(id="one")), calling(call(id="one"))])
    assert caught.value.param == "messages[1].tool_calls[0].id"


def test_a_system_message_leaves_calls_open_and_a_user_closes_them() -> None:
    between = {"role": "system", "content": "Note."}
    assert len(parse_messages([calling(call()), between, {"role": "tool"}])) == 3
    with pytest.raises(BadRequestError) as caught:
        parse_messages([calling(call()), HI, {"role": "tool"}])
    assert caught.value.param == "messages[2]"


def test_halves_of_surrogate_pairs_are_joined_or_replaced() -> None:
    raw = [HI | {"content": "a\ud83d\ude42b\ud83dc\x00"}, calling(call({"\udc00": "\ud800"}))]
    first, second = parse_messages(raw)
    assert first.content == "a🙂b\ufffdc\x00"
    assert second.tool_calls[0].arguments == {"\ufffd": "\ufffd"}


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters())
    | st.just("user"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "tool_calls", "function", "name"])
            | st.text(max_size=2),
            inner,
            max_size=5,
        )
    ),
    max_leaves=20,
)


@given(json_values)
def test_any_json_is_either_parsed_or_refused_with_its_place(raw: Any) -> None:
    for parse in (parse_messages, parse_tools):
        try:
            parse(raw)
        except BadRequestError as error:
            assert error.param.startswith(("messages", "tools"))
            error.message.encode()


def tool(**function: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": "f", **function}}]


def test_a_tool_needs_only_its_name() -> None:
    (parsed,) = parse_tools(tool(parameters=None, description=None, more=5))
    assert (parsed.name, parsed.description, parsed.strict) == ("f", "", False)
    assert parsed.parameters == {}
    assert parse_tools(None) == parse_tools([]) == ()


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(levels):
        schema = {"properties": schema}
    return schema


@pytest.mark.parametrize(
    ("raw", "param"),
    [
        ({}, "tools"),
        ([5], "tools[0]"),
        ([{}], "tools[0].function"),
        ([{"type": "mcp", "function": {"name": "f"}}], "tools[0].type"),
        (tool(name=None), "tools[0].function.name"),
        (tool(name="a/b"), "tools[0].function.name"),
        (tool(name="x" * 129), "tools[0].function.name"),
        (tool(description=5), "tools[0].function.description"),
        (tool(parameters=5), "tools[0].function.parameters"),
        (tool(parameters=deep(900)), "tools[0].function.parameters"),
        (tool(parameters={"a": math.nan}), "tools[0].function.parameters"),
        (tool() + tool(), "tools[1].function.name"),
    ],
)
def test_a_wrong_tool_is_refused_by_its_place(raw: object, param: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        parse_tools(raw)
    assert caught.value.param == param
