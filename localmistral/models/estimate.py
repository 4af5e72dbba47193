"""The shape of a model that isn't on this disk, worked out from the catalogue alone.

Names and dimensions of the tensors are those of published files. Their types follow llama.cpp's own
mixes for the plain names (`Q4_K_M`: src/llama-quant.cpp; the totals come out as the published
sizes to the kilobyte), and are a likely mix, scaled to the published size, for the others. Reads
no file and no network, so nothing here is more exact than `models.toml`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from localmistral.models.catalog import Mmproj, Model, Quant, Shape
from localmistral.models.filenames import parse_file_name
from localmistral.models.shape import (
    FILE_TYPE_NAMES,
    FileKind,
    ModelShape,
    Rope,
    Tensor,
    TensorRole,
    Tokenizer,
    layer_of,
    role_of,
)
from localmistral.models.tensor_types import TENSOR_TYPES, TensorType

HEADER_BYTES = 8 << 20
"""The vocabulary and metadata before the weights: 7.9 to 8.4 MB in published files of 131,072
tokens (the first shard of Small 4 UD-Q4_K_XL is nothing else: 7,875,616 bytes)."""
MMPROJ_16_BIT_BYTES = 857_078_496
"""Small 4's image encoder at 16 bits: the one these models share, but for the last projection."""
EXACT_TOLERANCE = 0.002
ROUNDED_TOLERANCE = 0.01
"""How far a known mix may be from the published size before it is scaled: sizes such as "13.3 GiB"
or "about 68 GB" are less certain than the mix itself."""

_Draft = tuple[str, tuple[int, ...]]  # a tensor's name and dimensions

_TYPES = {kind.name: kind for kind in TENSOR_TYPES.values()}
_I_LADDER = ("iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "iq4_xs")
_K_LADDER = ("q2_K", "q3_K", "q4_K")
_UPPER_LADDER = ("q5_K", "q6_K", "q8_0", "f16")
# Quants that are named after no single type.
_NAMED_OTHERWISE = {"IQ2_M": "iq2_s", "IQ3_M": "iq3_s"}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Mix:
    """Types by what a tensor is for. `finer` goes to values and down projections of the layers
    that llama.cpp thinks worth it; `is_published`: the rule is known, not guessed."""

    base: str
    finer: str
    attention: str
    embedding: str
    output: str
    is_published: bool


_PUBLISHED = {
    name: _Mix(
        base=base, finer=finer, attention=base, embedding=base, output=output, is_published=True
    )
    for name, base, finer, output in (
        ("Q4_K_M", "q4_K", "q6_K", "q6_K"),
        ("Q5_K_M", "q5_K", "q6_K", "q6_K"),
        ("IQ4_XS", "iq4_xs", "iq4_xs", "q6_K"),
        ("Q6_K", "q6_K", "q6_K", "q6_K"),
        ("Q8_0", "q8_0", "q8_0", "q8_0"),
    )
}


def estimate_bytes(model: Model, quant: Quant) -> int | None:
    """Bytes of the quant's files together: the catalogue's figure, else what a published mix comes
    to for a dense model; None where neither tells."""
    if quant.bytes is not None:
        return quant.bytes
    if model.shape.experts or quant.name not in _PUBLISHED:
        return None
    drafts = _draft(model.shape)
    return HEADER_BYTES + _sum_bytes(drafts, _types(drafts, _PUBLISHED[quant.name], model.shape))


def estimate_shape(model: Model, quant: Quant) -> ModelShape:
    """What the header of that quant would say, as far as planning needs it.

    `file_bytes` sum to `estimate_bytes`, and the tensors to that less the header within 1 %.
    ValueError for a quant whose size is unknown.
    """
    size = estimate_bytes(model, quant)
    if size is None:
        raise ValueError(f"the size of {model.name}:{quant.name} is unknown")
    shape = model.shape
    drafts, types = _draft(shape), _mix_types(model, quant, size)
    files = _share_out(quant, size)
    file_types = {name: number for number, name in FILE_TYPE_NAMES.items()}
    latent = shape.kv_lora > 0
    return ModelShape(
        files=tuple(Path(path) for path, _ in files),
        file_bytes=tuple(count for _, count in files),
        version=3,
        kind=FileKind.MODEL,
        architecture=model.arch,
        name=model.name,
        size_label="",
        file_type=file_types.get(quant.name.removeprefix("UD-")),
        layer_count=shape.layers,
        embedding_length=shape.width,
        context_length=model.context,
        vocabulary_size=shape.vocabulary,
        feed_forward_lengths=(shape.feed_forward,) * shape.layers,
        head_counts=(shape.heads,) * shape.layers,
        kv_head_counts=(shape.kv_heads,) * shape.layers,
        key_length=shape.kv_lora + shape.rope_length if latent else shape.head_length,
        value_length=shape.kv_lora if latent else shape.head_length,
        key_length_mla=shape.head_length if latent else 0,
        value_length_mla=shape.head_length if latent else 0,
        q_lora_rank=shape.q_lora,
        kv_lora_rank=shape.kv_lora,
        rope=Rope(dimension_count=shape.rope_length or shape.head_length),
        expert_count=shape.experts,
        expert_used_count=shape.experts_used,
        expert_shared_count=shape.experts_shared,
        expert_feed_forward_length=shape.expert_width,
        tokenizer=Tokenizer(model="gpt2", pre="tekken", token_count=shape.vocabulary),
        sampling=(),
        tensors=tuple(
            _tensor(name, dims, kind) for (name, dims), kind in zip(drafts, types, strict=True)
        ),
    )


def estimate_mmproj_bytes(mmproj: Mmproj) -> int:
    """Bytes of an image encoder: the catalogue's figure, else by the type in the file's name."""
    if mmproj.bytes is not None:
        return mmproj.bytes
    named = parse_file_name(mmproj.file.path.rpartition("/")[2]).quant or "F16"
    kind = _TYPES.get(named.lower(), _TYPES["f16"])
    return int(MMPROJ_16_BIT_BYTES * _bits(kind) / 16)


def _draft(shape: Shape) -> list[_Draft]:
    """Every tensor's name and dimensions, in ggml's order (row length first)."""
    drafts: list[_Draft] = [
        ("token_embd", (shape.width, shape.vocabulary)),
        ("output_norm", (shape.width,)),
    ]
    if not shape.tied:
        drafts.append(("output", (shape.width, shape.vocabulary)))
    for number in range(shape.layers):
        attention = _latent_attention(shape) if shape.kv_lora else _attention(shape)
        layer = [*attention, *(_experts(shape) if shape.experts else _feed_forward(shape))]
        drafts += [(f"blk.{number}.{name}", dims) for name, dims in layer]
    return [(f"{name}.weight", dims) for name, dims in drafts]


def _attention(shape: Shape) -> list[_Draft]:
    width, own, shared = shape.width, shape.heads * shape.head_length, shape.kv_heads
    return [
        ("attn_norm", (width,)),
        ("attn_q", (width, own)),
        ("attn_k", (width, shared * shape.head_length)),
        ("attn_v", (width, shared * shape.head_length)),
        ("attn_output", (own, width)),
    ]


def _latent_attention(shape: Shape) -> list[_Draft]:
    width, heads, length = shape.width, shape.heads, shape.head_length
    return [
        ("attn_norm", (width,)),
        ("attn_q_a", (width, shape.q_lora)),
        ("attn_q_a_norm", (shape.q_lora,)),
        ("attn_q_b", (shape.q_lora, heads * length)),
        ("attn_kv_a_mqa", (width, shape.kv_lora + shape.rope_length)),
        ("attn_kv_a_norm", (shape.kv_lora,)),
        ("attn_k_b", (length - shape.rope_length, shape.kv_lora, heads)),
        ("attn_v_b", (shape.kv_lora, length, heads)),
        ("attn_output", (heads * length, width)),
    ]


def _feed_forward(shape: Shape) -> list[_Draft]:
    return [
        ("ffn_norm", (shape.width,)),
        ("ffn_gate", (shape.width, shape.feed_forward)),
        ("ffn_up", (shape.width, shape.feed_forward)),
        ("ffn_down", (shape.feed_forward, shape.width)),
    ]


def _experts(shape: Shape) -> list[_Draft]:
    width, inner, experts = shape.width, shape.expert_width, shape.experts
    shared = inner * shape.experts_shared
    return [
        ("ffn_norm", (width,)),
        ("ffn_gate_inp", (width, experts)),
        ("ffn_gate_up_exps", (width, 2 * inner, experts)),
        ("ffn_down_exps", (inner, width, experts)),
        ("ffn_gate_shexp", (width, shared)),
        ("ffn_up_shexp", (width, shared)),
        ("ffn_down_shexp", (shared, width)),
    ]


def _choose_mix(quant: str, shape: Shape) -> _Mix:
    """The published mix of that name, else what Unsloth's dynamic quants look like: the bulk as the
    name says. Beside routed experts, where they weigh little, attention and shared experts are
    fine in either: so Small 4's Q4_K_M comes to the speed that was measured of it."""
    if quant in _PUBLISHED:
        mix = _PUBLISHED[quant]
        return replace(mix, attention="q8_0") if shape.experts else mix
    plain = quant.removeprefix("UD-")
    names = [name for name in _TYPES if plain.startswith(name.upper())]
    base = _NAMED_OTHERWISE.get(plain) or max(names, key=len, default="q4_K")
    bits = _bits(_TYPES[base])
    return _Mix(
        base=base,
        finer=base,
        attention=("q8_0" if bits > 3 else "q6_K") if shape.experts else base,
        embedding=base if bits > 5 else "q4_K",
        output=base if bits > 7 else "q6_K",
        is_published=False,
    )


def _types(drafts: Sequence[_Draft], mix: _Mix, shape: Shape) -> list[str]:
    return [_type_of(name, dims, mix, shape) for name, dims in drafts]


def _type_of(name: str, dims: Sequence[int], mix: _Mix, shape: Shape) -> str:
    part = name.removesuffix(".weight").rpartition(".")[2]
    if len(dims) == 1 or part == "ffn_gate_inp":
        return "f32"
    if part == "token_embd":
        return mix.output if shape.tied else mix.embedding
    if part == "output":
        return mix.output
    if part in ("attn_v", "ffn_down", "ffn_down_exps") and _is_worth_more(name, shape.layers):
        kind = mix.finer
    else:
        is_bulk = part in ("ffn_gate", "ffn_up", "ffn_down") or role_of(name) is TensorRole.EXPERT
        kind = mix.base if is_bulk else mix.attention
    # Rows that are too short for a block of 256 get a type with short blocks.
    return kind if dims[0] % _TYPES[kind].block_elements == 0 else "q8_0"


def _is_worth_more(name: str, layers: int) -> bool:
    """llama-quant.cpp's use_more_bits: the outer eighths, and every third layer between them."""
    layer, eighth = layer_of(name) or 0, layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def _mix_types(model: Model, quant: Quant, size: int) -> list[str]:
    """A type for each tensor, so that they come to `size` less the header."""
    drafts, mix = _draft(model.shape), _choose_mix(quant.name, model.shape)
    types = _types(drafts, mix, model.shape)
    missing = size - HEADER_BYTES - _sum_bytes(drafts, types)
    tolerance = EXACT_TOLERANCE if quant.exact else ROUNDED_TOLERANCE
    is_dense = not model.shape.experts  # the rule for experts differs between publishers
    if mix.is_published and is_dense and abs(missing) <= tolerance * size:
        return types
    return _scale(drafts, types, missing, _ladder(mix.base))


def _scale(
    drafts: Sequence[_Draft], types: list[str], missing: int, ladder: Sequence[str]
) -> list[str]:
    """Move the bulk of the weights up or down the ladder, a tensor and a rung at a time, while that
    brings the sum nearer. Outer layers and down projections are the first to gain and the last
    to lose, as in published mixes."""
    types, order = list(types), _bulk_by_worth(drafts)
    moved = True
    while moved:
        moved = False
        for index in order if missing > 0 else reversed(order):
            at = ladder.index(types[index]) + (1 if missing > 0 else -1)
            if not 0 <= at < len(ladder):
                continue
            dims = drafts[index][1]
            gain = _bytes(dims, ladder[at]) - _bytes(dims, types[index])
            if abs(missing - gain) < abs(missing):
                types[index], missing, moved = ladder[at], missing - gain, True
    return types


def _bulk_by_worth(drafts: Sequence[_Draft]) -> list[int]:
    names = [name for name, _ in drafts]
    bulk = [n for n, name in enumerate(names) if role_of(name) is TensorRole.EXPERT]
    if not bulk:
        bulk = [n for n, name in enumerate(names) if "ffn_" in name and "norm" not in name]
    middle = (layer_of(names[bulk[-1]]) or 0) / 2
    return sorted(
        bulk, key=lambda n: ("down" not in names[n], -abs((layer_of(names[n]) or 0) - middle))
    )


def _ladder(base: str) -> tuple[str, ...]:
    """Types that a mix around `base` is made of, by size."""
    if base in _K_LADDER:
        return _K_LADDER + _UPPER_LADDER
    if base in _UPPER_LADDER:
        return ("q4_K", *_UPPER_LADDER)
    lower = _I_LADDER if base in _I_LADDER else (base,)
    return lower + _UPPER_LADDER


def _share_out(quant: Quant, size: int) -> list[tuple[str, int]]:
    """The quant's files and their bytes; where only the total is known, equal parts of it. Files of
    unknown name go by the pattern that finds them."""
    paths = [file.path for file in quant.files] or [f"*{quant.name}.gguf"]
    known = [file.bytes for file in quant.files if file.bytes is not None]
    if len(known) == len(paths):
        return list(zip(paths, known, strict=True))
    part, rest = divmod(size, len(paths))
    return [(path, part + (n < rest)) for n, path in enumerate(paths)]


def _tensor(name: str, dims: tuple[int, ...], kind: str) -> Tensor:
    return Tensor(
        name=name,
        dims=dims,
        type=kind,
        elements=prod(dims),
        bytes=_bytes(dims, kind),
        file_index=0,
        layer=layer_of(name),
        role=role_of(name),
    )


def _sum_bytes(drafts: Sequence[_Draft], types: Sequence[str]) -> int:
    return sum(_bytes(dims, kind) for (_, dims), kind in zip(drafts, types, strict=True))


def _bytes(dims: Sequence[int], kind: str) -> int:
    return prod(dims) // _TYPES[kind].block_elements * _TYPES[kind].block_bytes


def _bits(kind: TensorType) -> float:
    return 8 * kind.block_bytes / kind.block_elements
