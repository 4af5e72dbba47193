"""Refuses GBNF grammars that llama.cpp's parser or sampler would not get through.

llama.cpp's own search for left recursion is exponential and misses what hides behind rules that may
be empty; its sampler keeps every way to read the text so far. Knows nothing of tokens' texts.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from localmistral.engine.gbnf_rules import (
    Chars,
    Element,
    GbnfError,
    GbnfParser,
    Ref,
    Rules,
)
from localmistral.engine.schema_graph import find_loop
from localmistral.errors import BadRequestError

MAX_BYTES = 64 * 1024
MAX_PATHS = 5_000
"""Ways from a rule's start to its first character: llama.cpp walks them all, again and again."""
MAX_CHAIN = 500
"""Rules that begin with one another: llama.cpp recurses along them."""
MAX_STATES = 256
"""Parses kept side by side; each costs a pass over the vocabulary per token (0.1 ms)."""
PROBED_CHARACTERS = 32
"""Length of the text on which the parses are counted: ambiguity that grows shows by then."""
MAX_READINGS = 20_000
"""Ways to reach those parses inside one token: llama.cpp tries each, and merges none."""
_TOKEN_CHARACTERS = 16
_MAX_PROBED = 300
_MAX_STEPS = 400_000
"""Of the probe itself: about 1 s."""
_PROBED_CHOICES = 6
"""Characters tried at each step of it; the one with the most parses is taken."""

Beginnings = Mapping[str, list[str]]


def check_gbnf(grammar: str, param: str) -> None:
    """Raise BadRequestError if `grammar` is malformed, or llama.cpp would not get through it."""
    try:
        size = len(grammar.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise BadRequestError(
            "The grammar holds half of a surrogate pair, which is not text.", param=param
        ) from error
    if size > MAX_BYTES:
        raise BadRequestError(
            f"The grammar has {size} bytes, at most {MAX_BYTES} are taken.", param=param
        )
    try:
        rules = GbnfParser(text=grammar).parse()
        _check_rules(rules)
    except GbnfError as refusal:
        raise BadRequestError(f"The grammar {refusal}.", param=param) from refusal


def _check_rules(rules: Rules) -> None:
    for alternatives in rules.values():
        for element in (element for sequence in alternatives for element in sequence):
            if isinstance(element, Ref) and element.name not in rules:
                raise GbnfError(f"refers to {element.name[:60]!r}, which it does not define")
    endless = next(iter(rules.keys() - _find_finite(rules, with_characters=True)), None)
    if endless is not None:
        # where nothing can follow, llama.cpp is left without a state and ends the process
        raise GbnfError(f"has a {_show(endless)} that never comes to an end")
    beginnings = _find_beginnings(rules, _find_finite(rules, with_characters=False))
    names = list(rules)
    numbers = {name: number for number, name in enumerate(names)}
    loop = find_loop(
        range(len(names)), lambda number: [numbers[child] for child in beginnings[names[number]]]
    )
    if loop is not None:
        raise GbnfError(f"has a {_show(names[loop])} that begins with itself (left recursion)")
    _check_paths(rules, beginnings)
    named = ["root", *(name for name in rules if name != "root")]
    _Probe(rules).run(named[:_MAX_PROBED])


def _show(name: str) -> str:
    return "group" if name.startswith("_") else f"rule {name[:60]!r}"


def _find_finite(rules: Rules, *, with_characters: bool) -> set[str]:
    """Rules that can produce a finite text, or without characters: the empty one.

    A fixpoint over the elements that each alternative still waits for.
    """
    users: dict[str, list[tuple[str, int]]] = {name: [] for name in rules}
    waiting: dict[tuple[str, int], int] = {}
    todo: list[str] = []
    for name, alternatives in rules.items():
        for number, sequence in enumerate(alternatives):
            references = [element for element in sequence if isinstance(element, Ref)]
            for element in references:
                users[element.name].append((name, number))
            waiting[name, number] = len(references if with_characters else sequence)
            if not waiting[name, number]:
                todo.append(name)
    finite: set[str] = set()
    while todo:
        name = todo.pop()
        if name in finite:
            continue
        finite.add(name)
        for user in users[name]:
            waiting[user] -= 1
            if not waiting[user]:
                todo.append(user[0])
    return finite


def _find_beginnings(rules: Rules, empty: set[str]) -> Beginnings:
    """For each rule the rules that can stand first in it.

    Left out is a rule at its own end, as in S ::= item S | nothing with an item that may be empty:
    nothing piles up behind it, and llama.cpp notices that it has been there.
    """

    def scan(name: str, sequence: Sequence[Element]) -> Iterator[str]:
        for number, element in enumerate(sequence, 1):
            if not isinstance(element, Ref):
                return
            if element.name != name or number < len(sequence):
                yield element.name
            if element.name not in empty:
                return

    return {
        name: [child for sequence in alternatives for child in scan(name, sequence)]
        for name, alternatives in rules.items()
    }


def _check_paths(rules: Rules, beginnings: Beginnings) -> None:
    """Bound the number and the length of the ways to a rule's first character."""
    paths: dict[str, int] = {}
    chain: dict[str, int] = {}
    for start in rules:
        todo = [start]
        while todo:
            name = todo[-1]
            missing = [child for child in beginnings[name] if child not in paths]
            if missing:
                todo += missing
                continue
            todo.pop()
            paths[name] = len(rules[name]) + sum(paths[child] for child in beginnings[name])
            chain[name] = 1 + max((chain[child] for child in beginnings[name]), default=0)
            if paths[name] > MAX_PATHS:
                raise GbnfError(
                    f"has a rule with more than {MAX_PATHS} ways to begin, that is the most taken"
                )
            if chain[name] > MAX_CHAIN:
                raise GbnfError(
                    f"has more than {MAX_CHAIN} rules in a row that begin with one another"
                )


Place = tuple[int, int]
Stack = tuple[Place, ...]
"""What is still to be matched, the next on top: places as (sequence, index of its element)."""
Readings = dict[Stack, int]


class _Probe:
    """Reads a text that makes for many parses side by side, the way llama.cpp's sampler would."""

    def __init__(self, rules: Rules) -> None:
        self._sequences: list[tuple[Element, ...]] = []
        self._numbers: dict[str, list[int]] = {}
        self._expanded: dict[Stack, frozenset[Stack]] = {}
        self._steps = 0
        for name, alternatives in rules.items():
            first = len(self._sequences)
            self._sequences += alternatives
            self._numbers[name] = list(range(first, len(self._sequences)))

    def run(self, names: Iterable[str]) -> None:
        """Read from the start of each rule in turn: what is ambiguous may stand behind a word."""
        for name in names:
            self._read(name)

    def _read(self, name: str) -> None:
        """Follow the text of most readings; their number may grow, but not multiply."""
        start = [self._push((), number, 0) for number in self._numbers[name]]
        readings = dict.fromkeys((ready for stack in start for ready in self._expand(stack)), 1)
        for step in range(1, PROBED_CHARACTERS + 1):
            if len(readings) > MAX_STATES or sum(readings.values()) > MAX_READINGS:
                raise GbnfError(
                    f"is too ambiguous: one text has more than {MAX_STATES} states side by side, "
                    f"or {MAX_READINGS} readings"
                )
            nexts = [self._advance(readings, code) for code in self._choose_codes(readings)]
            readings = max(nexts, key=lambda reading: sum(reading.values()), default={})
            if step % _TOKEN_CHARACTERS == 0:  # llama.cpp merges equal states after each token
                readings = dict.fromkeys(readings, 1)

    def _push(self, stack: Stack, number: int, index: int) -> Stack:
        """A finished sequence leaves nothing behind, as in llama.cpp."""
        return (*stack, (number, index)) if index < len(self._sequences[number]) else stack

    def _expand(self, stack: Stack) -> frozenset[Stack]:
        """Follow rules until a character or nothing is on top of every stack."""
        known = self._expanded.get(stack)
        if known is None:
            known = self._expanded[stack] = frozenset(self._follow(stack))
        return known

    def _follow(self, start: Stack) -> Iterator[Stack]:
        seen: set[Stack] = set()
        todo = [start]
        while todo:
            stack = todo.pop()
            if stack in seen:
                continue
            seen.add(stack)
            self._steps += 1
            if self._steps > _MAX_STEPS:
                raise GbnfError("is too ambiguous, or its rules lead through too many others")
            element = self._top(stack)
            if not isinstance(element, Ref):
                yield stack
                continue
            number, index = stack[-1]
            below = self._push(stack[:-1], number, index + 1)
            todo += [self._push(below, child, 0) for child in self._numbers[element.name]]

    def _top(self, stack: Stack) -> Element | None:
        return self._sequences[stack[-1][0]][stack[-1][1]] if stack else None

    def _advance(self, readings: Readings, code: int) -> Readings:
        """The stacks after the character `code`, and in how many ways each came about."""
        after: Readings = {}
        for stack, count in readings.items():
            element = self._top(stack)
            if isinstance(element, Chars) and element.accepts(code):
                rest = self._push(stack[:-1], stack[-1][0], stack[-1][1] + 1)
                for ready in self._expand(rest):
                    after[ready] = after.get(ready, 0) + count
        return after

    def _choose_codes(self, stacks: Iterable[Stack]) -> list[int]:
        """The characters that most stacks accept."""
        tops = [top for stack in stacks if isinstance(top := self._top(stack), Chars)]
        codes = {ord("a"), ord("0"), ord(" ")} | {top.ranges[0][0] for top in tops if top.ranges}
        counts = {code: sum(top.accepts(code) for top in tops) for code in codes}
        likely = sorted(counts, key=lambda code: (-counts[code], code))
        return [code for code in likely[:_PROBED_CHOICES] if counts[code]]
