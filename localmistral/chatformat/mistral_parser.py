"""Reads what Mistral's models write, by token id: thinking, answer and tool calls.

    [THINK]thoughts[/THINK]answer[TOOL_CALLS]name[ARGS]{"a": 1}[TOOL_CALLS]...     v13, v15
    answer[TOOL_CALLS]name[CALL_ID]id[ARGS]{"a": 1}                                v11
    [TOOL_CALLS][{"name": "name", "arguments": {"a": 1}, "id": "id"}]              v3, v7

Control tokens count by their id and never show, whatever text comes with them; the same words
written as plain text are text. All text comes out exactly as written, so that an answer put back
into the history gives the same tokens again.
Knows nothing of prompts or of how tokens are made.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

from localmistral.chatformat.parser import (
    ContentDelta,
    Delta,
    ReasoningDelta,
    ToolCallDelta,
    new_call_id,
    read_call,
)

_ID = re.compile(r"[A-Za-z0-9]{9}")

# What the next text is: `call` right after [TOOL_CALLS], when it may be a name or a list.
State = Literal["answer", "thinking", "call", "name", "id", "arguments", "list"]


class MistralParser:
    """The parser of one answer.

    `control` maps the names of control tokens to ids. Thinking may begin anywhere, ends with
    [/THINK] or a call, and is all of the rest if it is never closed. A call's id and name come
    first, then its arguments as they are written; a list of calls is told when it is complete.
    `tools` false: the client declared none and can't run any, so a call comes out as content, its
    name and arguments as plain text. So does what is no call: a name without arguments, arguments
    without a name, a broken list.
    """

    def __init__(
        self,
        control: Mapping[str, int],
        *,
        tools: bool = False,
        in_thinking: bool = False,
        new_id: Callable[[], str] = new_call_id,
    ) -> None:
        self._control = {number: name for name, number in control.items()}
        self._tools = tools
        self._new_id = new_id
        self._state: State = "thinking" if in_thinking else "answer"
        self._deltas: list[Delta] = []
        self._held = ""  # the name or list being read; in an answer, blanks after a call
        self._id = ""
        self._json = JsonScan()
        self._has_arguments = False
        self._is_call = False  # whether arguments go to a call, not to the content
        self._ids: set[str] = set()
        self._calls = 0

    def feed(self, token_id: int, text: str, /) -> list[Delta]:
        """Take a token; `token_id` -1 is held text that belongs to no single token."""
        self._deltas = []
        control = self._control.get(token_id)
        if control is not None:
            # Held text may come along with a token that the engine doesn't know as control.
            if text != control and text.endswith(control):
                self._take(text.removesuffix(control))
            self._turn(control)
        elif text:
            self._take(text)
        return self._deltas

    def finish(self) -> list[Delta]:
        self._deltas = []
        self._end_call()
        return self._deltas

    def _turn(self, control: str) -> None:
        """What a control token changes; one that has no business where it stands is left out."""
        if control == "[THINK]":
            self._end_call()
            self._state = "thinking"
        elif control == "[/THINK]" and self._state == "thinking":
            self._state = "answer"
        elif control == "[TOOL_CALLS]":
            self._end_call()
            self._held, self._state = "", "call"
        elif control == "[CALL_ID]" and self._state == "name":
            self._state = "id"
        elif control == "[ARGS]" and self._state in ("call", "name", "id"):
            self._begin_arguments()

    def _take(self, text: str) -> None:
        if self._state == "thinking":
            self._deltas.append(ReasoningDelta(text=text))
        elif self._state == "answer":
            self._answer(text)
        elif self._state == "id":
            self._id += text
        elif self._state == "arguments":
            self._take_arguments(text)
        else:
            self._take_start(text)

    def _take_start(self, text: str) -> None:
        """The name of a call, or the list of calls that older models write."""
        self._held += text
        if self._state == "call" and (start := self._held.lstrip()):
            self._state = "list" if start[0] in "[{" else "name"
            self._json = JsonScan()
            text = self._held
        if self._state == "list":
            self._take_list(text)
        elif self._state == "name" and "{" in text:
            # No name has a brace: the model has left out [ARGS].
            name, brace, rest = self._held.partition("{")
            self._held = name
            self._begin_arguments()
            self._take_arguments(brace + rest)

    def _take_list(self, text: str) -> None:
        end = self._json.feed(text)
        if end is None:
            return
        rest = text[end:]
        body = self._held[: len(self._held) - len(rest)]
        self._held, self._state = "", "answer"
        if not self._tell_list(body):
            self._answer(body)
        self._answer(rest)

    def _take_arguments(self, text: str) -> None:
        """Arguments end with the brace that closes them; what follows is answer again."""
        end = self._json.feed(text)
        self._argue(text[:end])
        if end is not None:
            self._state = "answer"
            self._answer(text[end:])

    def _begin_arguments(self) -> None:
        name, call_id = self._held.strip(), self._id.strip()
        self._json, self._has_arguments, self._state = JsonScan(), False, "arguments"
        self._is_call = self._tools and bool(name)
        if self._is_call:
            self._announce(name, call_id)
        else:
            self._say(self._held)
        self._held = self._id = ""

    def _end_call(self) -> None:
        """Whatever call was being read is over, complete or not."""
        broken_list = self._state == "list" and not self._tell_list(self._held + "]")
        if broken_list or self._state in ("name", "id"):
            self._say(self._held)
        elif self._state == "arguments" and not self._has_arguments:
            self._argue("{}" if self._is_call else "")
        self._held = self._id = ""
        self._state = "answer"

    # What comes out.

    def _say(self, text: str) -> None:
        if text:
            self._deltas.append(ContentDelta(text=text))

    def _answer(self, text: str) -> None:
        """Content; blanks between or after calls are layout unless more text follows."""
        if self._calls and not (self._held + text).strip():
            self._held += text
        else:
            self._say(self._held + text)
            self._held = ""

    def _announce(self, name: str, call_id: str, arguments: str = "") -> None:
        if not _ID.fullmatch(call_id) or call_id in self._ids:
            call_id = self._new_id()
        self._ids.add(call_id)
        index = self._calls
        self._deltas.append(ToolCallDelta(index=index, id=call_id, name=name, arguments=arguments))
        self._calls += 1

    def _argue(self, text: str) -> None:
        if not self._is_call:
            self._say(text)
        elif text:
            self._deltas.append(ToolCallDelta(index=self._calls - 1, arguments=text))
        self._has_arguments = self._has_arguments or bool(text.strip())

    def _tell_list(self, body: str) -> bool:
        """Tell the calls of a complete list (or one call alone); false if it isn't one."""
        try:
            listed: Any = json.loads(body)
        except (ValueError, RecursionError):
            return False
        items = listed if isinstance(listed, list) else [listed]
        calls = [read_call(item) for item in items]
        if not self._tools or not calls or None in calls:
            return False
        for item, call in zip(items, calls, strict=True):
            assert call is not None
            given = item.get("id")
            self._announce(call[0], given if isinstance(given, str) else "", call[1])
        return True


class JsonScan:
    """Finds the end of a JSON object or list in text that comes in pieces."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = self._escaped = False

    def feed(self, text: str) -> int | None:
        """Where the value ends in `text` (just behind its last bracket), or None yet."""
        for i, c in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped = c == "\\"
                self._in_string = c != '"'
            elif c == '"':
                self._in_string = True
            elif c in "[{":
                self._depth += 1
            elif c in "]}":
                self._depth -= 1
                if self._depth <= 0:
                    return i + 1
        return None
