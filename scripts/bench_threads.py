"""How threads should wait on the CPU: decode speed per setting, on an idle and on a busy machine.

    python scripts/bench_threads.py MODEL.gguf

Every setting has a process of its own, since OpenMP reads its environment once. "busy" counts
processes that compute without end beside it. The settings take turns; medians are shown, and as a
share of the fastest setting of each column. The engine's default is `library.SPIN_COUNT`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SETTINGS: dict[str, dict[str, str]] = {
    "active (OpenMP's default)": {"OMP_WAIT_POLICY": "active"},
    "spin 100,000": {"GOMP_SPINCOUNT": "100000"},
    "spin 10,000": {"GOMP_SPINCOUNT": "10000"},
    "spin 1,000": {"GOMP_SPINCOUNT": "1000"},
    "spin 100": {"GOMP_SPINCOUNT": "100"},
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "spin 1,000, as many threads as free cores": {"BENCH_THREADS": "0"},
    "one thread": {"OMP_WAIT_POLICY": "passive", "BENCH_THREADS": "1"},
}


@contextmanager
def keep_busy(count: int) -> Iterator[None]:
    """`count` processes that compute until the block ends."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def measure(model: Path, environment: dict[str, str]) -> float:
    """Tokens per second in a fresh process."""
    kept = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    done = subprocess.run(
        [sys.executable, __file__, str(model), "--once"],
        env={**kept, **environment}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return float(done.stdout)


def generate_once(model: Path, seconds: float) -> float:
    """Decode for about `seconds`; tokens per second."""
    from localmistral.engine import Engine, EngineSettings, Request
    from localmistral.engine.threads import count_cores

    threads = int(os.environ.get("BENCH_THREADS", count_cores()))
    settings = EngineSettings(context=512, threads=threads)
    with Engine.load([model], settings) as engine:
        prompt = tuple(engine.tokenize("Once upon a time"))
        with engine.submit(Request(prompt=prompt, ignore_eos=True)) as stream:
            events = iter(stream)
            next(events)
            started, tokens = time.perf_counter(), 0
            for _ in events:
                tokens += 1
                if time.perf_counter() - started > seconds:
                    break
            return tokens / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--busy", default="0,1,2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.5)
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.once:
        print(generate_once(arguments.model, arguments.seconds))
        return
    for busy in map(int, arguments.busy.split(",")):
        speeds: dict[str, list[float]] = {name: [] for name in SETTINGS}
        with keep_busy(busy):
            for _ in range(arguments.rounds):
                for name, environment in SETTINGS.items():
                    speeds[name].append(measure(arguments.model, environment))
        medians = {name: statistics.median(values) for name, values in speeds.items()}
        print(f"{busy} busy processes:", flush=True)
        for name, speed in medians.items():
            share = speed / max(medians.values())
            print(f"  {name:28} {speed:7.1f} tokens/s  {share:.2f}", flush=True)


if __name__ == "__main__":
    main()
