"""The engine's thread: continuous batching of many requests over one context.

Every step carries the next token of each generating request first, then as much prompt of the
others as its time budget allows. Knows nothing of chat or HTTP.
"""

import collections
import threading
import time
from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np

from localmistral.engine.jobs import Job
from localmistral.engine.library import explain, forget_complaints
from localmistral.engine.metrics import EngineMetrics, Totals
from localmistral.engine.model import ABORTED, DECODED, Context, Model
from localmistral.engine.pace import Pace, share_prompt
from localmistral.engine.sampling import Sampler
from localmistral.engine.sequences import Sequence, SequenceCache
from localmistral.engine.settings import EngineSettings
from localmistral.engine.stream import FinishReason
from localmistral.engine.tokenizer import Tokenizer
from localmistral.errors import BusyError, EngineError

LONGEST_BRIDGE = 2
"""Idle sequences between two that compute, up to which a row for each beats a pass of its own: on
the CPU a row of a small model takes about as long, of a large one a fraction."""

_Part = tuple[Job, int, int]
"""A job, how many of its pending tokens a step computes, and the logits wanted at their end."""


@dataclass(frozen=True, slots=True)
class _Share:
    """A job's part of a batch: `count` of its pending tokens, logits from row `first` on."""

    job: Job
    count: int
    first: int
    logits: int


class Scheduler:
    """Runs on one thread, through `run`; the other public methods may be called from any."""

    def __init__(
        self, model: Model, context: Context, tokenizer: Tokenizer, settings: EngineSettings,
        *, offloaded: bool,
    ) -> None:  # fmt: skip
        self._model, self._context, self._tokenizer = model, context, tokenizer
        self._settings = settings
        self._cache = SequenceCache(
            context,
            settings.parallel,
            settings.context,
            partial=model.keeps_every_position,
            window=model.window,
            stored_bytes=settings.stored_bytes,
        )
        self._pace = Pace(context.capacity, offloaded=offloaded)
        self._lock = threading.Condition()
        self._waiting: collections.deque[Job] = collections.deque()
        self._running: list[Job] = []
        self._decoding: list[_Share] = []
        self._bridged: list[Sequence] = []
        self._can_bridge = model.keeps_every_position and not model.window
        self._spared_last = False
        self._closing = False
        self._totals = Totals()

    # From any thread.

    def submit(self, job: Job) -> None:
        with self._lock:
            if self._closing:
                raise EngineError("The engine is closed.")
            if len(self._waiting) >= self._settings.queue:
                raise BusyError(
                    f"{len(self._waiting)} requests are waiting already, the queue is full.",
                    "Try again in a few seconds.",
                )
            self._waiting.append(job)
            self._totals.add(requests=1)
            self._lock.notify()

    def cancel(self, job: Job) -> None:
        """End `job` as soon as can be: before the next step, or by aborting the present one."""
        with self._lock:
            job.cancelled = True
            is_waiting = job in self._waiting
            if is_waiting:
                self._waiting.remove(job)
                self._totals.add(cancelled=1)
            elif self._may_abort(job):
                self._context.abort.set()
            self._lock.notify()
        if is_waiting:
            job.finish("cancelled")  # the engine's thread has not seen it yet

    def close(self) -> None:
        """Cancel everything and end the thread's loop."""
        with self._lock:
            self._closing = True
            self._context.abort.set()
            self._lock.notify()

    def metrics(self) -> EngineMetrics:
        with self._lock:
            return self._totals.snapshot(
                running=len(self._running),
                waiting=len(self._waiting),
                stored_tokens=self._cache.count_tokens(),
            )

    def _may_abort(self, job: Job) -> bool:
        """Whether the step under way should be given up for the sake of `job`'s end.

        The others in the step lose its work. So that a client that keeps cancelling can't stop
        them, no two steps that others have a part in are aborted in a row.
        """
        if not any(share.job is job for share in self._decoding):
            return False
        if all(share.job.cancelled for share in self._decoding):
            return True
        return job.is_prefilling and not self._spared_last

    # On the engine's thread.

    def run(self) -> None:
        """Serve requests until `close`; an unforeseen error ends them all with an EngineError."""
        try:
            while self._wait_for_work():
                self._step()
            self._end_all(None)
        except Exception as error:
            with self._lock:
                self._closing = True
            self._end_all(error)
            raise

    def _wait_for_work(self) -> bool:
        with self._lock:
            while not (self._closing or self._waiting or self._running):
                self._lock.wait()
            return not self._closing

    def _end_all(self, error: Exception | None) -> None:
        with self._lock:
            jobs = [*self._running, *self._waiting]
            self._waiting.clear()
        for job in jobs:
            if error is None:
                self._end(job, "cancelled")
            else:
                self._fail(job, error)

    def _step(self) -> None:
        self._end_cancelled()
        self._start_waiting()
        shares = self._fill_batch()
        if not shares:
            return
        self._context.adapt_threads(
            steady=any(share.job.request.sampling.is_repeatable for share in shares)
        )
        started_s = time.monotonic()
        code = self._decode(shares)
        self._cut_bridges()
        if code == DECODED:
            self._measure(shares, time.monotonic() - started_s)
            for share in shares:
                self._take_result(share)
        else:
            self._undo(shares, code)

    def _end_cancelled(self) -> None:
        for job in [job for job in self._running if job.cancelled]:
            self._end(job, "cancelled")

    def _start_waiting(self) -> None:
        while len(self._running) < self._settings.parallel:
            with self._lock:
                if not self._waiting:
                    return
                job = self._waiting.popleft()
                self._running.append(job)
            self._start(job)

    def _start(self, job: Job) -> None:
        request = job.request
        try:
            sampler = Sampler(
                self._model.vocabulary, request.sampling,
                constraint=request.constraint, top_logprobs=request.top_logprobs,
                min_tokens=request.min_tokens, held_back=job.list_held_back(self._tokenizer),
            )  # fmt: skip
            job.sampler = sampler  # from here on, whatever happens, it will be freed
            sequence = self._cache.acquire(job.prompt, reuse=request.cache_prompt)
            job.start(sequence, sampler)
        except Exception as error:  # noqa: BLE001  (one request's trouble must not end the others)
            self._fail(job, error)
            return
        with self._lock:
            self._totals.add(prompt_tokens=len(job.prompt), cached_tokens=job.cached_tokens)

    def _fill_batch(self) -> list[_Share]:
        """The next step's tokens, with their sequences in ascending order: llama.cpp computes
        neighbours at once, and what comes after a gap by itself."""
        self._context.clear_batch()
        parts = self._pick_answers()
        parts += self._pick_prompts(self._context.capacity - sum(count for _, count, _ in parts))
        parts.sort(key=lambda part: part[0].place.number)
        spare = self._context.capacity - sum(count for _, count, _ in parts)
        shares: list[_Share] = []
        for job, count, logits in parts:
            if shares:
                spare -= self._bridge(shares[-1].job.place, job.place, spare)
            shares.append(self._add(job, count, logits))
        return shares

    def _pick_answers(self) -> list[_Part]:
        """The next token of every answer, and what is guessed to follow."""
        writing = [job for job in self._running if not job.is_prefilling]
        spare = self._context.capacity - len(writing)
        parts = []
        for job in writing:
            guesses = min(job.guesses, spare)
            spare -= guesses
            parts.append((job, 1 + guesses, 1 + guesses))
        return parts

    def _pick_prompts(self, room: int) -> list[_Part]:
        """As much of the prompts as the step has time for, and `room`."""
        reading = [job for job in self._running if job.is_prefilling]
        if not reading:
            return []
        with self._lock:
            company = len(self._running) + len(self._waiting) > 1
        budget = self._pace.budget(
            sum(len(job.pending) for job in reading),
            writing=len(reading) < len(self._running),
            company=company,
            steady=any(job.request.sampling.is_repeatable for job in reading),
        )
        grants = share_prompt(min(budget, room), [len(job.pending) for job in reading])
        return [
            (job, count, int(count == len(job.pending)))
            for job, count in zip(reading, grants, strict=True)
            if count
        ]

    def _bridge(self, low: Sequence, high: Sequence, room: int) -> int:
        """Join two parts of the batch over a short gap, by a token in each sequence between them
        that is cut off after the step: a row costs less than another pass over the weights.
        Returns the number of rows."""
        gap = self._cache.find_between(low.number, high.number)
        longest = min(max(low.length, high.length) + 1, self._settings.context)
        if (
            len(gap) > min(LONGEST_BRIDGE, room)
            or not self._can_bridge
            or any(sequence.length >= longest for sequence in gap)  # attention goes by the longest
        ):
            return 0
        for sequence in gap:
            self._context.add(sequence.number, sequence.length, (0,), logits=0)
        self._bridged += gap
        return len(gap)

    def _add(self, job: Job, count: int, logits: int) -> _Share:
        place = job.place
        first = self._context.add(place.number, place.length, job.pending[:count], logits=logits)
        return _Share(job, count, first + count - logits, logits)

    def _cut_bridges(self) -> None:
        for sequence in self._bridged:
            self._cache.truncate(sequence, sequence.length)
        self._bridged = []

    def _decode(self, shares: list[_Share]) -> int:
        with self._lock:
            if self._closing or all(share.job.cancelled for share in shares):
                return ABORTED
            self._decoding = shares
        forget_complaints()
        code = self._context.decode()
        if code == DECODED and any(share.job.is_prefilling for share in shares):
            self._context.synchronize()  # else the clock would stop before a GPU has computed
        with self._lock:
            self._decoding = []
            self._context.abort.clear()
            self._spared_last = code == ABORTED and not all(s.job.cancelled for s in shares)
            self._totals.add(steps=1, aborted_steps=int(code == ABORTED))
        return code

    def _measure(self, shares: list[_Share], step_s: float) -> None:
        prompt_tokens = sum(share.count for share in shares if share.job.is_prefilling)
        writing = not all(share.job.is_prefilling for share in shares)
        self._pace.measure(prompt_tokens, step_s, writing=writing)
        with self._lock:
            self._totals.add_step(step_s)

    def _take_result(self, share: _Share) -> None:
        job = share.job
        job.place.append(job.pending[: share.count])
        if not share.logits:
            job.pending = job.pending[share.count :]
            return
        try:
            self._choose_tokens(share)
        except Exception as error:  # noqa: BLE001  (one request's trouble must not end the others)
            self._fail(job, error)

    def _choose_tokens(self, share: _Share) -> None:
        """Sample at the share's last rows; beyond the first as long as the guesses come true."""
        job, sequence, sampler = share.job, share.job.place, share.job.sampler
        assert sampler is not None
        guessed = job.pending[share.count - share.logits + 1 : share.count]
        confirmed = sequence.length - len(guessed)
        reason: FinishReason | None = None
        chosen: list[int] = []
        for row in range(share.logits):
            token, probability = sampler.sample(self._context, share.first + row)
            chosen = [token]
            reason = job.emit(self._tokenizer, token, probability, self._settings.context)
            if reason is None and job.request.guide is not None:
                reason = self._put(job, chosen)
            if reason or len(chosen) > 1 or row == len(guessed) or token != guessed[row]:
                break
            confirmed += 1
        if confirmed < sequence.length:
            self._cache.truncate(sequence, confirmed)
        if reason:
            self._end(job, reason)
        else:
            self._continue(job, chosen)

    def _put(self, job: Job, chosen: list[int]) -> FinishReason | None:
        """Append to `chosen` what the request's guide puts into the answer after it."""
        assert job.request.guide is not None
        assert job.sampler is not None
        added = job.request.guide.follow(chosen[-1])
        self._tokenizer.check(added)
        if added:
            job.flush()
        for token in added:
            job.sampler.accept(token)
            chosen.append(token)
            reason = job.emit(self._tokenizer, token, None, self._settings.context)
            if reason:
                return reason
        return None

    def _continue(self, job: Job, chosen: list[int]) -> None:
        """Set up the next step of `job`: the tokens just chosen, and guesses behind them."""
        guesses: Items[int] = ()
        can_guess = len(chosen) == 1 and self._model.keeps_every_position
        if job.request.proposer is not None and can_guess:
            room = self._settings.context - job.place.length - 1
            known = [*job.request.prompt, *job.generated]
            guesses = list(job.request.proposer.propose(known))[: max(0, room)]
            self._tokenizer.check(guesses)
        job.pending = np.asarray([*chosen, *guesses], np.int32)
        job.guesses = len(guesses)

    def _undo(self, shares: list[_Share], code: int) -> None:
        """Cut off what an aborted or failed step left in memory; a failure ends its requests."""
        for share in shares:
            place = share.job.place
            self._cache.truncate(place, place.length)
            share.job.restart()
        if code != ABORTED:
            error = EngineError(explain(f"A decode step of {len(shares)} requests failed ({code})"))
            for share in shares:
                self._fail(share.job, error)

    def _end(self, job: Job, reason: FinishReason) -> None:
        self._release(job)
        with self._lock:
            cancelled = int(reason == "cancelled")
            self._totals.add(finished=1 - cancelled, cancelled=cancelled)
        job.finish(reason)

    def _fail(self, job: Job, error: Exception) -> None:
        self._release(job)
        with self._lock:
            self._totals.add(failed=1)
        job.fail(error)

    def _release(self, job: Job) -> None:
        """Take `job` out of the running ones, before its reader hears that it ended."""
        if job.sequence is not None:
            self._cache.release(job.sequence)
        if job.sampler is not None:
            job.sampler.close()
        with self._lock:
            if job in self._running:
                self._running.remove(job)
            self._totals.add(generated_tokens=len(job.generated))
