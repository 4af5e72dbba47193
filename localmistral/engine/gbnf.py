"""A constraint by llama.cpp's own grammar sampler, for clients that send GBNF.

Slower than the other constraints: each mask is a pass over the whole vocabulary, about 8 ms of CPU
for 49k tokens and 20 ms for 131k (scripts/bench_mask.py). Knows nothing of what makes a grammar
dangerous.
"""

import ctypes
import time
import weakref
from typing import Any

import numpy as np
import numpy.typing as npt

from localmistral.engine.gbnf_check import check_gbnf
from localmistral.engine.library import explain, forget_complaints, llama
from localmistral.engine.settings import Logits
from localmistral.engine.tokenizer import Tokenizer
from localmistral.errors import BadRequestError, EngineError

MAX_MASK_S = 2.0
"""A mask that takes longer ends its request: the engine's other streams wait for it.

llama.cpp can't be stopped within a call, and the cost of a call can grow with every character of a
token by the grammar's ambiguity, so tokens are tried by their length, the short ones first.
"""

_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
"""llama.h: struct llama_token_data."""


class GbnfConstraint:
    """Allows what continues the grammar; end tokens exactly when it is complete.

    llama.cpp takes the spelled-out name of a control token for text: `barred` keeps those out.
    """

    def __init__(
        self, tokenizer: Tokenizer, grammar: str, barred: npt.NDArray[np.int64], param: str
    ) -> None:
        """Raises BadRequestError for a grammar that is malformed or too costly."""
        check_gbnf(grammar, param)
        self._barred = barred
        lengths = np.array([len(tokenizer.piece(token)) for token in range(tokenizer.size)])
        self._order = np.argsort(lengths, kind="stable")
        self._candidates = np.zeros(tokenizer.size, _CANDIDATE)
        self._candidates["id"] = self._order
        cuts = np.flatnonzero(np.diff(lengths[self._order])) + 1
        self._groups = np.split(self._candidates, cuts)  # views, one for each length
        forget_complaints()
        with tokenizer.hold() as vocabulary:
            self._sampler = llama.llama_sampler_init_grammar(
                vocabulary, grammar.encode("utf-8"), b"root"
            )
            if not self._sampler:
                raise BadRequestError(explain("The grammar is refused"), param=param)
            weakref.finalize(self, llama.llama_sampler_free, self._sampler)
            self._try_first(param)

    def _try_first(self, param: str) -> None:
        logits = np.zeros(self._order.size, np.float32)
        try:
            self.mask(logits)
        except EngineError as error:
            raise BadRequestError(
                error.message,
                "Write it with fewer alternatives, or send a JSON schema.",
                param=param,
            ) from error
        if not np.isfinite(logits).any():
            raise BadRequestError(
                "No token of this vocabulary can begin what the grammar describes.", param=param
            )

    def _apply(self, candidates: Any) -> None:
        """Set the logits of forbidden candidates to -inf; llama.cpp keeps their order."""
        array = llama.llama_token_data_array(
            data=ctypes.cast(candidates.ctypes.data, ctypes.POINTER(llama.llama_token_data)),
            size=candidates.size,
            selected=-1,
            sorted=False,
        )
        llama.llama_sampler_apply(self._sampler, ctypes.byref(array))

    def mask(self, logits: Logits) -> None:
        self._candidates["logit"] = logits[self._order]
        started_s = time.monotonic()
        for group in self._groups:
            self._apply(group)
            if time.monotonic() - started_s > MAX_MASK_S:
                raise EngineError(f"The grammar takes more than {MAX_MASK_S:.0f} s for one token.")
        logits[self._order] = self._candidates["logit"]
        logits[self._barred] = -np.inf

    def accept(self, token: int) -> None:
        """llama.cpp ends the process over a token that doesn't match, so it is tried first."""
        alone = np.array([(token, 0.0, 0.0)], _CANDIDATE)
        self._apply(alone)
        if token in self._barred or not np.isfinite(alone["logit"][0]):
            raise EngineError(f"Token {token} is not allowed by the grammar.")
        llama.llama_sampler_accept(self._sampler, token)
