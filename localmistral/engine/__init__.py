"""llama.cpp behind a queue: load a model, submit requests, read their streams.

The only package that imports llama_cpp, and only once one of its names is asked for: a command
that leaves the work to a running server needs the plain values (settings, specs) and must start
at once. Knows nothing of chat, HTTP or choosing a plan.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from localmistral.engine.buffers import LoadReport
    from localmistral.engine.embedding import Embedder
    from localmistral.engine.engine import Engine
    from localmistral.engine.metrics import EngineMetrics
    from localmistral.engine.sampling import TokenProbability
    from localmistral.engine.settings import (
        Constraint,
        EngineSettings,
        Proposer,
        Request,
        Sampling,
    )
    from localmistral.engine.stream import FinishReason, GenerationResult, Stream, TokenEvent

__all__ = [
    "Constraint",
    "Embedder",
    "Engine",
    "EngineMetrics",
    "EngineSettings",
    "FinishReason",
    "GenerationResult",
    "LoadReport",
    "Proposer",
    "Request",
    "Sampling",
    "Stream",
    "TokenEvent",
    "TokenProbability",
]

_HOMES = {
    "buffers": ("LoadReport",),
    "embedding": ("Embedder",),
    "engine": ("Engine",),
    "metrics": ("EngineMetrics",),
    "sampling": ("TokenProbability",),
    "settings": ("Constraint", "EngineSettings", "Proposer", "Request", "Sampling"),
    "stream": ("FinishReason", "GenerationResult", "Stream", "TokenEvent"),
}

if not TYPE_CHECKING:

    def __getattr__(name):
        """Import the module that holds `name`, the first time it is asked for."""
        from importlib import import_module

        for home, names in _HOMES.items():
            if name in names:
                return getattr(import_module(f"{__name__}.{home}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
