"""Which model is planned: the wanted one, a smaller sibling, or the wanted one below the aims.

Knows no words: what was decided and why is for others to say.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import chain

from localmistral.errors import LocalMistralError
from localmistral.fit.choosing.batches import suit_batch
from localmistral.fit.choosing.knobs import list_contexts, list_kv_types
from localmistral.fit.choosing.options import Option, Options
from localmistral.fit.choosing.selection import Aims, choose, choose_fastest, fast_options, judge
from localmistral.fit.plan import Candidate, PlanRequest

MODEL_KNOBS = ("quant", "gpu_layers", "tensor_split", "cpu_expert_layers", "split_mode")
"""Fixed values that are about one model: with them no other model is proposed."""


class Verdict(Enum):
    """How an option came to be chosen."""

    KEEPS_AIMS = "the wanted model keeps the aims"
    BELOW_AIM = "no model keeps the aims, the wanted one fits"
    SIBLING = "only a sibling keeps the aims"
    SIBLING_BELOW_AIM = "no model keeps the aims, only a sibling fits in a quant worth having"
    LAST_RESORT = "nothing sound fits or keeps what was asked: a quant that is known to break"


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """`wanted` is the wanted model's fastest option worth having where it misses the aims; None
    where nothing of it fits."""

    option: Option
    verdict: Verdict
    wanted: Option | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Nothing can be planned: nothing fits (`fastest` is None), or nothing is as fast as was
    asked for."""

    fastest: Option | None


def decide(
    options: Options, wanted: Sequence[Candidate], siblings: Sequence[Sequence[Candidate]]
) -> Decision | Failure:
    """The option to plan. `siblings` has the largest model first."""
    found = _decide(options, wanted, siblings)
    if isinstance(found, Failure):
        return found
    return replace(found, option=suit_batch(options, found.option))


def _decide(
    options: Options, wanted: Sequence[Candidate], siblings: Sequence[Sequence[Candidate]]
) -> Decision | Failure:
    request = options.request
    aims = Aims(min_speed=request.min_speed)
    own = _worth_having(request, wanted)
    found = choose(options, own, aims)
    if found is not None:
        return Decision(option=found, verdict=Verdict.KEEPS_AIMS)
    fastest = fastest_of(options, own)
    able = [_able(request, group) for group in siblings]
    able = [group for group in able if group] if _may_replace(options, wanted, own, aims) else []
    sound = [_unbroken(group) for group in able]
    found = _first(choose(options, group, aims) for group in sound)
    if found is not None:
        return Decision(option=found, verdict=Verdict.SIBLING, wanted=fastest)
    if not request.has_min_speed and fastest is not None:
        return Decision(option=fastest, verdict=Verdict.BELOW_AIM, wanted=fastest)
    quickest = None if request.has_min_speed else _quickest(options, sound)
    if quickest is not None:
        return Decision(option=quickest, verdict=Verdict.SIBLING_BELOW_AIM)
    return _resort(options, [wanted, *able], aims)


def _resort(
    options: Options, groups: Sequence[Sequence[Candidate]], aims: Aims
) -> Decision | Failure:
    """Where nothing sound will do: whatever keeps the aims, or else whatever fits."""
    found = _first(choose(options, group, aims) for group in groups)
    if found is None and options.request.has_min_speed:
        fast = fast_options(options, list(chain.from_iterable(groups)), Aims())
        return Failure(fastest=min(fast, key=lambda one: one.seconds, default=None))
    if found is None:
        found = _first(fastest_of(options, group) for group in groups)
    if found is None:
        return Failure(fastest=None)
    return Decision(option=found, verdict=Verdict.LAST_RESORT)


def _first(found: Iterable[Option | None]) -> Option | None:
    return next((option for option in found if option is not None), None)


def _quickest(options: Options, groups: Sequence[Sequence[Candidate]]) -> Option | None:
    found = [option for group in groups if (option := fastest_of(options, group)) is not None]
    return min(found, key=lambda one: one.seconds, default=None)


def fastest_of(options: Options, group: Sequence[Candidate]) -> Option | None:
    """The best there is without a least speed: of one quant by preference, else the fastest."""
    if len(group) == 1:
        return choose(options, group, Aims())
    return choose_fastest(options, group, Aims())


def _able(request: PlanRequest, group: Sequence[Candidate]) -> list[Candidate]:
    """Those for which the request's fixed values make sense."""
    return [candidate for candidate in group if _makes_sense(request, candidate)]


def _unbroken(group: Sequence[Candidate]) -> list[Candidate]:
    """A smaller model in a sound quant serves better than a larger one in a broken quant."""
    return [candidate for candidate in group if not judge(candidate).is_broken]


def _worth_having(request: PlanRequest, wanted: Sequence[Candidate]) -> list[Candidate]:
    """Without 1 and 2 bits, unless there is no choice: a smaller model serves better than those."""
    if request.quant is not None or len(wanted) == 1:
        return list(wanted)
    return [candidate for candidate in wanted if not judge(candidate).is_last_resort]


def _makes_sense(request: PlanRequest, candidate: Candidate) -> bool:
    try:
        list_contexts(request, candidate)
        list_kv_types(request, candidate.shape)
    except LocalMistralError:
        return False
    return True


def _may_replace(
    options: Options, wanted: Sequence[Candidate], own: Sequence[Candidate], aims: Aims
) -> bool:
    """Whether another model may be proposed: not where a fixed value is at fault, nor for a file
    that is at hand by itself."""
    request = options.request
    if any(getattr(request, knob) is not None for knob in MODEL_KNOBS):
        return False
    if len(wanted) == 1 and wanted[0].is_local:
        return False
    released = replace(request, context=None, kv_type=None, batch=None, ubatch=None)
    return released == request or choose(options.under(released), own, aims) is None
