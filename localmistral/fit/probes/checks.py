"""What `doctor` looks at: each check is a pure judgement of what was found, with what to do.

Probes nothing: the command hands in the figures. A check that fails keeps the machine from being
used as it could be; a warning may be as it should.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from localmistral.fit.hardware import Hardware
from localmistral.fit.last_load import Difference
from localmistral.fit.machine import GIB, Machine
from localmistral.fit.plan import Plan
from localmistral.fit.probes.builds import rebuilding_command
from localmistral.fit.probes.limits import Limits
from localmistral.fit.probes.mismatch import Mismatch
from localmistral.units import format_bandwidth, format_bytes

Status = Literal["ok", "warn", "fail"]

TELLING_FEATURES = ("avx", "fma", "avx2", "avx512", "dotprod", "matmul_int8")
"""Instruction sets without which llama.cpp computes clearly slower on a CPU that has them."""
SMALLEST_MODEL_BYTES = 4 * GIB
"""What the smallest model that is of use takes: Ministral 3B at 4 bits with its context."""
TOLERATED_DIFFERENCE = 0.02
"""Of a planned size: more is told after a load as well."""
SLOW_RAM, FAST_RAM = 0.4, 1.2
"""Times the nominal bandwidth: below, modules sit in one channel or much else runs (few threads
reach 60 %); above, the nominal figure is too low."""
BUSY_SHARE = 0.25
"""Of the CPUs, computing for others: from here on it shows in the speed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One judgement: `message` is a sentence, `hint` what to type or do (may be empty)."""

    name: str
    status: Status
    message: str
    hint: str = ""


def check_cards(machine: Machine, mismatches: Sequence[Mismatch]) -> Check:
    """Whether llama.cpp uses the cards that are there."""
    mistakes = [mismatch for mismatch in mismatches if mismatch.is_mistake]
    if mistakes:
        commands = [mistake.command for mistake in mistakes if mistake.command]
        sentences = " ".join(mistake.sentence for mistake in mistakes)
        return Check(name="cards", status="fail", message=sentences, hint="\n".join(commands))
    if mismatches:
        hidden = " ".join(mismatch.sentence for mismatch in mismatches)
        return Check(name="cards", status="ok", message=hidden)
    names = ", ".join(f"{gpu.name} ({gpu.backend})" for gpu in machine.gpus)
    said = f"llama.cpp uses {names}." if names else "There is no card; models run on the CPU."
    return Check(name="cards", status="ok", message=said)


def check_build(features: Sequence[str], built: frozenset[str]) -> Check:
    """Whether llama.cpp's CPU code uses what this processor has."""
    missing = [name for name in TELLING_FEATURES if name in features and name not in built]
    if missing:
        return Check(
            name="build",
            status="warn",
            message=f"This CPU has {', '.join(missing)}, and this llama-cpp-python is built "
            "without.",
            hint=rebuilding_command(),
        )
    used = [name for name in TELLING_FEATURES if name in built]
    said = f"uses {', '.join(used)}" if used else "knows no special instructions of this CPU"
    return Check(name="build", status="ok", message=f"llama.cpp's CPU code {said}.")


def check_paging(system: str, machine: Machine) -> Check:
    """Whether the driver would page silently when a card is full."""
    has_nvidia = any(gpu.backend == "cuda" for gpu in machine.gpus)
    if has_nvidia and system.startswith(("Windows", "WSL")):
        return Check(
            name="paging",
            status="warn",
            message="On Windows NVIDIA's driver moves what is too much for a card into RAM "
            "without a word, and everything becomes slow.",
            hint="In NVIDIA's control panel set 'CUDA - Sysmem Fallback Policy' to 'Prefer No "
            "Sysmem Fallback'.",
        )
    return Check(name="paging", status="ok", message="A card that is full says so.")


def check_threads(
    machine: Machine, limits: Limits, variables: Mapping[str, str], logical_cpus: int
) -> Check:
    """Whether all cores may compute."""
    cores = machine.cpu.cores
    limit = variables.get("OMP_THREAD_LIMIT", "")
    if limit.isdigit() and int(limit) < cores:
        return Check(
            name="threads",
            status="warn",
            message=f"OMP_THREAD_LIMIT={limit} lets {limit} of {cores} cores compute.",
            hint="unset OMP_THREAD_LIMIT",
        )
    if "GOMP_CPU_AFFINITY" in variables or variables.get("OMP_PROC_BIND", "").lower() == "true":
        names = " and ".join(name for name in variables if name != "OMP_NUM_THREADS")
        return Check(
            name="threads",
            status="warn",
            message=f"{names} ties threads to CPUs: with other programs beside it they wait.",
            hint=f"unset {names.replace(' and ', ' ')}",
        )
    reasons = []
    if limits.cpus is not None:
        reasons.append(f"a quota of {limits.cpus:g} CPUs")
    if limits.allowed_cpus is not None and limits.allowed_cpus < logical_cpus:
        reasons.append(f"{limits.allowed_cpus} of {logical_cpus} CPUs allowed")
    because = f" ({', '.join(reasons)})" if reasons else ""
    return Check(name="threads", status="ok", message=f"{cores} cores compute{because}.")


def check_load(busy_cpus: float, logical_cpus: int) -> Check:
    """Whether others compute at the same time; `busy_cpus` is how many they keep busy."""
    said = f"Other programs keep {busy_cpus:.1f} of {logical_cpus} CPUs busy."
    if busy_cpus > BUSY_SHARE * logical_cpus:
        return Check(
            name="load",
            status="warn",
            message=said,
            hint="Expect less speed from layers in RAM while they run.",
        )
    return Check(name="load", status="ok", message=said)


def check_ram(machine: Machine, plan: Plan | None) -> Check:
    """Whether RAM suffices for what a plan puts there, or for any model at all."""
    ram = machine.ram
    said = f"{format_bytes(ram.available_bytes)} of {format_bytes(ram.total_bytes)} are available"
    needed = SMALLEST_MODEL_BYTES if plan is None else plan.devices[-1].used_bytes
    purpose = "a small model" if plan is None else f"{plan.model} {plan.quant}"
    if plan is None and machine.gpus:
        needed = 0  # a model on the cards needs little more than the program does
    if needed > ram.budget_bytes:
        return Check(
            name="ram",
            status="warn",
            message=f"{said}, and {purpose} needs {format_bytes(needed)} with a margin to spare.",
            hint="Close other programs, or see what fits: localmistral plan",
        )
    for_plan = f"; {purpose} needs {format_bytes(needed)}" if plan is not None else ""
    return Check(name="ram", status="ok", message=f"{said}{for_plan}.")


def check_disk(folder: Path, free_bytes: int | None, plan: Plan | None) -> Check:
    """Whether a download fits beside what the disk holds; `folder` is where models go."""
    if free_bytes is None:
        return Check(name="disk", status="warn", message=f"{folder} can't be looked at.")
    said = f"{format_bytes(free_bytes)} are free where models go, {folder}"
    if plan is None:
        needed, purpose = SMALLEST_MODEL_BYTES, "a small model"
    else:
        needed = 0 if plan.is_local else sum(file.bytes for file in plan.files)
        purpose = f"{plan.model} {plan.quant}"
    if needed > free_bytes:
        return Check(
            name="disk",
            status="warn",
            message=f"{said}, and {purpose} takes {format_bytes(needed)}.",
            hint="Free some space (localmistral list, localmistral rm), or set HF_HUB_CACHE to a "
            "folder on another disk.",
        )
    for_plan = f"; {purpose} takes {format_bytes(needed)}" if plan and needed else ""
    return Check(name="disk", status="ok", message=f"{said}{for_plan}.")


def check_ram_speed(machine: Machine, measured: float, threads: int) -> Check:
    """Whether RAM is about as fast as a plan takes it for."""
    nominal = machine.ram.bandwidth
    by = f"{threads} threads" if threads > 1 else "one thread"
    said = f"{by} read {format_bandwidth(measured)}; plans count on {format_bandwidth(nominal)}"
    if measured < SLOW_RAM * nominal:
        message = f"{said}: one memory channel is in use, or other programs are busy."
        hint = "When the machine is idle: localmistral bench"
    elif measured > FAST_RAM * nominal:
        message = f"{said}, which is too little."
        hint = "Let plans go by measurements: localmistral bench"
    else:
        return Check(name="ram speed", status="ok", message=f"{said}, nominal.")
    return Check(name="ram speed", status="warn", message=message, hint=hint)


def check_last_load(differences: Sequence[Difference] | None) -> Check:
    """Whether the last load took what its plan said."""
    if differences is None:
        return Check(name="last load", status="ok", message="No load has left figures yet.")
    worst = max(differences, key=lambda difference: difference.relative, default=None)
    if worst is None or worst.relative <= TOLERATED_DIFFERENCE:
        said = "The last load took what was planned."
        return Check(name="last load", status="ok", message=said)
    return Check(
        name="last load",
        status="warn",
        message=f"The last load put {format_bytes(worst.actual_bytes)} of {worst.part} on "
        f"{worst.device}, planned were {format_bytes(worst.planned_bytes)}.",
        hint="If a load runs out of memory: a shorter --context, or fewer --gpu-layers.",
    )


def check_machine(
    hardware: Hardware, built: frozenset[str], variables: Mapping[str, str]
) -> tuple[Check, ...]:
    """The checks that need nothing but what was found; those of cards and build only where
    llama.cpp had its say."""
    machine = hardware.machine
    told = (
        (
            check_cards(machine, hardware.mismatches),
            check_build(machine.cpu.features, built),
            check_paging(hardware.system, machine),
        )
        if hardware.devices
        else ()
    )
    return (*told, check_threads(machine, hardware.limits, variables, hardware.logical_cpus))
