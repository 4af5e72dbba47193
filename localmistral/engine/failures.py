"""Why llama.cpp could not load: our errors, made of what its log says.

llama.cpp returns no code but a null pointer. Knows nothing of what the caller does next.
"""

import logging
import re
from collections.abc import Mapping, Sequence

from localmistral.engine.backends import CPU
from localmistral.engine.buffers import find_owners
from localmistral.engine.library import LogLine, explain
from localmistral.errors import EngineError, ModelFileError, OutOfMemoryError
from localmistral.units import format_bytes

_SHORTAGE = re.compile(
    r"(failed|unable) to (allocate|reserve)|allocation of size|out of (\w+ )?memory|"
    r"outof(host|device)memory|std::bad_alloc|cannot allocate memory|insufficient memory",
    re.IGNORECASE,
)
"""How llama.cpp and its backends (CUDA, Vulkan, Metal, the system) say that memory is short."""
_READING = "while reading"
"""Room for a text of absurd length: that is a damaged file, and no shortage."""
_BUFFER = re.compile(r"failed to allocate (\S.*) buffer of size (\d+)")
_NO_TENSOR_SPLIT = "SPLIT_MODE_TENSOR not implemented"


def explain_load(
    name: str, log: Sequence[LogLine], devices: Mapping[str, str]
) -> ModelFileError | EngineError:
    """The error of a model `name` that did not load; `devices` as for `read_report`."""
    what = f"{name} could not be loaded"
    if any(_NO_TENSOR_SPLIT in text for _, text in log):
        return EngineError(explain(what, log), "Use the split mode layer.")
    if is_shortage(log):
        hint = "Put fewer layers there with --gpu-layers, or take a smaller quantisation."
        return _explain_shortage(what, hint, log, devices)
    return ModelFileError(
        explain(what, log), "Run it again with --verbose to see llama.cpp's whole log."
    )


def explain_context(
    cells: int, smaller: int, log: Sequence[LogLine], devices: Mapping[str, str]
) -> EngineError:
    """The error of a context of `cells` that could not be made; `smaller` is what to try next."""
    what = f"A context of {cells} tokens could not be made"
    hint = f"Ask for less memory: --context {smaller}"
    if is_shortage(log):
        return _explain_shortage(what, hint, log, devices)
    return EngineError(explain(what, log), hint)


def is_shortage(log: Sequence[LogLine]) -> bool:
    return any(
        level >= logging.ERROR and _SHORTAGE.search(text) and _READING not in text
        for level, text in log
    )


def _explain_shortage(
    what: str, hint: str, log: Sequence[LogLine], devices: Mapping[str, str]
) -> OutOfMemoryError:
    """With the device and the bytes where ggml names them, in llama.cpp's words otherwise."""
    found = next(filter(None, (_BUFFER.search(text) for _, text in log)), None)
    if found is None:
        return OutOfMemoryError(explain(what, log), hint)
    (device, *others), size = find_owners(found[1], devices), int(found[2])
    where = "RAM" if device == CPU else " or ".join((device, *others))
    return OutOfMemoryError(f"{what}: {where} has no room for {format_bytes(size)} more.", hint,
        device="" if others else device, wanted_bytes=size)  # fmt: skip
