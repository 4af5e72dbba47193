"""Which option is the best one, by what the user prefers. (The heart of the planner.)

Every preference is an order over the options that keep the least speed and context, so that more
memory, which only adds options and speeds up others, never makes the choice worse:

- balanced: quality class, then context up to its aim, then speed; classes beyond the 4-bit one
  count only for options that lie wholly on cards with the full context;
- quality: bits per weight, then context, then speed;
- speed: unbroken quants first, then speed, then context;
- context: quality class up to the 4-bit one, then context up to the model's limit, then speed.

Speeds within 5 % of each other count as equal: then the better quant and the larger batch win. The
cache stays f16 unless q8_0 brings a better class, a longer context, or the least speed; to be
faster is reason enough only where `speed` is preferred. Words nothing.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from localmistral.fit.choosing.knobs import PLAIN_KV_TYPE, largest_context
from localmistral.fit.choosing.options import Option, Options
from localmistral.fit.plan import Candidate
from localmistral.fit.quality import EIGHT_BIT_RANK, FOUR_BIT_RANK, QuantQuality, judge_quant

NEAR = 0.05
"""Speeds closer than this can't be told apart: predictions are not better than that."""
LONG_CONTEXT_STEP = 2048
"""To how many tokens the longest context is found."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Aims:
    """What every option must keep: tokens per second, and whether broken quants may be taken."""

    min_speed: float = 0.0


def choose(options: Options, candidates: Sequence[Candidate], aims: Aims) -> Option | None:
    """The best option of one model by the request's preference; None if none keeps the aims."""
    chooser = _CHOOSERS[options.request.prefer]
    return chooser(options, candidates, aims)


def choose_fastest(options: Options, candidates: Sequence[Candidate], aims: Aims) -> Option | None:
    """The fastest unbroken quant, or the fastest of all if only broken ones do."""
    for group in _split(candidates, lambda found: not judge(found).is_broken):
        found = choose_any_fastest(options, group, aims)
        if found is not None:
            return found
    return None


def choose_balanced(options: Options, candidates: Sequence[Candidate], aims: Aims) -> Option | None:
    """Class by class, from the best one down."""
    for rank in range(EIGHT_BIT_RANK, FOUR_BIT_RANK, -1):
        found = _best_of_class(options, _with_rank(candidates, rank), aims, is_whole=True)
        if found is not None:
            return found
    return choose_up_to_four_bits(options, candidates, aims, _best_of_class)


def choose_quality(options: Options, candidates: Sequence[Candidate], aims: Aims) -> Option | None:
    """Quant by quant, from the largest one down; broken ones last."""
    for candidate in sorted(candidates, key=_goodness, reverse=True):
        found = _best_of_class(options, [candidate], aims)
        if found is not None:
            return found
    return None


def choose_context(options: Options, candidates: Sequence[Candidate], aims: Aims) -> Option | None:
    """The longest context at four bits, or in the best class below that has any."""
    if options.request.context is not None:
        return choose_up_to_four_bits(options, candidates, aims, _best_of_class)
    return choose_up_to_four_bits(options, candidates, aims, _longest_of_class)


_CHOOSERS: dict[str, Callable[[Options, Sequence[Candidate], Aims], Option | None]] = {
    "balanced": choose_balanced,
    "quality": choose_quality,
    "speed": choose_fastest,
    "context": choose_context,
}


def choose_up_to_four_bits(
    options: Options,
    candidates: Sequence[Candidate],
    aims: Aims,
    choose_in_class: Callable[[Options, Sequence[Candidate], Aims], Option | None],
) -> Option | None:
    """From the 4-bit class down. Larger quants, partly in RAM, come in where there's no 4-bit one:
    they are slower and no smaller."""
    larger = [found for found in candidates if judge(found).class_rank > FOUR_BIT_RANK]
    for rank in range(FOUR_BIT_RANK, -1, -1):
        groups = [_with_rank(candidates, rank)]
        groups += [larger] if rank == FOUR_BIT_RANK else []
        for group in groups:
            found = choose_in_class(options, group, aims)
            if found is not None:
                return found
    return None


def judge(candidate: Candidate) -> QuantQuality:
    """The quality of a candidate's quant."""
    return judge_quant(candidate.quant, candidate.bits_per_weight)


def _with_rank(candidates: Sequence[Candidate], rank: int) -> list[Candidate]:
    """Those of a class; 16 bits count as 8, whose loss is nothing one could measure."""
    return [c for c in candidates if min(judge(c).class_rank, EIGHT_BIT_RANK) == rank]


def _goodness(candidate: Candidate) -> tuple[bool, float]:
    return not judge(candidate).is_broken, candidate.bits_per_weight


def _split(
    candidates: Sequence[Candidate], is_first: Callable[[Candidate], bool]
) -> Iterator[list[Candidate]]:
    yield [found for found in candidates if is_first(found)]
    yield [found for found in candidates if not is_first(found)]


def _best_of_class(
    options: Options, group: Sequence[Candidate], aims: Aims, *, is_whole: bool = False
) -> Option | None:
    """The longest context up to the aim, and with it the fastest option. Beyond the 4-bit class
    (`is_whole`) a shorter context would be too high a price."""
    pairs = [(one, kv_type) for one in group for kv_type in options.kv_types(one)]
    if not pairs:
        return None
    contexts = options.contexts(group[0])
    found = _pick(options, _options_at(options, pairs, contexts[0], aims, is_whole=is_whole))
    if found is not None or is_whole or len(contexts) == 1:
        return found
    # What the shortest context doesn't bring about, none does.
    last = list(_options_at(options, pairs, contexts[-1], aims))
    able = [(option.candidate, option.load.kv_type) for option in last]
    for context in contexts[1:-1]:
        found = _pick(options, _options_at(options, able, context, aims))
        if found is not None:
            return found
    return _pick(options, last)


def _options_at(
    options: Options,
    pairs: Iterable[tuple[Candidate, str]],
    context: int,
    aims: Aims,
    *,
    is_whole: bool = False,
) -> Iterator[Option]:
    """The options of quants and KV types at a context that keep the aims."""
    for candidate, kv_type in pairs:
        if is_whole and not options.could_be_whole(candidate, context, kv_type):
            continue
        found = _reach(options, candidate, context, kv_type, aims)
        if found is not None and (found.is_whole or not is_whole):
            yield found


def _reach(
    options: Options, candidate: Candidate, context: int, kv_type: str, aims: Aims
) -> Option | None:
    """The option, if it keeps the aims; not searched for where a bound says that it can't."""
    bound = options.least_seconds(candidate, context, kv_type)
    if bound is None or bound * aims.min_speed > 1:
        return None
    found = options.find(candidate, context, kv_type, aims.min_speed)
    return None if found is None or found.seconds * aims.min_speed > 1 else found


def _pick(options: Options, found: Iterable[Option]) -> Option | None:
    """Of equally good options the fastest; of nearly as fast ones the most careful."""
    able = list(found)
    if options.request.prefer != "speed":
        able = _without_needless_loss(able)
    least = min((option.seconds for option in able), default=0.0)
    near = [option for option in able if option.seconds * (1 - NEAR) <= least]
    return min(near, key=_carefulness, default=None)


def _without_needless_loss(found: Sequence[Option]) -> list[Option]:
    """Without a quantised cache where a plain one has as much context."""
    longest = max((o.context for o in found if o.load.kv_type == PLAIN_KV_TYPE), default=0)
    return [o for o in found if o.load.kv_type == PLAIN_KV_TYPE or o.context > longest]


def _carefulness(option: Option) -> tuple[bool, int, float, float, int, float]:
    """Smaller is better: longer context, plain cache, better quant, larger batch, then speed."""
    return (
        option.quality.is_broken,
        -option.context,
        option.load.kv_type != PLAIN_KV_TYPE,
        -option.candidate.bits_per_weight,
        -option.load.ubatch,
        option.seconds,
    )


def choose_any_fastest(options: Options, group: Sequence[Candidate], aims: Aims) -> Option | None:
    """The fastest option of any quant, or one that is nearly as fast and better otherwise."""
    return _pick(options, fast_options(options, group, aims))


def fast_options(options: Options, group: Sequence[Candidate], aims: Aims) -> list[Option]:
    """The fastest option and nearly as fast ones, at the first or the last context: a shorter one
    may be faster."""
    found: list[Option] = []
    for candidate in sorted(group, key=lambda one: one.bits_per_weight):
        contexts = options.contexts(candidate)
        for context in dict.fromkeys((contexts[0], contexts[-1])):
            best = min((option.seconds for option in found), default=float("inf"))
            pairs = [(candidate, kv_type) for kv_type in options.kv_types(candidate)]
            found += _options_at(options, pairs, context, _tighten(aims, best))
    return found


def _tighten(aims: Aims, best: float) -> Aims:
    """Nothing slower than near the best matters any more."""
    return Aims(min_speed=max(aims.min_speed, (1 - NEAR) / best))


def _longest_of_class(options: Options, group: Sequence[Candidate], aims: Aims) -> Option | None:
    """The longest context of any quant of a class, found by halving; then the fastest there."""
    longest = 0
    for candidate in sorted(group, key=lambda one: one.shape.weight_bytes):
        for kv_type in reversed(options.kv_types(candidate)):  # the most modest ones first
            longest = max(longest, _longest(options, candidate, kv_type, aims, above=longest))
    able = [found for found in group if largest_context(found) >= longest]
    pairs = [(found, kv_type) for found in able for kv_type in options.kv_types(found)]
    return _pick(options, _options_at(options, pairs, longest, aims)) if longest else None


def _longest(
    options: Options, candidate: Candidate, kv_type: str, aims: Aims, *, above: int
) -> int:
    """The longest context that keeps the aims; 0 if none above `above` does."""

    def keeps(context: int) -> bool:
        return _reach(options, candidate, context, kv_type, aims) is not None

    high = largest_context(candidate)
    low = above + LONG_CONTEXT_STEP if above else options.contexts(candidate)[-1]
    if low > high or not keeps(low):
        return 0
    if keeps(high):
        return high
    while high - low > LONG_CONTEXT_STEP:
        middle = (low + high) // 2 // LONG_CONTEXT_STEP * LONG_CONTEXT_STEP
        middle = middle if middle > low else low + LONG_CONTEXT_STEP
        low, high = (middle, high) if keeps(middle) else (low, middle)
    return low
