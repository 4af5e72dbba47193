"""Embeddings: texts to vectors, by a model that was made for that.

An `Embedder` has a context of its own, the only one of a model that can't write; beside one that
generates the weights are shared. Its calls may come from any thread, one runs at a time. Knows
nothing of HTTP.

Its memory is that of its batch: `fit.embedding` says how much, 512 tokens at first, for BERT of
110 M parameters about 85 MiB. A longer text makes it grow for good, to at most what a batch of
`settings.context` tokens takes. Plans count all of that for models that only embed; beside a
context that generates it isn't planned, and is taken only when somebody asks for embeddings.
"""

import ctypes
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from localmistral.engine.failures import explain_context
from localmistral.engine.library import LogLine, capture_log, explain, llama
from localmistral.engine.metrics import EngineMetrics
from localmistral.engine.model import Model
from localmistral.engine.offload import name_buffers
from localmistral.engine.settings import EngineSettings
from localmistral.engine.threads import ThreadCount
from localmistral.errors import ContextOverflowError, EngineError, ModelFileError
from localmistral.fit.embedding import batch_for, uses_flash_attention
from localmistral.models.shape import ENCODER_ARCHITECTURES, VECTOR_POOLINGS

Vectors = npt.NDArray[np.float32]

MAX_SEQUENCES = 32
"""Texts in one batch: short ones together use the machine as well as a long one does."""
_MAX_VALUE_BYTES = 64
_SMALLEST_LENGTH = np.float32(1e-30)
"""Stands for 0, which can't be divided by."""


class Embedder:
    """Owns its context. Close it before the model is freed."""

    def __init__(self, model: Model, settings: EngineSettings) -> None:
        """`settings.context` bounds the length of a text; memory is taken when the first comes, or
        by `prepare`."""
        self.size = int(llama.llama_model_n_embd_out(model.pointer))
        self.limit = settings.context
        self._texts = self._tokens = 0
        self._model: Model | None = model
        self._settings = settings
        self._lock = threading.Lock()
        self._context: Any = None
        self._batch: Any = None
        self._capacity = 0
        self._log: Sequence[LogLine] = ()

    def prepare(self, tokens: int = 1) -> Sequence[LogLine]:
        """Take the memory for texts of `tokens`; what llama.cpp said of it.

        Raises OutOfMemoryError where a device has no room, EngineError for anything else.
        """
        with self._lock:
            self._reserve(tokens)
        return self._log

    def embed(self, texts: Sequence[Sequence[int]]) -> Vectors:
        """The vectors of `texts` (token ids, not empty), in order, shape (texts, `size`), each of
        length 1.

        Raises ContextOverflowError for a text longer than the context, EngineError when llama.cpp
        fails or the engine is closed.
        """
        longest = max(map(len, texts), default=0)
        if longest > self.limit:
            raise ContextOverflowError(
                f"A text has {longest} tokens, the context holds {self.limit}.",
                "Cut it into pieces.",
                param="input",
            )
        found = np.empty((len(texts), self.size), np.float32)
        with self._lock:
            self._reserve(longest)
            first = 0
            for batch in cut_batches([len(text) for text in texts], self._capacity):
                rows = [texts[first + n] for n in range(batch)]
                found[first : first + batch] = self._compute(rows)
                first += batch
            self._texts += len(texts)
            self._tokens += sum(map(len, texts))
        return normalise(found)

    def metrics(self) -> EngineMetrics:
        """Texts as requests, and their tokens."""
        return EngineMetrics(requests=self._texts, finished=self._texts, prompt_tokens=self._tokens)

    def _reserve(self, tokens: int) -> None:
        """A context whose batch holds a text of `tokens`."""
        if self._model is None:
            raise EngineError("The engine is closed.")
        if self._context is not None and tokens <= self._capacity:
            return
        self._free()
        capacity = batch_for(tokens)
        with capture_log() as self._log:
            context = llama.llama_init_from_model(self._model.pointer, self._params(capacity))
        if not context:
            devices = name_buffers(self._settings)
            raise explain_context(capacity, capacity // 2, self._log, devices)
        self._context, self._capacity = context, capacity
        self._batch = llama.llama_batch_init(capacity, 0, 1)

    def _params(self, capacity: int) -> Any:
        params = llama.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = capacity
        params.n_seq_max = MAX_SEQUENCES
        params.kv_unified = True
        params.no_perf = True
        params.embeddings = True
        params.flash_attn_type = (
            llama.LLAMA_FLASH_ATTN_TYPE_AUTO
            if uses_flash_attention(capacity)
            else llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        params.n_threads = params.n_threads_batch = ThreadCount(self._settings.threads).current
        return params

    def _compute(self, texts: Sequence[Sequence[int]]) -> Vectors:
        """One batch, a sequence a text."""
        row = 0
        for sequence, tokens in enumerate(texts):
            for position, token in enumerate(tokens):
                self._batch.token[row] = token
                self._batch.pos[row] = position
                self._batch.n_seq_id[row] = 1
                self._batch.seq_id[row][0] = sequence
                self._batch.logits[row] = 1  # pooling reads every token
                row += 1
        self._batch.n_tokens = row
        memory = llama.llama_get_memory(self._context)
        if memory:
            llama.llama_memory_clear(memory, False)
        with capture_log() as log:
            code = int(llama.llama_decode(self._context, self._batch))
        if code:
            raise EngineError(explain(f"llama.cpp could not embed {row} tokens ({code})", log))
        return np.stack([self._read(sequence) for sequence in range(len(texts))])

    def _read(self, sequence: int) -> Vectors:
        pointer = llama.llama_get_embeddings_seq(self._context, sequence)
        if not pointer:
            raise EngineError("llama.cpp gave no embedding of a text.")
        return np.ctypeslib.as_array(pointer, shape=(self.size,)).copy()

    def _free(self) -> None:
        if self._context is not None:
            llama.llama_batch_free(self._batch)
            llama.llama_free(self._context)
            self._context = self._batch = None

    def close(self) -> None:
        """Wait for what runs, free the context, and let nobody embed again."""
        with self._lock:
            self._free()
            self._model = None


def normalise(vectors: Vectors) -> Vectors:
    """The same directions, each of length 1; what has no direction stays all zeros."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    scaled: Vectors = np.divide(vectors, np.maximum(lengths, _SMALLEST_LENGTH))
    return scaled


def makes_embeddings(model: Model) -> bool:
    """Whether the file says how the vectors of its tokens become that of a text."""
    architecture = _read_value(model, "general.architecture")
    pooling = _read_value(model, f"{architecture}.pooling_type")
    return pooling in map(str, VECTOR_POOLINGS)


def only_embeds(model: Model) -> bool:
    """Whether that is all it can do: by the file, as `ModelShape.only_embeds` has it.

    Raises ModelFileError for a model that can't do that either: such as rerankers.
    """
    architecture = _read_value(model, "general.architecture")
    is_causal = _read_value(model, f"{architecture}.attention.causal") != "false"
    looks_ahead = architecture in ENCODER_ARCHITECTURES or not is_causal
    if looks_ahead and not makes_embeddings(model):
        raise ModelFileError(
            f"The model ({architecture}) reads texts in both directions and names no pooling to "
            "a vector, so it can neither write nor make embeddings.",
            "Use a GGUF file of a chat or an embedding model.",
        )
    return looks_ahead


def _read_value(model: Model, key: str) -> str:
    buffer = ctypes.create_string_buffer(_MAX_VALUE_BYTES)
    llama.llama_model_meta_val_str(model.pointer, key.encode(), buffer, _MAX_VALUE_BYTES)
    return buffer.value.decode("utf-8", "replace")


def cut_batches(lengths: Sequence[int], capacity: int) -> list[int]:
    """How many texts each batch takes, in order: as many as fit, MAX_SEQUENCES at most."""
    batches: list[int] = []
    filled = capacity
    for length in lengths:
        if not batches or filled + length > capacity or batches[-1] == MAX_SEQUENCES:
            batches.append(0)
            filled = 0
        batches[-1] += 1
        filled += length
    return batches
