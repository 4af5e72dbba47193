"""Keeps what the outside wrote apart from what the template wrote, through any rendering.

The edge characters of all control tokens (`<`, `|`, `>`, `[`, `]`, `/` and their like) are replaced
in every outside string by private-use characters that occur nowhere else in this prompt, one for
one. A control token that is whole after rendering was therefore written by the template: the text
is cut there, and only then the original characters come back. Trimming, joining, slicing, looping
over characters or JSON in the template change nothing about that.

A template can also put its own brackets around an outside word (`'<' ~ name ~ '>'`). So words that
are the inside of a control token (`im_end`, `INST`, `s`) get a stand-in for their first letter.
Not covered: a template that itself spells part of a token's word and takes the rest from outside.

Knows nothing of templates or messages, and token ids only as the names of control tokens.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from localmistral.errors import BadRequestError

# Characters that get no stand-in: quotes and backslashes would escape JSON's own escaping.
_LEFT_ALONE = frozenset("\"'\\")
_WORD = re.compile(r"\w+")
_PRIVATE = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))

# Words that templates look up or compare; a token such as `<function>` must not hide them.
_STRUCTURAL = (
    "array arguments assistant boolean content default description developer enum function id "
    "integer items name null number object parameters properties required role string strict "
    "system text tool tools type user"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A piece of a prompt.

    `control` false: `text` is tokenised on its own, with control text as plain text
    (`parse_special=False`). `control` true: `text` is exactly the name of one control token, and
    stands for that token's id.
    """

    text: str
    control: bool = False


class SpecialTexts:
    """The texts of a vocabulary that must not be imitated from outside.

    `control`: tokens of the GGUF types CONTROL and UNKNOWN, which a tokenizer yields only when it
    parses special tokens. `user_defined`: of the type USER_DEFINED, which it always matches; only
    those that look like markup (`<tool_call>`) are kept from the outside. A text may be in both:
    then it is used as a control token, and matched like a user-defined one.
    """

    def __init__(self, control: Iterable[str], user_defined: Iterable[str] = ()) -> None:
        self.control = frozenset(filter(None, control))
        self.markup = frozenset(text for text in user_defined if _looks_like_markup(text))
        names = self.control | self.markup
        self.edges = frozenset(c for text in names for c in text if _is_edge(c))
        parts = (text for text in names if not self.edges.isdisjoint(text))
        words = {word.casefold() for text in parts for word in _WORD.findall(text)}
        self.words = frozenset(words.difference(_STRUCTURAL.split()))
        bare = sorted(text for text in names if self.edges.isdisjoint(text))
        # A token without any edge character: every place where it begins gets a stand-in.
        self.bare = re.compile(f"(?s)(?={'|'.join(map(re.escape, bare))}).") if bare else None
        self._find_control = _Finder(self.control)
        self._find_markup = _Finder(self.markup)

    def control_spans(self, text: str) -> Iterator[tuple[int, int]]:
        """Places of control tokens in `text`, the longest at each place, not overlapping."""
        start = 0
        while (span := self._find_control.next(text, start)) is not None:
            yield span
            start = span[1]

    def markup_span(self, text: str, start: int) -> tuple[int, int] | None:
        """The next place of a user-defined markup token at or after `start`."""
        return self._find_markup.next(text, start)


class _Finder:
    """Finds the leftmost, longest of many literal texts, in time that doesn't grow with them."""

    def __init__(self, texts: frozenset[str]) -> None:
        self._texts = texts
        self._lengths = sorted({len(text) for text in texts}, reverse=True)
        firsts = "".join(sorted({text[0] for text in texts}))
        self._first = re.compile(f"[{re.escape(firsts)}]") if firsts else None

    def next(self, text: str, start: int) -> tuple[int, int] | None:
        while self._first is not None and (found := self._first.search(text, start)):
            start = found.start()
            for length in self._lengths:
                if text[start : start + length] in self._texts:
                    return start, start + length
            start += 1
        return None


def _looks_like_markup(text: str) -> bool:
    return len(text) > 2 and text[0] in "<[" and text[-1] in ">]"


def _is_edge(c: str) -> bool:
    return not (c.isalnum() or c.isspace() or c == "_" or c in _LEFT_ALONE) and c.isprintable()


def texts_in(value: Any) -> Iterator[str]:
    """Every string of a JSON-like value, keys included."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            stack.extend(item)
            stack.extend(item.values())
        elif isinstance(item, list | tuple):
            stack.extend(item)


class Disguise:
    """The stand-ins of one prompt. `inputs`: every text that can occur in it."""

    def __init__(self, special: SpecialTexts, inputs: Iterable[str]) -> None:
        self._special = special
        taken: set[str] = set().union(*inputs)
        self._free = (c for block in _PRIVATE for c in map(chr, block) if c not in taken)
        self._original: dict[int, str] = {}
        self._by_word_start: dict[str, str] = {}
        self._seam = ""
        self._edges = {ord(c): self._stand_in(c) for c in sorted(special.edges)}

    def _stand_in(self, original: str) -> str:
        c = next(self._free, None)
        if c is None:
            raise BadRequestError("The conversation uses every private-use character of Unicode.")
        self._original[ord(c)] = original
        return c

    def marker(self) -> str:
        """A character that occurs nowhere in the prompt, and vanishes from it at the end."""
        return self._stand_in("")

    def seam(self) -> str:
        """A character that vanishes too, but leaves the texts around it in separate segments."""
        self._seam = self._seam or self._stand_in("")
        return self._seam

    def covers(self, c: str) -> bool:
        """Whether `c` is a stand-in."""
        return ord(c) in self._original

    def hide(self, value: Any) -> Any:
        """An outside value with stand-ins in all its strings, keys included."""
        if isinstance(value, str):
            return self._hide_text(value)
        if isinstance(value, dict):
            return {self.hide(key): self.hide(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.hide(item) for item in value]
        return value

    def _hide_text(self, text: str) -> str:
        if self._special.bare is not None:
            text = self._special.bare.sub(lambda found: self._letter(found[0]), text)
        text = _WORD.sub(self._hide_word, text)
        return text.translate(self._edges)

    def _hide_word(self, found: re.Match[str]) -> str:
        word = found[0]
        return self._letter(word[0]) + word[1:] if word.casefold() in self._special.words else word

    def _letter(self, c: str) -> str:
        if c not in self._by_word_start:
            self._by_word_start[c] = self._stand_in(c)
        return self._by_word_start[c]

    def cut(self, text: str) -> tuple[Segment, ...]:
        """Cut a rendering at the control tokens in it, then take the stand-ins away."""
        segments: list[Segment] = []
        end = 0
        for start, stop in self._special.control_spans(text):
            segments.extend(self._plain(text[end:start]))
            segments.append(Segment(text=text[start:stop], control=True))
            end = stop
        segments.extend(self._plain(text[end:]))
        return tuple(segments)

    def _plain(self, text: str) -> Iterator[Segment]:
        """Text without control tokens, cut at seams."""
        for piece in text.split(self._seam) if self._seam else (text,):
            yield from self._without_markup(piece)

    def _without_markup(self, text: str) -> Iterator[Segment]:
        """A text cut inside every markup token that came from outside."""
        restored = self.restore(text)
        begin = search = 0
        while (span := self._special.markup_span(restored, search)) is not None:
            start, stop = span
            if restored[start:stop] == text[start:stop]:
                search = stop
                continue
            yield Segment(text=restored[begin : start + 1])
            begin = search = start + 1
        if begin < len(restored):
            yield Segment(text=restored[begin:])

    def restore(self, text: str) -> str:
        return text.translate(self._original)
