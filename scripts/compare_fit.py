"""Our placement against llama.cpp's own, on the named machines of the tests: a table in Markdown.

    python scripts/compare_fit.py [--context 32k] [--same-quant]

llama.cpp's rule (its `--fit`, as its documentation and common/fit.cpp describe it): with an
automatic context, cut that first, down to 4,096 tokens; then keep experts of the last layers in
RAM, as few as are needed; then whole layers. The cards are filled front to back, 1024 MiB of each
stay free, RAM counts as endless. It does not choose a quant: it gets the one that was chosen here.
Speeds of both come from the same model (localmistral/fit/speed.py), memory from the same sums.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

# the machines are the tests' own
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from plan_samples import candidates, siblings
from test_planner import CASES, SMALL, Case

from localmistral.fit.choosing.options import Options
from localmistral.fit.choosing.pricing import Space
from localmistral.fit.machine import MIB, Gpu, Machine
from localmistral.fit.placement import Placement
from localmistral.fit.plan import Candidate, Load, Plan
from localmistral.fit.planner import plan
from localmistral.fit.speed import decode_seconds
from localmistral.units import format_bytes, format_tokens, parse_tokens

LLAMA_MARGIN_BYTES = 1024 * MIB
LLAMA_LEAST_CONTEXT = 4096
LLAMA_UBATCH = 512
CORRECTIONS = 4
"""How often a filling is repeated with the buffers that the one before turned out to need."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """What one of the two rules makes of a machine."""

    context: int
    placement: Placement
    speed: float
    ram_excess: int


def with_llama_margin(machine: Machine) -> Machine:
    """The machine whose budgets are what llama.cpp fills: a larger margin, RAM without end."""
    gpus = tuple(_shrunk(gpu) for gpu in machine.gpus)
    return replace(machine, gpus=gpus, ram=replace(machine.ram, available_bytes=1 << 60))


def _shrunk(gpu: Gpu) -> Gpu:
    own_margin = gpu.free_bytes - gpu.budget_bytes
    backend_and_more = max(0, LLAMA_MARGIN_BYTES - 512 * MIB)
    return replace(gpu, free_bytes=max(0, gpu.budget_bytes + own_margin - backend_and_more))


def fill(space: Space, in_ram: int, on_cpu: int) -> Placement | None:
    """Layers front to back over the cards, the experts of the last `in_ram` layers in RAM and the
    first `on_cpu` layers on the CPU; None if that is too much."""
    count = space.layer_count
    experts = tuple(range(max(on_cpu, count - in_ram), count))
    spare = [0] * len(space.budgets)
    for _ in range(CORRECTIONS):
        counts = _fill_once(space, experts, on_cpu, spare)
        if counts is None:
            return None
        placement = Placement(
            gpu_layers=sum(counts), tensor_split=tuple(counts), cpu_expert_layers=experts
        )
        memory = space.measure(placement)[:-1]
        if not any(device.excess_bytes for device in memory):
            return placement
        for card, device in enumerate(memory):
            spare[card] = max(spare[card], device.compute_bytes + device.mmproj_bytes)
    return None


def _fill_once(
    space: Space, experts: Sequence[int], on_cpu: int, spare: Sequence[int]
) -> list[int] | None:
    kept = frozenset(experts)
    counts = [0] * len(space.budgets)
    room = [budget - less for budget, less in zip(space.budgets, spare, strict=True)]
    card = 0
    for layer in range(on_cpu, space.layer_count + 1):
        size = _bytes_of(space, layer, kept)
        while card < len(room) and room[card] < size:
            card += 1
        if card == len(room):
            return None
        room[card] -= size
        counts[card] += 1
    return counts


def _bytes_of(space: Space, layer: int, experts_in_ram: frozenset[int]) -> int:
    if layer == space.layer_count:
        return space.output_bytes
    dense = space.dense[layer + 1] - space.dense[layer]
    return dense + (0 if layer in experts_in_ram else space.expert_bytes[layer])


def llama_fit(options: Options, candidate: Candidate, context: int | None) -> Fit | None:
    """llama.cpp's answer; `context` None is its automatic one. None if not even one layer fits."""
    machine = with_llama_margin(options.machine)
    theirs = replace(options, machine=machine, _options={}, _costs={}, _spaces={}, _kept=[])
    for tokens, in_ram, on_cpu in _attempts(candidate, context):
        load = Load(cells=tokens * options.request.parallel, ubatch=LLAMA_UBATCH)
        space = theirs.space(candidate, tokens, load)
        placement = fill(space, in_ram, on_cpu)
        if placement is not None:
            return _judge(options, candidate, tokens, load, placement)
    return None


def _attempts(candidate: Candidate, context: int | None) -> Iterator[tuple[int, int, int]]:
    """(context, layers with experts in RAM, layers on the CPU) in the order of giving up."""
    layers = candidate.shape.layer_count
    tokens = context or candidate.context_limit
    while context is None and tokens > LLAMA_LEAST_CONTEXT:
        yield tokens, 0, 0
        tokens //= 2
    has_experts = any(candidate.shape.expert_bytes)
    yield from ((tokens, number, 0) for number in range(layers + 1 if has_experts else 1))
    most = layers if has_experts else 0
    yield from ((tokens, most, number) for number in range(1, layers + 1))


def _judge(
    options: Options, candidate: Candidate, tokens: int, load: Load, placement: Placement
) -> Fit:
    space = options.space(candidate, tokens, load)
    return Fit(
        context=tokens,
        placement=placement,
        speed=1 / decode_seconds(space.costs, placement),
        ram_excess=space.measure(placement)[-1].excess_bytes,
    )


def compare(name: str, case: Case, context: int | None) -> str | None:
    """One row of the table; None where no card is used."""
    fallbacks = siblings() if case.wanted == SMALL else ()
    made = plan(candidates(case.wanted), case.where, case.request, siblings=fallbacks)
    if not made.placement.gpu_layers:
        return None
    groups = (candidates(case.wanted), *siblings())
    candidate = next(
        one
        for group in groups
        for one in group
        if (one.model, one.quant) == (made.model, made.quant)
    )
    options = Options(machine=case.where, request=case.request)
    theirs = llama_fit(options, candidate, made.context if context is None else context or None)
    return _row(name, made, theirs)


def _row(name: str, made: Plan, theirs: Fit | None) -> str:
    ours = made.predicted.decode_tokens_per_second
    model = "" if made.model == SMALL else f"{made.model} "
    cells = [name, f"{model}{made.quant}", _describe(made.context, made.placement), f"{ours:.1f}"]
    if theirs is None:
        return _join([*cells, "does not fit", "", ""])
    note = f" (RAM over by {format_bytes(theirs.ram_excess)})" if theirs.ram_excess else ""
    shown = _describe(theirs.context, theirs.placement) + note
    return _join([*cells, shown, f"{theirs.speed:.1f}", f"{ours / theirs.speed:.2f}"])


def _describe(context: int, placement: Placement) -> str:
    split = ",".join(map(str, placement.tensor_split))
    mode = ", tensor" if placement.split_mode == "tensor" else ""
    experts = len(placement.cpu_expert_layers)
    return f"{format_tokens(context)}, {split}{mode}" + (f", {experts} in RAM" if experts else "")


def _join(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument(
        "--context", help="what llama.cpp is given: a number, or auto; default: the plan's"
    )
    asked = parser.parse_args().context
    context = None if asked is None else 0 if asked == "auto" else parse_tokens(asked)
    heads = ("machine", "quant", "localmistral", "tokens/s", "llama.cpp --fit", "tokens/s", "ratio")
    print(_join(heads))
    print(_join(["---"] * len(heads)))
    for name, case in CASES.items():
        row = compare(name, case, context)
        if row is not None:
            print(row, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
