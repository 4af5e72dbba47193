"""Plans for models that only make embeddings: a device that takes all of it, and how long texts
may be.

There is little to choose: such models are small, keep no cache between calls and write nothing, so
no speed is predicted. Pure, as `planner` is. Knows neither texts nor engines.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from localmistral.errors import PlanError
from localmistral.fit.kv import kv_bytes_per_layer
from localmistral.fit.machine import Machine
from localmistral.fit.placement import CPU, Placement
from localmistral.fit.plan import (
    CONTEXT_MULTIPLE,
    Candidate,
    DeviceMemory,
    Plan,
    PlanRequest,
    Prediction,
)
from localmistral.fit.weights import weight_bytes_per_device
from localmistral.models.shape import ModelShape
from localmistral.units import format_bytes

SMALLEST_BATCH = 512
"""Tokens a batch holds at first. A text has to fit into one batch, since its vector is pooled
there, and graphs grow with the batch: so it grows only when a longer text comes."""
LONGEST_PLAIN_BATCH = 2048
"""Up to this batch attention is computed without flash attention. On the CPU flash attention sums
in 16 bits, tile by tile, so that a vector would change with its neighbours in the batch (by 5e-4,
against 3e-5 without; measured on a model of two layers). What it saves, a number for each pair of
tokens and head, is at most some 300 MiB up to here, and 16 times that at 8,192 tokens."""
_KV_TYPE = "f16"
_ELEMENT_BYTES = 4
_WIDTHS = 6
"""Vectors of the model's width that are alive at once, for each token: read off llama.cpp's own
figures for BERT of 384 to 1,024 elements (see `scratch_bytes`)."""
_GATED = 2
"""A gated feed-forward part has two vectors of its length where a plain one has one."""


def batch_for(tokens: int) -> int:
    """Tokens of the batch that is made for a text of `tokens`."""
    batch = SMALLEST_BATCH
    while batch < tokens:
        batch *= 2
    return batch


def uses_flash_attention(batch: int) -> bool:
    return batch > LONGEST_PLAIN_BATCH


def scratch_bytes(shape: ModelShape, batch: int) -> int:
    """The compute buffer for a batch of so many tokens, and the cache of models that have one.

    With width w, feed-forward length f and h heads, llama.cpp's dry loads of BERT gave exactly
    4b(6w) + 4b²(h + 1) bytes without flash attention and 4b(3w + f) + 2b² with it, for batches b
    of 512 to 8,192 tokens; this is never less than either, also with a gated feed-forward part.
    """
    forward = max(shape.feed_forward_lengths, default=0)
    rows = _ELEMENT_BYTES * batch * (_WIDTHS * shape.embedding_length + _GATED * forward)
    heads = 0 if uses_flash_attention(batch) else max(shape.head_counts, default=0)
    scores = _ELEMENT_BYTES * batch * batch * (heads + 1)
    cache = 0 if shape.is_encoder else sum(kv_bytes_per_layer(shape, _KV_TYPE, batch))
    return rows + scores + cache


def most_scratch_bytes(shape: ModelShape, batch: int) -> int:
    """For batches up to `batch`: the largest isn't always the one that takes most."""
    return max(scratch_bytes(shape, size) for size in (batch, min(batch, LONGEST_PLAIN_BATCH)))


def output_bytes(shape: ModelShape, batch: int) -> int:
    """What llama.cpp keeps in RAM for the results: a vector of each token, and logits of each,
    though such a model has none (llama-context.cpp, `output_reserve`)."""
    return _ELEMENT_BYTES * batch * (shape.vocabulary_size + shape.embedding_length)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Choice:
    candidate: Candidate
    placement: Placement
    tokens: int
    devices: tuple[DeviceMemory, ...]

    @property
    def fits(self) -> bool:
        return not any(device.excess_bytes for device in self.devices)


def plan_embedding(candidates: Sequence[Candidate], machine: Machine, request: PlanRequest) -> Plan:
    """The plan for the largest of `candidates` (quants of one model) that fits a device.

    A card comes before the CPU, the longest texts before shorter ones. PlanError where nothing
    fits, or for a fixed value that has no meaning for such a model.
    """
    _refuse_foreign(candidates[0].model, request)
    ordered = sorted(candidates, key=lambda one: -one.bits_per_weight)
    tried = [
        _measure(candidate, placement, tokens, machine)
        for placements in _list_placements(ordered[0].shape, machine, request)
        for tokens in _list_lengths(ordered[0], request)
        for candidate in ordered
        for placement in placements
    ]
    chosen = next((choice for choice in tried if choice.fits), None)
    if chosen is None:
        raise _refuse_size(tried)
    return _compose(chosen, machine, request)


def _refuse_foreign(model: str, request: PlanRequest) -> None:
    fixed = {
        "--kv-type": request.kv_type,
        "--tensor-split": request.tensor_split,
        "--split-mode": request.split_mode,
        "--cpu-experts": request.cpu_expert_layers,
        "--batch": request.batch,
        "--ubatch": request.ubatch,
        "--min-speed": request.has_min_speed or None,
    }
    for option, value in fixed.items():
        if value is not None:
            raise PlanError(
                f"{model} makes embeddings, for which {option} has no meaning.",
                f"Leave out {option}",
                change=((option, None),),
            )


def _list_placements(
    shape: ModelShape, machine: Machine, request: PlanRequest
) -> Iterator[list[Placement]]:
    """On one card, that with the most room first; then, unless layers on cards are asked for, in
    RAM."""
    cards = sorted(range(len(machine.gpus)), key=lambda n: -machine.gpus[n].budget_bytes)
    asked, whole = request.gpu_layers, shape.layer_count + 1
    if asked is not None and asked > 0 and not cards:
        raise PlanError(
            f"--gpu-layers {asked} needs a card, and there is none that can be used (see "
            "localmistral hardware).",
            "Leave out --gpu-layers",
            change=(("--gpu-layers", None),),
        )
    layers = whole if asked is None or asked < 0 else min(asked, whole)
    if layers:
        yield [
            Placement(
                gpu_layers=layers,
                tensor_split=tuple(layers if n == card else 0 for n in range(len(cards))),
            )
            for card in cards
        ]
    if not layers or asked is None or not cards:
        yield [Placement(gpu_layers=0, tensor_split=(0,) * len(cards))]


def _list_lengths(candidate: Candidate, request: PlanRequest) -> list[int]:
    """Tokens of the longest text: as asked, else the model's limit, else halves of it."""
    limit = candidate.context_limit
    for option, tokens in (
        ("--context", request.context),
        ("--min-context", request.min_context if request.has_min_context else None),
    ):
        if tokens is not None and tokens > limit:
            raise PlanError(
                f"{option} asks for {tokens:,} tokens, {candidate.model} reads texts of at most "
                f"{limit:,}.",
                f"Leave out {option}",
                change=((option, None),),
            )
    if request.context is not None:
        return [min(limit, _round_up(request.context))]
    least = request.min_context if request.has_min_context else min(limit, SMALLEST_BATCH)
    lengths = [limit]
    while lengths[-1] // 2 >= least:
        lengths.append(lengths[-1] // 2)
    return lengths


def _measure(candidate: Candidate, placement: Placement, tokens: int, machine: Machine) -> _Choice:
    """Bytes on every card, the CPU last. What a device computes with is counted whole on each that
    computes, and the inputs (a mask over pairs of tokens) in RAM in any case."""
    shape, batch = candidate.shape, batch_for(tokens)
    weights = weight_bytes_per_device(shape, placement)
    scratch = most_scratch_bytes(shape, batch)
    mask = _ELEMENT_BYTES * batch * batch
    has_layers = CPU in placement.layer_devices(shape.layer_count)
    compute = dict.fromkeys(placement.used_cards, scratch)
    compute[CPU] = output_bytes(shape, batch) + (scratch if has_layers else mask)
    names = [f"GPU {n} ({gpu.name})" for n, gpu in enumerate(machine.gpus)]
    budgets = [gpu.budget_bytes for gpu in machine.gpus]
    rows = zip(
        [*range(len(names)), CPU],
        [*names, "CPU"],
        [*budgets, machine.ram.budget_bytes],
        strict=True,
    )
    devices = tuple(
        DeviceMemory(
            name=name,
            budget_bytes=budget,
            weights_bytes=weights.get(device, 0),
            mmproj_bytes=0,
            kv_bytes=0,
            compute_bytes=compute.get(device, 0),
        )
        for device, name, budget in rows
    )
    return _Choice(candidate=candidate, placement=placement, tokens=tokens, devices=devices)


def _refuse_size(tried: Sequence[_Choice]) -> PlanError:
    """In the words of what comes nearest."""
    nearest = min(tried, key=lambda one: sum(device.excess_bytes for device in one.devices))
    device = max(nearest.devices, key=lambda one: one.excess_bytes)
    candidate = nearest.candidate
    return PlanError(
        f"{candidate.model} {candidate.quant} does not fit: with texts of {nearest.tokens:,} "
        f"tokens, {device.name} needs {format_bytes(device.used_bytes)} and may use "
        f"{format_bytes(device.budget_bytes)}.",
        f"Ask for shorter texts: --context {max(1, nearest.tokens // 2)}",
    )


def _compose(choice: _Choice, machine: Machine, request: PlanRequest) -> Plan:
    candidate, batch = choice.candidate, batch_for(choice.tokens)
    in_ram = not choice.placement.gpu_layers
    twice = 2 * candidate.shape.weight_bytes <= machine.ram.available_bytes
    return Plan(
        model=candidate.model,
        quant=candidate.quant,
        repository=candidate.repository,
        revision=candidate.revision,
        files=candidate.files,
        context=_round_up(choice.tokens),
        parallel=1,
        kv_type=_KV_TYPE,
        placement=choice.placement,
        flash_attention=uses_flash_attention(batch),
        batch=batch,
        ubatch=batch,
        threads=max(1, machine.cpu.cores) if request.threads is None else request.threads,
        mmap=True,
        repack=in_ram and twice,
        devices=choice.devices,
        predicted=Prediction(depth=0, decode_tokens_per_second=0.0, prefill_tokens_per_second=0.0),
        reasons=tuple(_explain(choice, machine, request)),
        is_estimated=candidate.is_estimated,
        is_local=candidate.is_local,
        only_embeds=True,
    )


def _round_up(tokens: int) -> int:
    return -(-tokens // CONTEXT_MULTIPLE) * CONTEXT_MULTIPLE


def _explain(choice: _Choice, machine: Machine, request: PlanRequest) -> Iterator[str]:
    candidate, tokens = choice.candidate, choice.tokens
    yield f"{candidate.model} makes embeddings and writes no text: no speed is predicted."
    if request.context is not None:
        yield f"Texts of up to {tokens:,} tokens are kept as asked."
    elif tokens == candidate.context_limit:
        yield f"Texts of up to {tokens:,} tokens are all that the model is meant for."
    else:
        yield (
            f"Texts of up to {tokens:,} tokens are what memory allows; the model is meant for "
            f"{candidate.context_limit:,}."
        )
    yield _explain_place(choice, machine)
    first, most = (
        most_scratch_bytes(candidate.shape, batch) + output_bytes(candidate.shape, batch)
        for batch in (SMALLEST_BATCH, batch_for(tokens))
    )
    if most > first:
        yield (
            f"{format_bytes(first)} are computed with at first, up to {format_bytes(most)} once "
            f"texts of more than {SMALLEST_BATCH} tokens come."
        )
    if candidate.is_local:
        yield f"{candidate.quant} is on this disk."


def _explain_place(choice: _Choice, machine: Machine) -> str:
    used = choice.placement.used_cards
    if used:
        return f"{choice.devices[used[0]].name} has room for all of it."
    if not machine.gpus:
        return "The CPU computes it, since there is no card to use."
    return "The CPU computes it."
