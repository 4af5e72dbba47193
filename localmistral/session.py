"""A loaded model that one can talk to: the engine and the chat format behind one `stream`.

    with Chat.load("SmolLM2-135M-Instruct.Q4_1.gguf") as chat:
        for item in chat.stream([{"role": "user", "content": "Hello"}]):
            ...  # ReasoningDelta, ContentDelta, ToolCallDelta; last a ChatResult

Terminal, one-shot and server all use it. Knows nothing of rendering or HTTP.
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

from localmistral.answer import Assembly, ChatStream
from localmistral.calling import read_tool_choice, shape_answer
from localmistral.chatformat.effort import ThinkingBudgets, parse_effort, thinks
from localmistral.chatformat.formats import ChatFormat, make_format
from localmistral.chatformat.messages import Message, Tool, parse_messages, parse_tools
from localmistral.chatformat.segments import Segment
from localmistral.engine import Constraint, Engine, EngineSettings, Request, Sampling
from localmistral.engine.constraints import ConstraintCompiler, Spec, Thinking
from localmistral.engine.thinking import ThinkingBudget
from localmistral.errors import BadRequestError
from localmistral.fit.plan import Plan, PlanRequest
from localmistral.loading import (
    OnNote,
    PlannedLoad,
    find_model,
    load_engine,
    plan_load,
)
from localmistral.markup import find_thinking_tags, read_prompt_tokens
from localmistral.models.cache import LocalModel
from localmistral.models.catalog import load_catalog
from localmistral.models.gguf import read_shape, read_vocabulary
from localmistral.models.history import record_use
from localmistral.models.shape import ModelShape, Vocabulary, require_runnable
from localmistral.planning import current_machine
from localmistral.planning.candidates import limit_context


class Chat:
    """A model ready to answer, from any thread and many at once. Close it after use.

    One that only makes embeddings is loaded as well: `engine.embedder` has them, and what needs an
    answer raises BadRequestError.
    """

    def __init__(
        self,
        engine: Engine,
        shape: ModelShape,
        vocabulary: Vocabulary,
        local: LocalModel,
        *,
        chat_template: str | None = None,
        budgets: ThinkingBudgets | None = None,
    ) -> None:
        self.engine = engine
        self.shape = shape
        self.plan: Plan | None = None
        self.name = local.name
        self.title = local.path.name if local.name == str(local.path) else local.name
        self.model = load_catalog().find(local.model) if local.model else None
        self.budgets = budgets or ThinkingBudgets()
        self._tokens = read_prompt_tokens(engine, vocabulary)
        self._format: ChatFormat | None = None
        self._thinking: tuple[int, int] | None = None
        if self.can_chat:
            self._format = make_format(
                self._tokens,
                embedded=shape.tokenizer.chat_template,
                catalogue_template=self.model.template if self.model else None,
                model_name=self.model.name if self.model else shape.name,
                override=chat_template,
            )
            self._thinking = self._format.thinking_ids or find_thinking_tags(vocabulary)
        self._compiler = ConstraintCompiler(engine.tokenizer)

    @classmethod
    def load(
        cls,
        name: str | os.PathLike[str],
        settings: EngineSettings | None = None,
        *,
        context: int | None = None,
        request: PlanRequest | None = None,
        chat_template: str | None = None,
        budgets: ThinkingBudgets | None = None,
        on_progress: Callable[[float], None] | None = None,
        on_note: OnNote = lambda _: None,
    ) -> Self:
        """Load a model by path, by a name of the catalogue or as `hf:org/repo:QUANT`.

        It is planned for this machine first: `request` says what is wanted of the plan, `context`
        (tokens per stream) alone is short for that. With `settings` nothing is planned, and they
        hold as they are. `chat_template` is a Jinja file, "embedded" or the name of a Mistral
        family. `on_note` gets sentences about what came out otherwise than planned. Raises
        ModelNotFoundError when the model isn't on this disk, ModelFileError when it can't be
        loaded, LocalMistralError when no plan fits.
        """
        if settings is not None:
            return cls._load_as_told(
                os.fspath(name), settings, context, chat_template, budgets, on_progress
            )
        wanted = request or PlanRequest()
        if context is not None:
            wanted = dataclasses.replace(wanted, context=context)
        planned = plan_load(os.fspath(name), wanted, current_machine())
        return cls.load_planned(
            planned,
            chat_template=chat_template,
            budgets=budgets,
            on_progress=on_progress,
            on_note=on_note,
        )

    @classmethod
    def load_planned(
        cls,
        planned: PlannedLoad,
        *,
        chat_template: str | None = None,
        budgets: ThinkingBudgets | None = None,
        on_progress: Callable[[float], None] | None = None,
        on_note: OnNote = lambda _: None,
    ) -> Self:
        """Load what `loading.plan_load` planned; `plan` then says what was really run."""
        vocabulary = read_vocabulary(planned.local.path)
        engine, done = load_engine(planned, on_progress=on_progress, on_note=on_note)
        chat = cls._wrap(engine, done.shape, vocabulary, done.local, chat_template, budgets)
        chat.plan = done.plan
        return chat

    @classmethod
    def _load_as_told(
        cls,
        name: str,
        settings: EngineSettings,
        context: int | None,
        chat_template: str | None,
        budgets: ThinkingBudgets | None,
        on_progress: Callable[[float], None] | None,
    ) -> Self:
        local = find_model(name)
        shape = read_shape(local.path)
        require_runnable(shape)
        vocabulary = read_vocabulary(local.path)
        limit = limit_context(shape, local.model)
        wanted = min(settings.context, limit) if context is None else context
        settings = dataclasses.replace(settings, context=wanted)
        engine = Engine.load(shape.files, settings, on_progress=on_progress)
        return cls._wrap(engine, shape, vocabulary, local, chat_template, budgets)

    @classmethod
    def _wrap(
        cls,
        engine: Engine,
        shape: ModelShape,
        vocabulary: Vocabulary,
        local: LocalModel,
        chat_template: str | None,
        budgets: ThinkingBudgets | None,
    ) -> Self:
        try:
            chat = cls(
                engine, shape, vocabulary, local, chat_template=chat_template, budgets=budgets
            )
        except BaseException:
            engine.close()
            raise
        record_use(local.path)
        return chat

    @property
    def can_chat(self) -> bool:
        """False where the model makes embeddings and nothing else."""
        return not self.shape.only_embeds

    def require_writer(self) -> None:
        """Errors: BadRequestError where the model can't chat."""
        if not self.can_chat:
            raise BadRequestError(
                f"{self.title} makes embeddings, it can't chat.",
                "Ask it for embeddings (/v1/embeddings), and a chat model for text.",
                param="model",
            )

    @property
    def format(self) -> ChatFormat:
        """How the model is talked to. Errors: those of `require_writer`."""
        self.require_writer()
        assert self._format is not None
        return self._format

    @property
    def has_effort_switch(self) -> bool:
        """Whether the model can be told how much to think."""
        return self.can_chat and self.format.has_effort_switch

    def render(
        self,
        messages: object,
        *,
        tools: object = None,
        effort: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> tuple[Segment, ...]:
        """The prompt of a conversation. Errors: BadRequestError naming what is wrong."""
        return self.format.render(
            _parse(messages),
            tools=_parse_tools(tools),
            effort=parse_effort(effort),
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )

    def encode(self, segments: Sequence[Segment]) -> tuple[int, ...]:
        """Token ids: control tokens by name, everything else as plain text."""
        tokens: list[int] = []
        for segment in segments:
            if segment.control:
                tokens.append(self._tokens.control[segment.text])
            else:
                tokens += self.engine.tokenize(segment.text)
        return tuple(tokens)

    def default_sampling(self, effort: str | None = None) -> Sampling:
        """The model card's values for `effort`, else the file's own, else llama.cpp's."""
        if self.model is None:
            return _recommended_sampling(self.shape)
        card = self.model.sampling_for("high" if self._thinks(effort) else "none")
        given = {"temperature": card.temperature, "top_p": card.top_p}
        known: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
        return dataclasses.replace(_recommended_sampling(self.shape), **known)

    def stream(
        self,
        messages: object,
        *,
        tools: object = None,
        effort: str | None = None,
        max_tokens: int | None = None,
        stop: Sequence[str] | None = (),
        sampling: Mapping[str, Any] | None = None,
        output: Spec | None = None,
        tool_choice: str | Mapping[str, Any] | None = "auto",
        thinking_budget: int | None = None,
        cache_prompt: bool = True,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        top_logprobs: int | None = None,
        ignore_eos: bool = False,
        min_tokens: int = 0,
        stop_tokens: Sequence[int] = (),
    ) -> ChatStream:
        """Start an answer to `messages` (OpenAI's form, or parsed ones).

        `sampling` names the fields of `Sampling` to set; the others keep the model's defaults.
        `output` is what the answer (not the thinking before it, nor a call in its place) has to
        look like; arguments of strict tools always fit their schema. `tool_choice` is auto, none,
        required (at least one call), or the tool to call: its name, or OpenAI's object with the
        name in it.
        `thinking_budget` in tokens takes the place of the effort's own. With `top_logprobs` (0 to
        20) the stream also has a TokenProbability after each token of the content.
        Errors: BadRequestError, ContextOverflowError, BusyError; later ones come while iterating.
        """
        choice = read_tool_choice(tool_choice)
        declared = _parse_tools(tools) if choice != "none" else ()
        shape = shape_answer(self._tokens.control, declared, choice, output)
        segments = self.render(
            messages,
            tools=declared,
            effort=effort,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )
        is_open = self.format.ends_in_thinking(segments)
        request = Request(
            prompt=self.encode(segments),
            max_tokens=max_tokens,
            stop=(stop,) if isinstance(stop, str) else tuple(stop or ()),
            sampling=self.set_sampling(sampling or {}, effort),
            cache_prompt=cache_prompt,
            top_logprobs=top_logprobs,
            ignore_eos=ignore_eos,
            min_tokens=min_tokens,
            stop_tokens=tuple(stop_tokens),
            thinking=self._thinking,
            in_thinking=is_open,
            constraint=self._make_constraint(shape, effort, is_open, of_tools=shape is not output),
            guide=self._make_guide(effort, thinking_budget, is_open),
        )
        parser = self.format.make_parser(tools=bool(declared), in_thinking=is_open)
        stream = self.engine.submit(request)
        return ChatStream(stream, Assembly(parser), prompt_tokens=len(request.prompt))

    def set_sampling(self, given: Mapping[str, Any], effort: str | None = None) -> Sampling:
        """The model's defaults with the fields in `given`. Errors: BadRequestError."""
        return _set_sampling(self.default_sampling(effort), given)

    def constrain(self, output: Spec | None) -> Constraint | None:
        """What keeps a plain text, without any thinking before it, to the form of `output`."""
        return None if output is None else self._compiler.compile(output)

    def _thinks(self, effort: str | None) -> bool:
        return thinks(effort or self.format.default_effort)

    def _make_constraint(
        self, output: Spec | None, effort: str | None, is_open: bool, *, of_tools: bool
    ) -> Constraint | None:
        if output is None:
            return None
        thinking = None
        if self._thinking is not None and (is_open or self._thinks(effort)):
            opening, closing = (self.engine.detokenize([token]) for token in self._thinking)
            thinking = Thinking(open=opening, close=closing, opened=is_open)
        param = "tools" if of_tools else "response_format"
        return self._compiler.compile(output, thinking=thinking, param=param)

    def _make_guide(
        self, effort: str | None, thinking_budget: int | None, is_open: bool
    ) -> ThinkingBudget | None:
        budget = thinking_budget
        if budget is None:
            budget = self.budgets.choose(effort, self.engine.settings.context)
        if budget is None or self._thinking is None:
            return None
        if budget < 1:
            raise BadRequestError(
                f"thinking_budget is {budget}, it must be at least 1.",
                "Effort none leaves thinking out.",
                param="thinking_budget",
            )
        return ThinkingBudget(
            open_token=self._thinking[0],
            close_token=self._thinking[1],
            budget=budget,
            closing=self.engine.tokenize(self.budgets.closing),
            is_open=is_open,
        )

    def close(self) -> None:
        self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _parse(messages: object) -> tuple[Message, ...]:
    if isinstance(messages, tuple) and all(isinstance(m, Message) for m in messages):
        return messages
    return parse_messages(messages)


def _set_sampling(defaults: Sampling, given: Mapping[str, Any]) -> Sampling:
    """`given` over the defaults; None leaves one as it is. Errors: BadRequestError."""
    known = {field.name for field in dataclasses.fields(Sampling)}
    for name in given:
        if name not in known:
            raise BadRequestError(f"{str(name)[:40]!r} is no sampling setting.", param=str(name))
    return dataclasses.replace(defaults, **{k: v for k, v in given.items() if v is not None})


def _parse_tools(tools: object) -> tuple[Tool, ...]:
    if isinstance(tools, tuple) and all(isinstance(tool, Tool) for tool in tools):
        return tools
    return parse_tools(tools)


def _recommended_sampling(shape: ModelShape) -> Sampling:
    """The values of the file that make sense, one by one."""
    sampling = Sampling()
    for name, value in shape.sampling:
        whole: Any = int(value) if name == "top_k" else value
        with contextlib.suppress(BadRequestError):
            sampling = dataclasses.replace(sampling, **{name: whole})
    return sampling
