"""Compute buffers measured for many sizes at once are those of each size by itself."""

import random

import pytest

from localmistral.fit.graphs.arena import CELLS, TOKENS, Gauge, Program, Tape

CELL_COUNTS = range(32_768, 131_072, 2_048)


def _random_tape(seed: int, tokens: int, cells: int, *, is_proportional: bool = False) -> Tape:
    """A graph whose tensors grow with the batch, the cache, both or neither."""
    chance = random.Random(seed)
    tape = Tape(copies=chance.choice((1, 1, 4)))
    made = [tape.copy_in(4 * 4096 * tokens)]
    for _ in range(120):
        size = 4 * chance.randint(1, 6) * 1024 * tokens
        if not chance.randrange(16):  # few depend on the cache, as in real graphs
            sizes = (2 * tokens * cells, 2 * chance.randint(1, 9) * 64 * cells, 1 << 20)
            size = sizes[0] if is_proportional else chance.choice(sizes)
        sources = tuple(chance.choice(made[-6:]) for _ in range(chance.randint(1, 2)))
        step = chance.randrange(8)
        if step == 0:
            tape.cut()
            made.append(tape.copy_in(size))
        elif step == 1:
            made.append(tape.view(sources[0]))
        elif step == 2:
            tape.use(*sources)
        else:
            made.append((tape.make if step < 5 else tape.change)(size, *sources))
    return tape


def _program(seed: int, *, is_proportional: bool = False) -> Program:
    return _random_tape(seed, TOKENS, CELLS, is_proportional=is_proportional).compile()


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("tokens", [1, 7, 96, 512])
def test_sizes_by_token_and_cell_give_the_buffer_of_plain_sizes(seed: int, tokens: int) -> None:
    for cells in (256, 16_384, 100_096):
        plain = _random_tape(seed, tokens, cells).measure()
        assert _program(seed).walk(tokens, cells, ()).size == plain


@pytest.mark.parametrize("seed", range(12))
def test_a_gauge_gives_the_buffer_of_a_fresh_walk_in_whatever_order_it_is_asked(seed: int) -> None:
    program = _program(seed)
    gauge = Gauge(program)
    asked = [*CELL_COUNTS]
    random.Random(seed).shuffle(asked)
    for cells in (CELL_COUNTS[0], CELL_COUNTS[-1], *asked):
        assert gauge.measure(512, cells) == program.walk(512, cells, ()).size


def test_a_gauge_walks_less_often_than_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    walks = []
    walk = Program.walk

    def count(self: Program, tokens: int, cells: int, weights: tuple[int, ...]) -> object:
        walks.append(cells)
        return walk(self, tokens, cells, weights)

    monkeypatch.setattr(Program, "walk", count)
    for seed in range(12):
        gauge = Gauge(_program(seed))
        for cells in (CELL_COUNTS[0], CELL_COUNTS[-1], *CELL_COUNTS):
            gauge.measure(512, cells)
    assert len(walks) < 12 * len(CELL_COUNTS) * 3 / 4


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("tokens", [7, 32, 512, 2048])
def test_a_buffer_proportional_to_the_batch_is_measured_once(seed: int, tokens: int) -> None:
    program = _program(seed, is_proportional=True)
    gauge = Gauge(program)
    for cells in (256, 65_536):
        assert gauge.measure(tokens, cells) == program.walk(tokens, cells, ()).size


def test_weights_in_ram_count_with_their_own_bytes() -> None:
    def tape(first: int, second: int) -> Tape:
        tape = Tape()
        source = tape.make(1024, tape.copy_in(first))
        tape.cut()
        tape.make(4096, source, tape.copy_in(second))
        return tape

    gauge = Gauge(tape(-1, -2).compile())
    for first, second in ((1000, 5000), (9000, 1000), (4096, 4096)):
        assert gauge.measure(512, 256, (first, second)) == tape(first, second).measure()
