"""How much prompt one step may carry, and who of the waiting gets it.

Follows the machine's speed. Knows nothing of batches or of llama.cpp.
"""

from collections.abc import Sequence

SHARED_STEP_S = 0.25
"""Longest step while answers are being written: their readers see no longer pause."""
ALONE_STEP_S = 4.0
"""A step of prompt alone is cut smaller only past this. It is far above what a step usually
takes (0.5 s for SmolLM2 on two cores), because how a prompt is cut shows in the last bits of the
logits: a size that followed the clock closely would make two equal runs differ."""
ALONE_TOKENS = 128
"""Prompt tokens of a step without a GPU when nobody waits for a token; larger is no faster."""
SMALLEST_CHUNK = 4
_FIRST_RATE_S = 0.01
"""Seconds per prompt token assumed before the first measurement."""
_FULL_WEIGHT_TOKENS = 64
"""A step with fewer prompt tokens than this says less about their speed."""


class Pace:
    """The budget of prompt tokens per step; `largest` is what a batch holds."""

    def __init__(self, largest: int, *, offloaded: bool) -> None:
        self._alone_tokens = largest if offloaded else min(ALONE_TOKENS, largest)
        self._rate_s = _FIRST_RATE_S

    def budget(self, *, alone: bool) -> int:
        """Prompt tokens that the next step may carry; `alone` if nobody waits for a token."""
        if not alone:
            return max(SMALLEST_CHUNK, int(SHARED_STEP_S / self._rate_s))
        tokens = self._alone_tokens
        while tokens > SMALLEST_CHUNK and tokens * self._rate_s > ALONE_STEP_S:
            tokens //= 4
        return max(SMALLEST_CHUNK, tokens)

    def measure(self, tokens: int, step_s: float) -> None:
        """A step with `tokens` of prompt in it took `step_s` seconds."""
        if tokens >= SMALLEST_CHUNK:
            weight = 0.5 * min(1.0, tokens / _FULL_WEIGHT_TOKENS)
            self._rate_s += weight * (step_s / tokens - self._rate_s)


def share_prompt(budget: int, remaining: Sequence[int]) -> list[int]:
    """Prompt tokens that each waiting prompt gets of `budget`, in order of arrival.

    The first comes first; but prompts short enough to be done with at once may use up to half
    of the budget before it, so that a short question never waits for a long document.
    """
    grants = [0] * len(remaining)
    half = budget // 2
    for i, tokens in enumerate(remaining[1:], start=1):
        if tokens <= half:
            grants[i] = tokens
            half -= tokens
    left = budget - sum(grants)
    for i, tokens in enumerate(remaining):
        more = min(left, tokens - grants[i])
        grants[i] += more
        left -= more
    return grants
