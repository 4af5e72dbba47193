"""GGUF headers that are read in pieces, through any function that yields byte ranges of a file.

Nearly all of a header is the vocabulary (some 8 MB for 131,072 tokens), and all quantisations
of a model carry the same one. So one file's is read whole, and the others borrow it: their metadata
before it and their tensors after it are read, and the seams are compared.
Knows neither the network nor a cache.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from localmistral.errors import ModelFileError
from localmistral.models.gguf import check_magic
from localmistral.models.header import (
    MAX_HEADER_BYTES,
    Array,
    Header,
    IncompleteHeaderError,
    find_end,
    read_header,
)
from localmistral.models.metadata import Metadata

ReadRange = Callable[[int, int], bytes]
"""Bytes [start, end) of a file, fewer where the file ends."""

FIRST_BYTES = 64 << 10
"""What is read of a file nothing is known of: the whole header of a shard without vocabulary."""
LARGEST_STEP = 2 << 20
SMALLEST_STEP = 64 << 10
LARGE_ARRAY_ITEMS = 1024
"""Arrays from here on are a vocabulary's; those with a value a layer stay below."""
SLACK_BYTES = 4 << 10
"""Read beyond what the lender's header took: names and template differ by a little."""
SEAM_BYTES = 64
"""Compared at each end of a borrowed vocabulary."""
BORROWED_LIMIT_BYTES = 4 << 20
"""Metadata and tensors around a vocabulary: more says that it wasn't the same one after all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lender:
    """The vocabulary of a header that was read whole: everything from its first large array's
    elements to the end of its last one. `key` is how that first array is announced."""

    key: bytes
    body: bytes
    start: int  # of the body in the lender's file
    rest_bytes: int  # from the end of the body to the end of the header


def read_whole(read: ReadRange, file_bytes: int, name: str) -> Metadata:
    """A header read from the file's start in growing steps; ModelFileError as `read_header`."""
    buffer = read(0, min(FIRST_BYTES, file_bytes))
    check_magic(Path(name), buffer[:1024], file_bytes)
    return _complete(buffer, read, file_bytes, name, LARGEST_STEP, MAX_HEADER_BYTES)


def read_borrowing(
    read: ReadRange, file_bytes: int, name: str, lender: Lender
) -> tuple[Metadata, bool]:
    """A header that is put together with the lender's vocabulary where the file has the same.

    The second value says whether it was; otherwise the header was read whole.
    """
    borrowed = _borrow(read, file_bytes, name, lender)
    return (borrowed, True) if borrowed else (read_whole(read, file_bytes, name), False)


def make_lender(metadata: Metadata) -> Lender | None:
    """What can be lent of a header that was read whole; None where it has no vocabulary."""
    header, buffer = metadata.header, metadata.buffer
    keys = list(header.metadata)
    large = [key for key in keys if _is_large(header, key)]
    if not large:
        return None
    between = keys[keys.index(large[0]) : keys.index(large[-1]) + 1]
    if not all(key.startswith("tokenizer.") for key in between):
        return None  # what stands between would be borrowed unseen
    first = header.metadata[large[0]].content
    last = header.metadata[large[-1]].content
    assert isinstance(first, Array)
    assert isinstance(last, Array)
    end = find_end(buffer, last)
    # before the elements stand key length 8, key, value type 4, element type 4 and count 8
    announced = first.offset - 24 - len(large[0].encode())
    header_end = header.tensors[0].offset if header.tensors else len(buffer)
    return Lender(
        key=bytes(buffer[announced : first.offset]),
        body=bytes(buffer[first.offset : end]),
        start=first.offset,
        rest_bytes=min(header_end, len(buffer)) - end,
    )


def _is_large(header: Header, key: str) -> bool:
    content = header.metadata[key].content
    return isinstance(content, Array) and content.count >= LARGE_ARRAY_ITEMS


def _borrow(read: ReadRange, file_bytes: int, name: str, lender: Lender) -> Metadata | None:
    head = read(0, min(lender.start + SLACK_BYTES, file_bytes))
    check_magic(Path(name), head[:1024], file_bytes)
    found = head.find(lender.key)
    start = found + len(lender.key)
    end = start + len(lender.body)
    seam = head[start : start + len(lender.body)]
    if found < 0 or end > file_bytes or len(seam) < SEAM_BYTES or not lender.body.startswith(seam):
        return None
    tail_start = max(end - SEAM_BYTES, start)
    tail = read(tail_start, min(end + lender.rest_bytes + SLACK_BYTES, file_bytes))
    if not tail.startswith(lender.body[tail_start - start :]):
        return None
    buffer = head[:start] + lender.body + tail[end - tail_start :]
    limit_bytes = len(lender.body) + BORROWED_LIMIT_BYTES
    try:
        return _complete(buffer, read, file_bytes, name, SMALLEST_STEP, limit_bytes)
    except ModelFileError:
        return None  # the reading of the whole header will say what is wrong, if anything is


def _complete(
    buffer: bytes,
    read: ReadRange,
    file_bytes: int,
    name: str,
    largest_step: int,
    limit_bytes: int,
) -> Metadata:
    """Parse a header, reading on for as long as it ends too early; the steps grow with it."""
    while True:
        try:
            return Metadata(header=read_header(buffer, file_bytes, name), buffer=buffer)
        except IncompleteHeaderError as error:
            if error.needed_bytes > limit_bytes:
                raise
            step = min(max(len(buffer), SMALLEST_STEP), largest_step)
            end = min(max(error.needed_bytes, len(buffer) + step), file_bytes)
            more = read(len(buffer), end)
            if not more:
                raise
            buffer += more
