"""Machines as people type them, and what is refused in one sentence."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localmistral.errors import UsageError
from localmistral.fit.machine import GIB, Cpu, Gpu, Machine, Ram
from localmistral.fit.specs import TYPED_CPU, make_machine, parse_gpus, parse_ram

CARD = Gpu(
    name="Card",
    total_bytes=24 * GIB,
    free_bytes=22 * GIB,
    bandwidth=1e12,
    flops=1e14,
    device="CUDA0",
)
REAL = Machine(
    gpus=(CARD, CARD),
    ram=Ram(total_bytes=64 * GIB, available_bytes=50 * GIB, bandwidth=80e9),
    cpu=Cpu(name="Real", cores=12),
    has_peer_access=True,
    notes=("found",),
)


@pytest.mark.parametrize(
    ("text", "sizes_gib", "bandwidth", "name"),
    [
        ("24GiB", [24], 936e9, "24 GiB card"),
        ("24g", [24], 936e9, "24 GiB card"),
        ("22.5 GiB", [22.5], 936e9, "22.5 GiB card"),
        ("16GiB@448GB/s", [16], 448e9, "16 GiB card"),
        ("24GiB @ 1.2TB/s", [24], 1200e9, "24 GiB card"),
        ("rtx-4090", [24], 1008e9, "RTX 4090"),
        ("3090:22GiB", [22], 936e9, "RTX 3090 22 GiB"),
        ("3090@900GB/s", [24], 900e9, "RTX 3090"),
        ("3090:20GiB@900GB/s", [20], 900e9, "RTX 3090 20 GiB"),
        ("3080:20GiB", [20], 760e9, "RTX 3080"),
        ("4060ti", [8], 288e9, "RTX 4060 Ti"),
        ("4060ti:16GiB", [16], 288e9, "RTX 4060 Ti"),
        ("rtx-4060-ti-16gb", [16], 288e9, "RTX 4060 Ti"),
        ("rtx-3090-48gb", [48], 936e9, "RTX 3090 48 GiB"),
        ("2x3090", [24, 24], 936e9, "RTX 3090"),
        ("2x 24GiB", [24, 24], 936e9, "24 GiB card"),
        ("4 X 16GiB@448GB/s", [16] * 4, 448e9, "16 GiB card"),
        ("16x8GiB", [8] * 16, 224e9, "8 GiB card"),
    ],
)
def test_a_spec_means_these_cards(
    text: str, sizes_gib: list[float], bandwidth: float, name: str
) -> None:
    gpus = parse_gpus([text])
    assert [gpu.total_bytes for gpu in gpus] == [size * GIB for size in sizes_gib]
    assert {(gpu.free_bytes, gpu.bandwidth, gpu.name) for gpu in gpus} == {
        (gpus[0].total_bytes, bandwidth, name)
    }
    assert {(gpu.backend, gpu.device) for gpu in gpus} == {("cuda", None)}


def test_cards_keep_the_order_in_which_they_are_typed() -> None:
    names = [gpu.name for gpu in parse_gpus(["3060", "2x3090", "24GiB", "3060"])]
    assert names == ["RTX 3060", "RTX 3090", "RTX 3090", "24 GiB card", "RTX 3060"]
    assert parse_gpus([]) == ()


@pytest.mark.parametrize(
    "name", ["7900xt", "7900 xtx", "6800xt", "9070xt:16GiB", "6950 XT@576GB/s"]
)
def test_a_name_with_an_x_in_it_is_no_count(name: str) -> None:
    (gpu,) = parse_gpus([name])
    assert gpu.name.startswith("RX ")
    assert parse_gpus([f"3x {name}"]) == (gpu,) * 3


def test_a_maker_decides_the_backend() -> None:
    backends = [parse_gpus([name])[0].backend for name in ("3090", "7900xtx", "b580", "m4-max")]
    assert backends == ["cuda", "rocm", "vulkan", "metal"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "No card"),
        ("  ", "No card"),
        ("0", "No card"),
        ("24", "24GiB"),
        ("-24GiB", "No card"),
        ("nan", "No card"),
        ("infGiB", "No card"),
        ("3091", "rtx-3090"),
        ("rtx-6000", "rtx-6000-ada"),
        ("3090,3060", "Repeat --gpu"),
        ("0GiB", "size"),
        ("1PB", "1 TiB"),
        ("1B", "256 MiB"),
        ("100MiB", "256 MiB"),
        ("3090:", "size"),
        ("3090:22", "22GiB"),
        ("3090:0GiB", "size"),
        ("3090:1PB", "1 TiB"),
        ("foo:24GiB", "foo"),
        ("24GiB:24GiB", "No card"),
        ("24GiB@", "bandwidth"),
        ("24GiB@936", "bandwidth"),
        ("24GiB@936GB", "bandwidth"),
        ("24GiB@0GB/s", "bandwidth"),
        ("24GiB@1MB/s", "bandwidth"),
        ("24GiB@900TB/s", "bandwidth"),
        ("@936GB/s", "No card"),
        ("0x3090", "0 cards"),
        ("17x3090", "17 cards"),
        ("65x3090", "65 cards"),
        ("999999999x3090", "No card"),
        ("2x", "size"),
        ("x3090", "No card"),
        ("2x2x3090", "No card"),
        ("-1x3090", "No card"),
        ("٣x3090", "No card"),
        ("a" * 5000, "No card"),
    ],
)
def test_a_spec_that_means_nothing_is_refused_with_the_way_to_write_it(
    text: str, words: str
) -> None:
    with pytest.raises(UsageError) as refused:
        parse_gpus([text])
    said = f"{refused.value.message} {refused.value.hint}"
    assert words in said
    assert refused.value.hint
    assert len(said) < 500


def test_more_cards_than_llama_cpp_can_use_are_refused_though_each_option_is_fine() -> None:
    assert len(parse_gpus(["8x3090", "8x3090"])) == 16
    with pytest.raises(UsageError, match="17 cards"):
        parse_gpus(["8x3090", "8x3090", "3060"])


@given(st.text(max_size=40) | st.from_regex(r"[0-9x. ]{0,4}(rtx|a|24|3090|GiB)?[:@x0-9a-zG/. ]*"))
def test_any_text_is_cards_or_a_usage_error(text: str) -> None:
    try:
        gpus = parse_gpus([text])
    except UsageError as error:
        assert error.message
    else:
        assert 1 <= len(gpus) <= 16
        assert all(gpu.total_bytes > 0 and gpu.bandwidth > 0 and gpu.flops > 0 for gpu in gpus)


@given(st.integers(300, 400_000), st.integers(300, 400_000), st.booleans())
def test_more_memory_never_makes_a_typed_card_slower(one: int, other: int, has_speed: bool) -> None:
    speed = "@500GB/s" if has_speed else ""
    small, large = parse_gpus([f"{size}MiB{speed}" for size in sorted((one, other))])
    assert small.bandwidth <= large.bandwidth
    assert small.flops <= large.flops
    assert small.link <= large.link


def test_what_was_taken_for_granted_is_said_once() -> None:
    machine = make_machine(None, parse_gpus(["2x24GiB", "4060ti"]), parse_ram("64GiB"))
    assert len(machine.notes) == 3
    assert "RTX 3090" in machine.notes[0]
    assert "16GiB" in machine.notes[1]
    assert "51 GB/s" in machine.notes[2]
    told = make_machine(None, parse_gpus(["24GiB@936GB/s", "3090"]), parse_ram("64GiB@90GB/s"))
    assert told.notes == ()


def test_ram_is_a_size_and_perhaps_a_bandwidth() -> None:
    assert parse_ram("64GiB") == Ram(total_bytes=64 * GIB, available_bytes=64 * GIB, bandwidth=51e9)
    assert parse_ram(" 32g @ 90GB/s").bandwidth == 90e9
    assert parse_ram("32GB").total_bytes == 32_000_000_000


@pytest.mark.parametrize(
    "text", ["", "0", "64", "1PB", "17TiB", "1MiB", "-1GiB", "64GiB@", "64GiB@90", "64GiB@9TB/s",
             "64GiB@1MB/s", "2x32GiB", "ddr5"]
)  # fmt: skip
def test_ram_that_means_nothing_is_refused(text: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse_ram(text)
    assert refused.value.hint


def test_a_machine_that_is_typed_whole_needs_no_other() -> None:
    machine = make_machine(None, parse_gpus(["2x3090"]), parse_ram("64GiB"))
    assert [gpu.name for gpu in machine.gpus] == ["RTX 3090"] * 2
    assert (machine.cpu, machine.is_real, machine.has_peer_access) == (TYPED_CPU, False, False)
    assert machine.ram.available_bytes == 64 * GIB
    assert make_machine(None, (), parse_ram("64GiB"), cpu_only=True).gpus == ()


def test_what_is_not_typed_is_this_machines() -> None:
    assert make_machine(REAL, (), None) is REAL
    with_cards = make_machine(REAL, parse_gpus(["3090"]), None)
    assert (with_cards.ram, with_cards.cpu) == (REAL.ram, REAL.cpu)
    assert [gpu.name for gpu in with_cards.gpus] == ["RTX 3090"]
    assert (with_cards.is_real, with_cards.has_peer_access) == (False, False)
    assert with_cards.notes == ()
    with_ram = make_machine(REAL, (), parse_ram("128GiB@90GB/s"))
    assert with_ram.gpus == REAL.gpus
    assert with_ram.has_peer_access
    assert with_ram.notes == ("found",)
    alone = make_machine(REAL, (), None, cpu_only=True)
    assert (alone.gpus, alone.ram) == ((), REAL.ram)


def test_no_cards_and_cards_contradict_each_other() -> None:
    with pytest.raises(UsageError, match="--cpu-only"):
        make_machine(REAL, parse_gpus(["3090"]), None, cpu_only=True)
    with pytest.raises(ValueError, match="RAM"):
        make_machine(None, parse_gpus(["3090"]), None)


def test_memory_that_both_processors_use_is_counted_once() -> None:
    machine = make_machine(None, parse_gpus(["m4-max:64GiB"]), None)
    (gpu,) = machine.gpus
    assert (gpu.is_integrated, gpu.total_bytes, gpu.free_bytes) == (True, 64 * GIB, 48 * GIB)
    assert (machine.ram.total_bytes, machine.ram.available_bytes) == (64 * GIB, 16 * GIB)
    assert machine.ram.bandwidth == gpu.bandwidth
    assert gpu.budget_bytes + machine.ram.budget_bytes < 64 * GIB


def test_an_integrated_card_gives_its_share_back_when_it_is_left_out() -> None:
    shared = replace(CARD, is_integrated=True, free_bytes=30 * GIB)
    ram = replace(REAL.ram, available_bytes=10 * GIB)
    real = replace(REAL, gpus=(shared,), ram=ram)
    assert make_machine(real, (), None, cpu_only=True).ram.available_bytes == 40 * GIB
    assert make_machine(real, parse_gpus(["3090"]), None).ram.available_bytes == 40 * GIB
    assert make_machine(real, (), parse_ram("40GiB")).ram.available_bytes == 10 * GIB
