"""The server over real HTTP with the demo model: requests, errors, security, streams."""

from __future__ import annotations

import contextlib
import gzip
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from live_server import LiveServer, serve_live, serve_model

from localmistral.engine import EngineSettings
from localmistral.errors import EngineError, UsageError
from localmistral.server.serving import Serving
from localmistral.server.settings import ServerSettings

QUESTION = [{"role": "user", "content": "What is 31 + 46?"}]
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    settings = EngineSettings(threads=1, parallel=4, queue=8)
    with serve_model("demo", settings, ServerSettings(port=0, max_body_bytes=1 << 20)) as live:
        yield live


def ask(server: LiveServer, **fields: Any) -> httpx2.Response:
    return server.http.post(CHAT, json={"messages": QUESTION, **fields})


def read_events(text: str) -> list[Any]:
    """The data of server-sent events; the end mark as it is."""
    data = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    return [item if item == "[DONE]" else json.loads(item) for item in data]


def error_of(response: httpx2.Response, status: int) -> dict[str, Any]:
    """The error body of a refused request, its shape checked."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "Traceback" not in error["message"]
    assert ".py" not in error["message"]
    return dict(error)


def assert_it_still_answers(server: LiveServer) -> None:
    assert ask(server, max_tokens=2).status_code == 200


# Requests


@pytest.mark.parametrize(
    "body", [b'{"messages": [', b"", b'{"messages": "\xff"}', b"{} {}", b"{'a'}"]
)
def test_a_body_that_is_no_json_is_refused(server: LiveServer, body: bytes) -> None:
    response = server.http.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert error_of(response, 400)["type"] == "invalid_request_error"


@pytest.mark.parametrize("body", ["[1,2]", "42", "null", '"x"', "true"])
def test_a_body_that_is_no_object_is_refused(server: LiveServer, body: str) -> None:
    response = server.http.post(CHAT, content=body, headers={"content-type": "application/json"})
    error_of(response, 400)


def test_json_of_great_depth_is_refused(server: LiveServer) -> None:
    body = '{"messages": ' + "[" * 100_000 + "]" * 100_000 + "}"
    response = server.http.post(CHAT, content=body, headers={"content-type": "application/json"})
    error_of(response, 400)
    assert_it_still_answers(server)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_another_content_type_is_refused(server: LiveServer, kind: str) -> None:
    body = json.dumps({"messages": QUESTION})
    response = server.http.post(CHAT, content=body, headers={"content-type": kind} if kind else {})
    error_of(response, 415)


@pytest.mark.parametrize(
    ("messages", "place"),
    [
        (None, "messages"),
        ("s", "messages"),
        ([], "messages"),
        ([123], "messages[0]"),
        ([{}], "messages[0].role"),
        ([{"role": "user", "content": 123}], "messages[0].content"),
        ([*QUESTION, {"role": "robot", "content": "x"}], "messages[1].role"),
    ],
)
def test_wrong_messages_are_refused_with_their_place(
    server: LiveServer, messages: Any, place: str
) -> None:
    error = error_of(ask(server, messages=messages), 400)
    assert error["param"] == place
    assert place in error["message"]


def test_unknown_fields_are_ignored(server: LiveServer) -> None:
    messages = [{**QUESTION[0], "colour": "red", "weight": [1]}]
    response = ask(server, messages=messages, unheard_of={"a": 1}, user="me", store=True)
    assert response.status_code == 200


def test_null_is_as_good_as_absent(server: LiveServer) -> None:
    names = (
        *("model", "temperature", "top_p", "top_k", "n", "seed", "stop", "stream", "tools"),
        *("stream_options", "max_tokens", "tool_choice", "logprobs", "top_logprobs"),
        *("response_format", "reasoning_effort", "reasoning_format", "logit_bias"),
        *("frequency_penalty", "presence_penalty", "max_completion_tokens"),
        "parallel_tool_calls",
    )
    plain = ask(server).json()["choices"]
    assert ask(server, **dict.fromkeys(names)).json()["choices"] == plain


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1),
        ("temperature", "hot"),
        ("top_p", 5),
        ("seed", 2**63),
        ("n", 0),
        ("n", 10_000),
        ("max_tokens", -1),
        ("max_tokens", 0),
        ("max_completion_tokens", -5),
        ("top_k", -7),
        ("min_p", 2),
        ("repeat_penalty", -1),
        ("thinking_budget", -1),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"99999999": 1}),
        ("stop", [""]),
        ("reasoning_format", "xml"),
        ("tools", 5),
        ("tool_choice", "some_tool"),
        ("stream", "yes"),
    ],
)
def test_values_out_of_range_are_refused_by_name(
    server: LiveServer, field: str, value: Any
) -> None:
    error = error_of(ask(server, **{field: value}), 400)
    assert field in error["message"] or (error["param"] or "").startswith(field)
    assert_it_still_answers(server)


def test_nan_and_infinity_are_refused(server: LiveServer) -> None:
    for word in ("NaN", "Infinity", "-Infinity", "1e999"):
        body = f'{{"messages": {json.dumps(QUESTION)}, "temperature": {word}}}'
        response = server.http.post(
            CHAT, content=body, headers={"content-type": "application/json"}
        )
        assert "temperature" in error_of(response, 400)["message"]


def test_too_many_logprobs_are_refused(server: LiveServer) -> None:
    assert error_of(ask(server, logprobs=True, top_logprobs=21), 400)["param"] == "top_logprobs"


def test_parts_and_the_developer_role_make_the_same_tokens(server: LiveServer) -> None:
    def tokens(messages: list[dict[str, Any]]) -> list[int]:
        found: list[int] = server.http.post("/tokenize", json={"messages": messages}).json()[
            "tokens"
        ]
        return found

    plain = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
    listed = [
        {"role": "developer", "content": [{"type": "text", "text": "Be kind."}]},
        {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
    ]
    assert tokens(plain) == tokens(listed)


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_longer_than_the_context_is_refused_with_both_counts(
    server: LiveServer, stream: bool
) -> None:
    messages = [{"role": "user", "content": "one two three " * 3000}]
    error = error_of(ask(server, messages=messages, stream=stream), 400)
    assert error["code"] == "context_length_exceeded"
    assert str(server.chat.engine.settings.context) in error["message"]


def test_two_choices_have_their_indexes(server: LiveServer) -> None:
    body = ask(server, n=2, temperature=1.5, seed=7, max_tokens=12).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    assert body["usage"]["prompt_tokens"] == ask(server).json()["usage"]["prompt_tokens"]
    events = read_events(ask(server, n=2, stream=True).text)
    seen = {choice["index"] for event in events[:-1] for choice in event["choices"]}
    assert seen == {0, 1}


def test_another_model_is_not_found(server: LiveServer) -> None:
    assert error_of(ask(server, model="gpt-9"), 404)["code"] == "model_not_found"
    for name in ("demo", "DEMO"):
        assert ask(server, model=name, max_tokens=2).status_code == 200


def test_an_unknown_path_or_method_is_an_error_object(server: LiveServer) -> None:
    error_of(server.http.get("/v1/nothing"), 404)
    error_of(server.http.get(CHAT), 405)


def test_while_loading_everything_waits_with_503() -> None:
    serving = Serving(progress=0.5)
    with serve_live(serving) as http:
        for response in (http.post(CHAT, json={"messages": QUESTION}), http.get("/v1/models")):
            assert "50%" in error_of(response, 503)["message"]
            assert response.headers["retry-after"]
        health = http.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "loading")


def test_a_failed_load_shows_in_health() -> None:
    serving = Serving(failure=EngineError("No memory."))
    with serve_live(serving) as http:
        assert http.get("/health").status_code == 503
        error_of(http.post(CHAT, json={"messages": QUESTION}), 500)


def test_a_body_over_the_limit_is_refused(server: LiveServer) -> None:
    large = json.dumps({"messages": [{"role": "user", "content": "x" * (2 << 20)}]}).encode()
    response = server.http.post(CHAT, content=large, headers={"content-type": "application/json"})
    error_of(response, 413)

    def pieces() -> Iterator[bytes]:
        for start in range(0, len(large), 65_536):
            yield large[start : start + 65_536]

    with contextlib.suppress(httpx2.WriteError, httpx2.ReadError):
        response = server.http.post(
            CHAT, content=pieces(), headers={"content-type": "application/json"}
        )
        error_of(response, 413)
    assert_it_still_answers(server)


def test_a_compressed_body_is_refused(server: LiveServer) -> None:
    bomb = gzip.compress(b" " * (10 << 20))
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    error_of(server.http.post(CHAT, content=bomb, headers=headers), 415)


# Streams


def test_a_stream_has_one_role_one_id_one_reason_and_an_end(server: LiveServer) -> None:
    events = read_events(ask(server, stream=True, reasoning_effort="high").text)
    assert events[-1] == "[DONE]"
    chunks = events[:-1]
    assert len({chunk["id"] for chunk in chunks}) == 1
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert [("role" in delta) for delta in deltas] == [True] + [False] * (len(deltas) - 1)
    reasons = [c["choices"][0]["finish_reason"] for c in chunks]
    assert [r for r in reasons if r] == ["stop"]
    assert reasons[-1] == "stop"
    whole = ask(server, reasoning_effort="high").json()["choices"][0]["message"]
    assert "".join(d.get("content") or "" for d in deltas) == whole["content"]
    assert "".join(d.get("reasoning_content", "") for d in deltas) == whole["reasoning_content"]


def test_usage_comes_last_and_only_when_asked_for(server: LiveServer) -> None:
    plain = read_events(ask(server, stream=True).text)
    assert all("usage" not in event for event in plain[:-1])
    asked = read_events(ask(server, stream=True, stream_options={"include_usage": True}).text)
    assert asked[-2]["choices"] == []
    assert asked[-2]["usage"]["total_tokens"] > asked[-2]["usage"]["prompt_tokens"]


def test_nothing_of_a_stop_string_is_sent(server: LiveServer) -> None:
    whole = ask(server).json()["choices"][0]["message"]["content"]
    stop = whole[2:9]
    for stream in (False, True):
        response = ask(server, stop=stop, stream=stream)
        if stream:
            chunks = read_events(response.text)[:-1]
            text = "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks)
        else:
            text = response.json()["choices"][0]["message"]["content"]
        assert text == whole[: whole.index(stop)]


def test_logprobs_describe_every_token_of_the_content(server: LiveServer) -> None:
    choice = ask(server, logprobs=True, top_logprobs=3).json()["choices"][0]
    tokens = choice["logprobs"]["content"]
    assert "".join(token["token"] for token in tokens) == choice["message"]["content"]
    assert all(len(token["top_logprobs"]) == 3 and token["logprob"] <= 0 for token in tokens)
    chunks = read_events(ask(server, logprobs=True, stream=True).text)[:-1]
    streamed = [
        token["token"]
        for chunk in chunks
        if chunk["choices"][0]["logprobs"]
        for token in chunk["choices"][0]["logprobs"]["content"]
    ]
    assert streamed == [token["token"] for token in tokens]


def wait_until_idle(server: LiveServer) -> None:
    """All sequences free and nothing waiting; the limit is generous for busy machines."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        now = server.chat.engine.metrics()
        if now.running == 0 and now.waiting == 0:
            return
        time.sleep(0.05)
    pytest.fail(f"still busy: {server.chat.engine.metrics()}")


LONG = {"max_tokens": 3000, "ignore_eos": True}


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_sequence(server: LiveServer, stream: bool) -> None:
    cancelled = server.chat.engine.metrics().cancelled
    body = json.dumps({"messages": QUESTION, "stream": stream, **LONG}).encode()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as link:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        link.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        deadline = time.monotonic() + 30
        while server.chat.engine.metrics().running == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert server.chat.engine.metrics().running == 1
    wait_until_idle(server)
    assert server.chat.engine.metrics().cancelled == cancelled + 1


def test_a_full_queue_says_so_and_the_waiting_ones_are_served_in_order(server: LiveServer) -> None:
    statuses: list[int] = []

    def post() -> None:
        with httpx2.Client(base_url=server.url, timeout=120) as http:
            body = {"messages": QUESTION, "max_tokens": 200, "ignore_eos": True}
            statuses.append(http.post(CHAT, json=body).status_code)

    threads = [threading.Thread(target=post) for _ in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(statuses) == {200, 503}
    assert statuses.count(200) >= 8
    wait_until_idle(server)
    assert_it_still_answers(server)


# Structure, tools, reasoning

TOOL = {
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
WEATHER = [{"role": "user", "content": "What is the weather in Oslo?"}]


def test_efforts_think_or_do_not(server: LiveServer) -> None:
    for effort in ("none", "minimal"):
        message = ask(server, reasoning_effort=effort).json()["choices"][0]["message"]
        assert message["content"]
        assert "reasoning_content" not in message
    for effort in ("low", "medium", "high", "xhigh", "max"):
        body = ask(server, reasoning_effort=effort).json()
        message = body["choices"][0]["message"]
        assert "77" in message["content"]
        assert message["reasoning_content"]
        assert body["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0
        assert not any(word in message["content"] for word in ("[THINK]", "[/THINK]", "</s>"))
    error = error_of(ask(server, reasoning_effort="extreme"), 400)
    assert "minimal" in error["message"]


def test_reasoning_comes_in_three_dialects(server: LiveServer) -> None:
    def message(dialect: str) -> dict[str, Any]:
        response = ask(server, reasoning_effort="high", reasoning_format=dialect)
        found: dict[str, Any] = response.json()["choices"][0]["message"]
        return found

    plain = message("reasoning_content")
    assert message("reasoning")["reasoning"] == plain["reasoning_content"]
    listed = message("mistral")["content"]
    assert listed[0]["thinking"][0]["text"] == plain["reasoning_content"]
    assert listed[1] == {"type": "text", "text": plain["content"]}
    assert "reasoning_content" not in message("none")


def test_history_with_reasoning_makes_the_same_tokens_in_every_dialect(server: LiveServer) -> None:
    thought = {"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]}
    dialects: list[dict[str, Any]] = [
        {"content": "Yes.", "reasoning_content": "Hm."},
        {"content": "Yes.", "reasoning": "Hm."},
        {"content": [thought, {"type": "text", "text": "Yes."}]},
    ]
    counted = []
    for dialect in dialects:
        messages = [
            *QUESTION,
            {"role": "assistant", **dialect},
            {"role": "user", "content": "Why?"},
        ]
        counted.append(server.http.post("/tokenize", json={"messages": messages}).json()["tokens"])
    assert counted[0] == counted[1] == counted[2]


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "get_weather"}}]
)
def test_a_forced_call_has_valid_arguments(server: LiveServer, choice: Any) -> None:
    body = ask(server, messages=WEATHER, tools=[TOOL], tool_choice=choice).json()["choices"][0]
    assert body["finish_reason"] == "tool_calls"
    call = body["message"]["tool_calls"][0]
    assert call["function"]["name"] == "get_weather"
    assert set(json.loads(call["function"]["arguments"])) == {"city"}
    assert body["message"]["content"] is None


def test_call_deltas_add_up_to_the_call(server: LiveServer) -> None:
    whole = ask(server, messages=WEATHER, tools=[TOOL]).json()["choices"][0]["message"][
        "tool_calls"
    ]
    chunks = read_events(ask(server, messages=WEATHER, tools=[TOOL], stream=True).text)[:-1]
    deltas = [
        c["choices"][0]["delta"]["tool_calls"][0]
        for c in chunks
        if "tool_calls" in c["choices"][0]["delta"]
    ]
    assert deltas[0]["id"]
    assert deltas[0]["function"]["name"] == "get_weather"
    arguments = "".join(delta["function"]["arguments"] for delta in deltas)
    assert arguments == whole[0]["function"]["arguments"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_an_unknown_tool_or_none_is_refused(server: LiveServer) -> None:
    named = {"type": "function", "function": {"name": "nope"}}
    assert error_of(ask(server, tools=[TOOL], tool_choice=named), 400)["param"] == "tool_choice"
    assert error_of(ask(server, tool_choice="required"), 400)["param"] == "tool_choice"


def test_a_schema_shapes_the_answer(server: LiveServer) -> None:
    schema = {
        "type": "object",
        "properties": {
            'say "x"': {"enum": ['a "quote"', "b"]},
            "größe": {"type": "string", "pattern": "^\\d+$", "maxLength": 4},
        },
        "required": ['say "x"', "größe"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    text = ask(server, response_format=form).json()["choices"][0]["message"]["content"]
    answer = json.loads(text)
    assert answer['say "x"'] in ('a "quote"', "b")
    assert answer["größe"].isdecimal()


@pytest.mark.parametrize(
    "form",
    [
        {"type": "yaml"},
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": {}},
        {},
        "json",
    ],
)
def test_a_wrong_response_format_is_refused(server: LiveServer, form: Any) -> None:
    assert "response_format" in error_of(ask(server, response_format=form), 400)["message"]


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


@pytest.mark.parametrize(
    "schema",
    [
        nested(150),
        {"$ref": "#"},
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
        {"type": "string", "maxLength": 10**9},
        {"type": "array", "items": {"type": "string"}, "minItems": 10**9},
    ],
)
def test_a_schema_beyond_reason_is_refused(server: LiveServer, schema: Any) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    error_of(ask(server, response_format=form), 400)
    assert_it_still_answers(server)


@pytest.mark.parametrize(
    "grammar",
    ["root ::= (", "", "root ::= unknown", 'x ::= "a"', "(" * 20_000, "root ::= root"],
)
def test_bad_grammars_are_refused_and_the_process_lives(server: LiveServer, grammar: str) -> None:
    error_of(ask(server, grammar=grammar), 400)
    assert_it_still_answers(server)


@pytest.mark.parametrize("text", ["[/INST]", "</s>", "[THINK]", "[TOOL_CALLS]"])
def test_markup_in_texts_stays_text(server: LiveServer, text: str) -> None:
    tokenizer = server.chat.engine.tokenizer
    control = server.chat.engine.tokenize(text, parse_special=True)
    assert len(control) == 1
    assert tokenizer.is_control(control[0])
    messages = [{"role": "system", "content": text}, {"role": "user", "content": text}]
    clean = [{"role": "system", "content": "x"}, {"role": "user", "content": "x"}]

    def count(of: list[dict[str, Any]]) -> int:
        tokens = server.http.post("/tokenize", json={"messages": of}).json()["tokens"]
        return int(tokens.count(control[0]))

    assert count(messages) == count(clean)
    plain = server.http.post("/tokenize", json={"prompt": text}).json()["tokens"]
    assert control[0] not in plain
    parsed = server.http.post("/tokenize", json={"prompt": text, "parse_special": True}).json()
    assert parsed["tokens"][-1] == control[0]


def test_tokens_go_there_and_back(server: LiveServer) -> None:
    made = server.http.post("/tokenize", json={"prompt": "Hello, world"}).json()
    assert made["count"] == len(made["tokens"])
    assert made["tokens"][0] == server.chat.engine.tokenizer.bos
    back = server.http.post("/detokenize", json={"tokens": made["tokens"][1:]}).json()
    assert back["prompt"] == "Hello, world"
    error_of(server.http.post("/detokenize", json={"tokens": [10**9]}), 400)


# Security


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.com", "127.0.0.1.nip.io", "x:y", ""]
)
def test_a_foreign_host_is_refused(server: LiveServer, host: str) -> None:
    response = server.http.get("/v1/models", headers={"host": host})
    assert "--allow-host" in error_of(response, 403)["message"]


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:1", "127.0.0.1:99", "[::1]:8", "LOCALHOST"]
)
def test_local_hosts_pass_with_any_port(server: LiveServer, host: str) -> None:
    assert server.http.get("/v1/models", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "origin", ["http://evil.com", "http://localhost.evil.com", "http://notlocalhost", "null"]
)
def test_a_foreign_page_gets_no_permission(server: LiveServer, origin: str) -> None:
    for method in ("GET", "OPTIONS"):
        headers = {"origin": origin, "access-control-request-method": "POST"}
        response = server.http.request(method, "/v1/models", headers=headers)
        assert not [name for name in response.headers if name.startswith("access-control")]


def test_pages_and_hosts_that_are_allowed_pass(server: LiveServer) -> None:
    settings = ServerSettings(port=0, allow_hosts=("box",), allow_origins=("http://page",))
    with serve_live(Serving(chat=server.chat), settings) as http:
        response = http.get("/v1/models", headers={"origin": "http://page", "host": "box:80"})
        assert response.headers["access-control-allow-origin"] == "http://page"
        other = http.get("/v1/models", headers={"origin": "http://other"})
        assert "access-control-allow-origin" not in other.headers


def test_a_key_is_asked_for_and_compared(
    server: LiveServer, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = ServerSettings(port=0, api_keys=("secret-key-1", "other-key"), log="json")
    with serve_live(Serving(chat=server.chat), settings) as http:
        error_of(http.get("/v1/models"), 401)
        for wrong in ("secret-key-", "secret-key-12", "x", "ünïcode"):
            refused = {b"authorization": f"Bearer {wrong}".encode()}
            error_of(http.get("/v1/models", headers=refused), 401)
        for headers in (
            {b"authorization": b"Bearer secret-key-1"},
            {b"authorization": b"bearer other-key"},
            {b"x-api-key": b"secret-key-1"},
        ):
            assert http.get("/v1/models", headers=headers).status_code == 200
        assert http.get("/health").status_code == 200
    logged = capfd.readouterr().err
    assert '"status": 401' in logged
    assert "secret-key" not in logged


def test_other_machines_need_a_key() -> None:
    with pytest.raises(UsageError, match="no key"):
        ServerSettings(host="0.0.0.0")
    assert ServerSettings(host="0.0.0.0", api_keys=("long-enough",)).url.startswith("http://127")


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "http://169.254.169.254/", "data:image/png;base64,xx"]
)
def test_an_image_is_refused_without_a_look_at_it(server: LiveServer, url: str) -> None:
    part = {"type": "image_url", "image_url": {"url": url}}
    error = error_of(ask(server, messages=[{"role": "user", "content": [part]}]), 400)
    assert error["param"] == "messages[0].content[0]"


# What a server tells of itself


def test_models_suit_clients_of_both_kinds(server: LiveServer) -> None:
    listed = server.http.get("/v1/models").json()
    assert listed["object"] == "list"
    model = listed["data"][0]
    assert (model["id"], model["object"], model["type"]) == ("demo", "model", "base")
    assert isinstance(model["capabilities"], dict)
    assert server.http.get("/v1/models/demo").json() == model
    error_of(server.http.get("/v1/models/other"), 404)


def test_metrics_count_what_happened(server: LiveServer) -> None:
    assert ask(server, max_tokens=3).status_code == 200
    text = server.http.get("/metrics").text
    values = dict(
        line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#")
    )
    assert float(values['localmistral_tokens_total{kind="generated"}']) >= 3
    assert float(values["localmistral_ready"]) == 1
    assert float(values["localmistral_time_to_first_token_seconds_count"]) >= 1
    key = 'localmistral_http_responses_total{path="/v1/chat/completions",status="200"}'
    assert float(values[key]) >= 1
