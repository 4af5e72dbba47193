"""What was found: cards as drivers and the PCI bus report them, devices as llama.cpp lists them.

Plain values that the probes make and hardware.py puts together.
"""

import re
from dataclasses import dataclass

_PCI_ID = re.compile(r"(?:([0-9a-f]{1,8}):)?([0-9a-f]{2}):([0-9a-f]{2})(?:\.([0-7]))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendDevice:
    """A device that llama.cpp can compute on.

    `kind` is cpu, gpu, igpu or accel (a library beside the CPU); `backend` is cpu, cuda, rocm,
    vulkan, metal, sycl, rpc or the name its backend has. `pci_id` as in FoundCard.
    """

    name: str
    description: str
    kind: str
    backend: str
    free_bytes: int
    total_bytes: int
    pci_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundCard:
    """A card that is in the machine, whether or not llama.cpp can use it.

    `vendor` is nvidia, amd or intel. `pci_id` is `0000:c1:00.0`. None is what the source doesn't
    say. `free_bytes` leaves out what other programs have; `link` is in bytes per second.
    """

    name: str
    vendor: str
    pci_id: str | None = None
    total_bytes: int | None = None
    free_bytes: int | None = None
    bandwidth: float | None = None
    flops: float | None = None
    link: float | None = None
    compute_capability: tuple[int, int] | None = None


def normalise_pci_id(text: str) -> str | None:
    """`00000000:C1:00.0` -> `0000:c1:00.0`, as ggml and sysfs write it; None if it is none."""
    match = _PCI_ID.fullmatch(text.strip().lower())
    if match is None:
        return None
    domain, bus, device, function = match.groups()
    return f"{int(domain or '0', 16):04x}:{bus}:{device}.{function or 0}"
