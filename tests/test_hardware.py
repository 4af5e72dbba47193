"""Machines put together from what llama.cpp lists and what drivers report."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from localmistral.engine.devices import list_devices
from localmistral.fit.hardware import assemble, choose_devices, probe_hardware, probe_machine
from localmistral.fit.machine import GIB, Cpu, Machine, Ram
from localmistral.fit.probes.builds import choose_cuda_wheel, mending_command, rebuilding_command
from localmistral.fit.probes.found import BackendDevice, FoundCard
from localmistral.fit.probes.mismatch import Mismatch, compare
from localmistral.fit.probes.nvidia import NvidiaReport

RAM = Ram(total_bytes=64 * GIB, available_bytes=60 * GIB, bandwidth=80e9)
PROCESSOR = Cpu(name="CPU", cores=8)
ON_CPU = BackendDevice(
    name="CPU",
    description="CPU",
    kind="cpu",
    backend="cpu",
    free_bytes=60 * GIB,
    total_bytes=64 * GIB,
)


def device(number: int, name: str = "NVIDIA GeForce RTX 3090", **changes: Any) -> BackendDevice:
    fields = {
        "name": f"CUDA{number}",
        "description": name,
        "kind": "gpu",
        "backend": "cuda",
        "free_bytes": 23 * GIB,
        "total_bytes": 24 * GIB,
        "pci_id": f"0000:0{number}:00.0",
    }
    return BackendDevice(**{**fields, **changes})


def card(number: int, name: str = "NVIDIA GeForce RTX 3090", **changes: Any) -> FoundCard:
    fields = {
        "name": name,
        "vendor": "nvidia",
        "pci_id": f"0000:0{number}:00.0",
        "total_bytes": 24 * GIB,
        "free_bytes": 23 * GIB,
        "compute_capability": (8, 6),
    }
    return FoundCard(**{**fields, **changes})


def report(*cards: FoundCard, **changes: Any) -> NvidiaReport:
    return NvidiaReport(**{"cards": cards, "driver": "550.54", "cuda": (12, 4), **changes})


def machine(
    *devices: BackendDevice, nvidia: NvidiaReport | None = None, on_bus: tuple[FoundCard, ...] = ()
) -> Machine:
    nvidia = nvidia or NvidiaReport()
    return assemble((*devices, ON_CPU), nvidia, on_bus, RAM, PROCESSOR).machine


# Cards


def test_a_card_has_llama_cpps_memory_and_the_tables_rates() -> None:
    found = machine(device(1), nvidia=report(card(1, free_bytes=20 * GIB, link=7.9e9)))
    (gpu,) = found.gpus
    assert (gpu.name, gpu.device, gpu.backend) == ("RTX 3090", "CUDA1", "cuda")
    assert (gpu.total_bytes, gpu.free_bytes) == (24 * GIB, 20 * GIB)  # the lower of both views
    assert (gpu.bandwidth, gpu.flops, gpu.link) == (936e9, 71e12, 7.9e9)
    assert found.notes == ()
    assert found.is_real


def test_cards_are_matched_by_their_place_and_not_by_their_order() -> None:
    nvidia = report(card(1, free_bytes=5 * GIB), card(2, free_bytes=6 * GIB))
    gpus = machine(device(2), device(1), nvidia=nvidia).gpus
    assert [gpu.free_bytes for gpu in gpus] == [6 * GIB, 5 * GIB]


def test_cards_without_a_place_are_matched_by_name_in_order() -> None:
    nvidia = report(card(1, free_bytes=5 * GIB), card(2, free_bytes=6 * GIB))
    gpus = machine(device(7, pci_id=None), device(8, pci_id=None), nvidia=nvidia).gpus
    assert [gpu.free_bytes for gpu in gpus] == [5 * GIB, 6 * GIB]


def test_a_drivers_bandwidth_is_believed_where_it_is_quite_another() -> None:
    def bandwidth_with(told: float | None) -> float:
        return machine(device(1), nvidia=report(card(1, bandwidth=told))).gpus[0].bandwidth

    assert bandwidth_with(None) == 936e9
    assert bandwidth_with(930e9) == 936e9
    assert bandwidth_with(700e9) == 700e9


def test_a_card_that_no_table_has_counts_by_its_driver_or_as_a_common_one() -> None:
    unknown = "NVIDIA GeForce RTX 9999"
    told = report(card(1, unknown, bandwidth=2e12, flops=3e14))
    (gpu,) = machine(device(1, unknown), nvidia=told).gpus
    assert (gpu.name, gpu.bandwidth, gpu.flops) == (unknown, 2e12, 3e14)
    found = machine(device(1, unknown), nvidia=report(card(1, unknown)))
    assert found.gpus[0].bandwidth == 936e9
    assert any(unknown in note and "RTX 3090" in note for note in found.notes)


def test_one_card_that_two_backends_list_counts_once() -> None:
    twice = device(1, name="NVIDIA GeForce RTX 3090", backend="vulkan")
    twice = replace(twice, name="Vulkan0")
    assert [gpu.device for gpu in machine(device(1), twice).gpus] == ["CUDA1"]
    unplaced = replace(device(1), pci_id=None), replace(device(2), pci_id=None)
    assert len(machine(*unplaced).gpus) == 2


def test_integrated_graphics_are_used_only_where_there_is_no_card() -> None:
    integrated = device(
        3, "AMD Radeon 780M", kind="igpu", backend="vulkan", free_bytes=40 * GIB, pci_id=None
    )
    with_card = machine(device(1), integrated, nvidia=report(card(1)))
    assert [gpu.device for gpu in with_card.gpus] == ["CUDA1"]
    assert any("780M" in note for note in with_card.notes)
    alone = machine(integrated)
    (gpu,) = alone.gpus
    assert gpu.is_integrated
    assert gpu.free_bytes + alone.ram.available_bytes <= RAM.available_bytes
    assert alone.ram.available_bytes >= RAM.available_bytes / 4


def test_unified_memory_is_divided_and_not_counted_twice() -> None:
    apple = BackendDevice(
        name="MTL0",
        description="Apple M9 Max",
        kind="gpu",
        backend="metal",
        free_bytes=48 * GIB,
        total_bytes=48 * GIB,
    )
    found = machine(apple)
    (gpu,) = found.gpus
    assert (gpu.is_integrated, gpu.bandwidth) == (True, RAM.bandwidth)
    assert gpu.free_bytes == 45 * GIB
    assert found.ram.available_bytes == 15 * GIB


def test_an_rpc_server_is_a_card_of_unknown_rates_or_this_machines_ram() -> None:
    def remote(description: str) -> BackendDevice:
        return device(0, description, backend="rpc", pci_id=None)

    here, there = machine(remote("127.0.0.1:50052"), remote("10.0.0.2:50052")).gpus
    assert (here.bandwidth, here.backend) == (RAM.bandwidth, "rpc")
    assert there.bandwidth == 360e9
    assert there.link < here.link
    assert here.assumption == ""
    assert "RPC" in there.assumption


def test_peer_access_needs_every_pair_of_the_cards_in_use() -> None:
    ids = ["0000:01:00.0", "0000:02:00.0"]
    pairs = frozenset({(ids[0], ids[1]), (ids[1], ids[0])})
    both = report(card(1), card(2), peers=pairs)
    assert machine(device(1), device(2), nvidia=both).has_peer_access
    assert not machine(device(1), nvidia=both).has_peer_access
    assert not machine(device(1), device(2), device(3), nvidia=both).has_peer_access
    one_way = report(card(1), card(2), peers=frozenset({(ids[0], ids[1])}))
    assert not machine(device(1), device(2), nvidia=one_way).has_peer_access


def test_accelerators_and_the_cpu_are_no_cards() -> None:
    blas = device(0, "OpenBLAS", kind="accel", backend="blas", pci_id=None)
    assert choose_devices((blas, ON_CPU)) == ((), ())
    assert machine(blas).gpus == ()


# Where the views disagree


def mismatch_of(
    *devices: BackendDevice, nvidia: NvidiaReport, built_in: tuple[str, ...] = ("cpu",)
) -> tuple[Mismatch, ...]:
    return compare((*devices, ON_CPU), nvidia.cards, nvidia, built_in)


@pytest.fixture(autouse=True)
def nothing_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)


def test_cards_that_the_build_cannot_use_are_said_with_the_command_that_mends_it() -> None:
    cards = (card(1, "NVIDIA GeForce RTX 4090"), card(2, "NVIDIA GeForce RTX 4090"))
    (found,) = mismatch_of(nvidia=report(*cards))
    assert found.sentence.startswith(
        "2x RTX 4090 found, but this llama-cpp-python is built without CUDA"
    )
    assert found.command.endswith("/whl/cu124")
    assert found.is_mistake
    notes = machine(nvidia=report(*cards)).notes
    assert notes == (found.sentence,)
    assert machine(nvidia=report(*cards)).gpus == ()


def test_different_cards_are_all_named() -> None:
    cards = (card(1), card(2, "NVIDIA GeForce RTX 3060"), card(3))
    (found,) = mismatch_of(nvidia=report(*cards))
    assert "2x RTX 3090 and RTX 3060 found" in found.sentence


def test_cards_that_are_all_used_are_no_matter() -> None:
    nvidia = report(card(1), card(2))
    assert mismatch_of(device(1), device(2), nvidia=nvidia) == ()
    unplaced = device(1, pci_id=None), device(2, pci_id=None)
    assert mismatch_of(*unplaced, nvidia=nvidia) == ()
    by_vulkan = device(1, backend="vulkan"), device(2, backend="vulkan")
    assert mismatch_of(*by_vulkan, nvidia=nvidia) == ()


def test_a_build_with_the_backend_that_finds_no_card_is_not_called_a_build_without() -> None:
    (found,) = mismatch_of(nvidia=report(card(1)), built_in=("cuda", "cpu"))
    assert "without" not in found.sentence
    assert "driver 550.54" in found.sentence
    (second,) = mismatch_of(device(1), nvidia=report(card(1), card(2)))
    assert "RTX 3090 found" in second.sentence


def test_cards_that_were_hidden_on_purpose_are_no_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    (found,) = mismatch_of(device(1), nvidia=report(card(1), card(2)))
    assert "CUDA_VISIBLE_DEVICES=0" in found.sentence
    assert not found.is_mistake
    (without,) = mismatch_of(nvidia=report(card(1)))
    assert "built without CUDA" in without.sentence


def test_a_driver_that_is_missing_or_broken_is_said_once() -> None:
    on_bus = (card(1, "GeForce RTX 3090"),)
    (missing,) = compare((ON_CPU,), on_bus, NvidiaReport())
    assert "driver is not installed" in missing.sentence
    (broken,) = compare((ON_CPU,), on_bus, NvidiaReport(problem="It doesn't answer."))
    assert broken.sentence == "It doesn't answer."


def test_every_maker_has_a_remedy() -> None:
    for vendor, word in (("amd", "Vulkan"), ("intel", "Vulkan")):
        idle = card(1, f"{vendor} card", vendor=vendor)
        (found,) = compare((ON_CPU,), (idle,), NvidiaReport())
        assert word in found.sentence
        assert found.command


@pytest.mark.parametrize(
    ("cuda", "capabilities", "folder"),
    [
        ((13, 4), [(8, 6)], "cu132"),
        ((13, 1), [(12, 0)], "cu130"),
        ((13, 0), [(7, 0)], "cu125"),
        ((12, 8), [(8, 9), (6, 1)], "cu125"),
        ((12, 4), [(8, 6)], "cu124"),
        ((12, 0), [(8, 6)], "cu118"),
        ((11, 4), [(8, 6)], None),
        ((12, 8), [(5, 2)], None),
        ((12, 4), [None], "cu124"),
        (None, [(8, 6)], None),
    ],
)
def test_ready_wheels_fit_driver_and_cards(
    cuda: tuple[int, int] | None, capabilities: list[tuple[int, int] | None], folder: str | None
) -> None:
    assert choose_cuda_wheel(cuda, capabilities) == folder


def test_commands_use_the_interpreter_of_this_program() -> None:
    for command in (mending_command([card(1)], cuda=(12, 4)), rebuilding_command()):
        assert " -m pip install " in command
        assert Path(sys.executable).name in command
    assert "--no-binary llama-cpp-python" in rebuilding_command()


def test_without_a_ready_wheel_it_is_built_in_the_words_of_the_system() -> None:
    idle = [card(1)]
    assert mending_command(idle, cuda=None, system="Linux").startswith(
        'CMAKE_ARGS="-DGGML_CUDA=on" '
    )
    assert mending_command(idle, cuda=None, system="Windows").startswith("$env:CMAKE_ARGS=")
    amd = [card(1, vendor="amd")]
    assert "GGML_HIP" in mending_command(amd, system="Linux", has_rocm=True)
    assert "/vulkan" in mending_command(amd, system="Linux", has_rocm=False)
    assert "/vulkan" in mending_command(amd, system="Windows", has_rocm=True)


# This machine


def test_this_machine_is_probed() -> None:
    devices = list_devices()
    found = probe_hardware(devices)
    assert found.devices == devices
    assert found.machine.cpu.cores >= 1
    assert 0 < found.machine.ram.available_bytes <= found.machine.ram.total_bytes
    assert found.logical_cpus >= found.machine.cpu.cores
    assert found.system


def test_without_devices_nobody_is_asked_about_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("asked")

    monkeypatch.setattr("localmistral.fit.hardware.read_nvidia", refuse)
    monkeypatch.setattr("localmistral.fit.hardware.read_pci_cards", refuse)
    assert probe_machine(()).gpus == ()
    with pytest.raises(AssertionError):
        probe_machine([ON_CPU])


def test_a_container_has_its_limit_for_memory(tmp_path: Path) -> None:
    for name, text in {
        "proc/self/mountinfo": "30 24 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/memory.max": "300000000\n",
        "sys/fs/cgroup/memory.current": "100000000\n",
        "sys/fs/cgroup/cpu.max": "100000 100000\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    found = probe_hardware((), root=tmp_path)
    assert found.machine.ram.total_bytes == 300_000_000
    assert found.machine.ram.available_bytes == 200_000_000
    assert found.machine.ram.budget_bytes == 0
    assert found.machine.cpu.cores == 1
    assert found.limits.cpus == 1


def test_a_machine_without_any_of_the_files_is_probed_all_the_same(tmp_path: Path) -> None:
    found = probe_hardware([ON_CPU], root=tmp_path)
    assert found.machine.ram.bandwidth == 51e9
    assert found.machine.cpu.cores >= 1


# The command


def hardware(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "localmistral", "hardware", *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, stdin=subprocess.DEVNULL
    )
    assert done.returncode == code, done.stderr
    return done


def test_the_json_document_of_this_machine_has_its_keys() -> None:
    document = json.loads(hardware("--json").stdout)
    assert set(document) == {
        "is_real", "system", "gpus", "has_peer_access", "ram", "cpu", "devices", "backends",
        "cards", "nvidia", "limits", "mismatches", "notes",
    }  # fmt: skip
    assert document["is_real"]
    assert [device["name"] for device in document["devices"]].count("CPU") == 1
    assert document["ram"]["budget_bytes"] <= document["ram"]["available_bytes"]
    assert document["cpu"]["logical_cpus"] >= document["cpu"]["cores"]


def test_a_typed_machine_is_shown_as_it_is_understood() -> None:
    typed = ("--gpu", "2x3090", "--gpu", "16GiB@448GB/s", "--ram", "64GiB@90GB/s")
    document = json.loads(hardware(*typed, "--json").stdout)
    assert [gpu["name"] for gpu in document["gpus"]] == ["RTX 3090", "RTX 3090", "16 GiB card"]
    assert document["gpus"][2]["bandwidth"] == 448e9
    assert document["ram"]["bandwidth"] == 90e9
    assert (document["is_real"], document["devices"], document["notes"]) == (False, [], [])
    shown = hardware(*typed).stdout
    assert "RTX 3090" in shown
    assert "448 GB/s" in shown


def test_wrong_specs_are_usage_errors() -> None:
    for arguments in (("--gpu", "3091"), ("--ram", "0"), ("--cpu-only", "--gpu", "3090")):
        done = hardware(*arguments, code=2)
        assert done.stdout == ""
        assert done.stderr.startswith("error: ")
        assert len(done.stderr.splitlines()) == 2
