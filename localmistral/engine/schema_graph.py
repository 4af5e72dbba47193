"""How the schemas inside a JSON schema lead to one another: loops, and what has to be multiplied.

Nodes are numbers, edges come from the caller; nothing recurses. Knows no keyword.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

Edges = Callable[[int], Iterable[int]]


def find_loop(nodes: Iterable[int], edges: Edges) -> int | None:
    """A node that leads back to itself, or None. Depth-first, on a stack of its own."""
    done: set[int] = set()
    for start in nodes:
        if start in done:
            continue
        on_path = {start}
        path = [(start, iter(edges(start)))]
        while path:
            node, children = path[-1]
            child = next(children, None)
            if child is None:
                path.pop()
                on_path.discard(node)
                done.add(node)
            elif child in on_path:
                return child
            elif child not in done:
                on_path.add(child)
                path.append((child, iter(edges(child))))
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What the value of one schema has to satisfy: its own weight, all of some, one of each group.

    `inner` are schemas of other values (properties, items), which never add up with `own`.
    """

    own: int = 0
    all_of: tuple[int, ...] = ()
    any_of: tuple[tuple[int, ...], ...] = ()
    inner: tuple[int, ...] = ()


def weigh_merged(parts: Mapping[int, Parts], limit: int) -> dict[int, int]:
    """How many weights can come together in one value of each node, counted up to `limit`.

    The least solution of weight = max(own, inner) + sum(all_of) + max of each any_of group; it
    exists for loops as well, since weights only grow and stop at `limit`.
    """
    weights = dict.fromkeys(parts, 0)
    users: dict[int, list[int]] = {node: [] for node in parts}
    for node, part in parts.items():
        groups = (child for group in part.any_of for child in group)
        for child in (*part.all_of, *groups, *part.inner):
            users[child].append(node)
    todo = list(parts)
    while todo:
        node = todo.pop()
        part = parts[node]
        weight = max([part.own, *(weights[child] for child in part.inner)])
        weight += sum(weights[child] for child in part.all_of)
        weight += sum(max(weights[child] for child in group) for group in part.any_of)
        if min(weight, limit) > weights[node]:
            weights[node] = min(weight, limit)
            todo += users[node]
    return weights


def count_cases(parts: Mapping[int, Parts], limit: int) -> dict[int, int]:
    """Cases that each node multiplies out to: a product over its parts, a sum within a group.

    Counted up to `limit`. `parts` must have no loop through all_of and any_of.
    """
    cases: dict[int, int] = {}
    for start in parts:
        path = [start]
        while path:
            node = path[-1]
            part = parts[node]
            children = [*part.all_of, *(child for group in part.any_of for child in group)]
            missing = [child for child in children if child not in cases]
            if missing and node not in cases:
                path += missing
                continue
            path.pop()
            product = 1
            for group in (*((child,) for child in part.all_of), *part.any_of):
                product = min(limit, product * sum(cases[child] for child in group))
            cases[node] = product
    return cases
