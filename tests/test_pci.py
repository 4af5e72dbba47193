"""Cards on the bus, from trees of files as Linux lays them out."""

from __future__ import annotations

from pathlib import Path

import pytest

from localmistral.fit.machine import GIB
from localmistral.fit.probes.found import normalise_pci_id
from localmistral.fit.probes.pci import find_amd_name, find_pci_name, read_pci_cards

AMD_NAMES = """# List of AMDGPU IDs
1.0.0
744C,\tC8,\tAMD Radeon RX 7900 XTX
744C,\tCC,\tAMD Radeon RX 7900 XT
"""
PCI_NAMES = """# comment
1002  Advanced Micro Devices, Inc. [AMD/ATI]
\t744c  Navi 31 [Radeon RX 7900 XT/7900 XTX]
\t\t1002 0123  A board
\t1638  Cezanne
10de  NVIDIA Corporation
\t2204  GA102 [GeForce RTX 3090]
"""


def add(root: Path, address: str, **files: str) -> None:
    folder = root / "sys/bus/pci/devices" / address
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(f"{text}\n", encoding="utf-8")


def add_names(root: Path) -> None:
    for name, text in (
        ("usr/share/libdrm/amdgpu.ids", AMD_NAMES),
        ("usr/share/misc/pci.ids", PCI_NAMES),
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")


def test_an_amd_card_is_told_with_memory_and_link(tmp_path: Path) -> None:
    add_names(tmp_path)
    add(
        tmp_path,
        "0000:c1:00.0",
        vendor="0x1002",
        device="0x744c",
        revision="0xc8",
        mem_info_vram_total=str(24 * GIB),
        mem_info_vram_used=str(GIB),
        max_link_speed="16.0 GT/s PCIe",
        current_link_width="8",
        **{"class": "0x030000"},
    )
    (card,) = read_pci_cards(tmp_path)
    assert (card.name, card.vendor, card.pci_id) == (
        "AMD Radeon RX 7900 XTX",
        "amd",
        "0000:c1:00.0",
    )
    assert (card.total_bytes, card.free_bytes) == (24 * GIB, 23 * GIB)
    assert card.link == pytest.approx(15.76e9)


def test_cards_are_told_apart_from_what_else_is_on_the_bus(tmp_path: Path) -> None:
    display = {"class": "0x030000"}
    add(tmp_path, "0000:00:02.0", vendor="0x8086", device="0x4680", **display)  # integrated
    add(tmp_path, "0000:01:00.0", vendor="0x10de", device="0x2204", **display)
    add(tmp_path, "0000:01:00.1", vendor="0x10de", device="0x1aef", **{"class": "0x040300"})
    add(tmp_path, "0000:02:00.0", vendor="0x1a03", device="0x2000", **display)  # a server's console
    add(tmp_path, "0000:03:00.0", vendor="0x8086", device="0xe20b", **display)  # Arc
    add(tmp_path, "0000:04:00.0", vendor="0x1002", device="0x74a1", **{"class": "0x120000"})
    add(
        tmp_path,
        "0000:05:00.0",
        vendor="0x1002",
        device="0x1638",
        mem_info_vram_total=str(GIB // 2),  # an APU's window
        **display,
    )
    add(tmp_path, "0000:06:00.0")
    found = [(card.vendor, card.pci_id) for card in read_pci_cards(tmp_path)]
    assert found == [
        ("nvidia", "0000:01:00.0"),
        ("intel", "0000:03:00.0"),
        ("amd", "0000:04:00.0"),
    ]


def test_a_card_without_files_still_has_a_name(tmp_path: Path) -> None:
    add(tmp_path, "0000:01:00.0", vendor="0x10de", device="0x2204", **{"class": "0x030000"})
    (card,) = read_pci_cards(tmp_path)
    assert card.name == "nvidia 10de:2204"
    assert (card.total_bytes, card.free_bytes, card.link) == (None, None, None)


def test_a_machine_without_a_bus_has_no_cards(tmp_path: Path) -> None:
    assert read_pci_cards(tmp_path) == ()
    (tmp_path / "sys/bus/pci").mkdir(parents=True)
    (tmp_path / "sys/bus/pci/devices").write_text("a file", encoding="utf-8")
    assert read_pci_cards(tmp_path) == ()


def test_names_are_found_in_both_lists() -> None:
    assert find_amd_name(AMD_NAMES, "744c", "cc") == "AMD Radeon RX 7900 XT"
    assert find_amd_name(AMD_NAMES, "744c", "00") == ""
    assert find_pci_name(PCI_NAMES, "10de", "2204") == "GeForce RTX 3090"
    assert find_pci_name(PCI_NAMES, "1002", "1638") == "Cezanne"
    assert find_pci_name(PCI_NAMES, "1002", "2204") == ""
    assert find_pci_name(PCI_NAMES, "1002", "1002") == ""


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("00000000:C1:00.0", "0000:c1:00.0"),
        ("0000:c1:00.0", "0000:c1:00.0"),
        ("c1:00.0", "0000:c1:00.0"),
        ("10000:01:00.0", "10000:01:00.0"),
        ("", None),
        ("GPU-0", None),
    ],
)
def test_places_on_the_bus_are_written_one_way(text: str, normal: str | None) -> None:
    assert normalise_pci_id(text) == normal
