"""The plan: what is loaded, where each part goes, how fast it will be, and why.

Plain values. Knows no machine, and decides nothing.
"""

from dataclasses import dataclass, replace
from typing import Self

from localmistral.fit.placement import Placement
from localmistral.models.shape import ModelShape

PREFERENCES = ("balanced", "quality", "speed", "context")
KV_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")
SPLIT_MODES = ("none", "layer", "tensor")
DEFAULT_MIN_SPEED = 20.0
DEFAULT_MIN_CONTEXT = 16 * 1024
CONTEXT_AIM = 32 * 1024
DEFAULT_DEPTH = 4096
CONTEXT_MULTIPLE = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedFile:
    """One file to have: its path in the repository (or on this disk), bytes, sha256 if known."""

    path: str
    bytes: int
    sha256: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One quantisation of one model that a plan may choose.

    `files` are the model's (without the image encoder's); `is_estimated` says that the shape was
    worked out from the catalogue and not read from a file; `is_local` that nothing needs a
    download. `context_limit` is the model's real limit in tokens. `repository` and `revision` are
    None for files placed by hand.
    """

    model: str
    quant: str
    shape: ModelShape
    context_limit: int
    files: tuple[PlannedFile, ...]
    mmproj: PlannedFile | None = None
    repository: str | None = None
    revision: str | None = None
    is_estimated: bool = False
    is_local: bool = False

    @property
    def bits_per_weight(self) -> float:
        """Of the whole file, as quants are compared: 8 x weight bytes / parameters."""
        return 8 * self.shape.weight_bytes / max(1, self.shape.parameter_count)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """What the user wants; None leaves the choice to the planner, anything else is kept.

    `context` is tokens per stream and `parallel` the streams: the plan reserves their product.
    `tensor_split` are shares as typed. `min_speed` in tokens per second of decode at `depth` filled
    tokens, as far as the context goes; `has_min_speed` and `has_min_context` say that the user set
    them, so that missing them is an error.
    """

    context: int | None = None
    parallel: int = 1
    kv_type: str | None = None
    gpu_layers: int | None = None
    tensor_split: tuple[float, ...] | None = None
    cpu_expert_layers: tuple[int, ...] | None = None
    split_mode: str | None = None
    threads: int | None = None
    batch: int | None = None
    ubatch: int | None = None
    flash_attention: bool | None = None
    quant: str | None = None
    prefer: str = "balanced"
    min_speed: float = DEFAULT_MIN_SPEED
    has_min_speed: bool = False
    min_context: int = DEFAULT_MIN_CONTEXT
    has_min_context: bool = False
    depth: int = DEFAULT_DEPTH
    vision: bool = True

    def for_another_model(self) -> Self:
        """Without what is fixed for one model."""
        return replace(
            self,
            quant=None,
            gpu_layers=None,
            tensor_split=None,
            cpu_expert_layers=None,
            split_mode=None,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How a context is made, apart from where things are: what memory and speed depend on.

    `cells` is context x parallel, the KV cells that are reserved: each of the `sequences`, one a
    stream, has its share, a multiple of 256. llama.cpp rounds its largest graph up to a multiple of
    the sequences, and keeps a row of logits for each.
    """

    cells: int
    sequences: int = 1
    kv_type: str = "f16"
    batch: int = 2048
    ubatch: int = 512
    flash_attention: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceMemory:
    """Bytes on one device. `compute_bytes` holds every copy, logits and offloaded experts."""

    name: str
    budget_bytes: int
    weights_bytes: int
    mmproj_bytes: int
    kv_bytes: int
    compute_bytes: int

    @property
    def used_bytes(self) -> int:
        return self.weights_bytes + self.mmproj_bytes + self.kv_bytes + self.compute_bytes

    @property
    def excess_bytes(self) -> int:
        """How far over the budget; 0 when it fits."""
        return max(0, self.used_bytes - self.budget_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Speeds at `depth` tokens of filled context, one stream."""

    depth: int
    decode_tokens_per_second: float
    prefill_tokens_per_second: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """Another plan one could have, in the figures one chooses by; `change` is what to type."""

    change: str
    model: str
    quant: str
    context: int
    kv_type: str
    decode_tokens_per_second: float
    prefill_tokens_per_second: float
    gpu_bytes: int
    ram_bytes: int
    download_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything a load needs. `devices` are the cards in order, the CPU last.

    `only_embeds`: the model makes embeddings and writes nothing. `context` is then the longest
    text, there is no cache, `compute_bytes` is what texts of that length take, and speeds are 0:
    none are predicted.
    """

    model: str
    quant: str
    repository: str | None
    revision: str | None
    files: tuple[PlannedFile, ...]
    context: int
    parallel: int
    kv_type: str
    placement: Placement
    flash_attention: bool
    batch: int
    ubatch: int
    threads: int
    mmap: bool
    repack: bool
    devices: tuple[DeviceMemory, ...]
    predicted: Prediction
    reasons: tuple[str, ...]
    alternatives: tuple[Alternative, ...] = ()
    is_estimated: bool = False
    is_local: bool = False
    only_embeds: bool = False
