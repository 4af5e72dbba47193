"""Runs a chat template that may be hostile: no attribute tricks, and an end to every computation.

Jinja's immutable sandbox keeps a template away from Python. What it leaves open is closed here:
every loop turn, call, filter and operator of a template is charged to a `Meter` (steps, characters,
seconds), so nested loops, doubling strings and giant numbers stop with an error. The statements
that charge are put into the parsed template, so nothing depends on signals or threads.

Knows nothing of messages, of tokens or of who wrote which text.
"""

import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from functools import wraps
from typing import Any

import jinja2
from jinja2 import filters as stock
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from localmistral.chatformat.metering import (
    HINT,
    MAX_WIDTH_DIGITS,
    Meter,
    Metering,
    shallow_chars,
    too_much,
)
from localmistral.errors import TemplateError

MAX_JSON_LAYOUT = 32  # characters of indent, or of separators
MAX_SOURCE_CHARS = 256 * 1024  # real templates have up to about 20,000
_STR_METHODS = (
    "capitalize casefold count endswith find format format_map index isalnum isalpha isascii "
    "isdecimal isdigit isidentifier islower isnumeric isprintable isspace istitle isupper join "
    "lower lstrip partition removeprefix removesuffix replace rfind rindex rpartition rsplit "
    "rstrip split splitlines startswith strip swapcase title upper"
)
_METHODS: dict[type, frozenset[str]] = {
    str: frozenset(_STR_METHODS.split()),
    dict: frozenset({"copy", "get", "items", "keys", "values"}),
    list: frozenset({"copy", "count", "index"}),
    tuple: frozenset({"count", "index"}),
    int: frozenset({"bit_length"}),
    float: frozenset({"is_integer"}),
}
_STOCK_FILTERS = (
    "abs capitalize count d default dictsort first float groupby int items last length list lower "
    "map max min reject rejectattr reverse select selectattr sort title trim truncate unique "
    "upper wordcount"
)
# Filters that look at no more than the first level of their value. All others may compare, print
# or hash nested values in C, where shared parts make the work exponential.
_SHALLOW_FILTERS = (
    "count d default first items last length list map reject rejectattr reverse select selectattr"
)
_SHALLOW_TESTS = (
    "boolean callable defined divisibleby even false filter float integer iterable mapping none "
    "number odd sameas sequence string test true undefined"
)


class Refusal(Exception):  # noqa: N818
    """The template called `raise_exception`: it doesn't take this conversation."""


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`, a mark for training, is the text inside it."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Sandbox(ImmutableSandboxedEnvironment):
    """A Jinja environment in which everything a template does is charged.

    One may be used from several threads at once: the meter belongs to the thread that renders.
    """

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(
        self,
        *,
        clock: Callable[[], datetime],
        ascii_kept: Callable[[str], bool],
        refuses: bool = True,
    ) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            finalize=_printed,
            extensions=[loopcontrols, _Generation],
        )
        self._here = threading.local()
        self._clock = clock
        self._ascii_kept = ascii_kept
        self._refuses = refuses
        self._restrict()

    def _restrict(self) -> None:
        """Keep what chat templates use; own versions of what can grow without end."""
        self.globals.pop("lipsum")
        self.globals.update(raise_exception=self._refuse, strftime_now=self._strftime_now)
        shallow = (_SHALLOW_FILTERS + " " + _SHALLOW_TESTS).split()
        standard: dict[str, Any] = dict(self.filters)
        known = {name: standard[name] for name in _STOCK_FILTERS.split()}
        own: dict[str, Callable[..., Any]] = {
            "e": _escape,
            "escape": _escape,
            "format": self._format,
            "indent": self._indent,
            "join": self._join,
            "replace": self._replace,
            "round": self._round,
            "safe": self.text_of,
            "string": self.text_of,
            "sum": self._sum,
            "tojson": self._tojson,
        }
        known |= own
        self.filters = {name: self._metered(known[name], name not in shallow) for name in known}
        tests: dict[str, Any] = dict(self.tests)
        self.tests = {name: self._metered(tests[name], name not in shallow) for name in tests}

    @property
    def meter(self) -> Meter:
        """The running render's meter; outside one (constants of the template) a fresh one."""
        if not hasattr(self._here, "meter"):
            self._here.meter = Meter()
        return self._here.meter  # type: ignore[no-any-return]

    def prepare(self, source: str) -> jinja2.Template:
        """Compile a template. Errors: TemplateError with Jinja's own message and line."""
        if len(source) > MAX_SOURCE_CHARS:
            size = f"{len(source):,} characters, over {MAX_SOURCE_CHARS:,}"
            raise TemplateError(f"The chat template has {size}.", HINT)
        self._here.meter = Meter()
        try:
            tree = Metering().visit(self.parse(source))
            tree.set_environment(self)
            code = self.compile(tree)
            return self.template_class.from_code(self, code, self.make_globals(None))
        except jinja2.TemplateSyntaxError as error:
            message = f"The chat template is broken at line {error.lineno}: {_reason(error)}."
            raise TemplateError(message, HINT) from error
        except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError) as error:
            message = f"The chat template can't be compiled: {_reason(error)}."
            raise TemplateError(message, HINT) from error

    def run(self, template: jinja2.Template, variables: Mapping[str, Any], meter: Meter) -> str:
        """Render, spending no more than `meter` has.

        Errors: Refusal, LimitError, TemplateError for everything else a template does wrong.
        """
        self._here.meter = meter
        try:
            context = template.new_context(dict(variables))
            pieces = list(template.root_render_func(context))
            meter.require(sum(map(len, pieces)))
            return "".join(pieces)
        except (Refusal, TemplateError):
            raise
        except Exception as error:
            raise TemplateError(f"The chat template failed: {_reason(error)}.", HINT) from error

    # What the compiled template calls.

    def tick(self, chars: int) -> None:
        self.meter.charge(chars)

    def text_of(self, *values: Any) -> str:
        meter = self.meter
        for value in values:
            meter.weigh(value)
        return "".join(map(str, values))

    def weighed(self, value: Any) -> Any:
        if not isinstance(value, str | int | float | None):
            self.meter.weigh(value)
        return value

    def charged(self, value: Any) -> Any:
        self.meter.charge(shallow_chars(value))
        return value

    def getitem(self, obj: Any, argument: Any) -> Any:
        if not isinstance(argument, str | int | float | jinja2.Undefined | None):
            kind = type(argument).__name__
            raise TemplateError(f"The chat template looks something up by a {kind}.", HINT)
        return super().getitem(obj, argument)

    def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
        kind = type(obj).__name__
        message = f"The chat template reaches for {attribute!r} of a {kind}, which is not allowed."
        raise TemplateError(message, HINT)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self.meter.check_binop(operator, left, right)
        return self.charged(super().call_binop(context, operator, left, right))

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        if getattr(obj, "__self__", None) is self:
            for scope in ("_loop_vars", "_block_vars"):  # Jinja's, for functions with a context
                kwargs.pop(scope, None)
            return obj(*args, **kwargs)
        # Jinja wraps str.format to keep its fields away from attributes.
        owner = getattr(getattr(obj, "__wrapped__", obj), "__self__", None)
        for kind, allowed in _METHODS.items():
            if isinstance(owner, kind):
                args = self._check_method(owner, obj.__name__, allowed, args, kwargs)
                break
        else:
            if isinstance(owner, LoopContext):
                self.meter.weigh(args)
        return self.charged(super().call(context, obj, *args, **kwargs))

    # Guards.

    def _check_method(
        self,
        owner: Any,
        name: str,
        allowed: frozenset[str],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[Any, ...]:
        if name not in allowed:
            kind = type(owner).__name__
            raise TemplateError(f"The chat template uses the method {kind}.{name}.", HINT)
        if isinstance(owner, str):
            if name == "join" and len(args) == 1:
                args = (list(args[0]),)
                self.meter.require(len(owner) * len(args[0]))
            elif name == "replace" and len(args) >= 2:
                self.meter.check_replace(owner, *args[:2])
            elif name in ("format", "format_map"):
                self.meter.check_fields(owner, (args, kwargs))
        elif isinstance(owner, list | tuple) and name != "copy":
            self.meter.weigh(owner)
        self.meter.weigh(args)
        return args

    def _metered(self, function: Callable[..., Any], deep: bool) -> Callable[..., Any]:
        """A filter or test that charges for what it makes, and before that for what it reads."""

        @wraps(function)
        def metered(*args: Any, **kwargs: Any) -> Any:
            if deep:
                args = tuple(list(arg) if isinstance(arg, Iterator) else arg for arg in args)
                for value in (*args, *kwargs.values()):
                    self.weighed(value)
            return self.charged(function(*args, **kwargs))

        return metered

    # Filters and functions of our own.

    def _format(self, template: Any, *args: Any, **kwargs: Any) -> str:
        text = self.text_of(template)
        values = kwargs or args
        self.meter.check_percent(text, values)
        return text % values

    def _join(self, values: Iterable[Any], separator: str = "", attribute: Any = None) -> str:
        if attribute is not None:
            values = map(stock.make_attrgetter(self, attribute), values)
        texts = [self.text_of(value) for value in values]
        self.meter.require(len(separator) * len(texts))
        return str(separator).join(texts)

    def _replace(self, text: Any, old: str, new: str, count: int | None = None) -> str:
        text = self.text_of(text)
        self.meter.check_replace(text, old, new)
        return text.replace(str(old), str(new), -1 if count is None else count)  # type: ignore[no-any-return]

    def _indent(
        self, text: str, width: int | str = 4, first: bool = False, blank: bool = False
    ) -> str:
        if isinstance(width, int) and width >= 10**MAX_WIDTH_DIGITS:
            raise too_much("indents by a width that is too large")
        prefix = width if isinstance(width, str) else " " * width
        text = self.text_of(text)
        self.meter.require(len(text) + (text.count("\n") + 1) * len(prefix))
        return stock.do_indent(text, width, first, blank)

    def _round(self, value: float, precision: int = 0, method: str = "common") -> float:
        if abs(precision) > 20:
            raise too_much(f"rounds to {precision:g} digits")
        return stock.do_round(value, precision, method)  # type: ignore[arg-type]

    def _sum(self, values: Iterable[Any], attribute: Any = None, start: Any = 0) -> Any:
        if attribute is not None:
            values = map(stock.make_attrgetter(self, attribute), values)
        for value in values:
            self.meter.check_binop("+", start, value)
            start = self.charged(start + value)
        return start

    def _tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """JSON as templates expect it: keys in their order, no HTML escapes."""
        spaces = indent if isinstance(indent, int) else len(indent or "")
        if max(spaces, len("".join(separators or ()))) > MAX_JSON_LAYOUT:
            raise too_much("lays out JSON too widely")
        self.meter.weigh(value)
        text = json.dumps(
            value,
            ensure_ascii=False,
            indent=indent,
            separators=tuple(separators) if separators else None,  # type: ignore[arg-type]
            sort_keys=sort_keys,
        )
        if not ensure_ascii:
            return text
        return "".join(
            c if c < "\x7f" or self._ascii_kept(c) else json.dumps(c)[1:-1] for c in text
        )

    def _refuse(self, message: Any) -> str:
        if self._refuses:
            raise Refusal(self.text_of(message))
        return ""

    def _strftime_now(self, pattern: Any) -> str:
        pattern = self.text_of(pattern)
        if len(pattern) > 1000 or re.search(r"%[^A-Za-z%]*\d{3,}", pattern):
            raise too_much("wants a date of too many characters")
        return self._clock().strftime(pattern)


def _escape(value: Any) -> str:
    """HTML escapes, as text: Jinja's "safe" type would escape everything it is added to."""
    return str.__str__(stock.do_forceescape(value))


@jinja2.pass_context
def _printed(context: Context, value: Any) -> str:
    """The text of a printed expression. Taking the context keeps Jinja from folding constants."""
    environment = context.environment
    assert isinstance(environment, Sandbox)
    return environment.text_of(value)


def _reason(error: BaseException) -> str:
    """One line of an exception's own words, without an end of sentence."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    said = error.message if isinstance(error, jinja2.TemplateSyntaxError) else str(error)
    words = " ".join((said or "").split()) or type(error).__name__
    return words[:300].rstrip(".")
