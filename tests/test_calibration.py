from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from speed_samples import RTX_3090, RTX_4090, SMALL_4_Q4_K_M, llama_8b, machine

from localmistral.fit.calibrating import Measurement, fit_calibration
from localmistral.fit.calibration import (
    NO_CALIBRATION,
    Calibration,
    fingerprint,
    from_json,
    read_calibration,
    to_json,
    write_calibration,
)
from localmistral.fit.machine import GIB, Machine
from localmistral.fit.placement import Placement
from localmistral.fit.plan import Load
from localmistral.fit.speed import predict
from localmistral.models.shape import ModelShape

LEARNT = Calibration(card_decode=1.25, ram_decode=0.8, card_prefill=1.5, ram_prefill=2.0)
HERE = machine(RTX_3090, RTX_3090)


def test_a_calibration_comes_back_as_it_was_kept(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "calibration.json"
    assert read_calibration(HERE, path) == (NO_CALIBRATION, "")
    assert write_calibration(LEARNT, HERE, path) == path
    assert read_calibration(HERE, path) == (LEARNT, "")
    write_calibration(NO_CALIBRATION, HERE, path)
    assert read_calibration(HERE, path) == (NO_CALIBRATION, "")
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_free_memory_and_granted_cores_do_not_make_another_machine() -> None:
    ram = dataclasses.replace(HERE.ram, available_bytes=GIB)
    cards = tuple(dataclasses.replace(gpu, free_bytes=GIB) for gpu in HERE.gpus)
    cpu = dataclasses.replace(HERE.cpu, cores=1)
    later = dataclasses.replace(HERE, ram=ram, gpus=cards, cpu=cpu, notes=("something",))
    assert from_json(to_json(LEARNT, HERE), later) == (LEARNT, "")


@pytest.mark.parametrize(
    "other",
    [
        machine(RTX_3090),
        machine(RTX_3090, RTX_4090),
        machine(RTX_3090, dataclasses.replace(RTX_3090, backend="vulkan")),
        machine(RTX_3090, dataclasses.replace(RTX_3090, total_bytes=12 * GIB)),
        dataclasses.replace(HERE, cpu=dataclasses.replace(HERE.cpu, name="Another CPU")),
        dataclasses.replace(HERE, ram=dataclasses.replace(HERE.ram, total_bytes=64 * GIB)),
    ],
    ids=["a card less", "another card", "another backend", "less memory", "cpu", "ram"],
)
def test_changed_hardware_loses_its_calibration_and_says_so(other: Machine) -> None:
    calibration, note = from_json(to_json(LEARNT, HERE), other)
    assert calibration == NO_CALIBRATION
    assert "other hardware" in note and "bench" in note
    assert fingerprint(other) != fingerprint(HERE)


def test_a_machine_that_is_not_there_has_no_calibration(tmp_path: Path) -> None:
    path = write_calibration(LEARNT, HERE, tmp_path / "calibration.json")
    typed = dataclasses.replace(HERE, is_real=False)
    assert read_calibration(typed, path) == (NO_CALIBRATION, "")
    assert from_json(path.read_text(encoding="utf-8"), typed) == (NO_CALIBRATION, "")


def changed(**changes: object) -> str:
    return json.dumps({**json.loads(to_json(LEARNT, HERE)), **changes})


FACTORS = dataclasses.asdict(LEARNT)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '"text"',
        "{}",
        "[" * 100_000,
        changed(factors=None),
        changed(factors=[]),
        changed(factors={}),
        changed(factors={**FACTORS, "ram_decode": None}),
        changed(factors={**FACTORS, "ram_decode": "1"}),
        changed(factors={**FACTORS, "ram_decode": True}),
        changed(factors={**FACTORS, "ram_decode": 0}),
        changed(factors={**FACTORS, "ram_decode": -1.0}),
        changed(factors={**FACTORS, "ram_decode": 1e9}),
        changed(factors={**FACTORS, "ram_decode": float("nan")}),
        changed(factors={**FACTORS, "ram_decode": float("inf")}),
    ],
)
def test_a_damaged_file_is_ignored_and_said(text: str, tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    path.write_text(text, encoding="utf-8")
    calibration, note = read_calibration(HERE, path)
    assert calibration == NO_CALIBRATION
    assert "ignored" in note and "bench" in note


def test_a_file_of_another_version_is_ignored_and_said() -> None:
    calibration, note = from_json(changed(version=99), HERE)
    assert calibration == NO_CALIBRATION
    assert "99" in note


def test_bytes_that_are_no_text_and_a_folder_in_its_place_are_ignored(tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    broken.write_bytes(b"\xff\xfe{}")
    for path in (broken, tmp_path):
        calibration, note = read_calibration(HERE, path)
        assert calibration == NO_CALIBRATION
        assert "ignored" in note


@pytest.mark.parametrize("factor", [0.0, -1.0, 21.0, float("nan"), float("inf")])
def test_an_absurd_factor_is_no_calibration(factor: float) -> None:
    with pytest.raises(ValueError, match="card_decode"):
        Calibration(card_decode=factor)


# Learning


def measure_as(
    shape: ModelShape, on: Machine, placement: Placement, truth: Calibration
) -> tuple[Measurement, ...]:
    """What a machine of that truth would measure."""
    speeds = [
        predict(shape, on, placement, Load(cells=32_768), depth=depth, calibration=truth)
        for depth in (0, 1024, 4096)
    ]
    return tuple(
        Measurement(
            depth=speed.depth,
            decode_tokens_per_second=speed.decode_tokens_per_second,
            prefill_tokens_per_second=speed.prefill_tokens_per_second,
        )
        for speed in speeds
    )


ALL_ON_CARDS = Placement(gpu_layers=33, tensor_split=(17, 16))
MOSTLY_IN_RAM = Placement(gpu_layers=37, tensor_split=(19, 18), cpu_expert_layers=tuple(range(36)))
ON_CPU = Placement(gpu_layers=0, tensor_split=(0, 0))


@pytest.mark.parametrize(
    ("shape", "placement", "truth"),
    [
        (llama_8b("q4_K"), ALL_ON_CARDS, Calibration(card_decode=1.3, card_prefill=0.7)),
        (llama_8b("q4_K"), ON_CPU, Calibration(ram_decode=0.6, ram_prefill=2.5)),
        (SMALL_4_Q4_K_M, MOSTLY_IN_RAM, Calibration(ram_decode=1.8)),
    ],
    ids=["cards", "cpu", "experts in RAM"],
)
def test_what_a_machine_shows_is_learnt(
    shape: ModelShape, placement: Placement, truth: Calibration
) -> None:
    seen = measure_as(shape, HERE, placement, truth)
    learnt = fit_calibration(shape, HERE, placement, Load(cells=32_768), seen)
    for name, factor in dataclasses.asdict(truth).items():
        assert getattr(learnt, name) == pytest.approx(factor, rel=0.02)


def test_what_is_known_of_the_other_side_is_kept() -> None:
    truth = Calibration(card_decode=1.4, ram_decode=1.8)
    seen = measure_as(SMALL_4_Q4_K_M, HERE, MOSTLY_IN_RAM, truth)
    known = Calibration(card_decode=1.4)
    load = Load(cells=32_768)
    learnt = fit_calibration(SMALL_4_Q4_K_M, HERE, MOSTLY_IN_RAM, load, seen, known)
    assert learnt.card_decode == 1.4
    assert learnt.ram_decode == pytest.approx(1.8, rel=0.01)


def test_a_prediction_with_what_was_learnt_meets_the_measurement() -> None:
    truth = Calibration(ram_decode=1.7, ram_prefill=3.0)
    seen = measure_as(llama_8b("q4_K"), HERE, ON_CPU, truth)
    load = Load(cells=32_768)
    learnt = fit_calibration(llama_8b("q4_K"), HERE, ON_CPU, load, seen[:1])
    for point in seen:
        again = predict(llama_8b("q4_K"), HERE, ON_CPU, load, depth=point.depth, calibration=learnt)
        assert again.decode_tokens_per_second == pytest.approx(
            point.decode_tokens_per_second, rel=0.02
        )


def test_a_measurement_beyond_reason_is_limited() -> None:
    stalled = Measurement(depth=0, decode_tokens_per_second=0.001, prefill_tokens_per_second=1e9)
    learnt = fit_calibration(llama_8b("q4_K"), HERE, ON_CPU, Load(cells=256), [stalled])
    assert (learnt.ram_decode, learnt.ram_prefill) == pytest.approx((20.0, 0.05))
