"""The grammar of tool calls, in the syntax that the model's own family writes: calls alone, or
calls that may follow a text or stand in its place.

Written in llguidance's Lark, where `<[9]>` is the control token with id 9. Knows nothing of how a
grammar is compiled, and takes the forms of arguments as they are: they are checked elsewhere.
"""

import json
from collections.abc import Mapping, Sequence

from localmistral.chatformat.messages import Tool

_Names = Sequence[tuple[int, str]]
_CALL_ID = "/[a-zA-Z0-9]{9}/"
_TAGS = ("<tool_call>", "</tool_call>")
_TEXT = "TEXT: /(?s:.*)/"


def write_call_grammar(
    control: Mapping[str, int], tools: Sequence[Tool], forms: Sequence[str], *, several: bool
) -> str:
    """One call of any of `tools`, or `several` in a row.

    `control` maps the vocabulary's control tokens to ids; without [TOOL_CALLS] the calls are
    written between `<tool_call>` tags. `forms` are what the tools' arguments look like, in Lark.
    """
    return _join(["start: calls", *_write_calls(control, tools, forms, several=several)])


def write_optional_calls(
    control: Mapping[str, int], tools: Sequence[Tool], forms: Sequence[str], answer: str | None
) -> str:
    """An answer of the form `answer` (in Lark), or calls; None: any text, and then perhaps calls.

    The other arguments are those of `write_call_grammar`.
    """
    if answer is not None:
        calls = _write_calls(control, tools, forms, several=True)
        return _join(["start: answer | calls", f"answer: {answer}", *calls])
    if "[TOOL_CALLS]" in control or _TAGS[0] in control:
        calls = _write_calls(control, tools, forms, several=True)
        return _join(["start: TEXT calls?", _TEXT, *calls])
    # the tag is text too, so it belongs to the text before it, which ends where the tag does
    calls = _write_calls(control, tools, forms, several=False, opening="begun")
    begun = f"begun[lazy]: /(?s:.*){_TAGS[0]}/"
    return _join(["start: calls* TEXT", _TEXT, begun, *calls])


def _join(rules: Sequence[str]) -> str:
    return "\n".join(rules) + "\n"


def _write_calls(
    control: Mapping[str, int],
    tools: Sequence[Tool],
    forms: Sequence[str],
    *,
    several: bool,
    opening: str = "",
) -> list[str]:
    """Rules, from `calls` on; `opening` stands for the opening tag, where there is one."""
    arguments = [f"args{n}: {form}" for n, form in enumerate(forms)]
    names = [(n, tool.name) for n, tool in enumerate(tools)]
    if "[TOOL_CALLS]" not in control:
        rules = _write_tagged(control, names, several=several, opening=opening)
    elif "[ARGS]" in control:
        rules = _write_named(control, tools, several=several)
    else:
        rules = _write_list(control, names, several=several)
    return [*rules, *arguments]


def _write_named(control: Mapping[str, int], tools: Sequence[Tool], *, several: bool) -> list[str]:
    """`[TOOL_CALLS]name[ARGS]{...}`, with `[CALL_ID]id` before [ARGS] where there is one."""
    call_id = f"<[{control['[CALL_ID]']}]> {_CALL_ID} " if _has_call_ids(control) else ""
    calls = [
        f"{_quote(tool.name)} {call_id}<[{control['[ARGS]']}]> args{n}"
        for n, tool in enumerate(tools)
    ]
    start = "calls: call+" if several else "calls: call"
    return [start, f"call: <[{control['[TOOL_CALLS]']}]> ({' | '.join(calls)})"]


def _has_call_ids(control: Mapping[str, int]) -> bool:
    """Version 11 alone: later vocabularies keep the token, but their models don't write it."""
    return "[CALL_ID]" in control and "[THINK]" not in control


def _write_list(control: Mapping[str, int], names: _Names, *, several: bool) -> list[str]:
    """`[TOOL_CALLS][{"name": ..., "arguments": {...}, "id": "..."}]`."""
    before_id, after_id = _quote(', "id": "'), _quote('"}')
    calls = [f"{_write_object(name, n)} {before_id} {_CALL_ID} {after_id}" for n, name in names]
    more = ' (", " call)*' if several else ""
    start = f'calls: <[{control["[TOOL_CALLS]"]}]> "[" call{more} "]"'
    return [start, f"call: {' | '.join(calls)}"]


def _write_tagged(
    control: Mapping[str, int], names: _Names, *, several: bool, opening: str = ""
) -> list[str]:
    """`<tool_call>`, a line with `{"name": ..., "arguments": {...}}`, `</tool_call>`."""
    first, closing = (f"<[{control[tag]}]>" if tag in control else _quote(tag) for tag in _TAGS)
    end = _quote("}\n")
    calls = " | ".join(f"{_write_object(name, n)} {end}" for n, name in names)
    more = ' ("\\n" call)*' if several else ""
    return [f"calls: call{more}", f'call: {opening or first} "\\n" ({calls}) {closing}']


def _write_object(name: str, number: int) -> str:
    """A call as a JSON object, up to its arguments."""
    beginning = f'{{"name": {json.dumps(name)}, "arguments": '
    return f"{_quote(beginning)} args{number}"


def _quote(text: str) -> str:
    """A string of the grammar language: JSON's escapes are its own."""
    return json.dumps(text, ensure_ascii=False)
