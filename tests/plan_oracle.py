"""What every document of `plan --json` must keep, worked out anew from the contract and from the
published figures of the models; nothing here comes from the planner's own code."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from localmistral.models.shape import ModelShape

CPU = -1
MIB = 1 << 20
KEYS: Mapping[str, type | tuple[type, ...]] = {
    "model": str,
    "quant": str,
    "files": list,
    "download_bytes": int,
    "context": int,
    "kv_type": str,
    "split_mode": str,
    "gpu_layers": int,
    "tensor_split": list,
    "cpu_expert_layers": list,
    "flash_attention": bool,
    "batch": int,
    "ubatch": int,
    "threads": int,
    "devices": list,
    "predicted": dict,
    "reasons": list,
    "alternatives": list,
}
DEVICE_PARTS = ("weights_bytes", "mmproj_bytes", "kv_bytes", "compute_bytes")
KV_F16_BYTES = {  # a token of all layers
    "mistral-small-4": 23_040,
    "mistral-small-3.2": 163_840,
    "devstral-small-2": 163_840,
    "ministral-3-14b": 163_840,
    "ministral-3-8b": 139_264,
    "ministral-3-3b": 106_496,
}
KV_SIXTEENTHS = {"f16": (1, 1), "bf16": (1, 1), "f32": (2, 1), "q8_0": (17, 32), "q4_0": (9, 32)}
EXPERTS = re.compile(r"^blk\.(\d+)\.ffn_(up|down|gate_up|gate)_(ch|)exps\.")
JARGON = re.compile(r"\b(ubatch|None|Verdict|rank|dataclass|femto\w*|n_gpu_layers|_\w+)\b")


def check_document(
    document: Mapping[str, Any], *, layers: int, limit: int, has_fixed_experts: bool = False
) -> None:
    """Keys, types, sums and orders; `layers` of the model and its `limit` of context. Experts that
    the user named stay named, also of layers that are in RAM as a whole."""
    for key, kind in KEYS.items():
        assert type(document[key]) is kind, (key, document[key])
    split, experts = document["tensor_split"], document["cpu_expert_layers"]
    assert all(type(count) is int and count >= 0 for count in [*split, *experts])
    assert sum(split) == document["gpu_layers"] <= layers + 1
    assert experts == sorted(set(experts))
    first = 0 if has_fixed_experts else layers + 1 - document["gpu_layers"]
    assert all(first <= n < layers for n in experts)
    assert document["context"] % 256 == 0 and 0 < document["context"] <= limit
    assert document["download_bytes"] == sum(file["bytes"] for file in document["files"])
    assert document["split_mode"] in ("none", "layer", "tensor")
    assert 1 <= document["ubatch"] <= document["batch"] and document["threads"] >= 1
    _check_devices(document)
    predicted = document["predicted"]
    assert type(predicted["depth"]) is int and 0 <= predicted["depth"] <= document["context"]
    assert predicted["decode_tokens_per_second"] > 0 < predicted["prefill_tokens_per_second"]
    for reason in document["reasons"]:
        assert re.fullmatch(r"[\w~].*[^.]\.", reason) and not JARGON.search(reason), reason
    assert document["reasons"] and len(set(document["reasons"])) == len(document["reasons"])


def _check_devices(document: Mapping[str, Any]) -> None:
    *cards, cpu = document["devices"]
    assert len(cards) == len(document["tensor_split"])
    assert cpu["name"].startswith("CPU")
    for device, count in zip(document["devices"], [*document["tensor_split"], 1], strict=True):
        parts = [device[part] for part in DEVICE_PARTS]
        assert all(type(part) is int and part >= 0 for part in parts)
        assert sum(parts) <= device["budget_bytes"] or not sum(parts)
        assert count or not sum(parts), device


def place_layers(document: Mapping[str, Any], layers: int) -> list[int]:
    """The device of each layer and of the output: those that don't go to cards come first, then
    each goes to the first card whose cumulative share exceeds its place."""
    split, wanted = document["tensor_split"], document["gpu_layers"]
    places = [CPU] * (layers + 1 - wanted)
    for number in range(wanted):
        ends = [sum(split[: card + 1]) / wanted for card in range(len(split))]
        places.append(next(card for card, end in enumerate(ends) if end > number / wanted))
    return places


def check_weights(document: Mapping[str, Any], shape: ModelShape) -> None:
    """Every device's weights to the byte, by the names of the tensors."""
    places = place_layers(document, shape.layer_count)
    expected = dict.fromkeys([*range(len(document["tensor_split"])), CPU], 0)
    for tensor in shape.tensors:
        block = re.match(r"blk\.(\d+)\.", tensor.name)
        expert = EXPERTS.match(tensor.name)
        if expert and int(expert[1]) in document["cpu_expert_layers"]:
            device = CPU
        elif block:
            device = places[int(block[1])]
        else:
            device = CPU if tensor.name.startswith("token_embd") else places[-1]
        expected[device] += tensor.bytes
    if shape.has_tied_embeddings and places[-1] != CPU:
        tied = [tensor.bytes for tensor in shape.tensors if tensor.name == "token_embd.weight"]
        expected[places[-1]] += sum(tied)
    if document["split_mode"] != "tensor":
        found = [device["weights_bytes"] for device in document["devices"]]
        assert found == list(expected.values())


def check_cache(
    document: Mapping[str, Any], f16_bytes: int, layers: int, parallel: int = 1
) -> None:
    """Every device's cache to the byte: each layer's share is with the layer."""
    over, under = KV_SIXTEENTHS[document["kv_type"]]
    cells = document["context"] * parallel
    each = f16_bytes * over * cells // (under * layers)
    places = place_layers(document, layers)[:-1]
    devices = [*range(len(document["tensor_split"])), CPU]
    found = [device["kv_bytes"] for device in document["devices"]]
    if document["split_mode"] == "tensor":
        assert sum(found) >= each * layers
    else:
        assert found == [each * places.count(device) for device in devices]


def check_small_4_buffers(document: Mapping[str, Any], largest_expert_bytes: int) -> None:
    """Compute buffers of CUDA cards against the formulas fitted to llama.cpp's dry loads (which
    are up to 8 % over), with what only CUDA has."""
    used = [card for card, count in enumerate(document["tensor_split"]) if count]
    tokens, context = document["ubatch"], document["context"]
    mask, hidden, logits = 2 * context * tokens, 4 * 4096 * tokens, 4 * 131_072 * tokens
    in_ram = bool(document["cpu_expert_layers"])
    whole = document["gpu_layers"] == 37 and not in_ram
    for card in used:
        is_last = card == used[-1]
        if whole and len(used) > 1:
            factor = 13.5 if card == used[0] else 15 if is_last else 17.5
            wanted = 4 * mask + factor * hidden + (logits if is_last else 0)
        elif len(used) == 1:
            wanted = max(mask + 9 * hidden, logits + 2 * hidden)
        else:
            wanted = max(mask + 10.5 * hidden, logits + 7 * hidden)
            wanted = wanted if is_last else mask + 9.5 * hidden
        least = wanted / 1.08 - MIB
        if document["kv_type"] not in ("f16", "bf16", "f32"):
            least += 640 * context / 1.08
        if in_ram and card == used[0]:
            least += largest_expert_bytes
        found = document["devices"][card]["compute_bytes"]
        assert found >= least, (card, found / MIB, least / MIB)


def largest_expert(shape: ModelShape, layers: Sequence[int]) -> int:
    """Bytes of the largest tensor of experts in these layers."""
    sizes = [
        tensor.bytes
        for tensor in shape.tensors
        if (found := EXPERTS.match(tensor.name)) and int(found[1]) in layers
    ]
    return max(sizes, default=0)
