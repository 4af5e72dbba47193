"""What NVIDIA's driver says of its cards, through NVML (nvidia-ml-py): names, memory, rates, links.

Every question may be unsupported by a card or a driver; what is not answered is None. Works on
Linux, Windows and WSL; there is none on macOS. Knows nothing of llama.cpp.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any

from localmistral.fit.cards import link_bandwidth
from localmistral.fit.probes.found import FoundCard, normalise_pci_id

_MHZ = 1e6
_DATA_RATE = 2
"""Transfers per cycle of the memory clock that NVML reports: a 3090's 9751 MHz x 2 x 384 bits are
its 936 GB/s, an A100's 1215 MHz x 2 x 5120 bits its 1555."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NvidiaReport:
    """The driver and its cards. `cuda` is the newest CUDA that the driver runs.

    `peers` are pairs of PCI ids whose cards read each other's memory directly. `problem` is a
    sentence where there is a driver that doesn't answer.
    """

    cards: tuple[FoundCard, ...] = ()
    driver: str | None = None
    cuda: tuple[int, int] | None = None
    peers: frozenset[tuple[str, str]] = field(default=frozenset())
    problem: str | None = None


def read_nvidia() -> NvidiaReport:
    """Ask the driver of this machine; an empty report where there is none."""
    try:
        import pynvml
    except ImportError:
        return NvidiaReport(problem="The package nvidia-ml-py is missing: no card can be asked.")
    return ask_nvml(pynvml)


def ask_nvml(nvml: Any) -> NvidiaReport:
    """The report of `nvml`, which is the module pynvml (or stands for it)."""
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        if type(error).__name__ == "NVMLError_LibraryNotFound":
            return NvidiaReport()  # no driver is installed
        return NvidiaReport(problem=f"NVIDIA's driver doesn't answer: {error}.")
    try:
        return _ask_driver(nvml)
    finally:
        _ask(nvml, nvml.nvmlShutdown)


def _ask_driver(nvml: Any) -> NvidiaReport:
    handles = []
    for index in range(_ask(nvml, nvml.nvmlDeviceGetCount) or 0):
        handle = _ask(nvml, nvml.nvmlDeviceGetHandleByIndex, index)
        if handle is not None:
            handles.append(handle)
    cards = tuple(_ask_card(nvml, handle) for handle in handles)
    version = _ask(nvml, nvml.nvmlSystemGetCudaDriverVersion_v2)
    return NvidiaReport(
        cards=cards,
        driver=_text(_ask(nvml, nvml.nvmlSystemGetDriverVersion)),
        cuda=None if version is None else (version // 1000, version % 1000 // 10),
        peers=_ask_peers(nvml, handles, cards),
    )


def _ask(nvml: Any, question: Callable[..., Any], *arguments: Any) -> Any:
    """The answer, or None where the card or the driver has none."""
    try:
        return question(*arguments)
    except nvml.NVMLError:
        return None


def _text(value: str | bytes | None) -> str | None:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _ask_card(nvml: Any, handle: Any) -> FoundCard:
    memory = _ask(nvml, nvml.nvmlDeviceGetMemoryInfo, handle)
    pci = _ask(nvml, nvml.nvmlDeviceGetPciInfo, handle)
    capability = _ask(nvml, nvml.nvmlDeviceGetCudaComputeCapability, handle)
    return FoundCard(
        name=_text(_ask(nvml, nvml.nvmlDeviceGetName, handle)) or "NVIDIA card",
        vendor="nvidia",
        pci_id=None if pci is None else normalise_pci_id(_text(pci.busId) or ""),
        total_bytes=None if memory is None else int(memory.total),
        free_bytes=None if memory is None else int(memory.free),
        bandwidth=_ask_bandwidth(nvml, handle),
        flops=_ask_flops(nvml, handle, capability),
        link=_ask_link(nvml, handle),
        compute_capability=None if capability is None else (capability[0], capability[1]),
    )


def _ask_bandwidth(nvml: Any, handle: Any) -> float | None:
    """Bytes per second: memory clock x transfers per cycle x bus width."""
    clock = _ask(nvml, nvml.nvmlDeviceGetMaxClockInfo, handle, nvml.NVML_CLOCK_MEM)
    width_bits = _ask(nvml, nvml.nvmlDeviceGetMemoryBusWidth, handle)
    return clock * _MHZ * _DATA_RATE * width_bits / 8 if clock and width_bits else None


def _ask_flops(nvml: Any, handle: Any, capability: Sequence[int] | None) -> float | None:
    """Peak 16-bit rate: cores x clock x 2 x what the generation's matrix units add."""
    cores = _ask(nvml, nvml.nvmlDeviceGetNumGpuCores, handle)
    clock = _ask(nvml, nvml.nvmlDeviceGetMaxClockInfo, handle, nvml.NVML_CLOCK_SM)
    if not cores or not clock or capability is None:
        return None
    return float(cores * clock * _MHZ * 2 * _matrix_factor(capability[0], capability[1]))


def _matrix_factor(major: int, minor: int) -> int:
    """Times the ordinary 32-bit rate, as consumer cards have it (see card_table.py)."""
    if (major, minor) < (7, 0):
        return 1
    if major == 7:
        return 8 if minor < 5 else 4
    return {(8, 0): 16, (9, 0): 16, (10, 0): 16}.get((major, minor), 2)


def _ask_link(nvml: Any, handle: Any) -> float | None:
    """Of the slot and the card together; the generation in use drops while a card idles."""
    generation = _ask(nvml, nvml.nvmlDeviceGetMaxPcieLinkGeneration, handle)
    lanes = _ask(nvml, nvml.nvmlDeviceGetCurrPcieLinkWidth, handle)
    return link_bandwidth(generation, lanes) if generation and lanes else None


def _ask_peers(
    nvml: Any, handles: Sequence[Any], cards: Sequence[FoundCard]
) -> frozenset[tuple[str, str]]:
    peers = set()
    for (one, card), (other, partner) in permutations(zip(handles, cards, strict=True), 2):
        status = _ask(nvml, nvml.nvmlDeviceGetP2PStatus, one, other, nvml.NVML_P2P_CAPS_INDEX_READ)
        if status == nvml.NVML_P2P_STATUS_OK and card.pci_id and partner.pci_id:
            peers.add((card.pci_id, partner.pci_id))
    return frozenset(peers)
