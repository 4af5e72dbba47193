"""Run with the server's /v1 as the only argument: litellm, unchanged, as four providers."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # nothing is fetched from elsewhere

import litellm
from pydantic import BaseModel, ConfigDict

BASE = sys.argv[1]
SUM = [{"role": "user", "content": "What is 31 + 46?"}]
WEATHER = [{"role": "user", "content": "What is the weather in Oslo?"}]
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather in a city",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
            },
        },
    }
]


class Parity(BaseModel):
    """A form for an answer."""

    model_config = ConfigDict(extra="forbid")
    is_even: bool


def ask(provider: str, messages: Any = SUM, base: str = BASE, **more: Any) -> Any:
    return litellm.completion(
        messages=messages, model=f"{provider}/demo", api_base=base, api_key="any", **more
    )


def check_openai() -> None:
    whole = ask("openai", temperature=0).choices[0].message.content
    chunks = ask("openai", temperature=0, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole
    thought = ask("openai", reasoning_effort="high").choices[0].message
    assert thought.reasoning_content
    assert "77" in thought.content
    shaped = ask("openai", response_format=Parity).choices[0].message.content
    assert set(json.loads(shaped)) == {"is_even"}


def check_tools() -> None:
    for provider in ("openai", "mistral", "hosted_vllm"):
        (call,) = ask(provider, WEATHER, tools=TOOLS, tool_choice="required",
                      parallel_tool_calls=False).choices[0].message.tool_calls  # fmt: skip
        assert json.loads(call.function.arguments) == {"city": "Oslo"}, provider
    chunks = list(ask("openai", WEATHER, tools=TOOLS, stream=True))
    (call,) = litellm.stream_chunk_builder(chunks).choices[0].message.tool_calls
    assert json.loads(call.function.arguments) == {"city": "Oslo"}


def check_other_routes() -> None:
    root = BASE.removesuffix("/v1")
    assert ask("anthropic", base=root, max_tokens=100).choices[0].message.content
    made = litellm.responses(
        input="What is 31 + 46?", model="openai/demo", api_base=BASE, api_key="any"
    )
    assert made.output[-1].content[0].text
    text = litellm.text_completion(
        prompt="31 + 46 =", model="text-completion-openai/demo", api_base=BASE, api_key="any",
        max_tokens=4,
    )  # fmt: skip
    assert text.choices[0].text


def check_errors() -> None:
    try:
        ask("openai", temperature=-1)
    except litellm.BadRequestError as error:
        assert "temperature" in str(error)
    else:
        raise AssertionError("a wrong temperature was taken")


for check in (check_openai, check_tools, check_other_routes, check_errors):
    check()
    print("PASS", check.__name__)
