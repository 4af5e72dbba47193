"""Which chat format a model speaks: a Mistral family's, or that of a Jinja template.

`make_format` is the way in. Knows nothing of models' files, of sampling or of engines.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from localmistral.chatformat.families import (
    FAMILIES,
    Family,
    find_family,
    reasoning_instructions,
)
from localmistral.chatformat.messages import Message, Tool
from localmistral.chatformat.mistral_format import MistralFormat
from localmistral.chatformat.mistral_parser import MistralParser
from localmistral.chatformat.parser import OutputParser, TagParser
from localmistral.chatformat.rendering import PromptTokens
from localmistral.chatformat.sandbox import MAX_SOURCE_CHARS
from localmistral.chatformat.segments import Segment
from localmistral.chatformat.template import ChatTemplate, ends_in_thinking
from localmistral.errors import TemplateError, UsageError

EMBEDDED = "embedded"
_SWITCH = re.compile(r"\b(reasoning_effort|enable_thinking)\b")


class ChatFormat(Protocol):
    """Conversations to prompts, and answers back. Usable from several threads at once."""

    @property
    def name(self) -> str:
        """A family's name, "embedded", or the file the template came from."""
        ...

    @property
    def source(self) -> str:
        """The Jinja template."""
        ...

    @property
    def has_effort_switch(self) -> bool: ...

    @property
    def default_effort(self) -> str:
        """What an effort of None means: "none" or "high"."""
        ...

    @property
    def thinking_ids(self) -> tuple[int, int] | None:
        """The tokens that open and close thinking, where these are control tokens."""
        ...

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] = (),
        effort: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> tuple[Segment, ...]: ...

    def make_parser(self, *, tools: bool, in_thinking: bool) -> OutputParser: ...

    def ends_in_thinking(self, segments: Sequence[Segment]) -> bool: ...


class TemplateFormat(ChatTemplate):
    """The format of any chat template; control tokens of Mistral's in an answer are read by id."""

    default_effort = "none"

    def __init__(self, source: str | None, tokens: PromptTokens, *, name: str = EMBEDDED) -> None:
        """`source` None or blank: ChatML. Errors: TemplateError."""
        super().__init__(
            source,
            bos_token=tokens.bos,
            eos_token=tokens.eos,
            control_tokens=tokens.control,
            user_defined_tokens=tokens.user_defined,
            add_bos=tokens.adds_bos,
        )
        self.name = name
        self.has_effort_switch = _SWITCH.search(self.source) is not None
        self._control = tokens.control

    @property
    def thinking_ids(self) -> tuple[int, int] | None:
        for opening, closing in (("[THINK]", "[/THINK]"), ("<think>", "</think>")):
            if opening in self._control and closing in self._control:
                return self._control[opening], self._control[closing]
        return None

    def make_parser(self, *, tools: bool, in_thinking: bool) -> OutputParser:
        if "[TOOL_CALLS]" in self._control:
            return MistralParser(self._control, tools=tools, in_thinking=in_thinking)
        return TagParser(tools=tools, in_thinking=in_thinking)

    def ends_in_thinking(self, segments: Sequence[Segment]) -> bool:
        return ends_in_thinking(segments)


def make_format(
    tokens: PromptTokens,
    *,
    embedded: str | None = None,
    catalogue_template: str | None = None,
    model_name: str = "",
    override: str | None = None,
) -> ChatFormat:
    """The chat format of a model.

    `embedded` is the template in its file; `catalogue_template` and `model_name` are the
    catalogue's words on it, if it is known there; `override` is what the user wants instead: a
    family's name, "embedded", or the path of a Jinja file.
    Errors: UsageError for an override that is none of these or doesn't fit the vocabulary,
    TemplateError for a template that can't be compiled.
    """
    if override is not None and override not in FAMILIES and override != EMBEDDED:
        return TemplateFormat(_read_file(override), tokens, name=override)
    if override is None:
        family = find_family(tokens.control, catalogue_template, embedded)
    else:
        family = FAMILIES.get(override)
    if family is None:
        return TemplateFormat(embedded, tokens)
    _check_fits(family, tokens)
    instructions = reasoning_instructions(model_name, embedded)
    return MistralFormat(family, tokens, instructions=instructions)


def _check_fits(family: Family, tokens: PromptTokens) -> None:
    missing = sorted(family.control_tokens - tokens.control.keys())
    if missing:
        raise UsageError(
            f"The chat template {family.name} needs {len(missing)} control tokens that this "
            f"model's vocabulary doesn't have: {', '.join(missing[:5])}.",
            "Use --chat-template embedded, or leave it out.",
        )


def _read_file(path: str) -> str:
    file = Path(path)
    if not file.is_file():
        names = ", ".join((EMBEDDED, *FAMILIES))
        raise UsageError(
            f"{path[:200]!r} is neither a file nor a chat template that is known.",
            f"Use --chat-template with a Jinja file or one of {names}.",
        )
    try:
        size = file.stat().st_size
        if size > 4 * MAX_SOURCE_CHARS:
            raise TemplateError(f"The chat template {path} has {size:,} bytes.")
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TemplateError(f"The chat template {path} can't be read: {error}.") from error
