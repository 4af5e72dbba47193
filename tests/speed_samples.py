"""Shapes of models whose speed on known hardware was published, with the types their files have."""

from __future__ import annotations

import math
from pathlib import Path

from localmistral.fit.machine import GIB, Cpu, Gpu, Machine, Ram
from localmistral.models.shape import (
    FileKind,
    ModelShape,
    Tensor,
    Tokenizer,
    layer_of,
    role_of,
)
from localmistral.models.tensor_types import TENSOR_TYPES

_TYPES = {kind.name: kind for kind in TENSOR_TYPES.values()}
CPU = Cpu(name="Some CPU", cores=8, features=("avx2",))


def tensor(name: str, kind: str, *dims: int) -> Tensor:
    """A weight as a file would list it."""
    full = f"{name}.weight"
    elements = math.prod(dims)
    block = _TYPES[kind]
    return Tensor(
        name=full,
        dims=dims,
        type=kind,
        elements=elements,
        bytes=elements // block.block_elements * block.block_bytes,
        file_index=0,
        layer=layer_of(full),
        role=role_of(full),
    )


def make_shape(architecture: str, tensors: list[Tensor], **fields: object) -> ModelShape:
    """A shape with `fields` set and everything else as in a file that says nothing."""
    return ModelShape(
        files=(Path("model.gguf"),),
        file_bytes=(sum(t.bytes for t in tensors),),
        version=3,
        kind=FileKind.MODEL,
        architecture=architecture,
        name="sample",
        size_label="",
        file_type=None,
        tokenizer=Tokenizer(token_count=1),
        sampling=(),
        tensors=tuple(tensors),
        **fields,  # type: ignore[arg-type]
    )


def small_4(
    *, gate_up: str, down: str, dense: str, ends: tuple[str, str], layers: int = 36
) -> ModelShape:
    """Mistral Small 4, with types for the experts, for the rest, and for embedding and output."""
    tensors = [
        tensor("token_embd", ends[0], 4096, 131_072),
        tensor("output_norm", "f32", 4096),
        tensor("output", ends[1], 4096, 131_072),
    ]
    for n in range(layers):
        tensors += [
            tensor(f"blk.{n}.attn_q_a", dense, 4096, 1024),
            tensor(f"blk.{n}.attn_q_b", dense, 1024, 4096),
            tensor(f"blk.{n}.attn_kv_a_mqa", dense, 4096, 320),
            tensor(f"blk.{n}.attn_k_b", "q8_0", 64, 256, 32),
            tensor(f"blk.{n}.attn_v_b", dense, 256, 128, 32),
            tensor(f"blk.{n}.attn_output", dense, 4096, 4096),
            tensor(f"blk.{n}.ffn_gate_inp", "f32", 4096, 128),
            tensor(f"blk.{n}.ffn_gate_up_exps", gate_up, 4096, 4096, 128),
            tensor(f"blk.{n}.ffn_down_exps", down, 2048, 4096, 128),
            tensor(f"blk.{n}.ffn_gate_shexp", dense, 4096, 2048),
            tensor(f"blk.{n}.ffn_up_shexp", dense, 4096, 2048),
            tensor(f"blk.{n}.ffn_down_shexp", dense, 2048, 4096),
        ]
    return make_shape(
        "mistral4",
        tensors,
        layer_count=layers,
        embedding_length=4096,
        head_counts=(32,) * layers,
        kv_head_counts=(1,) * layers,
        key_length=320,
        value_length=256,
        key_length_mla=128,
        value_length_mla=128,
        kv_lora_rank=256,
        expert_count=128,
        expert_used_count=4,
        expert_shared_count=1,
        vocabulary_size=131_072,
    )


SMALL_4_Q4_K_M = small_4(gate_up="q4_K", down="q5_K", dense="q8_0", ends=("q4_K", "q6_K"))
SMALL_4_IQ3_XXS = small_4(gate_up="iq2_s", down="iq3_xxs", dense="q8_0", ends=("q4_K", "q6_K"))


def dense_model(
    kind: str, *, layers: int, width: int, heads: int, kv_heads: int, inner: int, vocabulary: int,
    output: str | None = None,
) -> ModelShape:  # fmt: skip
    """A llama-like model with heads of 128, all in one type but for the output."""
    tensors = [
        tensor("token_embd", kind, width, vocabulary),
        tensor("output_norm", "f32", width),
        tensor("output", output or kind, width, vocabulary),
    ]
    for n in range(layers):
        tensors += [
            tensor(f"blk.{n}.attn_q", kind, width, heads * 128),
            tensor(f"blk.{n}.attn_k", kind, width, kv_heads * 128),
            tensor(f"blk.{n}.attn_v", kind, width, kv_heads * 128),
            tensor(f"blk.{n}.attn_output", kind, heads * 128, width),
            tensor(f"blk.{n}.ffn_gate", kind, width, inner),
            tensor(f"blk.{n}.ffn_up", kind, width, inner),
            tensor(f"blk.{n}.ffn_down", kind, inner, width),
        ]
    return make_shape(
        "llama",
        tensors,
        layer_count=layers,
        embedding_length=width,
        head_counts=(heads,) * layers,
        kv_head_counts=(kv_heads,) * layers,
        key_length=128,
        value_length=128,
        vocabulary_size=vocabulary,
    )


def llama_7b(kind: str) -> ModelShape:
    return dense_model(
        kind, layers=32, width=4096, heads=32, kv_heads=32, inner=11_008, vocabulary=32_000
    )


def llama_8b(kind: str) -> ModelShape:
    return dense_model(
        kind, layers=32, width=4096, heads=32, kv_heads=8, inner=14_336, vocabulary=128_256
    )


MEDIUM_IQ4_XS = dense_model(
    "iq4_xs", layers=88, width=12_288, heads=96, kv_heads=8, inner=28_672, vocabulary=131_072,
    output="q6_K",
)  # fmt: skip


def gpt_oss_120b() -> ModelShape:
    """36 layers, 4 of 128 experts in MXFP4, the rest in 8 and 16 bits."""
    tensors = [
        tensor("token_embd", "q8_0", 2880, 201_088),
        tensor("output_norm", "f32", 2880),
        tensor("output", "q8_0", 2880, 201_088),
    ]
    for n in range(36):
        tensors += [
            tensor(f"blk.{n}.attn_q", "q8_0", 2880, 4096),
            tensor(f"blk.{n}.attn_k", "q8_0", 2880, 512),
            tensor(f"blk.{n}.attn_v", "q8_0", 2880, 512),
            tensor(f"blk.{n}.attn_output", "q8_0", 4096, 2880),
            tensor(f"blk.{n}.ffn_gate_inp", "f32", 2880, 128),
            *(
                tensor(f"blk.{n}.ffn_{part}_exps", "mxfp4", 2880, 2880, 128)
                for part in ("gate", "up", "down")
            ),
        ]
    return make_shape(
        "gpt-oss",
        tensors,
        layer_count=36,
        embedding_length=2880,
        head_counts=(64,) * 36,
        kv_head_counts=(8,) * 36,
        key_length=64,
        value_length=64,
        expert_count=128,
        expert_used_count=4,
        sliding_window=128,
        sliding_window_period=2,
        vocabulary_size=201_088,
    )


def card(name: str, gib: int, bandwidth: float, flops: float, link: float = 31.5e9) -> Gpu:
    return Gpu(
        name=name,
        total_bytes=gib * GIB,
        free_bytes=gib * GIB,
        bandwidth=bandwidth,
        flops=flops,
        link=link,
    )


RTX_3090 = card("RTX 3090", 24, 936e9, 71e12, link=15.8e9)
RTX_3080_20G = card("RTX 3080", 20, 760e9, 59.5e12)
RTX_4090 = card("RTX 4090", 24, 1008e9, 165.2e12)
RTX_5090 = card("RTX 5090", 32, 1792e9, 209.5e12, link=63e9)
RTX_PRO_6000 = card("RTX PRO 6000", 96, 1792e9, 503.8e12, link=63e9)


def machine(*gpus: Gpu, bandwidth: float = 51e9, cpu: Cpu = CPU) -> Machine:
    ram = Ram(total_bytes=128 * GIB, available_bytes=120 * GIB, bandwidth=bandwidth)
    return Machine(gpus=gpus, ram=ram, cpu=cpu)
