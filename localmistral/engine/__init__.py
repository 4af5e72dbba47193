"""llama.cpp behind a queue: load a model, submit requests, read their streams.

The only package that imports llama_cpp. Knows nothing of chat, HTTP or choosing a plan.
"""

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
    "Engine",
    "EngineMetrics",
    "EngineSettings",
    "FinishReason",
    "GenerationResult",
    "Proposer",
    "Request",
    "Sampling",
    "Stream",
    "TokenEvent",
    "TokenProbability",
]
