"""The body of Anthropic's /v1/messages, and what it asks of `Chat.stream`.

Knows nothing of responses.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from localmistral.engine.constraints import JsonSchema, Spec
from localmistral.errors import BadRequestError
from localmistral.server.messages_blocks import Turn, read_assistant, read_system, read_user
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

    def read_turns(self) -> list[Turn]:
        """The conversation in OpenAI's form. Errors: BadRequestError naming the block."""
        turns = read_system(self.system, "system") if self.system else []
        for i, message in enumerate(self.messages):
            where = f"messages[{i}]"
            if message.role == "assistant":
                turns += read_assistant(message.content, where)
            elif message.role == "system":
                turns += read_system(message.content, f"{where}.content")
            else:
                turns += read_user(message.content, where)
        if turns and turns[-1].calls:
            place = turns[-1].calls[0]
            raise BadRequestError(f"{place} is a call without its result after it.", param=place)
        return turns

    @property
    def continues_answer(self) -> bool:
        """An assistant message at the end is the beginning of the answer."""
        return self.messages[-1].role == "assistant"

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
            "continue_final_message": self.continues_answer,
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
