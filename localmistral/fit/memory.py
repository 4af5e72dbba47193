"""Bytes on each device of a machine: weights, cache, image encoder, compute buffers.

Puts together what the modules below it count, and is the last word on whether a plan fits.
Chooses nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from math import ceil

from localmistral.fit.graphs.compute import (
    MAX_LAYERS_FROM_RAM,
    OFFLOAD_BACKENDS,
    PIPELINE_COPIES,
    Piece,
    cache_copy_bytes,
    card_bytes,
    experts_in_ram_place,
    f16_cell_elements,
    gpu_compute_bytes,
    host_compute_bytes,
    is_pipelined,
)
from localmistral.fit.graphs.part import LAYERS_OF_A_KIND, Entry, Experts, Part
from localmistral.fit.kv import kv_bytes_per_layer
from localmistral.fit.machine import Gpu, Machine
from localmistral.fit.placement import CPU, Placement
from localmistral.fit.plan import DeviceMemory, Load
from localmistral.fit.weights import (
    input_bytes,
    output_bytes,
    sum_weights,
    weight_bytes_per_device,
)
from localmistral.models.shape import ModelShape

__all__ = [
    "OFFLOAD_BACKENDS",
    "cache_copy_bytes",
    "gpu_compute_bytes",
    "host_compute_bytes",
    "input_bytes",
    "is_pipelined",
    "kv_bytes_per_layer",
    "measure",
    "output_bytes",
]


def measure(
    shape: ModelShape,
    machine: Machine,
    placement: Placement,
    load: Load,
    *,
    mmproj_bytes: int = 0,
) -> tuple[DeviceMemory, ...]:
    """Bytes on every card in order (zeros for one left out), the CPU last.

    Weights mapped from the file count as RAM needed. `mmproj_bytes` are the image encoder's, which
    lies on the first card used. Split mode tensor divides every layer's weights and cache over the
    cards, by whole KV heads; its compute buffers were seen to be those of one card with everything,
    on each card.
    """
    weights = weight_bytes_per_device(shape, placement)
    kv = _kv_per_device(shape, placement, load)
    if placement.split_mode == "tensor":
        weights, kv = _spread(shape, placement, weights), _spread(shape, placement, kv)
    compute = _compute_per_device(shape, machine, placement, load)
    used = placement.used_cards
    encoder = used[0] if used else CPU
    budgets = [gpu.budget_bytes for gpu in machine.gpus] + [machine.ram.budget_bytes]
    names = [f"GPU {n} ({gpu.name})" for n, gpu in enumerate(machine.gpus)] + ["CPU"]
    devices = [*range(len(machine.gpus)), CPU]
    return tuple(
        DeviceMemory(
            name=name,
            budget_bytes=budget,
            weights_bytes=weights.get(device, 0),
            mmproj_bytes=mmproj_bytes if device == encoder else 0,
            kv_bytes=kv.get(device, 0),
            compute_bytes=compute.get(device, 0),
        )
        for device, name, budget in zip(devices, names, budgets, strict=True)
    )


def _kv_per_device(shape: ModelShape, placement: Placement, load: Load) -> dict[int, int]:
    devices = placement.layer_devices(shape.layer_count)
    found: dict[int, int] = {}
    sizes = kv_bytes_per_layer(shape, load.kv_type, load.cells)
    for device, size in zip(devices, sizes, strict=False):
        found[device] = found.get(device, 0) + size
    return found


def _spread(shape: ModelShape, placement: Placement, sizes: dict[int, int]) -> dict[int, int]:
    """What cards have in common, by their shares; a share is at least the KV heads it rounds to."""
    heads = min((count for count in shape.kv_head_counts if count), default=1)
    on_cards = sum(size for device, size in sizes.items() if device != CPU)
    spread = {CPU: sizes.get(CPU, 0)}
    for card in placement.used_cards:
        share = placement.tensor_split[card] / placement.gpu_layers
        spread[card] = ceil(on_cards * max(share, round(share * heads) / heads))
    return spread


def _compute_per_device(
    shape: ModelShape, machine: Machine, placement: Placement, load: Load
) -> dict[int, int]:
    layers = _Layers.of(shape, placement)
    pipelined = is_pipelined(shape, machine, placement)
    used = placement.used_cards
    offloads = bool(used) and machine.gpus[used[0]].backend in OFFLOAD_BACKENDS
    found = {
        CPU: host_compute_bytes(
            shape,
            load,
            is_pipelined=pipelined,
            gpu_count=len(used),
            is_whole=placement.is_whole(shape.layer_count),
            has_layers=layers.on_cpu > 0 and not offloads,
            has_experts=bool(layers.in_ram) and not offloads,
        )
    }
    copies = PIPELINE_COPIES if pipelined else 1
    for card in used:
        place = card if card in layers.used else layers.used[0]
        piece = _describe_piece(shape, machine.gpus[card], load, layers, place)
        piece = replace(piece, copies=copies)
        found[card] = max(card_bytes(shape, load, piece), _least_with_experts(shape, load, piece))
    return found


def _least_with_experts(shape: ModelShape, load: Load, piece: Piece) -> int:
    """At least what the piece takes if the CPU computes the experts in RAM, as it does for short
    batches, and beside that the largest tensor of them where this card copies them.

    The replay lets the copy share memory that nothing else needs at that moment; whether every
    backend gets to do so isn't known, and some percent are a small price for a safe bound.
    """
    largest = max((size for name, size in piece.weights if "exps" in name), default=0)
    experts: tuple[Experts, ...] = tuple(
        "here" if place == "here" else "host" for place in piece.part.experts
    )
    if not largest and experts == piece.part.experts:
        return 0
    if "host" in experts:
        experts = (*experts, "here")  # the worst order: which layers are in RAM shall not matter
    plain = replace(piece, part=replace(piece.part, experts=experts, has_guests=False), weights=())
    return card_bytes(shape, load, plain) + largest


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layers:
    """Where layers are: `devices` of each and of the output, `in_ram` those on cards whose experts
    are in RAM. Cards that work together on each layer count as the first of them."""

    devices: tuple[int, ...]
    used: tuple[int, ...]
    in_ram: frozenset[int]

    @classmethod
    def of(cls, shape: ModelShape, placement: Placement) -> "_Layers":
        devices, used = placement.layer_devices(shape.layer_count), placement.used_cards
        if placement.split_mode == "tensor":
            used = used[:1]
            devices = tuple(CPU if device == CPU else used[0] for device in devices)
        return cls(
            devices=devices,
            used=used,
            in_ram=frozenset(n for n in placement.cpu_expert_layers if devices[n] != CPU),
        )

    @property
    def on_cpu(self) -> int:
        return self.devices[:-1].count(CPU)


def _describe_piece(shape: ModelShape, gpu: Gpu, load: Load, layers: _Layers, card: int) -> Piece:
    """The part of the graph that a card runs."""
    is_first = card == layers.used[0]
    offloads = is_first and gpu.backend in OFFLOAD_BACKENDS
    from_ram = min(layers.on_cpu, MAX_LAYERS_FROM_RAM) if offloads else 0
    entry: Entry = "norm" if not is_first else "parts" if layers.on_cpu else "embedding"
    place = experts_in_ram_place(gpu.backend, is_first=is_first)
    own = [n for n, device in enumerate(layers.devices[:-1]) if device == card]
    has_experts = [bool(size) for size in sum_weights(shape).experts]
    ram = [n in layers.in_ram for n in own if has_experts[n]]
    part = Part(
        entry="embedding" if from_ram else entry,
        has_last_layer=layers.devices[-2] == card,
        has_output=layers.devices[-1] == card,
        dense=min(LAYERS_OF_A_KIND, len(own) - len(ram)),
        experts=_experts_pattern(ram, place),
        from_ram=from_ram,
        # the first card computes the experts in RAM of all cards
        has_guests=offloads and any(layers.devices[layer] != card for layer in layers.in_ram),
    )
    return Piece(
        part=part,
        f16_cell_elements=f16_cell_elements(shape, load, gpu.backend),
        weights=_weights_in_ram(shape, layers) if offloads else (),
    )


def _experts_pattern(ram: Sequence[bool], place: Experts) -> tuple[Experts, ...]:
    """Where the experts of a card's layers are computed, for the layers that decide the size: the
    last runs of layers alike, shortened. `ram` says whether a layer's experts are in RAM."""
    runs = [(in_ram, len(list(run))) for in_ram, run in groupby(ram)]
    here: Experts = "here"
    return tuple(
        place if in_ram else here
        for in_ram, count in runs[-_RUNS_OF_LAYERS:]
        for _ in range(min(LAYERS_OF_A_KIND, count))
    )


_RUNS_OF_LAYERS = 4


def _weights_in_ram(shape: ModelShape, layers: _Layers) -> tuple[tuple[str, int], ...]:
    """By name the largest tensors that the first card computes with though they are in RAM."""
    if not layers.in_ram and not layers.on_cpu:
        return ()
    largest: dict[str, int] = {}
    for layer, matrices in enumerate(sum_weights(shape).matrices):
        is_whole = layers.devices[layer] == CPU
        if is_whole or layer in layers.in_ram:
            for matrix in matrices:
                if is_whole or matrix.is_expert:
                    largest[matrix.name] = max(largest.get(matrix.name, 0), matrix.bytes)
    return tuple(sorted(largest.items()))
