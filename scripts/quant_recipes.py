"""Which type each tensor of a quantised file has: published mixes, imitated by rules.

Knows names of tensors and no shapes beyond the length of a row.
"""

import re
from collections.abc import Sequence

from localmistral.models.shape import FILE_TYPE_NAMES
from localmistral.models.tensor_types import TENSOR_TYPES

_BLOCKS = {kind.name: kind.block_elements for kind in TENSOR_TYPES.values()}

# Published mixes: (pattern, type), the first that matches counts. `*` stands for the layers that
# llama-quantize gives more bits (the first and last eighth, and every third one between), OUTPUT
# for the tensor that makes logits.
# The types of routed experts were chosen so that Small 4's file comes out at its published size;
# unsloth's mixes keep everything else at 8 bits or close to them.
RECIPES: dict[str, tuple[tuple[str, str], ...]] = {
    "UD-IQ1_M": (("gate_up_exps", "iq1_m"), ("down_exps", "iq2_s"), ("", "q8_0")),
    "UD-IQ3_XXS": (("gate_up_exps", "iq2_s"), ("down_exps", "iq3_xxs"), ("", "q8_0")),
    "UD-IQ3_S": (("gate_up_exps", "iq2_s"), ("down_exps", "iq3_s"), ("", "q8_0")),
    "UD-IQ4_XS": (("gate_up_exps", "iq3_s"), ("down_exps", "q4_K"), ("", "q8_0")),
    "UD-Q4_K_XL": (
        (r"blk\.[0-5]\.ffn_down_exps", "q6_K"),
        ("down_exps", "q5_K"),
        ("gate_up_exps", "q4_K"),
        ("", "q8_0"),
    ),
    "UD-Q6_K": (("exps", "q6_K"), ("", "q8_0")),
    "Q4_K_M": (
        ("*attn_v", "q6_K"),
        ("*ffn_down", "q6_K"),
        ("OUTPUT", "q6_K"),
        ("attn_kv_a_mqa", "q8_0"),
        ("", "q4_K"),
    ),
    "Q8_0": (("", "q8_0"),),
}


def _more_bits_pattern(layer_count: int) -> str:
    eighth = layer_count // 8
    layers = [
        n
        for n in range(layer_count)
        if n < eighth or n >= 7 * layer_count // 8 or (n - eighth) % 3 == 2
    ]
    return rf"^blk\.({'|'.join(map(str, layers))})\."


def type_rules(quant: str, layer_count: int, *, is_tied: bool) -> list[tuple[str, str]]:
    """What `--quant` means, as (pattern, type): the first pattern found in a name counts."""
    output = r"^token_embd\." if is_tied else r"^output\."
    if quant in RECIPES:
        prefix = _more_bits_pattern(layer_count)
        return [
            (pattern.replace("*", prefix).replace("OUTPUT", output), kind)
            for pattern, kind in RECIPES[quant]
        ]
    # quantised files keep the output in a finer type than the layers
    return [(output, "q6_K" if quant.endswith("_K") else quant), ("", quant)]


def choose_type(name: str, dims: Sequence[int], rules: Sequence[tuple[str, str]]) -> str:
    """The type by the rules, a wider one where rows are too short for its blocks."""
    if len(dims) == 1 or "ffn_gate_inp" in name:
        return "f32"
    wanted = next(kind for pattern, kind in rules if re.search(pattern, name))
    for kind in (wanted, "q8_0", "f16"):
        if dims[0] % _BLOCKS[kind] == 0:
            return kind
    raise AssertionError("f16 has blocks of one element")


def file_type(quant: str) -> int:
    """The number that llama.cpp files such a mix under, 0 for one without."""
    bare = quant.removeprefix("UD-").upper()
    names = (bare, f"{bare}_M", f"{bare}_MOE", bare.replace("_XL", "_M"))
    return next((number for number, name in FILE_TYPE_NAMES.items() if name in names), 0)
