"""Cards by any spelling: what people type, what drivers report."""

from __future__ import annotations

from itertools import pairwise

import pytest

from localmistral.fit.cards import (
    all_cards,
    choose_by_memory,
    common_cards,
    estimate_flops,
    find_cards,
    link_bandwidth,
    mentioned_bytes,
    suggest_names,
)
from localmistral.fit.machine import GIB

NAMES = sorted({card.name for card in all_cards()})


@pytest.mark.parametrize(
    ("spelling", "name", "memory_gib"),
    [
        ("3090", "RTX 3090", 24),
        ("rtx-3090", "RTX 3090", 24),
        ("RTX3090", "RTX 3090", 24),
        ("geforce3090", "RTX 3090", 24),
        ("NVIDIA GeForce RTX 3090", "RTX 3090", 24),
        ("  nvidia_geforce_rtx_3090 ", "RTX 3090", 24),
        ("3090ti", "RTX 3090 Ti", 24),
        ("4070 ti super", "RTX 4070 Ti Super", 16),
        ("4090d", "RTX 4090 D", 24),
        ("NVIDIA GeForce RTX 4060 Ti 16GB", "RTX 4060 Ti", 16),
        ("4060ti-16g", "RTX 4060 Ti", 16),
        ("NVIDIA GeForce GTX 1060 3GB", "GTX 1060", 3),
        ("NVIDIA GeForce RTX 3080 Laptop GPU", "RTX 3080 Laptop", 8),
        ("rtx-3080-mobile", "RTX 3080 Laptop", 8),
        ("NVIDIA GeForce RTX 2070 with Max-Q Design", "RTX 2070", 8),
        ("a6000", "RTX A6000", 48),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada", 48),
        ("Quadro RTX 6000", "Quadro RTX 6000", 24),
        ("rtx-pro-6000", "RTX PRO 6000", 96),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "RTX PRO 6000", 96),
        (
            "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition",
            "RTX PRO 6000 Max-Q",
            96,
        ),
        ("NVIDIA A100-SXM4-80GB", "A100 SXM4", 80),
        ("NVIDIA A100 80GB PCIe", "A100", 80),
        ("NVIDIA A100-PCIE-40GB", "A100", 40),
        ("NVIDIA H100 80GB HBM3", "H100", 80),
        ("NVIDIA H100 PCIe", "H100 PCIe", 80),
        ("Tesla V100-SXM2-32GB", "Tesla V100", 32),
        ("t4", "Tesla T4", 16),
        ("Tesla P40", "Tesla P40", 24),
        ("rx-7900-xtx", "RX 7900 XTX", 24),
        ("7900xtx", "RX 7900 XTX", 24),
        ("AMD Radeon RX 7900 XTX (RADV NAVI31)", "RX 7900 XTX", 24),
        ("AMD Instinct MI300X", "Instinct MI300X", 192),
        ("mi50", "Instinct MI50", 16),
        ("Intel(R) Arc(TM) B580 Graphics", "Arc B580", 12),
        ("a770", "Arc A770", 16),
        ("Apple M4 Max", "M4 Max", 36),
        ("m2-ultra", "M2 Ultra", 64),
        ("NVIDIA GB10", "GB10", 128),
        ("AMD Radeon 8060S", "8060S", 128),
    ],
)
def test_a_card_is_found_by_this_spelling(spelling: str, name: str, memory_gib: int) -> None:
    card = find_cards(spelling)[0]
    assert (card.name, card.memory_bytes) == (name, memory_gib * GIB)


@pytest.mark.parametrize("name", NAMES)
def test_every_card_is_found_by_its_name_and_as_it_would_be_typed(name: str) -> None:
    rows = find_cards(name)
    assert {row.name for row in rows} == {name}
    assert rows == tuple(card for card in all_cards() if card.name == name)
    assert find_cards(rows[0].slug) == find_cards(rows[0].slug.replace("-", "").upper()) == rows


@pytest.mark.parametrize("card", all_cards(), ids=lambda card: f"{card.slug}-{card.memory_bytes}")
def test_a_row_has_figures_that_such_cards_have(card: object) -> None:
    from localmistral.fit.cards import Card

    assert isinstance(card, Card)
    assert 2 * GIB <= card.memory_bytes <= 288 * GIB
    assert 68e9 <= card.bandwidth <= 8e12
    assert 1e12 < card.flops <= 2.5e15
    assert 7e9 < card.link < 64e9
    assert card.backend in ("cuda", "rocm", "vulkan", "metal")
    # A matrix unit does some ten to a thousand operations for each byte of memory it could read.
    assert 5 < card.flops / card.bandwidth < 500


def test_the_bandwidths_are_those_of_the_data_sheets() -> None:
    told = {
        "RTX 3060": 360, "RTX 3080": 760, "RTX 3090": 936, "RTX 3090 Ti": 1008,
        "RTX 4060 Ti": 288, "RTX 4070": 504, "RTX 4070 Ti Super": 672, "RTX 4080": 717,
        "RTX 4090": 1008, "RTX 5070 Ti": 896, "RTX 5080": 960, "RTX 5090": 1792,
        "RTX A6000": 768, "RTX 6000 Ada": 960, "RTX PRO 6000": 1792, "RX 7900 XTX": 960,
    }  # fmt: skip
    assert {name: find_cards(name)[0].bandwidth / 1e9 for name in told} == told


@pytest.mark.parametrize("name", ["", " ", "6000", "rtx6000", "rtx", "x", "24GiB", "AMD", "3091"])
def test_what_names_no_card_or_several_finds_none(name: str) -> None:
    assert find_cards(name) == ()


def test_the_size_in_a_name_chooses_among_rows_or_is_told() -> None:
    assert [row.memory_bytes for row in find_cards("4060 ti 16gb")] == [16 * GIB]
    assert len(find_cards("4060 ti")) == 2
    assert [row.memory_bytes for row in find_cards("rtx-3090-48gb")] == [24 * GIB]
    assert mentioned_bytes("rtx-3090-48gb") == 48 * GIB
    assert mentioned_bytes("rtx-3090") is None
    assert choose_by_memory(find_cards("4060ti"), 15.6 * GIB).memory_bytes == 16 * GIB  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("rtx-4099", "rtx-4090"),
        ("rtx 3900", "rtx-3090"),
        ("rtx6000", "rtx-6000-ada"),
        ("7900", "rx-7900-xtx"),
        ("h10", "h100"),
    ],
)
def test_a_near_miss_names_its_neighbour_as_it_is_typed(name: str, near: str) -> None:
    assert near in suggest_names(name)
    assert all(find_cards(found) for found in suggest_names(name))


def test_nothing_like_a_card_has_no_neighbours() -> None:
    assert suggest_names("qwertz-uiop") == ()
    assert suggest_names("") == ()


def test_common_cards_grow_in_every_respect() -> None:
    cards = common_cards()
    for figure in ("memory_bytes", "bandwidth", "flops", "link"):
        values = [getattr(card, figure) for card in cards]
        assert values == sorted(values), figure


def test_the_matrix_rate_of_a_bandwidth_is_that_of_the_common_card_and_grows() -> None:
    assert estimate_flops(936e9) == pytest.approx(71e12)
    assert estimate_flops(448e9) == pytest.approx(47.4e12)
    rates = [estimate_flops(speed * 1e9) for speed in range(1, 4000, 7)]
    assert all(0 < low <= high for low, high in pairwise(rates))


def test_a_link_is_generation_times_lanes() -> None:
    assert link_bandwidth(3, 16) == pytest.approx(15.76e9)
    assert link_bandwidth(4, 8) == pytest.approx(link_bandwidth(3, 16), rel=0.01)
    assert link_bandwidth(9, 16) == link_bandwidth(6, 16)
