"""Prompts equal mistral-common's, token for token, in every family; and what is done where it
refuses."""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from gguf_writer import tekken_vocabulary
from oracle import (
    CONTROL_TEXT,
    FAMILY_NAMES,
    LONG,
    REFUSALS,
    SLOTS,
    WEATHER,
    Conversation,
    Random,
    call,
    expected_if_accepted,
    expected_tokens,
    our_segments,
    our_tokens,
    result,
    said,
    special_names,
    system,
    text,
    text_tokens,
    thought,
    tokenizer,
    tool,
    user,
)

from localmistral.engine.library import llama
from localmistral.engine.tokenizer import Tokenizer
from localmistral.errors import BadRequestError

THINKING_FAMILIES = ("v13-reasoning", "v15")
RANDOM_CONVERSATIONS = 150
SMALL = 4096  # ids of the vocabulary that llama.cpp is given


def C(*messages: Any, **more: Any) -> Conversation:  # noqa: N802
    return Conversation(messages, **more)


ANSWERED = (user("Weather?"), said(None, call()), result())
TWO = (call("aaaaaaaa1", {"city": "Rome"}), call("bbbbbbbb2", {"city": "Oslo"}))
BOTH = (user("Both?"), said(None, *TWO))

# Everything here is accepted by mistral-common for every family.
COMMON: dict[str, Conversation] = {
    "one question": C(user("Hello")),
    "a system prompt": C(system("Be brief."), user("Hello")),
    "turns": C(user("a"), said("b"), user("c"), said("d"), user("e")),
    "german": C(system("Antworte höflich."), user("Größe und Maß?"), said("Äh…"), user("ß")),
    "french": C(user("Où est l’été ? « Ici »"), said("Là-bas…"), user("d’accord\u00a0!")),
    "japanese": C(user("東京の天気は？"), said("晴れです。"), user("ありがとう　")),
    "chinese": C(system("你是助手。"), user("三乘以七是多少？")),
    "korean": C(user("안녕하세요"), said("네"), user("한글 자모 ㄱㄴㄷ")),
    "arabic": C(user("مرحبا، كيف الحال؟"), said("بخير"), user("شكرًا")),
    "hebrew": C(user("שָׁלוֹם עולם")),
    "hindi": C(user("नमस्ते, आप कैसे हैं?")),
    "thai": C(user("สวัสดีชาวโลก")),
    "russian": C(system("Кратко."), user("Ёлка ёжика"), said("Да"), user("Ещё")),
    "greek": C(user("Καλημέρα κόσμε")),
    "emoji": C(user("🙂🙃👩‍👩‍👧‍👦🇳🇴🏳️‍🌈"), said("👍🏽"), user("❤️")),
    "combining marks": C(user("e\u0301 n\u0303 \u200d\u200b\ufeff")),
    "private use and unassigned": C(user("\ue000\uf8ff\U000f0000\u0378")),
    "control characters": C(user("a\x00b\x07\x1b[31m\x7f")),
    "maths and code": C(user("∑ x² ≤ ∞\n```py\nif a<b and c>d:\n\treturn [i for i in x]\n```")),
    "html and quotes": C(user("<b>\"it's\" & 'so'</b> &amp; \\n {{ x }} {% y %} {# z #}")),
    "newlines": C(system("\n\na\n"), user("\r\n b \n\n\n c"), said("\n d"), user("\n")),
    "blanks at both ends": C(system("  s  "), user("  u  "), said("  a  "), user("\tx\t")),
    "answer of blanks": C(user("a"), said("   "), user("b")),
    "newline at an answer's end": C(user("a"), said("b \n"), user("c"), said("d\n "), user("e")),
    "empty question": C(user("")),
    "empty system prompt": C(system(""), user("x")),
    "empty question later": C(user("a"), said("b"), user("")),
    "blank question": C(user(" ")),
    "long question": C(user(LONG)),
    "long everything": C(system(LONG), user(LONG), said(LONG), user(LONG)),
    "long line": C(user("word " * 500 + "x" * 500)),
    "control text of the user": C(user(CONTROL_TEXT)),
    "control text of the system": C(system(CONTROL_TEXT), user("x")),
    "control text of the assistant": C(user("x"), said(CONTROL_TEXT), user("y")),
    "control text of a tool": C(user("x"), said(None, call()), result(CONTROL_TEXT)),
    "control text in arguments": C(
        user("x"), said(None, call(arguments={CONTROL_TEXT: [CONTROL_TEXT]})), result()
    ),
    "control text in tools": C(
        user("x"), tools=[tool(description=CONTROL_TEXT, parameters={CONTROL_TEXT: "[INST]"})]
    ),
    "lone control tokens": C(user("[INST]"), said("</s>"), user("[/INST]"), said("s"), user("<s>")),
    "split control tokens": C(user("[INS"), user("T]"), said("[TOOL_"), said("CALLS]"), user("/")),
    "insides of control tokens": C(user("INST /INST s /s THINK TOOL_CALLS"), said("s"), user("s")),
    "placeholder tokens": C(user("<SPECIAL_20> <SPECIAL_37> <unk> <pad> [IMG]")),
    "foreign control tokens": C(user("<|im_start|>system<|im_end|> <think>x</think> <bos>")),
    "thinking tags in an answer": C(user("x"), said("<think>a</think>b"), user("y")),
    "think tokens in an answer": C(user("x"), said("[THINK]a[/THINK]b"), user("y")),
    "two user messages": C(user("a"), user("b")),
    "many user messages": C(user("a"), user(""), user("b "), user("\n"), user("c")),
    "two assistant messages": C(user("a"), said("b"), said("c"), user("d")),
    "assistant messages with blanks": C(user("a"), said("b "), said(" c "), user("d")),
    "two system messages": C(system("a"), system("b"), user("c")),
    "system between users": C(user("a"), system("b"), user("c")),
    "system before the last user": C(user("a"), said("b"), user("c"), system("d"), user("e")),
    "system before an answer": C(user("a"), system("b"), said("c"), user("d")),
    "system at the end": C(user("a"), system("b")),
    "system alone": C(system("a")),
    "parts": C(system(text("a", "b")), user(text("c", "d", "e")), said(text("f", "g")), user("h")),
    "one part": C(system(text("a")), user(text("b")), said(text("c ")), user(text("d"))),
    "no and empty parts": C(user([]), user(text("")), user(text("", "a", "")), user("b")),
    "parts merged": C(user(text("a", "b")), user("c"), user(text("d", "e"))),
    "a tool declared": C(user("Weather?"), tools=[WEATHER]),
    "bare tools": C(user("x"), tools=[tool("a"), tool("b", parameters=None, description=None)]),
    "a strict tool": C(user("x"), tools=[tool("a", strict=True, parameters={"type": "object"})]),
    "tools and turns": C(system("s"), user("a"), said("b"), user("c"), tools=[WEATHER, tool("z")]),
    "tools and merged users": C(user("a"), said("b"), user("c"), user("d"), tools=[WEATHER]),
    "a call": C(*ANSWERED, tools=[WEATHER]),
    "a call answered": C(*ANSWERED, said("12 degrees."), user("Thanks"), tools=[WEATHER]),
    "parallel calls": C(*BOTH, result("r", "aaaaaaaa1"), result("o", "bbbbbbbb2")),
    "results the other way round": C(*BOTH, result("o", "bbbbbbbb2"), result("r", "aaaaaaaa1")),
    "calls again": C(
        *ANSWERED, said(None, call("zzzzzzzz9")), result("b", "zzzzzzzz9"), said("ok"), user("?")
    ),
    "calls in two turns": C(*ANSWERED, said("done"), *ANSWERED, said("done"), user("x")),
    "user after a result": C(*ANSWERED, user("Stop.")),
    "arguments as an object": C(user("x"), said("", call(arguments={"b": 1, "a": "é"})), result()),
    "arguments as text": C(
        user("x"), said("", call(arguments='{"b":1 , "a":"\\u00e9"}')), result()
    ),
    "arguments in nests": C(
        user("x"),
        said(None, call(arguments={"z": {"y": [{}, [], [1, [None]]]}, "a": {"": False}})),
        result(),
    ),
    "numbers in arguments": C(
        user("x"), said(None, call(arguments='{"a": 1.0, "b": 1e5, "c": -0, "d": 1E-7}')), result()
    ),
    "huge numbers in arguments": C(user("x"), said("", call(arguments={"a": 10**40})), result()),
    "escapes in arguments": C(
        user("x"), said(None, call(arguments={"a": '"\\/\b\n\t\u2028🙂\x7f'})), result()
    ),
    "no arguments": C(user("x"), said(None, call(arguments="")), result()),
    "null arguments": C(user("x"), said(None, call(arguments=None)), result()),
    "a result of JSON": C(user("x"), said(None, call()), result('{"t":21.50,"w":["é","\\u00e9"]}')),
    "a result of a number": C(user("x"), said(None, call()), result("42")),
    "a result of a float": C(user("x"), said(None, call()), result("1e5")),
    "a result of a list": C(user("x"), said(None, call()), result("[1,2 , 3]")),
    "a result of a string": C(user("x"), said(None, call()), result('"quoted"')),
    "a result of null": C(user("x"), said(None, call()), result("null")),
    "a result of NaN": C(user("x"), said(None, call()), result("NaN")),
    "a result of nothing": C(user("x"), said(None, call()), result("")),
    "a result of broken JSON": C(user("x"), said(None, call()), result('{"a": ')),
    "a result in parts": C(user("x"), said(None, call()), result(text("a", "b"))),
    "a long result": C(user("x"), said(None, call()), result(json.dumps({"t": LONG}))),
    "a named result": C(user("x"), said(None, call()), result("r", name="weather")),
    "an assistant to be continued": C(user("a"), said("The answer"), goes_on=True),
    "continued after blanks": C(user("a"), said("The answer is "), goes_on=True),
    "continued after merging": C(user("a"), said("The"), said("answer"), goes_on=True),
    "a call to be continued": C(user("a"), said(None, call()), goes_on=True),
    "control text to be continued": C(user("a"), said("[THINK]x</s>"), goes_on=True),
    "system, then an assistant to be continued": C(system("s"), said("x"), goes_on=True),
    "starts with the assistant": C(said("Hi, I am here."), user("Hello")),
    "starts with system and assistant": C(system("s"), said("Hi."), user("Hello"), tools=[WEATHER]),
    "effort none": C(system("s"), user("a"), tools=[WEATHER], effort="none"),
    "effort high": C(system("s"), user("a"), tools=[WEATHER], effort="high"),
    "effort high, no system": C(user("a"), said("b"), user("c"), effort="high"),
    "effort none, no user": C(system("a"), effort="none"),
    "effort high, late system": C(user("a"), system("b"), user("c"), effort="high"),
}

# Refused by v3 alone: text and calls in one message.
BESIDE_CALLS: dict[str, Conversation] = {
    "text beside a call": C(user("x"), said("I look. ", call()), result(), tools=[WEATHER]),
    "text and a call merged": C(user("x"), said("I look."), said(None, call()), result()),
    "parts beside calls": C(user("x"), said(text("a", "b"), call()), result(), said("c"), user("")),
}

LISTED = [{"type": "text", "text": "I "}, {"type": "text", "text": "think"}]
THINKING: dict[str, Conversation] = {
    "reasoning_content": C(user("a"), said("b", reasoning_content="t"), user("c")),
    "reasoning": C(user("a"), said("b ", reasoning="t "), user("c")),
    "both fields": C(user("a"), said("b", reasoning="t", reasoning_content="t"), user("c")),
    "a thinking part": C(user("a"), said([thought("t"), *text("b")]), user("c")),
    "a thinking list": C(user("a"), said([thought(LISTED), *text("b", "c")]), user("d")),
    "thinking alone": C(user("a"), said(None, reasoning_content="t"), user("c")),
    "empty thinking": C(user("a"), said("b", reasoning_content=""), user("c")),
    "empty thinking part": C(user("a"), said([thought(""), *text("b")]), user("c")),
    "thinking twice": C(
        user("a"), said([thought("t"), *text("b"), thought("u"), *text("c")]), user("")
    ),
    "thinking last": C(user("a"), said([*text("b"), thought("t")]), user("c")),
    "thinking in a row": C(user("a"), said([thought("t"), thought("u")]), user("c")),
    "thinking merged": C(
        user("a"), said("b", reasoning="t"), said("c"), said("d", reasoning="u"), user("e")
    ),
    "thinking and a call": C(user("a"), said(None, call(), reasoning_content="t"), result()),
    "thinking, text and a call": C(user("a"), said("b ", call(), reasoning="t"), result()),
    "thinking after a result": C(
        user("a"), said("", call(), reasoning="t"), result(), said("b", reasoning="u"), user("c")
    ),
    "unclosed thinking": C(user("a"), said([thought("t", closed=False)]), user("c")),
    "unclosed thinking before text": C(
        user("a"), said([thought("two wor", closed=False), *text("ds")]), user("c")
    ),
    "thinking continued": C(user("a"), said([thought("t", closed=False)]), goes_on=True),
    "thinking closed and continued": C(user("a"), said([thought("t", closed=True)]), goes_on=True),
    "text after thinking continued": C(user("a"), said("so ", reasoning="t"), goes_on=True),
    "control text in thinking": C(user("a"), said("b", reasoning=CONTROL_TEXT), user("c")),
    "control text in a thinking part": C(user("a"), said([thought(CONTROL_TEXT)]), user("c")),
    "blanks around thinking": C(user("a"), said("\n\n b\n ", reasoning="\n t \n"), user("c")),
    "thinking in many languages": C(user("a"), said("はい", reasoning="Точно 🙂 né"), user("c")),
    "long thinking": C(user("a"), said("b", reasoning=LONG), user("c"), effort="high"),
}

INSTRUCTED: dict[str, Conversation] = {
    "thinking in a system message": C(
        system([*text("a"), thought("t"), *text("b", "c")]), user("d")
    ),
    "thinking alone in a system message": C(system([thought("t")]), user("d")),
    "the client's own instructions": C(
        system([*text("Think: "), thought("so"), *text("End.")]), user("d"), effort="high"
    ),
}


def accepted_by(family: str) -> dict[str, Conversation]:
    """The fixed conversations that mistral-common takes for a family."""
    accepted = dict(COMMON)
    if family != "v3-tekken":
        accepted |= BESIDE_CALLS
    if family in THINKING_FAMILIES:
        accepted |= THINKING
    return accepted | INSTRUCTED if family == "v13-reasoning" else accepted


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_fixed_conversations_are_equal(family: str) -> None:
    conversations = accepted_by(family)
    assert len(conversations) >= 60
    for label, conversation in conversations.items():
        assert our_tokens(family, conversation) == expected_tokens(family, conversation), label


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_random_conversations_are_equal_wherever_the_oracle_takes_them(family: str) -> None:
    outcomes: Counter[str] = Counter()
    for seed in range(RANDOM_CONVERSATIONS):
        conversation = random_conversation(family, seed)
        expected = expected_if_accepted(family, conversation)
        tokens = our_tokens(family, conversation)  # which takes them all
        assert expected in (tokens, None), f"seed {seed}: {conversation}"
        outcomes["refused" if expected is None else "equal"] += 1
    fixed = len(accepted_by(family))
    print(f"{family:14} {fixed} fixed, {outcomes['equal']} random conversations, all equal")
    assert outcomes["equal"] > RANDOM_CONVERSATIONS // 2


def random_conversation(family: str, seed: int) -> Conversation:
    in_system = family == "v13-reasoning"
    thinking = family in THINKING_FAMILIES
    return Random(seed, thinking=thinking, thinking_in_system=in_system).conversation()


# What mistral-common refuses, and what is done instead: rendered so, or refused at a place.

LENIENT: list[tuple[str, str, Conversation, str]] = [
    # (family, what, conversation, our prompt)
    (
        "v15",
        "a system message after an assistant",
        C(user("a"), said("b"), system("s"), user("c")),
        "<s>[MODEL_SETTINGS]{E}[/MODEL_SETTINGS][INST]a[/INST]b</s>[SYSTEM_PROMPT]s[/SYSTEM_PROMPT]"
        "[INST]c[/INST]",
    ),
    (
        "v7",
        "a system message between assistants",
        C(user("a"), said("b"), system("s"), said("c"), user("d")),
        "<s>[INST]a[/INST]b</s>[SYSTEM_PROMPT]s[/SYSTEM_PROMPT]c</s>[INST]d[/INST]",
    ),
    (
        "v3-tekken",
        "a system message after an assistant",
        C(user("a"), said("b"), system("s"), user("c")),
        "<s>[INST]a[/INST]b</s>[INST]s\n\nc[/INST]",
    ),
    (
        "v15",
        "a system message after a result",
        C(*ANSWERED, system("s"), user("c")),
        "<s>[MODEL_SETTINGS]{E}[/MODEL_SETTINGS][INST]Weather?[/INST][TOOL_CALLS]weather[ARGS]"
        '{"city": "Oslo"}</s>[TOOL_RESULTS]12 degrees[/TOOL_RESULTS][SYSTEM_PROMPT]s'
        "[/SYSTEM_PROMPT][INST]c[/INST]",
    ),
    (
        "v13",
        "a system message between a call and its result",
        C(user("a"), said(None, call()), system("s"), result("r")),
        '<s>[INST]a[/INST][TOOL_CALLS]weather[ARGS]{"city": "Oslo"}</s>[SYSTEM_PROMPT]s'
        "[/SYSTEM_PROMPT][TOOL_RESULTS]r[/TOOL_RESULTS]",
    ),
    (
        "v13",
        "an empty assistant message",
        C(user("a"), said(""), user("b")),
        "<s>[INST]a\n\nb[/INST]",
    ),
    (
        "v11",
        "an empty assistant message to be continued",
        C(user("a"), said(None), goes_on=True),
        "<s>[INST]a[/INST]",
    ),
    (
        "v7",
        "an assistant message at the end",
        C(user("a"), said("b")),
        "<s>[INST]a[/INST]b</s>",
    ),
    (
        "v7",
        "an assistant message alone, to be continued",
        C(said("b"), goes_on=True),
        "<s>b",
    ),
    (
        "v13",
        "a call without a result",
        C(user("a"), said(None, call()), user("b"), said("c"), user("d")),
        '<s>[INST]a[/INST][TOOL_CALLS]weather[ARGS]{"city": "Oslo"}</s>[INST]b[/INST]c</s>'
        "[INST]d[/INST]",
    ),
    (
        "v13",
        "calls in two assistant messages",
        C(user("a"), said("x", TWO[0]), said(None, TWO[1]), result("o", "bbbbbbbb2"),
          result("r", "aaaaaaaa1")),
        '<s>[INST]a[/INST]x[TOOL_CALLS]weather[ARGS]{"city": "Rome"}[TOOL_CALLS]weather[ARGS]'
        '{"city": "Oslo"}</s>[TOOL_RESULTS]r[/TOOL_RESULTS][TOOL_RESULTS]o[/TOOL_RESULTS]',
    ),
    (
        "v3-tekken",
        "text beside a call",
        C(user("a"), said("I look.", call()), result("r")),
        '<s>[INST]a[/INST]I look.[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Oslo"}, '
        '"id": "abcDEF123"}]</s>[TOOL_RESULTS]{"content": "r", "call_id": "abcDEF123"}'
        "[/TOOL_RESULTS]",
    ),
    (
        "v11",
        "thinking where there are no tokens for it",
        C(user("a"), said("b ", reasoning="t"), said(None, reasoning_content="u"), user("c")),
        "<s>[INST]a[/INST]b</s>[INST]c[/INST]",
    ),
    (
        "v13",
        "thinking where there are no tokens for it",
        C(user("a"), said([thought("t"), *text("b", "c")]), user("d")),
        "<s>[INST]a[/INST]b\n\nc</s>[INST]d[/INST]",
    ),
    (
        "v15",
        "thinking in a part and in a field",
        C(user("a"), said([thought("t"), *text("b")], reasoning="u"), user("c")),
        "<s>[MODEL_SETTINGS]{E}[/MODEL_SETTINGS][INST]a[/INST][THINK]t[/THINK]b</s>[INST]c[/INST]",
    ),
    (
        "v15",
        "two fields that differ",
        C(user("a"), said("b", reasoning="u", reasoning_content="t"), user("c")),
        "<s>[MODEL_SETTINGS]{E}[/MODEL_SETTINGS][INST]a[/INST][THINK]t[/THINK]b</s>[INST]c[/INST]",
    ),
    (
        "v13",
        "a result without content, a function with a dot",
        C(user("a"), said(None, call(name="a.b", arguments={})), result(None)),
        "<s>[INST]a[/INST][TOOL_CALLS]a.b[ARGS]{}</s>[TOOL_RESULTS][/TOOL_RESULTS]",
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "what", "conversation", "prompt"), LENIENT, ids=[f"{a}: {b}" for a, b, *_ in LENIENT]
)
def test_what_the_oracle_refuses_is_rendered_sensibly(
    family: str, what: str, conversation: Conversation, prompt: str
) -> None:
    with pytest.raises(REFUSALS):
        expected_tokens(family, conversation)
    segments = our_segments(family, conversation)
    wanted = prompt.replace("{E}", '{"reasoning_effort": "none"}')
    assert "".join(segment.text for segment in segments) == wanted
    assert all(s.control or "[" not in s.text.replace("[{", "") for s in segments)


REFUSED: list[tuple[str, str, Conversation, str]] = [
    ("v15", "a result without a call", C(user("a"), result()), "messages[1]"),
    ("v15", "a result of another call", C(*BOTH, result("r", "x")), "messages[2].tool_call_id"),
    (
        "v15",
        "a second result of a call",
        C(*ANSWERED, result()),
        "messages[3]",
    ),
    (
        "v15",
        "thinking in a system message",
        C(system([thought("t")]), user("a")),
        "messages[0].content",
    ),
    (
        "v11",
        "thinking in a system message",
        C(user("a"), system([thought("t")])),
        "messages[1].content",
    ),
    ("v15", "thinking of a user", C(user([thought("t")])), "messages[0].content[0].type"),
    ("v15", "a user's null", C(user(None)), "messages[0].content"),
    ("v15", "an unknown role", C({"role": "critic", "content": "x"}), "messages[0].role"),
    ("v15", "a user continued", C(user("a"), goes_on=True), "continue_final_message"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "what", "conversation", "place"), REFUSED, ids=[f"{a}: {b}" for a, b, *_ in REFUSED]
)
def test_what_makes_no_sense_is_refused_by_its_place(
    family: str, what: str, conversation: Conversation, place: str
) -> None:
    with pytest.raises(BadRequestError) as caught:
        our_segments(family, conversation)
    assert caught.value.param == place


@pytest.mark.parametrize("arguments", ["[1]", "1", '"x"', "null", "{", "nonsense", [1], 5, True])
@pytest.mark.parametrize("family", ["v3-tekken", "v15"])
def test_arguments_that_are_no_object_are_refused_by_their_place(
    family: str, arguments: Any
) -> None:
    with pytest.raises(BadRequestError) as caught:
        our_segments(family, C(user("a"), said(None, call(arguments=arguments)), result()))
    assert caught.value.param == "messages[1].tool_calls[0].function.arguments"


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        (None, "none"),
        ("none", "none"),
        ("minimal", "none"),
        ("low", "high"),
        ("medium", "high"),
        ("high", "high"),
        ("xhigh", "high"),
        ("max", "high"),
    ],
)
def test_every_effort_is_one_of_the_models_own_two(asked: str | None, meant: str) -> None:
    for family in ("v15", "v13-reasoning"):
        if asked is None and family == "v13-reasoning":
            meant = "high"  # a model that reasons by instructions does so unless told not to
        tokens = our_tokens(family, C(system("s"), user("a"), effort=asked))
        assert tokens == expected_tokens(family, C(system("s"), user("a"), effort=meant))


# The same with llama.cpp's tokenizer, which is what runs.


def byte_names() -> list[str]:
    """The names that byte-level BPE gives to the 256 bytes, by byte (GPT-2's mapping)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    names = {byte: chr(byte) for byte in printable}
    names |= {byte: chr(256 + n) for n, byte in enumerate(others)}
    return [names[byte] for byte in range(256)]


def small_vocabulary(family: str) -> tuple[list[str], list[str]]:
    """Tokens and merges of the first ids of the vocabulary, in GGUF's spelling."""
    names = byte_names()
    pieces = [base64.b64decode(entry["token_bytes"]) for entry in text_tokens()[: SMALL - SLOTS]]
    ranks = {piece: rank for rank, piece in enumerate(pieces)}
    spelled = ["".join(names[byte] for byte in piece) for piece in pieces]
    merges = []
    for piece in pieces:
        cuts = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        known = [(ranks[a], ranks[b]) for a, b in cuts if a in ranks and b in ranks]
        merges += [f"{spelled[a]} {spelled[b]}" for a, b in sorted(known)]
    return [*special_names(family), *spelled], merges


@pytest.fixture(scope="module")
def llama_tokenizer(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[[str], Tokenizer]]:
    """Makes llama.cpp's tokenizer for a family, of a GGUF that holds a vocabulary only."""
    opened: list[tuple[Tokenizer, object]] = []

    def make(family: str) -> Tokenizer:
        tokens, merges = small_vocabulary(family)
        kinds = [3] * SLOTS + [1] * (len(tokens) - SLOTS)
        path: Path = tmp_path_factory.mktemp("vocabulary") / f"{family}.gguf"
        path.write_bytes(tekken_vocabulary(tokens, kinds, merges).data())
        params = llama.llama_model_default_params()
        params.vocab_only = True
        model = llama.llama_model_load_from_file(str(path).encode(), params)
        assert model
        opened.append((Tokenizer(llama.llama_model_get_vocab(model)), model))
        return opened[-1][0]

    yield make
    for made, model in opened:
        made.close()
        llama.llama_model_free(model)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_llama_cpp_makes_the_same_tokens_of_our_segments(
    family: str, llama_tokenizer: Callable[[str], Tokenizer]
) -> None:
    llama_encode = llama_tokenizer(family).encode
    special = special_names(family)
    conversations = list(accepted_by(family).items())
    conversations += [(f"seed {seed}", random_conversation(family, seed)) for seed in range(40)]
    equal = 0
    for label, conversation in conversations:
        expected = expected_if_accepted(family, conversation, SMALL)
        tokens: list[int] = []
        for segment in our_segments(family, conversation):
            known = segment.control
            tokens += [special.index(segment.text)] if known else llama_encode(segment.text)
        assert expected in (tokens, None), label
        equal += expected is not None
    assert equal >= 80


def test_the_oracles_vocabularies_have_real_tokens() -> None:
    """Ids of the real vocabulary, so that equal doesn't mean equally wrong."""
    inner = tokenizer("v15").instruct_tokenizer.tokenizer
    assert inner.encode("Hello world", bos=False, eos=False) == [22177, 4304]
    assert inner.get_special_token("[MODEL_SETTINGS]") == 36
