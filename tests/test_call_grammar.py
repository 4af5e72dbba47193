"""Forced calls in every family's syntax: written by a real model, read by the family's parser."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from localmistral.chatformat.call_grammar import write_call_grammar
from localmistral.chatformat.messages import parse_tools
from localmistral.chatformat.mistral_parser import MistralParser
from localmistral.chatformat.parser import OutputParser, TagParser, ToolCallDelta
from localmistral.engine import Request, Sampling
from localmistral.engine.constraints import ConstraintCompiler, Lark
from localmistral.errors import BadRequestError
from localmistral.session import Chat

CITY = {"type": "string", "maxLength": 10}
NUMBER = {"type": "integer", "minimum": 0, "maximum": 99}


def make_tool(name: str, **properties: object) -> dict[str, object]:
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    parameters["additionalProperties"] = False  # type: ignore[assignment]
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = [make_tool("get_weather", city=CITY), make_tool("add", a=NUMBER, b=NUMBER)]
# The control tokens that tell the syntaxes apart, at their ids in every Tekken vocabulary.
SYNTAXES = {
    "v15": {"[TOOL_CALLS]": 9, "[ARGS]": 32, "[CALL_ID]": 33, "[THINK]": 34, "[/THINK]": 35},
    "v11": {"[TOOL_CALLS]": 9, "[ARGS]": 32, "[CALL_ID]": 33},
    "v7": {"[TOOL_CALLS]": 9},
    "tags": {},
}


@pytest.fixture(scope="module")
def chat() -> Iterator[Chat]:
    with Chat.load("demo") as loaded:
        yield loaded


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("syntax", SYNTAXES)
def test_a_forced_call_is_read_back_with_arguments_that_fit(
    chat: Chat, syntax: str, several: bool, seed: int
) -> None:
    control = SYNTAXES[syntax]
    tools = parse_tools(TOOLS)
    schemas = [json.dumps(tool.parameters) for tool in tools]
    grammar = write_call_grammar(control, tools, schemas, several=several)
    constraint = ConstraintCompiler(chat.engine.tokenizer).compile(Lark(grammar=grammar))
    request = Request(
        prompt=tuple(chat.encode(chat.render([{"role": "user", "content": "Hello"}]))),
        constraint=constraint, sampling=Sampling(temperature=1.0, seed=seed), max_tokens=300,
    )  # fmt: skip
    parser: OutputParser = MistralParser(control, tools=True) if control else TagParser(tools=True)
    stream = chat.engine.submit(request)
    deltas = []
    for event in stream:
        text = "" if event.control and control else event.text
        deltas += parser.feed(-1 if event.token is None else event.token, text)
    deltas += parser.finish()
    assert stream.result is not None
    if several and stream.result.finish_reason == "length":
        pytest.skip("the toy went on calling")
    assert stream.result.finish_reason == "stop"
    calls: dict[int, list[str]] = {}
    for delta in deltas:
        assert isinstance(delta, ToolCallDelta), delta
        name_and_arguments = calls.setdefault(delta.index, ["", ""])
        name_and_arguments[0] += delta.name
        name_and_arguments[1] += delta.arguments
    assert len(calls) >= 1 if several else len(calls) == 1
    for name, arguments in calls.values():
        values = json.loads(arguments)
        if name == "add":
            assert all(0 <= values[key] <= 99 for key in ("a", "b"))
        else:
            assert name == "get_weather"
            assert len(values["city"]) <= 10


@pytest.mark.parametrize("effort", ["none", "high"])
@pytest.mark.parametrize("choice", ["required", "add", "get_weather"])
def test_tool_choice_makes_the_model_call(chat: Chat, choice: str, effort: str) -> None:
    messages = [{"role": "user", "content": "Hello there"}]
    stream = chat.stream(
        messages, tools=TOOLS, tool_choice=choice, effort=effort, max_tokens=400,
        sampling={"temperature": 1.0, "seed": 1},
    )  # fmt: skip
    for _ in stream:
        continue
    assert stream.result is not None
    assert stream.result.content == ""
    assert bool(stream.result.reasoning) == (effort == "high")
    names = {call.name for call in stream.result.tool_calls}
    assert names
    assert choice == "required" or names == {choice}
    if stream.result.finish_reason != "length":
        assert stream.result.finish_reason == "tool_calls"


@pytest.mark.parametrize(("choice", "tools"), [("nope", TOOLS), ("required", []), ("add", None)])
def test_a_choice_without_its_tool_is_refused(chat: Chat, choice: str, tools: object) -> None:
    with pytest.raises(BadRequestError, match="asks for a call") as refusal:
        chat.stream([{"role": "user", "content": "Hi"}], tools=tools, tool_choice=choice)
    assert refusal.value.param == "tool_choice"


def test_a_schema_that_cannot_be_enforced_is_named_with_its_tool(chat: Chat) -> None:
    tool = make_tool("deep", x={"type": "string", "maxLength": 10**9})
    with pytest.raises(BadRequestError, match="maxLength") as refusal:
        chat.stream([{"role": "user", "content": "Hi"}], tools=[tool], tool_choice="required")
    assert refusal.value.param.startswith("tools")
