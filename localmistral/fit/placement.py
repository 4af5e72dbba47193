"""Where the parts of a model go: layers to cards, routed experts to RAM.

The rule of layers is llama.cpp's (src/llama-model.cpp): of `a = min(n_gpu_layers, n_layer + 1)`
the first `n_layer + 1 - a` layers stay on the CPU, the rest goes to the first device whose
cumulative share exceeds its place; the output counts as layer n_layer. Knows no bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

CPU = -1
"""The device index of layers that stay in RAM; cards count from 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """`tensor_split` has one integer a card, its layers (the output counts as one), summing to
    `gpu_layers`; a card left out has 0. `cpu_expert_layers` are ascending layer numbers whose
    routed experts (all of them) stay in RAM though the layer itself is on a card. `split_mode` is
    none, layer or tensor."""

    gpu_layers: int
    tensor_split: tuple[int, ...]
    cpu_expert_layers: tuple[int, ...] = ()
    split_mode: str = "layer"

    @property
    def used_cards(self) -> tuple[int, ...]:
        """Indexes of the cards that hold a layer."""
        return tuple(card for card, layers in enumerate(self.tensor_split) if layers)

    def layer_devices(self, layer_count: int) -> tuple[int, ...]:
        """The device of each layer, and of the output as entry `layer_count`; CPU is -1."""
        on_cards = [card for card, count in enumerate(self.tensor_split) for _ in range(count)]
        return (CPU,) * (layer_count + 1 - len(on_cards)) + tuple(on_cards)

    def is_whole(self, layer_count: int) -> bool:
        """Whether every layer and the output are on cards, and no experts in RAM."""
        return self.gpu_layers > layer_count and not self.cpu_expert_layers


def count_layers(shares: Sequence[float], gpu_layers: int) -> tuple[int, ...]:
    """Layers per card that llama.cpp makes of `shares`: exact for integers that sum to it."""
    total = sum(shares)
    ends = [end / total for end in accumulate(shares)]
    counts = [0] * len(shares)
    for place in range(gpu_layers):
        card = next((n for n, end in enumerate(ends) if end > place / gpu_layers), len(ends) - 1)
        counts[card] += 1
    return tuple(counts)
