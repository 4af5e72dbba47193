"""Two servers under the same load, in alternation: throughput, first tokens, gaps, second turns.

    localmistral serve -m MODEL.gguf --port 8081 --parallel 16 --context 3072 --threads 2
    python scripts/bench_server.py --ours http://127.0.0.1:8081 --peer http://127.0.0.1:8082

Both have to hold 16 streams of 3,072 tokens. The peer is any server with OpenAI's chat interface
that knows `ignore_eos`; llama.cpp's own comes as a wheel (xllamacpp, in an environment of its own):

    p = xllamacpp.CommonParams(); p.model.path = "MODEL.gguf"; p.port = 8082
    p.n_parallel = 16; p.n_ctx = 16 * 3072; p.cpuparams.n_threads = 2
    p.cpuparams_batch.n_threads = 2; xllamacpp.Server(p); time.sleep(1e6)

Every round asks both with the same new prompts, so that no prefix is known to either. Figures are
medians of the rounds; run it with nothing else running. The client is one thread with plain
sockets: it shares the machine with the servers, and must cost both as little as can be.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

WORDS = ("river", "stone", "lamp", "seven", "window", "green", "paper", "north", "bread", "cloud")
LONG_PROMPT_TOKENS = 2000
LONG_AFTER_TOKENS = 24
"""Tokens of the running streams before the long prompt arrives."""
RUNNING_BESIDE = 4


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


Scenario = Callable[[str, int], Coroutine[Any, Any, dict[str, float]]]


def make_scenarios(streams: Sequence[int], tokens: int) -> dict[str, Scenario]:
    def of_streams(count: int) -> Scenario:
        return lambda url, seed: run_streams(url, seed, streams=count, tokens=tokens)

    found = {f"{count} streams": of_streams(count) for count in streams}
    found["long prompt"] = lambda url, seed: run_long_prompt(url, seed, tokens=tokens)
    found["second turn"] = lambda url, seed: run_second_turn(url, seed, tokens=tokens)
    return found


def compare(scenario: Scenario, ours: str, peer: str, rounds: int, seed: int) -> list[str]:
    """A line a figure: both medians, and how many times better ours is (above 1 is better)."""
    results: dict[str, list[dict[str, float]]] = {ours: [], peer: []}
    for number in range(rounds + 1):
        for url in (ours, peer) if number % 2 else (peer, ours):
            measured = asyncio.run(scenario(url, seed + number))
            if number:  # the first round only warms up
                results[url].append(measured)
    lines = []
    for name in results[ours][0]:
        a, b = ([found[name] for found in results[url]] for url in (ours, peer))
        single = [x / y if name == "tokens/s" else y / x for x, y in zip(a, b, strict=True)]
        lines.append(
            f"{name:30} {statistics.median(a):10.1f} {statistics.median(b):10.1f}"
            f"   {statistics.median(single):5.2f}  ({min(single):.2f}-{max(single):.2f})"
        )
    return lines


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
    arguments = parser.parse_args()
    streams = [int(count) for count in arguments.streams.split(",")]
    print(f"{'':30} {'ours':>10} {'peer':>10}   better by (rounds)")
    for name, scenario in make_scenarios(streams, arguments.tokens).items():
        print(f"{name}:", flush=True)
        lines = compare(scenario, arguments.ours, arguments.peer, arguments.rounds, arguments.seed)
        print("\n".join(f"  {line}" for line in lines), flush=True)


if __name__ == "__main__":
    main()
