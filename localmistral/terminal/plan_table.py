"""A plan for people: the choice, what lies on each device, why, and what else one could have.

Knows neither models nor machines, only the finished plan; reading off a terminal gets whole lines.
"""

import re
import shutil
import sys
import textwrap
from collections.abc import Sequence

from localmistral.fit.plan import Alternative, DeviceMemory, Plan
from localmistral.terminal.render import Styled, print_line, print_table
from localmistral.units import format_bytes, format_speed, format_tokens

BAR_WIDTH = 30
NARROWEST_BAR = 10
LONGEST_NAME = 34
SUMS_WIDTH = len("  1023.9 MiB of 1023.9 GiB")
PLAIN_WIDTH = 80

_PARTS = (
    ("weights", "weights_bytes", "█", "blue"),
    ("image encoder", "mmproj_bytes", "▆", "magenta"),
    ("KV", "kv_bytes", "▓", "green"),
    ("compute", "compute_bytes", "▒", "yellow"),
)
_FREE = "·"
# A number stays on the line of its unit.
_UNIT = re.compile(r"([0-9]) ([KMGT]?i?B\b|tokens/s|ms\b|layers?\b)")


def print_plan(plan: Plan) -> None:
    """The whole plan on stdout."""
    print_choice(plan)
    print_line()
    print_devices(plan)
    print_line()
    print_line(("Why", "bold"))
    for reason in plan.reasons:
        print_bullet(reason)
    if plan.alternatives:
        print_line()
        print_line(("What else there is", "bold"))
        _print_alternatives(plan.alternatives)


def print_choice(plan: Plan) -> None:
    """The choice in two lines: what is loaded, and where it comes from."""
    print_line((f"{plan.model} {plan.quant}", "bold"))
    print_paragraph(_describe_use(plan))
    print_paragraph(_describe_files(plan))


def _describe_use(plan: Plan) -> str:
    if plan.only_embeds:
        return "makes embeddings, writes no text"
    speeds, streams = plan.predicted, ""
    if plan.parallel > 1:
        streams = f" for each of {plan.parallel} streams"
    return (
        f"context {format_tokens(plan.context)}{streams}, KV cache {plan.kv_type}, "
        f"about {format_speed(speeds.decode_tokens_per_second)} "
        f"at {format_tokens(speeds.depth)} of filled context, "
        f"prompts {format_speed(speeds.prefill_tokens_per_second)}"
    )


def _describe_files(plan: Plan) -> str:
    total = format_bytes(sum(file.bytes for file in plan.files))
    count = f"{len(plan.files)} files" if len(plan.files) > 1 else "1 file"
    if plan.is_local:
        return f"{total} in {count}, on this disk"
    source = f" from {plan.repository}" if plan.repository else ""
    estimated = ", sizes estimated from the catalogue" if plan.is_estimated else ""
    return f"{total} in {count} to download{source}{estimated}"


def print_devices(plan: Plan) -> None:
    """Two lines a device: a bar of its budget, and the parts in figures."""
    names = [_shorten(device.name) for device in plan.devices]
    margin = max(map(len, names)) + 2
    bar_width = max(NARROWEST_BAR, min(BAR_WIDTH, screen_width() - margin - SUMS_WIDTH))
    for index, (name, device) in enumerate(zip(names, plan.devices, strict=True)):
        used, budget = format_bytes(device.used_bytes), format_bytes(device.budget_bytes)
        sums = (f"  {used} of {budget}", "")
        print_line((name.ljust(margin), ""), *_bar(device, bar_width), sums)
        print_paragraph(_describe_parts(plan, index, device), indent="  ")
    legend = [(f"{mark} ", style) for _, _, mark, style in _PARTS]
    texts = [(f"{name}  ", "dim") for name, _, _, _ in _PARTS]
    pairs = [part for pair in zip(legend, texts, strict=True) for part in pair]
    print_line(*pairs, (f"{_FREE} free", "dim"))


def _bar(device: DeviceMemory, width: int) -> list[Styled]:
    """The budget as `width` characters; each part has its share, and one mark at least."""
    budget = max(device.budget_bytes, device.used_bytes, 1)
    parts: list[Styled] = []
    drawn, filled = 0, 0
    for _, field, mark, style in _PARTS:
        size = getattr(device, field)
        filled += size
        end = round(filled * width / budget)
        count = min(max(end - drawn, 1 if size else 0), width - drawn)
        parts.append((mark * count, style))
        drawn += count
    return [*parts, (_FREE * (width - drawn), "dim")]


def _describe_parts(plan: Plan, index: int, device: DeviceMemory) -> str:
    sizes = [
        f"{name} {format_bytes(size)}"
        for name, field, _, _ in _PARTS
        if (size := getattr(device, field))
    ]
    free = device.budget_bytes - device.used_bytes
    sizes.append(f"free {format_bytes(free)}" if free >= 0 else f"over by {format_bytes(-free)}")
    return f"{_describe_layers(plan, index)}: {', '.join(sizes)}"


def _describe_layers(plan: Plan, index: int) -> str:
    """What of the model is on a device, in words. The output is a layer to llama.cpp, the last."""
    placement = plan.placement
    if index == len(placement.tensor_split):
        return _describe_cpu(plan)
    count = placement.tensor_split[index]
    if not count:
        return "left out"
    if placement.split_mode == "tensor":
        return f"{count} of {placement.gpu_layers} shares of every layer"
    if index < placement.used_cards[-1]:
        return _count_layers(count)
    return f"{_count_layers(count - 1)} and the output" if count > 1 else "the output"


def _describe_cpu(plan: Plan) -> str:
    placement, memory = plan.placement, plan.devices[-1]
    if not placement.gpu_layers:
        return "all layers"
    # Only layers have a cache: those that llama.cpp leaves in RAM come before those on cards.
    parts = ["the input", *(["the other layers"] if memory.kv_bytes else [])]
    if placement.cpu_expert_layers:
        plural = "s" if len(placement.cpu_expert_layers) > 1 else ""
        parts.append(f"experts of layer{plural} {format_layers(placement.cpu_expert_layers)}")
    return ", ".join(parts)


def _count_layers(count: int) -> str:
    return f"{count} {'layer' if count == 1 else 'layers'}"


def format_layers(layers: Sequence[int]) -> str:
    """`0-3, 8` of (0, 1, 2, 3, 8): what `--cpu-experts` takes, with room to breathe."""
    spans: list[list[int]] = []
    for layer in layers:
        if spans and layer == spans[-1][1] + 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    return ", ".join(f"{a}-{b}" if a != b else str(a) for a, b in spans)


def _print_alternatives(alternatives: Sequence[Alternative]) -> None:
    rows = [
        (
            alternative.change,
            alternative.quant,
            format_tokens(alternative.context),
            format_speed(alternative.decode_tokens_per_second).removesuffix(" tokens/s"),
            format_bytes(alternative.gpu_bytes),
            format_bytes(alternative.ram_bytes),
            format_bytes(alternative.download_bytes),
        )
        for alternative in alternatives
    ]
    print_table(("plan ...", "quant", "context", "tokens/s", "GPU", "RAM", "files"), rows)


def print_paragraph(text: str, *, indent: str = "", style: str = "") -> None:
    """Wrapped on a terminal, one line elsewhere."""
    for line in _wrap(text, indent, indent):
        print_line((line, style))


def print_bullet(text: str) -> None:
    for line in _wrap(text, "- ", "  "):
        print_line((line, ""))


def _wrap(text: str, first: str, then: str) -> list[str]:
    if not sys.stdout.isatty():
        return [first + text]
    lines = textwrap.wrap(
        _UNIT.sub("\\1\N{NO-BREAK SPACE}\\2", text),
        screen_width(),
        initial_indent=first,
        subsequent_indent=then,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [line.replace("\N{NO-BREAK SPACE}", " ") for line in lines]


def screen_width() -> int:
    """Columns to write in: the terminal's, else the usual 80."""
    if not sys.stdout.isatty():
        return PLAIN_WIDTH
    return shutil.get_terminal_size((PLAIN_WIDTH, 24)).columns


def _shorten(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 3]}..."
