"""`localmistral plan` as a program: what it prints, for whom, and what it refuses."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from make_header_gguf import build_files, write_files

from localmistral.cli import main
from localmistral.cli.options import LOAD_RANGES, parse_layers, read_request
from localmistral.engine import EngineSettings, model, offload
from localmistral.errors import BadRequestError, UsageError
from localmistral.fit.plan import KV_TYPES, SPLIT_MODES
from localmistral.fit.plan_json import plan_from_json

KEYS = {
    "model",
    "quant",
    "files",
    "download_bytes",
    "context",
    "kv_type",
    "split_mode",
    "gpu_layers",
    "tensor_split",
    "cpu_expert_layers",
    "flash_attention",
    "batch",
    "ubatch",
    "threads",
    "devices",
    "predicted",
    "reasons",
    "alternatives",
}
DEVICE_KEYS = {
    "name",
    "budget_bytes",
    "weights_bytes",
    "mmproj_bytes",
    "kv_bytes",
    "compute_bytes",
}
TYPED = ("--gpu", "2x3090", "--ram", "64GiB")
MACHINES = {
    "two large cards": ("--gpu", "2x3090", "--ram", "64GiB"),
    "two large cards, fast RAM": ("--gpu", "2x rtx-4090", "--ram", "128GiB@90GB/s"),
    "uneven cards": ("--gpu", "24GiB", "--gpu", "12GiB", "--ram", "64GiB"),
    "uneven cards, the other way": ("--gpu", "8GiB", "--gpu", "24GiB", "--ram", "64GiB"),
    "a card too small": ("--gpu", "24GiB", "--gpu", "2GiB", "--ram", "64GiB"),
    "four equal cards": ("--gpu", "4x16GiB@448GB/s", "--ram", "32GiB"),
    "one small card": ("--gpu", "8GiB", "--ram", "16GiB"),
    "one card": ("--gpu", "16GiB", "--ram", "64GiB"),
    "one large card": ("--gpu", "rtx-pro-6000", "--ram", "64GiB"),
    "no card": ("--cpu-only", "--ram", "16GiB"),
    "no card, much RAM": ("--cpu-only", "--ram", "128GiB@96GB/s"),
    "eight cards": ("--gpu", "8x24GiB", "--ram", "256GiB"),
}


@pytest.fixture(autouse=True)
def _nothing_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No model but those of the test, no Hub, and no calibration of this machine."""
    for name in ("HF_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("LOCALMISTRAL_MODELS", "LOCALMISTRAL_RPC", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> Path:
    (path,) = write_files(
        tmp_path_factory.mktemp("header") / "small.gguf", build_files("small-4", "iq3_s")
    )
    return path


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "localmistral", "plan", *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        stdin=subprocess.DEVNULL,
        timeout=240,
    )


@pytest.fixture
def plan(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """Run in this process; its document."""

    def run(*arguments: str) -> dict[str, Any]:
        code = main(["plan", *arguments, "--offline", "--json"])
        out, err = capsys.readouterr()
        assert code == 0, err
        document: dict[str, Any] = json.loads(out)
        return document

    return run


@pytest.fixture
def refuse(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Run in this process; its exit code and what stands on stderr. stdout is empty."""

    def run(*arguments: str) -> tuple[int, str]:
        code = main(["plan", *arguments, "--offline"])
        out, err = capsys.readouterr()
        assert out == ""
        assert "Traceback" not in err
        return code, err

    return run


def check_contract(document: dict[str, Any]) -> None:
    """What every plan promises, whatever it is for."""
    assert document.keys() >= KEYS
    plan_from_json(document)  # it can be replayed
    assert document["context"] % 256 == 0
    assert document["download_bytes"] == sum(file["bytes"] for file in document["files"])
    assert all(set(file) == {"path", "bytes", "sha256"} for file in document["files"])
    assert sum(document["tensor_split"]) == document["gpu_layers"]
    *cards, last = document["devices"]
    assert last["name"].startswith("CPU")
    assert len(cards) == len(document["tensor_split"])
    for device, layers in zip(document["devices"], [*document["tensor_split"], 1], strict=True):
        assert device.keys() == DEVICE_KEYS
        parts = [device[key] for key in DEVICE_KEYS - {"name", "budget_bytes"}]
        assert all(isinstance(part, int) and part >= 0 for part in parts)
        assert sum(parts) <= device["budget_bytes"] or not layers
        assert layers or sum(parts) == 0
    assert document["split_mode"] in ("none", "layer", "tensor")
    assert document["predicted"]["decode_tokens_per_second"] > 0
    assert document["predicted"]["prefill_tokens_per_second"] > 0
    assert document["reasons"]
    assert all(reason.strip() == reason and reason.endswith(".") for reason in document["reasons"])


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES.keys())
@pytest.mark.parametrize("model", ["small-4", "ministral-3-8b", "medium-3.5"])
def test_a_plan_keeps_its_promises_on_any_machine(
    machine: tuple[str, ...], model: str, plan: Callable[..., dict[str, Any]]
) -> None:
    document = plan(model, *machine)
    check_contract(document)
    assert document["predicted"]["depth"] == min(4096, document["context"])


@pytest.mark.parametrize("machine", list(MACHINES.values())[:6:2], ids=list(MACHINES)[:6:2])
def test_a_header_is_planned_exactly(
    machine: tuple[str, ...], header: Path, plan: Callable[..., dict[str, Any]]
) -> None:
    document = plan(str(header), *machine)
    check_contract(document)
    assert document["quant"] == "IQ3_S"
    assert document["local"] and not document["estimated"]
    assert document["files"] == [
        {"path": str(header), "bytes": header.stat().st_size, "sha256": None}
    ]
    kinds = ("weights_bytes", "kv_bytes")
    weights, cache = (sum(device[kind] for device in document["devices"]) for kind in kinds)
    assert weights == pytest.approx(header.stat().st_size, rel=0.01)
    assert cache == document["context"] * {"f16": 23_040, "q8_0": 12_240}[document["kv_type"]]


def test_the_program_prints_one_document_on_stdout_and_notes_beside_it() -> None:
    result = call("--gpu", "24GiB", "--ram", "64GiB", "--json")
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    check_contract(document)
    assert document["estimated"]
    assert "24 GiB counts as" in result.stderr  # what a bare size was taken for


def test_the_program_plans_a_file_and_its_model_s_name_alike(header: Path, tmp_path: Path) -> None:
    by_file = call(str(header), *TYPED, "--json")
    by_option = call("-m", str(header), *TYPED, "--json")
    assert by_file.returncode == 0, by_file.stderr
    assert by_file.stdout == by_option.stdout
    saved = tmp_path / "plan.json"
    saved.write_text(by_file.stdout, encoding="utf-8")
    shown = call("--plan", str(saved), "--json")
    assert shown.stdout == by_file.stdout


def test_without_a_model_it_is_the_headline_s(plan: Callable[..., dict[str, Any]]) -> None:
    assert plan(*TYPED) == plan("small-4", *TYPED) == plan("-m", "mistral-small-4", *TYPED)
    named = plan("--quant", "iq3-s", *TYPED)
    assert (named["model"], named["quant"]) == ("mistral-small-4", "UD-IQ3_S")


def test_what_is_set_is_kept(plan: Callable[..., dict[str, Any]]) -> None:
    document = plan(
        "small-4:UD-IQ3_S",
        "--gpu=2x3090",
        "--ram=64GiB",
        "--context=8k",
        "--kv-type=q8_0",
        "--gpu-layers=37",
        "--tensor-split=1,1",
        "--cpu-experts=0-3,8",
        "--threads=6",
        "--depth=8k",
        "--batch=1024",
        "--ubatch=256",
        "--no-vision",
    )
    check_contract(document)
    assert document["quant"] == "UD-IQ3_S"
    assert document["context"] == 8192
    assert document["kv_type"] == "q8_0"
    assert (document["gpu_layers"], document["tensor_split"]) == (37, [19, 18])
    assert document["cpu_expert_layers"] == [0, 1, 2, 3, 8]
    assert (document["threads"], document["batch"], document["ubatch"]) == (6, 1024, 256)
    assert document["predicted"]["depth"] == 8192
    assert len(document["files"]) == 1
    assert all(device["mmproj_bytes"] == 0 for device in document["devices"])


def test_streams_reserve_their_contexts_together(plan: Callable[..., dict[str, Any]]) -> None:
    one, four = (plan("ministral-3-8b", *TYPED, "--context=8k", f"--parallel={n}") for n in (1, 4))
    cache = [sum(device["kv_bytes"] for device in d["devices"]) for d in (one, four)]
    assert four["context"] == one["context"] == 8192
    assert cache == [8192 * 139_264, 4 * 8192 * 139_264]
    check_contract(four)


def test_the_image_encoder_is_counted_once(plan: Callable[..., dict[str, Any]]) -> None:
    document = plan("small-4", *TYPED)
    sizes = [device["mmproj_bytes"] for device in document["devices"]]
    assert sum(map(bool, sizes)) == 1
    assert document["files"][-1]["path"] == "mmproj-F16.gguf"
    assert document["files"][-1]["bytes"] == sum(sizes) == 857_078_496


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("small-4", "-m", "small-4"), "Two models are named"),
        (("--prefer", "best"), "'best' is not known"),
        (("--kv-type", "q9_0"), "'q9_0' is not known"),
        (("--split-mode", "row"), "'row' is not known"),
        (("--cpu-experts", "0-"), "not a list of layers"),
        (("--cpu-experts", "3-0"), "not a list of layers"),
        (("--cpu-experts", "0,,2"), "not a list of layers"),
        (("--cpu-experts", "-1"), "not a list of layers"),
        (("--cpu-experts", ""), "not a list of layers"),
        (("--tensor-split", "1,x"), "not a list of shares"),
        (("--context", "many"), "not a whole number of tokens"),
        (("--context", "99M"), "--context is"),
        (("--min-context", "0"), "not a whole number of tokens"),
        (("--min-speed", "fast"), "not a speed"),
        (("--depth", "deep"), "not a whole number of tokens"),
        (("--gpu-layers", "-2"), "--gpu-layers is -2"),
        (("--parallel", "0"), "--parallel is 0"),
        (("--threads", "-1"), "--threads is -1"),
        (("--ubatch", "0"), "--ubatch is 0"),
        (("--gpu", "voodoo2"), "voodoo2"),
        (("--gpu", "24GiB", "--cpu-only"), "--cpu-only"),
        (("--ram", "0"), "--ram"),
        (("--nonsense",), "nonsense"),
    ],
)
def test_a_wrong_option_is_a_usage_error(
    arguments: tuple[str, ...], complaint: str, refuse: Callable[..., tuple[int, str]]
) -> None:
    code, message = refuse(*arguments)
    assert code == 2
    assert complaint in message


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("smal-4", *TYPED), "nearest names are"),
        (("small-4:Q7_X", *TYPED), "has no quant 'Q7_X'"),
        (("nowhere.gguf", *TYPED), "There is no file"),
        (("hf:some/where", *TYPED), "Nothing of 'hf:some/where'"),
        (("--plan", "nowhere.json"), "can't be read"),
        (("small-4:Q8_0", "--gpu", "8GiB", "--ram", "16GiB"), "GiB"),
        (("ministral-3-8b", *TYPED, "--context", "1M"), "262,144"),
    ],
)
def test_what_cannot_be_planned_is_one_sentence_and_a_hint(
    arguments: tuple[str, ...], complaint: str, refuse: Callable[..., tuple[int, str]]
) -> None:
    code, message = refuse(*arguments)
    assert code in (1, 2)
    sentence, hint = message.splitlines()[-2:]
    assert sentence.startswith("error: ")
    assert complaint in sentence + hint


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("small-4",), "MODEL"),
        (("-m", "small-4"), "--model"),
        (("--quant", "Q8_0"), "--quant"),
        (("--kv-type", "f16"), "--kv-type"),
        (("--gpu", "24GiB"), "--gpu"),
        (("--explain",), "--explain"),
    ],
)
def test_nothing_changes_a_saved_plan(
    arguments: tuple[str, ...], named: str, refuse: Callable[..., tuple[int, str]]
) -> None:
    code, message = refuse("--plan", "plan.json", *arguments)
    assert (code, f"and {named} asks for another one" in message) == (2, True)


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("0-3,8", (0, 1, 2, 3, 8)),
        ("8, 0-2", (0, 1, 2, 8)),
        ("5", (5,)),
        ("2-2,2", (2,)),
        ("none", ()),
    ],
)
def test_layers_are_read_as_ranges(text: str, layers: tuple[int, ...]) -> None:
    assert parse_layers(text) == layers


@pytest.mark.parametrize("text", ["a", "1;2", "1-2-3", "0x1", "٣", "1.0", "10000000", "1-"])
def test_anything_else_is_no_list_of_layers(text: str) -> None:
    with pytest.raises(UsageError, match="not a list of layers"):
        parse_layers(text)


def test_a_request_without_options_leaves_everything_open() -> None:
    request = read_request()
    assert (request.context, request.kv_type, request.gpu_layers) == (None, None, None)
    assert (request.min_speed, request.has_min_speed) == (20, False)
    assert (request.min_context, request.has_min_context) == (16384, False)
    assert request.vision
    wished = read_request(min_speed="5t/s", min_context="4k", depth="0", threads=0)
    assert (wished.min_speed, wished.has_min_speed) == (5, True)
    assert (wished.min_context, wished.has_min_context) == (4096, True)
    assert (wished.depth, wished.threads) == (0, None)


def test_the_command_line_s_limits_are_the_engine_s() -> None:
    for name, (low, high) in LOAD_RANGES.items():
        for value in (low, high):
            EngineSettings(**{name: value})  # type: ignore[arg-type]
        with pytest.raises(BadRequestError):
            EngineSettings(**{name: high + 1})  # type: ignore[arg-type]
        with pytest.raises(UsageError):
            read_request(**{name: high + 1})  # type: ignore[arg-type]
    assert set(model._GGML_TYPES) == set(KV_TYPES)  # what is taken is what llama.cpp is told
    assert set(offload._SPLIT_MODES) == set(SPLIT_MODES)


def test_people_get_a_table_that_fits_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "small-4", *TYPED, "--offline", "--explain"]) == 0
    out, _ = capsys.readouterr()
    assert "\x1b" not in out
    lines = out.splitlines()
    assert lines[0].startswith("mistral-small-4 ")
    bars = [line for line in lines if "█" in line and " of " in line]
    assert len(bars) == 3
    assert all(len(line) <= 80 for line in bars)
    for heading in ("Why", "Weights", "Cache", "Budgets", "Time of a token"):
        assert heading in lines
    assert any(line.startswith("- ") for line in lines)


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are POSIX's")
@pytest.mark.parametrize("columns", [80, 120])
def test_a_terminal_gets_no_line_wider_than_it_is(columns: int) -> None:
    text = _run_on_terminal(columns, "plan", "small-4", *TYPED, "--offline", "--explain")
    plain = _strip_styles(text)
    assert "\x1b[" in text
    assert "mistral-small-4" in plain
    assert max(len(line) for line in plain.splitlines()) <= columns


def _run_on_terminal(columns: int, *arguments: str) -> str:
    import pty  # not on Windows

    leader, follower = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(columns), "TERM": "xterm-256color"}
    environment.pop("NO_COLOR", None)
    with subprocess.Popen(
        [sys.executable, "-m", "localmistral", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=follower,
        stderr=subprocess.PIPE,
        env=environment,
    ) as process:
        os.close(follower)
        read = b""
        while True:
            try:
                piece = os.read(leader, 65536)
            except OSError:  # Linux's way to say that the other end is closed
                piece = b""
            if not piece:
                break
            read += piece
        assert process.wait(timeout=240) == 0
    os.close(leader)
    return read.decode()


def _strip_styles(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)
