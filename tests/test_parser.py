"""The parser of text tags: what comes out depends on the text, never on how it was cut."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from localmistral.chatformat.parser import (
    ContentDelta,
    Delta,
    ReasoningDelta,
    TagParser,
    ToolCallDelta,
    new_call_id,
)

Parsed = tuple[str, str, list[tuple[int, str, str, str]]]


def parse(pieces: list[str], *, tools: bool = True, in_thinking: bool = False) -> Parsed:
    """Reasoning, content and calls of an answer that comes in these pieces."""
    ids = (f"id{i}" for i in itertools.count())
    parser = TagParser(tools=tools, in_thinking=in_thinking, new_id=lambda: next(ids))
    deltas: list[Delta] = []
    for piece in pieces:
        deltas += parser.feed(0, piece)
    deltas += parser.finish()
    assert all(delta.text for delta in deltas if not isinstance(delta, ToolCallDelta))
    return (
        "".join(delta.text for delta in deltas if isinstance(delta, ReasoningDelta)),
        "".join(delta.text for delta in deltas if isinstance(delta, ContentDelta)),
        [(d.index, d.id, d.name, d.arguments) for d in deltas if isinstance(d, ToolCallDelta)],
    )


CALL = '<tool_call>\n{"name": "f", "arguments": {"a": "ü"}}\n</tool_call>'
F = (0, "id0", "f", '{"a": "ü"}')
TABLE: list[tuple[str, Parsed]] = [
    ("", ("", "", [])),
    ("Hello", ("", "Hello", [])),
    (" \n Hello \n", ("", " \n Hello \n", [])),
    ("<think>why</think>so", ("why", "so", [])),
    ("\n<think>\nwhy\n\nthen\n</think>\n\nso\n", ("why\n\nthen", "so\n", [])),
    ("<think></think>so", ("", "so", [])),
    ("<think>why", ("why", "", [])),
    ("<think>why </thi", ("why </thi", "", [])),
    ("</think>\nso", ("", "so", [])),
    ("a <think>b</think>", ("", "a <think>b</think>", [])),
    ("<thinking>x", ("", "<thinking>x", [])),
    ("<think", ("", "<think", [])),
    ("1 < 2 <t", ("", "1 < 2 <t", [])),
    (CALL, ("", "", [F])),
    (f"Look:\n{CALL}\n", ("", "Look:", [F])),
    (f"<think>x</think>\n\n{CALL}\n{CALL}", ("x", "", [F, (1, "id1", "f", '{"a": "ü"}')])),
    (f"{CALL}\nDone. ", ("", "Done. ", [F])),
    (CALL.removesuffix("</tool_call>"), ("", "", [F])),
    ("a \n<tool_call>oops</tool_call> b", ("", "a \n<tool_call>oops</tool_call> b", [])),
    ("<tool_call>[1]", ("", "<tool_call>[1]", [])),
    ('<tool_call>{"name": 5}</tool_call>', ("", '<tool_call>{"name": 5}</tool_call>', [])),
    (f"<tool_call>x {CALL}", ("", "<tool_call>x", [F])),
    (
        '<tool_call>{"name": "g", "arguments": {"t": "</tool_call>\\""}}</tool_call>',
        ("", "", [(0, "id0", "g", '{"t": "</tool_call>\\""}')]),
    ),
    (
        '<tool_call>{"name": "g", "arguments": "{\\"b\\": 1}"}</tool_call>',
        ("", "", [(0, "id0", "g", '{"b": 1}')]),
    ),
    ('<tool_call>{"name": "g"}</tool_call>', ("", "", [(0, "id0", "g", "{}")])),
    (
        '<tool_call>{"name": "g", "arguments": {"a": NaN}}</tool_call>',
        ("", '<tool_call>{"name": "g", "arguments": {"a": NaN}}</tool_call>', []),
    ),
    (
        '<tool_call>{"name": "g", "arguments": {"a": "\\ud83d"}}</tool_call>',
        ("", "", [(0, "id0", "g", '{"a": "\\ud83d"}')]),
    ),
    (
        "<tool_call>" + '{"a":' * 5000 + "</tool_call>",
        ("", "<tool_call>" + '{"a":' * 5000 + "</tool_call>", []),
    ),
]


@pytest.mark.parametrize(("text", "expected"), TABLE, ids=[text[:24] for text, _ in TABLE])
def test_an_answer_is_split_into_its_kinds(text: str, expected: Parsed) -> None:
    assert parse([text]) == expected
    assert parse(list(text)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("why</think>so", ("why", "so", [])),
        ("\n\nwhy\n</think>\n\nso", ("why", "so", [])),
        ("<think>\nwhy</think>so", ("why", "so", [])),
        ("<thi", ("<thi", "", [])),
        ("why <think> again</think>so", ("why <think> again", "so", [])),
        (f"</think>{CALL}", ("", "", [F])),
        ("all of it", ("all of it", "", [])),
    ],
)
def test_an_answer_may_start_in_thinking(text: str, expected: Parsed) -> None:
    assert parse([text], in_thinking=True) == expected
    assert parse(list(text), in_thinking=True) == expected


def test_without_tools_a_call_is_text() -> None:
    assert parse([f" {CALL} "], tools=False) == ("", f" {CALL} ", [])


def test_text_streams_as_it_comes() -> None:
    parser = TagParser(tools=True)
    assert parser.feed(1, "Hel") == [ContentDelta(text="Hel")]
    assert parser.feed(2, "lo <") == [ContentDelta(text="lo")]
    assert parser.feed(3, "b>") == [ContentDelta(text=" <b>")]
    assert parser.finish() == []


def test_thinking_streams_as_it_comes() -> None:
    parser = TagParser()
    assert parser.feed(1, "<think>") == []
    assert parser.feed(2, "\nFirst, ") == [ReasoningDelta(text="First,")]
    assert parser.feed(3, "then</") == [ReasoningDelta(text=" then")]
    assert parser.feed(4, "think>\n\nSo") == [ContentDelta(text="So")]


def test_call_ids_are_nine_letters_or_digits_and_differ() -> None:
    ids = {new_call_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(len(i) == 9 and i.isalnum() and i.isascii() for i in ids)


TAGS = '<think> </think> <tool_call> </tool_call> <th ink> < / > " \\ a 1 { }'
SPACED = (" ", "\n", CALL, '{"name": "f", "arguments": {}}', '{"name": "')
PIECES = st.sampled_from((*TAGS.split(), *SPACED))
TEXTS = st.lists(PIECES | st.text(max_size=3), max_size=12).map("".join)


@given(TEXTS, st.data(), st.booleans(), st.booleans())
@example("<tool_call>x<tool_call>", None, True, False)
def test_the_cut_into_pieces_changes_nothing(
    text: str, data: st.DataObject | None, tools: bool, in_thinking: bool
) -> None:
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=8)) if data else range(len(text))
    edges = [0, *sorted(cuts), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(edges)]
    whole = parse([text], tools=tools, in_thinking=in_thinking)
    assert parse(pieces, tools=tools, in_thinking=in_thinking) == whole


@given(TEXTS, st.booleans())
def test_nothing_visible_is_lost(text: str, in_thinking: bool) -> None:
    reasoning, content, calls = parse([text], in_thinking=in_thinking)
    kept = reasoning + content + "".join(name + arguments for _, _, name, arguments in calls)
    for tag in ("<think>", "</think>", "<tool_call>", "</tool_call>"):
        text = text.replace(tag, "")
        kept = kept.replace(tag, "")
    if not calls:
        assert "".join(kept.split()) == "".join(text.split())
    for _, _, _, arguments in calls:
        assert isinstance(json.loads(arguments), dict)


@given(st.text())
def test_text_without_markup_passes_unchanged(text: str) -> None:
    text = text.replace("<", "")
    assert parse([text]) == ("", text, [])
