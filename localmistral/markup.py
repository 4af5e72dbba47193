"""Which tokens of a model are markup: control tokens by text, and the ends of its thinking.

Takes them from the vocabulary by name, never by number. Knows nothing of prompts.
"""

from localmistral.chatformat.families import CONTROL_NAMES
from localmistral.chatformat.rendering import PromptTokens
from localmistral.engine import Engine
from localmistral.models.shape import TokenType, Vocabulary

_MARKUP_STARTS = frozenset("<[|")


def read_prompt_tokens(engine: Engine, vocabulary: Vocabulary) -> PromptTokens:
    tokenizer = engine.tokenizer

    def name(token: int) -> str:
        return vocabulary.texts[token] if 0 <= token < len(vocabulary.texts) else ""

    return PromptTokens(
        control=_find_control_tokens(engine, vocabulary),
        user_defined=_texts_of(vocabulary, TokenType.USER_DEFINED),
        bos=name(tokenizer.bos),
        eos=name(tokenizer.eos),
        adds_bos=tokenizer.adds_bos,
    )


def find_thinking_tags(vocabulary: Vocabulary) -> tuple[int, int] | None:
    """The ids of <think> and </think>, where each is one token."""
    try:
        return vocabulary.texts.index("<think>"), vocabulary.texts.index("</think>")
    except ValueError:
        return None


def _find_control_tokens(engine: Engine, vocabulary: Vocabulary) -> dict[str, int]:
    """Control tokens by text: the file's, those llama.cpp takes for such, and Mistral's names."""
    return {
        text: number
        for number, (text, kind) in enumerate(zip(vocabulary.texts, vocabulary.types, strict=True))
        if kind in (TokenType.CONTROL, TokenType.UNKNOWN)
        or text in CONTROL_NAMES
        or (text[:1] in _MARKUP_STARTS and engine.tokenizer.is_control(number))
    }


def _texts_of(vocabulary: Vocabulary, kind: TokenType) -> tuple[str, ...]:
    pairs = zip(vocabulary.texts, vocabulary.types, strict=True)
    return tuple(text for text, number in pairs if number == kind)
