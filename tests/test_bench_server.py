"""The scripts that put load on servers: what they measure, and that they find what is wrong."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import bench_server
import pytest
import soak_server
from live_server import LiveServer, serve_model
from soak_server import Action, Findings, judge, measure_growth

from localmistral.engine import EngineSettings

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "scripts"
DEMO = ROOT / "localmistral" / "data" / "demo.gguf"


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with serve_model("demo", EngineSettings(threads=1, parallel=4, context=4096)) as live:
        yield live


def test_an_answer_is_read_with_its_times_and_tokens(server: LiveServer) -> None:
    seen: list[int] = []
    question = [{"role": "user", "content": "What is 31 + 46?"}]
    answer = asyncio.run(bench_server.ask(server.url, question, 24, seen.append))
    body = {"messages": question, "max_tokens": 24, "ignore_eos": True, "temperature": 0}
    whole = server.http.post("/v1/chat/completions", json=body).json()
    assert answer.text == whole["choices"][0]["message"]["content"]
    assert answer.tokens == 24
    assert seen == list(range(1, len(answer.times_s) + 1))
    assert answer.times_s == sorted(answer.times_s)
    assert 0 < answer.first_s <= answer.times_s[-1] - answer.sent_s
    assert sum(answer.gaps_s) == pytest.approx(answer.times_s[-1] - answer.times_s[0])


def test_a_server_that_gives_fewer_tokens_is_not_measured(server: LiveServer) -> None:
    question = [{"role": "user", "content": "What is 31 + 46?"}]
    with pytest.raises(SystemExit, match="where 5000 were asked for"):
        asyncio.run(bench_server.ask(server.url, question, 5000, lambda _: None))


def test_every_prompt_begins_anew() -> None:
    texts = [bench_server._question(seed)[0]["content"] for seed in range(200)]
    assert len({text.split()[0] for text in texts}) == 200
    assert len(bench_server._question(3, 2000)[0]["content"].split()) >= 2000


def test_the_table_has_every_scenario_and_its_ratios(server: LiveServer) -> None:
    command = [
        *(sys.executable, str(SCRIPTS / "bench_server.py"), "--ours", server.url),
        *("--peer", server.url, "--streams", "1,2", "--tokens", "32", "--rounds", "1"),
        *("--bare", str(DEMO), "--threads", "1"),
    ]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=240)
    assert done.returncode == 0, done.stderr
    for name in ("1 streams:", "2 streams:", "long prompt:", "second turn:"):
        assert name in done.stdout
    other = r" +(\d+\.\d) +(\d+\.\d\d) +\([^)]*\)"
    rows = re.findall(rf"^  \D.* (\d+\.\d){other}(?:{other})?$", done.stdout, re.MULTILINE)
    assert len(rows) == 2 * 3 + 3 + 1
    assert sum(bool(row[3]) for row in rows) == 2 * 3
    for ours, *others in rows:
        for theirs, ratio in (others[:2], others[2:]):
            if theirs:
                check_ratio(float(ours), float(theirs), float(ratio))


def check_ratio(ours: float, theirs: float, ratio: float) -> None:
    """One round: the ratio is that of the two figures, whichever way is better, but for digits."""
    rounding = 0.05 / ours + 0.05 / theirs
    possible = (ours / theirs, theirs / ours)
    assert any(abs(ratio - value) <= 0.006 + 1.1 * rounding * value for value in possible)


@asynccontextmanager
async def answering(reply: bytes) -> AsyncIterator[str]:
    """A server that answers everything with `reply` and hangs up."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1 << 16)
        writer.write(reply)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


def run_against(reply: bytes, use: Callable[[str], Awaitable[None]]) -> None:
    async def run() -> None:
        async with answering(reply) as url:
            await use(url)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("reply", "is_wrong"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n{}", False),
        (b"HTTP/1.1 503 Busy\r\n\r\n{}", False),
        (b"HTTP/1.1 500 Oh\r\n\r\n{}", True),
        (b"HTTP/1.1 400 No\r\n\r\n{}", True),
        (b'HTTP/1.1 200 OK\r\n\r\ndata: {"error":{}}\n\n', True),
        (b"", True),
    ],
)
def test_a_status_that_was_not_deserved_is_noted(reply: bytes, is_wrong: bool) -> None:
    findings = Findings()
    action = Action(name="x", path="/", body={})
    run_against(reply, lambda url: soak_server.perform(url, action, findings))
    assert bool(findings.wrong) == is_wrong
    assert findings.counts["x"] == 1


def test_growth_is_counted_from_the_end_of_the_warm_up() -> None:
    warming = [(float(n), n * 10**6) for n in range(20)]
    level = [(float(n), 20 * 10**6) for n in range(20, 100)]
    assert measure_growth(warming + level) == 0
    leaking = [(float(n), n * 10**6) for n in range(100)]
    assert measure_growth(leaking) == 70 * 10**6


def make_findings() -> Findings:
    return Findings(health_s=[0.001] * 200, memory=[(float(n), 10**8) for n in range(100)])


def test_the_verdict_fails_for_each_demand_alone() -> None:
    def met(findings: Findings, *, is_idle: bool = True, code: int = 0) -> list[bool]:
        return [is_met for is_met, _ in judge(findings, is_idle=is_idle, code=code)]

    assert met(make_findings()) == [True] * 5
    leaking, slow, wrong = make_findings(), make_findings(), make_findings()
    leaking.memory = [(float(n), 10**8 + n * 10**6) for n in range(100)]
    slow.health_s[:3] = [0.2] * 3
    wrong.wrong.append("stream: 500")
    assert met(leaking) == [False, True, True, True, True]
    assert met(slow) == [True, False, True, True, True]
    assert met(wrong) == [True, True, False, True, True]
    assert met(make_findings(), is_idle=False) == [True, True, True, False, True]
    assert met(make_findings(), code=-15) == [True, True, True, True, False]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="sends a POSIX signal")
def test_a_short_soak_leaves_nothing_behind(tmp_path: Path) -> None:
    import os

    command = [sys.executable, str(SCRIPTS / "soak_server.py"), "--minutes", "0.25"]
    environ = {**os.environ, "XDG_STATE_HOME": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=280, env=environ)
    lines = done.stdout.splitlines()
    assert len(lines) == 6, done.stdout + done.stderr
    assert len(lines[0].split(", ")) >= 12  # kinds of requests
    # how long /health takes depends on who else uses the machine: a figure, but no verdict here
    failed = [line for line in lines[1:] if not line.startswith("ok:") and "/health" not in line]
    assert failed == []
