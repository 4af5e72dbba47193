"""What a run of layers costs on a card: seconds, the card's share that is filled, bytes of RAM.

A segment is layers [start, stop) on one card, with the output if it is the last one. If its
weights, cache and compute buffers don't fit, experts of its layers go to RAM. Everything is summed
from prefix sums made once per search, since a search prices thousands of segments. Seconds are
kept as whole femtoseconds, so that equal placements compare equal. Chooses no placement.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

from localmistral.fit.choosing.covering import ExpertClasses, cover
from localmistral.fit.graphs.compute import Role, gpu_compute_bytes
from localmistral.fit.kv import kv_bytes_per_layer
from localmistral.fit.machine import Machine
from localmistral.fit.memory import measure
from localmistral.fit.placement import Placement
from localmistral.fit.plan import DeviceMemory, Load
from localmistral.fit.speed import SpeedCosts
from localmistral.fit.weights import output_bytes, sum_weights
from localmistral.models.shape import ModelShape

FEMTOSECONDS = 1e15


class Price(NamedTuple):
    """Of a segment: time (and weighted RAM) in femtoseconds, share of the card, and how many layers
    of each class of experts go to RAM."""

    cost: int
    fill: float
    taken: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """One model, machine and load, with the sums that every search in it needs.

    `dense`, `experts`, `resident[card]`, `in_ram[card]` and `on_cpu` are prefix sums by layer, of
    bytes (with the cache) and of femtoseconds; `twin` names the first card equal to each.
    """

    shape: ModelShape
    machine: Machine
    load: Load
    costs: SpeedCosts
    mmproj_bytes: int
    dense: tuple[int, ...]
    experts: tuple[int, ...]
    expert_bytes: tuple[int, ...]
    largest_experts: tuple[int, ...]
    output_bytes: int
    copied_bytes: int
    first_bytes: int
    resident: tuple[tuple[int, ...], ...]
    in_ram: tuple[tuple[int, ...], ...]
    on_cpu: tuple[int, ...]
    output: tuple[int, ...]
    hop: int
    budgets: tuple[int, ...]
    twin: tuple[int, ...]
    _measured: dict[Placement, tuple[DeviceMemory, ...]] = field(
        default_factory=dict, compare=False, repr=False
    )

    @property
    def layer_count(self) -> int:
        return self.shape.layer_count

    def measure(self, placement: Placement) -> tuple[DeviceMemory, ...]:
        """Bytes by device of a placement, the CPU last: the last word on what fits."""
        if placement not in self._measured:  # a search asks about most of its answers thrice
            self._measured[placement] = measure(
                self.shape, self.machine, placement, self.load, mmproj_bytes=self.mmproj_bytes
            )
        return self._measured[placement]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mode:
    """One kind of placement: the graph's buffers depend on it.

    `classes` are the experts that may go to RAM, `forced` those that must. `corrections` are bytes
    by (first equal card, role) that a compute buffer was found to take beyond the estimate.
    `ram_weight` is femtoseconds per byte of RAM, above 0 where RAM is what is short.
    """

    is_whole: bool
    is_pipelined: bool
    classes: ExpertClasses
    forced: frozenset[int] | None = None
    corrections: Mapping[tuple[int, Role], int] = field(default_factory=dict)
    ram_weight: int = 0


def build_space(
    shape: ModelShape, machine: Machine, load: Load, costs: SpeedCosts, mmproj_bytes: int
) -> Space:
    """The sums for one model, machine and load."""
    weights = sum_weights(shape)
    kv = kv_bytes_per_layer(shape, load.kv_type, load.cells)
    return Space(
        shape=shape,
        machine=machine,
        load=load,
        costs=costs,
        mmproj_bytes=mmproj_bytes,
        dense=_sums([size + cache for size, cache in zip(weights.dense, kv, strict=True)]),
        experts=_sums(weights.experts),
        expert_bytes=weights.experts,
        largest_experts=weights.largest_experts,
        output_bytes=output_bytes(shape),
        copied_bytes=weights.copied,
        first_bytes=weights.first,
        resident=tuple(_sums(_femtoseconds(row)) for row in costs.resident),
        in_ram=tuple(_sums(_femtoseconds(row)) for row in costs.experts_in_ram),
        on_cpu=_sums(_femtoseconds(costs.on_cpu)),
        output=_femtoseconds(costs.output),
        hop=round(costs.hop * FEMTOSECONDS),
        budgets=tuple(gpu.budget_bytes for gpu in machine.gpus),
        twin=_first_equals(machine, costs),
    )


def _first_equals(machine: Machine, costs: SpeedCosts) -> tuple[int, ...]:
    """For each card the first one that has the same room and speed."""
    cards = [
        (gpu.budget_bytes, gpu.backend, costs.resident[n], costs.experts_in_ram[n], costs.output[n])
        for n, gpu in enumerate(machine.gpus)
    ]
    return tuple(cards.index(card) for card in cards)


def _sums(values: Sequence[int]) -> tuple[int, ...]:
    return tuple(accumulate(values, initial=0))


def _femtoseconds(seconds: Sequence[float]) -> tuple[int, ...]:
    return tuple(round(value * FEMTOSECONDS) for value in seconds)


@dataclass(slots=True, kw_only=True)
class Pricer:
    """Prices segments of one mode, and remembers them: equal cards have equal prices."""

    space: Space
    mode: Mode
    _known: dict[tuple[int, Role, int, int], Price | None] = field(default_factory=dict)
    _rows: dict[tuple[int, Role, int], list[Price]] = field(default_factory=dict)
    _rooms: dict[tuple[int, Role], int] = field(default_factory=dict)
    _counts: tuple[tuple[int, ...], ...] = ()
    _moves: dict[tuple[int, int, tuple[int, ...]], tuple[int, int, tuple[int, ...]] | None] = field(
        default_factory=dict
    )
    _class_costs: dict[int, tuple[int, ...]] = field(default_factory=dict)
    _forced: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        of_layer = self.mode.classes.of_layer
        self._counts = tuple(
            _sums([1 if found == number else 0 for found in of_layer])
            for number in range(len(self.mode.classes.sizes))
        )
        forced = self.mode.forced or frozenset()
        sizes = enumerate(self.space.expert_bytes)
        self._forced = _sums([size if layer in forced else 0 for layer, size in sizes])

    def price(self, card: int, role: Role, start: int, stop: int) -> Price | None:
        """Of layers [start, stop) on `card`, and the output in the roles that have it; None where
        they can't fit."""
        key = (self.space.twin[card], role, start, stop)
        if key not in self._known:
            self._known[key] = self._compute(card, role, start, stop)
        return self._known[key]

    def row(self, card: int, role: Role, start: int) -> list[Price]:
        """Of the runs of layers from `start` without the output, the shortest first: as many as
        fit, since a longer run needs more room still."""
        key = (self.space.twin[card], role, start)
        if key not in self._rows:
            self._rows[key] = list(self._price_runs(card, role, start))
        return self._rows[key]

    def _price_runs(self, card: int, role: Role, start: int) -> Iterator[Price]:
        space, weight, budget = self.space, self.mode.ram_weight, self.space.budgets[card]
        dense, experts, resident = space.dense, space.experts, space.resident[card]
        is_forced = self.mode.forced is not None
        whole_room = self.room(card, role) + dense[start]
        for stop in range(start + 1, space.layer_count + 1):
            room = whole_room - dense[stop]
            if room < 0:
                return
            inside = experts[stop] - experts[start]
            moved: tuple[int, int, tuple[int, ...]] | None = (0, 0, ())
            if is_forced or inside > room:
                moved = self._move(card, start, stop, inside - room)
            if moved is None:
                return
            extra, ram, taken = moved
            time = resident[stop] - resident[start] + extra
            fill = (budget - room + inside - ram) / budget
            yield Price(time + weight * ram, fill, taken)

    def _compute(self, card: int, role: Role, start: int, stop: int) -> Price | None:
        space = self.space
        room = self.room(card, role) - (space.dense[stop] - space.dense[start])
        has_output = role in ("only", "last")
        room -= space.output_bytes if has_output else 0
        if room < 0:
            return None
        experts = space.experts[stop] - space.experts[start]
        moved = self._move(card, start, stop, experts - room)
        if moved is None:
            return None
        extra, ram, taken = moved
        budget = space.budgets[card]
        time = space.resident[card][stop] - space.resident[card][start] + extra
        return Price(
            cost=time + (space.output[card] if has_output else 0) + self.mode.ram_weight * ram,
            fill=(budget - room + experts - ram) / budget,
            taken=taken,
        )

    def room(self, card: int, role: Role) -> int:
        """Bytes for weights and cache on a card in a role."""
        key = (self.space.twin[card], role)
        if key not in self._rooms:
            space = self.space
            compute = estimate_compute(space, self.mode, card, role)
            first = space.mmproj_bytes + space.first_bytes if role in ("only", "first") else 0
            corrected = compute + self.mode.corrections.get(key, 0)
            self._rooms[key] = space.budgets[card] - corrected - space.copied_bytes - first
        return self._rooms[key]

    def _move(
        self, card: int, start: int, stop: int, needed: int
    ) -> tuple[int, int, tuple[int, ...]] | None:
        """Time, bytes and classes of the experts that go to RAM to free `needed` bytes."""
        if self.mode.forced is not None:
            return self._move_forced(card, start, stop, needed)
        if needed <= 0:
            return 0, 0, ()
        if not self.mode.classes.sizes:
            return None
        counts = tuple([sums[stop] - sums[start] for sums in self._counts])
        key = (card, needed, counts)
        if key not in self._moves:  # runs of layers alike ask the same
            self._moves[key] = self._cover(card, counts, needed)
        return self._moves[key]

    def _cover(
        self, card: int, counts: tuple[int, ...], needed: int
    ) -> tuple[int, int, tuple[int, ...]] | None:
        sizes = self.mode.classes.sizes
        found = cover(sizes, self._costs_of_classes(card), counts, needed)
        if found is None:
            return None
        ram = sum(map(int.__mul__, sizes, found[1]))
        return found[0] - self.mode.ram_weight * ram, ram, found[1]

    def _move_forced(
        self, card: int, start: int, stop: int, needed: int
    ) -> tuple[int, int, tuple[int, ...]] | None:
        ram = self._forced[stop] - self._forced[start]
        layers = [n for n in range(start, stop) if n in (self.mode.forced or ())]
        extra = sum(self._extra(card, layer) for layer in layers)
        return (extra, ram, ()) if ram >= needed else None

    def _extra(self, card: int, layer: int) -> int:
        """Femtoseconds more for a layer whose experts are in RAM."""
        in_ram, resident = self.space.in_ram[card], self.space.resident[card]
        return (in_ram[layer + 1] - in_ram[layer]) - (resident[layer + 1] - resident[layer])

    def _costs_of_classes(self, card: int) -> tuple[int, ...]:
        if card not in self._class_costs:
            classes, weight = self.mode.classes, self.mode.ram_weight
            self._class_costs[card] = tuple(
                self._extra(card, classes.of_layer.index(number)) + weight * size
                for number, size in enumerate(classes.sizes)
            )
        return self._class_costs[card]


def estimate_compute(space: Space, mode: Mode, card: int, role: Role) -> int:
    """Bytes of a card's compute buffer before more than its role is known."""
    return gpu_compute_bytes(
        space.shape,
        space.load,
        role=role,
        is_pipelined=mode.is_pipelined and role != "only",
        is_whole=mode.is_whole,
        backend=space.machine.gpus[card].backend,
    )
