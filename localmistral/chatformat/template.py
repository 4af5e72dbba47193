"""Renders a conversation with a model's chat template, into segments that are safe to tokenise.

Only the template's own text can become control tokens (see `segments`), whatever the template does
is bounded (see `sandbox`), and what it can't express is said another way (see `dialect`).
Knows nothing of tokenizers beyond the names of special tokens, and nothing of a model's output.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from types import MappingProxyType
from typing import Any

from localmistral.chatformat.dialect import Dialect, forms, lay_out_tools, probe
from localmistral.chatformat.effort import thinks
from localmistral.chatformat.messages import Message, Tool, plain_json, without_empty_answers
from localmistral.chatformat.metering import MAX_CHARS, TRIAL_CHARS, TRIAL_STEPS, Meter
from localmistral.chatformat.rendering import Renderer
from localmistral.chatformat.segments import Segment, SpecialTexts, texts_in
from localmistral.errors import BadRequestError

# For models whose file has no template.
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_THINKING_TAGS = {"<think>": "</think>", "<thinking>": "</thinking>", "[THINK]": "[/THINK]"}
_RESERVED = "messages tools add_generation_prompt bos_token eos_token raise_exception strftime_now"


class ChatTemplate:
    """A compiled template. One may be used from several threads at once."""

    def __init__(
        self,
        source: str | None,
        *,
        bos_token: str = "",
        eos_token: str = "",
        control_tokens: Iterable[str] = (),
        user_defined_tokens: Iterable[str] = (),
        add_bos: bool = False,
        clock: Callable[[], datetime] = datetime.now,
    ) -> None:
        """Compile `source` (None or blank: ChatML).

        `control_tokens` are the texts of the vocabulary's CONTROL and UNKNOWN tokens,
        `user_defined_tokens` of its USER_DEFINED ones; `add_bos` is whether the vocabulary wants
        a BOS at the start. Errors: TemplateError.
        """
        self.source = source if source and source.strip() else CHATML
        self._renderer = Renderer(
            self.source,
            SpecialTexts(control_tokens, user_defined_tokens),
            bos_token=bos_token,
            eos_token=eos_token,
            add_bos=add_bos,
            clock=clock,
        )
        self._dialect: Dialect | None = None
        self._efforts: dict[str, str] = {}

    @property
    def dialect(self) -> Dialect:
        """What the template understands, found at the first use."""
        if self._dialect is None:
            self._dialect = probe(self.source, self._run_small)
        return self._dialect

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] = (),
        effort: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        extra: Mapping[str, Any] | None = None,
    ) -> tuple[Segment, ...]:
        """The prompt of a conversation, BOS included where the vocabulary wants it.

        `effort` goes to templates as `reasoning_effort` and `enable_thinking`; `extra` are further
        template variables from outside. `continue_final_message` leaves the last assistant message
        open. Errors: BadRequestError if the template refuses the conversation in every form,
        TemplateError if it fails or passes its limits.
        """
        if not messages:
            raise BadRequestError("There are no messages.", param="messages")
        extra = _checked(extra or {})
        if continue_final_message:
            _check_continuable(messages)
            continue_final_message = not messages[-1].is_empty
        messages = tuple(map(_with_thinking_apart, without_empty_answers(messages)))
        adapted, shown = self.dialect.adapt(messages, tools)
        settings = self._thinking_variables(effort) | extra
        settings["add_generation_prompt"] = add_generation_prompt and not continue_final_message
        refusals: list[BadRequestError] = []
        for form in forms(adapted):
            try:
                return self._render_form(form, shown, settings, continue_final_message)
            except BadRequestError as error:
                refusals.append(error)
        raise refusals[0]

    def _render_form(
        self,
        messages: tuple[Message, ...],
        tools: tuple[Tool, ...],
        settings: Mapping[str, Any],
        open_end: bool,
    ) -> tuple[Segment, ...]:
        laid = self.dialect.lay_out(messages, _same)
        texts = list(texts_in([laid, lay_out_tools(tools, _same), settings]))
        disguise = self._renderer.disguise(texts)
        marker = ""
        if open_end:
            marker = disguise.marker()
            messages = (*messages[:-1], _marked(messages[-1], marker + " "))
        hidden = {name: disguise.hide(value) for name, value in settings.items()}
        rendered = self._run(
            self.dialect.lay_out(messages, disguise.hide),
            lay_out_tools(tools, disguise.hide) or None,
            hidden,
            Meter(chars=MAX_CHARS + 64 * sum(map(len, texts))),
        )
        if open_end:
            rendered = _opened(rendered, marker)
        return self._renderer.cut(disguise, rendered)

    def _run(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        settings: Mapping[str, Any],
        meter: Meter,
    ) -> str:
        variables = {"documents": None, **settings, "messages": messages, "tools": tools}
        return self._renderer.run(variables, meter)

    def _run_small(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        settings: Mapping[str, Any] = MappingProxyType({}),
    ) -> str:
        """Render a trial conversation, which gets little to spend."""
        meter = Meter(chars=TRIAL_CHARS, steps=TRIAL_STEPS)
        return self._run(messages, tools, {"add_generation_prompt": False, **settings}, meter)

    def _thinking_variables(self, effort: str | None) -> dict[str, Any]:
        if effort is None:
            return {}
        if effort not in self._efforts:
            self._efforts[effort] = self._accepted_effort(effort)
        return {
            "reasoning_effort": self._efforts[effort],
            "enable_thinking": thinks(effort),
            "thinking": thinks(effort),
        }

    def _accepted_effort(self, effort: str) -> str:
        """The effort itself, unless the template takes only the nearest of none and high."""
        nearest = "high" if thinks(effort) else "none"
        laid = self.dialect.lay_out([Message(role="user", content="question")], _same)
        for candidate in (effort, nearest):
            try:
                self._run_small(laid, None, {"reasoning_effort": candidate})
            except BadRequestError:
                continue
            return candidate
        return effort


def ends_in_thinking(segments: Sequence[Segment]) -> bool:
    """Whether a prompt leaves a thinking tag open, so that the answer starts with reasoning.

    Looks at what follows the last control token that is no thinking tag itself: the assistant's
    own beginning, in every template that has control tokens at all.
    """
    tags = {*_THINKING_TAGS, *_THINKING_TAGS.values()}
    tail = ""
    for segment in reversed(segments):
        if segment.control and segment.text not in tags:
            break
        tail = segment.text + tail
    return any(
        tail.rfind(opening) > tail.rfind(closing) for opening, closing in _THINKING_TAGS.items()
    )


def _same(value: Any) -> Any:
    return value


def _checked(extra: Mapping[str, Any]) -> dict[str, Any]:
    checked = {}
    for name, value in extra.items():
        param = f"chat_template_kwargs.{name}"
        if name in _RESERVED.split():
            raise BadRequestError(f"{param} is set by the program itself.", param=param)
        checked[name] = plain_json(value, param)
    return checked


def _with_thinking_apart(message: Message) -> Message:
    """Thinking that a client echoes within the text, as the model wrote it, apart from the text."""
    if message.role == "system" and any(part.thinking for part in message.parts):
        raise BadRequestError(
            "A system message holds thinking, which this model's template can't show.",
            "Send the system message as text.",
            param="messages",
        )
    start = message.content.lstrip()
    if message.role == "assistant" and not message.reasoning:
        for opening, closing in _THINKING_TAGS.items():
            if start.startswith(opening) and closing in start:
                thinking, _, answer = start.removeprefix(opening).partition(closing)
                return replace(message, content=answer.lstrip(), reasoning=thinking.strip())
    return message


def _check_continuable(messages: Sequence[Message]) -> None:
    last = messages[-1] if messages else None
    if last is None or last.role != "assistant" or last.tool_calls:
        raise BadRequestError(
            "continue_final_message needs an assistant message without tool calls at the end.",
            param="continue_final_message",
        )


def _marked(message: Message, mark: str) -> Message:
    """The message with a mark where it is to be continued: after its text, else its thinking."""
    if message.reasoning and not message.content:
        return replace(message, reasoning=message.reasoning + mark)
    return replace(message, content=message.content + mark)


def _opened(rendered: str, marker: str) -> str:
    """The rendering up to the marker, trimmed if the template trims.

    A blank was put behind the marker: a template that trims has taken it away, and then blanks
    before the marker would have gone too.
    """
    end = rendered.rfind(marker)
    if end < 0:
        raise BadRequestError(
            "The model's chat template doesn't show the assistant message to be continued.",
            param="continue_final_message",
        )
    kept = rendered[:end].replace(marker, "")
    return kept if rendered[end + 1 : end + 2] == " " else kept.rstrip()
