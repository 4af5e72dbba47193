"""The command line that was typed, with an option changed: the next command to type.

Knows nothing of what the options mean, but that a quant may stand behind a model's name.
"""

import os
import shlex
import subprocess
from collections.abc import Iterable, Sequence

Change = tuple[str, str | None]


def retype(arguments: Sequence[str], changes: Iterable[Change]) -> str:
    """The whole command with each (option, value) in place of what was typed of that option; None
    leaves it out, an empty value is a flag's. What follows `--` stays behind it."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options, rest = list(arguments[:end]), list(arguments[end:])
    for name, value in changes:
        options = _without(options, name)
        if name == "--quant":
            options = [_cut_quant(word) for word in options]
        if value is not None:
            options += [name, value] if value else [name]
    words = ["localmistral", *options, *rest]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def _without(words: Sequence[str], name: str) -> list[str]:
    """Without an option that takes a value, written in either way."""
    kept: list[str] = []
    is_value = False
    for word in words:
        if not is_value and word != name and not word.startswith(f"{name}="):
            kept.append(word)
        is_value = not is_value and word == name
    return kept


def _cut_quant(word: str) -> str:
    """`small-4:Q8_0` -> `small-4`, where that is how a model is named."""
    from localmistral.models.catalog import load_catalog

    name, _, quant = word.rpartition(":")
    option, equals, model = name.rpartition("=")
    is_name = model.startswith("hf:") or load_catalog().find(model) is not None
    return name if quant and is_name and (not equals or option == "--model") else word
