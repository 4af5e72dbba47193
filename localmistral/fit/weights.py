"""Where a model's weights go, to the byte: layers to their devices, the ends to theirs.

By src/llama-model.cpp and llama-model-loader.cpp: a layer's tensors follow the layer, the input
embedding stays on the CPU, the output's tensors go with the output; an embedding that is the
output as well is loaded twice, unless both are on the CPU; tables of rotary factors are copied to
every device that has layers; what else stands outside of the layers goes with layer 0. Layers for
predicting several tokens at once (MTP) are skipped. Knows no budgets.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from localmistral.fit.placement import CPU, Placement
from localmistral.models.shape import ModelShape, Tensor, TensorRole

_COPIED_PREFIX = "rope_"
"""`rope_freqs`, `rope_factors_long|short`: made again for each layer, one copy a device."""
_OUTPUT_PREFIX = "altup_"
"""Of Gemma 3n: tensors of the output by llama.cpp's table, though not by name."""

T = TypeVar("T")


def once_per_shape(compute: Callable[[ModelShape], T]) -> Callable[[ModelShape], T]:
    """Compute once and keep the result while the shape lives.

    By identity: hashing a shape walks through all its tensors, which costs more than most sums.
    """
    kept: dict[int, T] = {}

    def recall(shape: ModelShape) -> T:
        key = id(shape)
        if key not in kept:
            kept[key] = compute(shape)
            weakref.finalize(shape, kept.pop, key, None)
        return kept[key]

    return recall


class Matrix(NamedTuple):
    """One tensor of a layer: its name there (`ffn_up`), and whether it is of routed experts."""

    name: str
    bytes: int
    is_expert: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSums:
    """A model's bytes by where they go. `dense` and `experts` are by layer, `largest_dense` and
    `largest_experts` the biggest single tensor of each layer; `matrices` are a layer's tensors.
    `copied` goes to every device with layers, `first` to that of layer 0."""

    dense: tuple[int, ...]
    experts: tuple[int, ...]
    largest_dense: tuple[int, ...]
    largest_experts: tuple[int, ...]
    matrices: tuple[tuple[Matrix, ...], ...]
    input: int
    output: int
    tied: int
    copied: int
    first: int


@once_per_shape
def sum_weights(shape: ModelShape) -> WeightSums:
    """The sums of a shape's tensors, without those that llama.cpp skips."""
    running = shape.layer_count - shape.nextn_layer_count
    skipped = (0,) * shape.nextn_layer_count
    matrices = _matrices(shape)
    others = [tensor for tensor in shape.tensors if tensor.role is TensorRole.OTHER]
    copied = _sum(others, _COPIED_PREFIX)
    output = _sum(others, _OUTPUT_PREFIX)
    tied = [tensor.bytes for tensor in shape.tensors if tensor.name == "token_embd.weight"]
    return WeightSums(
        dense=shape.dense_bytes[:running] + skipped,
        experts=shape.expert_bytes[:running] + skipped,
        largest_dense=tuple(_largest(layer, is_expert=False) for layer in matrices),
        largest_experts=tuple(_largest(layer, is_expert=True) for layer in matrices),
        matrices=matrices,
        input=shape.embedding_bytes,
        output=shape.output_bytes + output,
        tied=sum(tied) if shape.has_tied_embeddings else 0,
        copied=copied,
        first=_sum(others, "") - copied - output,
    )


def _matrices(shape: ModelShape) -> tuple[tuple[Matrix, ...], ...]:
    layers: list[list[Matrix]] = [[] for _ in range(shape.layer_count)]
    for tensor in shape.tensors:
        if tensor.layer is not None:
            name = tensor.name.split(".", 2)[2].removesuffix(".weight")
            is_expert = tensor.role is TensorRole.EXPERT
            layers[tensor.layer].append(Matrix(name, tensor.bytes, is_expert))
    return tuple(map(tuple, layers))


def _largest(matrices: Sequence[Matrix], *, is_expert: bool) -> int:
    return max((m.bytes for m in matrices if m.is_expert is is_expert), default=0)


def _sum(tensors: Sequence[Tensor], prefix: str) -> int:
    return sum(tensor.bytes for tensor in tensors if tensor.name.startswith(prefix))


def output_bytes(shape: ModelShape) -> int:
    """The output's weights on its device; an embedding that is the output counts once more."""
    sums = sum_weights(shape)
    return sums.output + sums.tied


def input_bytes(shape: ModelShape) -> int:
    """What always stays on the CPU: the embeddings that rows are looked up in."""
    return sum_weights(shape).input


def weight_bytes_per_device(shape: ModelShape, placement: Placement) -> dict[int, int]:
    """Bytes of weights by device (CPU is -1), for every device that has any."""
    sums = sum_weights(shape)
    devices = placement.layer_devices(shape.layer_count)
    output_device = devices[-1]
    found = {CPU: sums.input}
    in_ram = frozenset(placement.cpu_expert_layers)
    for layer, device in enumerate(devices[:-1]):
        expert_device = CPU if layer in in_ram else device
        found[device] = found.get(device, 0) + sums.dense[layer]
        found[expert_device] = found.get(expert_device, 0) + sums.experts[layer]
    tied = 0 if output_device == CPU else sums.tied
    found[output_device] = found.get(output_device, 0) + sums.output + tied
    found[devices[0]] += sums.first
    for device in set(devices[:-1]):
        found[device] += sums.copied
    return found
