"""A dry load says what a real one takes, without taking it; and how llama.cpp's log is read."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest
from make_header_gguf import build_files, write_files
from rpc_servers import RpcProcess, start_rpc
from test_engine import generate

from localmistral.engine import Engine, EngineSettings
from localmistral.engine.buffers import DeviceBuffers, LoadReport, read_report
from localmistral.engine.dry_load import dry_load
from localmistral.engine.library import capture_log, llama
from localmistral.errors import BadRequestError, EngineError, ModelFileError
from localmistral.models.gguf import read_shape

DEMO = Path(__file__).resolve().parent.parent / "localmistral" / "data" / "demo.gguf"
MIB = 2**20
RECEIVED_COPIES = 4
"""Of the hidden state of a ubatch: what a dry load counts too much on devices after the first."""


@pytest.fixture(scope="module")
def rpc() -> Iterator[RpcProcess]:
    with start_rpc(3) as process:
        yield process


@pytest.fixture(scope="module")
def small_4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small 4 in q4_K, 67 GB of it a hole."""
    path = tmp_path_factory.mktemp("small-4") / "small-4.gguf"
    return write_files(path, build_files("small-4", "q4_K"))[0]


def load_both(path: Path, settings: EngineSettings) -> tuple[LoadReport, LoadReport]:
    with Engine.load([path], settings) as engine:
        return dry_load([path], settings), engine.report


CASES = (
    {"context": 512},
    {"context": 4096, "ubatch": 128, "tensor_split": (20, 11)},
    {"context": 2048, "kv_type": "q8_0", "parallel": 3, "tensor_split": (1, 20, 10)},
    {"context": 2048, "gpu_layers": 12, "tensor_split": (6, 6)},
    {"context": 1024, "gpu_layers": 0},
    {"context": 1024, "devices": ("CPU",), "flash_attention": False},
    {"context": 1024, "split_mode": "none", "repack": False},
)
DEMO_CASES = (
    {"context": 512, "cpu_expert_layers": (0, 1, 2, 3), "tensor_split": (3, 2)},
    {"context": 1024, "cpu_expert_layers": (2,), "kv_type": "q8_0"},
)


@pytest.mark.parametrize("case", [*CASES, *DEMO_CASES], ids=str)
def test_it_says_what_a_real_load_takes(
    rpc: RpcProcess, smollm2_path: Path, case: dict[str, object]
) -> None:
    count = len(case.get("tensor_split", (1, 1)))  # type: ignore[arg-type]
    fields = {"threads": 1, "devices": rpc.devices[:count], **case}
    path = DEMO if case in DEMO_CASES else smollm2_path
    dry, real = rpc.call(load_both, path, EngineSettings(**fields))  # type: ignore[arg-type]
    assert dry.layer_devices == real.layer_devices
    assert dry.graph_copies == real.graph_copies
    hidden_bytes = 4 * read_shape(path).embedding_length * int(str(case.get("ubatch", 512)))
    for number, (found, expected) in enumerate(zip(dry.buffers, real.buffers, strict=True)):
        assert (found.name, found.output_bytes) == (expected.name, expected.output_bytes)
        assert found.weights_bytes == found.kv_bytes == 0
        spare = found.compute_bytes - expected.compute_bytes
        receives = 0 < number < len(dry.buffers) - 1 and found.compute_bytes > 0
        assert 0 <= spare <= (RECEIVED_COPIES * hidden_bytes + 2**16 if receives else 0)
    assert sum(buffers.weights_bytes for buffers in real.buffers) > 0
    assert real.find("CPU").output_bytes > 0


def dry_mib(path: Path, settings: EngineSettings) -> tuple[list[float], int, int]:
    """Compute buffers in MiB, copies of the graph, and how far the process grew, in bytes."""
    dry_load([path], settings)  # the first one loads libraries and connects
    before = psutil.Process().memory_info().rss
    report = dry_load([path], settings)
    grown = psutil.Process().memory_info().rss - before
    assert not any(buffers.weights_bytes or buffers.kv_bytes for buffers in report.buffers)
    return [buffers.compute_bytes / MIB for buffers in report.buffers], report.graph_copies, grown


@pytest.mark.parametrize(
    ("experts", "copies", "wanted"),
    [((), 4, [364, 632, 296]), ((0, 1, 2, 3), 1, [136, 304, 128])],
    ids=["pipelined", "experts in RAM"],
)
def test_a_model_far_beyond_this_machine_is_measured_without_its_memory(
    rpc: RpcProcess, small_4: Path, experts: tuple[int, ...], copies: int, wanted: list[float]
) -> None:
    """MiB at 64k tokens on two devices, as published for this architecture's graph."""
    settings = EngineSettings(
        context=65536, threads=1, devices=rpc.devices[:2], cpu_expert_layers=experts
    )
    found, found_copies, grown = rpc.call(dry_mib, small_4, settings)
    assert found_copies == copies
    assert found == pytest.approx(wanted, abs=1)
    assert grown < 256 * MIB  # the weights are 67 GB, the KV 1.4 GiB


def test_it_needs_no_device_but_the_cpu(small_4: Path) -> None:
    report = dry_load([small_4], EngineSettings(context=8192, threads=1))
    assert report.layer_devices == ("CPU",) * 37
    assert report.buffers == (report.find("CPU"),)
    assert report.find("CPU").compute_bytes > 256 * MIB  # logits of a ubatch alone


def test_shards_are_taken_together(tmp_path: Path) -> None:
    paths = write_files(tmp_path / "small-4.gguf", build_files("small-4", "q4_K", 3))
    report = dry_load(paths, EngineSettings(context=8192, threads=1))
    assert len(report.layer_devices) == 37


def test_it_refuses_what_a_load_refuses(smollm2_path: Path, tmp_path: Path) -> None:
    with pytest.raises(BadRequestError, match="the model's limit is 8192"):
        dry_load([smollm2_path], EngineSettings(context=8448))
    with pytest.raises(EngineError, match="CUDA3"):
        dry_load([smollm2_path], EngineSettings(devices=("CUDA3",)))
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(smollm2_path.read_bytes()[:100_000])
    with pytest.raises(ModelFileError):
        dry_load([broken], EngineSettings(context=512))


# Beside an engine.


def test_it_disturbs_no_engine_that_runs(smollm2_path: Path) -> None:
    """Dry loads one after the other while an engine writes: texts and reports are those alone."""
    settings = EngineSettings(context=1024, threads=1)
    alone = dry_load([smollm2_path], settings)
    with Engine.load([smollm2_path], settings) as engine:
        prompt = engine.tokenize("Once upon a time")
        fields = {"max_tokens": 60, "ignore_eos": True, "cache_prompt": False}
        text = generate(engine, prompt, **fields)
        again: list[str] = []
        writer = threading.Thread(target=lambda: again.append(generate(engine, prompt, **fields)))
        writer.start()
        reports = {dry_load([smollm2_path], settings)}
        while writer.is_alive():
            reports.add(dry_load([smollm2_path], settings))
        writer.join()
    assert again == [text]
    assert reports == {alone}


def test_loads_at_the_same_time_keep_their_logs_apart(smollm2_path: Path) -> None:
    settings = (EngineSettings(ubatch=512, threads=1), EngineSettings(ubatch=128, threads=1))
    alone = [dry_load([smollm2_path], each) for each in settings]
    assert alone[0] != alone[1]
    found: list[list[LoadReport]] = [[], []]

    def load(number: int) -> None:
        for _ in range(5):
            found[number].append(dry_load([smollm2_path], settings[number]))

    threads = [threading.Thread(target=load, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[alone[0]] * 5, [alone[1]] * 5]


def test_a_load_is_measured_though_others_have_taken_the_log_since() -> None:
    quiet = llama.llama_log_callback(lambda *_: None)
    llama.llama_log_set(quiet, None)
    report = dry_load([DEMO], EngineSettings(context=512, threads=1, devices=("CPU",)))
    assert report.find("CPU").compute_bytes > 0


def test_a_capture_holds_the_lines_of_its_own_thread() -> None:
    def complain() -> None:
        llama.llama_model_load_from_file(b"/nowhere.gguf", llama.llama_model_default_params())

    with capture_log() as outer:
        other = threading.Thread(target=complain)
        other.start()
        other.join()
        assert outer == []
        with capture_log() as inner:
            complain()
    complain()
    assert outer == inner
    assert any("nowhere.gguf" in text and level == logging.ERROR for level, text in inner)


# Reading the log.

GPU = {"CUDA0": "CUDA0", "CUDA1": "CUDA1"}


def read(lines: Sequence[str], devices: dict[str, str] = GPU) -> LoadReport:
    return read_report([(logging.INFO, line) for line in lines], devices)


def test_every_part_is_found_and_host_buffers_are_the_cpus() -> None:
    report = read(
        [
            "load_tensors: layer   0 assigned to device CUDA0, is_swa = 0",
            "load_tensors: layer   1 assigned to device CUDA1, is_swa = 0",
            "load_tensors: layer   2 assigned to device CPU, is_swa = 0",
            "load_tensors:   CPU_Mapped model buffer size =     1.00 MiB",
            "load_tensors:   CPU_REPACK model buffer size =     2.00 MiB",
            "load_tensors:    CUDA_Host model buffer size =     4.00 MiB",
            "load_tensors:        CUDA0 model buffer size =    10.50 MiB",
            "load_tensors:        CUDA0 model buffer size =     0.50 MiB",
            "load_tensors:        CUDA1 model buffer size = 12345.25 MiB",
            "llama_context:  CUDA_Host  output buffer size =     0.50 MiB",
            "llama_kv_cache:      CUDA0 KV buffer size =    64.00 MiB",
            "llama_kv_cache:      CUDA0 KV buffer size =    16.00 MiB",
            "llama_memory_recurrent:      CUDA1 RS buffer size =     3.00 MiB",
            "sched_reserve:      CUDA0 compute buffer size =   300.00 MiB",
            "sched_reserve:  CUDA_Host compute buffer size =    28.00 MiB",
            "sched_reserve:        CPU compute buffer size =     2.00 MiB",
            "sched_reserve: graph: nodes = 936, splits = 1, input objects = 4",
            "sched_reserve: reserve took 12.16 ms, sched copies = 4",
        ]
    )
    assert report.layer_devices == ("CUDA0", "CUDA1", "CPU")
    assert report.graph_copies == 4
    assert report.is_offloaded
    assert report.buffers == (
        DeviceBuffers(
            name="CUDA0", weights_bytes=11 * MIB, kv_bytes=80 * MIB, compute_bytes=300 * MIB
        ),
        DeviceBuffers(name="CUDA1", weights_bytes=int(12345.25 * MIB), kv_bytes=3 * MIB),
        DeviceBuffers(
            name="CPU", weights_bytes=7 * MIB, compute_bytes=30 * MIB, output_bytes=MIB // 2
        ),
    )


def test_a_buffer_that_is_made_anew_counts_once() -> None:
    report = read(
        [
            "sched_reserve:      CUDA0 compute buffer size =   900.00 MiB",
            "sched_reserve: compute buffer allocation failed, retrying without pipeline",
            "sched_reserve:      CUDA0 compute buffer size =   250.00 MiB",
            "~llama_context:      CUDA0 compute buffer size is 250.0000 MiB, matches expectation",
            "sched_reserve: reserve took 12.16 ms, sched copies = 1",
        ]
    )
    assert report.find("CUDA0").compute_bytes == 250 * MIB
    assert report.graph_copies == 1


@pytest.mark.parametrize(
    ("devices", "buffer", "owner"),
    [
        ({"MTL0": "MTL0"}, "MTL0_Mapped", "MTL0"),
        ({"Vulkan1": "Vulkan1", "Vulkan10": "Vulkan10"}, "Vulkan10", "Vulkan10"),
        ({"Vulkan1": "Vulkan1"}, "Vulkan_Host", "CPU"),
        ({"RPC1": "RPC0[10.0.0.2:50052]", "RPC0": "RPC0[10.0.0.1:50052]"},
         "RPC0[10.0.0.2:50052]", "RPC1"),
        ({}, "CPU_AMX", "CPU"),
        ({}, "ROCm_Host", "CPU"),
        ({}, "CUDA2", "CUDA2"),
    ],
)  # fmt: skip
def test_a_buffer_belongs_to_its_device(devices: dict[str, str], buffer: str, owner: str) -> None:
    report = read([f"load_tensors: {buffer} model buffer size =     8.00 MiB"], devices)
    assert report.find(owner).weights_bytes == 8 * MIB
    assert sum(each.weights_bytes for each in report.buffers) == 8 * MIB
    assert report.buffers[-1].name == "CPU"


def test_devices_that_split_every_tensor_each_have_the_largest_share() -> None:
    report = read(["load_tensors:     Meta() model buffer size =    60.00 MiB"])
    assert [each.weights_bytes for each in report.buffers] == [60 * MIB, 60 * MIB, 0]
