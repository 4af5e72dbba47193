"""The fastest placement of one model and context on a machine that keeps every budget.

Layers run in order, so a placement is a chain of segments: some first layers on the CPU, then runs
of layers on cards in their order, the output on the last card used. The best chain is found card
by card (dynamic programming over the next layer), with exact sums; which experts go to RAM is
settled inside each segment. Cards that would only cost a hop are left out by the same sums.
Knows no quant, no context and no wishes but fixed values.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from localmistral.fit.choosing.bounds import least_spilled_seconds, needed_bytes, room_on_cards
from localmistral.fit.choosing.chains import Chain, best_chain, chain_by_shares, role_of
from localmistral.fit.choosing.covering import ExpertClasses, classify
from localmistral.fit.choosing.pricing import Mode, Pricer, Space, estimate_compute
from localmistral.fit.graphs.compute import Role
from localmistral.fit.memory import is_pipelined
from localmistral.fit.placement import Placement
from localmistral.fit.speed import decode_seconds

NO_CLASSES = ExpertClasses(sizes=(), of_layer=())
_RAM_WEIGHT_BITS = 30
"""Femtoseconds per byte, as a power of two, that make RAM dearer than any time: 1 s per MB."""
_MOST_ROUNDS = 4
"""How often a search is repeated with better known compute buffers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the user fixed of a placement; None is free. `gpu_layers` is 0 to layers + 1."""

    gpu_layers: int | None = None
    shares: tuple[float, ...] | None = None
    cpu_expert_layers: tuple[int, ...] | None = None
    split_mode: str | None = None


def find_placement(space: Space, limits: Limits = Limits()) -> Placement | None:
    """The fastest placement by `decode_seconds` within every budget of `measure`, or None.

    Layers of a mixture of experts go to the CPU as a whole only where keeping their experts there
    isn't enough: prompts would be read much more slowly.
    """
    if not space.machine.gpus or limits.gpu_layers == 0:
        return _keep_fitting(space, [_on_cpu(space, limits)])
    found = _keep_fitting(space, _whole(space, limits))
    if found is None or decode_seconds(space.costs, found) > least_spilled_seconds(space):
        spilled = _spilled(space, limits, starts=(0,))
        found = _keep_fitting(space, [*([found] if found else []), *spilled])
    has_experts = any(space.expert_bytes)
    if found is not None and has_experts:
        return found
    later = range(1, space.layer_count + 1)
    tries = [] if found is None else [found]
    tries += _spilled(space, limits, starts=tuple(later))
    if limits.gpu_layers is None and limits.shares is None:
        tries.append(_on_cpu(space, limits))
    return _keep_fitting(space, tries)


def _on_cpu(space: Space, limits: Limits) -> Placement:
    return Placement(
        gpu_layers=0,
        tensor_split=(0,) * len(space.machine.gpus),
        cpu_expert_layers=limits.cpu_expert_layers or (),
        split_mode="none",
    )


def _keep_fitting(space: Space, tries: Iterable[Placement]) -> Placement | None:
    """The fastest of the placements that fit, by the sums that have the last word."""
    fitting = [placement for placement in tries if fits(space, placement)]
    return min(fitting, key=lambda found: decode_seconds(space.costs, found), default=None)


def fits(space: Space, placement: Placement) -> bool:
    """Whether every device keeps its budget."""
    return not any(device.excess_bytes for device in space.measure(placement))


def _whole(space: Space, limits: Limits) -> list[Placement]:
    """Everything on cards, unless the user keeps experts in RAM."""
    is_too_much = needed_bytes(space) > sum(room_on_cards(space))
    if limits.cpu_expert_layers or is_too_much:
        return []
    mode = Mode(is_whole=True, is_pipelined=_can_pipeline(space), classes=NO_CLASSES)
    return _settle(space, limits, mode, (0,))


def _can_pipeline(space: Space) -> bool:
    """Whether any two of the cards would compute in a pipeline, which takes larger buffers."""
    cards, total = len(space.machine.gpus), space.layer_count + 1
    pairs = [(a, b) for a in range(cards) for b in range(a + 1, cards)]
    splits = (tuple({a: total - 1, b: 1}.get(n, 0) for n in range(cards)) for a, b in pairs)
    return any(
        is_pipelined(space.shape, space.machine, Placement(gpu_layers=total, tensor_split=split))
        for split in splits
    )


def _spilled(space: Space, limits: Limits, starts: Sequence[int]) -> list[Placement]:
    """With experts in RAM, and the first layers as `starts` allow."""
    forced = limits.cpu_expert_layers
    if tuple(starts) == (0,) and forced == ():
        return []  # nothing would be in RAM
    movable = classify(space.expert_bytes) if forced is None else NO_CLASSES
    mode = Mode(
        is_whole=False,
        is_pipelined=False,
        classes=movable,
        forced=None if forced is None else frozenset(forced),
    )
    return _settle(space, limits, mode, starts)


def _settle(space: Space, limits: Limits, mode: Mode, starts: Sequence[int]) -> list[Placement]:
    """Placements of a mode, each found with the compute buffers that the one before turned out to
    need; until they stay the same."""
    found: list[Placement] = []
    known: dict[tuple[int, Role], int] = {}
    for number in range(_MOST_ROUNDS):
        best = _search(space, limits, replace(mode, corrections=known), starts)
        if best is None:
            break
        found.append(best)
        learnt = _compare_buffers(space, mode, best)
        if number:  # estimates that go up and down must not do so for ever
            learnt = {key: max(size, known.get(key, size)) for key, size in learnt.items()}
        if all(known.get(key, 0) == size for key, size in learnt.items()):
            break
        known = {**known, **learnt}
    return found


def _compare_buffers(space: Space, mode: Mode, placement: Placement) -> dict[tuple[int, Role], int]:
    """Bytes by which the cards' compute buffers exceed their estimates."""
    memory, used = space.measure(placement), placement.used_cards
    found = {}
    for number, card in enumerate(used):
        role = role_of(number, len(used))
        exact = memory[card].compute_bytes
        found[space.twin[card], role] = exact - estimate_compute(space, mode, card, role)
    return found


def _without_pipeline(space: Space, placement: Placement, mode: Mode) -> Placement:
    """Without any layer or expert in RAM llama.cpp would build the pipeline's larger buffers after
    all: the experts that cost least are moved."""
    whole = placement.is_whole(space.layer_count)
    if not (whole and is_pipelined(space.shape, space.machine, placement) and mode.classes.sizes):
        return placement
    layer = mode.classes.of_layer.index(len(mode.classes.sizes) - 1)
    return replace(placement, cpu_expert_layers=(layer,))


def _search(space: Space, limits: Limits, mode: Mode, starts: Sequence[int]) -> Placement | None:
    """The fastest placement of a mode that keeps the RAM's budget too."""
    fastest = _best_placement(space, limits, mode, starts)
    if fastest is None or mode.is_whole or _keeps_ram(space, fastest):
        return fastest
    low, high, kept = 0, _RAM_WEIGHT_BITS + 1, None
    while low < high:  # the least weight that keeps the budget, if the greatest does
        middle = (low + high) // 2 if kept else _RAM_WEIGHT_BITS
        weighted = replace(mode, ram_weight=1 << middle)
        found = _best_placement(space, limits, weighted, starts)
        if found is not None and _keeps_ram(space, found):
            high, kept = middle, found
        elif kept is None:
            return None
        else:
            low = middle + 1
    return kept


def _keeps_ram(space: Space, placement: Placement) -> bool:
    return space.measure(placement)[-1].excess_bytes == 0


def _best_placement(
    space: Space, limits: Limits, mode: Mode, starts: Sequence[int]
) -> Placement | None:
    pricer = Pricer(space=space, mode=mode)
    if limits.gpu_layers is not None:
        start = space.layer_count + 1 - limits.gpu_layers
        starts = tuple(n for n in starts if n == start)
    if limits.shares is None:
        chain = best_chain(pricer, starts, is_single=limits.split_mode == "none")
    else:
        chain = chain_by_shares(pricer, starts, limits.shares)
    if chain is None:
        return None
    return _without_pipeline(space, _to_placement(space, mode, chain, limits), mode)


def _to_placement(space: Space, mode: Mode, chain: Chain, limits: Limits) -> Placement:
    counts = [0] * len(space.machine.gpus)
    in_ram: list[int] = []
    last, link = chain.card, chain
    while link.before is not None:
        counts[link.card] = link.stop - link.start + (link.card == last)
        in_ram += _choose_layers(mode.classes, link)
        link = link.before
    single = sum(1 for count in counts if count) == 1
    return Placement(
        gpu_layers=sum(counts),
        tensor_split=tuple(counts),
        cpu_expert_layers=tuple(sorted(in_ram))
        if limits.cpu_expert_layers is None
        else limits.cpu_expert_layers,
        split_mode=limits.split_mode or ("none" if single else "layer"),
    )


def _choose_layers(classes: ExpertClasses, link: Chain) -> Iterator[int]:
    """The first layers of each class in a chain's last segment, as many as are to go to RAM."""
    for number, taken in enumerate(link.taken):
        members = [n for n in range(link.start, link.stop) if classes.of_layer[n] == number]
        yield from members[:taken]
