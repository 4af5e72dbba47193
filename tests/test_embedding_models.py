"""Models that only make embeddings: their vectors against NumPy, and what serves or refuses them.

The model is a random BERT of two layers (`tiny_bert`); its tolerances are llama.cpp's, whose GELU
goes through a table of 16-bit floats.
"""

from __future__ import annotations

import base64
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
import tiny_bert
from gguf_writer import TOKENS, VOCABULARY, Gguf, tiny_llama
from live_server import LiveServer, serve_model
from server_process import launch, make_environ, run
from tiny_bert import CLS, CONTEXT, LAST, MEAN, RANK, WIDTH, write_bert

from localmistral.cli.serve import _announce as announce
from localmistral.engine import Engine, EngineSettings, Request
from localmistral.engine.dry_load import dry_load
from localmistral.errors import (
    BadRequestError,
    ContextOverflowError,
    EngineError,
    ModelFileError,
)
from localmistral.models.gguf import read_shape
from localmistral.server.settings import ServerSettings
from localmistral.session import Chat

TEXTS = [
    "Hello world",
    "What is the weather in Oslo today?",
    "naïve writing: 31 + 46 (readness)",
    "snowman ☃ and Ünknown",
    "the " * 60,
]
SETTINGS = EngineSettings(threads=1, context=4096)
NUMPY_TOLERANCE = 2e-3
BATCH_TOLERANCE = 1e-4
CHAT: list[dict[str, str]] = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The same weights with each way of pooling."""
    folder = tmp_path_factory.mktemp("bert")
    return {
        pooling: write_bert(folder / f"bert-{pooling}.gguf", pooling)
        for pooling in (MEAN, CLS, LAST)
    }


@pytest.fixture(scope="module")
def server(models: dict[int, Path]) -> Iterator[LiveServer]:
    with serve_model(str(models[CLS]), SETTINGS) as live:
        yield live


def reference(pooling: int) -> np.ndarray[Any, Any]:
    weights = tiny_bert.make_weights()
    return np.array([tiny_bert.embed(weights, tiny_bert.tokenize(t), pooling) for t in TEXTS])


@pytest.mark.parametrize("pooling", [MEAN, CLS, LAST])
def test_vectors_are_those_of_the_formulas(models: dict[int, Path], pooling: int) -> None:
    tokens = [tiny_bert.tokenize(text) for text in TEXTS]
    with Engine.load([models[pooling]], SETTINGS) as engine:
        assert engine.embedder is not None
        together = engine.embedder.embed(tokens)
        alone = np.concatenate([engine.embedder.embed([each]) for each in tokens])
    expected = reference(pooling)
    assert np.abs(np.triu(expected @ expected.T, 1)).max() < 0.98  # they can be told apart
    np.testing.assert_allclose(together, expected, atol=NUMPY_TOLERANCE)
    np.testing.assert_allclose(together, alone, atol=BATCH_TOLERANCE)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)


def test_a_text_gets_the_special_tokens_of_its_vocabulary(server: LiveServer) -> None:
    tokenizer = server.chat.engine.tokenizer
    assert tokenizer.frame == ([tiny_bert.CLS_ID], [tiny_bert.SEP_ID])
    for text in TEXTS:
        expected = tiny_bert.tokenize(text)
        answer = server.http.post("/tokenize", json={"prompt": text}).json()
        assert answer["tokens"] == expected
        bare = server.http.post("/tokenize", json={"prompt": text, "add_special_tokens": False})
        assert bare.json()["tokens"] == expected[1:-1]
        made = server.http.post("/v1/embeddings", json={"input": text}).json()
        assert made["usage"]["prompt_tokens"] == len(expected)


def test_control_text_in_a_text_is_no_control_token(server: LiveServer) -> None:
    answer = server.http.post("/tokenize", json={"prompt": "[CLS] a [SEP]"}).json()
    assert answer["tokens"].count(tiny_bert.CLS_ID) == 1
    assert answer["tokens"].count(tiny_bert.SEP_ID) == 1


def test_the_server_gives_those_vectors_in_every_form(server: LiveServer) -> None:
    expected = reference(CLS)
    with openai.OpenAI(base_url=server.base, api_key="any", max_retries=0) as client:
        made = client.embeddings.create(model="bert-2", input=TEXTS)
        vectors = np.array([item.embedding for item in made.data])
        np.testing.assert_allclose(vectors, expected, atol=NUMPY_TOLERANCE)
        tokens = [tiny_bert.tokenize(text) for text in TEXTS]
        by_tokens = client.embeddings.create(model="bert-2", input=tokens)
        cut = client.embeddings.create(model="bert-2", input=TEXTS[0], dimensions=8).data[0]
    np.testing.assert_allclose(
        np.array([item.embedding for item in by_tokens.data]), vectors, atol=BATCH_TOLERANCE
    )
    first = expected[0, :8] / np.linalg.norm(expected[0, :8])
    np.testing.assert_allclose(cut.embedding, first, atol=5 * NUMPY_TOLERANCE)
    body = {"input": TEXTS[1], "encoding_format": "base64"}
    coded = server.http.post("/v1/embeddings", json=body).json()["data"][0]["embedding"]
    values = np.frombuffer(base64.b64decode(coded), "<f4")
    assert values.shape == (WIDTH,)
    np.testing.assert_allclose(values, expected[1], atol=NUMPY_TOLERANCE)


def test_many_texts_from_many_threads_get_their_own_vectors(server: LiveServer) -> None:
    expected = reference(CLS)
    found: dict[int, Any] = {}

    def ask(number: int) -> None:
        texts = [TEXTS[(number + n) % len(TEXTS)] for n in range(40)]
        found[number] = server.http.post("/v1/embeddings", json={"input": texts}).json()["data"]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, data in found.items():
        vectors = np.array([item["embedding"] for item in data])
        wanted = expected[[(number + n) % len(TEXTS) for n in range(40)]]
        np.testing.assert_allclose(vectors, wanted, atol=NUMPY_TOLERANCE)
    assert len(found) == len(threads)


def test_a_text_longer_than_the_model_is_refused_with_both_counts(server: LiveServer) -> None:
    fits = server.http.post("/v1/embeddings", json={"input": "a " * (CONTEXT - 2)})
    assert fits.status_code == 200
    for sent, param in (
        ("a " * (CONTEXT - 1), "input"),
        (["a", "a " * 500], "input[1]"),
        ([5] * (CONTEXT + 1), "input"),
    ):
        response = server.http.post("/v1/embeddings", json={"input": sent})
        error = response.json()["error"]
        count = {"input": CONTEXT + 1, "input[1]": 502}[param]
        assert response.status_code == 400
        assert f"{count} tokens" in error["message"]
        assert str(CONTEXT) in error["message"]
        assert error["param"] == param


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": CHAT}),
        ("/v1/chat/completions", {"messages": CHAT, "stream": True}),
        (
            "/v1/chat/completions",
            {"messages": CHAT, "tools": [{"type": "function", "function": {"name": "f"}}]},
        ),
        ("/v1/chat/completions", {"messages": CHAT, "reasoning_effort": "high"}),
        ("/v1/completions", {"prompt": "Hi"}),
        ("/v1/completions", {"prompt": "Hi", "suffix": "there", "stream": True}),
        ("/v1/completions", {"prompt": "Hi", "response_format": {"type": "json_object"}}),
        ("/v1/responses", {"input": "Hi"}),
        ("/v1/responses", {"input": "Hi", "stream": True}),
        ("/v1/messages", {"messages": CHAT, "max_tokens": 5}),
        ("/v1/messages", {"messages": CHAT, "max_tokens": 5, "stream": True}),
        ("/v1/messages/count_tokens", {"messages": CHAT}),
        ("/tokenize", {"messages": CHAT}),
    ],
)
def test_whatever_needs_an_answer_is_refused_in_one_sentence(
    server: LiveServer, path: str, body: dict[str, Any]
) -> None:
    response = server.http.post(path, json=body)
    assert response.status_code == 400, response.text
    assert "makes embeddings, it can't chat" in response.json()["error"]["message"]


def test_the_small_routes_serve_it(server: LiveServer) -> None:
    model = server.http.get("/v1/models").json()["data"][0]
    assert model["id"] == "bert-2"
    assert model["max_context_length"] == CONTEXT
    able = {name for name, can in model["capabilities"].items() if can}
    assert able == {"embeddings"}
    assert server.http.get("/health").json() == {"status": "ok"}
    tokens = tiny_bert.tokenize("hello world today")
    text = server.http.post("/detokenize", json={"tokens": tokens[1:-1]}).json()["content"]
    assert text.strip() == "hello world today"
    before = read_metrics(server)
    server.http.post("/v1/embeddings", json={"input": [tokens, tokens]})
    after = read_metrics(server)
    changes = {name: after[name] - before[name] for name in after if name in before}
    assert changes['localmistral_tokens_total{kind="prompt"}'] == 2 * len(tokens)
    assert changes['localmistral_requests_total{outcome="finished"}'] == 2
    assert after["localmistral_ready"] == 1


def read_metrics(server: LiveServer) -> dict[str, float]:
    lines = server.http.get("/metrics").text.splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


def test_the_engine_takes_no_requests_and_ends_in_order(models: dict[int, Path]) -> None:
    with Engine.load([models[CLS]], SETTINGS) as engine:
        assert engine.settings.context == CONTEXT
        states = [engine.is_alive]
        assert engine.embedder is not None
        with pytest.raises(BadRequestError, match="embeddings"):
            engine.submit(Request(prompt=(5, 6)))
        with pytest.raises(ContextOverflowError, match=str(CONTEXT)):
            engine.embedder.embed([[5] * (CONTEXT + 1)])
        embedder = engine.embedder
    assert [*states, engine.is_alive] == [True, False]
    with pytest.raises(EngineError, match="closed"):
        embedder.embed([[5]])
    with pytest.raises(EngineError, match="closed"):
        engine.tokenize("a")


def test_python_gets_vectors_and_no_chat(models: dict[int, Path]) -> None:
    with Chat.load(models[MEAN]) as chat:
        assert chat.plan is not None
        assert chat.plan.only_embeds
        assert not chat.has_effort_switch
        assert chat.engine.embedder is not None
        vectors = chat.engine.embedder.embed([tiny_bert.tokenize(text) for text in TEXTS])
        with pytest.raises(BadRequestError, match="makes embeddings, it can't chat"):
            chat.stream(CHAT)
    np.testing.assert_allclose(vectors, reference(MEAN), atol=NUMPY_TOLERANCE)


@pytest.mark.parametrize("pooling", [None, 0, RANK])
def test_an_encoder_without_pooling_is_refused(tmp_path: Path, pooling: int | None) -> None:
    path = write_bert(tmp_path / "bert.gguf", pooling)
    with pytest.raises(ModelFileError, match="names no pooling"):
        Engine.load([path], SETTINGS)
    with pytest.raises(ModelFileError, match=r"bert\.gguf .* names no pooling"):
        Chat.load(path)


def test_an_encoder_is_one_even_if_its_file_says_nothing_of_it(tmp_path: Path) -> None:
    changes = {"bert.attention.causal": True}
    path = write_bert(tmp_path / "bert.gguf", MEAN, changes)
    assert read_shape(path).only_embeds
    with Engine.load([path], SETTINGS) as engine:
        assert engine.embedder is not None
        found = engine.embedder.embed([tiny_bert.tokenize(text) for text in TEXTS])
    np.testing.assert_allclose(found, reference(MEAN), atol=NUMPY_TOLERANCE)


@pytest.mark.parametrize("pooling", [MEAN, CLS])
def test_rotary_positions_and_gates_come_out_as_well(tmp_path: Path, pooling: int) -> None:
    weights = tiny_bert.make_nomic_weights()
    path = write_bert(tmp_path / "nomic.gguf", pooling, weights=weights, architecture="nomic-bert")
    tokens = [tiny_bert.tokenize(text) for text in TEXTS]
    with Chat.load(path) as chat:
        assert chat.engine.embedder is not None
        found = chat.engine.embedder.embed(tokens)
    expected = np.array([tiny_bert.embed(weights, each, pooling) for each in tokens])
    np.testing.assert_allclose(found, expected, atol=NUMPY_TOLERANCE)


def write_modern_bert(path: Path) -> Path:
    """ModernBERT: byte pairs in place of word pieces, one matrix for queries, keys and values,
    windows in two of three layers."""
    rng = np.random.default_rng(8)
    width, inner = 32, 48
    shapes = {
        "token_embd": (len(TOKENS), width),
        "token_embd_norm": (width,),
        "output_norm": (width,),
    }
    for layer in range(3):
        shapes |= {
            f"blk.{layer}.attn_norm": (width,),
            f"blk.{layer}.attn_qkv": (3 * width, width),
            f"blk.{layer}.attn_output": (width, width),
            f"blk.{layer}.ffn_norm": (width,),
            f"blk.{layer}.ffn_up": (2 * inner, width),
            f"blk.{layer}.ffn_down": (width, inner),
        }
    weights = {
        f"{name}.weight": rng.normal(0 if len(shape) == 2 else 1, 0.3, shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    changes = {
        **VOCABULARY,
        "modern-bert.block_count": 3,
        "modern-bert.feed_forward_length": inner,
        "modern-bert.attention.layer_norm_epsilon": 1e-5,
        "modern-bert.attention.sliding_window": 16,
        "modern-bert.attention.sliding_window_pattern": 3,
        "modern-bert.rope.freq_base": 160_000.0,
        "tokenizer.ggml.add_eos_token": True,
        "tokenizer.ggml.add_sep_token": True,
        "tokenizer.ggml.seperator_token_id": 2,
    }
    return write_bert(path, CLS, changes, weights, architecture="modern-bert")


def test_a_modern_bert_gets_its_ends_and_keeps_texts_apart(tmp_path: Path) -> None:
    path = write_modern_bert(tmp_path / "modern.gguf")
    with serve_model(str(path), SETTINGS) as live:
        tokens = live.http.post("/tokenize", json={"prompt": "hello"}).json()["tokens"]
        assert (tokens[0], tokens[-1]) == (1, 2)  # BOS and EOS of this vocabulary
        assert len(tokens) > 2
        texts = ["hello", "hello world, hello again and again", "another"]
        both = live.http.post("/v1/embeddings", json={"input": texts}).json()["data"]
        single = [live.http.post("/v1/embeddings", json={"input": t}).json()["data"] for t in texts]
    together = np.array([item["embedding"] for item in both])
    alone = np.array([data[0]["embedding"] for data in single])
    np.testing.assert_allclose(together, alone, atol=BATCH_TOLERANCE)
    assert np.abs(together[0] - together[1]).max() > 0.01


def write_decoder(path: Path, pooling: int, *, is_causal: bool) -> Path:
    """A decoder of the usual kind, told to pool; weights are random."""
    keys = {"llama.pooling_type": pooling, "llama.attention.causal": is_causal}
    whole: Gguf = tiny_llama(keys, without=("tokenizer.chat_template",))
    rng = np.random.default_rng(3)
    values = rng.normal(0, 0.2, whole.weight_bytes() // 4).astype("<f4")
    path.write_bytes(whole.header() + values.tobytes())
    return path


def test_a_decoder_that_looks_ahead_only_embeds(tmp_path: Path) -> None:
    ahead = write_decoder(tmp_path / "ahead.gguf", CLS, is_causal=False)
    causal = write_decoder(tmp_path / "causal.gguf", CLS, is_causal=True)
    with Chat.load(ahead, SETTINGS) as chat:
        assert not chat.can_chat
        assert chat.engine.embedder is not None
        short, long = chat.engine.embedder.embed([[5, 6], [5, 6, 7, 8]])
        alone = chat.engine.embedder.embed([[5, 6]])[0]
    assert np.abs(short - long).max() > 0.01  # the first token has seen the last
    np.testing.assert_allclose(short, alone, atol=BATCH_TOLERANCE)
    with Chat.load(causal, SETTINGS) as chat:
        assert chat.can_chat
        assert chat.engine.embedder is not None
        short, long = chat.engine.embedder.embed([[5, 6], [5, 6, 7, 8]])
    np.testing.assert_allclose(short, long, atol=2e-3)


def test_a_plan_counts_what_the_longest_text_takes(tmp_path: Path) -> None:
    rows = np.zeros((4096, WIDTH), np.float32)
    weights = {**tiny_bert.make_weights(), "position_embd.weight": rows}
    path = write_bert(tmp_path / "long.gguf", MEAN, {"bert.context_length": 4096}, weights)
    with Chat.load(path) as chat:
        plan, embedder = chat.plan, chat.engine.embedder
        assert plan is not None
        assert embedder is not None
        at_first = chat.engine.report.find("CPU").compute_bytes
        vector = embedder.embed([[5] * 4096])
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)
    assert plan.context == 4096
    sizes = [
        dry_load([path], EngineSettings(threads=1, context=tokens)).find("CPU").compute_bytes
        for tokens in (512, 1024, 2048, 4096)
    ]
    assert at_first <= sizes[0] < sizes[1] < sizes[2]
    assert max(sizes) <= plan.devices[-1].compute_bytes < 2 * max(sizes)


@pytest.mark.parametrize("command", [("run", "-m"), ("chat", "-m"), ("bench",)])
def test_commands_that_write_refuse_it_in_one_sentence(
    models: dict[int, Path], tmp_path: Path, command: tuple[str, ...]
) -> None:
    words = [*command, str(models[CLS]), *(["Hi"] if command[0] == "run" else [])]
    ended = subprocess.run(
        [sys.executable, "-m", "localmistral", *words],
        capture_output=True,
        encoding="utf-8",
        stdin=subprocess.DEVNULL,
        timeout=120,
        env=make_environ(tmp_path),
    )
    assert ended.returncode == 1
    assert ended.stdout == ""
    first, hint = ended.stderr.splitlines()[:2]
    assert first == "error: bert-2.gguf makes embeddings, it can't chat."
    assert f"localmistral serve -m {models[CLS]}" in hint


def test_the_server_says_what_it_serves(
    server: LiveServer, capsys: pytest.CaptureFixture[str]
) -> None:
    announce(server.chat, ServerSettings())
    said = capsys.readouterr().err
    assert f"serves bert-2, embeddings of texts of up to {CONTEXT} tokens." in said


@pytest.mark.slow
def test_serve_plans_loads_and_serves_it(models: dict[int, Path], tmp_path: Path) -> None:
    with launch(tmp_path, models[MEAN]) as process:
        with httpx2.Client(base_url=process.url, timeout=60) as http:
            data = http.post("/v1/embeddings", json={"input": TEXTS}).json()["data"]
            model = http.get("/v1/models").json()["data"][0]
        answer = run(tmp_path, "-m", models[MEAN], "Hi")
    vectors = np.array([item["embedding"] for item in data])
    np.testing.assert_allclose(vectors, reference(MEAN), atol=NUMPY_TOLERANCE)
    assert model["plan"]["devices"][-1]["kv_bytes"] == 0
    assert answer.returncode == 1
    assert "makes embeddings, it can't chat" in answer.stderr
