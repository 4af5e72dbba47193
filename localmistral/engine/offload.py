"""Where llama.cpp puts the parts of a model: devices, shares, and experts that stay in RAM.

Knows neither bytes nor why a layer goes where.
"""

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from localmistral.engine.backends import CPU, cpu_buffer_type, find_device, list_names, name_buffer
from localmistral.engine.library import llama
from localmistral.engine.settings import EngineSettings
from localmistral.errors import BadRequestError, EngineError
from localmistral.models.gguf import read_shape

_SPLIT_MODES = {
    "none": llama.LLAMA_SPLIT_MODE_NONE,
    "layer": llama.LLAMA_SPLIT_MODE_LAYER,
    "tensor": llama.LLAMA_SPLIT_MODE_TENSOR,
}


class _Override(ctypes.Structure):
    """llama.h: llama_model_tensor_buft_override."""

    _fields_ = [("pattern", ctypes.c_char_p), ("buffer_type", ctypes.c_void_p)]


def check_offload(files: Sequence[Path], settings: EngineSettings) -> None:
    """Refuse what can't be for this model, before llama.cpp reads its weights.

    Reads the header only where `settings` ask for something that depends on it.
    """
    if settings.split_mode != "tensor" and not settings.cpu_expert_layers:
        return
    shape = read_shape(files[0])
    if settings.split_mode == "tensor" and shape.expert_count:
        raise EngineError(
            f"The split mode tensor is for dense models, {files[0].name} has "
            f"{shape.expert_count} experts a layer (architecture {shape.architecture}).",
            "Use the split mode layer.",
        )
    if settings.cpu_expert_layers and not shape.expert_count:
        raise BadRequestError(
            f"{files[0].name} has no experts that could stay in RAM.",
            "Leave out --cpu-experts, and use --gpu-layers for whole layers.",
            param="cpu_expert_layers",
        )
    beyond = max(settings.cpu_expert_layers, default=0)
    if beyond >= shape.layer_count:
        raise BadRequestError(
            f"Layer {beyond} is asked for in RAM, {files[0].name} has layers 0 to "
            f"{shape.layer_count - 1}.",
            "Name other layers with --cpu-experts.",
            param="cpu_expert_layers",
        )


def apply_offload(params: Any, settings: EngineSettings) -> list[Any]:
    """Fill llama.cpp's model parameters; what is returned must live as long as the load.

    Raises EngineError for a device that isn't there.
    """
    kept: list[Any] = []
    params.n_gpu_layers = settings.gpu_layers
    params.split_mode = _SPLIT_MODES[settings.split_mode]
    if settings.devices:
        handles = [find_device(name) for name in settings.devices if name != CPU]
        kept.append((ctypes.c_void_p * (len(handles) + 1))(*handles))
        params.devices = ctypes.addressof(kept[-1])
    if settings.tensor_split:
        params.tensor_split = _share_array(settings.tensor_split)
    if settings.cpu_expert_layers:
        pattern = match_experts(settings.cpu_expert_layers).encode()
        kept.append((_Override * 2)(_Override(pattern, cpu_buffer_type())))
        params.tensor_buft_overrides = ctypes.addressof(kept[-1])
    return kept


def match_experts(layers: Sequence[int]) -> str:
    """The pattern of the routed experts' tensors of `layers`, fused or not, shared ones excluded.

    One for all layers: llama.cpp tries every pattern on every tensor.
    """
    numbers = "|".join(str(layer) for layer in sorted(set(layers)))
    return rf"^blk\.({numbers})\.ffn_(up|down|gate_up|gate)_(ch|)exps"


def _share_array(shares: Sequence[float]) -> Any:
    if len(shares) > llama.LLAMA_MAX_DEVICES:
        raise BadRequestError(
            f"tensor_split has {len(shares)} shares, llama.cpp knows at most "
            f"{llama.LLAMA_MAX_DEVICES} devices.",
            "Give one share per GPU.",
        )
    return (ctypes.c_float * llama.LLAMA_MAX_DEVICES)(*shares)


def name_buffers(settings: EngineSettings) -> dict[str, str]:
    """The devices that a load may use, and what the log calls their buffers.

    Where `settings` leave the choice to llama.cpp: all but RPC devices, which it doesn't choose,
    and whose servers may be gone.
    """
    names = settings.devices or tuple(name for name in list_names() if not name.startswith("RPC"))
    buffers = {name: name_buffer(name) for name in names}
    return {name: buffer for name, buffer in buffers.items() if buffer != CPU}
