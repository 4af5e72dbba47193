"""ggml's registry of devices, as far as loading needs it: find one by name, name its buffers.

Handles are addresses. Asking an RPC device anything but its name asks its server, and ggml ends
the process when that server is gone. Knows nothing of what the devices are like.
"""

import ctypes
import pathlib
from collections.abc import Callable
from typing import Any

from llama_cpp import _ctypes_extensions, _ggml

from localmistral.engine.library import libggml
from localmistral.errors import EngineError

CPU = "CPU"
"""ggml's name of the device that always is."""

base = _ctypes_extensions.load_shared_library(
    "ggml-base", pathlib.Path(_ggml.libggml_base_path)
)  # its own handle: Windows finds a symbol only in the library that defines it


def declare(library: Any, name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
    """A C function with its types, independent of what others declare of the same one."""
    function: Callable[..., Any] = ctypes.CFUNCTYPE(result, *arguments)((name, library))
    return function


_handle = ctypes.c_void_p
_device_count = declare(libggml, "ggml_backend_dev_count", ctypes.c_size_t)
_device_at = declare(libggml, "ggml_backend_dev_get", _handle, ctypes.c_size_t)
_device_named = declare(libggml, "ggml_backend_dev_by_name", _handle, ctypes.c_char_p)
_device_name = declare(base, "ggml_backend_dev_name", ctypes.c_char_p, _handle)
_buffer_type = declare(base, "ggml_backend_dev_buffer_type", _handle, _handle)
_buffer_type_name = declare(base, "ggml_backend_buft_name", ctypes.c_char_p, _handle)
_cpu_buffer_type = declare(base, "ggml_backend_cpu_buffer_type", _handle)

_registry_named = declare(libggml, "ggml_backend_reg_by_name", _handle, ctypes.c_char_p)
_register = declare(libggml, "ggml_backend_register", None, _handle)
_registry_size = declare(base, "ggml_backend_reg_dev_count", ctypes.c_size_t, _handle)
_registry_device = declare(base, "ggml_backend_reg_dev_get", _handle, _handle, ctypes.c_size_t)
_registry_function = declare(
    base, "ggml_backend_reg_get_proc_address", _handle, _handle, ctypes.c_char_p
)


def device_handles() -> tuple[int, ...]:
    """The handles of all devices in the order of registration, the CPU among them."""
    return tuple(_device_at(n) for n in range(_device_count()))


def list_names() -> tuple[str, ...]:
    """The names of all devices, the CPU among them."""
    return tuple(_device_name(handle).decode() for handle in device_handles())


def find_device(name: str) -> int:
    """The handle of the device of that name; EngineError with those there are."""
    handle = _device_named(name.encode())
    if not handle:
        raise EngineError(
            f"llama.cpp has no device {name!r}, only {', '.join(list_names())}.",
            "See what it can use: localmistral hardware",
        )
    return int(handle)


def name_buffer(device: str) -> str:
    """What llama.cpp's log calls the buffers of `device`, such as `RPC0[127.0.0.1:50052]`."""
    name: bytes = _buffer_type_name(_buffer_type(find_device(device)))
    return name.decode()


def cpu_buffer_type() -> int:
    """The handle of plain memory, which keeps a tensor off all devices."""
    return int(_cpu_buffer_type())


def find_function(backend: str, name: str) -> int | None:
    """The address of a function that `backend` adds to ggml; None where it isn't built in."""
    registry = _registry_named(backend.encode())
    return _registry_function(registry, name.encode()) if registry else None


def register(registry: int) -> tuple[str, ...]:
    """Make the devices of a backend's registry findable; their names."""
    _register(registry)
    devices = (_registry_device(registry, n) for n in range(_registry_size(registry)))
    return tuple(_device_name(device).decode() for device in devices)
