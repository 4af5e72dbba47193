"""What the last load took beside what its plan said, kept for `doctor` in a small file.

A file that is missing or damaged tells of no difference: losing it loses nothing.
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Bytes of one part (weights, kv, compute) on one device: as planned, and as llama.cpp said."""

    device: str
    part: str
    planned_bytes: int
    actual_bytes: int

    @property
    def relative(self) -> float:
        """Of what was planned: 0.02 is 2 %."""
        return abs(self.actual_bytes - self.planned_bytes) / max(1, self.planned_bytes)


def last_load_file() -> Path:
    """Where the differences are kept; it may not exist."""
    import platformdirs

    return platformdirs.user_state_path("localmistral", appauthor=False) / "last_load.json"


def write_differences(differences: Sequence[Difference], path: Path | None = None) -> None:
    """Keep what a load found; a disk that refuses changes nothing."""
    file = path or last_load_file()
    document = {"differences": [asdict(difference) for difference in differences]}
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def read_differences(path: Path | None = None) -> tuple[Difference, ...] | None:
    """What the last load found; None where nothing (readable) was kept."""
    try:
        document = json.loads((path or last_load_file()).read_text(encoding="utf-8"))
        return tuple(_read_row(row) for row in document["differences"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _read_row(row: Any) -> Difference:
    planned, actual = row["planned_bytes"], row["actual_bytes"]
    if not all(isinstance(number, int) and number >= 0 for number in (planned, actual)):
        raise ValueError("bytes are whole numbers from 0")
    return Difference(
        device=str(row["device"]),
        part=str(row["part"]),
        planned_bytes=planned,
        actual_bytes=actual,
    )
