"""Mixed load on a server for minutes, with clients that leave and requests that are wrong.

    python scripts/soak_server.py --model MODEL.gguf --minutes 30

Starts `localmistral serve`, keeps it busy, and looks meanwhile at its memory and at how fast
/health answers. The verdict: memory grew by less than 20 MB after the warm-up, /health's p99 stayed
under 100 ms, every status was one that the request deserved, nothing is left running, and SIGTERM
ended it with 0. The exit code is 0 if all of it held. Needs a POSIX system for the last part.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import json
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

MAX_GROWTH_BYTES = 20 * 10**6
MAX_HEALTH_S = 0.1
WARM_UP_SHARE = 0.2
"""Of the whole time: caches fill, and malloc's arenas find their sizes."""
SAMPLE_S = 0.5
HEALTH_S = 0.05
IDLE_WITHIN_S = 10.0
START_WITHIN_S = 300.0
PARALLEL = 4
CHAT = "/v1/chat/completions"
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer"}},
    "required": ["name", "age"],
}
TOOL = {"type": "function", "function": {"name": "find", "parameters": SCHEMA}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """A request: its statuses when all is well; after `leave_after` bytes of its answer the client
    goes (0: at once), None stays to the end."""

    name: str
    path: str
    body: Any
    statuses: frozenset[int] = frozenset({200})
    leave_after: int | None = None


@dataclass(slots=True, kw_only=True)
class Findings:
    """What was seen so far."""

    counts: collections.Counter[str] = field(default_factory=collections.Counter)
    wrong: list[str] = field(default_factory=list)
    health_s: list[float] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)


def choose(dice: random.Random) -> Action:
    """The next request of a client."""
    words = " ".join(dice.choices(("alpha", "river", "seven", "lamp", "green", "stone"), k=6))
    question = [{"role": "user", "content": f"{dice.random()} {words}?"}]
    long = [{"role": "user", "content": f"{dice.random()} " + words * 60}]
    base: dict[str, Any] = {"messages": question, "max_tokens": dice.randint(1, 48)}
    endless = {**base, "max_tokens": 400, "ignore_eos": True, "stream": True}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    loop = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#"}}}
    bad = frozenset({400})
    return dice.choice(
        (
            Action(name="stream", path=CHAT, body={**base, "stream": True}),
            Action(name="whole", path=CHAT, body=base),
            Action(name="two choices", path=CHAT, body={**base, "n": 2, "logprobs": True}),
            Action(name="schema", path=CHAT, body={**base, "response_format": form}),
            Action(
                name="forced call",
                path=CHAT,
                body={**base, "tools": [TOOL], "tool_choice": "required", "stream": True},
            ),
            Action(name="long prompt", path=CHAT, body={**base, "messages": long}),
            Action(name="messages", path="/v1/messages", body={**base, "stream": True}),
            Action(name="text", path="/v1/completions", body={"prompt": words, "max_tokens": 16}),
            Action(name="tokenize", path="/tokenize", body={"messages": question}),
            Action(name="leaves at once", path=CHAT, body=endless, leave_after=0),
            Action(
                name="leaves a stream", path=CHAT, body=endless, leave_after=dice.randint(1, 9000)
            ),
            Action(
                name="leaves in prefill", path=CHAT, body={**endless, "messages": long},
                leave_after=0,
            ),
            Action(name="no JSON", path=CHAT, body="{", statuses=bad),
            Action(name="no messages", path=CHAT, body={"messages": []}, statuses=bad),
            Action(
                name="endless schema", path=CHAT, body={**base, "response_format": loop},
                statuses=bad,
            ),
            Action(
                name="too long", path=CHAT, statuses=bad,
                body={"messages": [{"role": "user", "content": "word " * 20_000}]},
            ),
            Action(
                name="other model", path=CHAT, body={**base, "model": "other"},
                statuses=frozenset({404}),
            ),
        )
    )  # fmt: skip


async def perform(url: str, action: Action, findings: Findings) -> None:
    """Send one request and note what came of it; a full queue (503) is no fault."""
    parts = urlsplit(url)
    body = (action.body if isinstance(action.body, str) else json.dumps(action.body)).encode()
    head = (
        f"POST {action.path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    try:
        writer.write(head.encode() + body)
        if action.leave_after is not None:
            await asyncio.sleep(0.02)
            await reader.read(action.leave_after)
            findings.counts[action.name] += 1
            return
        answer = await reader.read(-1)
    finally:
        writer.close()
    status = int(answer[9:12] or b"0")
    findings.counts[action.name] += 1
    is_broken = status == 200 and b'data: {"error"' in answer
    if is_broken or status not in {*action.statuses, 503}:
        findings.wrong.append(f"{action.name}: {status} {answer[-300:]!r}")


async def work(url: str, seed: int, until_s: float, findings: Findings) -> None:
    """One client after the other, in this one's place."""
    dice = random.Random(seed)
    while time.monotonic() < until_s:
        await perform(url, choose(dice), findings)


async def watch_health(url: str, until_s: float, findings: Findings) -> None:
    """Ask for /health again and again, on a connection that is kept."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    while time.monotonic() < until_s:
        begun = time.monotonic()
        writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(
            int(line.split(b":")[1])
            for line in head.lower().splitlines()
            if line.startswith(b"content-length:")
        )
        await reader.readexactly(length)
        findings.health_s.append(time.monotonic() - begun)
        if not head.startswith(b"HTTP/1.1 200"):
            findings.wrong.append(f"health: {head[:40]!r}")
        await asyncio.sleep(HEALTH_S)
    writer.close()


async def watch_memory(pid: int, until_s: float, findings: Findings) -> None:
    process = psutil.Process(pid)
    while time.monotonic() < until_s:
        findings.memory.append((time.monotonic(), process.memory_info().rss))
        await asyncio.sleep(SAMPLE_S)


async def soak(url: str, pid: int, seconds: float, clients: int, seed: int) -> Findings:
    """Load and look, for so many seconds."""
    findings = Findings()
    until_s = time.monotonic() + seconds
    async with asyncio.TaskGroup() as group:
        group.create_task(watch_health(url, until_s, findings))
        group.create_task(watch_memory(pid, until_s, findings))
        for number in range(clients):
            group.create_task(work(url, seed + number, until_s, findings))
    return findings


def measure_growth(memory: list[tuple[float, int]]) -> int:
    """Bytes from the end of the warm-up to the end, each the median of a tenth of the time."""
    count = len(memory)
    start, tenth = int(count * WARM_UP_SHARE), max(1, count // 10)
    early = [used for _, used in memory[start : start + tenth]]
    late = [used for _, used in memory[-tenth:]]
    return int(statistics.median(late) - statistics.median(early))


def describe_memory(memory: list[tuple[float, int]]) -> str:
    """How it went: the median of every tenth of the time, in MB."""
    tenth = max(1, len(memory) // 10)
    medians = [
        statistics.median(used for _, used in memory[start : start + tenth])
        for start in range(0, len(memory), tenth)
    ]
    return " ".join(f"{used / 1e6:.1f}" for used in medians)


def find_percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def read_gauges(url: str) -> dict[str, float]:
    """/metrics' plain values by name."""
    import urllib.request

    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as response:
        lines = response.read().decode().splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
    return {name: float(value) for name, value in pairs if "{" not in name}


def is_idle_soon(url: str) -> bool:
    """Whether nothing runs or waits any more a little after the last client has gone."""
    deadline = time.monotonic() + IDLE_WITHIN_S
    while time.monotonic() < deadline:
        now = read_gauges(url)
        if now["localmistral_running"] == 0 == now["localmistral_waiting"]:
            return True
        time.sleep(0.1)
    return False


def judge(findings: Findings, *, is_idle: bool, code: int) -> list[tuple[bool, str]]:
    """Whether each demand was met, and with what figure."""
    growth = measure_growth(findings.memory)
    slow_s = find_percentile(findings.health_s, 0.99)
    limit = MAX_GROWTH_BYTES / 1e6
    return [
        (
            growth < MAX_GROWTH_BYTES,
            f"memory grew by {growth / 1e6:.1f} MB (under {limit:.0f}): "
            f"{describe_memory(findings.memory)}",
        ),
        (
            slow_s < MAX_HEALTH_S,
            f"/health p99 {slow_s * 1e3:.0f} ms, worst {max(findings.health_s) * 1e3:.0f} ms "
            f"of {len(findings.health_s)} (under {MAX_HEALTH_S * 1e3:.0f})",
        ),
        (not findings.wrong, f"{len(findings.wrong)} unexpected answers {findings.wrong[:3]}"),
        (is_idle, "nothing left running or waiting"),
        (code == 0, f"SIGTERM ended it with {code}"),
    ]


@contextlib.contextmanager
def serving(arguments: list[str]) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A server on a free port, ready, and its URL."""
    command = [sys.executable, "-m", "localmistral", "serve", "--port", "0", "--log", "json"]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                [*command, *arguments], stdin=subprocess.DEVNULL, stdout=file, stderr=file
            )
        try:
            yield process, _wait_until_ready(process, log)
        finally:
            process.kill()
            process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + START_WITHIN_S
    while time.monotonic() < deadline and process.poll() is None:
        for line in log.read_text(encoding="utf-8").splitlines():
            if '"event": "ready"' in line:
                return str(json.loads(line)["url"])
        time.sleep(0.1)
    raise SystemExit(f"The server did not start: {log.read_text(encoding='utf-8')}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    options = ["-m", given.model, "--parallel", str(PARALLEL), "--context", "2048"]
    with serving(options) as (process, url):
        findings = asyncio.run(
            soak(url, process.pid, given.minutes * 60, given.clients, given.seed)
        )
        is_idle = is_idle_soon(url)
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
    verdict = judge(findings, is_idle=is_idle, code=code)
    print(", ".join(f"{name} {count}" for name, count in sorted(findings.counts.items())))
    for is_met, text in verdict:
        print(f"{'ok' if is_met else 'FAILED'}: {text}")
    return 0 if all(is_met for is_met, _ in verdict) else 1


if __name__ == "__main__":
    sys.exit(main())
