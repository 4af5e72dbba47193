"""The engine: a model loaded once, answering any number of requests from any thread.

    with Engine.load([path], EngineSettings(context=4096, parallel=4)) as engine:
        for event in engine.submit(Request(prompt=tuple(engine.tokenize("Hello")))):
            print(event.text, end="")

Knows nothing of chat formats, plans or HTTP.
"""

import functools
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Self

from localmistral.engine.buffers import LoadReport, read_report
from localmistral.engine.embedding import Embedder, makes_embeddings, only_embeds
from localmistral.engine.jobs import Job
from localmistral.engine.library import has_gpu, logger
from localmistral.engine.metrics import EngineMetrics
from localmistral.engine.model import Context, Model, fit_settings
from localmistral.engine.offload import name_buffers
from localmistral.engine.scheduler import Scheduler
from localmistral.engine.settings import EngineSettings, Request
from localmistral.engine.stream import Channel, Stream
from localmistral.engine.tokenizer import Tokenizer
from localmistral.errors import BadRequestError, ContextOverflowError, EngineError

_POLL_S = 0.1


class Engine:
    """Owns the thread that owns the model. Close it, or leave its `with` block."""

    def __init__(
        self, thread: "_EngineThread", settings: EngineSettings, tokenizer: Tokenizer
    ) -> None:
        self._thread = thread
        self._tokenizer = tokenizer
        self.settings = settings
        self._finalizer = weakref.finalize(self, thread.stop)

    @classmethod
    def load(
        cls,
        files: Sequence[Path],
        settings: EngineSettings | None = None,
        *,
        on_progress: Callable[[float], None] | None = None,
    ) -> Self:
        """Load `files` (all shards, in order) and make the context.

        Ctrl-C stops the load. Raises ModelFileError for what llama.cpp can't load,
        OutOfMemoryError where a device has no room, EngineError for devices and splits that can't
        be. `on_progress` gets 0.0-1.0 on another thread.
        """
        thread = _EngineThread(files, settings or EngineSettings(), on_progress)
        thread.start()
        try:
            while not thread.ready.wait(_POLL_S):
                continue
        except BaseException:
            thread.stop()
            raise
        if thread.error is not None:
            thread.join()
            raise thread.error
        assert thread.tokenizer is not None
        return cls(thread, thread.settings, thread.tokenizer)

    def submit(self, request: Request) -> Stream:
        """Queue `request`; returns at once.

        Raises ContextOverflowError when the prompt leaves no room for an answer, BusyError when
        the queue is full, EngineError when the engine is closed, BadRequestError for a model that
        only makes embeddings.
        """
        self._check(request)
        channel = Channel()
        job = Job(request, channel)
        scheduler = self._thread.open_scheduler()
        scheduler.submit(job)
        return Stream(channel, functools.partial(self._cancel, scheduler, job))

    def _cancel(self, scheduler: Scheduler, job: Job) -> None:
        """A method, so that a stream in use keeps its engine from being closed behind it."""
        scheduler.cancel(job)

    def _check(self, request: Request) -> None:
        size, context = len(request.prompt), self.settings.context
        if size >= context:
            room = _round_up(size + 1024)
            larger = f", or make room: --context {room}" if room <= self._thread.limit else ""
            raise ContextOverflowError(
                f"The prompt has {size} tokens, the context holds {context}.",
                f"Shorten it{larger}.",
                param="messages",
            )
        self._tokenizer.check(request.prompt, param="prompt")
        self._tokenizer.check(list(request.sampling.logit_bias), param="logit_bias")
        self._tokenizer.check(request.stop_tokens, param="stop_token_ids")

    def tokenize(self, text: str, *, parse_special: bool = False) -> list[int]:
        """Token ids of `text`, without BOS; control-token text counts only with `parse_special`."""
        return self._tokenizer.encode(text, parse_special=parse_special)

    def detokenize(self, tokens: Iterable[int]) -> str:
        """The text of `tokens`, control tokens spelled out."""
        return self._tokenizer.decode(tokens)

    @staticmethod
    def has_gpu() -> bool:
        """Whether this build of llama.cpp finds a GPU."""
        return has_gpu()

    @property
    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    @property
    def embedder(self) -> Embedder | None:
        """What turns texts into vectors; None for a model that wasn't made for it."""
        return self._thread.embedder

    @property
    def report(self) -> LoadReport:
        """What the load took on every device, by llama.cpp's own account."""
        assert self._thread.report is not None
        return self._thread.report

    @property
    def is_alive(self) -> bool:
        """False once the engine is closed or has met an error that it can't go on after."""
        return self._thread.is_serving

    def metrics(self) -> EngineMetrics:
        return self._thread.metrics()

    def close(self) -> None:
        """Cancel what runs, end the thread and free the memory; safe to call twice."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _EngineThread(threading.Thread):
    """Loads, serves and frees on one thread: llama.cpp's context bears no second one."""

    def __init__(
        self,
        files: Sequence[Path],
        settings: EngineSettings,
        on_progress: Callable[[float], None] | None,
    ) -> None:
        super().__init__(name="localmistral-engine", daemon=True)
        self._files = files
        self.settings = settings
        self._on_progress = on_progress
        self._stopped = threading.Event()
        self._context: Context | None = None
        self._scheduler: Scheduler | None = None
        self.ready = threading.Event()
        self.error: BaseException | None = None
        self.tokenizer: Tokenizer | None = None
        self.embedder: Embedder | None = None
        self.report: LoadReport | None = None
        self.is_serving = False
        self.limit = 0

    def open_scheduler(self) -> Scheduler:
        if self._scheduler is not None:
            return self._scheduler
        if self.is_serving:
            raise BadRequestError(
                "The model makes embeddings, it writes no text.", "Use a chat model.", param="model"
            )
        raise EngineError("The engine is closed.")

    def metrics(self) -> EngineMetrics:
        if self._scheduler is None and self.embedder is not None:
            return self.embedder.metrics()
        return self.open_scheduler().metrics()

    def stop(self) -> None:
        """End the load or the serving, and wait until the memory is free."""
        self._stopped.set()
        scheduler = self._scheduler
        if scheduler is not None:
            scheduler.close()
        if self is not threading.current_thread():
            self.join()

    def run(self) -> None:
        model: Model | None = None
        try:
            model = Model(self._files, self.settings, self._report)
            self.limit = model.trained_context
            if only_embeds(model):
                self._embed(model)
            else:
                self._generate(model)
        except BaseException as error:  # noqa: BLE001  (raised by `load`, or logged)
            self._note(error)
        finally:
            self.is_serving = False
            if self.tokenizer is not None:
                self.tokenizer.close()
            if self.embedder is not None:
                self.embedder.close()
            if self._context is not None:
                self._context.close()
            if model is not None:
                model.close()
            self.ready.set()

    def _generate(self, model: Model) -> None:
        self.settings = fit_settings(self.settings, model)
        self._context = Context(model, self.settings)
        self.report = read_report(model.log + self._context.log, name_buffers(self.settings))
        stored_bytes = min(self.settings.stored_bytes, self.report.kv_bytes)
        self.settings = replace(self.settings, stored_bytes=stored_bytes)
        if makes_embeddings(model):
            self.embedder = Embedder(model, self.settings)
        self.tokenizer = Tokenizer(model.vocabulary)
        self._scheduler = Scheduler(
            model,
            self._context,
            self.tokenizer,
            self.settings,
            offloaded=self.report.is_offloaded,
        )
        if self._stopped.is_set():
            return
        self.is_serving = True
        self.ready.set()
        self._scheduler.run()

    def _embed(self, model: Model) -> None:
        """Callers compute on their own threads; this one holds the model for them."""
        context = min(self.settings.context, self.limit)
        self.settings = replace(self.settings, context=context, parallel=1)
        self.embedder = Embedder(model, self.settings)
        log = self.embedder.prepare()
        self.report = read_report([*model.log, *log], name_buffers(self.settings))
        self.tokenizer = Tokenizer(model.vocabulary)
        self.is_serving = True
        self.ready.set()
        self._stopped.wait()

    def _note(self, error: BaseException) -> None:
        if self.ready.is_set():
            logger.error("the engine's thread ended", exc_info=error)
        else:
            self.error = error

    def _report(self, done: float) -> bool:
        if self._on_progress is not None:
            self._on_progress(done)
        return not self._stopped.is_set()


def _round_up(tokens: int) -> int:
    return -(-tokens // 256) * 256
