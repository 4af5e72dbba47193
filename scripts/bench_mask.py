"""What a constraint costs per token: computing the mask, applying it, taking the token in.

    python scripts/bench_mask.py MODEL.gguf [--tokens 400]

Loads the vocabulary only, so a header-only file (scripts/make_header_gguf.py) will do. Walks
through documents with random allowed tokens and prints medians and 95th percentiles.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np

from localmistral.engine.constraints import (
    Choice,
    ConstraintCompiler,
    Gbnf,
    JsonObject,
    JsonSchema,
    Lark,
    Regex,
    Spec,
)
from localmistral.engine.library import llama
from localmistral.engine.tokenizer import Tokenizer

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "kind": {"enum": ["city", "river", "mountain"]},
        "height_m": {"type": "integer", "minimum": 0, "maximum": 9000},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 4},
        "founded": {"type": "string", "pattern": "^[0-9]{4}-[0-9]{2}$"},
        "position": {
            "type": "object",
            "properties": {"lat": {"type": "number"}, "lon": {"type": "number"}},
            "required": ["lat", "lon"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "kind", "height_m", "tags", "founded", "position"],
    "additionalProperties": False,
}
SPECS: dict[str, Spec] = {
    "JSON schema": JsonSchema(schema=SCHEMA),
    "JSON object": JsonObject(),
    "regex": Regex(pattern=r"[A-Z][a-z]+( [a-z]+){3,40}\."),
    "choice of 200": Choice(options=tuple(f"option {number}" for number in range(200))),
    "Lark": Lark(grammar='start: "-" item ("," item)*\nitem: /[a-z ]+/ | /[0-9]+/'),
    "GBNF": Gbnf(grammar='root ::= "[" item ("," item)* "]"\nitem ::= "\\"" [^"]{1,40} "\\""'),
}


def open_vocabulary(path: Path) -> Tokenizer:
    """The vocabulary of a model file, without its weights; stays loaded until the process ends."""
    params = llama.llama_model_default_params()
    params.vocab_only = True
    model = llama.llama_model_load_from_file(str(path).encode("utf-8"), params)
    if not model:
        raise SystemExit(f"{path} could not be loaded as a vocabulary.")
    return Tokenizer(llama.llama_model_get_vocab(model))


def measure(compiler: ConstraintCompiler, tokenizer: Tokenizer, spec: Spec, tokens: int) -> None:
    """Print one line: compile time, then mask and accept per token, in milliseconds."""
    random = np.random.default_rng(0)
    scores = random.normal(size=(8, tokenizer.size)).astype(np.float32)
    compile_ms, mask_ms, accept_ms = [], [], []
    constraint = None
    for step in range(tokens):
        if constraint is None:
            started = time.perf_counter()
            constraint = compiler.compile(spec)
            compile_ms.append(1e3 * (time.perf_counter() - started))
        logits = scores[step % len(scores)].copy()
        started = time.perf_counter()
        constraint.mask(logits)
        masked = time.perf_counter()
        token = int(random.choice(np.flatnonzero(np.isfinite(logits))))
        mask_ms.append(1e3 * (masked - started))
        if tokenizer.is_end(token):
            constraint = None
            continue
        started = time.perf_counter()
        constraint.accept(token)
        accept_ms.append(1e3 * (time.perf_counter() - started))
    figures = [f"compile {np.median(compile_ms):6.2f}"]
    for name, times in (("mask", mask_ms), ("accept", accept_ms)):
        middle, high = np.median(times), np.percentile(times, 95)
        figures.append(f"{name} {middle:6.3f} (95 %: {high:6.3f})")
    print("  ".join(figures))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=400)
    options = parser.parse_args()
    tokenizer = open_vocabulary(options.model)
    compiler = ConstraintCompiler(tokenizer)
    started = time.perf_counter()
    compiler.compile(Choice(options=("a",)))
    print(
        f"{tokenizer.size} tokens, grammar tokenizer made in {time.perf_counter() - started:.2f} s"
    )
    print("milliseconds per token:")
    for name, spec in SPECS.items():
        print(f"{name:>15}  ", end="", flush=True)
        measure(compiler, tokenizer, spec, options.tokens)
    return 0


if __name__ == "__main__":
    sys.exit(main())
