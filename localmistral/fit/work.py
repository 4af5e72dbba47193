"""What one token asks of a layer: bytes to read, products to make, attention over what is filled.

Sums over a model's tensors, by layer and kind; knows no device. Layers for predicting several
tokens at once (MTP) don't run and ask for nothing.
"""

from collections import defaultdict
from dataclasses import dataclass

from localmistral.fit.kv import kv_bytes_per_layer
from localmistral.fit.rates import core_rates
from localmistral.fit.weights import once_per_shape
from localmistral.models.shape import ModelShape, Tensor, TensorRole

F16_BYTES = 2


@dataclass(slots=True)
class _Sums:
    """Of some tensors: bytes, elements, and one measured CPU core's seconds for one token and per
    token of many."""

    bytes: int = 0
    elements: int = 0
    core_s: float = 0.0
    core_batch_s: float = 0.0

    def add(self, tensor: Tensor) -> None:
        byte_rate, operation_rate = core_rates(tensor.type)
        self.bytes += tensor.bytes
        self.elements += tensor.elements
        self.core_s += tensor.bytes / byte_rate
        if len(tensor.dims) > 1:
            self.core_batch_s += 2 * tensor.elements / operation_rate


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Of a group of tensors that every token passes: bytes, operations, and seconds of one core
    of the measured kind, for a token alone (`core_s`) and per token of many (`core_batch_s`)."""

    bytes: int
    flops: float
    core_s: float
    core_batch_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWork:
    """`experts` counts all of them; a token passes `expert_share` of it."""

    dense: Work
    experts: Work


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelWork:
    """`expert_share` is used / total, 0 without experts."""

    layers: tuple[LayerWork, ...]
    output: Work
    expert_share: float


@once_per_shape
def sum_work(shape: ModelShape) -> ModelWork:
    """The work of a model, by layer."""
    dense: dict[int, _Sums] = defaultdict(_Sums)
    experts: dict[int, _Sums] = defaultdict(_Sums)
    output = _Sums()
    for tensor in shape.tensors:
        if tensor.role is TensorRole.EXPERT and tensor.layer is not None:
            experts[tensor.layer].add(tensor)
        elif tensor.role is TensorRole.DENSE and tensor.layer is not None:
            dense[tensor.layer].add(tensor)
        elif tensor.role is TensorRole.OUTPUT or _is_tied(shape, tensor):
            output.add(tensor)
    running = shape.layer_count - shape.nextn_layer_count
    layers = (
        LayerWork(dense=_freeze(dense, n, running), experts=_freeze(experts, n, running))
        for n in range(shape.layer_count)
    )
    share = shape.expert_used_count / shape.expert_count if shape.expert_count else 0.0
    return ModelWork(
        layers=tuple(layers), output=_freeze({0: output}, 0, 1), expert_share=min(1.0, share)
    )


def _is_tied(shape: ModelShape, tensor: Tensor) -> bool:
    return shape.has_tied_embeddings and tensor.name == "token_embd.weight"


def _freeze(sums: dict[int, _Sums], layer: int, running: int) -> Work:
    found = sums.get(layer) if layer < running else None
    found = found or _Sums()
    return Work(
        bytes=found.bytes,
        flops=2.0 * found.elements,
        core_s=found.core_s,
        core_batch_s=found.core_batch_s,
    )


def slides(shape: ModelShape, layer: int) -> bool:
    """Whether a layer looks back over its window only. `sliding_window_period` is after how many
    layers one looks at everything."""
    if not shape.sliding_window:
        return False
    if shape.sliding_window_layers:
        return shape.sliding_window_layers[layer]
    period = shape.sliding_window_period
    return period > 1 and (layer + 1) % period != 0


def seen_tokens(shape: ModelShape, layer: int, depth: int) -> int:
    """Tokens that a layer attends to when `depth` are there."""
    return min(depth, shape.sliding_window) if slides(shape, layer) else depth


def cache_bytes(shape: ModelShape, kv_type: str, depth: int) -> tuple[int, ...]:
    """Bytes of cache read per token, by layer."""
    full = kv_bytes_per_layer(shape, kv_type, depth)
    if not shape.sliding_window or depth <= shape.sliding_window:
        return full
    window = kv_bytes_per_layer(shape, kv_type, shape.sliding_window)
    return tuple(
        w if slides(shape, n) else f for n, (f, w) in enumerate(zip(full, window, strict=True))
    )


def copied_bytes(shape: ModelShape, kv_type: str, depth: int) -> int:
    """Traffic per token and layer that a quantised latent cache (MLA) adds on CUDA and ROCm: its
    kernels for heads of 320 take f16 alone, so every step writes a copy and reads it."""
    if kv_type in ("f16", "bf16", "f32") or not shape.has_latent_attention:
        return 0
    return 2 * F16_BYTES * shape.key_length * depth


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """One token's attention in one layer: heads x filled tokens, and operations."""

    head_tokens: float
    flops: float


def measure_attention(shape: ModelShape, layer: int, depth: int) -> Attention:
    """A product with each key and one with each value, per head. Latent attention works on its
    compressed rows (key_length 320, value_length 256 for Small 4), for every head."""
    has_cache = layer < len(shape.kv_head_counts) and shape.kv_head_counts[layer] > 0
    if not has_cache or layer >= shape.layer_count - shape.nextn_layer_count:
        return Attention(head_tokens=0.0, flops=0.0)
    head_tokens = float(shape.head_counts[layer] * seen_tokens(shape, layer, depth))
    lengths = shape.key_length + shape.value_length
    return Attention(head_tokens=head_tokens, flops=2 * head_tokens * lengths)
