"""Which family a model is of, what its format does around the prompts, and the rules one by one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from make_templates import FAMILIES as GENERATED
from make_templates import make_template
from oracle import (
    CONTROL_TEXT,
    FAMILY_NAMES,
    Conversation,
    call,
    chat_format,
    expected_tokens,
    our_segments,
    result,
    said,
    special_names,
    system,
    text,
    thought,
    user,
)

from localmistral.chatformat.families import (
    CONTROL_NAMES,
    FAMILIES,
    find_family,
    reasoning_instructions,
)
from localmistral.chatformat.formats import TemplateFormat, make_format
from localmistral.chatformat.messages import Message, ToolCall, parse_messages
from localmistral.chatformat.mistral_format import MistralFormat
from localmistral.chatformat.mistral_parser import MistralParser
from localmistral.chatformat.normalising import result_as_json, with_short_ids
from localmistral.chatformat.parser import TagParser
from localmistral.chatformat.rendering import PromptTokens
from localmistral.chatformat.segments import Segment
from localmistral.errors import TemplateError, UsageError


def vocabulary(name: str) -> dict[str, int]:
    return {token: i for i, token in enumerate(special_names(name))}


def tokens(control: Mapping[str, int]) -> PromptTokens:
    return PromptTokens(control=control, bos="<s>", eos="</s>", adds_bos=True)


V13_TEMPLATE = "{{ bos_token }}[INST]{{ messages[0].content }}[/INST][TOOL_CALLS]x[ARGS]"
# Mistral's SentencePiece vocabulary of v3: the same names at other ids.
_SENTENCEPIECE = (
    "<unk> <s> </s> [INST] [/INST] [TOOL_CALLS] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] "
    "[TOOL_RESULTS] [/TOOL_RESULTS]"
)
SENTENCEPIECE = {name: i for i, name in enumerate(_SENTENCEPIECE.split())}
LLAMA = {"<|begin_of_text|>": 128000, "<|eot_id|>": 128009, "<|start_header_id|>": 128006}
CHATML = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
# Mistral Nemo's own file: no system tokens, and <pad> and [PREFIX] where v7 has others.
NEMO = {
    token: i
    for token, i in vocabulary("v3-tekken").items()
    if "SYSTEM" not in token and token not in ("[TOOL_CONTENT]", "[IMG]", "<pad>", "[PREFIX]")
} | {"<pad>": 10, "[PREFIX]": 11}


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_shipped_templates_are_what_the_generator_makes(family: str) -> None:
    assert FAMILIES[family].source == make_template(family)


def test_every_generated_family_is_known_and_checked_by_the_script(tmp_path: Path) -> None:
    assert tuple(GENERATED) == tuple(FAMILIES) == FAMILY_NAMES
    script = Path(__file__).parent.parent / "scripts" / "make_templates.py"
    done = subprocess.run(
        [sys.executable, str(script), "--check"], capture_output=True, text=True, cwd=tmp_path
    )
    assert (done.returncode, done.stdout) == (0, "6 templates, changed: none\n")


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_catalogues_word_counts_first(family: str) -> None:
    found = find_family(vocabulary("v15"), family)
    assert found is FAMILIES[family]


def test_the_catalogues_word_does_not_count_for_a_file_that_lacks_the_tokens() -> None:
    assert find_family(vocabulary("v7"), "v15") is FAMILIES["v7"]
    assert find_family(LLAMA, "v15") is None
    assert find_family(vocabulary("v11"), "v99") is FAMILIES["v11"]


@pytest.mark.parametrize(
    ("control", "embedded", "family"),
    [
        (vocabulary("v15"), None, "v15"),
        (vocabulary("v13-reasoning"), None, "v13"),
        (vocabulary("v11"), None, "v11"),
        (vocabulary("v7"), None, "v7"),
        (NEMO, None, "v3-tekken"),
        # The template in the file settles what the vocabulary leaves open.
        (vocabulary("v13-reasoning"), "[INST] First draft your thinking process", "v13-reasoning"),
        (vocabulary("v13-reasoning"), "[INST]", "v13"),
        (vocabulary("v13"), V13_TEMPLATE, "v13"),
        (vocabulary("v11"), V13_TEMPLATE + "[CALL_ID]", "v11"),
        (vocabulary("v13-reasoning"), V13_TEMPLATE, "v13"),
        (vocabulary("v13-reasoning"), V13_TEMPLATE + "[CALL_ID]", "v11"),
        (vocabulary("v13-reasoning"), "[INST][TOOL_CALLS][", "v7"),
        (vocabulary("v11"), "[INST][TOOL_CALLS][", "v7"),
        (vocabulary("v11"), "[INST]", "v11"),
        (vocabulary("v15"), "[INST]", "v15"),
        (vocabulary("v7"), V13_TEMPLATE, "v3-tekken"),
        (vocabulary("v7"), V13_TEMPLATE + "[SYSTEM_PROMPT]", "v7"),
        # Others.
        ({}, None, None),
        (SENTENCEPIECE, None, None),
        (SENTENCEPIECE, V13_TEMPLATE, None),
        (LLAMA, None, None),
        (CHATML, None, None),
        # A fine-tune of Mistral's to ChatML.
        (vocabulary("v15"), "<|im_start|>{{ messages[0].content }}<|im_end|>", None),
        # Names of new tokens at other ids are no sign of a newer family.
        (vocabulary("v7") | {"[MODEL_SETTINGS]": 90, "[THINK]": 91}, None, "v7"),
        (vocabulary("v15") | {"[TOOL_CALLS]": 500}, None, None),
    ],
)
def test_a_family_is_recognised_by_its_control_tokens(
    control: dict[str, int], embedded: str | None, family: str | None
) -> None:
    found = find_family(control, None, embedded)
    assert (found.name if found else None) == family


def test_a_placeholder_is_no_token() -> None:
    control = vocabulary("v15")
    for name in ("[MODEL_SETTINGS]", "[/MODEL_SETTINGS]"):
        control[f"<SPECIAL_{control.pop(name)}>"] = 36
    found = find_family(control, None)
    assert found is FAMILIES["v13"]


# The entry point.


def test_a_recognised_model_gets_its_familys_format() -> None:
    made = make_format(tokens(vocabulary("v15")), embedded="[INST] anything {% broken")
    assert isinstance(made, MistralFormat)
    assert (made.name, made.has_effort_switch, made.default_effort) == ("v15", True, "none")
    assert made.thinking_ids == (34, 35)
    assert isinstance(made.make_parser(tools=True, in_thinking=False), MistralParser)


@pytest.mark.parametrize(
    ("family", "switch", "effort", "thinking"),
    [
        ("v3-tekken", False, "none", None),
        ("v7", False, "none", None),
        ("v11", False, "none", None),
        ("v13", False, "none", None),
        ("v13-reasoning", True, "high", (34, 35)),
        ("v15", True, "none", (34, 35)),
    ],
)
def test_a_format_says_how_reasoning_is_switched(
    family: str, switch: bool, effort: str, thinking: tuple[int, int] | None
) -> None:
    made = chat_format(family)
    assert (made.has_effort_switch, made.default_effort) == (switch, effort)
    assert made.thinking_ids == thinking


def test_any_other_model_gets_the_template_in_its_file() -> None:
    made = make_format(tokens(CHATML), embedded="{{ messages[0].content }}{{ reasoning_effort }}")
    assert isinstance(made, TemplateFormat)
    assert (made.name, made.has_effort_switch, made.thinking_ids) == ("embedded", True, None)
    assert isinstance(made.make_parser(tools=False, in_thinking=False), TagParser)
    assert not make_format(tokens(CHATML)).has_effort_switch


def test_mistrals_control_tokens_are_read_by_id_under_any_template() -> None:
    made = make_format(tokens(SENTENCEPIECE), embedded="[INST]{{ messages[0].content }}[/INST]")
    assert made.name == "embedded"
    assert isinstance(made.make_parser(tools=True, in_thinking=False), MistralParser)


def test_the_user_chooses_a_family_the_embedded_template_or_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text("{{ messages[0].content }}!", encoding="utf-8")
    control, embedded = tokens(vocabulary("v15")), "[INST]{{ messages[0].content }}[/INST]"
    by_name = make_format(control, embedded=embedded, override="v11")
    assert (by_name.name, by_name.source) == ("v11", FAMILIES["v11"].source)
    own = make_format(control, embedded=embedded, catalogue_template="v15", override="embedded")
    assert (own.name, own.source) == ("embedded", embedded)
    mine = make_format(control, embedded=embedded, override=str(file))
    assert (mine.name, mine.source) == (str(file), "{{ messages[0].content }}!")


def test_an_unknown_template_is_refused_with_all_names() -> None:
    with pytest.raises(UsageError) as caught:
        make_format(tokens(CHATML), override="v16")
    assert "v16" in caught.value.message
    for name in ("embedded", *FAMILY_NAMES):
        assert name in caught.value.hint


def test_a_family_that_does_not_fit_the_vocabulary_is_refused() -> None:
    with pytest.raises(UsageError, match=r"v15 needs 4 control tokens.*\[THINK\]"):
        make_format(tokens(vocabulary("v13")), override="v15")


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"x" * 5_000_000, b"{% broken"])
def test_an_unusable_template_file_is_refused(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "bad.jinja"
    file.write_bytes(content)
    with pytest.raises(TemplateError):
        make_format(tokens(CHATML), override=str(file))


# Where an answer begins.


@pytest.mark.parametrize("family", ["v13-reasoning", "v15"])
def test_an_open_thinking_is_seen_and_its_text_is_not_taken_for_one(family: str) -> None:
    made = chat_format(family)

    def begins_in_thinking(*messages: Mapping[str, object], goes_on: bool = True) -> bool:
        return made.ends_in_thinking(
            our_segments(family, Conversation(messages, None, None, goes_on))
        )

    opened = [thought("[/THINK] so", closed=False)]
    assert begins_in_thinking(user("a"), said(opened))
    assert not begins_in_thinking(user("a"), said([thought("so")]))
    assert not begins_in_thinking(user("a"), said("[THINK]so"))
    assert not begins_in_thinking(user("[THINK]"), goes_on=False)
    assert not begins_in_thinking(user("a"), said("b", reasoning="c"), user("d"), goes_on=False)


# Models that reason by their system prompt.


def prompt(made: MistralFormat, messages: list[dict[str, object]], effort: str | None) -> str:
    return "".join(s.text for s in made.render(parse_messages(messages), effort=effort))


@pytest.mark.parametrize("model", ["ministral-3-14b-reasoning", "Magistral-Small-2509"])
def test_instructions_stay_with_effort_high_and_go_with_none(model: str) -> None:
    made = make_format(
        tokens(vocabulary("v15")), catalogue_template="v13-reasoning", model_name=model
    )
    assert isinstance(made, MistralFormat)
    instructions = reasoning_instructions(model)
    words = [part.text for part in instructions]
    shown = f"{words[0]}[THINK]{words[1]}[/THINK]{words[2]}"
    for effort in ("high", "low", "medium", "xhigh", "max", None):
        assert prompt(made, [user("a")], effort) == (
            f"<s>[SYSTEM_PROMPT]{shown}[/SYSTEM_PROMPT][INST]a[/INST]"
        )
        assert prompt(made, [system("Own."), user("a")], effort) == (
            f"<s>[SYSTEM_PROMPT]{shown}\n\nOwn.[/SYSTEM_PROMPT][INST]a[/INST]"
        )
    for effort in ("none", "minimal"):
        assert prompt(made, [system("Own."), user("a")], effort) == (
            "<s>[SYSTEM_PROMPT]Own.[/SYSTEM_PROMPT][INST]a[/INST]"
        )
        assert prompt(made, [user("a")], effort) == "<s>[INST]a[/INST]"


def test_instructions_of_the_user_replace_ours() -> None:
    own = system([*text("Think."), thought("so"), *text("Answer.")])
    for effort in ("none", "high"):
        conversation = Conversation([own, user("a")], effort=effort)
        shown = "".join(s.text for s in our_segments("v13-reasoning", conversation))
        assert (
            shown
            == "<s>[SYSTEM_PROMPT]Think.[THINK]so[/THINK]Answer.[/SYSTEM_PROMPT][INST]a[/INST]"
        )


def test_the_thinking_marks_in_the_instructions_are_control_tokens() -> None:
    segments = our_segments("v13-reasoning", Conversation([user("[THINK]")], effort="high"))
    control = [s.text for s in segments if s.control]
    assert control == [
        "<s>", "[SYSTEM_PROMPT]", "[THINK]", "[/THINK]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]",
    ]  # fmt: skip
    assert Segment(text="[THINK]") in segments


def test_the_instructions_are_the_models_own() -> None:
    ministral, magistral = reasoning_instructions("x"), reasoning_instructions("magistral-small")
    assert ministral[0].text.startswith("# HOW YOU SHOULD THINK AND ANSWER\n\nFirst draft")
    assert magistral[0].text.startswith("First draft your thinking process (inner monologue)")
    assert ministral[1].text.endswith("to generate the response to the user.")
    assert magistral[1].text.endswith("Use the same language as the input.")
    embedded = f"x {magistral[1].text} y"
    assert reasoning_instructions("unknown", embedded) == magistral


# Control text from outside, by segments: that the tokens are right is the oracle's word.


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_text_from_outside_never_becomes_a_control_token(family: str) -> None:
    def controls(word: str) -> list[str]:
        conversation = Conversation(
            [
                system(word),
                user(word),
                said(word, call(arguments={word: word}), reasoning=word),
                result(word),
                said(word),
                user(text(word, word)),
            ],
            [{"type": "function", "function": {"name": "f", "description": word}}],
        )
        return [s.text for s in our_segments(family, conversation) if s.control]

    assert controls(CONTROL_TEXT) == controls("harmless")
    for name in special_names(family)[:40]:
        assert controls(name) == controls("harmless")


def test_control_tokens_that_a_file_types_as_user_defined_are_as_safe() -> None:
    control = vocabulary("v15")
    made = make_format(
        PromptTokens(control=control, user_defined=("[THINK]", "[/THINK]"), bos="<s>", eos="</s>")
    )
    assert {"[THINK]", "[MODEL_SETTINGS]"} <= CONTROL_NAMES <= control.keys()
    messages = [user("[THINK]x[/THINK]"), said("[THINK]", reasoning="[/THINK]"), user("b")]
    segments = made.render(parse_messages(messages))
    assert [s.text for s in segments if s.control and "THINK" in s.text] == ["[THINK]", "[/THINK]"]
    plain = [s.text for s in segments if not s.control]
    assert not any("[THINK]" in piece or "[/THINK]" in piece for piece in plain)
    assert "".join(s.text for s in segments).count("[THINK]") == 3


# Call ids.


def conversation_with(*ids: str) -> tuple[Message, ...]:
    return tuple(
        message
        for id_ in ids
        for message in (
            Message(role="assistant", tool_calls=(ToolCall(id=id_, name="f", arguments={}),)),
            Message(role="tool", tool_call_id=id_),
        )
    )


def shortened(*ids: str) -> list[str]:
    messages = with_short_ids(conversation_with(*ids))
    for calling, answer in zip(messages[::2], messages[1::2], strict=True):
        assert calling.tool_calls[0].id == answer.tool_call_id
    return [message.tool_call_id for message in messages[1::2]]


def test_call_ids_become_nine_letters_or_digits_and_stay_apart() -> None:
    ids = ["call_1", "call_2", "call_1", "toolu_01A09q90qw90lq917835lq9", "x" * 500, "é", "null"]
    short = shortened(*ids)
    assert all(len(id_) == 9 and id_.isascii() and id_.isalnum() for id_ in short)
    assert short[0] == short[2]
    assert len(set(short)) == len(set(ids))


def test_valid_call_ids_are_kept_even_where_another_id_would_become_the_same() -> None:
    (taken,) = shortened("call_1")
    assert shortened("abcDEF123", "call_1") == ["abcDEF123", taken]
    first, second = shortened("call_1", taken)
    assert second == taken
    assert first != taken


def test_call_ids_do_not_change_as_the_conversation_grows() -> None:
    ids = [f"call_{i}" for i in range(200)]
    assert shortened(*ids)[:50] == shortened(*ids[:50])


@pytest.mark.parametrize("family", ["v3-tekken", "v7", "v11"])
def test_a_prompt_with_foreign_ids_is_the_one_with_their_short_forms(family: str) -> None:
    foreign = ["call_abc", "call_def"]
    messages = [user("a"), said(None, call(foreign[0]), call(foreign[1]))]
    messages += [result("1", foreign[0]), result("2", foreign[1])]
    segments = our_segments(family, Conversation(messages))
    short = shortened(*foreign)
    renamed = [user("a"), said(None, call(short[0]), call(short[1]))]
    renamed += [result("1", short[0]), result("2", short[1])]
    assert segments == our_segments(family, Conversation(renamed))
    assert expected_tokens(family, Conversation(renamed))


@pytest.mark.parametrize(
    ("content", "shown"),
    [
        ("", "{}"),
        ("plain", '"plain"'),
        ('{"b":1,"a":[1.50,"\\u00e9"]}', '{"b": 1, "a": [1.5, "é"]}'),
        ('"\\ud800"', '"\ufffd"'),
        ("[" * 100_000, '"' + "[" * 100_000 + '"'),
        ("9" * 5000, '"' + "9" * 5000 + '"'),
    ],
)
def test_a_result_is_shown_as_json(content: str, shown: str) -> None:
    assert result_as_json(content) == shown


def test_a_long_conversation_is_rendered() -> None:
    turns = [
        m for i in range(500) for m in (user(f"q{i}"), said(None, call()), result(), said("a"))
    ]
    for family in ("v3-tekken", "v15"):
        segments = our_segments(family, Conversation([*turns, user("last")]))
        assert sum(s.text == "[INST]" for s in segments) == 501
