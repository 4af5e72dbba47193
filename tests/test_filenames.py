"""What GGUF file names say."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localmistral.models.filenames import (
    FileName,
    fold_base,
    fold_name,
    group_files,
    match_quant,
    parse_file_name,
    shard_paths,
    shard_siblings,
)


@pytest.mark.parametrize(
    ("file_name", "base", "quant"),
    [
        ("Mistral-Small-4-119B-2603-UD-IQ3_S.gguf", "Mistral-Small-4-119B-2603", "UD-IQ3_S"),
        ("Mistral-Small-4-119B-2603-MXFP4_MOE.gguf", "Mistral-Small-4-119B-2603", "MXFP4_MOE"),
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct", "Q4_1"),
        ("ggml-model-q4_k_m.gguf", "ggml-model", "Q4_K_M"),
        ("x-bf16.GGUF", "x", "BF16"),
        ("y.i1-IQ2_M.gguf", "y", "IQ2_M"),
        ("Q8_0.gguf", "", "Q8_0"),
        ("model.gguf", "model", None),
        ("Qwen3-Q8.gguf", "Qwen3-Q8", None),
        ("SQ4_0.gguf", "SQ4_0", None),
        ("x-Q4_K_M-v2.gguf", "x-Q4_K_M-v2", None),
        (".gguf", "", None),
    ],
)
def test_base_and_quant_are_told_apart(file_name: str, base: str, quant: str | None) -> None:
    assert parse_file_name(file_name) == FileName(base=base, quant=quant, role="model")


@pytest.mark.parametrize(
    ("file_name", "shard", "shards"),
    [
        ("x-Q8_0-00002-of-00003.gguf", 2, 3),
        ("x-Q8_0-00000-of-00003.gguf", 1, 1),
        ("x-Q8_0-00004-of-00003.gguf", 1, 1),
        ("x-Q8_0-2-of-3.gguf", 1, 1),
    ],
)
def test_only_possible_shard_numbers_are_shards(file_name: str, shard: int, shards: int) -> None:
    name = parse_file_name(file_name)
    assert (name.shard, name.shards) == (shard, shards)
    if shards > 1:
        assert (name.base, name.quant) == ("x", "Q8_0")


@pytest.mark.parametrize(
    ("file_name", "base", "quant"),
    [
        ("mmproj-F16.gguf", "", "F16"),
        ("mmproj-M-8B-Q8_0.gguf", "M-8B", "Q8_0"),
        ("M-14B-BF16-mmproj.gguf", "M-14B", "BF16"),
        ("M-24B-mmproj-BF16.gguf", "M-24B", "BF16"),
        ("M.mmproj-f16.gguf", "M", "F16"),
    ],
)
def test_an_image_encoder_is_one_wherever_its_name_says_so(
    file_name: str, base: str, quant: str
) -> None:
    assert parse_file_name(file_name) == FileName(base=base, quant=quant, role="mmproj")


def test_files_are_grouped_by_folder_name_and_number_of_shards() -> None:
    names = [
        "a/x-00001-of-00002.gguf",
        "a/x-00002-of-00002.gguf",
        "b/x-00002-of-00002.gguf",
        "a/x-00001-of-00003.gguf",
        "a/x.gguf",
        "a/mmproj-F16.gguf",
        "a/x-imatrix.gguf",
        "a/readme.md",
    ]
    sets = {str(s.first): s.missing for s in group_files(Path(name) for name in names)}
    assert sets == {
        str(Path("a/mmproj-F16.gguf")): (),
        str(Path("a/x-00001-of-00002.gguf")): (),
        str(Path("a/x-00001-of-00003.gguf")): (2, 3),
        str(Path("a/x.gguf")): (),
        str(Path("b/x-00001-of-00002.gguf")): (1,),
    }


def test_siblings_and_shard_paths_agree() -> None:
    paths = shard_paths("Q8_0/x-Q8_0.gguf", 3)
    assert paths[2] == "Q8_0/x-Q8_0-00003-of-00003.gguf"
    assert shard_siblings(Path(paths[1])) == tuple(Path(path) for path in paths)
    assert shard_paths("x.gguf", 1) == ("x.gguf",)
    assert shard_siblings(Path("x.gguf")) == (Path("x.gguf"),)


@pytest.mark.parametrize(
    ("asked", "available", "meant"),
    [
        ("q4_k_m", ("UD-Q4_K_M", "Q4_K_M"), "Q4_K_M"),
        ("UD-Q4_K_M", ("UD-Q4_K_M", "Q4_K_M"), "UD-Q4_K_M"),
        ("Q4_K_XL", ("UD-Q4_K_XL", "Q4_K_M"), "UD-Q4_K_XL"),
        ("ud-q8_0", ("Q8_0",), "Q8_0"),
        ("q4km", ("Q4_K_M", "Q4_K_S"), "Q4_K_M"),
        ("Q4_K", ("Q4_K_M", "Q4_K_S"), None),
        ("", ("Q4_K_M",), None),
        ("Q8_0", (), None),
    ],
)
def test_a_quant_is_matched_without_case_separators_or_ud(
    asked: str, available: tuple[str, ...], meant: str | None
) -> None:
    assert match_quant(asked, available) == meant


def test_names_are_compared_in_one_form() -> None:
    assert fold_name(" Mistral_Small  4 ") == "mistral-small-4"
    assert fold_base("mistralai_Mistral-Small-4-119B-2603") == "mistral-small-4-119b-2603"


@given(st.text(max_size=60))
def test_any_name_is_taken_apart(text: str) -> None:
    name = parse_file_name(text + ".gguf")
    assert 1 <= name.shard <= name.shards
