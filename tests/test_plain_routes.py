"""/tokenize in the forms of vLLM and llama-server, and metrics that Prometheus can read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from live_server import LiveServer, serve_model
from prometheus_client.parser import text_string_to_metric_families

from localmistral.engine import EngineSettings

TEXT = "Hello, größer 🦆"
QUESTION = [{"role": "user", "content": "What is 31 + 46?"}]


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with serve_model("demo", EngineSettings(threads=1, parallel=2)) as live:
        yield live


def tokenize(server: LiveServer, **fields: Any) -> dict[str, Any]:
    response = server.http.post("/tokenize", json=fields)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def test_pieces_are_texts_or_bytes_that_add_up(server: LiveServer) -> None:
    plain = tokenize(server, content=TEXT, add_special=False)
    found = tokenize(server, content=TEXT, add_special=False, with_pieces=True)
    assert [token["id"] for token in found["tokens"]] == plain["tokens"]
    pieces = [token["piece"] for token in found["tokens"]]
    assert any(isinstance(piece, list) for piece in pieces)  # the duck is cut into bytes
    whole = b"".join(bytes(p) if isinstance(p, list) else p.encode() for p in pieces)
    assert whole.decode() == TEXT


def test_texts_of_tokens_come_beside_them_as_in_vllm(server: LiveServer) -> None:
    found = tokenize(server, prompt="Hello", return_token_strs=True)
    assert found["token_strs"][0] == "<s>"
    assert "".join(found["token_strs"][1:]) == "Hello"
    assert len(found["token_strs"]) == found["count"] == len(found["tokens"])
    assert "token_strs" not in tokenize(server, prompt="Hello")
    conversation = tokenize(server, messages=QUESTION, return_token_strs=True)
    assert conversation["token_strs"][-1] == "[/INST]"


def test_the_effort_is_read_as_for_an_answer(server: LiveServer) -> None:
    high = tokenize(server, messages=QUESTION, reasoning_effort="high")["tokens"]
    assert high != tokenize(server, messages=QUESTION)["tokens"]
    for others in ({"reasoning_effort": "high"}, {"enable_thinking": True}):
        found = tokenize(server, messages=QUESTION, chat_template_kwargs=others)
        assert found["tokens"] == high
    both = {"reasoning_effort": "none", "chat_template_kwargs": {"reasoning_effort": "high"}}
    assert tokenize(server, messages=QUESTION, **both) == tokenize(server, messages=QUESTION)


def test_metrics_are_what_prometheus_reads(server: LiveServer) -> None:
    server.http.post("/v1/messages", json={"messages": QUESTION, "max_tokens": 3})
    families = {f.name: f for f in text_string_to_metric_families(server.http.get("/metrics").text)}
    assert {name: family.type for name, family in families.items()}.items() >= {
        ("localmistral_http_responses", "counter"),
        ("localmistral_requests", "counter"),
        ("localmistral_tokens", "counter"),
        ("localmistral_time_to_first_token_seconds", "histogram"),
        ("localmistral_time_per_output_token_seconds", "histogram"),
        ("localmistral_running", "gauge"),
        ("localmistral_waiting", "gauge"),
        ("localmistral_kv_tokens", "gauge"),
        ("localmistral_ready", "gauge"),
    }
    kinds = {sample.labels["kind"] for sample in families["localmistral_tokens"].samples}
    assert kinds == {"prompt", "prompt_cached", "generated"}
    assert all(family.documentation for family in families.values())
