"""`localmistral pull`: models from the Hub into its cache, and whether they are whole."""

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from localmistral.cli.consent import confirm_download
from localmistral.cli.listing import print_json
from localmistral.cli.options import AsJson, Debug, ModelOption, Offline, Quant, Yes, name_model
from localmistral.errors import ModelFileError, UsageError

if TYPE_CHECKING:
    from localmistral.fetching import Download
    from localmistral.fit.plan import Plan
    from localmistral.models.cache import LocalModel
    from localmistral.models.hub import FileCheck
    from localmistral.models.names import CatalogModel, HubRepository


def pull(
    positional: Annotated[
        str | None, typer.Argument(metavar="MODEL[:QUANT]", help="As -m.")
    ] = None,
    model: ModelOption = None,
    quant: Quant = None,
    yes: Yes = False,
    check: Annotated[
        bool, typer.Option("--check", help="Verify what is on disk by its hash; nothing is pulled.")
    ] = False,
    offline: Offline = False,
    as_json: AsJson = False,
    debug: Debug = False,  # noqa: ARG001  (read by `main`)
) -> None:
    """Download a model; what was interrupted continues. Without a quant, the planner's choice."""
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    if model is None and positional is None and (quant is not None or not check):
        raise UsageError("No model is named.", "See localmistral models; localmistral pull NAME")
    name = None if model is None and positional is None else name_model(model, positional, quant)
    if check:
        _check(name, as_json)
    else:
        assert name is not None
        _pull(name, yes, as_json)


def _pull(name: str, yes: bool, as_json: bool) -> None:
    from localmistral.fetching import Download, fetch
    from localmistral.models.cache import find_local
    from localmistral.models.download import is_offline
    from localmistral.models.names import LocalFiles, resolve
    from localmistral.terminal.progress import show_transfer

    resolved = resolve(name)
    local = find_local(resolved)
    if local is not None and (isinstance(resolved, LocalFiles) or is_offline()):
        _show(local, 0, as_json)
        return
    assert not isinstance(resolved, LocalFiles)  # a path that resolves is there
    plan = None if resolved.quant else _choose(name)
    ready = _prepare_named(resolved) if plan is None else _prepare_planned(plan)
    if not isinstance(ready, Download):
        _show(ready, 0, as_json)
        return
    if ready.missing_bytes:
        confirm_download(yes=yes, plan=plan)(ready)
    _show(fetch(ready, show_transfer), ready.missing_bytes, as_json)


def _prepare_planned(plan: "Plan") -> "Download | LocalModel":
    """What is to be brought, or the copy on this disk where there's nothing newer to bring."""
    from localmistral.fetching import find_planned, find_published, prepare_files, prepare_plan
    from localmistral.terminal.render import print_note

    if not plan.is_local:
        return prepare_plan(plan, on_note=print_note)
    source = find_published(plan)
    return find_planned(plan) if source is None else prepare_files(source)


def _prepare_named(resolved: "CatalogModel | HubRepository") -> "Download":
    from localmistral.fetching import prepare_files
    from localmistral.models.remote import find_remote
    from localmistral.terminal.render import print_note

    source = find_remote(resolved, on_note=print_note)
    assert source is not None  # it's asked for by its quant
    return prepare_files(source)


def _choose(name: str) -> "Plan":
    from localmistral.fit.plan import PlanRequest
    from localmistral.planning import current_machine, gather_candidates, plan_choices
    from localmistral.terminal.render import print_note

    choices = gather_candidates(name, uses_hub=True)
    for note in choices.notes:
        print_note(note)
    return plan_choices(choices, PlanRequest(), current_machine())


def _show(local: "LocalModel", downloaded_bytes: int, as_json: bool) -> None:
    """What is here now: a word on stderr, the path that -m takes on stdout."""
    from localmistral.terminal.render import print_note

    state = "is downloaded and verified" if downloaded_bytes else "is here already"
    print_note(f"{local.name} {state}: localmistral run -m {local.name} PROMPT")
    if as_json:
        print_json({**local.to_json(), "downloaded_bytes": downloaded_bytes})
    else:
        sys.stdout.write(f"{local.path}\n")


def _check(name: str | None, as_json: bool) -> None:
    """Hash every file of a model, or of all; exit 1 when one was corrupt."""
    from localmistral.models.cache import find_copies, list_local
    from localmistral.models.checking import check_local
    from localmistral.terminal.progress import CHECKING, show_transfer
    from localmistral.terminal.render import print_note

    models = find_copies(name) if name is not None else list_local()
    if not models:
        print_note("There are no models on this disk.")
    results: list[tuple[LocalModel, FileCheck]] = []
    for local in models:
        with show_transfer(local.name, CHECKING) as on_progress:
            checks = check_local(local, on_progress=on_progress)
        results += [(local, check) for check in checks]
        print_note(f"{local.name}: {_describe_checks(checks)}")
    if as_json:
        print_json([_check_json(local, check) for local, check in results])
    _fail_on_damage(results)


def _describe_checks(checks: "Sequence[FileCheck]") -> str:
    """`all 4 files are verified`, or what isn't."""
    sound = sum(check.state == "ok" for check in checks)
    if sound == len(checks):
        return "its file is verified" if sound == 1 else f"all {sound} files are verified"
    others = ", ".join(f"{c.path.name}: {c.problem}" for c in checks if c.state != "ok")
    return f"{sound} of {len(checks)} files are verified; {others}"


def _check_json(local: "LocalModel", check: "FileCheck") -> dict[str, object]:
    return {
        "model": local.name,
        "path": str(check.path),
        "bytes": check.file.bytes,
        "sha256": check.file.sha256,
        "state": check.state,
        "problem": check.problem,
    }


def _fail_on_damage(results: "Sequence[tuple[LocalModel, FileCheck]]") -> None:
    damaged = [(local, check) for local, check in results if check.state in ("corrupt", "missing")]
    if not damaged:
        return
    local, check = damaged[0]
    others = len(damaged) - 1
    more = f" {others} more are damaged or missing." if others else ""
    hint = f"Fetch it again: localmistral pull {local.name}" if local.repository else ""
    raise ModelFileError(f"{check.path.name} of {local.name}: {check.problem}.{more}", hint)
