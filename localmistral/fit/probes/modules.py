"""How fast RAM is: the modules that the firmware lists (SMBIOS, structures of type 17).

Nominal: transfers per second x width x channels. Linux lets only root read the table, Windows
everybody; virtual machines have none or an empty one. Knows no timings and no real rate.
"""

import ctypes
import platform
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_MEMORY_DEVICE = 17
_TABLE = "sys/firmware/dmi/tables/DMI"
_WINDOWS_HEADER_BYTES = 8
_RATES_MT = (100, 20_000)
"""Transfers per second, in millions, that are believed."""
_MODULE_BITS = 64
_CHANNEL = re.compile(r"channel[ _-]*([a-z0-9]+)|dimm[ _-]*([a-z])[0-9]?\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Module:
    """A memory module that is there: its rate in millions of transfers, its width, its place."""

    rate_mt: int
    width_bits: int
    place: str


def read_ram_bandwidth(root: Path = Path("/")) -> float | None:
    """Nominal bytes per second of this machine's RAM; None where the firmware doesn't say."""
    if platform.system() == "Windows":
        table = _read_windows_table()
    else:
        try:
            table = (root / _TABLE).read_bytes()
        except OSError:
            table = b""
    return calculate_bandwidth(parse_modules(table))


def parse_modules(table: bytes) -> tuple[Module, ...]:
    """The populated memory slots of an SMBIOS table; none of what is cut or malformed."""
    found = (_read_module(data, texts) for kind, data, texts in _split(table))
    return tuple(module for module in found if module is not None)


def calculate_bandwidth(modules: Sequence[Module]) -> float | None:
    """Bytes per second: the slowest rate x 8 bytes x channels.

    Channels are counted by what the slots are called; where they have no such names two modules
    are two channels and four are two as well, as on desktops. Chips narrower than a module
    (soldered LPDDR) each have a channel of their own.
    """
    if not modules:
        return None
    rate = min(module.rate_mt for module in modules) * 1e6
    if all(module.width_bits < _MODULE_BITS for module in modules):
        return rate * sum(module.width_bits for module in modules) / 8
    named = {channel for module in modules if (channel := _channel(module.place))}
    channels = len(named) if named else min(len(modules), 2)
    return rate * _MODULE_BITS / 8 * channels


def _channel(place: str) -> str:
    """What tells channels apart in `P0 CHANNEL A` or `ChannelA-DIMM0`: also the processor."""
    match = _CHANNEL.search(place)
    if match is None:
        return ""
    processor = re.search(r"\b(?:p|cpu|proc)[ _-]*([0-9])", place, re.IGNORECASE)
    return f"{processor[1] if processor else 0}{match[1] or match[2]}".lower()


def _split(table: bytes) -> Iterator[tuple[int, bytes, list[bytes]]]:
    """Type, formatted area and texts of every structure."""
    start = 0
    while start + 4 <= len(table):
        kind, length = table[start], table[start + 1]
        end = table.find(b"\0\0", start + length)
        if length < 4 or end < 0:
            return
        yield kind, table[start : start + length], table[start + length : end].split(b"\0")
        start = end + 2


def _read_module(data: bytes, texts: Sequence[bytes]) -> Module | None:
    """SMBIOS reference specification, 7.18: width at 0x0a, size at 0x0c, rate at 0x15 and 0x20."""
    if data[0] != _MEMORY_DEVICE or len(data) < 0x17:
        return None
    width_bits, size = struct.unpack_from("<HH", data, 0x0A)
    rates = [struct.unpack_from("<H", data, 0x15)[0]]
    if len(data) >= 0x22:
        rates.insert(0, struct.unpack_from("<H", data, 0x20)[0])  # as configured
    low, high = _RATES_MT
    rate = next((rate for rate in rates if low <= rate <= high), None)
    if not size or rate is None or width_bits not in (16, 32, 64):
        return None
    numbers = (number for number in data[0x10:0x12] if 0 < number <= len(texts))
    place = " ".join(texts[number - 1].decode("ascii", "replace") for number in numbers)
    return Module(rate_mt=rate, width_bits=width_bits, place=place)


def _read_windows_table() -> bytes:
    read = ctypes.CDLL("kernel32").GetSystemFirmwareTable
    provider = int.from_bytes(b"RSMB", "big")
    size = read(provider, 0, None, 0)
    if size <= _WINDOWS_HEADER_BYTES:
        return b""
    buffer = ctypes.create_string_buffer(size)
    read(provider, 0, buffer, size)
    return buffer.raw[_WINDOWS_HEADER_BYTES:]
