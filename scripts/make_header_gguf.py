"""Write a GGUF file that is all header: the metadata and tensor infos of a real model's shape,
a made-up vocabulary with the real control tokens, and a hole in place of the weights.

    python scripts/make_header_gguf.py OUT.gguf --model small-4 --quant q4_K [--shards 3]

Such a file takes some megabytes on disk whatever it claims to hold (on file systems with sparse
files), loads in llama.cpp with `no_alloc`, and serves planning; it can't generate text.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# the GGUF writer is the tests' own: nothing in the product writes model files
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from gguf_writer import TYPE_NUMBERS, Gguf, TensorSpec, Typed

from localmistral.models.header import ValueType
from localmistral.models.shape import FILE_TYPE_NAMES, TokenType

VOCABULARY_SIZE = 131_072
SPECIAL_SLOTS = 1_000
CONTROL_TOKENS = {
    0: "<unk>",
    1: "<s>",
    2: "</s>",
    3: "[INST]",
    4: "[/INST]",
    5: "[AVAILABLE_TOOLS]",
    6: "[/AVAILABLE_TOOLS]",
    7: "[TOOL_RESULTS]",
    8: "[/TOOL_RESULTS]",
    9: "[TOOL_CALLS]",
    10: "[IMG]",
    11: "<pad>",
    12: "[IMG_BREAK]",
    13: "[IMG_END]",
    17: "[SYSTEM_PROMPT]",
    18: "[/SYSTEM_PROMPT]",
    32: "[ARGS]",
    33: "[CALL_ID]",
    34: "[THINK]",
    35: "[/THINK]",
    36: "[MODEL_SETTINGS]",
    37: "[/MODEL_SETTINGS]",
}


def _byte_characters() -> list[str]:
    """The 256 printable stand-ins that byte-level BPE uses, in byte order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    stand_in = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(stand_in)) for byte in range(256)]


def vocabulary(size: int = VOCABULARY_SIZE) -> dict[str, Any]:
    """Tekken's layout: 1,000 special slots, the 256 bytes, then placeholders."""
    texts = [CONTROL_TOKENS.get(i, f"<SPECIAL_{i}>") for i in range(SPECIAL_SLOTS)]
    texts += _byte_characters()
    merges = [f"w{i:06}" for i in range(size - len(texts))]
    types = [TokenType.CONTROL] * SPECIAL_SLOTS
    types += [TokenType.NORMAL] * (size - SPECIAL_SLOTS)
    prefix = "tokenizer.ggml."
    return {
        prefix + "model": "gpt2",
        prefix + "pre": "tekken",
        prefix + "tokens": texts + merges,
        prefix + "token_type": types,
        prefix + "merges": [f"{text[:-1]} {text[-1]}" for text in merges],
        prefix + "bos_token_id": 1,
        prefix + "eos_token_id": 2,
        prefix + "unknown_token_id": 0,
        prefix + "padding_token_id": 11,
        prefix + "add_bos_token": True,
        prefix + "add_eos_token": False,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A model to imitate: its metadata without vocabulary, and its tensors in a given type."""

    metadata: dict[str, Any]
    tensors: Callable[[str], list[TensorSpec]]


def _prefixed(architecture: str, values: dict[str, Any]) -> dict[str, Any]:
    return {f"{architecture}.{key}": value for key, value in values.items()}


SMALL_4 = {
    "general.architecture": "mistral4",
    "general.name": "Mistral Small 4 119B 2603 (header only)",
    "general.size_label": "128x3.9B",
    **_prefixed(
        "mistral4",
        {
            "block_count": 36,
            "context_length": 1_048_576,
            "embedding_length": 4096,
            "feed_forward_length": 12_288,
            "vocab_size": VOCABULARY_SIZE,
            "attention.head_count": 32,
            "attention.head_count_kv": 1,
            "attention.layer_norm_rms_epsilon": 1e-6,
            "attention.q_lora_rank": 1024,
            "attention.kv_lora_rank": 256,
            "attention.key_length": 320,
            "attention.value_length": 256,
            "attention.key_length_mla": 128,
            "attention.value_length_mla": 128,
            "attention.temperature_scale": 0.1,
            "attention.temperature_length": 8192,
            "rope.dimension_count": 64,
            "rope.freq_base": 10_000.0,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 128.0,
            "rope.scaling.original_context_length": 8192,
            "rope.scaling.yarn_beta_fast": 32.0,
            "rope.scaling.yarn_beta_slow": 1.0,
            "rope.scaling.yarn_log_multiplier": 0.1,
            "leading_dense_block_count": 0,
            "expert_count": 128,
            "expert_used_count": 4,
            "expert_shared_count": 1,
            "expert_feed_forward_length": 2048,
            "expert_group_count": 1,
            "expert_group_used_count": 1,
            "expert_weights_scale": 1.0,
            "expert_weights_norm": True,
        },
    ),
}

MINISTRAL_3_8B = {
    "general.architecture": "mistral3",
    "general.name": "Ministral 3 8B Instruct 2512 (header only)",
    "general.size_label": "8B",
    **_prefixed(
        "mistral3",
        {
            "block_count": 34,
            "context_length": 262_144,
            "embedding_length": 4096,
            "feed_forward_length": 14_336,
            "vocab_size": VOCABULARY_SIZE,
            "attention.head_count": 32,
            "attention.head_count_kv": 8,
            "attention.layer_norm_rms_epsilon": 1e-5,
            "attention.key_length": 128,
            "attention.value_length": 128,
            "attention.temperature_scale": 0.1,
            "rope.dimension_count": 128,
            "rope.freq_base": 1_000_000.0,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 16.0,
            "rope.scaling.original_context_length": 16_384,
            "rope.scaling.yarn_beta_fast": 32.0,
            "rope.scaling.yarn_beta_slow": 1.0,
            "rope.scaling.yarn_log_multiplier": 1.0,
        },
    ),
}


def _matrix(name: str, kind: str, *dims: int) -> TensorSpec:
    return TensorSpec(name=f"{name}.weight", type=kind, dims=dims)


def _ends(quant: str, width: int) -> list[TensorSpec]:
    """Embedding and output, which quantised files keep in a finer type than the layers."""
    output = "q6_K" if quant.endswith("_K") else quant
    return [
        _matrix("token_embd", quant, width, VOCABULARY_SIZE),
        _matrix("output_norm", "f32", width),
        _matrix("output", output, width, VOCABULARY_SIZE),
    ]


def _latent_attention(layer: str, quant: str) -> list[TensorSpec]:
    """Small 4's: q_lora 1024, kv_lora 256, 32 heads of 64 plain and 64 rotated, values of 128."""
    # k_b has rows of 64 elements, too short for blocks of 256
    narrow = "q8_0" if quant not in ("f32", "f16", "bf16") else quant
    return [
        _matrix(f"{layer}.attn_norm", "f32", 4096),
        _matrix(f"{layer}.attn_q_a", quant, 4096, 1024),
        _matrix(f"{layer}.attn_q_a_norm", "f32", 1024),
        _matrix(f"{layer}.attn_q_b", quant, 1024, 32 * 128),
        _matrix(f"{layer}.attn_kv_a_mqa", quant, 4096, 256 + 64),
        _matrix(f"{layer}.attn_kv_a_norm", "f32", 256),
        _matrix(f"{layer}.attn_k_b", narrow, 64, 256, 32),
        _matrix(f"{layer}.attn_v_b", quant, 256, 128, 32),
        _matrix(f"{layer}.attn_output", quant, 32 * 128, 4096),
    ]


def small_4_tensors(quant: str) -> list[TensorSpec]:
    """36 layers of latent attention, 128 fused routed experts and 1 shared expert."""
    tensors = _ends(quant, 4096)
    for number in range(36):
        layer = f"blk.{number}"
        tensors += _latent_attention(layer, quant)
        tensors += [
            _matrix(f"{layer}.ffn_norm", "f32", 4096),
            _matrix(f"{layer}.ffn_gate_inp", "f32", 4096, 128),
            _matrix(f"{layer}.ffn_gate_up_exps", quant, 4096, 2 * 2048, 128),
            _matrix(f"{layer}.ffn_down_exps", quant, 2048, 4096, 128),
            _matrix(f"{layer}.ffn_gate_shexp", quant, 4096, 2048),
            _matrix(f"{layer}.ffn_up_shexp", quant, 4096, 2048),
            _matrix(f"{layer}.ffn_down_shexp", quant, 2048, 4096),
        ]
    return tensors


def ministral_3_8b_tensors(quant: str) -> list[TensorSpec]:
    """34 dense layers with grouped-query attention."""
    tensors = _ends(quant, 4096)
    for number in range(34):
        layer = f"blk.{number}"
        tensors += [
            _matrix(f"{layer}.attn_norm", "f32", 4096),
            _matrix(f"{layer}.attn_q", quant, 4096, 4096),
            _matrix(f"{layer}.attn_k", quant, 4096, 1024),
            _matrix(f"{layer}.attn_v", quant, 4096, 1024),
            _matrix(f"{layer}.attn_output", quant, 4096, 4096),
            _matrix(f"{layer}.ffn_norm", "f32", 4096),
            _matrix(f"{layer}.ffn_gate", quant, 4096, 14_336),
            _matrix(f"{layer}.ffn_up", quant, 4096, 14_336),
            _matrix(f"{layer}.ffn_down", quant, 14_336, 4096),
        ]
    return tensors


MODELS = {
    "small-4": ModelSpec(metadata=SMALL_4, tensors=small_4_tensors),
    "ministral-3-8b": ModelSpec(metadata=MINISTRAL_3_8B, tensors=ministral_3_8b_tensors),
}


def _file_type(quant: str) -> int:
    names = (quant.upper(), f"{quant.upper()}_M", f"{quant.upper()}_MOE")
    return next((number for number, name in FILE_TYPE_NAMES.items() if name in names), 0)


def build_files(model: str, quant: str = "q4_K", shards: int = 1) -> list[Gguf]:
    """The file, or the shards: the first holds metadata only, as in published sets."""
    spec = MODELS[model]
    metadata = {**spec.metadata, "general.file_type": _file_type(quant), **vocabulary()}
    tensors = spec.tensors(quant)
    if shards == 1:
        return [Gguf(metadata=metadata, tensors=tensors)]
    per_shard = -(-len(tensors) // (shards - 1))
    parts: list[Sequence[TensorSpec]] = [
        (),
        *(tensors[n * per_shard : (n + 1) * per_shard] for n in range(shards - 1)),
    ]
    return [
        Gguf(
            metadata={
                **({} if number else metadata),
                "split.no": Typed(ValueType.UINT16, number),
                "split.count": Typed(ValueType.UINT16, shards),
                "split.tensors.count": Typed(ValueType.INT32, len(tensors)),
            },
            tensors=part,
        )
        for number, part in enumerate(parts)
    ]


def write_files(out: Path, files: Sequence[Gguf]) -> list[Path]:
    """Write headers and holes; shards are named after `out` the way llama.cpp looks for them."""
    count = len(files)
    paths = [out] if count == 1 else _shard_paths(out, count)
    for path, file in zip(paths, files, strict=True):
        header = file.header()
        with path.open("wb") as handle:
            handle.write(header)
        if os.name == "nt":  # NTFS would reserve the space of a hole that isn't declared
            subprocess.run(["fsutil", "sparse", "setflag", str(path)], check=True)
        os.truncate(path, len(header) + file.weight_bytes())
    return paths


def _shard_paths(out: Path, count: int) -> list[Path]:
    stem = out.name.removesuffix(".gguf")
    return [out.with_name(f"{stem}-{n + 1:05}-of-{count:05}.gguf") for n in range(count)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", choices=sorted(MODELS), default="small-4")
    parser.add_argument("--quant", choices=sorted(TYPE_NUMBERS), default="q4_K")
    parser.add_argument("--shards", type=int, default=1)
    options = parser.parse_args()
    if not 1 <= options.shards <= 1000:
        parser.error("--shards takes 1 to 1000")
    for path in write_files(options.out, build_files(options.model, options.quant, options.shards)):
        print(f"{path}: {path.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
