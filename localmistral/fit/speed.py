"""Tokens per second of a placement: what decoding one token costs on every device, summed.

Layers run one after another, so a token's time is the sum over layers of
(dense bytes + used / total of the routed experts' + cache of the filled context) / (share of
nominal bandwidth) + a fixed cost, and of the changes of device between them. With split mode
tensor the cards share the bytes of every layer, and meet twice in it.

Points held on to (tests/test_speed.py), measured against predicted in tokens per second of decode:

    RTX PRO 6000, Small 4 Q4_K_M, 4k filled                 186     190      +2 %
    2x RTX 3090, Small 4 UD-IQ3_XXS, q8_0 cache, 8k filled   92.9    91.6    -1 %
    RTX 4090, Llama 7B F16, nothing filled                   61.0    58.5    -4 %
    the same, Q8_0                                           98.1   101.4    +3 %
    RTX 3090, Llama 8B Q4_0                                 146.7   145.2    -1 %
    4x RTX 3080 20GB, Medium 3.5 IQ4_XS, layer               10.4     9.4   -10 %
    the same, split mode tensor                              21.6    21.2    -2 %
    gpt-oss-120b, all experts on a 14900K (weak source)      25      22.8    -9 %

Knows nothing of speculation, of several streams, and of AMD's and Intel's cards only what stands in
rates.py; `bench` corrects it for one machine.
"""

import itertools
from dataclasses import dataclass

from localmistral.fit.calibration import NO_CALIBRATION, Calibration
from localmistral.fit.machine import Cpu, Gpu, Machine
from localmistral.fit.placement import CPU, Placement
from localmistral.fit.plan import Load, Prediction
from localmistral.fit.prefill import prefill_tokens_per_second
from localmistral.fit.rates import (
    BASE_SECONDS,
    CORE_ATTENTION_DECODE,
    CPU_LAYER_SECONDS,
    HOP_SECONDS,
    RAM_EXPERTS_SECONDS,
    RAM_SHARE,
    RPC_HOP_SECONDS,
    TENSOR_SYNC_SECONDS,
    core_attention_seconds,
    core_share,
    layer_seconds,
    read_rate,
)
from localmistral.fit.work import (
    Attention,
    LayerWork,
    ModelWork,
    Work,
    cache_bytes,
    copied_bytes,
    measure_attention,
    sum_work,
)
from localmistral.models.shape import ModelShape

_COPYING_BACKENDS = ("cuda", "rocm")


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedCosts:
    """Seconds per token, additive; `[card][layer]` in the machine's and the model's order.

    `resident` is a layer wholly on a card, `experts_in_ram` one whose routed experts the CPU
    computes (the same where a layer has none), `on_cpu` one that is in RAM with its cache.
    `hop` is one change of device, `base` what every token costs. `fixed[card][layer]` is the part
    of `resident` that no bytes cause, which cards that share a layer all pay.
    """

    resident: tuple[tuple[float, ...], ...]
    experts_in_ram: tuple[tuple[float, ...], ...]
    on_cpu: tuple[float, ...]
    output: tuple[float, ...]
    output_on_cpu: float
    hop: float
    base: float
    fixed: tuple[tuple[float, ...], ...]


def measure_costs(
    shape: ModelShape,
    machine: Machine,
    *,
    kv_type: str,
    depth: int,
    calibration: Calibration = NO_CALIBRATION,
) -> SpeedCosts:
    """The costs of a model on a machine, for a token after `depth` filled ones."""
    work = sum_work(shape)
    cards = [_card_layers(shape, work, gpu, kv_type, depth) for gpu in machine.gpus]
    ram = [
        _ram_seconds(machine, layer.experts, work.expert_share) + RAM_EXPERTS_SECONDS
        if layer.experts.bytes
        else 0.0
        for layer in work.layers
    ]
    card, slow = calibration.card_decode, calibration.ram_decode
    on_cpu = [
        _cpu_layer(machine, layer, work.expert_share, measure_attention(shape, number, depth))
        for number, layer in enumerate(work.layers)
    ]
    rpc = any(gpu.backend == "rpc" for gpu in machine.gpus)
    return SpeedCosts(
        resident=tuple(_scale(layers.resident, card) for layers in cards),
        experts_in_ram=tuple(
            tuple(
                seconds * card + more * slow
                for seconds, more in zip(layers.without_experts, ram, strict=True)
            )
            for layers in cards
        ),
        on_cpu=_scale(on_cpu, slow),
        output=tuple(work.output.bytes / read_rate(gpu) * card for gpu in machine.gpus),
        output_on_cpu=_ram_seconds(machine, work.output, 1.0) * slow,
        hop=RPC_HOP_SECONDS if rpc else HOP_SECONDS,
        base=BASE_SECONDS,
        fixed=tuple(_scale(layers.fixed, card) for layers in cards),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _CardLayers:
    """Seconds by layer of one card."""

    resident: tuple[float, ...]
    without_experts: tuple[float, ...]
    fixed: tuple[float, ...]


def _card_layers(
    shape: ModelShape, work: ModelWork, gpu: Gpu, kv_type: str, depth: int
) -> _CardLayers:
    rate = read_rate(gpu)
    cache = cache_bytes(shape, kv_type, depth)
    copied = copied_bytes(shape, kv_type, depth) if gpu.backend in _COPYING_BACKENDS else 0
    plain = layer_seconds(gpu, has_experts=False)
    sparse = layer_seconds(gpu, has_experts=True)
    resident, without, fixed = [], [], []
    for layer, filled in zip(work.layers, cache, strict=True):
        if not layer.dense.bytes:  # doesn't run
            cost = seconds = 0.0
        else:
            cost = sparse if layer.experts.bytes else plain
            seconds = (layer.dense.bytes + filled + (copied if filled else 0)) / rate
        fixed.append(cost)
        resident.append(seconds + cost + layer.experts.bytes * work.expert_share / rate)
        without.append(seconds + min(cost, plain))
    return _CardLayers(resident=tuple(resident), without_experts=tuple(without), fixed=tuple(fixed))


def _ram_seconds(machine: Machine, work: Work, share: float) -> float:
    """Seconds for the CPU to pass `share` of some weights: its memory's or its cores', the longer.

    Types below four bits keep few cores from ever waiting for memory.
    """
    reading = work.bytes / (machine.ram.bandwidth * RAM_SHARE)
    return share * max(reading, work.core_s / _cores(machine.cpu))


def _cores(cpu: Cpu) -> float:
    """Its cores, counted in measured ones."""
    return max(1, cpu.cores) * core_share(cpu)


def _cpu_layer(machine: Machine, layer: LayerWork, share: float, attention: Attention) -> float:
    """Seconds of a layer on the CPU. Attention is bound by the cores: every head converts and
    multiplies the whole cache."""
    if not layer.dense.bytes:
        return 0.0
    core_s = core_attention_seconds(CORE_ATTENTION_DECODE, attention.head_tokens, attention.flops)
    dense = _ram_seconds(machine, layer.dense, 1.0) + core_s / _cores(machine.cpu)
    if not layer.experts.bytes:
        return dense + CPU_LAYER_SECONDS
    return dense + _ram_seconds(machine, layer.experts, share) + RAM_EXPERTS_SECONDS


def _scale(seconds: list[float] | tuple[float, ...], factor: float) -> tuple[float, ...]:
    return tuple(value * factor for value in seconds)


def decode_seconds(costs: SpeedCosts, placement: Placement) -> float:
    """Seconds per token: the sum of `costs` over a placement."""
    if placement.split_mode == "tensor" and len(placement.used_cards) > 1:
        return _tensor_seconds(costs, placement)
    devices = placement.layer_devices(len(costs.on_cpu))
    in_ram = frozenset(placement.cpu_expert_layers)
    seconds = costs.base
    for layer, device in enumerate(devices[:-1]):
        if device == CPU:
            seconds += costs.on_cpu[layer]
        else:
            table = costs.experts_in_ram if layer in in_ram else costs.resident
            seconds += table[device][layer]
    seconds += costs.output_on_cpu if devices[-1] == CPU else costs.output[devices[-1]]
    hops = sum(a != b for a, b in itertools.pairwise(devices))
    return seconds + costs.hop * hops


def _tensor_seconds(costs: SpeedCosts, placement: Placement) -> float:
    """Every card reads its share of each layer at once; the slowest is waited for."""
    total = sum(placement.tensor_split)
    first_on_card = len(costs.on_cpu) + 1 - placement.gpu_layers
    seconds = costs.base + sum(costs.on_cpu[: max(0, first_on_card)])
    seconds += costs.hop if first_on_card > 0 else 0.0
    for layer in range(max(0, first_on_card), len(costs.on_cpu)):
        seconds += TENSOR_SYNC_SECONDS + max(
            (costs.resident[card][layer] - costs.fixed[card][layer])
            * placement.tensor_split[card]
            / total
            + costs.fixed[card][layer]
            for card in placement.used_cards
        )
    return seconds + max(
        costs.output[card] * placement.tensor_split[card] / total for card in placement.used_cards
    )


def predict(
    shape: ModelShape,
    machine: Machine,
    placement: Placement,
    load: Load,
    *,
    depth: int,
    calibration: Calibration = NO_CALIBRATION,
) -> Prediction:
    """Both speeds of one stream at `depth` filled tokens: of writing the next token, and of reading
    a long prompt there."""
    costs = measure_costs(
        shape, machine, kv_type=load.kv_type, depth=depth, calibration=calibration
    )
    return Prediction(
        depth=depth,
        decode_tokens_per_second=1 / decode_seconds(costs, placement),
        prefill_tokens_per_second=prefill_tokens_per_second(
            shape, machine, placement, load, depth=depth, calibration=calibration
        ),
    )
