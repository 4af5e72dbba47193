"""What is chosen on named machines and why, what a fixed value does, and what an error says."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache

import pytest
from plan_samples import candidates, card, machine, siblings

from localmistral.errors import LocalMistralError, PlanError, UsageError
from localmistral.fit.machine import GIB, Machine
from localmistral.fit.plan import Plan, PlanRequest
from localmistral.fit.planner import plan
from localmistral.fit.quality import (
    EIGHT_BIT_RANK,
    FIVE_BIT_RANK,
    FOUR_BIT_RANK,
    SIX_BIT_RANK,
    THREE_BIT_RANK,
    judge_quant,
)

SMALL = "mistral-small-4"
MEDIUM = "mistral-medium-3.5"
SMALL_3 = "mistral-small-3.2"
NEARLY_FOUR = FOUR_BIT_RANK - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A machine and what must come out on it. None is not asserted; `in_ram` says whether experts
    or layers are in RAM."""

    where: Machine
    why: str
    wanted: str = SMALL
    request: PlanRequest = field(default_factory=PlanRequest)
    model: str | None = None
    rank: int | None = None
    context: int | None = 32_768
    kv_type: str | None = "f16"
    in_ram: bool | None = None
    left_out: tuple[int, ...] | None = ()
    split_mode: str | None = None
    least_speed: float = 20.0
    ubatch: int | None = None


DDR5 = 90e9
CASES = {
    "2x 3090, 64 GiB": Case(
        where=machine(card("3090"), card("3090")),
        rank=FOUR_BIT_RANK,
        in_ram=True,
        split_mode="layer",
        why="4 bits at 28 tokens/s come before 3 bits wholly on the cards at 100",
    ),
    "2x 3090, 32 GiB": Case(
        where=machine(card("3090"), card("3090"), ram=32),
        rank=FOUR_BIT_RANK,
        in_ram=True,
        why="the third of the experts that is in RAM fits into 32 GiB as well",
    ),
    "2x 3090, 16 GiB": Case(
        where=machine(card("3090"), card("3090"), ram=16),
        rank=NEARLY_FOUR,
        in_ram=True,
        why="RAM holds a few experts only",
    ),
    "2x 4090, 192 GiB DDR5": Case(
        where=machine(card("4090"), card("4090"), ram=192, bandwidth=DDR5),
        rank=FOUR_BIT_RANK,
        in_ram=True,
        why="more RAM doesn't make a larger quant worth its time: it would not be on the cards",
    ),
    "2x 5090, 64 GiB DDR5": Case(
        where=machine(card("5090"), card("5090"), bandwidth=DDR5),
        rank=FOUR_BIT_RANK,
        in_ram=True,
        least_speed=80,
        why="all but a few layers' experts are on the cards",
    ),
    "4x 3090, 128 GiB": Case(
        where=machine(*[card("3090")] * 4, ram=128),
        rank=FIVE_BIT_RANK,
        in_ram=False,
        split_mode="layer",
        why="the largest class that lies wholly on the cards",
    ),
    "4x 16 GiB": Case(
        where=machine(*[card("4060 Ti")] * 4),
        rank=FOUR_BIT_RANK,
        in_ram=True,
        why="nearly all of 4 bits is on the cards",
    ),
    "4x 12 GiB": Case(
        where=machine(*[card("3060")] * 4),
        rank=FOUR_BIT_RANK,
        in_ram=True,
        why="four slow cards just reach the aim with 4 bits",
    ),
    "24 + 12 GiB": Case(
        where=machine(card("3090"), card("3060")),
        rank=NEARLY_FOUR,
        in_ram=True,
        why="4 bits stay just below 20 tokens/s, experts are balanced over uneven cards",
    ),
    "24 + 8 GiB": Case(
        where=machine(card("3090"), card("8G")),
        rank=NEARLY_FOUR,
        in_ram=True,
        why="the small card takes a few layers whole",
    ),
    "8 + 24 GiB": Case(
        where=machine(card("8G"), card("3090")),
        rank=NEARLY_FOUR,
        in_ram=True,
        why="the same cards in the other order: the image encoder is on the small one",
    ),
    "2x 3090, one with a desktop": Case(
        where=machine(card("3090", busy_gib=3.5), card("3090")),
        rank=FOUR_BIT_RANK,
        in_ram=True,
        why="what a desktop takes is missing on that card only",
    ),
    "24 GiB and a 2 GiB card": Case(
        where=machine(card("3090"), card("2G")),
        rank=NEARLY_FOUR,
        in_ram=True,
        left_out=(1,),
        split_mode="none",
        why="2 GiB don't hold a layer and its buffers that would be worth the hop",
    ),
    "one 24 GiB card, DDR5": Case(
        where=machine(card("4090"), bandwidth=DDR5),
        rank=FOUR_BIT_RANK,
        in_ram=True,
        split_mode="none",
        why="most experts are in fast RAM, attention on the card",
    ),
    "one 32 GiB card, DDR5": Case(
        where=machine(card("5090"), bandwidth=DDR5),
        rank=FOUR_BIT_RANK,
        in_ram=True,
        least_speed=28,
        why="as with 24 GiB, faster",
    ),
    "one 96 GiB card": Case(
        where=machine(card("RTX PRO 6000"), ram=128, bandwidth=DDR5),
        rank=SIX_BIT_RANK,
        in_ram=False,
        least_speed=150,
        why="6 bits lie wholly on the card, 8 don't",
    ),
    "8x 3090": Case(
        where=machine(*[card("3090")] * 8, ram=256),
        rank=EIGHT_BIT_RANK,
        in_ram=False,
        left_out=(6, 7),
        why="six cards hold the largest quant, two more would only cost hops",
    ),
    "8 GiB card, 64 GiB DDR4": Case(
        where=machine(card("8G")),
        model="ministral-3-8b",
        kv_type="q8_0",
        in_ram=True,
        why="Small 4 fits but is too slow; a 14B fits only in a broken quant",
    ),
    "8 GiB card, 16 GiB": Case(
        where=machine(card("8G"), ram=16),
        model="ministral-3-8b",
        kv_type="q8_0",
        in_ram=True,
        why="Small 4 fits in no quant",
    ),
    "no card, 16 GiB": Case(
        where=machine(ram=16),
        model="ministral-3-3b",
        in_ram=True,
        least_speed=8,
        why="nothing keeps the aim: the fastest sibling that fits",
    ),
    "no card, 32 GiB": Case(
        where=machine(ram=32, cores=16),
        model="ministral-3-3b",
        in_ram=True,
        least_speed=8,
        why="the same with more RAM",
    ),
    "no card, 64 GiB DDR4": Case(
        where=machine(ram=64),
        model=SMALL,
        rank=THREE_BIT_RANK,
        in_ram=True,
        least_speed=5,
        why="no model keeps the aim, so the wanted one is planned as fast as it gets unbroken",
    ),
    "no card, 128 GiB DDR5": Case(
        where=machine(ram=128, bandwidth=96e9, cores=16),
        model="ministral-3-3b",
        in_ram=True,
        why="only the smallest sibling keeps 20 tokens/s from RAM",
    ),
    "no card, 128 GiB DDR5, 8 tokens/s are enough": Case(
        where=machine(ram=128, bandwidth=96e9, cores=16),
        request=PlanRequest(min_speed=8, has_min_speed=True),
        model=SMALL,
        rank=FOUR_BIT_RANK,
        in_ram=True,
        least_speed=8,
        why="with a lower aim the wanted model comes at 4 bits",
    ),
    "24B on 24 GiB": Case(
        where=machine(card("3090"), ram=32),
        wanted=SMALL_3,
        rank=SIX_BIT_RANK,
        kv_type="q8_0",
        in_ram=False,
        why="the smaller cache makes room for 6 bits with the full context",
    ),
    "8B on 8 GiB": Case(
        where=machine(card("8G"), ram=32),
        wanted="ministral-3-8b",
        rank=FOUR_BIT_RANK,
        kv_type="q8_0",
        in_ram=True,
        why="4 bits with the full context keep the aim with a few layers in RAM",
    ),
    "8B on 24 GiB": Case(
        where=machine(card("3090"), ram=32),
        wanted="ministral-3-8b",
        rank=EIGHT_BIT_RANK,
        in_ram=False,
        least_speed=50,
        why="8 bits, not 16: those would be no better and half as fast",
    ),
    "Medium 3.5, dense, on 4x 20 GiB with peer access": Case(
        where=machine(*[card("3080 20G")] * 4, peer=True),
        wanted=MEDIUM,
        in_ram=False,
        split_mode="tensor",
        context=None,
        kv_type=None,
        why="equal cards that reach each other's memory share every layer",
    ),
    "Medium 3.5, dense, on 4x 20 GiB without peer access": Case(
        where=machine(*[card("3080 20G")] * 4),
        wanted=MEDIUM,
        in_ram=False,
        split_mode="layer",
        context=None,
        kv_type=None,
        least_speed=7,
        why="without peer access sharing layers would copy through RAM",
    ),
    "speed on 2x 3090": Case(
        where=machine(card("3090"), card("3090")),
        request=PlanRequest(prefer="speed"),
        rank=THREE_BIT_RANK,
        in_ram=False,
        least_speed=80,
        why="IQ3_S is the smallest sound quant, and wholly on the cards",
    ),
    "quality on 2x 5090, 192 GiB": Case(
        where=machine(card("5090"), card("5090"), ram=192, bandwidth=DDR5),
        request=PlanRequest(prefer="quality"),
        rank=EIGHT_BIT_RANK,
        in_ram=True,
        why="the largest quant that still writes 20 tokens/s",
    ),
    "context on 2x 3090": Case(
        where=machine(card("3090"), card("3090")),
        request=PlanRequest(prefer="context"),
        rank=FOUR_BIT_RANK,
        context=262_144,
        kv_type=None,
        in_ram=True,
        why="all that the model is meant for, at 4 bits",
    ),
    "four streams": Case(
        where=machine(card("3090"), card("3090")),
        request=PlanRequest(parallel=4),
        rank=FOUR_BIT_RANK,
        kv_type=None,
        in_ram=True,
        why="each stream has its whole context",
    ),
}


@cache
def plan_named(name: str) -> Plan:
    case = CASES[name]
    fallbacks = siblings() if case.wanted == SMALL else ()
    return plan(candidates(case.wanted), case.where, case.request, siblings=fallbacks)


@pytest.mark.parametrize("name", CASES)
def test_the_choice_on_a_named_machine(name: str) -> None:
    case = CASES[name]
    made = plan_named(name)
    assert made.model == (case.model or case.wanted), case.why
    chosen = next(
        one
        for group in (candidates(case.wanted), *siblings())
        for one in group
        if (one.model, one.quant) == (made.model, made.quant)
    )
    rank = judge_quant(made.quant, chosen.bits_per_weight).class_rank
    assert case.rank in (None, rank), case.why
    assert case.context in (None, made.context), case.why
    assert case.kv_type in (None, made.kv_type), case.why
    whole = made.placement.is_whole(chosen.shape.layer_count)
    assert case.in_ram in (None, not whole), case.why
    unused = set(range(len(case.where.gpus))) - set(made.placement.used_cards)
    assert case.left_out is None or unused == set(case.left_out), case.why
    assert case.split_mode in (None, made.placement.split_mode), case.why
    assert made.predicted.decode_tokens_per_second >= case.least_speed, case.why
    assert not any(device.excess_bytes for device in made.devices)


def test_the_experts_in_ram_leave_every_card_nearly_full() -> None:
    made = plan_named("24 + 12 GiB")
    for device in made.devices[:-1]:
        assert device.budget_bytes - device.used_bytes < 1.5 * GIB


def test_a_plan_has_its_reasons_in_whole_sentences_with_figures() -> None:
    made = plan_named("24 GiB and a 2 GiB card")
    text = "\n".join(made.reasons)
    for wanted in ("perplexity", "32,768", "720.0 MiB", "left out", "experts of", "tokens/s"):
        assert wanted in text
    assert all(re.fullmatch(r"[A-Z0-9].*[^.]\.", reason) for reason in made.reasons)


def test_a_sibling_is_named_with_the_reason() -> None:
    slow = plan_named("8 GiB card, 64 GiB DDR4")
    assert re.search(r"instead of mistral-small-4, which would fit but write only", slow.reasons[0])
    small = plan_named("8 GiB card, 16 GiB")
    assert re.search(r"4: its smallest quant above 2 bits, UD-IQ3_XXS, has", small.reasons[0])


def test_a_model_below_the_aim_says_so_with_both_figures() -> None:
    made = plan_named("no card, 64 GiB DDR4")
    assert re.match(r"\d\.\d tokens/s is below the aim of 20", made.reasons[0])


def test_a_file_at_hand_is_planned_whatever_its_speed() -> None:
    only = [replace(candidates(SMALL, "UD-IQ3_S")[0], is_local=True)]
    made = plan(only, machine(ram=64), PlanRequest(), siblings=siblings())
    assert made.model == SMALL and made.is_local
    assert "below the aim" in made.reasons[0]


def test_alternatives_give_exactly_what_typing_them_gives() -> None:
    where = machine(card("3090"), card("3090"))
    made = plan(candidates(SMALL), where, PlanRequest(), siblings=siblings())
    assert 3 <= len(made.alternatives) <= 8
    typed: dict[str, Callable[[PlanRequest, str], PlanRequest]] = {
        "--quant": lambda request, value: replace(request, quant=value),
        "--prefer": lambda request, value: replace(request, prefer=value),
        "--kv-type": lambda request, value: replace(request, kv_type=value),
        "--context": lambda request, value: replace(
            request, context=int(value.removesuffix("k")) * 1024
        ),
        "--no-vision": lambda request, _: replace(request, vision=False),
    }
    for other in made.alternatives:
        words = other.change.split()
        if not words[0].startswith("--"):
            continue
        request = PlanRequest()
        for number, word in enumerate(words):
            if word in typed:
                request = typed[word](request, words[number + 1] if number + 1 < len(words) else "")
        found = plan(candidates(SMALL), where, request, siblings=siblings())
        assert (found.quant, found.context, found.kv_type) == (
            other.quant,
            other.context,
            other.kv_type,
        ), other.change
        assert found.predicted.decode_tokens_per_second == other.decode_tokens_per_second
        assert found.predicted.prefill_tokens_per_second == other.prefill_tokens_per_second
        assert sum(file.bytes for file in found.files) == other.download_bytes
        assert found.devices[-1].used_bytes == other.ram_bytes


def test_larger_batches_are_read_where_experts_are_in_ram() -> None:
    in_ram = plan_named("one 24 GiB card, DDR5")
    assert in_ram.ubatch > 512 and in_ram.batch >= in_ram.ubatch
    assert any("at a time" in reason for reason in in_ram.reasons)
    assert plan_named("one 96 GiB card").ubatch == 512


def test_threads_are_the_cores_where_the_cpu_computes_and_few_where_it_does_not() -> None:
    assert plan_named("one 24 GiB card, DDR5").threads == 8
    assert plan_named("one 96 GiB card").threads == 4
    assert plan_named("no card, 32 GiB").threads == 16


def test_weights_are_repacked_only_without_cards_and_with_room_for_a_copy() -> None:
    assert plan_named("no card, 16 GiB").repack
    assert not plan_named("no card, 64 GiB DDR4").repack
    assert not plan_named("2x 3090, 64 GiB").repack


TWO = machine(card("3090"), card("3090"))


def fixed(**values: object) -> Plan:
    return plan(candidates(SMALL), TWO, PlanRequest(**values), siblings=siblings())  # type: ignore[arg-type]


def test_the_context_is_rounded_up_to_whole_blocks() -> None:
    assert fixed(context=5000).context == 5120
    assert any("rounded from 5,000" in reason for reason in fixed(context=5000).reasons)


def test_the_context_never_passes_the_model_s_limit() -> None:
    assert fixed(context=262_144).context == 262_144
    with pytest.raises(LocalMistralError, match=r"262,145 tokens.*at most 262,144"):
        fixed(context=262_145)
    with pytest.raises(LocalMistralError, match="--min-context asks for"):
        fixed(min_context=300_000, has_min_context=True)


def test_a_short_model_has_its_own_limit_for_an_aim() -> None:
    short = [replace(one, context_limit=8192) for one in candidates("ministral-3-8b")]
    made = plan(short, TWO, PlanRequest())
    assert made.context == 8192
    assert any("all that the model is meant for" in reason for reason in made.reasons)


@pytest.mark.parametrize("depth", [0, 100_000, 300_000])
def test_the_depth_of_the_prediction_changes_no_context(depth: int) -> None:
    made = fixed(depth=depth)
    assert made.context == fixed().context == 32_768
    assert made.predicted.depth == min(depth, 32_768)
    said = f"(all there are; {depth:,} were asked for)" in " ".join(made.reasons)
    assert said == (depth > made.context)


def test_layers_and_shares_are_cut_as_llama_cpp_cuts_them() -> None:
    where = machine(card("3090"), card("3090"))
    model = candidates("ministral-3-8b")
    for layers in (-1, 35, 99):
        made = plan(model, where, PlanRequest(gpu_layers=layers))
        assert made.placement.gpu_layers == 35
    made = plan(model, where, PlanRequest(tensor_split=(1.0,)))
    assert made.placement.tensor_split == (35, 0)
    made = plan(model, where, PlanRequest(tensor_split=(20.0, 15.0)))
    assert made.placement.tensor_split == (20, 15)
    made = plan(model, where, PlanRequest(batch=256, ubatch=512))
    assert (made.batch, made.ubatch) == (256, 256)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tensor_split": (1.0, 1.0, 1.0)}, "3 shares, there are 2 cards"),
        ({"cpu_expert_layers": (3, 36)}, "layer 36, the model has layers 0 to 35"),
        ({"split_mode": "tensor"}, "for dense models"),
        ({"quant": "Q7_K"}, "no quant 'Q7_K'"),
    ],
)
def test_what_makes_no_sense_for_the_model_or_machine_is_refused(
    values: dict[str, object], message: str
) -> None:
    with pytest.raises(LocalMistralError, match=message) as caught:
        fixed(**values)
    assert caught.value.hint


@pytest.mark.parametrize(
    "values",
    [
        {"tensor_split": (0.0, 0.0)},
        {"tensor_split": (-1.0, 2.0)},
        {"tensor_split": (float("nan"), 2.0)},
        {"kv_type": "q9_9"},
        {"prefer": "beauty"},
        {"split_mode": "row"},
        {"context": 0},
        {"parallel": 0},
        {"ubatch": -1},
        {"min_speed": float("nan")},
        {"kv_type": "q8_0", "flash_attention": False},
        {"split_mode": "none", "tensor_split": (1.0, 1.0)},
    ],
)
def test_what_makes_no_sense_at_all_is_a_usage_error(values: dict[str, object]) -> None:
    with pytest.raises(UsageError) as caught:
        fixed(**values)
    assert caught.value.message.endswith(".")


def test_cards_that_are_not_there_are_said() -> None:
    with pytest.raises(LocalMistralError, match="--gpu-layers 20 needs a card"):
        plan(candidates(SMALL_3), machine(ram=64), PlanRequest(gpu_layers=20))
    made = plan(candidates(SMALL_3), machine(ram=64), PlanRequest(gpu_layers=-1))
    assert made.placement.gpu_layers == 0
    with pytest.raises(LocalMistralError, match=r"1 shares?, there are 0 cards"):
        plan(candidates(SMALL_3), machine(ram=64), PlanRequest(tensor_split=(1.0,)))


def test_experts_in_ram_are_for_mixtures_of_experts() -> None:
    with pytest.raises(LocalMistralError, match="mixtures of experts"):
        plan(candidates(SMALL_3), TWO, PlanRequest(cpu_expert_layers=(1,)))
    made = plan(candidates(SMALL_3), TWO, PlanRequest(cpu_expert_layers=()))
    assert made.placement.cpu_expert_layers == ()


def test_a_quantised_cache_is_not_chosen_without_flash_attention() -> None:
    made = plan(
        candidates("ministral-3-8b"), machine(card("8G")), PlanRequest(flash_attention=False)
    )
    assert made.kv_type == "f16" and not made.flash_attention


@pytest.mark.parametrize(
    ("where", "wanted", "values", "device", "change"),
    [
        (
            machine(card("3090")),
            SMALL_3,
            {"quant": "Q8_0", "gpu_layers": 41},
            "GPU 0",
            "gpu-layers",
        ),
        (
            machine(card("3090")),
            SMALL_3,
            {"quant": "Q4_K_M", "context": 131_072, "gpu_layers": 41},
            "GPU 0",
            "context",
        ),
        (
            machine(card("3090"), card("3060")),
            SMALL,
            {"tensor_split": (1.0, 1.0), "cpu_expert_layers": (), "gpu_layers": 37},
            "GPU 1",
            "gpu-layers|tensor-split|cpu-experts",
        ),
        (machine(card("3090"), ram=32), SMALL, {"quant": "Q8_0"}, "CPU", "quant"),
        (
            machine(ram=16),
            "ministral-3-14b",
            {"kv_type": "f32", "context": 65_536},
            "CPU",
            "context",
        ),
        (machine(ram=8), "ministral-3-3b", {"context": 65_536, "kv_type": "f16"}, "CPU", "context"),
    ],
)
def test_an_explicit_request_that_cannot_fit_says_by_how_much_where_and_what_helps(
    where: Machine, wanted: str, values: dict[str, object], device: str, change: str
) -> None:
    request = PlanRequest(**values)  # type: ignore[arg-type]
    with pytest.raises(PlanError) as caught:
        plan(candidates(wanted), where, request, siblings=siblings())
    message, hint = caught.value.message, caught.value.hint
    too_little = r"too little by [\d.]+ [MG]iB \([\d,]+ bytes\)"
    assert re.search(rf"{device}.* needs [\d.]+ GiB and may use [\d.]+ GiB, {too_little}", message)
    ((option, value),) = caught.value.change
    assert re.fullmatch(rf"--({change})", option)
    assert value and hint == f"It fits with {option} {value}"
    plan(candidates(wanted), where, retype(request, option.removeprefix("--"), value))


def retype(request: PlanRequest, option: str, value: str) -> PlanRequest:
    """The request with one option typed again."""
    if option == "context":
        return replace(request, context=int(value.removesuffix("k")) * 1024)
    if option == "gpu-layers":
        return replace(request, gpu_layers=int(value))
    if option == "tensor-split":
        return replace(request, tensor_split=tuple(float(n) for n in value.split(",")))
    if option == "quant":
        return replace(request, quant=value)
    layers = [range(int(a), int(b or a) + 1) for a, b in re.findall(r"(\d+)-?(\d*)", value)]
    return replace(request, cpu_expert_layers=tuple(n for run in layers for n in run))


def test_a_least_speed_that_nothing_reaches_is_refused_with_the_best_there_is() -> None:
    with pytest.raises(LocalMistralError, match=r"can't reach 500 tokens/s") as caught:
        fixed(min_speed=500.0, has_min_speed=True)
    reached = float(caught.value.hint.split()[-1])
    assert fixed(min_speed=reached, has_min_speed=True).reasons
    with pytest.raises(LocalMistralError):
        fixed(min_speed=reached + 0.2, has_min_speed=True)


def test_a_fixed_context_that_any_model_could_have_may_lead_to_a_sibling() -> None:
    where = machine(card("8G"), ram=16)
    made = plan(candidates(SMALL), where, PlanRequest(context=16_384), siblings=siblings())
    assert made.model == "ministral-3-8b" and made.context == 16_384
    with pytest.raises(LocalMistralError):
        plan(candidates(SMALL), where, PlanRequest(quant="UD-IQ1_M"), siblings=siblings())


def test_a_fixed_context_that_is_at_fault_keeps_the_model() -> None:
    made = plan(
        candidates(SMALL),
        machine(card("4090"), bandwidth=DDR5),
        PlanRequest(context=262_144, kv_type="f32", min_speed=30),
        siblings=siblings(),
    )
    assert made.model == SMALL
    assert made.predicted.decode_tokens_per_second < 30


def test_quants_are_named_as_loosely_as_elsewhere() -> None:
    assert fixed(quant="iq3-s").quant == "UD-IQ3_S"


def test_the_encoder_is_part_of_the_files_only_with_vision() -> None:
    assert [file.path for file in fixed().files][-1] == "mmproj-F16.gguf"
    made = fixed(vision=False)
    assert all("mmproj" not in file.path for file in made.files)
    assert all(device.mmproj_bytes == 0 for device in made.devices)


@pytest.mark.slow
def test_twenty_five_quants_are_planned_in_a_moment() -> None:
    import time

    many = [
        replace(one, quant=f"{one.quant}{suffix}", shape=replace(one.shape, name=suffix))
        for suffix in ("", "_B")
        for one in candidates(SMALL)
    ]
    plan(many[:1], TWO, PlanRequest())  # what is computed once and kept
    started = time.process_time()
    plan(many, TWO, PlanRequest(), siblings=siblings())
    assert time.process_time() - started < 10  # some 1 s; a search per quant and step takes 60
