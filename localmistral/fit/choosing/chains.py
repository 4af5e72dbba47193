"""The best chain of segments: which card takes which run of layers.

Found card by card (dynamic programming over the next layer): a card is left out, or takes the next
layers, or the rest of them with the output. Exact for the prices it is given. Knows no budgets.
"""

from collections.abc import Sequence
from typing import NamedTuple

from localmistral.fit.choosing.pricing import Mode, Pricer, Space
from localmistral.fit.graphs.compute import Role
from localmistral.fit.placement import count_layers


class Chain(NamedTuple):
    """The best known way to a place: femtoseconds, fill of the fullest card, and the last segment:
    layers [start, stop) on `card`, with `taken` layers of each class of experts in RAM. `before` is
    the chain before it, None where all layers so far are on the CPU, and no card has any."""

    cost: int
    fill: float
    before: "Chain | None" = None
    card: int = -1
    start: int = 0
    stop: int = 0
    taken: tuple[int, ...] = ()

    def is_better_than(self, other: "Chain | None") -> bool:
        return other is None or (self.cost, self.fill) < (other.cost, other.fill)


def _cost_of_start(space: Space, mode: Mode, start: int) -> Chain:
    """The first `start` layers on the CPU."""
    ram = space.dense[start] + space.experts[start]
    hop = space.hop if start else 0
    cost = space.on_cpu[start] + hop + mode.ram_weight * ram
    return Chain(cost=cost, fill=0.0)


def best_chain(pricer: Pricer, starts: Sequence[int], *, is_single: bool) -> Chain | None:
    """Card by card: either it is left out, or it takes the next layers, or the rest of them."""
    space = pricer.space
    begun = {start: _cost_of_start(space, pricer.mode, start) for start in starts}
    running: dict[int, Chain] = {}
    best: Chain | None = None
    final = len(space.machine.gpus) - 1
    for card in range(final + 1):
        extended = dict(running)
        goes_on = card < final and not is_single
        for start, chain in begun.items():
            best = _finish(pricer, chain, card, "only", start, best)
            if goes_on:
                _extend(pricer, chain, card, "first", start, extended)
        for start, chain in running.items():
            best = _finish(pricer, chain, card, "last", start, best)
            if goes_on:
                _extend(pricer, chain, card, "middle", start, extended)
        running = extended
    return best


def _finish(
    pricer: Pricer, chain: Chain, card: int, role: Role, start: int, best: Chain | None
) -> Chain | None:
    """The rest of the layers and the output on one card."""
    ended = _append(pricer, chain, card, role, start, pricer.space.layer_count)
    return ended if ended is not None and ended.is_better_than(best) else best


def _extend(
    pricer: Pricer, chain: Chain, card: int, role: Role, start: int, found: dict[int, Chain]
) -> None:
    """Every run of layers from `start` on that fits the card."""
    cost_before, fill_before = chain.cost + _cost_of_hop(pricer.space, chain), chain.fill
    for stop, price in enumerate(pricer.row(card, role, start), start + 1):
        cost, fill = cost_before + price.cost, max(fill_before, price.fill)
        known = found.get(stop)
        if known is None or cost < known.cost or (cost == known.cost and fill < known.fill):
            found[stop] = Chain(cost, fill, chain, card, start, stop, price.taken)


def _cost_of_hop(space: Space, chain: Chain) -> int:
    """Of going on to another card; the first one's is among the costs of the start."""
    return space.hop if chain.before is not None else 0


def _append(
    pricer: Pricer, chain: Chain, card: int, role: Role, start: int, stop: int
) -> Chain | None:
    price = pricer.price(card, role, start, stop)
    if price is None:
        return None
    cost = chain.cost + price.cost + _cost_of_hop(pricer.space, chain)
    return Chain(cost, max(chain.fill, price.fill), chain, card, start, stop, price.taken)


def chain_by_shares(
    pricer: Pricer, starts: Sequence[int], shares: tuple[float, ...]
) -> Chain | None:
    """The best number of first layers on the CPU where the cards' shares of the rest are fixed."""
    best: Chain | None = None
    for start in starts:
        chain: Chain | None = _cost_of_start(pricer.space, pricer.mode, start)
        counts = count_layers(shares, pricer.space.layer_count + 1 - start)
        used = [card for card, count in enumerate(counts) if count]
        for number, card in enumerate(used):
            is_last = number == len(used) - 1
            stop = start + counts[card] - is_last
            role = role_of(number, len(used))
            chain = chain and _append(pricer, chain, card, role, start, stop)
            start = stop
        if chain is not None and chain.is_better_than(best):
            best = chain
    return best


def role_of(number: int, count: int) -> Role:
    if count == 1:
        return "only"
    if number == 0:
        return "first"
    return "last" if number == count - 1 else "middle"
