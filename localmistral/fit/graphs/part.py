"""What of a model's graph runs on one device. Knows no sizes."""

from dataclasses import dataclass
from typing import Literal

Entry = Literal["embedding", "parts", "norm"]
"""How the residual stream comes to a device: as rows of the embedding, as the parts of its sum
(after layers on the CPU), or normalised and plain (after another card)."""
Experts = Literal["here", "copied", "host", "elsewhere"]
"""Where a layer's routed experts are computed: with the layer, with the layer but from RAM, by the
CPU (their results come back), or on another card (their sum comes back)."""

LAYERS_OF_A_KIND = 3
"""The first, one between and the last layer of a device differ; more are like the second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """`dense` layers without routed experts, then one with them for each entry of `experts`; layers
    of each kind beyond LAYERS_OF_A_KIND change nothing. `from_ram` counts layers of each kind
    before those, whose weights and cache are in RAM, but which this device computes; `has_guests`
    says that experts of other devices' layers come to it. Usually the device of the last layer has
    the output as well.
    """

    entry: Entry
    has_last_layer: bool
    has_output: bool
    dense: int = LAYERS_OF_A_KIND
    experts: tuple[Experts, ...] = ("here", "here", "here")
    from_ram: int = 0
    has_guests: bool = False
