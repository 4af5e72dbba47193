"""The choice: which quant of which model, with how much context, placed how, on this machine.

`plan` is pure: it reads no file, clock or environment, and the same arguments give the same plan.
The aims are a least speed and a least context. Where no quant of the wanted model keeps them, a
smaller sibling that does is proposed; where no sibling does either, the wanted model is planned as
fast as it gets, and the plan says so. What the user fixed stays fixed: it is an error where that
can't be. Models that only make embeddings are planned by `embedding`.
"""

from collections.abc import Sequence
from dataclasses import replace

from localmistral.errors import LocalMistralError
from localmistral.fit.calibration import NO_CALIBRATION, Calibration
from localmistral.fit.choosing.alternatives import list_alternatives
from localmistral.fit.choosing.decision import Decision, Failure, decide
from localmistral.fit.choosing.knobs import check_request
from localmistral.fit.choosing.options import Option, Options
from localmistral.fit.choosing.reasons import explain
from localmistral.fit.choosing.refusal import refuse_size, refuse_speed
from localmistral.fit.embedding import plan_embedding
from localmistral.fit.machine import Machine, Ram
from localmistral.fit.plan import Candidate, Plan, PlannedFile, PlanRequest
from localmistral.models.filenames import match_quant

THREADS_BESIDE_CARDS = 4
"""Enough where the cards do all the work: then threads only wait for them."""


def plan(
    candidates: Sequence[Candidate],
    machine: Machine,
    request: PlanRequest,
    *,
    siblings: Sequence[Sequence[Candidate]] = (),
    calibration: Calibration = NO_CALIBRATION,
) -> Plan:
    """The best plan for one of `candidates` (the quants of one model), or of the siblings.

    `siblings` are lists like it of models to fall back on, the largest first. LocalMistralError
    where nothing fits or a fixed value can't be kept, UsageError for one that makes no sense.
    """
    check_request(request)
    request = replace(request, quant=_find_quant(candidates, request.quant))
    wanted = [one for one in candidates if request.quant in (None, one.quant)]
    if all(candidate.shape.only_embeds for candidate in wanted):
        return plan_embedding(wanted, machine, request)
    options = Options(machine=machine, request=request, calibration=calibration)
    decision = decide(options, wanted, siblings)
    if isinstance(decision, Failure):
        if decision.fastest is None:
            raise refuse_size(options, wanted, candidates, siblings)
        raise refuse_speed(request, wanted[0].model, decision.fastest)
    shown = siblings if request.quant is None else ()
    return _compose(options, decision, candidates, shown)


def _find_quant(candidates: Sequence[Candidate], asked: str | None) -> str | None:
    """The quant's exact name; None if none is asked for. LocalMistralError where there's none."""
    if not candidates:
        raise LocalMistralError(
            "No quant of this model has a known size.", "See what is known: localmistral models"
        )
    if asked is None:
        return None
    names = [candidate.quant for candidate in candidates]
    found = asked if asked in names else match_quant(asked, names)
    if found is None:
        raise LocalMistralError(
            f"{candidates[0].model} has no quant {asked[:40]!r}.", f"Use {', '.join(names)}."
        )
    return found


def _compose(
    options: Options,
    decision: Decision,
    candidates: Sequence[Candidate],
    siblings: Sequence[Sequence[Candidate]],
) -> Plan:
    option = decision.option
    candidate, load = option.candidate, option.load
    has_vision = options.mmproj_bytes(candidate) > 0
    threads = _choose_threads(options, option)
    devices = options.measure(option)
    assert not any(device.excess_bytes for device in devices), "a search's answer is over budget"
    return Plan(
        model=candidate.model,
        quant=candidate.quant,
        repository=candidate.repository,
        revision=candidate.revision,
        files=(*candidate.files, *_encoder(candidate if has_vision else None)),
        context=option.context,
        parallel=options.request.parallel,
        kv_type=load.kv_type,
        placement=option.placement,
        flash_attention=load.flash_attention,
        batch=load.batch,
        ubatch=load.ubatch,
        threads=threads,
        mmap=True,
        repack=_may_repack(candidate, option, options.machine.ram),
        devices=devices,
        predicted=options.predict(option),
        reasons=explain(options, decision, candidates, threads),
        alternatives=list_alternatives(options, decision, candidates, siblings),
        is_estimated=candidate.is_estimated,
        is_local=candidate.is_local,
    )


def _encoder(candidate: Candidate | None) -> tuple[PlannedFile, ...]:
    return (candidate.mmproj,) if candidate and candidate.mmproj else ()


def _choose_threads(options: Options, option: Option) -> int:
    """One a core where the CPU computes; a few where the cards do."""
    cores = max(1, options.machine.cpu.cores)
    if options.request.threads is not None:
        return options.request.threads
    return min(cores, THREADS_BESIDE_CARDS) if option.is_whole else cores


def _may_repack(candidate: Candidate, option: Option, ram: Ram) -> bool:
    """The CPU's faster layout is a copy of the weights beside the file's pages: only for models
    that are in RAM alone, where there's room for both."""
    is_alone = not option.placement.gpu_layers
    return is_alone and 2 * candidate.shape.weight_bytes <= ram.available_bytes
