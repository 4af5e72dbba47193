"""A plan is run exactly as it is, over devices and on the CPU; what happens when memory is short.

The devices are llama.cpp's RPC servers on loopback; what they have free is made small where the
planner looks, so that models of a few megabytes have to be divided.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest
from rpc_servers import RpcProcess, start_rpc
from test_engine import GREEDY, assert_same, run_solo

from localmistral import loading
from localmistral.cli.loading import LoadOptions, plan_for
from localmistral.engine import Engine, EngineSettings, Request, TokenEvent
from localmistral.engine.buffers import DeviceBuffers, LoadReport
from localmistral.errors import LocalMistralError, ModelFileError, OutOfMemoryError
from localmistral.fit.calibration import Calibration, write_calibration
from localmistral.fit.choosing.changes import describe_changes
from localmistral.fit.last_load import Difference, read_differences
from localmistral.fit.machine import GIB, GPU_MARGIN_BYTES, MIB, Machine
from localmistral.fit.placement import CPU, Placement
from localmistral.fit.plan import Plan, PlanRequest
from localmistral.fit.plan_json import plan_to_json
from localmistral.loading import (
    PlannedLoad,
    check_dry,
    compare,
    find_excess,
    load_engine,
    make_settings,
    plan_load,
    replay_plan,
)
from localmistral.models.gguf import read_shape
from localmistral.planning import current_machine

DEMO = Path(__file__).resolve().parent.parent / "localmistral" / "data" / "demo.gguf"
PROMPT = "The capital of France is"
ANSWER_TOKENS = 12
LOGGED_BYTES = 0.005 * 2**20 + 1
"""Half of the last digit of a size in llama.cpp's log."""
ALIGNMENT = 128
"""Of tensors in a buffer, at most."""


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this process keeps what a load found."""
    path = tmp_path / "last_load.json"
    monkeypatch.setattr("localmistral.fit.last_load.last_load_file", lambda: path)
    return path


@pytest.fixture(scope="module")
def rpc() -> Iterator[RpcProcess]:
    with start_rpc(4) as process:
        yield process


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a load: the plan that was made and the one that was run, what was taken and
    said, the greedy answer, and the CPU's with its gaps."""

    made: Plan
    run: Plan
    settings: EngineSettings
    report: LoadReport
    names: tuple[str, ...]
    notes: tuple[str, ...]
    tokens: list[int]
    solo: list[TokenEvent]


def see_machine(room_mib: tuple[float, ...]) -> Machine:
    """This machine, its devices with so much room for a plan, and fast enough to be worth it."""
    machine = current_machine()
    gpus = tuple(
        replace(gpu, free_bytes=int(room * MIB) + GPU_MARGIN_BYTES, bandwidth=936e9, flops=70e12)
        for gpu, room in zip(machine.gpus, room_mib, strict=False)
    )
    return replace(machine, gpus=gpus)


def run_planned(path: Path, room_mib: tuple[float, ...], request: PlanRequest) -> Outcome:
    """In the process with the devices."""
    machine = see_machine(room_mib)
    planned = plan_load(str(path), request, machine)
    notes: list[str] = []
    engine, done = load_engine(planned, on_note=notes.append)
    with engine:
        report = engine.report
        settings = engine.settings
        prompt = tuple(engine.tokenize(PROMPT))
        ask = Request(prompt=prompt, sampling=GREEDY, max_tokens=ANSWER_TOKENS)
        tokens = [event.token for event in engine.submit(ask) if event.token is not None]
    alone = EngineSettings(
        context=done.plan.context, threads=1, devices=("CPU",), kv_type=done.plan.kv_type
    )
    with Engine.load([path], alone) as engine:
        solo = run_solo(engine, prompt, ANSWER_TOKENS)
    return Outcome(
        made=planned.plan,
        run=done.plan,
        settings=settings,
        report=report,
        names=tuple(gpu.device or "" for gpu in machine.gpus),
        notes=tuple(notes),
        tokens=tokens,
        solo=solo,
    )


def check_exact(path: Path, found: Outcome) -> None:
    """llama.cpp put every layer and byte where the plan that was run says."""
    shape, plan = read_shape(path), found.run
    names = {**dict(enumerate(found.names)), CPU: "CPU"}
    devices = plan.placement.layer_devices(shape.layer_count)
    assert found.report.layer_devices == tuple(names[device] for device in devices)
    for name, row in zip((*found.names, "CPU"), plan.devices, strict=True):
        actual = found.report.find(name)
        slack = LOGGED_BYTES * 2 + ALIGNMENT * len(shape.tensors)
        if name != "CPU" or not found.report.is_mapped:
            assert -LOGGED_BYTES * 2 <= actual.weights_bytes - row.weights_bytes <= slack, name
        assert abs(actual.kv_bytes - row.kv_bytes) <= LOGGED_BYTES, name
        compute = actual.compute_bytes + actual.output_bytes
        assert compute <= row.compute_bytes + MIB, name
        if name != "CPU":
            # a dry load, which the figures were fitted to, has so much more on later devices
            spare = max(MIB, 16 * shape.embedding_length * plan.ubatch)
            assert row.compute_bytes <= 1.1 * compute + spare, name
        assert row.used_bytes <= row.budget_bytes
    assert_same(found.solo, found.tokens)


# A plan is run exactly.


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Room per device in MiB, what is asked, and what must be seen of the plan."""

    room_mib: tuple[float, ...]
    cards: tuple[int, ...]
    context: int = 2048
    ubatch: int | None = None
    kv_type: str = "f16"
    gpu_layers: int | None = None
    experts: int = 0

    @property
    def request(self) -> PlanRequest:
        return PlanRequest(
            context=self.context,
            ubatch=self.ubatch,
            kv_type=self.kv_type,
            gpu_layers=self.gpu_layers,
        )


SMOLLM2_CASES = (
    Case(room_mib=(400,), cards=(0,)),
    Case(room_mib=(90, 90), cards=(0, 1)),
    Case(room_mib=(60, 120), cards=(0, 1)),
    Case(room_mib=(30, 200), cards=(1,)),
    Case(room_mib=(60, 60, 60), cards=(0, 1, 2), kv_type="q8_0"),
    Case(room_mib=(50, 20, 30, 160), cards=(0, 3)),
    Case(room_mib=(120, 120), cards=(0,), gpu_layers=12),
    Case(room_mib=(50, 50, 50, 100), cards=(0, 1, 2, 3)),
    Case(room_mib=(20, 20, 20, 20), cards=()),
)
DEMO_CASES = (
    Case(room_mib=(90, 90, 90), cards=(0,)),
    Case(room_mib=(4,), cards=(0,), context=1024, ubatch=64, experts=3),
    Case(room_mib=(3, 3), cards=(0, 1), context=1024, ubatch=64, experts=1),
    Case(room_mib=(1.5, 3), cards=(0, 1), context=1024, ubatch=64, experts=4),
    Case(room_mib=(2, 2, 2), cards=(0, 1), context=1024, ubatch=64, experts=4, kv_type="q8_0"),
)


@pytest.mark.parametrize("case", SMOLLM2_CASES, ids=str)
def test_a_dense_models_plan_is_run_exactly(
    rpc: RpcProcess, smollm2_path: Path, case: Case
) -> None:
    check_case(rpc, smollm2_path, case)


@pytest.mark.parametrize("case", DEMO_CASES, ids=str)
def test_a_mixture_of_experts_plan_is_run_exactly(rpc: RpcProcess, case: Case) -> None:
    check_case(rpc, DEMO, case)


def check_case(rpc: RpcProcess, path: Path, case: Case) -> None:
    found = rpc.call(run_planned, path, case.room_mib, case.request)
    assert found.notes == ()
    assert found.run == found.made
    placement = found.run.placement
    assert placement.used_cards == case.cards
    assert len(placement.cpu_expert_layers) == case.experts
    assert found.run.kv_type == case.kv_type
    assert case.gpu_layers in (None, placement.gpu_layers)
    check_exact(path, found)


def test_on_the_cpu_a_plan_is_run_exactly(smollm2_path: Path, kept: Path) -> None:
    machine = replace(current_machine(), gpus=())
    planned = plan_load(str(smollm2_path), PlanRequest(context=2048), machine)
    notes: list[str] = []
    engine, done = load_engine(planned, on_note=notes.append)
    with engine:
        report, settings = engine.report, engine.settings
    assert (done, notes) == (planned, [])
    assert set(report.layer_devices) == {"CPU"}
    (row,) = planned.plan.devices
    assert abs(report.find("CPU").kv_bytes - row.kv_bytes) <= LOGGED_BYTES
    assert settings.context == planned.plan.context == 2048
    assert read_differences(kept) == ()


# Settings


def test_a_plans_settings_are_its_own(smollm2_path: Path) -> None:
    machine = current_machine(["2x3090"], "64GiB")
    machine = replace(
        machine,
        gpus=tuple(replace(gpu, device=f"CUDA{n}") for n, gpu in enumerate(machine.gpus)),
    )
    planned = plan_load(str(smollm2_path), PlanRequest(tensor_split=(0, 1), threads=3), machine)
    settings = make_settings(planned.plan, machine)
    plan = planned.plan
    assert settings.devices == ("CUDA1",)  # a card without a layer isn't even opened
    assert settings.tensor_split == (31.0,)
    assert (settings.threads, settings.gpu_layers) == (3, 31)
    for name in ("context", "parallel", "batch", "ubatch", "kv_type", "mmap", "repack"):
        assert getattr(settings, name) == getattr(plan, name)


# Replaying


def replay_over(path: Path, plan_file: Path, room_mib: tuple[float, ...]) -> list[object]:
    """In the process with the devices: settings of the plan made, saved and replayed, and what
    their loads took."""
    machine = see_machine(room_mib)
    planned = plan_load(str(path), PlanRequest(context=1024, ubatch=64), machine)
    plan_file.write_text(json.dumps(plan_to_json(planned.plan)), encoding="utf-8")
    # as much memory as there is, now: the planner would choose otherwise
    again = replay_plan(plan_file, current_machine())
    seen: list[object] = []
    for load in (planned, again):
        engine, done = load_engine(load)
        with engine:
            seen += [make_settings(done.plan, done.machine), engine.report]
    return seen


def test_a_saved_plan_is_replayed_exactly(rpc: RpcProcess, tmp_path: Path) -> None:
    settings, report, *again = rpc.call(replay_over, DEMO, tmp_path / "plan.json", (1.5, 3))
    assert isinstance(settings, EngineSettings)
    assert settings.cpu_expert_layers and len(settings.devices) == 2
    assert again == [settings, report]


def test_a_plan_for_more_cards_than_there_are_is_refused(
    rpc: RpcProcess, tmp_path: Path, smollm2_path: Path
) -> None:
    path = tmp_path / "plan.json"
    machine = current_machine(["5x3090"], "64GiB")
    request = PlanRequest(tensor_split=(1, 1, 1, 1, 1))
    plan = plan_load(str(smollm2_path), request, machine).plan
    path.write_text(json.dumps(plan_to_json(plan)), encoding="utf-8")
    with pytest.raises(LocalMistralError, match="5 cards") as refused:
        rpc.call(replay_plan, path, replace(machine, gpus=machine.gpus[:4]))
    assert "localmistral plan" in refused.value.hint


def test_a_saved_plan_whose_file_became_another_is_refused(tmp_path: Path) -> None:
    model, path = tmp_path / "demo.gguf", tmp_path / "plan.json"
    model.write_bytes(DEMO.read_bytes())
    machine = replace(current_machine(), gpus=())
    plan = plan_load(str(model), PlanRequest(), machine).plan
    path.write_text(json.dumps(plan_to_json(plan)), encoding="utf-8")
    assert replay_plan(path, machine).plan.context == plan.context
    model.write_bytes(b"x" * model.stat().st_size)
    with pytest.raises(ModelFileError, match=r"demo\.gguf"):
        replay_plan(path, machine)


# Memory that isn't there.

needs_limits = pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux limits what a process may map"
)


def run_then_reload(
    path: Path, room_mib: tuple[float, ...], request: PlanRequest
) -> OutOfMemoryError | None:
    """In the process with the devices: the error of a load that had got its weights there, after
    which loads that need most of the same memory must succeed."""
    try:
        run_planned(path, room_mib, request)
    except OutOfMemoryError as error:
        devices = tuple(gpu.device or "" for gpu in current_machine().gpus)
        modest = EngineSettings(
            context=512, threads=1, devices=devices, tensor_split=(15, 16), batch=64, ubatch=32
        )
        for _ in range(3):
            Engine.load([path], modest).close()
        return error
    return None


def check_note(note: str) -> None:
    """One sentence."""
    assert note.endswith(".")
    assert ". " not in note
    assert "\n" not in note


ROOM_MIB = (160, 220)
LONG = PlanRequest(context=8192, kv_type="f16", ubatch=128)
"""Over two devices with that room, SmolLM2 takes 134 and 185 MiB of them, 90 of each for KV."""


@pytest.mark.slow
@needs_limits
def test_what_was_planned_freely_is_reduced_once_and_said(smollm2_path: Path) -> None:
    """The second server has less than the plan puts there, but more than nine tenths of it."""
    with start_rpc(2, (None, 171 * MIB)) as small:
        found = small.call(run_planned, smollm2_path, ROOM_MIB, LONG)
    (note,) = found.notes
    check_note(note)
    assert "RPC1 has no room for" in note
    assert describe_changes(found.made, found.run) in note
    assert found.run.placement.used_cards == (0, 1)
    assert found.run.devices[1].used_bytes <= 0.9 * found.made.devices[1].used_bytes
    check_exact(smollm2_path, found)


@pytest.mark.slow
@needs_limits
def test_after_one_reduction_the_cpu_has_its_turn(smollm2_path: Path) -> None:
    with start_rpc(2, (None, 115 * MIB)) as small:
        found = small.call(run_planned, smollm2_path, ROOM_MIB, LONG)
    first, second = found.notes
    check_note(first)
    check_note(second)
    assert "tensor split" in first
    assert "every layer on the CPU" in second
    assert found.run.placement.gpu_layers == 0
    assert set(found.report.layer_devices) == {"CPU"}
    assert_same(found.solo, found.tokens)


@pytest.mark.slow
@needs_limits
@pytest.mark.parametrize(
    ("fixed", "words"),
    [
        ({"gpu_layers": 31}, "--gpu-layers 31"),
        ({"gpu_layers": 31, "tensor_split": (15, 16)}, "--tensor-split 15,16"),
    ],
    ids=str,
)
def test_what_was_fixed_is_kept_and_the_error_says_which(
    smollm2_path: Path, fixed: dict[str, object], words: str
) -> None:
    request = replace(LONG, **fixed)  # type: ignore[arg-type]
    with start_rpc(2, (None, 115 * MIB)) as small:
        error = small.call(run_then_reload, smollm2_path, ROOM_MIB, request)
    assert isinstance(error, OutOfMemoryError)
    assert error.device == "RPC1"
    assert "RPC1 has no room for" in error.message
    assert words in error.message
    check_note(error.message)
    assert error.hint


@pytest.mark.skipif(
    psutil.virtual_memory().total + psutil.swap_memory().total > 80 * GIB
    or sys.platform != "linux",
    reason="90 GiB may be had, or promised, here",
)
def test_a_context_that_was_asked_for_is_not_cut_when_ram_runs_out(smollm2_path: Path) -> None:
    machine = replace(current_machine(), gpus=())
    machine = replace(machine, ram=replace(machine.ram, available_bytes=200 * GIB))
    request = PlanRequest(context=8192, parallel=256, kv_type="f32")
    before = psutil.Process().memory_info().rss
    with pytest.raises(OutOfMemoryError, match=r"RAM has no room for .* GiB") as refused:
        load_engine(plan_load(str(smollm2_path), request, machine))
    assert "--context 8k" in refused.value.message
    assert psutil.Process().memory_info().rss - before < 300 * MIB


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[EngineSettings]:
    """The settings of every load, as they are tried."""
    tried: list[EngineSettings] = []
    load = Engine.load

    def count(files: object, settings: EngineSettings, **rest: object) -> Engine:
        tried.append(settings)
        return load(files, settings, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Engine, "load", count)
    return tried


def test_other_errors_are_not_tried_again(tmp_path: Path, loads: list[EngineSettings]) -> None:
    path = tmp_path / "odd.gguf"
    data = DEMO.read_bytes()
    assert data.count(b"blk.2.attn_norm.weight") == 1
    path.write_bytes(data.replace(b"blk.2.attn_norm.weight", b"blk.2.attn_nxrm.weight"))
    notes: list[str] = []
    with pytest.raises(ModelFileError, match=r"odd\.gguf"):
        load_engine(
            plan_load(str(path), PlanRequest(context=512), replace(current_machine(), gpus=())),
            on_note=notes.append,
        )
    assert len(loads) <= 1
    assert notes == []


class Loads:
    """Stands for `Engine.load` on devices that have no room: so many fail, the rest succeed."""

    def __init__(self, failures: int, device: str) -> None:
        self.failures, self.device = failures, device
        self.tried: list[EngineSettings] = []

    def __call__(self, _files: object, settings: EngineSettings, **_: object) -> object:
        self.tried.append(settings)
        if len(self.tried) <= self.failures:
            raise OutOfMemoryError("X could not be loaded: no room.", "hint", device=self.device)
        return type("Loaded", (), {"report": make_report({})})()


@pytest.fixture
def two_cards(smollm2_path: Path) -> PlannedLoad:
    """SmolLM2 on a machine that isn't here, over its two cards by need."""
    machine = current_machine(["2x24GiB"], "64GiB")
    gpus = tuple(
        replace(gpu, device=f"CUDA{n}", free_bytes=1100 * MIB) for n, gpu in enumerate(machine.gpus)
    )
    return plan_load(str(smollm2_path), PlanRequest(context=8192), replace(machine, gpus=gpus))


@pytest.mark.parametrize("device", ["CUDA0", "CUDA1", "", "somewhere else"])
def test_every_try_asks_for_less_than_the_one_before(
    two_cards: PlannedLoad, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    loads = Loads(2, device)
    monkeypatch.setattr(Engine, "load", loads)
    monkeypatch.setattr(loading, "check_dry", lambda planned, _: planned)
    notes: list[str] = []
    _, done = load_engine(two_cards, on_note=notes.append)
    assert len(loads.tried) == len(set(map(str, loads.tried))) == 3
    assert loads.tried[2].devices == ("CPU",)
    assert done.plan.placement.gpu_layers == 0
    assert len(notes) == 2
    for note in notes:
        check_note(note)


def test_without_cards_ram_is_reduced_once(
    smollm2_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = replace(current_machine(), gpus=())
    planned = plan_load(str(smollm2_path), PlanRequest(), machine)
    loads = Loads(1, "CPU")
    monkeypatch.setattr(Engine, "load", loads)
    notes: list[str] = []
    _, done = load_engine(planned, on_note=notes.append)
    (note,) = notes
    check_note(note)
    before, after = planned.plan.devices[-1], done.plan.devices[-1]
    assert after.used_bytes <= 0.9 * before.used_bytes
    loads.tried.clear()
    loads.failures = 2
    with pytest.raises(OutOfMemoryError, match="no room"):
        load_engine(planned)
    assert len(loads.tried) == 2


@pytest.mark.parametrize("part", ["weights", "kv", "graph", "unknown"])
def test_the_size_that_failed_tells_how_much_room_there_is_not(
    two_cards: PlannedLoad, part: str
) -> None:
    row = two_cards.plan.devices[0]
    sizes = {"weights": row.weights_bytes, "kv": row.kv_bytes, "graph": row.compute_bytes // 2}
    error = OutOfMemoryError("x", device="CUDA0", wanted_bytes=sizes.get(part, 0))
    less = loading._lessen_device(two_cards, error)
    bounds = {"weights": row.weights_bytes, "kv": row.weights_bytes + row.kv_bytes}
    wanted = 0.9 * bounds.get(part, row.used_bytes)
    assert less.gpus[0].budget_bytes == pytest.approx(wanted, abs=2)
    assert less.gpus[1] == two_cards.machine.gpus[1]
    assert less.ram == two_cards.machine.ram


def test_three_failures_are_the_end(
    two_cards: PlannedLoad, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = Loads(3, "CUDA0")
    monkeypatch.setattr(Engine, "load", loads)
    monkeypatch.setattr(loading, "check_dry", lambda planned, _: planned)
    with pytest.raises(OutOfMemoryError, match="no room") as refused:
        load_engine(two_cards)
    assert len(loads.tried) == 3
    assert refused.value.hint == "hint"


def test_a_saved_plan_is_not_changed_when_memory_runs_out(
    two_cards: PlannedLoad, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = Loads(1, "CUDA0")
    monkeypatch.setattr(Engine, "load", loads)
    monkeypatch.setattr(loading, "check_dry", lambda planned, _: planned)
    with pytest.raises(OutOfMemoryError, match="saved plan") as refused:
        load_engine(replace(two_cards, replan=None, choices=None))
    assert "localmistral plan" in refused.value.hint
    assert len(loads.tried) == 1


def test_another_quant_brings_its_own_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smollm2_path: Path
) -> None:
    """Where memory is left for the smaller of two files only, that one is what is loaded."""
    folder = tmp_path / "hub" / "models--someone--Tiny-GGUF"
    snapshot = folder / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "Tiny-Q4_1.gguf").symlink_to(smollm2_path)
    (snapshot / "Tiny-Q8_0.gguf").symlink_to(DEMO)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    machine = replace(current_machine(), gpus=())
    planned = plan_load("hf:someone/Tiny-GGUF", PlanRequest(context=4096), machine)
    assert planned.shape.files == (planned.local.path,)
    other = next(c for c in planned.choices.candidates if c.quant != planned.plan.quant)  # type: ignore[union-attr]
    swapped = replace(planned.plan, quant=other.quant)
    tighter = loading._replan(replace(planned, replan=lambda _: swapped), machine)
    assert tighter.shape.files == other.shape.files == (tighter.local.path,)
    assert tighter.local.quant == other.quant


# The dry load


def make_report(compute_bytes: dict[str, int]) -> LoadReport:
    buffers = tuple(
        DeviceBuffers(name=name, compute_bytes=size) for name, size in compute_bytes.items()
    )
    return LoadReport(buffers=buffers, layer_devices=(), graph_copies=1, is_mapped=True)


def test_a_graph_larger_than_planned_is_excess_only_beyond_the_budget(
    two_cards: PlannedLoad,
) -> None:
    rows = two_cards.plan.devices
    budgets = tuple(row.budget_bytes for row in rows)
    room = rows[0].budget_bytes - rows[0].used_bytes
    assert room >= 0
    within = make_report({"CUDA0": rows[0].compute_bytes + room})
    beyond = make_report({"CUDA0": rows[0].compute_bytes + room + 5})
    assert find_excess(two_cards, within, budgets) == {}
    assert find_excess(two_cards, beyond, budgets) == {"CUDA0": 5}
    # what is in the plan alone (CUDA's copies) still counts
    assert find_excess(two_cards, make_report({}), budgets) == {}


def grow(extra_bytes: int, tried: list[EngineSettings], planned: PlannedLoad) -> object:
    """A dry load that finds the first card's graph so much larger than this plan's."""
    size = planned.plan.devices[0].compute_bytes + extra_bytes

    def answer(_files: object, settings: EngineSettings) -> LoadReport:
        tried.append(settings)
        return make_report({"CUDA0": size})

    return answer


def test_a_graph_over_the_budget_tightens_the_plan_and_is_said(
    two_cards: PlannedLoad, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[EngineSettings] = []
    monkeypatch.setattr(loading, "dry_load", grow(60 * MIB, tried, two_cards))
    notes: list[str] = []
    done = check_dry(two_cards, notes.append)
    assert notes and len(tried) <= loading.MAX_TIGHTENINGS
    for note in notes:
        check_note(note)
        assert "CUDA0 by" in note
    assert done.plan.devices[0].used_bytes < two_cards.plan.devices[0].used_bytes
    assert done.plan != two_cards.plan


def test_a_saved_plan_over_its_budget_is_refused(
    two_cards: PlannedLoad, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "dry_load", grow(500 * MIB, [], two_cards))
    with pytest.raises(OutOfMemoryError, match="CUDA0 by"):
        check_dry(replace(two_cards, replan=None, choices=None), lambda _: None)


def check_dry_over(path: Path, room_mib: tuple[float, ...], less_bytes: int) -> list[object]:
    """In the process with the devices: a plan whose graphs are said to be so much smaller than
    they are (its budget with them), as a formula that falls short would."""
    machine = see_machine(room_mib)
    planned = plan_load(str(path), PlanRequest(context=2048), machine)
    first, *rest = planned.plan.devices
    short = replace(
        first,
        compute_bytes=first.compute_bytes - less_bytes,
        budget_bytes=first.used_bytes - less_bytes,
    )
    planned = replace(planned, plan=replace(planned.plan, devices=(short, *rest)))
    notes: list[str] = []
    done = check_dry(planned, notes.append)
    return [planned.plan, done.plan, notes]


def test_llama_cpps_own_graphs_have_the_last_word(rpc: RpcProcess, smollm2_path: Path) -> None:
    before, after, notes = rpc.call(check_dry_over, smollm2_path, (90, 150), 5 * MIB)
    assert isinstance(before, Plan) and isinstance(after, Plan)
    assert isinstance(notes, list) and "RPC0 by" in notes[0]
    assert after.placement.tensor_split[0] < before.placement.tensor_split[0]


def test_a_plan_with_ample_room_is_not_loaded_dry(
    smollm2_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "dry_load", lambda *_: pytest.fail("it was"))
    machine = current_machine(["24GiB"], "64GiB")
    planned = plan_load(str(smollm2_path), PlanRequest(), machine)
    assert check_dry(planned, pytest.fail) is planned


# What it took beside what was planned


def test_a_difference_is_kept_for_doctor(smollm2_path: Path, kept: Path) -> None:
    machine = replace(current_machine(), gpus=())
    planned = plan_load(str(smollm2_path), PlanRequest(context=8192), machine)
    (row,) = planned.plan.devices
    wrong = replace(planned.plan, devices=(replace(row, kv_bytes=row.kv_bytes // 2),))
    engine, _ = load_engine(replace(planned, plan=wrong))
    engine.close()
    (found,) = read_differences(kept) or ()
    assert (found.device, found.part) == ("CPU", "kv")
    assert found.planned_bytes == row.kv_bytes // 2
    assert abs(found.actual_bytes - row.kv_bytes) <= LOGGED_BYTES


def test_only_what_matters_is_a_difference(two_cards: PlannedLoad) -> None:
    rows = two_cards.plan.devices
    names = ("CUDA0", "CUDA1", "CPU")

    def report(more_bytes: int, *, is_mapped: bool) -> LoadReport:
        buffers = tuple(
            DeviceBuffers(
                name=name,
                weights_bytes=row.weights_bytes + more_bytes,
                kv_bytes=row.kv_bytes,
                compute_bytes=row.compute_bytes,
            )
            for name, row in zip(names, rows, strict=True)
        )
        return LoadReport(buffers=buffers, layer_devices=(), graph_copies=1, is_mapped=is_mapped)

    assert compare(two_cards, report(0, is_mapped=False)) == ()
    assert compare(two_cards, report(15 * MIB, is_mapped=False)) == ()
    found = compare(two_cards, report(40 * MIB, is_mapped=True))
    assert [(one.device, one.part) for one in found] == [("CUDA0", "weights"), ("CUDA1", "weights")]
    found = compare(two_cards, report(40 * MIB, is_mapped=False))
    assert found[-1] == Difference(
        device="CPU",
        part="weights",
        planned_bytes=rows[-1].weights_bytes,
        actual_bytes=rows[-1].weights_bytes + 40 * MIB,
    )


# Calibration


def test_what_is_run_is_planned_with_the_calibration_that_was_kept(
    smollm2_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = replace(current_machine(), gpus=())
    path = tmp_path / "calibration.json"
    monkeypatch.setattr("localmistral.fit.calibration.calibration_file", lambda: path)
    plain = plan_load(str(smollm2_path), PlanRequest(), machine).plan
    write_calibration(Calibration(ram_decode=4.0), machine, path)
    slow = plan_load(str(smollm2_path), PlanRequest(), machine).plan
    ratio = plain.predicted.decode_tokens_per_second / slow.predicted.decode_tokens_per_second
    assert ratio == pytest.approx(4.0, rel=0.05)


# Words


def test_changes_are_told_in_words(two_cards: PlannedLoad) -> None:
    plan = two_cards.plan
    moved = replace(plan, kv_type="q8_0", placement=Placement(gpu_layers=30, tensor_split=(15, 15)))
    said = describe_changes(replace(plan, kv_type="f16"), moved)
    assert "a q8_0 in place of a f16 cache" in said
    assert " and 15,15 in place of " in said
    alone = replace(plan, placement=Placement(gpu_layers=0, tensor_split=(0, 0)))
    assert describe_changes(plan, alone) == "every layer on the CPU"
    assert describe_changes(plan, plan) == "the same placement"


def test_a_command_plans_as_python_does(smollm2_path: Path) -> None:
    options = LoadOptions(name=str(smollm2_path), request=PlanRequest(context=1024))
    by_command = plan_for(options)
    by_python = plan_load(str(smollm2_path), options.request, by_command.machine)
    assert by_command.plan == by_python.plan
