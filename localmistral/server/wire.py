"""Items of an answer, what it has to look like, and errors, as JSON and back, exactly.

The two ends are one program: a command that asks, and the server it found running. What else they
have to agree on stands here too. Does no HTTP itself.
"""

import dataclasses
import hmac
from collections.abc import Mapping
from typing import Any

from localmistral import errors
from localmistral.answer import ChatResult
from localmistral.chatformat.parser import ContentDelta, Delta, ReasoningDelta, ToolCallDelta
from localmistral.engine import specs
from localmistral.errors import BadRequestError, LocalMistralError

PROOF_PATH = "/local/proof"
STREAM_PATH = "/local/stream"
CHALLENGE_HEADER = "x-localmistral-challenge"

Item = Delta | ChatResult

_ITEMS: dict[str, type[Item]] = {
    "reasoning": ReasoningDelta,
    "content": ContentDelta,
    "call": ToolCallDelta,
    "result": ChatResult,
}
_KINDS = {cls: kind for kind, cls in _ITEMS.items()}
_SPECS: dict[str, Any] = {
    cls.__name__: cls
    for cls in (
        specs.JsonSchema, specs.JsonObject, specs.Regex, specs.Lark, specs.Choice, specs.Gbnf,
    )
}  # fmt: skip


def prove(token: str, challenge: str) -> str:
    """What shows that a server knows `token`, without telling it to whoever took its port."""
    return hmac.new(token.encode(), challenge.encode(), "sha256").hexdigest()


def encode_item(item: Item) -> dict[str, Any]:
    """`{kind: fields}`."""
    return {_KINDS[type(item)]: dataclasses.asdict(item)}


def decode_item(data: Mapping[str, Any]) -> Item:
    """What `encode_item` encoded."""
    ((kind, fields),) = data.items()
    if kind == "result":
        calls = tuple(ToolCallDelta(**call) for call in fields["tool_calls"])
        return ChatResult(**{**fields, "tool_calls": calls})
    return _ITEMS[kind](**fields)


def encode_spec(spec: specs.Spec | None) -> dict[str, Any] | None:
    """`{class: fields}`; a schema in it stays the object it is, however deep."""
    if spec is None:
        return None
    fields = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}
    return {type(spec).__name__: fields}


def decode_spec(data: Mapping[str, Any] | None) -> specs.Spec | None:
    """What `encode_spec` encoded. Raises BadRequestError for anything else."""
    if data is None:
        return None
    try:
        ((name, fields),) = data.items()
        if "options" in fields:
            fields = {**fields, "options": tuple(map(str, fields["options"]))}
        spec: specs.Spec = _SPECS[name](**fields)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BadRequestError(
            "output is nothing an answer can look like.", param="output"
        ) from error
    return spec


def encode_error(error: LocalMistralError) -> dict[str, Any]:
    """Its class by name, and all it says."""
    return {
        "class": type(error).__name__,
        "message": error.message,
        "hint": error.hint,
        "param": error.param if isinstance(error, BadRequestError) else "",
    }


def decode_error(data: Mapping[str, Any]) -> LocalMistralError:
    """The error that `encode_error` encoded; another server's or layer's as a plain one."""
    cls = getattr(errors, str(data.get("class")), LocalMistralError)
    message, hint = str(data.get("message")), str(data.get("hint") or "")
    if isinstance(cls, type) and issubclass(cls, BadRequestError):
        return cls(message, hint, param=str(data.get("param") or ""))
    if isinstance(cls, type) and issubclass(cls, LocalMistralError):
        return cls(message, hint)
    return LocalMistralError(message, hint)
