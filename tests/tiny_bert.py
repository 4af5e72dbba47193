"""A BERT of two layers with random weights as a GGUF file, and the same model in NumPy.

The NumPy half is written from the papers' formulas and knows nothing of llama.cpp, so that the two
can be compared: layers normalised after each sum (post-norm), learnt positions, attention in both
directions, GELU by its tanh formula. Nomic's variant of it has rotary positions, a feed-forward
part gated by SiLU, and no biases in either; weights tell which one it is.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf_writer import Gguf, TensorSpec, padded

Array = npt.NDArray[np.float32]

WIDTH, HEADS, FEED_FORWARD, LAYERS, CONTEXT = 32, 4, 64, 2, 96
EPSILON = 1e-12
MEAN, CLS, LAST, RANK = 1, 2, 3, 4

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PAD_ID, UNKNOWN_ID, CLS_ID, SEP_ID, MASK_ID = range(len(SPECIAL))
_SIGNS = "abcdefghijklmnopqrstuvwxyz0123456789"
_PUNCTUATION = ".,!?;:'\"()-+=/"
_WORDS = """
    the a an is are was in on at of to and or not it this that what who how where when why
    hello world weather oslo today cold warm rain sun snow cat dog bird fish tree house river
    good bad big small old new red green blue black white one two three four five six seven
    read write run walk talk sing play work sleep eat drink make take give find keep hold
    city road bridge train plane ship car bike book paper pen word text letter number line
""".split()  # noqa: SIM905  (a list of so many strings is hard to read)
_ENDINGS = ("ing", "ed", "er", "est", "ly", "ness", "tion", "es", "th", "ous")
TOKENS: list[str] = list(
    dict.fromkeys(
        [
            *SPECIAL,
            *(f"▁{sign}" for sign in _SIGNS + _PUNCTUATION),
            *_SIGNS,
            *(f"▁{word}" for word in _WORDS),
            *_ENDINGS,
        ]
    )
)
"""As converters write WordPiece: a word's first piece begins with ▁, later ones with nothing."""
VOCABULARY: dict[str, Any] = {
    "tokenizer.ggml.model": "bert",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)),
    "tokenizer.ggml.token_type_count": 2,
    "tokenizer.ggml.bos_token_id": CLS_ID,
    "tokenizer.ggml.eos_token_id": SEP_ID,
    "tokenizer.ggml.cls_token_id": CLS_ID,
    "tokenizer.ggml.seperator_token_id": SEP_ID,
    "tokenizer.ggml.unknown_token_id": UNKNOWN_ID,
    "tokenizer.ggml.padding_token_id": PAD_ID,
    "tokenizer.ggml.mask_token_id": MASK_ID,
}
METADATA: dict[str, Any] = {
    "general.architecture": "bert",
    "general.name": "Tiny Bert",
    "general.file_type": 0,
    "bert.block_count": LAYERS,
    "bert.context_length": CONTEXT,
    "bert.embedding_length": WIDTH,
    "bert.feed_forward_length": FEED_FORWARD,
    "bert.attention.head_count": HEADS,
    "bert.attention.layer_norm_epsilon": EPSILON,
    "bert.attention.causal": False,
}


def make_weights(seed: int = 5) -> dict[str, Array]:
    """Tensors by their GGUF names, shapes as NumPy has them (outputs, inputs)."""
    rng = np.random.default_rng(seed)

    def matrix(rows: int, columns: int, size: float = 1.0) -> Array:
        return rng.normal(0, size / np.sqrt(columns), (rows, columns)).astype(np.float32)

    def norm(name: str) -> dict[str, Array]:
        weight, bias = 1 + 0.2 * rng.normal(size=WIDTH), 0.2 * rng.normal(size=WIDTH)
        return {
            f"{name}.weight": weight.astype(np.float32),
            f"{name}.bias": bias.astype(np.float32),
        }

    weights = {
        "token_embd.weight": matrix(len(TOKENS), WIDTH, 4),
        "token_types.weight": matrix(2, WIDTH),
        "position_embd.weight": matrix(CONTEXT, WIDTH, 2),
        **norm("token_embd_norm"),
    }
    for layer in range(LAYERS):
        prefix = f"blk.{layer}."
        for name, rows, columns in (
            ("attn_q", WIDTH, WIDTH),
            ("attn_k", WIDTH, WIDTH),
            ("attn_v", WIDTH, WIDTH),
            ("attn_output", WIDTH, WIDTH),
            ("ffn_up", FEED_FORWARD, WIDTH),
            ("ffn_down", WIDTH, FEED_FORWARD),
        ):
            weights[f"{prefix}{name}.weight"] = matrix(rows, columns, 2)
            weights[f"{prefix}{name}.bias"] = matrix(1, rows)[0]
        weights |= norm(prefix + "attn_output_norm") | norm(prefix + "layer_output_norm")
    return weights


def make_nomic_weights(seed: int = 6) -> dict[str, Array]:
    """Those of Nomic's variant."""
    rng = np.random.default_rng(seed)
    plain = make_weights(seed)
    weights = {
        name: array
        for name, array in plain.items()
        if name != "position_embd.weight" and (not name.endswith(".bias") or "norm" in name)
    }
    for layer in range(LAYERS):
        gate = rng.normal(0, 2 / np.sqrt(WIDTH), (FEED_FORWARD, WIDTH)).astype(np.float32)
        weights[f"blk.{layer}.ffn_gate.weight"] = gate
    return weights


def write_bert(
    path: Path,
    pooling: int | None,
    changes: dict[str, Any] | None = None,
    weights: dict[str, Array] | None = None,
    *,
    architecture: str = "bert",
) -> Path:
    """The model as a file; `pooling` is llama.cpp's number of a way to pool, None leaves it out."""
    weights = make_weights() if weights is None else weights
    plain = {**METADATA, **({} if pooling is None else {"bert.pooling_type": pooling})}
    named = {key.replace("bert.", f"{architecture}.", 1): value for key, value in plain.items()}
    metadata = {**named, "general.architecture": architecture, **VOCABULARY, **(changes or {})}
    specs = [TensorSpec(name=name, dims=array.shape[::-1]) for name, array in weights.items()]
    data = b"".join(
        array.tobytes() + bytes(padded(array.nbytes, 32) - array.nbytes)
        for array in weights.values()
    )
    path.write_bytes(Gguf(metadata=metadata, tensors=specs).header() + data)
    return path


def split_words(text: str) -> list[str]:
    """Lower case without accents, cut at white space, punctuation by itself."""
    words = [""]
    for sign in unicodedata.normalize("NFD", text).lower():
        if unicodedata.category(sign) == "Mn":
            continue
        if sign.isspace():
            words.append("")
        elif sign in _PUNCTUATION:
            words += [sign, ""]
        else:
            words[-1] += sign
    return [word for word in words if word]


def tokenize(text: str) -> list[int]:
    """WordPiece, the longest piece first; a word that can't be written in pieces is unknown. CLS
    before and SEP behind."""
    ids = {token: number for number, token in enumerate(TOKENS)}
    found = [CLS_ID]
    for word in split_words(text):
        rest, pieces = f"▁{word}", []
        while rest:
            sizes = (n for n in range(len(rest), 0, -1) if rest[:n] in ids)
            size = next(sizes, None)
            if size is None:
                pieces = [UNKNOWN_ID]
                break
            pieces.append(ids[rest[:size]])
            rest = rest[size:]
        found += pieces
    return [*found, SEP_ID]


def embed(weights: dict[str, Array], tokens: Sequence[int], pooling: int) -> Array:
    """The vector of one text, of length 1."""
    states = weights["token_embd.weight"][list(tokens)].astype(np.float64)
    states = states + weights["token_types.weight"][0]
    if "position_embd.weight" in weights:
        states = states + weights["position_embd.weight"][: len(tokens)]
    states = _normalise(states, weights, "token_embd_norm")
    for layer in range(LAYERS):
        prefix = f"blk.{layer}."
        states = _normalise(
            states + _attend(states, weights, prefix), weights, prefix + "attn_output_norm"
        )
        inner = _project(states, weights, prefix + "ffn_up")
        if f"{prefix}ffn_gate.weight" in weights:
            gate = _project(states, weights, prefix + "ffn_gate")
            inner = inner * gate / (1 + np.exp(-gate))
        else:
            inner = _gelu(inner)
        states = states + _project(inner, weights, prefix + "ffn_down")
        states = _normalise(states, weights, prefix + "layer_output_norm")
    pooled = {MEAN: states.mean(axis=0), CLS: states[0], LAST: states[-1]}[pooling]
    vector: Array = (pooled / np.linalg.norm(pooled)).astype(np.float32)
    return vector


def _project(states: Any, weights: dict[str, Array], name: str) -> Any:
    bias = weights.get(f"{name}.bias", np.float32(0))
    return states @ weights[f"{name}.weight"].T.astype(np.float64) + bias


def _normalise(states: Any, weights: dict[str, Array], name: str) -> Any:
    centred = states - states.mean(axis=-1, keepdims=True)
    scaled = centred / np.sqrt(states.var(axis=-1, keepdims=True) + EPSILON)
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def _attend(states: Any, weights: dict[str, Array], prefix: str) -> Any:
    def split(name: str) -> Any:
        projected = _project(states, weights, prefix + name)
        return projected.reshape(len(states), HEADS, -1).transpose(1, 0, 2)

    query, key, value = split("attn_q"), split("attn_k"), split("attn_v")
    if "position_embd.weight" not in weights:
        query, key = _rotate(query), _rotate(key)
    scores = query @ key.transpose(0, 2, 1) / np.sqrt(WIDTH // HEADS)
    shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
    shares /= shares.sum(axis=-1, keepdims=True)
    mixed = (shares @ value).transpose(1, 0, 2).reshape(len(states), WIDTH)
    return _project(mixed, weights, prefix + "attn_output")


def _rotate(heads: Any) -> Any:
    """Rotary positions; element n of the first half of a head goes with n of the second."""
    half = heads.shape[-1] // 2
    angles = np.arange(heads.shape[1])[:, None] * 10_000.0 ** (-np.arange(half) / half)
    first, second = heads[..., :half], heads[..., half:]
    turned = (
        first * np.cos(angles) - second * np.sin(angles),
        first * np.sin(angles) + second * np.cos(angles),
    )
    return np.concatenate(turned, axis=-1)


def _gelu(values: Any) -> Any:
    return 0.5 * values * (1 + np.tanh(np.sqrt(2 / np.pi) * (values + 0.044715 * values**3)))
