"""Conversations, vocabularies and a plain Jinja rendering that the chat format's tests share."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import loopcontrols

from localmistral.chatformat.dialect import forms, lay_out_tools
from localmistral.chatformat.families import FAMILIES
from localmistral.chatformat.messages import Message, Tool, ToolCall
from localmistral.chatformat.template import CHATML, ChatTemplate

FOLDER = Path(__file__).parent / "templates"
NOW = datetime(2026, 3, 14, 15, 9, 26)

SMOLLM = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SOURCES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.jinja"))}
SOURCES |= {"chatml": CHATML, "smollm": SMOLLM}
SOURCES |= {f"mistral_{name}": family.source for name, family in FAMILIES.items()}
REAL_STYLES = tuple(name for name in SOURCES if name != "mangled")

_CONTROL = """
<s> </s> <unk> <pad> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS]
[/TOOL_RESULTS] [TOOL_CALLS] [SYSTEM_PROMPT] [/SYSTEM_PROMPT] [TOOL_CONTENT] [ARGS] [CALL_ID]
[THINK] [/THINK] [MODEL_SETTINGS] [/MODEL_SETTINGS] <|im_start|> <|im_end|> <|endoftext|>
<|start_header_id|> <|end_header_id|> <|eot_id|> <start_of_turn> <end_of_turn> <|start|>
<|message|> <|channel|> <|end|> <|system|> <|user|> <|assistant|> <|tool|> <image>
<\uff5cend\u2581of\u2581text\uff5c>
"""
_MARKUP = "<think> </think> <tool_call> </tool_call> <tool_response> </tool_response> <b>"
CONTROL = _CONTROL.split()
USER_DEFINED = [*_MARKUP.split(), "\n\n", "   "]


@cache
def template(name: str) -> ChatTemplate:
    """One of the templates, with a vocabulary that has the control tokens of all of them."""
    return ChatTemplate(
        SOURCES[name],
        bos_token="<s>",
        eos_token="</s>",
        control_tokens=CONTROL,
        user_defined_tokens=USER_DEFINED,
        clock=lambda: NOW,
    )


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


class RefusedError(Exception):
    """What the plain rendering raises for `raise_exception`."""


def _raise(message: str) -> None:
    raise RefusedError(message)


def plain_rendering(
    name: str,
    messages: Sequence[Message],
    tools: Sequence[Tool] = (),
    settings: Mapping[str, Any] | None = None,
) -> str:
    """The same conversation rendered by Jinja as it comes, without sandbox and stand-ins."""
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(
        raise_exception=_raise, strftime_now=NOW.strftime, bos_token="<s>", eos_token="</s>"
    )
    source = SOURCES[name].replace("{% generation %}", "").replace("{% endgeneration %}", "")
    compiled = environment.from_string(source)
    dialect = template(name).dialect
    adapted, shown = dialect.adapt(messages, tools)
    for form in forms(adapted):
        variables = {"add_generation_prompt": True, **(settings or {})}
        laid = dialect.lay_out(form, lambda value: value)
        laid_tools = lay_out_tools(shown, lambda value: value) or None
        try:
            return compiled.render(messages=laid, tools=laid_tools, **variables)
        except RefusedError:
            continue
    raise RefusedError(name)


WEATHER = Tool(
    name="get_weather",
    description="The weather now",
    parameters={
        "type": "object",
        "properties": {
            "city": {"type": "string", "description": "Where"},
            "unit": {"enum": ["celsius", "fahrenheit"]},
            "days": {"type": "array", "items": {"type": "integer"}},
        },
        "required": ["city"],
    },
)


def user(text: str) -> Message:
    return Message(role="user", content=text)


def assistant(text: str, **more: Any) -> Message:
    return Message(role="assistant", content=text, **more)


CALL = ToolCall(id="abcdef123", name="get_weather", arguments={"city": "Zürich", "days": [1, 2]})
RESULT = Message(role="tool", content='{"t": 21}', name="get_weather", tool_call_id="abcdef123")
SYSTEM = Message(role="system", content="Be brief.\nAlways.")
CONVERSATIONS: dict[str, tuple[Message, ...]] = {
    "question": (user("What is 1 < 2 & \"3\" > 'a'?"),),
    "system": (SYSTEM, user("  Hello,\n\nworld! ")),
    "turns": (
        SYSTEM,
        user("Grüße 🙂"),
        assistant("Hi."),
        user("日本語"),
        assistant("はい"),
        user("a"),
    ),
    "thinking": (user("1+1"), assistant("2", reasoning="One and\none."), user("and 2+2?")),
    "call": (user("Weather?"), assistant("", tool_calls=(CALL,)), RESULT),
    "answered": (
        user("Weather?"),
        assistant("Let me look.", tool_calls=(CALL,)),
        RESULT,
        assistant("21 degrees."),
        user("Thanks"),
    ),
    "same role twice": (user("a"), user("b"), assistant("c"), assistant("d"), user("e")),
    "late system": (user("a"), assistant("b"), SYSTEM, user("c")),
}
