"""This machine: what llama.cpp can use, beside what is there, put together into a Machine.

The first is ggml's device list, which the engine hands in; the second comes from the drivers, the
PCI bus and the operating system. `assemble` is pure; `probe_hardware` asks. Integrated cards
share RAM with the CPU, and `machine.share_memory` divides it. Knows no policy.
"""

import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from localmistral.fit.cards import choose_by_memory, common_cards, estimate_flops, find_cards
from localmistral.fit.machine import DEFAULT_RAM_BANDWIDTH, Cpu, Gpu, Machine, Ram, share_memory
from localmistral.fit.probes.cpu import read_cpu
from localmistral.fit.probes.found import BackendDevice, FoundCard
from localmistral.fit.probes.limits import Limits, count_cores, read_limits
from localmistral.fit.probes.mismatch import Mismatch, compare
from localmistral.fit.probes.modules import read_ram_bandwidth
from localmistral.fit.probes.nvidia import NvidiaReport, read_nvidia
from localmistral.fit.probes.pci import read_pci_cards

__all__ = ["BackendDevice", "Hardware", "assemble", "probe_hardware", "probe_machine"]

DISAGREEMENT = 0.1
"""A driver's bandwidth that differs by more from the table's is believed instead: another memory
was sold under the same name."""
RPC_BANDWIDTH = 360e9
RPC_FLOPS = 25e12
"""What a card behind an RPC server counts as, since ggml tells only its memory: an RTX 3060's."""
RPC_LINK = 125e6
"""Bytes per second of gigabit Ethernet."""
_LOOPBACK = ("127.", "localhost", "0.0.0.0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """Everything that was found. `cards` are those that drivers or the bus report, `mismatches`
    where they and llama.cpp's `devices` disagree. `backends` are those of its build."""

    machine: Machine
    devices: tuple[BackendDevice, ...]
    backends: tuple[str, ...]
    cards: tuple[FoundCard, ...]
    mismatches: tuple[Mismatch, ...]
    nvidia: NvidiaReport
    limits: Limits
    logical_cpus: int
    system: str


def probe_machine(devices: Sequence[BackendDevice]) -> Machine:
    """This machine with the cards among `devices`, llama.cpp's list; without it, no cards."""
    return probe_hardware(devices).machine


def probe_hardware(
    devices: Sequence[BackendDevice], built_in: Sequence[str] = (), root: Path = Path("/")
) -> Hardware:
    """Ask drivers and system about this machine. What can't be read is left out; never raises.

    Without `devices` nobody is asked about cards. `built_in` are llama.cpp's backends.
    """
    limits = read_limits(root)
    nvidia = read_nvidia() if devices else NvidiaReport()
    on_bus = read_pci_cards(root) if devices else ()
    name, features = read_cpu(root)
    physical, logical = _count_cpus()
    cpu = Cpu(name=name, cores=count_cores(physical, limits), features=features)
    ram = _read_ram(limits, _read_bandwidth(name, root))
    hardware = assemble(devices, nvidia, on_bus, ram, cpu, built_in)
    return replace(hardware, limits=limits, logical_cpus=logical, system=name_system())


def assemble(
    devices: Sequence[BackendDevice],
    nvidia: NvidiaReport,
    on_bus: Sequence[FoundCard],
    ram: Ram,
    cpu: Cpu,
    built_in: Sequence[str] = (),
) -> Hardware:
    """The machine of these findings. Pure."""
    cards = _merge(nvidia.cards, on_bus)
    usable, passed_over = choose_devices(devices)
    matched = match_cards(usable, cards)
    gpus = tuple(_make_gpu(device, card, ram) for device, card in zip(usable, matched, strict=True))
    ram, gpus = share_memory(ram, gpus)
    mismatches = compare(devices, cards, nvidia, built_in) if devices else ()
    notes = (
        *(mismatch.sentence for mismatch in mismatches),
        *passed_over,
        *dict.fromkeys(gpu.assumption for gpu in gpus if gpu.assumption),
    )
    machine = Machine(
        gpus=gpus,
        ram=ram,
        cpu=cpu,
        has_peer_access=_has_peer_access(usable, matched, nvidia),
        notes=notes,
    )
    return Hardware(
        machine=machine,
        devices=tuple(devices),
        backends=tuple(built_in),
        cards=cards,
        mismatches=mismatches,
        nvidia=nvidia,
        limits=Limits(),
        logical_cpus=cpu.cores,
        system="",
    )


def choose_devices(
    devices: Sequence[BackendDevice],
) -> tuple[tuple[BackendDevice, ...], tuple[str, ...]]:
    """The devices that a model is split over, as llama.cpp chooses them, and why not the others.

    Each card once, though two backends list it (the first wins); integrated ones only where
    there is no other.
    """
    seen: set[str] = set()
    single = []
    for device in devices:
        if device.kind in ("gpu", "igpu") and device.pci_id not in seen:
            single.append(device)
            seen |= {device.pci_id} if device.pci_id else set()
    cards = tuple(device for device in single if device.kind == "gpu")
    if not cards:
        return tuple(single), ()
    left_out = [device.description for device in single if device.kind == "igpu"]
    return cards, tuple(f"{name} is integrated and left to the desktop." for name in left_out)


def match_cards(
    devices: Sequence[BackendDevice], cards: Sequence[FoundCard]
) -> tuple[FoundCard | None, ...]:
    """For every device the card that it is: by its place on the bus, else by name, in order."""
    left = list(cards)
    matched: list[FoundCard | None] = []
    for device in devices:
        card = next(
            (card for card in left if device.pci_id and card.pci_id == device.pci_id),
            None,
        ) or next(
            (card for card in left if not device.pci_id and card.name == device.description),
            None,
        )
        if card is not None:
            left.remove(card)
        matched.append(card)
    return tuple(matched)


def _merge(driver: Sequence[FoundCard], on_bus: Sequence[FoundCard]) -> tuple[FoundCard, ...]:
    """The driver's word on a card, else the bus's; NVIDIA's cards are all in the driver's list."""
    known = {card.pci_id for card in driver}
    return (*driver, *(card for card in on_bus if card.pci_id not in known))


def _make_gpu(device: BackendDevice, card: FoundCard | None, ram: Ram) -> Gpu:
    if device.backend == "rpc":
        return _make_remote_gpu(device, ram)
    total = device.total_bytes or (card and card.total_bytes) or 0
    rows = find_cards(device.description) or find_cards(card.name if card else "")
    row = choose_by_memory(rows, total) if rows else None
    told = card.bandwidth if card else None
    is_apple = device.backend == "metal" and device.description.startswith("Apple")
    is_integrated = device.kind == "igpu" or is_apple or bool(row and row.is_integrated)
    like = choose_by_memory(common_cards(), total)
    guess = ram.bandwidth if is_integrated else like.bandwidth
    bandwidth = _believe(row.bandwidth if row else None, told) or guess
    flops = (row and row.flops) or (card and card.flops) or estimate_flops(bandwidth)
    free = [device.free_bytes, *([card.free_bytes] if card and card.free_bytes is not None else [])]
    return Gpu(
        name=row.name if row else device.description,
        total_bytes=total,
        free_bytes=min(*free, total) if total else min(free),
        bandwidth=bandwidth,
        flops=flops,
        link=(card and card.link) or (row.link if row else like.link),
        backend=device.backend,
        device=device.name,
        is_integrated=is_integrated,
        assumption=""
        if row or told or is_integrated
        else f"{device.description} is not in the table of cards and counts as fast as the "
        f"{like.name}, {like.bandwidth / 1e9:.0f} GB/s; bench measures it.",
    )


def _make_remote_gpu(device: BackendDevice, ram: Ram) -> Gpu:
    """An RPC server's device; one on this machine computes with this machine's RAM."""
    is_here = device.description.startswith(_LOOPBACK)
    bandwidth = ram.bandwidth if is_here else RPC_BANDWIDTH
    return Gpu(
        name=f"{device.name} at {device.description}",
        total_bytes=device.total_bytes,
        free_bytes=min(device.free_bytes, device.total_bytes),
        bandwidth=bandwidth,
        flops=estimate_flops(bandwidth) if is_here else RPC_FLOPS,
        link=ram.bandwidth if is_here else RPC_LINK,
        backend="rpc",
        device=device.name,
        assumption=""
        if is_here
        else "What computes behind an RPC server is unknown: it counts as an RTX 3060, "
        "reached by gigabit Ethernet.",
    )


def _believe(table: float | None, told: float | None) -> float | None:
    """The data sheet's bandwidth, unless the driver tells of quite another one."""
    if table is None or told is None:
        return table or told
    return told if abs(told - table) > DISAGREEMENT * table else table


def _has_peer_access(
    devices: Sequence[BackendDevice],
    matched: Sequence[FoundCard | None],
    nvidia: NvidiaReport,
) -> bool:
    """Whether all cards are NVIDIA's and every one reads every other one's memory."""
    if len(devices) < 2 or any(device.backend != "cuda" for device in devices):
        return False
    ids = [card.pci_id if card else None for card in matched]
    return all(
        one is not None and other is not None and (one, other) in nvidia.peers
        for one in ids
        for other in ids
        if one is not other
    )


def _read_ram(limits: Limits, bandwidth: float | None) -> Ram:
    import psutil

    try:
        memory = psutil.virtual_memory()
        total, available = int(memory.total), int(memory.available)
    except (OSError, RuntimeError, psutil.Error):
        total = available = limits.memory_bytes or 0  # a system without /proc
    if limits.memory_bytes is not None:
        total = min(total, limits.memory_bytes)
    if limits.memory_free_bytes is not None:
        available = min(available, limits.memory_free_bytes)
    return Ram(
        total_bytes=total,
        available_bytes=available,
        bandwidth=bandwidth or DEFAULT_RAM_BANDWIDTH,
    )


def _read_bandwidth(cpu_name: str, root: Path) -> float | None:
    """Of RAM: Apple's chips are known by name, other machines by their memory modules."""
    rows = find_cards(cpu_name) if cpu_name.startswith("Apple") else ()
    return rows[0].bandwidth if rows else read_ram_bandwidth(root)


def _count_cpus() -> tuple[int, int]:
    """Physical cores and logical CPUs of the whole machine."""
    import psutil

    try:
        logical = psutil.cpu_count(logical=True) or 1
        return psutil.cpu_count(logical=False) or logical, logical
    except (OSError, RuntimeError, psutil.Error):
        return 1, 1


def name_system() -> str:
    """`Linux x86_64`, `WSL x86_64`, `Windows AMD64`, `Darwin arm64`."""
    is_wsl = "microsoft" in platform.release().lower()
    return f"{'WSL' if is_wsl else platform.system()} {platform.machine()}".strip()
