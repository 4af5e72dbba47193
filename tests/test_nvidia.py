"""What NVIDIA's driver says, with a stand-in for its library, and with the real one's own words."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from localmistral.fit.probes.nvidia import ask_nvml, read_nvidia


@dataclass
class Card:
    """What a driver would say of one; None is refused as not supported."""

    name: str | bytes = "NVIDIA GeForce RTX 3090"
    bus: str | bytes = "00000000:01:00.0"
    memory: tuple[int, int] | None = (25769803776, 25300000000)
    clocks: dict[int, int] = field(default_factory=lambda: {2: 9751, 1: 2100})
    width: int | None = 384
    cores: int | None = 10496
    capability: tuple[int, int] | None = (8, 6)
    link: tuple[int, int] | None = (4, 8)


class Nvml:
    """Answers as pynvml does: its names and its errors."""

    NVMLError = pynvml.NVMLError
    NVML_CLOCK_MEM = pynvml.NVML_CLOCK_MEM
    NVML_CLOCK_SM = pynvml.NVML_CLOCK_SM
    NVML_P2P_CAPS_INDEX_READ = pynvml.NVML_P2P_CAPS_INDEX_READ
    NVML_P2P_STATUS_OK = pynvml.NVML_P2P_STATUS_OK

    def __init__(self, *cards: Card, has_peers: bool = False, fails: int | None = None) -> None:
        self.cards = cards
        self.has_peers = has_peers
        self.fails = fails
        self.is_open = False

    def nvmlInit(self) -> None:  # noqa: N802
        if self.fails is not None:
            raise pynvml.NVMLError(self.fails)
        self.is_open = True

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.is_open = False

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.cards)

    def nvmlDeviceGetP2PStatus(self, one: Card, other: Card, _index: int) -> int:  # noqa: N802
        return 0 if self.has_peers else 1

    def __getattr__(self, name: str) -> Any:
        answers = {
            "nvmlDeviceGetHandleByIndex": lambda index: self.cards[index],
            "nvmlSystemGetDriverVersion": lambda: "550.54.14",
            "nvmlSystemGetCudaDriverVersion_v2": lambda: 12040,
            "nvmlDeviceGetName": lambda card: card.name,
            "nvmlDeviceGetPciInfo": lambda card: SimpleNamespace(busId=card.bus),
            "nvmlDeviceGetMemoryInfo": lambda card: SimpleNamespace(
                total=told(card.memory)[0], free=card.memory[1], used=0
            ),
            "nvmlDeviceGetMaxClockInfo": lambda card, kind: told(card.clocks.get(kind)),
            "nvmlDeviceGetMemoryBusWidth": lambda card: told(card.width),
            "nvmlDeviceGetNumGpuCores": lambda card: told(card.cores),
            "nvmlDeviceGetCudaComputeCapability": lambda card: told(card.capability),
            "nvmlDeviceGetMaxPcieLinkGeneration": lambda card: told(card.link)[0],
            "nvmlDeviceGetCurrPcieLinkWidth": lambda card: told(card.link)[1],
        }
        return answers[name]


def told(value: Any) -> Any:
    if value is None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
    return value


def test_every_name_that_is_asked_for_is_one_of_the_library() -> None:
    asked = [name for name in (*vars(Nvml), "nvmlDeviceGetMemoryBusWidth") if "vml" in name.lower()]
    assert all(hasattr(pynvml, name) for name in asked)
    for name in (
        "nvmlDeviceGetNumGpuCores",
        "nvmlDeviceGetCurrPcieLinkWidth",
        "nvmlDeviceGetMaxPcieLinkGeneration",
        "nvmlDeviceGetCudaComputeCapability",
        "nvmlDeviceGetMaxClockInfo",
        "nvmlSystemGetCudaDriverVersion_v2",
        "nvmlDeviceGetPciInfo",
    ):
        assert hasattr(pynvml, name)


def test_a_card_is_told_with_memory_rates_and_link() -> None:
    nvml = Nvml(Card())
    report = ask_nvml(nvml)
    (card,) = report.cards
    assert (card.name, card.vendor, card.pci_id) == (
        "NVIDIA GeForce RTX 3090",
        "nvidia",
        "0000:01:00.0",
    )
    assert (card.total_bytes, card.free_bytes) == (25769803776, 25300000000)
    assert card.bandwidth == pytest.approx(936e9, rel=0.001)
    assert card.flops == pytest.approx(2 * 10496 * 2 * 2100e6)
    assert card.link == pytest.approx(15.76e9)
    assert card.compute_capability == (8, 6)
    assert (report.driver, report.cuda, report.problem) == ("550.54.14", (12, 4), None)
    assert not nvml.is_open


def test_what_a_card_does_not_answer_is_left_open() -> None:
    silent = Card(memory=None, clocks={}, width=None, cores=None, capability=None, link=None)
    (card,) = ask_nvml(Nvml(silent)).cards
    assert card.name == "NVIDIA GeForce RTX 3090"
    assert {
        card.total_bytes,
        card.free_bytes,
        card.bandwidth,
        card.flops,
        card.link,
        card.compute_capability,
    } == {None}


def test_names_in_bytes_are_read_as_text() -> None:
    (card,) = ask_nvml(Nvml(Card(name=b"Tesla P40", bus=b"00000001:C1:00.0"))).cards
    assert (card.name, card.pci_id) == ("Tesla P40", "0001:c1:00.0")


@pytest.mark.parametrize(
    ("capability", "factor"),
    [((6, 1), 1), ((7, 0), 8), ((7, 5), 4), ((8, 0), 16), ((8, 9), 2), ((9, 0), 16), ((12, 0), 2)],
)
def test_the_matrix_rate_goes_by_the_generation(capability: tuple[int, int], factor: int) -> None:
    (card,) = ask_nvml(Nvml(Card(capability=capability))).cards
    assert card.flops == pytest.approx(10496 * 2100e6 * 2 * factor)


def test_peers_are_pairs_of_cards_in_both_directions() -> None:
    cards = Card(), Card(bus="00000000:02:00.0"), Card(bus="00000000:03:00.0")
    assert len(ask_nvml(Nvml(*cards, has_peers=True)).peers) == 6
    assert ask_nvml(Nvml(*cards)).peers == frozenset()


def test_no_driver_is_no_problem_and_a_broken_one_is() -> None:
    absent = ask_nvml(Nvml(fails=pynvml.NVML_ERROR_LIBRARY_NOT_FOUND))
    assert (absent.cards, absent.problem) == ((), None)
    broken = ask_nvml(Nvml(fails=pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH))
    assert broken.cards == ()
    assert broken.problem is not None
    assert "ersion" in broken.problem


def test_this_machine_is_asked_without_an_error() -> None:
    report = read_nvidia()
    assert all(card.vendor == "nvidia" for card in report.cards)
