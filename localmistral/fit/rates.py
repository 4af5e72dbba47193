"""How fast devices are: the constants that speeds are predicted from, each with its source.

Bytes and operations per second that llama.cpp reaches, and what a layer costs whatever its size.
Knows no model and no placement.

Sources: the points of `speed.py`, and llama.cpp's own pull requests and issues where several
cards are compared: 7676 and 7860 (RTX 3090, 8B, by quant and ubatch), 21024 (RTX 3090 by Vulkan),
26284 and 20934 (RX 7900 XTX by ROCm and Vulkan), 27525 (M1 Max). The CPU's figures were measured
on one core of a server (Zen 5, AVX-512) with llama.cpp's own kernels, as CPU time of one thread.
"""

import re
from dataclasses import dataclass

from localmistral.fit.machine import Cpu, Gpu

BASE_SECONDS = 0.1e-3
"""Per token: choosing it among 131,072, building the batch, the embedding's row."""
HOP_SECONDS = 0.05e-3
"""Per change of device: a hidden state of some kilobytes and two synchronisations."""
RPC_HOP_SECONDS = 0.5e-3
"""The same over a network: a round trip of gigabit Ethernet."""
TENSOR_SYNC_SECONDS = 0.19e-3
"""Per layer with split mode tensor: two sums over all cards. From Mistral Medium 3.5 IQ4_XS on 4x
RTX 3080 20GB, 21.6 tokens/s: what is left of a token after a quarter of the bytes."""
RAM_SHARE = 0.6
"""Of nominal bandwidth, that weights in RAM are read with."""
RAM_EXPERTS_SECONDS = 0.2e-3
"""Per layer whose experts the CPU computes, beside their bytes: waking threads, handing over."""
CPU_LAYER_SECONDS = 0.1e-3
"""Per dense layer on the CPU: some twenty points where all threads wait for one another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendRates:
    """Shares of a card's nominal rates: of bandwidth when decoding, of the 16-bit matrix rate in
    prefill, there for products with weights and for attention over keys and values per head."""

    bandwidth: float
    matmul: float
    attention: float


_BACKENDS = {
    "cuda": BackendRates(bandwidth=0.85, matmul=0.75, attention=0.65),
    "rocm": BackendRates(bandwidth=0.6, matmul=0.4, attention=0.3),
    "vulkan": BackendRates(bandwidth=0.85, matmul=0.35, attention=0.3),
    "metal": BackendRates(bandwidth=0.65, matmul=0.65, attention=0.4),
}
_OTHER = BackendRates(bandwidth=0.6, matmul=0.3, attention=0.1)
"""SYCL, RPC and whatever comes: cautious."""

_MOE_LAYER = ((936e9, 0.15e-3), (1792e9, 0.055e-3))
"""(bandwidth, seconds): what a layer of Small 4 costs beside its bytes on an RTX 3090 and on an RTX
PRO 6000; many small kernels that the younger chip starts and ends faster. Between by bandwidth,
outside as at the nearer end: slow cards of young generations are a little faster than that."""
_DENSE_LAYER = ((936e9, 0.045e-3), (1792e9, 0.035e-3))
"""The same of a dense layer: RTX 3090 (8B Q4_0, 146.7 tokens/s), RTX 4090 (7B F16 and Q8_0), RTX
5090 (8B Q4_K_M, 221.7 tokens/s)."""

MATMUL_EXTRA_ROWS = 18
"""A product over n tokens takes as long as n + 18 would at full rate (RTX 3090, 8B, 16 to 512
tokens: within 6 %). For experts the n is the tokens that reach one expert."""
MATMUL_CEILING = 200e12
"""Operations per second that llama.cpp's matrix kernels were not seen to pass on any card."""
LATENT_ATTENTION_SHARE = 0.55
"""Of the rate of ordinary attention: heads of 320 and 256 values leave room for few rows at once.
From both prefill points of Small 4, at 4k and at 8k."""
LINK_SHARE = 0.85
"""Of a link's nominal rate: what copies of hundreds of megabytes reach."""
_FULL_RATE = re.compile(
    r"\bRTX (?:A\d|\d000\b|PRO\b)|\bAda\b|TITAN (?:RTX|V)|Tesla [TV]|"
    r"\b(?:[ABHL]|GH|GB)\d{1,4}[GS]?\b"
)
"""Names of NVIDIA's workstation and data centre cards. They sum 16-bit products in 32 bits at twice
the rate GeForce cards do, but the 8-bit products that llama.cpp makes of quantised weights run at
the same rate on both, so that half of their figure compares."""


def backend_rates(gpu: Gpu) -> BackendRates:
    return _BACKENDS.get(gpu.backend, _OTHER)


def read_rate(gpu: Gpu) -> float:
    """Bytes per second of weights and cache while decoding."""
    return gpu.bandwidth * backend_rates(gpu).bandwidth


def peak_flops(gpu: Gpu) -> float:
    """The matrix rate that shares are taken of, comparable across kinds of cards."""
    is_full = gpu.backend == "cuda" and _FULL_RATE.search(gpu.name)
    return gpu.flops / 2 if is_full else gpu.flops


def matmul_rate(gpu: Gpu) -> float:
    """Operations per second of products with weights, once enough tokens are there."""
    return min(MATMUL_CEILING, peak_flops(gpu) * backend_rates(gpu).matmul)


def attention_rate(gpu: Gpu, *, is_latent: bool) -> float:
    """Operations per second of attention over many tokens at once."""
    share = backend_rates(gpu).attention * (LATENT_ATTENTION_SHARE if is_latent else 1.0)
    return min(MATMUL_CEILING, peak_flops(gpu) * share)


def layer_seconds(gpu: Gpu, *, has_experts: bool) -> float:
    """What a layer costs per token on a card beside its bytes."""
    return _interpolate(_MOE_LAYER if has_experts else _DENSE_LAYER, gpu.bandwidth)


def _interpolate(points: tuple[tuple[float, float], ...], bandwidth: float) -> float:
    (low, first), (high, last) = points
    place = min(1.0, max(0.0, (bandwidth - low) / (high - low)))
    return first + place * (last - first)


CORE_ATTENTION_DECODE = (12e-9, 14.3e-12)
CORE_ATTENTION_PREFILL = (1.5e-9, 10.6e-12)
"""Seconds of the measured core for attention over an f16 cache, for one token and for many: per
head and filled token, and per operation (SmolLM2's heads of 64 and Small 4's of 320, at 2,048 and
4,096 filled tokens)."""
_CORE_RATES: dict[str, tuple[float, float]] = {
    "f32": (40e9, 80e9),
    "f16": (35e9, 200e9),
    "bf16": (37e9, 310e9),
    "q8_0": (29e9, 150e9),
    "q6_K": (28e9, 300e9),
    "q5_K": (21e9, 390e9),
    "q5_0": (18e9, 115e9),
    "q5_1": (18e9, 90e9),
    "q4_K": (24e9, 300e9),
    "q4_0": (24e9, 300e9),
    "q4_1": (17e9, 70e9),
    "iq4_nl": (23e9, 300e9),
    "iq4_xs": (16e9, 400e9),
    "mxfp4": (13e9, 100e9),
    "q3_K": (13e9, 310e9),
    "q2_K": (16e9, 190e9),
    "iq3_s": (5.1e9, 350e9),
    "iq3_xxs": (5.6e9, 310e9),
    "iq2_s": (5.5e9, 310e9),
    "iq2_xs": (5.6e9, 310e9),
    "iq2_xxs": (5.0e9, 350e9),
    "iq1_m": (4.9e9, 290e9),
    "iq1_s": (5.5e9, 290e9),
}
"""Per core and ggml type: bytes of weights per second for one token, and operations per second for
64 at once. The types below four bits are looked up in tables, which is what makes them slow."""
_OTHER_TYPE = (12e9, 100e9)
_INSTRUCTIONS = (
    ("avx512", 1.0),
    ("avx2", 0.6),
    ("avx", 0.25),
    ("sve", 0.7),
    ("neon", 0.6),
    ("asimd", 0.6),
)
"""Share of the measured core's speed by the best instruction set (first match counts): half the
vector width at a little higher clock, half of that again without integer products."""
_OTHER_INSTRUCTIONS = 0.6
_NO_INSTRUCTIONS = 0.1


def core_share(cpu: Cpu) -> float:
    """Speed of one of its cores against the one that was measured; AVX2 if nothing is known."""
    if not cpu.features:
        return _OTHER_INSTRUCTIONS
    known = [feature.lower() for feature in cpu.features]
    for prefix, share in _INSTRUCTIONS:
        if any(feature.startswith(prefix) for feature in known):
            return share
    return _NO_INSTRUCTIONS


def core_attention_seconds(cost: tuple[float, float], head_tokens: float, flops: float) -> float:
    """Seconds of the measured core for `flops` of attention, spread over heads x filled tokens."""
    return head_tokens * cost[0] + flops * cost[1]


def core_rates(kind: str) -> tuple[float, float]:
    """(bytes per second for one token, operations per second for many) of the measured core."""
    return _CORE_RATES.get(kind, _OTHER_TYPE)
