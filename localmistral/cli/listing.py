"""`localmistral models` and `localmistral list`."""

import json
import sys
from typing import Any

from localmistral.cli.options import AsJson, Debug


def models(as_json: AsJson = False, debug: Debug = False) -> None:  # noqa: ARG001
    """The models known by name, with their quantisations."""
    from localmistral.models.catalog import load_catalog
    from localmistral.terminal import tables

    known = load_catalog().models
    if as_json:
        print_json([model.to_json() for model in known])
    else:
        tables.print_models(known)


def list_models(as_json: AsJson = False, debug: Debug = False) -> None:  # noqa: ARG001
    """The models on this disk, and the downloads that aren't finished."""
    from localmistral.models.cache import scan_local
    from localmistral.models.history import last_used_s
    from localmistral.models.partials import list_partials
    from localmistral.terminal import tables
    from localmistral.terminal.render import print_note

    scan = scan_local()
    for warning in scan.warnings:
        print_note(warning)
    partials = {partial.name: partial for partial in list_partials()}
    rows = [
        tables.LocalRow(
            model=model,
            last_used_s=last_used_s(model.path) if model.complete else None,
            partial=partials.pop(model.name, None),
        )
        for model in scan.models
    ]
    if as_json:
        listed = [row.to_json() for row in rows]
        print_json(listed + [tables.partial_json(partial) for partial in partials.values()])
    else:
        tables.print_local(rows, list(partials.values()))


def print_json(document: Any) -> None:
    json.dump(document, sys.stdout, ensure_ascii=False, indent=2)
    sys.stdout.write("\n")
