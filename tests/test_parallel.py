"""Several things at once: order, failures, and that nothing waits for what hangs."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest

from localmistral.models.parallel import map_parallel


@pytest.mark.parametrize("threads", [1, 3, 50])
@pytest.mark.parametrize("count", [0, 1, 20])
def test_results_come_in_the_order_of_the_items(threads: int, count: int) -> None:
    def square(number: int) -> int:
        time.sleep(0.001 * (number % 3))
        return number * number

    assert map_parallel(square, range(count), threads=threads) == [n * n for n in range(count)]


def test_nothing_is_a_result_like_any_other() -> None:
    assert map_parallel(lambda _: None, "ab", threads=2) == [None, None]


def test_so_many_run_at_once() -> None:
    barrier = threading.Barrier(4)
    assert len(map_parallel(lambda _: barrier.wait(30), range(8), threads=4)) == 8


def test_the_first_failure_is_raised_and_the_rest_is_not_begun() -> None:
    begun = []

    def fail(number: int) -> None:
        begun.append(number)
        raise ValueError(f"number {number}")

    with pytest.raises(ValueError, match="number 0"):
        map_parallel(fail, range(10_000), threads=1)
    assert len(begun) < 10_000


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such signals")
def test_ctrl_c_leaves_though_a_thread_hangs() -> None:
    script = (
        "import os, signal, threading, time\n"
        "from localmistral.models.parallel import map_parallel\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell may have ignored it
        "threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "try:\n"
        "    map_parallel(time.sleep, [600, 600], threads=2)\n"
        "except KeyboardInterrupt:\n"
        "    print('left')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "left\n"), done.stderr
