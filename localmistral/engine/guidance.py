"""Grammars for llguidance, and a constraint that asks it which tokens may come next.

The only importer of llguidance. Knows nothing of what a grammar came from, nor of its cost beyond
the limits it hands on.
"""

import json
import re
import threading
from collections.abc import Callable, Sequence, Set
from typing import Any

import llguidance
import numpy as np

from localmistral.engine.settings import Logits
from localmistral.engine.tokenizer import Tokenizer
from localmistral.errors import EngineError

LIMITS = llguidance.LLParserLimits(
    max_items_in_row=5_000,  # 1,000 optional properties make 4,000; a row takes 2 ms to build
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=200_000,  # about 15 ms
    step_max_items=50_000,
    max_lexer_states=100_000,  # 1-2 KiB each
    max_grammar_size=500_000,
    precompute_large_lexemes=False,
    verbose_errors=False,
)
PROBED_TOKENS = 4
"""Steps tried before a grammar is accepted: some fail only when the second mask is computed."""

_NO_FORCING = '\n%llguidance {"no_forcing": true}\n'
"""Without it llguidance tokenises the rest of every constant at every step: 11 ms for 50 kB."""
_POSITION = re.compile(r"^(?:at )?\d+\(\d+\): ")


class GrammarError(Exception):
    """llguidance refuses a grammar; the message is the first line of its reason."""


class GrammarTokenizer:
    """A vocabulary in llguidance's form, made once: about 0.7 s for 131k tokens.

    Control tokens and those that end a generation are not text: only `<[id]>` allows the former,
    only a complete grammar the latter. `control`, `ends` and `special` (both) are token ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.size = tokenizer.size
        self.ends = tuple(token for token in range(self.size) if tokenizer.is_end(token))
        if not self.ends:
            raise EngineError("The vocabulary has no token that ends a generation.")
        control = [token for token in range(self.size) if tokenizer.is_control(token)]
        self.control = np.setdiff1d(control, self.ends)
        self.special = np.union1d(self.control, self.ends)
        vocabulary: Any = _Vocabulary(tokenizer, self.ends, frozenset(self.special.tolist()))
        self.handle = llguidance.LLTokenizer(
            vocabulary, n_vocab=self.size, eos_token=list(self.ends)
        )


class _Vocabulary:
    """What llguidance reads a vocabulary from (its TokenizerWrapper protocol)."""

    is_tokenizer_wrapper = True
    bos_token_id = None
    special_token_ids: Sequence[int] = ()

    def __init__(self, tokenizer: Tokenizer, ends: Sequence[int], special: Set[int]) -> None:
        self.eos_token_id = ends[0]
        self.tokens = [
            b"\xff" * (token in special) + tokenizer.piece(token) for token in range(tokenizer.size)
        ]
        self._encode: Callable[[str], list[int]] = tokenizer.encode

    def __call__(self, text: bytes | str) -> list[int]:
        plain = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        return self._encode(plain)


class GrammarConstraint:
    """Allows what continues the grammar; end tokens exactly when it is complete."""

    def __init__(self, tokenizer: GrammarTokenizer, grammar: str, *, lenient: bool) -> None:
        """Compile `grammar`, compute the first mask and try some steps; raises GrammarError.

        `lenient` lets pass what llguidance only warns of: parts of a schema that it ignores.
        """
        self._matcher = llguidance.LLMatcher(tokenizer.handle, grammar, log_level=0, limits=LIMITS)
        self._bits = np.zeros(-(-tokenizer.size // 32), np.uint32)
        self._size = tokenizer.size
        self._ends = frozenset(tokenizer.ends)
        complaints = [] if lenient else self._matcher.get_grammar_warnings()
        if self._matcher.is_error() or complaints:
            raise GrammarError(_first_line(self._matcher.get_error() or complaints[0]))
        self._probe()

    def _probe(self) -> None:
        """Walk some steps on a copy, each time with the first token allowed that goes on."""
        matcher = self._matcher.deep_copy()
        for _ in range(PROBED_TOKENS):
            forbidden = self._compute(matcher)
            if matcher.is_error():
                raise GrammarError(_first_line(matcher.get_error()))
            allowed = np.flatnonzero(~forbidden)
            if not allowed.size:
                raise GrammarError("no token of this vocabulary can begin or continue it")
            first = allowed[: len(self._ends) + 1].tolist()
            going_on = next((token for token in first if token not in self._ends), None)
            if going_on is None:
                return
            matcher.consume_token(going_on)

    def _compute(self, matcher: llguidance.LLMatcher) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """The forbidden tokens as booleans, shape (vocabulary,)."""
        matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        bits = (~self._bits).view(np.uint8)
        return np.unpackbits(bits, count=self._size, bitorder="little").view(np.bool_)

    def mask(self, logits: Logits) -> None:
        forbidden = self._compute(self._matcher)
        if self._matcher.is_error():
            reason = _first_line(self._matcher.get_error())
            raise EngineError(f"The constraint can't be followed any further: {reason}.")
        np.putmask(logits, forbidden, -np.inf)

    def accept(self, token: int) -> None:
        if not self._matcher.consume_token(token):
            raise EngineError(f"Token {token} is not allowed by the constraint.")


class LazyTokenizer:
    """The GrammarTokenizer of an engine, made when it is first asked for; from any thread."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._made: GrammarTokenizer | None = None

    def make(self) -> GrammarTokenizer:
        with self._lock:
            if self._made is None:
                self._made = GrammarTokenizer(self._tokenizer)
            return self._made


def write_json(schema: str, *, whitespace: str, lenient: bool) -> str:
    """Lark for a JSON schema (as JSON text); `whitespace` is a pattern, "" for none at all.

    The pattern is matched at most once wherever JSON allows whitespace.
    """
    options: dict[str, object] = {"lenient": lenient, "whitespace_flexible": False}
    if whitespace:
        options["whitespace_pattern"] = whitespace
    members = {"x-guidance": options, **json.loads(schema)} | {"x-guidance": options}
    return f"start: %json {json.dumps(members)}"


def write_regex(pattern: str) -> str:
    """Lark for a pattern that the whole text must match; ^ and $ around it change nothing."""
    return f"start: /{llguidance.regex_to_lark(pattern, '')}/"


def write_choice(options: Sequence[str]) -> str:
    """Lark for one of `options`, to the letter."""
    return "start: " + " | ".join(json.dumps(option) for option in options)


def compose(answer: str, before: str = "") -> str:
    """The grammar to compile: `answer` in Lark, or `before`, which calls for it as @answer."""
    grammars = [{"lark_grammar": before + _NO_FORCING}] if before else []
    grammars.append({"name": "answer", "lark_grammar": answer + _NO_FORCING})
    return json.dumps({"grammars": grammars})


def write_thinking(open_tag: str, close_tag: str, *, opened: bool) -> str:
    """Lark for thinking between tags in text, then at most two newlines or spaces, then @answer.

    When thinking is not `opened` by the prompt it may be left out.
    """
    start = "thinking GAP? @answer"
    if not opened:
        start = f"({json.dumps(open_tag)} thinking GAP?)? @answer"
    close = llguidance.regex_to_lark(re.escape(close_tag), "")
    return f"start: {start}\nthinking[lazy]: /(?s:.*){close}/\nGAP: /[ \\n]{{1,2}}/"


def _first_line(reason: str) -> str:
    lines = reason.strip().splitlines() or ["no reason"]
    # a pattern's parser quotes the pattern first, and says what is wrong in a line of its own
    told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    line = _POSITION.sub("", (told or lines)[0])
    return line.removeprefix("failed to compile JSON schema: ")[:300].rstrip(".")
