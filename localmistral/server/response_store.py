"""Responses that later ones may go on from, in memory, the least recently used forgotten first.

Knows nothing of HTTP.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Set
from dataclasses import dataclass
from typing import Any

MAX_RESPONSES = 512
MAX_BYTES = 64 << 20
"""Of all conversations kept, as JSON: an agent's long one has about a megabyte."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredResponse:
    """`items` is the conversation before the answer, without instructions; each has an id."""

    body: dict[str, Any]
    items: tuple[dict[str, Any], ...]

    @property
    def conversation(self) -> tuple[dict[str, Any], ...]:
        """Up to and with the answer."""
        return (*self.items, *self.body["output"])


class ResponseStore:
    """One server's memory of responses; safe to use from several threads."""

    def __init__(self, max_responses: int = MAX_RESPONSES, max_bytes: int = MAX_BYTES) -> None:
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._kept: OrderedDict[str, tuple[StoredResponse, int]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def put(self, name: str, response: StoredResponse) -> None:
        """Keep `response`; one that is larger than everything may be isn't kept at all."""
        size = len(json.dumps([response.body, response.items]))
        with self._lock:
            self._kept[name] = (response, size)
            self._bytes += size
            while len(self._kept) > self._max_responses or self._bytes > self._max_bytes:
                _, (_, freed) = self._kept.popitem(last=False)
                self._bytes -= freed

    def find(self, name: str) -> StoredResponse | None:
        with self._lock:
            if name not in self._kept:
                return None
            self._kept.move_to_end(name)
            return self._kept[name][0]

    def find_items(self, ids: Set[str]) -> dict[str, dict[str, Any]]:
        """Those items of all conversations kept whose ids are named."""
        if not ids:
            return {}
        with self._lock:
            kept = [response for response, _ in self._kept.values()]
        items = (item for response in kept for item in response.conversation)
        return {item["id"]: item for item in items if item["id"] in ids}

    def remove(self, name: str) -> bool:
        """Whether it was there."""
        with self._lock:
            found = self._kept.pop(name, None)
            self._bytes -= found[1] if found else 0
            return found is not None
