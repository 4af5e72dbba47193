"""`localmistral rm`: models and unfinished downloads off this disk."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from localmistral.cli.consent import can_ask
from localmistral.cli.options import Debug, ModelOption, Quant, Yes, name_model
from localmistral.errors import LocalMistralError, UsageError
from localmistral.units import format_bytes

if TYPE_CHECKING:
    from localmistral.models.removal import Removal


def rm(
    positional: Annotated[
        str | None, typer.Argument(metavar="MODEL[:QUANT]", help="As -m.")
    ] = None,
    model: ModelOption = None,
    quant: Quant = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="Remove what unfinished downloads left behind.")
    ] = False,
    yes: Yes = False,
    debug: Debug = False,  # noqa: ARG001  (read by `main`)
) -> None:
    """Remove a model from this disk; without a quant, all of its quantisations."""
    is_named = model is not None or positional is not None
    if partial and (is_named or quant is not None):
        raise UsageError("--partial sweeps every unfinished download; no model is named with it.")
    if partial:
        _sweep(yes)
    elif is_named:
        _remove(name_model(model, positional, quant), yes)
    else:
        raise UsageError("No model is named.", "See localmistral list; localmistral rm NAME")


def _remove(name: str, yes: bool) -> None:
    from localmistral.models.cache import find_copies
    from localmistral.models.history import forget_download
    from localmistral.models.names import DEMO
    from localmistral.models.removal import plan_removal, remove
    from localmistral.terminal.render import print_note

    models = find_copies(name)
    if any(local.name == DEMO for local in models):
        raise LocalMistralError("The demo model is a part of localmistral, so it stays.")
    removal = plan_removal(models)
    for line in _describe(removal):
        print_note(line)
    _agree(f"Remove {len(models)} model{'s' if len(models) > 1 else ''}?", name, yes)
    remove(removal)
    for local in models:
        forget_download(local.name)
    print_note(f"{format_bytes(removal.freed_bytes)} are free again.")


def _describe(removal: "Removal") -> Sequence[str]:
    lines = [
        f"{local.name}: {format_bytes(local.bytes)} in {local.path.parent}"
        for local in removal.models
    ]
    if removal.kept_bytes:
        lines.append(
            f"{format_bytes(removal.kept_bytes)} of it stay: other models or revisions use them."
        )
    return lines


def _sweep(yes: bool) -> None:
    from localmistral.models.download import sweep_partials
    from localmistral.models.orphans import find_orphans, sweep_orphans
    from localmistral.models.partials import forget_swept, list_partials
    from localmistral.terminal.render import print_note

    partials, orphans = list_partials(), find_orphans()
    if not partials and not orphans:
        print_note("There are no unfinished downloads.")
        return
    for partial in partials:
        print_note(f"{partial.name}: {format_bytes(partial.done_bytes)} downloaded.")
    for blob in orphans:
        size = format_bytes(blob.stat().st_size)
        print_note(f"{blob}: {size} that no model of the cache uses.")
    _agree("Remove these?", "--partial", yes)
    swept = [sweep_partials(), sweep_orphans()]
    forget_swept()
    count, freed = sum(one.count for one in swept), sum(one.bytes for one in swept)
    print_note(f"Removed {count} file{'' if count == 1 else 's'}: {format_bytes(freed)} are free.")


def _agree(question: str, argument: str, yes: bool) -> None:
    if yes:
        return
    if not can_ask():
        raise LocalMistralError(
            "Nothing is removed without being asked for, and nobody is there to be asked.",
            f"localmistral rm {argument} --yes",
        )
    if not typer.confirm(question, default=False, err=True):
        raise LocalMistralError("Nothing was removed.")
