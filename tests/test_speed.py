from __future__ import annotations

import dataclasses
import math

import pytest
from speed_samples import (
    MEDIUM_IQ4_XS,
    RTX_3080_20G,
    RTX_3090,
    RTX_4090,
    RTX_5090,
    RTX_PRO_6000,
    SMALL_4_IQ3_XXS,
    SMALL_4_Q4_K_M,
    card,
    dense_model,
    gpt_oss_120b,
    llama_7b,
    llama_8b,
    machine,
    make_shape,
    tensor,
)

from localmistral.fit import card_table
from localmistral.fit.calibration import Calibration
from localmistral.fit.machine import GIB, Cpu, Gpu, Machine
from localmistral.fit.placement import Placement
from localmistral.fit.plan import Load, Prediction
from localmistral.fit.rates import core_share, layer_seconds, peak_flops
from localmistral.fit.speed import decode_seconds, measure_costs, predict
from localmistral.fit.work import cache_bytes, seen_tokens, slides
from localmistral.models.shape import ModelShape

I9_14900K = machine(RTX_4090, bandwidth=96e9, cpu=Cpu(name="14900K", cores=24, features=("avx2",)))
RX_7900_XTX = dataclasses.replace(card("RX 7900 XTX", 24, 960e9, 122.8e12), backend="rocm")
ON_CPU = Placement(gpu_layers=0, tensor_split=())


def predicted(
    shape: ModelShape,
    on: Machine,
    *split: int,
    depth: int = 64,
    kv_type: str = "f16",
    mode: str = "layer",
    experts: tuple[int, ...] = (),
    ubatch: int = 512,
    calibration: Calibration | None = None,
) -> Prediction:
    """The prediction with so many layers per card."""
    placement = Placement(
        gpu_layers=sum(split), tensor_split=split, split_mode=mode, cpu_expert_layers=experts
    )
    load = Load(cells=65_536, kv_type=kv_type, ubatch=ubatch)
    return predict(
        shape, on, placement, load, depth=depth, calibration=calibration or Calibration()
    )


# What was measured elsewhere


DECODE_POINTS = {
    "RTX PRO 6000, Small 4 Q4_K_M, 4k": (
        186.0, 0.05, predicted(SMALL_4_Q4_K_M, machine(RTX_PRO_6000), 37, depth=4096),
    ),
    "2x RTX 3090, Small 4 UD-IQ3_XXS, q8_0, 8k": (
        92.9, 0.05,
        predicted(
            SMALL_4_IQ3_XXS, machine(RTX_3090, RTX_3090), 19, 18, depth=8192, kv_type="q8_0"
        ),
    ),
    "RTX 4090, 7B F16": (61.0, 0.06, predicted(llama_7b("f16"), machine(RTX_4090), 33)),
    "RTX 4090, 7B Q8_0": (98.1, 0.06, predicted(llama_7b("q8_0"), machine(RTX_4090), 33)),
    "RTX 3090, 8B Q4_0": (146.7, 0.05, predicted(llama_8b("q4_0"), machine(RTX_3090), 33)),
    "RX 7900 XTX by ROCm, 8B Q4_K": (
        105.8, 0.1, predicted(llama_8b("q4_K"), machine(RX_7900_XTX), 33),
    ),
    "4x RTX 3080 20GB, Medium IQ4_XS, layer": (
        10.4, 0.12,
        predicted(MEDIUM_IQ4_XS, machine(*(RTX_3080_20G,) * 4), 23, 22, 22, 22),
    ),
    "4x RTX 3080 20GB, Medium IQ4_XS, tensor": (
        21.6, 0.05,
        predicted(
            MEDIUM_IQ4_XS, machine(*(RTX_3080_20G,) * 4), 23, 22, 22, 22, mode="tensor"
        ),
    ),
    "gpt-oss-120b, experts on a 14900K": (
        25.0, 0.15, predicted(gpt_oss_120b(), I9_14900K, 37, experts=tuple(range(36))),
    ),
}  # fmt: skip


@pytest.mark.parametrize("point", DECODE_POINTS)
def test_a_published_decode_speed_is_met(point: str) -> None:
    measured, tolerance, prediction = DECODE_POINTS[point]
    assert prediction.decode_tokens_per_second == pytest.approx(measured, rel=tolerance)


PREFILL_POINTS = {
    "RTX PRO 6000, Small 4 Q4_K_M, 4k": (
        3752, 0.05, predicted(SMALL_4_Q4_K_M, machine(RTX_PRO_6000), 37, depth=4096),
    ),
    "2x RTX 3090, Small 4 UD-IQ3_XXS, 8k": (
        2151, 0.05,
        predicted(
            SMALL_4_IQ3_XXS, machine(RTX_3090, RTX_3090), 19, 18, depth=8192, kv_type="q8_0"
        ),
    ),
    "RTX 3090, 8B Q6_K": (
        3491, 0.08, predicted(llama_8b("q6_K"), machine(RTX_3090), 33, depth=1024),
    ),
    "RTX 3090, 8B Q4_0, 32k": (
        1448, 0.1, predicted(llama_8b("q4_0"), machine(RTX_3090), 33, depth=32_768),
    ),
    "RTX 3090, 8B Q5_1, ubatch 16": (
        1014, 0.1, predicted(llama_8b("q5_1"), machine(RTX_3090), 33, depth=1024, ubatch=16),
    ),
    "RX 7900 XTX by ROCm, 8B Q4_K, 4k": (
        2690, 0.1, predicted(llama_8b("q4_K"), machine(RX_7900_XTX), 33, depth=4096),
    ),
}  # fmt: skip


@pytest.mark.parametrize("point", PREFILL_POINTS)
def test_a_published_prefill_speed_is_met(point: str) -> None:
    measured, tolerance, prediction = PREFILL_POINTS[point]
    assert prediction.prefill_tokens_per_second == pytest.approx(measured, rel=tolerance)


def test_the_samples_are_as_large_as_the_files_that_were_measured() -> None:
    assert SMALL_4_Q4_K_M.weight_bytes / GIB == pytest.approx(67.3, rel=0.01)
    assert SMALL_4_IQ3_XXS.weight_bytes == pytest.approx(42_797_027_008, rel=0.01)
    assert llama_7b("f16").weight_bytes / GIB == pytest.approx(12.55, rel=0.01)
    assert llama_7b("q8_0").weight_bytes / GIB == pytest.approx(6.67, rel=0.01)


def test_the_fixed_cost_of_a_layer_lies_between_the_two_cards_it_is_known_of() -> None:
    assert layer_seconds(RTX_3090, has_experts=True) == pytest.approx(0.15e-3)
    assert layer_seconds(RTX_PRO_6000, has_experts=True) == pytest.approx(0.055e-3)
    between = layer_seconds(card("RTX 5080 Ti", 24, 1364e9, 150e12), has_experts=True)
    assert between == pytest.approx((0.15e-3 + 0.055e-3) / 2)
    slow, fast = card("RTX 3060", 12, 360e9, 25e12), card("H200", 141, 4800e9, 989e12)
    assert layer_seconds(slow, has_experts=True) == pytest.approx(0.15e-3)
    assert layer_seconds(fast, has_experts=True) == pytest.approx(0.055e-3)
    assert layer_seconds(RTX_3090, has_experts=False) < layer_seconds(RTX_3090, has_experts=True)


# The sum


TWO_CARDS = machine(RTX_3090, RTX_4090)
COSTS = measure_costs(SMALL_4_Q4_K_M, TWO_CARDS, kv_type="f16", depth=4096)


def test_decode_is_the_sum_of_its_costs() -> None:
    placement = Placement(gpu_layers=35, tensor_split=(20, 15), cpu_expert_layers=(5, 30))
    expected = COSTS.base + 2 * COSTS.hop + sum(COSTS.on_cpu[:2])
    expected += sum(COSTS.resident[0][n] for n in range(2, 22) if n != 5)
    expected += sum(COSTS.resident[1][n] for n in range(22, 36) if n != 30)
    expected += COSTS.experts_in_ram[0][5] + COSTS.experts_in_ram[1][30] + COSTS.output[1]
    assert decode_seconds(COSTS, placement) == pytest.approx(expected)
    on_cpu = COSTS.base + sum(COSTS.on_cpu) + COSTS.output_on_cpu
    assert decode_seconds(COSTS, Placement(gpu_layers=0, tensor_split=(0, 0))) == pytest.approx(
        on_cpu
    )
    output_alone = decode_seconds(COSTS, Placement(gpu_layers=1, tensor_split=(0, 1)))
    assert output_alone == pytest.approx(
        COSTS.base + COSTS.hop + sum(COSTS.on_cpu) + COSTS.output[1]
    )


def test_the_prediction_is_the_same_sum() -> None:
    prediction = predicted(SMALL_4_Q4_K_M, TWO_CARDS, 20, 17, depth=4096)
    placement = Placement(gpu_layers=37, tensor_split=(20, 17))
    assert prediction.decode_tokens_per_second == pytest.approx(
        1 / decode_seconds(COSTS, placement)
    )
    assert prediction.depth == 4096


def test_a_layer_costs_more_the_further_it_is_from_a_card() -> None:
    for layer in range(36):
        assert COSTS.resident[0][layer] < COSTS.experts_in_ram[0][layer] < COSTS.on_cpu[layer]
        assert COSTS.resident[1][layer] < COSTS.resident[0][layer]


def test_a_layer_without_experts_costs_the_same_wherever_experts_would_be() -> None:
    costs = measure_costs(llama_8b("q4_K"), TWO_CARDS, kv_type="f16", depth=100)
    assert costs.experts_in_ram == costs.resident


def test_experts_in_ram_take_the_bytes_a_token_uses_and_a_fixed_cost() -> None:
    """Per layer: the active share at 60 % of nominal bandwidth, and 0.2 ms."""
    cores = Cpu(name="many cores", cores=64, features=("avx512f",))
    shape = SMALL_4_Q4_K_M
    costs = measure_costs(
        shape, machine(RTX_3090, bandwidth=90e9, cpu=cores), kv_type="f16", depth=0
    )
    active_bytes = shape.expert_bytes[0] * 4 / 128
    gained = costs.experts_in_ram[0][0] - costs.resident[0][0]
    on_card = active_bytes / (0.85 * 936e9) + 0.15e-3 - 0.045e-3
    assert gained == pytest.approx(active_bytes / (0.6 * 90e9) + 0.2e-3 - on_card)


def test_few_cores_are_slower_than_the_memory_where_types_need_tables() -> None:
    few = Cpu(name="few cores", cores=4, features=("avx2",))
    many = dataclasses.replace(few, cores=32)

    def speed(kind: str, cpu: Cpu) -> float:
        on = machine(bandwidth=51e9, cpu=cpu)
        return predict(
            llama_8b(kind), on, ON_CPU, Load(cells=256), depth=0
        ).decode_tokens_per_second

    assert speed("q4_K", many) == pytest.approx(speed("q4_K", few), rel=0.05)
    assert speed("iq3_s", few) < speed("q4_K", few) < speed("iq3_s", many)
    old = dataclasses.replace(few, features=("sse4_2",))
    assert speed("q4_K", old) < 0.5 * speed("q4_K", few)
    assert core_share(dataclasses.replace(few, features=())) == core_share(few)


def test_faster_memory_makes_experts_in_ram_faster_and_nothing_else() -> None:
    slow = measure_costs(SMALL_4_Q4_K_M, machine(RTX_3090), kv_type="f16", depth=0)
    fast = measure_costs(SMALL_4_Q4_K_M, machine(RTX_3090, bandwidth=96e9), kv_type="f16", depth=0)
    assert fast.experts_in_ram[0][0] < slow.experts_in_ram[0][0]
    assert fast.resident == slow.resident


@pytest.mark.parametrize("on", [machine(RTX_3090), machine()], ids=["card", "cpu"])
def test_filled_context_slows_both_speeds(on: Machine) -> None:
    split = (33,) * len(on.gpus)
    speeds = [predicted(llama_8b("q4_K"), on, *split, depth=d) for d in (0, 4096, 32_768)]
    assert speeds[0].decode_tokens_per_second > speeds[1].decode_tokens_per_second
    assert speeds[1].decode_tokens_per_second > speeds[2].decode_tokens_per_second
    assert speeds[0].prefill_tokens_per_second > speeds[1].prefill_tokens_per_second
    assert speeds[1].prefill_tokens_per_second > speeds[2].prefill_tokens_per_second


def test_a_quantised_latent_cache_is_copied_at_every_step_on_cuda() -> None:
    """640 bytes a token and layer, written and read: slower than the f16 cache it saves."""
    depth, split = 131_072, (37,)
    plain = predicted(SMALL_4_Q4_K_M, machine(RTX_PRO_6000), *split, depth=depth)
    quantised = predicted(
        SMALL_4_Q4_K_M, machine(RTX_PRO_6000), *split, depth=depth, kv_type="q8_0"
    )
    assert quantised.decode_tokens_per_second < plain.decode_tokens_per_second
    vulkan = dataclasses.replace(RTX_PRO_6000, backend="vulkan")
    uncopied = predicted(SMALL_4_Q4_K_M, machine(vulkan), *split, depth=depth, kv_type="q8_0")
    assert uncopied.decode_tokens_per_second > plain.decode_tokens_per_second
    grouped = [
        predicted(llama_8b("q4_K"), machine(RTX_3090), 33, depth=depth, kv_type=kv)
        for kv in ("f16", "q8_0")
    ]
    assert grouped[1].decode_tokens_per_second > grouped[0].decode_tokens_per_second


def test_a_sliding_layer_reads_at_most_its_window() -> None:
    shape = gpt_oss_120b()
    assert [slides(shape, n) for n in range(4)] == [True, False, True, False]
    assert seen_tokens(shape, 0, 4096) == 128
    assert seen_tokens(shape, 1, 4096) == 4096
    short, long = cache_bytes(shape, "f16", 4096), cache_bytes(shape, "f16", 8192)
    assert (long[0], long[1]) == (short[0], 2 * short[1])
    listed = dataclasses.replace(
        shape, sliding_window_period=0, sliding_window_layers=(False, True) * 18
    )
    assert [slides(listed, n) for n in range(2)] == [False, True]
    unlisted = dataclasses.replace(shape, sliding_window_period=0)
    assert not slides(unlisted, 0)


def test_layers_that_do_not_run_cost_nothing() -> None:
    """The last layers of a model with multi-token prediction are in the file alone."""
    shape = dense_model(
        "q4_K", layers=8, width=1024, heads=8, kv_heads=2, inner=2048, vocabulary=1024
    )
    shape = dataclasses.replace(shape, nextn_layer_count=1)
    costs = measure_costs(shape, machine(RTX_3090), kv_type="f16", depth=1000)
    assert costs.resident[0][7] == costs.on_cpu[7] == costs.experts_in_ram[0][7] == 0
    assert costs.resident[0][6] > 0


def test_a_tied_embedding_is_read_as_the_output() -> None:
    tied = make_shape(
        "llama",
        [tensor("token_embd", "q8_0", 1024, 131_072), tensor("output_norm", "f32", 1024)],
        embedding_length=1024,
    )
    costs = measure_costs(tied, machine(RTX_3090), kv_type="f16", depth=0)
    assert costs.output[0] == pytest.approx(tied.weight_bytes / (0.85 * 936e9))
    assert costs.output_on_cpu > costs.output[0]


# Several cards


def test_equal_cards_may_change_places() -> None:
    on = machine(RTX_3090, RTX_3090)
    one = predicted(SMALL_4_IQ3_XXS, on, 18, 19, depth=4096)
    other = predicted(SMALL_4_IQ3_XXS, on, 19, 18, depth=4096)
    assert one.decode_tokens_per_second == pytest.approx(other.decode_tokens_per_second)


def test_a_second_card_costs_a_hop_in_decode_and_gains_in_prefill() -> None:
    on = machine(RTX_5090, RTX_5090)
    alone, both = (predicted(llama_8b("q8_0"), on, *split) for split in ((33, 0), (17, 16)))
    assert both.decode_tokens_per_second < alone.decode_tokens_per_second
    assert both.decode_tokens_per_second > 0.95 * alone.decode_tokens_per_second
    assert both.prefill_tokens_per_second > 1.6 * alone.prefill_tokens_per_second


def test_the_hop_over_a_network_is_dearer() -> None:
    far = dataclasses.replace(RTX_3090, backend="rpc")
    near = measure_costs(SMALL_4_Q4_K_M, machine(RTX_3090), kv_type="f16", depth=0)
    assert measure_costs(SMALL_4_Q4_K_M, machine(far), kv_type="f16", depth=0).hop > near.hop


def test_split_mode_tensor_waits_for_the_card_with_most_to_do() -> None:
    even = machine(RTX_3080_20G, RTX_3080_20G)
    halves, uneven = (
        predicted(llama_8b("f16"), even, *split, mode="tensor") for split in ((17, 16), (25, 8))
    )
    layered = predicted(llama_8b("f16"), even, 17, 16)
    assert halves.decode_tokens_per_second > uneven.decode_tokens_per_second
    assert halves.decode_tokens_per_second > layered.decode_tokens_per_second
    alone = predicted(llama_8b("f16"), even, 33, 0, mode="tensor")
    assert alone.decode_tokens_per_second == pytest.approx(
        predicted(llama_8b("f16"), even, 33, 0).decode_tokens_per_second
    )


def test_small_models_gain_nothing_from_split_mode_tensor() -> None:
    tiny = dense_model(
        "q4_K", layers=24, width=1024, heads=8, kv_heads=2, inner=2048, vocabulary=32_000
    )
    on = machine(RTX_3090, RTX_3090)
    tensor_mode = predicted(tiny, on, 13, 12, mode="tensor").decode_tokens_per_second
    assert tensor_mode < predicted(tiny, on, 13, 12).decode_tokens_per_second


# Prefill


def test_experts_in_ram_are_copied_over_the_link_for_every_ubatch() -> None:
    in_ram = tuple(range(36))
    slow_link = dataclasses.replace(RTX_PRO_6000, link=16e9)
    speeds = [
        predicted(SMALL_4_Q4_K_M, machine(gpu), 37, experts=in_ram, ubatch=ubatch)
        for gpu, ubatch in ((RTX_PRO_6000, 512), (slow_link, 512), (RTX_PRO_6000, 2048))
    ]
    fast, slow, large = (s.prefill_tokens_per_second for s in speeds)
    assert fast > 2 * slow
    assert large > 2 * fast
    expert_bytes = sum(SMALL_4_Q4_K_M.expert_bytes)
    assert slow < 512 / (expert_bytes / 16e9)


def test_backends_that_copy_nothing_leave_experts_in_ram_to_the_cpu() -> None:
    in_ram = tuple(range(36))
    far = dataclasses.replace(RTX_PRO_6000, backend="rpc")
    two, eight = (
        machine(far, cpu=Cpu(name="CPU", cores=cores, features=("avx2",))) for cores in (2, 8)
    )
    speeds = [
        predicted(SMALL_4_Q4_K_M, on, 37, experts=in_ram).prefill_tokens_per_second
        for on in (two, eight)
    ]
    assert speeds[1] > 2 * speeds[0]


def test_small_batches_are_left_to_the_cpu_and_do_not_depend_on_the_link() -> None:
    in_ram = tuple(range(36))
    slow_link = dataclasses.replace(RTX_PRO_6000, link=1e9)
    speeds = {
        predicted(SMALL_4_Q4_K_M, machine(gpu), 37, experts=in_ram, ubatch=16)
        for gpu in (RTX_PRO_6000, slow_link)
    }
    assert len(speeds) == 1


def test_more_cores_read_prompts_faster_on_the_cpu() -> None:
    speeds = [
        predicted(llama_8b("q4_K"), machine(cpu=Cpu(name="CPU", cores=n, features=("avx2",))))
        for n in (4, 16)
    ]
    assert speeds[1].prefill_tokens_per_second == pytest.approx(
        4 * speeds[0].prefill_tokens_per_second, rel=0.01
    )


def test_no_card_is_credited_with_more_than_any_was_seen_to_reach() -> None:
    h200 = card("H200", 141, 4800e9, 989e12)
    speed = predicted(llama_8b("q4_K"), machine(h200), 33).prefill_tokens_per_second
    flops = 2 * sum(math.prod(t.dims) for t in llama_8b("q4_K").tensors if t.layer is not None)
    assert speed * flops < 200e12


def test_workstation_cards_are_told_from_those_for_games() -> None:
    """The same chip: an RTX A6000's figure is twice an RTX 3090's, and its speed is not."""

    def peak(name: str, flops: float) -> float:
        return peak_flops(Gpu(name=name, total_bytes=1, free_bytes=1, bandwidth=1, flops=flops))

    full = ("NVIDIA RTX A6000", "RTX PRO 6000", "RTX 6000 Ada", "NVIDIA A100-SXM4-80GB", "H100 NVL",
            "Quadro RTX 8000", "Tesla T4", "TITAN RTX", "L40S", "GB10")  # fmt: skip
    games = ("NVIDIA GeForce RTX 3090", "RTX 4060 Ti", "RTX 5090 Laptop", "GTX 1080 Ti",
             "RTX 2080 Super", "24 GiB card", "TITAN Xp")  # fmt: skip
    assert {peak(name, 100.0) for name in full} == {50.0}
    assert {peak(name, 100.0) for name in games} == {100.0}


def test_every_card_of_the_table_gets_sensible_speeds() -> None:
    rows = [
        (backend, line.split("|"))
        for backend, table in (
            ("cuda", card_table.NVIDIA), ("rocm", card_table.AMD),
            ("vulkan", card_table.INTEL), ("metal", card_table.APPLE),
        )
        for line in table.strip().splitlines()
    ]  # fmt: skip
    for backend, (name, _, bandwidth, teraflops, _) in rows:
        gpu = card(name.strip(), 999, float(bandwidth) * 1e9, float(teraflops) * 1e12)
        on = machine(dataclasses.replace(gpu, backend=backend))
        speed = predicted(llama_8b("q4_K"), on, 33)
        bound = gpu.bandwidth / llama_8b("q4_K").weight_bytes
        assert 0.1 * bound < speed.decode_tokens_per_second < 1.1 * bound
        assert speed.prefill_tokens_per_second < gpu.flops / 7e9


# Calibration


def test_a_calibration_stretches_what_it_names_and_nothing_else() -> None:
    placement = Placement(gpu_layers=37, tensor_split=(37,), cpu_expert_layers=(0, 1))
    on = machine(RTX_3090)

    def seconds(calibration: Calibration) -> float:
        costs = measure_costs(SMALL_4_Q4_K_M, on, kv_type="f16", depth=0, calibration=calibration)
        return decode_seconds(costs, placement)

    plain = seconds(Calibration())
    card_part = seconds(Calibration(card_decode=2.0)) - plain
    ram_part = seconds(Calibration(ram_decode=2.0)) - plain
    base = measure_costs(SMALL_4_Q4_K_M, on, kv_type="f16", depth=0).base
    assert plain == pytest.approx(base + card_part + ram_part)
    assert card_part > 0 and ram_part > 0
    assert seconds(Calibration(card_prefill=3.0, ram_prefill=3.0)) == plain


def test_a_calibration_of_prefill_stretches_prefill_alone() -> None:
    plain = predicted(llama_8b("q4_K"), machine())
    slower = predicted(llama_8b("q4_K"), machine(), calibration=Calibration(ram_prefill=2.0))
    assert slower.prefill_tokens_per_second == pytest.approx(plain.prefill_tokens_per_second / 2)
    assert slower.decode_tokens_per_second == plain.decode_tokens_per_second
