"""`plan --explain`: the sums behind a plan, from the same functions that the planner used.

Chooses nothing and reads no file.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise

from localmistral.fit.calibration import Calibration
from localmistral.fit.machine import BACKEND_BYTES, GPU_MARGIN_BYTES, Gpu, Machine
from localmistral.fit.memory import kv_bytes_per_layer
from localmistral.fit.placement import CPU
from localmistral.fit.plan import Plan
from localmistral.fit.rates import RAM_SHARE, read_rate
from localmistral.fit.speed import SpeedCosts, decode_seconds, measure_costs
from localmistral.models.shape import ModelShape, TensorRole
from localmistral.terminal.plan_table import format_layers, print_bullet, print_paragraph
from localmistral.terminal.render import print_line, print_table
from localmistral.units import format_bandwidth, format_bytes, format_speed

_ROLES = (
    ("routed experts", TensorRole.EXPERT),
    ("rest of the layers", TensorRole.DENSE),
    ("embedding", TensorRole.EMBEDDING),
    ("output", TensorRole.OUTPUT),
    ("other", TensorRole.OTHER),
)


def print_explanation(
    plan: Plan, shape: ModelShape, machine: Machine, calibration: Calibration
) -> None:
    """Weights by kind, the cache, each budget, and where a token's time goes."""
    print_line()
    print_line(("Weights", "bold"))
    _print_weights(shape)
    if not plan.only_embeds:
        print_line()
        print_line(("Cache", "bold"))
        print_paragraph(_describe_cache(plan, shape))
    print_line()
    print_line(("Budgets", "bold"))
    for text in _describe_budgets(machine):
        print_bullet(text)
    if plan.only_embeds:
        return
    print_line()
    print_line(("Time of a token", "bold"))
    for text in _describe_time(plan, shape, machine, calibration):
        print_bullet(text)


def _print_weights(shape: ModelShape) -> None:
    rows = []
    for name, role in _ROLES:
        tensors = [tensor for tensor in shape.tensors if tensor.role is role]
        if not tensors:
            continue
        by_layer = {TensorRole.EXPERT: shape.expert_bytes, TensorRole.DENSE: shape.dense_bytes}
        total = sum(tensor.bytes for tensor in tensors)
        kinds = _list_types((tensor.type, tensor.bytes) for tensor in tensors)
        rows.append((name, kinds, _span(by_layer.get(role, ())), format_bytes(total)))
    rows.append(("together", "", "", format_bytes(shape.weight_bytes)))
    print_table(("part", "types", "a layer", "bytes"), rows)
    if shape.has_tied_embeddings:
        print_paragraph("The output is the embedding, which is loaded a second time for it.")


def _list_types(sizes: Iterable[tuple[str, int]]) -> str:
    """Types by their share of the bytes; vectors of some kilobytes aren't worth naming."""
    sums: dict[str, int] = {}
    for kind, size in sizes:
        sums[kind] = sums.get(kind, 0) + size
    ordered = sorted(sums, key=lambda kind: -sums[kind])
    whole = sum(sums.values())
    shown = [kind for kind in ordered if sums[kind] * 100 >= whole]
    return ", ".join(shown[:3]) + (", ..." if len(shown) > 3 else "")


def _span(sizes: Sequence[int]) -> str:
    """`1.1 GiB`, or both ends where layers differ."""
    there = [size for size in sizes if size]
    if not there:
        return ""
    low, high = format_bytes(min(there)), format_bytes(max(there))
    return low if low == high else f"{low} to {high}"


def _describe_cache(plan: Plan, shape: ModelShape) -> str:
    cells = plan.context * plan.parallel
    by_layer = kv_bytes_per_layer(shape, plan.kv_type, cells)
    streams = f" x {plan.parallel} streams" if plan.parallel > 1 else ""
    return (
        f"{plan.kv_type}: {plan.context:,} tokens{streams} x "
        f"{sum(by_layer) / cells:,.0f} bytes in {sum(map(bool, by_layer))} layers = "
        f"{format_bytes(sum(by_layer))}, each layer's with the layer."
    )


def _describe_budgets(machine: Machine) -> list[str]:
    texts = [f"GPU {n}: {_describe_budget(gpu)}" for n, gpu in enumerate(machine.gpus)]
    ram = machine.ram
    margin = ram.available_bytes - ram.budget_bytes
    texts.append(
        f"CPU: {format_bytes(ram.available_bytes)} of {format_bytes(ram.total_bytes)} available, "
        f"less {format_bytes(margin)} for everything else = {format_bytes(ram.budget_bytes)}."
    )
    return texts


def _describe_budget(gpu: Gpu) -> str:
    backend = BACKEND_BYTES.get(gpu.backend, 0)
    own = f"{format_bytes(backend)} for {gpu.backend} and " if backend else ""
    return (
        f"{format_bytes(gpu.free_bytes)} of {format_bytes(gpu.total_bytes)} free, less {own}"
        f"{format_bytes(GPU_MARGIN_BYTES)} of margin = {format_bytes(gpu.budget_bytes)}."
    )


def _describe_time(
    plan: Plan, shape: ModelShape, machine: Machine, calibration: Calibration
) -> list[str]:
    costs = measure_costs(
        shape,
        machine,
        kv_type=plan.kv_type,
        depth=plan.predicted.depth,
        calibration=calibration,
    )
    texts = [
        "A layer's time is what a token reads of it (all dense weights, "
        f"{_expert_share(shape)}the filled cache) over the rate of its memory, and a fixed cost."
    ]
    if plan.placement.split_mode != "tensor":
        texts += _describe_devices(plan, shape, machine, costs)
    seconds = decode_seconds(costs, plan.placement)
    speed = format_speed(1 / seconds)
    texts.append(
        f"Together {_ms(seconds)} a token at a depth of {plan.predicted.depth:,}: {speed}."
    )
    return texts


def _expert_share(shape: ModelShape) -> str:
    if not shape.expert_count:
        return ""
    return f"{shape.expert_used_count} of {shape.expert_count} routed experts, "


def _describe_devices(
    plan: Plan, shape: ModelShape, machine: Machine, costs: SpeedCosts
) -> list[str]:
    devices = plan.placement.layer_devices(shape.layer_count)
    in_ram = frozenset(plan.placement.cpu_expert_layers)
    texts = []
    for device in dict.fromkeys(devices):
        mine = [n for n, where in enumerate(devices[:-1]) if where == device]
        seconds = sum(_layer_seconds(costs, device, n, is_split=n in in_ram) for n in mine)
        if devices[-1] == device:
            seconds += costs.output_on_cpu if device == CPU else costs.output[device]
        texts.append(
            f"{_describe_rate(machine, device)}: {_describe_part(mine, devices[-1] == device)}, "
            f"{_ms(seconds)}."
        )
    if in_ram:
        texts.append(
            f"In these, experts of layers {format_layers(sorted(in_ram))} are read from RAM "
            f"at {format_bandwidth(machine.ram.bandwidth * RAM_SHARE)}."
        )
    hops = sum(a != b for a, b in pairwise(devices))
    texts.append(
        f"Changes of device: {hops}, {_ms(hops * costs.hop)}; once a token {_ms(costs.base)}."
    )
    return texts


def _layer_seconds(costs: SpeedCosts, device: int, layer: int, *, is_split: bool) -> float:
    if device == CPU:
        return costs.on_cpu[layer]
    return (costs.experts_in_ram if is_split else costs.resident)[device][layer]


def _describe_rate(machine: Machine, device: int) -> str:
    if device == CPU:
        return f"CPU at {format_bandwidth(machine.ram.bandwidth * RAM_SHARE)}"
    return f"GPU {device} at {format_bandwidth(read_rate(machine.gpus[device]))}"


def _describe_part(layers: Sequence[int], has_output: bool) -> str:
    parts = []
    if layers:
        parts.append(f"layer{'s' if len(layers) > 1 else ''} {format_layers(layers)}")
    if has_output:
        parts.append("the output")
    return " and ".join(parts)


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.2f} ms"
