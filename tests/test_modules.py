"""Memory modules, from tables as firmware writes them."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localmistral.fit.probes.modules import (
    Module,
    calculate_bandwidth,
    parse_modules,
    read_ram_bandwidth,
)


def module(
    rate: int, place: str, *, width: int = 64, size: int = 16384, configured: int = 0
) -> bytes:
    """A structure of type 17 with 0x28 bytes, as SMBIOS 2.8 has them."""
    data = bytearray(0x28)
    data[0], data[1] = 17, len(data)
    struct.pack_into("<HHH", data, 0x08, width, width, size)
    data[0x10] = 1
    struct.pack_into("<H", data, 0x15, rate)
    struct.pack_into("<H", data, 0x20, configured)
    return bytes(data) + place.encode() + b"\0\0"


OTHER = bytes([1, 8, 0, 0, 1, 2, 0, 0]) + b"Maker\0Product\0\0"
END = bytes([127, 4, 0, 0]) + b"\0\0"


def test_populated_slots_are_read_among_other_structures() -> None:
    table = (
        OTHER
        + module(6000, "ChannelA-DIMM0", configured=5600)
        + module(0, "ChannelA-DIMM1", size=0)
        + module(6000, "ChannelB-DIMM0")
        + END
    )
    assert parse_modules(table) == (
        Module(rate_mt=5600, width_bits=64, place="ChannelA-DIMM0"),
        Module(rate_mt=6000, width_bits=64, place="ChannelB-DIMM0"),
    )
    assert calculate_bandwidth(parse_modules(table)) == pytest.approx(89.6e9)


@pytest.mark.parametrize(
    ("places", "width", "channels_of_64_bits"),
    [
        (["DIMM 0"], 64, 1),
        (["DIMM 0", "DIMM 1"], 64, 2),
        (["DIMM 0", "DIMM 1", "DIMM 2", "DIMM 3"], 64, 2),
        (["DIMM_A1", "DIMM_A2", "DIMM_B1", "DIMM_B2"], 64, 2),
        (["ChannelA-DIMM0", "ChannelA-DIMM1"], 64, 1),
        ([f"P0 CHANNEL {name}" for name in "ABCDEFGH"], 64, 8),
        ([f"P{cpu} CHANNEL {name}" for cpu in (0, 1) for name in "ABCD"], 64, 8),
        ([f"P0 CHANNEL {name}" for name in "ABCDEFGH"], 32, 4),  # soldered: 256 bits
    ],
)
def test_channels_are_counted_by_the_names_of_the_slots(
    places: list[str], width: int, channels_of_64_bits: int
) -> None:
    table = b"".join(module(3200, place, width=width) for place in places)
    assert calculate_bandwidth(parse_modules(table)) == pytest.approx(25.6e9 * channels_of_64_bits)


@pytest.mark.parametrize("rate", [0, 1, 0xFFFF])
def test_rates_that_no_module_has_are_not_believed(rate: int) -> None:
    assert parse_modules(module(rate, "DIMM 0")) == ()


@given(st.binary(max_size=300))
def test_any_bytes_are_modules_or_none(table: bytes) -> None:
    for found in parse_modules(b"\x11" + table):
        assert found.width_bits in (16, 32, 64)


def test_a_table_that_is_cut_tells_what_is_whole() -> None:
    table = module(3200, "DIMM_A1") + module(3200, "DIMM_B1")
    assert len(parse_modules(table[:-1])) == 1
    assert parse_modules(b"") == ()


def test_a_machine_whose_firmware_says_nothing_has_no_known_bandwidth(tmp_path: Path) -> None:
    assert read_ram_bandwidth(tmp_path) is None
    assert calculate_bandwidth(()) is None
