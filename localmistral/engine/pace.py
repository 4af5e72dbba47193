"""How much prompt one step may carry, and who of the waiting gets it.

Follows the machine's speed. Knows nothing of batches or of llama.cpp.
"""

from collections.abc import Sequence

SHARED_STEP_S = 0.5
"""Longest step while answers are being written: their readers see no longer pause. Where a step
without any prompt takes longer than half of this already, a step may take twice as long as that."""
CROWDED_STEP_S = 1.0
"""Longest step of prompts alone when more than one request is there."""
ALONE_STEP_S = 4.0
"""A step of one request's prompt alone is cut smaller only past this. It is far above what a step
usually takes (0.5 s for SmolLM2 on two cores), because how a prompt is cut shows in the last bits
of the logits: a size that followed the clock closely would make two equal runs differ."""
ALONE_TOKENS = 128
"""Prompt tokens of a step without a GPU when nobody waits for a token; larger is no faster."""
SMALLEST_CHUNK = 4
TILE_TOKENS = 64
"""llama.cpp's attention on the CPU takes the tokens of a prompt by so many: 2,048 tokens of
SmolLM2 took 7.5 s by 48 at a time, 6.2 s by 64 and 5.6 s by 128."""
_FIRST_RATE_S = 0.01
"""Seconds per prompt token assumed before the first measurement."""
_FULL_WEIGHT_TOKENS = 64
"""A step with fewer prompt tokens than this says less about their speed."""
_LARGEST_CHANGE = 4.0
"""One slow step (a busy machine, a page fault) may not change the rate by more than this factor."""


class Pace:
    """The budget of prompt tokens per step; `largest` is what a batch holds."""

    def __init__(self, largest: int, *, offloaded: bool) -> None:
        self._alone_tokens = largest if offloaded else min(ALONE_TOKENS, largest)
        self._rate_s = _FIRST_RATE_S
        self._writing_s = 0.0

    def budget(self, wanted: int, *, writing: bool, company: bool, steady: bool = False) -> int:
        """Prompt tokens that the next step may carry, of `wanted` that wait.

        `writing`: others wait for their next token in it; `company`: other requests are there;
        `steady`: the request is meant to be repeatable, so alone it never looks at the clock.
        """
        if not writing and not company:
            return self._alone_tokens if steady else self._cut_alone()
        room_s = CROWDED_STEP_S
        if writing:
            room_s = max(SHARED_STEP_S, 2 * self._writing_s) - self._writing_s
        fitting = max(SMALLEST_CHUNK, int(room_s / self._rate_s))
        if wanted <= fitting or fitting < TILE_TOKENS:
            return fitting
        # beside answers, llama.cpp computes the first of them together with the answers' tokens
        return fitting // TILE_TOKENS * TILE_TOKENS + int(writing)

    def _cut_alone(self) -> int:
        tokens = self._alone_tokens
        while tokens > SMALLEST_CHUNK and tokens * self._rate_s > ALONE_STEP_S:
            tokens //= 4
        return max(SMALLEST_CHUNK, tokens)

    def measure(self, tokens: int, step_s: float, *, writing: bool) -> None:
        """A step with `tokens` of prompt in it took `step_s`; `writing` if answers were, too."""
        if not tokens:
            self._writing_s += 0.25 * (step_s - self._writing_s)
        if tokens < SMALLEST_CHUNK:
            return
        own_s = step_s - (self._writing_s if writing else 0.0)
        rate_s = max(own_s, 0.1 * step_s) / tokens
        low, high = self._rate_s / _LARGEST_CHANGE, self._rate_s * _LARGEST_CHANGE
        weight = 0.5 * min(1.0, tokens / _FULL_WEIGHT_TOKENS)
        self._rate_s += weight * (min(max(rate_s, low), high) - self._rate_s)


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
