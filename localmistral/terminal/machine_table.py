"""A machine and what `doctor` found, for people. Knows no probe."""

import sys
import textwrap
from collections.abc import Sequence

from localmistral.fit.hardware import Hardware
from localmistral.fit.machine import Gpu, Machine
from localmistral.fit.probes.checks import Check
from localmistral.terminal.plan_table import print_paragraph, screen_width
from localmistral.terminal.render import print_line, print_table
from localmistral.units import format_bandwidth, format_bytes

_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}
_LABEL_WIDTH = 11
_SHOWN_FEATURES = ("avx", "avx2", "fma", "avx512", "amx_int8", "neon", "dotprod", "matmul_int8")


def print_machine(machine: Machine, found: Hardware | None) -> None:
    """The machine in a few lines, its cards as a table, then what is to be said about it."""
    system = found.system if found else "a machine that isn't there"
    rows = [
        ("machine", system if machine.is_real else f"as typed, on {system}" if found else system),
        ("CPU", _describe_cpu(machine)),
        ("RAM", _describe_ram(machine)),
        ("limits", _describe_limits(found)),
        ("driver", _describe_driver(found)),
        ("llama.cpp", _describe_devices(found)),
        ("cards", "" if machine.gpus else "none that can be used"),
    ]
    for label, text in rows:
        if text:
            _print_row(label, text)
    if machine.gpus:
        print_line(("", ""))
        _print_cards(machine)
    _print_notes(machine, found)


def print_checks(checks: Sequence[Check]) -> None:
    """One line a check, wrapped on a terminal, what to do under it."""
    width = max(len(check.name) for check in checks)
    indent = " " * (width + 8)
    for check in checks:
        first, *others = _wrap(check.message, len(indent))
        status = (check.status.ljust(4), _STYLES[check.status])
        print_line(status, (f"  {check.name.ljust(width)}  ", "bold"), (first, ""))
        for line in others:
            print_line((indent + line, ""))
        for line in check.hint.splitlines():
            print_line((indent + line, "dim"))  # whole: it is to be copied


def _wrap(text: str, indent: int) -> list[str]:
    if not sys.stdout.isatty():
        return [text]
    return textwrap.wrap(text, max(20, screen_width() - indent), break_on_hyphens=False)


def _print_row(label: str, text: str) -> None:
    print_line((label.ljust(_LABEL_WIDTH), "bold"), (text, ""))


def _print_cards(machine: Machine) -> None:
    headings = ("card", "memory", "free", "for models", "bandwidth", "by")
    print_table(headings, [_card_row(gpu) for gpu in machine.gpus])
    if machine.has_peer_access:
        print_line(("The cards read each other's memory directly.", ""))


def _card_row(gpu: Gpu) -> tuple[str, ...]:
    shared = " (RAM)" if gpu.is_integrated else ""
    return (
        gpu.name,
        format_bytes(gpu.total_bytes) + shared,
        format_bytes(gpu.free_bytes),
        format_bytes(gpu.budget_bytes),
        format_bandwidth(gpu.bandwidth),
        gpu.device or gpu.backend,
    )


def _print_notes(machine: Machine, found: Hardware | None) -> None:
    commands = {
        mismatch.sentence: mismatch.command for mismatch in (found.mismatches if found else ())
    }
    for note in machine.notes:
        print_line(("", ""))
        print_paragraph(note, style="yellow" if note in commands else "")
        if commands.get(note):
            print_line((f"  {commands[note]}", "dim"))


def _describe_cpu(machine: Machine) -> str:
    cpu = machine.cpu
    features = [name for name in _SHOWN_FEATURES if name in cpu.features]
    shown = f" ({', '.join(features)})" if features else ""
    cores = f"{cpu.cores} core{'s' if cpu.cores != 1 else ''}"
    return f"{cpu.name}, {cores}{shown}" if cpu.name else f"{cores}{shown}"


def _describe_ram(machine: Machine) -> str:
    ram = machine.ram
    return (
        f"{format_bytes(ram.total_bytes)}, {format_bytes(ram.available_bytes)} available, "
        f"{format_bytes(ram.budget_bytes)} for models, {format_bandwidth(ram.bandwidth)} nominal"
    )


def _describe_limits(found: Hardware | None) -> str:
    if found is None:
        return ""
    limits = found.limits
    parts = []
    if limits.cpus is not None:
        parts.append(f"{limits.cpus:g} CPUs")
    if limits.allowed_cpus is not None and limits.allowed_cpus < found.logical_cpus:
        parts.append(f"{limits.allowed_cpus} of {found.logical_cpus} CPUs allowed")
    if limits.memory_bytes is not None:
        parts.append(f"{format_bytes(limits.memory_bytes)} of memory")
    return ", ".join(parts)


def _describe_driver(found: Hardware | None) -> str:
    if found is None or found.nvidia.driver is None:
        return ""
    cuda = found.nvidia.cuda
    return f"NVIDIA {found.nvidia.driver}" + (f", up to CUDA {cuda[0]}.{cuda[1]}" if cuda else "")


def _describe_devices(found: Hardware | None) -> str:
    names = [device.name for device in found.devices] if found else []
    return f"computes on {', '.join(names)}" if names else ""
