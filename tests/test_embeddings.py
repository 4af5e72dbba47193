"""Embeddings: the vectors are llama.cpp's own, and /v1/embeddings hands them out in every form.

These are chat models whose file is told to pool; for models that do nothing else see
test_embedding_models.
"""

from __future__ import annotations

import base64
import ctypes
import struct
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as llama
import numpy as np
import openai
import pytest
from gguf_writer import encode_text, encode_value
from live_server import LiveServer, serve_model

from localmistral.engine import Engine, EngineSettings
from localmistral.engine.embedding import MAX_SEQUENCES, cut_batches
from localmistral.errors import ContextOverflowError, EngineError

MEAN, LAST = 1, 3
TEXTS = ["Hello", "What is 31 + 46?", "The weather in Oslo is cold today.", "Hello"]
ALIGNMENT = 32
HEAD_BYTES = 24


def write_pooling(source: Path, target: Path, architecture: str, pooling: int) -> Path:
    """A copy of a GGUF with a pooling type: the new keys, padded to the alignment of the weights,
    come before all others."""
    data = source.read_bytes()
    pair = encode_text(f"{architecture}.pooling_type") + encode_value(pooling)
    filler = encode_text("x") + encode_value("")
    missing = -(len(pair) + len(filler)) % ALIGNMENT
    filler = encode_text("x") + encode_value("y" * missing)
    magic, version, tensors, pairs = struct.unpack("<4sIQQ", data[:HEAD_BYTES])
    head = struct.pack("<4sIQQ", magic, version, tensors, pairs + 2)
    target.write_bytes(head + pair + filler + data[HEAD_BYTES:])
    return target


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The demo model with each way of pooling."""
    folder = tmp_path_factory.mktemp("pooled")
    demo = Path(str(resources.files("localmistral") / "data" / "demo.gguf"))
    return {
        pooling: write_pooling(demo, folder / f"pool-{pooling}.gguf", "mistral4", pooling)
        for pooling in (MEAN, LAST)
    }


@pytest.fixture(scope="module")
def server(models: dict[int, Path]) -> Iterator[LiveServer]:
    with serve_model(str(models[MEAN]), EngineSettings(threads=1, context=1024)) as live:
        yield live


@pytest.fixture
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.base, api_key="any", max_retries=0) as found:
        yield found


def embed_plainly(path: Path, texts: Sequence[Sequence[int]], pooling: int) -> np.ndarray[Any, Any]:
    """Vectors by llama.cpp itself: every token's, one text at a time, pooled here."""
    model = llama.llama_model_load_from_file(str(path).encode(), llama.llama_model_default_params())
    params = llama.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = 512
    params.embeddings = True
    params.pooling_type = 0
    params.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it sums in 16 bits
    params.n_threads = 1
    context = llama.llama_init_from_model(model, params)
    size = llama.llama_model_n_embd(model)
    found = []
    for tokens in texts:
        llama.llama_memory_clear(llama.llama_get_memory(context), True)
        array = (llama.llama_token * len(tokens))(*tokens)
        assert llama.llama_decode(context, llama.llama_batch_get_one(array, len(tokens))) == 0
        rows = np.array(
            [
                ctypes.cast(
                    llama.llama_get_embeddings_ith(context, n),
                    ctypes.POINTER(ctypes.c_float * size),
                ).contents
                for n in range(len(tokens))
            ]
        )
        vector = rows.mean(axis=0) if pooling == MEAN else rows[-1]
        found.append(vector / np.linalg.norm(vector))
    llama.llama_free(context)
    llama.llama_model_free(model)
    return np.array(found)


@pytest.mark.parametrize("pooling", [MEAN, LAST])
def test_vectors_are_those_of_llama_cpp(models: dict[int, Path], pooling: int) -> None:
    with Engine.load([models[pooling]], EngineSettings(threads=1, context=1024)) as engine:
        assert engine.embedder is not None
        texts = [engine.tokenize(text) for text in TEXTS]
        together = engine.embedder.embed(texts)
        alone = np.concatenate([engine.embedder.embed([text]) for text in texts])
    expected = embed_plainly(models[pooling], texts, pooling)
    np.testing.assert_allclose(together, expected, atol=2e-3)
    np.testing.assert_allclose(alone, expected, atol=2e-3)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    assert not np.allclose(together[0], together[1], atol=0.05)


def test_texts_longer_than_the_first_batch_make_it_grow(models: dict[int, Path]) -> None:
    with Engine.load([models[MEAN]], EngineSettings(threads=1, context=1024)) as engine:
        assert engine.embedder is not None
        short, long = engine.tokenize(TEXTS[2]), engine.tokenize(TEXTS[2] * 60)
        assert len(long) > 512
        before = engine.embedder.embed([short])
        both = engine.embedder.embed([long, short])
        # larger batches take other kernels, which round differently
        assert both[1] @ before[0] > 0.999
        with pytest.raises(ContextOverflowError, match="1025"):
            engine.embedder.embed([[5] * 1025])
        embedder = engine.embedder
    with pytest.raises(EngineError, match="closed"):
        embedder.embed([short])


def test_generating_goes_on_beside_it(server: LiveServer, client: openai.OpenAI) -> None:
    question: list[Any] = [{"role": "user", "content": "What is 31 + 46?"}]
    stream = client.chat.completions.create(model="pool-1", messages=question, stream=True)
    first = next(iter(stream))
    client.embeddings.create(model="pool-1", input=TEXTS)
    rest = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    whole = client.chat.completions.create(model="pool-1", messages=question)
    assert (first.choices[0].delta.content or "") + rest == whole.choices[0].message.content


def test_batches_hold_what_fits_in_order() -> None:
    assert cut_batches([], 10) == []
    assert cut_batches([4, 4, 4, 10, 1], 10) == [2, 1, 1, 1]
    assert cut_batches([1] * (MAX_SEQUENCES + 1), 512) == [MAX_SEQUENCES, 1]


def test_every_form_of_input_gives_the_same_vectors(
    server: LiveServer, client: openai.OpenAI
) -> None:
    made = client.embeddings.create(model="pool-1", input=TEXTS)
    assert [item.index for item in made.data] == list(range(len(TEXTS)))
    tokens = [server.http.post("/tokenize", json={"prompt": t}).json()["tokens"] for t in TEXTS]
    assert made.usage.prompt_tokens == sum(map(len, tokens))
    by_tokens = client.embeddings.create(model="pool-1", input=tokens)
    one = client.embeddings.create(model="pool-1", input=TEXTS[1])
    one_by_tokens = client.embeddings.create(model="pool-1", input=tokens[1])
    plain = client.embeddings.create(model="pool-1", input=TEXTS, encoding_format="float")
    vectors = np.array([item.embedding for item in made.data])
    for other in (by_tokens, plain):
        np.testing.assert_allclose(np.array([i.embedding for i in other.data]), vectors, atol=2e-3)
    for other in (one, one_by_tokens):
        np.testing.assert_allclose(other.data[0].embedding, vectors[1], atol=2e-3)
    np.testing.assert_allclose(vectors[0], vectors[3], atol=2e-3)


def test_base64_and_numbers_are_the_same_values(server: LiveServer) -> None:
    def ask(form: str) -> Any:
        body = {"input": "Hello", "encoding_format": form}
        return server.http.post("/v1/embeddings", json=body).json()["data"][0]["embedding"]

    values = np.frombuffer(base64.b64decode(ask("base64")), "<f4")
    np.testing.assert_array_equal(values, np.array(ask("float"), np.float32))


def test_fewer_dimensions_are_the_first_ones_scaled_anew(client: openai.OpenAI) -> None:
    whole = np.array(client.embeddings.create(model="pool-1", input="Hello").data[0].embedding)
    cut = client.embeddings.create(model="pool-1", input="Hello", dimensions=8).data[0].embedding
    np.testing.assert_allclose(cut, whole[:8] / np.linalg.norm(whole[:8]), atol=1e-4)
    assert len(whole) > 8


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": None}, "input"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input[1]"),
        ({"input": [[]]}, "input"),
        ({"input": ["a", 5]}, "input"),
        ({"input": 5}, "input"),
        ({"input": {"a": 1}}, "input"),
        ({"input": [10**9]}, "input"),
        ({"input": [-1]}, "input"),
        ({"input": [10**30]}, "input"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": "word " * 2000}, "input"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "dimensions": 10**6}, "dimensions"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
    ],
)
def test_what_cannot_be_embedded_is_refused_by_name(
    server: LiveServer, body: dict[str, Any], param: str
) -> None:
    response = server.http.post("/v1/embeddings", json=body)
    assert response.status_code == 400, response.text
    assert (response.json()["error"]["param"] or "").startswith(param)


def test_a_chat_model_makes_none_and_says_so() -> None:
    with serve_model("demo", EngineSettings(threads=1)) as live:
        response = live.http.post("/v1/embeddings", json={"input": "Hello"})
        assert response.status_code == 400
        assert "makes no embeddings" in response.json()["error"]["message"]
        model = live.http.get("/v1/models").json()["data"][0]
        assert model["capabilities"]["embeddings"] is False


def test_models_say_who_can(server: LiveServer) -> None:
    model = server.http.get("/v1/models").json()["data"][0]
    assert model["capabilities"]["embeddings"] is True
