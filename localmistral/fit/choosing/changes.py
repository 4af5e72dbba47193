"""How one plan differs from another, in words. Knows not why."""

from localmistral.fit.plan import Plan
from localmistral.units import format_tokens


def describe_changes(before: Plan, after: Plan) -> str:
    """What `after` has in place of what `before` had, to follow the word `with`."""
    old, new = before.placement, after.placement
    figures = [
        ("{} in place of {}", after.quant, before.quant),
        ("{} in place of {} tokens of context", _tokens(after), _tokens(before)),
        ("a {} in place of a {} cache", after.kv_type, before.kv_type),
        ("experts of {} in place of {} layers in RAM", _experts(after), _experts(before)),
        ("a ubatch of {} in place of {}", after.ubatch, before.ubatch),
    ]
    if new.gpu_layers:
        figures += [
            ("{} in place of {} layers on cards", new.gpu_layers, old.gpu_layers),
            ("{} in place of {} as tensor split", _split(after), _split(before)),
        ]
    changes = [text.format(now, then) for text, now, then in figures if now != then]
    if old.gpu_layers and not new.gpu_layers:
        changes.insert(0, "every layer on the CPU")
    return _join(changes or ["the same placement"])


def _join(parts: list[str]) -> str:
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last


def _tokens(plan: Plan) -> str:
    return format_tokens(plan.context)


def _split(plan: Plan) -> str:
    return ",".join(map(str, plan.placement.tensor_split))


def _experts(plan: Plan) -> int:
    return len(plan.placement.cpu_expert_layers)
