"""Reading and writing bytes, bandwidths, speeds and token counts as people type them.

GB is 10^9 and GiB is 2^30, always; a bare letter (`24G`) means the binary unit, as in `ls -h` and
Docker. `k` and `M` in a token count are 1024 and 1024^2, because contexts are powers of two and
`32k` means 32768 to users of llama.cpp. Knows no model and no device.
"""

import re
from fractions import Fraction

from localmistral.errors import UsageError

_BYTE_UNITS = {
    "": 1,
    "b": 1,
    **{p: 1024**i for i, p in enumerate("kmgtp", start=1)},
    **{f"{p}ib": 1024**i for i, p in enumerate("kmgtp", start=1)},
    **{f"{p}b": 1000**i for i, p in enumerate("kmgtp", start=1)},
}
_TOKEN_UNITS = {"": 1, "k": 1024, "m": 1024**2}
# ASCII digits only, and few of them: int() and float() accept far more than a person types.
_QUANTITY = re.compile(r"\s*([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*([A-Za-z]*)\s*", re.ASCII)
_LARGEST = 2**63 - 1  # llama.cpp's and the operating system's sizes are signed 64 bit


def parse_bytes(text: str) -> int:
    """Bytes of `24GiB`, `4.1 GB`, `512M` or `1048576`; UsageError for anything else."""
    return _parse(text, _BYTE_UNITS, "a size such as 24GiB or 4.1GB")


def parse_bandwidth(text: str) -> int:
    """Bytes per second of `448GB/s`; the unit is required. UsageError for anything else."""
    expected = "a bandwidth such as 448GB/s"
    amount, slash, second = text.rpartition("/")
    if not slash or second.strip().lower() != "s" or amount.strip()[-1:].isdigit():
        raise _refusal(text, expected)
    return _parse(amount, _BYTE_UNITS, expected, shown=text)


def parse_tokens(text: str) -> int:
    """Tokens of `32k` (32768), `1M` (1048576) or `5000`; UsageError unless a whole number."""
    return _parse(text, _TOKEN_UNITS, "a whole number of tokens such as 4096 or 32k", whole=True)


def parse_speed(text: str) -> float:
    """Tokens per second of `20`, `12.5`, `20t/s` or `20 tokens/s`; UsageError otherwise."""
    number = re.sub(r"\s*(?:t|tok|tokens)/s\s*$", "", text, flags=re.IGNORECASE)
    match = _QUANTITY.fullmatch(number)
    if match is None or match[2] or not float(match[1]):
        raise _refusal(text, "a speed such as 20 or 12.5t/s")
    return float(match[1])


def format_bytes(count: int) -> str:
    """`44459982848` -> `41.4 GiB`; below 1 KiB `812 B`. Always binary units."""
    value, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        # 1023.95 would be printed as 1024.0: that is one of the next unit.
        if abs(value) < 1023.95 or unit == "PiB":
            break
        value /= 1024
    return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"


def format_bandwidth(bytes_per_second: float) -> str:
    """`936e9` -> `936 GB/s`, as in data sheets; one decimal below 10, MB/s below 1 GB/s."""
    # 999.5 MB/s would be printed as 1000 MB/s.
    divisor, unit = (1e9, "GB/s") if bytes_per_second >= 999.5e6 else (1e6, "MB/s")
    value = bytes_per_second / divisor
    return f"{value:.1f} {unit}" if value < 9.95 else f"{value:.0f} {unit}"


def format_tokens(count: int) -> str:
    """`262144` -> `256k`, the inverse of `parse_tokens`: exact, so `5000` stays `5000`."""
    if count and count % 1024**2 == 0:
        return f"{count // 1024**2}M"
    return f"{count // 1024}k" if count and count % 1024 == 0 else str(count)


def format_speed(tokens_per_second: float) -> str:
    """`92.94` -> `92.9 tokens/s`; without decimals from 1000 on (`3,752 tokens/s`)."""
    decimals = 0 if tokens_per_second >= 999.95 else 1
    return f"{tokens_per_second:,.{decimals}f} tokens/s"


def _parse(
    text: str, units: dict[str, int], expected: str, *, shown: str = "", whole: bool = False
) -> int:
    """Bytes or tokens, above zero and exact: fractions, since 4.1 * 10^9 is not 4100000000."""
    match = _QUANTITY.fullmatch(text)
    factor = units.get(match[2].lower()) if match else None
    if match is None or factor is None:
        raise _refusal(shown or text, expected)
    amount = Fraction(match[1]) * factor
    if (whole and amount.denominator != 1) or not 1 <= amount <= _LARGEST:
        raise _refusal(shown or text, expected)
    return round(amount)


def _refusal(text: str, expected: str) -> UsageError:
    return UsageError(f"{text[:60]!r} is not {expected}.")
