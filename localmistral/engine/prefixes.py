"""What earlier requests computed and others overwrote since: kept in RAM, to be put back.

Knows neither the context nor when keeping something is worth it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int32]
State = npt.NDArray[np.uint8]
"""A sequence's part of llama.cpp's memory, as llama.cpp writes it."""


def measure_common(tokens: Tokens, prompt: Tokens) -> int:
    """Length of the common beginning of the two."""
    size = min(len(tokens), len(prompt))
    different = np.flatnonzero(tokens[:size] != prompt[:size])
    return int(different[0]) if different.size else size


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prefix:
    """The `tokens` a sequence held and its `state`; `is_whole` unless a sliding window has let go
    of what came first."""

    tokens: Tokens
    state: State
    is_whole: bool

    @property
    def length(self) -> int:
        return len(self.tokens)


class PrefixStore:
    """Prefixes of at most `limit_bytes` together; those used longest ago give way."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._prefixes: list[Prefix] = []

    def __iter__(self) -> Iterator[Prefix]:
        """The one used last comes last."""
        return iter(self._prefixes)

    @property
    def used_bytes(self) -> int:
        return sum(prefix.state.nbytes for prefix in self._prefixes)

    def add(self, prefix: Prefix, *, replaces_beginnings: bool) -> None:
        """Keep `prefix`, in place of stored beginnings of it if it `replaces_beginnings`."""
        if replaces_beginnings:
            self._prefixes = [
                known
                for known in self._prefixes
                if measure_common(known.tokens, prefix.tokens) < known.length
            ]
        self._prefixes.append(prefix)
        while self._prefixes and self.used_bytes > self.limit_bytes:
            del self._prefixes[0]

    def touch(self, prefix: Prefix) -> None:
        """`prefix` was used now."""
        self._prefixes.remove(prefix)
        self._prefixes.append(prefix)

    def covers(self, tokens: Tokens) -> bool:
        """Whether a stored prefix begins with all of `tokens`."""
        return any(measure_common(known.tokens, tokens) == len(tokens) for known in self)
