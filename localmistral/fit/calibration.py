"""What `bench` has learnt about this machine: factors on predicted times, kept in a file.

A calibration belongs to one machine, told by the names and sizes of what is in it; it never
applies to a machine that was typed, nor after a card or memory was changed. Knows no model.
"""

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from localmistral.fit.machine import GIB, Machine

VERSION = 1
MIN_FACTOR = 0.05
MAX_FACTOR = 20.0
"""Beyond these a measurement says more about what else ran than about the machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Factors on seconds: measured / predicted. `card` for layers on cards, `ram` for what the
    CPU computes from RAM, of decode and of prefill."""

    card_decode: float = 1.0
    ram_decode: float = 1.0
    card_prefill: float = 1.0
    ram_prefill: float = 1.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not MIN_FACTOR <= value <= MAX_FACTOR:
                raise ValueError(
                    f"{field.name} is {value}, not between {MIN_FACTOR} and {MAX_FACTOR}"
                )


NO_CALIBRATION = Calibration()


def fingerprint(machine: Machine) -> str:
    """What a machine is recognised by: its cards in order, its processor, its memory in GiB.

    Memory that is free, and the cores a container grants, change from day to day and don't count.
    """
    cards = [f"{gpu.name} {round(gpu.total_bytes / GIB)} {gpu.backend}" for gpu in machine.gpus]
    ram = f"{round(machine.ram.total_bytes / GIB)} GiB"
    return " | ".join([*cards, machine.cpu.name, ram])


def to_json(calibration: Calibration, machine: Machine) -> str:
    """The file's text."""
    document = {
        "version": VERSION,
        "machine": fingerprint(machine),
        "factors": asdict(calibration),
    }
    return json.dumps(document, ensure_ascii=False, indent=2) + "\n"


def from_json(text: str, machine: Machine) -> tuple[Calibration, str]:
    """The calibration of `machine` in a file's text, and a remark if there is none that applies.

    A machine that isn't real gets none, without a remark.
    """
    if not machine.is_real:
        return NO_CALIBRATION, ""
    try:
        document = json.loads(text)
        version, owner = document["version"], document["machine"]
        calibration = _read_factors(document["factors"]) if version == VERSION else NO_CALIBRATION
    except (ValueError, TypeError, KeyError, RecursionError):
        return NO_CALIBRATION, "The calibration file can't be read and is ignored: run bench again."
    if version != VERSION:
        return NO_CALIBRATION, (
            f"The calibration is of version {str(version)[:20]}, not {VERSION}, and is ignored: "
            "run bench again."
        )
    if owner != fingerprint(machine):
        return NO_CALIBRATION, (
            "The calibration was made on other hardware and is ignored: run bench again."
        )
    return calibration, ""


def _read_factors(factors: dict[str, Any]) -> Calibration:
    known = {field.name: factors[field.name] for field in fields(Calibration)}
    for value in known.values():
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
        ):
            raise ValueError("not a number")
    return Calibration(**known)


def calibration_file() -> Path:
    """Where it is kept; the folder may not be there yet."""
    import platformdirs

    return platformdirs.user_state_path("localmistral", appauthor=False) / "calibration.json"


def read_calibration(machine: Machine, path: Path | None = None) -> tuple[Calibration, str]:
    """`from_json` of the file; without one, no calibration and no remark."""
    if not machine.is_real:
        return NO_CALIBRATION, ""
    source = path or calibration_file()
    try:
        text = source.read_text(encoding="utf-8")
    except FileNotFoundError:
        return NO_CALIBRATION, ""
    except (OSError, UnicodeError) as error:
        return NO_CALIBRATION, f"The calibration file is ignored: {error}."
    return from_json(text, machine)


def write_calibration(calibration: Calibration, machine: Machine, path: Path | None = None) -> Path:
    """Keep it, in place of any other; returns where. Raises OSError."""
    target = path or calibration_file()
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_suffix(".new")
    beside.write_text(to_json(calibration, machine), encoding="utf-8")
    beside.replace(target)
    return target
