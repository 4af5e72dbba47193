"""The official Anthropic client, unchanged, against the server with the demo model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from live_server import LiveServer, serve_model

from localmistral.engine import EngineSettings

SUM: list[Any] = [{"role": "user", "content": "What is 31 + 46?"}]
WEATHER: list[Any] = [{"role": "user", "content": "What is the weather in Oslo?"}]
TOOLS: list[Any] = [
    {
        "name": "get_weather",
        "description": "The weather in a city",
        "input_schema": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    }
]
THINKING: Any = {"type": "enabled", "budget_tokens": 1024}


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with serve_model("demo", EngineSettings(threads=1, parallel=2)) as live:
        yield live


@pytest.fixture
def client(server: LiveServer) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="any", max_retries=0) as found:
        yield found


def test_an_answer_without_thinking(client: anthropic.Anthropic) -> None:
    message = client.messages.create(model="demo", max_tokens=200, messages=SUM)
    assert [block.type for block in message.content] == ["text"]
    assert message.stop_reason == "end_turn"
    assert message.usage.output_tokens > 0


def test_thinking_is_a_block_of_its_own(client: anthropic.Anthropic) -> None:
    message = client.messages.create(model="demo", max_tokens=2000, messages=SUM, thinking=THINKING)
    assert [block.type for block in message.content] == ["thinking", "text"]
    assert "77" in message.content[1].to_dict()["text"]  # type: ignore[operator]


def test_a_stream_adds_up_to_the_whole_answer(client: anthropic.Anthropic) -> None:
    arguments: dict[str, Any] = {
        "model": "demo", "max_tokens": 2000, "messages": SUM, "thinking": THINKING,
    }  # fmt: skip
    whole = client.messages.create(**arguments)
    with client.messages.stream(**arguments) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    assert [b.to_dict()[b.type] for b in final.content] == [
        b.to_dict()[b.type] for b in whole.content
    ]
    assert final.stop_reason == "end_turn"
    assert final.usage.output_tokens == whole.usage.output_tokens
    assert kinds[0] == "message_start"
    assert kinds[-1] == "message_stop"


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_tool_is_called_and_its_result_is_taken(
    client: anthropic.Anthropic, is_streamed: bool
) -> None:
    arguments: dict[str, Any] = {
        "model": "demo", "max_tokens": 200, "messages": WEATHER, "tools": TOOLS,
        "tool_choice": {"type": "any"},
    }  # fmt: skip
    if is_streamed:
        with client.messages.stream(**arguments) as stream:
            message: Any = stream.get_final_message()
    else:
        message = client.messages.create(**arguments)
    assert message.stop_reason == "tool_use"
    call = message.content[-1]
    assert call.name == "get_weather"
    assert set(call.input) == {"city"}
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "12 degrees"}
    turns = [
        *WEATHER,
        {"role": "assistant", "content": message.content},
        {"role": "user", "content": [result, {"type": "text", "text": "And now?"}]},
    ]
    again = client.messages.create(model="demo", max_tokens=50, messages=turns, tools=TOOLS)
    assert again.stop_reason in ("end_turn", "tool_use", "max_tokens")


def test_the_end_says_why(client: anthropic.Anthropic) -> None:
    cut = client.messages.create(model="demo", max_tokens=3, messages=SUM)
    assert cut.stop_reason == "max_tokens"
    stopped = client.messages.create(
        model="demo", max_tokens=200, messages=SUM, stop_sequences=["="]
    )
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "=")


def test_tokens_are_counted_as_the_answer_counts_them(client: anthropic.Anthropic) -> None:
    counted = client.messages.count_tokens(
        model="demo", messages=SUM, system="Be brief.", tools=TOOLS
    )
    usage = client.messages.create(
        model="demo", max_tokens=1, messages=SUM, system="Be brief.", tools=TOOLS
    ).usage
    assert counted.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)


def test_errors_are_the_clients_own(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(model="claude-9", max_tokens=5, messages=SUM)
    with pytest.raises(anthropic.BadRequestError, match="temperature"):
        client.messages.create(
            model="demo", max_tokens=5, messages=SUM, extra_body={"temperature": -1}
        )
    image: Any = {"type": "image", "source": {"type": "url", "url": "http://169.254.169.254/"}}
    with pytest.raises(anthropic.BadRequestError, match="image"):
        client.messages.create(
            model="demo", max_tokens=5, messages=[{"role": "user", "content": [image]}]
        )
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        client.messages.create(model="demo", max_tokens=0, messages=SUM)
