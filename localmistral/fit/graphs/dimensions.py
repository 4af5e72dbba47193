"""How wide a model's tensors are: all that the size of its graph depends on.

From hyper-parameters and tensors' names and shapes. Knows no graph and no bytes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from localmistral.fit.weights import once_per_shape
from localmistral.models.shape import ModelShape


@dataclass(frozen=True, slots=True, kw_only=True)
class Dimensions:
    """Elements a token in a model's tensors: what the size of its graph depends on.

    `dense` and `shared` are widths of feed-forward parts, 0 where no layer has one. `rotation` is
    the side of the matrix that turns quantised keys.
    """

    hidden: int
    vocabulary: int
    heads: int
    query: int
    key: int
    value: int
    attended: int
    is_latent: bool
    q_lora: int
    kv_lora: int
    rotated: int
    plain_query: int
    head_value: int
    rotation: int
    has_qkv_fused: bool
    has_qk_norm: bool
    masks: int
    dense: int
    experts: int
    experts_used: int
    expert_width: int
    has_gate_up_fused: bool
    shared: int


@once_per_shape
def read_dimensions(shape: ModelShape) -> Dimensions:
    """The dimensions of a model, from its hyper-parameters and its tensors' shapes."""
    heads, kv_heads = max(shape.head_counts, default=0), max(shape.kv_head_counts, default=0)
    latent = shape.has_latent_attention
    names = {tensor.name.partition(".")[2].partition(".")[2]: tensor for tensor in shape.tensors}
    shared = names.get("ffn_up_shexp.weight")
    is_dense = [bool(width) and not size for width, size in _feed_forward(shape)]
    return Dimensions(
        hidden=shape.embedding_length,
        vocabulary=shape.vocabulary_size,
        heads=heads,
        query=heads * shape.key_length,
        key=kv_heads * shape.key_length,
        value=kv_heads * shape.value_length,
        attended=heads * shape.value_length,
        is_latent=latent,
        q_lora=shape.q_lora_rank,
        kv_lora=shape.kv_lora_rank,
        rotated=shape.key_length - shape.kv_lora_rank if latent else 0,
        plain_query=heads * shape.key_length_mla,
        head_value=heads * shape.value_length_mla,
        rotation=_largest_power_of_two_in(shape.key_length),
        has_qkv_fused="attn_qkv.weight" in names,
        has_qk_norm="attn_q_norm.weight" in names,
        masks=2 if shape.sliding_window else 1,
        dense=max((w for w, keep in zip(_widths(shape), is_dense, strict=True) if keep), default=0),
        experts=shape.expert_count if any(shape.expert_bytes) else 0,
        experts_used=shape.expert_used_count,
        expert_width=shape.expert_feed_forward_length or max(_widths(shape), default=0),
        has_gate_up_fused="ffn_gate_up_exps.weight" in names,
        shared=shared.dims[1] if shared else 0,
    )


def _widths(shape: ModelShape) -> tuple[int, ...]:
    return shape.feed_forward_lengths or (0,) * shape.layer_count


def _feed_forward(shape: ModelShape) -> Iterator[tuple[int, int]]:
    """Of each layer the width of a dense part, and the bytes of experts that replace it."""
    return zip(_widths(shape), shape.expert_bytes, strict=True)


def _largest_power_of_two_in(length: int) -> int:
    return length & -length
