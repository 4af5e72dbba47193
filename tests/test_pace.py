"""How much prompt a step carries, and how it is shared."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from localmistral.engine.pace import ALONE_TOKENS, SHARED_STEP_S, Pace, share_prompt


@given(st.integers(0, 3000), st.lists(st.integers(1, 5000), max_size=10))
def test_all_of_the_budget_is_used_and_nobody_gets_too_much(
    budget: int, remaining: list[int]
) -> None:
    grants = share_prompt(budget, remaining)
    assert sum(grants) == min(budget, sum(remaining))
    assert all(0 <= g <= r for g, r in zip(grants, remaining, strict=True))
    if remaining:
        assert grants[0] >= min(remaining[0], budget - budget // 2)


def test_equal_long_prompts_are_served_in_order() -> None:
    assert share_prompt(100, [500, 500, 500]) == [100, 0, 0]


def test_a_short_prompt_goes_along_with_a_long_one() -> None:
    assert share_prompt(100, [5000, 20, 5000, 30]) == [50, 20, 0, 30]


def test_steps_beside_running_answers_follow_the_machines_speed() -> None:
    for rate_s in (0.0001, 0.001, 0.02):
        pace = Pace(2048, offloaded=False)
        for _ in range(30):
            tokens = min(2048, pace.budget(alone=False))
            pace.measure(tokens, tokens * rate_s)
        assert 0.5 < pace.budget(alone=False) * rate_s / SHARED_STEP_S < 1.5


def test_steps_alone_do_not_follow_small_changes_of_speed() -> None:
    pace = Pace(2048, offloaded=False)
    for rate_s in (0.0001, 0.004, 0.0001, 0.02):
        pace.measure(ALONE_TOKENS, ALONE_TOKENS * rate_s)
        assert pace.budget(alone=True) == ALONE_TOKENS


def test_on_a_very_slow_machine_a_step_alone_shrinks_too() -> None:
    pace = Pace(2048, offloaded=True)
    for _ in range(30):
        tokens = pace.budget(alone=True)
        pace.measure(tokens, tokens * 0.5)
    assert 1 <= pace.budget(alone=True) <= 8
