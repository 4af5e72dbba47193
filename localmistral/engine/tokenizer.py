"""Text to token ids and back, by the vocabulary of a loaded model; from any thread.

Knows nothing of chat: whether control tokens are recognised is the caller's word, piece by piece.
"""

import ctypes
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from localmistral.engine.library import llama
from localmistral.errors import BadRequestError, EngineError

_SHORT_RUN = 400
"""Characters of one kind in a row that any thread's stack can take."""
_STACK_PER_CHARACTER = 2048
"""llama.cpp splits text with std::regex, which recurses for every character of a match: a run of
16,000 to 32,000 fits 8 MiB of stack (measured with a Tekken vocabulary), and a longer one ends
the process. A match is at most about three runs long, so this doubles what was measured."""
_LONGEST_RUN = 250_000
"""Longer runs are cut here (512 MB of stack); a word of this length is not text any more."""
_PROBE = "a"
"""A text that no vocabulary takes for its BOS."""


class Tokenizer:
    """The vocabulary of a model. `close` must come before the model is freed."""

    def __init__(self, vocabulary: object) -> None:
        self._vocabulary: object | None = vocabulary
        self._lock = threading.Condition()
        self._users = 0
        self._pieces: dict[int, bytes] = {}
        self.size = int(llama.llama_vocab_n_tokens(vocabulary))
        self.bos = int(llama.llama_vocab_bos(vocabulary))
        self.eos = int(llama.llama_vocab_eos(vocabulary))
        self.adds_bos = bool(llama.llama_vocab_get_add_bos(vocabulary))
        self.adds_eos = bool(llama.llama_vocab_get_add_eos(vocabulary))
        self._frame: tuple[list[int], list[int]] | None = None
        self._control: dict[int, bool] = {}
        self._ends: dict[int, bool] = {}
        self._all_ends: tuple[int, ...] | None = None

    def close(self) -> None:
        """Wait until nobody uses the vocabulary, and let nobody use it again."""
        with self._lock:
            self._vocabulary = None
            self._lock.wait_for(lambda: not self._users)

    def is_control(self, token: int) -> bool:
        known = self._control.get(token)
        if known is None:
            with self.hold() as vocabulary:
                known = bool(llama.llama_vocab_is_control(vocabulary, token))
            self._control[token] = known
        return known

    def is_end(self, token: int) -> bool:
        """Whether `token` ends a generation (llama.cpp's end-of-generation set)."""
        known = self._ends.get(token)
        if known is None:
            with self.hold() as vocabulary:
                known = bool(llama.llama_vocab_is_eog(vocabulary, token))
            self._ends[token] = known
        return known

    def list_ends(self) -> tuple[int, ...]:
        """All tokens that end a generation; looked for once."""
        if self._all_ends is None:
            is_end = llama.llama_vocab_is_eog
            with self.hold() as vocabulary:
                found = tuple(t for t in range(self.size) if is_end(vocabulary, t))
            self._all_ends = found
        return self._all_ends

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        """Token ids of `text`, without BOS; control-token text counts only with `parse_special`."""
        tokens: list[int] = []
        for part in _cut_runs(text):
            tokens += self._encode_part(part, parse_special)
        return tokens

    @property
    def frame(self) -> tuple[list[int], list[int]]:
        """What llama.cpp puts before and behind a whole text: BOS and EOS, CLS and SEP, or none."""
        if self._frame is None:
            bare = self._call_tokenize(_PROBE, parse_special=False)
            whole = self._call_tokenize(_PROBE, parse_special=False, add_special=True)
            places = range(len(whole) - len(bare) + 1)
            start = next(n for n in places if whole[n : n + len(bare)] == bare)
            self._frame = whole[:start], whole[start + len(bare) :]
        return self._frame

    def _encode_part(self, text: str, parse_special: bool) -> list[int]:
        run = _measure_run(text)
        if run <= _SHORT_RUN:
            return self._call_tokenize(text, parse_special)
        result: list[int] = []
        run_with_stack(
            lambda: result.extend(self._call_tokenize(text, parse_special)),
            2**20 + run * _STACK_PER_CHARACTER,
        )
        return result

    def _call_tokenize(
        self, text: str, parse_special: bool, *, add_special: bool = False
    ) -> list[int]:
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadRequestError(
                f"Character {error.start} of the text is half of a surrogate pair, not text."
            ) from error
        capacity = len(data) + 2  # BOS and EOS
        buffer = (llama.llama_token * capacity)()
        with self.hold() as vocabulary:
            count = llama.llama_tokenize(
                vocabulary, data, len(data), buffer, capacity, add_special, parse_special
            )
        if count < 0:
            raise EngineError(f"llama.cpp could not tokenise a text of {len(data)} bytes.")
        return list(buffer[:count])

    def _open(self) -> object:
        if self._vocabulary is None:
            raise EngineError("The engine is closed.")
        return self._vocabulary

    @contextmanager
    def hold(self) -> Iterator[object]:
        """llama.cpp's handle of the vocabulary, kept from being closed; many may hold it."""
        with self._lock:
            vocabulary = self._open()
            self._users += 1
        try:
            yield vocabulary
        finally:
            with self._lock:
                self._users -= 1
                self._lock.notify_all()

    def piece(self, token: int) -> bytes:
        """The bytes of one token, control tokens spelled out; may be a part of a character."""
        cached = self._pieces.get(token)
        if cached is None:
            cached = self._pieces[token] = self._render_piece(token)
        return cached

    def _render_piece(self, token: int) -> bytes:
        self.check([token])
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            with self.hold() as vocabulary:
                count = llama.llama_token_to_piece(vocabulary, token, buffer, size, 0, True)
            if count >= 0:
                return buffer.raw[:count]
            size = -count

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of `tokens`, control tokens spelled out."""
        return b"".join(self.piece(token) for token in tokens).decode("utf-8", "replace")

    def check(self, tokens: Sequence[int], *, param: str = "") -> None:
        """Refuse ids that the vocabulary doesn't have: llama.cpp would read past its tables.

        `param` is the request's field that they came in.
        """
        ids = np.asarray(tokens)
        wrong = ids[(ids < 0) | (ids >= self.size)]
        if wrong.size:
            raise BadRequestError(
                f"Token {int(wrong[0])} is not in the vocabulary of {self.size} tokens.",
                param=param,
            )


_stack_lock = threading.Lock()


def run_with_stack(work: Callable[[], None], size: int) -> None:
    """Call `work` on a thread of its own with `size` bytes of stack; its error comes through."""
    errors: list[BaseException] = []

    def guarded() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001  (it is raised again below)
            errors.append(error)

    rounded = -(-size // 2**20) * 2**20
    with _stack_lock:
        before = threading.stack_size(rounded)
        try:
            thread = threading.Thread(target=guarded, name="tokenizer")
            thread.start()
        finally:
            threading.stack_size(before)
    thread.join()
    if errors:
        raise errors[0]


def _classify(text: str) -> tuple[npt.NDArray[np.bool_], ...]:
    """Masks over the characters: what a tokenizer's pattern may match as one run.

    Non-ASCII characters count as letters and as punctuation, since combining marks, letters and
    symbols need Unicode's tables to tell apart; an upper bound is all that is wanted.
    """
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    space = (codes <= 32) | np.isin(codes, _UNICODE_SPACES)
    ascii_codes = codes < 128
    letter = ascii_codes & (
        ((codes >= 48) & (codes <= 57)) | (((codes | 32) >= 97) & ((codes | 32) <= 122))
    )
    return space, ~space & (letter | ~ascii_codes), ~space & ~letter


_UNICODE_SPACES = np.array(
    [0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000],
    dtype=np.uint32,
)


def _measure_run(text: str) -> int:
    """The longest run of characters of one class, in characters."""
    if len(text) <= _SHORT_RUN:
        return len(text)
    return max(int(np.max(ends - starts, initial=0)) for starts, ends in _find_runs(text))


def _find_runs(text: str) -> list[tuple[npt.NDArray[np.int_], npt.NDArray[np.int_]]]:
    """(starts, ends) of the runs of each class; ends are exclusive."""
    runs = []
    for mask in _classify(text):
        edges = np.diff(np.concatenate(([False], mask, [False])).astype(np.int8))
        runs.append((np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)))
    return runs


def _cut_runs(text: str) -> list[str]:
    """`text` in pieces, cut only inside runs longer than `_LONGEST_RUN`."""
    if len(text) <= _LONGEST_RUN:
        return [text]
    cuts = {0, len(text)}
    for starts, ends in _find_runs(text):
        for i in np.flatnonzero(ends - starts > _LONGEST_RUN):
            cuts.update(range(int(starts[i]) + _LONGEST_RUN, int(ends[i]), _LONGEST_RUN))
    places = sorted(cuts)
    return [text[start:end] for start, end in itertools.pairwise(places)]
