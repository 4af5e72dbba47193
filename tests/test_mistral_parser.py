"""Mistral's output read by token id: thinking, content, calls, and nothing of the markup."""

from __future__ import annotations

import codecs
import json
from collections.abc import Sequence
from itertools import count
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracle import Conversation, encode, our_tokens, special_names, tokenizer, user

from localmistral.answer import Assembly
from localmistral.chatformat.mistral_parser import JsonScan, MistralParser
from localmistral.chatformat.parser import ContentDelta, Delta, ReasoningDelta, ToolCallDelta
from localmistral.chatformat.segments import Segment
from localmistral.engine import GenerationResult, TokenEvent

IDS = {name: i for i, name in enumerate(special_names("v15"))}
ARGS = '{"city": "Oslo"}'


def parser(*, tools: bool = True, in_thinking: bool = False) -> MistralParser:
    numbers = count(1)
    return MistralParser(
        IDS, tools=tools, in_thinking=in_thinking, new_id=lambda: f"newid{next(numbers):04d}"
    )


def feed(made: MistralParser, *parts: str) -> list[Delta]:
    """Feed control tokens (by their names) and texts, then finish."""
    deltas: list[Delta] = []
    for part in parts:
        # What comes with a control token is spelled out, and must not matter.
        deltas += made.feed(IDS.get(part, 5000), part)
    return deltas + made.finish()


def summed(deltas: Sequence[Delta]) -> tuple[str, str, list[tuple[str, str, str]]]:
    """Reasoning, content and calls (id, name, arguments)."""
    reasoning = "".join(d.text for d in deltas if isinstance(d, ReasoningDelta))
    content = "".join(d.text for d in deltas if isinstance(d, ContentDelta))
    calls: dict[int, tuple[str, str, str]] = {}
    for d in deltas:
        if isinstance(d, ToolCallDelta):
            id_, name, arguments = calls.get(d.index, (d.id, d.name, ""))
            calls[d.index] = (id_, name, arguments + d.arguments)
    return reasoning, content, [calls[i] for i in sorted(calls)]


OSLO = ("newid0001", "weather", ARGS)
CASES: list[tuple[str, tuple[str, ...], tuple[str, str, list[tuple[str, str, str]]]]] = [
    ("nothing", (), ("", "", [])),
    ("an answer", ("Hello ", "there.\n"), ("", "Hello there.\n", [])),
    ("thinking", ("[THINK]", " so", "\n", "[/THINK]", "\nHi"), (" so\n", "\nHi", [])),
    ("empty thinking", ("[THINK]", "[/THINK]", "Hi"), ("", "Hi", [])),
    ("unclosed thinking", ("[THINK]", "so", " on"), ("so on", "", [])),
    ("text before thinking", ("a", "[THINK]", "b", "[/THINK]", "c"), ("b", "ac", [])),
    ("thinking twice", ("[THINK]", "a", "[/THINK]", "[THINK]", "b", "[/THINK]"), ("ab", "", [])),
    ("a call", ("[TOOL_CALLS]", "wea", "ther", "[ARGS]", '{"city"', ': "Oslo"}'), ("", "", [OSLO])),
    (
        "text before a call",
        ("I look. ", "[TOOL_CALLS]", "weather", "[ARGS]", ARGS),
        ("", "I look. ", [OSLO]),
    ),
    (
        "thinking before a call",
        ("[THINK]", "t", "[/THINK]", "[TOOL_CALLS]", "weather", "[ARGS]", ARGS),
        ("t", "", [OSLO]),
    ),
    (
        "a call that ends unclosed thinking",
        ("[THINK]", "t", "[TOOL_CALLS]", "weather", "[ARGS]", ARGS),
        ("t", "", [OSLO]),
    ),
    (
        "several calls",
        ("[TOOL_CALLS]", "weather", "[ARGS]", ARGS, "[TOOL_CALLS]", "time", "[ARGS]", "{}"),
        ("", "", [OSLO, ("newid0002", "time", "{}")]),
    ),
    (
        "blanks between and after calls",
        ("[TOOL_CALLS]", "weather", "[ARGS]", ARGS, "\n", "[TOOL_CALLS]", "t", "[ARGS]", "{}\n"),
        ("", "", [OSLO, ("newid0002", "t", "{}")]),
    ),
    (
        "text after a call",
        ("[TOOL_CALLS]", "weather", "[ARGS]", ARGS + "\n", "Done", "."),
        ("", "\nDone.", [OSLO]),
    ),
    (
        "the model's own call id",
        ("[TOOL_CALLS]", "weather", "[CALL_ID]", "abc", "123XYZ", "[ARGS]", ARGS),
        ("", "", [("abc123XYZ", "weather", ARGS)]),
    ),
    (
        "a bad and a repeated call id",
        (
            "[TOOL_CALLS]", "a", "[CALL_ID]", "x", "[ARGS]", "{}",
            "[TOOL_CALLS]", "b", "[CALL_ID]", "abc123XYZ", "[ARGS]", "{}",
            "[TOOL_CALLS]", "c", "[CALL_ID]", "abc123XYZ", "[ARGS]", "{}",
        ),
        ("", "", [("newid0001", "a", "{}"), ("abc123XYZ", "b", "{}"), ("newid0002", "c", "{}")]),
    ),
    ("no [ARGS]", ("[TOOL_CALLS]", "weather", ARGS), ("", "", [OSLO])),
    ("no arguments", ("[TOOL_CALLS]", "now", "[ARGS]"), ("", "", [("newid0001", "now", "{}")])),
    (
        "no arguments, then a call",
        ("[TOOL_CALLS]", "now", "[ARGS]", "[TOOL_CALLS]", "weather", "[ARGS]", ARGS),
        ("", "", [("newid0001", "now", "{}"), ("newid0002", "weather", ARGS)]),
    ),
    (
        "arguments cut short",
        ("[TOOL_CALLS]", "weather", "[ARGS]", '{"city": "Os'),
        ("", "", [("newid0001", "weather", '{"city": "Os')]),
    ),
    (
        "braces in strings",
        ("[TOOL_CALLS]", "f", "[ARGS]", '{"a": "}\\"}', '{", "b": [{}]}', "x"),
        ("", "x", [("newid0001", "f", '{"a": "}\\"}{", "b": [{}]}')]),
    ),
    ("a name cut short", ("[TOOL_CALLS]", "wea"), ("", "wea", [])),
    ("arguments without a name", ("[TOOL_CALLS]", "[ARGS]", ARGS, "x"), ("", ARGS + "x", [])),
    (
        "a list of calls",
        ("[TOOL_CALLS]", '[{"name": "weather", "arguments": ' + ARGS, ', "id": "abc123XYZ"}', "]"),
        ("", "", [("abc123XYZ", "weather", ARGS)]),
    ),
    (
        "a list of two calls with a blank before",
        ("[TOOL_CALLS]", " ", '[{"name": "a", "arguments": {}}, {"name": "b"}]', "\n"),
        ("", "", [("newid0001", "a", "{}"), ("newid0002", "b", "{}")]),
    ),
    (
        "a list without its end",
        ("[TOOL_CALLS]", '[{"name": "weather", "arguments": ' + ARGS + "}"),
        ("", "", [OSLO]),
    ),
    (
        "a call that is no list",
        ("[TOOL_CALLS]", '{"name": "weather", "arguments": ' + json.dumps(ARGS) + "}"),
        ("", "", [OSLO]),
    ),
    ("a broken list", ("[TOOL_CALLS]", '[{"name": ', "5}]", "x"), ("", '[{"name": 5}]x', [])),
    ("a list cut short", ("[TOOL_CALLS]", '[{"name": "wea'), ("", '[{"name": "wea', [])),
    ("an empty list", ("[TOOL_CALLS]", "[]"), ("", "[]", [])),
    ("only the beginning of a call", ("a", "[TOOL_CALLS]"), ("", "a", [])),
    (
        "stray control tokens",
        ("[/THINK]", "a", "[ARGS]", "[CALL_ID]", "b", "[INST]", "<SPECIAL_77>", "[IMG]", "c"),
        ("", "abc", []),
    ),
    (
        "stray control tokens in a call",
        ("[TOOL_CALLS]", "wea", "[INST]", "ther", "[ARGS]", '{"city"', "[/THINK]", ': "Oslo"}'),
        ("", "", [OSLO]),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("parts", "wanted"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_an_answer_is_taken_apart(parts: tuple[str, ...], wanted: Any) -> None:
    assert summed(feed(parser(), *parts)) == wanted


@pytest.mark.parametrize("parts", [c[1] for c in CASES], ids=[c[0] for c in CASES])
def test_the_result_does_not_depend_on_how_the_text_is_cut(parts: tuple[str, ...]) -> None:
    letters = [c for part in parts for c in ([part] if part in IDS else part)]
    assert summed(feed(parser(), *letters)) == summed(feed(parser(), *parts))


def test_the_name_of_a_call_comes_before_its_arguments() -> None:
    made = parser()
    made.feed(IDS["[TOOL_CALLS]"], "[TOOL_CALLS]")
    assert made.feed(5000, "weather") == []
    announced = made.feed(IDS["[ARGS]"], "")
    assert announced == [ToolCallDelta(index=0, id="newid0001", name="weather")]
    assert made.feed(5000, '{"ci') == [ToolCallDelta(index=0, arguments='{"ci')]
    assert made.feed(5000, 'ty": 1}') == [ToolCallDelta(index=0, arguments='ty": 1}')]
    assert made.finish() == []


def test_text_that_was_held_before_a_control_token_is_not_lost() -> None:
    made = parser()
    deltas = made.feed(IDS["[THINK]"], "a [THINK]") + made.feed(IDS["[/THINK]"], "b[/THINK]")
    assert summed(deltas) == ("b", "a ", [])


def test_a_prompt_that_ends_in_thinking_begins_with_it() -> None:
    deltas = feed(parser(in_thinking=True), "on", "[/THINK]", "so")
    assert summed(deltas) == ("on", "so", [])


def test_control_tokens_written_as_plain_text_are_text() -> None:
    made = parser()
    words = "[THINK]a[/THINK][TOOL_CALLS]f[ARGS]{}</s>"
    deltas = made.feed(5000, words) + made.feed(-1, words) + made.finish()
    assert summed(deltas) == ("", words + words, [])


@pytest.mark.parametrize(
    ("parts", "content"),
    [
        (("I look. ", "[TOOL_CALLS]", "weather", "[ARGS]", ARGS), "I look. weather" + ARGS),
        (("[TOOL_CALLS]", "weather", "[CALL_ID]", "abc123XYZ", "[ARGS]", ARGS), "weather" + ARGS),
        (("[TOOL_CALLS]", '[{"name": "f", "arguments": {}}]'), '[{"name": "f", "arguments": {}}]'),
        (("[TOOL_CALLS]", "now", "[ARGS]"), "now"),
    ],
)
def test_without_declared_tools_a_call_is_text(parts: tuple[str, ...], content: str) -> None:
    assert summed(feed(parser(tools=False), *parts)) == ("", content, [])


@given(
    st.lists(st.sampled_from([*list(IDS)[:20], "[THINK]", "[/THINK]", "[ARGS]", "[CALL_ID]"])
             | st.text(alphabet='ab{}[]" \\:,', max_size=4), max_size=12),
    st.booleans(),
)  # fmt: skip
def test_nothing_of_the_markup_ever_shows(parts: list[str], tools: bool) -> None:
    deltas = feed(parser(tools=tools), *parts)
    shown = "".join(
        d.arguments + d.name if isinstance(d, ToolCallDelta) else d.text for d in deltas
    )
    plain = "".join(part for part in parts if part not in IDS)
    for name in IDS:
        assert name not in shown or name in plain
    assert tools or not any(isinstance(d, ToolCallDelta) for d in deltas)


@given(st.dictionaries(st.text(max_size=5), st.none() | st.text() | st.lists(st.integers())))
def test_the_end_of_json_is_found_wherever_it_is_cut(value: dict[str, Any]) -> None:
    written = json.dumps(value, ensure_ascii=False)
    scan = JsonScan()
    ends = [scan.feed(c) for c in written]
    assert ends[-1] == 1
    assert set(ends[:-1]) <= {None}
    assert JsonScan().feed(written + "}") == len(written)


# Answers put back into the history give the same tokens again.


def generated(family: str, parts: Sequence[str]) -> list[int]:
    names = special_names(family)
    return encode(family, [Segment(text=part, control=part in names) for part in parts])


def read_back(family: str, tokens: Sequence[int]) -> dict[str, Any]:
    """The message that comes of generated tokens, by the way answers really go."""
    names = special_names(family)
    inner = tokenizer(family).instruct_tokenizer.tokenizer
    control = {name: i for i, name in enumerate(names)}
    assembly = Assembly(MistralParser(control, tools=True))
    decoder = codecs.getincrementaldecoder("utf-8")()
    for token in tokens:
        if token < len(names):
            assembly.read(TokenEvent(token=token, text=names[token], control=True))
        else:
            piece = decoder.decode(inner.id_to_byte_piece(token))
            assembly.read(TokenEvent(token=token, text=piece))
    assembly.finish()
    result = GenerationResult(
        finish_reason="stop",
        stop_text=None,
        prompt_tokens=1,
        cached_tokens=0,
        completion_tokens=len(tokens),
        queue_s=0,
        prefill_s=0,
        decode_s=0,
        seed=0,
    )
    return assembly.build_result(result).to_message()


ANSWERS = [
    ("Hello there.",),
    ("  \n leading and 🙂 日本語 [THINK] as text\n",),
    ("[THINK]", "\n so \n", "[/THINK]", "\n\nFour "),
    ("[THINK]", " never closed"),
    (
        "[THINK]",
        "t",
        "[/THINK]",
        "Look: ",
        "[TOOL_CALLS]",
        "weather",
        "[ARGS]",
        '{"c": ["é", 1.5]}',
    ),
    ("[TOOL_CALLS]", "a", "[ARGS]", "{}", "[TOOL_CALLS]", "b", "[ARGS]", '{"x": {"y": null}}'),
]
OLD_ANSWERS = {
    "v11": ("[TOOL_CALLS]", "f", "[CALL_ID]", "abc123XYZ", "[ARGS]", '{"a": "é"}'),
    "v7": ("Look.", "[TOOL_CALLS]", '[{"name": "f", "arguments": {"a": 1}, "id": "abc123XYZ"}]'),
    "v3-tekken": ("[TOOL_CALLS]", '[{"name": "f", "arguments": {"a": 1}, "id": "abc123XYZ"}]'),
}


@pytest.mark.parametrize(
    ("family", "parts"),
    [(family, parts) for family in ("v13-reasoning", "v15") for parts in ANSWERS]
    + list(OLD_ANSWERS.items()),
)
def test_an_answer_in_the_history_gives_its_own_tokens_again(
    family: str, parts: tuple[str, ...]
) -> None:
    question = Conversation([user("Question?")], effort="high")
    answer = generated(family, parts)
    message = read_back(family, answer)
    history = Conversation([user("Question?"), message], effort="high", goes_on=True)
    again = our_tokens(family, history)
    closed = [special_names(family).index("[/THINK]")] if parts[-1] == " never closed" else []
    assert again == our_tokens(family, question) + answer + closed
