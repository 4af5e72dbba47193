"""The GGUF reader: what it reads, and that nothing wrong gets past it."""

import ctypes
import os
import random
import struct
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gguf_writer import (
    TOKENS,
    Gguf,
    TensorSpec,
    Typed,
    tiny_llama,
    tiny_llama_tensors,
    tiny_mistral4,
    tiny_mistral4_tensors,
)
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from malformed_gguf import CASES

from localmistral.errors import ModelFileError
from localmistral.models import hyperparameters
from localmistral.models.gguf import read_shape, read_vocabulary
from localmistral.models.header import ValueType
from localmistral.models.shape import (
    FileKind,
    ModelShape,
    SpecialTokens,
    TensorRole,
    TokenType,
    require_runnable,
    role_of,
)
from localmistral.models.tensor_types import TENSOR_TYPES

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "make_header_gguf.py"
MIB = 1 << 20


def _written(folder: Path, gguf: Gguf, name: str = "model.gguf") -> Path:
    path = folder / name
    path.write_bytes(gguf.data())
    return path


def _refusal(path: Path) -> ModelFileError:
    with pytest.raises(ModelFileError) as caught:
        read_shape(path)
    return caught.value


# what is wrong with a file


@pytest.mark.parametrize("name", CASES)
def test_a_malformed_file_is_refused_with_one_sentence(name: str, tmp_path: Path) -> None:
    data, phrase = CASES[name]
    path = tmp_path / "broken.gguf"
    path.write_bytes(data)
    error = _refusal(path)
    assert phrase in error.message
    assert error.message.startswith("broken.gguf ")
    assert error.message.endswith(".")
    assert error.message.isprintable() and len(error.message) < 250
    assert error.hint


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    assert "There is no file nothing.gguf" in _refusal(tmp_path / "nothing.gguf").message


def test_a_directory_is_said_to_be_one(tmp_path: Path) -> None:
    assert "is a directory" in _refusal(tmp_path).message


def test_a_path_with_a_zero_byte_is_refused() -> None:
    assert "can't be read" in _refusal(Path("a\0b.gguf")).message


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_refused_without_waiting_on_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")  # type: ignore[attr-defined,unused-ignore]
    assert "not a regular file" in _refusal(tmp_path / "pipe.gguf").message


def test_every_truncation_of_a_small_file_is_refused(tmp_path: Path) -> None:
    data = tiny_llama().data()
    header = len(tiny_llama().header())
    for size in [*range(0, header, 7), *range(header, len(data), 5003)]:
        path = tmp_path / "cut.gguf"
        path.write_bytes(data[:size])
        assert _refusal(path).message.startswith("cut.gguf ")


def test_a_truncated_real_model_is_refused_with_both_sizes(
    smollm2_path: Path, tmp_path: Path
) -> None:
    whole = smollm2_path.stat().st_size
    path = tmp_path / "cut.gguf"
    path.write_bytes(smollm2_path.read_bytes())
    for size in [whole - 1, *(whole * part // 32 for part in range(31, 0, -1))]:
        os.truncate(path, size)
        message = _refusal(path).message
        assert "is cut short" in message and f"the file has {size:,}" in message
    rng = random.Random(1)
    for size in sorted((rng.randrange(1, 1_500_000) for _ in range(30)), reverse=True):
        os.truncate(path, size)
        assert f"the file has {size:,}" in _refusal(path).message or size < 4


def test_a_file_can_be_replaced_after_reading_and_after_failing(tmp_path: Path) -> None:
    good = _written(tmp_path, tiny_llama())
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(tiny_llama().data()[:-9])
    read_shape(good)
    read_vocabulary(good)
    _refusal(bad)
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(tmp_path) not in maps.read_text(encoding="utf-8")
    good.replace(bad)
    assert read_shape(bad).layer_count == 2


# what a sound file says


def test_a_dense_model_is_read_in_full(tmp_path: Path) -> None:
    path = _written(tmp_path, tiny_llama())
    shape = read_shape(path)
    assert shape.files == (path,) and shape.file_bytes == (path.stat().st_size,)
    assert (shape.version, shape.kind, shape.architecture) == (3, FileKind.MODEL, "llama")
    assert (shape.name, shape.size_label, shape.file_type_name) == ("Tiny", "", "F32")
    assert (shape.layer_count, shape.embedding_length, shape.context_length) == (2, 64, 512)
    assert shape.feed_forward_lengths == (96, 96)
    assert (shape.head_counts, shape.kv_head_counts) == ((4, 4), (2, 2))
    assert (shape.key_length, shape.value_length) == (16, 16)
    assert (shape.expert_count, shape.sliding_window) == (0, 0)
    assert shape.rope.dimension_count == 16 and shape.rope.scaling == "none"
    assert shape.vocabulary_size == len(TOKENS)
    assert shape.tokenizer.special == SpecialTokens(bos=1, eos=2)
    assert (shape.tokenizer.add_bos, shape.tokenizer.add_eos) == (True, None)
    assert shape.tokenizer.chat_template == "{{ messages[0].content }}"
    require_runnable(shape)


def test_latent_attention_and_experts_are_read(tmp_path: Path) -> None:
    shape = read_shape(_written(tmp_path, tiny_mistral4()))
    assert shape.has_latent_attention and shape.kv_head_counts == (1, 1)
    assert (shape.key_length, shape.value_length) == (48, 32)
    assert (shape.key_length_mla, shape.value_length_mla) == (32, 32)
    assert (shape.q_lora_rank, shape.kv_lora_rank) == (32, 32)
    assert (shape.expert_count, shape.expert_used_count, shape.expert_shared_count) == (4, 2, 1)
    assert shape.expert_feed_forward_length == 32
    assert (shape.rope.scaling, shape.rope.factor) == ("yarn", 8.0)
    assert shape.rope.original_context_length == 512


def test_bytes_are_summed_by_role(tmp_path: Path) -> None:
    shape = read_shape(_written(tmp_path, tiny_mistral4()))
    specs = tiny_mistral4_tensors()
    routed = [spec for spec in specs if "_exps" in spec.name]
    assert shape.expert_bytes == (sum(spec.bytes for spec in routed) // 2,) * 2
    assert shape.embedding_bytes == 64 * len(TOKENS) * 4
    assert shape.output_bytes == 64 * len(TOKENS) * 4 + 64 * 4
    assert shape.weight_bytes == sum(spec.bytes for spec in specs)
    ends = shape.embedding_bytes + shape.output_bytes
    assert sum(shape.dense_bytes) + sum(shape.expert_bytes) + ends == shape.weight_bytes
    assert not shape.has_tied_embeddings


def test_a_missing_output_tensor_shows_as_tied_embeddings(tmp_path: Path) -> None:
    assert read_shape(_written(tmp_path, tiny_llama())).has_tied_embeddings


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("token_embd.weight", TensorRole.EMBEDDING),
        ("output.weight", TensorRole.OUTPUT),
        ("output_norm.weight", TensorRole.OUTPUT),
        ("rope_freqs.weight", TensorRole.OTHER),
        ("blk.0.ffn_gate_up_exps.weight", TensorRole.EXPERT),
        ("blk.11.ffn_down_exps.weight", TensorRole.EXPERT),
        ("blk.3.ffn_up_exps.weight", TensorRole.EXPERT),
        ("blk.3.ffn_gate_exps.bias", TensorRole.EXPERT),
        ("blk.3.ffn_gate_chexps.weight", TensorRole.EXPERT),
        ("blk.3.ffn_gate_shexp.weight", TensorRole.DENSE),
        ("blk.3.ffn_gate_inp.weight", TensorRole.DENSE),
        ("blk.3.exp_probs_b.bias", TensorRole.DENSE),
        ("blk.3.ffn_gate.weight", TensorRole.DENSE),
    ],
)
def test_only_routed_experts_count_as_experts(name: str, role: TensorRole) -> None:
    assert role_of(name) is role


def test_heads_and_widths_may_differ_by_layer(tmp_path: Path) -> None:
    changes = {
        "llama.attention.head_count": [4, 0],
        "llama.attention.head_count_kv": [2, 0],
        "llama.feed_forward_length": Typed(ValueType.UINT32, [96, 48]),
    }
    shape = read_shape(_written(tmp_path, tiny_llama(changes)))
    assert shape.head_counts == (4, 0) and shape.kv_head_counts == (2, 0)
    assert shape.feed_forward_lengths == (96, 48)


def test_a_recurrent_model_needs_no_heads(tmp_path: Path) -> None:
    changes = {"llama.attention.head_count": 0, "llama.ssm.state_size": 16}
    shape = read_shape(_written(tmp_path, tiny_llama(changes)))
    assert shape.head_counts == (0, 0) and shape.key_length == 0


@pytest.mark.parametrize(
    ("pattern", "period", "layers"),
    [(6, 6, ()), ([True, False], 0, (True, False)), ([1, 0], 0, (True, False))],
)
def test_a_sliding_window_comes_with_a_period_or_with_a_list(
    pattern: Any, period: int, layers: tuple[bool, ...], tmp_path: Path
) -> None:
    key = "llama.attention.sliding_window"
    shape = read_shape(_written(tmp_path, tiny_llama({key: 128, f"{key}_pattern": pattern})))
    assert shape.sliding_window == 128
    assert (shape.sliding_window_period, shape.sliding_window_layers) == (period, layers)


def test_version_2_reads_like_version_3(tmp_path: Path) -> None:
    old = read_shape(_written(tmp_path, tiny_llama(version=2)))
    assert replace(old, version=3) == read_shape(_written(tmp_path, tiny_llama()))


@pytest.mark.parametrize("alignment", [32, 64, 4096])
def test_a_stated_alignment_is_followed(alignment: int, tmp_path: Path) -> None:
    gguf = tiny_llama({"general.alignment": alignment}, alignment=alignment)
    assert read_shape(_written(tmp_path, gguf)).layer_count == 2


def test_named_chat_templates_are_kept(tmp_path: Path) -> None:
    changes = {"tokenizer.chat_template.tool_use": "T", "tokenizer.chat_templates": ["tool_use"]}
    shape = read_shape(_written(tmp_path, tiny_llama(changes)))
    assert shape.tokenizer.named_chat_templates == (("tool_use", "T"),)


def test_an_id_of_minus_one_means_no_token(tmp_path: Path) -> None:
    changes = {
        "tokenizer.ggml.unknown_token_id": (1 << 32) - 1,
        "tokenizer.ggml.padding_token_id": len(TOKENS),  # common in fine-tunes, and harmless
        "tokenizer.ggml.prefix_token_id": 5,
    }
    special = read_shape(_written(tmp_path, tiny_llama(changes))).tokenizer.special
    assert special == SpecialTokens(bos=1, eos=2, fim_prefix=5)


def test_the_vocabulary_is_read_on_demand(tmp_path: Path) -> None:
    vocabulary = read_vocabulary(_written(tmp_path, tiny_llama()))
    assert vocabulary.texts == tuple(TOKENS)
    assert vocabulary.types[:4] == (TokenType.CONTROL,) * 3 + (TokenType.NORMAL,)
    assert len(vocabulary.types) == len(TOKENS)


def test_the_real_model_is_read_as_llama_cpp_reads_it(smollm2_path: Path) -> None:
    shape = read_shape(smollm2_path)
    report = _llama_cpp_report(smollm2_path, "dry")
    assert report == [
        shape.parameter_count,
        shape.weight_bytes,
        shape.layer_count,
        shape.embedding_length,
        shape.head_counts[0],
        shape.kv_head_counts[0],
        shape.vocabulary_size,
        shape.context_length,
    ]
    assert read_vocabulary(smollm2_path).texts[:3] == (
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
    )
    assert shape.tokenizer.pre == "smollm"


# other kinds of file


@pytest.mark.parametrize(
    ("metadata", "phrase"),
    [
        ({"general.architecture": "clip", "general.type": "mmproj"}, "is a vision projector"),
        ({"general.architecture": "clip"}, "is a vision projector"),
        ({"general.architecture": "llama", "general.type": "adapter"}, "is a LoRA adapter"),
        ({"general.type": "imatrix"}, "is an importance matrix"),
        ({"general.architecture": "controlvector"}, "is a control vector"),
    ],
)
def test_a_file_that_is_no_language_model_is_read_but_not_run(
    metadata: dict[str, Any], phrase: str, tmp_path: Path
) -> None:
    tensors = [TensorSpec(name="v.blk.0.attn_q.weight"), TensorSpec(name="blk.7.x.lora_a")]
    shape = read_shape(_written(tmp_path, Gguf(metadata=metadata, tensors=tensors)))
    assert shape.kind is not FileKind.MODEL and shape.weight_bytes == 256
    assert shape.dense_bytes == ()
    with pytest.raises(ModelFileError, match=phrase):
        require_runnable(shape)


def test_a_vocabulary_without_weights_is_read_but_not_run(tmp_path: Path) -> None:
    path = _written(tmp_path, tiny_llama(tensors=[]))
    shape = read_shape(path)
    assert shape.is_vocabulary_only and shape.vocabulary_size == len(TOKENS)
    assert read_vocabulary(path).texts == tuple(TOKENS)
    with pytest.raises(ModelFileError, match="vocabulary of 101 tokens but no weights"):
        require_runnable(shape)


def test_a_model_without_a_vocabulary_is_read_but_not_run(tmp_path: Path) -> None:
    changes = {"tokenizer.ggml.model": "none", "llama.vocab_size": len(TOKENS)}
    shape = read_shape(_written(tmp_path, tiny_llama(changes)))
    assert shape.vocabulary_size == len(TOKENS) and shape.tokenizer.token_count == 0
    with pytest.raises(ModelFileError, match="no vocabulary"):
        require_runnable(shape)


# shards


def _shards(folder: Path, count: int = 3, first: dict[str, Any] | None = None) -> list[Path]:
    """A tiny model in shards, the first of metadata only and with `first` changed."""
    tensors = tiny_llama_tensors()
    cuts = [0, *(len(tensors) * n // (count - 1) for n in range(count))]
    paths = []
    for number in range(count):
        split = {
            "split.no": Typed(ValueType.UINT16, number),
            "split.count": Typed(ValueType.UINT16, count),
            "split.tensors.count": Typed(ValueType.INT32, len(tensors)),
            **((first or {}) if number == 0 else {}),
        }
        part = tensors[cuts[number] : cuts[number + 1]]
        gguf = (
            tiny_llama(split, tensors=part) if number == 0 else Gguf(metadata=split, tensors=part)
        )
        paths.append(_written(folder, gguf, f"tiny-{number + 1:05}-of-{count:05}.gguf"))
    return paths


def test_any_shard_stands_for_the_whole_set(tmp_path: Path) -> None:
    paths = _shards(tmp_path)
    shapes = [read_shape(path) for path in paths]
    assert shapes[0] == shapes[1] == shapes[2]
    assert shapes[0].files == tuple(paths)
    assert [tensor.file_index for tensor in shapes[0].tensors] == [1] * 10 + [2] * 10
    single = read_shape(_written(tmp_path, tiny_llama()))
    assert shapes[0].dense_bytes == single.dense_bytes
    assert shapes[0].parameter_count == single.parameter_count
    assert read_vocabulary(paths[2]).texts == tuple(TOKENS)


@pytest.mark.parametrize("asked", [0, 1, 2])
@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_missing_shard_is_named_and_the_present_ones_counted(
    asked: int, missing: int, tmp_path: Path
) -> None:
    paths = _shards(tmp_path)
    paths[missing].unlink()
    message = _refusal(paths[asked]).message
    if asked == missing:
        assert "There is no file" in message and paths[missing].name in message
    else:
        assert f"{paths[missing].name} is missing: 2 of 3 shards are present." == message


def test_a_shard_in_the_place_of_another_is_refused(tmp_path: Path) -> None:
    paths = _shards(tmp_path)
    paths[2].write_bytes(paths[1].read_bytes())
    assert "is shard 2 of 3 by its header, not shard 3 of 3" in _refusal(paths[0]).message


def test_a_first_shard_that_is_another_is_refused(tmp_path: Path) -> None:
    paths = _shards(tmp_path, first={"split.no": Typed(ValueType.UINT16, 1)})
    assert "isn't the first shard" in _refusal(paths[0]).message


def test_a_shard_of_another_set_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    paths, more = _shards(tmp_path), _shards(other, 4)
    paths[2].write_bytes(more[2].read_bytes())
    assert "is shard 3 of 4 by its header, not shard 3 of 3" in _refusal(paths[0]).message


def test_a_file_that_is_no_shard_among_shards_is_refused(tmp_path: Path) -> None:
    paths = _shards(tmp_path)
    paths[1].write_bytes(tiny_llama().data())
    assert "is no shard by its header" in _refusal(paths[0]).message


def test_shards_that_hold_other_tensors_than_promised_are_refused(tmp_path: Path) -> None:
    paths = _shards(tmp_path, first={"split.tensors.count": Typed(ValueType.INT32, 21)})
    assert "promises 21 tensors in 3 shards, but they hold 20" in _refusal(paths[0]).message


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    paths = _shards(tmp_path)
    split = {
        "split.no": Typed(ValueType.UINT16, 2),
        "split.count": Typed(ValueType.UINT16, 3),
    }
    tensors = tiny_llama_tensors()
    _written(tmp_path, Gguf(metadata=split, tensors=[tensors[0], *tensors[11:]]), paths[2].name)
    assert "two shards with tensor 'token_embd.weight'" in _refusal(paths[0]).message


def test_a_renamed_shard_is_refused_with_the_name_it_needs(tmp_path: Path) -> None:
    path = _shards(tmp_path)[0]
    renamed = path.rename(tmp_path / "tiny.gguf")
    assert "isn't named like NAME-00001-of-00003.gguf" in _refusal(renamed).message


def test_split_no_of_another_type_is_refused_before_llama_cpp_asserts_on_it(tmp_path: Path) -> None:
    paths = _shards(tmp_path)
    _written(tmp_path, Gguf(metadata={"split.no": 1}, tensors=()), paths[1].name)
    assert "stores split.no as uint32, not as uint16" in _refusal(paths[0]).message


# against llama.cpp itself


def _llama_cpp_library(name: str) -> Path:
    import llama_cpp

    folder = Path(llama_cpp.__file__).parent / "lib"
    return next(path for path in sorted(folder.iterdir()) if path.stem.removeprefix("lib") == name)


def test_the_type_table_is_ggml_s_own() -> None:
    ggml = ctypes.CDLL(str(_llama_cpp_library("ggml-base")))
    ggml.ggml_type_name.restype = ctypes.c_char_p
    ggml.ggml_type_size.restype = ctypes.c_size_t
    ggml.ggml_blck_size.restype = ctypes.c_int64
    for number, kind in TENSOR_TYPES.items():
        assert ggml.ggml_type_name(number).decode() == kind.name
        assert ggml.ggml_type_size(number) == kind.block_bytes
        assert ggml.ggml_blck_size(number) == kind.block_elements
    gone = set(range(max(TENSOR_TYPES))) - set(TENSOR_TYPES)
    assert all(ggml.ggml_blck_size(number) == 0 for number in gone)


_LOAD = """
import ctypes, sys
import llama_cpp as llama
quiet = llama.llama_log_callback(lambda level, text, data: None)
llama.llama_log_set(quiet, ctypes.c_void_p(0))
params = llama.llama_model_default_params()
params.no_alloc = sys.argv[2] == "dry"
params.load_mode = llama.LLAMA_LOAD_MODE_NONE
model = llama.llama_model_load_from_file(sys.argv[1].encode(), params)
if not model:
    sys.exit("refused")
options = llama.llama_context_default_params()
options.n_ctx, options.n_threads, options.n_batch = 256, 1, 64
context = llama.llama_init_from_model(model, options)
if not context:
    sys.exit("no context")
if sys.argv[2] == "run":
    tokens = (ctypes.c_int32 * 3)(1, 2, 3)
    if llama.llama_decode(context, llama.llama_batch_get_one(tokens, 3)):
        sys.exit("no decode")
vocab = llama.llama_model_get_vocab(model)
print(llama.llama_model_n_params(model), llama.llama_model_size(model))
print(llama.llama_model_n_layer(model), llama.llama_model_n_embd(model))
print(llama.llama_model_n_head(model), llama.llama_model_n_head_kv(model))
print(llama.llama_vocab_n_tokens(vocab), llama.llama_model_n_ctx_train(model))
"""


def _llama_cpp_report(path: Path, mode: str) -> list[int]:
    """Parameters, bytes, layers, width, heads, KV heads, tokens and context by llama.cpp."""
    command = [sys.executable, "-c", _LOAD, str(path), mode]
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()]


@pytest.mark.parametrize("gguf", [tiny_llama(), tiny_llama(version=2), tiny_mistral4()])
def test_the_files_that_the_malformed_ones_start_from_run_in_llama_cpp(
    gguf: Gguf, tmp_path: Path
) -> None:
    path = _written(tmp_path, gguf)
    shape = read_shape(path)
    report = _llama_cpp_report(path, "run")
    assert report[:3] == [shape.parameter_count, shape.weight_bytes, shape.layer_count]


# header-only files


def _make_header(out: Path, *options: str) -> None:
    subprocess.run([sys.executable, str(SCRIPT), str(out), *options], check=True, timeout=120)


def test_a_67_gb_file_of_holes_is_read_without_its_weights(tmp_path: Path) -> None:
    path = tmp_path / "small-4.gguf"
    _make_header(path)
    shape = read_shape(path)
    assert shape.file_bytes[0] > 67e9
    assert shape.parameter_count == 118_972_826_624
    assert shape.expert_bytes == (1728 * MIB,) * 36
    assert shape.vocabulary_size == 131_072 and not shape.has_tied_embeddings
    assert (shape.key_length, shape.value_length, shape.kv_head_counts[0]) == (320, 256, 1)
    texts = read_vocabulary(path).texts
    assert (texts[3], texts[34], texts[36]) == ("[INST]", "[THINK]", "[MODEL_SETTINGS]")
    report = _llama_cpp_report(path, "dry")
    assert report[:3] == [shape.parameter_count, shape.weight_bytes, 36]


def test_a_header_only_model_can_be_made_in_shards(tmp_path: Path) -> None:
    _make_header(
        tmp_path / "m.gguf", "--model", "ministral-3-8b", "--quant", "q8_0", "--shards", "3"
    )
    shape = read_shape(tmp_path / "m-00002-of-00003.gguf")
    assert len(shape.files) == 3 and shape.layer_count == 34
    assert {tensor.type for tensor in shape.tensors} == {"q8_0", "f32"}
    assert _llama_cpp_report(shape.files[0], "dry")[0] == shape.parameter_count


# fuzzing: whatever the bytes, a sound shape or a ModelFileError comes out

_SEEDS = [gguf.header() for gguf in (tiny_llama(), tiny_mistral4(), tiny_llama(version=2))]
_HEADER = len(_SEEDS[0])
_FUZZ = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def _read_or_refuse(folder: Path, data: bytes) -> ModelShape | None:
    path = folder / "fuzz.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        shape = read_shape(path)
        vocabulary = read_vocabulary(path)
    except ModelFileError as error:
        assert len(error.message) < 1000
        return None
    else:
        assert len(vocabulary.texts) == len(vocabulary.types) == shape.tokenizer.token_count
        assert len(shape.dense_bytes) == len(shape.expert_bytes) == shape.layer_count
        return shape
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 8 * MIB + 4 * len(data)


@_FUZZ
@given(
    seed=st.sampled_from(_SEEDS),
    flips=st.lists(
        st.tuples(st.integers(4, 1 << 16), st.sampled_from([0, 1, 2, 127, 128, 255])), max_size=8
    ),
    cut=st.integers(0, 64),
)
def test_flipped_bytes_never_get_past_as_anything_but_a_refusal_or_a_shape(
    seed: bytes, flips: list[tuple[int, int]], cut: int, tmp_path: Path
) -> None:
    data = bytearray(seed + bytes(300_000))
    for place, byte in flips:
        data[4 + place % (len(seed) - 4)] = byte
    _read_or_refuse(tmp_path, bytes(data[: len(data) - cut]))


@_FUZZ
@given(
    first=st.sampled_from(_SEEDS),
    second=st.sampled_from(_SEEDS),
    cut=st.integers(0, _HEADER),
    resume=st.integers(0, _HEADER),
)
def test_spliced_headers_are_refused_or_read(
    first: bytes, second: bytes, cut: int, resume: int, tmp_path: Path
) -> None:
    _read_or_refuse(tmp_path, first[:cut] + second[resume:] + bytes(300_000))


_KEYS = sorted({*tiny_llama().metadata, *tiny_mistral4().metadata})
_VALUES = st.one_of(
    st.integers(0, (1 << 32) - 1),
    st.sampled_from([0, 1, 2, 3, 512, 513, 1 << 31]),
    st.floats(width=32),
    st.booleans(),
    st.text(max_size=5),
    st.lists(st.integers(-5, 5), max_size=4),
    st.lists(st.text(max_size=3), max_size=4),
    st.builds(Typed, st.sampled_from([ValueType.UINT64, ValueType.INT8]), st.integers(0, 100)),
)


@_FUZZ
@given(
    build=st.sampled_from([tiny_llama, tiny_mistral4]),
    changes=st.dictionaries(st.sampled_from(_KEYS), _VALUES, min_size=1, max_size=3),
)
@example(build=tiny_llama, changes={"llama.attention.head_count": [0, 0]})
@example(build=tiny_llama, changes={"general.architecture": "x" * 100_000})
@example(build=tiny_llama, changes={"llama.rope.scaling.type": "\n" * 100_000})
@example(build=tiny_llama, changes={"tokenizer.ggml.scores": []})
@example(build=tiny_llama, changes={"tokenizer.ggml.model": "no_vocab"})
@example(build=tiny_mistral4, changes={"mistral4.expert_used_count": [2, 0]})
@example(build=tiny_mistral4, changes={"mistral4.attention.temperature_scale": float("inf")})
def test_changed_values_are_refused_or_read(
    build: Any, changes: dict[str, Any], tmp_path: Path
) -> None:
    shape = _read_or_refuse(tmp_path, build(changes).data())
    if shape is not None and shape.kind is FileKind.MODEL:
        assert 1 <= shape.layer_count <= hyperparameters.MAX_LAYERS
        assert shape.expert_used_count <= shape.expert_count <= hyperparameters.MAX_EXPERTS
        assert all(tensor.bytes > 0 for tensor in shape.tensors)


def test_a_claimed_list_of_millions_costs_no_memory(tmp_path: Path) -> None:
    claim = struct.pack("<IIQ", 9, 8, 1 << 22)
    data = tiny_llama().data().replace(struct.pack("<IIQ", 9, 8, len(TOKENS)), claim)
    assert _read_or_refuse(tmp_path, data) is None
