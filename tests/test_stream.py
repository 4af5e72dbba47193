"""Text that is held back until it is final, and the queue between engine and reader."""

from __future__ import annotations

import gc
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localmistral.engine.stream import (
    Channel,
    GenerationResult,
    Stream,
    TextAssembler,
    TokenEvent,
)
from localmistral.errors import EngineError


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return [data[a:b] for a, b in itertools.pairwise(edges)]


def assemble(pieces: list[bytes], stops: tuple[str, ...] = ()) -> tuple[list[str], str | None]:
    assembler = TextAssembler(stops)
    out = []
    for piece in pieces:
        out.append(assembler.push(piece))
        if assembler.stop_text is not None:
            return out, assembler.stop_text
    return [*out, assembler.flush()], None


@given(st.text(), st.lists(st.integers(0, 1000)))
def test_any_cut_of_the_bytes_gives_the_same_text(text: str, places: list[int]) -> None:
    pieces, _ = assemble(cut(text.encode(), places))
    assert "".join(pieces) == text


@given(
    st.text(alphabet="abc ", max_size=40),
    st.lists(st.integers(0, 100)),
    st.lists(st.text(alphabet="abc ", min_size=1, max_size=5), min_size=1, max_size=3),
)
def test_text_ends_before_the_first_stop_string(
    text: str, places: list[int], stops: list[str]
) -> None:
    pieces, stop = assemble(cut(text.encode(), places), tuple(stops))
    shown = "".join(pieces)
    found = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    assert shown == (text[: min(found)[1]] if found else text)
    assert (stop is not None) == bool(found)
    # What was shown along the way never had to be taken back.
    for i in range(len(pieces)):
        assert text.startswith("".join(pieces[:i]))


@pytest.mark.parametrize("pieces", [[b"abcd"], [b"ab", b"cd"], [b"a", b"b", b"c", b"d"]])
def test_of_several_stop_strings_the_one_that_is_complete_first_counts(
    pieces: list[bytes],
) -> None:
    assert assemble(pieces, ("bcd", "bc"))[1] == "bc"
    assert assemble(pieces, ("abcd", "c"))[1] == "c"


def test_half_a_character_at_the_end_is_dropped_and_broken_bytes_are_marked() -> None:
    assert "".join(assemble(["é".encode()[:1]])[0]) == ""
    assert "".join(assemble([b"a\xffb"])[0]) == "a\ufffdb"


RESULT = GenerationResult(
    finish_reason="stop", stop_text=None, prompt_tokens=1, cached_tokens=0, completion_tokens=1,
    queue_s=0, prefill_s=0, decode_s=0, seed=0,
)  # fmt: skip


def test_a_stream_gives_its_events_then_its_result() -> None:
    channel = Channel()
    stream = Stream(channel, lambda: None)
    channel.put(TokenEvent(token=1, text="a"))
    channel.put(RESULT)
    assert [event.text for event in stream] == ["a"]
    assert stream.result is RESULT
    assert list(stream) == []


def test_an_error_is_raised_again_at_every_reading() -> None:
    channel = Channel()
    stream = Stream(channel, lambda: None)
    channel.put(EngineError("broken"))
    for _ in range(2):
        with pytest.raises(EngineError, match="broken"):
            list(stream)


def test_only_an_unfinished_stream_is_cancelled_by_leaving_it() -> None:
    for finished in (True, False):
        channel = Channel()
        calls: list[int] = []
        stream = Stream(channel, lambda calls=calls: calls.append(1))  # type: ignore[misc]
        if finished:
            channel.put(RESULT)
        del stream
        gc.collect()
        assert bool(calls) is not finished
