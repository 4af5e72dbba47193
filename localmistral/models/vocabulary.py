"""Metadata -> the tokenizer's fields and, on demand, every token's text.

Knows nothing of how text is cut into tokens.
"""

from collections import Counter
from dataclasses import fields

from localmistral.models.header import Array, ValueType, read_numbers
from localmistral.models.metadata import Metadata
from localmistral.models.shape import SpecialTokens, Tokenizer, TokenType, Vocabulary

NO_VOCABULARY = ("none", "no_vocab")  # llama.cpp's two spellings
NO_TOKEN = (1 << 32) - 1  # -1 in 32 bits: how converters write "has none"

_PREFIX = "tokenizer.ggml."
_TEMPLATE = "tokenizer.chat_template"
_SPECIAL_KEYS = {
    "bos": ("bos_token_id",),
    "eos": ("eos_token_id",),
    "eot": ("eot_token_id",),
    "eom": ("eom_token_id",),
    "unknown": ("unknown_token_id",),
    "separator": ("seperator_token_id",),  # GGUF's own spelling
    "padding": ("padding_token_id",),
    "mask": ("mask_token_id",),
    "fim_prefix": ("fim_pre_token_id", "prefix_token_id"),
    "fim_suffix": ("fim_suf_token_id", "suffix_token_id"),
    "fim_middle": ("fim_mid_token_id", "middle_token_id"),
}
# Fine-tunes with a padding id one past the end are common; it never gets into a prompt, and
# llama.cpp ignores it as well.
_HARMLESS = ("separator", "padding", "mask")


def read_tokenizer(metadata: Metadata, *, are_texts_checked: bool = False) -> Tokenizer:
    """Everything about the vocabulary but its texts; they are checked, not kept.

    `are_texts_checked`: the same texts were checked in another header, so not again (it's slow).
    """
    model = metadata.text(_PREFIX + "model")
    tokens = metadata.array(_PREFIX + "tokens", ValueType.STRING)
    if model is None:
        metadata.fail(f"has no {_PREFIX}model, so its tokens can't be read")
    count = tokens.count if tokens and model not in NO_VOCABULARY else 0
    special = _read_special(metadata, count)
    if model not in NO_VOCABULARY:
        if not are_texts_checked:
            _check_tokens(metadata, tokens)
        _check_merges(metadata, model)
        _check_added(metadata, model, special)
    return Tokenizer(
        model=model,
        pre=metadata.text(_PREFIX + "pre") or "",
        token_count=count,
        special=special,
        add_bos=metadata.flag(_PREFIX + "add_bos_token"),
        add_eos=metadata.flag(_PREFIX + "add_eos_token"),
        add_space_prefix=metadata.flag(_PREFIX + "add_space_prefix"),
        chat_template=metadata.text(_TEMPLATE),
        named_chat_templates=tuple(
            (key.removeprefix(_TEMPLATE + "."), metadata.text(key) or "")
            for key in metadata.header.metadata
            if key.startswith(_TEMPLATE + ".")
        ),
    )


def read_texts(metadata: Metadata) -> Vocabulary:
    """Every token's text and type; empty for a model without a vocabulary."""
    texts = metadata.strings(_PREFIX + "tokens") or []
    types = metadata.numbers(_PREFIX + "token_type", ValueType.INT32, ValueType.UINT32)
    return Vocabulary(
        texts=tuple(text.decode("utf-8", errors="replace") for text in texts),
        types=types or (TokenType.NORMAL,) * len(texts),
    )


def _check_tokens(metadata: Metadata, tokens: Array | None) -> None:
    if tokens is None or tokens.count == 0:
        metadata.fail(f"has no tokens in its vocabulary ({_PREFIX}tokens)")
    scores = metadata.array(_PREFIX + "scores", ValueType.FLOAT32)
    types = metadata.array(_PREFIX + "token_type", ValueType.INT32, ValueType.UINT32)
    for name, array in (("scores", scores), ("token_type", types)):
        if array is not None and array.count != tokens.count:
            metadata.fail(f"has {tokens.count:,} tokens but {array.count:,} of {_PREFIX}{name}")
    if types is not None:
        numbers = read_numbers(metadata.buffer, types)
        if min(numbers) < 0 or max(numbers) > max(TokenType):
            wrong = next(i for i, n in enumerate(numbers) if not 0 <= n <= max(TokenType))
            metadata.fail(f"gives token {wrong:,} the unknown type {numbers[wrong]}")
    _check_bytes(metadata, _check_unique(metadata, metadata.strings(_PREFIX + "tokens") or []))


def _check_unique(metadata: Metadata, texts: list[bytes]) -> set[bytes]:
    """llama.cpp asserts that no two tokens have one text, with `[EMPTY_n]` for an empty one.

    Returns the texts as a set.
    """
    distinct = set(texts)
    if b"" in distinct:
        texts = [text or b"[EMPTY_%d]" % index for index, text in enumerate(texts)]
        distinct = set(texts)
    if len(distinct) < len(texts):
        text, count = Counter(texts).most_common(1)[0]
        shown = text.decode("utf-8", errors="replace")[:40]
        metadata.fail(f"has the token {shown!r} {count:,} times in its vocabulary")
    return distinct


def _check_bytes(metadata: Metadata, texts: set[bytes]) -> None:
    """llama.cpp's SentencePiece falls back to single bytes and ends the process without them."""
    if metadata.text(_PREFIX + "model") == "llama":
        missing = [
            b for b in range(256) if b"<0x%02X>" % b not in texts and bytes([b]) not in texts
        ]
        if missing:
            metadata.fail(
                f"lacks tokens for {len(missing)} of the 256 bytes, first <0x{missing[0]:02X}>"
            )


def _check_merges(metadata: Metadata, model: str) -> None:
    merges = metadata.array(_PREFIX + "merges", ValueType.STRING)
    if model == "gpt2" and merges is None:
        metadata.fail(f"has no {_PREFIX}merges, which its tokenizer needs")
    metadata.array(_PREFIX + "precompiled_charsmap", ValueType.INT8, ValueType.UINT8)


def _check_added(metadata: Metadata, model: str, special: SpecialTokens) -> None:
    """llama.cpp asserts that a token it puts around every text exists."""
    needs = [
        (metadata.flag(_PREFIX + "add_bos_token"), special.bos, "bos", ("llama", "bert")),
        (metadata.flag(_PREFIX + "add_eos_token"), special.eos, "eos", ("llama", "t5", "bert")),
        (model == "bert", special.separator, "seperator", ()),
    ]
    for added, token, name, has_default in needs:
        if added and token is None and model not in has_default:
            metadata.fail(f"adds {name} to every text but has no {_PREFIX}{name}_token_id")


def _read_special(metadata: Metadata, token_count: int) -> SpecialTokens:
    ids = {
        field.name: _read_special_id(metadata, field.name, token_count)
        for field in fields(SpecialTokens)
    }
    return SpecialTokens(**ids)


def _read_special_id(metadata: Metadata, name: str, token_count: int) -> int | None:
    for suffix in _SPECIAL_KEYS[name]:
        key = _PREFIX + suffix
        token = metadata.count(key, default=NO_TOKEN, maximum=NO_TOKEN)
        if token == NO_TOKEN:
            continue
        if token < token_count:
            return token
        if token_count and name not in _HARMLESS:
            metadata.fail(f"has {key} {token:,}, but only {token_count:,} tokens")
    return None
