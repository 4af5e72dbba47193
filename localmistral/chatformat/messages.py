"""Conversations: OpenAI-style messages and tools from JSON-like data to checked, frozen values.

Accepts the dialects in which clients send thinking back, and names the place of whatever is wrong
(`messages[2].content`). Knows nothing of templates, tokens or HTTP.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from localmistral.errors import BadRequestError

ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_DEPTH = 100  # of nested objects and lists in tool schemas and arguments
MAX_TOOLS = 1024
"""OpenAI takes 128, agents with many servers behind them declare some hundreds; rendering and
counting the tokens of ten thousand takes seconds before they turn out not to fit."""
MAX_TOOL_BYTES = 2 << 20
"""Of all tools as JSON: twice what a context of 256k tokens holds."""
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")  # Anthropic allows 128, OpenAI 64
_TEXT_PARTS = frozenset({"text", "input_text", "output_text"})
_REASONING_FIELDS = ("reasoning_content", "reasoning")
_IMAGE_PARTS = frozenset({"image", "image_url", "input_image"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A function the assistant called; `arguments` is the parsed JSON object."""

    id: str
    name: str
    arguments: Mapping[str, Any]

    @property
    def arguments_json(self) -> str:
        return json.dumps(self.arguments, ensure_ascii=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A piece of a message's content. `closed` false: thinking that was never ended."""

    text: str
    thinking: bool = False
    closed: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One message. `role` is system, user, assistant or tool (developer has become system).

    `content` and `reasoning` are all its text and all its thinking; `listed` keeps the parts in
    their order where a client sent a list, for formats to which that makes a difference.
    """

    role: str
    content: str = ""
    reasoning: str = ""
    listed: tuple[Part, ...] = field(default=(), compare=False)
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    name: str = ""

    @property
    def parts(self) -> tuple[Part, ...]:
        """What was said, in order: `listed` unless `content` or `reasoning` was replaced since."""
        text = "".join(part.text for part in self.listed if not part.thinking)
        thinking = "".join(part.text for part in self.listed if part.thinking)
        if self.listed and (text, thinking) == (self.content, self.reasoning):
            return self.listed
        thought = (Part(text=self.reasoning, thinking=True),) if self.reasoning else ()
        return (*thought, Part(text=self.content)) if self.content else thought

    @property
    def is_empty(self) -> bool:
        """Whether it has no text, no thinking (not even an empty thinking part) and no calls."""
        return not (self.tool_calls or any(part.text or part.thinking for part in self.parts))


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A function the assistant may call; `parameters` is its JSON schema, empty if none came."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    strict: bool = False


def parse_messages(raw: object) -> tuple[Message, ...]:
    """Check a `messages` field. Errors: BadRequestError whose `param` names the place.

    Unknown fields are ignored, null equals absent, halves of surrogate pairs become U+FFFD, and
    an assistant message without text, thinking and calls is dropped unless it is the last (which
    may be there to be continued).
    """
    if not isinstance(raw, list | tuple):
        raise _wrong("messages", f"must be a list of messages, not {_kind(raw)}")
    if not raw:
        raise _wrong("messages", "is empty: at least one message is needed")
    messages: list[Message] = []
    open_calls: list[str] = []
    for i, item in enumerate(raw):
        message = _parse_message(item, f"messages[{i}]", open_calls)
        if message.role == "assistant" and message.is_empty and i < len(raw) - 1:
            continue
        if message.role == "assistant":
            _open(message, messages, open_calls, f"messages[{i}].tool_calls")
        elif message.role == "user":
            open_calls.clear()
        messages.append(message)
    if all(message.role == "assistant" and message.is_empty for message in messages):
        raise _wrong("messages", "holds only empty assistant messages")
    return tuple(messages)


def without_empty_answers(messages: Iterable[Message]) -> tuple[Message, ...]:
    """The conversation without assistant messages that say nothing."""
    return tuple(m for m in messages if m.role != "assistant" or not m.is_empty)


def _open(message: Message, before: list[Message], open_calls: list[str], param: str) -> None:
    """Note the calls of an assistant message; one that follows another adds to its calls."""
    if not (before and before[-1].role == "assistant"):
        open_calls.clear()
    for i, call in enumerate(message.tool_calls):
        if call.id in open_calls:
            raise _wrong(f"{param}[{i}].id", f'repeats the id "{call.id[:60]}"')
        open_calls.append(call.id)


def parse_tools(raw: object) -> tuple[Tool, ...]:
    """Check a `tools` field (null or absent: none). Errors: BadRequestError naming the place."""
    if raw is None:
        return ()
    if not isinstance(raw, list | tuple):
        raise _wrong("tools", f"must be a list of tools, not {_kind(raw)}")
    _check_amount(raw)
    tools = tuple(_parse_tool(item, f"tools[{i}]") for i, item in enumerate(raw))
    seen: set[str] = set()
    for i, tool in enumerate(tools):
        if tool.name in seen:
            raise _wrong(f"tools[{i}].function.name", f'repeats the name "{tool.name}"')
        seen.add(tool.name)
    return tools


def _check_amount(tools: Sequence[object]) -> None:
    if len(tools) > MAX_TOOLS:
        raise _wrong("tools", f"has {len(tools)} tools, at most {MAX_TOOLS} are taken")
    try:
        size = len(json.dumps(tools))
    except (TypeError, ValueError, RecursionError):  # refused by its place, where it is read
        return
    if size > MAX_TOOL_BYTES:
        raise _wrong("tools", f"has {size:,} bytes, at most {MAX_TOOL_BYTES:,} are taken")


def _wrong(param: str, what: str, hint: str = "") -> BadRequestError:
    return BadRequestError(f"{param} {what}.", hint, param=param)


def _kind(value: object) -> str:
    """What JSON calls a value."""
    names = {
        type(None): "null",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "a list",
        tuple: "a list",
        dict: "an object",
    }
    return names.get(type(value), type(value).__name__)


def encodable(text: str) -> str:
    """The same text, with halves of surrogate pairs joined where both are there, else U+FFFD."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _string(value: object, param: str) -> str:
    if not isinstance(value, str):
        raise _wrong(param, f"must be a string, not {_kind(value)}")
    return encodable(value)


def _optional_string(item: Mapping[str, Any], key: str, param: str) -> str:
    value = item.get(key)
    return "" if value is None else _string(value, f"{param}.{key}")


def _object(value: object, param: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise _wrong(param, f"must be an object, not {_kind(value)}")
    return value


def _parse_message(raw: object, param: str, open_calls: list[str]) -> Message:
    item = _object(raw, param)
    role = item.get("role")
    if role is None:
        raise _wrong(f"{param}.role", "is missing")
    if not isinstance(role, str) or role not in ROLES:
        shown = json.dumps(role)[:60] if isinstance(role, str) else _kind(role)
        raise _wrong(f"{param}.role", f"is {shown}; it must be one of {', '.join(ROLES)}")
    if role == "assistant":
        return _parse_assistant(item, param, len(open_calls))
    role = "system" if role == "developer" else role
    parts = _parse_content(item.get("content"), f"{param}.content", role)
    name = _optional_string(item, "name", param)
    answered = ""
    if role == "tool":
        if name and not _NAME.fullmatch(name):
            raise _bad_name(f"{param}.name", name)
        answered = _answered(item, param, open_calls)
    return _message(role, parts, name=name, tool_call_id=answered)


def _message(role: str, parts: tuple[Part, ...], **more: Any) -> Message:
    return Message(
        role=role,
        content="".join(part.text for part in parts if not part.thinking),
        reasoning="".join(part.text for part in parts if part.thinking),
        listed=parts,
        **more,
    )


def _answered(item: Mapping[str, Any], param: str, open_calls: list[str]) -> str:
    """The id of the call that a tool message answers; without one, the oldest open call's."""
    given = _optional_string(item, "tool_call_id", param)
    if not open_calls:
        raise _wrong(param, "is a tool result without an assistant message that calls a tool")
    answered = given or open_calls[0]
    if answered not in open_calls:
        known = ", ".join(open_calls)[:200]
        raise _wrong(f"{param}.tool_call_id", f'is "{given[:60]}"; the open calls are {known}')
    open_calls.remove(answered)
    return answered


def _parse_assistant(item: Mapping[str, Any], param: str, open_calls: int) -> Message:
    parts = _parse_content(item.get("content"), f"{param}.content", "assistant")
    fields = [_optional_string(item, key, param) for key in _REASONING_FIELDS]
    given = [key for key in _REASONING_FIELDS if item.get(key) is not None]
    if given and not any(part.thinking for part in parts):
        thought = next(filter(None, fields), "")
        parts = (Part(text=thought, thinking=True), *parts)
    calls = _parse_calls(item.get("tool_calls"), f"{param}.tool_calls", open_calls)
    name = _optional_string(item, "name", param)
    return _message("assistant", parts, tool_calls=calls, name=name)


def _parse_content(raw: object, param: str, role: str) -> tuple[Part, ...]:
    """The parts of a content field; plain text is one part, and no part if it is empty."""
    if isinstance(raw, str):
        return (Part(text=encodable(raw)),) if raw else ()
    if raw is None:
        if role in ("assistant", "tool"):
            return ()
        raise _wrong(param, "is missing")
    if not isinstance(raw, list | tuple):
        raise _wrong(param, f"must be a string or a list of parts, not {_kind(raw)}")
    return tuple(_parse_part(part, f"{param}[{i}]", role) for i, part in enumerate(raw))


def _parse_part(raw: object, param: str, role: str) -> Part:
    part = _object(raw, param)
    kind = part.get("type")
    if isinstance(kind, str) and kind in _TEXT_PARTS:
        return Part(text=_string(part.get("text"), f"{param}.text"))
    if kind == "refusal" and role == "assistant":
        return Part(text=_string(part.get("refusal"), f"{param}.refusal"))
    if kind == "thinking" and role in ("assistant", "system"):
        text = _parse_thinking(part.get("thinking"), f"{param}.thinking")
        return Part(text=text, thinking=True, closed=part.get("closed") is not False)
    if isinstance(kind, str) and kind in _IMAGE_PARTS:
        raise _wrong(param, "is an image, which this model can't read", "Send text only.")
    shown = json.dumps(kind)[:60] if isinstance(kind, str) else _kind(kind)
    raise _wrong(f"{param}.type", f"is {shown}, which {role} content can't hold")


def _parse_thinking(raw: object, param: str) -> str:
    if isinstance(raw, str):
        return encodable(raw)
    if not isinstance(raw, list | tuple):
        raise _wrong(param, f"must be a string or a list of parts, not {_kind(raw)}")
    texts: list[str] = []
    for i, item in enumerate(raw):
        part = _object(item, f"{param}[{i}]")
        if part.get("type") != "text":
            raise _wrong(f"{param}[{i}].type", 'must be "text"')
        texts.append(_string(part.get("text"), f"{param}[{i}].text"))
    return "".join(texts)


def _parse_calls(raw: object, param: str, open_calls: int) -> tuple[ToolCall, ...]:
    """The calls of a message; those without an id are numbered after the calls still open."""
    if raw is None:
        return ()
    if not isinstance(raw, list | tuple):
        raise _wrong(param, f"must be a list of calls, not {_kind(raw)}")
    calls = tuple(_parse_call(item, f"{param}[{i}]", open_calls + i) for i, item in enumerate(raw))
    for i, call in enumerate(calls):
        if any(call.id == other.id for other in calls[:i]):
            raise _wrong(f"{param}[{i}].id", f'repeats the id "{call.id[:60]}"')
    return calls


def _parse_call(raw: object, param: str, index: int) -> ToolCall:
    item = _object(raw, param)
    _check_type(item, param)
    function = _object(item.get("function"), f"{param}.function")
    return ToolCall(
        id=_optional_string(item, "id", param) or f"call{index:05d}",
        name=_parse_name(function, f"{param}.function"),
        arguments=_parse_arguments(function.get("arguments"), f"{param}.function.arguments"),
    )


def _check_type(item: Mapping[str, Any], param: str) -> None:
    if item.get("type") not in (None, "function"):
        raise _wrong(f"{param}.type", 'must be "function"')


def _parse_name(function: Mapping[str, Any], param: str) -> str:
    name = _string(function.get("name"), f"{param}.name")
    if not _NAME.fullmatch(name):
        raise _bad_name(f"{param}.name", name)
    return name


def _bad_name(param: str, name: str) -> BadRequestError:
    what = f"is {json.dumps(name)[:80]}; 1 to 128 of letters, digits, _ . - are allowed"
    return _wrong(param, what)


def _parse_arguments(raw: object, param: str) -> Mapping[str, Any]:
    if raw is None or raw == "":
        return {}
    if isinstance(raw, str):
        try:
            raw = json.loads(raw, parse_constant=_refuse_constant)
        except RecursionError as error:
            raise _wrong(param, f"is nested more than {MAX_DEPTH} deep") from error
        except ValueError as error:
            raise _wrong(param, f"is not valid JSON ({error})") from error
    if not isinstance(raw, Mapping):
        raise _wrong(param, f"must be a JSON object, not {_kind(raw)}")
    return plain_json(raw, param)  # type: ignore[no-any-return]


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def plain_json(value: object, param: str, depth: int = 0) -> Any:
    """A copy made of JSON's own types, with encodable strings and bounded nesting."""
    if depth > MAX_DEPTH:
        raise _wrong(param, f"is nested more than {MAX_DEPTH} deep")
    if isinstance(value, str):
        return encodable(value)
    if isinstance(value, float) and not float("-inf") < value < float("inf"):
        raise _wrong(param, f"holds {value}, which is no JSON number")
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping):
        keys = (_string(key, param) for key in value)
        items = (plain_json(item, param, depth + 1) for item in value.values())
        return dict(zip(keys, items, strict=True))
    if isinstance(value, list | tuple):
        return [plain_json(item, param, depth + 1) for item in value]
    raise _wrong(param, f"holds a {_kind(value)}, which is no JSON value")


def _parse_tool(raw: object, param: str) -> Tool:
    item = _object(raw, param)
    _check_type(item, param)
    function = _object(item.get("function"), f"{param}.function")
    name = _parse_name(function, f"{param}.function")
    description = _optional_string(function, "description", f"{param}.function")
    strict = function.get("strict") is True
    schema = function.get("parameters")
    if schema is None:
        return Tool(name=name, description=description, strict=strict)
    where = f"{param}.function.parameters"
    parameters = plain_json(_object(schema, where), where)
    return Tool(name=name, description=description, parameters=parameters, strict=strict)
