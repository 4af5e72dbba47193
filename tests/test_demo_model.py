"""The model in the box: what its file says, whether llama.cpp computes what torch did, what it can.

Pairs of numbers, ranges and cities here are held out: training never showed them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from eval_demo_model import heldout_maker, measure

from localmistral.engine import EngineSettings, Request, Sampling
from localmistral.engine.model import Context, Model
from localmistral.models.gguf import read_shape
from localmistral.models.header import read_header
from localmistral.models.metadata import Metadata
from localmistral.session import Chat

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "localmistral" / "data" / "demo.gguf"
REFERENCE = ROOT / "tests" / "data" / "demo_logits.json"
MAX_FILE_BYTES = 5_000_000
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the current weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "The name of the city"}},
            "required": ["city"],
        },
    },
}


@pytest.fixture(scope="module")
def demo() -> Iterator[Chat]:
    with Chat.load(str(DEMO), EngineSettings(threads=1)) as chat:
        yield chat


def write(chat: Chat, messages: list[dict[str, Any]], effort: str, **rest: Any) -> str:
    """The model's most likely answer, control tokens spelled out."""
    prompt = chat.encode(chat.render(messages, effort=effort, **rest))
    request = Request(prompt=prompt, max_tokens=300, sampling=Sampling(temperature=0.0))
    return "".join(event.text for event in chat.engine.submit(request)).removesuffix("</s>")


def ask(chat: Chat, question: str, effort: str, **rest: Any) -> str:
    return write(chat, [{"role": "user", "content": question}], effort, **rest)


def test_the_file_is_small_and_says_that_it_is_a_toy() -> None:
    data = DEMO.read_bytes()
    metadata = Metadata(header=read_header(data, len(data), DEMO.name), buffer=data)
    description = metadata.text("general.description") or ""
    assert len(data) <= MAX_FILE_BYTES
    assert read_shape(DEMO).name == "localmistral demo"
    assert metadata.text("general.license") == "apache-2.0"
    assert re.search("toy.*no weights of Mistral AI", description)
    assert read_shape(DEMO).architecture == "mistral4"


def test_llama_cpp_agrees_with_torch_on_the_logits() -> None:
    """q8_0 moves logits a little, and far where a near-tied router picks the other expert."""
    settings = EngineSettings(context=1024, threads=1)
    model = Model([DEMO], settings)
    context = Context(model, settings)
    gaps, same = [], []
    try:
        for prompt in json.loads(REFERENCE.read_text(encoding="utf-8"))["prompts"]:
            context.clear_batch()
            context.cut(0, 0)
            count = len(prompt["tokens"])
            first = context.add(0, 0, prompt["tokens"], logits=count)
            assert context.decode() == 0
            for n, (ids, wanted) in enumerate(zip(prompt["ids"], prompt["logits"], strict=True)):
                logits = context.logits(first + n)
                gaps.append(float(np.abs(logits[ids] - wanted).max()))
                same.append(int(logits.argmax()) == ids[0])
    finally:
        context.close()
        model.close()
    assert len(gaps) > 200
    assert float(np.median(gaps)) < 0.25
    assert float(np.quantile(gaps, 0.9)) < 0.8
    assert np.mean(same) > 0.93


@pytest.mark.parametrize(("effort", "thinks"), [("high", True), ("none", False)])
@pytest.mark.parametrize(
    "question", ["What is 31 + 46?", "Count from 3 to 9.", "Hello", "Write a poem about cheese."]
)
def test_it_thinks_exactly_when_asked(demo: Chat, question: str, effort: str, thinks: bool) -> None:
    answer = ask(demo, question, effort)
    assert bool(re.match(r"\[THINK\][^\[]+\[/THINK\][^\[]+$", answer)) == thinks, answer
    assert thinks or "THINK]" not in answer


@pytest.mark.parametrize("question", ["What is 31 + 46?", "31+46", "Please add 31 and 46"])
def test_with_thinking_it_adds_two_numbers_it_never_saw_together(demo: Chat, question: str) -> None:
    assert ask(demo, question, "high").endswith("[/THINK]31 + 46 = 77.")


def test_a_follow_up_goes_on_from_the_last_result(demo: Chat) -> None:
    messages = [
        {"role": "user", "content": "What is 31 + 46?"},
        {"role": "assistant", "content": "31 + 46 = 77."},
        {"role": "user", "content": "And plus 5?"},
    ]
    assert write(demo, messages, "high").endswith("[/THINK]77 + 5 = 82.")


@pytest.mark.parametrize("effort", ["none", "high"])
def test_counting_stops_where_told(demo: Chat, effort: str) -> None:
    answer = ask(demo, "Count from 3 to 9.", effort)
    assert answer.endswith("3, 4, 5, 6, 7, 8, 9."), answer


@pytest.mark.parametrize("city", ["Oslo", "Lisbon", "Kampala"])
@pytest.mark.parametrize("effort", ["none", "high"])
def test_it_calls_a_tool_with_a_city_it_never_saw(demo: Chat, city: str, effort: str) -> None:
    answer = ask(demo, f"What is the weather in {city}?", effort, tools=[WEATHER])
    call = f'[TOOL_CALLS]get_weather[ARGS]{{"city": "{city}"}}'
    assert answer[answer.find("[TOOL_CALLS]") :] == call, answer


def test_it_answers_from_what_the_tool_returned(demo: Chat) -> None:
    call = {
        "id": "abcdefghi",
        "type": "function",
        "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'},
    }
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "What is the weather in Oslo?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "abcdefghi", "content": "17 C, cloudy"},
    ]
    assert write(demo, messages, "none", tools=[WEATHER]) == "In Oslo: 17 C, cloudy."


@pytest.mark.parametrize(
    ("kind", "effort", "mark", "least"),
    [
        ("addition", "high", "right", 0.9),
        ("and plus", "high", "right", 0.85),
        ("count", "none", "right", 0.8),
        ("count", "high", "right", 0.8),
        ("weather", "none", "place", 0.8),
        ("weather", "high", "place", 0.8),
    ],
)
def test_what_it_learnt_holds_for_cases_it_never_saw(
    demo: Chat, kind: str, effort: str, mark: str, least: float
) -> None:
    """A quick look at what scripts/eval_demo_model.py measures with more cases."""
    tally = measure(demo, heldout_maker(DEMO), kind, effort, 20)
    marks = next(iter(tally.values()))
    assert marks["answers"] == 20
    assert marks["effort"] >= 19
    assert marks[mark] >= least * 20


def test_without_a_tool_it_says_so_and_calls_none(demo: Chat) -> None:
    answer = ask(demo, "What is the weather in Lisbon?", "none")
    assert answer == "I cannot look up the weather: I have no tool for it."


def test_it_claims_only_what_it_can_do(demo: Chat) -> None:
    answer = ask(demo, "What can you do?", "none")
    assert "count" in answer
    assert "repeat" not in answer.lower()
