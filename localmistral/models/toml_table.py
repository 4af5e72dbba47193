"""A TOML table of the catalogue, emptied field by field with its types checked.

Knows the file's name, for the messages, and nothing of models.
"""

import re
from typing import Any, TypeVar, get_args

from localmistral.errors import LocalMistralError

_T = TypeVar("_T")


class TomlTable:
    """One TOML table being emptied field by field, so that what's left over is a mistake."""

    def __init__(self, values: dict[str, Any], where: str) -> None:
        self.values = dict(values)
        self.where = where

    def fail(self, problem: str) -> LocalMistralError:
        return LocalMistralError(f"models.toml: {self.where}: {problem}.")

    def take(self, key: str, kind: type[_T], default: _T | None = None) -> _T:
        value = self.values.pop(key, default)
        if value is None:
            raise self.fail(f"{key} is missing")
        # bool is an int to Python, but `context = true` is a mistake.
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.fail(f"{key} = {value!r:.60} is not of type {kind.__name__}")
        return value

    def optional(self, key: str, kind: type[_T]) -> _T | None:
        return self.take(key, kind) if key in self.values else None

    def size(self, key: str) -> int | None:
        value = self.optional(key, int)
        if value is not None and value <= 0:
            raise self.fail(f"{key} = {value} is not above zero")
        return value

    def matching(self, key: str, pattern: re.Pattern[str]) -> str | None:
        value = self.optional(key, str)
        if value is not None and not pattern.fullmatch(value):
            raise self.fail(f"{key} = {value!r} is malformed")
        return value

    def choice(self, key: str, literal: Any) -> Any:
        value = self.take(key, str)
        if value not in get_args(literal):
            raise self.fail(f"{key} = {value!r} is none of {', '.join(get_args(literal))}")
        return value

    def tables(self, key: str) -> list["TomlTable"]:
        items = self.take(key, list)
        if not items or not all(isinstance(item, dict) for item in items):
            raise self.fail(f"{key} is not a list of tables")
        return [self._inner(item, f"{key} {n}") for n, item in enumerate(items, start=1)]

    def table(self, key: str) -> "TomlTable | None":
        value = self.optional(key, dict)
        return None if value is None else self._inner(value, key)

    def done(self) -> None:
        if self.values:
            raise self.fail(f"unknown field {next(iter(self.values))!r}")

    def _inner(self, values: dict[str, Any], fallback: str) -> "TomlTable":
        label = values.get("name") or values.get("id") or fallback
        return TomlTable(values, f"{self.where}: {label}")
