"""`localmistral plan`."""

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from localmistral.cli.listing import print_json
from localmistral.cli.options import (
    AsJson,
    Batch,
    Context,
    CpuExperts,
    CpuOnly,
    Debug,
    Depth,
    GpuLayers,
    GpuSpecs,
    KvType,
    MinContext,
    MinSpeed,
    ModelOption,
    NoVision,
    Offline,
    Parallel,
    PlanFile,
    Prefer,
    Quant,
    RamSpec,
    SplitMode,
    TensorSplit,
    Threads,
    Ubatch,
    name_model,
    read_request,
)
from localmistral.errors import UsageError
from localmistral.fit.plan import PlanRequest

HEADLINE = "mistral-small-4"
"""The model that is planned when none is named."""
_BESIDE_A_PLAN = ("plan_file", "as_json", "offline", "debug")
"""Parameters that mean something when a saved plan is shown."""


def plan(
    command: typer.Context,
    positional: Annotated[str | None, typer.Argument(metavar="MODEL", help="As -m.")] = None,
    model: ModelOption = None,
    quant: Quant = None,
    context: Context = None,
    parallel: Parallel = None,
    kv_type: KvType = None,
    gpu_layers: GpuLayers = None,
    tensor_split: TensorSplit = None,
    split_mode: SplitMode = None,
    cpu_experts: CpuExperts = None,
    threads: Threads = None,
    batch: Batch = None,
    ubatch: Ubatch = None,
    no_vision: NoVision = False,
    gpu: GpuSpecs = None,
    ram: RamSpec = None,
    cpu_only: CpuOnly = False,
    prefer: Prefer = None,
    min_speed: MinSpeed = None,
    min_context: MinContext = None,
    depth: Depth = None,
    plan_file: PlanFile = None,
    offline: Offline = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Show the sums behind the figures.")
    ] = False,
    as_json: AsJson = False,
    debug: Debug = False,  # noqa: ARG001  (read by `main`)
) -> None:
    """Which quantisation, context and placement of MODEL suit this machine, or another one."""
    if plan_file is not None:
        _show_saved(plan_file, command, as_json)
        return
    if model is None and positional is None:
        model = HEADLINE
    name = name_model(model, positional, quant)
    request = read_request(
        context=context,
        kv_type=kv_type,
        gpu_layers=gpu_layers,
        tensor_split=tensor_split,
        cpu_experts=cpu_experts,
        split_mode=split_mode,
        threads=threads,
        batch=batch,
        ubatch=ubatch,
        parallel=parallel,
        depth=depth,
        prefer=prefer,
        min_speed=min_speed,
        min_context=min_context,
        no_vision=no_vision,
    )
    target = Target(gpus=tuple(gpu or ()), ram=ram, cpu_only=cpu_only)
    _plan(name, request, target, Output(offline=offline, explain=explain, as_json=as_json))


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The machine that is meant, as typed."""

    gpus: tuple[str, ...]
    ram: str | None
    cpu_only: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """Where the sizes come from, and how much is shown."""

    offline: bool
    explain: bool
    as_json: bool


def _plan(name: str, request: PlanRequest, target: Target, output: Output) -> None:
    from localmistral.fit.calibration import read_calibration
    from localmistral.fit.plan_json import plan_to_json
    from localmistral.planning import current_machine, gather_candidates, plan_choices

    machine = current_machine(target.gpus, target.ram, cpu_only=target.cpu_only)
    choices = gather_candidates(name, uses_hub=not output.offline)
    calibration, remark = read_calibration(machine)
    chosen = plan_choices(choices, request, machine, calibration=calibration)
    _print_notes([*machine.notes, *choices.notes, remark])
    if output.as_json:
        print_json(plan_to_json(chosen))
        return
    from localmistral.terminal.plan_explain import print_explanation
    from localmistral.terminal.plan_table import print_plan

    print_plan(chosen)
    if output.explain:
        print_explanation(chosen, choices.candidate_of(chosen).shape, machine, calibration)


def _print_notes(notes: Sequence[str]) -> None:
    said = [note for note in notes if note]
    if not sys.stderr.isatty():  # a program reads: rich would cost it a fifth of the time
        with contextlib.suppress(OSError):
            sys.stderr.writelines(f"{note}\n" for note in said)
    elif said:
        from localmistral.terminal.render import print_note

        for note in said:
            print_note(note)


def _show_saved(path: Path, command: typer.Context, as_json: bool) -> None:
    from localmistral.fit.plan_json import plan_to_json, read_plan

    for name in command.params:
        source = command.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE" and name not in _BESIDE_A_PLAN:
            option = "MODEL" if name == "positional" else f"--{name.replace('_', '-')}"
            raise UsageError(
                f"--plan {path} is a finished plan, and {option} asks for another one.",
                "Leave one of them out.",
            )
    saved = read_plan(path)
    if as_json:
        print_json(plan_to_json(saved))
        return
    from localmistral.terminal.plan_table import print_plan

    print_plan(saved)
