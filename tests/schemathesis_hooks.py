"""Lets generated requests get past the first checks: most of them keep a few of their fields, hold
something that can be answered, and ask for short answers. Read by schemathesis, not by pytest."""

from __future__ import annotations

import zlib
from typing import Any

import schemathesis

QUESTION = [{"role": "user", "content": "What is 31 + 46?"}]
SOUND = {"messages": QUESTION, "input": "What is 31 + 46?", "prompt": "31 + 46 =", "tokens": [5, 6]}
LIMITS = {"max_tokens": 3, "max_completion_tokens": 3, "max_output_tokens": 3}
UNTOUCHED, MENDED, KEPT = 5, 2, 4
"""One body in 5 stays as it was made, every other one gets sound contents, one field in 4 stays."""


@schemathesis.hook
def map_body(_context: schemathesis.HookContext, body: Any) -> Any:
    """The same change for the same body: what was found can be found again."""
    number = draw(body)
    if not isinstance(body, dict) or number % UNTOUCHED == 0:
        return body
    kept = {
        key: value for key, value in body.items() if key in SOUND or draw((key, value)) % KEPT == 0
    }
    kept.pop("model", None)
    kept |= {name: limit for name, limit in LIMITS.items() if name in body}
    if number % MENDED:
        kept |= {name: value for name, value in SOUND.items() if name in body}
    return kept


def draw(value: Any) -> int:
    return zlib.crc32(repr(value).encode("utf-8", "replace"))
