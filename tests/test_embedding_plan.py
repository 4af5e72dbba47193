"""Plans for models that only make embeddings: where they go, how long texts may be, what is said.

Sizes are those of published models, as llama.cpp's dry loads give them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from localmistral.errors import PlanError
from localmistral.fit.embedding import (
    batch_for,
    most_scratch_bytes,
    output_bytes,
    scratch_bytes,
    uses_flash_attention,
)
from localmistral.fit.machine import GIB, MIB, Cpu, Machine, Ram
from localmistral.fit.plan import Candidate, Plan, PlannedFile, PlanRequest
from localmistral.fit.plan_json import plan_from_json, plan_to_json
from localmistral.fit.planner import plan
from localmistral.fit.specs import make_machine, parse_gpus, parse_ram
from localmistral.models.shape import FileKind, ModelShape, Tensor, Tokenizer, layer_of, role_of

BGE_SMALL: dict[str, Any] = {
    "layers": 12,
    "width": 384,
    "heads": 12,
    "vocabulary": 30_522,
    "context": 512,
}
BGE_BASE: dict[str, Any] = {
    "layers": 12,
    "width": 768,
    "heads": 12,
    "vocabulary": 30_522,
    "context": 512,
}
BGE_M3: dict[str, Any] = {
    "layers": 24,
    "width": 1024,
    "heads": 16,
    "vocabulary": 250_002,
    "context": 8192,
}
ELEMENT_BYTES = {"F32": 4, "F16": 2}


def tensor(name: str, elements: int, element_bytes: int) -> Tensor:
    return Tensor(
        name=name,
        dims=(elements,),
        type="f32" if element_bytes == 4 else "f16",
        elements=elements,
        bytes=elements * element_bytes,
        file_index=0,
        layer=layer_of(name),
        role=role_of(name),
    )


def make_shape(
    *, layers: int, width: int, heads: int, vocabulary: int, context: int, quant: str = "F16"
) -> ModelShape:
    """BERT: its matrices by their sizes; norms and biases are left out."""
    size = ELEMENT_BYTES[quant]
    tensors = [tensor("token_embd.weight", width * vocabulary, size)]
    tensors += [
        tensor(f"blk.{n}.{name}.weight", times * width * width, size)
        for n in range(layers)
        for name, times in (("attn_qkv", 3), ("attn_output", 1), ("ffn_up", 4), ("ffn_down", 4))
    ]
    return ModelShape(
        files=(Path("bert.gguf"),),
        file_bytes=(sum(t.bytes for t in tensors),),
        version=3,
        kind=FileKind.MODEL,
        architecture="bert",
        name="Bert",
        size_label="",
        file_type=1,
        layer_count=layers,
        embedding_length=width,
        context_length=context,
        vocabulary_size=vocabulary,
        feed_forward_lengths=(4 * width,) * layers,
        head_counts=(heads,) * layers,
        kv_head_counts=(heads,) * layers,
        key_length=width // heads,
        value_length=width // heads,
        pooling=2,
        is_causal=False,
        tokenizer=Tokenizer(token_count=vocabulary),
        sampling=(),
        tensors=tuple(tensors),
    )


def make_candidates(model: dict[str, Any], quants: Sequence[str] = ("F16",)) -> list[Candidate]:
    shapes: list[tuple[str, ModelShape]] = [(q, make_shape(**model, quant=q)) for q in quants]
    return [
        Candidate(
            model="bert",
            quant=quant,
            shape=shape,
            context_limit=shape.context_length,
            files=(PlannedFile(path="bert.gguf", bytes=shape.weight_bytes),),
        )
        for quant, shape in shapes
    ]


def machine(*gpus: str, ram: str = "32GiB") -> Machine:
    return make_machine(None, parse_gpus(gpus), parse_ram(ram), not gpus)


def plan_for(model: dict[str, Any], where: Machine, **request: Any) -> Plan:
    return plan(make_candidates(model), where, PlanRequest(**request))


@pytest.mark.parametrize(
    ("model", "batch", "seen_mib"),
    [
        (BGE_SMALL, 512, 17.51),
        (BGE_SMALL, 2048, 226.02),
        (BGE_SMALL, 8192, 212.09),
        (BGE_BASE, 512, 22.01),
        (BGE_BASE, 2048, 244.02),
        (BGE_BASE, 8192, 296.09),
        (BGE_M3, 512, 29.01),
        (BGE_M3, 2048, 320.02),
        (BGE_M3, 8192, 352.09),
    ],
)
def test_compute_buffers_are_never_less_than_those_of_dry_loads(
    model: dict[str, Any], batch: int, seen_mib: float
) -> None:
    assert seen_mib * MIB <= scratch_bytes(make_shape(**model), batch) + 4 * MIB / 100
    assert scratch_bytes(make_shape(**model), batch) < 3 * seen_mib * MIB


def test_batches_double_and_long_ones_use_flash_attention() -> None:
    assert [batch_for(n) for n in (1, 512, 513, 2048, 2049, 8192)] == [
        512, 512, 1024, 2048, 4096, 8192,
    ]  # fmt: skip
    assert [uses_flash_attention(n) for n in (512, 2048, 4096)] == [False, False, True]


def test_the_way_to_the_longest_batch_counts_as_well() -> None:
    shape = make_shape(**BGE_BASE)
    assert scratch_bytes(shape, 4096) < scratch_bytes(shape, 2048)
    assert most_scratch_bytes(shape, 4096) == scratch_bytes(shape, 2048)
    assert most_scratch_bytes(shape, 512) == scratch_bytes(shape, 512)


def test_without_a_card_the_cpu_has_all_of_it_and_no_cache() -> None:
    found = plan_for(BGE_BASE, machine())
    shape = make_shape(**BGE_BASE)
    (cpu,) = found.devices
    assert found.only_embeds
    assert found.placement.gpu_layers == 0
    assert (cpu.weights_bytes, cpu.kv_bytes) == (shape.weight_bytes, 0)
    assert cpu.compute_bytes == scratch_bytes(shape, 512) + output_bytes(shape, 512)
    assert (found.context, found.parallel, found.batch, found.ubatch) == (512, 1, 512, 512)
    assert "no speed is predicted" in found.reasons[0]
    assert found.predicted.decode_tokens_per_second == 0


def test_the_roomiest_card_takes_all_layers() -> None:
    found = plan_for(BGE_M3, machine("8GiB", "24GiB"))
    shape = make_shape(**BGE_M3)
    assert found.placement.tensor_split == (0, 25)
    small, large, cpu = found.devices
    assert small.used_bytes == 0
    assert large.weights_bytes + cpu.weights_bytes == shape.weight_bytes
    assert cpu.weights_bytes == shape.embedding_bytes
    assert large.compute_bytes == most_scratch_bytes(shape, 8192)
    assert cpu.compute_bytes > output_bytes(shape, 8192)


def test_the_largest_quant_that_fits_the_card_is_taken() -> None:
    candidates = make_candidates(BGE_M3, ("F16", "F32"))
    assert plan(candidates, machine("24GiB"), PlanRequest()).quant == "F32"
    narrow = machine("2.5GiB")  # with what the backend and the margin leave of it
    chosen = plan(candidates, narrow, PlanRequest())
    assert (chosen.quant, chosen.placement.gpu_layers) == ("F16", 25)
    asked = plan(candidates, machine("24GiB"), PlanRequest(quant="F16"))
    assert asked.quant == "F16"


def test_texts_are_as_long_as_memory_allows() -> None:
    small = Machine(
        gpus=(),
        ram=Ram(total_bytes=8 * GIB, available_bytes=7 * GIB),
        cpu=Cpu(name="", cores=4),
    )
    found = plan_for(BGE_M3, small)
    assert found.context in (2048, 1024)
    assert found.devices[-1].excess_bytes == 0
    assert any("what memory allows; the model is meant for 8,192" in r for r in found.reasons)
    with pytest.raises(PlanError, match=r"does not fit.*8,192 tokens.*CPU needs"):
        plan_for(BGE_M3, small, context=8192)
    with pytest.raises(PlanError, match="does not fit"):
        plan_for(BGE_M3, replace(small, ram=replace(small.ram, available_bytes=2 * GIB)))


def test_what_is_fixed_is_kept_or_refused_by_name() -> None:
    cards = machine("24GiB")
    assert plan_for(BGE_M3, cards, context=1000).context == 1024
    assert plan_for(BGE_M3, cards, gpu_layers=0).placement.gpu_layers == 0
    assert plan_for(BGE_M3, cards, gpu_layers=5).placement.tensor_split == (5,)
    assert plan_for(BGE_M3, cards, gpu_layers=-1).placement.tensor_split == (25,)
    assert plan_for(BGE_M3, cards, threads=3).threads == 3
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("--context", {"context": 8193}),
        ("--min-context", {"min_context": 9000, "has_min_context": True}),
        ("--kv-type", {"kv_type": "q8_0"}),
        ("--tensor-split", {"tensor_split": (1.0,)}),
        ("--split-mode", {"split_mode": "layer"}),
        ("--cpu-experts", {"cpu_expert_layers": (1,)}),
        ("--ubatch", {"ubatch": 128}),
        ("--min-speed", {"min_speed": 5.0, "has_min_speed": True}),
    ]
    for option, request in wrong:
        with pytest.raises(PlanError, match=option) as raised:
            plan_for(BGE_M3, cards, **request)
        assert raised.value.change == ((option, None),)
    with pytest.raises(PlanError, match="--gpu-layers 3 needs a card"):
        plan_for(BGE_M3, machine(), gpu_layers=3)


def test_such_a_plan_can_be_kept() -> None:
    found = plan_for(BGE_M3, machine("24GiB"))
    assert plan_from_json(plan_to_json(found)) == found
