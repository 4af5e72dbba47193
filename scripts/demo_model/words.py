"""Words, names and numbers, drawn from a seed; and what is held out for tests.

`is_heldout` and `heldout_cities` in `phrases.toml` draw the line: training never shows a held-out
pair of numbers (as a question or as a follow-up, in either order), a held-out counting range, or a
held-out place. Knows nothing of conversations.
"""

from __future__ import annotations

import random
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TypeVar
from zlib import crc32

T = TypeVar("T")
phrases = SimpleNamespace(
    **tomllib.loads(Path(__file__).with_name("phrases.toml").read_text(encoding="utf-8"))
)
_HELDOUT_NAMES = frozenset(name.lower() for name in phrases.heldout_cities)
_ONSETS = [*"bcdfghjklmnprstvwz", *re.findall("..", "brchdrgrklkrprshstthtrskpl"), "", ""]
_VOWELS = [*"aaeeiioou", "ai", "au", "ei", "ou", "y", "é", "ö"]
_CODAS = ["", "", "", "", *"nrslmktdx", "nd", "rg", "st", "ng", "ll"]


def is_heldout(kind: str, *parts: object) -> bool:
    """Whether something is kept for tests: one in ten, by a hash of its parts."""
    return crc32(",".join([kind, *map(str, parts)]).encode()) // 10 % 10 == 3


def is_heldout_pair(a: int, b: int) -> bool:
    """Whether the sums and differences of these two numbers, in either order, are held out."""
    return is_heldout("sum", min(a, b), max(a, b))


def is_heldout_name(name: str) -> bool:
    """Whether a place is held out: a listed city, or one in ten of the invented names."""
    return name.lower() in _HELDOUT_NAMES or is_heldout("name", name.lower())


class Words:
    """Draws on one side of the split; `pieces` are texts that invented words are made of."""

    def __init__(self, seed: int, pieces: list[str], *, heldout: bool = False) -> None:
        self.rng = random.Random(seed)
        self.pieces = pieces
        self.heldout = heldout

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def until(self, draw: Callable[[], T], is_held: Callable[[T], bool]) -> T:
        """Draw until the outcome lies on this maker's side of the split."""
        while True:
            outcome = draw()
            if is_held(outcome) == self.heldout:
                return outcome

    def syllables(self) -> str:
        """An invented, pronounceable word."""
        r = self.rng
        count = r.choice((1, 2, 2, 2, 3, 3, 4))
        return "".join(
            r.choice(_ONSETS) + r.choice(_VOWELS) + r.choice(_CODAS) for _ in range(count)
        )

    def word(self) -> str:
        """An invented word: syllables, or pieces of the vocabulary."""
        if self.chance(0.5):
            return self.syllables()
        return "".join(self.rng.choice(self.pieces) for _ in range(self.rng.randint(1, 3)))

    def invented_place(self) -> str:
        r = self.rng
        name = self.word().capitalize()
        shape = r.random()
        if shape < 0.12:
            name = f"{r.choice(phrases.place_beginnings)} {name}"
        elif shape < 0.2:
            name += r.choice(phrases.place_endings)
        elif shape < 0.27:
            name += r.choice((" ", " ", "-")) + self.word().capitalize()
        return name

    def place(self) -> str:
        """A place to ask about: two in three of them invented, so that only copying works."""
        r = self.rng
        if self.heldout:
            if self.chance(0.5):
                return str(r.choice(phrases.heldout_cities))
        elif self.chance(0.3):
            name = str(r.choice(phrases.cities))
            return name if self.chance(0.9) else r.choice((name.lower(), name.upper()))
        return self.until(self.invented_place, is_heldout_name)

    def words(self, least: int, most: int) -> str:
        r = self.rng
        return " ".join(
            self.word() if self.chance(0.4) else r.choice(self.pieces)
            for _ in range(r.randint(least, most))
        )

    def topic(self) -> str:
        """What an off-topic request is about; held-out ones are never invented."""
        topics = phrases.topics
        listed = topics[::5] if self.heldout else [t for i, t in enumerate(topics) if i % 5]
        if not self.heldout and self.chance(0.5):
            return self.words(1, 3)
        return str(self.rng.choice(listed))

    def vary(self, text: str) -> str:
        """The same text, sometimes in another case, without its mark, or with a polite word."""
        r = self.rng.random()
        if r < 0.12:
            text = text[0].lower() + text[1:]
        elif r < 0.17:
            text = text.upper()
        elif r < 0.25:
            text = text.rstrip("?.!")
        elif r < 0.3:
            text = text[0].lower() + text[1:].rstrip("?.!")
        return text

    def number(self) -> int:
        """A number of two digits; in training also of one, now and then of three."""
        r = self.rng.random()
        if self.heldout or r < 0.85:
            return self.rng.randint(10, 99)
        return self.rng.randint(0, 9) if r < 0.96 else self.rng.randint(100, 999)
