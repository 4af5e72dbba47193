"""pydantic-ai, unchanged, against the server with the demo model, through both of OpenAI's APIs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator

import openai
import pydantic
import pytest
from live_server import LiveServer, serve_model
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.messages import TextPart, ThinkingPart
from pydantic_ai.models import Model
from pydantic_ai.models.openai import (
    OpenAIChatModel,
    OpenAIChatModelSettings,
    OpenAIResponsesModel,
)
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.settings import ModelSettings

from localmistral.engine import EngineSettings

SUM = "What is 31 + 46?"
WEATHER = "What is the weather in Oslo?"
GREEDY = ModelSettings(temperature=0, max_tokens=80)
THINKING = OpenAIChatModelSettings(openai_reasoning_effort="high")
MODELS = {"chat": OpenAIChatModel, "responses": OpenAIResponsesModel}

Run = Callable[[Callable[[Model], Awaitable[None]]], None]


class Parity(pydantic.BaseModel):
    """A form for an answer."""

    model_config = pydantic.ConfigDict(extra="forbid")
    is_even: bool


class CalledError(Exception):
    """A tool has been called: the run may end."""


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with serve_model("demo", EngineSettings(threads=1, parallel=2)) as live:
        yield live


@pytest.fixture(params=MODELS)
def run(server: LiveServer, request: pytest.FixtureRequest) -> Run:
    """Runs something asynchronous with a model, and closes its connections."""

    async def run_with_model(work: Callable[[Model], Awaitable[None]]) -> None:
        async with openai.AsyncOpenAI(base_url=server.base, api_key="any") as client:
            await work(MODELS[request.param]("demo", provider=OpenAIProvider(openai_client=client)))

    return lambda work: asyncio.run(run_with_model(work))


def test_an_answer_whole_and_streamed(run: Run) -> None:
    async def ask(model: Model) -> None:
        agent = Agent(model, model_settings=GREEDY)
        whole = await agent.run(SUM)
        async with agent.run_stream(SUM) as result:
            streamed = "".join([text async for text in result.stream_text(delta=True)])
        assert whole.output == streamed
        assert streamed.startswith("31 + 46 = ")

    run(ask)


def test_thinking_is_a_part_and_goes_back_into_the_history(run: Run) -> None:
    async def ask(model: Model) -> None:
        agent = Agent(model, model_settings=THINKING)
        first = await agent.run(SUM)
        kinds = [type(part) for part in first.all_messages()[-1].parts]
        assert kinds == [ThinkingPart, TextPart]
        assert "77" in first.output
        second = await agent.run("And 12 + 12?", message_history=first.all_messages())
        assert second.usage.input_tokens > first.usage.input_tokens

    run(ask)


def test_a_tool_runs_and_its_result_is_told(run: Run) -> None:
    async def ask(model: Model) -> None:
        agent = Agent(model, model_settings=GREEDY)
        asked: list[str] = []

        @agent.tool_plain
        def get_weather(city: str) -> str:
            """The weather in a city"""
            asked.append(city)
            return "12 degrees"

        assert "12 degrees" in (await agent.run(WEATHER)).output
        assert asked == ["Oslo"]

    run(ask)


def test_an_output_of_a_form_by_a_call_and_by_a_schema(run: Run) -> None:
    async def ask(model: Model) -> None:
        called = await Agent(model, output_type=Parity, model_settings=GREEDY).run(SUM)
        assert isinstance(called.output, Parity)
        form = NativeOutput(Parity)
        shaped = await Agent(model, output_type=form, model_settings=GREEDY).run(SUM)
        assert isinstance(shaped.output, Parity)

    run(ask)


def test_a_form_for_the_answer_leaves_room_for_tools(run: Run) -> None:
    async def ask(model: Model) -> None:
        agent = Agent(model, output_type=NativeOutput(Parity), model_settings=GREEDY)

        @agent.tool_plain
        def get_weather(city: str) -> str:
            """The weather in a city"""
            raise CalledError(city)

        await agent.run(WEATHER)

    with pytest.raises(CalledError, match=r"^Oslo$"):
        run(ask)
