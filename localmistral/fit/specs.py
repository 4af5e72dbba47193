"""Machines as people type them: `--gpu 2x3090 --gpu '16GiB@448GB/s' --ram 64GiB@90GB/s`.

A card is a name (`rtx-4090`), a name with other memory (`3090:22GiB`), a size (`24GiB`), any of
them with a bandwidth (`24GiB@936GB/s`), and with a count in front (`2x 3090`). Probes nothing.
"""

import re
from collections.abc import Sequence
from dataclasses import replace

from localmistral.errors import UsageError
from localmistral.fit.cards import (
    Card,
    choose_by_memory,
    common_cards,
    estimate_flops,
    find_cards,
    mentioned_bytes,
    suggest_names,
)
from localmistral.fit.machine import (
    DEFAULT_RAM_BANDWIDTH,
    GIB,
    MIB,
    Cpu,
    Gpu,
    Machine,
    Ram,
    share_memory,
)
from localmistral.units import format_bytes, parse_bandwidth, parse_bytes

MAX_CARDS = 16
"""llama.cpp's own limit (llama_max_devices)."""
CARD_BYTES = (256 * MIB, 1024 * GIB)
"""Smallest and largest memory of a card that is believed; the largest made has 288 GiB, and a
computer with memory for both processors 512."""
RAM_BYTES = (GIB, 16 * 1024 * GIB)
CARD_BANDWIDTH = (1e9, 20e12)
RAM_BANDWIDTH = (1e9, 2e12)
"""Bytes per second that are believed; a server with 12 channels of DDR5 has 0.6e12."""

TYPED_CPU = Cpu(name="", cores=8, features=("avx2",))
"""The processor of a machine that is typed whole: a usual desktop's."""

_COUNT = re.compile(r"([0-9]{1,3})\s*[x×*]\s*(?=\S)(.*)", re.IGNORECASE | re.DOTALL)
_SIZE = re.compile(r"\s*[0-9.]+\s*[A-Za-z]{1,3}\s*", re.ASCII)
_HOW_TO = "A card is a name or a size: --gpu rtx-4090, --gpu 24GiB or --gpu '24GiB@936GB/s'."


def parse_gpus(texts: Sequence[str]) -> tuple[Gpu, ...]:
    """The cards of one or more `--gpu`, in order. UsageError names what can't be meant."""
    counted = [(*_read_count(text), text) for text in texts]
    count = sum(count for count, _, _ in counted)
    if count > MAX_CARDS:
        raise UsageError(
            f"{count} cards are more than the {MAX_CARDS} that llama.cpp can use.",
            "Name the cards that the model is to be split over.",
        )
    return tuple(gpu for count, body, text in counted for gpu in (_read_card(body, text),) * count)


def parse_ram(text: str) -> Ram:
    """Main memory of `64GiB` or `64GiB@90GB/s`, all of it available; UsageError otherwise."""
    size, at, speed = text.partition("@")
    hint = "Write --ram 64GiB or --ram 64GiB@90GB/s."
    try:
        parsed = parse_bytes(size)
    except UsageError as error:
        raise UsageError(f"--ram: {error.message}", hint) from error
    memory = _in_range(parsed, RAM_BYTES, f"--ram {size.strip()[:40]}")
    if not at:
        return Ram(total_bytes=memory, available_bytes=memory)
    bandwidth = _read_bandwidth(speed, RAM_BANDWIDTH, "90GB/s for dual-channel DDR5-5600")
    return Ram(total_bytes=memory, available_bytes=memory, bandwidth=bandwidth)


def make_machine(
    real: Machine | None, gpus: Sequence[Gpu], ram: Ram | None, cpu_only: bool = False
) -> Machine:
    """The machine to plan for: what was typed, and for the rest this one.

    `real` may be None where the options say all: cards (or none) and RAM. UsageError if the
    options contradict each other.
    """
    if cpu_only and gpus:
        raise UsageError(
            f"--cpu-only leaves no card, and --gpu names {len(gpus)}.", "Leave one of them out."
        )
    if real is None:
        real = _typed_machine(gpus, ram)
    elif not (gpus or ram or cpu_only):
        return real
    cards = () if cpu_only else tuple(gpus) or real.gpus
    memory, cards = share_memory(ram or _own_memory(gpus) or _undivided(real), cards)
    keeps_cards = not (gpus or cpu_only)
    return replace(
        real,
        gpus=cards,
        ram=memory,
        has_peer_access=real.has_peer_access and keeps_cards,
        is_real=False,
        notes=(*(real.notes if keeps_cards else ()), *_describe(gpus, ram)),
    )


def _typed_machine(gpus: Sequence[Gpu], ram: Ram | None) -> Machine:
    memory = ram or _own_memory(gpus)
    if memory is None:
        raise ValueError("a machine without RAM: probe this one, or pass ram")
    return Machine(gpus=(), ram=memory, cpu=TYPED_CPU, is_real=False)


def _own_memory(gpus: Sequence[Gpu]) -> Ram | None:
    """A typed chip with memory for both processors brings the machine's RAM along."""
    shared = next((gpu for gpu in gpus if gpu.is_integrated), None)
    if shared is None:
        return None
    size = shared.total_bytes
    return Ram(total_bytes=size, available_bytes=size, bandwidth=shared.bandwidth)


def _undivided(real: Machine) -> Ram:
    """This machine's RAM with what its own integrated cards had been given."""
    given = sum(gpu.free_bytes for gpu in real.gpus if gpu.is_integrated)
    return replace(real.ram, available_bytes=real.ram.available_bytes + given)


def _describe(gpus: Sequence[Gpu], ram: Ram | None) -> tuple[str, ...]:
    """What was taken for granted, each once."""
    notes = [gpu.assumption for gpu in gpus if gpu.assumption]
    if ram is not None and ram.bandwidth == DEFAULT_RAM_BANDWIDTH:
        notes.append(
            "RAM counts as dual-channel DDR4-3200, 51 GB/s; --ram 64GiB@90GB/s would say otherwise."
        )
    return tuple(dict.fromkeys(notes))


def _read_count(text: str) -> tuple[int, str]:
    """`2x3090` is two of them; `7900xtx` is a name."""
    match = _COUNT.fullmatch(text.strip())
    if match is None or find_cards(re.split("[:@]", text)[0]):
        return 1, text.strip()
    count = int(match[1])
    if not 1 <= count <= MAX_CARDS:
        raise UsageError(
            f"--gpu {text[:40]!r} names {count} cards, it can be 1 to {MAX_CARDS}.", _HOW_TO
        )
    return count, match[2]


def _read_card(body: str, text: str) -> Gpu:
    """One card of `NAME[:SIZE][@BANDWIDTH]` or `SIZE[@BANDWIDTH]`."""
    left, at, speed = body.partition("@")
    name, colon, size = left.partition(":")
    rows = find_cards(name)
    bandwidth = _read_bandwidth(speed, CARD_BANDWIDTH, "936GB/s for an RTX 3090") if at else None
    if rows:
        memory = _read_size(size, text) if colon else mentioned_bytes(name)
        return _make_named(rows, memory, bandwidth)
    if colon or not _SIZE.fullmatch(name):
        raise _unknown(name, text)
    return _make_sized(_read_size(name, text), bandwidth)


def _make_named(rows: Sequence[Card], memory: int | None, bandwidth: float | None) -> Gpu:
    """A card of the table; `memory` and `bandwidth` override the table's."""
    card = rows[0] if memory is None else choose_by_memory(rows, memory)
    size = memory or card.memory_bytes
    name = card.name if size == card.memory_bytes else f"{card.name} {_show(size)}"
    return Gpu(
        name=name,
        total_bytes=size,
        free_bytes=size,
        bandwidth=bandwidth or card.bandwidth,
        flops=card.flops,
        link=card.link,
        backend=card.backend,
        is_integrated=card.is_integrated,
        assumption=_choice_of_size(rows) if memory is None else "",
    )


def _choice_of_size(rows: Sequence[Card]) -> str:
    chosen, *others = rows
    if not others and not chosen.is_integrated:
        return ""
    example = f"--gpu {chosen.slug}:{others[0].memory_bytes // GIB if others else 64}GiB"
    return (
        f"{chosen.name} is sold with different memory and counts as "
        f"{chosen.memory_bytes // GIB} GiB; {example} would say otherwise."
    )


def _make_sized(memory: int, bandwidth: float | None) -> Gpu:
    """A card known by its size; what isn't said is taken from a common card."""
    common = common_cards()
    like = choose_by_memory(common, memory)
    gpu = Gpu(
        name=f"{_show(memory)} card",
        total_bytes=memory,
        free_bytes=memory,
        bandwidth=bandwidth or like.bandwidth,
        flops=like.flops if bandwidth is None else estimate_flops(bandwidth),
        link=like.link,
    )
    if bandwidth is not None:
        return gpu
    example = f"--gpu '{_show(memory).replace(' ', '')}@500GB/s'"
    return replace(
        gpu,
        assumption=f"A card of {_show(memory)} counts as fast as the {like.name}, "
        f"{like.bandwidth / 1e9:.0f} GB/s; {example} would say otherwise.",
    )


def _show(size: int) -> str:
    """`24 GiB`, `22.5 GiB`: cards are known by whole numbers."""
    return format_bytes(size).replace(".0 ", " ")


def _read_size(text: str, shown: str) -> int:
    try:
        size = parse_bytes(text)
    except UsageError as error:
        raise UsageError(error.message, _HOW_TO) from error
    if text.strip().replace(".", "").isdigit():
        raise UsageError(
            f"The size in --gpu {shown[:40]!r} has no unit.", f"Write {text.strip()}GiB."
        )
    return _in_range(size, CARD_BYTES, f"--gpu {shown.strip()[:40]}")


def _in_range(size: int, limits: tuple[int, int], what: str) -> int:
    low, high = limits
    if low <= size <= high:
        return size
    raise UsageError(
        f"{what} means {_show(size)}, and it can be {_show(low)} to {_show(high)}.",
        "Write a size with its unit, such as 24GiB.",
    )


def _read_bandwidth(text: str, limits: tuple[float, float], example: str) -> float:
    try:
        bandwidth = float(parse_bandwidth(text))
    except UsageError as error:
        raise UsageError(error.message, f"After @ stands a bandwidth: {example}.") from error
    low, high = limits
    if low <= bandwidth <= high:
        return bandwidth
    raise UsageError(
        f"A bandwidth of {text.strip()[:40]} is not between {low / 1e9:.0f} and "
        f"{high / 1e9:.0f} GB/s.",
        f"After @ stands a bandwidth: {example}.",
    )


def _unknown(name: str, text: str) -> UsageError:
    shown = name.strip()[:60]
    near = suggest_names(name)
    if re.fullmatch("[1-9][0-9]{0,2}", shown):
        near = (f"{shown}GiB", *near[:2])
    hint = f"Did you mean {' or '.join(near)}? " if near else ""
    if "," in text:
        hint = "Repeat --gpu for each card. "
    return UsageError(f"No card is known as {shown!r}.", hint + _HOW_TO)
