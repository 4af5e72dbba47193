"""Prompts of Mistral's families, token for token those of mistral-common.

The family's generated template renders a normalised conversation (see `normalising`, which also
lists what is done where mistral-common refuses). The template's own refusals are off: what they
look for has been settled before.
Knows nothing of tokenizers beyond the names of control tokens.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from localmistral.chatformat.dialect import Hide
from localmistral.chatformat.effort import thinks
from localmistral.chatformat.families import FAMILIES, Family
from localmistral.chatformat.messages import Message, Part, Tool
from localmistral.chatformat.metering import MAX_CHARS, MAX_STEPS, Meter
from localmistral.chatformat.mistral_parser import MistralParser
from localmistral.chatformat.normalising import normalise, result_as_json
from localmistral.chatformat.parser import OutputParser
from localmistral.chatformat.rendering import PromptTokens, Renderer
from localmistral.chatformat.segments import Segment, SpecialTexts, texts_in
from localmistral.errors import BadRequestError

_BOS, _EOS = "<s>", "</s>"
# A role that no template knows: it renders nothing, and keeps its neighbours from being merged.
_GAP = {"role": "gap", "content": ""}
# What these templates need for n messages: they copy their list of messages n times.
_CHARS_PER_PAIR, _STEPS_PER_MESSAGE = 16, 200


class MistralFormat:
    """The chat format of a family. One may be used from several threads at once."""

    def __init__(
        self, family: Family, tokens: PromptTokens, *, instructions: tuple[Part, ...] = ()
    ) -> None:
        """`instructions` is the reasoning system prompt, for families that are switched by one.

        `tokens.control` must have the family's control tokens.
        """
        self.family = family
        self.name = family.name
        self.default_effort = family.default_effort
        self.has_effort_switch = family.reasoning != "none"
        self._tokens = tokens
        self._instructions = instructions if family.reasoning == "system-prompt" else ()
        self._shown = _as_vocabulary_allows(family, tokens.control)
        self.source = self._shown.source
        self._renderer = Renderer(
            self.source,
            SpecialTexts(tokens.control, tokens.user_defined),
            bos_token=_BOS,
            eos_token=_EOS,
            add_bos=False,  # every family's template begins with it
            refuses=False,
        )

    @property
    def thinking_ids(self) -> tuple[int, int] | None:
        """The ids of [THINK] and [/THINK], if the vocabulary has them."""
        opening, closing = (self._tokens.control.get(name) for name in ("[THINK]", "[/THINK]"))
        return None if opening is None or closing is None else (opening, closing)

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] = (),
        effort: str | None = None,
        add_generation_prompt: bool = True,  # noqa: ARG002 - these formats have none
        continue_final_message: bool = False,
    ) -> tuple[Segment, ...]:
        """The prompt of a conversation, BOS included.

        `continue_final_message` leaves the last assistant message open. Errors: BadRequestError.
        """
        if not messages:
            raise BadRequestError("There are no messages.", param="messages")
        if continue_final_message and messages[-1].role != "assistant":
            raise BadRequestError(
                "continue_final_message needs an assistant message at the end.",
                param="continue_final_message",
            )
        thinking = thinks(effort or self.default_effort)
        instructions = self._instructions if thinking else ()
        normal = normalise(messages, self._shown, instructions)
        segments = self._render_normal(normal, tools, {"reasoning_effort": _switch(thinking)})
        eos = Segment(text=_EOS, control=True)
        return segments[:-1] if continue_final_message and segments[-1] == eos else segments

    def make_parser(self, *, tools: bool, in_thinking: bool) -> OutputParser:
        """A parser for one answer; `in_thinking` is `ends_in_thinking` of its prompt."""
        return MistralParser(self._tokens.control, tools=tools, in_thinking=in_thinking)

    def ends_in_thinking(self, segments: Sequence[Segment]) -> bool:
        """Whether a prompt leaves its thinking open, so that the answer goes on with it."""
        controls = (segment.text for segment in reversed(segments) if segment.control)
        return next(controls, "") == "[THINK]"

    def _render_normal(
        self, messages: tuple[Message, ...], tools: Sequence[Tool], settings: Mapping[str, str]
    ) -> tuple[Segment, ...]:
        plain, plain_results = _Layout(self._shown, _same, "", "").lay_out(messages)
        texts = list(texts_in([plain, plain_results, _lay_out_tools(tools, _same)]))
        disguise = self._renderer.disguise(texts)
        mark = disguise.marker()
        layout = _Layout(self._shown, disguise.hide, mark, disguise.seam())
        laid, results = layout.lay_out(messages)
        count = len(laid)
        meter = Meter(
            chars=MAX_CHARS + 64 * sum(map(len, texts)) + _CHARS_PER_PAIR * count * count,
            steps=MAX_STEPS + _STEPS_PER_MESSAGE * count,
        )
        variables = {**settings, "messages": laid, "tools": _lay_out_tools(tools, disguise.hide)}
        rendered = self._renderer.run(variables, meter)
        if results:
            place = re.compile(f'"{mark}(\\d+){mark}"')
            rendered = place.sub(lambda found: results[int(found[1])], rendered)
        return self._renderer.cut(disguise, rendered)


class _Layout:
    """Messages as the dictionaries that the generated templates read.

    Results that are to be JSON values get a mark in their place; `lay_out` returns them apart,
    because the templates can show text and numbers only. A seam goes behind unclosed thinking:
    whatever follows is encoded apart from it.
    """

    def __init__(self, family: Family, hide: Hide, mark: str, seam: str) -> None:
        self._family = family
        self._hide = hide
        self._mark = mark
        self._seam = seam
        self._results: list[str] = []

    def lay_out(self, messages: Sequence[Message]) -> tuple[list[dict[str, Any]], list[str]]:
        laid = [item for message in messages for item in self._message(message)]
        return laid, self._results

    def _message(self, message: Message) -> Iterator[dict[str, Any]]:
        if message.role == "system" and not self._family.system_blocks:
            if message.parts:
                yield {"role": "system", "content": self._content(message)}
            yield _GAP
            return
        laid: dict[str, Any] = {"role": message.role, "content": self._content(message)}
        if message.role == "tool":
            laid["tool_call_id"] = self._hide(message.tool_call_id)
        if message.tool_calls:
            laid["tool_calls"] = [
                {
                    "id": self._hide(call.id),
                    "function": {
                        "name": self._hide(call.name),
                        "arguments": self._hide(call.arguments_json),
                    },
                }
                for call in message.tool_calls
            ]
        yield laid

    def _content(self, message: Message) -> str | list[dict[str, Any]]:
        if message.role == "tool" and self._family.json_results:
            self._results.append(self._hide(result_as_json(message.content)))
            return f"{self._mark}{len(self._results) - 1}{self._mark}"
        if not any(part.thinking for part in message.parts):
            return self._hide(message.content)  # type: ignore[no-any-return]
        return [self._part(part) for part in message.parts]

    def _part(self, part: Part) -> dict[str, Any]:
        if part.thinking:
            text = self._hide(part.text) + ("" if part.closed else self._seam)
            return {"type": "thinking", "thinking": text, "closed": part.closed}
        return {"type": "text", "text": self._hide(part.text)}


def _lay_out_tools(tools: Sequence[Tool], hide: Hide) -> list[dict[str, Any]]:
    """Tools as mistral-common writes them: these keys, in this order."""
    return [
        {
            "type": "function",
            "function": {
                "name": hide(tool.name),
                "description": hide(tool.description),
                "parameters": hide(tool.parameters),
            },
        }
        for tool in tools
    ]


def _as_vocabulary_allows(family: Family, control: Mapping[str, int]) -> Family:
    """v13 shows earlier thinking if the vocabulary can, as mistral-common does."""
    reasoning = FAMILIES["v13-reasoning"]
    if family.name == "v13" and reasoning.control_tokens <= control.keys():
        return reasoning
    return family


def _switch(thinking: bool) -> str:
    """The value of the model setting: Mistral's models know two."""
    return "high" if thinking else "none"


def _same(value: Any) -> Any:
    return value
