"""Anthropic's content blocks as OpenAI-style messages, which the one parser then checks.

Remembers where each piece stood in the body that came, so that what the parser objects to is named
as the client wrote it. Knows nothing of requests' other fields or of responses.
"""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from localmistral.errors import BadRequestError

Content = str | Sequence[Mapping[str, Any]]

_BILLING = "x-anthropic-billing-header:"
"""Claude Code's first system block is a line of accounting with another value in every request. It
says nothing to a model, and at the head of the prompt it would leave no prefix to reuse."""
_PLACE = re.compile(r"messages\[(\d+)\](?:\.(content|tool_calls)\[(\d+)\])?(.*)")
_FIELDS = {
    ".tool_call_id": ".tool_use_id",
    ".function.name": ".name",
    ".function.arguments": ".input",
    ".function.parameters": ".input_schema",
    ".function.description": ".description",
}
"""OpenAI's names of fields in an error's place, and Anthropic's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A message in OpenAI's form. `place` says where it stood in the request, `parts` where the
    parts of its content did, and `calls` its calls."""

    message: dict[str, Any]
    place: str
    parts: tuple[str, ...] = ()
    calls: tuple[str, ...] = ()


def read_system(content: Content, where: str) -> list[Turn]:
    """One system message, or none where nothing is said. Errors: BadRequestError."""
    if isinstance(content, str):
        texts = [content]
    else:
        texts = [_read_text(block, f"{where}[{i}]") for i, block in enumerate(content)]
    said = [text for text in map(_strip_billing, texts) if text]
    message = {"role": "system", "content": "\n\n".join(said)}
    return [Turn(message=message, place=where)] if said else []


def _strip_billing(text: str) -> str:
    return text.partition("\n")[2] if text.startswith(_BILLING) else text


def read_user(content: Content, where: str) -> list[Turn]:
    """Results of tools become messages of their own, the rest one user message after them."""
    place = f"{where}.content"
    if isinstance(content, str):
        return [Turn(message={"role": "user", "content": content}, place=where)]
    results: list[Turn] = []
    parts: dict[str, Mapping[str, Any]] = {}
    for i, block in enumerate(content):
        inner = f"{place}[{i}]"
        if block.get("type") == "tool_result":
            results.append(Turn(message=_read_result(block, inner), place=inner))
        elif block.get("type") in _DOCUMENTS:
            parts[inner] = {"type": "text", "text": _read_text(block, inner)}
        else:
            parts[inner] = block
    if not (results or parts):
        raise BadRequestError(f"{place} is empty.", param=place)
    message = {"role": "user", "content": list(parts.values())}
    own = [Turn(message=message, place=where, parts=tuple(parts))] if parts else []
    return [*results, *own]


def _read_result(block: Mapping[str, Any], where: str) -> dict[str, Any]:
    content = block.get("content")
    text = "" if content is None else _read_texts(content, f"{where}.content")
    if block.get("is_error"):
        text = f"Error: {text}"
    return {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": text}


def _read_texts(content: Any, where: str) -> str:
    """A text, or blocks that come down to one."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadRequestError(f"{where} must be text or a list of blocks.", param=where)
    return "\n".join(_read_text(block, f"{where}[{i}]") for i, block in enumerate(content))


def _read_text(block: Any, where: str) -> str:
    kind = block.get("type") if isinstance(block, Mapping) else None
    if kind == "text" and isinstance(block.get("text"), str):
        return str(block["text"])
    if kind == "document":
        return _join(block, ("title", "context"), _read_source(block.get("source"), where))
    if kind == "search_result":
        text = _read_texts(block.get("content"), f"{where}.content")
        return _join(block, ("title", "source"), text)
    if kind == "image":
        raise BadRequestError(
            f"{where} is an image, which this model can't read.", "Send text only.", param=where
        )
    raise BadRequestError(f"{where} must be a text block.", param=where)


_DOCUMENTS = ("document", "search_result")


def _join(block: Mapping[str, Any], names: Sequence[str], text: str) -> str:
    """What heads a document, a line each, then its text."""
    heads = [block[name] for name in names if isinstance(block.get(name), str)]
    return "\n".join([*heads, text])


def _read_source(source: Any, where: str) -> str:
    source = source if isinstance(source, Mapping) else {}
    if source.get("type") == "text" and isinstance(source.get("data"), str):
        return str(source["data"])
    if source.get("type") == "content":
        return _read_texts(source.get("content"), f"{where}.source.content")
    raise BadRequestError(
        f"{where} is a document that isn't plain text.", "Send its text.", param=where
    )


def read_assistant(content: Content, where: str) -> list[Turn]:
    """One assistant message: thinking, text and calls."""
    if isinstance(content, str):
        return [Turn(message={"role": "assistant", "content": content}, place=where)]
    parts: dict[str, Mapping[str, Any]] = {}
    calls: dict[str, dict[str, Any]] = {}
    for i, block in enumerate(content):
        kind, inner = block.get("type"), f"{where}.content[{i}]"
        if kind == "tool_use":
            calls[inner] = _read_call(block, inner)
        elif kind == "thinking":
            parts[inner] = {"type": "thinking", "thinking": block.get("thinking")}
        elif kind != "redacted_thinking":  # which nobody but its author can read
            parts[inner] = block
    message: dict[str, Any] = {"role": "assistant", "content": list(parts.values())}
    if calls:
        message["tool_calls"] = list(calls.values())
    return [Turn(message=message, place=where, parts=tuple(parts), calls=tuple(calls))]


def _read_call(block: Mapping[str, Any], where: str) -> dict[str, Any]:
    arguments = block.get("input")
    if not isinstance(arguments, Mapping):
        raise BadRequestError(f"{where}.input must be an object.", param=f"{where}.input")
    function = {"name": block.get("name"), "arguments": json.dumps(arguments)}
    return {"id": block.get("id"), "type": "function", "function": function}


@contextlib.contextmanager
def named_as_sent(turns: Sequence[Turn]) -> Iterator[None]:
    """What is wrong with a message or a tool is named by its place in Anthropic's request."""
    try:
        yield
    except BadRequestError as error:
        place = _find_place(error.param, turns)
        if place == error.param:
            raise
        message = error.message.replace(error.param, place)
        raise type(error)(message, error.hint, param=place) from error


def _find_place(param: str, turns: Sequence[Turn]) -> str:
    found = _PLACE.fullmatch(param)
    head, rest = "", param
    if found and int(found[1]) < len(turns):
        turn = turns[int(found[1])]
        inner = turn.parts if found[2] == "content" else turn.calls
        head, rest = turn.place, found[4]
        if found[2] and int(found[3]) < len(inner):
            head = inner[int(found[3])]
    for name, own in _FIELDS.items():
        rest = rest.replace(name, own)
    return head + rest
