"""Formats of JSON schema written out as patterns, where the compiler's own are too loose.

llguidance takes 2023-02-29 and the year 0000 for dates. Knows nothing of what else is in a schema.
"""

from collections.abc import Callable
from typing import Any

_YEAR = "(?:[1-9][0-9]{3}|0[1-9][0-9]{2}|00[1-9][0-9]|000[1-9])"
_DIVISIBLE_BY_4 = "(?:0[48]|[2468][048]|[13579][26])"
"""Two digits that 4 divides, without 00."""
_LEAP_YEAR = f"(?:[0-9]{{2}}{_DIVISIBLE_BY_4}|{_DIVISIBLE_BY_4}00)"
_DAY = (
    "(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])"
    "|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    "|02-(?:0[1-9]|1[0-9]|2[0-8]))"
)
_DATE = f"(?:{_YEAR}-{_DAY}|{_LEAP_YEAR}-02-29)"
_HOUR_MINUTE = "(?:[01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = f"{_HOUR_MINUTE}:[0-5][0-9](?:\\.[0-9]{{1,6}})?(?:Z|[+-]{_HOUR_MINUTE})"

EXACT = {"date": f"^{_DATE}$", "date-time": f"^{_DATE}T{_TIME}$"}
"""RFC 3339 in the Gregorian calendar from year 1; leap seconds are left out."""


def write_out_formats(value: Any, is_schema: Callable[[Any], bool]) -> Any:
    """A copy of `value` in which formats of EXACT are patterns.

    `is_schema` tells schemas from plain data that looks like one. Recurses as deep as `value` is.
    """
    if isinstance(value, list | tuple):
        return [write_out_formats(child, is_schema) for child in value]
    if not isinstance(value, dict):
        return value
    copy = {key: write_out_formats(child, is_schema) for key, child in value.items()}
    name = value.get("format")
    if not is_schema(value) or not isinstance(name, str) or name not in EXACT:
        return copy
    del copy["format"]
    if "pattern" not in copy:
        return copy | {"pattern": EXACT[name]}
    return copy | {"allOf": [*copy.get("allOf", []), {"pattern": EXACT[name]}]}
