"""Shapes worked out from the catalogue, against published sizes and a header's own shape."""

from itertools import pairwise
from pathlib import Path

import pytest
from make_header_gguf import build_files, write_files

from localmistral.models.catalog import Mmproj, Model, Quant, load_catalog
from localmistral.models.estimate import (
    HEADER_BYTES,
    MMPROJ_16_BIT_BYTES,
    estimate_bytes,
    estimate_mmproj_bytes,
    estimate_shape,
)
from localmistral.models.gguf import read_shape
from localmistral.models.shape import ModelShape, TensorRole, require_runnable

SIZED = [
    (model, quant)
    for model in load_catalog().models
    for quant in model.quants
    if estimate_bytes(model, quant) is not None
]


def estimate(name: str, quant_name: str) -> ModelShape:
    model = load_catalog().find(name)
    assert model is not None
    return estimate_shape(model, next(q for q in model.quants if q.name == quant_name))


@pytest.mark.parametrize(
    ("model", "quant"), SIZED, ids=lambda value: value.name if value is not None else ""
)
class TestEveryQuantOfKnownSize:
    def test_has_files_of_exactly_that_size(self, model: Model, quant: Quant) -> None:
        shape = estimate_shape(model, quant)
        assert sum(shape.file_bytes) == estimate_bytes(model, quant)
        if quant.files:
            assert [path.as_posix() for path in shape.files] == [f.path for f in quant.files]
        known = [file.bytes for file in quant.files if file.bytes]
        assert not known or list(shape.file_bytes) == known

    def test_has_weights_of_that_size_within_1_percent(self, model: Model, quant: Quant) -> None:
        shape = estimate_shape(model, quant)
        total = sum(shape.file_bytes)
        assert abs(shape.weight_bytes + HEADER_BYTES - total) <= 0.01 * total

    def test_is_a_model_that_planning_takes(self, model: Model, quant: Quant) -> None:
        shape = estimate_shape(model, quant)
        require_runnable(shape)
        assert shape.architecture == model.arch
        assert len(shape.dense_bytes) == shape.layer_count == len(shape.kv_head_counts)
        assert all(shape.dense_bytes)
        assert all(shape.expert_bytes) == bool(model.shape.experts)
        assert shape.parameter_count == pytest.approx(model.parameters_billions * 1e9, rel=0.15)


@pytest.mark.parametrize(
    ("name", "quant"),
    [
        ("ministral-3-14b", "Q4_K_M"),
        ("ministral-3-14b", "Q8_0"),
        ("ministral-3-8b", "Q4_K_M"),
        ("ministral-3-8b", "Q5_K_M"),
        ("ministral-3-3b", "Q4_K_M"),
        ("ministral-3-14b-reasoning", "Q4_K_M"),
        ("ministral-3-8b-reasoning", "Q4_K_M"),
        ("ministral-3-3b-reasoning", "Q4_K_M"),
    ],
)
def test_the_published_mixes_come_out_to_the_size_of_a_header(name: str, quant: str) -> None:
    """llama.cpp's own rule for these names: nothing but vocabulary and metadata is unaccounted."""
    shape = estimate(name, quant)
    rest = sum(shape.file_bytes) - shape.weight_bytes
    assert 7_800_000 < rest < 8_500_000


def test_small_4_has_its_published_number_of_parameters() -> None:
    shape = estimate("small-4", "UD-Q4_K_XL")
    experts = sum(t.elements for t in shape.tensors if t.role is TensorRole.EXPERT)
    assert shape.parameter_count == 118_972_826_624
    assert experts == 36 * 128 * 3 * 4096 * 2048


@pytest.mark.parametrize(
    ("model", "header_model", "type_name"),
    [("small-4", "small-4", "q8_0"), ("ministral-3-8b", "ministral-3-8b", "q8_0")],
)
def test_an_estimate_has_the_tensors_and_lengths_of_a_real_header(
    model: str, header_model: str, type_name: str, tmp_path: Path
) -> None:
    (path,) = write_files(tmp_path / "m.gguf", build_files(header_model, type_name))
    real, guess = read_shape(path), estimate(model, "Q8_0")
    assert {t.name: t.dims for t in guess.tensors} == {t.name: t.dims for t in real.tensors}
    for field in (
        "architecture",
        "layer_count",
        "embedding_length",
        "vocabulary_size",
        "feed_forward_lengths",
        "head_counts",
        "kv_head_counts",
        "key_length",
        "value_length",
        "key_length_mla",
        "value_length_mla",
        "q_lora_rank",
        "kv_lora_rank",
        "expert_count",
        "expert_used_count",
        "expert_shared_count",
        "expert_feed_forward_length",
        "sliding_window",
        "has_latent_attention",
        "has_tied_embeddings",
    ):
        assert getattr(guess, field) == getattr(real, field), field
    assert guess.rope.dimension_count == real.rope.dimension_count


@pytest.mark.parametrize(
    ("name", "bytes_per_token"),
    [
        ("ministral-3-14b", 163_840),
        ("ministral-3-8b", 139_264),
        ("ministral-3-3b", 106_496),
        ("magistral-small", 163_840),
        ("devstral-small-2", 163_840),
        ("small-3.2", 163_840),
        ("small-4", 23_040),
        ("leanstral", 23_040),
    ],
)
def test_the_cache_takes_the_published_bytes_per_token(name: str, bytes_per_token: int) -> None:
    shape = estimate(name, "Q4_K_M")
    values = 0 if shape.has_latent_attention else shape.value_length
    cached = sum(heads * (shape.key_length + values) for heads in shape.kv_head_counts)
    assert 2 * cached == bytes_per_token


def test_a_larger_quant_of_a_model_never_has_smaller_experts_in_sum() -> None:
    sized = sorted(
        (sum(shape.file_bytes), sum(shape.expert_bytes))
        for model, quant in SIZED
        if model.name == "mistral-small-4"
        for shape in [estimate_shape(model, quant)]
    )
    experts = [size for _, size in sized]
    assert len(experts) > 8
    assert all(b >= 0.99 * a for a, b in pairwise(experts))


def test_a_quant_of_unknown_size_has_no_shape() -> None:
    with pytest.raises(ValueError, match="UD-Q5_K_XL is unknown"):
        estimate("small-4", "UD-Q5_K_XL")


def test_a_published_mix_of_a_dense_model_needs_no_size() -> None:
    shape = estimate("nemo", "Q4_K_M")
    assert sum(shape.file_bytes) == pytest.approx(7.48e9, rel=0.01)
    assert {t.type for t in shape.tensors} == {"q4_K", "q6_K", "f32"}


def test_a_sharded_quant_of_rounded_size_is_shared_out_to_the_byte() -> None:
    shape = estimate("small-4", "UD-IQ4_XS")
    assert len(shape.files) == 3
    assert sum(shape.file_bytes) == 58_100_000_000
    assert max(shape.file_bytes) - min(shape.file_bytes) <= 1


def test_an_encoder_of_unknown_size_is_taken_for_one_of_its_type() -> None:
    encoders: dict[str, Mmproj] = {
        repository.mmproj.file.path: repository.mmproj
        for model in load_catalog().models
        for repository in model.repositories
        if repository.mmproj
    }
    by_type = {path: estimate_mmproj_bytes(mmproj) for path, mmproj in encoders.items()}
    assert by_type["Ministral-3-8B-Instruct-2512-BF16-mmproj.gguf"] == MMPROJ_16_BIT_BYTES
    half = by_type["mmproj-Ministral-3-8B-Instruct-2512-Q8_0.gguf"]
    assert half == int(MMPROJ_16_BIT_BYTES * 8.5 / 16)
    assert estimate_mmproj_bytes(encoders["mmproj-F16.gguf"]) in (857_078_496, 5_357_971_702)
