"""Every error a user can meet: one sentence with numbers in it, and the next command to type.

Knows nothing of terminals, exit codes or HTTP: those edges choose by class.
"""


class LocalMistralError(Exception):
    """A known failure.

    `message` is one sentence saying what is wrong, `hint` is what to do next (may be empty).
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(LocalMistralError):
    """The command line contradicts itself."""


class PlanError(LocalMistralError):
    """What was asked for can't be had on this machine; another value of an option could.

    `change` are the options to type in place of those that were typed, as (`--quant`, `Q4_K_M`);
    None instead of a value leaves the option out, an empty one is a flag's. It may be empty.
    """

    def __init__(
        self, message: str, hint: str = "", *, change: tuple[tuple[str, str | None], ...] = ()
    ) -> None:
        super().__init__(message, hint)
        self.change = change


class BadRequestError(LocalMistralError):
    """A request's own content is wrong; `param` names the field, such as `messages[2].role`."""

    def __init__(self, message: str, hint: str = "", *, param: str = "") -> None:
        super().__init__(message, hint)
        self.param = param


class ContextOverflowError(BadRequestError):
    """A prompt has more tokens than the context holds."""


class ModelNotFoundError(LocalMistralError):
    """No model of that name is known, or it is not on this disk."""


class ModelFileError(LocalMistralError):
    """A model file is damaged, cut short or no GGUF at all."""


class DownloadError(LocalMistralError):
    """The Hub can't be reached or refuses, what it sent isn't the file, or the disk is full."""


class TemplateError(LocalMistralError):
    """A chat template can't be compiled, refuses the conversation, or passes its limits."""


class BusyError(LocalMistralError):
    """The engine's queue is full; trying again later may work."""


class EngineError(LocalMistralError):
    """llama.cpp failed; the message carries its own log line."""


class OutOfMemoryError(EngineError):
    """A device has no room for the weights, the context or a graph: smaller values may load.

    `device` is its name, `wanted_bytes` what it could not give; empty and 0 where unknown.
    """

    def __init__(
        self, message: str, hint: str = "", *, device: str = "", wanted_bytes: int = 0
    ) -> None:
        super().__init__(message, hint)
        self.device = device
        self.wanted_bytes = wanted_bytes
