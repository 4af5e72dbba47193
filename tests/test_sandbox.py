"""Hostile templates: no way to Python, and an end to everything they start."""

from __future__ import annotations

import time
import tracemalloc

import pytest
from chat_samples import user

from localmistral.chatformat.metering import LimitError, Meter
from localmistral.chatformat.template import ChatTemplate
from localmistral.errors import TemplateError


def nested(start: str, step: str, end: str) -> str:
    """A value whose parts are shared 60 levels deep: small in memory, endless when walked."""
    return "{% set b = [1] %}{% set a = " + start + " %}" + step * 60 + "{{ " + end + " }}"


def loops(body: str, *, start: str = "''", turns: int = 99) -> str:
    """A loop that may keep something in `n.v`."""
    head = "{% set s = 'x' * 999999 %}{% set n = namespace(v=" + start + ") %}"
    return head + f"{{% for i in range({turns}) %}}{body}{{% endfor %}}"


LISTS = ("[1]", "{% set a = [a, a] %}{% set b = [b, b] %}")
TUPLES = ("(1,)", "{% set a = (a, a) %}")

ENDLESS = {
    "loops": loops(loops("", turns=99999), turns=99999),
    "printing loops": loops("{% for b in range(9999) %}xxxx{% endfor %}", turns=9999),
    "filtered loops": loops("{% for b in range(9999) if b < 0 %}{% endfor %}", turns=9999),
    "text * n": "{{ 'x' * 10**10 }}",
    "n * text": "{{ 10**10 * 'x' }}",
    "list * n": "{{ [1] * 10**10 }}",
    "%d": "{{ '%1000000000d' % 1 }}",
    "%*d": "{{ '%*d' % (1000000000, 1) }}",
    "%.f": "{{ '%.1000000000f' % 1 }}",
    "|format": "{{ '%1000000000d'|format(1) }}",
    "format": "{{ '{:1000000000d}'.format(1) }}",
    "format in format": "{{ '{:{}}'.format(1, 1000000000) }}",
    "format_map": "{{ '{a:1000000000d}'.format_map({'a': 1}) }}",
    "many fields": "{{ ('{0}' * 99999).format('x' * 999999) }}",
    "many %": "{{ ('%(a)s' * 99999) % {'a': 'x' * 999999} }}",
    "|center": "{{ 'a'|center(10**10) }}",
    "center": "{{ 'a'.center(10**10) }}",
    "ljust": "{{ 'a'.ljust(10**10) }}",
    "zfill": "{{ 'a'.zfill(10**10) }}",
    "expandtabs": "{{ '\t'.expandtabs(10**10) }}",
    "|replace": "{% set a = 'aaaaaaaaaa' %}" + "{% set a = a|replace('a', a) %}" * 12,
    "replace": "{% set a = 'aaaaaaaaaa' %}" + "{% set a = a.replace('a', a) %}" * 12,
    "replace nothing": "{% set a = 'aaaaaaaaaa' %}" + "{% set a = a.replace('', a) %}" * 12,
    "power": "{{ 9**(9**9) }}",
    "squares": "{% set a = 9**999 %}{{ a * a * a * a }}",
    "recursion": "{% macro m(x) %}{{ m(x + 1) }}{% endmacro %}{{ m(1) }}",
    "two recursions": "{% macro m(x) %}{% if x %}{{ m(x-1) ~ m(x-1) }}{% endif %}{% endmacro %}"
    "{{ m(60) }}",
    "block recursion": "{% block a %}{{ self.a() }}{% endblock %}",
    "loop recursion": "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "loop recursions": "{% for x in [1] recursive %}{{ loop([1, 2]) if loop.depth < 60 }}"
    "{% endfor %}",
    "list growth": loops("{% set n.v = n.v + n.v %}", start="[1]"),
    "text growth": loops("{% set n.v = n.v ~ n.v %}", start="'x'"),
    "kept text": loops("{% set n.v = n.v + [s ~ i] %}", start="[]", turns=9999),
    "kept slices": loops("{% set n.v = n.v + [s[i:]] %}", start="[]", turns=9999),
    "set blocks": "{% set a %}xx{% endset %}" + "{% set a %}{{ a }}{{ a }}{% endset %}" * 60,
    "call blocks": "{% macro m() %}{{ caller() }}{{ caller() }}{% endmacro %}"
    + "{% call m() %}" * 15
    + "x" * 2000
    + "{% endcall %}" * 15,
    "print nested": nested(*LISTS, "a"),
    "json nested": nested(*LISTS, "a|tojson"),
    "compare nested": nested(*LISTS, "a == b"),
    "test nested": nested(*LISTS, "a is eq b"),
    "in nested": nested(*LISTS, "a in [b]"),
    "select nested": nested(*LISTS, "[a]|select('eq', b)|list|length"),
    "index nested": nested(*LISTS, "[a].index(b)"),
    "sort nested": nested(*LISTS, "[a, b]|sort|length"),
    "max nested": nested(*LISTS, "[a, b]|max|length"),
    "%s nested": nested(*LISTS, "'%s' % (a,)"),
    "format nested": nested(*LISTS, "'{}'.format(a)"),
    "string nested": nested(*LISTS, "a|string|length"),
    "upper nested": nested(*LISTS, "a|upper"),
    "trim nested": nested(*LISTS, "a|trim"),
    "escape nested": nested(*LISTS, "a|e"),
    "join nested": nested(*LISTS, "[1, 2]|join(a)"),
    "raise nested": nested(*LISTS, "raise_exception(a)"),
    "views nested": nested("{'k': 1}", "{% set a = {'k': a, 'l': a} %}", "a.items()"),
    "key nested": nested(*TUPLES, "{a: 1}"),
    "get nested": nested(*TUPLES, "{}.get(a)"),
    "unique nested": nested(*TUPLES, "[a]|unique|list|length"),
    "lookup nested": nested(*TUPLES, "{}[a]"),
    "namespace nested": nested("namespace(k=1)", "{% set a = namespace(k=a, l=a) %}", "a"),
    "changed nested": nested(*LISTS, "1").replace(
        "{{ 1 }}", "{% for x in [a, b] %}{{ loop.changed(x) }}{% endfor %}"
    ),
    "join": "{{ ([{'a': 'x' * 999999}] * 9999)|map(attribute='a')|join }}",
    "str.join": "{{ ''.join(([{'a': 'x' * 999999}] * 9999)|map(attribute='a')) }}",
    "separators": "{{ range(9999)|join('x' * 999999) }}",
    "sum": "{{ ([[1] * 9999] * 9999)|sum(start=[])|length }}",
    "round": "{{ 1|round(1000000000, 'ceil') }}",
    "lipsum": "{{ lipsum(n=10**8) }}",
    "batch": "{{ [1]|batch(10**10, 'x')|list }}",
    "slice": "{{ [1]|slice(10**10)|list }}",
    "indent": "{{ 'a'|indent(10**10, first=true) }}",
    "indent lines": "{{ ('a\n' * 99999)|indent('x' * 99999) }}",
    "json indent": "{{ [1]|tojson(indent=10**9) }}",
    "json separators": "{{ ([1] * 9999)|tojson(separators=('x' * 999999, '')) }}",
    "strftime": "{{ strftime_now('%1000000000Y') }}",
    "deep list": loops("{% set n.v = [n.v] %}", turns=2000) + "{{ n.v|tojson }}",
}


@pytest.mark.parametrize("name", ENDLESS)
def test_what_would_never_end_is_stopped(name: str) -> None:
    tracemalloc.start()
    began = time.monotonic()
    with pytest.raises(TemplateError) as caught:
        ChatTemplate(ENDLESS[name]).render((user("hi"),))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert time.monotonic() - began < 30
    assert peak < 200_000_000
    assert caught.value.hint


def test_the_full_limit_holds_where_only_a_long_conversation_triggers_the_loop() -> None:
    source = (
        "{% for m in messages if m.content|length > 99 %}{% for a in range(99999) %}"
        "{% for b in range(99999) %}x{% endfor %}{% endfor %}{% endfor %}"
    )
    began = time.monotonic()
    with pytest.raises(LimitError, match="steps"):
        ChatTemplate(source).render((user("x" * 100),))
    assert time.monotonic() - began < 30


def test_time_is_limited_too(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = Meter()
    monkeypatch.setattr(time, "monotonic", lambda: float("inf"))
    with pytest.raises(LimitError, match="longer than 10 s"):
        for _ in range(1000):
            meter.charge()


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ ''['__class__'] }}",
        "{{ ''|attr('__class__') }}",
        "{{ messages|map(attribute='__class__')|list }}",
        "{{ '{0.__class__}'.format('') }}",
        "{% set f = '{0.__class__.__mro__}'.format %}{{ f('') }}",
        "{{ '{a.__class__}'.format_map({'a': 1}) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ namespace.__init__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ raise_exception.__func__ }}",
        "{{ strftime_now.__self__ }}",
        "{{ self.__init__ }}",
        "{{ self._TemplateReference__context }}",
        "{% for a in [1] %}{{ loop._iterable }}{% endfor %}",
        "{% macro m() %}{% endmacro %}{{ m._func }}",
        "{{ dict.mro() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'system'}) }}",
        "{{ environment.meter }}",
        "{% import 'os' as os %}",
    ],
)
def test_tricks_with_attributes_are_refused(source: str) -> None:
    with pytest.raises(TemplateError):
        ChatTemplate(source).render((user("hi"),))


def test_a_template_can_not_switch_the_meter_off() -> None:
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    for prefix in (
        "{% set environment = none %}",
        "{% set tick = none %}",
        "{% macro tick() %}{% endmacro %}",
    ):
        with pytest.raises(LimitError):
            ChatTemplate(prefix + loops).render((user("hi"),))
