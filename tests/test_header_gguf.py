"""Header-only files: the sizes and types of the files they imitate, and llama.cpp loads them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from make_header_gguf import MIN_VOCABULARY_SIZE, MODELS, build_files, write_files
from quant_recipes import RECIPES

from localmistral.engine import EngineSettings
from localmistral.engine.dry_load import dry_load
from localmistral.models.gguf import read_shape
from localmistral.models.shape import ModelShape

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "make_header_gguf.py"
GB = 10**9
PUBLISHED_BYTES = (
    ("small-4", "UD-IQ1_M", 32_306_941_632),
    ("small-4", "UD-IQ3_XXS", 42_797_027_008),
    ("small-4", "UD-IQ3_S", 44_407_639_744),
    ("small-4", "UD-IQ4_XS", 58.1 * GB),
    ("small-4", "UD-Q4_K_XL", 7_875_616 + 49_697_757_344 + 24_456_006_464),
    ("small-4", "UD-Q6_K", 99 * GB),
    ("small-4", "Q4_K_M", 72.64 * GB),
    ("small-4", "Q8_0", 126.5 * GB),
    ("medium-3.5", "Q4_K_M", 69.8 * 2**30),
    ("devstral-small-2", "Q4_K_M", 13.3 * 2**30),
    ("small-3.2", "Q4_K_M", 14.3 * GB),
    ("ministral-3-14b", "Q4_K_M", 8_239_593_024),
    ("ministral-3-14b", "Q8_0", 14_359_311_264),
    ("ministral-3-8b", "Q4_K_M", 5_198_911_904),
    ("ministral-3-3b", "Q4_K_M", 2_147_023_008),
)


def read_small(
    folder: Path, model: str, quant: str = "q4_K", types: tuple[tuple[str, str], ...] = ()
) -> ModelShape:
    """With the smallest vocabulary, which is quick to write."""
    files = build_files(model, quant, types=types, vocabulary_size=MIN_VOCABULARY_SIZE)
    return read_shape(write_files(folder / "model.gguf", files)[0])


@pytest.mark.parametrize(("model", "quant", "published"), PUBLISHED_BYTES)
def test_an_imitated_mix_has_the_published_size(model: str, quant: str, published: float) -> None:
    (file,) = build_files(model, quant)
    size = len(file.header()) + file.weight_bytes()
    assert size == pytest.approx(published, rel=0.01)


@pytest.mark.parametrize("quant", [*RECIPES, "q4_K", "mxfp4", "iq2_xxs", "bf16"])
def test_every_quant_makes_a_sound_file_of_every_model(tmp_path: Path, quant: str) -> None:
    for model, spec in MODELS.items():
        shape = read_small(tmp_path, model, quant)
        assert shape.layer_count == spec.layer_count
        assert shape.vocabulary_size == shape.tokenizer.token_count == MIN_VOCABULARY_SIZE
        assert shape.has_tied_embeddings == (model == "ministral-3-3b")


def test_experts_are_fused_and_take_the_published_bytes(tmp_path: Path) -> None:
    mib = {"q8_0": 3264, "q6_K": 2520, "q4_K": 1728, "iq3_xxs": 1176, "iq1_m": 672}
    for quant, expected in mib.items():
        shape = read_small(tmp_path, "small-4", quant)
        assert shape.expert_bytes == (expected * 2**20,) * 36
        names = {tensor.name for tensor in shape.tensors if tensor.layer == 0}
        assert {"blk.0.ffn_gate_up_exps.weight", "blk.0.ffn_down_exps.weight"} <= names


def test_types_can_be_set_by_name_and_the_first_rule_counts(tmp_path: Path) -> None:
    rules = ((r"^blk\.[0-3]\.ffn_down_exps", "q8_0"), ("ffn_down_exps", "q6_K"))
    shape = read_small(tmp_path, "small-4", "q4_K", rules)
    types = [t.type for t in shape.tensors if t.name.endswith("ffn_down_exps.weight")]
    assert types == ["q8_0"] * 4 + ["q6_K"] * 32
    assert {t.type for t in shape.tensors if "gate_up" in t.name} == {"q4_K"}


def test_rows_too_short_for_a_type_are_kept_wider(tmp_path: Path) -> None:
    shape = read_small(tmp_path, "small-4", "q4_K")
    assert {t.type for t in shape.tensors if t.name.endswith("attn_k_b.weight")} == {"q8_0"}


def test_published_mixes_give_some_layers_more_bits(tmp_path: Path) -> None:
    shape = read_small(tmp_path, "ministral-3-8b", "Q4_K_M")
    downs = [t.type for t in shape.tensors if t.name.endswith("ffn_down.weight")]
    assert downs[0] == downs[-1] == "q6_K"
    assert 0.4 < downs.count("q6_K") / len(downs) < 0.6
    output = next(t for t in shape.tensors if t.name == "output.weight")
    assert output.type == "q6_K" and shape.file_type_name == "Q4_K_M"


@pytest.mark.parametrize("model", sorted(MODELS))
def test_llama_cpp_builds_the_graph_of_every_model(tmp_path: Path, model: str) -> None:
    files = build_files(model, "Q4_K_M", vocabulary_size=MIN_VOCABULARY_SIZE)
    paths = write_files(tmp_path / "model.gguf", files)
    report = dry_load(paths, EngineSettings(context=4096, threads=1, devices=("CPU",)))
    assert len(report.layer_devices) == MODELS[model].layer_count + 1
    assert report.find("CPU").compute_bytes > 2**20


def run_script(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), str(out), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_the_command_writes_shards_of_a_mix(tmp_path: Path) -> None:
    out = tmp_path / "small-4.gguf"
    done = run_script(
        out, "--quant", "UD-Q4_K_XL", "--shards", "3", "--vocabulary", "1300",
        "--type", r"^blk\.0\.=q8_0",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    shape = read_shape(tmp_path / "small-4-00002-of-00003.gguf")
    assert len(shape.files) == 3 and shape.vocabulary_size == 1300
    assert {t.type for t in shape.tensors if t.layer == 0} == {"f32", "q8_0"}
    assert {t.type for t in shape.tensors if t.layer == 1} == {"f32", "q8_0", "q6_K", "q4_K"}
    if hasattr(os.stat_result, "st_blocks"):  # not on Windows
        assert sum(file.stat().st_blocks * 512 for file in shape.files) < 2**24


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--type", "q8_0"), "PATTERN=TYPE"),
        (("--type", "exps=q9"), "PATTERN=TYPE"),
        (("--vocabulary", "10"), "--vocabulary takes"),
        (("--shards", "0"), "--shards takes"),
        (("--quant", "Q9"), "invalid choice"),
    ],
)
def test_the_command_refuses_what_makes_no_sense(
    tmp_path: Path, options: tuple[str, ...], said: str
) -> None:
    done = run_script(tmp_path / "m.gguf", *options)
    assert done.returncode == 2 and said in done.stderr
    assert not list(tmp_path.iterdir())
