"""The official OpenAI client, unchanged, against the server with the demo model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import openai
import pydantic
import pytest
from live_server import LiveServer, serve_model

from localmistral.engine import EngineSettings

SUM: list[Any] = [{"role": "user", "content": "What is 31 + 46?"}]
WEATHER: list[Any] = [{"role": "user", "content": "What is the weather in Oslo?"}]
FUNCTION: dict[str, Any] = {
    "name": "get_weather",
    "description": "The weather in a city",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
CHAT_TOOLS: list[Any] = [{"type": "function", "function": FUNCTION}]
TOOLS: list[Any] = [{"type": "function", **FUNCTION}]


class Answer(pydantic.BaseModel):
    """A form for an answer."""

    total: int
    is_even: bool


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with serve_model("demo", EngineSettings(threads=1, parallel=2)) as live:
        yield live


@pytest.fixture
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.base, api_key="any", max_retries=0) as found:
        yield found


def test_the_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").id == "demo"


def test_a_chat_answer_with_and_without_thinking(client: openai.OpenAI) -> None:
    plain = client.chat.completions.create(model="demo", messages=SUM)
    assert plain.choices[0].finish_reason == "stop"
    thought = client.chat.completions.create(model="demo", messages=SUM, reasoning_effort="high")
    message = thought.choices[0].message
    assert "77" in (message.content or "")
    assert message.model_extra is not None
    assert message.model_extra["reasoning_content"]
    assert thought.usage is not None
    assert thought.usage.completion_tokens_details is not None
    assert (thought.usage.completion_tokens_details.reasoning_tokens or 0) > 0


def test_a_chat_stream_with_its_usage(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="demo", messages=SUM, stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text.startswith("31 + 46 = ")
    assert chunks[-1].usage is not None


def test_the_async_client_streams_two_answers_at_once(server: LiveServer) -> None:
    async def ask(client: openai.AsyncOpenAI) -> str:
        stream = await client.chat.completions.create(model="demo", messages=SUM, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def ask_twice() -> list[str]:
        async with openai.AsyncOpenAI(base_url=server.base, api_key="any") as client:
            return list(await asyncio.gather(ask(client), ask(client)))

    assert all(text.startswith("31 + 46 = ") for text in asyncio.run(ask_twice()))


def test_a_parsed_answer(client: openai.OpenAI) -> None:
    parsed = client.chat.completions.parse(model="demo", messages=SUM, response_format=Answer)
    assert isinstance(parsed.choices[0].message.parsed, Answer)


def test_a_tool_call_and_the_answer_to_its_result(client: openai.OpenAI) -> None:
    first = client.chat.completions.create(model="demo", messages=WEATHER, tools=CHAT_TOOLS)
    message = first.choices[0].message
    assert first.choices[0].finish_reason == "tool_calls"
    assert message.tool_calls
    call: Any = message.tool_calls[0]
    assert json.loads(call.function.arguments) == {"city": "Oslo"}
    turns = [
        *WEATHER,
        message,
        {"role": "tool", "tool_call_id": call.id, "content": '{"temperature": 12}'},
    ]
    second = client.chat.completions.create(
        model="demo", messages=turns, tools=CHAT_TOOLS, max_tokens=60
    )
    assert second.choices[0].message.role == "assistant"


def test_a_streamed_tool_call_is_put_together_by_the_client(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model="demo", messages=WEATHER, tools=CHAT_TOOLS, tool_choice="required"
    ) as stream:
        final = stream.get_final_completion()
    calls = final.choices[0].message.tool_calls
    assert calls
    assert calls[0].function.name == "get_weather"


def test_completions_of_texts_and_of_tokens(server: LiveServer, client: openai.OpenAI) -> None:
    tokens = server.http.post("/tokenize", json={"prompt": "31 + 46 ="}).json()["tokens"]
    several: list[str] = ["31 + 46 =", "12 + 12 ="]
    for prompt, count in ((several, 2), (tokens, 1), ([tokens, tokens], 2)):
        made = client.completions.create(model="demo", prompt=prompt, max_tokens=4, temperature=0)
        assert [choice.index for choice in made.choices] == list(range(count))
    echoed = client.completions.create(
        model="demo", prompt="31 + 46 =", max_tokens=4, echo=True, n=2
    )
    assert all(choice.text.startswith("31 + 46 =") for choice in echoed.choices)
    scored = client.completions.create(model="demo", prompt="31 + 46 =", max_tokens=4, logprobs=2)
    logprobs = scored.choices[0].logprobs
    assert logprobs is not None
    assert "".join(logprobs.tokens or []) == scored.choices[0].text


def test_a_completion_stream_equals_the_whole(client: openai.OpenAI) -> None:
    arguments: dict[str, Any] = {
        "model": "demo", "prompt": "31 + 46 =", "max_tokens": 8, "temperature": 0,
    }  # fmt: skip
    whole = client.completions.create(**arguments).choices[0]
    chunks = list(client.completions.create(**arguments, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.text
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert [reason for reason in reasons if reason] == [whole.finish_reason]


def test_a_suffix_needs_a_model_with_tokens_for_it(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="suffix"):
        client.completions.create(model="demo", prompt="a", suffix="b")


def test_a_response_with_reasoning(client: openai.OpenAI) -> None:
    response = client.responses.create(
        model="demo", input="What is 31 + 46?", reasoning={"effort": "high"}
    )
    assert response.status == "completed"
    assert [item.type for item in response.output] == ["reasoning", "message"]
    assert "77" in response.output_text
    assert response.usage is not None
    assert response.usage.output_tokens_details.reasoning_tokens > 0


def test_a_streamed_response_equals_the_whole(client: openai.OpenAI) -> None:
    arguments: dict[str, Any] = {
        "model": "demo", "input": "What is 31 + 46?", "reasoning": {"effort": "high"},
    }  # fmt: skip
    whole = client.responses.create(**arguments)
    with client.responses.stream(**arguments) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert final.output_text == whole.output_text
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[0].type == "response.created"
    assert events[-1].type == "response.completed"


def test_a_response_goes_on_from_an_earlier_one(client: openai.OpenAI) -> None:
    first = client.responses.create(model="demo", input="What is 31 + 46?")
    second = client.responses.create(
        model="demo", input="And plus 5?", previous_response_id=first.id
    )
    assert first.usage is not None
    assert second.usage is not None
    assert second.usage.input_tokens > first.usage.input_tokens
    assert client.responses.retrieve(first.id).output_text == first.output_text
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)
    with pytest.raises(openai.BadRequestError, match="previous_response_id"):
        client.responses.create(model="demo", input="x", previous_response_id=first.id)


@pytest.mark.parametrize("choice", ["auto", "none"])
def test_input_tokens_are_counted_as_the_response_counts_them(
    client: openai.OpenAI, choice: Any
) -> None:
    asked: dict[str, Any] = {
        "model": "demo", "input": WEATHER, "instructions": "Be brief.", "tools": TOOLS,
        "tool_choice": choice,
    }  # fmt: skip
    counted = client.responses.input_tokens.count(**asked)
    made = client.responses.create(**asked, max_output_tokens=1)
    assert made.usage is not None
    assert counted.input_tokens == made.usage.input_tokens


def test_a_response_that_calls_and_its_output(client: openai.OpenAI) -> None:
    first = client.responses.create(
        model="demo", input=WEATHER, tools=TOOLS, tool_choice="required"
    )
    call: Any = first.output[-1]
    assert call.type == "function_call"
    assert set(json.loads(call.arguments)) == {"city"}
    output: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "12 degrees"}
    remembered = client.responses.create(
        model="demo", input=[output], previous_response_id=first.id, tools=TOOLS
    )
    sent = client.responses.create(
        model="demo",
        input=[*WEATHER, *first.output, output],  # type: ignore[list-item]
        tools=TOOLS,
    )
    assert remembered.usage is not None
    assert sent.usage is not None
    assert remembered.usage.input_tokens == sent.usage.input_tokens


def test_a_parsed_response(client: openai.OpenAI) -> None:
    parsed = client.responses.parse(model="demo", input="What is 31 + 46?", text_format=Answer)
    assert isinstance(parsed.output_parsed, Answer)


def test_a_cut_response_says_so(client: openai.OpenAI) -> None:
    response = client.responses.create(model="demo", input="What is 31 + 46?", max_output_tokens=2)
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"


def test_errors_are_the_clients_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-9", messages=SUM)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model="demo", messages=SUM, temperature=-1)
    with pytest.raises(openai.BadRequestError, match="tools"):
        client.responses.create(model="demo", input="x", tools=[{"type": "web_search"}])
