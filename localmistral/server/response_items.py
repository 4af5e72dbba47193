"""Items of /v1/responses as messages, and where in a request each part of a message stood.

What an assistant thought, said and called side by side becomes one message, so an item's place
among the messages isn't its own. Knows nothing of answers, and leaves checking to the one parser.
"""

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from localmistral.errors import BadRequestError

Item = Mapping[str, Any]
REFERENCE = "item_reference"
_PLACE = re.compile(r"messages\[(\d+)\](.*)")
_SEAL = "localmistral:"
_CALL_FIELDS = re.compile(r"^\.(function\.)?")


@dataclass(slots=True)
class Conversation:
    """Messages made of items. `sources[k]` maps what is inside of message k to its item."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    sources: list[dict[str, str]] = field(default_factory=list)

    def add(self, message: dict[str, Any], **sources: str) -> None:
        self.messages.append(message)
        self.sources.append(sources)

    def open_assistant(self, where: str) -> dict[str, Any]:
        """The assistant's message that is being added to."""
        if not self.messages or self.messages[-1]["role"] != "assistant":
            self.add({"role": "assistant", "content": []}, whole=where)
        return self.messages[-1]

    def locate(self, error: BadRequestError) -> BadRequestError:
        """The same error with the client's own place in its words and as its `param`."""
        if not error.param.startswith("messages"):
            return error
        place = self._find(error.param)
        message = error.message
        if message.startswith(error.param):
            message = place + message.removeprefix(error.param)
        return type(error)(message, error.hint, param=place)

    def _find(self, param: str) -> str:
        found = _PLACE.fullmatch(param)
        if found is None or int(found[1]) >= len(self.sources):
            return "input"
        sources, rest = self.sources[int(found[1])], found[2]
        for inner in sorted(sources, key=len, reverse=True):
            tail = rest.removeprefix(f".{inner}")
            if tail != rest and tail[:1] in ("", ".", "["):
                return sources[inner] + (_CALL_FIELDS.sub(".", tail) if tail else "")
        return sources["whole"]


def read_items(items: Sequence[Item], places: Sequence[str]) -> Conversation:
    """`items` as messages; `places` are the names of each item for errors. An item that is no
    function call, output, message or thinking is refused. A call that was cut off is left out: its
    arguments are no JSON, and nobody ran it.
    """
    conversation = Conversation()
    for item, where in zip(items, places, strict=True):
        kind = _name_kind(item)
        if kind == "message":
            _add_message(conversation, item, where)
        elif kind == "function_call":
            if item.get("status") != "incomplete":
                _add_call(conversation, item, where)
        elif kind == "function_call_output":
            message = _read_result(item, where)
            conversation.add(
                message,
                whole=where, tool_call_id=f"{where}.call_id", content=f"{where}.output",
            )  # fmt: skip
        elif kind == "reasoning":
            message = conversation.open_assistant(where)
            message["reasoning_content"] = message.get("reasoning_content", "") + _thought(item)
            conversation.sources[-1].setdefault("reasoning_content", where)
        else:
            raise BadRequestError(
                f"{where}.type is {str(kind)[:40]!r}, which this server doesn't know.",
                param=f"{where}.type",
            )
    return conversation


def _name_kind(item: Item) -> Any:
    if item.get("type") is not None:
        return item["type"]
    return "message" if "role" in item else None


def is_reference(item: Item) -> bool:
    """Whether it stands for an item of an earlier response; its type may be left out."""
    kind = _name_kind(item)
    return kind == REFERENCE or (kind is None and set(item) - {"type"} == {"id"})


def _add_message(conversation: Conversation, item: Item, where: str) -> None:
    content = item.get("content")
    if item.get("role") != "assistant":
        conversation.add({"role": item.get("role"), "content": content}, whole=where)
        # whatever stands inside of it has the same name there
        conversation.sources[-1] |= {n: f"{where}.{n}" for n in ("role", "content", "name")}
        return
    is_text = isinstance(content, str)
    parts = [{"type": "text", "text": content}] if is_text else content
    if not isinstance(parts, list):
        raise BadRequestError(
            f"{where}.content must be a text or a list of parts.", param=f"{where}.content"
        )
    message = conversation.open_assistant(where)
    sources = conversation.sources[-1]
    for i, part in enumerate(parts):
        place = f"{where}.content" if is_text else f"{where}.content[{i}]"
        sources[f"content[{len(message['content'])}]"] = place
        message["content"] = [*message["content"], part]


def _add_call(conversation: Conversation, item: Item, where: str) -> None:
    calls = conversation.open_assistant(where).setdefault("tool_calls", [])
    conversation.sources[-1][f"tool_calls[{len(calls)}]"] = where
    function = {"name": item.get("name"), "arguments": item.get("arguments")}
    name = item.get("call_id") or item.get("id")
    calls.append({"id": name, "type": "function", "function": function})


def _read_result(item: Item, where: str) -> dict[str, Any]:
    output = item.get("output")
    if not isinstance(output, str | list):
        raise BadRequestError(
            f"{where}.output must be a text or a list of parts.", param=f"{where}.output"
        )
    return {"role": "tool", "tool_call_id": item.get("call_id"), "content": output}


def _thought(item: Item) -> str:
    """The text of a reasoning item; what stands for it where the text itself isn't given."""
    sealed = item.get("encrypted_content")
    for parts in (item.get("content"), unseal(sealed), item.get("summary")):
        text = _join_texts(parts)
        if text:
            return text
    return ""


def _join_texts(parts: Any) -> str:
    if not isinstance(parts, list):
        return parts if isinstance(parts, str) else ""
    texts = [part.get("text") for part in parts if isinstance(part, Mapping)]
    return "".join(text for text in texts if isinstance(text, str))


def seal(text: str) -> str:
    """Thinking in a form that clients hand back unread. Nothing is secret: the text is theirs."""
    return _SEAL + base64.b64encode(text.encode("utf-8", "replace")).decode("ascii")


def unseal(sealed: object) -> str:
    """What was sealed; empty for what another server sealed."""
    if not isinstance(sealed, str) or not sealed.startswith(_SEAL):
        return ""
    try:
        return base64.b64decode(sealed.removeprefix(_SEAL), validate=True).decode("utf-8")
    except (binascii.Error, ValueError):
        return ""
