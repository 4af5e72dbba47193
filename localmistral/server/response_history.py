"""What a response is an answer to: earlier responses, references to their items, and new input.

Knows nothing of answers, and starts nothing.
"""

import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from localmistral.errors import BadRequestError
from localmistral.server.response_items import Conversation, is_reference, read_items
from localmistral.server.response_store import ResponseStore
from localmistral.server.response_writer import new_id
from localmistral.server.responses_request import ResponsesRequest

_ID_PREFIXES = {"message": "msg", "function_call": "fc", "reasoning": "rs"}


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """Items of a conversation, each with its place in the request; `instructions` come first but
    hold for one response, so they are no part of what is remembered."""

    items: tuple[dict[str, Any], ...]
    places: tuple[str, ...]
    instructions: str | None

    def read(self) -> Conversation:
        """As messages. Errors: BadRequestError naming the item."""
        conversation = read_items(self.items, self.places)
        if self.instructions:
            system = {"role": "system", "content": self.instructions}
            conversation.messages.insert(0, system)
            conversation.sources.insert(0, {"whole": "instructions"})
        return conversation

    def shorten(self, fits: Callable[["History"], bool]) -> "History":
        """The longest end that `fits`, from a user's message on, behind all system messages.

        `self` if none does.
        """
        starts = [i for i, item in enumerate(self.items) if item.get("role") == "user"]
        found = bisect.bisect_left(starts, True, key=lambda start: fits(self._cut(start)))
        return self._cut(starts[found]) if found < len(starts) else self

    def _cut(self, start: int) -> "History":
        kept = [
            i
            for i, item in enumerate(self.items)
            if i >= start or item.get("role") in ("system", "developer")
        ]
        return replace(
            self,
            items=tuple(self.items[i] for i in kept),
            places=tuple(self.places[i] for i in kept),
        )


def gather(store: ResponseStore, body: ResponsesRequest) -> History:
    """All of it, references resolved. Errors: BadRequestError for what is forgotten."""
    earlier = _recall(store, body.previous_response_id)
    new = body.list_input()
    places = [f"input[{i}]" for i in range(len(new))]
    resolved = _resolve(store, new, places)
    return History(
        items=(*earlier, *resolved),
        places=(*["previous_response_id"] * len(earlier), *places),
        instructions=body.instructions,
    )


def _recall(store: ResponseStore, name: str | None) -> tuple[dict[str, Any], ...]:
    if name is None:
        return ()
    found = store.find(name)
    if found is None:
        raise BadRequestError(
            f"previous_response_id {name[:80]!r} is not known here (any more).",
            "Send the whole conversation as input.",
            param="previous_response_id",
        )
    return found.conversation


def _resolve(
    store: ResponseStore, items: Sequence[dict[str, Any]], places: Sequence[str]
) -> list[dict[str, Any]]:
    """References replaced by what they stand for, every other item under an id of its own."""
    names = {str(item.get("id")) for item in items if is_reference(item)}
    known = store.find_items(names)
    resolved = []
    for item, place in zip(items, places, strict=True):
        if not is_reference(item):
            resolved.append(_complete(item))
        elif str(item.get("id")) in known:
            resolved.append(known[str(item["id"])])
        else:
            raise BadRequestError(
                f"{place} refers to {str(item.get('id'))[:80]!r}, which is not known here (any "
                "more).",
                "Send the item itself.",
                param=place,
            )
    return resolved


def _complete(item: Mapping[str, Any]) -> dict[str, Any]:
    """The item with its type and an id, as it is listed."""
    kind = item.get("type") or ("message" if "role" in item else None)
    name = item.get("id")
    if not isinstance(name, str) or not name:
        name = new_id(_ID_PREFIXES.get(str(kind), "item"))
    return {**item, "type": kind, "id": name}
