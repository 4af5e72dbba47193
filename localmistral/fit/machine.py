"""The machine that a plan is made for: its cards, its memory, its processor.

Plain values, whether they were probed, typed as `--gpu 24GiB` or both; everything downstream takes
only these. Knows no probe and no policy beyond the reserves that turn free memory into a budget.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

MIB = 1 << 20
GIB = 1 << 30

BACKEND_BYTES = {"cuda": 400 * MIB, "rocm": 400 * MIB, "vulkan": 192 * MIB}
"""What a backend takes of a card before anything is put there: its context, kernels and scratch
space. About 500 MiB beside weights and KV were seen on an RTX 3090 at 8k context (facts of a run
with UD-IQ3_XXS), 140 MiB of them compute buffers. Backends without an entry run elsewhere (RPC)
or in the memory they share with the CPU (Metal)."""
GPU_MARGIN_BYTES = 512 * MIB
"""Left free on a card: a desktop grows, allocators fragment, and drivers of Windows page silently
instead of failing. Half of llama.cpp's own 1024 MiB, because compute buffers are counted here."""
RAM_MARGIN_BYTES = 2 * GIB
RAM_MARGIN_SHARE = 1 / 16
"""Left free of RAM, whichever is more: the system, a browser, Python itself with the tokenizer."""
DEFAULT_RAM_BANDWIDTH = 51e9
"""Bytes per second of dual-channel DDR4-3200: what RAM is taken for when nothing is known."""
INTEGRATED_SHARE = 3 / 4
"""Of the available RAM, what integrated cards may have together; the CPU has the rest. macOS
allows its GPU about this much of a large machine's memory (recommendedMaxWorkingSetSize)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One card. Bytes are of its own memory; bandwidths in bytes per second, nominal.

    `backend` is cuda, rocm, vulkan, metal, sycl or rpc. `device` is llama.cpp's name of it
    (`CUDA0`), None for a card that isn't there. `flops` is the peak dense 16-bit rate of its matrix
    units (2 per multiply-add); `link` the host's way to the card, in one direction. An integrated
    one shares the CPU's memory: its `free_bytes` are then not counted in `Ram`.
    `assumption` says what was taken for granted, for people; empty if nothing was.
    """

    name: str
    total_bytes: int
    free_bytes: int
    bandwidth: float
    flops: float
    link: float = 16e9
    backend: str = "cuda"
    device: str | None = None
    is_integrated: bool = False
    assumption: str = ""

    @property
    def budget_bytes(self) -> int:
        """What a plan may use: free memory less the backend's cost and the margin."""
        return max(0, self.free_bytes - BACKEND_BYTES.get(self.backend, 0) - GPU_MARGIN_BYTES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ram:
    """Main memory; `available_bytes` is what new programs can have, `bandwidth` is nominal."""

    total_bytes: int
    available_bytes: int
    bandwidth: float = DEFAULT_RAM_BANDWIDTH

    @property
    def budget_bytes(self) -> int:
        margin = max(RAM_MARGIN_BYTES, int(self.total_bytes * RAM_MARGIN_SHARE))
        return max(0, self.available_bytes - margin)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cpu:
    """The processor: `cores` are physical and usable (a container's limit counts)."""

    name: str
    cores: int
    features: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Everything a plan needs to know; `gpus` in the order of tensor_split.

    `has_peer_access`: every card reads every other one's memory directly. `is_real`: probed, not
    typed. `notes` are sentences about what was taken for granted or can't be used.
    """

    gpus: tuple[Gpu, ...]
    ram: Ram
    cpu: Cpu
    has_peer_access: bool = False
    is_real: bool = True
    notes: tuple[str, ...] = field(default=())


def share_memory(ram: Ram, gpus: Sequence[Gpu]) -> tuple[Ram, tuple[Gpu, ...]]:
    """Divide RAM between the CPU and the integrated cards, so that no byte is promised twice.

    Each card gets at most an equal part of their share, the CPU what is then left.
    """
    count = sum(gpu.is_integrated for gpu in gpus)
    if not count:
        return ram, tuple(gpus)
    limit = int(ram.available_bytes * INTEGRATED_SHARE) // count
    shared = tuple(
        replace(gpu, free_bytes=min(gpu.free_bytes, limit)) if gpu.is_integrated else gpu
        for gpu in gpus
    )
    given = sum(gpu.free_bytes for gpu in shared if gpu.is_integrated)
    return replace(ram, available_bytes=ram.available_bytes - given), shared
