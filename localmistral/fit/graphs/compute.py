"""Compute buffers: what a device needs beside weights and cache while a batch is computed.

Found by replaying the graph's allocations (`graph`, `arena`). For mistral4, and for mistral3 and
llama without experts, that gave llama.cpp's own sizes to a few KB for nearly all of some thousand
random placements (scripts/check_compute_buffers.py); the few misses, up to 12 % too little, had
whole layers in RAM beside a quantised cache or no flash attention, or a cache in f32. Llama with
experts (Mixtral) was up to half too small with all experts in RAM on three cards. Other
architectures have similar graphs, and get a margin; those with sliding windows come out up to
twice too large. What only some backends do comes on top: an f16 copy of a quantised
cache, weights that are computed with on a card though they are in RAM, four copies of the inputs
under pipeline parallelism. Knows no budgets.

All figures are those of a dry load: the real one has its norms on the device of the layer, so that
cards after the first receive one copy of the residual stream less.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from localmistral.fit.graphs.arena import CELLS, TOKENS, Gauge, Tape
from localmistral.fit.graphs.dimensions import Dimensions, read_dimensions
from localmistral.fit.graphs.graph import GraphWriter
from localmistral.fit.graphs.part import LAYERS_OF_A_KIND, Entry, Experts, Part
from localmistral.fit.kv import pad_cells, row_bytes
from localmistral.fit.machine import Machine
from localmistral.fit.placement import Placement
from localmistral.fit.plan import Load
from localmistral.models.shape import ModelShape

Role = Literal["only", "first", "middle", "last"]
"""A card's place among those that hold layers."""

PIPELINE_BACKENDS = ("cuda", "rocm", "vulkan", "sycl", "rpc")
"""Backends whose devices have events and asynchronous copies (their `get_props` in ggml)."""
PIPELINE_COPIES = 4
"""GGML_SCHED_MAX_COPIES: batches that are on their way at once."""
OFFLOAD_BACKENDS = ("cuda", "rocm", "vulkan", "sycl", "metal")
"""Backends that compute with weights in RAM when a batch has 32 tokens or more (`offload_op`):
the first card copies one tensor at a time into its compute buffer."""
F16_CACHE_BACKENDS = ("cuda", "rocm")
"""Backends whose attention works on f16 keys and values, and makes such copies of others
(ggml-cuda/fattn-common.cuh)."""

EXACT_ARCHITECTURES = ("llama", "mistral3", "mistral4")
OTHER_MARGIN = 1.08
"""For architectures whose graphs are not written down here, only similar ones."""
_SLACK_BYTES = 4 << 10
"""Inputs of a few bytes a token that some graphs have and others don't."""

MAX_LAYERS_FROM_RAM = 4
"""Layers of a kind after which the buffer of a card that computes with layers in RAM was never
seen to grow."""

WeightsInRam = tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """The part of the graph that a card runs, and how: with `copies` of its inputs, f16 copies of
    `f16_cell_elements` of each cell, and `weights`, tensors in RAM that it computes with."""

    part: Part
    copies: int = 1
    f16_cell_elements: int = 0
    weights: WeightsInRam = ()


def count_tokens(load: Load) -> int:
    """Tokens of the largest graph: a ubatch, as far as batch and cache allow, shared out evenly."""
    tokens = min(load.ubatch, load.batch, pad_cells(load.cells))
    return -(-tokens // load.sequences) * load.sequences


def card_bytes(shape: ModelShape, load: Load, piece: Piece) -> int:
    """The compute buffer of a card that runs `piece`."""
    size = _replay(read_dimensions(shape), count_tokens(load), _Cache.of(load), piece)
    return _with_margin(shape, size)


def _with_margin(shape: ModelShape, size: int) -> int:
    is_exact = shape.architecture in EXACT_ARCHITECTURES
    return (size if is_exact else int(size * OTHER_MARGIN)) + _SLACK_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cache:
    """`cells` are those of each of `sequences`."""

    cells: int
    sequences: int
    kv_type: str
    flash_attention: bool

    @classmethod
    def of(cls, load: Load) -> "_Cache":
        return cls(
            cells=pad_cells(load.cells // load.sequences),
            sequences=load.sequences,
            kv_type=load.kv_type,
            flash_attention=load.flash_attention,
        )


@lru_cache(maxsize=4096)
def _replay(dimensions: Dimensions, tokens: int, cache: _Cache, piece: Piece) -> int:
    present = [(name, size) for name, size in piece.weights if size]
    names = tuple((name, -number) for number, (name, _) in enumerate(present, 1))
    gauge = _gauge(dimensions, replace(cache, cells=CELLS), replace(piece, weights=names))
    return gauge.measure(tokens, cache.cells, tuple(size for _, size in present))


@lru_cache(maxsize=1024)
def _gauge(dimensions: Dimensions, cache: _Cache, piece: Piece) -> Gauge:
    tape = Tape(copies=piece.copies)
    _make_writer(dimensions, tape, TOKENS, cache, piece).write(piece.part)
    return Gauge(tape.compile())


def _make_writer(
    dimensions: Dimensions, tape: Tape, tokens: int, cache: _Cache, piece: Piece
) -> GraphWriter:
    return GraphWriter(
        dimensions=dimensions,
        tape=tape,
        tokens=tokens,
        cells=cache.cells,
        sequences=cache.sequences,
        flash_attention=cache.flash_attention,
        is_kv_quantised=cache.kv_type not in ("f32", "f16", "bf16"),
        is_kv_f32=cache.kv_type == "f32",
        f16_cell_elements=piece.f16_cell_elements,
        weights_in_ram=dict(piece.weights),
        cache_bytes=_cache_copies(dimensions, cache),
    )


def f16_cell_elements(shape: ModelShape, load: Load, backend: str) -> int:
    """Elements of a cell that attention copies to f16: none of an f16 cache, nor of an f32 one,
    which llama.cpp itself converts first."""
    if not load.flash_attention or load.kv_type in ("f16", "f32"):
        return 0
    if backend not in F16_CACHE_BACKENDS:
        return 0
    dimensions = read_dimensions(shape)
    return dimensions.key + (0 if dimensions.is_latent else dimensions.value)


def gpu_compute_bytes(
    shape: ModelShape,
    load: Load,
    *,
    role: Role,
    is_pipelined: bool,
    is_whole: bool,
    backend: str = "cuda",
    offloaded_expert_bytes: int = 0,
) -> int:
    """A card's compute buffer when no more of the placement is known: the largest it may be.

    `is_whole` is False where layers or experts are in RAM; `offloaded_expert_bytes` is the largest
    tensor of experts that the card computes with though it is in RAM.
    """
    elements = f16_cell_elements(shape, load, backend)
    copies = PIPELINE_COPIES if is_pipelined else 1
    pieces = _possible_pieces(role, is_whole, backend, copies, elements, offloaded_expert_bytes)
    size = _replay_largest(read_dimensions(shape), count_tokens(load), _Cache.of(load), pieces)
    return _with_margin(shape, size)


@lru_cache(maxsize=4096)
def _replay_largest(
    dimensions: Dimensions, tokens: int, cache: _Cache, pieces: tuple[Piece, ...]
) -> int:
    return max(_replay(dimensions, tokens, cache, piece) for piece in pieces)


@lru_cache(maxsize=256)
def _possible_pieces(
    role: Role,
    is_whole: bool,
    backend: str,
    copies: int,
    elements: int,
    offloaded_expert_bytes: int,
) -> tuple[Piece, ...]:
    weights = tuple((name, offloaded_expert_bytes) for name in _EXPERT_NAMES)
    return tuple(
        Piece(
            part=Part(
                entry=entry,
                has_last_layer=role in ("only", "last"),
                has_output=role in ("only", "last"),
                dense=min(LAYERS_OF_A_KIND, len(experts)),
                experts=experts,
            ),
            copies=copies,
            f16_cell_elements=elements,
            weights=weights if offloaded_expert_bytes else (),
        )
        for entry in _possible_entries(role, is_whole)
        for experts in _possible_experts(role, is_whole, backend)
    )


_EXPERT_NAMES = ("ffn_gate_up_exps", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")


def _possible_entries(role: Role, is_whole: bool) -> tuple[Entry, ...]:
    if role in ("middle", "last"):
        return ("norm",)
    return ("embedding",) if is_whole else ("embedding", "parts")


def _possible_experts(role: Role, is_whole: bool, backend: str) -> list[tuple[Experts, ...]]:
    """Numbers and orders of layers, with experts here and in RAM, that lead to different sizes."""
    one: tuple[Experts, ...] = ("here",)
    here = one * LAYERS_OF_A_KIND
    if is_whole:
        return [here, one]
    place = experts_in_ram_place(backend, is_first=role in ("only", "first"))
    there = (place,) * LAYERS_OF_A_KIND
    return [here, one, there, there + here, here + there, (*here, place, "here")]


def experts_in_ram_place(backend: str, *, is_first: bool) -> Experts:
    """Where a card's layers have their experts computed if those are in RAM."""
    if backend not in OFFLOAD_BACKENDS:
        return "host"
    return "copied" if is_first else "elsewhere"


def cache_copy_bytes(shape: ModelShape, load: Load) -> int:
    """What the first card copies of the cache of a layer in RAM that it computes: all of it."""
    return sum(_cache_copies(read_dimensions(shape), _Cache.of(load)))


def _cache_copies(dimensions: Dimensions, cache: _Cache) -> tuple[int, int]:
    """Bytes of a layer's keys and values. With latent attention the values are among the keys,
    which are copied a second time for that."""
    values = dimensions.key if dimensions.is_latent else dimensions.value
    keys, values = (row_bytes(cache.kv_type, size) for size in (dimensions.key, values))
    cells = cache.cells * cache.sequences
    return keys * cells, values * cells


def host_compute_bytes(
    shape: ModelShape,
    load: Load,
    *,
    is_pipelined: bool,
    gpu_count: int,
    is_whole: bool,
    has_layers: bool | None = None,
    has_experts: bool | None = None,
) -> int:
    """The CPU's compute buffer, and the rows of logits it keeps, one a sequence.

    Where `has_layers` and `has_experts` don't say what the CPU itself computes (weights in RAM
    that a card computes with don't count), it is all that `is_whole` allows.
    """
    layers = not is_whole if has_layers is None else has_layers
    experts = not is_whole if has_experts is None else has_experts
    size = _replay_host(
        read_dimensions(shape),
        count_tokens(load),
        _Cache.of(load),
        PIPELINE_COPIES if is_pipelined else 1,
        min(gpu_count, 2),
        layers or gpu_count == 0,
        experts,
    )
    return _with_margin(shape, size) + 4 * shape.vocabulary_size * load.sequences


@lru_cache(maxsize=1024)
def _replay_host(
    dimensions: Dimensions,
    tokens: int,
    cache: _Cache,
    copies: int,
    card_count: int,
    has_layers: bool,
    has_experts: bool,
) -> int:
    gauge = _gauge_host(
        dimensions, replace(cache, cells=CELLS), copies, card_count, has_layers, has_experts
    )
    # how the CPU's pieces end is not followed to the last tensor
    slack = 4 * dimensions.hidden * tokens if has_layers or has_experts else 0
    return gauge.measure(tokens, cache.cells) + slack


@lru_cache(maxsize=256)
def _gauge_host(
    dimensions: Dimensions,
    cache: _Cache,
    copies: int,
    card_count: int,
    has_layers: bool,
    has_experts: bool,
) -> Gauge:
    tape = Tape(copies=copies)
    is_all = card_count == 0
    piece = Piece(part=Part(entry="embedding", has_last_layer=is_all, has_output=is_all))
    writer = _make_writer(dimensions, tape, TOKENS, cache, piece)
    writer.write_host(card_count=card_count, has_layers=has_layers, has_experts=has_experts)
    return Gauge(tape.compile())


def is_pipelined(shape: ModelShape, machine: Machine, placement: Placement) -> bool:
    """Whether llama.cpp runs several batches at once over the cards (llama-context.cpp): all
    layers and the output on more than one card, split by layer, nothing overridden."""
    used = placement.used_cards
    return (
        len(used) > 1
        and placement.split_mode == "layer"
        and placement.is_whole(shape.layer_count)
        and all(machine.gpus[card].backend in PIPELINE_BACKENDS for card in used)
    )
