"""Mistral's official client, unchanged, against the server with the demo model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pydantic
import pytest
from live_server import LiveServer, serve_model
from mistralai.client import Mistral
from mistralai.client.errors import SDKError

from localmistral.engine import EngineSettings

SUM: Any = [{"role": "user", "content": "What is 31 + 46?"}]
WEATHER: Any = [{"role": "user", "content": "What is the weather in Oslo?"}]
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


class Answer(pydantic.BaseModel):
    """A form for an answer."""

    model_config = pydantic.ConfigDict(extra="forbid")
    is_even: bool


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with serve_model("demo", EngineSettings(threads=1, parallel=2)) as live:
        yield live


@pytest.fixture
def client(server: LiveServer) -> Iterator[Mistral]:
    with Mistral(api_key="any", server_url=server.url) as found:
        yield found


def content_of(message: Any) -> tuple[str, str]:
    """Thinking and text of a message's content, a text or a list of chunks."""
    if isinstance(message.content, str):
        return "", message.content
    thinking = "".join(
        part.text for c in message.content if c.type == "thinking" for part in c.thinking
    )
    return thinking, "".join(c.text for c in message.content if c.type == "text")


def test_the_models_are_listed_and_described(client: Any) -> None:
    listed = client.models.list()
    assert listed.data is not None
    assert [model.id for model in listed.data] == ["demo"]
    described = client.models.retrieve(model_id="demo")
    assert described.capabilities.completion_chat
    assert described.capabilities.reasoning


def test_an_answer_and_its_stream_are_the_same(client: Any) -> None:
    whole = client.chat.complete(model="demo", messages=SUM)
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage.total_tokens
    with client.chat.stream(model="demo", messages=SUM) as stream:
        chunks = [event.data.choices[0].delta.content for event in stream]
    assert "".join(chunk for chunk in chunks if isinstance(chunk, str)) == (
        whole.choices[0].message.content
    )


def test_prompt_mode_reasoning_gives_thinking_in_chunks(client: Any) -> None:
    whole = client.chat.complete(model="demo", messages=SUM, prompt_mode="reasoning")
    thinking, text = content_of(whole.choices[0].message)
    assert thinking
    assert "77" in text
    seen = ["", ""]
    with client.chat.stream(model="demo", messages=SUM, prompt_mode="reasoning") as stream:
        for event in stream:
            delta = event.data.choices[0].delta
            if delta.content:
                for place, part in enumerate(content_of(delta)):
                    seen[place] += part
    assert tuple(seen) == (thinking, text)
    turns = [*SUM, whole.choices[0].message, {"role": "user", "content": "Why?"}]
    again = client.chat.complete(model="demo", messages=turns, max_tokens=20)
    assert again.usage.prompt_tokens
    assert whole.usage.prompt_tokens
    assert again.usage.prompt_tokens > whole.usage.prompt_tokens + 20


def test_effort_none_wins_over_prompt_mode(client: Any) -> None:
    made = client.chat.complete(
        model="demo", messages=SUM, prompt_mode="reasoning", reasoning_effort="none"
    )
    assert content_of(made.choices[0].message)[0] == ""


def test_a_random_seed_repeats_the_answer(client: Any) -> None:
    def ask(seed: int) -> Any:
        made = client.chat.complete(
            model="demo", messages=SUM, random_seed=seed, temperature=1.5, max_tokens=30
        )
        return made.choices[0].message.content

    assert ask(5) == ask(5)
    assert len({ask(seed) for seed in range(6)}) > 1


def test_a_tool_is_called_on_any_and_its_result_is_taken(client: Any) -> None:
    made = client.chat.complete(
        model="demo", messages=WEATHER, tools=TOOLS, tool_choice="any", parallel_tool_calls=False
    )
    message = made.choices[0].message
    assert made.choices[0].finish_reason == "tool_calls"
    assert message is not None
    assert isinstance(message.tool_calls, list)
    call = message.tool_calls[0]
    assert json.loads(str(call.function.arguments)) == {"city": "Oslo"}
    result = {
        "role": "tool", "tool_call_id": call.id, "name": "get_weather", "content": "12 degrees",
    }  # fmt: skip
    turns: Any = [*WEATHER, message, result]
    answered = client.chat.complete(model="demo", messages=turns, tools=TOOLS, max_tokens=60)
    assert "12" in str(answered.choices[0].message.content)


def test_a_streamed_call_comes_in_one_piece(client: Any) -> None:
    seen = []
    with client.chat.stream(model="demo", messages=WEATHER, tools=TOOLS) as stream:
        for event in stream:
            calls = event.data.choices[0].delta.tool_calls
            seen += calls if isinstance(calls, list) else []
    assert [call.function.name for call in seen] == ["get_weather"]
    assert json.loads(str(seen[0].function.arguments)) == {"city": "Oslo"}


def test_a_parsed_answer(client: Any) -> None:
    made = client.chat.parse(Answer, model="demo", messages=SUM)
    assert made.choices
    assert made.choices[0].message is not None
    assert isinstance(made.choices[0].message.parsed, Answer)


def test_an_answer_goes_on_from_a_prefix(client: Any) -> None:
    begun: Any = [*SUM, {"role": "assistant", "content": "31 + 46 = ", "prefix": True}]
    made = client.chat.complete(model="demo", messages=begun, max_tokens=4)
    asked = client.chat.complete(model="demo", messages=SUM, max_tokens=4)
    assert made.usage.prompt_tokens
    assert asked.usage.prompt_tokens
    assert made.usage.prompt_tokens > asked.usage.prompt_tokens
    assert not str(made.choices[0].message.content).startswith("31")


def test_errors_are_the_clients_own(client: Any) -> None:
    with pytest.raises(SDKError, match="404"):
        client.chat.complete(model="mistral-large", messages=SUM)
    with pytest.raises(SDKError, match="temperature"):
        client.chat.complete(model="demo", messages=SUM, temperature=-1)
