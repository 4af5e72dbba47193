"""The conversations that the demo model is trained on, and the held-out ones it is tested with.

`Maker(seed, pieces)` makes training conversations, `Maker(seed, pieces, heldout=True)` test ones;
`words.py` says what is held out. Knows nothing of tokens.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from demo_model.words import Words, is_heldout, is_heldout_pair
from demo_model.words import phrases as w

EFFORTS = ("none", "high")
_SUMS, _LOOKUPS = ("addition", "subtraction", "and plus", "and minus"), ("weather", "lookup")
EXAMPLES = (*_SUMS, "count", *_LOOKUPS, "chat", "fact", "other", "no_tool")
_COLUMNS = ("Ones", "Tens", "Hundreds", "Thousands")


@dataclass(frozen=True, slots=True)
class Turn:
    """One assistant message: thinking (seen with effort "high" only), and a text or a tool call."""

    think: str
    text: str = ""
    call: tuple[str, dict[str, Any]] | None = None


@dataclass(slots=True)
class Conversation:
    """`messages` holds (role, text or Turn); a follow-up builds on the number `result`."""

    effort: str
    system: str | None = None
    tools: list[dict[str, Any]] = field(default_factory=list)
    messages: list[tuple[str, str | Turn]] = field(default_factory=list)
    result: int | None = None

    def add(self, asked: str, turn: Turn) -> None:
        self.messages += [("user", asked), ("assistant", turn)]


def _columns(a: int, b: int) -> list[tuple[str, int, int, bool]]:
    """(name, digit of a, digit of b, is the last) of each decimal column, ones first."""
    width = max(len(str(a)), len(str(b)))
    return [(_COLUMNS[i], a // 10**i % 10, b // 10**i % 10, i == width - 1) for i in range(width)]


def add_steps(a: int, b: int) -> str:
    """Spell out a written addition, column by column."""
    parts, carry = [f"{a} + {b}."], 0
    for name, p, q, last in _columns(a, b):
        total = p + q + carry
        part = f"{name}: {p} + {q}{' + 1' if carry else ''} = {total}"
        carry = total // 10
        parts.append(part + (f", write {total % 10}, carry 1." if carry and not last else "."))
    return " ".join([*parts, f"Result: {a + b}."])


def subtract_steps(a: int, b: int) -> str:
    """Spell out a written subtraction, column by column."""
    if a < b:
        turned = subtract_steps(b, a)
        return f"{a} - {b}. {a} is less than {b}, so I turn it around: {turned} Negative: {a - b}."
    parts, borrow = [f"{a} - {b}."], 0
    for name, p, q, _ in _columns(a, b):
        taken = " - 1" if borrow else ""
        borrowed = int(p < q + borrow)
        left = p + 10 * borrowed - q - borrow
        parts.append(
            f"{name}: {p + 10 * borrowed} - {q}{taken} = {left}"
            + (", borrow 1." if borrowed else ".")
        )
        borrow = borrowed
    return " ".join([*parts, f"Result: {a - b}."])


class Maker(Words):
    """Draws conversations from a seed."""

    # -- exchanges: each adds a question and its answer --------------------------------------

    def sum(self, c: Conversation, start: int | None = None, plus: bool | None = None) -> None:
        """An addition or a subtraction; a follow-up if the result it goes on from is given."""
        r = self.rng
        plus = self.chance(0.6) if plus is None else plus
        if start is None:
            a, b = self.until(
                lambda: (self.number(), self.number()), lambda pair: is_heldout_pair(*pair)
            )
            if not plus and a < b and self.chance(0.85):
                a, b = b, a
            asked = self.vary(r.choice(w.add_phrases if plus else w.sub_phrases).format(a=a, b=b))
        else:
            top = 99 if plus else max(1, min(start, 99))

            def draw() -> tuple[int, int]:
                return start, r.randint(1, top if self.chance(0.5) else min(9, top))

            a, b = self.until(draw, lambda pair: is_heldout_pair(*pair)) if start > 9 else draw()
            asked = self.vary(r.choice(w.more_add if plus else w.more_sub).format(b=b))
        result = a + b if plus else a - b
        think = add_steps(a, b) if plus else subtract_steps(a, b)
        c.add(asked, Turn(think, f"{a} {'+' if plus else '-'} {b} = {result}."))
        c.result = result if result > 9 else None

    def count(self, c: Conversation) -> None:
        r = self.rng

        def draw() -> tuple[int, int]:
            a = (
                1
                if self.chance(0.2)
                else r.randint(0, 12)
                if self.chance(0.5)
                else r.randint(10, 95)
            )
            return a, a + (r.randint(1, 15) if self.chance(0.75) else r.randint(15, 35))

        a, b = self.until(draw, lambda pair: is_heldout("count", *pair))
        phrases = w.count_to_phrases if a == 1 and self.chance(0.4) else w.count_phrases
        asked = self.vary(r.choice(phrases).format(a=a, b=b))
        numbers = ", ".join(map(str, range(a, b + 1))) + "."
        c.add(asked, Turn(f"I start at {a} and stop at {b}.", numbers))

    def repeat(self, c: Conversation) -> None:
        """Words to repeat: the quickest way to teach a small model to copy."""
        said = self.words(1, self.rng.choice((4, 12, 36)))
        c.add(self.rng.choice(w.repeat_phrases).format(x=said), Turn("I repeat the words.", said))

    def chat(self, c: Conversation) -> None:
        r = self.rng
        chat = r.choices(w.chat, weights=[kind["weight"] for kind in w.chat])[0]
        c.add(self.vary(r.choice(chat["questions"])), Turn(chat["think"], chat["answer"]))

    def fact(self, c: Conversation) -> None:
        r = self.rng
        if self.chance(0.6):
            country = r.choice(list(w.capitals))
            asked = r.choice(w.capital_phrases).format(x=country)
            text = f"The capital of {country} is {w.capitals[country]}."
        else:
            asked, text = r.choice(list(w.facts.items()))
        c.add(self.vary(asked), Turn("I know this.", text))

    def other(self, c: Conversation) -> None:
        """A request that the model cannot serve, and says so."""
        r = self.rng
        if not self.heldout and self.chance(0.25):
            asked = self.words(2, 10).capitalize() + r.choice((".", "?", ""))
        else:
            asked = r.choice(w.other_phrases).format(
                x=self.topic(), y=self.topic(), a=self.number(), b=self.number()
            )
        c.add(self.vary(asked), Turn("I was not trained for this.", w.sorry))

    # -- tools -------------------------------------------------------------------------------

    def tool(self, subject: str) -> dict[str, Any]:
        """The definition of a tool that looks up `subject` in a place."""
        r = self.rng
        noun = subject.replace(" ", "_")
        doc = r.choice(w.tool_docs).format(n=subject)
        name = r.choice(w.tool_names).format(n=noun, N=noun.capitalize(), m=self.word())
        if self.chance(0.07):
            # only the description tells what it is for
            name = self.word().lower() + r.choice(("", "_api", "_tool"))
        elif self.chance(0.1):
            doc = ""
        place = r.choice(w.place_names) if self.chance(0.96) else self.word().lower()
        about: dict[str, Any] = {"type": "string"}
        if self.chance(0.6):
            about["description"] = r.choice(w.place_docs).format(e=r.choice(w.cities))
        if self.chance(0.2):
            about = dict(reversed(about.items()))
        properties: dict[str, Any] = {place: about}
        extras = list(w.extra_parameters.items())
        properties |= dict(r.sample(extras, r.choice((0, 0, 0, 1, 1, 2))))
        if self.chance(0.15):
            properties = dict(reversed(properties.items()))
        parameters: dict[str, Any] = {"type": "object", "properties": properties}
        if len(properties) > 1 or self.chance(0.85):
            parameters["required"] = [place]
        if self.chance(0.12):
            parameters["additionalProperties"] = False
        if self.chance(0.15):
            parameters = dict(reversed(parameters.items()))
        return _function("".join(ch for ch in name if ch.isascii()) or "lookup", doc, parameters)

    def other_tool(self) -> dict[str, Any]:
        name, doc, keys = self.rng.choice(w.other_tools)
        properties = {key: {"type": "string"} for key in keys}
        parameters = {"type": "object", "properties": properties, "required": list(keys)}
        return _function(name, doc, parameters)

    def subject(self) -> str:
        if self.chance(0.6):
            return "weather"
        return self.rng.choice(w.subjects) if self.chance(0.7) else self.syllables()

    def tool_result(self, subject: str, place: str) -> tuple[str, str]:
        """What a tool returns, and how the answer reports it."""
        r = self.rng
        degrees = r.choice((r.randint(-15, 42), r.randint(-15, 42), round(r.uniform(-9, 39), 1)))
        if subject in ("time", "local time"):
            values: list[Any] = [f"{r.randint(0, 23):02d}:{r.randint(0, 59):02d}"]
        elif subject in ("weather", "forecast", "temperature") or self.chance(0.3):
            values = [
                r.choice((degrees, f"{degrees} C", f"{degrees}°C", f"{degrees} degrees")),
                r.choice(w.skies),
            ]
        else:
            values = [r.choice((r.randint(0, 99999), self.word(), self.words(1, 3)))]
        if self.chance(0.1) and not self.heldout:
            values[-1] = self.words(1, 3)
        if self.chance(0.25):
            values.append(
                r.choice((f"wind {r.randint(1, 90)} km/h", r.randint(0, 100), self.word()))
            )
        if self.chance(0.3):
            r.shuffle(values)
        if self.chance(0.5):
            plain = r.choice((", ", ", ", " and ", "; ", " ")).join(map(str, values))
            return plain, f"In {place}: {plain}."
        keys = [*w.result_keys, subject.replace(" ", "_"), self.word().lower()]
        table: dict[str, Any] = dict(zip(r.sample(keys, len(values)), values, strict=True))
        said = f"In {place}: " + ", ".join(f"{key} {value}" for key, value in table.items()) + "."
        if self.chance(0.35):
            table = {r.choice(("city", "city", "location", "place")): place, **table}
        layout: dict[str, Any] = r.choice(({}, {}, {}, {"separators": (",", ":")}, {"indent": 2}))
        return json.dumps(table, ensure_ascii=False, **layout), said

    def lookup(
        self, c: Conversation, subject: str, tool: dict[str, Any] | None, asked: str, place: str
    ) -> None:
        """A question about a place: a call, its result and the answer; or a refusal."""
        if tool is None:
            think = f"The user wants the {subject} in {place}. I have no tool for it."
            c.add(asked, Turn(think, f"I cannot look up the {subject}: I have no tool for it."))
            return
        function = tool["function"]
        parameters = function["parameters"]
        key = parameters.get("required", list(parameters["properties"]))[0]
        think = f"The user wants the {subject} in {place}. I call {function['name']}."
        c.add(asked, Turn(think, call=(function["name"], {key: place})))
        result, said = self.tool_result(subject, place)
        c.messages += [("tool", result), ("assistant", Turn("I have the result.", said))]

    def ask(self, subject: str) -> tuple[str, str]:
        """A question about `subject` in a place, and the place as it is spelt there."""
        place = self.place()
        is_weather = subject == "weather" and self.chance(0.8)
        text = self.rng.choice(w.weather_phrases if is_weather else w.lookup_phrases)
        shown = self.vary(text.replace("{c}", "\0").replace("{n}", subject))
        return shown.replace("\0", place), place

    def lookups(self, c: Conversation, most: int) -> None:
        """One to `most` lookups with one set of tools; now and then a question that needs none."""
        r = self.rng
        subjects = list(dict.fromkeys(self.subject() for _ in range(r.choice((1, 1, 1, 1, 2, 2)))))
        tools = {subject: self.tool(subject) for subject in subjects}
        c.tools = list(tools.values())
        if self.chance(0.25):
            c.tools.append(self.other_tool())
        names = {t["function"]["name"] for t in c.tools}
        if len(names) < len(c.tools):
            c.tools = c.tools[:1]
            subjects = subjects[:1]
        r.shuffle(c.tools)
        missing = [s for s in ("weather", "time") if s not in subjects and self.chance(0.2)]
        subject = ""
        for _ in range(r.randint(1, most)):
            if most > 1 and self.chance(0.15):
                r.choice((self.sum, self.chat, self.other, self.fact))(c)
                subject = ""
                continue
            if subject and self.chance(0.5):
                place = self.place()
                asked = self.vary(r.choice(w.more_city)).replace("{C}", "{c}").format(c=place)
            else:
                subject = r.choice([*subjects, *subjects, *missing])
                asked, place = self.ask(subject)
            tool = tools[subject] if subject in subjects else None
            self.lookup(c, subject, tool, asked, place)

    # -- conversations -----------------------------------------------------------------------

    def start(self, effort: str | None = None) -> Conversation:
        """An empty conversation; one in three has a system prompt."""
        r = self.rng
        c = Conversation(effort or r.choice(EFFORTS))
        if self.chance(0.33):
            kind = r.random()
            c.system = r.choice(w.systems)
            if kind < 0.3:
                c.system = self.words(2, 12).capitalize() + "."
            elif kind < 0.4:
                name, kind_of = self.word().capitalize(), ("a helpful", "a friendly", "an honest")
                c.system = f"You are {name}, {r.choice(kind_of)} assistant."
            elif kind < 0.5:
                year, month, day = r.randint(2020, 2030), r.randint(1, 12), r.randint(1, 28)
                c.system = f"Today is {year}-{month:02d}-{day:02d}. {c.system}"
        return c

    def conversation(self, copying: float = 0.08) -> Conversation:
        """A training conversation; `copying` is the share of those that repeat words."""
        r = self.rng
        c = self.start()
        if self.chance(copying):
            for _ in range(r.randint(1, 3)):
                self.repeat(c)
            return c
        if self.chance(0.24):
            self.lookups(c, 4)
            return c
        if self.chance(0.06):
            c.tools = [self.tool(self.subject()) if self.chance(0.7) else self.other_tool()]
        if c.effort == "none" and self.chance(0.4):
            c.effort = "high"  # most is learnt where the steps are shown
        kinds = (self.sum, self.count, self.chat, self.fact, self.other, self.no_tool)
        weights = (58, 22, 6, 5, 5, 4) if c.effort == "high" else (6, 44, 15, 11, 13, 11)
        for _ in range(r.choice((1, 2, 3, 4))):
            if c.result is not None and c.result < 900 and self.chance(0.75):
                self.sum(c, c.result)
                continue
            c.result = None
            r.choices(kinds, weights=weights)[0](c)
        return c

    def no_tool(self, c: Conversation) -> None:
        """A question for a tool that is not there."""
        if c.tools:
            return self.chat(c)
        subject = self.subject()
        asked, place = self.ask(subject)
        return self.lookup(c, subject, None, asked, place)

    def example(self, kind: str, effort: str) -> Conversation:
        """A conversation of one exchange of a kind of EXAMPLES; two of them for a follow-up."""
        c = self.start(effort)
        if kind in ("addition", "subtraction"):
            self.sum(c, plus=kind == "addition")
        elif kind in ("and plus", "and minus"):
            while c.result is None or not 60 <= c.result < 200:  # all have held-out followers
                c.messages.clear()
                self.sum(c)
            self.sum(c, c.result, plus=kind == "and plus")
        elif kind in _LOOKUPS:
            subject = "weather" if kind == "weather" else self.rng.choice(w.subjects)
            c.tools = [self.tool(subject), *([self.other_tool()] if self.chance(0.3) else [])]
            asked, place = self.ask(subject)
            self.lookup(c, subject, c.tools[0], asked, place)
        else:
            getattr(self, kind)(c)
        return c


def _function(name: str, doc: str, parameters: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "function",
        "function": {"name": name, "description": doc, "parameters": parameters},
    }


def openai_request(
    c: Conversation, upto: int | None = None, keep_thinking: bool = True
) -> dict[str, Any]:
    """A conversation, or its first `upto` messages, as an OpenAI-style request.

    Earlier thinking can be left out, as many clients do.
    """
    messages: list[dict[str, Any]] = [{"role": "system", "content": c.system}] if c.system else []
    shown = c.messages[:upto]
    call_id = ""
    for n, (role, body) in enumerate(shown):
        message: dict[str, Any] = {"role": role, "content": body}
        if role == "tool":
            message["tool_call_id"] = call_id
        if isinstance(body, Turn):
            message["content"] = [{"type": "text", "text": body.text}] if body.text else []
            if c.effort == "high" and (keep_thinking or n == len(shown) - 1):
                message["content"].insert(0, {"type": "thinking", "thinking": body.think})
            if body.call:
                call_id = f"{n:09d}"
                function = {
                    "name": body.call[0],
                    "arguments": json.dumps(body.call[1], ensure_ascii=False),
                }
                message["tool_calls"] = [{"id": call_id, "type": "function", "function": function}]
            message["content"] = message["content"] or ""
        messages.append(message)
    request: dict[str, Any] = {"model": "demo", "messages": messages, "reasoning_effort": c.effort}
    if c.tools:
        request["tools"] = c.tools
    return request
