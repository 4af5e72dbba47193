"""From measured speeds to a calibration: what has to be multiplied for predictions to hold.

One factor can be learnt from one load, that of the side which takes most of the time (cards or
RAM); the other side keeps what is known of it. Measures nothing.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from localmistral.fit.calibration import MAX_FACTOR, MIN_FACTOR, NO_CALIBRATION, Calibration
from localmistral.fit.machine import Machine
from localmistral.fit.placement import Placement
from localmistral.fit.plan import Load
from localmistral.fit.speed import predict
from localmistral.models.shape import ModelShape


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """Tokens per second of one stream at `depth` filled tokens."""

    depth: int
    decode_tokens_per_second: float
    prefill_tokens_per_second: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parts:
    """Seconds per token: measured, and as predicted, by what factors apply to."""

    measured: float
    card: float
    ram: float
    other: float


def fit_calibration(
    shape: ModelShape,
    machine: Machine,
    placement: Placement,
    load: Load,
    measured: Sequence[Measurement],
    current: Calibration = NO_CALIBRATION,
) -> Calibration:
    """The calibration by which predictions meet `measured` (one depth at least) best, as ratios."""

    def split(depth: int, field: str, figure: float) -> _Parts:
        def seconds(card: float, ram: float) -> float:
            trial = Calibration(
                card_decode=card, ram_decode=ram, card_prefill=card, ram_prefill=ram
            )
            prediction = predict(shape, machine, placement, load, depth=depth, calibration=trial)
            return 1 / float(getattr(prediction, field))

        return _split(seconds, 1 / figure)

    decode, prefill = (
        [split(point.depth, field, getattr(point, field)) for point in measured]
        for field in ("decode_tokens_per_second", "prefill_tokens_per_second")
    )
    card_decode, ram_decode = _solve(decode, current.card_decode, current.ram_decode)
    card_prefill, ram_prefill = _solve(prefill, current.card_prefill, current.ram_prefill)
    return Calibration(
        card_decode=card_decode,
        ram_decode=ram_decode,
        card_prefill=card_prefill,
        ram_prefill=ram_prefill,
    )


def _split(seconds: Callable[[float, float], float], measured: float) -> _Parts:
    """Predicted time is linear in the factors, so that doubling one shows its part."""
    whole = seconds(1.0, 1.0)
    card = max(0.0, seconds(2.0, 1.0) - whole)
    ram = max(0.0, seconds(1.0, 2.0) - whole)
    return _Parts(measured=measured, card=card, ram=ram, other=max(0.0, whole - card - ram))


def _solve(points: Sequence[_Parts], card: float, ram: float) -> tuple[float, float]:
    """The factors (card, ram): the larger part's anew, the other's as given."""
    if sum(point.card for point in points) >= sum(point.ram for point in points):
        return _mean([(p.measured - p.other - p.ram * ram, p.card) for p in points]), ram
    return card, _mean([(p.measured - p.other - p.card * card, p.ram) for p in points])


def _mean(ratios: Sequence[tuple[float, float]]) -> float:
    """Geometric mean of (left to explain / predicted), within what a calibration may hold."""
    logs = [math.log(_limit(left / part)) for left, part in ratios if part > 0]
    return _limit(math.exp(sum(logs) / len(logs))) if logs else 1.0


def _limit(factor: float) -> float:
    return min(MAX_FACTOR, max(MIN_FACTOR, factor))
