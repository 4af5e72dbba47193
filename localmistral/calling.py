"""What tools and the choice among them make of the form of an answer.

A forced call leaves nothing but calls. Where the model may choose, it is held to a form only as
far as somebody relies on it: arguments of tools declared strict, and an answer of a given form
that calls may take the place of. Knows nothing of prompts, or of how a form is enforced.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from localmistral.chatformat.call_grammar import write_call_grammar, write_optional_calls
from localmistral.chatformat.messages import Tool
from localmistral.engine.constraints import Gbnf, JsonSchema, Lark, Spec, write_form
from localmistral.errors import BadRequestError

_ANY_ARGUMENTS = JsonSchema(schema={"type": "object"})


def read_tool_choice(choice: str | Mapping[str, Any] | None) -> str:
    """auto, none, required or a tool's name, out of OpenAI's forms of it; None is auto."""
    if isinstance(choice, Mapping):
        function = choice.get("function", choice)
        name = function.get("name") if isinstance(function, Mapping) else None
        choice = name if isinstance(name, str) else str(dict(choice))
    return "auto" if choice is None else str(choice)


def shape_answer(
    control: Mapping[str, int], tools: Sequence[Tool], choice: str, output: Spec | None
) -> Spec | None:
    """What the answer has to look like, given what its text alone has to (`output`).

    `control` maps the vocabulary's control tokens to ids; `choice` is auto, none, required or a
    tool's name. Errors: BadRequestError for a choice without its tool, for schemas beyond reason.
    """
    if choice == "none":
        return output
    if choice != "auto":
        return _force(control, _choose(tools, choice), several=choice == "required")
    is_held = output is not None or any(tool.strict for tool in tools)
    # a grammar of the client's own is the whole answer, calls or not
    if not tools or not is_held or isinstance(output, Gbnf | Lark):
        return output
    forms = [_write_arguments(tool) if tool.strict else _write(_ANY_ARGUMENTS) for tool in tools]
    answer = None if output is None else _write(output)
    lenient = isinstance(output, JsonSchema) and not output.strict
    return Lark(grammar=write_optional_calls(control, tools, forms, answer), lenient=lenient)


def _force(control: Mapping[str, int], tools: Sequence[Tool], *, several: bool) -> Spec:
    forms = [_write_arguments(tool) for tool in tools]
    grammar = write_call_grammar(control, tools, forms, several=several)
    return Lark(grammar=grammar, lenient=not any(tool.strict for tool in tools))


def _choose(tools: Sequence[Tool], choice: str) -> list[Tool]:
    allowed = [tool for tool in tools if choice in ("required", tool.name)]
    if allowed:
        return allowed
    names = ", ".join(tool.name for tool in tools)[:200] or "none"
    raise BadRequestError(
        f"tool_choice {choice[:64]!r} asks for a call, but the tools are: {names}.",
        "Declare the tool, or use auto.",
        param="tool_choice",
    )


def _write_arguments(tool: Tool) -> str:
    where = f"tools.{tool.name}.parameters"
    kind = tool.parameters.get("type", "object")
    if kind != "object" and not (isinstance(kind, list) and "object" in kind):
        raise BadRequestError(
            f"{where} has the type {str(kind)[:40]!r}, but arguments are always an object.",
            "Make the type object.",
            param=where,
        )
    # a schema that also allows other values, or says nothing of its type, would let them through
    return _write(JsonSchema(schema={**tool.parameters, "type": "object"}), where)


def _write(spec: Spec, param: str = "response_format") -> str:
    return write_form(spec, param).removeprefix("start: ")
