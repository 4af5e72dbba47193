"""What the engine is told: how to load a model, how to sample, what one request asks for.

Plain values with their checks; knows nothing of llama.cpp.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from localmistral.errors import BadRequestError
from localmistral.fit.plan import KV_TYPES, SPLIT_MODES

MAX_SEED = 2**32 - 2
"""llama.cpp takes 2^32 - 1 for "draw one"."""
MAX_TOP_LOGPROBS = 20
MAX_TOKENS = 2**31 - 1
MAX_STOPS = 64
MAX_STOP_CHARACTERS = 4096
MAX_LAYERS = 10_000

Logits = npt.NDArray[np.float32]


_LOAD_RANGES = (
    ("context", 1, 2**24),
    ("parallel", 1, 256),
    ("stored_bytes", 0, 2**50),
    ("queue", 1, 100_000),
    ("batch", 1, 65_536),
    ("ubatch", 1, 65_536),
    ("threads", 0, 512),
    ("gpu_layers", -1, MAX_LAYERS),
)
"""Bounds far beyond use: C's integers would wrap silently, and llama.cpp ends the process."""
MAX_BIAS = 10_000
MAX_BREAKERS = 64
GREEDY_BELOW = 1e-4
"""Temperatures below this count as 0: dividing by them overflows a float."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """How a model is loaded.

    `context` is tokens per stream, `parallel` the number of streams that generate at once,
    `batch` the most tokens of one decode call and `ubatch` of one graph; 0 threads means the
    physical cores. `queue` is how many requests may wait. Up to `stored_bytes` of RAM, but no
    more than the context's own cache takes, keep what earlier requests computed and later ones
    overwrote. `gpu_layers` is -1 for all of them. `repack` lets the CPU copy weights into a layout
    that is faster for it, which takes their size in memory once more.

    `devices` are names as ggml reports them (`CUDA0`, `RPC1`), in the order of `tensor_split`;
    empty leaves the choice to llama.cpp, ("CPU",) uses no other device at all. `tensor_split` are
    the devices' shares: layers, where they are integers that sum to `gpu_layers`. The routed
    experts of `cpu_expert_layers` stay in RAM. `split_mode` is none (the first device alone),
    layer, or tensor (every matrix over all devices).
    """

    context: int = 4096
    parallel: int = 1
    stored_bytes: int = 1 << 30
    queue: int = 64
    batch: int = 2048
    ubatch: int = 512
    threads: int = 0
    kv_type: str = "f16"
    flash_attention: bool | None = None
    gpu_layers: int = -1
    devices: tuple[str, ...] = ()
    tensor_split: tuple[float, ...] = ()
    cpu_expert_layers: tuple[int, ...] = ()
    split_mode: str = "layer"
    mmap: bool = True
    repack: bool = True

    def __post_init__(self) -> None:
        for name, low, high in _LOAD_RANGES:
            _check_range(name, getattr(self, name), low, high)
        if self.kv_type not in KV_TYPES:
            raise BadRequestError(
                f"The KV type {self.kv_type!r} is not known.", f"Use one of {', '.join(KV_TYPES)}."
            )
        _check_devices(self.devices)
        _check_shares(self.tensor_split, len(self.devices))
        for layer in self.cpu_expert_layers:
            _check_range("cpu_expert_layers", layer, 0, MAX_LAYERS)
        _check_split_mode(self.split_mode, self.devices, self.flash_attention)


def _check_devices(devices: Sequence[str]) -> None:
    if len(set(devices)) < len(devices):
        raise BadRequestError(
            f"A device is named twice in {', '.join(devices)}.", "Name every device once."
        )
    if "CPU" in devices and len(devices) > 1:
        raise BadRequestError(
            f"The CPU is named among {len(devices)} devices, it takes what they leave anyway.",
            "Name the CPU alone, or leave it out.",
        )


def _check_shares(shares: Sequence[float], device_count: int) -> None:
    if not all(isinstance(share, int | float) and 0 <= share < math.inf for share in shares):
        raise BadRequestError(
            f"tensor_split is {', '.join(map(str, shares))}, its shares must be 0 or more.",
            param="tensor_split",
        )
    if shares and not any(shares):
        raise BadRequestError("All shares of tensor_split are 0.", param="tensor_split")
    if device_count and len(shares) > device_count:
        raise BadRequestError(
            f"tensor_split has {len(shares)} shares for {device_count} devices.",
            "Give one share per device.",
            param="tensor_split",
        )


def _check_split_mode(mode: str, devices: Sequence[str], flash_attention: bool | None) -> None:
    if mode not in SPLIT_MODES:
        raise BadRequestError(
            f"The split mode {mode!r} is not known.", f"Use one of {', '.join(SPLIT_MODES)}."
        )
    if mode == "tensor" and (len(devices) == 1 or flash_attention is False):
        needs = "at least 2 devices" if len(devices) == 1 else "flash attention"
        raise BadRequestError(
            f"The split mode tensor needs {needs}.", "Use the split mode layer.", param="split_mode"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen; the defaults are llama.cpp's.

    Temperature 0 takes the most likely token. `seed` None draws one, which the result names.
    Applied in llama.cpp's order: bias, penalties, DRY, top_n_sigma, top_k, typical, top_p, min_p,
    XTC, temperature.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    typical_p: float = 1.0
    top_n_sigma: float = -1.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = -1
    dry_sequence_breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    repeat_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    penalty_last_n: int = 64
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def is_repeatable(self) -> bool:
        """Whether the same request is meant to give the same text again."""
        return self.is_greedy or self.seed is not None

    def __post_init__(self) -> None:
        _check_range("temperature", self.temperature, 0, 100)
        _check_range("top_k", self.top_k, 0, 2**31 - 1)
        for name in ("top_p", "min_p", "typical_p", "xtc_probability", "xtc_threshold"):
            _check_range(name, getattr(self, name), 0, 1)
        _check_range("top_n_sigma", self.top_n_sigma, -1, 1_000_000)
        _check_range("dry_multiplier", self.dry_multiplier, 0, 1_000_000)
        _check_range("dry_base", self.dry_base, 0, 1_000_000)
        _check_range("dry_allowed_length", self.dry_allowed_length, 0, 2**31 - 1)
        _check_range("dry_penalty_last_n", self.dry_penalty_last_n, -1, 2**31 - 1)
        _check_range("repeat_penalty", self.repeat_penalty, 0.001, 1_000_000)
        _check_range("frequency_penalty", self.frequency_penalty, -100, 100)
        _check_range("presence_penalty", self.presence_penalty, -100, 100)
        _check_range("penalty_last_n", self.penalty_last_n, -1, 2**31 - 1)
        if self.seed is not None:
            _check_range("seed", self.seed, 0, MAX_SEED)
        for token, bias in self.logit_bias.items():
            if not (abs(bias) <= MAX_BIAS or bias == -math.inf):
                raise BadRequestError(
                    f"logit_bias of token {token} is {bias}, it must be within {MAX_BIAS} of 0.",
                    param="logit_bias",
                )
        _check_breakers(self.dry_sequence_breakers)


def _check_breakers(breakers: Sequence[str]) -> None:
    if len(breakers) > MAX_BREAKERS:
        raise BadRequestError(
            f"There are {len(breakers)} dry_sequence_breakers, at most {MAX_BREAKERS} are taken.",
            param="dry_sequence_breakers",
        )
    for text in breakers:
        if not 0 < len(text) <= MAX_STOP_CHARACTERS or any("\ud800" <= c <= "\udfff" for c in text):
            raise BadRequestError(
                f"Each of dry_sequence_breakers must have 1 to {MAX_STOP_CHARACTERS} characters.",
                param="dry_sequence_breakers",
            )


_FRACTIONS = frozenset(
    {
        "temperature",
        "top_p",
        "min_p",
        "typical_p",
        "top_n_sigma",
        "xtc_probability",
        "xtc_threshold",
        "dry_multiplier",
        "dry_base",
        "repeat_penalty",
        "frequency_penalty",
        "presence_penalty",
    }
)


def _check_range(name: str, value: object, low: float, high: float) -> None:
    """Refuse what is no number, or outside `low..high`; NaN is outside of everything."""
    kind = "a number" if name in _FRACTIONS else "a whole number"
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or (name not in _FRACTIONS and not isinstance(value, int)):
        raise BadRequestError(f"{name} is {str(value)[:40]!r}, it must be {kind}.", param=name)
    assert isinstance(value, int | float)
    if not low <= value <= high:
        raise BadRequestError(
            f"{name} is {value}, it must be between {low} and {high}.", param=name
        )


class Constraint(Protocol):
    """Says which tokens may come next; one object serves one request, on the engine's thread."""

    def mask(self, logits: Logits) -> None:
        """Set the logits of forbidden tokens to -inf, in place; shape (vocabulary,)."""

    def accept(self, token: int) -> None:
        """`token` was chosen."""


class Guide(Protocol):
    """Writes into the answer itself at times; one object serves one request."""

    def follow(self, token: int) -> Sequence[int]:
        """Tokens to put after `token`, which was just chosen; none lets the model go on."""


class Proposer(Protocol):
    """Guesses the tokens to come, so that one decode step can confirm several of them."""

    def propose(self, tokens: Sequence[int]) -> Sequence[int]:
        """Likely followers of `tokens` (prompt and answer so far); may be empty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One generation: the prompt's token ids, and when to end.

    `max_tokens` None means up to the context's end. `stop` strings end the text before them.
    `cache_prompt` False computes the prompt cold, so that the text depends on nothing that ran
    before. Between the two tokens of `thinking` no stop string is looked for; `in_thinking` says
    that the prompt ends between them. `top_logprobs` None reports no log-probabilities, 0 those
    of the chosen tokens alone. `stop_tokens` end the answer as the model's own ends do, and are no
    part of it; before `min_tokens` tokens nothing ends it, unless its constraint allows no more.
    """

    prompt: tuple[int, ...]
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    cache_prompt: bool = True
    top_logprobs: int | None = None
    ignore_eos: bool = False
    min_tokens: int = 0
    stop_tokens: tuple[int, ...] = ()
    thinking: tuple[int, int] | None = None
    in_thinking: bool = False
    constraint: Constraint | None = None
    guide: Guide | None = None
    proposer: Proposer | None = None

    def __post_init__(self) -> None:
        if not self.prompt:
            raise BadRequestError("The prompt has 0 tokens, it needs at least 1.", param="prompt")
        if self.max_tokens is not None:
            _check_range("max_tokens", self.max_tokens, 1, MAX_TOKENS)
        most = MAX_TOKENS if self.max_tokens is None else self.max_tokens
        _check_range("min_tokens", self.min_tokens, 0, most)
        if len(self.stop_tokens) > MAX_STOPS:
            raise BadRequestError(
                f"There are {len(self.stop_tokens)} stop tokens, at most {MAX_STOPS} are taken.",
                param="stop_token_ids",
            )
        if self.top_logprobs is not None:
            _check_range("top_logprobs", self.top_logprobs, 0, MAX_TOP_LOGPROBS)
        if len(self.stop) > MAX_STOPS:
            raise BadRequestError(
                f"There are {len(self.stop)} stop strings, at most {MAX_STOPS} are taken.",
                param="stop",
            )
        for text in self.stop:
            if not isinstance(text, str):
                raise BadRequestError(f"A stop string is {text!r}, not a text.", param="stop")
            if not 0 < len(text) <= MAX_STOP_CHARACTERS:
                raise BadRequestError(
                    f"A stop string has {len(text)} characters, it needs 1 to "
                    f"{MAX_STOP_CHARACTERS}.",
                    param="stop",
                )
