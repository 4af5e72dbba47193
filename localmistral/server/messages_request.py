"""The body of Anthropic's /v1/messages, and what it asks of `Chat.stream`.

Turns Anthropic's content blocks into OpenAI-style messages, which the one parser then checks.
Knows nothing of responses.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from localmistral.engine.constraints import JsonSchema, Spec
from localmistral.errors import BadRequestError
from localmistral.server.parameters import Count, Flag, Real, Text, check_count

_EFFORTS = {"low": "low", "medium": "medium", "high": "high", "xhigh": "high", "max": "high"}


class MessageParam(BaseModel):
    model_config = ConfigDict(extra="ignore")
    role: Literal["user", "assistant", "system"]
    content: Text | list[dict[str, Any]]


class Thinking(BaseModel):
    """Whether the model thinks first; `budget_tokens` ends that after so many tokens."""

    model_config = ConfigDict(extra="ignore")
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Count | None = None


class ToolChoice(BaseModel):
    model_config = ConfigDict(extra="ignore")
    type: Literal["auto", "any", "tool", "none"]
    name: Text | None = None
    disable_parallel_tool_use: Flag | None = None


class OutputConfig(BaseModel):
    model_config = ConfigDict(extra="ignore")
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: dict[str, Any] | None = None


class CountRequest(BaseModel):
    """A conversation with tools: what the prompt is made of."""

    model_config = ConfigDict(extra="ignore")
    model: Text | None = None
    messages: Annotated[list[MessageParam], Field(min_length=1)]
    system: Text | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None

    def read_messages(self) -> list[dict[str, Any]]:
        """The conversation in OpenAI's form. Errors: BadRequestError naming the block."""
        messages: list[dict[str, Any]] = []
        if self.system:
            messages.append({"role": "system", "content": _read_system(self.system)})
        for i, message in enumerate(self.messages):
            where = f"messages[{i}]"
            if message.role == "assistant":
                messages.append(_read_assistant(message.content, f"{where}.content"))
            elif message.role == "system":
                messages.append({"role": "system", "content": _read_system(message.content)})
            else:
                messages += _read_user(message.content, f"{where}.content")
        return messages

    def read_tools(self) -> list[dict[str, Any]] | None:
        """The tools in OpenAI's form. Errors: BadRequestError for what only Anthropic can run."""
        if not self.tools:
            return None
        tools = []
        for i, tool in enumerate(self.tools):
            if tool.get("type") not in (None, "custom"):
                raise BadRequestError(
                    f"tools[{i}].type is {str(tool['type'])[:40]!r}, which runs at Anthropic only.",
                    "Declare a tool of your own.",
                    param=f"tools[{i}].type",
                )
            function = {
                "name": tool.get("name"),
                "description": tool.get("description"),
                "parameters": tool.get("input_schema"),
                "strict": tool.get("strict"),
            }
            tools.append({"type": "function", "function": function})
        return tools

    def read_effort(self) -> str:
        """Without a word of it nothing is thought, as with Anthropic."""
        if self.thinking is not None and self.thinking.type != "disabled":
            effort = self.output_config.effort if self.output_config else None
            return _EFFORTS[effort or "high"]
        return "none"

    def read_tool_choice(self) -> str:
        """As `Chat.stream` takes it. Errors: BadRequestError for a tool without a name."""
        choice = self.tool_choice
        if choice is None or choice.type in ("auto", "none"):
            return "auto" if choice is None else choice.type
        if choice.type == "any":
            return "required"
        if not choice.name:
            raise BadRequestError("tool_choice.name is missing.", param="tool_choice.name")
        return choice.name


class MessagesRequest(CountRequest):
    """Anthropic's request for an answer."""

    max_tokens: Count
    stream: Flag | None = None
    stop_sequences: list[Text] | None = None
    temperature: Real | None = None
    top_p: Real | None = None
    top_k: Count | None = None

    def read_arguments(self) -> dict[str, Any]:
        """Keyword arguments of `Chat.stream`. Errors: BadRequestError."""
        budget = self.thinking.budget_tokens if self.thinking else None
        sampling = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return {
            "tools": self.read_tools(),
            "tool_choice": self.read_tool_choice(),
            "effort": self.read_effort(),
            "max_tokens": check_count("max_tokens", self.max_tokens),
            "stop": tuple(self.stop_sequences or ()),
            "sampling": {name: value for name, value in sampling.items() if value is not None},
            "thinking_budget": check_count("thinking.budget_tokens", budget),
            "output": self._read_output(),
            # an assistant message at the end is the beginning of the answer
            "continue_final_message": self.messages[-1].role == "assistant",
        }

    def _read_output(self) -> Spec | None:
        form = self.output_config.format if self.output_config else None
        if form is None:
            return None
        if form.get("type") != "json_schema" or form.get("schema") is None:
            raise BadRequestError(
                "output_config.format needs the type json_schema and a schema.",
                param="output_config.format",
            )
        return JsonSchema(schema=form["schema"])


def _read_system(content: str | list[dict[str, Any]]) -> str:
    if isinstance(content, str):
        return content
    texts = [_text_of(block, f"system[{i}]") for i, block in enumerate(content)]
    return "\n\n".join(texts)


def _text_of(block: Mapping[str, Any], where: str) -> str:
    text = block.get("text")
    if block.get("type") != "text" or not isinstance(text, str):
        raise BadRequestError(f"{where} must be a text block.", param=where)
    return text


def _read_user(content: str | list[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    """Results of tools become messages of their own, the rest one user message after them."""
    if isinstance(content, str):
        return [{"role": "user", "content": content}]
    results: list[dict[str, Any]] = []
    parts: list[dict[str, Any]] = []
    for i, block in enumerate(content):
        if block.get("type") == "tool_result":
            results.append(_read_result(block, f"{where}[{i}]"))
        elif block.get("type") == "document":
            parts.append({"type": "text", "text": _read_document(block, f"{where}[{i}]")})
        else:
            parts.append(block)
    return [*results, *([{"role": "user", "content": parts}] if parts else [])]


def _read_result(block: Mapping[str, Any], where: str) -> dict[str, Any]:
    content = block.get("content")
    if isinstance(content, list):
        inner = enumerate(content)
        content = "\n".join(_text_of(_object(b, where), f"{where}.content[{i}]") for i, b in inner)
    text = "" if content is None else content
    if not isinstance(text, str):
        raise BadRequestError(f"{where}.content must be text.", param=f"{where}.content")
    if block.get("is_error"):
        text = f"Error: {text}"
    return {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": text}


def _read_document(block: Mapping[str, Any], where: str) -> str:
    source = block.get("source")
    if isinstance(source, Mapping) and source.get("type") == "text":
        return str(source.get("data", ""))
    raise BadRequestError(f"{where} is a document that isn't plain text.", param=where)


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise BadRequestError(f"{where} holds something other than blocks.", param=where)
    return value


def _read_assistant(content: str | list[dict[str, Any]], where: str) -> dict[str, Any]:
    if isinstance(content, str):
        return {"role": "assistant", "content": content}
    parts: list[dict[str, Any]] = []
    calls: list[dict[str, Any]] = []
    for i, block in enumerate(content):
        kind = block.get("type")
        if kind == "tool_use":
            calls.append(_read_call(block, f"{where}[{i}]"))
        elif kind == "thinking":
            parts.append({"type": "thinking", "thinking": block.get("thinking")})
        elif kind != "redacted_thinking":  # which nobody but its author can read
            parts.append(block)
    return {"role": "assistant", "content": parts, **({"tool_calls": calls} if calls else {})}


def _read_call(block: Mapping[str, Any], where: str) -> dict[str, Any]:
    arguments = block.get("input")
    if not isinstance(arguments, Mapping):
        raise BadRequestError(f"{where}.input must be an object.", param=f"{where}.input")
    function = {"name": block.get("name"), "arguments": json.dumps(arguments)}
    return {"id": block.get("id"), "type": "function", "function": function}
