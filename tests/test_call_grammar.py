"""Forced calls in every family's syntax: written by a real model, read by the family's parser."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import numpy as np
import pytest

from localmistral.answer import ChatResult
from localmistral.chatformat.call_grammar import write_call_grammar, write_optional_calls
from localmistral.chatformat.messages import parse_tools
from localmistral.chatformat.mistral_parser import MistralParser
from localmistral.chatformat.parser import OutputParser, TagParser, ToolCallDelta
from localmistral.engine import Request, Sampling
from localmistral.engine.constraints import ConstraintCompiler, JsonSchema, Lark
from localmistral.engine.guidance import GrammarConstraint, GrammarTokenizer, compose
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
    forms = [f"%json {json.dumps(tool.parameters)}" for tool in tools]
    grammar = write_call_grammar(control, tools, forms, several=several)
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


STRICT = [{**tool, "function": {**tool["function"], "strict": True}} for tool in TOOLS]  # type: ignore[dict-item]


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_a_text_may_be_followed_by_calls_that_fit_and_by_no_others(chat: Chat, syntax: str) -> None:
    control = SYNTAXES[syntax]
    tools = parse_tools(STRICT)
    forms = [f"%json {json.dumps(tool.parameters)}" for tool in tools]
    grammar = write_optional_calls(control, tools, forms, None)
    tokenizer = GrammarTokenizer(chat.engine.tokenizer)
    call_id = "<[33]>abcdefghi" if syntax == "v11" else ""
    good, bad = (
        {
            "v15": f"<[9]>add<[32]>{arguments}",
            "v11": f"<[9]>add{call_id}<[32]>{arguments}",
            "v7": f'<[9]>[{{"name": "add", "arguments": {arguments}, "id": "abcdefghi"}}]',
            "tags": f'<tool_call>\n{{"name": "add", "arguments": {arguments}}}\n</tool_call>',
        }[syntax]
        for arguments in ('{"a": 5, "b": 7}', '{"a": "five"}')
    )
    for text in ("", "Hello!\n\nIt's <b>good</b> {to} see you. ", "ünï ☃"):
        assert follows(chat, tokenizer, grammar, text)
        assert follows(chat, tokenizer, grammar, text + good)
        assert not follows(chat, tokenizer, grammar, text + bad)
        if syntax != "v7":
            assert follows(chat, tokenizer, grammar, text + good + good)
            assert not follows(chat, tokenizer, grammar, text + good + bad)


def follows(chat: Chat, tokenizer: GrammarTokenizer, grammar: str, text: str) -> bool:
    """Whether a whole answer is allowed by a grammar; `<[9]>` in it is the token with id 9."""
    constraint = GrammarConstraint(tokenizer, compose(grammar), lenient=False)
    logits = np.zeros(tokenizer.size, np.float32)
    for part in re.split(r"(<\[\d+\]>)", text):
        control = re.fullmatch(r"<\[(\d+)\]>", part)
        tokens = [int(control[1])] if control else chat.engine.tokenize(part)
        for token in tokens:
            logits[:] = 0
            constraint.mask(logits)
            if not np.isfinite(logits[token]):
                return False
            constraint.accept(token)
    logits[:] = 0
    constraint.mask(logits)
    return bool(np.isfinite(logits[list(tokenizer.ends)]).any())


@pytest.mark.parametrize("seed", range(6))
def test_strict_arguments_fit_whatever_the_model_wants(chat: Chat, seed: int) -> None:
    messages = [{"role": "user", "content": "What is the weather in Oslo?"}]
    tools = [
        make_tool("get_weather", city={"enum": ["Rome", "Lima"]}, day=NUMBER),
        make_tool("add", a=NUMBER, b=NUMBER),
    ]
    for tool in tools:
        tool["function"]["strict"] = True  # type: ignore[index]
    stream = chat.stream(
        messages, tools=tools, max_tokens=300, sampling={"temperature": 0.8, "seed": seed}
    )
    for _ in stream:
        continue
    assert stream.result is not None
    assert stream.result.tool_calls, stream.result.content
    for call in stream.result.tool_calls:
        values = json.loads(call.arguments)
        if call.name == "get_weather":
            assert values["city"] in ("Rome", "Lima")
            assert 0 <= values["day"] <= 99
        else:
            assert set(values) == {"a", "b"}


def test_a_call_may_stand_in_place_of_an_answer_of_a_form(chat: Chat) -> None:
    schema = {
        "type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"],
        "additionalProperties": False,
    }  # fmt: skip

    def ask(content: str) -> ChatResult:
        stream = chat.stream(
            [{"role": "user", "content": content}], tools=[make_tool("get_weather", city=CITY)],
            output=JsonSchema(schema=schema), max_tokens=100,
        )  # fmt: skip
        for _ in stream:
            continue
        assert stream.result is not None
        return stream.result

    called = ask("What is the weather in Oslo?")
    assert json.loads(called.tool_calls[0].arguments) == {"city": "Oslo"}
    answered = ask("What is 31 + 46?")
    assert answered.tool_calls or set(json.loads(answered.content)) == {"ok"}


def test_a_forced_call_comes_before_an_answer_of_a_form(chat: Chat) -> None:
    stream = chat.stream(
        [{"role": "user", "content": "Hi"}], tools=TOOLS, tool_choice="add",
        output=JsonSchema(schema={"type": "object"}), max_tokens=100,
    )  # fmt: skip
    for _ in stream:
        continue
    assert stream.result is not None
    assert stream.result.tool_calls[0].name == "add"


def test_an_unenforceable_schema_matters_only_where_it_is_enforced(chat: Chat) -> None:
    odd = make_tool("odd", x={"type": "string", "maxLength": 10**9})
    messages = [{"role": "user", "content": "Hello"}]
    with chat.stream(messages, tools=[odd], max_tokens=2) as stream:
        assert list(stream)
    odd["function"]["strict"] = True  # type: ignore[index]
    with pytest.raises(BadRequestError, match="maxLength"):
        chat.stream(messages, tools=[odd], max_tokens=2)
