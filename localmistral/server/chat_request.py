"""The body of /v1/chat/completions: its fields, and what they ask of `Chat.stream`.

Knows nothing of responses.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from localmistral.chatformat.messages import ROLES
from localmistral.errors import BadRequestError
from localmistral.server.parameters import (
    Count,
    Flag,
    OutputParameters,
    SamplingParameters,
    Text,
    check_count,
)
from localmistral.server.tool_choice import read_tool_choice

ReasoningFormat = Literal["reasoning_content", "reasoning", "mistral", "none"]
_REASONING_FORMATS: dict[str, ReasoningFormat] = {
    "auto": "reasoning_content",
    "deepseek": "reasoning_content",
    "deepseek-legacy": "reasoning_content",
    "reasoning_content": "reasoning_content",
    "reasoning": "reasoning",
    "vllm": "reasoning",
    "mistral": "mistral",
    "none": "none",
    "hidden": "none",
}
"""llama-server's names, vLLM's field, Mistral's content lists; none leaves the thinking out."""
MESSAGE: Any = {
    "type": "object",
    "required": ["role"],
    "properties": {
        "role": {"enum": list(ROLES)},
        "content": {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "object", "required": ["type"]}},
                {"type": "null"},
            ]
        },
        "tool_calls": {"type": "array", "items": {"type": "object"}},
        "tool_call_id": {"type": "string"},
    },
}
TOOL: Any = {
    "type": "object",
    "required": ["function"],
    "properties": {
        "type": {"enum": ["function"]},
        "function": {
            "type": "object",
            "required": ["name"],
            "properties": {
                "name": {"type": "string", "pattern": "^[A-Za-z0-9_.-]{1,128}$"},
                "description": {"type": "string"},
                "parameters": {"type": "object"},
                "strict": {"type": "boolean"},
            },
        },
    },
}
"""For the documentation: both are checked where they are parsed, with better words."""


class StreamOptions(BaseModel):
    """`include_usage` adds a last chunk with the counts of tokens."""

    model_config = ConfigDict(extra="ignore")
    include_usage: Flag | None = None


class ChatRequest(SamplingParameters, OutputParameters):
    """OpenAI's chat request with the fields that llama.cpp and vLLM add."""

    model: Text | None = Field(None, description="An id of /v1/models; absent: the loaded model.")
    messages: Any = Field(
        None,
        json_schema_extra={"type": "array", "items": MESSAGE, "minItems": 1},
        description="The conversation.",
    )
    stream: Flag | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    tools: Any = Field(None, json_schema_extra={"type": "array", "items": TOOL})
    tool_choice: Text | dict[str, Any] | None = None
    parallel_tool_calls: Flag | None = None
    logprobs: Flag | None = None
    top_logprobs: Count | None = None
    reasoning_effort: Text | None = Field(
        None, description="none, minimal, low, medium, high, xhigh or max."
    )
    reasoning_format: Text | None = Field(
        None,
        description="reasoning_content (the default), reasoning, mistral or none; with "
        "prompt_mode the default is mistral.",
    )
    prompt_mode: Literal["reasoning"] | None = Field(
        None,
        description="Mistral's way to ask for thinking: high, unless reasoning_effort says "
        "otherwise, and in Mistral's own content lists.",
    )
    include_reasoning: Flag | None = Field(None, description="vLLM's: false hides the thinking.")
    thinking_budget: Count | None = Field(None, description="End the thinking after N tokens.")
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="`reasoning_effort` and `enable_thinking`, or `thinking`, are read."
    )
    add_generation_prompt: Flag | None = None
    continue_final_message: Flag | None = None

    def read_effort(self) -> str | None:
        """The effort, in whichever of four places it stands."""
        if self.reasoning_effort is not None:
            return self.reasoning_effort
        others = self.chat_template_kwargs or {}
        effort = others.get("reasoning_effort")
        if effort is not None and not isinstance(effort, str):
            raise BadRequestError(
                f"chat_template_kwargs.reasoning_effort is {str(effort)[:40]!r}, not a text.",
                param="chat_template_kwargs.reasoning_effort",
            )
        if effort is not None:
            return effort
        enabled = others.get("enable_thinking", others.get("thinking"))
        if isinstance(enabled, bool):
            return "high" if enabled else "none"
        return "high" if self.prompt_mode else None

    def read_format(self) -> ReasoningFormat:
        """Errors: BadRequestError for a format nobody knows."""
        wanted = self.reasoning_format or ("mistral" if self.prompt_mode else "auto")
        if self.include_reasoning is False:
            wanted = "none"
        if wanted not in _REASONING_FORMATS:
            raise BadRequestError(
                f"reasoning_format {wanted[:40]!r} is not known.",
                "Use reasoning_content, reasoning, mistral or none.",
                param="reasoning_format",
            )
        return _REASONING_FORMATS[wanted]

    def read_max_tokens(self) -> int | None:
        check_count("max_tokens", self.max_tokens)
        newer = check_count("max_completion_tokens", self.max_completion_tokens)
        given = (newer, self.max_tokens, self.read_limit())
        return next((count for count in given if count is not None), None)

    def read_top_logprobs(self) -> int | None:
        """None without log-probabilities. Errors: BadRequestError outside 0 to 20."""
        count = self.top_logprobs
        if count is not None and not 0 <= count <= 20:
            raise BadRequestError(
                f"top_logprobs is {count}, it must be between 0 and 20.", param="top_logprobs"
            )
        if not self.logprobs:
            return None
        return count or 0

    def _has_prefix(self) -> bool:
        """Whether the last message is, in Mistral's way, marked as the answer's beginning."""
        last = self.messages[-1] if isinstance(self.messages, list) and self.messages else None
        return isinstance(last, dict) and last.get("prefix") is True

    def read_arguments(self) -> dict[str, Any]:
        """Keyword arguments of `Chat.stream`, but for `sampling` and `output`."""
        choice, tools = read_tool_choice(self.tool_choice, self.tools)
        return {
            "tools": tools,
            "tool_choice": choice,
            "effort": self.read_effort(),
            "max_tokens": self.read_max_tokens(),
            "stop": self.stop,
            "thinking_budget": self.thinking_budget,
            "cache_prompt": self.cache_prompt is not False,
            "add_generation_prompt": self.add_generation_prompt is not False,
            "continue_final_message": bool(self.continue_final_message) or self._has_prefix(),
            "top_logprobs": self.read_top_logprobs(),
            **self.read_endings(),
        }
