"""The best chain of segments: which card takes which run of layers.

Found card by card (dynamic programming over the next layer): a card is left out, or takes the next
layers, or the rest of them with the output. Exact for the prices it is given. Knows no budgets.
"""

from collections.abc import Sequence
from typing import NamedTuple

from localmistral.fit.compute import Role
from localmistral.fit.placement import count_layers
from localmistral.fit.pricing import Mode, Price, Pricer, Segment, Space


class Link(NamedTuple):
    """One more segment after `before`."""

    before: "Link | None"
    segment: Segment


class Chain(NamedTuple):
    """The best known way to a place: femtoseconds, fill of the fullest card, bytes of RAM."""

    cost: int
    fill: float
    ram: int
    link: Link | None

    def is_better_than(self, other: "Chain | None") -> bool:
        return other is None or (self.cost, self.fill) < (other.cost, other.fill)


def _cost_of_start(space: Space, mode: Mode, start: int) -> Chain:
    """The first `start` layers on the CPU."""
    ram = space.dense[start] + space.experts[start]
    hop = space.hop if start else 0
    cost = space.on_cpu[start] + hop + mode.ram_weight * ram
    return Chain(cost=cost, fill=0.0, ram=ram, link=None)


def best_chain(pricer: Pricer, starts: Sequence[int], *, is_single: bool) -> Chain | None:
    """Card by card: either it is left out, or it takes the next layers, or the rest of them."""
    space = pricer.space
    begun = {start: _cost_of_start(space, pricer.mode, start) for start in starts}
    running: dict[int, Chain] = {}
    best: Chain | None = None
    for card in range(len(space.machine.gpus)):
        extended = dict(running)
        for start, chain in begun.items():
            best = _finish(pricer, chain, card, "only", start, best)
            if not is_single:
                _extend(pricer, chain, card, "first", start, extended)
        for start, chain in running.items():
            best = _finish(pricer, chain, card, "last", start, best)
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
    hop = pricer.space.hop if chain.link is not None else 0
    for stop in range(start + 1, pricer.space.layer_count + 1):
        price = pricer.price(card, role, start, stop)
        if price is None:
            break  # a longer run needs more room still
        known, cost = found.get(stop), chain.cost + price.cost + hop
        if known is None or cost <= known.cost:
            longer = _join(chain, card, start, stop, price, cost)
            if longer.is_better_than(known):
                found[stop] = longer


def _append(
    pricer: Pricer, chain: Chain, card: int, role: Role, start: int, stop: int
) -> Chain | None:
    price = pricer.price(card, role, start, stop)
    if price is None:
        return None
    hop = pricer.space.hop if chain.link is not None else 0
    return _join(chain, card, start, stop, price, chain.cost + price.cost + hop)


def _join(chain: Chain, card: int, start: int, stop: int, price: Price, cost: int) -> Chain:
    return Chain(
        cost,
        max(chain.fill, price.fill),
        chain.ram + price.ram,
        Link(chain.link, Segment(card, start, stop, price.taken)),
    )


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
