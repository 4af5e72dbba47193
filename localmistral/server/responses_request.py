"""The body of OpenAI's /v1/responses, and what it asks of `Chat.stream`.

Turns input items into messages, which the one parser then checks. Knows nothing of answers.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from localmistral.engine.constraints import JsonObject, JsonSchema, Spec
from localmistral.errors import BadRequestError
from localmistral.server.parameters import Count, Flag, Real, Text, check_count
from localmistral.server.tool_choice import read_tool_choice

MAX_METADATA = 16


class Reasoning(BaseModel):
    model_config = ConfigDict(extra="ignore")
    effort: Text | None = None
    summary: Text | None = None


class TextFormat(BaseModel):
    """What the text has to look like; the schema stands here, not in a wrapper."""

    model_config = ConfigDict(extra="ignore")
    type: Literal["text", "json_object", "json_schema"]
    name: Text | None = None
    strict: Flag | None = None
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")


class TextOptions(BaseModel):
    model_config = ConfigDict(extra="ignore")
    format: TextFormat | None = None


class ResponsesRequest(BaseModel):
    """OpenAI's request for a response; unknown fields are ignored, a null is as good as absent."""

    model_config = ConfigDict(extra="ignore")

    model: Text | None = None
    input: Text | list[dict[str, Any]] = Field(description="A text, or a list of items.")
    instructions: Text | None = Field(None, description="The system prompt of this response.")
    previous_response_id: Text | None = Field(None, description="Go on from that response.")
    store: Flag | None = Field(None, description="Keep it for previous_response_id; yes.")
    stream: Flag | None = None
    background: Flag | None = None
    max_output_tokens: Count | None = None
    temperature: Real | None = None
    top_p: Real | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Text | dict[str, Any] | None = None
    parallel_tool_calls: Flag | None = None
    reasoning: Reasoning | None = None
    text: TextOptions | None = None
    metadata: dict[str, Text] | None = None

    def check(self) -> None:
        """Errors: BadRequestError for what can't be had here."""
        check_count("max_output_tokens", self.max_output_tokens)
        if self.background:
            raise BadRequestError(
                "background is true, and this server keeps no requests running by themselves.",
                "Leave it out.",
                param="background",
            )
        if self.metadata is not None and len(self.metadata) > MAX_METADATA:
            raise BadRequestError(
                f"metadata has {len(self.metadata)} entries, at most {MAX_METADATA} are taken.",
                param="metadata",
            )

    def read_input(self) -> list[dict[str, Any]]:
        """The new messages, without instructions. Errors: BadRequestError naming the item."""
        if isinstance(self.input, str):
            return [{"role": "user", "content": self.input}]
        return read_items(self.input)

    def read_tools(self) -> list[dict[str, Any]] | None:
        """The tools in the form of chat completions."""
        if not self.tools:
            return None
        return [_read_tool(tool, f"tools[{i}]") for i, tool in enumerate(self.tools)]

    def read_arguments(self) -> dict[str, Any]:
        """Keyword arguments of `Chat.stream`, but for the messages."""
        sampling = {"temperature": self.temperature, "top_p": self.top_p}
        choice, tools = read_tool_choice(self.tool_choice, self.read_tools())
        return {
            "tools": tools,
            "tool_choice": choice,
            "effort": self.reasoning.effort if self.reasoning else None,
            "max_tokens": self.max_output_tokens,
            "sampling": {name: value for name, value in sampling.items() if value is not None},
            "output": self._read_output(),
        }

    def _read_output(self) -> Spec | None:
        form = self.text.format if self.text else None
        if form is None or form.type == "text":
            return None
        if form.type == "json_object":
            return JsonObject()
        if form.schema_ is None:
            raise BadRequestError("text.format.schema is missing.", param="text.format.schema")
        return JsonSchema(schema=form.schema_)


def _read_tool(tool: Mapping[str, Any], where: str) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise BadRequestError(
            f"{where}.type is {str(tool.get('type'))[:40]!r}, which only runs at OpenAI.",
            "Declare a function.",
            param=f"{where}.type",
        )
    names = ("name", "description", "parameters", "strict")
    return {"type": "function", "function": {name: tool.get(name) for name in names}}


def read_items(items: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Input or output items as messages: what an assistant thought, said and called side by side
    becomes one message. Errors: BadRequestError naming the item."""
    messages: list[dict[str, Any]] = []
    for i, item in enumerate(items):
        kind = item.get("type") or ("message" if "role" in item else None)
        where = f"input[{i}]"
        if kind == "message":
            message = {"role": item.get("role"), "content": item.get("content")}
            if message["role"] == "assistant":
                _join_content(_assistant(messages), message["content"], where)
            else:
                messages.append(message)
        elif kind == "function_call":
            calls = _assistant(messages).setdefault("tool_calls", [])
            calls.append(_read_call(item))
        elif kind == "function_call_output":
            messages.append(_read_result(item, where))
        elif kind == "reasoning":
            message = _assistant(messages)
            message["reasoning_content"] = message.get("reasoning_content", "") + _thought(item)
        else:
            raise BadRequestError(
                f"{where}.type is {str(kind)[:40]!r}, which this server doesn't know.",
                param=f"{where}.type",
            )
    return messages


def _assistant(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """The assistant message that is being added to."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": []})
    return messages[-1]


def _join_content(message: dict[str, Any], content: Any, where: str) -> None:
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise BadRequestError(
            f"{where}.content must be a text or a list of parts.", param=f"{where}.content"
        )
    message["content"] = [*message["content"], *content]


def _read_call(item: Mapping[str, Any]) -> dict[str, Any]:
    function = {"name": item.get("name"), "arguments": item.get("arguments")}
    return {"id": item.get("call_id") or item.get("id"), "type": "function", "function": function}


def _read_result(item: Mapping[str, Any], where: str) -> dict[str, Any]:
    output = item.get("output")
    if not isinstance(output, str | list):
        raise BadRequestError(
            f"{where}.output must be a text or a list of parts.", param=f"{where}.output"
        )
    return {"role": "tool", "tool_call_id": item.get("call_id"), "content": output}


def _thought(item: Mapping[str, Any]) -> str:
    """The text of a reasoning item; its summary where the text itself isn't given."""
    parts = item.get("content") or item.get("summary")
    if not isinstance(parts, list):
        return parts if isinstance(parts, str) else ""
    texts = [part.get("text") for part in parts if isinstance(part, Mapping)]
    return "".join(text for text in texts if isinstance(text, str))
