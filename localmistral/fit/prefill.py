"""Tokens per second of reading a long prompt: operations over what the matrix units reach.

Per ubatch of n tokens a layer takes the sum of
- its products: 2 x elements x (n + 18) / rate, for experts those that a token passes and 18 more
  tokens for each expert that is touched (few tokens reach any one expert, which wastes the units);
- its attention over the filled context, per token 2 x heads x (key + value length) x depth;
- reading its weights once.
Cards that hold all layers between them work on different ubatches at the same time, so that the
slowest one sets the pace. Experts (and layers) in RAM are copied to the first card for every ubatch
of 32 tokens or more, as llama.cpp does it where the backend can; else the CPU computes them.

Points held on to, in tokens per second: RTX PRO 6000, Small 4 Q4_K_M, 4k: 3752 (predicted +3 %);
2x RTX 3090, Small 4 UD-IQ3_XXS, 8k: 2151 (-3 %); RTX 3090, Llama 8B Q6_K: 3491 (-4 %); RX 7900 XTX
by ROCm, Llama 8B Q4_K, nothing and 4k filled: 3200 and 2690 (0 %, +1 %). Q4_0, and GeForce cards
younger than that, are up to a third faster than said.
Knows nothing of the time to first token or of prefixes that are in memory.
"""

from dataclasses import dataclass

from localmistral.fit.calibration import Calibration
from localmistral.fit.machine import Gpu, Machine
from localmistral.fit.memory import is_pipelined
from localmistral.fit.placement import CPU, Placement
from localmistral.fit.plan import Load
from localmistral.fit.rates import (
    CORE_ATTENTION_PREFILL,
    HOP_SECONDS,
    LINK_SHARE,
    MATMUL_EXTRA_ROWS,
    attention_rate,
    core_attention_seconds,
    core_share,
    matmul_rate,
    read_rate,
)
from localmistral.fit.work import Attention, LayerWork, measure_attention, sum_work
from localmistral.models.shape import ModelShape

COPYING_BACKENDS = ("cuda", "rocm", "vulkan", "sycl", "metal")
"""Backends that take over products with weights in RAM when the batch is large (offload_op)."""
MIN_COPIED_TOKENS = 32
"""llama.cpp's GGML_OP_OFFLOAD_MIN_BATCH: smaller batches leave weights in RAM to the CPU."""
_STATE_BYTES = 4
"""Hidden states are passed on as 32-bit floats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ubatch:
    """What the parts of a layer have in common: n tokens, and what share of the experts n tokens
    touch and one token passes."""

    tokens: int
    is_latent: bool
    expert_share: float
    touched: float
    copies_to: Gpu | None
    cores: float


def prefill_tokens_per_second(
    shape: ModelShape,
    machine: Machine,
    placement: Placement,
    load: Load,
    *,
    depth: int,
    calibration: Calibration,
) -> float:
    """The pace at which a long prompt is read where `depth` tokens are filled already."""
    work = sum_work(shape)
    ubatch = _make_ubatch(shape, machine, placement, load)
    devices = placement.layer_devices(shape.layer_count)
    in_ram = frozenset(placement.cpu_expert_layers)
    seconds: dict[int, float] = dict.fromkeys(devices, 0.0)
    for number, layer in enumerate(work.layers):
        attention = measure_attention(shape, number, depth + ubatch.tokens // 2)
        device = devices[number]
        if device == CPU:
            more = _layer_in_ram(layer, ubatch, calibration, attention)
        else:
            gpu = machine.gpus[device]
            more = _layer_on_card(gpu, layer, ubatch, attention, number in in_ram)
            more *= calibration.card_prefill
            if number in in_ram:
                more += _experts_in_ram(layer, ubatch, calibration)
        seconds[device] += more
    return ubatch.tokens / _combine(shape, machine, placement, seconds, ubatch.tokens)


def _make_ubatch(shape: ModelShape, machine: Machine, placement: Placement, load: Load) -> _Ubatch:
    expert_share = sum_work(shape).expert_share
    tokens = max(1, min(load.ubatch, load.batch, load.cells))
    used = placement.used_cards
    first = machine.gpus[used[0]] if used else None
    can_copy = first is not None and first.backend in COPYING_BACKENDS
    return _Ubatch(
        tokens=tokens,
        is_latent=shape.has_latent_attention,
        expert_share=expert_share,
        touched=1 - (1 - expert_share) ** tokens,
        copies_to=first if can_copy and tokens >= MIN_COPIED_TOKENS else None,
        cores=max(1, machine.cpu.cores) * core_share(machine.cpu),
    )


def _combine(
    shape: ModelShape,
    machine: Machine,
    placement: Placement,
    seconds: dict[int, float],
    tokens: int,
) -> float:
    """Seconds per ubatch when the devices work one after another, at once, or on the same layer."""
    state_bytes = tokens * shape.embedding_length * _STATE_BYTES
    used = placement.used_cards
    links = [machine.gpus[card].link for card in used]
    if placement.split_mode == "tensor" and len(used) > 1:
        in_ram = seconds.get(CPU, 0.0)
        largest = max(placement.tensor_split) / sum(placement.tensor_split)
        sums = 2 * shape.layer_count * state_bytes / (min(links) * LINK_SHARE)
        return in_ram + (sum(seconds.values()) - in_ram) * largest + sums
    if is_pipelined(shape, machine, placement):
        return max(seconds.values())
    hops = len(seconds) - 1
    passing = hops * (HOP_SECONDS + state_bytes / (min(links) * LINK_SHARE)) if links else 0.0
    return sum(seconds.values()) + passing


def _layer_on_card(
    gpu: Gpu, layer: LayerWork, ubatch: _Ubatch, attention: Attention, without_experts: bool
) -> float:
    rate = attention_rate(gpu, is_latent=ubatch.is_latent)
    seconds = _dense_products(gpu, layer, ubatch) + ubatch.tokens * attention.flops / rate
    seconds += layer.dense.bytes / read_rate(gpu)
    if not without_experts:
        seconds += _expert_products(gpu, layer, ubatch)
        seconds += layer.experts.bytes * ubatch.touched / read_rate(gpu)
    return seconds


def _dense_products(gpu: Gpu, layer: LayerWork, ubatch: _Ubatch) -> float:
    return layer.dense.flops * (ubatch.tokens + MATMUL_EXTRA_ROWS) / matmul_rate(gpu)


def _expert_products(gpu: Gpu, layer: LayerWork, ubatch: _Ubatch) -> float:
    """A token passes `expert_share` of the products; each touched expert costs some rows more."""
    rows = ubatch.tokens * ubatch.expert_share + MATMUL_EXTRA_ROWS * ubatch.touched
    return layer.experts.flops * rows / matmul_rate(gpu)


def _experts_in_ram(layer: LayerWork, ubatch: _Ubatch, calibration: Calibration) -> float:
    gpu = ubatch.copies_to
    if gpu is not None:
        copied = layer.experts.bytes * ubatch.touched / (gpu.link * LINK_SHARE)
        return copied + _expert_products(gpu, layer, ubatch) * calibration.card_prefill
    rows = ubatch.tokens * ubatch.expert_share
    return layer.experts.core_batch_s * rows / ubatch.cores * calibration.ram_prefill


def _layer_in_ram(
    layer: LayerWork, ubatch: _Ubatch, calibration: Calibration, attention: Attention
) -> float:
    """A layer whose weights and cache are in RAM: the CPU has the attention to itself."""
    core_s = core_attention_seconds(CORE_ATTENTION_PREFILL, attention.head_tokens, attention.flops)
    seconds = ubatch.tokens * core_s / ubatch.cores * calibration.ram_prefill
    gpu = ubatch.copies_to
    if gpu is not None:
        products = _dense_products(gpu, layer, ubatch) * calibration.card_prefill
        return (
            seconds
            + layer.dense.bytes / (gpu.link * LINK_SHARE)
            + products
            + _experts_in_ram(layer, ubatch, calibration)
        )
    dense = layer.dense.core_batch_s * ubatch.tokens / ubatch.cores * calibration.ram_prefill
    return seconds + dense + _experts_in_ram(layer, ubatch, calibration)
