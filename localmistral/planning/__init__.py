"""From a model's name to a plan: which quantisations there are to choose from, on which machine.

Gathers what the disk, the Hub and the catalogue know, and hands it to the planner. Neither loads
nor downloads; imports llama.cpp only to list the devices of a machine that wasn't typed in whole.
"""

from collections.abc import Sequence
from dataclasses import replace

from localmistral.fit.calibration import Calibration, read_calibration
from localmistral.fit.machine import Machine
from localmistral.fit.plan import Plan, PlanRequest
from localmistral.fit.planner import plan
from localmistral.fit.specs import make_machine, parse_gpus, parse_ram
from localmistral.planning.candidates import Choices, gather_candidates
from localmistral.planning.saved import load_plan

__all__ = [
    "Choices",
    "current_machine",
    "gather_candidates",
    "load_plan",
    "plan_choices",
    "plan_model",
]


def plan_model(
    name: str,
    request: PlanRequest,
    machine: Machine,
    *,
    prefers_local: bool = False,
    calibration: Calibration | None = None,
    uses_hub: bool = False,
) -> Plan:
    """The plan for the model that `name` means (`small-4`, `small-4:UD-IQ3_S`, a path, ...).

    Errors: those of `gather_candidates`, and the planner's where an explicit request can't fit.
    """
    choices = gather_candidates(name, prefers_local=prefers_local, uses_hub=uses_hub)
    return plan_choices(choices, request, machine, calibration=calibration)


def plan_choices(
    choices: Choices,
    request: PlanRequest,
    machine: Machine,
    *,
    calibration: Calibration | None = None,
) -> Plan:
    """The best of `choices` for a machine; None takes the calibration that `bench` kept for it."""
    if calibration is None:
        calibration, _ = read_calibration(machine)
    if choices.quant is not None:
        request = replace(request, quant=choices.quant)
    chosen = plan(
        choices.candidates, machine, request, siblings=choices.siblings, calibration=calibration
    )
    return replace(chosen, reasons=(*chosen.reasons, *_describe_disk(choices, chosen)))


def _describe_disk(choices: Choices, chosen: Plan) -> tuple[str, ...]:
    """A reason's sentence about what is here already, where there was a choice."""
    here = [candidate.quant for candidate in choices.candidates if candidate.is_local]
    if chosen.is_local and len(choices.candidates) > 1:
        return (f"{chosen.quant} is on this disk, nothing has to be downloaded.",)
    if here and not chosen.is_local:
        verb = "is" if len(here) == 1 else "are"
        return (
            f"{', '.join(here)} of {choices.candidates[0].model} {verb} on this disk, which "
            "run and chat take unless --quant says otherwise.",
        )
    return ()


def current_machine(
    gpus: Sequence[str] = (), ram: str | None = None, *, cpu_only: bool = False
) -> Machine:
    """The machine of `--gpu`, `--ram` and `--cpu-only`, this one where they leave something open.

    Cards and memory that are typed aren't probed; UsageError for a spec that can't be read.
    """
    cards = parse_gpus(gpus)
    memory = None if ram is None else parse_ram(ram)
    real = None
    if memory is None or not (cards or cpu_only):
        real = _probe(looks_for_cards=not (cards or cpu_only))
    return make_machine(real, cards, memory, cpu_only)


def _probe(*, looks_for_cards: bool) -> Machine:
    from localmistral.fit.hardware import probe_machine  # slow to import

    if not looks_for_cards:
        return probe_machine(())
    from localmistral.engine.devices import list_devices  # loads llama.cpp

    return probe_machine(list_devices())
