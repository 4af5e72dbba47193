"""What a model file says about the model: the types that planning, prompts and the engine read.

Holds data and sums; knows neither the file format nor where the numbers came from.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from functools import cached_property
from pathlib import Path

from localmistral.errors import ModelFileError

# llama.cpp's own expression for what `--n-cpu-moe` moves; shared experts (`_shexp`) are dense
_EXPERT_NAME = re.compile(r"^blk\.\d+\.ffn_(up|down|gate_up|gate)_(ch|)exps\b")
_LAYER_NAME = re.compile(r"^blk\.(\d+)\.")
_EMBEDDING_NAME = re.compile(r"^(token_embd|per_layer_token_embd|position_embd|token_types)\b")
_OUTPUT_NAME = re.compile(r"^(output|output_norm|cls)\b")

# llama.cpp gives these no memory of what came before (its llama-model.cpp, `create_memory`), so
# they can't write; they read a text in both directions, whatever their files say of that
ENCODER_ARCHITECTURES = frozenset(
    (
        "bert",
        "eurobert",
        "gemma-embedding",
        "jina-bert-v2",
        "jina-bert-v3",
        "modern-bert",
        "neo-bert",
        "nomic-bert",
        "nomic-bert-moe",
    )
)
_ENCODERS_WITH_OUTPUT = ("gemma-embedding",)
# llama.h's enum llama_pooling_type: MEAN, CLS and LAST. NONE gives no vector of a whole text, and
# RANK gives a score.
VECTOR_POOLINGS = frozenset((1, 2, 3))

# llama.h's enum llama_ftype, as quantised files are named
FILE_TYPE_NAMES = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    7: "Q8_0",
    8: "Q5_0",
    9: "Q5_1",
    10: "Q2_K",
    11: "Q3_K_S",
    12: "Q3_K_M",
    13: "Q3_K_L",
    14: "Q4_K_S",
    15: "Q4_K_M",
    16: "Q5_K_S",
    17: "Q5_K_M",
    18: "Q6_K",
    19: "IQ2_XXS",
    20: "IQ2_XS",
    21: "Q2_K_S",
    22: "IQ3_XS",
    23: "IQ3_XXS",
    24: "IQ1_S",
    25: "IQ4_NL",
    26: "IQ3_S",
    27: "IQ3_M",
    28: "IQ2_S",
    29: "IQ2_M",
    30: "IQ4_XS",
    31: "IQ1_M",
    32: "BF16",
    36: "TQ1_0",
    37: "TQ2_0",
    38: "MXFP4_MOE",
    39: "NVFP4",
    40: "Q1_0",
    41: "Q2_0",
}


SAMPLING_KEYS = (
    ("temp", "temperature"),
    ("top_k", "top_k"),
    ("top_p", "top_p"),
    ("min_p", "min_p"),
    ("penalty_repeat", "repeat_penalty"),
)
"""Keys below `general.sampling.` that llama.cpp reads, and our names of them."""


class FileKind(StrEnum):
    """What a GGUF file is for; only a MODEL can be run on its own."""

    MODEL = "model"
    PROJECTOR = "vision projector"
    ADAPTER = "LoRA adapter"
    IMATRIX = "importance matrix"
    CONTROL_VECTOR = "control vector"


class TensorRole(StrEnum):
    """Where a tensor counts: with its layer, with the layer's routed experts, or at the ends."""

    EMBEDDING = "embedding"
    DENSE = "dense"
    EXPERT = "expert"
    OUTPUT = "output"
    OTHER = "other"


class TokenType(IntEnum):
    """GGUF's `tokenizer.ggml.token_type`."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def role_of(name: str) -> TensorRole:
    """The role of a tensor by its GGUF name."""
    if _EXPERT_NAME.match(name):
        return TensorRole.EXPERT
    if _LAYER_NAME.match(name):
        return TensorRole.DENSE
    if _EMBEDDING_NAME.match(name):
        return TensorRole.EMBEDDING
    if _OUTPUT_NAME.match(name):
        return TensorRole.OUTPUT
    return TensorRole.OTHER


def layer_of(name: str) -> int | None:
    """The layer a tensor belongs to by its GGUF name, None for the ends of the model."""
    match = _LAYER_NAME.match(name)
    return int(match[1]) if match else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """One tensor: `dims` in ggml's order (row length first), `type` as ggml names it."""

    name: str
    dims: tuple[int, ...]
    type: str
    elements: int
    bytes: int
    file_index: int
    layer: int | None
    role: TensorRole


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary positions; `scaling` is none, linear, yarn or longrope."""

    dimension_count: int | None = None
    freq_base: float | None = None
    scaling: str = "none"
    factor: float | None = None
    original_context_length: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecialTokens:
    """Ids the file states; None where it doesn't, or states one that means "none"."""

    bos: int | None = None
    eos: int | None = None
    eot: int | None = None
    eom: int | None = None
    unknown: int | None = None
    separator: int | None = None
    padding: int | None = None
    mask: int | None = None
    fim_prefix: int | None = None
    fim_suffix: int | None = None
    fim_middle: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenizer:
    """The vocabulary without its texts. A flag is None where the file leaves it to llama.cpp."""

    model: str = ""
    pre: str = ""
    token_count: int = 0
    special: SpecialTokens = SpecialTokens()
    add_bos: bool | None = None
    add_eos: bool | None = None
    add_space_prefix: bool | None = None
    chat_template: str | None = None
    named_chat_templates: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """Every token by id; bytes that are no UTF-8 show as U+FFFD."""

    texts: tuple[str, ...]
    types: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)  # no slots: the sums below are computed once and kept
class ModelShape:
    """All a model's files say before the weights. Counts the file doesn't give are 0.

    Lengths are numbers of elements. `feed_forward_lengths`, `head_counts` and `kv_head_counts`
    have one entry a layer (0 where a layer has none). `key_length` and `value_length` are per
    head; for models with latent attention they are those of the compressed cache, and the
    `_mla` pair holds what a head works with. `sliding_window_layers` says which layers slide
    where the file lists them, `sliding_window_period` after how many layers one doesn't.
    `expert_used_count` is the most that any layer uses. `pooling` is how the vectors of its tokens
    become that of a text (0: not at all), `is_causal` whether a token sees only what came before.
    `sampling` are the values the file recommends, unchecked: temperature, top_k and so on.
    """

    files: tuple[Path, ...]
    file_bytes: tuple[int, ...]
    version: int
    kind: FileKind
    architecture: str
    name: str
    size_label: str
    file_type: int | None
    layer_count: int = 0
    nextn_layer_count: int = 0
    embedding_length: int = 0
    context_length: int = 0
    vocabulary_size: int = 0
    feed_forward_lengths: tuple[int, ...] = ()
    head_counts: tuple[int, ...] = ()
    kv_head_counts: tuple[int, ...] = ()
    key_length: int = 0
    value_length: int = 0
    key_length_mla: int = 0
    value_length_mla: int = 0
    q_lora_rank: int = 0
    kv_lora_rank: int = 0
    rope: Rope = Rope()
    expert_count: int = 0
    expert_used_count: int = 0
    expert_shared_count: int = 0
    expert_feed_forward_length: int = 0
    leading_dense_layer_count: int = 0
    pooling: int = 0
    is_causal: bool = True
    sliding_window: int = 0
    sliding_window_period: int = 0
    sliding_window_layers: tuple[bool, ...] = ()
    tokenizer: Tokenizer
    sampling: tuple[tuple[str, float], ...]
    tensors: tuple[Tensor, ...]

    @property
    def file_type_name(self) -> str:
        """Such as `Q4_K_M`; empty where the file doesn't say or the number is new."""
        return FILE_TYPE_NAMES.get(-1 if self.file_type is None else self.file_type, "")

    @property
    def is_vocabulary_only(self) -> bool:
        return not self.tensors

    @property
    def has_latent_attention(self) -> bool:
        """MLA: one compressed row a token instead of keys and values per head."""
        return self.key_length_mla > 0 and self.value_length_mla > 0

    @property
    def is_encoder(self) -> bool:
        """llama.cpp keeps no memory for it: it can't write."""
        return self.architecture in ENCODER_ARCHITECTURES

    @property
    def looks_ahead(self) -> bool:
        """A token sees what comes after it, so that nothing can be written one by one."""
        return self.is_encoder or not self.is_causal

    @property
    def only_embeds(self) -> bool:
        """It turns texts into vectors and can't write."""
        return self.looks_ahead and self.pooling in VECTOR_POOLINGS

    @cached_property
    def has_tied_embeddings(self) -> bool:
        """No `output.weight`: llama.cpp loads the embedding a second time as the output."""
        if self.is_encoder and self.architecture not in _ENCODERS_WITH_OUTPUT:
            return False
        names = {tensor.name for tensor in self.tensors}
        return "token_embd.weight" in names and "output.weight" not in names

    @cached_property
    def dense_bytes(self) -> tuple[int, ...]:
        """Bytes of everything but routed experts, by layer."""
        return self._bytes_by_layer(TensorRole.DENSE)

    @cached_property
    def expert_bytes(self) -> tuple[int, ...]:
        """Bytes of routed experts, by layer."""
        return self._bytes_by_layer(TensorRole.EXPERT)

    @cached_property
    def embedding_bytes(self) -> int:
        return _sum_bytes(self.tensors, TensorRole.EMBEDDING)

    @cached_property
    def output_bytes(self) -> int:
        """Bytes of the output tensors in the file: without the embedding, even if it is tied."""
        return _sum_bytes(self.tensors, TensorRole.OUTPUT)

    @cached_property
    def weight_bytes(self) -> int:
        return sum(tensor.bytes for tensor in self.tensors)

    @cached_property
    def parameter_count(self) -> int:
        return sum(tensor.elements for tensor in self.tensors)

    def _bytes_by_layer(self, role: TensorRole) -> tuple[int, ...]:
        sums = [0] * self.layer_count
        for tensor in self.tensors:
            if tensor.role is role and tensor.layer is not None:
                sums[tensor.layer] += tensor.bytes
        return tuple(sums)


def _sum_bytes(tensors: Iterable[Tensor], role: TensorRole) -> int:
    return sum(tensor.bytes for tensor in tensors if tensor.role is role)


def require_runnable(shape: ModelShape) -> None:
    """Refuse, with ModelFileError, a readable file that is no language model with weights."""
    name = shape.files[0].name
    if shape.kind is FileKind.PROJECTOR:
        raise ModelFileError(
            f"{name} is a vision projector (architecture {shape.architecture}), "
            "which only works beside its language model.",
            "Name the model's own GGUF file: localmistral run -m MODEL.gguf",
        )
    if shape.kind is not FileKind.MODEL:
        article = "an" if shape.kind is FileKind.IMATRIX else "a"
        raise ModelFileError(
            f"{name} is {article} {shape.kind.value}, not a language model.",
            "Name the model's own GGUF file: localmistral run -m MODEL.gguf",
        )
    if shape.looks_ahead and not shape.only_embeds:
        raise ModelFileError(
            f"{name} reads texts in both directions (architecture {shape.architecture}) and names "
            "no pooling to a vector, so it can neither write nor make embeddings.",
            "Name a chat or an embedding model: localmistral serve -m MODEL.gguf",
        )
    if shape.tokenizer.token_count == 0:
        raise ModelFileError(
            f"{name} has weights but no vocabulary (tokenizer {shape.tokenizer.model[:20]!r}), "
            "so it can't read text.",
            "Name a file with a vocabulary: localmistral run -m MODEL.gguf",
        )
    if shape.is_vocabulary_only:
        raise ModelFileError(
            f"{name} holds a vocabulary of {shape.tokenizer.token_count:,} tokens but no weights.",
            "Name a file with weights: localmistral run -m MODEL.gguf",
        )


def require_writer(shape: ModelShape, name: str) -> None:
    """Refuse, with ModelFileError, a model that makes embeddings alone; `name` is what to type."""
    if shape.only_embeds:
        raise ModelFileError(
            f"{shape.files[0].name} makes embeddings, it can't chat.",
            f"Serve it: localmistral serve -m {name}",
        )
