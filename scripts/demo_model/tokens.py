"""The demo model's vocabulary: the first 4096 ids of the real Tekken, with v15's control tokens.

So every id means what it means in the real models. Conversations become tokens with
mistral-common's own encoder; nothing here knows llama.cpp or torch.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from demo_model.conversations import EFFORTS, Conversation, openai_request

SPECIAL_SLOTS = 1000
TEXT_TOKENS = 3096
VOCAB_SIZE = SPECIAL_SLOTS + TEXT_TOKENS
SPECIAL_NAMES = {
    0: "<unk>", 1: "<s>", 2: "</s>", 3: "[INST]", 4: "[/INST]", 5: "[AVAILABLE_TOOLS]",
    6: "[/AVAILABLE_TOOLS]", 7: "[TOOL_RESULTS]", 8: "[/TOOL_RESULTS]", 9: "[TOOL_CALLS]",
    10: "[IMG]", 11: "<pad>", 12: "[IMG_BREAK]", 13: "[IMG_END]", 14: "[PREFIX]", 15: "[MIDDLE]",
    16: "[SUFFIX]", 17: "[SYSTEM_PROMPT]", 18: "[/SYSTEM_PROMPT]", 19: "[TOOL_CONTENT]",
    32: "[ARGS]", 33: "[CALL_ID]", 34: "[THINK]", 35: "[/THINK]", 36: "[MODEL_SETTINGS]",
    37: "[/MODEL_SETTINGS]",
}  # fmt: skip
UNK, BOS, EOS, END_INST, END_TOOL_RESULTS, PAD = 0, 1, 2, 4, 8, 11


def write_tekken(path: Path) -> None:
    """Write a v15 `tekken.json`: the head of mistral-common's own Tekken file."""
    import mistral_common

    data = Path(mistral_common.__file__).parent / "data" / "tekken_240911.json"
    source = json.loads(data.read_text(encoding="utf-8"))
    settings = {"type": "enum", "accepts_none": True, "values": list(EFFORTS), "default": "none"}
    tekken = {
        "config": source["config"]
        | {
            "num_vocab_tokens": TEXT_TOKENS,
            "default_vocab_size": VOCAB_SIZE,
            "default_num_special_tokens": SPECIAL_SLOTS,
            "version": "v15",
        },
        "special_tokens": [
            {"rank": i, "token_str": special_name(i), "is_control": True}
            for i in range(max(SPECIAL_NAMES) + 1)
        ],
        "model_settings_builder": {"reasoning_effort": settings},
        "vocab": source["vocab"][:TEXT_TOKENS],
    }
    path.write_text(json.dumps(tekken, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")


def special_name(token: int) -> str:
    """The text of a control token; unused slots have names made of their id."""
    return SPECIAL_NAMES.get(token, f"<SPECIAL_{token}>")


def vocabulary_bytes(tekken: Path) -> list[bytes]:
    """The bytes of each text token, in rank order."""
    vocabulary = json.loads(tekken.read_text(encoding="utf-8"))["vocab"]
    return [base64.b64decode(entry["token_bytes"]) for entry in vocabulary]


def letter_pieces(tekken: Path) -> list[str]:
    """The text tokens that are two or more ASCII letters: what invented words are made of."""
    return [b.decode() for b in vocabulary_bytes(tekken)[256:] if b.isalpha() and b.isascii()]


class Encoder:
    """Turns conversations into tokens, to train on or to complete."""

    def __init__(self, tekken: Path) -> None:
        from mistral_common.protocol.instruct.validator import ValidationMode
        from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

        self._serving: Any = MistralTokenizer.from_file(str(tekken))
        self._training: Any = MistralTokenizer.from_file(
            str(tekken), mode=ValidationMode.finetuning
        )

    def encode(
        self, c: Conversation, upto: int | None = None, keep_thinking: bool = True
    ) -> list[int]:
        """A whole conversation, or its first `upto` messages as a prompt."""
        from mistral_common.protocol.instruct.request import ChatCompletionRequest

        request = ChatCompletionRequest.from_openai(**openai_request(c, upto, keep_thinking))
        tokenizer = self._training if upto is None else self._serving
        return list(tokenizer.encode_chat_completion(request).tokens)

    def decode(self, tokens: list[int]) -> str:
        """The text of tokens, control tokens included."""
        from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy

        return str(self._serving.decode(tokens, special_token_policy=SpecialTokenPolicy.KEEP))


def assistant_mask(tokens: list[int], last_only: bool = False) -> list[bool]:
    """Marks the tokens that the assistant writes, the end of each, or the last, answer included."""
    mask, inside = [], False
    if last_only:
        start = max(n for n, token in enumerate(tokens) if token in (END_INST, END_TOOL_RESULTS))
        return [n > start for n in range(len(tokens))]
    for token in tokens:
        mask.append(inside)
        inside = token in (END_INST, END_TOOL_RESULTS) or (inside and token != EOS)
    return mask
