"""Bytes per device: the header's own sums, and llama.cpp's for the buffers of its graphs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from check_compute_buffers import LIKE_CUDA, Case, compare
from gguf_writer import Gguf, TensorSpec, tiny_llama, tiny_llama_tensors
from make_header_gguf import build_files, write_files
from rpc_servers import RpcProcess, start_rpc

from localmistral.engine import Engine, EngineSettings
from localmistral.engine.buffers import LoadReport
from localmistral.fit.graphs.arena import Tape
from localmistral.fit.machine import GIB, MIB, Cpu, Gpu, Machine, Ram
from localmistral.fit.memory import (
    cache_copy_bytes,
    gpu_compute_bytes,
    host_compute_bytes,
    input_bytes,
    is_pipelined,
    kv_bytes_per_layer,
    measure,
    output_bytes,
)
from localmistral.fit.placement import Placement, count_layers
from localmistral.fit.plan import DeviceMemory, Load
from localmistral.fit.weights import sum_weights
from localmistral.models.gguf import read_shape
from localmistral.models.shape import ModelShape

DEMO = Path(__file__).resolve().parent.parent / "localmistral" / "data" / "demo.gguf"
LOG_BYTES = 0.01 * MIB
"""llama.cpp's log rounds to this."""
ALL_OF_SMALL_4 = Placement(gpu_layers=37, tensor_split=(19, 18))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("headers")


@pytest.fixture(scope="module")
def rpc() -> Iterator[RpcProcess]:
    with start_rpc(4) as process:
        yield process


@cache
def header(folder: Path, model: str, quant: str = "q4_K") -> Path:
    return write_files(folder / f"{model}-{quant}.gguf", build_files(model, quant))[0]


@pytest.fixture(scope="module")
def small_4(folder: Path) -> ModelShape:
    return read_shape(header(folder, "small-4"))


def machine(count: int, backend: str = "cuda") -> Machine:
    card = Gpu(
        name="RTX 3090",
        total_bytes=24 * GIB,
        free_bytes=24 * GIB,
        bandwidth=936e9,
        flops=71e12,
        backend=backend,
    )
    ram = Ram(total_bytes=64 * GIB, available_bytes=60 * GIB)
    return Machine(gpus=(card,) * count, ram=ram, cpu=Cpu(name="Ryzen", cores=8))


# Weights and cache


def load_report(path: Path, settings: EngineSettings) -> LoadReport:
    with Engine.load([path], settings) as engine:
        return engine.report


@pytest.mark.parametrize(
    ("split", "experts", "kv_type"),
    [
        ((16, 15), (), "f16"),
        ((5, 20, 6), (), "q8_0"),
        ((30, 1), (), "q4_0"),
        ((4, 0, 5, 3), (), "f16"),
        ((3, 2), (), "f16"),
        ((2, 3), (0, 3), "q8_0"),
        ((1, 2), (2,), "bf16"),
    ],
)
def test_weights_and_cache_are_where_a_real_load_puts_them(
    rpc: RpcProcess,
    smollm2_path: Path,
    split: tuple[int, ...],
    experts: tuple[int, ...],
    kv_type: str,
) -> None:
    path = DEMO if sum(split) <= 5 else smollm2_path
    used = [name for name, layers in zip(rpc.devices, split, strict=False) if layers]
    settings = EngineSettings(
        context=2048,
        kv_type=kv_type,
        gpu_layers=sum(split),
        devices=tuple(used),
        tensor_split=tuple(layers for layers in split if layers),
        cpu_expert_layers=experts,
        mmap=False,
        repack=False,
        threads=1,
    )
    report = rpc.call(load_report, path, settings)
    placement = Placement(gpu_layers=sum(split), tensor_split=split, cpu_expert_layers=experts)
    load = Load(cells=2048, kv_type=kv_type)
    rows = measure(read_shape(path), machine(len(split), "rpc"), placement, load)
    names = iter(used)
    for row, layers in zip(rows[:-1], split, strict=True):
        if layers:
            check_row(row, report, next(names))
        else:
            assert row.used_bytes == 0
    check_row(rows[-1], report, "CPU")


def check_row(row: DeviceMemory, report: LoadReport, name: str) -> None:
    actual = report.find(name)
    assert row.weights_bytes == pytest.approx(actual.weights_bytes, abs=2 * LOG_BYTES)
    assert row.kv_bytes == pytest.approx(actual.kv_bytes, abs=LOG_BYTES)


def test_every_byte_of_a_file_is_somewhere_and_a_tied_embedding_twice(folder: Path) -> None:
    for model in ("small-4", "ministral-3-3b"):
        shape = read_shape(header(folder, model))
        total = shape.layer_count + 1
        twice = sum_weights(shape).tied
        assert bool(twice) == (model == "ministral-3-3b")
        for split in ((total, 0), (total // 2, total - total // 2), (3, 4)):
            placement = Placement(gpu_layers=sum(split), tensor_split=split)
            rows = measure(shape, machine(2), placement, Load(cells=4096))
            assert sum(row.weights_bytes for row in rows) == shape.weight_bytes + twice
        on_cpu = Placement(gpu_layers=0, tensor_split=(0, 0))
        rows = measure(shape, machine(2), on_cpu, Load(cells=4096))
        assert [row.weights_bytes for row in rows] == [0, 0, shape.weight_bytes]


def test_experts_in_ram_leave_exactly_their_bytes(small_4: ModelShape) -> None:
    load = Load(cells=32768)
    before = measure(small_4, machine(2), ALL_OF_SMALL_4, load)
    placement = replace(ALL_OF_SMALL_4, cpu_expert_layers=(0, 20, 21))
    after = measure(small_4, machine(2), placement, load)
    moved = [b.weights_bytes - a.weights_bytes for b, a in zip(before, after, strict=True)]
    assert moved == [1728 * MIB, 2 * 1728 * MIB, -3 * 1728 * MIB]
    assert [row.kv_bytes for row in before] == [row.kv_bytes for row in after]


def test_ends_of_a_model_stay_where_llama_cpp_needs_them(small_4: ModelShape) -> None:
    embedding = 4096 * 131_072 // 256 * 144
    assert input_bytes(small_4) == embedding
    assert output_bytes(small_4) == 4096 * 131_072 // 256 * 210 + 4 * 4096
    rows = measure(small_4, machine(2), ALL_OF_SMALL_4, Load(cells=4096))
    assert rows[-1].weights_bytes == embedding


def test_rotary_factors_are_copied_to_every_device_with_layers(tmp_path: Path) -> None:
    factors = TensorSpec(name="rope_freqs.weight", dims=(8,))
    shape = read_tiny(tmp_path, tiny_llama(tensors=[*tiny_llama_tensors(), factors]))
    split = Placement(gpu_layers=3, tensor_split=(1, 1, 1))
    rows = measure(shape, machine(3), split, Load(cells=256))
    tied = sum_weights(shape).tied
    assert sum(row.weights_bytes for row in rows) == shape.weight_bytes + tied + 32


def read_tiny(folder: Path, gguf: Gguf) -> ModelShape:
    path = folder / "tiny.gguf"
    path.write_bytes(gguf.data())
    return read_shape(path)


@pytest.mark.parametrize(
    ("model", "kv_type", "bytes_per_token"),
    [
        ("small-4", "f16", 23_040),
        ("small-4", "q8_0", 12_240),
        ("small-4", "q4_0", 6_480),
        ("small-3.2", "f16", 163_840),
        ("devstral-small-2", "f16", 163_840),
        ("ministral-3-14b", "f16", 163_840),
        ("ministral-3-8b", "f16", 139_264),
        ("ministral-3-3b", "f16", 106_496),
        ("ministral-3-3b", "q8_0", 56_576),
    ],
)
def test_a_token_of_cache_takes_what_is_published(
    folder: Path, model: str, kv_type: str, bytes_per_token: int
) -> None:
    sizes = kv_bytes_per_layer(read_shape(header(folder, model)), kv_type, 32768)
    assert sum(sizes) == 32768 * bytes_per_token
    assert len(set(sizes)) == 1


def test_a_cache_is_padded_to_256_cells(small_4: ModelShape) -> None:
    assert kv_bytes_per_layer(small_4, "f16", 1000) == kv_bytes_per_layer(small_4, "f16", 1024)
    assert kv_bytes_per_layer(small_4, "f16", 1025)[0] == 1280 * 640


def test_layers_that_predict_further_tokens_take_nothing(small_4: ModelShape) -> None:
    shape = replace(small_4, nextn_layer_count=1)
    assert kv_bytes_per_layer(shape, "f16", 4096)[-1] == 0
    assert sum_weights(shape).dense[-1] == sum_weights(shape).experts[-1] == 0


def test_layers_without_attention_have_no_cache(small_4: ModelShape) -> None:
    shape = replace(small_4, kv_head_counts=(0, *small_4.kv_head_counts[1:]))
    assert kv_bytes_per_layer(shape, "f16", 4096)[:2] == (0, 4096 * 640)


# Compute buffers

EXPERTS = tuple(range(36))
COMPUTE_CASES = (
    Case(model="small-4", split=(37,), context=8192),
    Case(model="small-4", split=(37,), context=262_144, kv_type="q8_0"),
    Case(model="small-4", split=(19, 18), context=65_536),
    Case(model="small-4", split=(10, 9, 9, 9), context=131_072, ubatch=1024),
    Case(model="small-4", split=(25, 1, 11), context=32_768, ubatch=2048, kv_type="q4_0"),
    Case(model="small-4", split=(19, 18), context=65_536, experts=(0, 1, 2, 3)),
    Case(model="small-4", split=(37,), context=16_384, experts=EXPERTS),
    Case(model="small-4", split=(20, 13), context=24_576),
    Case(model="small-4", split=(19, 18), context=65_536, experts=(0, 30), backend=LIKE_CUDA),
    Case(model="small-4", split=(24, 13), context=20_480, experts=(34,), backend=LIKE_CUDA),
    Case(model="small-4", split=(9, 12), context=262_144, backend=LIKE_CUDA),
    Case(model="small-4", split=(37,), context=32_768, experts=EXPERTS, backend=LIKE_CUDA),
    Case(model="ministral-3-8b", split=(35,), context=32_768, kv_type="q8_0"),
    Case(model="ministral-3-8b", split=(20, 15), context=8192, ubatch=128),
    Case(model="ministral-3-8b", split=(18,), context=65_536, backend=LIKE_CUDA),
    Case(model="ministral-3-3b", split=(9, 9, 9), context=131_072),
    Case(model="ministral-3-14b", split=(41,), context=6144),
    Case(model="ministral-3-14b", split=(30, 1), context=8192, kv_type="q8_0"),
    Case(model="devstral-small-2", split=(41,), context=49_152, ubatch=256),
    Case(model="devstral-small-2", split=(12, 10), context=65_536, backend=LIKE_CUDA),
    Case(model="small-3.2", split=(40, 1), context=65_536, flash_attention=False, ubatch=64),
    Case(model="medium-3.5", split=(23, 22, 22, 22), context=32_768),
    Case(model="medium-3.5", split=(89,), context=12_288),
    Case(model="ministral-3-8b", split=(20, 15), context=2048, parallel=4),
    Case(model="small-4", split=(19, 18), context=4096, parallel=10, ubatch=256),
    Case(model="medium-3.5", split=(60,), context=16_384, ubatch=1024, kv_type="q4_0"),
)


@pytest.mark.parametrize("case", COMPUTE_CASES, ids=str)
def test_compute_buffers_are_those_of_a_dry_load(rpc: RpcProcess, folder: Path, case: Case) -> None:
    outcome = compare(rpc, header(folder, case.model), case)
    assert min(outcome.actual) > MIB
    assert outcome.is_within_aim, outcome


@pytest.mark.parametrize(
    ("experts", "mib"), [((0, 1, 2, 3), 136), ((30,), 136), (EXPERTS, 130)], ids=str
)
def test_a_copy_of_experts_is_counted_beside_all_else_on_the_first_card(
    small_4: ModelShape, experts: tuple[int, ...], mib: int
) -> None:
    placement = replace(ALL_OF_SMALL_4, cpu_expert_layers=experts)
    first = measure(small_4, machine(2), placement, Load(cells=65_536))[0]
    assert (mib + 1152) * MIB <= first.compute_bytes < (mib + 1153) * MIB


def test_weights_that_a_card_copies_make_its_buffer_larger(rpc: RpcProcess, folder: Path) -> None:
    """So the imitation of CUDA in the table above does what it should."""
    plain = Case(model="small-4", split=(19, 18), context=65_536, experts=(0, 1, 2, 3))
    copied = replace(plain, backend=LIKE_CUDA)
    path = header(folder, "small-4")
    first, second = (compare(rpc, path, case).actual for case in (plain, copied))
    gate_up = 4096 * 4096 * 128 // 256 * 144
    assert gate_up < second[0] < first[0] + gate_up
    assert second[1] <= first[1]


@pytest.mark.parametrize(
    ("role", "pipelined", "whole", "mib"),
    [
        ("first", True, True, 364.5),
        ("last", True, True, 632.5),
        ("only", False, True, 272),
        ("first", False, False, 136),
    ],
)
def test_small_4_at_64k_takes_what_was_measured(
    small_4: ModelShape, role: str, pipelined: bool, whole: bool, mib: float
) -> None:
    found = gpu_compute_bytes(
        small_4,
        Load(cells=65_536),
        role=role,  # type: ignore[arg-type]
        is_pipelined=pipelined,
        is_whole=whole,
    )
    assert found / MIB == pytest.approx(mib, abs=0.6)


def test_the_cpu_holds_the_inputs_and_what_it_computes(small_4: ModelShape) -> None:
    load = Load(cells=65_536)
    logits = 4 * 131_072 * load.sequences

    def host(count: int, *, pipelined: bool = False, whole: bool = True) -> float:
        found = host_compute_bytes(
            small_4, load, is_pipelined=pipelined, gpu_count=count, is_whole=whole
        )
        return (found - logits) / MIB

    assert host(2, pipelined=True) == pytest.approx(296, abs=0.5)
    assert host(2) == pytest.approx(80, abs=0.5)
    assert 128 <= host(2, whole=False) < 200
    assert host(0) > 256 + 64


def test_a_quantised_cache_is_copied_to_f16_on_cuda_alone(small_4: ModelShape) -> None:
    def first_card(backend: str, kv_type: str, cells: int) -> int:
        load = Load(cells=cells, kv_type=kv_type)
        return measure(small_4, machine(2, backend), ALL_OF_SMALL_4, load)[0].compute_bytes

    for cells in (131_072, 262_144):
        plain = first_card("cuda", "f16", cells)
        assert first_card("vulkan", "q8_0", cells) == plain
        copy = first_card("cuda", "q8_0", cells) - plain
        assert copy == pytest.approx(640 * cells, abs=2 * 4 * 4096 * 512)
    growth = first_card("cuda", "q8_0", 262_144) - first_card("cuda", "q8_0", 131_072)
    assert growth == pytest.approx(131_072 * (4 * 2 * 512 + 640), rel=0.01)


def test_the_measured_growth_of_a_card_with_its_context_is_met(folder: Path) -> None:
    """Two RTX 3090, UD-IQ3_XXS, cache in q8_0: 21,584 MiB at 8k, 24,126 MiB at 256k on card 1."""
    shape = read_shape(header(folder, "small-4", "UD-IQ3_XXS"))
    small, large = (
        measure(shape, machine(2), ALL_OF_SMALL_4, Load(cells=cells, kv_type="q8_0"))[0]
        for cells in (8192, 262_144)
    )
    growth = (large.used_bytes - small.used_bytes) / MIB
    assert 0.99 < growth / (24_126 - 21_584) < 1.08
    assert small.used_bytes / MIB == pytest.approx(21_584 - 400, rel=0.03)


def test_a_tensor_of_experts_in_ram_is_held_by_the_first_card_alone(small_4: ModelShape) -> None:
    gate_up = sum_weights(small_4).largest_experts[0]
    assert gate_up == 1152 * MIB
    load = Load(cells=32_768)
    for experts in ((0,), (36 - 1,)):
        placement = replace(ALL_OF_SMALL_4, cpu_expert_layers=experts)
        cuda = measure(small_4, machine(2), placement, load)
        assert cuda[0].compute_bytes > gate_up > cuda[1].compute_bytes
        rpc = measure(small_4, machine(2, "rpc"), placement, load)
        assert rpc[0].compute_bytes < 200 * MIB
        assert rpc[2].compute_bytes > cuda[2].compute_bytes


def test_a_layer_in_ram_has_its_cache_copied_too(folder: Path) -> None:
    shape = read_shape(header(folder, "ministral-3-8b"))
    load = Load(cells=131_072)
    assert cache_copy_bytes(shape, load) == 131_072 * 2 * 2 * 1024
    some = Placement(gpu_layers=20, tensor_split=(20,))
    row = measure(shape, machine(1), some, load)[0]
    assert row.compute_bytes > cache_copy_bytes(shape, load)


def test_smaller_ubatches_and_contexts_never_take_more(small_4: ModelShape) -> None:
    def total(placement: Placement, load: Load) -> int:
        return sum(row.used_bytes for row in measure(small_4, machine(2), placement, load))

    for placement in (ALL_OF_SMALL_4, Placement(gpu_layers=37, tensor_split=(37, 0))):
        ubatches = [total(placement, Load(cells=65_536, ubatch=n)) for n in (128, 256, 512, 1024)]
        assert ubatches == sorted(ubatches)
        cells = [total(placement, Load(cells=n * 1024)) for n in (16, 32, 64, 128, 256)]
        assert cells == sorted(cells)


def test_other_architectures_get_a_margin(folder: Path) -> None:
    shape = read_shape(header(folder, "ministral-3-8b"))
    placement = Placement(gpu_layers=35, tensor_split=(35,))
    known, other = (
        measure(replace(shape, architecture=name), machine(1), placement, Load(cells=8192))[0]
        for name in ("llama", "qwen3")
    )
    assert 1.07 < other.compute_bytes / known.compute_bytes < 1.1


# Rows


def test_rows_name_each_card_and_the_cpu_comes_last(small_4: ModelShape) -> None:
    placement = Placement(gpu_layers=37, tensor_split=(19, 0, 18))
    rows = measure(small_4, machine(3), placement, Load(cells=8192), mmproj_bytes=857_078_496)
    assert [row.name for row in rows] == [
        "GPU 0 (RTX 3090)",
        "GPU 1 (RTX 3090)",
        "GPU 2 (RTX 3090)",
        "CPU",
    ]
    assert [row.mmproj_bytes for row in rows] == [857_078_496, 0, 0, 0]
    assert rows[1].used_bytes == 0 and rows[1].budget_bytes == machine(1).gpus[0].budget_bytes
    assert rows[3].budget_bytes == machine(1).ram.budget_bytes


def test_without_cards_the_cpu_has_everything(small_4: ModelShape) -> None:
    placement = Placement(gpu_layers=0, tensor_split=())
    (row,) = measure(small_4, machine(0), placement, Load(cells=8192), mmproj_bytes=5)
    assert row.weights_bytes == small_4.weight_bytes
    assert row.kv_bytes == 8192 * 23_040 and row.mmproj_bytes == 5


def test_a_card_left_out_comes_before_the_encoder(small_4: ModelShape) -> None:
    placement = Placement(gpu_layers=37, tensor_split=(0, 37))
    rows = measure(small_4, machine(2), placement, Load(cells=8192), mmproj_bytes=7)
    assert [row.mmproj_bytes for row in rows] == [0, 7, 0]


def test_tensor_mode_divides_layers_by_whole_heads(folder: Path) -> None:
    shape = read_shape(header(folder, "medium-3.5"))
    split = count_layers((1, 1, 1, 1), 89)
    placement = Placement(gpu_layers=89, tensor_split=split, split_mode="tensor")
    load = Load(cells=32_768)
    rows = measure(shape, machine(4), placement, load)
    layer_rows = measure(shape, machine(4), replace(placement, split_mode="layer"), load)
    total = sum(row.weights_bytes for row in layer_rows[:-1])
    for row in rows[:-1]:
        assert total / 4 <= row.weights_bytes < total / 4 * 1.04
    one = Placement(gpu_layers=89, tensor_split=(89,))
    alone = measure(shape, machine(1), one, load)[0].compute_bytes
    assert {row.compute_bytes for row in rows[:-1]} == {alone}


@pytest.mark.parametrize(
    ("change", "backend", "expected"),
    [
        ({}, "cuda", True),
        ({}, "vulkan", True),
        ({}, "rpc", True),
        ({}, "something", False),
        ({"cpu_expert_layers": (3,)}, "cuda", False),
        ({"gpu_layers": 36, "tensor_split": (19, 17)}, "cuda", False),
        ({"tensor_split": (37, 0)}, "cuda", False),
        ({"split_mode": "tensor"}, "cuda", False),
        ({"split_mode": "none", "tensor_split": (37, 0)}, "cuda", False),
    ],
)
def test_pipelining_needs_all_layers_on_several_cards_with_events(
    small_4: ModelShape, change: dict[str, object], backend: str, expected: bool
) -> None:
    placement = replace(ALL_OF_SMALL_4, **change)  # type: ignore[arg-type]
    assert is_pipelined(small_4, machine(2, backend), placement) is expected


# The arena


def test_a_freed_block_is_taken_by_the_tensor_it_fits_best() -> None:
    tape = Tape()
    large, kept, small, last = (tape.make(size) for size in (4096, 128, 1024, 128))
    tape.use(large)
    tape.use(small)
    tape.use(tape.make(1024))  # into the hole of 1024, not that of 4096
    tape.use(tape.make(4096))
    tape.use(kept, last)
    assert tape.measure() == 4096 + 128 + 1024 + 128


def test_a_tensor_that_nothing_else_needs_is_overwritten() -> None:
    tape = Tape()
    first = tape.make(1000)
    tape.use(tape.change(1000, first))
    assert tape.measure() == 1024
    tape = Tape()
    first = tape.make(1000)
    tape.use(tape.change(1000, first), first)
    assert tape.measure() == 2048


def test_a_view_keeps_its_tensor_and_is_never_overwritten() -> None:
    tape = Tape()
    first = tape.make(1024)
    tape.use(tape.change(1024, tape.view(first)))
    assert tape.measure() == 2048


def test_pipelined_inputs_are_held_in_four_copies_to_the_end() -> None:
    tape = Tape(copies=4)
    tape.use(tape.copy_in(1024))
    tape.use(tape.make(1024))
    assert tape.measure() == 5 * 1024


def test_inputs_of_a_piece_come_before_what_it_makes() -> None:
    tape = Tape()
    tape.use(tape.make(1024))
    late = tape.copy_in(512)
    tape.cut()
    tape.use(late, tape.copy_in(512))
    assert tape.measure() == 512 + 1024
