"""The placement search against trying everything, and against the budgets it must keep."""

from dataclasses import replace
from itertools import combinations, product

import pytest
from plan_samples import card, dense_shape, machine, small_4_shape

from localmistral.fit.choosing.covering import classify, cover
from localmistral.fit.choosing.pricing import Space, build_space
from localmistral.fit.choosing.search import Limits, find_placement, fits
from localmistral.fit.machine import GIB, Gpu, Machine
from localmistral.fit.memory import measure
from localmistral.fit.placement import Placement
from localmistral.fit.plan import Load
from localmistral.fit.speed import decode_seconds, measure_costs
from localmistral.models.shape import ModelShape


def sized(name: str, gib: float) -> Gpu:
    """A card of another size."""
    return replace(card(name), total_bytes=int(gib * GIB), free_bytes=int(gib * GIB))


def space_of(shape: ModelShape, where: Machine, *, mmproj_bytes: int = 0, **load: object) -> Space:
    values = Load(**{"cells": 8192, **load})  # type: ignore[arg-type]
    costs = measure_costs(shape, where, kv_type=values.kv_type, depth=4096)
    return build_space(shape, where, values, costs, mmproj_bytes)


def splits(count: int, cards: int) -> list[tuple[int, ...]]:
    """All ways to give `count` layers to `cards` cards in order."""
    if cards == 1:
        return [(count,)]
    return [(n, *rest) for n in range(count + 1) for rest in splits(count - n, cards - 1)]


def every_placement(space: Space) -> list[Placement]:
    """All placements there are: every split, and every set of experts in RAM."""
    layers, cards = space.layer_count, len(space.machine.gpus)
    found = []
    for total in range(layers + 2):
        first = layers + 1 - total
        movable = [n for n in range(first, layers) if space.expert_bytes[n]]
        sets = [chosen for n in range(len(movable) + 1) for chosen in combinations(movable, n)]
        for split, experts in product(splits(total, cards), sets):
            found.append(Placement(gpu_layers=total, tensor_split=split, cpu_expert_layers=experts))
    return found


def best_of_all(space: Space) -> float | None:
    """Seconds of the fastest placement that fits, whole layers in RAM only where they must be."""
    fitting = [one for one in every_placement(space) if fits(space, one)]
    if any(space.expert_bytes):
        full = space.layer_count + 1
        fitting = [one for one in fitting if one.gpu_layers == full] or fitting
    return min((decode_seconds(space.costs, one) for one in fitting), default=None)


MOE_MACHINES = [
    machine(sized("3090", 11), sized("3090", 11), ram=64),
    machine(sized("3090", 11), sized("3090", 11), ram=10),
    machine(sized("3090", 6), sized("3060", 9), ram=64),
    machine(sized("3060", 9), sized("5090", 5), ram=64, bandwidth=96e9),
    machine(sized("4090", 9), ram=64),
    machine(sized("4090", 4), ram=64),
    machine(sized("4090", 4), sized("2G", 4), ram=12),
    machine(sized("3090", 16), sized("3090", 2), ram=64),
    machine(sized("3090", 7), sized("3090", 7), ram=9.5),
    machine(sized("3090", 40), sized("2G", 40), ram=64),
]


@pytest.mark.parametrize("quant", ["UD-Q4_K_M", "UD-IQ3_S", "UD-IQ1_M"])
@pytest.mark.parametrize("where", MOE_MACHINES, ids=range(len(MOE_MACHINES)))
def test_a_mixture_of_experts_is_placed_within_two_percent_of_the_best(
    where: Machine, quant: str
) -> None:
    space = space_of(small_4_shape(quant, layers=7), where)
    compare_with_all(space)


def compare_with_all(space: Space) -> None:
    best, found = best_of_all(space), find_placement(space)
    if best is None:
        assert found is None
        return
    assert found is not None
    assert fits(space, found)
    assert decode_seconds(space.costs, found) <= 1.02 * best


DENSE_MACHINES = [
    machine(sized("3090", 4), sized("3090", 4), ram=64),
    machine(sized("3060", 3), sized("3090", 3.5), sized("5090", 3), ram=64),
    machine(sized("3090", 3), sized("2G", 2), ram=64),
    machine(sized("3090", 3), sized("2G", 2), ram=4),
    machine(sized("2G", 2), sized("5090", 2), ram=6),
    machine(sized("3090", 1.2), ram=64),
    machine(sized("3090", 1.2), ram=5),
]


@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
@pytest.mark.parametrize("where", DENSE_MACHINES, ids=range(len(DENSE_MACHINES)))
def test_a_dense_model_is_placed_within_two_percent_of_the_best(
    where: Machine, kv_type: str
) -> None:
    shape = dense_shape("ministral-3-3b", "Q4_K_M", layers=9)
    compare_with_all(space_of(shape, where, kv_type=kv_type, cells=65_536))


@pytest.mark.parametrize("layers", [3, 6])
@pytest.mark.parametrize("backend", ["cuda", "rocm", "vulkan", "rpc", "metal"])
def test_every_backend_keeps_the_budgets(backend: str, layers: int) -> None:
    cards = [replace(sized("3090", 7), backend=backend) for _ in range(3)]
    space = space_of(small_4_shape("UD-Q4_K_M", layers=layers), machine(*cards, ram=64))
    found = find_placement(space)
    assert found is not None
    assert fits(space, found)


def test_mixed_backends_are_within_two_percent_of_the_best() -> None:
    cards = (sized("3090", 6), replace(sized("3090", 6), backend="vulkan"), sized("3060", 6))
    compare_with_all(space_of(small_4_shape("UD-IQ3_S", layers=5), machine(*cards, ram=64)))


def test_the_image_encoder_has_its_room_on_the_first_card() -> None:
    where = machine(sized("3090", 10), sized("3090", 10), ram=64)
    shape = small_4_shape("UD-IQ3_S", layers=12)
    plain = find_placement(space_of(shape, where))
    beside = find_placement(space_of(shape, where, mmproj_bytes=4 * GIB))
    assert plain is not None and beside is not None
    assert fits(space_of(shape, where, mmproj_bytes=4 * GIB), beside)
    assert not fits(space_of(shape, where, mmproj_bytes=4 * GIB), plain)


def test_what_is_fixed_is_kept_and_the_rest_is_found() -> None:
    where = machine(sized("3090", 12), sized("3060", 12), ram=64)
    space = space_of(small_4_shape("UD-Q4_K_M", layers=12), where)
    for limits, kept in (
        (Limits(gpu_layers=8), lambda p: p.gpu_layers == 8),
        (Limits(gpu_layers=0), lambda p: p.gpu_layers == 0),
        (Limits(shares=(9.0, 4.0)), lambda p: p.tensor_split == (9, 4)),
        (Limits(shares=(3.0, 1.0), gpu_layers=8), lambda p: p.tensor_split == (6, 2)),
        (Limits(shares=(0.0, 1.0)), lambda p: p.tensor_split == (0, 13)),
        (Limits(cpu_expert_layers=tuple(range(12))), lambda p: len(p.cpu_expert_layers) == 12),
        (Limits(split_mode="none"), lambda p: len(p.used_cards) == 1),
    ):
        found = find_placement(space, limits)
        assert found is not None and kept(found), limits
        assert fits(space, found)
    without = find_placement(space, Limits(cpu_expert_layers=()))
    assert without is not None and without.cpu_expert_layers == () and without.gpu_layers < 13


def test_experts_go_to_ram_from_the_card_that_is_short() -> None:
    where = machine(sized("3090", 5), sized("3090", 24), ram=64)
    shape = small_4_shape("UD-Q4_K_M", layers=16)
    found = find_placement(space_of(shape, where), Limits(shares=(8.0, 9.0)))
    assert found is not None
    assert found.cpu_expert_layers
    assert max(found.cpu_expert_layers) < 8


def test_one_layer_in_ram_is_found_where_only_the_pipeline_s_buffers_are_too_large() -> None:
    shape = dense_shape("ministral-3-8b", "Q4_K_M")
    for gib in (3.6, 3.8, 4.0, 4.2):
        where = machine(sized("3090", gib), sized("3090", gib), ram=64)
        space = space_of(shape, where, cells=32_768)
        found = find_placement(space)
        assert found is not None
        memory = measure(shape, where, found, space.load)
        assert all(device.excess_bytes == 0 for device in memory)


@pytest.mark.parametrize("needed", range(1, 140, 3))
def test_the_cheapest_cover_is_found_for_two_classes(needed: int) -> None:
    sizes, counts = (23, 14), (4, 3)
    costs = tuple(10 + 3 * size for size in sizes)
    found = cover(sizes, costs, counts, needed)
    tried = [
        costs[0] * a + costs[1] * b
        for a, b in product(range(counts[0] + 1), range(counts[1] + 1))
        if sizes[0] * a + sizes[1] * b >= needed
    ]
    assert (found is None) == (not tried)
    if found is not None:
        assert sum(size * taken for size, taken in zip(sizes, found[1], strict=True)) >= needed
        assert found[0] == min(tried)


def test_classes_are_by_size_and_leave_out_layers_without_experts() -> None:
    found = classify((5, 0, 9, 5, 9))
    assert found.sizes == (9, 5)
    assert found.of_layer == (1, -1, 0, 1, 0)
