"""From a model's name to an engine that runs it as planned: the dry load as the last word, what
happens when memory runs out all the same, and how far the load was from its plan.

Knows nothing of conversations or of the terminal; says things through callbacks.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from localmistral.engine import Engine, EngineSettings, LoadReport
from localmistral.engine.dry_load import dry_load
from localmistral.errors import LocalMistralError, ModelNotFoundError, OutOfMemoryError
from localmistral.fit.calibration import Calibration, read_calibration
from localmistral.fit.choosing.changes import describe_changes
from localmistral.fit.last_load import Difference, write_differences
from localmistral.fit.machine import Machine
from localmistral.fit.plan import DeviceMemory, Plan, PlanRequest
from localmistral.models.cache import LocalModel, find_local, list_local
from localmistral.models.gguf import read_shape
from localmistral.models.names import CatalogModel, LocalFiles, quote_name, resolve
from localmistral.models.shape import ModelShape, require_runnable
from localmistral.planning import Choices, gather_candidates, load_plan, plan_choices
from localmistral.units import format_bytes

logger = logging.getLogger("localmistral.loading")

MAX_TIGHTENINGS = 3
"""Dry loads that may find a plan over its budget; each takes away what the last one found."""
AMPLE_FACTOR = 4
"""Planned compute buffers are within 10 % of real ones on cards and within a factor of 2 in RAM:
with room for so many more of them a dry load, which reads the vocabulary anew, could only agree."""
RETRY_SHARE = 0.9
"""Of what a device had no room for, what the next plan may put there."""
SAME_SHARE = 0.02
"""How far a size that failed may be from the planned one it is taken for: tensors are padded."""
MAX_STORED_BYTES = 8 << 30
"""Of the RAM a plan leaves free, at most so much keeps what earlier requests computed."""
CPU = "CPU"

OnNote = Callable[[str], None]
Replan = Callable[[Machine], Plan]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedLoad:
    """A plan for files on this disk, and how to make it anew for a machine with less memory from
    the same `choices`; both are None for a plan that has to be run as it is."""

    plan: Plan
    machine: Machine
    local: LocalModel
    shape: ModelShape
    replan: Replan | None = None
    choices: Choices | None = None


def plan_load(
    name: str,
    request: PlanRequest,
    machine: Machine,
    *,
    calibration: Calibration | None = None,
) -> PlannedLoad:
    """The plan for the best copy on this disk of what `name` means; None takes the calibration
    that `bench` kept for this machine, as `plan` does.

    Raises ModelNotFoundError when none is here, and the planner's errors.
    """
    local = find_model(name)
    choices = gather_candidates(name, prefers_local=True)
    known = read_calibration(machine)[0] if calibration is None else calibration

    def replan(machine: Machine) -> Plan:
        return plan_choices(choices, request, machine, calibration=known)

    chosen = replan(machine)
    shape = choices.candidate_of(chosen).shape
    return PlannedLoad(
        plan=chosen,
        machine=machine,
        local=_find_copy(shape, local),
        shape=shape,
        replan=replan,
        choices=choices,
    )


def _find_copy(shape: ModelShape, expected: LocalModel) -> LocalModel:
    """The copy on this disk that has a candidate's files; most often the expected one."""
    if expected.path == shape.files[0]:
        return expected
    listed = (local for local in list_local() if local.path == shape.files[0])
    return next(listed, expected)


def replay_plan(path: Path, machine: Machine) -> PlannedLoad:
    """A saved plan, to be run as it is. Raises what `load_plan` does, and ModelFileError for a
    file that is no longer a model's."""
    plan = load_plan(path, machine)
    shape = read_shape(Path(plan.files[0].path))
    require_runnable(shape)
    placed = find_local(LocalFiles(name="", path=shape.files[0], files=shape.files))
    assert placed is not None  # the plan's files are there
    listed = (local for local in list_local() if local.path == shape.files[0])
    return PlannedLoad(plan=plan, machine=machine, local=next(listed, placed), shape=shape)


def find_model(name: str) -> LocalModel:
    """The files on this disk that `name` stands for; ModelNotFoundError with the way out."""
    resolved = resolve(name)
    local = find_local(resolved)
    if local is None:
        what = f"No file of {quote_name(name)} is on this disk."
        if isinstance(resolved, CatalogModel):
            what = f"{resolved.model.name} is known, but not on this disk."
        raise ModelNotFoundError(what, f"localmistral pull {name}")
    return local


def make_settings(plan: Plan, machine: Machine) -> EngineSettings:
    """`plan` in the engine's words; cards without a layer are left out of its devices."""
    cards = plan.placement.used_cards
    devices = tuple(machine.gpus[card].device or "" for card in cards) or (CPU,)
    shares = tuple(float(plan.placement.tensor_split[card]) for card in cards)
    ram = plan.devices[-1]
    return EngineSettings(
        context=plan.context,
        parallel=plan.parallel,
        stored_bytes=max(0, min(MAX_STORED_BYTES, ram.budget_bytes - ram.used_bytes)),
        batch=plan.batch,
        ubatch=plan.ubatch,
        # as many threads as cores: the engine then chooses, and gives way to other processes
        threads=0 if plan.threads == machine.cpu.cores else plan.threads,
        kv_type=plan.kv_type,
        flash_attention=plan.flash_attention,
        gpu_layers=plan.placement.gpu_layers,
        devices=devices,
        tensor_split=shares,
        cpu_expert_layers=plan.placement.cpu_expert_layers,
        split_mode=plan.placement.split_mode,
        mmap=plan.mmap,
        repack=plan.repack,
    )


def load_engine(
    planned: PlannedLoad,
    *,
    on_progress: Callable[[float], None] | None = None,
    on_note: OnNote = lambda _: None,
) -> tuple[Engine, PlannedLoad]:
    """Run the plan; the one that was run comes back, which may be a tighter one.

    What memory doesn't allow is planned anew with less and said, once, then for the CPU. What the
    request fixed is kept: OutOfMemoryError with the device, and with what was fixed, where nothing
    else can be had. Raises what `Engine.load` and the planner raise.
    """
    for reason in planned.plan.reasons:
        logger.info("%s", reason)
    planned = check_dry(planned, on_note)
    retries = iter((_lessen_device, _leave_cards))
    while True:
        try:
            return _load(planned, on_progress), planned
        except OutOfMemoryError as error:
            planned = _replan_after(error, planned, retries, on_note)


def _load(planned: PlannedLoad, on_progress: Callable[[float], None] | None) -> Engine:
    settings = make_settings(planned.plan, planned.machine)
    engine = Engine.load(planned.shape.files, settings, on_progress=on_progress)
    _keep_differences(planned, engine.report)
    return engine


def check_dry(planned: PlannedLoad, on_note: OnNote) -> PlannedLoad:
    """Ask llama.cpp itself what the plan's graphs take; a plan over its budget is tightened.

    Where even graphs of several times the size would fit there's nothing to ask.
    """
    budgets = tuple(row.budget_bytes for row in planned.plan.devices)
    for _ in range(MAX_TIGHTENINGS):
        if _has_ample_room(planned.plan, budgets):
            return planned
        settings = make_settings(planned.plan, planned.machine)
        over = find_excess(planned, dry_load(planned.shape.files, settings), budgets)
        if not over:
            return planned
        worst = ", ".join(f"{name} by {format_bytes(size)}" for name, size in over.items())
        if planned.replan is None:
            raise OutOfMemoryError(
                f"The plan would go over its budget: {worst}.",
                f"Plan anew: localmistral plan {planned.local.name}",
            )
        tighter = _replan(planned, _lessen(planned.machine, over))
        changes = describe_changes(planned.plan, tighter.plan)
        on_note(f"llama.cpp needs more than planned ({worst}), so it is loaded with {changes}.")
        planned = tighter
    return planned


def _has_ample_room(plan: Plan, budgets: tuple[int, ...]) -> bool:
    return all(
        row.used_bytes + AMPLE_FACTOR * row.compute_bytes <= budget
        for row, budget in zip(plan.devices, budgets, strict=True)
        if row.used_bytes
    )


def find_excess(
    planned: PlannedLoad, report: LoadReport, budgets: tuple[int, ...]
) -> dict[str, int]:
    """Bytes over the `budgets` (the cards', the CPU's last) by device, with llama.cpp's own compute
    buffers in the plan's place.

    What only CUDA takes at run time is in the plan's figure alone, so the larger of both counts.
    """
    found = {}
    rows = zip(_name_devices(planned.machine), planned.plan.devices, budgets, strict=True)
    for name, row, budget in rows:
        buffers = report.find(name)
        compute = max(row.compute_bytes, buffers.compute_bytes + buffers.output_bytes)
        excess = row.used_bytes - row.compute_bytes + compute - budget
        if excess > 0 and compute > row.compute_bytes:
            found[name] = excess
    return found


def _lessen(machine: Machine, over: dict[str, int]) -> Machine:
    """The machine with so much less memory free on the devices named."""
    gpus = tuple(
        replace(gpu, free_bytes=max(0, gpu.free_bytes - over.get(gpu.device or gpu.name, 0)))
        for gpu in machine.gpus
    )
    available = max(0, machine.ram.available_bytes - over.get(CPU, 0))
    return replace(machine, gpus=gpus, ram=replace(machine.ram, available_bytes=available))


def _replan(planned: PlannedLoad, machine: Machine) -> PlannedLoad:
    """The load as it is planned for `machine`, which may be one of another quant's files."""
    assert planned.replan is not None
    plan = planned.replan(machine)
    shape = planned.shape
    if planned.choices is not None:
        shape = planned.choices.candidate_of(plan).shape
    local = _find_copy(shape, planned.local)
    return replace(planned, plan=plan, machine=machine, shape=shape, local=local)


Retry = Callable[[PlannedLoad, OutOfMemoryError], Machine | None]
"""Given what ran out of memory and how: the machine to plan for next, if any."""


def _replan_after(
    error: OutOfMemoryError, planned: PlannedLoad, retries: Iterator[Retry], on_note: OnNote
) -> PlannedLoad:
    """The next plan to try after `error`, which is raised where there's none."""
    what = error.message.removesuffix(".")
    if planned.replan is None:
        raise OutOfMemoryError(
            f"{what}, and a saved plan is run as it is.",
            f"Plan anew: localmistral plan {planned.local.name}",
            device=error.device,
            wanted_bytes=error.wanted_bytes,
        )
    refusals = []
    for retry in retries:
        machine = retry(planned, error)
        if machine is None:
            continue
        try:
            tighter = _replan(planned, machine)
        except LocalMistralError as refusal:
            is_alone = retry is _leave_cards
            where, hint = ("on the CPU alone", "") if is_alone else ("with less", refusal.hint)
            refusals.append((f"{where} {refusal.message}", hint))
            continue
        changes = describe_changes(planned.plan, tighter.plan)
        on_note(f"{what}, so it is loaded with {changes}.")
        return tighter
    if not refusals:
        raise error
    why, hint = refusals[0]
    raise OutOfMemoryError(
        f"{what}, and {why}",
        hint or error.hint,
        device=error.device,
        wanted_bytes=error.wanted_bytes,
    ) from error


def _lessen_device(planned: PlannedLoad, error: OutOfMemoryError) -> Machine:
    """With a tenth less on the device that ran out than there wasn't room for; on every card where
    llama.cpp named none."""
    rows = dict(zip(_name_devices(planned.machine), planned.plan.devices, strict=True))
    cards = [name for name, row in rows.items() if name != CPU and row.used_bytes]
    over = {
        name: rows[name].budget_bytes - int(RETRY_SHARE * _bound_room(rows[name], error))
        for name in ([error.device] if error.device in rows else cards or [CPU])
    }
    return _lessen(planned.machine, over)


def _bound_room(row: DeviceMemory, error: OutOfMemoryError) -> int:
    """Bytes that a device certainly doesn't have: llama.cpp makes room for the weights, then for
    KV, then for graphs, and the size that failed tells how far it came."""

    def is_it(planned_bytes: int) -> bool:
        return abs(error.wanted_bytes - planned_bytes) <= SAME_SHARE * planned_bytes

    if not error.wanted_bytes:
        return row.used_bytes
    if is_it(row.weights_bytes):
        return row.weights_bytes
    return row.weights_bytes + row.kv_bytes if is_it(row.kv_bytes) else row.used_bytes


def _leave_cards(planned: PlannedLoad, error: OutOfMemoryError) -> Machine | None:
    """The CPU alone; that's no way out where it is what had no room, or had everything already."""
    if error.device == CPU or not planned.plan.placement.used_cards:
        return None
    return replace(planned.machine, gpus=())


NOTABLE_SHARE = 0.02
"""Of a device's planned total: differences beyond it are said and kept."""
NOTABLE_BYTES = 16 << 20
"""Below this no difference is worth a word: the log rounds, and small models are all overhead."""


def compare(planned: PlannedLoad, report: LoadReport) -> tuple[Difference, ...]:
    """Where a real load differs from its plan by over 2 % of what a device was to hold.

    What CUDA takes only once it computes is in the plan and in no log, so compute buffers count
    where they came out larger. A map of the file tells no weights of the CPU: it counts with the
    stretches between its tensors.
    """
    found = []
    for name, row in zip(_name_devices(planned.machine), planned.plan.devices, strict=True):
        actual = report.find(name)
        compute = actual.compute_bytes + actual.output_bytes
        parts = {
            "kv": (row.kv_bytes, actual.kv_bytes),
            "compute": (row.compute_bytes, max(row.compute_bytes, compute)),
        }
        if name != CPU or not report.is_mapped:
            parts["weights"] = (row.weights_bytes, actual.weights_bytes)
        notable = max(NOTABLE_BYTES, NOTABLE_SHARE * row.used_bytes)
        found += [
            Difference(device=name, part=part, planned_bytes=wanted, actual_bytes=got)
            for part, (wanted, got) in parts.items()
            if abs(wanted - got) > notable
        ]
    return tuple(found)


def _keep_differences(planned: PlannedLoad, report: LoadReport) -> None:
    """For `doctor`, and for whoever reads the log."""
    found = compare(planned, report)
    for each in found:
        logger.info(
            "%s, %s: %s planned, %s taken",
            each.device,
            each.part,
            format_bytes(each.planned_bytes),
            format_bytes(each.actual_bytes),
        )
    write_differences(found)


def _name_devices(machine: Machine) -> tuple[str, ...]:
    """llama.cpp's names of the plan's devices, the CPU last."""
    return (*(gpu.device or gpu.name for gpu in machine.gpus), CPU)
