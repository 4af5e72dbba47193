"""Text to tokens: nothing that a person pastes may end the process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from gguf_writer import tekken_vocabulary

from localmistral.engine.library import llama
from localmistral.engine.tokenizer import _LONGEST_RUN, Tokenizer, _cut_runs, _measure_run
from localmistral.errors import BadRequestError, EngineError


def byte_names() -> list[str]:
    """The names that byte-level BPE gives to the 256 bytes, by byte (GPT-2's mapping)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    names = {byte: chr(byte) for byte in printable}
    names |= {byte: chr(256 + n) for n, byte in enumerate(others)}
    return [names[byte] for byte in range(256)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tokenizer]:
    """A Tekken-style vocabulary: bytes, a few merges, `[INST]` as a control token."""
    tokens = ["<unk>", "<s>", "</s>", "[INST]", "[MARK]", *byte_names(), "he", "ll", "hell"]
    types = [3, 3, 3, 3, 4, *[1] * (len(tokens) - 5)]
    path: Path = tmp_path_factory.mktemp("vocabulary") / "tekken.gguf"
    path.write_bytes(tekken_vocabulary(tokens, types, ["h e", "l l", "he ll"]).data())
    params = llama.llama_model_default_params()
    params.vocab_only = True
    model = llama.llama_model_load_from_file(str(path).encode(), params)
    assert model
    made = Tokenizer(llama.llama_model_get_vocab(model))
    yield made
    made.close()
    llama.llama_model_free(model)
    with pytest.raises(EngineError, match="closed"):
        made.encode("x")


RUNS = ["a", "A", " ", "\n", "!", "漢", "😀", "e\u0301", "\t ", "\r\n", "\0", "1", "aB", "é!"]


@pytest.mark.parametrize("unit", RUNS)
@pytest.mark.parametrize("count", [1000, 40_000, 300_000])
def test_a_long_run_of_anything_is_tokenised_without_loss(
    tokenizer: Tokenizer, unit: str, count: int
) -> None:
    text = f"hell {unit * (count // len(unit))} hell"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_run_is_tokenised_as_one_word_as_long_as_it_can_be(tokenizer: Tokenizer) -> None:
    (token,) = tokenizer.encode("hell")
    assert tokenizer.encode("hell" * 50_000) == [token] * 50_000


def test_only_runs_are_cut_and_only_past_the_limit() -> None:
    text = "some words, " * 60_000
    assert _cut_runs(text) == [text]
    pieces = _cut_runs(text + "x" * (2 * _LONGEST_RUN + 10) + " end")
    assert [len(piece) for piece in pieces[1:]] == [_LONGEST_RUN, 10 + len(" end")]
    assert max(map(_measure_run, pieces)) <= _LONGEST_RUN


def test_control_text_is_text_unless_it_is_asked_for(tokenizer: Tokenizer) -> None:
    assert 3 not in tokenizer.encode("[INST]")
    assert tokenizer.encode("[INST]", parse_special=True) == [3]
    assert tokenizer.decode([3]) == "[INST]"
    assert tokenizer.is_control(3)
    assert not tokenizer.is_control(300 - 40)
    assert tokenizer.is_end(2)
    assert not tokenizer.is_end(3)


def test_half_a_surrogate_pair_is_no_text(tokenizer: Tokenizer) -> None:
    with pytest.raises(BadRequestError, match="Character 2"):
        tokenizer.encode("ab\ud800")


def test_tokens_outside_the_vocabulary_are_refused(tokenizer: Tokenizer) -> None:
    for token in (-1, tokenizer.size):
        with pytest.raises(BadRequestError, match=f"{tokenizer.size} tokens"):
            tokenizer.decode([token])
