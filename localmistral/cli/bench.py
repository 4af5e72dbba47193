"""`localmistral bench`."""

import re
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from localmistral.cli.consent import can_ask
from localmistral.cli.knobs import LoadReader, loads_model
from localmistral.cli.loading import LoadOptions, plan_for, show_log
from localmistral.cli.options import AsJson, Positional
from localmistral.errors import LocalMistralError, UsageError

if TYPE_CHECKING:
    from localmistral.benchmark import Measured, Outcome, Protocol
    from localmistral.fit.machine import Machine
    from localmistral.fit.plan import Plan
    from localmistral.loading import PlannedLoad

MAX_STREAMS = 64
_COUNT = re.compile(r"[0-9]{1,4}", re.ASCII)


@loads_model
def bench(
    load: LoadReader,
    positional: Positional = None,  # noqa: ARG001  (read by `load`)
    streams: Annotated[
        str, typer.Option("--streams", metavar="N,M", help="Numbers of streams to measure.")
    ] = "1,2,4",
    quick: Annotated[
        bool, typer.Option("--quick", help="Each figure once, shortly, and one stream.")
    ] = False,
    save: Annotated[
        bool | None,
        typer.Option("--save/--no-save", help="Let plans for this machine learn from it."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure MODEL on this machine and compare with the plan, so that plans can learn from it."""
    counts = parse_streams(streams)
    options = load()
    if options.verbose:
        show_log()

    from localmistral.benchmark import judge
    from localmistral.fit.calibration import read_calibration

    protocol = make_protocol(options.request.depth, counts, quick=quick)
    planned = _plan(options, protocol.streams, protocol.depths)
    current, remark = read_calibration(planned.machine)
    done, measured = _run(planned, protocol)
    outcome = judge(done, measured, current)
    if not as_json:
        from localmistral.terminal.bench_table import print_measured

        local = planned.local
        title = local.path.name if local.name == str(local.path) else local.name
        print_measured(title, done.plan, measured, outcome)
    notes = [n for n in (remark, *measured.notes, describe_busy(measured.busy_cores)) if n]
    _note(notes)
    saved = _keep(planned.machine, measured, outcome, save)
    if as_json:
        from localmistral.cli.listing import print_json

        print_json({**to_json(done.plan, measured, outcome), "saved": saved, "notes": notes})


def _plan(options: LoadOptions, streams: tuple[int, ...], depths: tuple[int, ...]) -> "PlannedLoad":
    """The plan that `run` would make, its context divided among streams. Where that leaves too
    little to each, and memory allows more at the same places, more. A context that was asked for
    is per stream.
    """
    from localmistral.benchmark import find_deepest, needed_context, share_context

    most = max(streams)
    if options.request.context is not None:
        return plan_for(_widen(options, options.request.context, most))
    planned = plan_for(options)
    divided = share_context(planned, streams, depths)
    if divided.plan.parallel == most or options.plan_file is not None:
        return divided
    try:
        wider = plan_for(_widen(options, needed_context(find_deepest(planned.plan, depths)), most))
    except LocalMistralError:  # more context than the model has, or than memory holds
        return divided
    same = all(
        getattr(wider.plan, name) == getattr(planned.plan, name)
        for name in ("quant", "placement", "kv_type")
    )
    return wider if same else divided


def _widen(options: LoadOptions, context: int, parallel: int) -> LoadOptions:
    return replace(options, request=replace(options.request, context=context, parallel=parallel))


def parse_streams(text: str) -> tuple[int, ...]:
    """Ascending numbers of `1,2,4`; UsageError for anything else."""
    parts = [part.strip() for part in text.split(",")]
    counts = [int(part) for part in parts if _COUNT.fullmatch(part)]
    if len(counts) < len(parts) or not all(1 <= count <= MAX_STREAMS for count in counts):
        raise UsageError(
            f"--streams {text[:60]!r} is not a list of numbers from 1 to {MAX_STREAMS}.",
            "Write it as 1,2,4.",
        )
    return tuple(sorted(set(counts)))


def make_protocol(depth: int, streams: tuple[int, ...], *, quick: bool) -> "Protocol":
    """Nothing filled, a quarter of `depth`, and `depth`; quick leaves out the last and streams."""
    from localmistral.benchmark import QUICK_ROUNDS, QUICK_SECONDS, Protocol

    quarter = depth // 4
    if quick:
        return Protocol(
            depths=tuple(sorted({0, quarter})),
            streams=streams[:1],
            rounds=QUICK_ROUNDS,
            seconds=QUICK_SECONDS,
        )
    return Protocol(depths=tuple(sorted({0, quarter, depth})), streams=streams)


def _run(planned: "PlannedLoad", protocol: "Protocol") -> "tuple[PlannedLoad, Measured]":
    from localmistral.benchmark import measure
    from localmistral.loading import load_engine
    from localmistral.terminal.render import Bar, print_note, show_bars, show_loading

    with show_loading(planned.local.name) as on_progress:
        engine, done = load_engine(planned, on_progress=on_progress, on_note=print_note)
    with ExitStack() as stack:
        stack.enter_context(engine)
        show = stack.enter_context(show_bars())

        def on_step(text: str) -> None:
            if show is not None:
                show([Bar(label=f"Measuring: {text}", share=None, text="")])

        return done, measure(engine, protocol, on_step)


def describe_busy(busy_cores: float) -> str:
    """What to say of other processes; empty where they hardly did anything."""
    from localmistral.benchmark import BUSY_CORES

    if busy_cores < BUSY_CORES:
        return ""
    return (
        f"Other processes kept {busy_cores:.1f} cores busy meanwhile: what was measured is lower "
        "than what this machine can do."
    )


def _keep(machine: "Machine", measured: "Measured", outcome: "Outcome", save: bool | None) -> bool:
    """Write the calibration if that is wanted; whether it was."""
    from localmistral.benchmark import BUSY_CORES
    from localmistral.fit.calibration import write_calibration
    from localmistral.terminal.bench_table import describe_calibration
    from localmistral.terminal.render import print_note

    if outcome.learnt is None:
        print_note(outcome.reason)
        return False
    if save is False:
        return False
    print_note(describe_calibration(outcome.learnt))
    if save is None:
        if not can_ask():
            print_note("Nothing was kept; --save lets plans learn from it.")
            return False
        is_quiet = measured.busy_cores < BUSY_CORES
        if not typer.confirm("Let plans for this machine reckon with it?", is_quiet, err=True):
            return False
    try:
        path = write_calibration(outcome.learnt, machine)
    except OSError as error:
        raise LocalMistralError(f"The calibration can't be kept: {error}.") from error
    print_note(f"Kept in {path}; plans for this machine reckon with it from now on.")
    return True


def _note(notes: list[str]) -> None:
    from localmistral.terminal.render import print_note

    for note in notes:
        print_note(note)


def to_json(plan: "Plan", measured: "Measured", outcome: "Outcome") -> dict[str, Any]:
    """The document of `--json`: `depths` with what was measured and predicted (tokens per second),
    `streams` with what so many have together, `calibration` with the factors learnt or null."""
    from dataclasses import asdict

    depths = [
        {
            **asdict(point),
            "predicted_decode_tokens_per_second": expected.decode_tokens_per_second,
            "predicted_prefill_tokens_per_second": expected.prefill_tokens_per_second,
        }
        for point, expected in zip(measured.depths, outcome.predicted, strict=True)
    ]
    return {
        "model": plan.model,
        "quant": plan.quant,
        "context": plan.context,
        "parallel": plan.parallel,
        "kv_type": plan.kv_type,
        "split_mode": plan.placement.split_mode,
        "gpu_layers": plan.placement.gpu_layers,
        "tensor_split": list(plan.placement.tensor_split),
        "cpu_expert_layers": list(plan.placement.cpu_expert_layers),
        "batch": plan.batch,
        "ubatch": plan.ubatch,
        "threads": plan.threads,
        "depths": depths,
        "streams": [asdict(speed) for speed in measured.streams],
        "busy_cores": measured.busy_cores,
        "calibration": None if outcome.learnt is None else asdict(outcome.learnt),
    }
