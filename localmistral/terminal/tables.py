"""`localmistral models` and `localmistral list` for people. Knows no disk and no catalogue."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from localmistral.models.cache import LocalModel
from localmistral.models.catalog import Model
from localmistral.terminal.render import print_note, print_table
from localmistral.units import format_bytes, format_tokens

if TYPE_CHECKING:
    from localmistral.models.partials import PartialDownload  # slow to import


def print_models(models: Sequence[Model]) -> None:
    """One row a model: what it is, and the range of its quantisations."""
    rows = [
        (
            model.name,
            _describe_size(model),
            format_tokens(model.context),
            "yes" if model.vision else "no",
            model.reasoning,
            model.licence,
            _describe_quants(model),
        )
        for model in models
    ]
    print_table(
        ("model", "parameters", "context", "vision", "reasoning", "licence", "quants"), rows
    )


def _describe_size(model: Model) -> str:
    active = f" ({model.active_billions:g}B active)" if model.active_billions else ""
    return f"{model.parameters_billions:g}B{active}"


def _describe_quants(model: Model) -> str:
    """The smallest and the largest quantisation whose sizes are known."""
    sized = sorted(
        ((q.bytes, q.exact, q.name) for q in model.quants if q.bytes), key=lambda q: q[0]
    )
    if not sized:
        return ", ".join(quant.name for quant in model.quants)
    ends = sized[:1] if len(sized) == 1 else [sized[0], sized[-1]]
    shown = (
        f"{name} {'' if exact else 'about '}{format_bytes(size)}" for size, exact, name in ends
    )
    return " to ".join(shown)


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalRow:
    """A model on disk, when it was last used, and the download that would complete it: with an
    image encoder, where all shards are there."""

    model: LocalModel
    last_used_s: float | None  # since 1970
    partial: "PartialDownload | None"

    def to_json(self) -> dict[str, Any]:
        """`LocalModel.to_json`, `last_used` in UTC by ISO 8601 and `partial_bytes`, either null."""
        used = self.last_used_s
        return {
            **self.model.to_json(),
            "last_used": None if used is None else datetime.fromtimestamp(used, UTC).isoformat(),
            "partial_bytes": None if self.partial is None else self.partial.done_bytes,
        }


def partial_json(partial: "PartialDownload") -> dict[str, Any]:
    """A download of which no file is complete, as a row like those of models."""
    return {
        "name": partial.name,
        "model": None,
        "repository": partial.repository,
        "revision": None,
        "quant": partial.quant,
        "bytes": 0,
        "path": None,
        "files": [],
        "complete": False,
        "problem": _describe_partial(partial),
        "mmproj": None,
        "last_used": None,
        "partial_bytes": partial.done_bytes,
    }


def print_local(models: Sequence[LocalRow], partials: "Sequence[PartialDownload]") -> None:
    """One row a model on disk; incomplete ones say what is missing, and how far a download is."""
    if not models and not partials:
        print_note(
            "No models on this disk yet: localmistral pull small-4; any GGUF file runs, too: "
            "localmistral run -m FILE.gguf"
        )
        return
    now_s = time.time()
    rows = [
        (
            row.model.name,
            row.model.quant or "",
            format_bytes(row.model.bytes),
            _describe_state(row),
            _describe_age(row.last_used_s, now_s),
        )
        for row in models
    ]
    rows += [
        (p.name, p.quant or "", format_bytes(p.done_bytes), _describe_share(p), "")
        for p in partials
    ]
    print_table(("model", "quant", "size", "state", "last used"), rows)


def _describe_state(row: LocalRow) -> str:
    partial = f"; {_describe_share(row.partial)}" if row.partial else ""
    return f"{row.model.problem or 'complete'}{partial}"


def _describe_partial(partial: "PartialDownload") -> str:
    if partial.bytes is None:
        return f"{format_bytes(partial.done_bytes)} of an unfinished download"
    return f"{format_bytes(partial.done_bytes)} of {format_bytes(partial.bytes)} are downloaded"


def _describe_share(partial: "PartialDownload") -> str:
    """Short, so that a name and all figures fit 80 columns."""
    return f"partial, {partial.done_bytes / partial.bytes:.0%}" if partial.bytes else "partial"


def _describe_age(last_used_s: float | None, now_s: float) -> str:
    """`just now`, `3 h ago`, `3 days ago`; empty where it isn't known."""
    if last_used_s is None:
        return ""
    days = int(max(0.0, now_s - last_used_s) // 86400)
    if days == 0:
        hours = int(max(0.0, now_s - last_used_s) // 3600)
        return f"{hours} h ago" if hours else "just now"
    return "1 day ago" if days == 1 else f"{days} days ago"
