"""Why a request can't be had: by how many bytes on which device, and the one change that helps.

Only words errors and tries changes; the planner raises what this makes.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain

from localmistral.errors import PlanError
from localmistral.fit.choosing.decision import Decision, decide
from localmistral.fit.choosing.knobs import (
    CONTEXT_STEP,
    SMALL_KV_TYPE,
    choose_batches,
    limit_placement,
)
from localmistral.fit.choosing.options import Option, Options
from localmistral.fit.choosing.search import Limits, find_placement
from localmistral.fit.memory import measure
from localmistral.fit.placement import Placement, count_layers
from localmistral.fit.plan import (
    DEFAULT_MIN_CONTEXT,
    DEFAULT_MIN_SPEED,
    Candidate,
    DeviceMemory,
    PlanRequest,
)
from localmistral.units import format_bytes, format_tokens

_ENDLESS_BYTES = 1 << 60
LEAST_CONTEXT = 1024
"""The shortest context that is proposed: below, not even a question with an answer fits."""
_MOST_CONTEXTS = 16
"""How many shorter contexts are tried at most."""

Change = tuple[str, str]
"""An option and its value; an empty one is a flag's."""


def refuse_speed(request: PlanRequest, model: str, fastest: Option) -> PlanError:
    """Nothing reaches the least speed that was asked for."""
    reachable = max(0.1, int(fastest.speed * 10) / 10)
    return PlanError(
        f"{model} can't reach {request.min_speed:g} tokens/s here: the fastest, "
        f"{fastest.candidate.model} {fastest.candidate.quant}, is expected to write "
        f"{fastest.speed:.1f} tokens/s.",
        f"It reaches --min-speed {reachable:g}",
        change=(("--min-speed", f"{reachable:g}"),),
    )


def refuse_size(
    options: Options,
    wanted: Sequence[Candidate],
    candidates: Sequence[Candidate],
    siblings: Sequence[Sequence[Candidate]],
) -> PlanError:
    """Nothing of `wanted` fits; names its smallest quant's shortage, and the first change with
    which one of `candidates` fits, or else one of `siblings`."""
    smallest = min(wanted, key=lambda one: one.shape.weight_bytes)
    context, kv_type, memory = _closest(options, smallest)
    device = max(memory, key=lambda one: one.excess_bytes)
    asked = f" as asked ({_fixed_text(options.request)})" if _fixed_text(options.request) else ""
    excess = device.excess_bytes
    message = (
        f"{smallest.model} {smallest.quant} does not fit{asked}: with {context:,} tokens of "
        f"{kv_type} context, {device.name} needs {format_bytes(device.used_bytes)} and may use "
        f"{format_bytes(device.budget_bytes)}, too little by {format_bytes(excess)} "
        f"({excess:,} bytes)."
    )
    change = _advise(options, candidates)
    if change is not None:
        return PlanError(message, f"It fits with {' '.join(change).strip()}", change=(change,))
    for freed in _free(options.request):
        found = decide(options.under(freed), candidates, siblings)
        if isinstance(found, Decision):
            fixed = _name_fixed(options.request).keys() - _name_fixed(freed).keys()
            left_out = tuple((name, None) for name in sorted(fixed))
            chosen = found.option.candidate
            hint = f"Without that, it would be {chosen.model} {chosen.quant}"
            return PlanError(message, hint, change=left_out)
    return PlanError(message, "Take a smaller model: localmistral models")


def _free(request: PlanRequest) -> Iterator[PlanRequest]:
    """Without what is fixed for one model, then without anything fixed."""
    released = request.for_another_model()
    nothing = replace(
        released,
        context=None,
        kv_type=None,
        batch=None,
        ubatch=None,
        min_context=DEFAULT_MIN_CONTEXT,
        has_min_context=False,
        min_speed=DEFAULT_MIN_SPEED,
        has_min_speed=False,
        parallel=1,
    )
    yield from (one for one in (released, nothing) if one != request)


def _closest(options: Options, candidate: Candidate) -> tuple[int, str, tuple[DeviceMemory, ...]]:
    """The most modest load, placed as if RAM had no end; else as the fixed values say."""
    context = options.contexts(candidate)[-1]
    kv_type = options.kv_types(candidate)[-1]
    batch, ubatch = choose_batches(options.request)
    load = options.make_load(context, kv_type, ubatch, batch)
    space = options.space(candidate, context, load)
    ram = replace(options.machine.ram, available_bytes=_ENDLESS_BYTES)
    limits = limit_placement(options.request, candidate.shape, options.machine)
    endless = replace(space, machine=replace(options.machine, ram=ram))
    placement = find_placement(endless, limits) or _as_fixed(options, candidate, limits)
    mmproj_bytes = options.mmproj_bytes(candidate)
    memory = measure(candidate.shape, options.machine, placement, load, mmproj_bytes=mmproj_bytes)
    return context, kv_type, memory


def _as_fixed(options: Options, candidate: Candidate, limits: Limits) -> Placement:
    """The fixed values as they are, what is free of them by the cards' room."""
    total = candidate.shape.layer_count + 1
    layers = total if limits.gpu_layers is None else limits.gpu_layers
    room = tuple(float(max(1, gpu.budget_bytes)) for gpu in options.machine.gpus)
    return Placement(
        gpu_layers=layers,
        tensor_split=count_layers(limits.shares or room, layers) if layers else (0,) * len(room),
        cpu_expert_layers=limits.cpu_expert_layers or (),
        split_mode=limits.split_mode or "layer",
    )


def _fixed_text(request: PlanRequest) -> str:
    """The options that were fixed, as they are typed."""
    return " ".join(f"{name} {value}" for name, value in _name_fixed(request).items())


def _name_fixed(request: PlanRequest) -> dict[str, str]:
    """Options that were fixed, and their values as they are typed."""
    shares = request.tensor_split
    layers = request.cpu_expert_layers
    named: dict[str, str | int | None] = {
        "--quant": request.quant,
        "--context": None if request.context is None else format_tokens(request.context),
        "--kv-type": request.kv_type,
        "--gpu-layers": request.gpu_layers,
        "--tensor-split": None if shares is None else ",".join(f"{s:g}" for s in shares),
        "--cpu-experts": None if layers is None else format_layers(layers),
        "--split-mode": request.split_mode,
        "--parallel": request.parallel if request.parallel > 1 else None,
        "--batch": request.batch,
        "--ubatch": request.ubatch,
        "--min-context": format_tokens(request.min_context) if request.has_min_context else None,
        "--min-speed": f"{request.min_speed:g}" if request.has_min_speed else None,
    }
    return {name: str(value) for name, value in named.items() if value is not None}


def format_layers(layers: Sequence[int]) -> str:
    """Ascending layers as they are typed: `0-3,8`, `none`."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ",".join(f"{a}-{b}" if a < b else str(a) for a, b in runs) or "none"


def _advise(options: Options, candidates: Sequence[Candidate]) -> Change | None:
    """The first single change with which it fits, as an option and its value."""
    request = options.request
    asked = request.context or options.contexts(candidates[0])[-1]
    changes = (
        _shorter(request, asked),
        _smaller_cache(request),
        _fewer_layers(request),
        _other_experts(request),
        _smaller_quant(request),
        _rest(request),
    )
    for changed, name in chain.from_iterable(changes):
        group = [one for one in candidates if changed.quant in (None, one.quant)]
        found = _find(options.under(changed), group)
        if found is not None:
            return name(found)
    return None


def _find(options: Options, group: Sequence[Candidate]) -> Option | None:
    """What would be planned of a group."""
    decision = decide(options, group, ())
    return decision.option if isinstance(decision, Decision) else None


_Changes = Iterator[tuple[PlanRequest, Callable[[Option], Change]]]


def _shorter(request: PlanRequest, asked: int) -> _Changes:
    """Contexts from just below what was asked for down to the least, in even steps."""
    start = (asked - 1) // CONTEXT_STEP * CONTEXT_STEP
    stride = max(CONTEXT_STEP, asked // _MOST_CONTEXTS // CONTEXT_STEP * CONTEXT_STEP)
    for context in (*range(start, 0, -stride), LEAST_CONTEXT):
        changed = replace(request, context=context, has_min_context=False)
        yield changed, lambda found: ("--context", format_tokens(found.context))


def _smaller_cache(request: PlanRequest) -> _Changes:
    is_plain = request.kv_type not in (None, SMALL_KV_TYPE)
    if is_plain and request.flash_attention is not False:
        yield replace(request, kv_type=SMALL_KV_TYPE), lambda _: ("--kv-type", SMALL_KV_TYPE)


def _fewer_layers(request: PlanRequest) -> _Changes:
    if request.gpu_layers is not None:
        yield (
            replace(request, gpu_layers=None),
            lambda found: ("--gpu-layers", str(found.placement.gpu_layers)),
        )
    if request.tensor_split is not None:
        yield (
            replace(request, tensor_split=None),
            lambda found: ("--tensor-split", ",".join(map(str, found.placement.tensor_split))),
        )
    if request.split_mode is not None:
        yield (
            replace(request, split_mode=None),
            lambda found: ("--split-mode", found.placement.split_mode),
        )


def _other_experts(request: PlanRequest) -> _Changes:
    if request.cpu_expert_layers is not None:
        yield (
            replace(request, cpu_expert_layers=None),
            lambda found: ("--cpu-experts", format_layers(found.placement.cpu_expert_layers)),
        )


def _smaller_quant(request: PlanRequest) -> _Changes:
    if request.quant is not None:
        yield replace(request, quant=None), lambda found: ("--quant", found.candidate.quant)


def _rest(request: PlanRequest) -> _Changes:
    if request.ubatch is not None:
        yield replace(request, ubatch=None), lambda found: ("--ubatch", str(found.load.ubatch))
    if request.parallel > 1:
        yield replace(request, parallel=1), lambda _: ("--parallel", "1")
    if request.vision:
        yield replace(request, vision=False), lambda _: ("--no-vision", "")
