"""`localmistral doctor`."""

import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from localmistral.cli.hardware import probe
from localmistral.cli.listing import print_json
from localmistral.cli.options import AsJson, Debug
from localmistral.errors import LocalMistralError

if TYPE_CHECKING:
    from localmistral.fit.hardware import Hardware
    from localmistral.fit.machine import Machine
    from localmistral.fit.plan import Plan
    from localmistral.fit.probes.checks import Check

_LOAD_S = 0.5
_RAM_S = 1.0
_HEADLINE = "mistral-small-4"
"""Whose plan RAM and disk are checked against."""


def doctor(as_json: AsJson = False, debug: Debug = False) -> None:  # noqa: ARG001
    """Look for what keeps this machine from its best: cards, build, limits, memory, disk.

    --json: {ok, checks[] {name, status ok|warn|fail, message, hint}}; ok means that no check
    failed. The exit code is 0 whenever all checks could be made.
    """
    checks = tuple(run_checks())
    if as_json:
        is_fine = all(check.status != "fail" for check in checks)
        print_json({"ok": is_fine, "checks": [asdict(check) for check in checks]})
        return
    from localmistral.terminal.machine_table import print_checks

    print_checks(checks)


def run_checks() -> "Iterator[Check]":
    """Every check of this machine, in the order of how much it matters."""
    from localmistral.fit.last_load import read_differences
    from localmistral.fit.probes import checks
    from localmistral.fit.probes.limits import read_thread_variables

    hardware, built, problem = _probe()
    yield from (problem,) if problem else ()
    yield from checks.check_machine(hardware, built, read_thread_variables())
    logical_cpus = hardware.logical_cpus
    yield checks.check_load(_measure_load(logical_cpus), logical_cpus)
    plan = _make_plan(hardware.machine)
    yield checks.check_ram(hardware.machine, plan)
    yield _check_disk(plan)
    yield _check_ram_speed(hardware.machine)
    yield checks.check_last_load(read_differences())


def _probe() -> "tuple[Hardware, frozenset[str], Check | None]":
    """The hardware and what the CPU code is built for; a check where llama.cpp has no say."""
    from localmistral.fit.hardware import probe_hardware
    from localmistral.fit.probes.checks import Check

    try:
        hardware = probe()
    except LocalMistralError as error:
        problem = Check(name="llama.cpp", status="fail", message=error.message, hint=error.hint)
        hardware = probe_hardware(())
        return hardware, frozenset(), problem
    from localmistral.engine.devices import build_features

    return hardware, build_features(), None


def _measure_load(logical_cpus: int) -> float:
    """CPUs that other programs keep busy just now; this one sleeps meanwhile."""
    import psutil

    return float(psutil.cpu_percent(interval=_LOAD_S)) / 100 * logical_cpus


def _make_plan(machine: "Machine") -> "Plan | None":
    """What would be planned for the headline model here; None if nothing can be."""
    from localmistral.fit.plan import PlanRequest
    from localmistral.planning import plan_model

    try:
        return plan_model(_HEADLINE, PlanRequest(), machine)
    except LocalMistralError:
        return None


def _check_disk(plan: "Plan | None") -> "Check":
    from localmistral.fit.probes.checks import check_disk
    from localmistral.models.cache import hub_cache

    folder = hub_cache()
    return check_disk(folder, _measure_free(folder), plan)


def _measure_free(folder: Path) -> int | None:
    """Free bytes of the disk that `folder` is on, or will be on; None if it can't be told."""
    for place in (folder, *folder.parents):
        try:
            return shutil.disk_usage(place).free
        except FileNotFoundError:
            continue
        except OSError:
            return None
    return None


def _check_ram_speed(machine: "Machine") -> "Check":
    from localmistral.fit.probes.checks import check_ram_speed
    from localmistral.fit.probes.ram_speed import measure_ram_bandwidth

    threads = machine.cpu.cores
    return check_ram_speed(machine, measure_ram_bandwidth(_RAM_S, threads), threads)
