"""Asking before something large is downloaded or removed; a script is told what to type instead."""

import sys
from typing import TYPE_CHECKING

import typer

from localmistral.errors import LocalMistralError
from localmistral.units import format_bytes, format_speed, format_tokens

if TYPE_CHECKING:
    from localmistral.fetching import Confirm, Download
    from localmistral.fit.plan import Plan


def confirm_download(*, yes: bool, plan: "Plan | None" = None) -> "Confirm":
    """Shows the plan that chose the files, and their size, then asks unless `yes`."""

    def confirm(download: "Download") -> None:
        from localmistral.fetching import refuse_to_ask
        from localmistral.terminal.render import print_note

        if plan is not None:
            show_choice(plan)
        print_note(describe_download(download))
        if yes:
            return
        if not can_ask():
            raise refuse_to_ask(download)
        if not typer.confirm("Download?", default=True, err=True):
            raise LocalMistralError(
                "Nothing was downloaded.", f"Later: localmistral pull {download.name}"
            )

    return confirm


def can_ask() -> bool:
    """Whether a person sits there who sees a question and can answer it."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def show_choice(plan: "Plan") -> None:
    """What the planner chose for this machine, and why."""
    from localmistral.terminal.render import print_note

    speed = f", about {format_speed(plan.predicted.decode_tokens_per_second)}"
    print_note(
        f"The plan for this machine: {plan.model}:{plan.quant}, context "
        f"{format_tokens(plan.context)}{'' if plan.only_embeds else speed}."
    )
    for reason in plan.reasons:
        print_note(f"- {reason}")


def describe_download(download: "Download") -> str:
    """`mistral-small-4:UD-IQ3_S from unsloth/...: 2 files, 42.2 GiB; ...` in one sentence."""
    count = len(download.files)
    files = "1 file" if count == 1 else f"{count} files"
    here = download.bytes - download.missing_bytes
    rest = f", {format_bytes(here)} of it here already" if here else ""
    return (
        f"{download.name} from {download.repository}: {files}, {format_bytes(download.bytes)}{rest}"
        f"; {format_bytes(download.missing_bytes)} to download."
    )
