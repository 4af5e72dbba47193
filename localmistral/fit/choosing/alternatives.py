"""Other plans one could have: other preferences, quants, contexts, cache types and models.

Each is what `decide` makes of the request with one change, so that typing the change gives exactly
the figures shown. Words nothing but the change.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from localmistral.errors import LocalMistralError
from localmistral.fit.choosing.decision import Decision, Verdict, decide
from localmistral.fit.choosing.knobs import PLAIN_KV_TYPE, SMALL_KV_TYPE, round_context
from localmistral.fit.choosing.options import Option, Options
from localmistral.fit.choosing.selection import judge
from localmistral.fit.plan import PREFERENCES, Alternative, Candidate, PlanRequest
from localmistral.units import format_tokens

MOST_ALTERNATIVES = 8
_SLOWEST = 5
"""An alternative that is slower by more than this factor is none."""
_ENCODER_SHARE = 0.04
"""Of the cards' memory; a smaller image encoder makes no difference worth a line."""
_QUANTS_EACH_SIDE = 2
"""How many larger and smaller quants are shown, the nearest classes first."""

_Change = tuple[str, PlanRequest, Sequence[Candidate]]


def list_alternatives(
    options: Options,
    decision: Decision,
    candidates: Sequence[Candidate],
    siblings: Sequence[Sequence[Candidate]],
) -> tuple[Alternative, ...]:
    """At most eight, by model, quant and context from the largest down; none equals the choice."""
    chosen = decision.option
    seen = {_identity(chosen)}
    found: list[tuple[str, Options, Option]] = []
    for change, request, group in _changes(options, decision, candidates, siblings):
        changed = options.under(request)
        option = _decide(changed, group, decision.verdict)
        useful = option is not None and option.speed * _SLOWEST >= chosen.speed
        if option is not None and useful and _identity(option) not in seen:
            seen.add(_identity(option))
            found.append((change, changed, option))
    order = {one.model: n for n, one in enumerate([*candidates, *(s[0] for s in siblings if s)])}
    kept = sorted(found[:MOST_ALTERNATIVES], key=lambda one: _place(one[2], order))
    return tuple(_describe(change, changed, option) for change, changed, option in kept)


def _identity(option: Option) -> tuple[object, ...]:
    return (
        option.candidate.model,
        option.candidate.quant,
        option.context,
        option.load.kv_type,
        option.placement,
    )


def _place(option: Option, order: dict[str, int]) -> tuple[int, float, int, str]:
    candidate = option.candidate
    model = order.get(candidate.model, len(order))
    return (model, -candidate.bits_per_weight, -option.context, option.load.kv_type)


def _decide(options: Options, group: Sequence[Candidate], verdict: Verdict) -> Option | None:
    """What the planner would choose of one model; None where it would refuse, or go for another
    model for want of speed."""
    wanted = [one for one in group if options.request.quant in (None, one.quant)]
    try:
        decision = decide(options, wanted, ()) if wanted else None
    except LocalMistralError:
        return None
    if not isinstance(decision, Decision):
        return None
    stays = options.request.quant is not None
    slow = decision.verdict not in (Verdict.KEEPS_AIMS, verdict)
    return None if slow and not stays else decision.option


def _changes(
    options: Options,
    decision: Decision,
    candidates: Sequence[Candidate],
    siblings: Sequence[Sequence[Candidate]],
) -> Iterator[_Change]:
    """The changes worth showing, the most useful ones first."""
    chosen, request = decision.option, options.request
    own = [one for one in candidates if one.model == chosen.candidate.model]
    group: Sequence[Candidate] = own or next(
        s for s in siblings if s and s[0].model == chosen.candidate.model
    )
    prefix = "" if own else f"{chosen.candidate.model} "
    if not own and decision.wanted is not None:
        yield from _wanted_anyway(request, decision.wanted, candidates)
    for preference in PREFERENCES:
        if preference != request.prefer:
            changed = replace(request, prefer=preference)
            yield f"{prefix}--prefer {preference}", changed, group
    yield from _other_caches(request, chosen, group, prefix)
    yield from _other_contexts(request, chosen, group, prefix)
    if _matters(options, chosen):
        yield f"{prefix}--no-vision", replace(request, vision=False), group
    if request.quant is None or own:
        for quant in _near_quants(chosen.candidate, group):
            yield f"{prefix}--quant {quant}", replace(request, quant=quant), group
    for sibling in siblings:
        if sibling and sibling[0].model != chosen.candidate.model:
            yield sibling[0].model, request.for_another_model(), sibling


def _matters(options: Options, chosen: Option) -> bool:
    """Whether the image encoder takes a share of the cards that something else could use."""
    cards = sum(gpu.budget_bytes for gpu in options.machine.gpus)
    return options.mmproj_bytes(chosen.candidate) > _ENCODER_SHARE * cards > 0


def _wanted_anyway(
    request: PlanRequest, fastest: Option, candidates: Sequence[Candidate]
) -> Iterator[_Change]:
    """The model that was wanted, slower than the aim."""
    speed = int(fastest.speed)
    if speed:
        changed = replace(request, min_speed=float(speed), has_min_speed=True)
        yield f"{candidates[0].model} --min-speed {speed}", changed, candidates


def _other_caches(
    request: PlanRequest, chosen: Option, group: Sequence[Candidate], prefix: str
) -> Iterator[_Change]:
    """The same quant and context with the other cache type."""
    other = SMALL_KV_TYPE if chosen.load.kv_type == PLAIN_KV_TYPE else PLAIN_KV_TYPE
    quant, context = chosen.candidate.quant, chosen.context
    typed = [f"--quant {quant}"] if request.quant is None and len(group) > 1 else []
    typed += [f"--context {format_tokens(context)}"] if request.context is None else []
    change = prefix + " ".join([*typed, f"--kv-type {other}"])
    yield change, replace(request, quant=quant, context=context, kv_type=other), group


def _other_contexts(
    request: PlanRequest, chosen: Option, group: Sequence[Candidate], prefix: str
) -> Iterator[_Change]:
    """Twice the context, and half of it where more would then lie on the cards."""
    double, half = 2 * chosen.context, round_context(chosen.context // 2)
    contexts = [double] if double <= chosen.candidate.context_limit else []
    partly = chosen.placement.gpu_layers > 0 and not chosen.is_whole
    contexts += [half] if partly and half >= request.depth else []
    for context in contexts:
        change = f"{prefix}--context {format_tokens(context)}"
        yield change, replace(request, context=context), group


def _near_quants(chosen: Candidate, group: Sequence[Candidate]) -> Iterator[str]:
    """One quant of each of the nearest classes above and below."""
    rank = judge(chosen).class_rank
    by_rank: dict[int, Candidate] = {}
    for candidate in sorted(group, key=lambda one: one.bits_per_weight):
        by_rank.setdefault(judge(candidate).class_rank, candidate)
    above = sorted(found for found in by_rank if found > rank)[:_QUANTS_EACH_SIDE]
    below = sorted((found for found in by_rank if found < rank), reverse=True)[:_QUANTS_EACH_SIDE]
    yield from (by_rank[found].quant for found in (*above, *below))


def _describe(change: str, options: Options, option: Option) -> Alternative:
    memory = options.measure(option)
    predicted = options.predict(option)
    candidate = option.candidate
    return Alternative(
        change=change,
        model=candidate.model,
        quant=candidate.quant,
        context=option.context,
        kv_type=option.load.kv_type,
        decode_tokens_per_second=predicted.decode_tokens_per_second,
        prefill_tokens_per_second=predicted.prefill_tokens_per_second,
        gpu_bytes=sum(device.used_bytes for device in memory[:-1]),
        ram_bytes=memory[-1].used_bytes,
        download_bytes=sum(file.bytes for file in candidate.files)
        + options.mmproj_bytes(candidate),
    )
