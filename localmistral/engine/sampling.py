"""Choosing the next token with llama.cpp's samplers, and its log-probability.

One `Sampler` belongs to one request and is used on the engine's thread. Knows nothing of text.
"""

import ctypes
import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from localmistral.engine.library import llama
from localmistral.engine.model import Context
from localmistral.engine.settings import MAX_SEED, Constraint, Logits, Sampling
from localmistral.errors import EngineError


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenProbability:
    """Natural-log probability of a token under the model, before any sampling setting."""

    token: int
    logprob: float
    alternatives: tuple[tuple[int, float], ...] = ()


class Sampler:
    """A chain of llama.cpp's samplers with the state of one request.

    The same seed gives the same choices for the same logits; what runs beside a request can
    change its logits in their last bits, since llama.cpp groups rows into larger products.
    """

    def __init__(
        self,
        vocabulary: Any,
        sampling: Sampling,
        *,
        constraint: Constraint | None = None,
        top_logprobs: int | None = None,
        min_tokens: int = 0,
        held_back: Sequence[int] = (),
    ) -> None:
        """None of `held_back` is chosen among the first `min_tokens`, unless nothing else is
        left."""
        self.seed = secrets.randbelow(MAX_SEED) if sampling.seed is None else sampling.seed
        self._constraint = constraint
        self._top_logprobs = top_logprobs
        self._held_back = np.asarray(held_back, np.int64)
        self._still_held = min_tokens if held_back else 0
        self._bias = sampling.logit_bias
        self._chain = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
        for sampler in _make_samplers(vocabulary, sampling, self.seed):
            llama.llama_sampler_chain_add(self._chain, sampler)
        self._looks_back = bool(
            sampling.repeat_penalty != 1
            or sampling.frequency_penalty
            or sampling.presence_penalty
            or sampling.dry_multiplier
        )

    def accept_prompt(self, tokens: Sequence[int]) -> None:
        """Show the prompt to the samplers that look back; the others need not see it."""
        if self._looks_back:
            for token in tokens:
                llama.llama_sampler_accept(self._chain, int(token))

    def sample(self, context: Context, row: int) -> tuple[int, TokenProbability | None]:
        """Choose from the logits of `row`; raises EngineError when no token is allowed."""
        if self._constraint is None and self._top_logprobs is None and not self._still_held:
            token = int(llama.llama_sampler_sample(self._chain, context.pointer, row))
            self._check_choice(token, context.logit(row, token))
            return token, None
        logits = context.logits(row)
        probabilities = None
        if self._top_logprobs is not None:
            probabilities = logits - _log_sum_exp(logits)
        if self._constraint is not None:
            self._constraint.mask(logits)
            if not np.isfinite(logits.max()):
                raise EngineError("The constraint leaves no token to go on with.")
        if self._still_held:
            self._hold_back(logits)
        token = int(llama.llama_sampler_sample(self._chain, context.pointer, row))
        self._check_choice(token, float(logits[token]))
        if self._constraint is not None:
            self._constraint.accept(token)
        if probabilities is None:
            return token, None
        return token, _report(token, probabilities, self._top_logprobs or 0)

    def _hold_back(self, logits: Logits) -> None:
        self._still_held -= 1
        kept = logits[self._held_back]
        logits[self._held_back] = -np.inf
        if not np.isfinite(logits.max()):  # a complete form ends, however short it is
            logits[self._held_back] = kept

    def _check_choice(self, token: int, logit: float) -> None:
        """llama.cpp chooses a token even when all are forbidden, or when it computed nonsense."""
        if math.isnan(logit) or math.isinf(logit) or self._bias.get(token) == -math.inf:
            raise EngineError(f"No token is left to go on with: the best has a logit of {logit}.")

    def accept(self, token: int) -> None:
        """Note a token that was not sampled but put into the answer."""
        self._still_held = max(0, self._still_held - 1)
        llama.llama_sampler_accept(self._chain, token)
        if self._constraint is not None:
            self._constraint.accept(token)

    def close(self) -> None:
        if self._chain:
            llama.llama_sampler_free(self._chain)
            self._chain = None


def _log_sum_exp(logits: Logits) -> np.floating[Any]:
    peak = logits.max()
    return peak + np.log(np.exp(logits - peak).sum(dtype=np.float64))  # type: ignore[no-any-return]


def _report(token: int, probabilities: Any, top: int) -> TokenProbability:
    alternatives: tuple[tuple[int, float], ...] = ()
    if top:
        best = np.argpartition(-probabilities, top)[:top]
        best = best[np.argsort(-probabilities[best], kind="stable")]
        alternatives = tuple((int(i), float(probabilities[i])) for i in best)
    return TokenProbability(
        token=token, logprob=float(probabilities[token]), alternatives=alternatives
    )


def _make_samplers(vocabulary: Any, sampling: Sampling, seed: int) -> list[Any]:
    """llama.cpp's samplers in its own default order; those that would change nothing left out."""
    samplers = [
        *_make_bias(vocabulary, sampling),
        *_make_penalties(vocabulary, sampling),
    ]
    if sampling.is_greedy:
        return [*samplers, llama.llama_sampler_init_greedy()]
    if sampling.top_n_sigma > 0:
        samplers.append(llama.llama_sampler_init_top_n_sigma(sampling.top_n_sigma))
    if sampling.top_k > 0:
        samplers.append(llama.llama_sampler_init_top_k(sampling.top_k))
    if sampling.typical_p < 1:
        samplers.append(llama.llama_sampler_init_typical(sampling.typical_p, 1))
    if sampling.top_p < 1:
        samplers.append(llama.llama_sampler_init_top_p(sampling.top_p, 1))
    if sampling.min_p > 0:
        samplers.append(llama.llama_sampler_init_min_p(sampling.min_p, 1))
    if sampling.xtc_probability > 0:
        samplers.append(
            llama.llama_sampler_init_xtc(sampling.xtc_probability, sampling.xtc_threshold, 1, seed)
        )
    samplers.append(llama.llama_sampler_init_temp(sampling.temperature))
    samplers.append(llama.llama_sampler_init_dist(seed))
    return samplers


def _make_bias(vocabulary: Any, sampling: Sampling) -> list[Any]:
    if not sampling.logit_bias:
        return []
    biases = [llama.llama_logit_bias(token, bias) for token, bias in sampling.logit_bias.items()]
    array = (llama.llama_logit_bias * len(biases))(*biases)
    size = llama.llama_vocab_n_tokens(vocabulary)
    return [llama.llama_sampler_init_logit_bias(size, len(biases), array)]


def _make_penalties(vocabulary: Any, sampling: Sampling) -> list[Any]:
    samplers = []
    if (sampling.repeat_penalty, sampling.frequency_penalty, sampling.presence_penalty) != (
        1,
        0,
        0,
    ):
        samplers.append(
            llama.llama_sampler_init_penalties(
                llama.llama_vocab_n_tokens(vocabulary),
                _look_back(sampling.penalty_last_n),
                sampling.repeat_penalty,
                sampling.frequency_penalty,
                sampling.presence_penalty,
            )
        )
    if sampling.dry_multiplier > 0:
        breakers = [text.encode("utf-8") for text in sampling.dry_sequence_breakers]
        samplers.append(
            llama.llama_sampler_init_dry(
                vocabulary,
                sampling.dry_multiplier,
                sampling.dry_base,
                sampling.dry_allowed_length,
                _look_back(sampling.dry_penalty_last_n),
                (ctypes.c_char_p * len(breakers))(*breakers),
                len(breakers),
            )
        )
    return samplers


_WHOLE_TEXT = 1 << 18
"""Tokens looked back at for "-1, the whole text": 256k, the longest context served."""


def _look_back(last_n: int) -> int:
    return _WHOLE_TEXT if last_n < 0 else min(last_n, _WHOLE_TEXT)
