"""The body of OpenAI's /v1/responses, and what it asks of `Chat.stream`.

Knows nothing of how items become messages, or of answers.
"""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from localmistral.engine.constraints import JsonObject, JsonSchema, Spec
from localmistral.errors import BadRequestError
from localmistral.server.parameters import Count, Flag, SamplingParameters, Text, check_count
from localmistral.server.tool_choice import read_tool_choice

MAX_METADATA = 16
MAX_LOGPROBS = 20
LOGPROBS = "message.output_text.logprobs"
SEALED_REASONING = "reasoning.encrypted_content"
_KEPT_ELSEWHERE = {
    "conversation": "a conversation that OpenAI keeps",
    "prompt": "a prompt that OpenAI keeps",
}
"""Without them the model would answer something else than what was asked."""


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
    verbosity: Text | None = None


class ResponsesRequest(SamplingParameters):
    """OpenAI's request for a response, with llama.cpp's and vLLM's ways to choose tokens; unknown
    fields are ignored, a null is as good as absent."""

    model: Text | None = None
    input: Text | list[dict[str, Any]] = Field(description="A text, or a list of items.")
    instructions: Text | None = Field(None, description="The system prompt of this response.")
    previous_response_id: Text | None = Field(None, description="Go on from that response.")
    store: Flag | None = Field(None, description="Keep it for previous_response_id; yes.")
    stream: Flag | None = None
    background: Flag | None = None
    conversation: Any = Field(None, description="Refused: none is kept here.")
    prompt: Any = Field(None, description="Refused: none is kept here.")
    max_output_tokens: Count | None = None
    truncation: Literal["auto", "disabled"] | None = Field(
        None, description="auto leaves out the oldest turns of a conversation that is too long."
    )
    include: list[Text] | None = Field(
        None, description=f"{LOGPROBS} and {SEALED_REASONING} have an effect."
    )
    top_logprobs: Count | None = Field(None, description="Alternatives per token, 0 to 20.")
    tools: list[dict[str, Any]] | None = None
    tool_choice: Text | dict[str, Any] | None = None
    parallel_tool_calls: Flag | None = None
    reasoning: Reasoning | None = None
    text: TextOptions | None = None
    metadata: dict[str, Text] | None = None

    def check(self) -> None:
        """Errors: BadRequestError for what can't be had here."""
        check_count("max_output_tokens", self.max_output_tokens)
        self._refuse("background", bool(self.background), "no requests run by themselves here.")
        self._refuse("n", self.count_choices() > 1, "a response is one answer.")
        for name, what in _KEPT_ELSEWHERE.items():
            self._refuse(name, getattr(self, name) is not None, f"it names {what}.")
        if self.top_logprobs is not None and not 0 <= self.top_logprobs <= MAX_LOGPROBS:
            raise BadRequestError(
                f"top_logprobs is {str(self.top_logprobs)[:40]}, it must be between 0 and "
                f"{MAX_LOGPROBS}.",
                param="top_logprobs",
            )
        if self.metadata is not None and len(self.metadata) > MAX_METADATA:
            raise BadRequestError(
                f"metadata has {len(self.metadata)} entries, at most {MAX_METADATA} are taken.",
                param="metadata",
            )

    def _refuse(self, name: str, is_set: bool, why: str) -> None:
        if is_set:
            raise BadRequestError(f"{name} can't be had: {why}", "Leave it out.", param=name)

    def includes(self, what: str) -> bool:
        return what in (self.include or ())

    def list_input(self) -> list[dict[str, Any]]:
        """The new items, a text as the message that it stands for."""
        if isinstance(self.input, str):
            part = {"type": "input_text", "text": self.input}
            return [{"type": "message", "role": "user", "content": [part]}]
        return self.input

    def read_tools(self) -> list[dict[str, Any]] | None:
        """The tools in the form of chat completions."""
        if not self.tools:
            return None
        return [_read_tool(tool, f"tools[{i}]") for i, tool in enumerate(self.tools)]

    def read_arguments(self) -> dict[str, Any]:
        """Keyword arguments of `Chat.stream`, but for the messages."""
        choice, tools = read_tool_choice(self.tool_choice, self.read_tools())
        limit = self.max_output_tokens
        return {
            "tools": tools,
            "tool_choice": choice,
            "effort": self.reasoning.effort if self.reasoning else None,
            "max_tokens": self.read_limit() if limit is None else limit,
            "stop": self.stop,
            "sampling": self.read_sampling(),
            "output": self._read_output(),
            "cache_prompt": self.cache_prompt is not False,
            "top_logprobs": (self.top_logprobs or 0) if self.includes(LOGPROBS) else None,
            **self.read_endings(),
        }

    def _read_output(self) -> Spec | None:
        form = self.text.format if self.text else None
        if form is None or form.type == "text":
            return None
        if form.type == "json_object":
            return JsonObject()
        if form.schema_ is None:
            raise BadRequestError("text.format.schema is missing.", param="text.format.schema")
        return JsonSchema(schema=form.schema_, strict=form.strict is not False)


def _read_tool(tool: Mapping[str, Any], where: str) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise BadRequestError(
            f"{where}.type is {str(tool.get('type'))[:40]!r}, which can't be had here.",
            "Declare a function.",
            param=f"{where}.type",
        )
    names = ("name", "description", "parameters", "strict")
    return {"type": "function", "function": {name: tool.get(name) for name in names}}
