"""A small GGUF writer: metadata and tensor infos -> bytes, sound or deliberately wrong.

Python values are stored the way converters store them (int: uint32, float: float32, list of ints:
int32); `Typed` overrides that, and `Raw` puts any bytes where a value would stand.
"""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from localmistral.models.header import SCALAR_FORMATS, ValueType
from localmistral.models.tensor_types import TENSOR_TYPES

TYPE_NUMBERS = {kind.name: number for number, kind in TENSOR_TYPES.items()}


@dataclass(frozen=True, slots=True)
class Typed:
    """A value, or a list's elements, of a stated GGUF type."""

    kind: ValueType
    value: Any


@dataclass(frozen=True, slots=True)
class Raw:
    """Bytes in place of a whole value: its type, then its content."""

    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One tensor info; `offset` and `type_number` only where the honest ones aren't wanted."""

    name: str | bytes
    dims: Sequence[int] = (32,)
    type: str = "f32"
    type_number: int | None = None
    offset: int | None = None
    dimension_count: int | None = None

    @property
    def bytes(self) -> int:
        kind = TENSOR_TYPES[TYPE_NUMBERS[self.type]]
        elements = 1
        for size in self.dims:
            elements *= size
        return elements // kind.block_elements * kind.block_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Gguf:
    """A file to be written. `tensor_count` and `pair_count` override the honest counts."""

    metadata: Mapping[str, Any] | Sequence[tuple[str | bytes, Any]] = field(default_factory=dict)
    tensors: Sequence[TensorSpec] = ()
    version: int = 3
    alignment: int = 32
    tensor_count: int | None = None
    pair_count: int | None = None

    def header(self) -> bytes:
        """Everything before the weights, padded up to them."""
        is_map = isinstance(self.metadata, Mapping)
        pairs = list(self.metadata.items() if is_map else self.metadata)  # type: ignore[union-attr]
        pair_count = len(pairs) if self.pair_count is None else self.pair_count
        tensor_count = len(self.tensors) if self.tensor_count is None else self.tensor_count
        parts = [b"GGUF", struct.pack("<IQQ", self.version, tensor_count, pair_count)]
        parts += [encode_text(key) + encode_value(value) for key, value in pairs]
        offset = 0
        for tensor in self.tensors:
            parts.append(_encode_tensor(tensor, offset))
            offset += padded(tensor.bytes, self.alignment)
        header = b"".join(parts)
        return header + bytes(padded(len(header), self.alignment) - len(header))

    def weight_bytes(self) -> int:
        """Bytes from the first weight to the end of the last, its padding included."""
        return sum(padded(tensor.bytes, self.alignment) for tensor in self.tensors)

    def data(self) -> bytes:
        """The whole file, with zeros for weights."""
        return self.header() + bytes(self.weight_bytes())


def padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def encode_text(text: str | bytes) -> bytes:
    data = text.encode("utf-8") if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def encode_value(value: Any) -> bytes:
    """A value's type and content."""
    if isinstance(value, Raw):
        return value.data
    typed = value if isinstance(value, Typed) else Typed(_kind_of(value), value)
    if isinstance(typed.value, list | tuple):
        head = struct.pack("<IIQ", ValueType.ARRAY, typed.kind, len(typed.value))
        if typed.kind is ValueType.STRING:
            return head + b"".join(map(encode_text, typed.value))
        return head + struct.pack(f"<{len(typed.value)}{SCALAR_FORMATS[typed.kind]}", *typed.value)
    head = struct.pack("<I", typed.kind)
    if typed.kind is ValueType.STRING:
        return head + encode_text(typed.value)
    return head + struct.pack("<" + SCALAR_FORMATS[typed.kind], typed.value)


def _kind_of(value: Any) -> ValueType:
    if isinstance(value, list | tuple):
        kind = _kind_of(value[0]) if value else ValueType.INT32
        return ValueType.INT32 if kind is ValueType.UINT32 else kind
    if isinstance(value, bool):
        return ValueType.BOOL
    if isinstance(value, int):
        return ValueType.UINT32
    return ValueType.FLOAT32 if isinstance(value, float) else ValueType.STRING


def _encode_tensor(tensor: TensorSpec, offset: int) -> bytes:
    count = len(tensor.dims) if tensor.dimension_count is None else tensor.dimension_count
    number = TYPE_NUMBERS[tensor.type] if tensor.type_number is None else tensor.type_number
    return (
        encode_text(tensor.name)
        + struct.pack(f"<I{len(tensor.dims)}Q", count, *tensor.dims)
        + struct.pack("<IQ", number, offset if tensor.offset is None else tensor.offset)
    )


TOKENS = ["<unk>", "<s>", "</s>", *(chr(code) for code in range(0x21, 0x7F)), "Ġ", "Ċ", "he", "ll"]
VOCABULARY: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "default",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3, 3, 3] + [1] * (len(TOKENS) - 3),
    "tokenizer.ggml.merges": ["h e", "l l"],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.chat_template": "{{ messages[0].content }}",
}


def tiny_llama(
    changes: Mapping[str, Any] | None = None,
    *,
    without: Sequence[str] = (),
    tensors: Sequence[TensorSpec] | None = None,
    **options: Any,
) -> Gguf:
    """A model of two layers that llama.cpp loads and runs (weights all zero), with changes."""
    metadata: dict[str, Any] = {
        "general.architecture": "llama",
        "general.name": "Tiny",
        "general.file_type": 0,
        "llama.block_count": 2,
        "llama.context_length": 512,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": 16,
        **VOCABULARY,
        **(changes or {}),
    }
    for key in without:
        del metadata[key]
    tensors = tiny_llama_tensors() if tensors is None else tensors
    return Gguf(metadata=metadata, tensors=tensors, **options)


def tiny_llama_tensors() -> list[TensorSpec]:
    tensors = [
        TensorSpec(name="token_embd.weight", dims=(64, len(TOKENS))),
        TensorSpec(name="output_norm.weight", dims=(64,)),
    ]
    for layer in range(2):
        tensors += [
            TensorSpec(name=f"blk.{layer}.{name}.weight", dims=dims)
            for name, dims in (
                ("attn_norm", (64,)),
                ("attn_q", (64, 64)),
                ("attn_k", (64, 32)),
                ("attn_v", (64, 32)),
                ("attn_output", (64, 64)),
                ("ffn_norm", (64,)),
                ("ffn_gate", (64, 96)),
                ("ffn_up", (64, 96)),
                ("ffn_down", (96, 64)),
            )
        ]
    return tensors


def tiny_mistral4(
    changes: Mapping[str, Any] | None = None, *, without: Sequence[str] = (), **options: Any
) -> Gguf:
    """Small 4's architecture in two layers of 64: latent attention, fused and shared experts."""
    keys = {
        "block_count": 2,
        "context_length": 4096,
        "embedding_length": 64,
        "feed_forward_length": 96,
        "vocab_size": len(TOKENS),
        "attention.head_count": 2,
        "attention.head_count_kv": 1,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "attention.q_lora_rank": 32,
        "attention.kv_lora_rank": 32,
        "attention.key_length": 48,
        "attention.value_length": 32,
        "attention.key_length_mla": 32,
        "attention.value_length_mla": 32,
        "attention.temperature_scale": 0.1,
        "attention.temperature_length": 512,
        "rope.dimension_count": 16,
        "rope.freq_base": 10_000.0,
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 8.0,
        "rope.scaling.original_context_length": 512,
        "rope.scaling.yarn_log_multiplier": 0.1,
        "leading_dense_block_count": 0,
        "expert_count": 4,
        "expert_used_count": 2,
        "expert_shared_count": 1,
        "expert_feed_forward_length": 32,
        "expert_group_count": 1,
        "expert_group_used_count": 1,
        "expert_weights_scale": 1.0,
        "expert_weights_norm": True,
    }
    metadata: dict[str, Any] = {
        "general.architecture": "mistral4",
        **{f"mistral4.{key}": value for key, value in keys.items()},
        **VOCABULARY,
        **(changes or {}),
    }
    for key in without:
        del metadata[key]
    return Gguf(metadata=metadata, tensors=tiny_mistral4_tensors(), **options)


def tiny_mistral4_tensors() -> list[TensorSpec]:
    tensors = [
        TensorSpec(name="token_embd.weight", dims=(64, len(TOKENS))),
        TensorSpec(name="output_norm.weight", dims=(64,)),
        TensorSpec(name="output.weight", dims=(64, len(TOKENS))),
    ]
    for layer in range(2):
        tensors += [
            TensorSpec(name=f"blk.{layer}.{name}.weight", dims=dims, type=kind)
            for name, dims, kind in (
                ("attn_norm", (64,), "f32"),
                ("attn_q_a", (64, 32), "q8_0"),
                ("attn_q_a_norm", (32,), "f32"),
                ("attn_q_b", (32, 64), "q8_0"),
                ("attn_kv_a_mqa", (64, 48), "q8_0"),
                ("attn_kv_a_norm", (32,), "f32"),
                ("attn_k_b", (16, 32, 2), "f32"),
                ("attn_v_b", (32, 32, 2), "q8_0"),
                ("attn_output", (64, 64), "q8_0"),
                ("ffn_norm", (64,), "f32"),
                ("ffn_gate_inp", (64, 4), "f32"),
                ("ffn_gate_up_exps", (64, 64, 4), "q4_0"),
                ("ffn_down_exps", (32, 64, 4), "q4_0"),
                ("ffn_gate_shexp", (64, 32), "q8_0"),
                ("ffn_up_shexp", (64, 32), "q8_0"),
                ("ffn_down_shexp", (32, 64), "q8_0"),
            )
        ]
    return tensors


def tekken_vocabulary(tokens: Sequence[str], kinds: Sequence[int], merges: Sequence[str]) -> Gguf:
    """A file that holds a Tekken-style vocabulary and no weights; token 1 is BOS and 2 is EOS."""
    return Gguf(
        metadata={
            "general.architecture": "llama",
            "llama.block_count": 1,
            "llama.context_length": 512,
            "llama.embedding_length": 32,
            "llama.feed_forward_length": 32,
            "llama.attention.head_count": 1,
            "llama.attention.layer_norm_rms_epsilon": 1e-5,
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "tekken",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": Typed(ValueType.INT32, kinds),
            "tokenizer.ggml.merges": merges,
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
        }
    )
