"""The bytes of the key-value cache, layer by layer, as llama.cpp allocates them.

By src/llama-kv-cache.cpp: a layer holds `cells` rows of keys and as many of values, one row having
the elements of all its KV heads; latent attention (MLA) holds one row of keys and no values. The
engine asks for full-size windows (llama.cpp's default `swa_full`), so a layer with a sliding window
has as many cells as any other; that every sequence has cells of its own changes nothing in the sum.
Each layer's share sits on the layer's device.
Doesn't know recurrent states (Mamba, RWKV), key lengths of their own in sliding layers, nor layers
that share another one's cache (Gemma 3n): those come out too large, or not at all.
"""

from functools import lru_cache

from localmistral.models.shape import ModelShape
from localmistral.models.tensor_types import TENSOR_TYPES

CELL_MULTIPLE = 256
"""llama.cpp pads a context to this many cells (llama-context.cpp)."""

_TYPES = {kind.name: kind for kind in TENSOR_TYPES.values()}


def pad_cells(cells: int) -> int:
    """The cells that llama.cpp makes of a context of `cells` tokens."""
    return -(-cells // CELL_MULTIPLE) * CELL_MULTIPLE


def row_bytes(kv_type: str, elements: int) -> int:
    """Bytes of a row of `elements` in a ggml type; blocks are padded to whole ones."""
    kind = _TYPES[kv_type]
    return -(-elements // kind.block_elements) * kind.block_bytes


def key_elements(shape: ModelShape, layer: int) -> int:
    """Elements of one cell's keys: of the compressed row with latent attention."""
    return shape.key_length * shape.kv_head_counts[layer]


def value_elements(shape: ModelShape, layer: int) -> int:
    """Elements of one cell's values; none with latent attention, whose keys contain them."""
    return 0 if shape.has_latent_attention else shape.value_length * shape.kv_head_counts[layer]


def has_cache(shape: ModelShape, layer: int) -> bool:
    """Whether a layer keeps keys: those for predicting more tokens at once (MTP) don't run."""
    return layer < shape.layer_count - shape.nextn_layer_count


@lru_cache(maxsize=256)
def _cell_bytes(
    key: tuple[tuple[int, ...], int, int, int], is_latent: bool, kv_type: str
) -> tuple[int, ...]:
    """Bytes of one cell by layer, for KV heads by layer, head lengths and the layers that run."""
    kv_heads, key_length, value_length, running = key
    return tuple(
        row_bytes(kv_type, key_length * heads)
        + (0 if is_latent else row_bytes(kv_type, value_length * heads))
        if layer < running
        else 0
        for layer, heads in enumerate(kv_heads)
    )


def cell_bytes(shape: ModelShape, kv_type: str) -> tuple[int, ...]:
    """Bytes of one cell (one token), by layer."""
    running = shape.layer_count - shape.nextn_layer_count
    key = (shape.kv_head_counts, shape.key_length, shape.value_length, running)
    return _cell_bytes(key, shape.has_latent_attention, kv_type)


def kv_bytes_per_layer(shape: ModelShape, kv_type: str, cells: int) -> tuple[int, ...]:
    """Bytes of the cache by layer, for `cells` tokens (context x parallel) of a ggml type."""
    padded = pad_cells(cells)
    return tuple(size * padded for size in cell_bytes(shape, kv_type))
