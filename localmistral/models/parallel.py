"""Doing a few things at once that mostly wait for the network, in a way that Ctrl-C can leave.

Python's own pools wait at the end of the process for whatever hangs; these threads are daemons.
"""

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

_T = TypeVar("_T")
_R = TypeVar("_R")

GLANCE_S = 0.2
"""How often the waiting thread looks up: on Windows, Ctrl-C is noticed only then."""


def map_parallel(function: Callable[[_T], _R], items: Sequence[_T], *, threads: int) -> list[_R]:
    """`function` of each item, in order; the first exception of any ends it, with what is still
    running left to itself."""
    waiting: queue.SimpleQueue[tuple[int, _T]] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[int, Future[_R]]] = queue.SimpleQueue()
    is_over = threading.Event()
    for pair in enumerate(items):
        waiting.put(pair)

    def work() -> None:
        while not is_over.is_set():
            try:
                index, item = waiting.get_nowait()
            except queue.Empty:
                return
            answer: Future[_R] = Future()
            try:
                answer.set_result(function(item))
            except BaseException as error:  # noqa: BLE001  (raised again by the thread that waits)
                answer.set_exception(error)
            done.put((index, answer))

    for _ in range(min(threads, len(items))):
        threading.Thread(target=work, daemon=True).start()
    results: dict[int, _R] = {}
    try:
        while len(results) < len(items):
            try:
                index, answer = done.get(timeout=GLANCE_S)
            except queue.Empty:
                continue
            results[index] = answer.result()
    finally:
        is_over.set()
    return [results[index] for index in range(len(items))]
