"""How much prompt a step carries, and how it is shared."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localmistral.engine.pace import ALONE_TOKENS, SHARED_STEP_S, TILE_TOKENS, Pace, share_prompt

WANTED = 5000
"""Tokens that wait: more than any step takes."""


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


@pytest.mark.parametrize("writing_s", [0.0, 0.05, 0.2, 0.6])
@pytest.mark.parametrize("rate_s", [0.0001, 0.001, 0.02])
def test_steps_beside_running_answers_follow_the_machines_speed(
    rate_s: float, writing_s: float
) -> None:
    """The step of the answers alone takes `writing_s`; every prompt token adds `rate_s`."""
    pace = Pace(2048, offloaded=False)
    for _ in range(40):
        pace.measure(0, writing_s, writing=True)
        tokens = min(2048, pace.budget(WANTED, writing=True, company=True))
        pace.measure(tokens, writing_s + tokens * rate_s, writing=True)
    step_s = writing_s + pace.budget(WANTED, writing=True, company=True) * rate_s
    assert 0.5 < step_s / max(SHARED_STEP_S, 2 * writing_s) < 1.5


def test_one_slow_step_does_not_starve_prompts() -> None:
    pace = Pace(2048, offloaded=False)
    for _ in range(20):
        pace.measure(100, 0.1, writing=False)
    before = pace.budget(WANTED, writing=True, company=True)
    pace.measure(100, 30.0, writing=False)
    assert pace.budget(WANTED, writing=True, company=True) > before / 5


def test_steps_alone_do_not_follow_small_changes_of_speed() -> None:
    pace = Pace(2048, offloaded=False)
    for rate_s in (0.0001, 0.004, 0.0001, 0.02):
        pace.measure(ALONE_TOKENS, ALONE_TOKENS * rate_s, writing=False)
        assert pace.budget(WANTED, writing=False, company=False) == ALONE_TOKENS


def test_a_repeatable_prompt_alone_never_looks_at_the_clock() -> None:
    pace = Pace(2048, offloaded=False)
    for _ in range(20):
        pace.measure(ALONE_TOKENS, 60.0, writing=False)
    assert pace.budget(WANTED, writing=False, company=False, steady=True) == ALONE_TOKENS
    assert pace.budget(WANTED, writing=False, company=True, steady=True) < ALONE_TOKENS


def test_steps_of_prompts_in_company_take_about_a_second() -> None:
    pace = Pace(2048, offloaded=True)
    for _ in range(40):
        tokens = pace.budget(WANTED, writing=False, company=True)
        pace.measure(tokens, tokens * 0.005, writing=False)
    assert 0.4 < pace.budget(WANTED, writing=False, company=True) * 0.005 <= 1.0


def test_on_a_very_slow_machine_a_step_alone_shrinks_too() -> None:
    pace = Pace(2048, offloaded=True)
    for _ in range(30):
        tokens = pace.budget(WANTED, writing=False, company=False)
        pace.measure(tokens, tokens * 0.5, writing=False)
    assert 1 <= pace.budget(WANTED, writing=False, company=False) <= 8


def test_long_prompts_come_in_whole_tiles_and_short_ones_at_once() -> None:
    pace = Pace(2048, offloaded=False)
    for _ in range(40):
        pace.measure(100, 100 * 0.0025, writing=False)
    fitting = pace.budget(10, writing=True, company=True)
    assert fitting > TILE_TOKENS
    assert pace.budget(fitting, writing=True, company=True) == fitting
    assert pace.budget(fitting + 1, writing=True, company=True) % TILE_TOKENS == 1
    assert pace.budget(WANTED, writing=False, company=True) % TILE_TOKENS == 0
