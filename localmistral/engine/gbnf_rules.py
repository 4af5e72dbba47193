"""Reads llama.cpp's GBNF into the same plain rules that llama.cpp makes of it.

So that what llama.cpp would not survive can be found first: `{5,2}` never ends there, deep nesting
ends the process. Knows nothing of how rules are matched.
"""

from dataclasses import dataclass, field

MAX_NESTING = 100
"""Parentheses; llama.cpp's parser recurses and dies at about 20,000."""
MAX_REPETITIONS = 1_000
"""Of one item; llama.cpp refuses 2,000."""
MAX_ELEMENTS = 50_000
"""Of all rules with repetitions written out."""

_WORD = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-")
_DIGITS = frozenset("0123456789")
_HEX = frozenset("0123456789abcdefABCDEF")
_ESCAPES = {"t": "\t", "r": "\r", "n": "\n"} | {char: char for char in '\\"[]-'}
_HEX_ESCAPES = {"x": 2, "u": 4, "U": 8}


@dataclass(frozen=True, slots=True)
class Ref:
    """Another rule."""

    name: str


@dataclass(frozen=True, slots=True)
class Chars:
    """One character inside, or outside, of inclusive ranges of code points."""

    ranges: tuple[tuple[int, int], ...]
    negated: bool = False

    def accepts(self, code: int) -> bool:
        return any(low <= code <= high for low, high in self.ranges) != self.negated


ANY = Chars((), negated=True)
Element = Ref | Chars
Alternatives = list[tuple[Element, ...]]
Rules = dict[str, Alternatives]


class GbnfError(Exception):
    """The rest of the sentence that begins with "The grammar"."""


@dataclass(slots=True, kw_only=True)
class GbnfParser:
    """Recursive descent; the recursion is over parentheses and ends at MAX_NESTING."""

    text: str
    position: int = 0
    elements: int = 0
    rules: Rules = field(default_factory=dict)

    def parse(self) -> Rules:
        if "\0" in self.text:
            raise GbnfError("holds a zero byte")
        self._skip_space(newlines=True)
        while self.position < len(self.text):
            self._parse_rule()
        if "root" not in self.rules:
            raise GbnfError("has no rule named root")
        return self.rules

    def _fail(self, wanted: str) -> GbnfError:
        line = self.text.count("\n", 0, self.position) + 1
        found = self.text[self.position : self.position + 20].split("\n")[0]
        shown = repr(found) if found else "nothing more"
        return GbnfError(f"has {shown} in line {line} where {wanted} is expected")

    def _peek(self, length: int = 1) -> str:
        return self.text[self.position : self.position + length]

    def _expect(self, text: str) -> None:
        if self._peek(len(text)) != text:
            raise self._fail(repr(text))
        self.position += len(text)

    def _skip_space(self, *, newlines: bool) -> None:
        blank = " \t\r\n" if newlines else " \t"
        while (char := self._peek()) and (char in blank or char == "#"):
            if char == "#":
                ends = [end for end in map(self._find, "\r\n") if end >= 0]
                self.position = min(ends, default=len(self.text))
            else:
                self.position += 1

    def _find(self, char: str) -> int:
        return self.text.find(char, self.position)

    def _take_while(self, allowed: frozenset[str], wanted: str) -> str:
        start = self.position
        while self._peek() in allowed and self._peek():
            self.position += 1
        if start == self.position:
            raise self._fail(wanted)
        return self.text[start : self.position]

    def _parse_rule(self) -> None:
        name = self._take_while(_WORD, "a rule's name")
        self._skip_space(newlines=False)
        self._expect("::=")
        self._skip_space(newlines=True)
        self.rules[name] = self._parse_alternatives(0)
        if self._peek() and self._peek() not in "\r\n":
            raise self._fail("the end of the rule")
        self._skip_space(newlines=True)

    def _parse_alternatives(self, depth: int) -> Alternatives:
        if depth > MAX_NESTING:
            raise GbnfError(f"has parentheses nested more than {MAX_NESTING} deep")
        alternatives = [self._parse_sequence(depth)]
        while self._peek() == "|":
            self.position += 1
            self._skip_space(newlines=True)
            alternatives.append(self._parse_sequence(depth))
        return alternatives

    def _parse_sequence(self, depth: int) -> tuple[Element, ...]:
        sequence: list[Element] = []
        last: tuple[Element, ...] = ()  # what a repetition applies to
        while (char := self._peek()) and char not in "|)\r\n":
            if char in "*+?{":
                low, high = self._parse_repetition(char)
                if not last:
                    raise self._fail("an item before the repetition")
                del sequence[len(sequence) - len(last) :]
                last = self._repeat(last, low, high)
            else:
                last = self._parse_item(char, depth)
            sequence += last
            self.elements += len(last)
            if self.elements > MAX_ELEMENTS:
                raise GbnfError(f"has more than {MAX_ELEMENTS} elements, repetitions written out")
            self._skip_space(newlines=depth > 0)
        return tuple(sequence)

    def _count(self, elements: int) -> None:
        self.elements += elements
        if self.elements > MAX_ELEMENTS:
            raise GbnfError(f"has more than {MAX_ELEMENTS} elements, repetitions written out")

    def _parse_item(self, char: str, depth: int) -> tuple[Element, ...]:
        if char == "(":
            self.position += 1
            self._skip_space(newlines=True)
            alternatives = self._parse_alternatives(depth + 1)
            self._expect(")")
            return (self._add_rule(alternatives),)
        if char == '"':
            return self._parse_literal()
        if char == "[":
            return self._parse_class()
        if char == ".":
            self.position += 1
            return (ANY,)
        if char in "<!":
            # llama.cpp lets tokens through there that it then ends the process over
            raise GbnfError("names a token, which only a Lark grammar may")
        return (Ref(self._take_while(_WORD, "an item")),)

    def _add_rule(self, alternatives: Alternatives) -> Ref:
        name = f"_{len(self.rules)}"  # no rule of the grammar's own can start with _
        self.rules[name] = alternatives
        return Ref(name)

    def _parse_repetition(self, char: str) -> tuple[int, int | None]:
        self.position += 1
        if char != "{":
            return {"*": (0, None), "+": (1, None), "?": (0, 1)}[char]
        self._skip_space(newlines=False)
        low = self._parse_count()
        high: int | None = low
        if self._peek() == ",":
            self.position += 1
            self._skip_space(newlines=False)
            high = self._parse_count() if self._peek() in _DIGITS else None
        self._expect("}")
        if high is not None and high < low:
            raise GbnfError(f"repeats something {low} to {high} times")
        return low, high

    def _parse_count(self) -> int:
        digits = self._take_while(_DIGITS, "a count").lstrip("0") or "0"
        if len(digits) > 4 or int(digits) > MAX_REPETITIONS:
            raise GbnfError(
                f"repeats something {digits[:20]} times, at most {MAX_REPETITIONS} are taken"
            )
        self._skip_space(newlines=False)
        return int(digits)

    def _repeat(self, item: tuple[Element, ...], low: int, high: int | None) -> tuple[Element, ...]:
        """`item` `low` to `high` times, with the same helper rules that llama.cpp makes."""
        rest: tuple[Element, ...] = ()
        if high is None:
            loop = self._add_rule([()])
            self.rules[loop.name] = [(*item, loop), ()]
            rest = (loop,)
        for _ in range(0 if high is None else high - low):
            rest = (self._add_rule([(*item, *rest), ()]),)
            self.elements += len(item)
            if self.elements > MAX_ELEMENTS:
                raise GbnfError(f"has more than {MAX_ELEMENTS} elements, repetitions written out")
        self._count(len(item) * low)
        return item * low + rest

    def _parse_literal(self) -> tuple[Element, ...]:
        self.position += 1
        codes = []
        while self._peek() != '"':
            codes.append(self._parse_char())
        self.position += 1
        return tuple(Chars(((code, code),)) for code in codes)

    def _parse_class(self) -> tuple[Element, ...]:
        self.position += 1
        negated = self._peek() == "^"
        self.position += negated
        ranges = []
        while self._peek() != "]":
            low = high = self._parse_char()
            if self._peek() == "-" and self._peek(2) != "-]":
                self.position += 1
                high = self._parse_char()
            ranges.append((low, high))
        self.position += 1
        if not ranges:
            raise GbnfError("has an empty character class")
        return (Chars(tuple(ranges), negated),)

    def _parse_char(self) -> int:
        char = self._peek()
        if not char:
            raise self._fail("the closing quote or bracket")
        self.position += 1
        if char != "\\":
            return ord(char)
        escape = self._peek()
        self.position += 1
        if escape in _HEX_ESCAPES:
            digits = self._peek(_HEX_ESCAPES[escape])
            if len(digits) < _HEX_ESCAPES[escape] or not set(digits) <= _HEX:
                raise self._fail(f"{_HEX_ESCAPES[escape]} hexadecimal digits")
            self.position += len(digits)
            return int(digits, 16)
        if escape not in _ESCAPES:
            self.position -= 1
            raise self._fail("a known escape")
        return ord(_ESCAPES[escape])
