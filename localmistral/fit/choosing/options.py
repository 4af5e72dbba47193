"""What each quant could be on this machine: one context, KV type and batch at a time, remembered.

An option is a quant with everything a load needs and the fastest placement for it. Cheap bounds
come first, so that most of what can't fit or can't be fast enough is never searched. Fixed values
of a request are kept. Ranks nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from localmistral.fit.calibration import NO_CALIBRATION, Calibration
from localmistral.fit.choosing.bounds import could_fit, least_seconds, needed_bytes, room_on_cards
from localmistral.fit.choosing.knobs import (
    choose_batches,
    limit_placement,
    list_contexts,
    list_kv_types,
)
from localmistral.fit.choosing.pricing import Space, build_space
from localmistral.fit.choosing.search import find_placement
from localmistral.fit.choosing.tensor_mode import may_spread, spread_over_cards
from localmistral.fit.machine import Machine
from localmistral.fit.memory import measure
from localmistral.fit.placement import Placement
from localmistral.fit.plan import (
    Candidate,
    DeviceMemory,
    Load,
    PlanRequest,
    Prediction,
)
from localmistral.fit.quality import QuantQuality, judge_quant
from localmistral.fit.speed import SpeedCosts, decode_seconds, measure_costs, predict

SMALLER_UBATCHES = (256, 128)
"""Tried where memory is so tight that the smaller compute buffers make the difference."""
UBATCH_GAIN = 0.1
"""What a smaller batch must gain in speed of writing, since it costs as much in reading prompts."""
_SHAPING = (
    "parallel",
    "depth",
    "vision",
    "flash_attention",
    "gpu_layers",
    "tensor_split",
    "cpu_expert_layers",
    "split_mode",
)
"""What an option depends on in a request beside its quant, context, KV type and batches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One way to run one quant. `context` is per stream; `seconds` of one token at the depth."""

    candidate: Candidate
    quality: QuantQuality
    context: int
    load: Load
    placement: Placement
    seconds: float

    @property
    def speed(self) -> float:
        """Tokens per second of decode."""
        return 1 / self.seconds

    @property
    def is_whole(self) -> bool:
        """Whether all of it lies on cards."""
        return self.placement.is_whole(self.candidate.shape.layer_count)


@dataclass(slots=True, kw_only=True)
class Options:
    """The options of a machine under a request's fixed values."""

    machine: Machine
    request: PlanRequest
    calibration: Calibration = NO_CALIBRATION
    _options: dict[tuple[int, int, str, int, int], Option | None] = field(default_factory=dict)
    _costs: dict[tuple[int, str, int], SpeedCosts] = field(default_factory=dict)
    _spaces: dict[tuple[int, int, str, int], Space] = field(default_factory=dict)
    _kept: list[Candidate] = field(default_factory=list)

    def under(self, request: PlanRequest) -> "Options":
        """The same machine under another request; what doesn't depend on the change is kept."""
        other = Options(machine=self.machine, request=request, calibration=self.calibration)
        if all(getattr(request, name) == getattr(self.request, name) for name in _SHAPING):
            other._options, other._costs = self._options, self._costs
            other._spaces, other._kept = self._spaces, self._kept
        return other

    def find(
        self, candidate: Candidate, context: int, kv_type: str, min_speed: float = 0.0
    ) -> Option | None:
        """The option with the largest physical batch that does not stand in the way.

        A smaller one is taken where it alone fits, keeps the least speed, or makes room for a
        placement that is faster by more than UBATCH_GAIN.
        """
        batch, most = choose_batches(self.request)
        plain = self.at(candidate, context, kv_type, most, batch)
        if self.request.ubatch or (plain and plain.is_whole and plain.speed >= min_speed):
            return plain
        for ubatch in SMALLER_UBATCHES:
            if plain and not self._may_gain(plain, ubatch, min_speed):
                continue
            tighter = self.at(candidate, context, kv_type, min(ubatch, most), batch)
            if tighter is not None and (plain is None or _gains(tighter, plain, min_speed)):
                return tighter
        return plain

    def _may_gain(self, plain: Option, ubatch: int, min_speed: float) -> bool:
        """Whether smaller compute buffers could matter: put all on cards, or just reach the aim."""
        if plain.speed < min_speed < plain.speed * (1 + UBATCH_GAIN):
            return True
        load = plain.load
        return self.could_be_whole(plain.candidate, plain.context, load.kv_type, ubatch)

    def at(
        self, candidate: Candidate, context: int, kv_type: str, ubatch: int, batch: int
    ) -> Option | None:
        """The fastest placement with all of these, or None where there is none."""
        key = (id(candidate), context, kv_type, ubatch, batch)
        if key not in self._options:
            self._kept.append(candidate)  # an id is one object's only while that lives
            load = self.make_load(context, kv_type, ubatch, batch)
            self._options[key] = self._compute(candidate, context, load)
        return self._options[key]

    def make_load(self, context: int, kv_type: str, ubatch: int, batch: int) -> Load:
        """The load of so many tokens per stream, as the request says otherwise."""
        return Load(
            cells=context * self.request.parallel,
            sequences=self.request.parallel,
            kv_type=kv_type,
            batch=batch,
            ubatch=ubatch,
            flash_attention=self.request.flash_attention is not False,
        )

    def _compute(self, candidate: Candidate, context: int, load: Load) -> Option | None:
        limits = limit_placement(self.request, candidate.shape, self.machine)
        space = self.space(candidate, context, load)
        if not could_fit(space):
            return None
        by_layer = limits.split_mode != "tensor"
        placement = find_placement(space, limits) if by_layer else None
        spread = spread_over_cards(space, limits)
        found = [one for one in (placement, spread) if one is not None]
        if not found:
            return None
        best = min(found, key=lambda one: decode_seconds(space.costs, one))
        return self._make(candidate, context, load, best)

    def _make(self, candidate: Candidate, context: int, load: Load, placement: Placement) -> Option:
        costs = self.costs(candidate, load.kv_type, context)
        return Option(
            candidate=candidate,
            quality=judge_quant(candidate.quant, candidate.bits_per_weight),
            context=context,
            load=load,
            placement=placement,
            seconds=decode_seconds(costs, placement),
        )

    def space(self, candidate: Candidate, context: int, load: Load) -> Space:
        return build_space(
            candidate.shape,
            self.machine,
            load,
            self.costs(candidate, load.kv_type, context),
            self.mmproj_bytes(candidate),
        )

    def costs(self, candidate: Candidate, kv_type: str, context: int) -> SpeedCosts:
        depth = min(self.request.depth, context)
        key = (id(candidate), kv_type, depth)
        if key not in self._costs:
            self._kept.append(candidate)
            self._costs[key] = measure_costs(
                candidate.shape,
                self.machine,
                kv_type=kv_type,
                depth=depth,
                calibration=self.calibration,
            )
        return self._costs[key]

    def least_seconds(self, candidate: Candidate, context: int, kv_type: str) -> float | None:
        """Less than any placement can take; None where none can fit."""
        ubatch = self.request.ubatch or min(SMALLER_UBATCHES)
        space = self._rough_space(candidate, context, kv_type, ubatch)
        if not could_fit(space):
            return None
        limits = limit_placement(self.request, candidate.shape, self.machine)
        # cards that share every layer can't be faster than all of them together
        together = len(self.machine.gpus) if may_spread(space, limits) else 1
        return least_seconds(space) / together

    def could_be_whole(
        self, candidate: Candidate, context: int, kv_type: str, ubatch: int = min(SMALLER_UBATCHES)
    ) -> bool:
        """Whether all of it is within all cards' budgets together."""
        space = self._rough_space(candidate, context, kv_type, self.request.ubatch or ubatch)
        return needed_bytes(space) <= sum(room_on_cards(space))

    def _rough_space(self, candidate: Candidate, context: int, kv_type: str, ubatch: int) -> Space:
        key = (id(candidate), context, kv_type, ubatch)
        if key not in self._spaces:
            self._kept.append(candidate)
            batch = max(ubatch, choose_batches(self.request)[0])
            cells = context * self.request.parallel
            load = Load(
                cells=cells,
                sequences=self.request.parallel,
                kv_type=kv_type,
                batch=batch,
                ubatch=ubatch,
            )
            self._spaces[key] = self.space(candidate, context, load)
        return self._spaces[key]

    def mmproj_bytes(self, candidate: Candidate) -> int:
        wanted = self.request.vision and candidate.mmproj is not None
        return candidate.mmproj.bytes if wanted and candidate.mmproj else 0

    def measure(self, option: Option) -> tuple[DeviceMemory, ...]:
        """Bytes by device, the CPU last."""
        return measure(
            option.candidate.shape,
            self.machine,
            option.placement,
            option.load,
            mmproj_bytes=self.mmproj_bytes(option.candidate),
        )

    def predict(self, option: Option) -> Prediction:
        return predict(
            option.candidate.shape,
            self.machine,
            option.placement,
            option.load,
            depth=min(self.request.depth, option.context),
            calibration=self.calibration,
        )

    def kv_types(self, candidate: Candidate) -> tuple[str, ...]:
        """The KV types that may be chosen for a model, the preferred one first."""
        return list_kv_types(self.request, candidate.shape)

    def contexts(self, candidate: Candidate) -> tuple[int, ...]:
        """The contexts that may be chosen for a model, the preferred one first."""
        return list_contexts(self.request, candidate)

    def enlarge_ubatch(self, option: Option, sizes: tuple[int, ...]) -> Iterator[Option]:
        """The same with larger physical batches, where they fit."""
        for size in sizes:
            larger = self.at(
                option.candidate, option.context, option.load.kv_type, size, batch=size
            )
            if larger is not None:
                yield larger


def _gains(tighter: Option, plain: Option, min_speed: float) -> bool:
    if plain.speed < min_speed <= tighter.speed:
        return True
    return tighter.speed >= plain.speed * (1 + UBATCH_GAIN)
