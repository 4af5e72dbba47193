"""What `bench` measured, for people: beside what was predicted. Measures and decides nothing."""

from localmistral.benchmark import Measured, Outcome
from localmistral.fit.calibration import Calibration
from localmistral.fit.plan import Plan
from localmistral.terminal.render import print_line, print_table
from localmistral.units import format_speed, format_tokens

_HEADINGS = ("filled", "answers", "predicted", "", "prompts", "predicted", "")


def print_measured(title: str, plan: Plan, measured: Measured, outcome: Outcome) -> None:
    """A row a depth, beside what was predicted, and a row for each number of streams."""
    print_line((f"{title}, {plan.quant}", "bold"), (f", {describe_placement(plan)}, tokens/s", ""))
    rows = [
        (
            format_tokens(point.depth),
            _figure(point.decode_tokens_per_second),
            _figure(expected.decode_tokens_per_second),
            format_ratio(point.decode_tokens_per_second, expected.decode_tokens_per_second),
            _figure(point.prefill_tokens_per_second),
            _figure(expected.prefill_tokens_per_second),
            format_ratio(point.prefill_tokens_per_second, expected.prefill_tokens_per_second),
        )
        for point, expected in zip(measured.depths, outcome.predicted, strict=True)
    ]
    print_table(_HEADINGS, rows)
    if measured.streams:
        print_line()
        streams = [
            (
                str(speed.streams),
                _figure(speed.tokens_per_second),
                _figure(speed.tokens_per_second / speed.streams),
            )
            for speed in measured.streams
        ]
        print_table(("streams", "together", "each"), streams)


def _figure(tokens_per_second: float) -> str:
    """The number alone: the unit stands above the table."""
    return format_speed(tokens_per_second).removesuffix(" tokens/s")


def format_ratio(measured: float, predicted: float) -> str:
    """`+12 %` when more was measured than predicted."""
    return f"{(measured / predicted - 1) * 100:+.0f} %"


def describe_placement(plan: Plan) -> str:
    """Where the layers are, in a few words."""
    placement = plan.placement
    cards = len(placement.used_cards)
    if not cards:
        return "all on the CPU"
    where = f"{placement.gpu_layers} layers on {cards} card{'s' * (cards > 1)}"
    in_ram = len(placement.cpu_expert_layers)
    return f"{where}, experts of {in_ram} in RAM" if in_ram else where


def describe_calibration(calibration: Calibration) -> str:
    """The factors that aren't 1, as one sentence."""
    named = (
        ("answers on cards", calibration.card_decode),
        ("answers from RAM", calibration.ram_decode),
        ("prompts on cards", calibration.card_prefill),
        ("prompts from RAM", calibration.ram_prefill),
    )
    changed = [f"{what} take {factor:.2f} times" for what, factor in named if factor != 1.0]
    return f"As measured, {', '.join(changed)} as long as planned without calibration."
