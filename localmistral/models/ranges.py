"""A set of byte positions, kept as sorted, disjoint ranges. Knows nothing of files."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator

Range = tuple[int, int]  # [start, end)


class Ranges:
    """Which bytes of a file are there; grows by `add`."""

    def __init__(self, ranges: Iterable[Range] = ()) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        for start, end in ranges:
            self.add(start, end)

    def __iter__(self) -> Iterator[Range]:
        return iter(tuple(zip(self._starts, self._ends, strict=True)))

    def add(self, start: int, end: int) -> None:
        """Put [start, end) in, joining what it touches."""
        first = bisect_left(self._ends, start)
        last = bisect_right(self._starts, end)
        if first < last:
            start, end = min(start, self._starts[first]), max(end, self._ends[last - 1])
        self._starts[first:last], self._ends[first:last] = [start], [end]

    def holds(self, start: int, end: int) -> bool:
        """Whether all of [start, end) is in."""
        at = bisect_right(self._starts, start) - 1
        return at >= 0 and end <= self._ends[at]

    @property
    def bytes(self) -> int:
        """How many bytes are in."""
        return sum(self._ends) - sum(self._starts)

    @property
    def frontier(self) -> int:
        """Up to where everything from byte 0 on is in."""
        return self._ends[0] if self._starts and self._starts[0] == 0 else 0

    def gaps(self, size: int) -> tuple[Range, ...]:
        """What of [0, size) is not in."""
        edges = [0, *(edge for pair in self for edge in pair), size]
        pairs = zip(edges[::2], edges[1::2], strict=True)
        return tuple((start, end) for start, end in pairs if start < end)
