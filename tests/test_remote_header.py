"""Headers read in pieces: what is moved, what is borrowed, and that the shape is the file's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from gguf_writer import TOKENS, Gguf, TensorSpec, tiny_llama, tiny_llama_tensors

from localmistral.errors import ModelFileError
from localmistral.models import shape_cache
from localmistral.models.gguf import join_headers, read_shape
from localmistral.models.header import IncompleteHeaderError, read_header
from localmistral.models.metadata import Metadata
from localmistral.models.remote_header import (
    FIRST_BYTES,
    Lender,
    make_lender,
    read_borrowing,
    read_whole,
)
from localmistral.models.shape import ModelShape

WORDS = [*TOKENS, *(f"word{n:06}" for n in range(20_000))]


def large(quant: str = "q8_0", *, words: list[str] = WORDS, name: str = "Tiny") -> Gguf:
    """A tiny model with a vocabulary of some 800 kB."""
    tensors = [
        TensorSpec(name="token_embd.weight", dims=(64, len(words)), type=quant),
        *tiny_llama_tensors()[1:],
    ]
    return tiny_llama(
        {
            "general.name": name,
            "tokenizer.ggml.tokens": words,
            "tokenizer.ggml.token_type": [3, 3, 3] + [1] * (len(words) - 3),
            "tokenizer.ggml.merges": ["h e", "l l"] * 8_000,
        },
        tensors=tensors,
    )


class Remote:
    """A file's bytes behind ranges, and how many were asked for."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.ranges: list[tuple[int, int]] = []

    def __call__(self, start: int, end: int) -> bytes:
        self.ranges.append((start, end))
        return self.data[start:end]

    @property
    def moved(self) -> int:
        return sum(min(end, len(self.data)) - start for start, end in self.ranges)


def shape_of(metadata: Metadata, file_bytes: int) -> ModelShape:
    return join_headers([Path("model.gguf")], [file_bytes], [metadata.header], metadata)


def shape_on_disk(data: bytes, folder: Path) -> ModelShape:
    path = folder / "model.gguf"
    path.write_bytes(data)
    return replace(read_shape(path), files=(Path("model.gguf"),))


def lend(file: Gguf) -> Lender:
    data = file.data()
    lender = make_lender(read_whole(Remote(data), len(data), "lender.gguf"))
    assert lender is not None
    return lender


@pytest.mark.parametrize("file", [tiny_llama(), large()], ids=["small", "large"])
def test_a_header_read_in_steps_is_the_one_on_disk(file: Gguf, tmp_path: Path) -> None:
    data = file.data() + bytes(3 << 20)
    remote = Remote(data)
    shape = shape_of(read_whole(remote, len(data), "model.gguf"), len(data))
    assert shape == shape_on_disk(data, tmp_path)
    assert remote.moved < len(file.header()) * 2 + FIRST_BYTES
    assert [start for start, _ in remote.ranges[1:]] == [end for _, end in remote.ranges[:-1]]


def test_another_quant_of_the_model_borrows_the_vocabulary(tmp_path: Path) -> None:
    lender = lend(large("q8_0"))
    data = large("f16").data()
    remote = Remote(data)
    metadata, borrowed = read_borrowing(remote, len(data), "model.gguf", lender)
    assert borrowed
    assert shape_of(metadata, len(data)) == shape_on_disk(data, tmp_path)
    assert remote.moved < 16 << 10 < len(lender.body)


def test_a_longer_name_in_front_of_the_vocabulary_changes_nothing(tmp_path: Path) -> None:
    lender = lend(large())
    data = large(name="Tiny, but with a name that moves everything behind it by an odd 61").data()
    metadata, borrowed = read_borrowing(Remote(data), len(data), "model.gguf", lender)
    assert borrowed
    assert shape_of(metadata, len(data)) == shape_on_disk(data, tmp_path)


def test_a_lender_without_tensors_serves_files_that_have_them(tmp_path: Path) -> None:
    whole = large()
    lender = lend(Gguf(metadata=whole.metadata))
    many = [
        *whole.tensors,
        *(TensorSpec(name=f"blk.1.extra_{n:050}", dims=(64,)) for n in range(2000)),
    ]
    data = Gguf(metadata=whole.metadata, tensors=many).data()
    remote = Remote(data)
    metadata, borrowed = read_borrowing(remote, len(data), "model.gguf", lender)
    assert borrowed
    assert shape_of(metadata, len(data)) == shape_on_disk(data, tmp_path)
    assert remote.moved < 400 << 10


@pytest.mark.parametrize(
    "change",
    [
        lambda words: [*words[:-1], "another word"],
        lambda words: [*words, "one more"],
        lambda words: words[:-1],
        lambda words: ["<other>", *words[1:]],
        lambda words: TOKENS,
    ],
    ids=["last longer", "more", "fewer", "first differs", "small"],
)
def test_another_vocabulary_is_noticed_and_read_whole(
    change: Callable[[list[str]], list[str]], tmp_path: Path
) -> None:
    data = large(words=change(WORDS)).data()
    metadata, borrowed = read_borrowing(Remote(data), len(data), "model.gguf", lend(large()))
    assert not borrowed
    assert shape_of(metadata, len(data)) == shape_on_disk(data, tmp_path)


def test_a_header_without_a_large_vocabulary_lends_nothing() -> None:
    data = tiny_llama().data()
    assert make_lender(read_whole(Remote(data), len(data), "model.gguf")) is None


def test_values_of_the_model_between_vocabulary_lists_are_not_lent() -> None:
    pairs = list(dict(large().metadata).items())
    index = [key for key, _ in pairs].index("tokenizer.ggml.token_type")
    pairs.insert(index, ("llama.expert_count", 0))
    data = Gguf(metadata=pairs, tensors=large().tensors).data()
    assert make_lender(read_whole(Remote(data), len(data), "model.gguf")) is None


@pytest.mark.parametrize(
    ("data", "words"),
    [(b"<!DOCTYPE html><html>" + bytes(5000), "HTML"), (b'{"error": "no"}' * 99, "JSON")],
)
def test_something_else_than_a_model_is_said_as_for_files(data: bytes, words: str) -> None:
    with pytest.raises(ModelFileError, match=words):
        read_whole(Remote(data), len(data), "model.gguf")
    with pytest.raises(ModelFileError, match=words):
        read_borrowing(Remote(data), len(data), "model.gguf", lend(large()))


def test_a_header_says_how_many_bytes_it_needs_at_any_cut() -> None:
    data = tiny_llama().data()
    size = len(tiny_llama().header())
    for cut in range(24, size - 32):
        with pytest.raises(IncompleteHeaderError) as caught:
            read_header(data[:cut], len(data), "model.gguf")
        assert cut < caught.value.needed_bytes <= size
    with pytest.raises(ModelFileError, match="cut short"):
        read_header(data[: size - 200], size - 200, "model.gguf")


# Shapes kept on this disk.


@pytest.fixture
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shape_cache, "shapes_folder", lambda: tmp_path / "shapes")


@pytest.mark.usefixtures("_own_folder")
def test_a_kept_shape_comes_back_equal(smollm2_path: Path, tmp_path: Path) -> None:
    for path in (smollm2_path, _written(tmp_path)):
        shape = read_shape(path)
        shape_cache.save_shape([path.name, "a"], shape)
        assert shape_cache.load_shape([path.name, "a"]) == shape
        assert shape_cache.load_shape([path.name, "b"]) is None


def _written(folder: Path) -> Path:
    path = folder / "tiny.gguf"
    path.write_bytes(tiny_llama({"general.sampling.temp": 0.5}).data())
    return path


@pytest.mark.usefixtures("_own_folder")
@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 1}', '{"format": 0}', "null"])
def test_a_damaged_kept_shape_is_as_good_as_none(text: str, tmp_path: Path) -> None:
    shape_cache.save_shape(["x"], read_shape(_written(tmp_path)))
    (path,) = (tmp_path / "shapes").iterdir()
    path.write_text(text, encoding="utf-8")
    assert shape_cache.load_shape(["x"]) is None


@pytest.mark.usefixtures("_own_folder")
def test_a_shape_of_another_format_is_read_anew(tmp_path: Path) -> None:
    shape_cache.save_shape(["x"], read_shape(_written(tmp_path)))
    (path,) = (tmp_path / "shapes").iterdir()
    document = json.loads(path.read_text(encoding="utf-8"))
    assert document["format"] == shape_cache.FORMAT
    path.write_text(json.dumps({**document, "format": shape_cache.FORMAT + 1}), encoding="utf-8")
    assert shape_cache.load_shape(["x"]) is None


@pytest.mark.usefixtures("_own_folder")
def test_only_so_many_shapes_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shape_cache, "KEPT_FILES", 3)
    shape = read_shape(_written(tmp_path))
    for number in range(6):
        shape_cache.save_shape([str(number)], shape)
    assert len(list((tmp_path / "shapes").iterdir())) == 3
    assert shape_cache.load_shape(["5"]) == shape
