"""Measures a planned load: prefill and decode at several depths, and several streams at once.

The figures are what a user gets, through the queue and the sampler, not llama.cpp's bare ones. What
they teach is worked out in fit/calibrating.py; keeps and shows nothing.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from localmistral.engine import Engine, GenerationResult, Request, Stream
from localmistral.engine.threads import CpuTimes, read_cpu_times
from localmistral.errors import EngineError
from localmistral.fit.calibrating import Measurement, fit_calibration
from localmistral.fit.calibration import Calibration
from localmistral.fit.machine import MIB, Machine
from localmistral.fit.plan import CONTEXT_MULTIPLE, Load, Plan, Prediction
from localmistral.fit.speed import predict
from localmistral.loading import CPU, PlannedLoad
from localmistral.units import format_bytes, format_tokens

MIN_DECODED = 8
MAX_DECODED = 128
"""Tokens generated per figure, as many as its time allows."""
MIN_READ = 32
"""Fewer prompt tokens say nothing: they are read another way than long prompts."""
COMFORTABLE_READ = 512
"""Prompt tokens per figure: llama.cpp's usual ubatch. """
MIN_READ_ON_CPU = 128
"""What the engine gives the CPU at a time; more is no faster (engine/pace.py)."""
MAX_FILL_S = 60.0
"""Depths that take longer to fill are left out and said."""
MAX_READ_S = 20.0
"""Longest that the reading of one chunk of prompt may take."""
_WARM_UP_TOKENS = 32
_SPARE_TOKENS = 16
_SEED = 1
BUSY_CORES = 0.25
"""Cores kept busy by other processes from which on figures are said to be too low."""
MIN_TEACHING_BYTES = 64 * MIB
"""Weights below which a model teaches nothing: its time is all overhead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """What to measure: depths ascending, numbers of streams, and how often each figure is taken in
    about so many seconds. The best counts: whatever disturbs a measurement makes it slower."""

    depths: tuple[int, ...]
    streams: tuple[int, ...]
    rounds: int = 3
    seconds: float = 1.5


QUICK_ROUNDS = 1
QUICK_SECONDS = 0.75


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamSpeed:
    """Tokens per second of decode that so many streams have together, with little context."""

    streams: int
    tokens_per_second: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """`busy_cores` is how many cores other processes kept busy on average meanwhile."""

    depths: tuple[Measurement, ...]
    streams: tuple[StreamSpeed, ...]
    busy_cores: float
    notes: tuple[str, ...]


OnStep = Callable[[str], None]


def measure(engine: Engine, protocol: Protocol, on_step: OnStep = lambda _: None) -> Measured:
    """Run the protocol; `on_step` hears what is being measured. Raises what the engine raises."""
    before = read_cpu_times()
    bench = _Bench(engine, protocol)
    on_step("warming up")
    bench.warm_up()
    depths = []
    notes: list[str] = []
    for depth in protocol.depths:
        reason = bench.refuse(depth)
        if reason:
            notes.append(reason)
            continue
        on_step(f"{format_tokens(depth)} tokens filled")
        depths.append(bench.measure_depth(depth))
    streams = []
    for count in protocol.streams:
        room = engine.settings.parallel
        if count > room:
            notes.append(f"{count} streams were left out: the context has room for {room}.")
            continue
        on_step(f"{count} streams at once" if count > 1 else "1 stream")
        streams.append(bench.measure_streams(count))
    return Measured(
        depths=tuple(depths),
        streams=tuple(streams),
        busy_cores=count_busy_cores(before, read_cpu_times()),
        notes=tuple(notes),
    )


def count_busy_cores(before: CpuTimes, after: CpuTimes) -> float:
    """Cores that other processes kept busy between two looks; those of low priority don't count."""
    seconds = after.clock_s - before.clock_s
    others = (after.all_s - before.all_s) - (after.own_s - before.own_s)
    return max(0.0, others / seconds) if seconds > 0 else 0.0


def needed_context(depth: int) -> int:
    """Tokens of context per stream that measuring at `depth` takes, with room for whole figures."""
    tokens = depth + COMFORTABLE_READ + _SPARE_TOKENS
    return -(-tokens // CONTEXT_MULTIPLE) * CONTEXT_MULTIPLE


def find_deepest(plan: Plan, depths: Sequence[int]) -> int:
    """The largest of `depths` that one stream with the whole context could reach; else 0."""
    cells = plan.context * plan.parallel
    return max((depth for depth in depths if needed_context(depth) <= cells), default=0)


def share_context(
    planned: PlannedLoad, streams: Sequence[int], depths: Sequence[int]
) -> PlannedLoad:
    """The same load with its context divided among streams: as many of `streams` at once as leave
    each of them what the deepest of `depths` needs that fits at all. The memory, and so the
    placement, is the plan's own.
    """
    replan = planned.replan
    shared = replace(planned, plan=_divide(planned.plan, streams, depths))
    if replan is None:
        return shared

    def replan_shared(machine: Machine) -> Plan:
        return _divide(replan(machine), streams, depths)

    return replace(shared, replan=replan_shared)


def _divide(plan: Plan, streams: Sequence[int], depths: Sequence[int]) -> Plan:
    cells = plan.context * plan.parallel
    needed = needed_context(find_deepest(plan, depths))
    count = max((n for n in streams if cells // n >= needed), default=1)
    context = cells // count // CONTEXT_MULTIPLE * CONTEXT_MULTIPLE
    return replace(plan, context=max(CONTEXT_MULTIPLE, context), parallel=count)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """`predicted` has an entry for each depth that was measured, by the calibration in use;
    `learnt` is the one that meets the figures, None where they teach nothing, for a `reason`."""

    predicted: tuple[Prediction, ...]
    learnt: Calibration | None
    reason: str = ""


def judge(planned: PlannedLoad, measured: Measured, current: Calibration) -> Outcome:
    """Compare what was measured with the predictions for the plan that was run."""
    plan, shape, machine = planned.plan, planned.shape, planned.machine
    cores = min(plan.threads or machine.cpu.cores, machine.cpu.cores)  # those that compute
    machine = replace(machine, cpu=replace(machine.cpu, cores=cores))
    load = Load(
        cells=plan.context * plan.parallel,
        sequences=plan.parallel,
        kv_type=plan.kv_type,
        batch=plan.batch,
        ubatch=plan.ubatch,
        flash_attention=plan.flash_attention,
    )
    predicted = tuple(
        predict(shape, machine, plan.placement, load, depth=point.depth, calibration=current)
        for point in measured.depths
    )
    if not measured.depths:
        return Outcome(predicted=(), learnt=None, reason="No depth could be measured.")
    if shape.weight_bytes < MIN_TEACHING_BYTES:
        size = format_bytes(shape.weight_bytes)
        reason = f"A model of {size} is all overhead, so plans learn nothing from it."
        return Outcome(predicted=predicted, learnt=None, reason=reason)
    learnt = fit_calibration(shape, machine, plan.placement, load, measured.depths, current)
    return Outcome(predicted=predicted, learnt=learnt)


class _Bench:
    """One engine under measurement, and what is known of its speed so far."""

    def __init__(self, engine: Engine, protocol: Protocol) -> None:
        self._engine = engine
        self._protocol = protocol
        self._random = random.Random(_SEED)
        self._text: list[int] = []
        self._read_rate = 0.0
        self._write_rate = 0.0
        self._first_rate = 0.0

    def warm_up(self) -> None:
        """First use of everything: kernels are compiled, weights come from the disk."""
        count = min(_WARM_UP_TOKENS, self._room(0))
        self._generate(self._draw(count), MIN_DECODED, cached=False)
        result = self._generate(self._draw(count), MIN_DECODED, cached=False)
        self._read_rate = count / max(result.prefill_s, 1e-6)
        self._write_rate = (MIN_DECODED - 1) / max(result.decode_s, 1e-6)
        self._first_rate = self._write_rate

    def refuse(self, depth: int) -> str:
        """Why a depth can't be measured; empty if it can."""
        shown = format_tokens(depth)
        if self._room(depth) < MIN_READ:
            context = format_tokens(self._engine.settings.context)
            return f"A depth of {shown} was left out: the context holds {context} per stream."
        seconds = (depth - len(self._text)) / self._read_rate
        if seconds > MAX_FILL_S:
            return f"A depth of {shown} was left out: filling it would take {seconds:.0f} s."
        return ""

    def measure_depth(self, depth: int) -> Measurement:
        """Both speeds after the first `depth` tokens of one long text."""
        self._fill(depth)
        rounds = range(self._protocol.rounds)
        read = max(self._read(depth) for _ in rounds)
        written = max(self._write(depth) for _ in rounds)
        self._read_rate, self._write_rate = read, written
        return Measurement(
            depth=depth, decode_tokens_per_second=written, prefill_tokens_per_second=read
        )

    def measure_streams(self, count: int) -> StreamSpeed:
        """Decode of `count` requests that start together."""
        share = self._first_rate * self._protocol.seconds / count
        tokens = max(MIN_DECODED, min(MAX_DECODED, int(share), self._room(_SPARE_TOKENS)))
        speeds = []
        for _ in range(self._protocol.rounds):
            prompts = [tuple(self._draw(MIN_DECODED)) for _ in range(count)]
            requests = [
                Request(prompt=prompt, max_tokens=tokens, ignore_eos=True, cache_prompt=False)
                for prompt in prompts
            ]
            streams = [self._engine.submit(request) for request in requests]
            results = [_finish(stream) for stream in streams]
            speeds.append(sum((tokens - 1) / max(r.decode_s, 1e-6) for r in results))
        return StreamSpeed(streams=count, tokens_per_second=max(speeds))

    def _fill(self, depth: int) -> None:
        self._text += self._draw(depth - len(self._text))
        if depth:
            self._generate(self._text, 1, cached=True)

    def _read(self, depth: int) -> float:
        """Tokens per second of a fresh piece of prompt behind the text so far."""
        settings = self._engine.settings
        largest = min(self._room(depth), int(self._read_rate * MAX_READ_S))
        affordable = int(self._read_rate * self._protocol.seconds)
        if settings.devices == (CPU,):
            wanted = min(settings.ubatch, max(MIN_READ_ON_CPU, affordable))
        else:
            wanted = settings.batch if affordable >= settings.batch else settings.ubatch
        count = max(MIN_READ, min(largest, wanted))
        result = self._generate(self._text[:depth] + self._draw(count), 1, cached=True)
        return (result.prompt_tokens - result.cached_tokens) / max(result.prefill_s, 1e-6)

    def _write(self, depth: int) -> float:
        affordable = int(self._write_rate * self._protocol.seconds)
        tokens = max(MIN_DECODED, min(MAX_DECODED, affordable, self._room(depth)))
        prompt = self._text[:depth] or self._draw(1)
        result = self._generate(prompt, tokens, cached=True)
        return (tokens - 1) / max(result.decode_s, 1e-6)

    def _generate(self, prompt: Sequence[int], tokens: int, *, cached: bool) -> GenerationResult:
        request = Request(
            prompt=tuple(prompt), max_tokens=tokens, ignore_eos=True, cache_prompt=cached
        )
        return _finish(self._engine.submit(request))

    def _room(self, depth: int) -> int:
        return self._engine.settings.context - depth - _SPARE_TOKENS

    def _draw(self, count: int) -> list[int]:
        """Ordinary tokens at random, the same ones every time."""
        tokenizer = self._engine.tokenizer
        drawn: list[int] = []
        while len(drawn) < count:
            token = self._random.randrange(tokenizer.size)
            if not tokenizer.is_control(token) and not tokenizer.is_end(token):
                drawn.append(token)
        return drawn


def _finish(stream: Stream) -> GenerationResult:
    """Read a stream to its end."""
    with stream:
        for _ in stream:
            continue
    if stream.result is None:
        raise EngineError("The engine ended a measurement before its result.")
    return stream.result
