"""How good a quantised model is: its class by name and bits per weight, and whether it breaks.

Perplexity of Mistral Small 4 (the only published table; BF16 is 5.3035):

    bits per weight   perplexity   above BF16
    5.5               5.3431       0.75 %
    4.6 (Q4_K_S)      5.3883       1.60 %
    4.3               5.4242       2.28 %

The 4-bit class is what stays within 2 % of BF16: from 4.4 bits on. Below about 3.1 bits long
reasoning was seen to end without an answer: those rank below everything else, except that IQ3_S
was seen to hold though its files of Small 4 have 2.99 bits.
The name of a quantisation says more than the bits of a whole file, which counts embeddings: Q4_1 of
a small model has 5.7 bits, and its layers are no better than Q4_1 elsewhere. So the name decides
where it is known, unless the file is two classes smaller. Knows no sizes and no speeds.
"""

import math
import re
from dataclasses import dataclass

BF16_PERPLEXITY = 5.3035
_PERPLEXITIES = ((4.3, 5.4242), (4.6, 5.3883), (5.5, 5.3431))
"""(bits per weight, perplexity), ascending."""

ONE_BIT_RANK = 0
TWO_BIT_RANK = 1
SMALL_THREE_BIT_RANK = 2
THREE_BIT_RANK = 3
NEARLY_FOUR_BIT_RANK = 4
FOUR_BIT_RANK = 5
FIVE_BIT_RANK = 6
SIX_BIT_RANK = 7
EIGHT_BIT_RANK = 8
FULL_RANK = 9
"""Quality classes, ascending. Small three bit is IQ3_XXS, three bit IQ3_S and better, nearly four
bit IQ4_XS, which misses the 4-bit class's 2 %."""

_CLASSES_BY_BITS = (
    (2.1, ONE_BIT_RANK),
    (2.75, TWO_BIT_RANK),
    (3.1, SMALL_THREE_BIT_RANK),
    (3.75, THREE_BIT_RANK),
    (4.4, NEARLY_FOUR_BIT_RANK),
    (5.25, FOUR_BIT_RANK),
    (6.25, FIVE_BIT_RANK),
    (7.5, SIX_BIT_RANK),
    (10.0, EIGHT_BIT_RANK),
    (math.inf, FULL_RANK),
)
"""(bits per weight below which a file is of a class, the class), ascending."""
_CLASSES_BY_NAME = tuple(
    (re.compile(rf"(?:^|[-_.])(?:{pattern})", re.IGNORECASE), rank)
    for pattern, rank in (
        (r"T?Q1_|IQ1_", ONE_BIT_RANK),
        (r"T?Q2_|IQ2_", TWO_BIT_RANK),
        (r"IQ3_XXS", SMALL_THREE_BIT_RANK),
        (r"I?Q3_", THREE_BIT_RANK),
        (r"IQ4_XS", NEARLY_FOUR_BIT_RANK),
        (r"I?Q4_", FOUR_BIT_RANK),
        (r"Q5_", FIVE_BIT_RANK),
        (r"Q6_", SIX_BIT_RANK),
        (r"Q8_", EIGHT_BIT_RANK),
        (r"B?F(?:16|32)\b", FULL_RANK),
    )
)
"""As files are named, with or without a maker's prefix (`UD-`); MXFP4 and NVFP4 go by their bits,
since what is around the experts differs from maker to maker."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantQuality:
    """`class_rank` orders classes, higher is better. `expected_loss` is how much perplexity rises
    over BF16, as a share: inside a class more bits always mean less of it."""

    bits_per_weight: float
    class_rank: int
    is_broken: bool
    expected_loss: float

    @property
    def is_last_resort(self) -> bool:
        """Whether a smaller model in a sound quant serves better: 1 and 2 bits."""
        return self.class_rank <= TWO_BIT_RANK


def judge_quant(name: str, bits_per_weight: float) -> QuantQuality:
    """The quality of a quantisation called `name` (`UD-Q4_K_XL`) whose file has so many bits per
    weight; 0 bits leaves it to the name, an unknown name to the bits."""
    by_name = next((rank for pattern, rank in _CLASSES_BY_NAME if pattern.search(name)), None)
    by_bits = _class_by_bits(bits_per_weight)
    rank = by_bits
    if by_name is not None and (bits_per_weight <= 0 or by_bits >= by_name - 1):
        rank = by_name
    return QuantQuality(
        bits_per_weight=bits_per_weight,
        class_rank=rank,
        is_broken=rank < THREE_BIT_RANK,
        expected_loss=estimate_loss(_clamp_to_class(bits_per_weight, rank)),
    )


def _class_by_bits(bits: float) -> int:
    return next(rank for limit, rank in _CLASSES_BY_BITS if bits < limit)


def _clamp_to_class(bits: float, rank: int) -> float:
    limits = [limit for limit, _ in _CLASSES_BY_BITS]
    low = limits[rank - 1] if rank else 1.0
    return max(low, min(bits, limits[rank]))


def estimate_loss(bits: float) -> float:
    """The rise of perplexity over BF16, as a share, at `bits` per weight.

    The logarithm runs in lines through the published points, and goes on beyond them as between the
    two at that end: 10 % at 3 bits, 0.06 % at 8.5. Only between 4.3 and 5.5 bits it is published.
    """
    points = [(b, math.log(p / BF16_PERPLEXITY - 1)) for b, p in _PERPLEXITIES]
    upper = next((n for n, (b, _) in enumerate(points) if n and bits <= b), len(points) - 1)
    (low, first), (high, last) = points[upper - 1], points[upper]
    return math.exp(first + (last - first) * (bits - low) / (high - low))
