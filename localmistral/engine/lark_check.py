"""Refuses Lark grammars that would cost llguidance too much, before it compiles them.

Reads no more of the syntax than strings, patterns, comments, brackets and counts. Knows nothing of
what the rules mean: llguidance says what is wrong with those.
"""

import json
import re
from typing import Any

from localmistral.engine.regex_check import check_regex
from localmistral.engine.schema_check import check_schema
from localmistral.errors import BadRequestError

MAX_GRAMMAR_BYTES = 512 * 1024
"""A grammar for tool calls carries the schemas of all tools."""
MAX_RULES = 1_000
"""The compiler recurses from rule to rule; a chain of 5,000 ends the process."""
MAX_REPETITIONS = 1_000
"""A repeat count of a rule writes the rule out; 100 million never came to an end."""
MAX_BRACKETS = 30
"""The depth llguidance takes."""
MAX_OPERATORS = 5
"""Uses of & and ~ in terminals: the cost of their product is exponential."""

_TOKEN = re.compile(
    r"""(?P<comment>//[^\n]*|\#[^\n]*)
      | (?P<string>"(?:\\.|[^"\\\n])*")
      | (?P<pattern>/(?:\\.|[^/\\\n])+/)
      | (?P<special><[^<>\s]*>)
      | (?P<directive>%\w+)
      | \{\s*(?P<low>\d*)\s*,?\s*(?P<high>\d*)\s*\}
      | ~\s*(?P<from>\d+)(?:\s*\.\.\s*(?P<to>\d+))?
      | (?P<rule>^\s*[?!]?[A-Za-z_][\w-]*(?:\.-?\d+)?\s*(?:\[[^\]\n]*\]|::\w+)?\s*:)
      | (?P<open>[(\[])
      | (?P<close>[)\]])
      | (?P<operator>[&~])""",
    re.VERBOSE | re.MULTILINE,
)
_DECODER = json.JSONDecoder()


def check_lark(grammar: str, param: str) -> None:
    """Raise BadRequestError, with numbers, if `grammar` is too large, deep or repetitive."""
    try:
        size = len(grammar.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise BadRequestError(
            "The grammar holds half of a surrogate pair, which is not text.", param=param
        ) from error
    if size > MAX_GRAMMAR_BYTES:
        raise BadRequestError(
            f"The grammar has {size} bytes, at most {MAX_GRAMMAR_BYTES} are taken.", param=param
        )
    _Scan(grammar, param).run()


class _Scan:
    """One pass over one grammar, counting."""

    def __init__(self, grammar: str, param: str) -> None:
        self._grammar = grammar
        self._param = param
        self._rules = self._operators = self._depth = 0

    def run(self) -> None:
        position = 0
        while (found := _TOKEN.search(self._grammar, position)) is not None:
            position = found.end()
            if found["directive"]:
                position = self._read_directive(found["directive"], position)
            else:
                self._count(found)
        self._cap("rules", self._rules, MAX_RULES)
        self._cap("uses of & and ~", self._operators, MAX_OPERATORS)

    def _count(self, found: re.Match[str]) -> None:
        if found["pattern"]:
            check_regex(found["pattern"][1:-1], "A pattern of the grammar", self._param)
        self._rules += bool(found["rule"])
        self._operators += bool(found["operator"])
        self._depth += bool(found["open"]) - bool(found["close"])
        self._cap("nested brackets", self._depth, MAX_BRACKETS)
        for name in ("low", "high", "from", "to"):
            digits = (found[name] or "").lstrip("0")
            if len(digits) > 4 or int(digits or 0) > MAX_REPETITIONS:
                raise BadRequestError(
                    f"The grammar repeats a rule {digits[:20]} times, at most {MAX_REPETITIONS} "
                    "are taken.",
                    "Use * or + where no exact count is needed.",
                    param=self._param,
                )

    def _cap(self, what: str, count: int, limit: int) -> None:
        if count > limit:
            raise BadRequestError(
                f"The grammar has {count} {what}, at most {limit} are taken.", param=self._param
            )

    def _read_directive(self, name: str, position: int) -> int:
        """Check what a directive carries; returns the index behind it."""
        if name == "%lark":
            raise BadRequestError("%lark inside a grammar is not supported.", param=self._param)
        start = position + len(self._grammar[position:]) - len(self._grammar[position:].lstrip())
        if name not in ("%json", "%regex", "%llguidance"):
            return position
        value, end = self._decode(name, start)
        if name == "%json":
            check_schema(value, self._param)
        return end

    def _decode(self, name: str, start: int) -> tuple[Any, int]:
        try:
            return _DECODER.raw_decode(self._grammar, start)
        except (ValueError, RecursionError) as error:
            raise BadRequestError(
                f"What follows {name} in the grammar is no JSON document, or too deep.",
                param=self._param,
            ) from error
