"""What is in the context's memory: which sequence holds which tokens, and which may be reused.

Finds the longest stored beginning of a prompt and shares it instead of computing it again.
Knows nothing of requests, batches or time.
"""

from typing import Protocol

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int32]


class Memory(Protocol):
    """The operations on llama.cpp's memory that are needed here; see `model.Context`."""

    def cut(self, sequence: int, position: int) -> bool: ...
    def share(self, source: int, target: int, length: int) -> None: ...
    def first_position(self, sequence: int) -> int: ...


class Sequence:
    """One sequence of the context: `tokens[:length]` are in memory."""

    def __init__(self, number: int, capacity: int) -> None:
        self.number = number
        self.tokens: Tokens = np.zeros(capacity, np.int32)
        self.length = 0
        self.busy = False
        self.last_used = 0

    def append(self, tokens: Tokens | list[int]) -> None:
        """Note that `tokens` are in memory now."""
        end = self.length + len(tokens)
        self.tokens[self.length : end] = tokens
        self.length = end

    def measure_common(self, prompt: Tokens) -> int:
        """Length of the common beginning with `prompt`."""
        size = min(self.length, len(prompt))
        different = np.flatnonzero(self.tokens[:size] != prompt[:size])
        return int(different[0]) if different.size else size


class SequenceCache:
    """All sequences of a context. `partial` False: memory can only be kept or dropped whole."""

    def __init__(
        self, memory: Memory, count: int, capacity: int, *, partial: bool, window: int = 0
    ) -> None:
        self._memory = memory
        self._window = window
        self._partial = partial
        self._sequences = [Sequence(number, capacity) for number in range(count)]
        self._clock = 0

    def acquire(self, prompt: Tokens, *, reuse: bool) -> Sequence:
        """A free sequence that holds as much of `prompt` as could be found, never all of it.

        The last token stays out: its logits are needed, and only computing it gives them.
        The caller makes sure that a sequence is free.
        """
        source, length = self._find_source(prompt)
        if not reuse:
            source, length = self._find_stale_copy(source, length, prompt), 0
        target = self._choose_target(source, length)
        if target is not source:
            self._drop(target)
            if source is not None:
                self._memory.share(source.number, target.number, length)
                target.append(source.tokens[:length])
        elif not self.truncate(target, length):
            self._drop(target)
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

    def evict(self) -> bool:
        """Drop the free sequence that was used longest ago; False when there is none."""
        idle = [s for s in self._sequences if not s.busy and s.length]
        if not idle:
            return False
        self._drop(min(idle, key=lambda s: s.last_used))
        return True

    def count_busy(self) -> int:
        return sum(s.busy for s in self._sequences)

    def count_tokens(self) -> int:
        """Tokens held, those shared by several sequences counted each time."""
        return sum(s.length for s in self._sequences)

    def _drop(self, sequence: Sequence) -> None:
        self._memory.cut(sequence.number, 0)
        sequence.length = 0

    def _find_source(self, prompt: Tokens) -> tuple[Sequence | None, int]:
        """The sequence with the longest usable beginning of `prompt`; free ones win a tie."""
        best: tuple[Sequence | None, int] = (None, 0)
        for sequence in sorted(self._sequences, key=lambda s: s.busy):
            length = min(sequence.measure_common(prompt), len(prompt) - 1)
            if length > best[1] and self._is_usable(sequence, length):
                best = (sequence, length)
        return best

    @staticmethod
    def _find_stale_copy(source: Sequence | None, length: int, prompt: Tokens) -> Sequence | None:
        """A free copy of the whole prompt, to be computed again in its own place.

        Where in memory a sequence lies shows in the last bits of its logits, so a request that
        is repeated cold should find the place it had before.
        """
        is_copy = source is not None and not source.busy and length == len(prompt) - 1
        return source if is_copy else None

    def _is_whole(self, sequence: Sequence, length: int) -> bool:
        """Whether all that attention looks back at from `length` on is in memory.

        A sliding window lets go of what has passed out of it, and a failed step may have pushed
        out what is needed again.
        """
        if not self._window or not length:
            return True
        return self._memory.first_position(sequence.number) <= max(0, length - self._window)

    def _is_usable(self, sequence: Sequence, length: int) -> bool:
        if not self._partial:
            return not sequence.busy and length == sequence.length
        if not sequence.busy and length == sequence.length:
            return True
        return self._memory.first_position(sequence.number) == 0

    def _choose_target(self, source: Sequence | None, length: int) -> Sequence:
        """`source` itself if nothing in it is lost, else an empty one, else the least recent."""
        if source is not None and not source.busy and length in (0, source.length):
            return source
        return min(
            (s for s in self._sequences if not s.busy),
            key=lambda s: (s.length > 0, s.last_used),
        )
