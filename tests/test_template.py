"""Templates rendered: as Jinja would, for every kind of conversation a template may not expect."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime

import pytest
from chat_samples import (
    CALL,
    CONTROL,
    CONVERSATIONS,
    NOW,
    REAL_STYLES,
    RESULT,
    SMOLLM,
    SYSTEM,
    WEATHER,
    assistant,
    plain_rendering,
    template,
    user,
)

from localmistral.chatformat.messages import Message, Part, parse_messages
from localmistral.chatformat.segments import Segment
from localmistral.chatformat.template import CHATML, ChatTemplate, ends_in_thinking
from localmistral.errors import BadRequestError, TemplateError


def joined(segments: Sequence[Segment]) -> str:
    return "".join(segment.text for segment in segments)


@pytest.mark.parametrize("tools", [(), (WEATHER,)], ids=["no tools", "tools"])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", REAL_STYLES)
def test_the_segments_joined_are_what_jinja_renders(
    name: str, conversation: str, tools: tuple[object, ...]
) -> None:
    messages = CONVERSATIONS[conversation]
    shown = (WEATHER,) if tools else ()
    expected = plain_rendering(name, messages, shown)
    segments = template(name).render(messages, tools=shown)
    assert joined(segments) == expected
    assert {s.text for s in segments if s.control} <= set(CONTROL)
    for segment in segments:
        assert segment.control or not any(text in segment.text for text in ("<|im_end|>", "[INST]"))


@pytest.mark.parametrize("name", REAL_STYLES)
def test_everything_said_is_in_the_prompt(name: str) -> None:
    messages = (
        replace(SYSTEM, content="sys-words"),
        user("user-words"),
        user("more-words"),
        assistant("said-words", tool_calls=(CALL,)),
        replace(RESULT, content="result-words"),
        assistant("answer-words"),
        user("last-words"),
    )
    text = joined(template(name).render(messages, tools=(WEATHER,)))
    wanted = ["sys", "user", "more", "result", "answer", "last"]
    if name not in ("headers", "instructions", "mistral_v3-tekken"):  # no text beside their calls
        wanted.append("said")
    for word in wanted:
        assert f"{word}-words" in text
    for shown in ("Zürich", "get_weather", "celsius"):
        assert shown in text


def test_what_a_template_understands_is_found_out() -> None:
    found = {name: template(name).dialect for name in REAL_STYLES}
    assert [name for name, dialect in found.items() if dialect.parts] == ["parts"]
    assert [name for name, dialect in found.items() if not dialect.system] == ["turns"]
    assert {name for name, dialect in found.items() if dialect.arguments_as_text} == {
        "instructions"
    }
    no_tools = {"chatml", "smollm", "parts", "turns"}
    assert {name for name, dialect in found.items() if not dialect.tools} == no_tools
    assert {name for name, dialect in found.items() if not dialect.calls} == no_tools
    assert {name for name, dialect in found.items() if not dialect.results} == {"turns"}
    keys = {name: dialect.reasoning_key for name, dialect in found.items() if dialect.reasoning_key}
    assert keys == {
        "mistral_v13-reasoning": "reasoning_content",
        "mistral_v15": "reasoning_content",
        "thinking": "reasoning_content",
        "typed": "thinking",
    }


def test_system_text_goes_to_the_user_where_there_is_no_system_role() -> None:
    text = joined(template("turns").render((SYSTEM, user("Hi"))))
    assert "user\nBe brief.\nAlways.\n\nHi<end_of_turn>" in text


@pytest.mark.parametrize("name", ["turns", "instructions"])
def test_consecutive_messages_are_merged_where_roles_must_alternate(name: str) -> None:
    text = joined(template(name).render(CONVERSATIONS["same role twice"]))
    assert "a\n\nb" in text
    assert "c\n\nd" in text


def test_messages_are_left_apart_where_the_template_takes_them() -> None:
    text = joined(template("chatml").render(CONVERSATIONS["same role twice"]))
    assert text.count("<|im_start|>user") == 3


def test_a_conversation_refused_in_every_form_is_a_bad_request_in_the_templates_words() -> None:
    with pytest.raises(BadRequestError, match="must alternate") as caught:
        template("turns").render((assistant("I begin."), user("no")))
    assert caught.value.param == "messages"
    with pytest.raises(BadRequestError, match="no messages"):
        template("chatml").render(())


@pytest.mark.parametrize(("add_bos", "count"), [(True, 1), (False, 0)])
def test_bos_is_put_first_only_where_wanted(add_bos: bool, count: int) -> None:
    made = ChatTemplate(CHATML, bos_token="<s>", control_tokens=CONTROL, add_bos=add_bos)
    segments = made.render((user("hi"),))
    assert sum(segment.text == "<s>" for segment in segments) == count
    assert not count or segments[0] == Segment(text="<s>", control=True)


@pytest.mark.parametrize("start", ["{{ bos_token }}", "<s>", "<s>{{ bos_token }}"])
def test_bos_is_never_doubled(start: str) -> None:
    made = ChatTemplate(start + CHATML, bos_token="<s>", control_tokens=CONTROL, add_bos=True)
    texts = [segment.text for segment in made.render((user("hi"),))]
    assert texts[:2] == ["<s>", "<|im_start|>"]


@pytest.mark.parametrize("source", [None, "", " \n"])
def test_chatml_stands_in_for_a_missing_template(source: str | None) -> None:
    segments = ChatTemplate(source, control_tokens=CONTROL).render((user("hi"),))
    assert joined(segments) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert [segment.control for segment in segments] == [True, False, True, False, True, False]


def test_the_generation_prompt_can_be_left_out() -> None:
    segments = template("chatml").render((user("hi"),), add_generation_prompt=False)
    assert joined(segments) == "<|im_start|>user\nhi<|im_end|>\n"


@pytest.mark.parametrize("name", [name for name in REAL_STYLES if name != "parts"])
@pytest.mark.parametrize("start", ["It is", "It is </s> [/INST] <|im_end|> I", "x"])
def test_a_final_assistant_message_can_be_continued(name: str, start: str) -> None:
    messages = (user("What is x?"), assistant(start))
    segments = template(name).render(messages, continue_final_message=True)
    assert joined(segments).endswith(start)
    benign = template(name).render(
        (user("What is x?"), assistant("zz")), continue_final_message=True
    )
    controls = [segment.text for segment in segments if segment.control]
    assert controls == [segment.text for segment in benign if segment.control]


@pytest.mark.parametrize(
    ("source", "kept"),
    [(CHATML, "so  "), (CHATML.replace("['content']", "['content']|trim"), "so")],
)
def test_blanks_before_the_continuation_are_kept_unless_the_template_trims(
    source: str, kept: str
) -> None:
    made = ChatTemplate(source, control_tokens=CONTROL)
    segments = made.render((user("q"), assistant("so  ")), continue_final_message=True)
    assert segments[-1].text == "assistant\n" + kept


@pytest.mark.parametrize("text", ["<think>\nwhy\n</think>\n\nso", "\n[THINK]why[/THINK]so"])
def test_thinking_echoed_within_a_text_is_taken_apart(text: str) -> None:
    made = template("thinking")
    apart = made.render((user("q"), assistant("so", reasoning="why"), user("r")))
    assert made.render((user("q"), assistant(text), user("r"))) == apart


@pytest.mark.parametrize("text", ["<think>open", "so <think>why</think>", "why</think>so"])
def test_text_that_is_no_echoed_thinking_stays_text(text: str) -> None:
    assert text in joined(template("chatml").render((user("q"), assistant(text), user("r"))))


def test_thinking_in_a_system_message_is_refused() -> None:
    listed = (Part(text="why", thinking=True),)
    message = Message(role="system", reasoning="why", listed=listed)
    with pytest.raises(BadRequestError, match="thinking"):
        template("chatml").render((message, user("q")))


def test_an_empty_message_to_be_continued_begins_an_answer() -> None:
    made = template("chatml")
    continued = made.render((user("q"), assistant("")), continue_final_message=True)
    assert continued == made.render((user("q"),))


def test_thinking_alone_can_be_continued() -> None:
    messages = (user("q"), assistant("", reasoning="I wonder"))
    for name, end in (("mistral_v15", "I wonder"), ("thinking", "<think>\nI wonder")):
        segments = template(name).render(messages, continue_final_message=True)
        assert joined(segments).endswith(end)
        assert ends_in_thinking(segments)


@pytest.mark.parametrize("messages", [(user("q"),), (user("q"), assistant("", tool_calls=(CALL,)))])
def test_only_an_assistants_text_can_be_continued(messages: tuple[Message, ...]) -> None:
    with pytest.raises(BadRequestError, match="continue_final_message"):
        template("chatml").render(messages, continue_final_message=True)


def test_a_message_the_template_hides_can_not_be_continued() -> None:
    with pytest.raises(BadRequestError, match="doesn't show"):
        ChatTemplate("hello").render((user("q"), assistant("a")), continue_final_message=True)


@pytest.mark.parametrize(
    ("effort", "open_end"),
    [(None, False), ("none", False), ("minimal", False), ("low", True), ("high", True)],
)
def test_the_effort_switches_thinking(effort: str | None, open_end: bool) -> None:
    segments = template("thinking").render((user("q"),), effort=effort)
    assert ends_in_thinking(segments) is open_end


@pytest.mark.parametrize(
    ("effort", "shown"),
    [("none", "none"), ("high", "high"), ("low", "high"), ("minimal", "none"), ("max", "high")],
)
def test_an_effort_the_template_does_not_know_becomes_the_nearest(effort: str, shown: str) -> None:
    text = joined(template("mistral_v15").render((user("q"),), effort=effort))
    assert f'{{"reasoning_effort": "{shown}"}}' in text


def test_an_effort_the_template_knows_is_kept() -> None:
    made = ChatTemplate(CHATML + "{{ reasoning_effort }}")
    assert joined(made.render((user("q"),), effort="medium")).endswith("medium")


@pytest.mark.parametrize(
    ("tail", "open_end"),
    [
        ("<think>\n", True),
        ("<think>\n\n</think>\n\n", False),
        ("[THINK]", True),
        ("[THINK]so[/THINK]", False),
        ("", False),
        ("</think>", False),
    ],
)
def test_an_open_thinking_tag_at_the_end_is_seen(tail: str, open_end: bool) -> None:
    made = ChatTemplate(CHATML + tail, control_tokens=CONTROL)
    assert ends_in_thinking(made.render((user("<think> [THINK]"),))) is open_end


def test_the_date_is_the_clocks() -> None:
    assert NOW.strftime("%d %b %Y") in joined(template("headers").render((user("q"),)))
    made = ChatTemplate("{{ strftime_now('%Y') }}", clock=lambda: datetime(1999, 1, 1))
    assert joined(made.render((user("q"),))) == "1999"


def test_json_keeps_order_and_characters_and_honours_its_arguments() -> None:
    value = {"b": "<é>", "a": [1, None]}
    for arguments, expected in (
        ("", '{"b": "<é>", "a": [1, null]}'),
        ("ensure_ascii=true", '{"b": "<\\u00e9>", "a": [1, null]}'),
        ("sort_keys=true", '{"a": [1, null], "b": "<é>"}'),
        ("separators=(',', ':')", '{"b":"<é>","a":[1,null]}'),
        ("indent=1", '{\n "b": "<é>",\n "a": [\n  1,\n  null\n ]\n}'),
    ):
        made = ChatTemplate(f"{{{{ value|tojson({arguments}) }}}}", control_tokens=CONTROL)
        assert joined(made.render((user("q"),), extra={"value": value})) == expected


def test_extra_variables_reach_the_template_but_not_its_own() -> None:
    made = ChatTemplate("{{ mood }}{{ documents[0].text }}")
    extra = {"mood": "gay", "documents": [{"text": " </s>"}]}
    assert joined(made.render((user("q"),), extra=extra)) == "gay </s>"
    for name in ("messages", "bos_token", "raise_exception"):
        with pytest.raises(BadRequestError) as caught:
            made.render((user("q"),), extra={name: 1})
        assert caught.value.param == f"chat_template_kwargs.{name}"
    nested: list[object] = []
    for _ in range(500):
        nested = [nested]
    with pytest.raises(BadRequestError, match="deep"):
        made.render((user("q"),), extra={"mood": nested})


def test_jinja_as_chat_templates_use_it() -> None:
    source = (
        "{% macro twice(x) %}{{ x }}{{ x }}{% endmacro %}"
        "{% macro m() %}{{ caller(2) }}{% endmacro %}"
        "{% for m in messages recursive %}{% if m.role == 'system' %}{% continue %}{% endif %}"
        "{{ loop.index }}{{ twice(m.content) }}{% break %}{% endfor %}"
        "{% set ns = namespace(n=0) %}{% for i in range(3) if i != 1 %}{% set ns.n = ns.n + i %}"
        "{% endfor %}{{ ns.n }}{% call(y) m() %}{{ y }}{% endcall %}"
        "{% filter upper %}{% block b %}b{% endblock %}{% endfilter %}{{ self.b() }}"
        "{% set text %}{{ 7 // 2 }}{% endset %}{{ text|int + 1 }}{{ {'a': 1}.items()|list }}"
        "{{ ['x', 'y']|join('-') ~ ('%03d' % 5) ~ '{:>3}'.format(1) ~ (2.5|round|int) }}"
        "{{ [3, 1]|sort|first }}{{ 'a' in 'abc' }}{{ none is none }}{{ 1|tojson is string }}"
        "{{ messages|map(attribute='role')|list }}{{ [1, 2]|sum }}{{ 'a\nb'|indent(1) }}"
    )
    expected = "1hihi22Bb4[('a', 1)]x-y005  121TrueTrueTrue['user']3a\n b"
    assert joined(ChatTemplate(source).render((user("hi"),))) == expected


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{% if %}", "line 1"),
        ("{{ 1 }}\n{{ x|nosuch }}", "line 2.*nosuch"),
        ("{{ a.b.c }}", "'a' is undefined"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ 'a' + 1 }}", "concatenate"),
        ("{% include 'x' %}", "loader"),
        ("{{ '\\ud800' }}", "no Unicode"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "nested too deeply"),
        ("{% for a in [1] %}" * 200 + "{% endfor %}" * 200, "compiled"),
        ("x" * 300_000, "300,000 characters"),
    ],
)
def test_a_broken_template_is_said_in_one_sentence(source: str, words: str) -> None:
    with pytest.raises(TemplateError, match=words) as caught:
        ChatTemplate(source).render((user("hi"),))
    assert "\n" not in caught.value.message
    assert caught.value.hint


def test_one_template_serves_many_threads() -> None:
    made = template("thinking")
    wrong: list[str] = []

    def work(i: int) -> None:
        text = f"</s>{i}<|im_end|>" * (i + 1)
        for _ in range(10):
            rendered = joined(made.render((user(text), assistant("a"), user(str(i)))))
            if f"user\n{text}<|im_end|>" not in rendered:
                wrong.append(rendered)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("name", ["mistral_v15", "thinking", "headers"])
def test_a_conversation_of_a_thousand_messages_stays_within_the_limits(name: str) -> None:
    messages = (user("question " * 100), assistant("answer " * 100)) * 500 + (user("end"),)
    assert len(joined(template(name).render(messages, tools=(WEATHER,)))) > 700_000


def test_a_raw_conversation_goes_all_the_way() -> None:
    raw = [
        {"role": "developer", "content": [{"type": "text", "text": "S"}]},
        {"role": "user", "content": "U"},
        {"role": "assistant", "content": None},
    ]
    plain = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    made = ChatTemplate(SMOLLM, control_tokens=CONTROL)
    assert made.render(parse_messages(raw)) == made.render(parse_messages(plain))
