"""How fast this machine reads its RAM now: a measurement of about a second, by numpy.

What it finds is a lower bound: few threads don't reach what the memory can do, and whatever else
runs takes its part. Knows no nominal figure.
"""

import time
from concurrent.futures import ThreadPoolExecutor

from localmistral.fit.machine import MIB

_TOTAL_BYTES = 256 * MIB
"""Read in turn by all threads together; most caches are far smaller."""
_SMALLEST_PART_BYTES = 32 * MIB


def measure_ram_bandwidth(seconds: float, threads: int = 1) -> float:
    """Bytes per second that `threads` read together, the best of several rounds."""
    import numpy as np

    part_bytes = max(_SMALLEST_PART_BYTES, _TOTAL_BYTES // threads)
    parts = [np.ones(part_bytes // 4, dtype=np.float32) for _ in range(threads)]
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        end = time.perf_counter() + seconds
        while True:
            start = time.perf_counter()
            list(pool.map(np.max, parts))
            best = max(best, threads * part_bytes / (time.perf_counter() - start))
            if time.perf_counter() >= end:
                return best
