"""The engine's speed as a share of a bare loop's, in one process, in alternation.

    python scripts/bench_engine.py MODEL.gguf --streams 1,4,8

The bare loop does the same work with nothing around it: one `llama_decode` per step with a token
of each stream, one `llama_sampler_sample` per stream, the same context size and samplers. Both
generate the same number of tokens from the same prompts; only the time after the prompts counts.
Run it with nothing else running: the ratio is that of the median speeds, and the ratios of single
rounds show how steady the machine was.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from localmistral.engine import Engine, EngineSettings, Request, Sampling
from localmistral.engine.library import llama
from localmistral.engine.model import Context, Model
from localmistral.engine.sampling import Sampler

SAMPLING = Sampling(seed=1)


@dataclass(frozen=True, slots=True)
class BareTimes:
    """Seconds to the first token of each prompt, and of all steps after that."""

    first_s: tuple[float, ...]
    decode_s: float


class BareLoop:
    """llama.cpp with as little Python around it as can be."""

    def __init__(self, path: Path, settings: EngineSettings) -> None:
        self._model = Model([path], settings)
        self._context = Context(self._model, settings)
        self._memory = llama.llama_get_memory(self._context.pointer)

    def run(self, prompts: list[tuple[int, ...]], tokens: int) -> BareTimes:
        """Generate `tokens` per prompt, computing one whole prompt after the other first."""
        context, decode, sample = self._context, llama.llama_decode, llama.llama_sampler_sample
        llama.llama_memory_clear(self._memory, False)
        samplers = [Sampler(self._model.vocabulary, SAMPLING) for _ in prompts]
        chains = [sampler._chain for sampler in samplers]
        chosen, first_s = [], []
        begun = time.perf_counter()
        for number, prompt in enumerate(prompts):
            context.clear_batch()
            row = context.add(number, 0, prompt, logits=1) + len(prompt) - 1
            assert context.decode() == 0
            chosen.append(sample(chains[number], context.pointer, row))
            first_s.append(time.perf_counter() - begun)
        streams = range(len(prompts))
        positions = np.asarray([len(prompt) for prompt in prompts], np.int32)
        context.clear_batch()
        for number in streams:
            context.add(number, 0, (0,), logits=1)
        batch, pointer = context._batch, context.pointer
        batch.n_tokens = len(prompts)
        started = time.perf_counter()
        for step in range(tokens - 1):
            context._tokens[: len(prompts)] = chosen
            context._positions[: len(prompts)] = positions + step
            assert decode(pointer, batch) == 0
            chosen = [sample(chains[number], pointer, number) for number in streams]
        decode_s = time.perf_counter() - started
        for sampler in samplers:
            sampler.close()
        return BareTimes(tuple(first_s), decode_s)

    def close(self) -> None:
        self._context.close()
        self._model.close()


def run_engine(engine: Engine, prompts: list[tuple[int, ...]], tokens: int) -> float:
    """The same through the engine, one reading thread per stream, as a server would have."""
    begun, ended = [0.0] * len(prompts), [0.0] * len(prompts)

    def read(number: int) -> None:
        request = Request(
            prompt=prompts[number], max_tokens=tokens, sampling=SAMPLING, ignore_eos=True
        )
        events = iter(engine.submit(request))
        next(events)
        begun[number] = time.perf_counter()
        for _ in events:
            continue
        ended[number] = time.perf_counter()

    threads = [threading.Thread(target=read, args=(number,)) for number in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return max(ended) - max(begun)


def compare(path: Path, streams: int, tokens: int, rounds: int) -> None:
    """Print the speeds and their ratio for one number of streams."""
    settings = EngineSettings(context=512, parallel=streams)
    bare = BareLoop(path, settings)
    with Engine.load([path], settings) as engine:
        prompts = [
            tuple(engine.tokenize(f"Question {n}: what is the number {n} good for? Answer:"))
            for n in range(streams)
        ]
        speeds: tuple[list[float], list[float]] = ([], [])
        for number in range(rounds + 1):
            order = (0, 1) if number % 2 else (1, 0)
            for which in order:
                seconds = (
                    run_engine(engine, prompts, tokens)
                    if which
                    else bare.run(prompts, tokens).decode_s
                )
                if number:  # the first round only warms up
                    speeds[which].append(streams * (tokens - 1) / seconds)
    bare.close()
    ours, theirs = statistics.median(speeds[1]), statistics.median(speeds[0])
    single = sorted(a / b for a, b in zip(speeds[1], speeds[0], strict=True))
    print(
        f"{streams} streams: engine {ours:.1f} tokens/s, bare loop {theirs:.1f} tokens/s, "
        f"ratio {ours / theirs:.3f} (rounds {single[0]:.3f} to {single[-1]:.3f}, "
        f"median {statistics.median(single):.3f})",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--streams", default="1,4,8")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    for streams in map(int, arguments.streams.split(",")):
        compare(arguments.model, streams, arguments.tokens, arguments.rounds)


if __name__ == "__main__":
    main()
