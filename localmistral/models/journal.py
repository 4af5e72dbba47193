"""A file that is being downloaded: its bytes in `KEY.part`, beside it `KEY.journal`, which says
which ranges are there.

Both survive the end of the process at any moment. Every write to the data is followed by a line
with the checksum of what was written; from time to time the data is forced to disk, and only then
does the journal call those ranges durable. What was written later is believed by the next try
where its checksum still fits, so a killed process loses nothing that was recorded and a power cut
at most the last seconds. Knows neither where bytes come from nor which hash the file must have.
"""

import contextlib
import errno
import os
import re
import shutil
import threading
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from localmistral.errors import DownloadError
from localmistral.models.ranges import Range, Ranges
from localmistral.units import format_bytes

# Not .incomplete: that is a name the Hub's own library sweeps.
DATA_SUFFIX = ".part"
JOURNAL_SUFFIX = ".journal"
_REWRITTEN_SUFFIX = ".journal-new"
_TITLE = "localmistral-journal-1"
_DURABLE = re.compile(r"\* ([0-9]{1,19}) ([0-9]{1,19})")
_RECENT = re.compile(r"\+ ([0-9]{1,19}) ([0-9]{1,19}) ([0-9]{1,10})")
_VERSION = re.compile(r"v ([0-9a-f]*)")
_COMPACTED_BYTES = 1 << 20  # a journal longer than that is shortened when it is next opened
LONGEST_WRITE = 4 << 20  # bytes; each is read back at once to check it
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Records:
    """A journal as read: ranges forced to disk, and others with the crc32 of their bytes."""

    version: str
    durable: Ranges
    recent: tuple[tuple[int, int, int], ...]  # start, end, crc32
    good_bytes: int  # of the journal, up to where it can be read; 0 where it's of no use


class Partial:
    """An unfinished file, open for writing by several threads of one process.

    The caller holds the lock that keeps other processes away. Methods raise DownloadError when
    the disk is full or refuses.
    """

    def __init__(self, folder: Path, key: str, size: int) -> None:
        """Open what an earlier download left of `key`, as far as it can be believed, or begin."""
        self.size = size
        self.path = folder / f"{key}{DATA_SUFFIX}"
        self._folder, self._key = folder, key
        self._lock = threading.Lock()
        self._closed = False
        with say_disk_errors(self.path):
            folder.mkdir(parents=True, exist_ok=True)
            self.path.touch()
            records = _read_records(folder, key, size)
            self.done = _believe(self.path, records)
            self.version = records.version if self.done.bytes else ""
            self._is_durable = not records.recent
            self._data = self.path.open("r+b", buffering=0)
            try:
                self._journal = self._open_journal(records.good_bytes if self.done.bytes else 0)
            except OSError:
                self._data.close()
                raise

    def progress(self) -> tuple[int, int]:
        """How many bytes are there, and up to where all of them are."""
        with self._lock:
            return self.done.bytes, self.done.frontier

    def write(self, start: int, data: bytes | bytearray | memoryview) -> None:
        """Put bytes at `start`, at most LONGEST_WRITE, then record them."""
        line = f"+ {start} {start + len(data)} {zlib.crc32(data)}\n".encode()
        with self._lock, say_disk_errors(self.path):
            self._data.seek(start)
            _write_all(self._data, data)
            _write_all(self._journal, line)
            self._is_durable = False
            self.done.add(start, start + len(data))

    def sync(self) -> None:
        """Force what is written to the disk and call it durable; does nothing where all is."""
        with self._lock:
            if self._closed or self._is_durable:
                return
            ranges, durable = self.done, tuple(self.done)
            self._is_durable = True
        # With a handle of its own and outside the lock, so that writers go on meanwhile and
        # `close` needn't wait for the disk.
        with say_disk_errors(self.path):
            with self.path.open("r+b", buffering=0) as data:
                os.fsync(data.fileno())
            with self._lock:
                if not self._closed and self.done is ranges:  # no reset came between
                    _write_all(self._journal, _durable_lines(durable))

    def remember_version(self, version: str) -> None:
        """Note which version of the file on the server the bytes are of, in hexadecimal."""
        with self._lock, say_disk_errors(self.path):
            self.version = version
            _write_all(self._journal, f"v {version}\n".encode())

    def reset(self) -> None:
        """Forget every byte."""
        with self._lock, say_disk_errors(self.path):
            self.done, self.version, self._is_durable = Ranges(), "", True
            # The journal first: it must never promise what is no longer there.
            self._journal.seek(0)
            self._journal.truncate()
            _write_all(self._journal, self._title)
            self._data.truncate(0)

    def close(self) -> None:
        """Let go of both files; may be called twice."""
        with self._lock:
            self._closed = True
            self._data.close()
            self._journal.close()

    def leave(self) -> None:
        """Close, and leave behind what a later try can use: nothing where nothing has come."""
        self.close()
        if self.done.bytes == 0:
            remove_partial(self._folder, self._key)

    def remove(self) -> None:
        """Close, and delete both files."""
        self.close()
        remove_partial(self._folder, self._key)

    def complete(self, target: Path) -> None:
        """Close, give the finished data its name in the cache, and delete the journal."""
        self.sync()
        self.close()
        with say_disk_errors(target):
            self.path.replace(target)
        remove_partial(self._folder, self._key)

    @property
    def _title(self) -> bytes:
        return f"{_TITLE} {self._key} {self.size}\n".encode()

    def _open_journal(self, good_bytes: int) -> FileIO:
        """The journal, cut after what is good of it and ready for more lines.

        Nothing is forced to disk here, which may take long: what isn't yet is checked anew.
        """
        path = self._folder / f"{self._key}{JOURNAL_SUFFIX}"
        if good_bytes > _COMPACTED_BYTES:
            good_bytes = self._rewrite_journal(path)
        if good_bytes == 0:
            journal = path.open("wb", buffering=0)
            _write_all(journal, self._title)
            return journal
        journal = path.open("r+b", buffering=0)
        journal.truncate(good_bytes)
        journal.seek(good_bytes)
        return journal

    def _rewrite_journal(self, path: Path) -> int:
        """Put a short journal, which says the same, in the place of a long one; its bytes."""
        os.fsync(self._data.fileno())
        lines = self._title + f"v {self.version}\n".encode() + _durable_lines(self.done)
        new = self._folder / f"{self._key}{_REWRITTEN_SUFFIX}"
        with new.open("wb", buffering=0) as file:
            _write_all(file, lines)
            os.fsync(file.fileno())
        new.replace(path)
        self._is_durable = True
        return len(lines)


def recorded_bytes(folder: Path, key: str, size: int) -> int:
    """How much of a file an earlier or running download has brought; checks no checksums."""
    try:
        on_disk = (folder / f"{key}{DATA_SUFFIX}").stat().st_size
        records = _read_records(folder, key, size)
    except OSError:
        return 0
    done = Ranges(records.durable)
    for start, end, _ in records.recent:
        done.add(start, end)
    return sum(max(0, min(end, on_disk) - start) for start, end in done)


def remove_partial(folder: Path, key: str) -> int:
    """Delete what an unfinished download of `key` left; the bytes of disk that frees."""
    freed = 0
    for suffix in (DATA_SUFFIX, JOURNAL_SUFFIX, _REWRITTEN_SUFFIX):
        path = folder / f"{key}{suffix}"
        with contextlib.suppress(FileNotFoundError):
            freed += allocated_bytes(path)
            path.unlink()
    return freed


def partial_keys(folder: Path) -> tuple[str, ...]:
    """Keys of all unfinished downloads in a folder of blobs; none where it can't be read."""
    suffixes = (DATA_SUFFIX, JOURNAL_SUFFIX, _REWRITTEN_SUFFIX)
    try:
        names = [path for path in folder.iterdir() if path.suffix in suffixes]
    except OSError:
        return ()
    return tuple(sorted({path.stem for path in names if is_key(path.stem)}))


def is_key(text: str) -> bool:
    """Whether this is a sha256 or a git sha1 in hexadecimal, the only names of blobs."""
    return re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", text) is not None


def allocated_bytes(path: Path) -> int:
    """What a file takes of its disk: less than its size where it has holes."""
    status = path.stat()
    blocks: int | None = getattr(status, "st_blocks", None)  # Windows has no such field
    return status.st_size if blocks is None else min(status.st_size, blocks * 512)


def _durable_lines(ranges: Iterable[Range]) -> bytes:
    return "".join(f"* {start} {end}\n" for start, end in ranges).encode()


def _read_records(folder: Path, key: str, size: int) -> _Records:
    """What the journal says; nothing where it is missing or of another file."""
    version, durable, recent, good_bytes = "", Ranges(), [], 0
    for line in _read_lines(folder / f"{key}{JOURNAL_SUFFIX}", f"{_TITLE} {key} {size}"):
        if match := _DURABLE.fullmatch(line):
            start, end = int(match[1]), int(match[2])
            if not start < end <= size:
                break
            durable.add(start, end)
        elif match := _RECENT.fullmatch(line):
            start, end = int(match[1]), int(match[2])
            if not start < end <= min(size, start + LONGEST_WRITE):
                break
            recent.append((start, end, int(match[3])))
        elif match := _VERSION.fullmatch(line):
            version = match[1]
        elif good_bytes:  # not the title: torn by a crash, and nothing behind it can be trusted
            break
        good_bytes += len(line) + 1
    return _Records(version=version, durable=durable, recent=tuple(recent), good_bytes=good_bytes)


def _read_lines(path: Path, title: str) -> Iterator[str]:
    """The title and whole lines below it; nothing where the title is another."""
    try:
        lines = path.read_bytes().decode("latin-1").split("\n")  # a character for every byte
    except FileNotFoundError:
        return
    if len(lines) > 1 and lines[0] == title:
        yield from lines[:-1]  # the last one has no end: empty, or torn


def _believe(path: Path, records: _Records) -> Ranges:
    """Ranges that are on disk: the durable ones, and later ones whose checksum still fits."""
    on_disk = path.stat().st_size
    done = Ranges((start, end) for start, end in records.durable if end <= on_disk)
    with path.open("rb") as data:
        for start, end, checksum in records.recent:
            if end <= on_disk and not done.holds(start, end):
                data.seek(start)
                if zlib.crc32(data.read(end - start)) == checksum:
                    done.add(start, end)
    return done


def _write_all(file: FileIO, data: bytes | bytearray | memoryview) -> None:
    """Raw files may take less than they are given."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


@contextlib.contextmanager
def say_disk_errors(path: Path) -> Iterator[None]:
    """Turn a failure to write near `path` into a DownloadError that says why."""
    try:
        yield
    except OSError as error:
        if error.errno in _DISK_FULL:
            free = format_bytes(shutil.disk_usage(path.parent).free)
            raise DownloadError(
                f"The disk with {path.parent} is full ({free} free); what has been downloaded is "
                "kept.",
                "Free some space, then run the same command again: it continues",
            ) from error
        raise DownloadError(
            f"{path.parent} can't be read or written: {error.strerror or error}.",
            "Set HF_HOME to a folder you may write to",
        ) from error
