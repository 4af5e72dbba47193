"""The command line typed again with an option changed."""

import os

import pytest

from localmistral.cli.retyping import retype

pytestmark = pytest.mark.skipif(os.name == "nt", reason="quotes are written another way there")


@pytest.mark.parametrize(
    ("typed", "change", "wanted"),
    [
        (["plan", "small-4"], ("--quant", "Q8_0"), "plan small-4 --quant Q8_0"),
        (["plan", "small-4:UD-IQ1_M"], ("--quant", "Q8_0"), "plan small-4 --quant Q8_0"),
        (["run", "-m", "hf:a/b:Q8_0", "hi: you"], ("--quant", None), "run -m hf:a/b 'hi: you'"),
        (["plan", "--model=small-4:Q8_0"], ("--quant", "X"), "plan --model=small-4 --quant X"),
        (["plan", "--quant", "A", "small-4"], ("--quant", "B"), "plan small-4 --quant B"),
        (["plan", "--context=9k", "x.gguf"], ("--context", "4k"), "plan x.gguf --context 4k"),
        (["plan", "--context", "9k"], ("--context", None), "plan"),
        (["plan", "C:\\a:b.gguf"], ("--no-vision", ""), "plan 'C:\\a:b.gguf' --no-vision"),
        (["run", "--", "--context"], ("--context", "4k"), "run --context 4k -- --context"),
    ],
)
def test_one_option_takes_the_place_of_what_was_typed(
    typed: list[str], change: tuple[str, str | None], wanted: str
) -> None:
    assert retype(typed, [change]) == f"localmistral {wanted}"


def test_several_options_are_changed_at_once() -> None:
    typed = ["plan", "small-4:Q8_0", "--gpu-layers", "37", "--gpu", "24GiB"]
    changed = retype(typed, [("--gpu-layers", None), ("--quant", None)])
    assert changed == "localmistral plan small-4 --gpu 24GiB"
