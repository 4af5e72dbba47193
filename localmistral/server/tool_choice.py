"""The choice among tools, in the spellings of OpenAI's two APIs and of Mistral's.

Knows nothing of how a choice is kept.
"""

from collections.abc import Mapping
from typing import Any

from localmistral.errors import BadRequestError

_WORDS = {"any": "required"}
"""Mistral's word, and what OpenAI calls it."""
_MODES = ("auto", "required")
_RESERVED = (*_MODES, "none")


def read_tool_choice(choice: Any, tools: Any) -> tuple[Any, Any]:
    """`choice` and `tools` as `Chat.stream` takes them.

    OpenAI's "allowed_tools" leaves those it names. Errors: BadRequestError for a mode or a list
    that can't be read; a choice of one tool is checked where it is used.
    """
    if isinstance(choice, str):
        return _WORDS.get(choice, choice), tools
    if not isinstance(choice, Mapping):
        return choice, tools
    if choice.get("type") != "allowed_tools":
        return _read_named(choice, tools)
    mode, names = _read_allowed(choice.get("allowed_tools", choice))
    known = tools if isinstance(tools, list) else []
    left = [tool for tool in known if _name_of(tool) in names]
    if len(left) < len(names):
        raise BadRequestError(
            f"tool_choice allows {len(names)} tools, {len(left)} of them are declared.",
            param="tool_choice",
        )
    return mode, left


def _read_named(choice: Mapping[str, Any], tools: Any) -> tuple[Any, Any]:
    """The tool that is named; one whose name is a mode's is all that is left, and required."""
    name = _name_of(choice)
    known = tools if isinstance(tools, list) else []
    left = [tool for tool in known if _name_of(tool) == name]
    return ("required", left) if left and name in _RESERVED else (choice, tools)


def _read_allowed(given: Any) -> tuple[str, set[str]]:
    """Mode and names."""
    given = given if isinstance(given, Mapping) else {}
    mode, tools = given.get("mode"), given.get("tools")
    names = {_name_of(tool) for tool in tools} if isinstance(tools, list) else {""}
    if mode not in _MODES or "" in names:
        raise BadRequestError(
            "tool_choice of the type allowed_tools needs a mode, auto or required, and tools.",
            param="tool_choice",
        )
    return mode, names


def _name_of(tool: Any) -> str:
    """Where a tool says it in either API; empty where it doesn't."""
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    return name if isinstance(name, str) else ""
