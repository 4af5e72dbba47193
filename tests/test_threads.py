"""The number of threads follows what other processes leave free."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from localmistral.engine import Engine, EngineSettings, Request, Sampling, TokenEvent
from localmistral.engine import threads as module
from localmistral.engine.threads import CpuTimes, ThreadCount, choose_threads, count_cores
from localmistral.fit.probes import limits

START = CpuTimes(0.0, 100.0, 10.0)


@pytest.mark.parametrize(
    ("cores", "logical", "others", "own", "expected"),
    [
        (2, 2, 0.0, 2.0, 2), (2, 2, 0.4, 1.0, 2), (2, 2, 1.0, 1.0, 1), (2, 2, 2.0, 0.1, 1),
        (2, 2, 9.0, 0.0, 1), (8, 16, 8.0, 8.0, 8), (8, 16, 12.0, 4.0, 4), (1, 1, 1.0, 0.5, 1),
        (4, 64, 32.0, 4.0, 4), (2, 2, -0.5, 2.0, 2),
    ],
)  # fmt: skip
def test_threads_are_the_cores_less_those_that_others_use(
    cores: int, logical: int, others: float, own: float, expected: int
) -> None:
    after = CpuTimes(3.0, 100.0 + 3 * (others + own), 10.0 + 3 * own)
    assert choose_threads(cores, logical, START, after) == expected


def test_a_fixed_number_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_WINDOW_S", 0.0)
    count = ThreadCount(3)
    assert not count.update(steady=False)
    assert count.current == 3


@pytest.mark.parametrize(("cpus", "allowed"), [(1.0, None), (0.5, None), (None, 1)])
def test_a_containers_limits_count(
    cpus: float | None, allowed: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = limits.Limits(cpus=cpus, allowed_cpus=allowed)
    monkeypatch.setattr(limits, "read_limits", lambda: found)
    assert count_cores() == 1


def test_busy_processes_are_seen_and_their_end_too() -> None:
    count = ThreadCount()
    cores = psutil.cpu_count() or 1
    hogs = [subprocess.Popen([sys.executable, "-c", "while 1: pass"]) for _ in range(cores)]
    try:
        time.sleep(0.3)
        count.update(steady=False)
        time.sleep(1)
        count.update(steady=False)
        assert count.current == 1 or count.current < count_cores()
        count.update(steady=True)
        assert count.current == count_cores()
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()


def test_a_repeatable_request_gives_the_same_text_on_a_busy_machine(smollm2_path: Path) -> None:
    def generate() -> list[TokenEvent]:
        with Engine.load([smollm2_path], EngineSettings(context=1024)) as engine:
            prompt = tuple(engine.tokenize("Once upon a time there was a cat. " * 50))
            request = Request(
                prompt=prompt, max_tokens=40, sampling=Sampling(temperature=0), top_logprobs=0
            )
            return list(engine.submit(request))

    quiet = generate()
    hog = subprocess.Popen([sys.executable, "-c", "while 1: pass"])
    try:
        assert generate() == quiet
    finally:
        hog.kill()
        hog.wait()
