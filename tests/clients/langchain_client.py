"""Run with the server's /v1 as the only argument: langchain-openai, unchanged."""

from __future__ import annotations

import sys
from typing import Any

from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel, ConfigDict

SUM, WEATHER = "What is 31 + 46?", "What is the weather in Oslo?"
SERVED: dict[str, Any] = {"model": "demo", "base_url": sys.argv[1], "api_key": "any"}


class Parity(BaseModel):
    """Whether a number is even."""

    model_config = ConfigDict(extra="forbid")
    is_even: bool


@tool  # type: ignore[untyped-decorator]
def get_weather(city: str) -> str:
    """The weather in a city"""
    return f"12 degrees in {city}"


def check_texts() -> None:
    model = ChatOpenAI(**SERVED, temperature=0)
    whole = model.invoke(SUM)
    assert whole.response_metadata["finish_reason"] == "stop"
    assert "".join(str(chunk.content) for chunk in model.stream(SUM)) == whole.content
    assert [answer.content for answer in model.batch([SUM] * 3)] == [whole.content] * 3
    asked = list(ChatOpenAI(**SERVED, stream_usage=True).stream(SUM))
    assert any(chunk.usage_metadata for chunk in asked)
    assert OpenAI(**SERVED, max_tokens=4).invoke("31 + 46 =")


def check_thinking() -> None:
    thought = ChatOpenAI(**SERVED, reasoning_effort="high").invoke(SUM)
    assert "77" in thought.content
    assert thought.usage_metadata["output_token_details"]["reasoning"] > 0
    newer = ChatOpenAI(**SERVED, use_responses_api=True, reasoning={"effort": "high"}).invoke(SUM)
    assert [block["type"] for block in newer.content_blocks] == ["reasoning", "text"]


def check_tools() -> None:
    for more in ({}, {"use_responses_api": True}):
        model = ChatOpenAI(**SERVED, temperature=0, max_tokens=80, **more).bind_tools([get_weather])
        asked = [HumanMessage(WEATHER)]
        called = model.invoke(asked)
        (call,) = called.tool_calls
        assert (call["name"], call["args"]) == ("get_weather", {"city": "Oslo"})
        told = model.invoke([*asked, called, get_weather.invoke(call)])
        assert "12" in str(told.text)
    merged: Any = None
    for chunk in ChatOpenAI(**SERVED).bind_tools([get_weather], strict=True).stream(WEATHER):
        merged = chunk if merged is None else merged + chunk
    assert merged.tool_calls[0]["args"] == {"city": "Oslo"}
    forced = ChatOpenAI(**SERVED).bind_tools([get_weather], tool_choice="any").invoke(SUM)
    assert forced.tool_calls


def check_forms() -> None:
    for method in ("json_schema", "function_calling"):
        made = ChatOpenAI(**SERVED).with_structured_output(Parity, method=method).invoke(SUM)
        assert isinstance(made, Parity), method


for check in (check_texts, check_thinking, check_tools, check_forms):
    check()
    print("PASS", check.__name__)
