"""Mistral's tokenizer families: which there are, how their prompts differ, how to recognise one.

A family's template is what mistral-common's generator makes for it (`scripts/make_templates.py`
writes them beside this module). Knows nothing of how conversations are rendered.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Literal

from localmistral.chatformat.messages import Part

Reasoning = Literal["effort", "system-prompt", "none"]

_BASE = (
    "<s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS] "
    "[TOOL_CALLS]"
)
_SYSTEM = "[SYSTEM_PROMPT] [/SYSTEM_PROMPT]"
_THINK = "[THINK] [/THINK]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One prompt format. The rules are those of mistral-common 1.13.

    `reasoning`: switched by a model setting ("effort"), by instructions in the system prompt, or
    not at all. `shows_thinking`: earlier thinking has a place in the prompt. `call_ids`: tool call
    ids are in the prompt, as nine letters or digits. `sorts_results`: results go in the order of
    their calls. `parts_separator`: between neighbouring text parts of one message.
    `system_blocks`: system messages stand where they are; if not, all are put into one text before
    the last user message. `json_results`: a result is shown as a JSON value.
    """

    name: str
    control_tokens: frozenset[str]
    reasoning: Reasoning = "none"
    shows_thinking: bool = False
    thinking_in_system: bool = False
    call_ids: bool = False
    sorts_results: bool = True
    parts_separator: str = "\n\n"
    system_blocks: bool = True
    json_results: bool = False

    @property
    def source(self) -> str:
        """The family's Jinja template."""
        return _read_template(self.name)

    @property
    def default_effort(self) -> str:
        """The effort where none is asked for: a model that reasons by instructions reasons."""
        return "high" if self.reasoning == "system-prompt" else "none"


@cache
def _read_template(name: str) -> str:
    file = resources.files("localmistral.chatformat") / "templates" / f"{name}.jinja"
    return file.read_text(encoding="utf-8")


def _tokens(*names: str) -> frozenset[str]:
    return frozenset(" ".join((_BASE, *names)).split())


_V13 = _tokens(_SYSTEM, "[ARGS]")
FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        Family(
            name="v3-tekken",
            control_tokens=_tokens(),
            call_ids=True,
            sorts_results=False,
            system_blocks=False,
            json_results=True,
        ),
        Family(
            name="v7",
            control_tokens=_tokens(_SYSTEM, "[TOOL_CONTENT]"),
            call_ids=True,
            sorts_results=False,
        ),
        Family(
            name="v11",
            control_tokens=_tokens(_SYSTEM, "[TOOL_CONTENT] [ARGS] [CALL_ID]"),
            call_ids=True,
        ),
        Family(name="v13", control_tokens=_V13),
        Family(
            name="v13-reasoning",
            control_tokens=_V13 | _tokens(_THINK),
            reasoning="system-prompt",
            shows_thinking=True,
            thinking_in_system=True,
        ),
        Family(
            name="v15",
            control_tokens=_V13 | _tokens(_THINK, "[MODEL_SETTINGS] [/MODEL_SETTINGS]"),
            reasoning="effort",
            shows_thinking=True,
            parts_separator="",
        ),
    )
}

CONTROL_NAMES = frozenset().union(*(family.control_tokens for family in FAMILIES.values()))
"""Every token that some family's prompts or answers use; some files type them USER_DEFINED."""

# Ids that tell a Tekken vocabulary from Mistral's SentencePiece ones, where [TOOL_CALLS] is 5 and
# [AVAILABLE_TOOLS] 6 (mistral-common, Tekkenizer.DEPRECATED_SPECIAL_TOKENS and the .model files).
_TEKKEN_IDS = {
    "<s>": 1,
    "</s>": 2,
    "[INST]": 3,
    "[/INST]": 4,
    "[AVAILABLE_TOOLS]": 5,
    "[/AVAILABLE_TOOLS]": 6,
    "[TOOL_RESULTS]": 7,
    "[/TOOL_RESULTS]": 8,
    "[TOOL_CALLS]": 9,
}
# Newest first: a family is taken if the tokens it brought are at their ids. An unused slot is
# called <SPECIAL_n>, so its name is simply absent.
_NEW_TOKENS: Mapping[str, Mapping[str, int]] = {
    "v15": {"[ARGS]": 32, "[THINK]": 34, "[MODEL_SETTINGS]": 36, "[/MODEL_SETTINGS]": 37},
    "v13": {"[ARGS]": 32, "[THINK]": 34, "[/THINK]": 35},
    "v11": {"[ARGS]": 32, "[CALL_ID]": 33},
    "v7": {"[SYSTEM_PROMPT]": 17, "[/SYSTEM_PROMPT]": 18, "[TOOL_CONTENT]": 19},
    "v3-tekken": {},
}


def find_family(
    vocabulary: Mapping[str, int], catalogue_template: str | None, embedded: str | None = None
) -> Family | None:
    """The family of a model, or None: then the file's own template is used.

    `vocabulary` maps the names of control tokens to ids. The catalogue's word counts first, if the
    vocabulary has that family's tokens; then which control tokens are at Tekken's ids; `embedded`
    (the template in the file) settles what the vocabulary leaves open. A fine-tune to another
    format, seen by a template without [INST], is no family; nor is any vocabulary whose ids are
    not Tekken's: Mistral's SentencePiece models put blanks around texts in ways that only their
    own templates know.
    """
    named = FAMILIES.get(catalogue_template or "")
    if named is not None and named.control_tokens <= vocabulary.keys():
        return named
    if not _has(vocabulary, _TEKKEN_IDS) or (embedded and "[INST]" not in embedded):
        return None
    newest = next(name for name, ids in _NEW_TOKENS.items() if _has(vocabulary, ids))
    family = FAMILIES[_refine(newest, embedded or "")]
    return family if family.control_tokens <= vocabulary.keys() else None


def _has(vocabulary: Mapping[str, int], ids: Mapping[str, int]) -> bool:
    return all(vocabulary.get(name) == number for name, number in ids.items())


def _refine(name: str, embedded: str) -> str:
    """Tell apart what shares a vocabulary, by the template in the file (nothing if there is none).

    Real vocabularies often have the tokens of a later version already, and v13 without [THINK] has
    the same as v11. Templates that show no calls at all say nothing about their form.
    """
    if name == "v13" and "draft your thinking process" in embedded:
        return "v13-reasoning"
    if name in ("v11", "v13") and "[TOOL_CALLS]" in embedded:
        if "[ARGS]" not in embedded:
            return "v7"
        return "v11" if "[CALL_ID]" in embedded else "v13"
    if name == "v7" and embedded and "[SYSTEM_PROMPT]" not in embedded:
        return "v3-tekken"
    return name


# The default system prompts of the model cards, text around a thinking part: of Ministral 3
# Reasoning 2512 (also docs.mistral.ai/capabilities/reasoning/native), and of Magistral Small
# 2507 and 2509. The models only reason reliably under these very words.
_MINISTRAL_INSTRUCTIONS = (
    Part(
        text="# HOW YOU SHOULD THINK AND ANSWER\n\n"
        "First draft your thinking process (inner monologue) until you arrive at a response. "
        "Format your response using Markdown, and use LaTeX for any mathematical equations. "
        "Write both your thoughts and the response in the same language as the input.\n\n"
        "Your thinking process must follow the template below:"
    ),
    Part(
        text="Your thoughts or/and draft, like working through an exercise on scratch paper. "
        "Be as casual and as long as you want until you are confident to generate the response "
        "to the user.",
        thinking=True,
    ),
    Part(text="Here, provide a self-contained response."),
)
_MAGISTRAL_INSTRUCTIONS = (
    Part(
        text=_MINISTRAL_INSTRUCTIONS[0].text.removeprefix("# HOW YOU SHOULD THINK AND ANSWER\n\n")
    ),
    Part(
        text="Your thoughts or/and draft, like working through an exercise on scratch paper. "
        "Be as casual and as long as you want until you are confident to generate the response. "
        "Use the same language as the input.",
        thinking=True,
    ),
    _MINISTRAL_INSTRUCTIONS[2],
)


def reasoning_instructions(model_name: str, embedded: str | None = None) -> tuple[Part, ...]:
    """The system prompt that makes a v13 reasoning model reason: Magistral's or Ministral's."""
    if "magistral" in model_name.casefold() or _MAGISTRAL_INSTRUCTIONS[1].text in (embedded or ""):
        return _MAGISTRAL_INSTRUCTIONS
    return _MINISTRAL_INSTRUCTIONS
