"""How hard a model thinks before it answers: the values that are taken, and what they mean.

Knows nothing of models or templates.
"""

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
