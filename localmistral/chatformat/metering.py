"""Counts what a chat template spends (steps, characters, seconds) and stops what is too much.

`Meter` is one render's budget; `Metering` puts the statements that charge it into a parsed
template, so that nothing depends on signals, threads or the platform.
Knows nothing of filters, of messages or of tokens.
"""

import re
import time
from collections.abc import ItemsView, KeysView, Mapping, ValuesView
from typing import Any

from jinja2 import nodes
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from localmistral.errors import TemplateError

MAX_STEPS = 2_000_000  # about 2 s of Jinja; a conversation of 1,000 messages takes under 50,000
MAX_SECONDS = 10.0  # for a machine on which that many steps take longer
MAX_CHARS = 64_000_000  # characters made in one render, before the share for long conversations
TRIAL_STEPS, TRIAL_CHARS = 50_000, 2_000_000  # for conversations of a few words
MAX_INT_BITS = 4096
MAX_WIDTH_DIGITS = 4  # of a width or precision in a format
HINT = "Use another template, or the model's own if this one was given by hand."

_WIDE_FORMAT = re.compile(rf"%[^a-zA-Z%]*(?:\*|\d{{{MAX_WIDTH_DIGITS + 1},}})")
_WIDE_FIELD = re.compile(rf"\{{[^{{}}]*:[^{{}}]*(?:\{{|\d{{{MAX_WIDTH_DIGITS + 1},}})")


class LimitError(TemplateError):
    """The template wanted more steps, characters or time than it gets."""


def too_much(what: str) -> LimitError:
    return LimitError(f"The chat template {what}, so it was stopped.", HINT)


def shallow_chars(value: Any) -> int:
    """What making `value` cost, its parts being there already."""
    if isinstance(value, str):
        return len(value)
    return 8 * len(value) if isinstance(value, list | tuple | dict) else 0


class Meter:
    """What one render may still spend."""

    def __init__(self, *, chars: int = MAX_CHARS, steps: int = MAX_STEPS) -> None:
        self._char_limit = self._chars = chars
        self._step_limit = self._steps = steps
        self._deadline = time.monotonic() + MAX_SECONDS

    def charge(self, chars: int = 0) -> None:
        """Count one step that made `chars` characters. Errors: LimitError."""
        self.require(chars)
        self._chars -= chars
        self._steps -= 1
        if self._steps < 0:
            raise too_much(f"takes more than {self._step_limit:,} steps")
        if self._steps % 256 == 0 and time.monotonic() > self._deadline:
            raise too_much(f"takes longer than {MAX_SECONDS:g} s")

    def require(self, chars: int) -> None:
        """Refuse before making `chars` characters that would pass the limit."""
        if chars > self._chars:
            raise too_much(f"makes text of more than {self._char_limit:,} characters")

    def weigh(self, value: Any) -> int:
        """Charge for every part of `value`, parts that occur twice twice; the sum is returned."""
        if isinstance(value, str):
            self.charge(len(value))
            return len(value)
        stack = [value]
        before = self._chars
        while stack:
            item = stack.pop()
            if isinstance(item, str):
                self.charge(len(item))
            elif isinstance(item, int):
                self.charge(8 + item.bit_length() // 3)
            elif isinstance(item, Mapping):
                self.charge(8 * len(item))
                stack.extend(item)
                stack.extend(item.values())
            elif isinstance(item, list | tuple | set | KeysView | ValuesView | ItemsView):
                self.charge(8 * len(item))
                stack.extend(item)
            elif isinstance(item, Namespace):
                raise TemplateError("The chat template compares or prints a namespace.", HINT)
            else:
                self.charge(24)
        return before - self._chars

    # Operations whose result can be far larger than what goes in.

    def check_binop(self, operator: str, left: Any, right: Any) -> None:
        if operator == "+":
            self.require(shallow_chars(left) + shallow_chars(right))
        elif operator == "%" and isinstance(left, str):
            self.check_percent(left, right)
        elif operator == "*":
            self._check_product(left, right)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            check_bits(left.bit_length() * abs(right) if abs(left) > 1 else 0)

    def _check_product(self, left: Any, right: Any) -> None:
        if isinstance(left, int) and isinstance(right, int):
            check_bits(left.bit_length() + right.bit_length())
        elif isinstance(left, int):
            self.require(shallow_chars(right) * max(left, 0))
        elif isinstance(right, int):
            self.require(shallow_chars(left) * max(right, 0))

    def check_percent(self, template: str, values: Any) -> None:
        """Before `template % values`."""
        if _WIDE_FORMAT.search(template):
            raise too_much("formats with a width that is too large")
        largest = self.weigh(values) + 10**MAX_WIDTH_DIGITS
        self.require(len(template) + template.count("%") * largest)

    def check_fields(self, template: str, values: Any) -> None:
        """Before `template.format(...)`."""
        if _WIDE_FIELD.search(template):
            raise too_much("formats with a width that is too large")
        largest = self.weigh(values) + 10**MAX_WIDTH_DIGITS
        self.require(len(template) + template.count("{") * largest)

    def check_replace(self, text: str, old: Any, new: Any) -> None:
        if isinstance(old, str) and isinstance(new, str):
            self.require(len(text) + text.count(old) * len(new))


def check_bits(bits: int) -> None:
    if bits > MAX_INT_BITS:
        raise too_much(f"makes a number of more than {MAX_INT_BITS:,} bits")


class Metering(NodeTransformer):
    """Puts charges into a parsed template: loop turns, macros, and operations done in C."""

    def _counted(self, node: Any) -> nodes.Node:
        """A body that repeats begins with a charge for itself and its literal text."""
        self.generic_visit(node)
        chars = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        node.body.insert(0, nodes.ExprStmt(_call("tick", nodes.Const(chars)), lineno=node.lineno))
        return node  # type: ignore[no-any-return]

    visit_Macro = visit_CallBlock = visit_Block = _counted  # noqa: N815

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        self._counted(node)
        if isinstance(node.test, nodes.Expr):
            node.test = _call("charged", node.test)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _call("text_of", *node.nodes)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.expr = _weighed(node.expr)
        for operand in node.ops:
            operand.expr = _weighed(operand.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _call("charged", node) if isinstance(node.arg, nodes.Slice) else node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.key = _weighed(node.key)
        return node


def _weighed(node: nodes.Expr) -> nodes.Expr:
    return node if isinstance(node, nodes.Const) else _call("weighed", node)


def _call(method: str, *args: nodes.Expr) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(method), list(args), [], None, None)
