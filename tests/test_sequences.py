"""Which stored prefix is reused, and which gives way; on a memory that only remembers the calls."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from localmistral.engine.sequences import Sequence, SequenceCache


class FakeMemory:
    """Holds lengths as llama.cpp would; `partial` False as for a recurrent model."""

    def __init__(self, *, partial: bool = True) -> None:
        self.partial = partial
        self.lengths: dict[int, int] = {}
        self.shares: list[tuple[int, int, int]] = []

    def cut(self, sequence: int, position: int) -> bool:
        held = self.lengths.get(sequence, 0)
        if not self.partial and 0 < position < held:
            return False
        self.lengths[sequence] = min(held, position)
        return True

    def share(self, source: int, target: int, length: int) -> None:
        assert self.lengths.get(target, 0) == 0
        assert self.lengths[source] >= length
        self.lengths[target] = length
        self.shares.append((source, target, length))

    def first_position(self, sequence: int) -> int:
        return 0 if self.lengths.get(sequence, 0) else -1


class Caller:
    """Uses the cache as the scheduler does: acquire, compute the rest, release."""

    def __init__(self, count: int, *, partial: bool = True) -> None:
        self.memory = FakeMemory(partial=partial)
        self.cache = SequenceCache(self.memory, count, 100, partial=partial)

    def begin(self, tokens: list[int], *, reuse: bool = True) -> tuple[Sequence, int]:
        prompt = np.asarray(tokens, np.int32)
        sequence = self.cache.acquire(prompt, reuse=reuse)
        cached = sequence.length
        assert list(sequence.tokens[:cached]) == tokens[:cached]
        assert self.memory.lengths.get(sequence.number, 0) == cached
        sequence.append(prompt[cached:])
        self.memory.lengths[sequence.number] = len(tokens)
        return sequence, cached

    def run(self, tokens: list[int], *, reuse: bool = True) -> int:
        sequence, cached = self.begin(tokens, reuse=reuse)
        self.cache.release(sequence)
        return cached


A, B, C = [1, 2, 3, 4], [1, 2, 9, 9], [7, 7, 7, 7]


def test_a_longer_prompt_continues_its_sequence_in_place() -> None:
    caller = Caller(3)
    caller.run(A)
    assert caller.run([*A, 5, 6]) == 4
    assert caller.memory.shares == []


def test_a_branch_shares_the_common_part_and_keeps_the_old_one() -> None:
    caller = Caller(3)
    caller.run(A)
    assert caller.run(B) == 2
    assert caller.memory.shares == [(0, 1, 2)]
    assert caller.run(A) == 3


def test_the_last_token_is_always_computed() -> None:
    caller = Caller(2)
    caller.run(A)
    assert caller.run(A) == 3
    assert caller.run(A[:2]) == 1


def test_a_running_sequence_is_shared_but_never_taken() -> None:
    caller = Caller(2)
    running, _ = caller.begin(A)
    other, cached = caller.begin([*A, 5])
    assert (cached, other.number) == (4, 1 - running.number)


def test_without_a_free_place_the_least_recently_used_gives_way() -> None:
    caller = Caller(2)
    for prompt in (A, C, A):
        caller.run(prompt)
    assert caller.run([8, 8]) == 0
    assert caller.run(A) == 3
    assert caller.run(C) == 0


def test_a_cold_request_shares_nothing_and_replaces_its_own_copy() -> None:
    caller = Caller(3)
    first, _ = caller.begin(A, reuse=False)
    caller.cache.release(first)
    again, cached = caller.begin(A, reuse=False)
    assert (again.number, cached) == (first.number, 0)


def test_evicting_drops_the_oldest_free_one() -> None:
    caller = Caller(3)
    caller.run(A)
    caller.run(C)
    assert caller.cache.evict()
    assert caller.memory.lengths[0] == 0
    assert caller.cache.evict()
    assert not caller.cache.evict()


def test_a_recurrent_memory_is_continued_whole_or_not_at_all() -> None:
    caller = Caller(3, partial=False)
    caller.run(A)
    assert caller.run([*A, 5]) == 4
    assert caller.run([*A, 6]) == 0
    assert caller.memory.shares == []


def test_what_cannot_be_cut_is_dropped_whole() -> None:
    caller = Caller(1, partial=False)
    sequence, _ = caller.begin(A)
    assert not caller.cache.truncate(sequence, 2)
    assert sequence.length == caller.memory.lengths[0] == 0


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), max_size=30))
def test_whatever_comes_only_true_prefixes_are_reused(prompts: list[list[int]]) -> None:
    caller = Caller(3)
    longest = 0
    for prompt in prompts:
        cached = caller.run(prompt)
        assert cached < len(prompt)
        longest = max(longest, cached)
    assert caller.cache.count_busy() == 0
    if len(prompts) >= 2 and prompts[-1] == prompts[-2]:
        assert caller.run(prompts[-1]) == len(prompts[-1]) - 1
