"""`bench`: what it measures, what plans learn from it, and the command as one types it."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from speed_samples import RTX_3090, llama_8b, machine

from localmistral.benchmark import (
    MAX_FILL_S,
    Measured,
    Outcome,
    Protocol,
    count_busy_cores,
    find_deepest,
    judge,
    measure,
    needed_context,
    share_context,
)
from localmistral.cli.bench import _keep, describe_busy, make_protocol, parse_streams
from localmistral.engine import Engine, EngineSettings
from localmistral.engine.threads import CpuTimes
from localmistral.errors import UsageError
from localmistral.fit.calibrating import Measurement
from localmistral.fit.calibration import (
    NO_CALIBRATION,
    Calibration,
    calibration_file,
    read_calibration,
)
from localmistral.fit.placement import Placement
from localmistral.fit.plan import Plan, Prediction
from localmistral.loading import PlannedLoad
from localmistral.models.cache import LocalModel
from localmistral.models.shape import ModelShape
from localmistral.terminal.bench_table import describe_calibration, format_ratio

DEMO = Path(__file__).resolve().parent.parent / "localmistral" / "data" / "demo.gguf"
SHAPE = llama_8b("q4_K")
HERE = machine(RTX_3090)
COMMAND = sys.modules[parse_streams.__module__]
"""The module: its name in the package is that of the command."""


def make_plan(context: int = 32_768, parallel: int = 1) -> Plan:
    return Plan(
        model="llama-8b",
        quant="Q4_K_M",
        repository=None,
        revision=None,
        files=(),
        context=context,
        parallel=parallel,
        kv_type="f16",
        placement=Placement(gpu_layers=33, tensor_split=(33,)),
        flash_attention=True,
        batch=2048,
        ubatch=512,
        threads=8,
        mmap=True,
        repack=True,
        devices=(),
        predicted=Prediction(
            depth=4096, decode_tokens_per_second=100.0, prefill_tokens_per_second=1000.0
        ),
        reasons=(),
    )


def make_load(plan: Plan, shape: ModelShape = SHAPE) -> PlannedLoad:
    local = LocalModel(
        name="llama-8b:Q4_K_M",
        model=None,
        repository=None,
        revision=None,
        quant="Q4_K_M",
        bytes=shape.weight_bytes,
        path=Path("llama.gguf"),
        files=(Path("llama.gguf"),),
        problem="",
        mmproj=None,
    )
    return PlannedLoad(plan=plan, machine=HERE, local=local, shape=shape)


def make_measured(*points: Measurement, busy_cores: float = 0.0) -> Measured:
    return Measured(depths=points, streams=(), busy_cores=busy_cores, notes=())


# What is measured


@pytest.fixture(scope="module")
def speeds() -> Measured:
    """The demo model under a protocol that asks for more than its context holds."""
    settings = EngineSettings(context=1024, parallel=2, devices=("CPU",))
    protocol = Protocol(depths=(0, 512, 1024), streams=(1, 2, 4), rounds=2, seconds=0.1)
    with Engine.load([DEMO], settings) as engine:
        return measure(engine, protocol)


def test_each_depth_and_number_of_streams_has_its_figures(speeds: Measured) -> None:
    assert [point.depth for point in speeds.depths] == [0, 512]
    for point in speeds.depths:
        assert point.decode_tokens_per_second > 0
        assert point.prefill_tokens_per_second > point.decode_tokens_per_second
    assert [speed.streams for speed in speeds.streams] == [1, 2]
    assert all(speed.tokens_per_second > 0 for speed in speeds.streams)
    assert speeds.busy_cores >= 0


def test_what_has_no_room_is_left_out_and_said(speeds: Measured) -> None:
    assert len(speeds.notes) == 2
    assert "1k" in speeds.notes[0] and "context holds 1k" in speeds.notes[0]
    assert "4 streams" in speeds.notes[1] and "room for 2" in speeds.notes[1]


def test_the_filled_part_is_read_once_and_every_figure_is_at_its_depth() -> None:
    """Per depth: one filling, then rounds that find it in memory."""
    settings = EngineSettings(context=4096, devices=("CPU",), ubatch=128)
    protocol = Protocol(depths=(300, 600), streams=(), rounds=3, seconds=0.05)
    with Engine.load([DEMO], settings) as engine:
        measure(engine, protocol)
        metrics = engine.metrics()
    read = metrics.prompt_tokens - metrics.cached_tokens
    fresh = 2 * 3 * 128  # behind the text, for each depth and round
    warm_up, again = 2 * 32, 2 * 3  # of a known prompt the last token is read again
    assert read == pytest.approx(600 + fresh + warm_up + again, abs=10)


def test_every_step_is_told(smollm2_path: Path) -> None:
    told: list[str] = []
    settings = EngineSettings(context=256, devices=("CPU",))
    protocol = Protocol(depths=(0,), streams=(1,), rounds=1, seconds=0.01)
    with Engine.load([smollm2_path], settings) as engine:
        measure(engine, protocol, told.append)
    assert told == ["warming up", "0 tokens filled", "1 stream"]


def test_a_depth_that_takes_minutes_to_fill_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("localmistral.benchmark.MAX_FILL_S", 0.0)
    settings = EngineSettings(context=1024, devices=("CPU",))
    protocol = Protocol(depths=(0, 512), streams=(), rounds=1, seconds=0.01)
    with Engine.load([DEMO], settings) as engine:
        measured = measure(engine, protocol)
    assert [point.depth for point in measured.depths] == [0]
    assert "512" in measured.notes[0] and "would take" in measured.notes[0]
    assert MAX_FILL_S > 0


def test_others_count_by_the_cores_they_kept_busy() -> None:
    before = CpuTimes(clock_s=10.0, all_s=100.0, own_s=5.0)
    after = CpuTimes(clock_s=20.0, all_s=130.0, own_s=20.0)
    assert count_busy_cores(before, after) == pytest.approx(1.5)
    assert count_busy_cores(before, before) == 0.0
    idle = CpuTimes(clock_s=20.0, all_s=104.0, own_s=10.0)
    assert count_busy_cores(before, idle) == 0.0
    assert describe_busy(1.5).startswith("Other processes kept 1.5 cores busy")
    assert describe_busy(0.1) == ""


# The context


@pytest.mark.parametrize(
    ("context", "depths", "streams", "expected"),
    [
        (32_768, (0, 4096), (1, 2, 4), (8192, 4)),
        (16_384, (0, 4096), (1, 2, 4), (8192, 2)),
        (8192, (0, 4096), (1, 2, 4), (8192, 1)),
        (8192, (0,), (1, 2, 4), (2048, 4)),
        (32_768, (0,), (3,), (10_752, 3)),
        (4096, (0, 1024, 4096), (1, 2, 4), (2048, 2)),  # 4096 fits no stream
        (512, (0, 4096), (1, 2, 4), (512, 1)),
        (32_768, (1024,), (64,), (32_768, 1)),
    ],
)
def test_streams_share_the_context_that_was_planned(
    context: int, depths: tuple[int, ...], streams: tuple[int, ...], expected: tuple[int, int]
) -> None:
    plan = share_context(make_load(make_plan(context)), streams, depths).plan
    assert (plan.context, plan.parallel) == expected
    assert plan.context * plan.parallel <= context
    if plan.parallel > 1:
        assert plan.context >= needed_context(find_deepest(make_plan(context), depths))


def test_a_plan_made_anew_for_less_memory_is_shared_as_well() -> None:
    load = dataclasses.replace(make_load(make_plan()), replan=lambda _: make_plan(16_384))
    shared = share_context(load, (1, 4), (0, 1024))
    assert shared.replan is not None
    again = shared.replan(HERE)
    assert (again.context, again.parallel) == (4096, 4)


# What is learnt


def test_measured_figures_stand_beside_what_was_predicted() -> None:
    point = Measurement(depth=0, decode_tokens_per_second=50.0, prefill_tokens_per_second=900.0)
    outcome = judge(make_load(make_plan()), make_measured(point), NO_CALIBRATION)
    assert outcome.learnt is not None
    expected = outcome.predicted[0].decode_tokens_per_second
    assert outcome.learnt.card_decode == pytest.approx(expected / 50.0, rel=0.05)
    assert outcome.learnt.ram_decode == 1.0
    calibrated = judge(make_load(make_plan()), make_measured(point), outcome.learnt)
    assert calibrated.predicted[0].decode_tokens_per_second == pytest.approx(50.0, rel=0.01)
    assert calibrated.predicted[0].prefill_tokens_per_second == pytest.approx(900.0, rel=0.01)
    assert dataclasses.astuple(calibrated.learnt or NO_CALIBRATION) == pytest.approx(
        dataclasses.astuple(outcome.learnt)
    )


def test_fewer_threads_than_cores_are_reckoned_with() -> None:
    point = Measurement(depth=0, decode_tokens_per_second=5.0, prefill_tokens_per_second=50.0)
    plan = dataclasses.replace(make_plan(), placement=Placement(gpu_layers=0, tensor_split=(0,)))
    outcomes = [
        judge(
            make_load(dataclasses.replace(plan, threads=threads)),
            make_measured(point),
            NO_CALIBRATION,
        )
        for threads in (8, 1, 0, 99)
    ]
    all_cores, one, unset, too_many = (o.predicted[0].prefill_tokens_per_second for o in outcomes)
    assert all_cores == pytest.approx(8 * one)
    assert unset == too_many == all_cores


def test_a_toy_teaches_nothing_nor_does_an_empty_measurement() -> None:
    point = Measurement(depth=0, decode_tokens_per_second=50.0, prefill_tokens_per_second=900.0)
    small = dataclasses.replace(SHAPE, tensors=SHAPE.tensors[-1:])
    toy = judge(make_load(make_plan(), small), make_measured(point), NO_CALIBRATION)
    assert toy.learnt is None and "overhead" in toy.reason
    nothing = judge(make_load(make_plan()), make_measured(), NO_CALIBRATION)
    assert nothing.learnt is None and nothing.reason


def test_factors_are_said_in_words() -> None:
    said = describe_calibration(Calibration(card_decode=1.25, ram_prefill=0.5))
    assert "answers on cards take 1.25 times" in said
    assert "prompts from RAM take 0.50 times" in said
    assert "answers from RAM" not in said
    assert format_ratio(112.0, 100.0) == "+12 %"
    assert format_ratio(40.0, 100.0) == "-60 %"


LEARNT = Outcome(predicted=(), learnt=Calibration(card_decode=1.5))


@pytest.fixture
def kept_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "calibration.json"
    monkeypatch.setattr("localmistral.fit.calibration.calibration_file", lambda: path)
    return path


@pytest.mark.parametrize(
    ("save", "answer", "is_kept"),
    [
        (True, None, True),
        (False, None, False),
        (None, None, False),  # a script that doesn't say
        (None, True, True),
        (None, False, False),
    ],
)
def test_a_calibration_is_kept_when_that_is_wanted(
    save: bool | None,
    answer: bool | None,
    is_kept: bool,
    kept_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(COMMAND, "can_ask", lambda: answer is not None)
    monkeypatch.setattr(typer, "confirm", lambda *_, **__: answer)
    assert _keep(HERE, make_measured(), LEARNT, save) == is_kept
    expected = LEARNT.learnt if is_kept else NO_CALIBRATION
    assert read_calibration(HERE, kept_file) == (expected, "")


@pytest.mark.parametrize(("busy_cores", "default"), [(0.0, True), (1.5, False)])
def test_figures_of_a_busy_machine_are_not_kept_by_a_mere_return(
    busy_cores: float, default: bool, kept_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(COMMAND, "can_ask", lambda: True)
    monkeypatch.setattr(typer, "confirm", lambda _, default, **__: default)
    assert _keep(HERE, make_measured(busy_cores=busy_cores), LEARNT, None) is default
    assert kept_file.exists() is default


# The command


@pytest.mark.parametrize(
    ("text", "counts"), [("1,2,4", (1, 2, 4)), ("4, 1,4", (1, 4)), ("64", (64,))]
)
def test_numbers_of_streams_are_read(text: str, counts: tuple[int, ...]) -> None:
    assert parse_streams(text) == counts


@pytest.mark.parametrize("text", ["", "0", "1,,2", "-1", "65", "a", "1.5", "²", "9" * 5000])
def test_other_numbers_of_streams_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--streams"):
        parse_streams(text)


def test_the_protocol_covers_nothing_filled_and_the_depth_that_was_asked_for() -> None:
    assert make_protocol(4096, (1, 2), quick=False).depths == (0, 1024, 4096)
    assert make_protocol(0, (1, 2), quick=False).depths == (0,)
    quick = make_protocol(4096, (1, 2), quick=True)
    assert (quick.depths, quick.streams, quick.rounds) == ((0, 1024), (1,), 1)


def run_bench(
    tmp_path: Path, *arguments: object, command: str = "bench"
) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "XDG_STATE_HOME": str(tmp_path / "state"),
        "XDG_DATA_HOME": str(tmp_path / "data"),
        "HF_HUB_CACHE": str(tmp_path / "hub"),
    }
    return subprocess.run(
        [sys.executable, "-m", "localmistral", command, *map(str, arguments)],
        capture_output=True,
        encoding="utf-8",
        stdin=subprocess.DEVNULL,
        env=environment,
        timeout=600,
    )


def test_the_figures_of_the_demo_are_one_json_document(tmp_path: Path) -> None:
    done = run_bench(tmp_path, "-m", "demo", "--quick", "--json", "--save")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert [row["depth"] for row in document["depths"]] == [0, 1024]
    for row in document["depths"]:
        for name in ("decode", "prefill"):
            assert row[f"{name}_tokens_per_second"] > 0
            assert row[f"predicted_{name}_tokens_per_second"] > 0
    assert [row["streams"] for row in document["streams"]] == [1]
    assert document["streams"][0]["tokens_per_second"] > 0
    assert document["gpu_layers"] == sum(document["tensor_split"])
    assert document["context"] >= 1024
    assert document["busy_cores"] >= 0
    assert (document["calibration"], document["saved"]) == (None, False)
    assert "overhead" in done.stderr


def test_a_person_gets_a_table_on_stdout_and_remarks_on_stderr(tmp_path: Path) -> None:
    done = run_bench(tmp_path, "demo", "--depth", "256", "--streams", "1,2", "--no-save")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("demo, ")
    assert lines[1].split() == ["filled", "answers", "predicted", "prompts", "predicted"]
    assert [line.split()[0] for line in lines[2:5]] == ["0", "64", "256"]
    assert [line.split()[0] for line in lines[-2:]] == ["1", "2"]
    assert "\x1b" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("demo", "-m", "demo"), "Two models"),
        (("demo", "--streams", "none"), "--streams"),
        (("demo", "--depth", "many"), "many"),
        (("demo", "--save=yes"), "--save"),
    ],
)
def test_wrong_usage_is_said_before_anything_is_loaded(
    arguments: tuple[str, ...], word: str, tmp_path: Path
) -> None:
    done = run_bench(tmp_path, *arguments)
    assert done.returncode == 2
    assert word in done.stderr
    assert done.stdout == ""


@pytest.mark.slow
def test_a_plan_reckons_with_what_bench_has_kept(smollm2_path: Path, tmp_path: Path) -> None:
    before = run_bench(tmp_path, smollm2_path, "--json", "--depth", "0", command="plan")
    done = run_bench(tmp_path, smollm2_path, "--quick", "--json", "--save")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["saved"] is True
    kept = list((tmp_path / "state").rglob(calibration_file().name))
    assert len(kept) == 1
    assert json.loads(kept[0].read_text(encoding="utf-8"))["factors"] == document["calibration"]
    after = run_bench(tmp_path, smollm2_path, "--json", "--depth", "0", command="plan")
    planned = [json.loads(p.stdout)["predicted"] for p in (before, after)]
    raw, calibrated = (p["decode_tokens_per_second"] for p in planned)
    factor = document["calibration"]["ram_decode"]
    assert calibrated == pytest.approx(raw / factor, rel=0.1)
    predicted = document["depths"][0]["predicted_decode_tokens_per_second"]
    assert predicted == pytest.approx(raw, rel=0.01)
