"""Graphics cards on the PCI bus, as Linux's sysfs shows them.

What the drivers of AMD publish (mem_info_vram_total and _used) needs no ROCm. Integrated graphics
are left out: llama.cpp itself says whether it can use them. Empty on other systems and in
containers without sysfs. `root` is where /sys and /usr are.
"""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from localmistral.fit.cards import link_bandwidth
from localmistral.fit.machine import GIB
from localmistral.fit.probes.found import FoundCard, normalise_pci_id
from localmistral.fit.probes.system_files import read_number, read_text

VENDORS = {"0x10de": "nvidia", "0x1002": "amd", "0x8086": "intel"}
_CLASSES = ("0x03", "0x12")
"""Display controllers, processing accelerators (Instinct)."""
_GENERATIONS = {"2.5": 1, "5": 2, "5.0": 2, "8": 3, "8.0": 3, "16.0": 4, "32.0": 5, "64.0": 6}
"""PCIe generation by the transfers (GT/s) that `max_link_speed` names."""
_SMALLEST_CARD_BYTES = 2 * GIB
"""An AMD device with less memory of its own is integrated graphics with a window into RAM."""
_AMD_NAMES = "usr/share/libdrm/amdgpu.ids"
_PCI_NAMES = ("usr/share/misc/pci.ids", "usr/share/hwdata/pci.ids")


def read_pci_cards(root: Path = Path("/")) -> tuple[FoundCard, ...]:
    """The cards of this machine, in the order of the bus."""
    try:
        folders = sorted((root / "sys/bus/pci/devices").iterdir())
    except OSError:
        return ()
    found = (_read_card(folder, root) for folder in folders)
    return tuple(card for card in found if card is not None)


def _read_card(folder: Path, root: Path) -> FoundCard | None:
    vendor = VENDORS.get(read_text(folder / "vendor"))
    if vendor is None or not read_text(folder / "class").startswith(_CLASSES):
        return None
    total, used = (
        read_number(folder / "mem_info_vram_total"),
        read_number(folder / "mem_info_vram_used"),
    )
    if _is_integrated(vendor, folder.name, total):
        return None
    return FoundCard(
        name=_name(folder, vendor, root),
        vendor=vendor,
        pci_id=normalise_pci_id(folder.name),
        total_bytes=total,
        free_bytes=None if total is None or used is None else max(0, total - used),
        link=_link(folder),
    )


def _is_integrated(vendor: str, address: str, total: int | None) -> bool:
    if vendor == "intel":
        return normalise_pci_id(address) == "0000:00:02.0"  # where Intel's chipsets put it
    return vendor == "amd" and total is not None and total < _SMALLEST_CARD_BYTES


def _name(folder: Path, vendor: str, root: Path) -> str:
    """What the card is sold as; the ids where no list of names is installed."""
    device = read_text(folder / "device").removeprefix("0x")
    revision = read_text(folder / "revision").removeprefix("0x")
    amd = _read_names(root / _AMD_NAMES) if vendor == "amd" else ""
    vendor_id = read_text(folder / "vendor").removeprefix("0x")
    return (
        read_text(folder / "product_name")
        or find_amd_name(amd, device, revision)
        or next(_find_names(root, vendor_id, device), "")
        or f"{vendor} {vendor_id}:{device}"
    )


def _find_names(root: Path, vendor_id: str, device: str) -> Iterator[str]:
    for path in _PCI_NAMES:
        name = find_pci_name(_read_names(root / path), vendor_id, device)
        if name:
            yield name


def find_amd_name(text: str, device: str, revision: str) -> str:
    """The name in libdrm's amdgpu.ids (`744C, C8, AMD Radeon RX 7900 XTX`); empty if none."""
    for line in text.splitlines():
        cells = [cell.strip().lower() for cell in line.split(",", 2)]
        if len(cells) == 3 and cells[:2] == [device.lower(), revision.lower()]:
            return line.split(",", 2)[2].strip()
    return ""


def find_pci_name(text: str, vendor_id: str, device: str) -> str:
    """The name in pci.ids; of `Navi 31 [Radeon RX 7900]` what stands in brackets."""
    is_vendor = False
    for line in text.splitlines():
        if line[:1] not in ("", "#", "\t"):
            is_vendor = line.lower().startswith(f"{vendor_id.lower()} ")
        elif is_vendor and line.lower().startswith(f"\t{device.lower()} "):
            name = line.strip()[len(device) :].strip()
            in_brackets = re.search(r"\[([^\]]+)\]", name)
            return in_brackets[1] if in_brackets else name
    return ""


def _link(folder: Path) -> float | None:
    generation = _GENERATIONS.get(read_text(folder / "max_link_speed").split(" ")[0])
    lanes = read_number(folder / "current_link_width")
    return link_bandwidth(generation, lanes) if generation and lanes else None


@cache
def _read_names(path: Path) -> str:
    return read_text(path)
