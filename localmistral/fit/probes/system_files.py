"""Reading what Linux writes into small files under /proc and /sys; what can't be read is empty."""

from pathlib import Path


def read_text(path: Path) -> str:
    """The file without surrounding space; empty if it is missing, a folder or forbidden."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def read_number(path: Path) -> int | None:
    """The whole number that the file holds; None if it holds none."""
    text = read_text(path)
    return int(text) if text.isascii() and text.isdigit() else None
