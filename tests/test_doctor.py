"""What doctor says: each judgement with figures made up for it, then the command itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from localmistral.fit.hardware import Hardware, assemble, probe_hardware
from localmistral.fit.last_load import Difference, read_differences, write_differences
from localmistral.fit.machine import GIB, MIB, Cpu, Gpu, Machine, Ram
from localmistral.fit.placement import Placement
from localmistral.fit.plan import DeviceMemory, Plan, PlannedFile, Prediction
from localmistral.fit.probes.checks import (
    Check,
    check_build,
    check_cards,
    check_disk,
    check_last_load,
    check_load,
    check_machine,
    check_paging,
    check_ram,
    check_ram_speed,
    check_threads,
)
from localmistral.fit.probes.limits import Limits
from localmistral.fit.probes.mismatch import Mismatch
from localmistral.fit.probes.nvidia import NvidiaReport
from localmistral.fit.probes.ram_speed import measure_ram_bandwidth

GPU = Gpu(name="RTX 3090", total_bytes=24 * GIB, free_bytes=23 * GIB, bandwidth=936e9, flops=71e12)
MACHINE = Machine(
    gpus=(),
    ram=Ram(total_bytes=32 * GIB, available_bytes=20 * GIB, bandwidth=51e9),
    cpu=Cpu(name="CPU", cores=8, features=("avx", "avx2", "fma")),
)
WITH_CARD = replace(MACHINE, gpus=(GPU,))


def plan_for(ram_bytes: int, download_bytes: int = 10 * GIB, *, is_local: bool = False) -> Plan:
    cpu = DeviceMemory(
        name="CPU",
        budget_bytes=ram_bytes,
        weights_bytes=ram_bytes,
        mmproj_bytes=0,
        kv_bytes=0,
        compute_bytes=0,
    )
    return Plan(
        model="small-4",
        quant="Q4",
        repository=None,
        revision=None,
        files=(PlannedFile(path="a.gguf", bytes=download_bytes),),
        context=4096,
        parallel=1,
        kv_type="f16",
        placement=Placement(gpu_layers=0, tensor_split=()),
        flash_attention=True,
        batch=2048,
        ubatch=512,
        threads=8,
        mmap=True,
        repack=False,
        devices=(cpu,),
        predicted=Prediction(depth=0, decode_tokens_per_second=1.0, prefill_tokens_per_second=1.0),
        reasons=(),
        is_local=is_local,
    )


def test_idle_cards_fail_with_the_command_that_mends_it() -> None:
    idle = Mismatch(sentence="2x RTX 4090 found, but no CUDA.", command="pip install it")
    check = check_cards(MACHINE, [idle])
    assert (check.status, check.message, check.hint) == ("fail", idle.sentence, "pip install it")
    hidden = replace(idle, is_mistake=False)
    assert check_cards(WITH_CARD, [hidden]).status == "ok"


def test_cards_in_use_and_no_cards_are_both_well() -> None:
    assert "RTX 3090 (cuda)" in check_cards(WITH_CARD, []).message
    assert check_cards(MACHINE, []).status == "ok"


def test_a_build_that_leaves_instructions_unused_is_said() -> None:
    check = check_build(("avx", "avx2", "fma", "avx512"), frozenset({"avx", "fma"}))
    assert check.status == "warn"
    assert "avx2, avx512" in check.message
    assert "pip install" in check.hint
    assert check_build(("avx",), frozenset({"avx", "avx2"})).status == "ok"
    assert check_build((), frozenset()).status == "ok"


@pytest.mark.parametrize(
    ("system", "machine", "status"),
    [
        ("Windows AMD64", WITH_CARD, "warn"),
        ("WSL x86_64", WITH_CARD, "warn"),
        ("Linux x86_64", WITH_CARD, "ok"),
        ("Windows AMD64", MACHINE, "ok"),
    ],
)
def test_drivers_page_on_windows_alone(system: str, machine: Machine, status: str) -> None:
    assert check_paging(system, machine).status == status


@pytest.mark.parametrize(
    ("variables", "status", "word"),
    [
        ({}, "ok", "8 cores"),
        ({"OMP_NUM_THREADS": "2"}, "ok", "8 cores"),  # llama.cpp names its number itself
        ({"OMP_THREAD_LIMIT": "2"}, "warn", "2 of 8"),
        ({"OMP_THREAD_LIMIT": "8"}, "ok", "8 cores"),
        ({"OMP_THREAD_LIMIT": "x"}, "ok", "8 cores"),
        ({"GOMP_CPU_AFFINITY": "0-3"}, "warn", "GOMP_CPU_AFFINITY"),
        ({"OMP_PROC_BIND": "TRUE"}, "warn", "OMP_PROC_BIND"),
        ({"OMP_PROC_BIND": "false"}, "ok", "8 cores"),
    ],
)
def test_variables_that_hold_threads_back_are_named(
    variables: dict[str, str], status: str, word: str
) -> None:
    check = check_threads(MACHINE, Limits(), variables, 16)
    assert check.status == status
    assert word in check.message


def test_a_containers_share_of_the_cpus_is_told() -> None:
    check = check_threads(MACHINE, Limits(cpus=2.5, allowed_cpus=8), {}, 16)
    assert "2.5 CPUs" in check.message
    assert "8 of 16" in check.message


def test_other_programs_that_compute_are_a_warning() -> None:
    assert check_load(0.2, 8).status == "ok"
    assert check_load(3.0, 8).status == "warn"


def test_ram_is_judged_by_the_plan_or_by_a_small_model() -> None:
    assert check_ram(MACHINE, None).status == "ok"
    assert check_ram(MACHINE, plan_for(10 * GIB)).status == "ok"
    short = check_ram(MACHINE, plan_for(19 * GIB))
    assert short.status == "warn"
    assert "19.0 GiB" in short.message
    small = replace(MACHINE, ram=replace(MACHINE.ram, available_bytes=3 * GIB))
    assert check_ram(small, None).status == "warn"
    assert check_ram(replace(small, gpus=(GPU,)), None).status == "ok"


def test_the_disk_is_judged_by_the_download() -> None:
    folder = Path("hub")
    assert check_disk(folder, 20 * GIB, plan_for(0)).status == "ok"
    short = check_disk(folder, 9 * GIB, plan_for(0))
    assert short.status == "warn"
    assert "9.0 GiB" in short.message
    assert "10.0 GiB" in short.message
    assert check_disk(folder, GIB, plan_for(0, is_local=True)).status == "ok"
    assert check_disk(folder, GIB, None).status == "warn"
    assert check_disk(folder, 9 * GIB, None).status == "ok"
    assert check_disk(folder, None, None).status == "warn"


@pytest.mark.parametrize(
    ("measured", "status"), [(5e9, "warn"), (30e9, "ok"), (55e9, "ok"), (90e9, "warn")]
)
def test_ram_that_is_far_from_its_figure_is_said(measured: float, status: str) -> None:
    check = check_ram_speed(MACHINE, measured, 8)
    assert check.status == status
    assert "51 GB/s" in check.message


def difference(planned: int, actual: int) -> Difference:
    return Difference(device="CUDA0", part="compute", planned_bytes=planned, actual_bytes=actual)


def test_a_load_that_took_more_or_less_than_planned_is_remembered(tmp_path: Path) -> None:
    path = tmp_path / "state" / "last_load.json"
    assert read_differences(path) is None
    rows = (difference(100 * MIB, 101 * MIB), difference(100 * MIB, 90 * MIB))
    write_differences(rows, path)
    assert read_differences(path) == rows
    check = check_last_load(rows)
    assert check.status == "warn"
    assert "90.0 MiB of compute on CUDA0" in check.message
    assert check_last_load(rows[:1]).status == "ok"
    assert check_last_load(()).status == "ok"
    assert check_last_load(None).status == "ok"
    assert check_last_load([difference(0, 5)]).status == "warn"


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"differences": 5}', '{"differences": [{}]}', "\x00",
     '{"differences": [{"device": "a", "part": "b", "planned_bytes": -1, "actual_bytes": 2}]}',
     '{"differences": [{"device": "a", "part": "b", "planned_bytes": "1", "actual_bytes": 2}]}'],
)  # fmt: skip
def test_a_damaged_record_of_the_last_load_tells_nothing(tmp_path: Path, text: str) -> None:
    path = tmp_path / "last_load.json"
    path.write_text(text, encoding="utf-8")
    assert read_differences(path) is None


def test_a_record_that_cannot_be_kept_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    write_differences((), tmp_path / "file" / "last_load.json")


def test_nothing_is_said_of_cards_where_llama_cpp_was_not_asked() -> None:
    names = [check.name for check in check_machine(probe_hardware(()), frozenset(), {})]
    assert names == ["threads"]
    cpu = {"name": "CPU", "description": "CPU", "kind": "cpu", "backend": "cpu"}
    from localmistral.fit.probes.found import BackendDevice

    device = BackendDevice(**cpu, free_bytes=1, total_bytes=1)
    hardware: Hardware = assemble([device], NvidiaReport(), (), MACHINE.ram, MACHINE.cpu)
    checks: Sequence[Check] = check_machine(hardware, frozenset(), {})
    assert [check.name for check in checks] == ["cards", "build", "paging", "threads"]


def test_ram_is_read_at_a_believable_rate() -> None:
    assert 2e8 < measure_ram_bandwidth(0.05, 2) < 5e12


# The command


def doctor(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "localmistral", "doctor", *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **environment},
    )


def test_the_document_has_every_check_of_this_machine(tmp_path: Path) -> None:
    done = doctor("--json", HF_HUB_CACHE=str(tmp_path / "not" / "there"), OMP_THREAD_LIMIT="1")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert set(document) == {"ok", "checks"}
    assert document["ok"] == all(check["status"] != "fail" for check in document["checks"])
    names = [check["name"] for check in document["checks"]]
    assert names == [
        "cards", "build", "paging", "threads", "load", "ram", "disk", "ram speed", "last load",
    ]  # fmt: skip
    for check in document["checks"]:
        assert set(check) == {"name", "status", "message", "hint"}
        assert check["status"] in ("ok", "warn", "fail")
        assert check["message"]
        assert check["hint"] or check["status"] == "ok"
    disk = document["checks"][names.index("disk")]
    assert str(tmp_path) in disk["message"]


def test_people_get_a_line_a_check_and_no_colour_off_a_terminal() -> None:
    done = doctor()
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    firsts = [line.split()[0] for line in done.stdout.splitlines() if not line.startswith(" ")]
    assert len(firsts) >= 9
    assert set(firsts) <= {"ok", "warn", "fail"}


def test_a_llama_cpp_that_cannot_be_loaded_is_a_finding_and_no_crash(tmp_path: Path) -> None:
    (tmp_path / "llama_cpp").mkdir()
    broken = "raise RuntimeError('libcudart.so.12: cannot open shared object file')\n"
    (tmp_path / "llama_cpp" / "__init__.py").write_text(broken, encoding="utf-8")
    done = doctor("--json", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert not document["ok"]
    assert document["checks"][0]["status"] == "fail"
    assert "libcudart.so.12" in document["checks"][0]["message"]
    assert "pip install" in document["checks"][0]["hint"]
    assert "cards" not in [check["name"] for check in document["checks"]]
