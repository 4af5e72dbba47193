"""How hard a model thinks before it answers: the values that are taken, and what they mean.

Knows nothing of models or templates.
"""

from dataclasses import dataclass

from localmistral.errors import BadRequestError

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
"""What a request may ask for; Mistral's models know `none` and `high`."""


def parse_effort(value: str | None) -> str | None:
    """Check an effort; None asks for the model's default. Errors: BadRequestError naming all."""
    if value is not None and value not in EFFORTS:
        raise BadRequestError(
            f"The reasoning effort {value[:40]!r} is not known.",
            f"Use one of {', '.join(EFFORTS)}.",
            param="reasoning_effort",
        )
    return value


def thinks(effort: str | None) -> bool:
    """Whether `effort` asks for thinking at all."""
    return effort not in (None, "none", "minimal")


@dataclass(frozen=True, slots=True, kw_only=True)
class ThinkingBudgets:
    """Most tokens of thinking at an effort below high, and what ends it when they are spent."""

    low: int = 1024
    medium: int = 4096
    closing: str = "\n\nThat is enough thinking, now the answer."

    def choose(self, effort: str | None, context: int) -> int | None:
        """The budget of `effort`, with room left in the context for an answer; None for none."""
        if effort == "low":
            return min(self.low, max(1, context // 8))
        if effort == "medium":
            return min(self.medium, max(1, context // 2))
        return None
