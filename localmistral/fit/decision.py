"""Which model is planned: the wanted one, a smaller sibling, or the wanted one below the aims.

Knows no words: what was decided and why is for others to say.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import chain

from localmistral.errors import LocalMistralError
from localmistral.fit.batches import suit_batch
from localmistral.fit.knobs import list_contexts, list_kv_types
from localmistral.fit.options import Option, Options
from localmistral.fit.plan import Candidate, PlanRequest
from localmistral.fit.selection import Aims, choose, choose_fastest, fast_options, judge

MODEL_KNOBS = ("quant", "gpu_layers", "tensor_split", "cpu_expert_layers", "split_mode")
"""Fixed values that are about one model: with them no other model is proposed."""


class Verdict(Enum):
    """How an option came to be chosen."""

    KEEPS_AIMS = "the wanted model keeps the aims"
    BELOW_AIM = "no model keeps the aims, the wanted one fits"
    SIBLING = "only a sibling keeps the aims"
    SIBLING_BELOW_AIM = "only a sibling fits"


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """`wanted` is the wanted model's fastest option where another verdict than the first stands;
    None where nothing of it fits."""

    option: Option
    verdict: Verdict
    wanted: Option | None = None

    @property
    def is_sibling(self) -> bool:
        return self.verdict in (Verdict.SIBLING, Verdict.SIBLING_BELOW_AIM)


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
    aims = Aims(min_speed=options.request.min_speed)
    found = choose(options, wanted, aims)
    if found is not None:
        return Decision(option=found, verdict=Verdict.KEEPS_AIMS)
    fastest = fastest_of(options, wanted)
    able = [_able(options.request, group) for group in siblings]
    able = [group for group in able if group] if _may_replace(options, wanted, aims) else []
    for group in [*map(_unbroken, able), *able]:
        found = choose(options, group, aims)
        if found is not None:
            return Decision(option=found, verdict=Verdict.SIBLING, wanted=fastest)
    if options.request.has_min_speed:
        everything = [*wanted, *chain.from_iterable(able)]
        fast = fast_options(options, everything, Aims())
        return Failure(fastest=min(fast, key=lambda one: one.seconds, default=None))
    if fastest is not None:
        return Decision(option=fastest, verdict=Verdict.BELOW_AIM, wanted=fastest)
    others = [found for group in able if (found := fastest_of(options, group)) is not None]
    if not others:
        return Failure(fastest=None)
    quickest = min(others, key=lambda one: one.seconds)
    return Decision(option=quickest, verdict=Verdict.SIBLING_BELOW_AIM)


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


def _makes_sense(request: PlanRequest, candidate: Candidate) -> bool:
    try:
        list_contexts(request, candidate)
        list_kv_types(request, candidate.shape)
    except LocalMistralError:
        return False
    return True


def _may_replace(options: Options, wanted: Sequence[Candidate], aims: Aims) -> bool:
    """Whether another model may be proposed: not where a fixed value is at fault, nor for a file
    that is at hand by itself."""
    request = options.request
    if any(getattr(request, knob) is not None for knob in MODEL_KNOBS):
        return False
    if len(wanted) == 1 and wanted[0].is_local:
        return False
    released = replace(request, context=None, kv_type=None, batch=None, ubatch=None)
    return released == request or choose(options.under(released), wanted, aims) is None
