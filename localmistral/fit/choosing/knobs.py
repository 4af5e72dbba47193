"""A request's fixed values: which contexts, KV types and placements they leave to choose from.

Values that llama.cpp would cut to size are cut as it does; those that make no sense for the model
or the machine raise. Chooses nothing.
"""

import math
from collections.abc import Sequence

from localmistral.errors import PlanError, UsageError
from localmistral.fit.choosing.search import Limits
from localmistral.fit.machine import Machine
from localmistral.fit.plan import (
    CONTEXT_AIM,
    CONTEXT_MULTIPLE,
    KV_TYPES,
    PREFERENCES,
    SPLIT_MODES,
    Candidate,
    PlanRequest,
)
from localmistral.models.shape import ModelShape

CONTEXT_STEP = 4096
"""How far the context steps down from its aim at a time."""
DEFAULT_BATCH = 2048
DEFAULT_UBATCH = 512
"""llama.cpp's own: beyond, prompts are read little faster where all weights lie on cards."""
PLAIN_KV_TYPE = "f16"
SMALL_KV_TYPE = "q8_0"
"""The only quantised cache that is chosen unasked: its loss can't be told from noise, while 4 bits
are known to hurt long contexts."""
_FLOAT_KV_TYPES = ("f32", "f16", "bf16")
_KV_BLOCK = 32
"""Elements in a block of every quantised KV type: a head must be a multiple of them."""
TENSOR_ARCHITECTURES = ("llama", "mistral3")
"""Those whose matrices llama.cpp is known to divide over cards; mistral4 is refused."""


def check_request(request: PlanRequest) -> None:
    """UsageError for values that no model and no machine could have."""
    choices = (
        ("--prefer", request.prefer, PREFERENCES),
        ("--kv-type", request.kv_type, KV_TYPES),
        ("--split-mode", request.split_mode, SPLIT_MODES),
    )
    for option, value, known in choices:
        if value is not None and value not in known:
            raise UsageError(f"{option} {value[:40]!r} is not known.", f"Use {', '.join(known)}.")
    positive = {
        "--context": request.context,
        "--parallel": request.parallel,
        "--batch": request.batch,
        "--ubatch": request.ubatch,
        "--threads": request.threads,
        "--min-context": request.min_context,
    }
    for option, number in positive.items():
        if number is not None and number < 1:
            raise UsageError(
                f"{option} is {number}, it must be at least 1.", f"Leave out {option}."
            )
    if request.flash_attention is False and _is_quantised(request.kv_type):
        raise UsageError(
            f"A cache of {request.kv_type} needs flash attention, which is switched off.",
            "Use --kv-type f16, or leave flash attention on.",
        )
    if request.split_mode == "none" and sum(share > 0 for share in request.tensor_split or ()) > 1:
        raise UsageError(
            "--split-mode none takes one card, and --tensor-split gives layers to several.",
            "Leave one of them out.",
        )
    if not math.isfinite(request.min_speed) or request.min_speed < 0 or request.depth < 0:
        raise UsageError(
            f"--min-speed is {request.min_speed:g} and --depth {request.depth}, neither may be "
            "negative.",
            "Leave them out for the defaults.",
        )


def _is_quantised(kv_type: str | None) -> bool:
    return kv_type is not None and kv_type not in _FLOAT_KV_TYPES


def round_context(tokens: int) -> int:
    """Up to llama.cpp's multiple."""
    return -(-tokens // CONTEXT_MULTIPLE) * CONTEXT_MULTIPLE


def largest_context(candidate: Candidate) -> int:
    """The longest context of whole multiples within the model's limit."""
    limit = candidate.context_limit
    return max(CONTEXT_MULTIPLE, limit // CONTEXT_MULTIPLE * CONTEXT_MULTIPLE)


def list_contexts(request: PlanRequest, candidate: Candidate) -> tuple[int, ...]:
    """The contexts to choose from, the preferred one first; one where it is fixed.

    The aim is 32k, at the least what `--min-context` says. LocalMistralError for more than the
    model can have.
    """
    most = largest_context(candidate)
    if request.context is not None:
        _check_length("--context", request.context, candidate)
        return (min(most, round_context(request.context)),)
    if request.has_min_context:
        _check_length("--min-context", request.min_context, candidate)
    floor = min(most, round_context(request.min_context))
    aim = min(most, max(CONTEXT_AIM, floor))
    return (*range(aim, floor, -CONTEXT_STEP), floor)


def _check_length(option: str, tokens: int, candidate: Candidate) -> None:
    if tokens > candidate.context_limit:
        raise PlanError(
            f"{option} asks for {tokens:,} tokens, {candidate.model} holds at most "
            f"{candidate.context_limit:,}.",
            f"Leave out {option} for a context that fits",
            change=((option, None),),
        )


def list_kv_types(request: PlanRequest, shape: ModelShape) -> tuple[str, ...]:
    """The KV types to choose from, the preferred one first. Keys and values have the same."""
    lengths = (shape.key_length, shape.value_length)
    divides = all(length % _KV_BLOCK == 0 for length in lengths)
    if request.kv_type is not None:
        if _is_quantised(request.kv_type) and not divides:
            raise PlanError(
                f"A cache of {request.kv_type} needs heads of whole blocks of {_KV_BLOCK}, this "
                f"model's have {lengths[0]} and {lengths[1]} elements.",
                "Leave out --kv-type for f16",
                change=(("--kv-type", None),),
            )
        return (request.kv_type,)
    if request.flash_attention is False or not divides:
        return (PLAIN_KV_TYPE,)
    return (PLAIN_KV_TYPE, SMALL_KV_TYPE)


def choose_batches(request: PlanRequest) -> tuple[int, int]:
    """Logical and physical batch; the latter is never more, as in llama.cpp."""
    batch = request.batch or max(DEFAULT_BATCH, request.ubatch or 0)
    return batch, min(batch, request.ubatch or DEFAULT_UBATCH)


def limit_placement(request: PlanRequest, shape: ModelShape, machine: Machine) -> Limits:
    """What is fixed of the placement, in the model's own numbers."""
    return Limits(
        gpu_layers=_limit_gpu_layers(request.gpu_layers, shape, machine),
        shares=_pad_shares(request.tensor_split, machine),
        cpu_expert_layers=_check_expert_layers(request.cpu_expert_layers, shape),
        split_mode=_check_split_mode(request.split_mode, shape, machine),
    )


def _limit_gpu_layers(layers: int | None, shape: ModelShape, machine: Machine) -> int | None:
    """As llama.cpp: negative or too many are all of them, and the output counts as one."""
    if not machine.gpus:
        if layers is not None and layers > 0:
            raise PlanError(
                f"--gpu-layers {layers} needs a card, and there is none that can be used (see "
                "localmistral hardware).",
                "Leave out --gpu-layers",
                change=(("--gpu-layers", None),),
            )
        return 0
    if layers is None:
        return None
    most = shape.layer_count + 1
    return most if layers < 0 else min(layers, most)


def _pad_shares(shares: Sequence[float] | None, machine: Machine) -> tuple[float, ...] | None:
    """One share a card: those left out at the end are 0, as in llama.cpp."""
    if shares is None:
        return None
    cards = len(machine.gpus)
    if any(not math.isfinite(share) or share < 0 for share in shares) or not any(shares):
        shown = ",".join(f"{share:g}" for share in shares)
        raise UsageError(
            f"--tensor-split {shown} needs shares of 0 or more, not all of them 0.",
            "Give one share a card, such as --tensor-split 1,1",
        )
    if len(shares) > cards:
        raise PlanError(
            f"--tensor-split has {len(shares)} shares, there {'is' if cards == 1 else 'are'} "
            f"{cards} card{'' if cards == 1 else 's'} to share among (see localmistral hardware).",
            "Leave out --tensor-split for the best shares",
            change=(("--tensor-split", None),),
        )
    return (*shares, *(0.0,) * (cards - len(shares)))


def _check_expert_layers(layers: Sequence[int] | None, shape: ModelShape) -> tuple[int, ...] | None:
    if layers is None:
        return None
    if layers and not any(shape.expert_bytes):
        raise PlanError(
            f"--cpu-experts is for mixtures of experts, and this model ({shape.architecture}) has "
            "no routed experts.",
            "Leave out --cpu-experts (--gpu-layers keeps layers in RAM)",
            change=(("--cpu-experts", None),),
        )
    beyond = [layer for layer in layers if not 0 <= layer < shape.layer_count]
    if beyond:
        raise PlanError(
            f"--cpu-experts names layer {beyond[0]}, the model has layers 0 to "
            f"{shape.layer_count - 1}.",
            "Leave out --cpu-experts for the best layers",
            change=(("--cpu-experts", None),),
        )
    return tuple(sorted(set(layers)))


def _check_split_mode(mode: str | None, shape: ModelShape, machine: Machine) -> str | None:
    if mode != "tensor":
        return mode
    if any(shape.expert_bytes) or shape.architecture not in TENSOR_ARCHITECTURES:
        raise PlanError(
            f"--split-mode tensor is for dense models ({', '.join(TENSOR_ARCHITECTURES)}), this "
            f"one is {shape.architecture}.",
            "Leave out --split-mode for the best one",
            change=(("--split-mode", None),),
        )
    if len(machine.gpus) < 2:
        cards = len(machine.gpus)
        raise PlanError(
            f"--split-mode tensor needs at least 2 cards, there {'is' if cards == 1 else 'are'} "
            f"{cards}.",
            "Leave out --split-mode",
            change=(("--split-mode", None),),
        )
    return mode
