"""Layers, KV and experts land on the devices that the settings name, with the bytes they should.

The devices are llama.cpp's RPC servers on loopback: as real to it as cards, and all on this CPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from rpc_servers import HOST, RpcProcess, find_free_port, start_rpc
from test_engine import GREEDY, assert_same, generate, run_solo

from localmistral.engine import Engine, EngineSettings, Request, TokenEvent
from localmistral.engine import rpc as rpc_module
from localmistral.engine.buffers import LoadReport
from localmistral.errors import BadRequestError, EngineError, OutOfMemoryError
from localmistral.fit.memory import kv_bytes_per_layer
from localmistral.fit.placement import CPU, Placement
from localmistral.fit.weights import weight_bytes_per_device
from localmistral.models.gguf import read_shape
from localmistral.models.shape import ModelShape, TensorRole

DEMO = Path(__file__).resolve().parent.parent / "localmistral" / "data" / "demo.gguf"
CONTEXT = 512
PROMPT = "The capital of France is"
ANSWER_TOKENS = 12
LOGGED_BYTES = 0.005 * 2**20 + 1
"""Half of the last digit of a size in llama.cpp's log."""
ALIGNMENT = 128
"""Of tensors in a buffer, at most (CUDA's; the CPU's is 64)."""


@pytest.fixture(scope="module")
def rpc() -> Iterator[RpcProcess]:
    with start_rpc(4) as process:
        yield process


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A placement over as many devices as `split` has entries, and how the context is made."""

    split: tuple[int, ...]
    experts: tuple[int, ...] = ()
    kv_type: str = "f16"
    mmap: bool = False
    repack: bool = True

    @property
    def placement(self) -> Placement:
        return Placement(
            gpu_layers=sum(self.split), tensor_split=self.split, cpu_expert_layers=self.experts
        )

    def settings(self, devices: tuple[str, ...]) -> EngineSettings:
        return EngineSettings(
            context=CONTEXT, threads=1, devices=devices[: len(self.split)],
            gpu_layers=sum(self.split), tensor_split=self.split, cpu_expert_layers=self.experts,
            kv_type=self.kv_type, mmap=self.mmap, repack=self.repack,
        )  # fmt: skip


SMOLLM2_CASES = (
    Case(split=(31,)),
    Case(split=(16, 15)),
    Case(split=(30, 1)),
    Case(split=(1, 30)),
    Case(split=(10, 0, 21)),
    Case(split=(8, 8, 8, 7)),
    Case(split=(1, 27, 1, 2), kv_type="q8_0"),
    Case(split=(5, 15)),
    Case(split=(1,)),
    Case(split=(0, 3, 0), kv_type="q4_0", repack=False),
)
DEMO_CASES = (
    Case(split=(5,)),
    Case(split=(3, 2), experts=(0, 2)),
    Case(split=(3, 2), experts=(0, 1, 2, 3), kv_type="q8_0"),
    Case(split=(1, 4), experts=(3,), repack=False),
    Case(split=(1, 1, 1, 2)),
    Case(split=(1, 0, 1, 1), experts=(2,)),
    Case(split=(2, 1), experts=(1,)),
)


def load_and_answer(
    path: Path, settings: EngineSettings
) -> tuple[LoadReport, list[int], list[TokenEvent]]:
    """In the process with the devices: the report, the answer there, and the CPU's with gaps."""
    with Engine.load([path], settings) as engine:
        report = engine.report
        prompt = tuple(engine.tokenize(PROMPT))
        request = Request(prompt=prompt, sampling=GREEDY, max_tokens=ANSWER_TOKENS)
        tokens = [event.token for event in engine.submit(request) if event.token is not None]
    alone = EngineSettings(
        context=CONTEXT, threads=1, devices=("CPU",), kv_type=settings.kv_type, repack=False
    )
    with Engine.load([path], alone) as engine:
        assert not engine.report.is_offloaded
        return report, tokens, run_solo(engine, prompt, ANSWER_TOKENS)


def expected_weights(shape: ModelShape, case: Case) -> dict[int, int]:
    """Bytes by device (index of the split; CPU is -1), tensor by tensor."""
    devices = case.placement.layer_devices(shape.layer_count)
    sums = dict.fromkeys((*range(len(case.split)), CPU), 0)
    for tensor in shape.tensors:
        in_ram = tensor.role is TensorRole.EXPERT and tensor.layer in case.experts
        if tensor.layer is not None:
            sums[CPU if in_ram else devices[tensor.layer]] += tensor.bytes
        elif tensor.role is TensorRole.EMBEDDING:
            sums[CPU] += tensor.bytes
        else:
            sums[devices[shape.layer_count]] += tensor.bytes
    if shape.has_tied_embeddings and devices[shape.layer_count] != CPU:
        sums[devices[shape.layer_count]] += shape.embedding_bytes
    return sums


def expected_kv(shape: ModelShape, case: Case) -> dict[int, int]:
    """Bytes by device, as the planner counts them."""
    sums = dict.fromkeys((*range(len(case.split)), CPU), 0)
    devices = case.placement.layer_devices(shape.layer_count)[:-1]
    sizes = kv_bytes_per_layer(shape, case.kv_type, CONTEXT)
    for device, size in zip(devices, sizes, strict=True):
        sums[device] += size
    return sums


def check(rpc: RpcProcess, path: Path, case: Case) -> None:
    shape = read_shape(path)
    report, tokens, solo = rpc.call(load_and_answer, path, case.settings(rpc.devices))
    names = {**dict(enumerate(rpc.devices[: len(case.split)])), CPU: "CPU"}

    layers = case.placement.layer_devices(shape.layer_count)
    assert report.layer_devices == tuple(names[device] for device in layers)
    assert [buffers.name for buffers in report.buffers] == list(names.values())
    slack = LOGGED_BYTES * 2 + ALIGNMENT * len(shape.tensors)
    weights = expected_weights(shape, case)
    assert {device: size for device, size in weights.items() if size} == {
        device: size
        for device, size in weight_bytes_per_device(shape, case.placement).items()
        if size
    }
    for device, wanted in weights.items():
        found = report.find(names[device]).weights_bytes
        assert -LOGGED_BYTES * 2 <= found - wanted <= slack, (names[device], wanted, found)
    for device, wanted in expected_kv(shape, case).items():
        found = report.find(names[device]).kv_bytes
        assert abs(found - wanted) <= LOGGED_BYTES, (names[device], wanted, found)
    for device, name in names.items():
        if device != CPU:
            assert (report.find(name).compute_bytes > 0) == (device in layers)
    assert_same(solo, tokens)


@pytest.mark.parametrize("case", SMOLLM2_CASES, ids=str)
def test_a_dense_model_lands_where_it_should_and_writes_the_same_text(
    rpc: RpcProcess, smollm2_path: Path, case: Case
) -> None:
    check(rpc, smollm2_path, case)


@pytest.mark.parametrize("case", DEMO_CASES, ids=str)
def test_a_mixture_of_experts_lands_where_it_should_and_writes_the_same_text(
    rpc: RpcProcess, case: Case
) -> None:
    check(rpc, DEMO, case)


def test_devices_are_used_in_the_order_they_are_named(rpc: RpcProcess, smollm2_path: Path) -> None:
    settings = EngineSettings(
        context=CONTEXT, threads=1, devices=("RPC3", "RPC1"), tensor_split=(21, 10)
    )
    report, tokens, solo = rpc.call(load_and_answer, smollm2_path, settings)
    assert report.layer_devices == ("RPC3",) * 21 + ("RPC1",) * 10
    assert [buffers.name for buffers in report.buffers] == ["RPC3", "RPC1", "CPU"]
    assert_same(solo, tokens)


def test_mapped_weights_are_told_from_exact_ones(rpc: RpcProcess) -> None:
    settings = EngineSettings(
        context=CONTEXT, threads=1, devices=rpc.devices[:2], cpu_expert_layers=(0, 3), repack=False
    )
    exact, _, _ = rpc.call(load_and_answer, DEMO, dataclasses.replace(settings, mmap=False))
    mapped, _, _ = rpc.call(load_and_answer, DEMO, settings)
    assert mapped.is_mapped
    assert not exact.is_mapped
    # the stretch of the file from layer 0's experts to layer 3's
    assert mapped.find("CPU").weights_bytes > 1.5 * exact.find("CPU").weights_bytes
    for device in settings.devices:
        assert mapped.find(device) == exact.find(device)


def test_split_mode_none_uses_the_first_device_alone(rpc: RpcProcess, smollm2_path: Path) -> None:
    settings = EngineSettings(
        context=CONTEXT, threads=1, devices=rpc.devices[:2], split_mode="none"
    )
    report, tokens, solo = rpc.call(load_and_answer, smollm2_path, settings)
    assert set(report.layer_devices) == {"RPC0"}
    assert report.find("RPC1").weights_bytes == report.find("RPC1").compute_bytes == 0
    assert_same(solo, tokens)


@pytest.mark.slow
def test_split_mode_tensor_spreads_every_layer_and_writes_the_same_text(
    rpc: RpcProcess, smollm2_path: Path
) -> None:
    settings = EngineSettings(
        context=CONTEXT, threads=1, devices=rpc.devices[:2], split_mode="tensor", mmap=False
    )
    report, tokens, solo = rpc.call(load_and_answer, smollm2_path, settings)
    shape = read_shape(smollm2_path)
    on_devices = sum(shape.dense_bytes) + shape.embedding_bytes + shape.output_bytes
    half = report.find("RPC0").weights_bytes
    assert report.find("RPC1").weights_bytes == half
    assert on_devices / 2 <= half < on_devices  # 3 KV heads don't halve
    assert report.is_offloaded
    assert_same(solo, tokens)


NAMES = ("river", "stone", "lamp", "cloud")


def answer_in_turns(
    path: Path, settings: EngineSettings
) -> tuple[list[list[TokenEvent]], list[list[int]], list[int]]:
    """Four conversations that share two streams: alone and cold, then in turns, twice; the second
    time with how many tokens of the prompts were computed."""
    with Engine.load([path], settings) as engine:
        prompts = [
            tuple(engine.tokenize(f"{name} {name} is a word that is said several times over" * 4))
            for name in NAMES
        ]
        solos = [run_solo(engine, prompt, ANSWER_TOKENS) for prompt in prompts]
        for _ in range(2):
            streams = [
                engine.submit(Request(prompt=prompt, sampling=GREEDY, max_tokens=ANSWER_TOKENS))
                for prompt in prompts
            ]
            answers = [[e.token for e in stream if e.token is not None] for stream in streams]
        results = [stream.result for stream in streams]
    return solos, answers, [r.prompt_tokens - r.cached_tokens for r in results if r]


@pytest.mark.parametrize("mode", ["layer", "tensor"])
@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
def test_what_makes_room_comes_back_from_ram_whatever_devices_held_it(
    rpc: RpcProcess, smollm2_path: Path, mode: str, kv_type: str
) -> None:
    settings = EngineSettings(
        context=CONTEXT, parallel=2, threads=1, devices=rpc.devices[:2], split_mode=mode,
        kv_type=kv_type, tensor_split=(1.0, 1.0),
    )  # fmt: skip
    solos, answers, computed = rpc.call(answer_in_turns, smollm2_path, settings)
    assert computed == [1] * len(NAMES)
    for solo, answer in zip(solos, answers, strict=True):
        assert_same(solo, answer)


def test_a_mixture_of_experts_is_refused_in_split_mode_tensor_before_it_loads() -> None:
    with pytest.raises(EngineError, match=r"dense models.*8 experts.*mistral4") as refused:
        Engine.load([DEMO], EngineSettings(context=CONTEXT, split_mode="tensor"))
    assert "layer" in refused.value.hint


def test_experts_are_refused_where_there_are_none(smollm2_path: Path) -> None:
    with pytest.raises(BadRequestError, match="no experts"):
        Engine.load([smollm2_path], EngineSettings(context=CONTEXT, cpu_expert_layers=(0,)))
    with pytest.raises(BadRequestError, match=r"Layer 4 .* layers 0 to 3"):
        Engine.load([DEMO], EngineSettings(context=CONTEXT, cpu_expert_layers=(1, 4)))


def test_an_unknown_device_is_refused_with_those_there_are(smollm2_path: Path) -> None:
    with pytest.raises(EngineError, match=r"'CUDA7'.*CPU"):
        Engine.load([smollm2_path], EngineSettings(context=CONTEXT, devices=("CUDA7",)))


@pytest.mark.parametrize(
    "settings",
    [
        {"devices": ("RPC0", "RPC0")},
        {"devices": ("CPU", "RPC0")},
        {"devices": ("RPC0",), "tensor_split": (1, 1)},
        {"tensor_split": (0, 0)},
        {"tensor_split": (1, -1)},
        {"tensor_split": (1, float("nan"))},
        {"split_mode": "row"},
        {"split_mode": "tensor", "devices": ("RPC0",)},
        {"split_mode": "tensor", "flash_attention": False},
        {"cpu_expert_layers": (-1,)},
    ],
    ids=str,
)
def test_settings_that_contradict_themselves_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(BadRequestError):
        EngineSettings(**settings)  # type: ignore[arg-type]


def test_the_cpu_alone_can_be_named(smollm2_path: Path) -> None:
    settings = EngineSettings(context=CONTEXT, devices=("CPU",), mmap=False)
    with Engine.load([smollm2_path], settings) as engine:
        shape = read_shape(smollm2_path)
        (cpu,) = engine.report.buffers
        assert set(engine.report.layer_devices) == {"CPU"}
        slack = LOGGED_BYTES * 2 + ALIGNMENT * len(shape.tensors)
        assert 0 <= cpu.weights_bytes - shape.weight_bytes + LOGGED_BYTES * 2 <= slack * 2
        assert cpu.kv_bytes > 0 < cpu.output_bytes
        assert generate(engine, engine.tokenize(PROMPT), max_tokens=3)


# Memory that isn't there.


def load_fails(path: Path, settings: EngineSettings) -> EngineError | None:
    try:
        Engine.load([path], settings).close()
    except EngineError as error:
        return error
    return None


needs_limits = pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux says and limits what a process may map"
)


@needs_limits
@pytest.mark.parametrize(
    ("context", "room", "wanted", "what"),
    [
        (CONTEXT, 16, 58, "could not be loaded"),
        (8192, 115, 89, "A context of 8192 tokens"),
        (CONTEXT, 110, 90, f"A context of {CONTEXT} tokens"),
    ],
)
def test_a_device_without_room_is_named_and_told_from_other_failures(
    smollm2_path: Path, context: int, room: int, wanted: int, what: str
) -> None:
    """The second server has `room` MiB: too little for the weights, the KV, or the graph's."""
    with start_rpc(2, (None, room * 2**20)) as small:
        settings = EngineSettings(
            context=context, threads=1, devices=small.devices, tensor_split=(15, 16), mmap=False
        )
        error = small.call(load_fails, smollm2_path, settings)
        fewer = dataclasses.replace(settings, context=CONTEXT, gpu_layers=0)
        assert small.call(load_fails, smollm2_path, fewer) is None
    assert isinstance(error, OutOfMemoryError)
    assert error.device == "RPC1"
    assert error.wanted_bytes > wanted * 2**20
    assert what in error.message
    assert "RPC1 has no room" in error.message
    assert error.hint


@pytest.mark.skipif(
    psutil.virtual_memory().total + psutil.swap_memory().total > 80 * 2**30
    or sys.platform != "linux",
    reason="90 GiB may be had, or promised, here",
)
def test_a_context_beyond_all_ram_is_out_of_memory(smollm2_path: Path) -> None:
    settings = EngineSettings(context=8192, parallel=256, kv_type="f32", threads=1)
    with pytest.raises(OutOfMemoryError, match=r"RAM has no room for .* GiB") as refused:
        Engine.load([smollm2_path], settings)
    assert refused.value.device == "CPU"


def test_a_file_that_is_no_model_is_not_out_of_memory(tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(DEMO.read_bytes()[:50_000])
    with pytest.raises(Exception) as refused:
        Engine.load([path], EngineSettings(context=CONTEXT))
    assert not isinstance(refused.value, OutOfMemoryError)


# Servers.


def test_a_server_is_registered_once_and_keeps_its_names(rpc: RpcProcess) -> None:
    assert rpc.devices == ("RPC0", "RPC1", "RPC2", "RPC3")
    assert rpc.call(rpc_module.add_servers, rpc.endpoints[1:3]) == ("RPC1", "RPC2")


def register_listed(listed: str) -> tuple[str, ...]:
    os.environ[rpc_module.VARIABLE] = listed
    return rpc_module.register_from_environment()


def test_the_environment_lists_servers(rpc: RpcProcess) -> None:
    assert rpc.call(register_listed, f" {rpc.endpoints[2]},{rpc.endpoints[0]} ,") == (
        "RPC2",
        "RPC0",
    )
    assert rpc.call(register_listed, "") == ()


@pytest.mark.parametrize("address", ["", "nowhere", ":1", "host:", "host:x", "host:99999", "::1:5"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(EngineError, match="HOST:PORT"):
        rpc_module.add_servers([address])


def test_an_unreachable_server_is_refused_in_one_sentence() -> None:
    with pytest.raises(EngineError, match=rf"No RPC server answers at {HOST}:\d+"):
        rpc_module.add_servers([f"{HOST}:{find_free_port()}"])


@contextmanager
def listen(answer: bytes | None) -> Iterator[str]:
    """A server that is none: it answers everybody once and hangs up, or (None) says nothing."""

    def serve() -> None:
        with contextlib.suppress(OSError):  # closed at the end
            while True:
                client, _ = listener.accept()
                clients.append(client)
                if answer is not None:
                    client.sendall(answer)
                    client.close()

    clients: list[socket.socket] = []
    listener = socket.create_server((HOST, 0))
    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"{HOST}:{listener.getsockname()[1]}"
    finally:
        with contextlib.suppress(OSError):  # only Linux shuts down what listens
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(10)
        for client in clients:
            client.close()


def test_what_is_no_rpc_server_is_refused_and_ends_nothing() -> None:
    with (
        listen(b"SSH-2.0-OpenSSH_9.9\r\n") as endpoint,
        pytest.raises(EngineError, match="is no RPC server of this"),
    ):
        rpc_module.add_servers([endpoint])


def test_a_server_that_says_nothing_is_not_waited_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc_module, "_ANSWER_S", 0.5)
    with (
        listen(None) as endpoint,
        pytest.raises(EngineError, match=r"gave no answer in 0\.5 s"),
    ):
        rpc_module.add_servers([endpoint])


def test_a_busy_server_is_refused(rpc: RpcProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other process holds the connection while it has an engine on the device."""
    monkeypatch.setattr(rpc_module, "_ANSWER_S", 0.5)
    rpc.call(hold_engine, EngineSettings(context=256, devices=rpc.devices[:1], threads=1))
    try:
        with pytest.raises(EngineError, match="gave no answer"):
            rpc_module.add_servers(rpc.endpoints[:1])
    finally:
        rpc.call(release_engine)


_held: list[Engine] = []


def hold_engine(settings: EngineSettings) -> None:
    _held.append(Engine.load([DEMO], settings))


def release_engine() -> None:
    _held.pop().close()
