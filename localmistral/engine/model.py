"""Loading a model and its context into llama.cpp, and the few calls that a scheduler needs.

`Context` is used by one thread only. Knows nothing of requests or of fairness.
"""

import ctypes
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from localmistral.engine.failures import explain_context, explain_load
from localmistral.engine.library import AbortFlag, capture_log, llama
from localmistral.engine.offload import apply_offload, check_offload, name_buffers
from localmistral.engine.prefixes import State
from localmistral.engine.settings import EngineSettings, Logits
from localmistral.engine.threads import ThreadCount
from localmistral.errors import BadRequestError, EngineError, ModelFileError

Progress = Callable[[float], bool]
"""Called with 0.0-1.0 while loading; False stops the load."""

_GGML_TYPES = {
    "f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "iq4_nl": 20,
    "bf16": 30,
}  # fmt: skip
_CONTEXT_MULTIPLE = 256

DECODED = 0
ABORTED = 2


class Model:
    """The weights of one model in memory; `log` is what llama.cpp said of the load."""

    def __init__(
        self,
        files: Sequence[Path],
        settings: EngineSettings,
        progress: Progress | None = None,
        *,
        is_dry: bool = False,
    ) -> None:
        """Load `files`. A dry model has no weights: its contexts compute buffer sizes alone.

        Raises ModelFileError for what llama.cpp can't load, OutOfMemoryError where a device has
        no room, EngineError for devices and splits that can't be.
        """
        check_offload(files, settings)
        params = llama.llama_model_default_params()
        kept = apply_offload(params, settings)
        params.use_extra_bufts = settings.repack
        params.no_alloc = is_dry
        if is_dry or not settings.mmap:
            params.load_mode = llama.LLAMA_LOAD_MODE_NONE
        if progress is not None:
            report = progress
            callback = llama.llama_progress_callback(lambda done, _: report(done))
            params.progress_callback = callback
        with capture_log() as self.log:
            self.pointer = self._load(files, params)
        del kept
        if not self.pointer:
            raise explain_load(files[0].name, self.log, name_buffers(settings))
        self._refuse_other_kinds(files[0].name)
        self.vocabulary = llama.llama_model_get_vocab(self.pointer)

    @staticmethod
    def _load(files: Sequence[Path], params: Any) -> Any:
        names = [_encode_path(path) for path in files]
        if len(names) == 1:
            return llama.llama_model_load_from_file(names[0], params)
        array = (ctypes.c_char_p * len(names))(*names)
        return llama.llama_model_load_from_splits(array, len(names), params)

    def _refuse_other_kinds(self, name: str) -> None:
        """Only decoders write text from left to right; the calls for it abort on others."""
        if (
            llama.llama_model_has_encoder(self.pointer)
            or not llama.llama_model_has_decoder(self.pointer)
            or llama.llama_model_is_diffusion(self.pointer)
        ):
            self.close()
            raise ModelFileError(
                f"{name} is an encoder or diffusion model, which can't write text token by token.",
                "Use a GGUF file of a chat model.",
            )

    @property
    def trained_context(self) -> int:
        return int(llama.llama_model_n_ctx_train(self.pointer))

    @property
    def window(self) -> int:
        """Positions that sliding-window attention looks back at; 0 without it."""
        return int(llama.llama_model_n_swa(self.pointer))

    @property
    def keeps_every_position(self) -> bool:
        """Whether memory can be cut or copied at any position: not so for recurrent states."""
        return not (
            llama.llama_model_is_recurrent(self.pointer)
            or llama.llama_model_is_hybrid(self.pointer)
        )

    def close(self) -> None:
        if self.pointer:
            llama.llama_model_free(self.pointer)
            self.pointer = None


class Context:
    """llama.cpp's context: one batch under construction, and the memory of `parallel` sequences.

    Fill the batch with `add`, sequences in ascending order, then `decode` it. Logits of rows that
    asked for them are valid until the next `decode`. `log` is what llama.cpp said when it made the
    context.

    Every sequence has cells of its own. In memory shared by all, a token's attention runs over
    everybody's cells and masks those of the others: at 8 streams that took a fifth of the speed.
    """

    def __init__(self, model: Model, settings: EngineSettings) -> None:
        """Raises OutOfMemoryError where a device has no room, EngineError for anything else."""
        self._n_vocab = int(llama.llama_vocab_n_tokens(model.vocabulary))
        self.abort = AbortFlag()
        self.cells = _round_up(settings.context) * settings.parallel
        params = self._params(settings)
        with capture_log() as self.log:
            self.pointer = llama.llama_init_from_model(model.pointer, params)
        if not self.pointer:
            smaller = max(_CONTEXT_MULTIPLE, settings.context // 2)
            raise explain_context(self.cells, smaller, self.log, name_buffers(settings))
        self._memory = llama.llama_get_memory(self.pointer)
        if not self._memory:
            self.close()
            raise ModelFileError(
                "The model keeps no memory of what came before: it makes embeddings, not text.",
                "Use a GGUF file of a chat model.",
            )
        self.capacity = min(settings.batch, int(llama.llama_n_batch(self.pointer)))
        self._make_batch(self.capacity)

    def _params(self, settings: EngineSettings) -> Any:
        limit = int(llama.llama_max_parallel_sequences())
        if settings.parallel > limit:
            raise BadRequestError(
                f"{settings.parallel} streams are asked for, llama.cpp holds at most {limit}.",
                "Ask for fewer with --parallel.",
            )
        params = llama.llama_context_default_params()
        params.n_ctx = self.cells
        params.n_batch = settings.batch
        params.n_ubatch = min(settings.ubatch, settings.batch)
        params.n_seq_max = settings.parallel
        params.kv_unified = False
        params.no_perf = True
        self.threads = ThreadCount(settings.threads)
        params.n_threads = params.n_threads_batch = self.threads.current
        params.type_k = params.type_v = _GGML_TYPES[settings.kv_type]
        params.flash_attn_type = _choose_flash_attention(settings)
        params.abort_callback = self.abort.callback
        params.abort_callback_data = self.abort.data
        return params

    def _make_batch(self, capacity: int) -> None:
        """Arrays that llama.cpp reads in place; every row belongs to exactly one sequence."""
        self._tokens = np.zeros(capacity, np.int32)
        self._positions = np.zeros(capacity, np.int32)
        self._counts = np.ones(capacity, np.int32)
        self._sequences = np.zeros(capacity, np.int32)
        first = self._sequences.ctypes.data
        self._pointers = (first + 4 * np.arange(capacity)).astype(np.uintp)
        self._wanted = np.zeros(capacity, np.int8)
        fields = dict(llama.llama_batch._fields_)

        def point(array: npt.NDArray[Any], name: str) -> Any:
            return ctypes.cast(array.ctypes.data, fields[name])

        self._batch = llama.llama_batch(
            0,
            point(self._tokens, "token"),
            None,
            point(self._positions, "pos"),
            point(self._counts, "n_seq_id"),
            point(self._pointers, "seq_id"),
            point(self._wanted, "logits"),
        )
        self.rows = 0

    def clear_batch(self) -> None:
        self.rows = 0

    def add(self, sequence: int, position: int, tokens: Any, *, logits: int) -> int:
        """Append `tokens` at `position`; the last `logits` rows give logits. The first row's index.

        The caller keeps within `capacity`: llama.cpp ends the process on a longer batch.
        """
        start, end = self.rows, self.rows + len(tokens)
        if end > self.capacity:
            raise EngineError(f"A batch of {end} tokens passes the limit of {self.capacity}.")
        self._tokens[start:end] = tokens
        if end - start == 1:
            self._positions[start] = position
        else:
            self._positions[start:end] = np.arange(position, position + end - start)
        self._sequences[start:end] = sequence
        self._wanted[start:end] = 0
        self._wanted[end - logits : end] = 1
        self.rows = end
        return start

    def decode(self) -> int:
        """Run the batch: DECODED, ABORTED, or a failure (1: no room for it in memory; or negative).

        After ABORTED and failures, parts of the batch may be in memory: the caller cuts them off.
        """
        self._batch.n_tokens = self.rows
        return int(llama.llama_decode(self.pointer, self._batch))

    def adapt_threads(self, *, steady: bool) -> None:
        """Use as many threads as other processes leave cores for, or all if `steady`."""
        if self.threads.update(steady=steady):
            count = self.threads.current
            llama.llama_set_n_threads(self.pointer, count, count)

    def synchronize(self) -> None:
        """Wait for devices that compute behind the call's back."""
        llama.llama_synchronize(self.pointer)

    def logits(self, row: int) -> Logits:
        """A writable view of a row's logits, shape (vocabulary,)."""
        pointer = llama.llama_get_logits_ith(self.pointer, row)
        if not pointer:
            raise EngineError(f"Row {row} of the batch has no logits.")
        return np.ctypeslib.as_array(pointer, shape=(self._n_vocab,))

    def logit(self, row: int, token: int) -> float:
        """One logit of a row that asked for logits."""
        return float(llama.llama_get_logits_ith(self.pointer, row)[token])

    def cut(self, sequence: int, position: int) -> bool:
        """Forget `sequence` from `position` on; False where only whole sequences can go."""
        return bool(llama.llama_memory_seq_rm(self._memory, sequence, position, -1))

    def save(self, sequence: int, limit_bytes: int) -> State | None:
        """A copy of what `sequence` holds, for any sequence; None if larger, or RAM is short."""
        size = int(llama.llama_state_seq_get_size(self.pointer, sequence))
        if size > limit_bytes:
            return None
        try:
            state = np.empty(size, np.uint8)
        except MemoryError:
            return None
        written = llama.llama_state_seq_get_data(self.pointer, _point(state), size, sequence)
        return state[: int(written)]

    def restore(self, sequence: int, state: State) -> bool:
        """Replace what `sequence` holds by what was saved; False, and it is empty, on failure."""
        size = len(state)
        read = int(llama.llama_state_seq_set_data(self.pointer, _point(state), size, sequence))
        return 0 < size == read

    def first_position(self, sequence: int) -> int:
        """The oldest position kept of `sequence`, -1 when it is empty (windows drop old ones)."""
        return int(llama.llama_memory_seq_pos_min(self._memory, sequence))

    def close(self) -> None:
        if self.pointer:
            llama.llama_free(self.pointer)
            self.pointer = None


def fit_settings(settings: EngineSettings, model: Model) -> EngineSettings:
    """Refuse a context that the model was not made for; a batch with room for every sequence."""
    trained = model.trained_context
    if settings.context > trained > 0:
        raise BadRequestError(
            f"A context of {settings.context} tokens is asked for, the model's limit is {trained}.",
            f"Use --context {trained} or less.",
            param="context",
        )
    # llama.cpp ends the process if a batch can't hold a token of every sequence.
    return replace(settings, batch=max(settings.batch, settings.parallel))


def _encode_path(path: Path) -> bytes:
    """What llama.cpp's fopen expects: the system's bytes, on Windows UTF-8."""
    return str(path).encode("utf-8") if sys.platform == "win32" else os.fsencode(path)


def _point(state: State) -> Any:
    return state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))


def _round_up(tokens: int) -> int:
    return -(-tokens // _CONTEXT_MULTIPLE) * _CONTEXT_MULTIPLE


def _choose_flash_attention(settings: EngineSettings) -> int:
    if settings.flash_attention is None:
        return int(llama.LLAMA_FLASH_ATTN_TYPE_AUTO)
    wanted = settings.flash_attention
    return int(
        llama.LLAMA_FLASH_ATTN_TYPE_ENABLED if wanted else llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
    )
