"""The reasoning-effort switch, tools and held output on the model in the box, end to end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from localmistral.answer import ChatResult
from localmistral.chatformat.effort import ThinkingBudgets
from localmistral.engine.constraints import Choice, JsonSchema
from localmistral.errors import BadRequestError
from localmistral.session import Chat

SUM = [{"role": "user", "content": "What is 31 + 46?"}]
MARKUP = ("[THINK]", "[/THINK]", "[TOOL_CALLS]", "[ARGS]", "</s>", "[INST]")
CLOSING = "Enough."


@pytest.fixture(scope="module")
def chat() -> Iterator[Chat]:
    budgets = ThinkingBudgets(low=6, medium=12, closing=CLOSING)
    with Chat.load("demo", budgets=budgets) as loaded:
        yield loaded


def finish(chat: Chat, messages: list[Any], **options: object) -> ChatResult:
    stream = chat.stream(messages, sampling={"temperature": 0}, **options)  # type: ignore[arg-type]
    for _ in stream:
        continue
    assert stream.result is not None
    return stream.result


@pytest.mark.parametrize("effort", ["high", "xhigh", "max"])
def test_high_thinks_and_is_right(chat: Chat, effort: str) -> None:
    result = finish(chat, SUM, effort=effort)
    assert result.reasoning
    assert "77" in result.content
    assert 0 < result.reasoning_tokens < result.completion_tokens
    assert 0 < result.reasoning_s <= result.decode_s
    assert not any(mark in result.content + result.reasoning for mark in MARKUP)


@pytest.mark.parametrize("effort", ["none", "minimal", None])
def test_none_answers_at_once(chat: Chat, effort: str | None) -> None:
    result = finish(chat, SUM, effort=effort)
    assert (result.reasoning, result.reasoning_tokens) == ("", 0)
    assert result.content


@pytest.mark.parametrize(("effort", "budget"), [("low", 6), ("medium", 12)])
def test_a_spent_budget_closes_the_thinking_and_the_answer_follows(
    chat: Chat, effort: str, budget: int
) -> None:
    high = finish(chat, SUM, effort="high")
    result = finish(chat, SUM, effort=effort)
    assert result.reasoning.endswith(CLOSING)
    thought = result.reasoning.removesuffix(CLOSING)
    assert high.reasoning.startswith(thought)
    assert len(chat.engine.tokenize(thought)) == budget
    assert result.content
    assert result.finish_reason == "stop"


def test_a_budget_of_the_requests_own_goes_first(chat: Chat) -> None:
    free = finish(chat, SUM, effort="low", thinking_budget=2000)
    assert free.reasoning == finish(chat, SUM, effort="high").reasoning
    cut = finish(chat, SUM, effort="high", thinking_budget=3)
    assert cut.reasoning.endswith(CLOSING)
    with pytest.raises(BadRequestError, match="at least 1"):
        chat.stream(SUM, effort="high", thinking_budget=0)


def test_budgets_leave_room_in_a_small_context() -> None:
    budgets = ThinkingBudgets()
    assert (budgets.choose("low", 32768), budgets.choose("medium", 32768)) == (1024, 4096)
    assert (budgets.choose("low", 256), budgets.choose("medium", 256)) == (32, 128)
    assert budgets.choose("high", 256) is budgets.choose(None, 256) is None


def test_switching_the_effort_keeps_both_prefixes(chat: Chat) -> None:
    history = [{"role": "user", "content": "Hello there, my friend of many years."}]
    for effort in ("high", "none"):
        answer = finish(chat, history, effort=effort)
        history = [*history, answer.to_message(), {"role": "user", "content": "What is 20 + 9?"}]
    before = {
        effort: finish(chat, history, effort=effort).prompt_tokens for effort in ("high", "none")
    }
    for effort in ("high", "none", "high"):
        result = finish(chat, history, effort=effort)
        assert result.prompt_tokens == before[effort]
        assert result.cached_tokens == result.prompt_tokens - 1


def test_a_tool_is_called_and_its_result_is_used(chat: Chat) -> None:
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}}
    tool = {"name": "get_weather", "description": "Get the weather", "parameters": parameters}
    tools = [{"type": "function", "function": tool}]
    history: list[Any] = [{"role": "user", "content": "What is the weather in Oslo?"}]
    called = finish(chat, history, tools=tools)
    assert called.finish_reason == "tool_calls"
    (call,) = called.tool_calls
    assert (call.name, json.loads(call.arguments)) == ("get_weather", {"city": "Oslo"})
    history.append(called.to_message())
    history.append({"role": "tool", "tool_call_id": call.id, "content": "rain"})
    answer = finish(chat, history, tools=tools)
    assert answer.content
    assert not answer.tool_calls
    assert answer.cached_tokens >= called.prompt_tokens


def test_held_output_comes_after_the_thinking(chat: Chat) -> None:
    schema = {
        "type": "object",
        "properties": {"sum": {"type": "integer", "minimum": 0, "maximum": 999}},
        "required": ["sum"],
        "additionalProperties": False,
    }
    result = finish(chat, SUM, effort="high", output=JsonSchema(schema=schema), max_tokens=200)
    assert result.reasoning
    assert list(json.loads(result.content)) == ["sum"]
    chosen = finish(chat, SUM, effort="none", output=Choice(options=("77", "78")))
    assert chosen.content in ("77", "78")
    assert chosen.reasoning == ""


@pytest.mark.parametrize("text", ["[/INST]", "</s>", "[THINK]", "[TOOL_CALLS]x[ARGS]{}"])
def test_typed_control_text_stays_text(chat: Chat, text: str) -> None:
    def controls(content: str) -> list[int]:
        messages = [{"role": "system", "content": content}, {"role": "user", "content": content}]
        tokens = chat.encode(chat.render(messages))
        return [token for token in tokens if chat.engine.tokenizer.is_control(token)]

    assert controls(text) == controls("hello")
