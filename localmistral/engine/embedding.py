"""Embeddings: texts to vectors, by a model that was made for that.

An `Embedder` has a context of its own beside the one that generates; the weights are shared. Its
calls may come from any thread, one runs at a time. Knows nothing of HTTP.
"""

import ctypes
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from localmistral.engine.failures import explain_context
from localmistral.engine.library import capture_log, explain, llama
from localmistral.engine.model import Model
from localmistral.engine.offload import name_buffers
from localmistral.engine.settings import EngineSettings
from localmistral.engine.threads import ThreadCount
from localmistral.errors import ContextOverflowError, EngineError

Vectors = npt.NDArray[np.float32]

MAX_SEQUENCES = 32
"""Texts in one batch: short ones together use the machine as well as a long one does."""
_SMALLEST_CAPACITY = 512
"""Tokens a batch holds at first. A text has to fit into one batch, since its vector is pooled
there, and graphs grow with the batch: so it grows only when a longer text comes."""
_POOLINGS = frozenset(("1", "2", "3"))
"""llama.h: enum llama_pooling_type, MEAN, CLS and LAST; NONE gives no vector of a whole text, and
RANK gives a score."""
_MAX_VALUE_BYTES = 64
_SMALLEST_LENGTH = np.float32(1e-30)
"""Stands for 0, which can't be divided by."""


class Embedder:
    """Owns its context. Close it before the model is freed."""

    def __init__(self, model: Model, settings: EngineSettings) -> None:
        """`settings.context` bounds the length of a text; memory is taken when the first comes."""
        self.size = int(llama.llama_model_n_embd_out(model.pointer))
        self.limit = settings.context
        self._model: Model | None = model
        self._settings = settings
        self._lock = threading.Lock()
        self._context: Any = None
        self._batch: Any = None
        self._capacity = 0

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
        return normalise(found)

    def _reserve(self, tokens: int) -> None:
        """A context whose batch holds a text of `tokens`."""
        if self._model is None:
            raise EngineError("The engine is closed.")
        if self._context is not None and tokens <= self._capacity:
            return
        self._free()
        capacity = _SMALLEST_CAPACITY
        while capacity < tokens:
            capacity *= 2
        with capture_log() as log:
            context = llama.llama_init_from_model(self._model.pointer, self._params(capacity))
        if not context:
            devices = name_buffers(self._settings)
            raise explain_context(capacity, capacity // 2, log, devices)
        self._context, self._capacity = context, capacity
        self._batch = llama.llama_batch_init(capacity, 0, 1)

    def _params(self, capacity: int) -> Any:
        params = llama.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = capacity
        params.n_seq_max = MAX_SEQUENCES
        params.kv_unified = True
        params.no_perf = True
        params.embeddings = True
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
    return _read_value(model, f"{architecture}.pooling_type") in _POOLINGS


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
