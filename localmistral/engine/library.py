"""llama.cpp as a library: loaded once, its threads' waiting bounded, its log kept.

Every other module of the engine takes `llama` from here. Knows nothing of models or requests.
"""

import collections
import ctypes
import logging
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

logger = logging.getLogger("localmistral.llama")
logger.addHandler(logging.NullHandler())  # silent unless --verbose or the embedding program asks

SPIN_COUNT = 1000
"""Iterations a waiting OpenMP thread of libgomp spins before it sleeps.

Decode on the CPU ends a parallel region about a thousand times per token, so sleeping at once
halves the speed of an idle machine, and spinning without end loses nearly all of it on a busy
one: see scripts/bench_threads.py, which compares the settings.
"""
_WAIT_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
_BLOCKTIME_MS = "1"
"""The same bound for LLVM's OpenMP runtime (macOS, Windows with clang), in milliseconds."""

_LEVELS = {1: logging.DEBUG, 2: logging.INFO, 3: logging.WARNING, 4: logging.ERROR}
"""ggml.h: enum ggml_log_level."""
_GPU_TYPES = (1, 2)
"""ggml-backend.h: enum ggml_backend_dev_type, GPU and IGPU."""
_CONTINUED = 5


def _bound_waiting() -> None:
    """Choose how OpenMP's threads wait, unless the user has; must run before the library loads."""
    if not any(name in os.environ for name in _WAIT_VARIABLES):
        os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)
        os.environ["KMP_BLOCKTIME"] = _BLOCKTIME_MS


__all__ = [
    "AbortFlag",
    "LogLine",
    "capture_log",
    "explain",
    "forget_complaints",
    "has_gpu",
    "libggml",
    "llama",
    "logger",
]

LogLine = tuple[int, str]
"""A line of llama.cpp's log: its level as in `logging`, its text."""

_bound_waiting()
import llama_cpp.llama_cpp as llama  # noqa: E402  (the environment has to be set first)
from llama_cpp._ggml import libggml  # noqa: E402


class _Log:
    """llama.cpp's log: passed on to `logging`, the last complaints kept for error messages."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._complaints: collections.deque[LogLine] = collections.deque(maxlen=8)
        self._captures: dict[int, list[list[LogLine]]] = {}
        self._level = logging.INFO

    def write(self, level: int, text: bytes | None, _user_data: object) -> None:
        line = (text or b"").decode("utf-8", "replace").rstrip("\n")
        if level != _CONTINUED:
            self._level = _LEVELS.get(level, logging.INFO)
        if not line.strip(" ."):
            return
        logger.log(self._level, "%s", line)
        kept = (self._level, line.strip())
        with self._lock:
            for lines in self._captures.get(threading.get_ident(), ()):
                lines.append(kept)
            if self._level >= logging.WARNING:
                self._complaints.append(kept)

    def start_capture(self) -> list[LogLine]:
        """A list that gets what is logged on this thread from now on."""
        lines: list[LogLine] = []
        with self._lock:
            self._captures.setdefault(threading.get_ident(), []).append(lines)
        return lines

    def stop_capture(self) -> None:
        """End the latest capture of this thread."""
        thread = threading.get_ident()
        with self._lock:
            self._captures[thread].pop()
            if not self._captures[thread]:
                del self._captures[thread]

    def take_complaints(self) -> list[LogLine]:
        """The warnings and errors since the last call as (level, line), oldest first."""
        with self._lock:
            complaints = list(self._complaints)
            self._complaints.clear()
        return complaints


_log = _Log()
_log_callback = llama.llama_log_callback(_log.write)


def _listen() -> None:
    """Again for every capture: llama.cpp has one listener, and other code may have become it."""
    llama.llama_log_set(_log_callback, ctypes.c_void_p(0))


_listen()
llama.llama_backend_init()


def has_gpu() -> bool:
    """Whether llama.cpp can compute on anything but the CPU of this machine."""
    find = libggml.ggml_backend_dev_by_type
    find.restype = ctypes.c_void_p
    return any(find(kind) for kind in _GPU_TYPES)


@contextmanager
def capture_log() -> Iterator[list[LogLine]]:
    """What llama.cpp logs on this thread inside the `with` block, in order.

    llama.cpp has one log for the whole process, but calls back on the thread that logs: an engine
    that runs meanwhile on its own thread leaves no line here, and loses none.
    """
    lines = _log.start_capture()
    _listen()
    try:
        yield lines
    finally:
        _log.stop_capture()


def explain(what: str, lines: Sequence[LogLine] | None = None) -> str:
    """`what` failed: one sentence with llama.cpp's own complaint in it, if it made one.

    The complaint is the first of the worst among `lines`, or among all threads' since
    `forget_complaints`.
    """
    kept = _log.take_complaints() if lines is None else lines
    complaints = [line for line in kept if line[0] >= logging.WARNING]
    if not complaints:
        return f"{what}; llama.cpp gave no reason."
    first_of_worst = max(complaints, key=lambda complaint: complaint[0])
    return f"{what}; llama.cpp says: {first_of_worst[1]}"


def forget_complaints() -> None:
    """Start afresh, so that the next `explain` speaks of what comes now."""
    _log.take_complaints()


class AbortFlag:
    """A flag that ggml asks between two operations, at no cost in Python.

    ggml calls `bool callback(void *data)`. A Python callback would take the interpreter's lock
    a thousand times per token, so the callback is C's own `strlen` over a buffer that holds
    either "" (0, go on) or one byte (1, stop).
    """

    def __init__(self) -> None:
        self._buffer = ctypes.create_string_buffer(2)
        self._runtime: Any = ctypes.cdll.msvcrt if sys.platform == "win32" else ctypes.CDLL(None)
        self.callback: Any = ctypes.cast(self._runtime.strlen, llama.ggml_abort_callback)
        self.data = ctypes.cast(self._buffer, ctypes.c_void_p)

    def set(self) -> None:
        self._buffer[0] = b"\x01"

    def clear(self) -> None:
        self._buffer[0] = b"\x00"

    def is_set(self) -> bool:
        return bool(self._buffer[0] == b"\x01")
