"""Where llama.cpp's devices and the machine's cards disagree, and what mends it. Pure but for the
environment's CUDA_VISIBLE_DEVICES and the like, which hide cards on purpose."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from localmistral.fit.cards import find_cards
from localmistral.fit.probes.builds import BACKENDS, mending_command
from localmistral.fit.probes.found import BackendDevice, FoundCard
from localmistral.fit.probes.nvidia import NvidiaReport

_SERVING = {
    "nvidia": ("cuda", "vulkan"),
    "amd": ("rocm", "vulkan"),
    "intel": ("sycl", "vulkan"),
}
"""Backends of llama.cpp that drive a maker's cards; `opencl` and others are rare enough."""
_TITLES = {"cuda": "CUDA", "rocm": "ROCm", "sycl": "SYCL", "vulkan": "Vulkan"}
_HIDING = {
    "nvidia": ("CUDA_VISIBLE_DEVICES",),
    "amd": ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"),
    "intel": ("ONEAPI_DEVICE_SELECTOR",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Mismatch:
    """`sentence` says what is idle and why; `command` mends it, or is empty. `is_mistake` is
    False where somebody hid the cards on purpose."""

    sentence: str
    command: str = ""
    is_mistake: bool = True


def compare(
    devices: Sequence[BackendDevice],
    cards: Sequence[FoundCard],
    nvidia: NvidiaReport,
    built_in: Sequence[str] = (),
) -> tuple[Mismatch, ...]:
    """What llama.cpp doesn't use of `cards`, by maker; none where all are used.

    `built_in` are the backends that this build has, also those that found no device.
    """
    mismatches = [
        mismatch
        for vendor in BACKENDS
        if (mismatch := _compare_vendor(vendor, devices, cards, nvidia, built_in)) is not None
    ]
    if nvidia.problem:
        mismatches.insert(0, Mismatch(sentence=nvidia.problem))
    return tuple(mismatches)


def _compare_vendor(
    vendor: str,
    devices: Sequence[BackendDevice],
    cards: Sequence[FoundCard],
    nvidia: NvidiaReport,
    built_in: Sequence[str],
) -> Mismatch | None:
    idle = _find_idle(vendor, devices, cards)
    if not idle:
        return None
    names = count_names(idle)
    if vendor == "nvidia" and not nvidia.cards:
        # Without an answer from the driver, what it said instead is more to the point.
        sentence = f"{names} found, but NVIDIA's driver is not installed."
        return None if nvidia.problem else Mismatch(sentence=sentence)
    own = {*built_in, *(device.backend for device in devices)}.intersection(_SERVING[vendor])
    hiding = next((name for name in _HIDING[vendor] if os.environ.get(name) is not None), None)
    if own and hiding is not None:
        sentence = f"{names} hidden by {hiding}={os.environ[hiding][:40]}."
        return Mismatch(sentence=sentence, is_mistake=False)
    command = mending_command(idle, cuda=nvidia.cuda)
    if own:
        backends = " and ".join(_TITLES.get(backend, backend) for backend in sorted(own))
        driver = f" (driver {nvidia.driver})" if vendor == "nvidia" and nvidia.driver else ""
        sentence = (
            f"{names} found, but llama.cpp doesn't list {'it' if len(idle) == 1 else 'them'}, "
            f"though it is built with {backends}{driver}."
        )
    else:
        sentence = (
            f"{names} found, but this llama-cpp-python is built without {BACKENDS[vendor]}: "
            f"{'it stays' if len(idle) == 1 else 'they stay'} idle."
        )
    return Mismatch(sentence=sentence, command=command)


def _find_idle(
    vendor: str, devices: Sequence[BackendDevice], cards: Sequence[FoundCard]
) -> list[FoundCard]:
    serving = [device for device in devices if device.backend in _SERVING[vendor]]
    used_ids = {device.pci_id for device in serving if device.pci_id}
    idle = [card for card in cards if card.vendor == vendor and card.pci_id not in used_ids]
    # A device that doesn't tell its place on the bus is one of these cards, whichever.
    return idle[sum(device.pci_id is None for device in serving) :]


def count_names(cards: Sequence[FoundCard]) -> str:
    """`2x RTX 4090 and RTX 3060`."""
    counts = Counter(_short_name(card.name) for card in cards).most_common()
    return " and ".join(f"{count}x {name}" if count > 1 else name for name, count in counts)


def _short_name(name: str) -> str:
    rows = find_cards(name)
    return rows[0].name if rows else name
