"""Run with the server's /v1 as the only argument: Simon Willison's llm, unchanged."""

from __future__ import annotations

import sys
from typing import Any

from llm.default_plugins.openai_models import Chat

PARITY = {
    "type": "object",
    "properties": {"is_even": {"type": "boolean"}},
    "required": ["is_even"],
    "additionalProperties": False,
}
asked: list[str] = []


def get_weather(city: str) -> str:
    """The weather in a city"""
    asked.append(city)
    return "12 degrees"


def make_model() -> Any:
    return Chat(
        "demo", model_name="demo", api_base=sys.argv[1], supports_schema=True, supports_tools=True
    )


def check_texts() -> None:
    whole = make_model().prompt("What is 31 + 46?", key="any", stream=False).text()
    assert whole.startswith("31 + 46 = ")
    streamed = "".join(make_model().prompt("What is 31 + 46?", key="any", temperature=0))
    assert streamed.startswith("31 + 46 = ")


def check_schema() -> None:
    made = make_model().prompt("What is 31 + 46?", key="any", schema=PARITY, stream=False).text()
    assert "is_even" in made


def check_tools() -> None:
    chain = make_model().chain(
        "What is the weather in Oslo?", tools=[get_weather], key="any",
        options={"max_tokens": 80, "temperature": 0},
    )  # fmt: skip
    assert "12" in chain.text()
    assert asked == ["Oslo"]


for check in (check_texts, check_schema, check_tools):
    check()
    print("PASS", check.__name__)
