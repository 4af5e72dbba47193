"""Brings a conversation into the one form that a Mistral family's template renders exactly.

One function per rule; each does what mistral-common does to a request before encoding it, or, where
mistral-common refuses, what helps an agent most:

| mistral-common refuses                        | here                                           |
|-----------------------------------------------|------------------------------------------------|
| system after an assistant or a result         | stands where it is (v3: joins the system text) |
| an assistant message that says nothing        | is left out                                    |
| an assistant message at the end               | is closed, or open if it is to be continued    |
| calls without results before the next answer  | are rendered without them                      |
| text beside calls (v3)                        | is rendered before the calls                   |
| call ids other than nine letters or digits    | are replaced by such (v3, v7, v11)             |
| thinking where there are no [THINK] tokens    | is left out                                    |
| thinking parts beside `reasoning_content`     | the parts count                                |
| unequal `reasoning_content` and `reasoning`   | the first counts                               |
| no `content`, function names with a dot       | are taken                                      |
| thinking in a system message (all but v13)    | is refused, naming the message                 |
| results without a call, arguments that are no | are refused, naming the place (`messages`)     |
| JSON object, NaN and Infinity in arguments    |                                                |

Knows nothing of templates, of control tokens or of safety.
"""

import hashlib
import itertools
import json
import re
import string
from collections.abc import Iterable, Sequence
from dataclasses import replace

from localmistral.chatformat.families import Family
from localmistral.chatformat.messages import (
    Message,
    Part,
    encodable,
    without_empty_answers,
)
from localmistral.errors import BadRequestError

_BETWEEN_MESSAGES = "\n\n"
_VALID_ID = re.compile(r"[A-Za-z0-9]{9}")
_ID_LETTERS = string.digits + string.ascii_letters


def normalise(
    messages: Sequence[Message], family: Family, instructions: tuple[Part, ...] = ()
) -> tuple[Message, ...]:
    """The conversation as the family's template wants it; `instructions` begin the system prompt.

    Every message's `parts` are: text only, in one part; or text and thinking, no two texts side by
    side. Errors: BadRequestError for what has no place in this family's prompts.
    """
    _refuse_thinking_in_system(messages, family)
    if not family.shows_thinking:
        messages = tuple(map(_without_thinking, messages))
    kept = without_empty_answers(messages)
    if instructions:
        kept = instructed(kept, instructions)
    kept = tuple(_settled(group, family) for group in _turns(kept))
    if family.sorts_results:
        kept = sorted_results(kept)
    if family.call_ids:
        kept = with_short_ids(kept)
    if not family.system_blocks and not _starts_with_user(kept):
        kept = (Message(role="user"), *kept)
    return kept


def _refuse_thinking_in_system(messages: Sequence[Message], family: Family) -> None:
    for i, message in enumerate(messages):
        thinks = any(part.thinking for part in message.parts)
        if message.role == "system" and thinks and not family.thinking_in_system:
            raise BadRequestError(
                f"messages[{i}].content holds thinking, which this model takes from the assistant "
                "only.",
                "Send the system message as text.",
                param=f"messages[{i}].content",
            )


def instructed(
    messages: tuple[Message, ...], instructions: tuple[Part, ...]
) -> tuple[Message, ...]:
    """The instructions before the user's own system prompt, unless that brings its own thinking."""
    first = messages[0] if messages else None
    if first is None or first.role != "system":
        return (_said("system", instructions), *messages)
    if any(part.thinking for part in first.parts):
        return messages
    return (_said("system", (*instructions, *first.parts)), *messages[1:])


def _turns(messages: Iterable[Message]) -> list[list[Message]]:
    """Neighbouring user messages together, neighbouring assistant messages too, others alone."""
    turns: list[list[Message]] = []
    for message in messages:
        if turns and turns[-1][-1].role == message.role and message.role in ("user", "assistant"):
            turns[-1].append(message)
        else:
            turns.append([message])
    return turns


def _settled(turn: list[Message], family: Family) -> Message:
    """One message of a turn's, its text and thinking in order."""
    parts = joined_parts([message.parts for message in turn], family.parts_separator)
    role = turn[0].role
    if role == "assistant" and not any(part.thinking for part in parts):
        parts = tuple(replace(part, text=part.text.rstrip(" ")) for part in parts)
    elif role == "system" and not parts and turn[0].listed:
        parts = (Part(text=""),)  # a list without words counts as a system text, "" does not
    calls = tuple(call for message in turn for call in message.tool_calls)
    settled = _said(role, parts)
    return replace(settled, tool_calls=calls, tool_call_id=turn[0].tool_call_id)


def _said(role: str, parts: tuple[Part, ...]) -> Message:
    return Message(
        role=role,
        content="".join(part.text for part in parts if not part.thinking),
        reasoning="".join(part.text for part in parts if part.thinking),
        listed=parts,
    )


def joined_parts(contents: Iterable[tuple[Part, ...]], separator: str) -> tuple[Part, ...]:
    """The parts of several messages as one list, neighbouring texts joined and empty ones gone.

    Between texts of one message goes `separator`, between texts of two messages a blank line.
    """
    joined: list[Part] = []
    for parts in contents:
        before = _BETWEEN_MESSAGES
        for part in parts:
            if part.thinking:
                joined.append(part)
            elif part.text and joined and not joined[-1].thinking:
                joined[-1] = Part(text=joined[-1].text + before + part.text)
                before = separator
            elif part.text:
                joined.append(part)
                before = separator
    return tuple(joined)


def _without_thinking(message: Message) -> Message:
    if message.role != "assistant" or not any(part.thinking for part in message.parts):
        return message
    parts = tuple(part for part in message.parts if not part.thinking)
    return replace(message, reasoning="", listed=parts)


def sorted_results(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Neighbouring results in the order of the calls they answer."""
    ordered: list[Message] = []
    order: dict[str, int] = {}
    first = 0  # where the present run of results begins
    for message in messages:
        if message.role == "assistant":
            order = {call.id: i for i, call in enumerate(message.tool_calls)}
        if message.role != "tool":
            first = len(ordered) + 1
        ordered.append(message)
        ordered[first:] = sorted(
            ordered[first:], key=lambda result: order.get(result.tool_call_id, len(order))
        )
    return tuple(ordered)


def with_short_ids(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Every call id as nine letters or digits, the same one for the same id, valid ones kept."""
    ids = [call.id for message in messages for call in message.tool_calls]
    short = {id_: id_ for id_ in ids if _VALID_ID.fullmatch(id_)}
    taken = set(short)
    for id_ in ids:
        if id_ not in short:
            short[id_] = _shortened(id_, taken)
            taken.add(short[id_])
    return tuple(
        replace(
            message,
            tool_calls=tuple(replace(call, id=short[call.id]) for call in message.tool_calls),
            tool_call_id=short.get(message.tool_call_id, message.tool_call_id),
        )
        for message in messages
    )


def _shortened(id_: str, taken: set[str]) -> str:
    """Nine letters or digits made of an id alone; another try where they are taken."""
    for attempt in itertools.count():
        digest = hashlib.sha256(f"{attempt} {id_}".encode()).digest()
        number = int.from_bytes(digest)
        letters = []
        for _ in range(9):
            number, index = divmod(number, len(_ID_LETTERS))
            letters.append(_ID_LETTERS[index])
        if (short := "".join(letters)) not in taken:
            break
    return short


def _starts_with_user(messages: Sequence[Message]) -> bool:
    """Whether the first message that is no system message is the user's."""
    roles = (message.role for message in messages if message.role != "system")
    return next(roles, None) == "user"


def result_as_json(content: str) -> str:
    """A result as JSON: itself if it is JSON, an empty object if empty, else a string."""
    try:
        value = json.loads(content or "{}")
        return encodable(json.dumps(value, ensure_ascii=False))
    except (ValueError, RecursionError):
        return json.dumps(content, ensure_ascii=False)
