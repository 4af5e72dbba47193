"""Every decision of a plan in one plain sentence with its numbers. Decides nothing."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from localmistral.fit.choosing.decision import Decision, Verdict, fastest_of
from localmistral.fit.choosing.knobs import (
    DEFAULT_UBATCH,
    PLAIN_KV_TYPE,
    choose_batches,
    largest_context,
)
from localmistral.fit.choosing.options import Option, Options
from localmistral.fit.choosing.placement_text import explain_placement
from localmistral.fit.choosing.selection import judge
from localmistral.fit.memory import kv_bytes_per_layer
from localmistral.fit.plan import CONTEXT_AIM, Candidate
from localmistral.fit.quality import FOUR_BIT_RANK
from localmistral.units import format_bytes


def explain(
    options: Options, decision: Decision, candidates: Sequence[Candidate], threads: int
) -> tuple[str, ...]:
    """The reasons in the order in which one would ask for them."""
    option = decision.option
    return (
        *_explain_model(options, decision, candidates),
        *_explain_quant(options, decision, candidates),
        *_explain_context(options, option),
        *_explain_cache(options, option),
        *explain_placement(options, option),
        *_explain_batch(options, option),
        _explain_threads(options, option, threads),
        _explain_speed(options, option),
        *_explain_source(option.candidate),
    )


def _explain_model(
    options: Options, decision: Decision, candidates: Sequence[Candidate]
) -> Iterator[str]:
    model, speed = candidates[0].model, options.request.min_speed
    chosen, wanted = decision.option.candidate.model, decision.wanted
    if chosen != model and wanted is not None:
        yield (
            f"{chosen} is proposed instead of {model}, which would fit but write only "
            f"{wanted.speed:.1f} tokens/s as {wanted.candidate.quant}: the aim is {speed:g}."
        )
    elif chosen != model:
        yield f"{chosen} is proposed instead of {model}: {_explain_absence(candidates)}."
    if chosen != model and any(judge(one).is_last_resort for one in candidates):
        yield f"Quants of {model} with 1 or 2 bits would serve worse than a smaller model."
    if decision.option.speed < speed:
        yield (
            f"{decision.option.speed:.1f} tokens/s is below the aim of {speed:g}, which no sound "
            "quant of a model that may be chosen reaches on this machine."
        )


def _explain_absence(candidates: Sequence[Candidate]) -> str:
    """Why no quant of the wanted model is chosen that would be worth having."""
    sound = [one for one in candidates if not judge(one).is_last_resort] or candidates
    smallest = min(sound, key=lambda one: one.shape.weight_bytes)
    size = format_bytes(smallest.shape.weight_bytes)
    kind = "quant" if len(sound) == len(candidates) else "quant above 2 bits"
    return f"its smallest {kind}, {smallest.quant}, has {size} and does not fit this machine"


def _explain_quant(
    options: Options, decision: Decision, candidates: Sequence[Candidate]
) -> Iterator[str]:
    option, request = decision.option, options.request
    quant, quality = option.candidate.quant, option.quality
    loss = f"about {quality.expected_loss:.1%} above BF16 in perplexity"
    group = [one for one in candidates if one.model == option.candidate.model]
    if request.quant is not None and group:
        yield f"{quant} is kept as asked; it is {loss}."
    elif len(group) == 1:
        yield f"{quant} is the only quant there is to choose from; it is {loss}."
    elif decision.verdict in (Verdict.BELOW_AIM, Verdict.SIBLING_BELOW_AIM):
        yield f"{quant}, {loss}, is the fastest of the quants that fit{_unbroken_text(option)}."
    elif decision.verdict is Verdict.LAST_RESORT:
        yield f"{quant}, {loss}, is chosen because nothing sounder fits at a speed that will do."
    else:
        yield f"{quant}, {loss}, {_PREFERENCE_TEXTS[request.prefer](option)}."
        yield from _explain_better(options, option, group)
    if quality.is_broken:
        yield (
            f"{quant} has {quality.bits_per_weight:.1f} bits per weight: below about 3.1, long "
            "reasoning sometimes ends without an answer."
        )


def _unbroken_text(option: Option) -> str:
    return "" if option.quality.is_broken else " and are not known to break"


def _balanced_text(option: Option) -> str:
    if option.quality.class_rank > FOUR_BIT_RANK and option.is_whole:
        return "is the largest class of quant that lies wholly on the cards with its full context"
    if option.quality.class_rank >= FOUR_BIT_RANK:
        return "is the fastest of the 4-bit class, the best worth having partly in RAM"
    return "is the fastest of the best class that keeps the aims"


_PREFERENCE_TEXTS: dict[str, Callable[[Option], str]] = {
    "balanced": _balanced_text,
    "quality": lambda _: "is the largest quant that keeps the least speed",
    "speed": lambda option: f"is the fastest of the quants that fit{_unbroken_text(option)}",
    "context": lambda _: "is the quant up to 4 bits with the longest context",
}


def _explain_better(options: Options, option: Option, group: Sequence[Candidate]) -> Iterator[str]:
    """Why it isn't the next better class: it doesn't fit, or is too slow."""
    rank = option.quality.class_rank
    better = [one for one in group if judge(one).class_rank > rank]
    if not better or options.request.prefer == "speed" or rank > FOUR_BIT_RANK:
        return
    smallest = min(better, key=lambda one: one.shape.weight_bytes)
    size = format_bytes(smallest.shape.weight_bytes)
    single = options.under(replace(options.request, quant=smallest.quant))
    best = fastest_of(single, [smallest])
    if best is None:
        yield f"{smallest.quant} ({size}), the smallest better one, does not fit."
    elif not best.is_whole and rank == FOUR_BIT_RANK and options.request.prefer == "balanced":
        yield (
            f"{smallest.quant} ({size}), the smallest better one, would lie partly in RAM, where "
            f"more bits aren't worth their time: {best.speed:.1f} tokens/s."
        )
    elif best.speed < options.request.min_speed:
        yield (
            f"{smallest.quant} ({size}), the smallest better one, would write "
            f"{best.speed:.1f} tokens/s, the aim is {options.request.min_speed:g}."
        )


def _explain_context(options: Options, option: Option) -> Iterator[str]:
    request, context = options.request, f"{option.context:,} tokens of context"
    limit = largest_context(option.candidate)
    if request.context is not None:
        rounded = (
            "" if request.context == option.context else f" (rounded from {request.context:,})"
        )
        yield f"{context} are kept as asked{rounded}."
    elif option.context == limit:
        yield f"{context} are all that the model is meant for."
    elif request.prefer == "context":
        yield f"{context} are the most that keeps the aims; the model is meant for {limit:,}."
    elif option.context == options.contexts(option.candidate)[0]:
        yield f"{context} are the aim; the model is meant for up to {limit:,}."
    else:
        yield f"{context} are what the quant leaves room for; the aim is {CONTEXT_AIM:,}."
    if request.parallel > 1:
        cells = option.context * request.parallel
        yield f"Each of {request.parallel} streams has that context: {cells:,} tokens in all."


def _explain_cache(options: Options, option: Option) -> Iterator[str]:
    kv_type, cells = option.load.kv_type, option.load.cells
    shape = option.candidate.shape
    size = sum(kv_bytes_per_layer(shape, kv_type, cells))
    if options.request.kv_type is not None:
        yield f"The cache is {kv_type} as asked: {format_bytes(size)}."
        return
    if kv_type == PLAIN_KV_TYPE:
        yield f"The cache is {kv_type}, without loss: {format_bytes(size)}."
        return
    plain = sum(kv_bytes_per_layer(shape, PLAIN_KV_TYPE, cells))
    yield (
        f"The cache is {kv_type}: {format_bytes(size)} instead of {format_bytes(plain)} as "
        f"{PLAIN_KV_TYPE}, {_explain_small_cache(options, option)}."
    )


def _explain_small_cache(options: Options, option: Option) -> str:
    """What would be the matter with a plain cache at the same quant and context."""
    speed = options.request.min_speed
    plain = options.find(option.candidate, option.context, PLAIN_KV_TYPE, speed)
    if plain is None:
        return "with which this quant and context do not fit"
    if plain.speed < speed <= option.speed:
        return f"with which it would write {plain.speed:.1f} tokens/s, below the aim of {speed:g}"
    if option.is_whole and not plain.is_whole:
        return "with which not all of it would lie on the cards"
    return f"with which it would write {plain.speed:.1f} tokens/s"


def _explain_batch(options: Options, option: Option) -> Iterator[str]:
    ubatch = option.load.ubatch
    if options.request.ubatch is not None or ubatch == choose_batches(options.request)[1]:
        return
    if ubatch > DEFAULT_UBATCH:
        yield (
            f"Prompts are read {ubatch:,} tokens at a time, because weights in RAM are copied to a "
            "card once each time."
        )
    else:
        yield (
            f"Prompts are read {ubatch} tokens at a time instead of {DEFAULT_UBATCH}: the smaller "
            "compute buffers are what makes it fit."
        )


def _explain_threads(options: Options, option: Option, threads: int) -> str:
    if options.request.threads is not None:
        return f"{threads} CPU threads are kept as asked."
    if option.is_whole:
        return f"{threads} CPU threads are enough, since the cards do all the work."
    return f"{threads} CPU threads, one for each core, compute what is in RAM."


def _explain_speed(options: Options, option: Option) -> str:
    predicted, asked = options.predict(option), options.request.depth
    full = f" (all there are; {asked:,} were asked for)" if asked > predicted.depth else ""
    return (
        f"With {predicted.depth:,} tokens of context filled{full}, it should write "
        f"{predicted.decode_tokens_per_second:,.1f} tokens/s and read "
        f"{predicted.prefill_tokens_per_second:,.0f} tokens/s of a prompt."
    )


def _explain_source(candidate: Candidate) -> Iterator[str]:
    if candidate.is_estimated:
        yield (
            f"Sizes are estimated from the catalogue's {format_bytes(candidate.shape.weight_bytes)}"
            ", since no file of it has been read yet."
        )
    if candidate.is_local:
        yield f"{candidate.quant} is on this disk."
