"""Turns a model's output, as it streams, into reasoning, content and tool calls.

`TagParser` reads models that mark these with text: `<think>...</think>` at the start and
`<tool_call>{json}</tool_call>`. The result depends on the text alone, never on how it was cut into
pieces, and what looks like markup but isn't comes out as content, so nothing is lost.
Knows nothing of prompts or of how tokens are made.
"""

import json
import secrets
import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class ReasoningDelta:
    """More of the model's thinking."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ContentDelta:
    """More of the answer."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCallDelta:
    """More of tool call number `index`; the first one of a call has `id` and `name`.

    `arguments` is a piece of JSON text; the pieces of one call joined are a JSON object.
    """

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""


Delta = ReasoningDelta | ContentDelta | ToolCallDelta


class OutputParser(Protocol):
    """Reads one answer. `token_id` is the token that ended in `text`, which may be empty."""

    def feed(self, token_id: int, text: str, /) -> list[Delta]: ...

    def finish(self) -> list[Delta]:
        """What was held back, once the answer has ended."""
        ...


def new_call_id() -> str:
    """Nine letters or digits: the strictest form any chat template asks for."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


_THINK, _THINK_END = "<think>", "</think>"
_CALL, _CALL_END = "<tool_call>", "</tool_call>"


class TagParser:
    """The parser for text tags; for a model that writes none it passes everything through.

    `tools`: whether tools were declared; without any, `<tool_call>` is plain text.
    `in_thinking`: the prompt ended with an open thinking tag. Blanks around reasoning, after
    `</think>` and around tool calls are layout and left out.
    """

    def __init__(
        self,
        *,
        tools: bool = False,
        in_thinking: bool = False,
        new_id: Callable[[], str] = new_call_id,
    ) -> None:
        self._tools = tools
        self._new_id = new_id
        self._held = ""
        self._gap = ""  # blanks before a tool call, in case it is none
        self._judged = 0  # length of the held text in which no call can end
        self._calls = 0
        self._started = in_thinking  # past the place where a thinking tag may open
        self._trim = in_thinking  # blanks are left out until the next visible character
        self._read: Callable[[bool], bool] = self._thinking if in_thinking else self._start
        self._deltas: list[Delta] = []

    def feed(self, _token_id: int, text: str, /) -> list[Delta]:
        self._held += text
        return self._advance(final=False)

    def finish(self) -> list[Delta]:
        return self._advance(final=True)

    def _advance(self, *, final: bool) -> list[Delta]:
        """Run the reader of the current part until it wants more text."""
        self._deltas = []
        while self._read(final):
            pass
        return self._deltas

    # Readers: each takes what it can from the held text, and says whether to go on reading.

    def _start(self, final: bool) -> bool:
        """Before anything visible: thinking may open here, and only here."""
        visible = self._held.lstrip()
        for tag in (_THINK, _THINK_END):
            if visible.startswith(tag):
                self._held = visible.removeprefix(tag)
                self._trim = True
                self._read = self._thinking if tag == _THINK else self._content
                return True
        if not final and (_THINK.startswith(visible) or _THINK_END.startswith(visible)):
            return False
        self._read = self._content
        return True

    def _thinking(self, final: bool) -> bool:
        if self._trim:
            self._held = self._held.lstrip()
            # A model may repeat the tag that its prompt has opened already.
            if self._started and self._held.startswith(_THINK):
                self._started = False
                self._held = self._held.removeprefix(_THINK)
                return True
            if self._started and not final and _THINK.startswith(self._held):
                return False
        thought, found, rest = self._held.partition(_THINK_END)
        if found:
            self._say_thought(thought.rstrip())
            self._held, self._trim, self._read = rest, True, self._content
            return True
        ready = len(self._held) if final else _safe_length(self._held, _THINK_END)
        self._say_thought(self._held[:ready])
        self._held = self._held[ready:]
        return False

    def _content(self, final: bool) -> bool:
        if self._trim:
            self._held = self._held.lstrip()
        if not self._tools:
            self._say(self._held)
            self._held = ""
            return False
        text, found, rest = self._held.partition(_CALL)
        if found:
            self._say(text.rstrip())
            self._gap = text[len(text.rstrip()) :]
            self._held, self._judged, self._read = rest, 0, self._call
            return True
        ready = len(self._held) if final else _safe_length(self._held, _CALL)
        self._say(self._held[:ready])
        self._held = self._held[ready:]
        return False

    def _call(self, final: bool) -> bool:
        while (end := self._held.find(_CALL_END, self._judged)) >= 0:
            if self._say_call(self._held[:end]):
                self._held, self._trim = self._held[end + len(_CALL_END) :], True
                self._read = self._content
                return True
            if not _is_inside_string(self._held[:end]):
                return self._no_call()
            self._judged = end + 1
        if not final:
            self._judged = max(self._judged, len(self._held) - len(_CALL_END))
            return False
        if self._say_call(self._held):
            self._held = ""
            return False
        return self._no_call()

    # What comes out.

    def _no_call(self) -> bool:
        """Give the opening tag back as content, and read on behind it."""
        self._say(self._gap + _CALL)
        self._read = self._content
        return True

    def _say(self, text: str) -> None:
        if text:
            self._trim = False
            self._deltas.append(ContentDelta(text=text))

    def _say_thought(self, text: str) -> None:
        if text:
            self._trim = False
            self._deltas.append(ReasoningDelta(text=text))

    def _say_call(self, body: str) -> bool:
        parsed = _parse_call(body)
        if parsed is None:
            return False
        name, arguments = parsed
        call = ToolCallDelta(index=self._calls, id=self._new_id(), name=name, arguments=arguments)
        self._deltas.append(call)
        self._calls += 1
        return True


def _safe_length(text: str, tag: str) -> int:
    """How much of `text` can't be the beginning of `tag`, or of blanks before it."""
    for size in range(min(len(tag) - 1, len(text)), 0, -1):
        if text.endswith(tag[:size]):
            text = text[:-size]
            break
    return len(text.rstrip())


def _parse_call(body: str) -> tuple[str, str] | None:
    """Name and arguments of a call's JSON text; None if it isn't one."""
    try:
        return read_call(json.loads(body, parse_constant=_refuse_constant))
    except (ValueError, RecursionError):
        return None


def read_call(call: Any) -> tuple[str, str] | None:
    """Name and arguments (as JSON text) of a call's JSON value; None if it isn't one."""
    if not isinstance(call, dict):
        return None
    name = call.get("name")
    arguments = call.get("arguments", call.get("parameters", {}))
    try:
        if isinstance(arguments, str):
            arguments = json.loads(arguments or "{}", parse_constant=_refuse_constant)
        if not isinstance(name, str) or not name or not isinstance(arguments, dict):
            return None
        return name, _dump(arguments)
    except (ValueError, RecursionError):
        return None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _dump(value: dict[str, Any]) -> str:
    """JSON with its own letters, unless it holds halves of surrogate pairs."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value)
    return text


def _is_inside_string(text: str) -> bool:
    """Whether JSON text ends within a string."""
    inside = escaped = False
    for c in text:
        if escaped:
            escaped = False
        elif inside and c == "\\":
            escaped = True
        elif c == '"':
            inside = not inside
    return inside
