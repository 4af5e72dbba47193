"""Split mode tensor: every matrix divided over all cards, so that they read it at the same time.

About twice as fast as whole layers on four equal cards (Mistral Medium 3.5 IQ4_XS on 4x RTX 3080
20GB: 10.4 tokens/s by layer, 21.6 by tensor), for dense models only. Chooses nothing: the search's
answer and this one are compared by their speed.
"""

from localmistral.fit.choosing.knobs import TENSOR_ARCHITECTURES
from localmistral.fit.choosing.pricing import Space
from localmistral.fit.choosing.search import Limits, fits
from localmistral.fit.machine import Machine
from localmistral.fit.placement import Placement, count_layers


def spread_over_cards(space: Space, limits: Limits) -> Placement | None:
    """All layers over all cards, evenly or by their room, if the mode is asked for, or safe; and
    if it fits."""
    if not may_spread(space, limits):
        return None
    total = space.layer_count + 1 if limits.gpu_layers is None else limits.gpu_layers
    for shares in _list_shares(space, limits):
        placement = Placement(
            gpu_layers=total, tensor_split=count_layers(shares, total), split_mode="tensor"
        )
        if fits(space, placement):
            return placement
    return None


def _list_shares(space: Space, limits: Limits) -> list[tuple[float, ...]]:
    """The shares to try: even ones are fastest, but the first card may hold an image encoder."""
    if limits.shares is not None:
        return [limits.shares]
    cards = len(space.budgets)
    room = list(space.budgets)
    room[0] -= space.mmproj_bytes
    by_room = tuple(float(size) for size in room)
    return [(1.0,) * cards, *([by_room] if min(room) > 0 else [])]


def may_spread(space: Space, limits: Limits) -> bool:
    """Whether the mode is asked for, or nothing speaks against it."""
    if limits.split_mode is not None:
        return limits.split_mode == "tensor"
    is_free = limits.gpu_layers is None and limits.shares is None and not limits.cpu_expert_layers
    is_dense = not any(space.expert_bytes)
    is_known = space.shape.architecture in TENSOR_ARCHITECTURES
    return is_free and is_dense and is_known and _are_equal_peers(space.machine)


def _are_equal_peers(machine: Machine) -> bool:
    """Cards of unequal speed wait for the slowest; without peer access they copy through RAM."""
    kinds = {(gpu.backend, gpu.bandwidth, gpu.flops) for gpu in machine.gpus}
    return machine.has_peer_access and len(machine.gpus) > 1 and len(kinds) == 1
