"""Devices of other machines (or processes): llama.cpp's RPC servers, registered with ggml.

The seam for a later `worker`, still an experiment. A server serves one program at a time, and
when one that is in use goes away, ggml ends this process: so every server is tried in a process
of its own first. Knows nothing of what is loaded onto the devices.
"""

import ctypes
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence

from localmistral.engine.backends import find_function, register
from localmistral.errors import EngineError

VARIABLE = "LOCALMISTRAL_RPC"
"""Servers to use, as host:port,host:port; read when devices are listed."""
_CONNECT_S = 5.0
_ANSWER_S = 10.0
_READY = b"ready"

_lock = threading.Lock()
_registered: dict[str, tuple[str, ...]] = {}


def add_servers(endpoints: Sequence[str]) -> tuple[str, ...]:
    """Register the devices of servers at `endpoints` (host:port); their names, in order.

    A server that is registered already keeps its names. Raises EngineError for one that can't be
    reached, is busy, or speaks another version; servers before it stay registered.
    """
    names: list[str] = []
    with _lock:
        for endpoint in endpoints:
            if endpoint not in _registered:
                _check_server(endpoint)
                _registered[endpoint] = _register_server(endpoint)
            names += _registered[endpoint]
    return tuple(names)


def register_from_environment() -> tuple[str, ...]:
    """Register the servers that the environment variable LOCALMISTRAL_RPC lists, if any."""
    listed = os.environ.get(VARIABLE, "").split(",")
    return add_servers([endpoint.strip() for endpoint in listed if endpoint.strip()])


def _check_server(endpoint: str) -> None:
    host, port = _parse(endpoint)
    if _find_add_server() is None:
        raise EngineError(
            "This llama-cpp-python is built without RPC, so it can't use other machines.",
            'Build it anew: CMAKE_ARGS="-DGGML_RPC=on" pip install --force-reinstall '
            "--no-cache-dir llama-cpp-python",
        )
    try:
        socket.create_connection((host, port), timeout=_CONNECT_S).close()
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        raise EngineError(
            f"No RPC server answers at {endpoint} within {_CONNECT_S:g} s: {reason}.",
            "Start one there, or leave it out.",
        ) from error
    _try_server(endpoint)


def _parse(endpoint: str) -> tuple[str, int]:
    """ggml cuts at the first colon and ends the process when it can't."""
    host, _, port = endpoint.partition(":")
    if not host or not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise EngineError(
            f"{endpoint!r} is no address of an RPC server, which is HOST:PORT.",
            "Write it like 192.168.1.20:50052 (IPv6 is not supported).",
        )
    return host, int(port)


def _try_server(endpoint: str) -> None:
    """Register it in a process of its own, which ggml may end."""
    with subprocess.Popen(
        [sys.executable, "-P", "-c", f"from {__name__} import _trial; _trial({endpoint!r})"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "GGML_NO_BACKTRACE": "1"},
    ) as trial:
        assert trial.stdout is not None
        trial.stdout.read(len(_READY))  # llama.cpp may take its time to load
        try:
            status = trial.wait(_ANSWER_S)
        except subprocess.TimeoutExpired as error:
            trial.kill()
            raise EngineError(
                f"The server at {endpoint} gave no answer in {_ANSWER_S:g} s.",
                "An RPC server serves one program at a time: end the other one, or start it anew.",
            ) from error
    if status:
        raise EngineError(
            f"What answers at {endpoint} is no RPC server of this llama.cpp's version.",
            "Run the same version of llama-cpp-python on both machines.",
        )


def _trial(endpoint: str) -> None:
    os.write(1, _READY)
    sys.exit(0 if _register_server(endpoint) else 1)


def _find_add_server() -> int | None:
    return find_function("RPC", "ggml_backend_rpc_add_server")


def _register_server(endpoint: str) -> tuple[str, ...]:
    address = _find_add_server()
    assert address is not None
    add_server = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p)(address)
    registry = add_server(endpoint.encode("ascii"))
    return register(registry) if registry else ()
