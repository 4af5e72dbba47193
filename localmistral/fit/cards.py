"""Finding a graphics card by any spelling of its name: what people type, what drivers report.

`3090`, `rtx-3090`, `RTX 3090` and `NVIDIA GeForce RTX 3090` are one card; `4060ti-16gb` names its
memory. Knows no machine; the figures stand in card_table.py.
"""

import difflib
import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

from localmistral.fit import card_table
from localmistral.fit.machine import GIB

LINK_BYTES_PER_LANE = {1: 0.25e9, 2: 0.5e9, 3: 0.985e9, 4: 1.97e9, 5: 3.94e9, 6: 7.56e9}
"""Bytes per second and lane by PCIe generation, after its coding (PCI-SIG)."""

_TABLES = (
    ("cuda", False, card_table.NVIDIA),
    ("rocm", False, card_table.AMD),
    ("vulkan", False, card_table.INTEL),
    ("metal", True, card_table.APPLE),
    ("cuda", True, card_table.INTEGRATED_NVIDIA),
    ("vulkan", True, card_table.INTEGRATED_AMD),
)
"""Backend that llama.cpp has for a maker's cards, and whether they share the CPU's memory. Intel's
run under Vulkan and SYCL; Vulkan is the one with ready builds."""

_NOISE = re.compile(
    "nvidia|geforce|amd|ati|radeon|intel|apple|graphics|gpu|generation|blackwell|workstation|server"
    "|edition|tm|r|tesla|instinct"
)
"""Words of a driver's name for a card that tell nothing apart in the table."""
_OPTIONAL = re.compile("pcie|sxm[2-5]?|nvl|hbm[23]e?|with|max|q|design")
"""Words that tell some cards apart, and are left out where the table has no such row."""
_SERIES = ("rtx", "gtx", "rx", "arc")
"""Words at the front that people leave out."""
_SYNONYMS = {"mobile": "laptop"}
_VENDOR_AT_FRONT = re.compile(r"^(?:nvidia|geforce|tesla|amd|radeon|instinct|intel|apple)+(?=.)")
_IN_BRACKETS = re.compile(r"\([^)]*\)")
_SIZE = re.compile(r"([0-9]{1,4})g(?:i?b)?")
_LONGEST_NAME = 80

COMMON_CARDS = (
    "GTX 1650",
    "GTX 1660",
    "RTX 3050",
    "RTX 3060",
    "RTX 5060 Ti 16GB",
    "RTX 3090",
    "RTX 6000 Ada",
    "RTX PRO 6000",
)
"""What a card known by its size alone is taken for: the one nearest in size, the smaller of two.
The slower of the common cards of a size, and each no slower than the one before it, so that more
memory never makes a machine slower."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """A row of the table, in bytes, bytes per second and operations per second."""

    name: str
    memory_bytes: int
    bandwidth: float
    flops: float
    link: float
    backend: str
    is_integrated: bool = False

    @property
    def slug(self) -> str:
        """The name as one types it: `rtx-3090`."""
        return "-".join(re.findall(r"[a-z0-9+]+", self.name.lower()))


def link_bandwidth(generation: int, lanes: int) -> float:
    """Bytes per second of a PCIe link in one direction; unknown generations count as the newest."""
    newest = max(LINK_BYTES_PER_LANE)
    return LINK_BYTES_PER_LANE[min(max(generation, 1), newest)] * lanes


def find_cards(name: str) -> tuple[Card, ...]:
    """The rows of that name, the usual size first; a size in the name leaves only its row.

    Empty if the name isn't known, or could mean several cards (`6000`).
    """
    words, size_gib = _split(name)
    for key in _spellings(words):
        rows = _index().get(key, ())
        sized = tuple(row for row in rows if size_gib in (None, round(row.memory_bytes / GIB)))
        if rows:
            return sized or rows
    return ()


def mentioned_bytes(name: str) -> int | None:
    """The memory that a name speaks of: 16 GiB of `rtx-4060-ti-16gb`; None if of none."""
    size_gib = _split(name)[1]
    return None if size_gib is None else size_gib * GIB


def choose_by_memory(rows: Sequence[Card], memory_bytes: int) -> Card:
    """Of the sizes a card comes in, the one nearest to what a driver reports."""
    return min(rows, key=lambda row: abs(row.memory_bytes - memory_bytes))


@cache
def common_cards() -> tuple[Card, ...]:
    """The rows of COMMON_CARDS, smallest first."""
    return tuple(find_cards(name)[0] for name in COMMON_CARDS)


def estimate_flops(bandwidth: float) -> float:
    """The matrix rate of a card known by its bandwidth: between common cards, in proportion."""
    # By bandwidth alone, so that more memory at one bandwidth changes no speed. Consumer cards
    # stand between 936 and 1792 GB/s as well: the workstation card of 960 is left out.
    rows = [card for card in common_cards() if card.name != "RTX 6000 Ada"]
    points = [(0.0, 0.0), *((card.bandwidth, card.flops) for card in rows)]
    place = min(bisect_right([speed for speed, _ in points], bandwidth), len(points) - 1)
    (low, slow), (high, fast) = list(pairwise(points))[place - 1]
    return slow + (fast - slow) * (bandwidth - low) / (high - low)


def suggest_names(name: str, count: int = 4) -> tuple[str, ...]:
    """Cards whose names look like `name`, as one would type them, nearest first."""
    words, _ = _split(name)
    wanted = "".join(words)
    by_key = {key: rows[0].slug for key, rows in _index().items()}
    near = difflib.get_close_matches(wanted, by_key, n=3 * count, cutoff=0.6)
    holding = sorted(key for key in by_key if len(wanted) >= 3 and wanted in key)
    return tuple(dict.fromkeys(by_key[key] for key in (*holding, *near)))[:count]


@cache
def all_cards() -> tuple[Card, ...]:
    """Every row of the table."""
    return tuple(
        _read_row(line, backend, is_integrated)
        for backend, is_integrated, text in _TABLES
        for line in text.strip().splitlines()
    )


def _read_row(line: str, backend: str, is_integrated: bool) -> Card:
    name, memory_gib, bandwidth, flops, link = (cell.strip() for cell in line.split("|"))
    generation, lanes = link.split("x")
    return Card(
        name=name,
        memory_bytes=int(memory_gib) * GIB,
        bandwidth=float(bandwidth) * 1e9,
        flops=float(flops) * 1e12,
        link=link_bandwidth(int(generation), int(lanes)),
        backend=backend,
        is_integrated=is_integrated,
    )


@cache
def _index() -> dict[str, tuple[Card, ...]]:
    """Rows by spelling; a spelling that several names share leads to none of them."""
    full: dict[str, list[Card]] = defaultdict(list)
    short: dict[str, list[Card]] = defaultdict(list)
    for card in all_cards():
        key = "".join(_split(card.name)[0])
        full[key].append(card)
        if (shortened := _shorten(key)) != key:
            short[shortened].append(card)
    unique = {key: rows for key, rows in short.items() if len({row.name for row in rows}) == 1}
    return {key: tuple(rows) for key, rows in {**unique, **full}.items()}


def _split(name: str) -> tuple[list[str], int | None]:
    """The telling words of a name, and the GiB it mentions, if any."""
    text = _IN_BRACKETS.sub(" ", name[:_LONGEST_NAME].lower())
    words, size_gib = [], None
    for word in re.findall(r"[a-z0-9]+", text):
        if match := _SIZE.fullmatch(word):
            size_gib = int(match[1])
        elif not _NOISE.fullmatch(word):
            words.append(_SYNONYMS.get(word, word))
    return words, size_gib


def _spellings(words: Sequence[str]) -> Iterator[str]:
    """What the name may stand under, the most exact first."""
    for chosen in (words, [word for word in words if not _OPTIONAL.fullmatch(word)]):
        key = _VENDOR_AT_FRONT.sub("", "".join(chosen))
        yield key
        yield _shorten(key)


def _shorten(key: str) -> str:
    """`rtx3090` -> `3090`."""
    series = next((word for word in _SERIES if key.startswith(word)), "")
    return key.removeprefix(series) or key
