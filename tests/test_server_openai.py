"""What OpenAI's own APIs promise, and what llama.cpp's and vLLM's clients add to them, over real
HTTP: limits, log-probabilities, forced calls, and responses that go on from one another."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from live_server import LiveServer, serve_model

from localmistral.engine import EngineSettings

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
SUM: list[Any] = [{"role": "user", "content": "What is 31 + 46?"}]
WEATHER: list[Any] = [{"role": "user", "content": "What is the weather in Oslo?"}]
FUNCTION: dict[str, Any] = {
    "name": "get_weather",
    "description": "The weather in a city",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
    },
}
TOOL = {"type": "function", "function": FUNCTION}
FLAT = {"type": "function", **FUNCTION}
LOGPROBS = {"include": ["message.output_text.logprobs"], "top_logprobs": 1}


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    settings = EngineSettings(threads=1, parallel=4, queue=16, context=2048)
    with serve_model("demo", settings) as live:
        yield live


def ask(server: LiveServer, path: str, **body: Any) -> dict[str, Any]:
    response = server.http.post(path, json={"temperature": 0, **body})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def chat(server: LiveServer, **body: Any) -> dict[str, Any]:
    """The first choice."""
    choice: dict[str, Any] = ask(server, CHAT, **{"messages": SUM, **body})["choices"][0]
    return choice


def respond(server: LiveServer, **body: Any) -> dict[str, Any]:
    return ask(server, RESPONSES, **{"input": SUM, "max_output_tokens": 60, **body})


def refuse(server: LiveServer, path: str, **body: Any) -> dict[str, Any]:
    response = server.http.post(path, json=body)
    assert response.status_code == 400, response.text
    error: dict[str, Any] = response.json()["error"]
    return error


def read_events(server: LiveServer, path: str, **body: Any) -> list[dict[str, Any]]:
    response = server.http.post(path, json={"temperature": 0, **body, "stream": True})
    assert response.status_code == 200, response.text
    lines = [line[6:] for line in response.text.splitlines() if line.startswith("data: {")]
    return [json.loads(line) for line in lines]


def tokenize(server: LiveServer, text: str) -> list[int]:
    body = {"prompt": text, "add_special_tokens": False}
    tokens: list[int] = server.http.post("/tokenize", json=body).json()["tokens"]
    return tokens


def text_of(response: dict[str, Any]) -> str:
    items = [item for item in response["output"] if item["type"] == "message"]
    return "".join(part["text"] for item in items for part in item["content"])


# Where an answer ends


def test_an_answer_has_min_tokens_at_least(server: LiveServer) -> None:
    usual = ask(server, CHAT, messages=SUM)["usage"]["completion_tokens"]
    for path, body in ((CHAT, {"messages": SUM}), (COMPLETIONS, {"prompt": "31 + 46 ="})):
        least = usual + 5
        longer = ask(server, path, **body, min_tokens=least, max_tokens=least + 10)
        assert longer["usage"]["completion_tokens"] >= least
    longer = respond(server, min_tokens=usual + 5)
    assert longer["usage"]["output_tokens"] >= usual + 5


def test_before_min_tokens_no_stop_string_or_token_ends_an_answer(server: LiveServer) -> None:
    plain = chat(server)["message"]["content"]
    assert plain.startswith("31 + 46 = ")
    assert chat(server, stop="+")["message"]["content"] == "31 "
    assert chat(server, stop="+", min_tokens=8)["message"]["content"] == plain
    plus = tokenize(server, "31 +")[-1]
    stopped = chat(server, stop_token_ids=[plus])
    assert stopped["message"]["content"] == "31"
    assert stopped["finish_reason"] == "stop"
    held = chat(server, stop_token_ids=[plus], min_tokens=5)["message"]["content"]
    assert len(tokenize(server, held)) >= 5


def test_a_form_that_is_complete_ends_before_min_tokens(server: LiveServer) -> None:
    choice = chat(server, guided_choice=["yes"], min_tokens=20)
    assert choice["message"]["content"] == "yes"
    assert choice["finish_reason"] == "stop"


def test_n_predict_limits_where_nothing_else_does(server: LiveServer) -> None:
    assert ask(server, CHAT, messages=SUM, n_predict=3)["usage"]["completion_tokens"] == 3
    both = ask(server, CHAT, messages=SUM, n_predict=3, max_tokens=4)
    assert both["usage"]["completion_tokens"] == 4
    assert ask(server, COMPLETIONS, prompt="1", n_predict=3)["usage"]["completion_tokens"] == 3


# Log-probabilities


@pytest.mark.parametrize("stop", ["= 1", "46", "+ 4", "12", "never"])
def test_tokens_of_a_stop_string_have_no_logprobs(server: LiveServer, stop: str) -> None:
    body: dict[str, Any] = {"messages": SUM, "logprobs": True, "top_logprobs": 1, "stop": stop}
    whole = chat(server, **body)
    text = whole["message"]["content"]
    told = [token["token"] for token in whole["logprobs"]["content"]]
    # only a token that the stop string began inside of may go on after the text
    assert "".join(told).startswith(text)
    assert len("".join(told[:-1])) < len(text)
    assert stop not in "".join(told)
    chunks = [event["choices"][0] for event in read_events(server, CHAT, **body)]
    streamed = [t["token"] for c in chunks if c["logprobs"] for t in c["logprobs"]["content"]]
    assert streamed == told
    assert "".join(c["delta"].get("content", "") for c in chunks) == text


@pytest.mark.parametrize("stop", ["= 3", None, "never"])
def test_text_offsets_are_places_in_the_text(server: LiveServer, stop: str | None) -> None:
    body: dict[str, Any] = {
        "prompt": "31 + 46 = 77. 12", "logprobs": 1, "stop": stop, "max_tokens": 10,
    }  # fmt: skip
    choice = ask(server, COMPLETIONS, **body)["choices"][0]
    found = choice["logprobs"]
    for token, offset in zip(found["tokens"], found["text_offset"], strict=True):
        assert choice["text"][offset:].startswith(token[: len(choice["text"]) - offset])
    for token, top in zip(found["tokens"], found["top_logprobs"], strict=True):
        assert token in top
    events = [event["choices"][0] for event in read_events(server, COMPLETIONS, **body)]
    streamed = [offset for e in events for offset in e["logprobs"]["text_offset"]]
    assert streamed == found["text_offset"]


def test_a_response_has_logprobs_where_they_are_included(server: LiveServer) -> None:
    assert respond(server)["output"][0]["content"][0]["logprobs"] == []
    part = respond(server, **LOGPROBS)["output"][0]["content"][0]
    assert "".join(token["token"] for token in part["logprobs"]) == part["text"]
    assert all(len(token["top_logprobs"]) == 1 for token in part["logprobs"])
    events = read_events(server, RESPONSES, input=SUM, **LOGPROBS)
    deltas = [e for e in events if e["type"] == "response.output_text.delta"]
    for event in deltas:
        assert "".join(token["token"] for token in event["logprobs"]) == event["delta"]
    assert refuse(server, RESPONSES, input=SUM, top_logprobs=21)["param"] == "top_logprobs"


# Completions


def test_no_prompt_is_a_new_text(server: LiveServer) -> None:
    absent = ask(server, COMPLETIONS)["choices"][0]["text"]
    assert absent == ask(server, COMPLETIONS, prompt=None)["choices"][0]["text"]
    assert absent == ask(server, COMPLETIONS, prompt="")["choices"][0]["text"]


def test_the_best_of_several_texts_are_told(server: LiveServer) -> None:
    body: dict[str, Any] = {
        "prompt": ["31 + 46 =", "The capital of"], "temperature": 2.0, "top_k": 0, "seed": 5,
        "logprobs": 0, "max_tokens": 6,
    }  # fmt: skip

    def rate(choice: dict[str, Any]) -> float:
        found = choice["logprobs"]["token_logprobs"]
        return float(sum(found) / len(found))

    every = ask(server, COMPLETIONS, **body, n=4)["choices"]
    best = ask(server, COMPLETIONS, **body, n=2, best_of=4)["choices"]
    assert [choice["index"] for choice in best] == [0, 1, 2, 3]
    for group in (0, 1):
        rates = sorted(map(rate, every[4 * group : 4 * group + 4]), reverse=True)
        told = list(map(rate, best[2 * group : 2 * group + 2]))
        assert told == pytest.approx(rates[:2], abs=0.05)
    hidden = ask(server, COMPLETIONS, **{**body, "logprobs": None}, best_of=2)["choices"][0]
    assert hidden["logprobs"] is None


def test_cached_tokens_are_never_more_than_the_prompt(server: LiveServer) -> None:
    body: dict[str, Any] = {"prompt": "The capital of France is a city", "max_tokens": 2}
    ask(server, COMPLETIONS, **body)
    usage = ask(server, COMPLETIONS, **body, n=4)["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] < usage["prompt_tokens"]


# Forms and tools


def test_what_cannot_be_enforced_is_ignored_where_strict_is_false(server: LiveServer) -> None:
    schema = {"type": "array", "items": {"type": "integer"}, "uniqueItems": True, "maxItems": 2}
    form: dict[str, Any] = {"name": "x", "schema": schema}

    def wrap(**more: Any) -> dict[str, Any]:
        return {"type": "json_schema", "json_schema": {**form, **more}}

    refuse(server, CHAT, messages=SUM, response_format=wrap())
    refuse(server, CHAT, messages=SUM, response_format=wrap(strict=True))
    loose = chat(server, response_format=wrap(strict=False))["message"]["content"]
    assert isinstance(json.loads(loose), list)
    flat = {"format": {"type": "json_schema", **form}}
    error = refuse(server, RESPONSES, input=SUM, text=flat)
    assert error["param"] == "text.format"
    flat["format"]["strict"] = False
    assert isinstance(json.loads(text_of(respond(server, text=flat))), list)


@pytest.mark.parametrize(
    "parameters",
    [
        None,
        {},
        {"properties": {"a": {"type": "string", "maxLength": 3}}, "additionalProperties": False},
        {"type": ["null", "object"], "additionalProperties": False},
        {
            "anyOf": [
                {"type": "null"},
                {"type": "object", "properties": {}, "additionalProperties": False},
            ]
        },
    ],
)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_arguments_are_an_object_whatever_their_schema_leaves_open(
    server: LiveServer, parameters: Any, seed: int
) -> None:
    # a bias towards what else the schema would let in: null, a number, a list
    others = [tokenize(server, text)[0] for text in ("null", "5", "[", '"')]
    function = {"name": "now", "parameters": parameters}
    choice = chat(
        server,
        tools=[{"type": "function", "function": function}],
        tool_choice="required", parallel_tool_calls=False, seed=seed, temperature=1.5,
        logit_bias=[[token, 30] for token in others], max_tokens=40,
    )  # fmt: skip
    assert choice["message"]["tool_calls"][0]["function"]["arguments"].startswith("{")


@pytest.mark.parametrize("name", ["auto", "none", "required"])
def test_a_tool_named_as_a_mode_is_called_when_it_is_chosen(server: LiveServer, name: str) -> None:
    own = {"name": name, "parameters": {"type": "object", "additionalProperties": False}}
    tools = [TOOL, {"type": "function", "function": own}]
    choice = {"type": "function", "function": {"name": name}}
    message = chat(server, tools=tools, tool_choice=choice, parallel_tool_calls=False)["message"]
    assert [call["function"]["name"] for call in message["tool_calls"]] == [name]
    flat = [FLAT, {"type": "function", **own}]
    chosen = {"type": "function", "name": name}
    made = respond(server, tools=flat, tool_choice=chosen, parallel_tool_calls=False)
    assert [item["name"] for item in made["output"]] == [name]


def test_thinking_can_be_left_out_and_asked_for_in_the_words_of_vllm(server: LiveServer) -> None:
    asked = chat(server, chat_template_kwargs={"thinking": True})
    assert asked["message"]["reasoning_content"]
    hidden = chat(server, reasoning_effort="high", include_reasoning=False)["message"]
    assert not {"reasoning", "reasoning_content"} & set(hidden)
    assert hidden["content"] == asked["message"]["content"]


# Responses that go on


def test_a_call_that_was_cut_off_does_not_spoil_what_follows(server: LiveServer) -> None:
    cut = respond(server, input=WEATHER, tools=[FLAT], tool_choice="required", max_output_tokens=7)
    assert cut["status"] == "incomplete"
    assert cut["output"][0]["status"] == "incomplete"
    on = respond(server, input="What is 31 + 46?", previous_response_id=cut["id"], tools=[FLAT])
    assert on["status"] == "completed"
    again = respond(server, input=[*WEATHER, *cut["output"], *SUM], tools=[FLAT])
    assert text_of(again) == text_of(on)


def test_items_may_be_referred_to(server: LiveServer) -> None:
    first = respond(server, input=WEATHER, tools=[FLAT])
    call = first["output"][-1]
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "12 C"}
    whole = respond(server, input=[*WEATHER, *first["output"], result], tools=[FLAT])
    for reference in ({"type": "item_reference", "id": call["id"]}, {"id": call["id"]}):
        referred = respond(server, input=[*WEATHER, reference, result], tools=[FLAT])
        assert referred["usage"]["input_tokens"] == whole["usage"]["input_tokens"]
        assert text_of(referred) == text_of(whole)
    unstored = respond(server, store=False)["output"][0]["id"]
    for name in ("msg_unknown", unstored):
        unknown = [*SUM, {"type": "item_reference", "id": name}]
        assert refuse(server, RESPONSES, input=unknown)["param"] == "input[1]"


def test_the_input_of_a_response_is_listed_in_pages(server: LiveServer) -> None:
    first = respond(server)
    second = respond(server, input="And 12 + 12?", previous_response_id=first["id"])
    path = f"{RESPONSES}/{second['id']}/input_items"
    listed = server.http.get(path, params={"order": "asc"}).json()
    assert [item["role"] for item in listed["data"]] == ["user", "assistant", "user"]
    assert listed["data"][2]["content"] == [{"type": "input_text", "text": "And 12 + 12?"}]
    ids = [item["id"] for item in listed["data"]]
    assert len(set(ids)) == 3
    newest = server.http.get(path, params={"limit": 1}).json()
    assert (newest["first_id"], newest["has_more"]) == (ids[2], True)
    rest = server.http.get(path, params={"after": ids[2]}).json()
    assert [item["id"] for item in rest["data"]] == [ids[1], ids[0]]
    assert not rest["has_more"]
    for wrong in ({"limit": 0}, {"limit": "x"}, {"order": "up"}, {"after": "nothing"}):
        assert server.http.get(path, params=wrong).status_code == 400
    assert server.http.get(f"{RESPONSES}/resp_x/input_items").status_code == 404


CALL = {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"}
ANSWER = {"role": "assistant", "content": "Hm."}


@pytest.mark.parametrize(
    ("items", "place"),
    [
        ([*SUM, {"role": "robot", "content": "x"}], "input[1].role"),
        ([*SUM, {**CALL, "arguments": "{oops"}], "input[1].arguments"),
        ([*SUM, ANSWER, CALL, {**CALL, "call_id": "b", "name": "a b"}], "input[3].name"),
        ([*SUM, CALL, CALL], "input[2].id"),
        ([*SUM, ANSWER, {"role": "assistant", "content": [{"type": "zzz"}]}],
         "input[2].content[0].type"),
        ([*SUM, ANSWER, {"role": "user", "content": [{"type": "input_text"}]}],
         "input[2].content[0].text"),
        ([*SUM, CALL, {"type": "function_call_output", "call_id": "z", "output": "x"}],
         "input[2].call_id"),
        ([*SUM, CALL, {"type": "function_call_output", "call_id": "a", "output": [{}]}],
         "input[2].output[0].type"),
        ([*SUM, {"type": "web_search_call", "id": "x"}], "input[1].type"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_an_item_names_the_item(
    server: LiveServer, items: list[Any], place: str
) -> None:
    first = respond(server)["id"]
    for more in ({}, {"instructions": "Be kind."}, {"previous_response_id": first}):
        for path in (RESPONSES, f"{RESPONSES}/input_tokens"):
            error = refuse(server, path, input=items, **more)
            assert error["param"] == place
            assert error["message"].startswith(place)
            assert "messages" not in error["message"]


def test_what_is_wrong_with_a_tool_names_its_place(server: LiveServer) -> None:
    for path in (RESPONSES, f"{RESPONSES}/input_tokens"):
        error = refuse(server, path, input=SUM, tools=[FLAT, {**FLAT, "name": "a b"}])
        assert error["param"] == "tools[1].name"
        assert error["message"].startswith("tools[1].name")


@pytest.mark.parametrize(
    ("field", "value"),
    [("conversation", "conv_1"), ("prompt", {"id": "p"}), ("background", True), ("n", 2)],
)
def test_what_only_openai_keeps_is_refused(server: LiveServer, field: str, value: Any) -> None:
    assert refuse(server, RESPONSES, input=SUM, **{field: value})["param"] == field
    respond(server, **{field: None})


def test_a_long_conversation_loses_its_oldest_turns_where_asked(server: LiveServer) -> None:
    turns: list[Any] = []
    for number in range(40):
        turns += [{"role": "user", "content": f"{number} " + "word " * 100}, ANSWER]
    system = {"role": "system", "content": "Be kind."}
    items = [system, *turns, *SUM]
    error = refuse(server, RESPONSES, input=items)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "input")
    body: dict[str, Any] = {"truncation": "auto", "max_output_tokens": 40}
    made = respond(server, input=items, **body)
    assert made["truncation"] == "auto"
    room = 2048 - made["usage"]["input_tokens"]
    assert 40 < room < 200
    # as many turns as fit, and the system message before them
    kept = [respond(server, input=[system, *turns[-2 * n :], *SUM], **body) for n in (16, 17, 18)]
    assert made["usage"]["input_tokens"] in [one["usage"]["input_tokens"] for one in kept]
    endless = [{"role": "user", "content": "word " * 3000}]
    assert refuse(server, RESPONSES, input=endless, truncation="auto")["param"] == "input"
    short = respond(server, truncation="auto")
    assert short["usage"] == respond(server)["usage"] | {
        "input_tokens_details": short["usage"]["input_tokens_details"]
    }


def test_thinking_comes_where_clients_for_hidden_thinking_look(server: LiveServer) -> None:
    body: dict[str, Any] = {
        "input": SUM, "reasoning": {"effort": "high", "summary": "auto"},
        "include": ["reasoning.encrypted_content"],
    }  # fmt: skip
    thought, answer = respond(server, **body, max_output_tokens=100)["output"]
    text = thought["content"][0]["text"]
    assert thought["summary"] == [{"type": "summary_text", "text": text}]
    events = read_events(server, RESPONSES, **body, max_output_tokens=100)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = [event["type"] for event in events]
    first = kinds.index("response.reasoning_summary_part.added")
    last = kinds.index("response.reasoning_summary_part.done")
    told = [e["delta"] for e in events if e["type"] == "response.reasoning_summary_text.delta"]
    assert "".join(told) == text
    assert kinds.index("response.output_item.added") < first
    assert last < kinds.index("response.output_item.done")
    # a client that keeps nothing but the sealed form gives the model its thinking back
    sealed = {"type": "reasoning", "summary": [], "encrypted_content": thought["encrypted_content"]}
    whole, back = (
        respond(server, input=[*SUM, item, answer, *SUM])["usage"]["input_tokens"]
        for item in (thought, sealed)
    )
    assert whole == back
    foreign = {**sealed, "encrypted_content": "gAAAAABo"}
    without = respond(server, input=[*SUM, foreign, answer, *SUM])["usage"]["input_tokens"]
    assert without < whole


def test_a_response_takes_the_sampling_of_other_servers(server: LiveServer) -> None:
    plain = text_of(respond(server))
    assert text_of(respond(server, stop=["="])) == plain.split("=")[0]
    seeded = [
        text_of(respond(server, temperature=2.0, top_k=0, seed=9, cache_prompt=False))
        for _ in range(2)
    ]
    assert seeded[0] == seeded[1]
