"""Refuses regular expressions that would cost too much, before anything compiles them.

Counts how large a pattern gets when its repetitions are written out. Knows nothing of what the
pattern means: its syntax is judged by whoever compiles it.
"""

import re

from localmistral.errors import BadRequestError

MAX_PATTERN_CHARACTERS = 20_000
"""Longer than any hand-written pattern; compiling one of this length takes milliseconds."""
MAX_REPETITIONS = 10_000
"""A repeat count costs an automaton state for every repetition that is reached."""
MAX_EXPANDED = 100_000
"""Atoms after writing out nested repetitions: about as many characters as an answer can have."""
MAX_GROUP_DEPTH = 100
"""Parsers of patterns recurse once per group."""

_REPEAT = re.compile(r"\{\s*(\d*)\s*(,?)\s*(\d*)\s*\}", re.ASCII)


def check_regex(pattern: str, where: str, param: str) -> None:
    """Raise BadRequestError, naming `where`, if `pattern` is too long, deep or repetitive."""
    if len(pattern) > MAX_PATTERN_CHARACTERS:
        raise BadRequestError(
            f"{where} has {len(pattern)} characters, at most {MAX_PATTERN_CHARACTERS} are taken.",
            param=param,
        )
    if any("\ud800" <= character <= "\udfff" for character in pattern):
        raise BadRequestError(
            f"{where} holds half of a surrogate pair, which is not text.", param=param
        )
    if (len(pattern) - len(pattern.rstrip("\\"))) % 2:
        raise BadRequestError(f"{where} ends in a backslash that escapes nothing.", param=param)
    size = _expand(pattern, where, param)
    if size > MAX_EXPANDED:
        raise BadRequestError(
            f"{where} stands for {_shorten(size)} atoms when its repetitions are written out, at "
            f"most {MAX_EXPANDED} are taken.",
            "Use * or + where no exact count is needed.",
            param=param,
        )


def _shorten(size: int) -> str:
    return str(size) if size < 10**12 else "more than 10^12"


def _expand(pattern: str, where: str, param: str) -> int:
    """Atoms of `pattern` with all counted repetitions written out."""
    sums = [0]  # one running sum per open group
    last = 0  # size of the item that a repetition would apply to
    position = 0
    while position < len(pattern):
        character = pattern[position]
        repeat = _REPEAT.match(pattern, position) if character == "{" else None
        if character == "(":
            sums.append(0)
            last = 0
            if len(sums) > MAX_GROUP_DEPTH:
                raise BadRequestError(
                    f"{where} has groups nested more than {MAX_GROUP_DEPTH} deep.", param=param
                )
        elif character == ")" and len(sums) > 1:
            last = max(1, sums.pop())
            sums[-1] += last
        elif repeat is not None and (repeat[1] or repeat[3]):
            count = _count(repeat, where, param)
            sums[-1] += last * (count - 1)
            last *= count
        elif character not in "*+?|":
            last = 1
            sums[-1] += 1
        position = repeat.end() if repeat else _skip_atom(pattern, position)
    return sum(sums)


def _count(repeat: re.Match[str], where: str, param: str) -> int:
    digits = max(repeat[1].lstrip("0"), repeat[3].lstrip("0"), key=lambda text: (len(text), text))
    if len(digits) > 18 or int(digits or 0) > MAX_REPETITIONS:
        raise BadRequestError(
            f"{where} repeats something {digits[:20]} times, at most {MAX_REPETITIONS} are taken.",
            "Use * or + where no exact count is needed.",
            param=param,
        )
    return max(1, int(digits or 0))


def _skip_atom(pattern: str, position: int) -> int:
    """The index behind the atom at `position`: an escape, a class in brackets, one character."""
    if pattern[position] == "\\":
        escape = _ESCAPE.match(pattern, position)
        return escape.end() if escape else position + 1
    if pattern[position] != "[":
        return position + 1
    position += 2 if pattern[position + 1 : position + 2] == "^" else 1
    position += 1 if pattern[position : position + 1] == "]" else 0  # a literal bracket
    depth = 1
    while position < len(pattern) and depth:
        character = pattern[position]
        depth += (character == "[") - (character == "]")
        position += 2 if character == "\\" else 1
    return position


_ESCAPE = re.compile(r"\\(?:[pPxuU]\{[^}]*\}|.)", re.DOTALL)
