"""Loading the model that a command names, with a bar, its log and the knobs that were set."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from localmistral.session import Chat


@contextmanager
def load_chat(
    name: str, knobs: dict[str, Any], chat_template: str | None, verbose: bool
) -> "Iterator[Chat]":
    from localmistral.engine import EngineSettings
    from localmistral.session import Chat
    from localmistral.terminal.render import show_loading

    if verbose:
        _show_log()
    context = knobs.get("context")
    others = {name: value for name, value in knobs.items() if name != "context"}
    with show_loading(name) as on_progress:
        chat = Chat.load(
            name,
            EngineSettings(**others),
            context=context,
            chat_template=chat_template,
            on_progress=on_progress,
        )
    with chat:
        yield chat


def _show_log() -> None:
    import logging

    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("localmistral")
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)


def warn_of_effort(chat: "Chat", effort: str | None) -> None:
    if effort is not None and not chat.has_effort_switch:
        from localmistral.terminal.render import print_note

        print_note(f"{chat.title} has no reasoning switch: --effort {effort} has no effect.")
