"""What holds for every plan, on machines that hypothesis makes up."""

from dataclasses import replace
from itertools import permutations
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from plan_samples import candidates, machine, siblings

from localmistral.errors import LocalMistralError
from localmistral.fit.choosing.batches import MOST_DECODE_LOSS
from localmistral.fit.choosing.decision import Decision, Failure, decide
from localmistral.fit.choosing.options import UBATCH_GAIN, Option, Options
from localmistral.fit.choosing.selection import NEAR
from localmistral.fit.machine import GIB, Gpu, Machine
from localmistral.fit.plan import Candidate, Plan, PlanRequest
from localmistral.fit.planner import plan
from localmistral.fit.quality import FOUR_BIT_RANK, judge_quant

pytestmark = pytest.mark.slow

MODELS = ("mistral-small-4", "mistral-small-3.2", "ministral-3-8b")
QUANTS = {
    "mistral-small-4": ("UD-IQ1_M", "UD-IQ3_XXS", "UD-IQ3_S", "UD-IQ4_XS", "UD-Q4_K_M", "UD-Q6_K"),
    "mistral-small-3.2": ("Q2_K", "IQ3_XXS", "Q3_K_M", "IQ4_XS", "Q4_K_M", "Q6_K", "Q8_0"),
    "ministral-3-8b": ("Q2_K", "IQ4_XS", "Q4_K_M", "Q5_K_M", "Q8_0", "BF16"),
}
MANY = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
FEW = settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))


@st.composite
def gpus(draw: st.DrawFn) -> Gpu:
    size = draw(st.sampled_from((2, 4, 6, 8, 10, 11, 12, 16, 20, 24, 32, 48, 96)))
    busy = draw(st.sampled_from((0.0, 0.0, 0.4, 1.7, 3.0)))
    return Gpu(
        name=f"{size}G",
        total_bytes=size * GIB,
        free_bytes=int(max(0.0, size - busy) * GIB),
        bandwidth=draw(st.sampled_from((112e9, 288e9, 360e9, 760e9, 936e9, 1008e9, 1792e9))),
        flops=draw(st.sampled_from((5e12, 50e12, 140e12, 330e12))),
        backend=draw(st.sampled_from(("cuda", "cuda", "cuda", "vulkan", "rocm", "rpc", "metal"))),
    )


@st.composite
def machines(draw: st.DrawFn, *, most_cards: int = 4) -> Machine:
    cards = draw(st.lists(gpus(), max_size=most_cards))
    return machine(
        *cards,
        ram=draw(st.sampled_from((4, 8, 16, 24, 32, 48, 64, 96, 128, 192))),
        bandwidth=draw(st.sampled_from((25e9, 51e9, 96e9, 200e9))),
        cores=draw(st.sampled_from((2, 8, 24))),
        peer=draw(st.booleans()),
    )


def some(model: str) -> tuple[Candidate, ...]:
    return candidates(model, *QUANTS[model])


requests = st.builds(
    PlanRequest,
    parallel=st.sampled_from((1, 1, 1, 4)),
    depth=st.sampled_from((0, 4096, 30_000)),
    prefer=st.sampled_from(("balanced", "balanced", "quality", "speed", "context")),
    min_speed=st.sampled_from((5.0, 20.0, 20.0, 60.0)),
    vision=st.booleans(),
)


def try_plan(model: str, where: Machine, request: PlanRequest) -> Plan | None:
    """The plan without siblings; None where it is refused."""
    try:
        return plan(some(model), where, request)
    except LocalMistralError as error:
        assert error.message.endswith(".")
        assert error.hint
        return None


def check(made: Plan, where: Machine, request: PlanRequest) -> None:
    """What every plan keeps."""
    chosen = next(c for model in MODELS for c in some(model) if fits_name(c, made))
    layers = chosen.shape.layer_count
    placement = made.placement
    assert len(made.devices) == len(where.gpus) + 1
    for device in made.devices:
        assert device.used_bytes <= device.budget_bytes, device
    assert sum(placement.tensor_split) == placement.gpu_layers <= layers + 1
    assert len(placement.tensor_split) == len(where.gpus)
    assert list(placement.cpu_expert_layers) == sorted(set(placement.cpu_expert_layers))
    assert set(placement.cpu_expert_layers) <= set(range(layers))
    assert made.context % 256 == 0
    assert made.context <= chosen.context_limit
    assert made.context >= min(request.min_context, chosen.context_limit)
    assert made.predicted.depth == min(request.depth, made.context)
    assert made.ubatch <= made.batch
    assert made.threads >= 1
    assert made.predicted.decode_tokens_per_second > 0
    assert made.predicted.prefill_tokens_per_second > 0
    weights = sum(device.weights_bytes for device in made.devices)
    assert chosen.shape.weight_bytes <= weights <= chosen.shape.weight_bytes * 1.2
    assert made.reasons and all(reason.endswith(".") for reason in made.reasons)
    assert len(made.alternatives) <= 8
    own = (made.quant, made.context, made.kv_type, made.predicted.decode_tokens_per_second)
    for other in made.alternatives:
        figures = (other.quant, other.context, other.kv_type, other.decode_tokens_per_second)
        assert other.model != made.model or figures != own


def fits_name(candidate: Candidate, made: Plan) -> bool:
    return (candidate.model, candidate.quant) == (made.model, made.quant)


@FEW
@given(st.sampled_from(MODELS), machines(), requests)
def test_a_plan_keeps_every_budget_and_is_the_same_twice(
    model: str, where: Machine, request: PlanRequest
) -> None:
    made = try_plan(model, where, request)
    if made is not None:
        check(made, where, request)
    assert try_plan(model, where, request) == made


def best(model: str, where: Machine, request: PlanRequest) -> Option | None:
    decision = decide(Options(machine=where, request=request), some(model), ())
    return decision.option if isinstance(decision, Decision) else None


def worth(option: Option | None) -> tuple[float, float, bool]:
    """Class, context and a cache without loss, which come before speed; nothing is the worst."""
    if option is None:
        return (-1, 0, False)
    rank = option.quality.class_rank
    rank = min(rank, FOUR_BIT_RANK) if not option.is_whole else rank
    return (rank, option.context, option.load.kv_type == "f16")


@MANY
@given(
    st.sampled_from(MODELS),
    machines(most_cards=3),
    st.integers(0, 3),
    st.sampled_from((0.25, 1.0, 4.0, 16.0)),
)
def test_more_memory_never_lowers_quality_context_or_speed(
    model: str, where: Machine, which: int, more_gib: float
) -> None:
    more = int(more_gib * GIB)
    cards = list(where.gpus)
    if which < len(cards):
        grown = cards[which]
        cards[which] = replace(
            grown, total_bytes=grown.total_bytes + more, free_bytes=grown.free_bytes + more
        )
        larger = replace(where, gpus=tuple(cards))
    else:
        available = where.ram.available_bytes + more
        larger = replace(where, ram=replace(where.ram, available_bytes=available))
    request = PlanRequest()
    before, after = best(model, where, request), best(model, larger, request)
    keeps = before is not None and before.speed >= request.min_speed
    if keeps:
        assert worth(after) >= worth(before)
    if before is not None:
        assert after is not None
        if worth(after) == worth(before):
            assert after.speed >= before.speed * (1 - allowance(before, after))


def allowance(before: Option, after: Option) -> float:
    """How much slower a choice may be than the fastest one of its class, context and cache: for a
    better quant, and for prompts."""
    batch = UBATCH_GAIN if before.load.ubatch < after.load.ubatch else 0.0
    return 1 - (1 - NEAR) * (1 - MOST_DECODE_LOSS) * (1 - batch)


@FEW
@given(gpus(), gpus(), st.integers(1, 2), st.sampled_from(MODELS))
def test_the_order_of_equal_cards_changes_nothing(
    first: Gpu, other: Gpu, count: int, model: str
) -> None:
    cards = [
        *(replace(first, device=f"CUDA{n}") for n in range(count + 1)),
        replace(other, device="CUDA9"),
    ]
    found = []
    for order in permutations(range(len(cards))):
        names = [cards[n].device == "CUDA9" for n in order]
        if names[-1]:  # the odd one stays last, the equal ones change places
            made = try_plan(model, machine(*(cards[n] for n in order)), PlanRequest())
            found.append(made)
    assert len(found) > 1
    assert all(made == found[0] for made in found)


fixed_values = st.fixed_dictionaries(
    {},
    optional={
        "context": st.sampled_from((1000, 4096, 20_000, 32_768, 65_536)),
        "kv_type": st.sampled_from(("f16", "q8_0", "q4_0", "f32")),
        "gpu_layers": st.integers(-1, 50),
        "threads": st.integers(1, 64),
        "ubatch": st.sampled_from((64, 512, 1024)),
        "batch": st.sampled_from((512, 2048, 4096)),
        "flash_attention": st.booleans(),
        "split_mode": st.sampled_from(("none", "layer")),
        "shares": st.lists(st.integers(0, 5), min_size=1, max_size=4),
        "experts": st.sets(st.integers(0, 35)),
        "quant": st.sampled_from((1, 3, 4)),
    },
)


@MANY
@given(st.sampled_from(MODELS), machines(), fixed_values)
def test_what_the_user_fixed_survives(model: str, where: Machine, fixed: dict[str, Any]) -> None:
    shares, experts, number = (fixed.pop(name, None) for name in ("shares", "experts", "quant"))
    request = PlanRequest(
        **fixed,
        tensor_split=None if shares is None else tuple(shares),
        cpu_expert_layers=None if experts is None else tuple(sorted(experts)),
        quant=None if number is None else QUANTS[model][number],
    )
    made = try_plan(model, where, request)
    assume(made is not None)
    assert made is not None
    check(made, where, replace(request, min_context=0 if "context" in fixed else 16_384))
    layers = some(model)[0].shape.layer_count
    if request.context is not None:
        assert made.context == -(-request.context // 256) * 256
    if request.gpu_layers is not None and where.gpus:
        wanted = request.gpu_layers if request.gpu_layers >= 0 else layers + 1
        assert made.placement.gpu_layers == min(wanted, layers + 1)
    if request.cpu_expert_layers is not None:
        assert made.placement.cpu_expert_layers == request.cpu_expert_layers
    if request.quant is not None:
        assert made.quant == request.quant
    if request.split_mode == "none":
        assert len(made.placement.used_cards) <= 1
    if shares is not None:
        unused = [n for n in range(len(where.gpus)) if n >= len(shares) or not shares[n]]
        assert not set(unused) & set(made.placement.used_cards)
    assert request.kv_type in (None, made.kv_type)
    assert request.threads in (None, made.threads)
    assert request.batch in (None, made.batch)
    assert request.ubatch is None or made.ubatch == min(request.ubatch, made.batch)
    assert request.flash_attention in (None, made.flash_attention)


@FEW
@given(machines(), st.sampled_from((20.0, 40.0)))
def test_a_sibling_is_proposed_only_where_the_wanted_model_cannot_keep_the_aims(
    where: Machine, min_speed: float
) -> None:
    options = Options(machine=where, request=PlanRequest(min_speed=min_speed))
    found = decide(options, some("mistral-small-4"), siblings())
    alone = decide(options, some("mistral-small-4"), ())
    model = "mistral-small-4"
    if isinstance(found, Decision) and found.option.candidate.model != model:
        assert isinstance(alone, Failure) or (
            alone.option.speed < min_speed or alone.option.quality.is_last_resort
        )
    elif isinstance(found, Decision):
        assert isinstance(alone, Decision) and alone.option == found.option


def test_ranks_of_the_samples_cover_the_classes() -> None:
    ranks = {judge_quant(c.quant, c.bits_per_weight).class_rank for m in MODELS for c in some(m)}
    assert len(ranks) >= 6
