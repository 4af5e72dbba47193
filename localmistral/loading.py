"""What a load takes: which files, how much context, and whether the memory is there.

Knows nothing of engines that run, or of conversations.
"""

import dataclasses

import psutil

from localmistral.engine import Engine, EngineSettings
from localmistral.errors import BadRequestError, EngineError, ModelNotFoundError
from localmistral.models.cache import LocalModel, find_local
from localmistral.models.catalog import Model, load_catalog
from localmistral.models.names import CatalogModel, HubRepository, quote_name, resolve
from localmistral.models.shape import ModelShape
from localmistral.units import format_bytes

DEFAULT_CONTEXT = 8192
"""Tokens of context when none is asked for: enough for a conversation, small enough for any
machine that holds the weights."""


def find_model(name: str) -> LocalModel:
    """The files on this disk that `name` stands for; ModelNotFoundError with the way out."""
    resolved = resolve(name)
    local = find_local(resolved)
    if local is not None:
        return local
    shown = quote_name(name)
    if isinstance(resolved, CatalogModel):
        raise ModelNotFoundError(
            f"{resolved.model.name} is known, but not on this disk.", _suggest_download(resolved)
        )
    assert isinstance(resolved, HubRepository)
    raise ModelNotFoundError(
        f"No file of {shown} is on this disk.",
        "Download one of its GGUF files, then: localmistral run -m FILE.gguf PROMPT",
    )


def _suggest_download(resolved: CatalogModel) -> str:
    wanted: Model = resolved.model
    repository = wanted.repositories[0].id
    return (
        f"Download one of its GGUF files from the Hub repository {repository}, then: "
        "localmistral run -m FILE.gguf PROMPT"
    )


def limit_context(shape: ModelShape, local: LocalModel) -> int:
    """The model's real limit: the catalogue's where it knows better than the file."""
    known = load_catalog().find(local.model) if local.model else None
    limits = [known.context if known else 0, shape.context_length]
    return min((limit for limit in limits if limit > 0), default=DEFAULT_CONTEXT)


def choose_context(wanted: int | None, limit: int) -> int:
    if wanted is None:
        return min(DEFAULT_CONTEXT, limit)
    if wanted > limit:
        raise BadRequestError(
            f"A context of {wanted} tokens is asked for, the model's limit is {limit}.",
            f"Use --context {limit} or less.",
            param="context",
        )
    return wanted


def fit_ram(settings: EngineSettings, shape: ModelShape) -> EngineSettings:
    """Refuse what can't run without a GPU; a second copy of the weights only where it fits."""
    if Engine.has_gpu():
        return settings
    memory = psutil.virtual_memory()
    if shape.weight_bytes > memory.total:
        raise EngineError(
            f"The weights take {format_bytes(shape.weight_bytes)}, this machine has "
            f"{format_bytes(memory.total)} of RAM and no GPU that llama.cpp can use.",
            "Take a smaller quantisation or model: localmistral models",
        )
    fits_twice = 2 * shape.weight_bytes < memory.available
    return dataclasses.replace(settings, repack=settings.repack and fits_twice)
