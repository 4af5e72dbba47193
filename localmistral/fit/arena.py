"""The compute buffer of one device, replayed: the same tensors put into the same free blocks.

llama.cpp sizes a compute buffer by walking through the graph once and giving every tensor the
smallest free block that holds it (ggml/src/ggml-alloc.c); how well freed blocks fit the tensors
that follow decides the size, which no formula of a few terms does. So the walk is repeated here,
over a `Tape` of the tensors that live on one device. Knows no model.
"""

from dataclasses import dataclass, field
from itertools import chain

ALIGNMENT = 128
"""CUDA's; every large tensor is a multiple of it anyway."""
_ENDLESS = 1 << 62


class _Arena:
    """Free blocks as [offset, size], by address; the last one has no end."""

    def __init__(self) -> None:
        self._free = [[0, _ENDLESS]]
        self.size = 0

    def take(self, size: int) -> int:
        """The offset of the smallest sufficient block, of the last one where none is."""
        best = -1
        for index in range(len(self._free) - 1):
            available = self._free[index][1]
            if available >= size and (best < 0 or available <= self._free[best][1]):
                best = index
        block = self._free[best]
        offset = block[0]
        block[0] += size
        block[1] -= size
        if not block[1]:
            del self._free[best]
        self.size = max(self.size, offset + size)
        return offset

    def give_back(self, offset: int, size: int) -> None:
        index = 0
        while index < len(self._free) and self._free[index][0] < offset:
            index += 1
        self._free.insert(index, [offset, size])
        for left in (index, index - 1):
            if 0 <= left < len(self._free) - 1:
                block, following = self._free[left], self._free[left + 1]
                if block[0] + block[1] == following[0]:
                    block[1] += following[1]
                    del self._free[left + 1]


@dataclass(slots=True)
class _Tensor:
    """`root` is the tensor whose memory it is: itself, unless it is a view."""

    size: int
    root: int
    is_kept: bool
    children: int = 0
    views: int = 0
    offset: int = -1
    is_held: bool = False


@dataclass(frozen=True, slots=True)
class _Node:
    """A step: makes `result` (-1: elsewhere) of `sources`, in place of one of them if it may."""

    result: int
    sources: tuple[int, ...] = ()
    may_overwrite: bool = False


@dataclass(slots=True)
class Tape:
    """The tensors of one device in the order of their making; numbers stand for tensors.

    The graph comes to a device in pieces ("splits"): all that a piece needs from elsewhere is
    copied before it starts. `copies` is how many times such inputs are held: 4 under pipeline
    parallelism, where they are never freed either.
    """

    copies: int = 1
    _tensors: list[_Tensor] = field(default_factory=list)
    _inputs: list[list[_Node]] = field(default_factory=lambda: [[]])
    _nodes: list[list[_Node]] = field(default_factory=lambda: [[]])

    def cut(self) -> None:
        """Begin a new piece."""
        self._inputs.append([])
        self._nodes.append([])

    def copy_in(self, size: int) -> int:
        """A tensor from elsewhere, copied before the piece that uses it; in order of first use."""
        number = self._add(size, is_kept=self.copies > 1)
        self._inputs[-1].append(_Node(number))
        return number

    def make(self, size: int, *sources: int) -> int:
        """The result of an operation, in memory of its own."""
        return self._step(_Node(self._add(size), sources))

    def change(self, size: int, *sources: int) -> int:
        """The result of an operation that may overwrite a source of its size (no view of one)."""
        return self._step(_Node(self._add(size), sources, may_overwrite=True))

    def view(self, source: int) -> int:
        """The same memory under another shape."""
        return self._step(_Node(self._add(0, root=self._tensors[source].root), (source,)))

    def use(self, *sources: int) -> None:
        """An operation whose result lies elsewhere: in the cache, or on another device."""
        self._step(_Node(-1, sources))

    def _step(self, node: _Node) -> int:
        self._nodes[-1].append(node)
        return node.result

    def _add(self, size: int, *, root: int = -1, is_kept: bool = False) -> int:
        number = len(self._tensors)
        padded = -(-size // ALIGNMENT) * ALIGNMENT
        self._tensors.append(_Tensor(padded, number if root < 0 else root, is_kept))
        return number

    def measure(self) -> int:
        """Bytes of the buffer that holds all of it. A tape is measured once."""
        arena = _Arena()
        if self.copies > 1:
            for node in chain.from_iterable(self._inputs):
                tensor = self._tensors[node.result]
                offsets = [arena.take(tensor.size) for _ in range(self.copies)]
                tensor.offset = offsets[0]
        pieces = zip(self._inputs, self._nodes, strict=True)
        nodes = [node for inputs, steps in pieces for node in (*inputs, *steps)]
        self._count_uses(nodes)
        for node in nodes:
            self._place(arena, node)
            for source in node.sources:
                self._leave(arena, source)
        return arena.size

    def _count_uses(self, nodes: list[_Node]) -> None:
        for node in nodes:
            if node.result >= 0 and self._tensors[node.result].root != node.result:
                self._tensors[self._tensors[node.result].root].views += 1
            for source in node.sources:
                self._tensors[source].children += 1

    def _place(self, arena: _Arena, node: _Node) -> None:
        """Give the result of a step its memory, unless it has some or needs none."""
        if node.result < 0:
            return
        tensor = self._tensors[node.result]
        if tensor.root != node.result or tensor.offset >= 0:
            return
        tensor.is_held = True
        for source in node.sources if node.may_overwrite else ():
            parent = self._tensors[source]
            is_last_use = parent.children == 1 and not parent.views and not parent.is_kept
            if parent.is_held and is_last_use and parent.size == tensor.size:
                tensor.offset = parent.offset
                parent.is_held = False
                return
        tensor.offset = arena.take(tensor.size)

    def _leave(self, arena: _Arena, number: int) -> None:
        """One use of a tensor is over; after the last one its memory is free."""
        tensor = self._tensors[number]
        tensor.children -= 1
        if tensor.children or tensor.views:
            return
        root = self._tensors[tensor.root]
        if tensor.root != number:
            root.views -= 1
            if root.views or root.children:
                return
        if root.is_held and not root.is_kept:
            arena.give_back(root.offset, root.size)
            root.is_held = False
