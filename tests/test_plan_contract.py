"""Plans through the command line against an oracle of their own: exact bytes, working hints."""

import json
import os
import random
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from make_header_gguf import build_files, write_files
from plan_oracle import (
    KV_F16_BYTES,
    check_cache,
    check_document,
    check_small_4_buffers,
    check_weights,
    largest_expert,
)

from localmistral.cli import main
from localmistral.models.gguf import read_shape

Run = Callable[..., tuple[int, str, str]]
HEADERS = {
    "small-4": ("UD-IQ3_XXS", "mistral-small-4"),
    "ministral-3-3b": ("q8_0", "ministral-3-3b"),  # its output is its embedding
    "small-3.2": ("q4_K", "mistral-small-3.2"),
}
SIZES = (2, 4, 6, 8, 10, 12, 16, 20, 24, 32, 48, 80, 96)
RAM = (8, 16, 24, 32, 64, 96, 128, 256, 512)
FIXED = (
    ("--context", "1000"),
    ("--context", "64k"),
    ("--kv-type", "q8_0"),
    ("--kv-type", "q4_0"),
    ("--gpu-layers", "20"),
    ("--tensor-split", "3,1"),
    ("--parallel", "3"),
    ("--prefer", "speed"),
    ("--prefer", "context"),
    ("--ubatch", "256"),
    ("--depth", "300k"),
)


@pytest.fixture(scope="module")
def headers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("headers")
    return {
        model: write_files(folder / f"{model}.gguf", build_files(model, quant))[0]
        for model, (quant, _) in HEADERS.items()
    }


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The program in this process: exit code, stdout, stderr. Nothing is on the disk."""
    for name in ("HF_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("LOCALMISTRAL_MODELS", "LOCALMISTRAL_RPC"):
        monkeypatch.delenv(name, raising=False)

    def call(*arguments: str) -> tuple[int, str, str]:
        code = main([*arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def draw(seed: int) -> list[str]:
    """A machine and perhaps a fixed value, always the same for a seed."""
    draws = random.Random(seed)
    count = draws.choice((0, 1, 1, 2, 2, 3, 4, 8))
    cards = [f"{draws.choice(SIZES)}GiB" for _ in range(count)]
    cards = [cards[0]] * count if cards and draws.random() < 0.4 else cards
    machine = [word for card in cards for word in ("--gpu", card)] or ["--cpu-only"]
    fixed = draws.choice(FIXED) if draws.random() < 0.5 else ()
    return [*machine, "--ram", f"{draws.choice(RAM)}GiB", *fixed]


@pytest.mark.parametrize(
    "seed",
    [pytest.param(n, marks=() if n < 6 else pytest.mark.slow) for n in range(24)],
)
def test_every_byte_of_a_plan_for_a_header_is_where_the_contract_puts_it(
    seed: int, headers: dict[str, Path], run: Run
) -> None:
    model = list(HEADERS)[seed % len(HEADERS)]
    arguments = ["plan", str(headers[model]), *draw(seed), "--offline", "--json"]
    code, out, err = run(*arguments)
    if code:
        check_refusal(arguments, code, out, err, run)
        return
    document: dict[str, Any] = json.loads(out)
    shape = read_shape(headers[model])
    parallel = int(arguments[arguments.index("--parallel") + 1] if "--parallel" in arguments else 1)
    check_document(document, layers=shape.layer_count, limit=shape.context_length)
    check_weights(document, shape)
    check_cache(document, KV_F16_BYTES[HEADERS[model][1]], shape.layer_count, parallel)
    if model == "small-4" and document["gpu_layers"] == 37 and parallel == 1:
        in_ram = largest_expert(shape, document["cpu_expert_layers"])
        check_small_4_buffers(document, in_ram)


def check_refusal(arguments: list[str], code: int, out: str, err: str, run: Run) -> None:
    """A sentence with bytes and the device, and a command that works where there can be one."""
    assert (code, out) == (1, "")
    sentence, hint = err.splitlines()[-2:]
    assert sentence.startswith("error: ") and "Traceback" not in err
    command = hint.partition(": localmistral ")[2]
    if command:
        assert os.name == "nt" or run(*shlex.split(command))[0] == 0, hint
    else:
        assert hint == "Take a smaller model: localmistral models"
        assert " bytes)." in sentence


@pytest.mark.skipif(os.name == "nt", reason="shlex doesn't read Windows' quoting")
@pytest.mark.parametrize(
    "arguments",
    [
        "small-4:UD-Q4_K_M --gpu 8GiB --ram 16GiB",
        "-m small-4:Q8_0 --gpu 24GiB --ram 64GiB",
        "--model=small-4 --quant=Q8_0 --gpu 24GiB --ram 64GiB",
        "ministral-3-8b --gpu 8GiB --ram 16GiB --context 900k",
        "ministral-3-8b --gpu 8GiB --ram 16GiB --context=200k --kv-type f32",
        "small-3.2 --gpu 24GiB --ram 32GiB --gpu-layers 41 --quant Q4_K_M --context 131072",
        "small-4 --gpu 2x24GiB --ram 64GiB --min-speed 900",
        "small-4 --gpu 24GiB --gpu 6GiB --ram 64GiB --cpu-experts none --gpu-layers 37",
        "small-4 --cpu-only --ram 64GiB --gpu-layers 5",
        "small-4 --gpu 24GiB --ram 64GiB --tensor-split 1,1",
        "ministral-3-8b --gpu 24GiB --ram 64GiB --cpu-experts 0-3",
        "small-4 --gpu 24GiB --ram 64GiB --cpu-experts 0-99",
        "small-4 --gpu 24GiB --ram 64GiB --split-mode tensor",
    ],
)
def test_the_hint_of_a_refusal_is_a_command_that_works(arguments: str, run: Run) -> None:
    code, out, err = run("plan", *arguments.split(), "--offline")
    assert (code, out) == (1, "")
    hint = err.splitlines()[-1]
    command = hint.partition(": localmistral ")[2]
    assert command.startswith("plan ")
    assert run(*shlex.split(command))[0] == 0, hint


@pytest.mark.parametrize(
    ("arguments", "decode", "prefill"),
    [
        ("small-4:Q4_K_M --gpu rtx-pro-6000 --ram 64GiB --depth 4k", 186, 3752),
        ("small-4:UD-IQ3_XXS --gpu 2x3090 --ram 64GiB --kv-type q8_0 --depth 8k", 92.9, 2151),
    ],
)
def test_published_speeds_are_predicted_within_a_tenth(
    arguments: str, decode: float, prefill: float, run: Run
) -> None:
    code, out, _ = run("plan", *arguments.split(), "--offline", "--json")
    assert code == 0
    predicted = json.loads(out)["predicted"]
    assert predicted["decode_tokens_per_second"] == pytest.approx(decode, rel=0.1)
    assert predicted["prefill_tokens_per_second"] == pytest.approx(prefill, rel=0.1)


@pytest.mark.parametrize(
    ("arguments", "model"),
    [
        ("--gpu 3060 --ram 64GiB", "ministral-3-14b"),
        ("--gpu 8GiB --ram 48GiB", "ministral-3-8b"),
        ("--cpu-only --ram 40GiB", "ministral-3-3b"),
        ("--gpu 3060 --ram 64GiB --quant UD-IQ1_M", "mistral-small-4"),
    ],
)
def test_a_sibling_is_better_than_one_or_two_bits_unless_those_are_asked_for(
    arguments: str, model: str, run: Run
) -> None:
    code, out, _ = run("plan", "small-4", *arguments.split(), "--offline", "--json")
    assert code == 0
    document = json.loads(out)
    assert document["model"] == model
    said = any("1 or 2 bits" in reason for reason in document["reasons"])
    assert said == (model != "mistral-small-4")
