"""GGUF files -> ModelShape and Vocabulary: opens, follows shards, says what a wrong file is.

The header alone is read, through a memory map that is closed again before returning.
Knows neither llama.cpp's library nor weights.
"""

import mmap
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

from localmistral.errors import ModelFileError
from localmistral.models.header import DOWNLOAD_AGAIN, Header, ValueType, read_header
from localmistral.models.hyperparameters import read_hyperparameters, read_kind
from localmistral.models.metadata import Metadata
from localmistral.models.shape import (
    SAMPLING_KEYS,
    FileKind,
    ModelShape,
    Tensor,
    Tokenizer,
    Vocabulary,
    layer_of,
    role_of,
)
from localmistral.models.vocabulary import read_texts, read_tokenizer

_SHARD_NAME = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")

# How other files that get taken for a model begin, and what to say of them.
_MAGIC = b"GGUF"
_SNIFFED_BYTES = 1024
_LOOKALIKES = (
    (b"<!doctype html", "looks like an HTML page, probably a failed download", DOWNLOAD_AGAIN),
    (b"<html", "looks like an HTML page, probably a failed download", DOWNLOAD_AGAIN),
    (b"<?xml", "looks like an XML error page, probably a failed download", DOWNLOAD_AGAIN),
    (
        b"version https://git-lfs",
        "is a Git LFS pointer, not the model itself",
        "Fetch the real file: git lfs pull",
    ),
    (b"pk\x03\x04", "is a zip archive or a PyTorch checkpoint, not GGUF", ""),
    (b"\x1f\x8b", "is compressed with gzip: unpack it first", "gunzip FILE"),
    (b"\x80\x02", "is a PyTorch checkpoint, not GGUF", ""),
    (b"lmgg", "is in the GGML format of before 2023-08, which nothing reads any more", ""),
    (b"fmgg", "is in the GGML format of before 2023-08, which nothing reads any more", ""),
    (b"tjgg", "is in the GGML format of before 2023-08, which nothing reads any more", ""),
    (b"\0" * 16, "begins with zeros, probably an unfinished download", DOWNLOAD_AGAIN),
    (b"{", "looks like JSON, probably an error instead of the download", DOWNLOAD_AGAIN),
)
_USE_GGUF = "Use a GGUF file of a chat model; localmistral models lists some."


def read_shape(path: Path) -> ModelShape:
    """Everything the header of `path`, and of its fellow shards, says about the model.

    Any shard of a set will do. Raises ModelFileError for a file that isn't there, that llama.cpp
    couldn't load, or that it must not be given; see `require_runnable` for files that are sound
    but no language model.
    """
    first = _first_shard(path)
    with _open_header(first) as metadata:
        count = metadata.count("split.count", default=1, kind=ValueType.UINT16)
        files = _shard_paths(first, path, count)
        headers = [metadata.header]
        headers += [_read_shard(file, n, count) for n, file in enumerate(files) if n > 0]
        return join_headers(files, [file.stat().st_size for file in files], headers, metadata)


def read_vocabulary(path: Path) -> Vocabulary:
    """The text and type of every token, by id; errors as for `read_shape`."""
    with _open_header(_first_shard(path)) as metadata:
        is_model = read_kind(metadata) is FileKind.MODEL
        if not is_model or read_tokenizer(metadata).token_count == 0:
            return Vocabulary(texts=(), types=())
        return read_texts(metadata)


@contextmanager
def _open_header(path: Path) -> Iterator[Metadata]:
    """One file's parsed header; the map is closed on leaving (Windows can't replace a mapped
    file)."""
    with _map_file(path) as buffer:
        yield Metadata(header=read_header(buffer, len(buffer), path.name), buffer=buffer)


def _map_file(path: Path) -> mmap.mmap:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            kind = "a directory" if path.is_dir() else "not a regular file"
            raise ModelFileError(f"{path.name or path} is {kind}, not a GGUF file.", _USE_GGUF)
        with path.open("rb") as file:
            start = file.read(_SNIFFED_BYTES)
            if not start:
                raise ModelFileError(f"{path.name} is empty (0 bytes).", DOWNLOAD_AGAIN)
            check_magic(path, start, path.stat().st_size)
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError as error:
        raise ModelFileError(
            f"There is no file {path.name} in {path.parent}.",
            "See what is on this disk: localmistral list",
        ) from error
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        raise ModelFileError(f"{path.name} can't be read: {error}.") from error


def check_magic(path: Path, start: bytes, file_bytes: int) -> None:
    """Refuse what is no GGUF file by its first bytes, saying what it seems to be."""
    if start.startswith(_MAGIC):
        return
    text = (
        start.lower() if start.startswith(b"\0") else start.lower().lstrip(b"\xef\xbb\xbf\r\n\t ")
    )
    for begin, what, hint in _LOOKALIKES:
        if text.startswith(begin):
            raise ModelFileError(f"{path.name} ({file_bytes:,} bytes) {what}.", hint or _USE_GGUF)
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < file_bytes:
        raise ModelFileError(f"{path.name} is a safetensors file, not GGUF.", _USE_GGUF)
    raise ModelFileError(
        f"{path.name} is no GGUF file: it begins with {start[:4]!r} instead of {_MAGIC!r}.",
        _USE_GGUF,
    )


def _first_shard(path: Path) -> Path:
    match = _SHARD_NAME.match(path.name)
    if match is None or not path.exists():
        return path
    first = path.with_name(f"{match['stem']}-00001-of-{match['count']}.gguf")
    if not first.exists():
        _refuse_missing(path, int(match["count"]))
    return first


def _siblings(path: Path, count: int) -> list[Path]:
    match = _SHARD_NAME.match(path.name)
    stem = match["stem"] if match else path.stem
    return [path.with_name(f"{stem}-{n + 1:05}-of-{count:05}.gguf") for n in range(count)]


def _refuse_missing(path: Path, count: int) -> None:
    files = _siblings(path, count)
    missing = [file.name for file in files if not file.exists()]
    if missing:
        more = f" and {len(missing) - 1} more are" if len(missing) > 1 else " is"
        raise ModelFileError(
            f"{missing[0]}{more} missing: {count - len(missing)} of {count} shards are present.",
            DOWNLOAD_AGAIN,
        )


def _shard_paths(first: Path, asked: Path, count: int) -> tuple[Path, ...]:
    """All shards in order, by the header's count; llama.cpp finds them by name as well."""
    match = _SHARD_NAME.match(first.name)
    named = int(match["count"]) if match else 1
    if count <= 1 and asked == first:
        return (first,)
    if match is None or named != count or int(match["number"]) != 1:
        raise ModelFileError(
            f"{first.name} is one of {count} shards by its header, but isn't named "
            f"like NAME-00001-of-{count:05}.gguf, so the others can't be found.",
            "Give the shards back the names they were published under",
        )
    _refuse_missing(first, count)
    return tuple(_siblings(first, count))


def _read_shard(path: Path, number: int, count: int) -> Header:
    with _open_header(path) as metadata:
        check_shard(metadata, number, count)
        return metadata.header


def check_shard(metadata: Metadata, number: int, count: int) -> None:
    """Refuse a header that isn't of shard `number` (from 0) of `count`; one of 1 says nothing."""
    if count > 1:
        stated = metadata.count("split.no", kind=ValueType.UINT16, default=-1)
        total = metadata.count("split.count", kind=ValueType.UINT16, default=count)
        if stated != number or total != count:
            says = f"shard {stated + 1} of {total}" if stated >= 0 else "no shard"
            metadata.fail(f"is {says} by its header, not shard {number + 1} of {count}")


def _check_shards(first: Metadata, headers: Sequence[Header]) -> None:
    if len(headers) == 1:
        return
    if first.count("split.no", kind=ValueType.UINT16, default=-1) != 0:
        first.fail("isn't the first shard by its header (split.no is not 0)")
    owners: dict[str, str] = {}
    for header in headers:
        for tensor in header.tensors:
            other = owners.setdefault(tensor.name, header.file_name)
            if other != header.file_name:
                first.fail(f"is one of two shards with tensor {tensor.name!r}: see {other}")
    stated = first.count("split.tensors.count", kind=ValueType.INT32, default=-1)
    if stated != len(owners):
        first.fail(
            f"promises {stated:,} tensors in {len(headers)} shards, but they hold {len(owners):,}"
        )


def join_headers(
    files: Sequence[Path],
    file_bytes: Sequence[int],
    headers: Sequence[Header],
    metadata: Metadata,
    *,
    are_texts_checked: bool = False,
) -> ModelShape:
    """The shape of a model from the headers of all its files, in order.

    `metadata` is the first one's. The files themselves are not opened, so they may be elsewhere.
    """
    _check_shards(metadata, headers)
    kind = read_kind(metadata)
    architecture = metadata.text("general.architecture") or ""
    is_model = kind is FileKind.MODEL
    tokenizer = Tokenizer()
    if is_model:
        tokenizer = read_tokenizer(metadata, are_texts_checked=are_texts_checked)
    infos = tuple(info for header in headers for info in header.tensors)
    numbers: dict[str, Any] = {}
    if is_model:
        numbers = read_hyperparameters(metadata, infos, tokenizer.token_count)
    file_type = metadata.count("general.file_type", default=-1)
    return ModelShape(
        files=tuple(files),
        file_bytes=tuple(file_bytes),
        version=metadata.header.version,
        kind=kind,
        architecture=architecture,
        name=metadata.text("general.name") or "",
        size_label=metadata.text("general.size_label") or "",
        file_type=file_type if file_type >= 0 else None,
        tokenizer=tokenizer,
        sampling=_read_sampling(metadata),
        tensors=_build_tensors(headers, is_model),
        **numbers,
    )


def _read_sampling(metadata: Metadata) -> tuple[tuple[str, float], ...]:
    """What the file recommends (llama.cpp's keys `general.sampling.*`), by our names."""
    found = ((ours, metadata.number(f"general.sampling.{key}")) for key, ours in SAMPLING_KEYS)
    return tuple((name, value) for name, value in found if value is not None)


def _build_tensors(headers: Sequence[Header], is_model: bool) -> tuple[Tensor, ...]:
    return tuple(
        Tensor(
            name=info.name,
            dims=info.dims,
            type=info.type.name,
            elements=prod(info.dims),
            bytes=info.bytes,
            file_index=index,
            layer=layer_of(info.name) if is_model else None,
            role=role_of(info.name),
        )
        for index, header in enumerate(headers)
        for info in header.tensors
    )
