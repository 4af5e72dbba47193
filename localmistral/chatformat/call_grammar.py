"""The grammar of a forced tool call, in the syntax that the model's own family writes.

Written in llguidance's Lark, where `<[9]>` is the control token with id 9. Knows nothing of how a
grammar is compiled, and takes the parameters' schemas as they are: they are checked elsewhere.
"""

import json
from collections.abc import Mapping, Sequence

from localmistral.chatformat.messages import Tool

_Names = Sequence[tuple[int, str]]
_CALL_ID = "/[a-zA-Z0-9]{9}/"


def write_call_grammar(
    control: Mapping[str, int], tools: Sequence[Tool], schemas: Sequence[str], *, several: bool
) -> str:
    """One call of any of `tools`, or `several` in a row.

    `control` maps the vocabulary's control tokens to ids; without [TOOL_CALLS] the calls are
    written between `<tool_call>` tags. `schemas` are those of the tools' parameters, as JSON.
    """
    arguments = [f"args{n}: %json {schema}" for n, schema in enumerate(schemas)]
    names = [(n, tool.name) for n, tool in enumerate(tools)]
    if "[TOOL_CALLS]" not in control:
        rules = _write_tagged(control, names, several=several)
    elif "[ARGS]" in control:
        rules = _write_named(control, tools, several=several)
    else:
        rules = _write_list(control, names, several=several)
    return "\n".join([*rules, *arguments]) + "\n"


def _write_named(control: Mapping[str, int], tools: Sequence[Tool], *, several: bool) -> list[str]:
    """`[TOOL_CALLS]name[ARGS]{...}`, with `[CALL_ID]id` before [ARGS] where there is one."""
    call_id = f"<[{control['[CALL_ID]']}]> {_CALL_ID} " if _has_call_ids(control) else ""
    calls = [
        f"{_quote(tool.name)} {call_id}<[{control['[ARGS]']}]> args{n}"
        for n, tool in enumerate(tools)
    ]
    start = "start: call+" if several else "start: call"
    return [start, f"call: <[{control['[TOOL_CALLS]']}]> ({' | '.join(calls)})"]


def _has_call_ids(control: Mapping[str, int]) -> bool:
    """Version 11 alone: later vocabularies keep the token, but their models don't write it."""
    return "[CALL_ID]" in control and "[THINK]" not in control


def _write_list(control: Mapping[str, int], names: _Names, *, several: bool) -> list[str]:
    """`[TOOL_CALLS][{"name": ..., "arguments": {...}, "id": "..."}]`."""
    before_id, after_id = _quote(', "id": "'), _quote('"}')
    calls = [f"{_write_object(name, n)} {before_id} {_CALL_ID} {after_id}" for n, name in names]
    more = ' (", " call)*' if several else ""
    start = f'start: <[{control["[TOOL_CALLS]"]}]> "[" call{more} "]"'
    return [start, f"call: {' | '.join(calls)}"]


def _write_tagged(control: Mapping[str, int], names: _Names, *, several: bool) -> list[str]:
    """`<tool_call>`, a line with `{"name": ..., "arguments": {...}}`, `</tool_call>`."""
    opening, closing = (
        f"<[{control[tag]}]>" if tag in control else _quote(tag)
        for tag in ("<tool_call>", "</tool_call>")
    )
    end = _quote("}\n")
    calls = " | ".join(f"{_write_object(name, n)} {end}" for n, name in names)
    more = ' ("\\n" call)*' if several else ""
    return [f"start: call{more}", f'call: {opening} "\\n" ({calls}) {closing}']


def _write_object(name: str, number: int) -> str:
    """A call as a JSON object, up to its arguments."""
    beginning = f'{{"name": {json.dumps(name)}, "arguments": '
    return f"{_quote(beginning)} args{number}"


def _quote(text: str) -> str:
    """A string of the grammar language: JSON's escapes are its own."""
    return json.dumps(text, ensure_ascii=False)
