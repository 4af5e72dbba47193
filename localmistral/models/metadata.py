"""Typed access to one GGUF header's metadata: a value of the wrong type or range is refused.

llama.cpp insists on exact types, and asserts some of them, so the same types are asked for here.
Knows no key by name.
"""

import math
from dataclasses import dataclass
from typing import NoReturn

from localmistral.errors import ModelFileError
from localmistral.models.header import (
    DOWNLOAD_AGAIN,
    Array,
    Buffer,
    Header,
    Value,
    ValueType,
    read_numbers,
    read_strings,
)

MAX_COUNT = (1 << 31) - 1  # llama.cpp keeps many of them in an int


@dataclass(frozen=True, slots=True, kw_only=True)
class Metadata:
    """A header together with the bytes its arrays still stand in."""

    header: Header
    buffer: Buffer

    def fail(self, what: str) -> NoReturn:
        raise ModelFileError(f"{self.header.file_name} {what}.", DOWNLOAD_AGAIN)

    def has(self, key: str) -> bool:
        return key in self.header.metadata

    def count(
        self,
        key: str,
        *,
        default: int = 0,
        minimum: int = 0,
        maximum: int = MAX_COUNT,
        kind: ValueType = ValueType.UINT32,
    ) -> int:
        """A whole number; `default` is returned, unchecked, where the key is absent."""
        value = self._scalar(key, kind)
        if value is None:
            return default
        if not minimum <= value <= maximum:
            self.fail(f"has {key} {value:,}, outside {minimum:,} to {maximum:,}")
        return int(value)

    def real(self, key: str, *, minimum: float = 0.0) -> float | None:
        """A finite number of at least `minimum`, None where the key is absent."""
        value = self._scalar(key, ValueType.FLOAT32)
        if value is not None and not (math.isfinite(value) and value >= minimum):
            self.fail(f"has {key} {value}, not a finite number of at least {minimum:g}")
        return value

    def number(self, key: str) -> float | None:
        """A number of any type; None where the key is absent or holds something else."""
        value = self.header.metadata.get(key)
        if value is None or isinstance(value.content, str | Array):
            return None
        return value.content

    def flag(self, key: str) -> bool | None:
        value = self._scalar(key, ValueType.BOOL)
        return None if value is None else bool(value)

    def text(self, key: str) -> str | None:
        value = self._value(key, ValueType.STRING)
        return None if value is None else str(value.content)

    def array(self, key: str, *elements: ValueType) -> Array | None:
        """An array with one of these element types, None where the key is absent."""
        value = self._value(key, ValueType.ARRAY)
        if value is None or not isinstance(value.content, Array):
            return None
        if value.content.element not in elements:
            wanted = " or ".join(kind.name.lower() for kind in elements)
            self.fail(f"has {key} as a list of {value.content.element.name.lower()}, not {wanted}")
        return value.content

    def numbers(self, key: str, *elements: ValueType) -> tuple[int, ...] | None:
        array = self.array(key, *elements)
        return None if array is None else tuple(map(int, read_numbers(self.buffer, array)))

    def strings(self, key: str) -> list[bytes] | None:
        array = self.array(key, ValueType.STRING)
        return None if array is None else read_strings(self.buffer, array)

    def by_layer(self, key: str, layer_count: int, *, maximum: int = MAX_COUNT) -> tuple[int, ...]:
        """One count a layer, from a list or from one number for all; empty where absent."""
        value = self.header.metadata.get(key)
        if value is None:
            return ()
        if not isinstance(value.content, Array):
            return (self.count(key, maximum=maximum),) * layer_count
        if value.content.count != layer_count:
            self.fail(f"lists {value.content.count:,} values of {key} for {layer_count:,} layers")
        counts = self.numbers(key, ValueType.UINT32, ValueType.INT32) or ()
        for layer, count in enumerate(counts):
            if not 0 <= count <= maximum:
                self.fail(f"has {key} {count:,} for layer {layer}, outside 0 to {maximum:,}")
        return counts

    def _scalar(self, key: str, kind: ValueType) -> float | None:
        value = self._value(key, kind)
        if value is None or isinstance(value.content, str | Array):
            return None
        return value.content

    def _value(self, key: str, kind: ValueType) -> Value | None:
        value = self.header.metadata.get(key)
        if value is not None and value.kind is not kind:
            self.fail(f"stores {key} as {value.kind.name.lower()}, not as {kind.name.lower()}")
        return value
