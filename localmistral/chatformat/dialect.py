"""What one template understands, found by trying it, and conversations laid out accordingly.

Templates differ in what they accept: text or parts, system messages or not, tools, arguments as
object or text, alternating roles only. What a template lacks is said in words it has, so that no
conversation of an agent is refused for its form.

Knows nothing of Jinja or of tokens: trying a template is a function it is given.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from localmistral.chatformat.messages import Message, Tool, ToolCall
from localmistral.errors import BadRequestError, TemplateError

Hide = Callable[[Any], Any]
# (messages, tools) -> rendering; raises BadRequestError or TemplateError.
Render = Callable[[list[dict[str, Any]], list[dict[str, Any]] | None], str]

_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}}
_NEEDLE, _ARGUMENT = "qzneedlezq", "qzargumentzq"
_TOOLS_INTRODUCTION = (
    "You can call these functions, described in JSON, one a line:\n<tools>\n{tools}\n</tools>\n"
    "To call one, write only this, with its name and arguments:\n"
    '<tool_call>\n{{"name": "NAME", "arguments": {{...}}}}\n</tool_call>'
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """What a template takes; the defaults are what a modern template takes."""

    parts: bool = False  # content must be a list of parts
    system: bool = True
    tools: bool = True  # shows tool definitions
    calls: bool = True  # shows an assistant's tool calls
    results: bool = True  # shows messages of the role "tool"
    arguments_as_text: bool = False
    reasoning_key: str = ""  # the message field it reads thinking from, or none

    def adapt(
        self, messages: Sequence[Message], tools: Sequence[Tool]
    ) -> tuple[tuple[Message, ...], tuple[Tool, ...]]:
        """The conversation with everything the template lacks put into words."""
        adapted = tuple(messages)
        if tools and not self.tools:
            adapted = _with_tools_in_words(adapted, tools)
        if not self.calls:
            adapted = tuple(map(_with_calls_in_words, adapted))
        if not self.results:
            adapted = tuple(map(_with_result_in_words, adapted))
        if not self.system:
            adapted = without_system(adapted)
        return adapted, tuple(tools) if self.tools else ()

    def lay_out(self, messages: Iterable[Message], hide: Hide) -> list[dict[str, Any]]:
        """Messages as the dictionaries a template reads; `hide` is applied to outside text."""
        return [self._message(message, hide) for message in messages]

    def _message(self, message: Message, hide: Hide) -> dict[str, Any]:
        content: Any = hide(message.content)
        if self.parts:
            content = [{"type": "text", "text": content}] if message.content else []
        laid: dict[str, Any] = {"role": message.role, "content": content}
        if message.name:
            laid["name"] = hide(message.name)
        if message.tool_call_id:
            laid["tool_call_id"] = hide(message.tool_call_id)
        if message.tool_calls:
            laid["tool_calls"] = [self._call(call, hide) for call in message.tool_calls]
        if message.reasoning and self.reasoning_key:
            laid[self.reasoning_key] = hide(message.reasoning)
        return laid

    def _call(self, call: ToolCall, hide: Hide) -> dict[str, Any]:
        arguments = call.arguments_json if self.arguments_as_text else call.arguments
        function = {"name": hide(call.name), "arguments": hide(arguments)}
        return {"id": hide(call.id), "type": "function", "function": function}


def lay_out_tools(tools: Iterable[Tool], hide: Hide) -> list[dict[str, Any]]:
    """Tools in OpenAI's shape."""
    return [
        {
            "type": "function",
            "function": {
                "name": hide(tool.name),
                "description": hide(tool.description),
                "parameters": hide(tool.parameters or _NO_PARAMETERS),
            },
        }
        for tool in tools
    ]


def forms(messages: tuple[Message, ...]) -> Iterator[tuple[Message, ...]]:
    """The conversation as it is, then in forms that stricter templates take.

    What is said stays in all but the last, which drops text beside tool calls.
    """
    last = merged(without_system(messages))
    candidates = (
        messages,
        merged(messages),
        merged(without_system(messages, later_only=True)),
        last,
        tuple(replace(m, content="") if m.tool_calls else m for m in last),
    )
    for i, form in enumerate(candidates):
        if form not in candidates[:i]:
            yield form


def merged(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Consecutive user and consecutive assistant messages as one, a blank line between."""
    result: list[Message] = []
    for message in messages:
        before = result[-1] if result else None
        if before and before.role == message.role and message.role in ("user", "assistant"):
            result[-1] = replace(
                before,
                content=_joined(before.content, message.content),
                reasoning=_joined(before.reasoning, message.reasoning),
                tool_calls=before.tool_calls + message.tool_calls,
            )
        else:
            result.append(message)
    return tuple(result)


def without_system(messages: Sequence[Message], *, later_only: bool = False) -> tuple[Message, ...]:
    """System text at the head of the next user message (of a new one where none follows).

    `later_only` leaves a system message at the very start as it is.
    """
    result: list[Message] = []
    waiting = ""
    for i, message in enumerate(messages):
        if message.role == "system" and not (later_only and i == 0):
            waiting = _joined(waiting, message.content)
        elif waiting and message.role == "user":
            result.append(replace(message, content=_joined(waiting, message.content)))
            waiting = ""
        elif waiting and message.role == "assistant":
            result += [Message(role="user", content=waiting), message]
            waiting = ""
        else:
            result.append(message)
    if waiting:
        result.append(Message(role="user", content=waiting))
    return tuple(result)


def _joined(*texts: str) -> str:
    return "\n\n".join(filter(None, texts))


def _with_tools_in_words(
    messages: tuple[Message, ...], tools: Sequence[Tool]
) -> tuple[Message, ...]:
    lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in lay_out_tools(tools, _same))
    words = _TOOLS_INTRODUCTION.format(tools=lines)
    if messages and messages[0].role == "system":
        first = replace(messages[0], content=_joined(messages[0].content, words))
        return (first, *messages[1:])
    return (Message(role="system", content=words), *messages)


def _with_calls_in_words(message: Message) -> Message:
    if not message.tool_calls:
        return message
    calls = (
        json.dumps({"name": call.name, "arguments": call.arguments}, ensure_ascii=False)
        for call in message.tool_calls
    )
    words = "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls)
    return replace(message, content=_joined(message.content, words), tool_calls=())


def _with_result_in_words(message: Message) -> Message:
    if message.role != "tool":
        return message
    words = f"<tool_response>\n{message.content}\n</tool_response>"
    return Message(role="user", content=words)


def _same(value: Any) -> Any:
    return value


def probe(source: str, render: Render) -> Dialect:
    """Find a template's dialect by rendering small conversations with it."""
    trial = _Trial(source, render, Dialect(reasoning_key=_reasoning_key(source)))
    trial.settle("parts", [Message(role="user", content=_NEEDLE)], prefer=False)
    trial.settle("system", [Message(role="system", content=_NEEDLE), _USER], prefer=True)
    trial.settle("tools", [_USER], prefer=True, tools=(Tool(name=_NEEDLE),))
    _settle_calls(trial)
    return trial.dialect


_USER = Message(role="user", content="question")
_ANSWER = Message(role="assistant", content="answer")
_CALL = Message(
    role="assistant",
    tool_calls=(ToolCall(id="call00000", name="weigh", arguments={"thing": _ARGUMENT}),),
)
_RESULT = Message(role="tool", content=_NEEDLE, name="weigh", tool_call_id="call00000")
_DUMMY_TOOL = Tool(name="weigh", description="weighs")


class _Trial:
    """A dialect in the finding."""

    def __init__(self, source: str, render: Render, dialect: Dialect) -> None:
        self._source = source
        self._render = render
        self.dialect = dialect

    def settle(
        self, trait: str, messages: list[Message], *, prefer: bool, tools: tuple[Tool, ...] = ()
    ) -> None:
        """Keep the preferred value of a trait unless only the other one shows the needle."""
        for value in (prefer, not prefer):
            dialect = replace(self.dialect, **{trait: value})  # type: ignore[arg-type]
            if _NEEDLE in self.rendering(dialect, messages, tools):
                self.dialect = dialect
                return
        self.dialect = replace(self.dialect, **{trait: prefer})  # type: ignore[arg-type]

    def rendering(
        self, dialect: Dialect, messages: list[Message], tools: tuple[Tool, ...] = ()
    ) -> str:
        """What the template makes of a conversation; nothing if it refuses or fails."""
        adapted, shown = dialect.adapt(messages, tools)
        try:
            laid = dialect.lay_out(adapted, _same)
            return self._render(laid, lay_out_tools(shown, _same) or None)
        except BadRequestError:
            return ""
        except TemplateError as error:
            # A template that passes its limits would pass them at every try.
            if type(error) is not TemplateError:
                raise
            return ""


def _settle_calls(trial: _Trial) -> None:
    """The way in which both a call and its result show, said in words if there is no other.

    Arguments go as an object, unless the template then fails or prints Python's form of it.
    """
    python_form = str(dict(_CALL.tool_calls[0].arguments))
    conversation = [_USER, _CALL, _RESULT, _ANSWER, _USER]
    for results in (True, False):
        for calls, as_text in ((True, False), (True, True), (False, False)):
            way = replace(trial.dialect, results=results, calls=calls, arguments_as_text=as_text)
            text = trial.rendering(way, conversation, (_DUMMY_TOOL,))
            if _NEEDLE in text and _ARGUMENT in text and python_form not in text:
                trial.dialect = way
                return


def _reasoning_key(source: str) -> str:
    """The field in which this template looks for the thinking of an earlier message."""
    for key in _REASONING_KEYS:
        quoted = rf"""(?:\[|get\()\s*['"]{key}['"]|['"]{key}['"]\s+in\s"""
        if re.search(rf"\w\.{key}\b|{quoted}", source):
            return key
    return ""
