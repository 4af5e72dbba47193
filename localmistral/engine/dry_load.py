"""A load without memory: llama.cpp builds the model and its graphs, and says what they would take.

Knows neither budgets nor plans.
"""

from collections.abc import Sequence
from pathlib import Path

from localmistral.engine.buffers import DeviceBuffers, LoadReport, read_report
from localmistral.engine.embedding import Embedder, only_embeds
from localmistral.engine.model import Context, Model, fit_settings
from localmistral.engine.offload import name_buffers
from localmistral.engine.settings import EngineSettings

__all__ = ["DeviceBuffers", "LoadReport", "dry_load"]


def dry_load(files: Sequence[Path], settings: EngineSettings) -> LoadReport:
    """Compute and output buffers of `files` (all shards, in order) loaded with `settings`.

    Nothing is read but the headers, which may be all there is of the files. Weights and KV come
    out as 0: llama.cpp skips them, and they follow exactly from the header. Never less than a real
    load takes; on devices after the first up to 4 times the hidden state of a ubatch more
    (16 bytes x embedding length x ubatch), measured over RPC devices. Works on the caller's thread,
    beside an engine that runs. Raises what `Engine.load` raises, but for a lack of memory.
    """
    model = Model(files, settings, is_dry=True)
    try:
        if only_embeds(model):
            return _measure_embedder(model, settings)
        fitted = fit_settings(settings, model)
        context = Context(model, fitted)
        context.close()
        return read_report(model.log + context.log, name_buffers(fitted))
    finally:
        model.close()


def _measure_embedder(model: Model, settings: EngineSettings) -> LoadReport:
    """With the longest text that `settings` allow. The log's output buffer is that of a few rows:
    a real one has a row for each token."""
    embedder = Embedder(model, settings)
    try:
        log = embedder.prepare(settings.context)
    finally:
        embedder.close()
    return read_report([*model.log, *log], name_buffers(settings))
