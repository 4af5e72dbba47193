"""Metadata -> the fields of a ModelShape, checked against each other and against the tensors.

Refuses what llama.cpp asserts (and would end the process over) or would divide by. Limits are
those of llama.cpp's llama-hparams.h and llama-model.cpp.
Knows the keys of GGUF, but nothing of files and shards.
"""

import re
from typing import Any

from localmistral.models.header import TensorInfo, ValueType, format_dims, shown
from localmistral.models.metadata import Metadata
from localmistral.models.shape import FileKind, Rope, TensorRole, layer_of, role_of

MAX_LAYERS = 512  # LLAMA_MAX_LAYERS
MAX_EXPERTS = 1024  # LLAMA_MAX_EXPERTS
MAX_WIDTH = 1 << 24  # of any vector; keeps products within 63 bits
MAX_GATING_FUNCTION = 4  # the last of llama_expert_gating_func_type; others end the process
MAX_HEADS = 1 << 16
MAX_ARCHITECTURE_CHARACTERS = 64

ROPE_SCALINGS = ("none", "linear", "yarn", "longrope")
# llama.cpp asserts that these have experts, even in a file without expert tensors
EXPERT_ARCHITECTURES = ("smallthinker", "llada-moe", "grovemoe", "glm4moe", "bailingmoe2")
# these take the length of the attention temperature from the file and assert that it isn't 0
TEMPERATURE_ARCHITECTURES = ("mistral4", "deepseek2")
LATENT_ARCHITECTURES = TEMPERATURE_ARCHITECTURES
# these assert that positions rotate whole heads
WHOLE_ROPE_ARCHITECTURES = (
    "llama",
    "mistral3",
    "qwen2",
    "qwen2moe",
    "qwen2vl",
    "qwen3",
    "qwen3moe",
    "qwen3vl",
    "smollm3",
)

# Small tensors that are added or multiplied: ggml ends the process unless they are f32.
_F32_NAME = re.compile(r"(norm\.weight|sinks\.weight|\.bias|^rope_(freqs|factors_\w+)\.weight)$")
# Matrices of these types have no multiplication in ggml. Tables of ids are i32 and no matrices.
_NO_MATRIX_TYPES = ("q8_1", "q8_K", "i8", "i16", "i32", "i64", "f64")
_ID_TABLE_NAME = re.compile(r"tid2eid")
_WEIGHT_ROLES = (TensorRole.EMBEDDING, TensorRole.DENSE, TensorRole.EXPERT, TensorRole.OUTPUT)


_KINDS = {
    "mmproj": FileKind.PROJECTOR,
    "adapter": FileKind.ADAPTER,
    "imatrix": FileKind.IMATRIX,
    "clip": FileKind.PROJECTOR,
    "controlvector": FileKind.CONTROL_VECTOR,
}


def read_kind(metadata: Metadata) -> FileKind:
    """What the file is for, by `general.type`, or by an architecture that is no model's."""
    for key in ("general.type", "general.architecture"):
        kind = _KINDS.get(metadata.text(key) or "")
        if kind is not None:
            return kind
    architecture = metadata.text("general.architecture")
    if not architecture:
        metadata.fail("has no general.architecture, so nothing can tell what model it is")
    if len(architecture) > MAX_ARCHITECTURE_CHARACTERS or not architecture.isprintable():
        metadata.fail(f"names no architecture: {shown(architecture)}")
    return FileKind.MODEL


def read_hyperparameters(
    metadata: Metadata, tensors: tuple[TensorInfo, ...], token_count: int
) -> dict[str, Any]:
    """ModelShape's numeric fields by name.

    `tensors` are those of all shards, `token_count` is the vocabulary's (0 without texts).
    """
    architecture = metadata.text("general.architecture") or ""
    prefix = f"{architecture}."
    required = ("block_count", "context_length", "embedding_length")
    missing = [prefix + key for key in required if not metadata.has(prefix + key)]
    if missing and tensors:
        metadata.fail(f"has no {missing[0]}, which every model needs")
    count = metadata.count
    layers = count(prefix + "block_count", minimum=1, maximum=MAX_LAYERS)
    width = count(prefix + "embedding_length", minimum=1, maximum=MAX_WIDTH)
    _check_layers(metadata, prefix, layers, tensors)
    _check_types(metadata, tensors)
    vocabulary = token_count or count(prefix + "vocab_size")
    _check_embedding(metadata, tensors, width, vocabulary)
    attention = _read_attention(metadata, prefix, layers, width)
    rope = _read_rope(metadata, prefix)
    _check_rope(metadata, architecture, attention, rope)
    return {
        "layer_count": layers,
        "nextn_layer_count": count(prefix + "nextn_predict_layers", maximum=max(layers - 1, 0)),
        "embedding_length": width,
        "context_length": count(prefix + "context_length", minimum=1),
        "vocabulary_size": vocabulary,
        "feed_forward_lengths": metadata.by_layer(
            prefix + "feed_forward_length", layers, maximum=MAX_WIDTH
        ),
        "leading_dense_layer_count": count(prefix + "leading_dense_block_count", maximum=layers),
        "pooling": count(prefix + "pooling_type"),
        "is_causal": metadata.flag(f"{prefix}attention.causal") is not False,
        **attention,
        **_read_sliding_window(metadata, prefix, layers),
        **_read_experts(metadata, architecture, layers, tensors),
        "rope": rope,
    }


def _check_layers(
    metadata: Metadata, prefix: str, layers: int, tensors: tuple[TensorInfo, ...]
) -> None:
    found = {layer for tensor in tensors if (layer := layer_of(tensor.name)) is not None}
    encodes = any(tensor.name.startswith(("enc.", "dec.")) for tensor in tensors)
    if not tensors or (encodes and not found):
        return
    last = max(found, default=-1)
    if last != layers - 1:
        metadata.fail(
            f"has {prefix}block_count {layers:,}, but tensors of {last + 1:,} layers"
            if last >= 0
            else f"has {prefix}block_count {layers:,}, but no layer's tensors"
        )


def _check_types(metadata: Metadata, tensors: tuple[TensorInfo, ...]) -> None:
    for tensor in tensors:
        kind = tensor.type.name
        if kind != "f32" and _F32_NAME.search(tensor.name):
            metadata.fail(f"stores {tensor.name!r} as {kind}, where llama.cpp needs f32")
        is_matrix = len(tensor.dims) > 1 and not _ID_TABLE_NAME.search(tensor.name)
        if kind in _NO_MATRIX_TYPES and is_matrix and role_of(tensor.name) in _WEIGHT_ROLES:
            metadata.fail(f"stores {tensor.name!r} as {kind}, which llama.cpp can't multiply with")


def _check_embedding(
    metadata: Metadata, tensors: tuple[TensorInfo, ...], width: int, vocabulary: int
) -> None:
    for tensor in tensors:
        if tensor.name == "token_embd.weight" and tensor.dims != (width, vocabulary):
            metadata.fail(
                f"has an embedding of {format_dims(tensor.dims)}, "
                f"but {vocabulary:,} tokens of embedding_length {width:,}"
            )


def _read_attention(metadata: Metadata, prefix: str, layers: int, width: int) -> dict[str, Any]:
    prefix = f"{prefix}attention."
    heads = metadata.by_layer(prefix + "head_count", layers, maximum=MAX_HEADS) or (0,) * layers
    kv_heads = metadata.by_layer(prefix + "head_count_kv", layers, maximum=MAX_HEADS) or heads
    _check_heads(metadata, prefix, heads, kv_heads)
    head_length = width // max(heads) if any(heads) else 0

    def length(key: str, default: int) -> int:
        return metadata.count(
            prefix + key, default=default, minimum=1 if any(heads) else 0, maximum=MAX_WIDTH
        )

    for epsilon in ("layer_norm_rms_epsilon", "layer_norm_epsilon"):
        metadata.real(prefix + epsilon)
    scale = metadata.real(prefix + "temperature_scale")
    stated = metadata.has(prefix + "temperature_length")
    needed = bool(scale) and prefix.partition(".")[0] in TEMPERATURE_ARCHITECTURES
    if (stated or needed) and metadata.count(prefix + "temperature_length") == 0 and scale:
        metadata.fail(f"has {prefix}temperature_scale {scale:g} but no temperature_length above 0")
    return {
        "head_counts": heads,
        "kv_head_counts": kv_heads,
        "key_length": length("key_length", head_length),
        "value_length": length("value_length", head_length),
        "key_length_mla": length("key_length_mla", 0),
        "value_length_mla": length("value_length_mla", 0),
        "q_lora_rank": metadata.count(prefix + "q_lora_rank", maximum=MAX_WIDTH),
        "kv_lora_rank": metadata.count(prefix + "kv_lora_rank", maximum=MAX_WIDTH),
    }


def _check_heads(
    metadata: Metadata, prefix: str, heads: tuple[int, ...], kv_heads: tuple[int, ...]
) -> None:
    architecture = prefix.partition(".")[0]
    recurrent = any(
        key.startswith((f"{architecture}.ssm.", f"{architecture}.wkv."))
        for key in metadata.header.metadata
    )
    for key, counts in (("head_count", heads), ("head_count_kv", kv_heads)):
        if counts and not any(counts) and not recurrent and metadata.header.tensors:
            metadata.fail(f"has {prefix}{key} 0, but attention needs at least 1 head")
    for layer, (count, kv_count) in enumerate(zip(heads, kv_heads, strict=True)):
        if kv_count and count % kv_count:
            metadata.fail(
                f"has {count:,} heads in layer {layer}, not a multiple of its {kv_count:,} KV heads"
            )


def _read_sliding_window(metadata: Metadata, prefix: str, layers: int) -> dict[str, Any]:
    key = f"{prefix}attention.sliding_window_pattern"
    value = metadata.header.metadata.get(key)
    sliding: tuple[bool, ...] = ()
    if value is not None and value.kind is ValueType.ARRAY:
        kinds = (ValueType.BOOL, ValueType.UINT32, ValueType.INT32)
        sliding = tuple(map(bool, metadata.numbers(key, *kinds) or ()))
        if len(sliding) != layers:
            metadata.fail(f"lists {len(sliding):,} values of {key} for {layers:,} layers")
    return {
        "sliding_window": metadata.count(f"{prefix}attention.sliding_window"),
        "sliding_window_period": 0 if sliding else metadata.count(key),
        "sliding_window_layers": sliding,
    }


def _read_experts(
    metadata: Metadata, architecture: str, layers: int, tensors: tuple[TensorInfo, ...]
) -> dict[str, int]:
    prefix = f"{architecture}.expert_"
    total = metadata.count(prefix + "count", maximum=MAX_EXPERTS)
    used = max(metadata.by_layer(prefix + "used_count", layers), default=0)
    lengths = metadata.by_layer(prefix + "feed_forward_length", layers, maximum=MAX_WIDTH)
    one_means_none = architecture.startswith("hunyuan") and total <= 1
    if not one_means_none and not (0 < used <= total or used == total == 0):
        metadata.fail(f"uses {used:,} of {total:,} experts ({prefix}used_count)")
    metadata.count(prefix + "gating_func", maximum=MAX_GATING_FUNCTION)
    _check_expert_groups(metadata, prefix, total)
    stacks = sum(role_of(tensor.name) is TensorRole.EXPERT for tensor in tensors)
    if total == 0 and (stacks or (tensors and architecture in EXPERT_ARCHITECTURES)):
        metadata.fail(f"has {prefix}count 0, but {stacks:,} expert tensors")
    return {
        "expert_count": total,
        "expert_used_count": used,
        "expert_shared_count": metadata.count(prefix + "shared_count", maximum=MAX_EXPERTS),
        "expert_feed_forward_length": max(lengths, default=0),
    }


def _check_expert_groups(metadata: Metadata, prefix: str, experts: int) -> None:
    groups = metadata.count(prefix + "group_count", maximum=MAX_EXPERTS)
    used = metadata.count(prefix + "group_used_count", maximum=MAX_EXPERTS)
    if groups and groups >= experts:
        metadata.fail(f"has {prefix}group_count {groups:,}, not below its {experts:,} experts")
    if groups > 1 and (experts % groups or not 0 < used < groups):
        metadata.fail(f"splits {experts:,} experts into {groups:,} groups and uses {used:,}")


def _read_rope(metadata: Metadata, prefix: str) -> Rope:
    prefix = f"{prefix}rope."
    scaling = metadata.text(prefix + "scaling.type")
    if scaling is not None and scaling not in ROPE_SCALINGS:
        known = ", ".join(ROPE_SCALINGS)
        metadata.fail(f"has {prefix}scaling.type {shown(scaling)}, none of {known}")
    factor = metadata.real(prefix + "scaling.factor")
    if factor is None:
        factor = metadata.real(prefix + "scale_linear")  # the older key
    dimensions, original = prefix + "dimension_count", prefix + "scaling.original_context_length"
    return Rope(
        dimension_count=metadata.count(dimensions) if metadata.has(dimensions) else None,
        freq_base=metadata.real(prefix + "freq_base"),
        scaling=scaling or ("linear" if factor else "none"),
        factor=factor,
        original_context_length=metadata.count(original) if metadata.has(original) else None,
    )


def _check_rope(
    metadata: Metadata, architecture: str, attention: dict[str, Any], rope: Rope
) -> None:
    """How many elements of a head rotate, against the head's length."""
    head, rotated = attention["key_length"], rope.dimension_count
    if rotated is None:
        rotated = head  # llama.cpp's default
    if not head:
        return
    key = f"{architecture}.rope.dimension_count"
    if rotated > head or rotated % 2:
        metadata.fail(f"has {key} {rotated:,}, not an even number of at most {head:,}")
    if rotated != head and architecture in WHOLE_ROPE_ARCHITECTURES:
        metadata.fail(f"has {key} {rotated:,}, but heads of {head:,}")
    inner = attention["key_length_mla"]
    if architecture in LATENT_ARCHITECTURES and inner:
        _check_latent(metadata, attention, rotated)


def _check_latent(metadata: Metadata, attention: dict[str, Any], rotated: int) -> None:
    """Latent attention: the cache holds one row of kv_lora_rank + rotated elements a token."""
    rank = attention["kv_lora_rank"]
    lengths = (attention["key_length"], attention["value_length"])
    if lengths != (rank + rotated, rank) or attention["key_length_mla"] <= rotated:
        metadata.fail(
            f"has key and value lengths {lengths[0]:,} and {lengths[1]:,} "
            f"({attention['key_length_mla']:,} before compression), which don't fit "
            f"kv_lora_rank {rank:,} and {rotated:,} rotated elements"
        )
    if any(count != 1 for count in attention["kv_head_counts"]):
        metadata.fail("has latent attention with other than 1 KV head")
