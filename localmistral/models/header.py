"""The GGUF container: bytes -> metadata and tensor infos, every count and offset checked first.

It is the gate in front of llama.cpp's own parser, which may end the process on a bad file, so it
refuses whatever that parser asserts. Works on any buffer that holds the start of a file whose full
size is known, so the bytes may come from a map or from somewhere else; a start that ends within the
header raises IncompleteHeaderError, which says how much more is needed.
Knows neither models nor layers, and never looks at weights.
Format: the GGUF specification of the ggml project, versions 2 and 3, little-endian.
"""

import mmap
import struct
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import NoReturn

from localmistral.errors import ModelFileError
from localmistral.models.tensor_types import TENSOR_TYPES, TensorType

Buffer = bytes | mmap.mmap

DOWNLOAD_AGAIN = (
    "Download the file again; of models pulled from the Hub, `localmistral pull --check NAME` "
    "removes what is damaged."
)

DEFAULT_ALIGNMENT = 32
# llama.cpp asserts that mapped weights start on 32 bytes; real files use 32.
MIN_ALIGNMENT, MAX_ALIGNMENT = 32, 1 << 20
MAX_METADATA_PAIRS = 1 << 16  # real files have about 60; llama.cpp's duplicate search is quadratic
MAX_TENSORS = 1 << 16  # the largest real file, unfused experts and all, has under 50,000
MAX_KEY_BYTES = (1 << 16) - 1  # the specification's limit
MAX_STRING_BYTES = 64 << 20  # a whole tokenizer.json is about 20 MB
MAX_ARRAY_ITEMS = 1 << 22  # the largest vocabularies have 262,144 tokens and 600,000 merges
MAX_HEADER_BYTES = 256 << 20  # such a vocabulary with its tokenizer.json stays under 64 MiB
MAX_TENSOR_NAME_BYTES = 63  # GGML_MAX_NAME is 64, its closing zero included
MAX_DIMENSIONS = 4  # GGML_MAX_DIMS
MAX_ELEMENTS = (1 << 63) - 1  # int64 in ggml


class IncompleteHeaderError(ModelFileError):
    """The buffer ends before the header does, though the file goes on.

    `needed_bytes` of the file's start are needed at least.
    """

    def __init__(self, file_name: str, needed_bytes: int) -> None:
        super().__init__(
            f"The header of {file_name} needs at least {needed_bytes:,} bytes of the file's start."
        )
        self.needed_bytes = needed_bytes


class ValueType(IntEnum):
    """GGUF's metadata value types."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


SCALAR_FORMATS = {
    ValueType.UINT8: "B",
    ValueType.INT8: "b",
    ValueType.UINT16: "H",
    ValueType.INT16: "h",
    ValueType.UINT32: "I",
    ValueType.INT32: "i",
    ValueType.FLOAT32: "f",
    ValueType.BOOL: "B",
    ValueType.UINT64: "Q",
    ValueType.INT64: "q",
    ValueType.FLOAT64: "d",
}
SCALAR_BYTES = {kind: struct.calcsize("<" + code) for kind, code in SCALAR_FORMATS.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Array:
    """Where an array's elements stand in the file; they are read only when asked for."""

    element: ValueType
    count: int
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """One metadata value with the type it was stored as."""

    kind: ValueType
    content: int | float | bool | str | Array


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """`dims` in ggml's order (row length first); `offset` counts from the file's first byte."""

    name: str
    dims: tuple[int, ...]
    type: TensorType
    offset: int
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """Everything in a GGUF file before its weights."""

    file_name: str
    version: int
    metadata: dict[str, Value]
    tensors: tuple[TensorInfo, ...]


def read_header(buffer: Buffer, file_bytes: int, file_name: str) -> Header:
    """Parse the header in `buffer`, the start of a file of `file_bytes` bytes in all.

    Raises ModelFileError, naming the file, for anything llama.cpp could stumble over, and
    IncompleteHeaderError where the buffer is too short.
    """
    reader = _Reader(buffer, file_bytes, file_name)
    version = _read_version(reader)
    tensor_count = reader.count("tensors", MAX_TENSORS)
    pair_count = reader.count("metadata entries", MAX_METADATA_PAIRS)
    metadata: dict[str, Value] = {}
    for index in range(pair_count):
        key = reader.name(f"metadata key {index + 1} of {pair_count}", MAX_KEY_BYTES)
        if key in metadata:
            reader.fail(f"has metadata key {shown(key)} twice")
        metadata[key] = _read_value(reader, key)
    alignment = _read_alignment(reader, metadata)
    tensors = _read_tensors(reader, tensor_count, alignment)
    return Header(file_name=file_name, version=version, metadata=metadata, tensors=tensors)


def read_strings(buffer: Buffer, array: Array) -> list[bytes]:
    """The texts of a string array whose bounds `read_header` has checked."""
    unpack = struct.Struct("<Q").unpack_from
    texts, offset = [], array.offset
    for _ in range(array.count):
        start = offset + 8
        offset = start + unpack(buffer, offset)[0]
        texts.append(buffer[start:offset])
    return texts


def find_end(buffer: Buffer, array: Array) -> int:
    """Where the first byte after an array stands."""
    if array.element is not ValueType.STRING:
        return array.offset + array.count * SCALAR_BYTES[array.element]
    unpack = struct.Struct("<Q").unpack_from
    offset = array.offset
    for _ in range(array.count):
        offset += 8 + unpack(buffer, offset)[0]
    return offset


def read_numbers(buffer: Buffer, array: Array) -> tuple[int | float, ...]:
    """The elements of an array of numbers or booleans (as 0 and 1)."""
    size = array.count * SCALAR_BYTES[array.element]
    code = f"<{array.count}{SCALAR_FORMATS[array.element]}"
    return struct.unpack(code, buffer[array.offset : array.offset + size])


def shown(text: str) -> str:
    """A quoted text of a file, cut to what fits a sentence."""
    return repr(text if len(text) <= 60 else text[:57] + "...")


def format_dims(dims: tuple[int, ...]) -> str:
    return " x ".join(f"{size:,}" for size in dims)


class _Reader:
    """A position in the buffer; every step forward is checked against the file's size."""

    def __init__(self, buffer: Buffer, file_bytes: int, file_name: str) -> None:
        self.buffer = buffer
        self.buffer_bytes = len(buffer)
        self.file_bytes = file_bytes
        self.file_name = file_name
        self.position = 0

    def fail(self, what: str) -> NoReturn:
        raise ModelFileError(f"{self.file_name} {what}.", DOWNLOAD_AGAIN)

    def advance(self, size: int, what: str) -> int:
        """Step over `size` bytes and return where they start."""
        start, end = self.position, self.position + size
        if end > self.file_bytes:
            self.fail(
                f"is cut short or damaged: {what} needs at least {end:,} bytes, "
                f"the file has {self.file_bytes:,}"
            )
        if end > MAX_HEADER_BYTES:
            self.fail(f"has a header of over {MAX_HEADER_BYTES:,} bytes at {what}")
        if end > self.buffer_bytes:
            raise IncompleteHeaderError(self.file_name, end)
        self.position = end
        return start

    def number(self, kind: ValueType, what: str) -> int | float:
        start = self.advance(SCALAR_BYTES[kind], what)
        value: int | float = struct.unpack_from("<" + SCALAR_FORMATS[kind], self.buffer, start)[0]
        return value

    def uint32(self, what: str) -> int:
        return int(self.number(ValueType.UINT32, what))

    def uint64(self, what: str) -> int:
        return int(self.number(ValueType.UINT64, what))

    def count(self, what: str, limit: int) -> int:
        value = self.uint64(f"the number of {what}")
        if value > limit:
            self.fail(f"claims {value:,} {what}, more than the {limit:,} any model has")
        return value

    def text(self, what: str, limit: int) -> str:
        size = self.uint64(f"the length of {what}")
        if size > limit:
            self.fail(f"gives {what} a length of {size:,} bytes, over the limit of {limit:,}")
        start = self.advance(size, what)
        try:
            return self.buffer[start : start + size].decode("utf-8")
        except UnicodeDecodeError as error:
            self.fail(f"has invalid UTF-8 at byte {error.start:,} of {what}")

    def name(self, what: str, limit: int) -> str:
        """A text that is compared as a C string in ggml: not empty, no zero byte."""
        text = self.text(what, limit)
        if not text or "\0" in text:
            self.fail(f"has {'a zero byte in' if text else 'nothing for'} {what}")
        return text


def _read_version(reader: _Reader) -> int:
    reader.advance(4, "the magic number")  # checked by the caller, who knows what else it may be
    version = reader.uint32("the version")
    if version and version & 0xFFFF == 0:
        reader.fail("is a big-endian GGUF file, which this machine can't use")
    if version == 1:
        reader.fail("is GGUF version 1 of 2023, which llama.cpp no longer reads (2 and 3 it does)")
    if version not in (2, 3):
        reader.fail(f"has GGUF version {version}, but only 2 and 3 are known")
    return version


def _read_type(reader: _Reader, what: str) -> ValueType:
    number = reader.uint32(f"the type of {what}")
    try:
        return ValueType(number)
    except ValueError:
        reader.fail(f"has unknown type {number} for {what} (0 to 12 are known)")


def _read_value(reader: _Reader, key: str) -> Value:
    what = f"metadata {shown(key)}"
    kind = _read_type(reader, what)
    if kind is ValueType.ARRAY:
        return Value(kind=kind, content=_read_array(reader, what))
    if kind is ValueType.STRING:
        return Value(kind=kind, content=reader.text(what, MAX_STRING_BYTES))
    number = reader.number(kind, what)
    if kind is not ValueType.BOOL:
        return Value(kind=kind, content=number)
    if number not in (0, 1):
        reader.fail(f"stores {number} for the yes-or-no value {what}")
    return Value(kind=kind, content=bool(number))


def _read_array(reader: _Reader, what: str) -> Array:
    """Step over an array, by arithmetic if its elements have one size."""
    element = _read_type(reader, f"the elements of {what}")
    if element is ValueType.ARRAY:
        reader.fail(f"nests an array in an array for {what}, which llama.cpp can't read")
    count = reader.uint64(f"the length of {what}")
    if count > MAX_ARRAY_ITEMS:
        reader.fail(f"claims {count:,} elements for {what}, over the limit of {MAX_ARRAY_ITEMS:,}")
    array = Array(element=element, count=count, offset=reader.position)
    if element is ValueType.STRING:
        _skip_strings(reader, count, what)
        return array
    size = count * SCALAR_BYTES[element]
    start = reader.advance(size, what)
    if element is ValueType.BOOL:
        flags = reader.buffer[start : start + size]
        if flags.count(0) + flags.count(1) != count:
            reader.fail(f"stores something other than 0 and 1 in the yes-or-no list {what}")
    return array


def _skip_strings(reader: _Reader, count: int, what: str) -> None:
    """Walk over the lengths alone: the hot loop, 0.06 microseconds a string."""
    start = reader.position
    reader.advance(8 * count, what)  # each has a length at least: bounds the walk below
    unpack = struct.Struct("<Q").unpack_from
    buffer, offset = reader.buffer, start
    try:
        for _ in range(count):
            offset += 8 + unpack(buffer, offset)[0]
    except (struct.error, OverflowError):  # the next length stands past the buffer's end
        offset = max(offset, reader.buffer_bytes - 7) + 8
    reader.position = start
    reader.advance(offset - start, what)


def _read_alignment(reader: _Reader, metadata: dict[str, Value]) -> int:
    value = metadata.get("general.alignment")
    if value is None:
        return DEFAULT_ALIGNMENT
    alignment = value.content
    if value.kind is not ValueType.UINT32 or not isinstance(alignment, int):
        reader.fail(f"stores general.alignment as {value.kind.name.lower()}, not as uint32")
    if not MIN_ALIGNMENT <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        reader.fail(
            f"has general.alignment {alignment:,}, not a power of two "
            f"from {MIN_ALIGNMENT} to {MAX_ALIGNMENT:,}"
        )
    return alignment


def _read_tensors(reader: _Reader, count: int, alignment: int) -> tuple[TensorInfo, ...]:
    infos: dict[str, TensorInfo] = {}
    for index in range(count):
        info = _read_tensor(reader, f"tensor {index + 1} of {count}")
        if info.name in infos:
            reader.fail(f"has tensor {info.name!r} twice")
        infos[info.name] = info
    start = _aligned(reader.position, alignment)
    expected = end = 0
    for info in infos.values():
        # ggml accepts only tensors that follow each other: this rules out overlaps as well
        if info.offset != expected:
            reader.fail(
                f"puts the weights of {info.name!r} at offset {info.offset:,} "
                f"where {expected:,} follows from the tensors before it"
            )
        end = expected + info.bytes
        expected = _aligned(end, alignment)
    if infos and start + end > reader.file_bytes:
        reader.fail(
            f"is cut short: its weights need {start + end:,} bytes, "
            f"the file has {reader.file_bytes:,}"
        )
    return tuple(replace(info, offset=start + info.offset) for info in infos.values())


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


def _read_tensor(reader: _Reader, what: str) -> TensorInfo:
    """One tensor info; its offset still counts from the start of the weights."""
    name = reader.name(f"the name of {what}", MAX_TENSOR_NAME_BYTES)
    what = f"tensor {name!r}"
    dimensions = reader.uint32(f"the dimensions of {what}")
    if dimensions > MAX_DIMENSIONS:
        reader.fail(f"gives {what} {dimensions:,} dimensions, over the limit of {MAX_DIMENSIONS}")
    dims = tuple(reader.uint64(f"the dimensions of {what}") for _ in range(dimensions))
    elements = 1
    for size in dims:
        elements *= size
        if not 0 < size <= MAX_ELEMENTS or elements >= MAX_ELEMENTS:
            reader.fail(f"gives {what} impossible dimensions {format_dims(dims)}")
    number = reader.uint32(f"the type of {what}")
    kind = TENSOR_TYPES.get(number)
    if kind is None:
        reader.fail(f"stores {what} as unknown or removed ggml type {number}")
    row = dims[0] if dims else 1
    if row % kind.block_elements:
        reader.fail(
            f"gives {what} rows of {row:,} elements, "
            f"not a multiple of the {kind.block_elements} in a block of {kind.name}"
        )
    size_bytes = elements // kind.block_elements * kind.block_bytes
    offset = reader.uint64(f"the offset of {what}")
    return TensorInfo(name=name, dims=dims, type=kind, offset=offset, bytes=size_bytes)
