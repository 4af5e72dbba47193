"""/openapi.json is true: what is documented comes, and nothing else does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from live_server import LiveServer, serve_live, serve_model

from localmistral.engine import EngineSettings
from localmistral.server.serving import Serving

QUESTION = [{"role": "user", "content": "What is 31 + 46?"}]
WEATHER = [{"role": "user", "content": "What is the weather in Oslo?"}]
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
}
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}
ANTHROPIC_TOOL = {"name": "get_weather", "input_schema": PARAMETERS}
FUNCTION = {"type": "function", "name": "get_weather", "parameters": PARAMETERS}
THINKING = {"type": "enabled", "budget_tokens": 1000}
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
REFUSALS = {"400", "401", "403", "404", "405", "413", "415", "500", "503"}
CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,"
    "response_schema_conformance,response_headers_conformance"
)
FUZZING_S = 15


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    settings = EngineSettings(threads=1, parallel=4, context=1024)
    with serve_model("demo", settings) as live:
        yield live


@pytest.fixture(scope="module")
def document(server: LiveServer) -> dict[str, Any]:
    found: dict[str, Any] = server.http.get("/openapi.json").json()
    return found


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield path, method, operation


def schema_of(document: dict[str, Any], path: str, method: str, status: int) -> dict[str, Any]:
    operation = document["paths"][path][method]
    schema: dict[str, Any] = operation["responses"][str(status)]["content"]["application/json"]
    return schema["schema"]  # type: ignore[no-any-return]


def test_every_route_is_there_with_its_refusals(document: dict[str, Any]) -> None:
    paths = {path for path, _, _ in operations(document)}
    assert paths == {
        *(CHAT, COMPLETIONS, MESSAGES, f"{MESSAGES}/count_tokens", RESPONSES),
        *(
            f"{RESPONSES}/{{name}}",
            f"{RESPONSES}/{{name}}/input_items",
            f"{RESPONSES}/input_tokens",
            "/v1/embeddings",
            "/v1/models",
            "/v1/models/{name}",
        ),
        *("/tokenize", "/detokenize", "/health", "/metrics"),
    }
    for path, method, operation in operations(document):
        assert set(operation["responses"]) == {"200", *REFUSALS}, (path, method)
        assert operation["description"], (path, method)
        if method == "post":
            assert operation["requestBody"]["content"]["application/json"]["schema"]


def test_every_schema_is_one_and_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    for schema in schemas.values():
        jsonschema.Draft202012Validator.check_schema(schema)
    text = json.dumps(document)
    named = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert named <= set(schemas)
    for _, _, operation in operations(document):
        for response in operation["responses"].values():
            for content in response["content"].values():
                schema = content.get("schema") or content["itemSchema"]
                jsonschema.Draft202012Validator.check_schema(schema)


def test_the_page_of_the_documentation_is_there(server: LiveServer) -> None:
    response = server.http.get("/docs")
    assert response.status_code == 200
    assert "openapi.json" in response.text


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": QUESTION, "n": 2, "logprobs": True, "top_logprobs": 2}),
        (CHAT, {"messages": QUESTION, "reasoning_effort": "high"}),
        (CHAT, {"messages": QUESTION, "prompt_mode": "reasoning"}),
        (CHAT, {"messages": WEATHER, "tools": [TOOL], "tool_choice": "any"}),
        (CHAT, {"messages": QUESTION, "max_tokens": 2}),
        (COMPLETIONS, {"prompt": ["31 +", "12"], "max_tokens": 4, "logprobs": 2}),
        (COMPLETIONS, {"prompt": "31 +", "max_tokens": 4, "echo": True}),
        (MESSAGES, {"messages": QUESTION, "max_tokens": 900, "thinking": THINKING}),
        (MESSAGES, {"messages": WEATHER, "max_tokens": 200, "tools": [ANTHROPIC_TOOL]}),
        (RESPONSES, {"input": "What is 31 + 46?", "reasoning": {"effort": "high"}}),
        (RESPONSES, {"input": WEATHER, "tools": [FUNCTION], "tool_choice": "required"}),
        (RESPONSES, {"input": "What is 31 + 46?", "max_output_tokens": 2}),
    ],
)
def test_answers_and_events_are_as_documented(
    server: LiveServer, document: dict[str, Any], path: str, body: dict[str, Any]
) -> None:
    content = document["paths"][path]["post"]["responses"]["200"]["content"]
    whole = server.http.post(path, json=body)
    assert whole.status_code == 200, whole.text
    jsonschema.validate(whole.json(), content["application/json"]["schema"])
    streamed = server.http.post(path, json={**body, "stream": True})
    assert streamed.headers["content-type"].startswith("text/event-stream")
    lines = [line[6:] for line in streamed.text.splitlines() if line.startswith("data: ")]
    events = [json.loads(line) for line in lines if line != "[DONE]"]
    assert events
    for event in events:
        described = content["text/event-stream"]["itemSchema"]["properties"]["data"]
        jsonschema.validate(event, described["contentSchema"])


def test_small_answers_are_as_documented(server: LiveServer, document: dict[str, Any]) -> None:
    made = server.http.post(RESPONSES, json={"input": "Hi", "max_output_tokens": 3}).json()
    for method, path, template, body in (
        ("get", "/v1/models", "/v1/models", None),
        ("get", "/v1/models/demo", "/v1/models/{name}", None),
        ("get", "/health", "/health", None),
        ("post", "/tokenize", "/tokenize", {"prompt": "Hello"}),
        ("post", "/detokenize", "/detokenize", {"tokens": [5, 6]}),
        ("post", f"{MESSAGES}/count_tokens", f"{MESSAGES}/count_tokens", {"messages": QUESTION}),
        ("post", f"{RESPONSES}/input_tokens", f"{RESPONSES}/input_tokens", {"input": "Hi"}),
        ("get", f"{RESPONSES}/{made['id']}", f"{RESPONSES}/{{name}}", None),
        ("delete", f"{RESPONSES}/{made['id']}", f"{RESPONSES}/{{name}}", None),
    ):
        response = server.http.request(method, path, json=body)
        assert response.status_code == 200, response.text
        jsonschema.validate(response.json(), schema_of(document, template, method, 200))


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, MESSAGES, RESPONSES, "/tokenize"])
def test_refusals_are_as_documented(
    server: LiveServer, document: dict[str, Any], path: str
) -> None:
    refused = {
        400: server.http.post(path, json={"messages": 5, "prompt": {}, "input": 5}),
        403: server.http.post(path, json={}, headers={"host": "evil.example"}),
        404: server.http.post(
            path,
            json={
                "model": "no", "messages": QUESTION, "prompt": "x", "input": "x", "max_tokens": 1,
            },
        ),
        405: server.http.put(path, json={}),
        415: server.http.post(path, content=b"a=b", headers={"content-type": "text/plain"}),
    }  # fmt: skip
    for status, response in refused.items():
        assert response.status_code == status, response.text
        jsonschema.validate(response.json(), schema_of(document, path, "post", status))


def test_health_that_is_not_well_is_as_documented(document: dict[str, Any]) -> None:
    with serve_live(Serving(progress=0.25)) as http:
        response = http.get("/health")
    assert response.status_code == 503
    jsonschema.validate(response.json(), schema_of(document, "/health", "get", 503))


@pytest.mark.slow
def test_generated_requests_meet_no_server_error_and_nothing_undocumented(
    server: LiveServer, tmp_path: Path
) -> None:
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json"),
        *("--checks", CHECKS, "--max-time", str(FUZZING_S), "--request-timeout", "120"),
        *("--suppress-health-check", "all", "--no-color", "--seed", "1", "--warnings", "off"),
    ]
    environ = {
        **os.environ,
        "SCHEMATHESIS_HOOKS": "schemathesis_hooks",
        "PYTHONPATH": str(Path(__file__).parent),
        "PYTHONIOENCODING": "utf-8",
    }
    done = subprocess.run(
        command, cwd=tmp_path, env=environ, capture_output=True, encoding="utf-8", timeout=280
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "16 selected" in done.stdout
    assert server.http.get("/health").status_code == 200
