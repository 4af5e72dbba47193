"""What an answer has to look like, as plain values.

Knows nothing of how that is enforced; see constraints.
"""

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class JsonSchema:
    """A JSON document that satisfies `schema`, its properties in the schema's order.

    `strict` refuses keywords that can't be enforced; otherwise they are ignored.
    """

    schema: Any
    whitespace: Literal["flexible", "compact"] = "flexible"
    strict: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class JsonObject:
    """Any JSON object."""

    whitespace: Literal["flexible", "compact"] = "flexible"


@dataclass(frozen=True, slots=True, kw_only=True)
class Regex:
    """Text that `pattern` (syntax of Rust's regex, no look-around) matches from end to end."""

    pattern: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Lark:
    """Text of a grammar in llguidance's Lark; `<[9]>` is the control token with id 9.

    `lenient` lets pass what is only warned of, such as parts of a %json schema that were ignored
    because its "x-guidance" says so.
    """

    grammar: str
    lenient: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One of `options`, to the letter."""

    options: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gbnf:
    """Text of a grammar in llama.cpp's GBNF, from its rule `root`."""

    grammar: str


Spec = JsonSchema | JsonObject | Regex | Lark | Choice | Gbnf
