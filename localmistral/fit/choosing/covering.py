"""Which layers' experts go to RAM so that a card has room: few layers, and few bytes too many.

Moving a layer's experts costs a fixed time and a time by its bytes, so the cheapest set that frees
`needed` bytes is small both in number and in bytes. Layers with equal experts form one class;
files have a handful. Exact for one and two classes of experts, near it for more. Knows no cards.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import mul


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertClasses:
    """Classes of layers by their experts, the largest first.

    `sizes` are bytes; `of_layer` is the class of each layer, -1 for one without experts.
    """

    sizes: tuple[int, ...]
    of_layer: tuple[int, ...]


def classify(expert_bytes: Sequence[int]) -> ExpertClasses:
    """The classes of a model's layers."""
    sizes = sorted({size for size in expert_bytes if size}, reverse=True)
    rank = {size: number for number, size in enumerate(sizes)}
    return ExpertClasses(
        sizes=tuple(sizes), of_layer=tuple(rank.get(size, -1) for size in expert_bytes)
    )


def cover(
    sizes: tuple[int, ...], costs: Sequence[int], counts: tuple[int, ...], needed: int
) -> tuple[int, tuple[int, ...]] | None:
    """Cost and number of layers taken of each class to free `needed` bytes; None if all are less.

    `costs` is what moving one layer of a class costs, `counts` how many there are.
    """
    if needed <= 0:
        return 0, (0,) * len(sizes)
    if len(sizes) == 1:
        taken = -(-needed // sizes[0])
        return (taken * costs[0], (taken,)) if taken <= counts[0] else None
    fewest = _take_fewest(sizes, counts, needed, extra=0)
    if fewest is None:
        return None
    best = _price(costs, fewest)
    slack = _sum_products(sizes, best[1]) - needed
    if slack * _rate(sizes, costs) <= costs[-1] - sizes[-1] * _rate(sizes, costs):
        return best  # one layer more costs more than all the bytes it could spare
    more = _take_fewest(sizes, counts, needed, extra=1)
    return best if more is None else min(best, _price(costs, more))


def _rate(sizes: Sequence[int], costs: Sequence[int]) -> float:
    """Cost per byte, beside what a layer costs whatever its bytes."""
    return (costs[0] - costs[-1]) / (sizes[0] - sizes[-1])


def _price(costs: Sequence[int], taken: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    return _sum_products(costs, taken), taken


def _sum_products(values: Sequence[int], counts: Sequence[int]) -> int:
    return sum(map(mul, values, counts))


@lru_cache(maxsize=1 << 16)
def _take_fewest(
    sizes: tuple[int, ...], counts: tuple[int, ...], needed: int, *, extra: int
) -> tuple[int, ...] | None:
    """The fewest layers that free `needed` bytes, and `extra` more, as small ones as that allows;
    None if there aren't any. Kept, since runs of layers alike ask the same many times."""
    taken = _take_largest(sizes, counts, needed, extra=extra)
    return None if taken is None else _shrink(sizes, counts, taken, needed)


def _take_largest(
    sizes: Sequence[int], counts: Sequence[int], needed: int, *, extra: int
) -> list[int] | None:
    """The fewest layers that free `needed` bytes, and `extra` more; None if there aren't any."""
    taken = [0] * len(sizes)
    for number, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        taken[number] = min(count, -(-needed // size) if needed > 0 else 0)
        needed -= taken[number] * size
    if needed > 0:
        return None
    for number, count in enumerate(counts):
        more = min(extra, count - taken[number])
        taken[number] += more
        extra -= more
    return taken if extra == 0 else None


def _shrink(
    sizes: Sequence[int], counts: Sequence[int], taken: list[int], needed: int
) -> tuple[int, ...]:
    """The same number of layers, larger ones exchanged for smaller ones as far as that goes."""
    slack = _sum_products(sizes, taken) - needed
    for large in range(len(sizes) - 1):
        for small in range(len(sizes) - 1, large, -1):
            difference = sizes[large] - sizes[small]
            swaps = min(taken[large], counts[small] - taken[small], slack // difference)
            taken[large] -= swaps
            taken[small] += swaps
            slack -= swaps * difference
    return tuple(taken)
