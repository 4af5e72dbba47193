"""What is in the context's memory: which sequence holds which tokens, and which may be reused.

Finds the longest known beginning of a prompt, in a sequence or in RAM, and copies it instead of
computing it again. Knows nothing of requests, batches or time.
"""

import sys
from collections.abc import Iterator
from typing import Protocol

import numpy as np

from localmistral.engine.prefixes import Prefix, PrefixStore, State, Tokens, measure_common

COPY_TOKENS = 16
"""How many tokens can be copied in the time of computing one, at the least: a copy moves the whole
source, a few GB/s of some 10 to 200 kB a token, where computing one takes 0.3 ms and more."""
NOTABLE_TOKENS = 64
"""A beginning longer by less than this is no reason to sit apart from the sequences that compute:
every token of the answer would cost a pass of its own over the weights."""
SMALLEST_STORED = 32
"""Tokens that are computed again as fast as they are looked for."""


class Memory(Protocol):
    """The operations on llama.cpp's memory that are needed here; see `model.Context`."""

    def cut(self, sequence: int, position: int) -> bool: ...
    def save(self, sequence: int, limit_bytes: int) -> State | None: ...
    def restore(self, sequence: int, state: State) -> bool: ...
    def first_position(self, sequence: int) -> int: ...


class Sequence:
    """One sequence of the context: `held` are the tokens in memory."""

    def __init__(self, number: int, capacity: int) -> None:
        self.number = number
        self._tokens: Tokens = np.zeros(capacity, np.int32)
        self.length = 0
        self.busy = False
        self.last_used = 0

    @property
    def tokens(self) -> Tokens:
        return self._tokens[: self.length]

    def append(self, tokens: Tokens | list[int]) -> None:
        """Note that `tokens` are in memory now."""
        end = self.length + len(tokens)
        self._tokens[self.length : end] = tokens
        self.length = end


Source = Sequence | Prefix


class SequenceCache:
    """All sequences of a context. `partial` False: memory can only be kept or dropped whole."""

    def __init__(
        self,
        memory: Memory,
        count: int,
        capacity: int,
        *,
        partial: bool,
        window: int = 0,
        stored_bytes: int = 0,
    ) -> None:
        self._memory = memory
        self._window = window
        self._partial = partial
        self._sequences = [Sequence(number, capacity) for number in range(count)]
        self._store = PrefixStore(stored_bytes)
        self._clock = 0

    def acquire(self, prompt: Tokens, *, reuse: bool) -> Sequence:
        """A free sequence that holds as much of `prompt` as could be found, never all of it.

        The last token stays out: its logits are needed, and only computing it gives them.
        The caller makes sure that a sequence is free.
        """
        source, length = self._find_source(prompt) if reuse else (None, 0)
        if isinstance(source, Prefix):
            self._store.touch(source)  # before what is stored next can push it out
        target = self._choose_target(source, length, prompt)
        self._keep(target, prompt)
        if source is target:
            self.truncate(target, length)
        else:
            self._drop(target)
            if source is not None and length * COPY_TOKENS >= source.length:
                self._copy(source, target, length)
        target.busy = True
        return target

    def release(self, sequence: Sequence) -> None:
        """The sequence is free again; what it holds stays until its place is needed."""
        sequence.busy = False
        self._clock += 1
        sequence.last_used = self._clock

    def truncate(self, sequence: Sequence, length: int) -> bool:
        """Keep the first `length` tokens; False, and nothing is kept, where that can't be done.

        Also cuts off what a failed decode left behind.
        """
        if self._memory.cut(sequence.number, length) and self._is_whole(sequence, length):
            sequence.length = min(sequence.length, length)
            return True
        self._drop(sequence)
        return False

    def find_between(self, low: int, high: int) -> list[Sequence]:
        """The sequences numbered between the two."""
        return self._sequences[low + 1 : high]

    def count_tokens(self) -> int:
        """Tokens that the context's sequences hold."""
        return sum(s.length for s in self._sequences)

    @property
    def stored_bytes(self) -> int:
        """Bytes of RAM that keep what sequences no longer hold."""
        return self._store.used_bytes

    def _drop(self, sequence: Sequence) -> None:
        self._memory.cut(sequence.number, 0)
        sequence.length = 0

    def _find_source(self, prompt: Tokens) -> tuple[Source | None, int]:
        """Who holds the longest usable beginning of `prompt`, if it isn't too far apart. Of equals,
        a free sequence wins, since that takes no copy: the one closest to those that compute, then
        the one that loses least."""

        def rank(candidate: tuple[Source, int]) -> tuple[int, bool, int, int]:
            source, length = candidate
            is_free = isinstance(source, Sequence) and not source.busy
            gap = self._measure_gap(source) if isinstance(source, Sequence) else 0
            value = length - (NOTABLE_TOKENS if gap > 1 else 0)
            return value, is_free, -gap, -source.length

        return max(self._list_sources(prompt), key=rank, default=(None, 0))

    def _measure_gap(self, sequence: Sequence) -> int:
        """How far `sequence` is from the nearest busy one; 0 when none is busy."""
        numbers = (s.number for s in self._sequences if s.busy)
        return min((abs(sequence.number - number) for number in numbers), default=0)

    def _list_sources(self, prompt: Tokens) -> Iterator[tuple[Source, int]]:
        sources: list[Source] = [*self._sequences, *self._store]
        for source in sources:
            length = min(measure_common(source.tokens, prompt), len(prompt) - 1)
            if length and self._is_usable(source, length):
                yield source, length

    def _is_usable(self, source: Source, length: int) -> bool:
        """Whether the first `length` tokens of `source` can be had for less than they cost."""
        is_free = isinstance(source, Sequence) and not source.busy
        if not is_free and length * COPY_TOKENS < source.length:
            return False
        if not self._partial:
            return length == source.length and not (isinstance(source, Sequence) and source.busy)
        if isinstance(source, Prefix):
            return source.is_whole or length == source.length
        if is_free and length == source.length:
            return True
        return self._memory.first_position(source.number) == 0

    def _is_whole(self, sequence: Sequence, length: int) -> bool:
        """Whether all that attention looks back at from `length` on is in memory.

        A sliding window lets go of what has passed out of it, and a failed step may have pushed
        out what is needed again.
        """
        if not self._window or not length:
            return True
        return self._memory.first_position(sequence.number) <= max(0, length - self._window)

    def _choose_target(self, source: Source | None, length: int, prompt: Tokens) -> Sequence:
        """`source` itself if most of it stays, else an empty sequence, else `source` itself if it
        is free, else the one that begins most like `prompt`, which will replace it; of equals the
        closest to those that compute, then the one used longest ago."""
        free = [s for s in self._sequences if not s.busy]
        if source in free and 2 * length >= source.length:
            return source
        empty = [s for s in free if not s.length]
        if empty:
            return min(empty, key=self._measure_gap)
        if source in free:
            return source
        return min(free, key=lambda s: (-_count_kept(s, prompt), self._measure_gap(s), s.last_used))

    def _keep(self, target: Sequence, prompt: Tokens) -> None:
        """Store what `target` holds, if a request for `prompt` in its place would lose most of it
        and nothing else has it."""
        tokens = target.tokens
        if len(tokens) < SMALLEST_STORED or _count_kept(target, prompt) or self._is_known(target):
            return
        is_whole = self._memory.first_position(target.number) == 0
        state = self._memory.save(target.number, self._store.limit_bytes)
        if state is not None:
            prefix = Prefix(tokens=tokens.copy(), state=state, is_whole=is_whole)
            self._store.add(prefix, replaces_beginnings=self._partial and is_whole)

    def _is_known(self, target: Sequence) -> bool:
        """Whether another sequence or the store begins with all that `target` holds."""
        tokens = target.tokens
        others = (s.tokens for s in self._sequences if s is not target)
        is_held = any(measure_common(other, tokens) == len(tokens) for other in others)
        return (self._partial and is_held) or self._store.covers(tokens)

    def _copy(self, source: Source, target: Sequence, length: int) -> None:
        """Put the first `length` tokens of `source` into the empty `target`; it stays empty where
        that fails."""
        state = (
            source.state
            if isinstance(source, Prefix)
            else self._memory.save(source.number, sys.maxsize)
        )
        if state is None or not self._memory.restore(target.number, state):
            self._drop(target)
            return
        target.append(source.tokens)
        self.truncate(target, length)


def _count_kept(sequence: Sequence, prompt: Tokens) -> int:
    """Tokens of `sequence` that `prompt` begins with too, if that is half of it or more; else 0."""
    common = measure_common(sequence.tokens, prompt)
    return common if 2 * common >= sequence.length else 0
