r"""Write a GGUF file that is all header: the metadata and tensor infos of a real model's shape,
a made-up vocabulary with the real control tokens, and a hole in place of the weights.

    python scripts/make_header_gguf.py OUT.gguf --model small-4 --quant q4_K [--shards 3]
    python scripts/make_header_gguf.py OUT.gguf --quant UD-Q4_K_XL --type '^blk\.[0-3]\.=q8_0'

`--quant` is a tensor type for all matrices, or the name of a published mix that is imitated
(Small 4's to within 1 % of their sizes). `--type PATTERN=TYPE`, repeatable, overrides it for
tensors in whose name the regular expression is found. Such a file takes some megabytes on disk
whatever it claims to hold (on file systems with sparse files), loads in llama.cpp with `no_alloc`,
and serves planning; it can't generate text.
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
from quant_recipes import RECIPES, choose_type, file_type, type_rules

from localmistral.models.header import ValueType
from localmistral.models.shape import TokenType

VOCABULARY_SIZE = 131_072
SPECIAL_SLOTS = 1_000
MIN_VOCABULARY_SIZE = SPECIAL_SLOTS + 256 + 1
"""Every byte, and one merge: an empty list has no type."""
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
    """A model to imitate: its metadata without vocabulary, and its tensors' names and dims."""

    metadata: dict[str, Any]
    layer_count: int
    tensors: Callable[[int], list[tuple[str, tuple[int, ...]]]]
    """Takes the size of the vocabulary."""


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


def _ends(width: int, vocabulary_size: int, *, is_tied: bool) -> list[tuple[str, tuple[int, ...]]]:
    ends = [("token_embd", (width, vocabulary_size)), ("output_norm", (width,))]
    return ends if is_tied else [*ends, ("output", (width, vocabulary_size))]


def small_4_tensors(vocabulary_size: int) -> list[tuple[str, tuple[int, ...]]]:
    """36 layers of latent attention (q_lora 1024, kv_lora 256, 32 heads of 64 plain and 64 rotated
    elements, values of 128), 128 fused routed experts and 1 shared expert."""
    layer = {
        "attn_norm": (4096,),
        "attn_q_a": (4096, 1024),
        "attn_q_a_norm": (1024,),
        "attn_q_b": (1024, 32 * 128),
        "attn_kv_a_mqa": (4096, 256 + 64),
        "attn_kv_a_norm": (256,),
        "attn_k_b": (64, 256, 32),
        "attn_v_b": (256, 128, 32),
        "attn_output": (32 * 128, 4096),
        "ffn_norm": (4096,),
        "ffn_gate_inp": (4096, 128),
        "ffn_gate_up_exps": (4096, 2 * 2048, 128),
        "ffn_down_exps": (2048, 4096, 128),
        "ffn_gate_shexp": (4096, 2048),
        "ffn_up_shexp": (4096, 2048),
        "ffn_down_shexp": (2048, 4096),
    }
    return _ends(4096, vocabulary_size, is_tied=False) + _repeated(layer, 36)


def _repeated(layer: dict[str, tuple[int, ...]], count: int) -> list[tuple[str, tuple[int, ...]]]:
    return [(f"blk.{n}.{name}", dims) for n in range(count) for name, dims in layer.items()]


# Positions of the models that stretch their context: rope base, factor and original length.
_MINISTRAL_ROPE = (1_000_000.0, 16.0, 16_384)
_DEVSTRAL_ROPE = (100_000_000.0, 48.0, 8_192)


def _dense(
    architecture: str,
    name: str,
    *,
    layers: int,
    width: int,
    heads: int,
    feed_forward: int,
    context: int = 262_144,
    rope: tuple[float, float, int] | None = None,
    is_tied: bool = False,
) -> ModelSpec:
    """A dense model with grouped-query attention: 8 KV heads of 128, as all of Mistral's have."""
    values: dict[str, Any] = {
        "block_count": layers,
        "context_length": context,
        "embedding_length": width,
        "feed_forward_length": feed_forward,
        "attention.head_count": heads,
        "attention.head_count_kv": 8,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.key_length": 128,
        "attention.value_length": 128,
        "rope.dimension_count": 128,
        "rope.freq_base": rope[0] if rope else 1_000_000_000.0,
    }
    if rope:
        values |= {
            "attention.temperature_scale": 0.1,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": rope[1],
            "rope.scaling.original_context_length": rope[2],
            "rope.scaling.yarn_beta_fast": 32.0,
            "rope.scaling.yarn_beta_slow": 1.0,
            "rope.scaling.yarn_log_multiplier": 1.0,
        }
    layer = {
        "attn_norm": (width,),
        "attn_q": (width, heads * 128),
        "attn_k": (width, 8 * 128),
        "attn_v": (width, 8 * 128),
        "attn_output": (heads * 128, width),
        "ffn_norm": (width,),
        "ffn_gate": (width, feed_forward),
        "ffn_up": (width, feed_forward),
        "ffn_down": (feed_forward, width),
    }
    return ModelSpec(
        metadata={
            "general.architecture": architecture,
            "general.name": f"{name} (header only)",
            "general.size_label": name.split()[-1],
            **_prefixed(architecture, values),
        },
        layer_count=layers,
        tensors=lambda size: _ends(width, size, is_tied=is_tied) + _repeated(layer, layers),
    )


MODELS = {
    "small-4": ModelSpec(metadata=SMALL_4, layer_count=36, tensors=small_4_tensors),
    "medium-3.5": _dense(
        "mistral3",
        "Mistral Medium 3.5 128B",
        layers=88,
        width=12_288,
        heads=96,
        feed_forward=28_672,
        rope=_DEVSTRAL_ROPE,
    ),
    "devstral-small-2": _dense(
        "mistral3",
        "Devstral Small 2 2512 24B",
        layers=40,
        width=5120,
        heads=32,
        feed_forward=32_768,
        rope=_DEVSTRAL_ROPE,
    ),
    "small-3.2": _dense(
        "llama",
        "Mistral Small 3.2 2506 24B",
        layers=40,
        width=5120,
        heads=32,
        feed_forward=32_768,
        context=131_072,
    ),
    "ministral-3-14b": _dense(
        "mistral3",
        "Ministral 3 Instruct 2512 14B",
        layers=40,
        width=5120,
        heads=32,
        feed_forward=16_384,
        rope=_MINISTRAL_ROPE,
    ),
    "ministral-3-8b": _dense(
        "mistral3",
        "Ministral 3 Instruct 2512 8B",
        layers=34,
        width=4096,
        heads=32,
        feed_forward=14_336,
        rope=_MINISTRAL_ROPE,
    ),
    "ministral-3-3b": _dense(
        "mistral3",
        "Ministral 3 Instruct 2512 3B",
        layers=26,
        width=3072,
        heads=32,
        feed_forward=9216,
        rope=_MINISTRAL_ROPE,
        is_tied=True,
    ),
}


def build_files(
    model: str,
    quant: str = "q4_K",
    shards: int = 1,
    *,
    types: Sequence[tuple[str, str]] = (),
    vocabulary_size: int = VOCABULARY_SIZE,
) -> list[Gguf]:
    """The file, or the shards: the first holds metadata only, as in published sets.

    `types` are (pattern, type) pairs that go before what `quant` says.
    """
    spec = MODELS[model]
    metadata = {
        **spec.metadata,
        f"{spec.metadata['general.architecture']}.vocab_size": vocabulary_size,
        "general.file_type": file_type(quant),
        **vocabulary(vocabulary_size),
    }
    names = spec.tensors(vocabulary_size)
    is_tied = all(name != "output" for name, _ in names)
    rules = [*types, *type_rules(quant, spec.layer_count, is_tied=is_tied)]
    tensors = [
        TensorSpec(
            name=f"{name}.weight", dims=dims, type=choose_type(f"{name}.weight", dims, rules)
        )
        for name, dims in names
    ]
    return _cut_into_shards(metadata, tensors, shards)


def _cut_into_shards(
    metadata: dict[str, Any], tensors: Sequence[TensorSpec], shards: int
) -> list[Gguf]:
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


def _read_rule(text: str) -> tuple[str, str]:
    pattern, equals, kind = text.rpartition("=")
    if not equals or kind not in TYPE_NUMBERS:
        raise argparse.ArgumentTypeError(f"{text!r} is not PATTERN=TYPE with a type of ggml's")
    return pattern, kind


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", choices=sorted(MODELS), default="small-4")
    parser.add_argument("--quant", choices=[*RECIPES, *sorted(TYPE_NUMBERS)], default="q4_K")
    parser.add_argument("--type", type=_read_rule, action="append", default=[], dest="types")
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY_SIZE)
    options = parser.parse_args()
    if not 1 <= options.shards <= 1000:
        parser.error("--shards takes 1 to 1000")
    if not MIN_VOCABULARY_SIZE <= options.vocabulary <= VOCABULARY_SIZE:
        parser.error(f"--vocabulary takes {MIN_VOCABULARY_SIZE} to {VOCABULARY_SIZE}")
    files = build_files(
        options.model,
        options.quant,
        options.shards,
        types=options.types,
        vocabulary_size=options.vocabulary,
    )
    for path in write_files(options.out, files):
        print(f"{path}: {path.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
