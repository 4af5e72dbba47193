"""mistral-common as the judge of prompts: its tokenizer for every family, and conversations.

Only two Tekken files come with mistral-common; the other versions are made from one of them by
rewriting the version and the special tokens.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mistral_common
from mistral_common.exceptions import MistralCommonException
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from localmistral.chatformat.families import reasoning_instructions
from localmistral.chatformat.formats import ChatFormat, make_format
from localmistral.chatformat.messages import parse_messages, parse_tools
from localmistral.chatformat.rendering import PromptTokens
from localmistral.chatformat.segments import Segment

SLOTS = 1000
_FIRST = (
    "<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] "
    "[/TOOL_RESULTS] [TOOL_CALLS] [IMG] <pad> [IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] [SUFFIX]"
)
_SYSTEM = {17: "[SYSTEM_PROMPT]", 18: "[/SYSTEM_PROMPT]", 19: "[TOOL_CONTENT]"}
_ARGS = _SYSTEM | {32: "[ARGS]", 33: "[CALL_ID]"}
_THINK = _ARGS | {34: "[THINK]", 35: "[/THINK]"}
# tokenizer name: (version, special tokens beyond the first 17)
TOKENIZERS: dict[str, tuple[str, dict[int, str]]] = {
    # mistral-common wants the tokens of v7 in every Tekken file.
    "v3-tekken": ("v3", _SYSTEM),
    "v7": ("v7", _SYSTEM),
    "v11": ("v11", _ARGS),
    "v13": ("v13", _ARGS),
    "v13-reasoning": ("v13", _THINK),
    "v15": ("v15", _THINK | {36: "[MODEL_SETTINGS]", 37: "[/MODEL_SETTINGS]"}),
}
# How mistral-common refuses: its own errors, pydantic's (ValueErrors), and assertions.
REFUSALS = (MistralCommonException, ValueError, AssertionError)
FAMILY_NAMES = tuple(TOKENIZERS)


@dataclass(frozen=True)
class Conversation:
    """A request as a client sends it."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None
    effort: str | None = None
    goes_on: bool = False  # continue_final_message


def special_names(name: str) -> list[str]:
    """The names of all special slots of a family's vocabulary; unused ones are placeholders."""
    _, more = TOKENIZERS[name]
    known = dict(enumerate(_FIRST.split())) | more
    return [known.get(i, f"<SPECIAL_{i}>") for i in range(SLOTS)]


def text_tokens() -> list[dict[str, Any]]:
    """The text tokens of mistral-common's Tekken file, in the order of their ranks."""
    return _source()["vocab"]  # type: ignore[no-any-return]


@cache
def _source() -> dict[str, Any]:
    path = Path(mistral_common.__file__).parent / "data" / "tekken_240911.json"
    return json.loads(path.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


@cache
def tokenizer(name: str, size: int = 131_072) -> Any:
    """mistral-common's tokenizer of a family, with the first `size` ids of the vocabulary."""
    version, _ = TOKENIZERS[name]
    tekken: dict[str, Any] = {
        "config": _source()["config"]
        | {
            "version": version,
            "default_vocab_size": size,
            "num_vocab_tokens": size - SLOTS,
            "default_num_special_tokens": SLOTS,
        },
        "vocab": text_tokens()[: size - SLOTS],
        "special_tokens": [
            {"rank": i, "token_str": token, "is_control": True}
            for i, token in enumerate(special_names(name))
        ],
    }
    if version == "v15":
        effort = {"type": "enum", "values": ["none", "high"], "accepts_none": True}
        tekken["model_settings_builder"] = {"reasoning_effort": effort | {"default": "none"}}
    with TemporaryDirectory() as folder:
        path = Path(folder) / "tekken.json"
        path.write_text(json.dumps(tekken), encoding="utf-8")
        return MistralTokenizer.from_file(str(path))


@cache
def chat_format(name: str) -> ChatFormat:
    """Our format for the same vocabulary, asked for by the catalogue's word."""
    control = {text: i for i, text in enumerate(special_names(name))}
    tokens = PromptTokens(control=control, bos="<s>", eos="</s>", adds_bos=True)
    made = make_format(tokens, catalogue_template=name)
    assert made.name == name
    return made


def expected_tokens(name: str, conversation: Conversation, size: int = 131_072) -> list[int]:
    """What mistral-common encodes. Raises whatever it raises for what it refuses."""
    effort = {"reasoning_effort": conversation.effort} if conversation.effort else {}
    messages = [_for_oracle(message) for message in conversation.messages]
    if name == "v13-reasoning" and conversation.effort != "none":
        messages = _instructed(messages)
    request = ChatCompletionRequest.from_openai(
        messages,
        [dict(tool) for tool in conversation.tools] if conversation.tools else None,
        conversation.goes_on,
        **(effort if name == "v15" else {}),
    )
    return list(tokenizer(name, size).encode_chat_completion(request).tokens)


def expected_if_accepted(
    name: str, conversation: Conversation, size: int = 131_072
) -> list[int] | None:
    """What mistral-common encodes, or None where it refuses."""
    try:
        return expected_tokens(name, conversation, size)
    except REFUSALS:
        return None


def our_segments(name: str, conversation: Conversation) -> tuple[Segment, ...]:
    return chat_format(name).render(
        parse_messages(list(conversation.messages)),
        tools=parse_tools(conversation.tools),
        effort=conversation.effort,
        continue_final_message=conversation.goes_on,
    )


def encode(name: str, segments: Sequence[Segment]) -> list[int]:
    """Segments as tokens: control tokens by name, text without any special tokens."""
    inner = tokenizer(name).instruct_tokenizer.tokenizer
    tokens: list[int] = []
    for segment in segments:
        if segment.control:
            tokens.append(special_names(name).index(segment.text))
        else:
            tokens += inner.encode(segment.text, bos=False, eos=False)
    return tokens


def our_tokens(name: str, conversation: Conversation) -> list[int]:
    return encode(name, our_segments(name, conversation))


def _for_oracle(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message in the one dialect mistral-common reads: its thinking is text, not a list."""
    said = dict(message)
    if said.get("role") == "developer":
        said["role"] = "system"
    if isinstance(said.get("content"), list):
        said["content"] = [_flat_part(part) for part in said["content"]]
    return said


def _flat_part(part: Mapping[str, Any]) -> dict[str, Any]:
    flat = dict(part)
    if isinstance(flat.get("thinking"), list):
        flat["thinking"] = "".join(item["text"] for item in flat["thinking"])
    return flat


def _instructed(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The model card's system prompt, with the client's own behind it in the same message."""
    parts = [
        thought(part.text) if part.thinking else {"type": "text", "text": part.text}
        for part in reasoning_instructions("")
    ]
    if not messages or messages[0]["role"] != "system":
        return [system(parts), *messages]
    own = messages[0]["content"]
    own = text(own) if isinstance(own, str) else own
    if any(part["type"] == "thinking" for part in own):
        return messages
    return [system(parts + own), *messages[1:]]


# Building blocks.


def user(content: Any = "Hello") -> dict[str, Any]:
    return {"role": "user", "content": content}


def system(content: Any = "Be brief.") -> dict[str, Any]:
    return {"role": "system", "content": content}


def said(content: Any = "Hi.", *calls: dict[str, Any], **more: Any) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": content, **more}
    return message | {"tool_calls": list(calls)} if calls else message


def call(
    id_: str = "abcDEF123", arguments: Any = '{"city": "Oslo"}', name: str = "weather"
) -> dict[str, Any]:
    return {"id": id_, "type": "function", "function": {"name": name, "arguments": arguments}}


def result(content: Any = "12 degrees", id_: str = "abcDEF123", **more: Any) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": id_, "content": content, **more}


def text(*texts: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": item} for item in texts]


def thought(content: Any, **more: Any) -> dict[str, Any]:
    return {"type": "thinking", "thinking": content, **more}


def tool(name: str = "weather", **function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **function}}


WEATHER = tool(
    description="The weather now: <b>\"quoted\"</b> & 'more'",
    parameters={
        "type": "object",
        "properties": {
            "city": {"type": "string", "description": "Stadt, ville, город, 都市 🏙"},
            "days": {"type": "integer", "minimum": 0, "maximum": 1e2},
            "unit": {"enum": ["°C", "°F", None, True, 1.0, -0.5]},
        },
        "required": ["city"],
        "additionalProperties": False,
    },
)
CONTROL_TEXT = "</s><s>[INST][/INST] [TOOL_CALLS]f[ARGS]{} [THINK]x[/THINK] [SYSTEM_PROMPT] [IMG]"
LONG = (
    "The quick brown fox jumps over the lazy dog; 12345 times, ünder ßtrange cïrcumstances.\n" * 60
)


class Random:
    """Conversations by chance: mostly such as clients send, with everything odd that they do."""

    TEXTS = (
        "Hello",
        "Was ist 7 × 8?",
        "¿Qué tal? ¡Olé!",
        "日本語のテキスト、改行\nあり",
        "Здравствуйте,  мир",
        "مرحبا بالعالم",
        "नमस्ते दुनिया",
        "👩‍👩‍👧‍👦 🇳🇴 e\u0301 \u200b\ufeff",
        "",
        " ",
        "\n\n",
        "  leading",
        "trailing   ",
        "trailing newline\n",
        "tab\tand\r\nCRLF ",
        CONTROL_TEXT,
        "[INST] nested [/INST]",
        "[/INST]",
        "</s>",
        "[THINK]",
        "[/THINK]done",
        '[MODEL_SETTINGS]{"reasoning_effort": "high"}[/MODEL_SETTINGS]',
        "<SPECIAL_37>",
        '{"a": [1, 2.50, true, null], "ü": "\\u00e9"}',
        "[1, 2]",
        "42",
        "-0.0",
        "1e5",
        "true",
        '"quoted"',
        "null",
        "x" * 300,
        "a\\b\"c'd{{ e }}{% f %}<&>",
        "INST s THINK",
        "\ue000\uf8ff\U000f0000",
    )
    VALUES: tuple[Any, ...] = (
        1, -0.5, 1e22, 10**25, True, None, "", "é🙂", CONTROL_TEXT, [], {}, [[1], {"a": "b"}], 1.0,
        {"z": 1, "a": {"ö": [None, False]}}, "line\nbreak\t\"q\" \\ / \u2028",
    )  # fmt: skip

    def __init__(self, seed: int, *, thinking: bool, thinking_in_system: bool = False) -> None:
        self._random = random.Random(seed)
        self._thinking = thinking
        self._thinking_in_system = thinking_in_system

    def conversation(self) -> Conversation:
        chance = self._random.random
        messages: list[dict[str, Any]] = []
        if chance() < 0.5:
            messages += [system(self._content()) for _ in range(1 + (chance() < 0.2))]
        if self._thinking_in_system and chance() < 0.2:
            messages.append(system([*text(self._text()), thought(self._text()), *text("")]))
        for _ in range(self._random.randint(1, 4)):
            messages += [user(self._content()) for _ in range(1 + (chance() < 0.25))]
            if chance() < 0.15:
                messages.append(system(self._content()))
            if chance() < 0.8:
                messages += self._answer()
        goes_on = chance() < 0.3
        if goes_on and chance() < 0.2:
            messages.append(said(self._content(), self._call()))
        elif goes_on:
            messages.append(self._said())
        elif messages[-1]["role"] == "assistant":
            messages.append(user(self._content()))
        tools = None
        if chance() < 0.4:
            tools = [self._tool(i) for i in range(self._random.randint(1, 3))]
        effort = self._random.choice([None, "none", "high"])
        return Conversation(messages, tools, effort, goes_on)

    def _answer(self) -> list[dict[str, Any]]:
        chance = self._random.random
        answer: list[dict[str, Any]] = []
        while chance() < 0.4:
            calls = [self._call() for _ in range(self._random.randint(1, 3))]
            content = self._random.choice([None, "", None]) if chance() < 0.6 else self._content()
            message = said(content, *calls)
            if self._thinking and chance() < 0.4:
                message[self._random.choice(["reasoning", "reasoning_content"])] = self._text()
                if isinstance(content, list):
                    message["content"] = self._text()
            answer.append(message)
            order = list(calls)
            if chance() < 0.3:
                self._random.shuffle(order)
            answer += [result(self._result(), made["id"]) for made in order]
        return answer + [self._said() for _ in range(1 + (chance() < 0.2))]

    def _said(self) -> dict[str, Any]:
        if not self._thinking or self._random.random() < 0.4:
            return said(self._content() or "x")
        if self._random.random() < 0.5:
            key = self._random.choice(["reasoning", "reasoning_content"])
            return said(self._text(), **{key: self._text()})
        parts = []
        for _ in range(self._random.randint(1, 4)):
            words = self._text()
            listed: Any = text(words) if self._random.random() < 0.5 else words
            closed = {} if self._random.random() < 0.7 else {"closed": self._random.random() < 0.5}
            thinks = self._random.random() < 0.5
            parts += [thought(listed, **closed)] if thinks else text(self._text())
        return said(parts)

    def _text(self) -> str:
        return "".join(self._random.choices(self.TEXTS, k=self._random.choice([1, 1, 2])))

    def _content(self) -> Any:
        if self._random.random() < 0.75:
            return self._text()
        return text(*(self._text() for _ in range(self._random.randint(0, 3))))

    def _result(self) -> Any:
        if self._random.random() < 0.3:
            return json.dumps({"v": self._random.choice(self.VALUES)}, indent=1)
        return self._content()

    def _call(self) -> dict[str, Any]:
        letters = "abcdefghijkLMNOP0123456789"
        keys = self._random.sample(["city", "z", "ü b", 'a"q', "", "[INST]"], k=2)
        arguments: Any = {key: self._random.choice(self.VALUES) for key in keys}
        form = self._random.choice(["object", "text", "compact", "none"])
        if form == "text":
            arguments = json.dumps(arguments)
        elif form == "compact":
            arguments = json.dumps(arguments, separators=(",", ":"), ensure_ascii=False)
        elif form == "none":
            arguments = self._random.choice(["", "{}", {}])
        id_ = "".join(self._random.choices(letters, k=9))
        return call(id_, arguments, self._random.choice(["weather", "a-b_C", "x" * 64]))

    def _tool(self, index: int) -> dict[str, Any]:
        properties = {"p": {"type": "string", "description": self._text()}}
        parameters = self._random.choice([None, {}, {"type": "object", "properties": properties}])
        more: dict[str, Any] = {}
        if self._random.random() < 0.7:
            more["description"] = self._text()
        if parameters is not None or self._random.random() < 0.5:
            more["parameters"] = parameters
        if self._random.random() < 0.2:
            more["strict"] = True
        return tool(f"tool_{index}", **more)
