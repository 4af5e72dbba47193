"""Several devices on a machine without a GPU: llama.cpp's RPC servers on loopback.

    with start_rpc(2) as rpc:
        result = rpc.call(function, *arguments)  # in a process that has RPC0 and RPC1

Devices can't be unregistered, and ggml ends a process whose server has gone: so whatever uses
them runs in a process of its own. `function` must stand at the top of a module.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec, TypeVar

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

HOST = "127.0.0.1"
START_S = 60.0
CALL_S = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RpcProcess:
    """A process in which the servers' devices are registered, RPC0 first."""

    devices: tuple[str, ...]
    endpoints: tuple[str, ...]
    pool: ProcessPoolExecutor

    def call(
        self,
        function: Callable[Parameters, Result],
        *arguments: Parameters.args,
        **named: Parameters.kwargs,
    ) -> Result:
        """What `function` returns there; its error is raised here."""
        return self.pool.submit(function, *arguments, **named).result(timeout=CALL_S)


@contextmanager
def start_rpc(count: int, memory_bytes: Sequence[int | None] = ()) -> Iterator[RpcProcess]:
    """`count` servers and a process that uses them; all are gone at the end.

    `memory_bytes` limits what the servers can allocate (not on Windows or macOS; what they report
    as free is this machine's RAM all the same: ggml's server has no setting for it).
    """
    limits = (*memory_bytes, *[None] * count)[:count]
    with ExitStack() as stack:
        endpoints = tuple(stack.enter_context(serve(limit)) for limit in limits)
        context = multiprocessing.get_context("spawn")
        pool = stack.enter_context(ProcessPoolExecutor(max_workers=1, mp_context=context))
        devices = pool.submit(register, endpoints).result(timeout=CALL_S)
        yield RpcProcess(devices=devices, endpoints=endpoints, pool=pool)


def register(endpoints: Sequence[str]) -> tuple[str, ...]:
    from localmistral.engine.rpc import add_servers

    return add_servers(endpoints)


@contextmanager
def serve(memory_bytes: int | None = None) -> Iterator[str]:
    """One server in a process of its own; its endpoint, once it accepts."""
    server, port = start_server(memory_bytes)
    try:
        yield f"{HOST}:{port}"
    finally:
        server.kill()
        server.communicate()


def start_server(memory_bytes: int | None) -> tuple[subprocess.Popen[bytes], int]:
    """A server that accepts; another port is taken when somebody was faster with the first."""
    for _ in range(5):
        port = find_free_port()
        command = [sys.executable, str(Path(__file__).resolve()), str(port), str(memory_bytes or 0)]
        server = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_WAIT_POLICY": "passive"},
        )
        if wait_for(server, port):
            return server, port
        server.kill()
        server.communicate()
    raise RuntimeError("no RPC server could be started")


def find_free_port() -> int:
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        port: int = taken.getsockname()[1]
        return port


def wait_for(server: subprocess.Popen[bytes], port: int) -> bool:
    end = time.monotonic() + START_S
    while server.poll() is None and time.monotonic() < end:
        try:
            socket.create_connection((HOST, port), timeout=1).close()
            return True
        except OSError:
            time.sleep(0.02)
    return False


def run_server(port: int, memory_bytes: int) -> None:
    """Serve this machine's CPU with one thread, until the other end of stdin is closed."""
    from localmistral.engine.backends import find_device, find_function

    address = find_function("RPC", "ggml_backend_rpc_start_server")
    assert address is not None
    size, pointer = ctypes.c_size_t, ctypes.c_void_p
    start = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p, size, size, pointer)(address)
    devices = (ctypes.c_void_p * 1)(find_device("CPU"))
    threading.Thread(target=end_with_parent, daemon=True).start()
    if memory_bytes:
        limit_memory(memory_bytes)
    start(f"{HOST}:{port}".encode(), None, 1, 1, ctypes.addressof(devices))


def end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


def limit_memory(more_bytes: int) -> None:
    import resource

    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = pages * resource.getpagesize() + more_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    run_server(int(sys.argv[1]), int(sys.argv[2]))
