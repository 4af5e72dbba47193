"""What a server serves: the chat once it is loaded, and until then how far the load has come.

Filled by whoever loads, read by the routes, from any thread. Knows nothing of HTTP.
"""

import time
from dataclasses import dataclass, field
from typing import Any

from localmistral.errors import BusyError, EngineError, LocalMistralError, ModelNotFoundError
from localmistral.session import Chat


@dataclass(slots=True, kw_only=True)
class Serving:
    """The state behind the routes; one object a server."""

    chat: Chat | None = None
    progress: float = 0.0
    failure: LocalMistralError | None = None
    is_draining: bool = False
    plan: dict[str, Any] | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    def require(self) -> Chat:
        """The chat, or why there is none: BusyError while loading, EngineError when it died."""
        if self.is_draining:
            raise BusyError("The server is shutting down.", "Send the request to another one.")
        if self.failure is not None:
            raise EngineError(self.failure.message, self.failure.hint)
        if self.chat is None:
            raise BusyError(
                f"The model is still loading ({self.progress:.0%}).", "Try again in a moment."
            )
        if not self.chat.engine.is_alive:
            raise EngineError("The engine has stopped.", "Restart the server.")
        return self.chat

    def require_model(self, name: str | None) -> Chat:
        """The chat if `name` means its model (None does); ModelNotFoundError otherwise."""
        chat = self.require()
        if name is None or name.casefold() in {known.casefold() for known in name_model(chat)}:
            return chat
        raise ModelNotFoundError(
            f"The model {name[:80]!r} is not served here, {name_model(chat)[0]!r} is.",
            "See /v1/models.",
        )


def name_model(chat: Chat) -> tuple[str, ...]:
    """What a request may call the loaded model: its id first, then its aliases."""
    stem = chat.title.removesuffix(".gguf")
    names = [stem, chat.title, chat.name]
    if chat.model is not None:
        names += [chat.model.name, *chat.model.aliases]
    return tuple(dict.fromkeys(names))
