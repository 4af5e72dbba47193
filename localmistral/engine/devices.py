"""What llama.cpp can compute on: ggml's list of devices, and what its CPU code was built for.

Asking a card for its memory starts its backend, which takes some of that memory for good. Knows
nothing of cards that this build has no backend for.
"""

import ctypes

from localmistral.engine.backends import base, declare, device_handles
from localmistral.engine.library import libggml, llama
from localmistral.engine.rpc import register_from_environment
from localmistral.fit.probes.found import BackendDevice, normalise_pci_id

_KINDS = ("cpu", "gpu", "igpu", "accel")
"""ggml-backend.h: enum ggml_backend_dev_type, in order; more are not devices of their own."""
_BACKENDS = {"hip": "rocm", "mtl": "metal"}
"""Names of registries that differ from what their backend is called, in small letters."""

_handle = ctypes.c_void_p
_text = ctypes.c_char_p


class _Properties(ctypes.Structure):
    """ggml-backend.h: struct ggml_backend_dev_props."""

    _fields_ = (
        ("name", _text),
        ("description", _text),
        ("memory_free", ctypes.c_size_t),
        ("memory_total", ctypes.c_size_t),
        ("type", ctypes.c_int),
        ("device_id", _text),
        ("caps", ctypes.c_bool * 16),  # five today: room for more
    )


_read_properties = declare(
    base, "ggml_backend_dev_get_props", None, _handle, ctypes.POINTER(_Properties)
)
_registry_count = declare(libggml, "ggml_backend_reg_count", ctypes.c_size_t)
_registry_at = declare(libggml, "ggml_backend_reg_get", _handle, ctypes.c_size_t)
_registry_of = declare(base, "ggml_backend_dev_backend_reg", _handle, _handle)
_registry_name = declare(base, "ggml_backend_reg_name", _text, _handle)


def list_devices() -> tuple[BackendDevice, ...]:
    """Every device, the CPU among them; RPC servers of the environment are registered first.

    Raises EngineError where such a server doesn't answer.
    """
    register_from_environment()
    devices = (_describe(handle) for handle in device_handles())
    return tuple(device for device in devices if device is not None)


def list_backends() -> tuple[str, ...]:
    """The backends of this build, also those that found no device, named as in BackendDevice."""
    return tuple(_name_backend(_registry_at(n)) for n in range(_registry_count()))


def build_features() -> frozenset[str]:
    """Instruction sets that the CPU code of this build uses, named as in fit/probes/cpu.py."""
    return parse_features(llama.llama_print_system_info().decode("utf-8", "replace"))


def parse_features(text: str) -> frozenset[str]:
    """What is 1 in `CPU : SSE3 = 1 | AVX2 = 1 | ... `, in small letters."""
    _, _, listed = text.partition("CPU :")
    pairs = (part.partition("=") for part in listed.split("|"))
    return frozenset(name.strip().lower() for name, _, value in pairs if value.strip() == "1")


def _describe(handle: int) -> BackendDevice | None:
    found = _Properties()
    _read_properties(handle, ctypes.byref(found))
    if not 0 <= found.type < len(_KINDS):
        return None
    return BackendDevice(
        name=_decode(found.name),
        description=_decode(found.description) or _decode(found.name),
        kind=_KINDS[found.type],
        backend=_name_backend(_registry_of(handle)),
        free_bytes=found.memory_free,
        total_bytes=found.memory_total,
        pci_id=normalise_pci_id(_decode(found.device_id)),
    )


def _name_backend(registry: int) -> str:
    name = _decode(_registry_name(registry)).partition("[")[0].lower()
    return _BACKENDS.get(name, name)


def _decode(text: bytes | None) -> str:
    return (text or b"").decode("utf-8", "replace").strip()
