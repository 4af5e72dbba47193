"""Loading the model that a command names: planned, downloaded if need be, with a bar."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from localmistral.cli.consent import can_ask, confirm_download
from localmistral.errors import ModelNotFoundError
from localmistral.fit.plan import PlanRequest
from localmistral.units import format_bytes

if TYPE_CHECKING:
    from localmistral.fit.machine import Machine
    from localmistral.fit.plan import Plan
    from localmistral.loading import PlannedLoad
    from localmistral.server.client import RemoteChat
    from localmistral.session import Chat


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """What the command line says about loading; with a `plan_file` no name, and an empty
    request."""

    name: str | None
    request: PlanRequest
    plan_file: Path | None = None
    chat_template: str | None = None
    offline: bool = False
    yes: bool = False
    verbose: bool = False


@contextmanager
def load_chat(options: LoadOptions) -> "Iterator[Chat]":
    """Plan, fetch what is missing once that is agreed to, load; the chat is closed at the end."""
    with load_served(options, lambda _: None, must_write=True) as chat:
        yield chat


def load_served(
    options: LoadOptions, on_progress: Callable[[float], None], *, must_write: bool = False
) -> "Chat":
    """As `load_chat`, for whoever closes the chat; `on_progress` gets 0.0-1.0 as well. A model that
    only makes embeddings is loaded too, unless it `must_write`."""
    from localmistral.session import Chat
    from localmistral.terminal.render import print_note, show_loading

    if options.verbose:
        show_log()
    planned = plan_for(options, must_write=must_write)
    for note in _warn_of_speed(planned, options.request.min_speed):
        print_note(note)
    with show_loading(planned.local.name) as show:

        def report(done: float) -> None:
            show(done)
            on_progress(done)

        return Chat.load_planned(
            planned,
            chat_template=options.chat_template,
            on_progress=report,
            on_note=print_note,
        )


def _warn_of_speed(planned: "PlannedLoad", aim: float) -> Iterator[str]:
    """Sentences before a load that will be slow, and of cards that lie idle meanwhile."""
    speed = planned.plan.predicted.decode_tokens_per_second
    if speed >= aim or planned.plan.only_embeds:
        return
    yield (
        f"The model is expected to write about {speed:.1f} tokens/s here; to see why: "
        f"localmistral plan {planned.local.name}"
    )
    if not planned.machine.gpus:  # then all there is to note of the machine are idle cards
        yield from planned.machine.notes


def plan_for(options: LoadOptions, *, must_write: bool = True) -> "PlannedLoad":
    """The plan that a load will run, its files on this disk; ModelFileError for a model that only
    makes embeddings where it `must_write`."""
    from localmistral.models.shape import require_writer

    planned = _plan(options, must_write)
    if must_write:
        require_writer(planned.shape, planned.local.name)
    return planned


def _plan(options: LoadOptions, must_write: bool) -> "PlannedLoad":
    from localmistral.loading import plan_load, replay_plan
    from localmistral.models.cache import find_local
    from localmistral.models.names import resolve
    from localmistral.planning import current_machine

    if options.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    if options.plan_file is not None:
        return replay_plan(options.plan_file, current_machine())
    assert options.name is not None  # the model or the plan is named
    name = options.name
    is_here = find_local(resolve(name)) is not None
    machine = current_machine()
    if not is_here:
        name = _fetch(options, name, machine, must_write)
    return plan_load(name, options.request, machine)


def _fetch(options: LoadOptions, name: str, machine: "Machine", must_write: bool) -> str:
    """Download what suits this machine best; the name of what is then here."""
    from localmistral.fetching import ensure_local, refuse_absent
    from localmistral.models.download import is_offline
    from localmistral.models.shape import require_writer
    from localmistral.planning import gather_candidates, plan_choices
    from localmistral.terminal.progress import show_transfer
    from localmistral.terminal.render import print_note

    if is_offline():
        raise refuse_absent(name, is_offline=True)
    may_fetch = options.yes or can_ask()
    try:
        choices = gather_candidates(name, uses_hub=may_fetch)
    except ModelNotFoundError as error:
        if may_fetch:
            raise
        raise refuse_absent(name, is_offline=False) from error
    plan = plan_choices(choices, options.request, machine)
    if must_write:
        require_writer(choices.candidate_of(plan).shape, name)
    if not may_fetch:
        raise _refuse_to_fetch(name, plan)
    for note in choices.notes:
        print_note(note)
    confirm = confirm_download(yes=options.yes, plan=plan)
    local = ensure_local(plan, confirm=confirm, show_transfer=show_transfer, on_note=print_note)
    return local.name


def _refuse_to_fetch(name: str, plan: "Plan") -> ModelNotFoundError:
    """What to say to a script, without asking the network first."""
    from localmistral.fetching import say_absent

    chosen = f"{plan.model}:{plan.quant}"
    size = format_bytes(sum(file.bytes for file in plan.files))
    return ModelNotFoundError(
        f"{say_absent(name)}, and nobody is there to be asked whether "
        f"{chosen} ({size}), which suits this machine, may be downloaded.",
        f"localmistral pull {chosen} --yes",
    )


def show_log() -> None:
    """Everything this program and llama.cpp log, on stderr."""
    import logging

    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("localmistral")
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)


def warn_of_effort(chat: "Chat | RemoteChat", effort: str | None) -> None:
    if effort is not None and not chat.has_effort_switch:
        from localmistral.terminal.render import print_note

        print_note(f"{chat.title} has no reasoning switch: --effort {effort} has no effect.")
