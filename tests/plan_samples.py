"""Models and machines to plan for: shapes like the real files' without a file, and cards by name.

Tensors have the real names and dimensions; types are mixed the way published quants mix them (finer
ones for attention, shared experts and some layers' `ffn_down`), so that sizes come out within a few
percent of the real ones. Norms and other vectors are left out: they are under 0.1 %.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

from localmistral.fit.machine import GIB, Cpu, Gpu, Machine, Ram
from localmistral.fit.plan import Candidate, PlannedFile
from localmistral.models.shape import FileKind, ModelShape, Tensor, Tokenizer, layer_of, role_of
from localmistral.models.tensor_types import TENSOR_TYPES

VOCABULARY = 131_072
_TYPES = {kind.name: kind for kind in TENSOR_TYPES.values()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Types by part; `fine` is what `down` has in the layers that llama.cpp gives more bits."""

    plain: str
    down: str
    fine: str
    dense: str
    output: str = "q6_K"
    embedding: str = "q4_K"


# of Small 4: `plain` is the experts' gate_up
MOE_RECIPES = {
    "UD-IQ1_M": Recipe(plain="iq1_m", down="iq2_xxs", fine="iq3_xxs", dense="q6_K"),
    "UD-IQ2_M": Recipe(plain="iq2_xxs", down="iq2_s", fine="iq3_xxs", dense="q6_K"),
    "UD-IQ3_XXS": Recipe(plain="iq2_s", down="iq3_xxs", fine="iq3_xxs", dense="q6_K"),
    "UD-IQ3_S": Recipe(plain="iq2_s", down="iq3_s", fine="iq3_s", dense="q6_K"),
    "UD-Q3_K_M": Recipe(plain="iq3_xxs", down="iq4_xs", fine="q4_K", dense="q8_0"),
    "UD-IQ4_XS": Recipe(plain="iq3_s", down="iq4_xs", fine="q4_K", dense="q8_0"),
    "MXFP4_MOE": Recipe(plain="mxfp4", down="mxfp4", fine="q6_K", dense="q8_0"),
    "UD-Q4_K_M": Recipe(plain="q4_K", down="q4_K", fine="q6_K", dense="q8_0"),
    "UD-Q4_K_XL": Recipe(plain="q4_K", down="q4_K", fine="q6_K", dense="q8_0", embedding="q8_0"),
    "UD-Q5_K_XL": Recipe(plain="q5_K", down="q5_K", fine="q6_K", dense="q8_0"),
    "UD-Q6_K": Recipe(plain="q6_K", down="q6_K", fine="q6_K", dense="q8_0", embedding="q6_K"),
    "Q8_0": Recipe(
        plain="q8_0", down="q8_0", fine="q8_0", dense="q8_0", output="q8_0", embedding="q8_0"
    ),
}
DENSE_RECIPES = {
    "Q2_K": Recipe(plain="q2_K", down="q3_K", fine="q3_K", dense="q3_K"),
    "IQ3_XXS": Recipe(plain="iq3_xxs", down="iq3_s", fine="q4_K", dense="iq3_s"),
    "Q3_K_M": Recipe(plain="q3_K", down="q4_K", fine="q5_K", dense="q4_K"),
    "IQ4_XS": Recipe(plain="iq4_xs", down="iq4_xs", fine="q5_K", dense="iq4_xs"),
    "Q4_K_M": Recipe(plain="q4_K", down="q4_K", fine="q6_K", dense="q4_K"),
    "Q5_K_M": Recipe(plain="q5_K", down="q5_K", fine="q6_K", dense="q5_K", embedding="q5_K"),
    "Q6_K": Recipe(plain="q6_K", down="q6_K", fine="q6_K", dense="q6_K", embedding="q6_K"),
    "Q8_0": Recipe(
        plain="q8_0", down="q8_0", fine="q8_0", dense="q8_0", output="q8_0", embedding="q8_0"
    ),
    "BF16": Recipe(
        plain="bf16", down="bf16", fine="bf16", dense="bf16", output="bf16", embedding="bf16"
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseModel:
    """Hyper-parameters of a dense model with grouped-query attention, heads of 128."""

    layers: int
    width: int
    heads: int
    feed_forward: int
    mmproj_bytes: int
    kv_heads: int = 8
    is_tied: bool = False
    context_limit: int = 262_144


DENSE_MODELS = {
    "mistral-medium-3.5": DenseModel(
        layers=88, width=12_288, heads=96, feed_forward=28_672, mmproj_bytes=5_357_971_702
    ),
    "mistral-small-3.2": DenseModel(
        layers=40,
        width=5120,
        heads=32,
        feed_forward=32_768,
        mmproj_bytes=878_000_000,
        context_limit=131_072,
    ),
    "ministral-3-14b": DenseModel(
        layers=40, width=5120, heads=32, feed_forward=16_384, mmproj_bytes=878_000_000
    ),
    "ministral-3-8b": DenseModel(
        layers=34, width=4096, heads=32, feed_forward=14_336, mmproj_bytes=858_000_000
    ),
    "ministral-3-3b": DenseModel(
        layers=26, width=3072, heads=32, feed_forward=9216, mmproj_bytes=842_000_000, is_tied=True
    ),
}


def tensor(name: str, kind: str, *dims: int) -> Tensor:
    """One tensor with its bytes by type."""
    row = _TYPES[kind]
    elements = prod(dims)
    return Tensor(
        name=f"{name}.weight",
        dims=dims,
        type=kind,
        elements=elements,
        bytes=elements // row.block_elements * row.block_bytes,
        file_index=0,
        layer=layer_of(name + "."),
        role=role_of(f"{name}.weight"),
    )


def has_more_bits(layer: int, count: int) -> bool:
    """llama.cpp's `use_more_bits`: the first and last eighth, and every third between."""
    eighth = count // 8
    return layer < eighth or layer >= 7 * count // 8 or (layer - eighth) % 3 == 2


def small_4_shape(quant: str, layers: int = 36) -> ModelShape:
    """Mistral Small 4's shape in a mix of types like the named quant's."""
    recipe = MOE_RECIPES[quant]
    tensors = [
        tensor("token_embd", recipe.embedding, 4096, VOCABULARY),
        tensor("output", recipe.output, 4096, VOCABULARY),
    ]
    for number in range(layers):
        tensors += _moe_layer(number, recipe, has_more_bits(number, layers))
    return ModelShape(
        **_basics(tensors),
        architecture="mistral4",
        name="Mistral Small 4",
        layer_count=layers,
        embedding_length=4096,
        context_length=1_048_576,
        vocabulary_size=VOCABULARY,
        feed_forward_lengths=(12_288,) * layers,
        head_counts=(32,) * layers,
        kv_head_counts=(1,) * layers,
        key_length=320,
        value_length=256,
        key_length_mla=128,
        value_length_mla=128,
        q_lora_rank=1024,
        kv_lora_rank=256,
        expert_count=128,
        expert_used_count=4,
        expert_shared_count=1,
        expert_feed_forward_length=2048,
    )


def _basics(tensors: Sequence[Tensor]) -> dict[str, Any]:
    return {
        "files": (Path("model.gguf"),),
        "file_bytes": (sum(t.bytes for t in tensors),),
        "version": 3,
        "kind": FileKind.MODEL,
        "size_label": "",
        "file_type": None,
        "tokenizer": Tokenizer(token_count=VOCABULARY),
        "sampling": (),
        "tensors": tuple(tensors),
    }


def _moe_layer(number: int, recipe: Recipe, is_fine: bool) -> Iterator[Tensor]:
    dense = recipe.dense
    for name, *dims in (
        ("attn_q_a", 4096, 1024),
        ("attn_q_b", 1024, 4096),
        ("attn_kv_a_mqa", 4096, 320),
        ("attn_v_b", 256, 128, 32),
        ("attn_output", 4096, 4096),
        ("ffn_gate_shexp", 4096, 2048),
        ("ffn_up_shexp", 4096, 2048),
        ("ffn_down_shexp", 2048, 4096),
    ):
        yield tensor(f"blk.{number}.{name}", dense, *dims)
    yield tensor(f"blk.{number}.attn_k_b", "q8_0", 64, 256, 32)
    yield tensor(f"blk.{number}.ffn_gate_inp", "f32", 4096, 128)
    yield tensor(f"blk.{number}.ffn_gate_up_exps", recipe.plain, 4096, 4096, 128)
    down = recipe.fine if is_fine else recipe.down
    yield tensor(f"blk.{number}.ffn_down_exps", down, 2048, 4096, 128)


def dense_shape(model: str, quant: str, layers: int = 0) -> ModelShape:
    """A dense model's shape in a mix of types like the named quant's; `layers` cuts it short."""
    spec, recipe = DENSE_MODELS[model], DENSE_RECIPES[quant]
    spec = replace(spec, layers=layers or spec.layers)
    tensors = [tensor("token_embd", recipe.embedding, spec.width, VOCABULARY)]
    if not spec.is_tied:
        tensors.append(tensor("output", recipe.output, spec.width, VOCABULARY))
    for number in range(spec.layers):
        tensors += _dense_layer(number, spec, recipe, has_more_bits(number, spec.layers))
    return ModelShape(
        **_basics(tensors),
        architecture="mistral3",
        name=model,
        layer_count=spec.layers,
        embedding_length=spec.width,
        context_length=spec.context_limit,
        vocabulary_size=VOCABULARY,
        feed_forward_lengths=(spec.feed_forward,) * spec.layers,
        head_counts=(spec.heads,) * spec.layers,
        kv_head_counts=(spec.kv_heads,) * spec.layers,
        key_length=128,
        value_length=128,
    )


def _dense_layer(number: int, spec: DenseModel, recipe: Recipe, is_fine: bool) -> Iterator[Tensor]:
    fine = recipe.fine if is_fine else recipe.dense
    down = recipe.fine if is_fine else recipe.down
    heads, kv_heads = spec.heads * 128, spec.kv_heads * 128
    for name, kind, *dims in (
        ("attn_q", recipe.dense, spec.width, heads),
        ("attn_k", recipe.dense, spec.width, kv_heads),
        ("attn_v", fine, spec.width, kv_heads),
        ("attn_output", recipe.dense, heads, spec.width),
        ("ffn_gate", recipe.plain, spec.width, spec.feed_forward),
        ("ffn_up", recipe.plain, spec.width, spec.feed_forward),
        ("ffn_down", down, spec.feed_forward, spec.width),
    ):
        yield tensor(f"blk.{number}.{name}", str(kind), *(int(n) for n in dims))


@cache
def candidates(model: str, *quants: str) -> tuple[Candidate, ...]:
    """All, or the named, quants of a model as a plan may choose them."""
    recipes = MOE_RECIPES if model == "mistral-small-4" else DENSE_RECIPES
    return tuple(_candidate(model, quant) for quant in quants or recipes)


def _candidate(model: str, quant: str) -> Candidate:
    is_moe = model == "mistral-small-4"
    shape = small_4_shape(quant) if is_moe else dense_shape(model, quant)
    mmproj_bytes = 857_078_496 if is_moe else DENSE_MODELS[model].mmproj_bytes
    return Candidate(
        model=model,
        quant=quant,
        shape=shape,
        context_limit=262_144 if is_moe else DENSE_MODELS[model].context_limit,
        files=(PlannedFile(path=f"{model}-{quant}.gguf", bytes=shape.weight_bytes),),
        mmproj=PlannedFile(path="mmproj-F16.gguf", bytes=mmproj_bytes),
        repository=f"example/{model}-GGUF",
    )


@cache
def siblings() -> tuple[tuple[Candidate, ...], ...]:
    """What is proposed where Small 4 can't run, the largest first."""
    names = ("ministral-3-14b", "ministral-3-8b", "ministral-3-3b")
    return tuple(candidates(name) for name in names)


# name: GiB, GB/s, TFLOP/s
CARDS = {
    "2G": (2, 112, 5),
    "8G": (8, 256, 20),
    "3060": (12, 360, 51),
    "4060 Ti": (16, 288, 88),
    "3080": (10, 760, 119),
    "3080 20G": (20, 760, 119),
    "3090": (24, 936, 142),
    "4070": (12, 504, 117),
    "4090": (24, 1008, 330),
    "5090": (32, 1792, 419),
    "RTX PRO 6000": (96, 1792, 500),
    "RTX 6000 Ada": (48, 960, 364),
}


def card(name: str, *, busy_gib: float = 0.0, backend: str = "cuda") -> Gpu:
    """A card by name, `busy_gib` of it taken by a desktop."""
    size, bandwidth, flops = CARDS[name]
    return Gpu(
        name=name,
        total_bytes=size * GIB,
        free_bytes=int((size - busy_gib) * GIB),
        bandwidth=bandwidth * 1e9,
        flops=flops * 1e12,
        backend=backend,
    )


def machine(
    *cards: Gpu, ram: float = 64, bandwidth: float = 51e9, cores: int = 8, peer: bool = False
) -> Machine:
    """A machine with `ram` GiB, 2 GiB of them in use."""
    return Machine(
        gpus=cards,
        ram=Ram(
            total_bytes=int(ram * GIB),
            available_bytes=int(max(0, ram - 2) * GIB),
            bandwidth=bandwidth,
        ),
        cpu=Cpu(name="test", cores=cores),
        has_peer_access=peer,
        is_real=False,
    )
