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
    """The models on this disk."""
    from localmistral.models.cache import scan_local
    from localmistral.terminal import tables
    from localmistral.terminal.render import print_note

    scan = scan_local()
    for warning in scan.warnings:
        print_note(warning)
    if as_json:
        print_json([model.to_json() for model in scan.models])
    else:
        tables.print_local(scan.models)


def print_json(document: Any) -> None:
    json.dump(document, sys.stdout, ensure_ascii=False, indent=2)
    sys.stdout.write("\n")
