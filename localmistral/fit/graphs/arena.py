"""The compute buffer of one device, replayed: the same tensors put into the same free blocks.

llama.cpp sizes a compute buffer by walking through the graph once and giving every tensor the
smallest free block that holds it (ggml/src/ggml-alloc.c); how well freed blocks fit the tensors
that follow decides the size, which no formula of a few terms does. So the walk is repeated here,
over a `Tape` of the tensors that live on one device. When each tensor is made and given up doesn't
depend on sizes, so that is worked out once, as a `Program`, and run for every size of batch and
cache. Knows no model.
"""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

ALIGNMENT = 128
"""CUDA's; every large tensor is a multiple of it anyway."""
_ENDLESS = 1 << 62
_FIELD_BITS = 48
_FIELD = (1 << _FIELD_BITS) - 1
TOKENS = 1 << _FIELD_BITS
CELLS = 1 << 2 * _FIELD_BITS
"""Stand for the tokens of a batch and the cells of the cache on a tape. They, and their product,
are beyond any other factor, so that a size of `a + b * TOKENS + c * CELLS + d * TOKENS * CELLS` can
be told apart again."""


class _Arena:
    """Free blocks, as their starts and their lengths, by address; the last one has no end.

    `trace` is every comparison of sizes that decided anything, `peak` where in it the buffer
    was made as large as it is.
    """

    __slots__ = ("_lengths", "_starts", "peak", "size", "trace")

    def __init__(self) -> None:
        self._starts = [0]
        self._lengths = [_ENDLESS]
        self.size = 0
        self.peak = 0
        self.trace: list[int] = []

    def take(self, size: int) -> int:
        """The offset of the smallest sufficient block, of the last one where none is."""
        lengths = self._lengths
        best, least, sufficient = len(lengths) - 1, _ENDLESS // 2, 0
        for index, length in enumerate(lengths):
            if size <= length:
                sufficient |= 1 << index
                if length <= least:
                    best, least = index, length
        offset = self._starts[best]
        if lengths[best] == size:
            del self._starts[best], lengths[best]
            self.trace += (sufficient, ~best)
        else:
            self._starts[best] = offset + size
            lengths[best] -= size
            self.trace += (sufficient, best)
        if offset + size > self.size:
            self.size = offset + size
            self.peak = len(self.trace)
        return offset

    def give_back(self, offset: int, size: int) -> None:
        starts, lengths = self._starts, self._lengths
        index = bisect_left(starts, offset)
        if offset + size == starts[index]:
            starts[index] = offset
            lengths[index] += size
        else:
            starts.insert(index, offset)
            lengths.insert(index, size)
        if index and starts[index - 1] + lengths[index - 1] == offset:
            lengths[index - 1] += lengths[index]
            del starts[index], lengths[index]


class Step(NamedTuple):
    """`made` is the number of a tensor that takes memory, in place of the first of `parents` that
    has its size, or -1; `freed` are those that give theirs back then, if they still have any."""

    made: int
    parents: tuple[int, ...]
    freed: tuple[int, ...]


class Size(NamedTuple):
    """Bytes of a tensor: a fixed number, and more by token, by cell, and by token and cell; or all
    the bytes of one of the weights in RAM."""

    fixed: int
    by_token: int
    by_cell: int
    by_both: int
    weight: int = -1


def _read_size(written: int) -> Size:
    if written < 0:
        return Size(0, 0, 0, 0, -1 - written)
    fields = (written >> number * _FIELD_BITS & _FIELD for number in range(4))
    return Size(*fields)


class Walk(NamedTuple):
    """Bytes of the buffer, and all that was decided by size on the way."""

    size: int
    trace: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """What happens to the memory of a device, whatever the sizes. Tensor n is as large as
    `sizes[kinds[n]]`; `kept` are never given back, and held `copies` times."""

    sizes: tuple[Size, ...]
    kinds: tuple[int, ...]
    kept: tuple[int, ...]
    copies: int
    steps: tuple[Step, ...]

    def walk(self, tokens: int, cells: int, weights: tuple[int, ...]) -> "Walk":
        """Through all steps, with sizes for so many tokens and cells, and weights of so many
        bytes."""
        weights = (*weights, 0)  # the last one, for what is none
        both = tokens * cells
        padded = [
            -(-(size + a * tokens + b * cells + c * both + weights[weight]) // ALIGNMENT)
            * ALIGNMENT
            for size, a, b, c, weight in self.sizes
        ]
        sizes = [padded[kind] for kind in self.kinds]
        arena = _Arena()
        for number in self.kept:
            for _ in range(self.copies):
                arena.take(sizes[number])
        self._take_steps(arena, sizes)
        return Walk(arena.size, (arena.peak, *arena.trace))

    def _take_steps(self, arena: _Arena, sizes: list[int]) -> None:
        take, give_back = arena.take, arena.give_back
        offsets = [-1] * len(sizes)
        for made, parents, freed in self.steps:
            if made >= 0:
                size = sizes[made]
                for parent in parents:
                    if sizes[parent] == size:
                        offsets[made], offsets[parent] = offsets[parent], -1
                        arena.trace.append(parent)
                        break
                else:
                    offsets[made] = take(size)
            for number in freed:
                if offsets[number] >= 0:
                    give_back(offsets[number], sizes[number])


_UNIT = 32
"""Tokens whose floats fill whole units of ALIGNMENT."""


class Gauge:
    """Measures a program for many sizes of the cache, with few walks.

    Cells come in multiples of 256, so that every size is linear in them, padding included. Where
    two walks decide alike, each comparison holds at both ends, hence between them, and the buffer
    grows linearly. Where all sizes are proportional to the tokens, so is the buffer.
    """

    __slots__ = ("_is_proportional", "_program", "_walks")

    def __init__(self, program: Program) -> None:
        self._program = program
        self._is_proportional = all(
            not size.fixed
            and not size.by_cell
            and size.by_token * _UNIT % ALIGNMENT == 0
            and size.weight < 0
            for size in program.sizes
        )
        self._walks: dict[tuple[int, tuple[int, ...]], tuple[list[int], list[Walk]]] = {}

    def measure(self, tokens: int, cells: int, weights: tuple[int, ...] = ()) -> int:
        """Bytes of the buffer; `weights` are those of the weights in RAM that it has copies of."""
        if self._is_proportional and tokens % _UNIT == 0:
            return self._measure(_UNIT, cells, ()) * (tokens // _UNIT)
        return self._measure(tokens, cells, weights)

    def _measure(self, tokens: int, cells: int, weights: tuple[int, ...]) -> int:
        known, walks = self._walks.setdefault((tokens, weights), ([], []))
        index = bisect_left(known, cells)
        if index < len(known) and known[index] == cells:
            return walks[index].size
        if 0 < index < len(known) and walks[index - 1].trace == walks[index].trace:
            low, high = known[index - 1], known[index]
            growth = walks[index].size - walks[index - 1].size
            return walks[index - 1].size + growth * (cells - low) // (high - low)
        walk = self._program.walk(tokens, cells, weights)
        known.insert(index, cells)
        walks.insert(index, walk)
        return walk.size


class Tape:
    """The tensors of one device in the order of their making; numbers stand for tensors.

    The graph comes to a device in pieces ("splits"): all that a piece needs from elsewhere is
    copied before it starts. `copies` is how many times such inputs are held: 4 under pipeline
    parallelism, where they are never freed either. Sizes may be written with TOKENS and CELLS; -1
    is that of the first of the weights in RAM, -2 of the second, and so on.
    """

    __slots__ = ("_copies", "_inputs", "_kinds", "_nodes", "_roots", "_sizes")

    def __init__(self, *, copies: int = 1) -> None:
        self._copies = copies
        self._kinds: list[int] = []
        self._sizes: dict[int, int] = {}
        self._roots: list[int] = []
        self._inputs: list[list[_Node]] = [[]]
        self._nodes: list[list[_Node]] = [[]]

    def cut(self) -> None:
        """Begin a new piece."""
        self._inputs.append([])
        self._nodes.append([])

    def copy_in(self, size: int) -> int:
        """A tensor from elsewhere, copied before the piece that uses it; in order of first use."""
        number = self._add(size)
        self._inputs[-1].append((number, (), False))
        return number

    def make(self, size: int, *sources: int) -> int:
        """The result of an operation, in memory of its own."""
        number = self._add(size)
        self._nodes[-1].append((number, sources, False))
        return number

    def change(self, size: int, *sources: int) -> int:
        """The result of an operation that may overwrite a source of its size (no view of one)."""
        number = self._add(size)
        self._nodes[-1].append((number, sources, True))
        return number

    def view(self, source: int) -> int:
        """The same memory under another shape."""
        number = self._add(0)
        self._roots[number] = self._roots[source]
        self._nodes[-1].append((number, (source,), False))
        return number

    def use(self, *sources: int) -> None:
        """An operation whose result lies elsewhere: in the cache, or on another device."""
        self._nodes[-1].append((-1, sources, False))

    def _add(self, size: int) -> int:
        number = len(self._roots)
        self._roots.append(number)
        self._kinds.append(self._sizes.setdefault(size, len(self._sizes)))
        return number

    def compile(self) -> Program:
        """When which tensor takes memory and gives it back."""
        copied = [number for piece in self._inputs for number, _, _ in piece]
        kept = tuple(copied) if self._copies > 1 else ()
        pieces = zip(self._inputs, self._nodes, strict=True)
        nodes = [node for inputs, steps in pieces for node in (*inputs, *steps)]
        return Program(
            sizes=tuple(map(_read_size, self._sizes)),
            kinds=tuple(self._kinds),
            kept=kept,
            copies=self._copies,
            steps=tuple(_Uses(self._roots, nodes, kept).follow(nodes)),
        )

    def measure(self) -> int:
        """Bytes of the buffer that holds all of it, where sizes are plain numbers."""
        return self.compile().walk(0, 0, ()).size


_Node = tuple[int, tuple[int, ...], bool]
"""A step: what it makes (-1: elsewhere) of which sources, and whether in place of one of them."""


class _Uses:
    """Counts down the uses of tensors, and so finds the step after which each is free.

    `roots` are the tensors whose memory each one is: itself, unless it is a view.
    """

    def __init__(self, roots: list[int], nodes: list[_Node], kept: tuple[int, ...]) -> None:
        self._roots = roots
        self._kept = frozenset(kept)
        self._children = [0] * len(roots)
        self._views = [0] * len(roots)
        for number, root in enumerate(roots):
            self._views[root] += root != number
        for _, sources, _ in nodes:
            for source in sources:
                self._children[source] += 1

    def follow(self, nodes: list[_Node]) -> Iterator[Step]:
        """What each node does to memory, where it does anything."""
        for made, sources, may_overwrite in nodes:
            is_new = made >= 0 and self._roots[made] == made and made not in self._kept
            in_place = is_new and may_overwrite
            parents = tuple(filter(self._is_last_use, sources)) if in_place else ()
            freed = tuple(root for root in map(self._leave, sources) if root >= 0)
            if is_new or freed:
                yield Step(made if is_new else -1, parents, freed)

    def _is_last_use(self, number: int) -> bool:
        is_plain = self._children[number] == 1 and not self._views[number]
        return is_plain and self._roots[number] == number and number not in self._kept

    def _leave(self, number: int) -> int:
        """One use of a tensor is over; after the last one its memory is free: the number of the
        tensor whose memory that is, or -1."""
        children, views, root = self._children, self._views, self._roots[number]
        children[number] -= 1
        if children[number] or views[number]:
            return -1
        if root != number:
            views[root] -= 1
            if views[root] or children[root]:
                return -1
        return -1 if root in self._kept else root
