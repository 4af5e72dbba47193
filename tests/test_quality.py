from __future__ import annotations

import pytest

from localmistral.fit.quality import (
    EIGHT_BIT_RANK,
    FIVE_BIT_RANK,
    FOUR_BIT_RANK,
    FULL_RANK,
    NEARLY_FOUR_BIT_RANK,
    ONE_BIT_RANK,
    SIX_BIT_RANK,
    SMALL_THREE_BIT_RANK,
    THREE_BIT_RANK,
    TWO_BIT_RANK,
    estimate_loss,
    judge_quant,
)

SMALL_4_PARAMETERS = 118_972_826_624


@pytest.mark.parametrize(
    ("name", "size", "rank"),
    [
        ("UD-IQ1_M", 32_306_941_632, ONE_BIT_RANK),
        ("UD-IQ2_M", 38_000_000_000, TWO_BIT_RANK),
        ("UD-Q2_K_XL", 41_000_000_000, TWO_BIT_RANK),
        ("UD-IQ3_XXS", 42_797_027_008, SMALL_THREE_BIT_RANK),
        ("UD-IQ3_S", 44_407_639_744, THREE_BIT_RANK),
        ("UD-Q3_K_M", 54_400_000_000, THREE_BIT_RANK),
        ("UD-IQ4_XS", 58_100_000_000, NEARLY_FOUR_BIT_RANK),
        ("MXFP4_MOE", 71_800_000_000, FOUR_BIT_RANK),
        ("UD-Q4_K_M", 73_800_000_000, FOUR_BIT_RANK),
        ("UD-Q4_K_XL", 74_161_639_424, FOUR_BIT_RANK),
        ("Q4_K_M", 72_640_000_000, FOUR_BIT_RANK),
        ("UD-Q5_K_XL", 85_000_000_000, FIVE_BIT_RANK),
        ("UD-Q6_K", 99_000_000_000, SIX_BIT_RANK),
        ("Q8_0", 126_500_000_000, EIGHT_BIT_RANK),
        ("BF16", 237_945_653_248, FULL_RANK),
    ],
)
def test_the_quants_of_small_4_are_in_their_classes(name: str, size: int, rank: int) -> None:
    quality = judge_quant(name, 8 * size / SMALL_4_PARAMETERS)
    assert quality.class_rank == rank
    assert quality.is_broken == (rank < THREE_BIT_RANK)
    assert (quality.expected_loss < 0.02) == (rank >= FOUR_BIT_RANK)


def test_iq3_s_holds_where_iq3_xxs_breaks_though_both_are_below_the_line() -> None:
    small, large = judge_quant("UD-IQ3_XXS", 2.88), judge_quant("UD-IQ3_S", 2.99)
    assert small.is_broken and not large.is_broken
    assert small.class_rank < large.class_rank < FOUR_BIT_RANK


@pytest.mark.parametrize(
    ("name", "bits", "rank"),
    [
        ("Q4_1", 5.74, FOUR_BIT_RANK),  # SmolLM2-135M: a third of it is the embedding
        ("Q4_K_M", 5.01, FOUR_BIT_RANK),
        ("Q3_K_S", 4.6, THREE_BIT_RANK),
        ("q4_k_m", 4.9, FOUR_BIT_RANK),
        ("IQ4_NL", 4.6, FOUR_BIT_RANK),
        ("Q2_K", 3.4, TWO_BIT_RANK),
        ("F16", 16.0, FULL_RANK),
        ("bf16", 16.0, FULL_RANK),
        ("F32", 32.0, FULL_RANK),
        ("TQ1_0", 1.7, ONE_BIT_RANK),
    ],
)
def test_the_name_decides_where_the_bits_of_the_file_mislead(
    name: str, bits: float, rank: int
) -> None:
    assert judge_quant(name, bits).class_rank == rank


@pytest.mark.parametrize(
    ("name", "bits", "rank"),
    [
        ("unnamed", 4.85, FOUR_BIT_RANK),
        ("", 2.9, SMALL_THREE_BIT_RANK),
        ("NVFP4", 4.6, FOUR_BIT_RANK),
        ("MXFP4_MOE", 4.25, NEARLY_FOUR_BIT_RANK),
        ("Q4_K_M", 2.6, TWO_BIT_RANK),  # whatever it is called
        ("Q8_0", 4.6, FOUR_BIT_RANK),
    ],
)
def test_the_bits_decide_where_the_name_says_nothing_or_cannot_be_true(
    name: str, bits: float, rank: int
) -> None:
    assert judge_quant(name, bits).class_rank == rank


def test_a_name_alone_is_enough() -> None:
    assert judge_quant("Q4_K_M", 0.0).class_rank == FOUR_BIT_RANK
    assert judge_quant("UD-IQ2_XXS", 0.0).is_broken


def test_expected_loss_meets_the_published_perplexities() -> None:
    assert estimate_loss(4.3) == pytest.approx(5.4242 / 5.3035 - 1)
    assert estimate_loss(4.6) == pytest.approx(5.3883 / 5.3035 - 1)
    assert estimate_loss(5.5) == pytest.approx(5.3431 / 5.3035 - 1)
    assert estimate_loss(4.4) == pytest.approx(0.02, rel=0.03)


def test_more_bits_never_mean_more_loss() -> None:
    losses = [estimate_loss(bits / 100) for bits in range(100, 3300)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] > 0
    inside = [judge_quant("Q4_K_M", bits / 100).expected_loss for bits in range(445, 520)]
    assert inside == sorted(inside, reverse=True)
    assert len(set(inside)) > 1


def test_ranks_rise_with_bits_where_the_name_is_unknown() -> None:
    ranks = [judge_quant("", bits / 10).class_rank for bits in range(10, 330)]
    assert ranks == sorted(ranks)
    assert set(ranks) == set(range(FULL_RANK + 1))
