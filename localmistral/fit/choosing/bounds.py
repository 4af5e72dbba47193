"""What no placement can be better than: cheap sums that spare most searches.

Every bound is on the safe side: what it rules out can't fit or can't be as fast. Searches nothing.
"""

from localmistral.fit.choosing.pricing import Space
from localmistral.fit.graphs.compute import Role, gpu_compute_bytes
from localmistral.fit.memory import OFFLOAD_BACKENDS


def needed_bytes(space: Space) -> int:
    """Weights, cache and image encoder; without compute buffers, and the embedding in RAM."""
    layers = space.dense[-1] + space.experts[-1]
    return layers + space.output_bytes + space.mmproj_bytes


def room_on_cards(space: Space) -> list[int]:
    """What each card can hold beside the least compute buffers: a card's that has all of it, or a
    middle one's that has layers only."""
    least = {
        backend: min(
            _compute_bytes(space, backend, "only"), _compute_bytes(space, backend, "middle")
        )
        for backend in {gpu.backend for gpu in space.machine.gpus}
    }
    cards = zip(space.budgets, space.machine.gpus, strict=True)
    return [max(0, budget - least[gpu.backend]) for budget, gpu in cards]


def _compute_bytes(space: Space, backend: str, role: Role) -> int:
    return gpu_compute_bytes(
        space.shape, space.load, role=role, is_pipelined=False, is_whole=True, backend=backend
    )


def could_fit(space: Space) -> bool:
    """Whether all bytes together are within all budgets together."""
    room = sum(room_on_cards(space)) + space.machine.ram.budget_bytes
    return needed_bytes(space) <= room


def least_seconds(space: Space) -> float:
    """Below every placement's seconds: each layer on the card that is fastest for it, and what is
    too much for all cards at the cheapest rate per byte, and in whole layers, in RAM."""
    costs, cards = space.costs, space.machine.gpus
    if not cards:
        return costs.base + sum(costs.on_cpu) + costs.output_on_cpu
    layers = range(space.layer_count)
    best = [min(row[n] for row in costs.resident) for n in layers]
    excess = needed_bytes(space) - sum(room_on_cards(space))
    if excess <= 0:
        return costs.base + sum(best)
    if all(gpu.backend in OFFLOAD_BACKENDS for gpu in cards):
        excess += min((size for size in space.largest_experts if size), default=0)
    extra = [
        max(0.0, min(costs.on_cpu[n], *(row[n] for row in costs.experts_in_ram)) - best[n])
        for n in layers
    ]
    # a layer in RAM as a whole frees more than its experts alone
    sizes = [space.dense[n + 1] - space.dense[n] + space.expert_bytes[n] for n in layers]
    rate = min(more / max(1, size) for more, size in zip(extra, sizes, strict=True))
    whole_layers = -(-excess // max(sizes)) * min(extra)
    return costs.base + sum(best) + max(excess * rate, whole_layers)


def least_spilled_seconds(space: Space) -> float:
    """Below the seconds of every placement with a layer, or a layer's experts, in RAM."""
    costs, layers = space.costs, range(space.layer_count)
    best = [min(row[n] for row in costs.resident) for n in layers]
    with_experts = [n for n in layers if space.expert_bytes[n]] or layers
    extra = min(
        min(costs.on_cpu[n], *(row[n] for row in costs.experts_in_ram if space.expert_bytes[n]))
        - best[n]
        if space.expert_bytes[n]
        else costs.on_cpu[n] - best[n]
        for n in with_experts
    )
    return costs.base + sum(best) + min(costs.output) + extra
