"""What an answer has to look like, checked and compiled for one request.

    compiler = ConstraintCompiler(engine.tokenizer)
    constraint = compiler.compile(JsonSchema(schema={"type": "object"}))
    engine.submit(Request(prompt=..., constraint=constraint))

Costly or endless specifications are refused before they are compiled. Knows nothing of HTTP, of
tools or of chat templates.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from localmistral.engine.gbnf import GbnfConstraint
from localmistral.engine.guidance import (
    GrammarConstraint,
    GrammarError,
    LazyTokenizer,
    compose,
    write_choice,
    write_json,
    write_regex,
    write_thinking,
)
from localmistral.engine.lark_check import check_lark
from localmistral.engine.regex_check import check_regex
from localmistral.engine.schema_check import check_schema
from localmistral.engine.settings import Constraint, Logits
from localmistral.engine.specs import Choice, Gbnf, JsonObject, JsonSchema, Lark, Regex, Spec
from localmistral.engine.tokenizer import Tokenizer, run_with_stack
from localmistral.errors import BadRequestError, EngineError

__all__ = [
    "Choice",
    "Constraint",
    "ConstraintCompiler",
    "Gbnf",
    "JsonObject",
    "JsonSchema",
    "Lark",
    "Regex",
    "Spec",
    "Thinking",
    "write_form",
]

MAX_OPTIONS = 10_000
MAX_OPTION_BYTES = 256 * 1024
"""Of all options of a choice together."""

FLEXIBLE_WHITESPACE = r" |\n[ ]{0,32}"
"""One space, or a new line with some indentation: any more and models go on with it for ever."""
_WHITESPACE = {"flexible": FLEXIBLE_WHITESPACE, "compact": ""}
_COMPILE_STACK_BYTES = 64 * 2**20
"""Compilers recurse along rules and references; a thread's own stack may have 0.5 MiB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Thinking:
    """How a model marks its thinking: control tokens such as [THINK], or tags such as <think>.

    `opened` says that the prompt ends inside of it, as after a template that writes the tag.
    """

    open: str
    close: str
    opened: bool = False


class ConstraintCompiler:
    """Makes constraints for one vocabulary; from any thread. Keep one per engine."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._lazy = LazyTokenizer(tokenizer)

    def compile(
        self, spec: Spec, *, thinking: Thinking | None = None, param: str = "response_format"
    ) -> Constraint:
        """A constraint for one request; its first mask has been computed.

        With `thinking`, thinking may come first and is free of the constraint. The first call on
        an engine takes about 0.7 s for 131k tokens. Raises BadRequestError with `param` for
        what is malformed, can't be satisfied or would cost too much.
        """
        tokens = self._find_tokens(thinking)
        by_text = None if tokens is not None else thinking
        if isinstance(spec, Gbnf):
            inner: Constraint = self._build_gbnf(spec, by_text, param)
        else:
            inner = self._build(spec, by_text, param)
        if thinking is None or tokens is None:
            return inner
        return AfterThinking(inner, tokens, self._lazy.make().special, opened=thinking.opened)

    def _find_tokens(self, thinking: Thinking | None) -> tuple[int, int] | None:
        """The control tokens that open and close thinking, None where it is marked by text."""
        if thinking is None:
            return None
        found = []
        for text in (thinking.open, thinking.close):
            tokens = self._tokenizer.encode(text, parse_special=True)
            if len(tokens) != 1 or not self._tokenizer.is_control(tokens[0]):
                return None
            found.append(tokens[0])
        return found[0], found[1]

    def _build(self, spec: Spec, thinking: Thinking | None, param: str) -> Constraint:
        answer, before = write_form(spec, param), ""
        if thinking is not None:
            before = write_thinking(thinking.open, thinking.close, opened=thinking.opened)
        grammar = compose(answer, before)
        lenient = (isinstance(spec, JsonSchema) and not spec.strict) or (
            isinstance(spec, Lark) and spec.lenient
        )
        tokenizer = self._lazy.make()
        made: list[GrammarConstraint] = []
        try:
            run_with_stack(
                lambda: made.append(GrammarConstraint(tokenizer, grammar, lenient=lenient)),
                _COMPILE_STACK_BYTES,
            )
        except GrammarError as error:
            raise BadRequestError(
                f"The {_NAMES[type(spec)]} can't be enforced: {error}.", _hint(spec), param=param
            ) from error
        return made[0]

    def _build_gbnf(self, spec: Gbnf, thinking: Thinking | None, param: str) -> Constraint:
        if thinking is not None:
            raise BadRequestError(
                "A GBNF grammar can't follow thinking that is marked by text.",
                "Turn thinking off: reasoning_effort none.",
                param=param,
            )
        return GbnfConstraint(self._tokenizer, spec.grammar, self._lazy.make().control, param)


class AfterThinking:
    """A constraint that begins when thinking between two control tokens has ended.

    Until then, and only if thinking was opened, any text goes, but no control token except the
    closing one: the answer can't end, nor call a tool, inside its thinking.
    """

    def __init__(
        self, inner: Constraint, tokens: tuple[int, int], special: npt.NDArray[np.int64],
        *, opened: bool,
    ) -> None:  # fmt: skip
        """`tokens` open and close thinking; `special` are all control and end tokens."""
        self._inner = inner
        self._open, self._close = tokens
        self._state: Literal["before", "thinking", "after"] = "thinking" if opened else "before"
        self._barred = special[special != self._close]

    def mask(self, logits: Logits) -> None:
        if self._state == "thinking":
            logits[self._barred] = -np.inf
            return
        opening = logits[self._open]
        self._inner.mask(logits)
        if self._state == "before":
            logits[self._open] = opening

    def accept(self, token: int) -> None:
        if self._state == "thinking":
            self._state = "after" if token == self._close else "thinking"
        elif self._state == "before" and token == self._open:
            self._state = "thinking"
        else:
            self._state = "after"
            self._inner.accept(token)


_NAMES: dict[type[Any], str] = {
    JsonSchema: "JSON schema",
    JsonObject: "JSON object",
    Regex: "regular expression",
    Lark: "grammar",
    Choice: "choice",
}


def _hint(spec: Spec) -> str:
    if isinstance(spec, JsonSchema) and spec.strict:
        return 'Leave out what can\'t be enforced, or have it ignored with "strict": false.'
    return ""


def write_form(spec: Spec, param: str) -> str:
    """`spec` in llguidance's Lark, checked; but for grammars the one rule `start: ...`.

    Errors: BadRequestError with `param`.
    """
    match spec:
        case JsonSchema(schema=schema, whitespace=whitespace, strict=strict):
            text = check_schema(schema, param)
            return write_json(text, whitespace=_WHITESPACE[whitespace], lenient=not strict)
        case JsonObject(whitespace=whitespace):
            return write_json(
                '{"type": "object"}', whitespace=_WHITESPACE[whitespace], lenient=False
            )
        case Regex(pattern=pattern):
            if not pattern:
                raise BadRequestError("The regular expression is empty.", param=param)
            check_regex(pattern, "The regular expression", param)
            return write_regex(pattern)
        case Lark(grammar=grammar):
            check_lark(grammar, param)
            return grammar
        case Choice(options=options):
            _check_options(options, param)
            return write_choice(options)
    raise EngineError(f"A {type(spec).__name__} is no constraint.")


def _check_options(options: Sequence[str], param: str) -> None:
    if not options:
        raise BadRequestError("A choice needs at least 1 option, it has 0.", param=param)
    for number, option in enumerate(options):
        if not isinstance(option, str) or not option:
            raise BadRequestError(f"Option {number} of the choice is not a text.", param=param)
    try:
        size = sum(len(option.encode("utf-8")) for option in options)
    except UnicodeEncodeError as error:
        raise BadRequestError(
            "An option holds half of a surrogate pair, which is not text.", param=param
        ) from error
    if len(options) > MAX_OPTIONS or size > MAX_OPTION_BYTES:
        raise BadRequestError(
            f"The choice has {len(options)} options of {size} bytes together, at most "
            f"{MAX_OPTIONS} of {MAX_OPTION_BYTES} bytes are taken.",
            param=param,
        )
