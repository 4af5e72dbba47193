"""`localmistral models` and `localmistral list` for people. Knows no disk and no catalogue."""

from collections.abc import Sequence

from localmistral.models.cache import LocalModel
from localmistral.models.catalog import Model
from localmistral.terminal.render import print_note, print_table
from localmistral.units import format_bytes, format_tokens


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


def print_local(models: Sequence[LocalModel]) -> None:
    """One row a model on disk; incomplete ones say what is missing."""
    if not models:
        print_note("No models on this disk yet; any GGUF file runs: localmistral run -m FILE.gguf")
        return
    rows = [
        (model.name, model.quant or "", format_bytes(model.bytes), model.problem or "complete")
        for model in models
    ]
    print_table(("model", "quant", "size", "state"), rows)
