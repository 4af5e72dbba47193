"""How many CPU threads to compute with: the cores there are, less those that others use.

A thread that has to share its core holds up all the others at every operation, a thousand times
per token: on two cores with one busy process, one thread was three times as fast as two (see
scripts/bench_threads.py). But flash attention on the CPU divides long contexts among the threads,
which shows in the last bits of the logits: what is to be repeatable keeps one number of threads.
Knows nothing of llama.cpp.
"""

import time
from dataclasses import dataclass

import psutil

from localmistral.fit.probes import limits

_WINDOW_S = 0.5
"""Shortest stretch over which others' use is measured: CPU times come in steps of 10 ms."""


def count_cores() -> int:
    """The physical cores that this process may use."""
    physical = psutil.cpu_count(logical=False) or psutil.cpu_count(logical=True) or 1
    return limits.count_cores(physical, limits.read_limits())


@dataclass(frozen=True, slots=True)
class CpuTimes:
    """Seconds since some moment: by the clock, of all processes, and of this one.

    Processes that run at low priority are left out: they give way by themselves.
    """

    clock_s: float
    all_s: float
    own_s: float


def read_cpu_times() -> CpuTimes:
    everyone = psutil.cpu_times()
    busy = everyone.user + everyone.system
    process = psutil.Process()
    if hasattr(everyone, "nice") and int(process.nice()) > 0:
        busy += everyone.nice  # this one is of low priority itself, so the others count
    own = process.cpu_times()
    return CpuTimes(time.monotonic(), busy, own.user + own.system)


class ThreadCount:
    """The number of threads to use now. `fixed` above 0 is what the user asked for."""

    def __init__(self, fixed: int = 0) -> None:
        self._fixed = fixed
        self._cores = count_cores()
        self._logical = psutil.cpu_count(logical=True) or self._cores
        self._last = read_cpu_times()
        self.current = fixed or self._cores

    def update(self, *, steady: bool) -> bool:
        """Look again, if the last look is long enough ago; whether `current` has changed.

        `steady` asks for all cores, whatever else runs.
        """
        if self._fixed:
            return False
        before = self.current
        if steady:
            self.current = self._cores
        elif time.monotonic() - self._last.clock_s >= _WINDOW_S:
            now = read_cpu_times()
            self.current = choose_threads(self._cores, self._logical, self._last, now)
            self._last = now
        return self.current != before


def choose_threads(cores: int, logical: int, before: CpuTimes, after: CpuTimes) -> int:
    """Threads for `cores` of our own among `logical` ones, by who computed between two looks."""
    seconds = after.clock_s - before.clock_s
    others = (after.all_s - before.all_s) - (after.own_s - before.own_s)
    free = logical - round(max(0.0, others) / seconds)
    return max(1, min(cores, free))
