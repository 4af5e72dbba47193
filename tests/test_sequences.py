"""Which stored prefix is reused, and which gives way; on a memory that only remembers the calls."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from localmistral.engine.prefixes import State
from localmistral.engine.sequences import Sequence, SequenceCache


class FakeMemory:
    """Holds lengths as llama.cpp would; `partial` False as for a recurrent model. A state is as
    many bytes as it has tokens."""

    def __init__(self, *, partial: bool = True) -> None:
        self.partial = partial
        self.lengths: dict[int, int] = {}
        self.saves: list[int] = []
        self.restores: list[tuple[int, int]] = []
        self.is_broken = False

    def cut(self, sequence: int, position: int) -> bool:
        held = self.lengths.get(sequence, 0)
        if not self.partial and 0 < position < held:
            return False
        self.lengths[sequence] = min(held, position)
        return True

    def save(self, sequence: int, limit_bytes: int) -> State | None:
        length = self.lengths[sequence]
        if length > limit_bytes:
            return None
        self.saves.append(sequence)
        return np.zeros(length, np.uint8)

    def restore(self, sequence: int, state: State) -> bool:
        self.lengths[sequence] = 0 if self.is_broken else len(state)
        self.restores.append((sequence, len(state)))
        return not self.is_broken

    def first_position(self, sequence: int) -> int:
        return 0 if self.lengths.get(sequence, 0) else -1


class Caller:
    """Uses the cache as the scheduler does: acquire, compute the rest, release."""

    def __init__(self, count: int, *, partial: bool = True, stored: int = 10_000) -> None:
        self.memory = FakeMemory(partial=partial)
        self.cache = SequenceCache(self.memory, count, 1000, partial=partial, stored_bytes=stored)

    def begin(self, tokens: list[int], *, reuse: bool = True) -> tuple[Sequence, int]:
        prompt = np.asarray(tokens, np.int32)
        sequence = self.cache.acquire(prompt, reuse=reuse)
        cached = sequence.length
        assert list(sequence.tokens) == tokens[:cached]
        assert self.memory.lengths.get(sequence.number, 0) == cached
        sequence.append(prompt[cached:])
        self.memory.lengths[sequence.number] = len(tokens)
        return sequence, cached

    def run(self, tokens: list[int], *, reuse: bool = True) -> int:
        sequence, cached = self.begin(tokens, reuse=reuse)
        self.cache.release(sequence)
        return cached


def text(name: int, length: int = 100) -> list[int]:
    return [1] + [name] * (length - 1)


A, B, C = text(7), text(8), text(9)


def test_a_longer_prompt_continues_its_sequence_in_place() -> None:
    caller = Caller(3)
    caller.run(A)
    assert caller.run([*A, 5, 6]) == 100
    assert caller.memory.saves == []


def test_an_edited_end_is_replaced_in_place() -> None:
    caller = Caller(3)
    caller.run(A)
    assert caller.run([*A[:60], 5, 6]) == 60
    assert caller.memory.saves == []


def test_another_conversation_takes_an_empty_place_with_the_common_beginning() -> None:
    caller = Caller(3)
    caller.run(A)
    branch = [*A[:20], *B]
    assert caller.run(branch) == 20
    assert caller.memory.restores == [(1, 100)]
    assert caller.run(A) == 99
    assert caller.run(branch) == 119


def test_the_last_token_is_always_computed() -> None:
    caller = Caller(2)
    caller.run(A)
    assert caller.run(A) == 99
    assert caller.run(A[:60]) == 59


def test_a_running_sequence_is_copied_but_never_taken() -> None:
    caller = Caller(2)
    running, _ = caller.begin(A)
    other, cached = caller.begin([*A, 5])
    assert (cached, other.number) == (100, 1 - running.number)


def test_conversations_take_turns_in_one_place() -> None:
    caller = Caller(1)
    for prompt in (A, B, C):
        caller.run(prompt)
    for prompt in (A, B, C, A):
        assert caller.run(prompt) == 99
    assert caller.cache.stored_bytes == 300  # all three: the last one was never overwritten


def test_what_is_stored_longest_unused_gives_way() -> None:
    caller = Caller(1, stored=100)
    assert [caller.run(prompt) for prompt in (A, B, A, C, B)] == [0, 1, 99, 1, 1]
    assert caller.cache.stored_bytes == 100


def test_without_room_nothing_is_stored() -> None:
    caller = Caller(1, stored=99)
    for prompt in (A, B, A):
        assert caller.run(prompt) < 2
    assert caller.memory.saves == []


def test_what_grew_is_stored_once() -> None:
    caller = Caller(1)
    caller.run(A)
    caller.run(B)
    caller.run([*A, *C])
    caller.run(B)
    assert caller.cache.stored_bytes == 300  # B, and A with what followed


def test_a_copy_much_longer_than_what_it_gives_is_not_made() -> None:
    caller = Caller(2)
    caller.begin([*A[:10], *([3] * 190)])
    assert caller.begin([*A[:10], 5])[1] == 0
    assert caller.memory.restores == []


def test_a_state_that_can_not_be_restored_is_computed_again() -> None:
    caller = Caller(1)
    caller.run(A)
    caller.run(B)
    caller.memory.is_broken = True
    assert caller.run(A) == 0


def test_a_cold_request_reuses_nothing() -> None:
    caller = Caller(2)
    for _ in range(3):
        assert caller.run(A, reuse=False) == 0
    assert caller.memory.saves == []


def test_places_next_to_those_that_compute_are_taken_first() -> None:
    caller = Caller(8)
    for name in range(8):
        caller.run(text(name))
    first, _ = caller.begin([*text(5), 5])
    assert first.number == 5
    numbers = {caller.begin([2, name, name])[0].number for name in range(3)}
    assert max(numbers | {5}) - min(numbers | {5}) == 3


def test_a_long_common_beginning_is_worth_a_place_apart() -> None:
    caller = Caller(8)
    for name in range(8):
        caller.run(text(name))
    caller.begin([*text(0), 5])
    far, cached = caller.begin([*text(7), 5])
    assert (far.number, cached) == (7, 100)


def test_a_recurrent_memory_is_continued_whole_or_not_at_all() -> None:
    caller = Caller(3, partial=False)
    caller.run(A)
    assert caller.run([*A, 5]) == 100
    assert caller.run([*A, 6]) == 0
    assert caller.memory.saves == []


def test_a_recurrent_state_is_restored_whole() -> None:
    caller = Caller(1, partial=False)
    caller.run(A)
    caller.run(B)
    assert caller.run([*A, 5]) == 100
    assert caller.run([*B, 5]) == 100
    assert caller.run([*A[:60], 5]) == 0


def test_what_cannot_be_cut_is_dropped_whole() -> None:
    caller = Caller(1, partial=False)
    sequence, _ = caller.begin(A)
    assert not caller.cache.truncate(sequence, 2)
    assert sequence.length == caller.memory.lengths[0] == 0


@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=60), max_size=30),
    st.integers(1, 4),
    st.sampled_from([0, 100, 1000]),
)
def test_whatever_comes_only_true_prefixes_are_reused(
    prompts: list[list[int]], count: int, stored: int
) -> None:
    caller = Caller(count, stored=stored)
    for prompt in prompts:
        assert caller.run(prompt) < len(prompt)
        assert caller.cache.stored_bytes <= stored
    if prompts:
        assert caller.run(prompts[-1]) == len(prompts[-1]) - 1
