"""Two servers under the same load, in alternation: throughput, first tokens, gaps, second turns.

    localmistral serve -m MODEL.gguf --port 8081 --parallel 16 --context 3072 --threads 2
    python scripts/bench_server.py --ours http://127.0.0.1:8081 --peer http://127.0.0.1:8082

Both have to hold 16 streams of 3,072 tokens. The peer is any server with OpenAI's chat interface
that knows `ignore_eos`; llama.cpp's own comes as a wheel (xllamacpp, in an environment of its own):

    p = xllamacpp.CommonParams(); p.model.path = "MODEL.gguf"; p.port = 8082
    p.n_parallel = 16; p.n_ctx = 16 * 3072; p.cpuparams.n_threads = 2
    p.cpuparams_batch.n_threads = 2; xllamacpp.Server(p); time.sleep(1e6)

With `--bare MODEL.gguf` a third column is llama.cpp called in a loop in this process, with nothing
around it (see bench_engine.py): the same numbers of streams and tokens from the same prompts, which
it computes whole, one after the other.

Every round asks both with the same new prompts, so that no prefix is known to either. Figures are
medians of the rounds; run it with nothing else running. The client is one thread with plain
sockets: it shares the machine with the servers, and must cost both as little as can be.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import time
import urllib.request
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from bench_engine import BareLoop

from localmistral.engine import EngineSettings

WORDS = ("river", "stone", "lamp", "seven", "window", "green", "paper", "north", "bread", "cloud")
LONG_PROMPT_TOKENS = 2000
LONG_AFTER_TOKENS = 24
"""Tokens of the running streams before the long prompt arrives."""
RUNNING_BESIDE = 4
CONTEXT = 3072


@dataclass(slots=True)
class Answer:
    """One streamed answer; times in seconds on one clock."""

    sent_s: float
    times_s: list[float] = field(default_factory=list)
    text: str = ""
    tokens: int = 0

    @property
    def first_s(self) -> float:
        """From the request to its first token."""
        return self.times_s[0] - self.sent_s

    @property
    def gaps_s(self) -> list[float]:
        return [b - a for a, b in zip(self.times_s, self.times_s[1:], strict=False)]

    @property
    def per_token_s(self) -> float:
        """Mean time between tokens after the first."""
        return (self.times_s[-1] - self.times_s[0]) / max(1, self.tokens - 1)


async def ask(
    url: str, messages: list[dict[str, str]], tokens: int, progress: Callable[[int], None]
) -> Answer:
    """Stream one answer of exactly `tokens`; `progress` gets the number of events so far."""
    parts = urlsplit(url)
    body = json.dumps(
        {
            "messages": messages, "max_tokens": tokens, "ignore_eos": True, "temperature": 0,
            "stream": True, "stream_options": {"include_usage": True},
        }
    ).encode()  # fmt: skip
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost:{parts.port}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        "Connection: close\r\n\r\n"
    )
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    answer = Answer(time.perf_counter())
    writer.write(head.encode() + body)
    events: list[bytes] = []
    while line := await reader.readline():
        if line.startswith(b"data: {") and (b'"content":"' in line or b'"usage":{' in line):
            events.append(line)
            if b'"content":""' not in line and b'"choices":[]' not in line:
                answer.times_s.append(time.perf_counter())
                progress(len(answer.times_s))
    writer.close()
    _read_events(answer, events)
    if answer.tokens != tokens:
        raise SystemExit(f"{url} gave {answer.tokens} tokens where {tokens} were asked for.")
    return answer


def _read_events(answer: Answer, events: Sequence[bytes]) -> None:
    """The text and the count of tokens, once nothing is being timed any more."""
    for line in events:
        event = json.loads(line[6:])
        for choice in event["choices"]:
            answer.text += choice["delta"].get("content") or ""
        if event.get("usage"):
            answer.tokens = event["usage"]["completion_tokens"]


def _ignore(_: int) -> None:
    return


def _question(seed: int, words: int = 8) -> list[dict[str, str]]:
    """A prompt that differs from every other one from its first word on."""
    chosen = [WORDS[(seed * 7 + n * n * 3 + n) % len(WORDS)] for n in range(words)]
    return [{"role": "user", "content": f"{seed} {' '.join(chosen)}: tell a story about it."}]


async def run_streams(url: str, seed: int, *, streams: int, tokens: int) -> dict[str, float]:
    """`streams` answers at once: tokens a second of all together, first token, time per token."""
    begun = time.perf_counter()
    answers = await asyncio.gather(
        *(ask(url, _question(seed * 100 + n), tokens, _ignore) for n in range(streams))
    )
    seconds = max(answer.times_s[-1] for answer in answers) - begun
    return {
        "tokens/s": streams * tokens / seconds,
        "first token ms": 1e3 * statistics.median(answer.first_s for answer in answers),
        "per token ms": 1e3 * statistics.median(answer.per_token_s for answer in answers),
    }


async def run_long_prompt(url: str, seed: int, *, tokens: int) -> dict[str, float]:
    """A long prompt that arrives while others stream: its first token, and what they notice."""
    ready = asyncio.Event()

    def progress(count: int) -> None:
        if count >= LONG_AFTER_TOKENS:
            ready.set()

    async with asyncio.TaskGroup() as group:
        running = [
            group.create_task(ask(url, _question(seed * 100 + n), tokens, progress))
            for n in range(RUNNING_BESIDE)
        ]
        await ready.wait()
        # a word of the list is one token for most vocabularies
        late = await ask(url, _question(seed * 100 + 50, LONG_PROMPT_TOKENS), 8, _ignore)
    gaps = sorted(gap for task in running for gap in task.result().gaps_s)
    return {
        "first token of 2,000 ms": 1e3 * late.first_s,
        "longest gap beside it ms": 1e3 * gaps[-1],
        "per token beside it ms": 1e3
        * statistics.median(task.result().per_token_s for task in running),
    }


async def run_second_turn(url: str, seed: int, *, tokens: int) -> dict[str, float]:
    """The second question of a conversation whose beginning is a few hundred tokens long."""
    messages = _question(seed * 100, 400)
    first = await ask(url, messages, tokens, _ignore)
    messages += [
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": "And then?"},
    ]
    second = await ask(url, messages, 8, _ignore)
    return {"second turn's first token ms": 1e3 * second.first_s}


Run = Callable[[int], dict[str, float]]
"""One contestant's figures for a round, by the round's seed."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """What is asked of a server in a round, by its URL and the round's seed; `streams` if it is
    no more than so many answers at once."""

    name: str
    ask: Callable[[str, int], Coroutine[Any, Any, dict[str, float]]]
    streams: int = 0

    def bind(self, url: str) -> Run:
        return lambda seed: asyncio.run(self.ask(url, seed))


def make_scenarios(streams: Sequence[int], tokens: int) -> list[Scenario]:
    def of_streams(count: int) -> Scenario:
        return Scenario(
            f"{count} streams",
            lambda url, seed: run_streams(url, seed, streams=count, tokens=tokens),
            count,
        )

    def ask_long(url: str, seed: int) -> Coroutine[Any, Any, dict[str, float]]:
        return run_long_prompt(url, seed, tokens=tokens)

    def ask_again(url: str, seed: int) -> Coroutine[Any, Any, dict[str, float]]:
        return run_second_turn(url, seed, tokens=tokens)

    several = [of_streams(count) for count in streams]
    return [*several, Scenario("long prompt", ask_long), Scenario("second turn", ask_again)]


def bind_bare(loop: BareLoop, ours: str, streams: int, tokens: int) -> Run:
    """The bare loop's run of so many streams; the prompts are rendered by our server."""

    def run(seed: int) -> dict[str, float]:
        prompts = [_tokenize(ours, _question(seed * 100 + n)) for n in range(streams)]
        times = loop.run(prompts, tokens)
        return {
            "tokens/s": streams * tokens / (times.first_s[-1] + times.decode_s),
            "first token ms": 1e3 * statistics.median(times.first_s),
            "per token ms": 1e3 * times.decode_s / (tokens - 1),
        }

    return run


def _tokenize(url: str, messages: list[dict[str, str]]) -> tuple[int, ...]:
    request = urllib.request.Request(
        f"{url}/tokenize",
        json.dumps({"messages": messages}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as answer:
        return tuple(json.load(answer)["tokens"])


def compare(runs: Sequence[Run], rounds: int, seed: int) -> list[str]:
    """A line a figure: the medians, and how many times better the first one is (above 1 is
    better), by the median of the rounds, their least and their largest."""
    results: list[list[dict[str, float]]] = [[] for _ in runs]
    for number in range(rounds + 1):
        turn = range(len(runs))
        for which in turn if number % 2 else reversed(turn):
            measured = runs[which](seed + number)
            if number:  # the first round only warms up
                results[which].append(measured)
    return [_describe(name, results) for name in results[0][0]]


def _describe(name: str, results: Sequence[Sequence[dict[str, float]]]) -> str:
    first, *others = ([found[name] for found in each] for each in results)
    line = f"{name:30} {statistics.median(first):10.1f}"
    for other in others:
        single = [x / y if name == "tokens/s" else y / x for x, y in zip(first, other, strict=True)]
        line += (
            f" {statistics.median(other):10.1f}   {statistics.median(single):5.2f}"
            f"  ({min(single):.2f}-{max(single):.2f})"
        )
    return line


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--ours", required=True, metavar="URL")
    parser.add_argument("--peer", required=True, metavar="URL")
    parser.add_argument("--streams", default="1,4,8,16")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=int(time.time()) % 100_000)
    parser.add_argument("--bare", type=Path, metavar="MODEL.gguf")
    parser.add_argument("--threads", type=int, default=0, help="of the bare loop")
    arguments = parser.parse_args()
    ours, rounds, seed = arguments.ours, arguments.rounds, arguments.seed
    streams = [int(count) for count in arguments.streams.split(",")]
    bare = f" {'bare loop':>10}   better by (rounds)" if arguments.bare else ""
    print(f"{'':32} {'ours':>10} {'peer':>10}   better by (rounds){bare}")
    for scenario in make_scenarios(streams, arguments.tokens):
        runs = [scenario.bind(url) for url in (ours, arguments.peer)]
        with contextlib.ExitStack() as stack:
            if arguments.bare and scenario.streams:
                settings = EngineSettings(
                    context=CONTEXT, parallel=scenario.streams, threads=arguments.threads
                )
                loop = stack.enter_context(contextlib.closing(BareLoop(arguments.bare, settings)))
                runs.append(bind_bare(loop, ours, scenario.streams, arguments.tokens))
            print(f"{scenario.name}:", flush=True)
            for line in compare(runs, rounds, seed):
                print(f"  {line}", flush=True)


if __name__ == "__main__":
    main()
