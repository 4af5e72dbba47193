"""Brings the missing ranges of a file over several connections, and proves the whole by its hash.

Retries what may succeed, with growing waits and an end; starts over where what is there can't be
continued. The hash is computed from the file while ranges arrive, so a file that was resumed is
verified whole. Knows neither huggingface_hub, its cache, nor locks.
"""

import hashlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from localmistral.errors import DownloadError
from localmistral.models.journal import LONGEST_WRITE, Partial, say_disk_errors
from localmistral.models.names import quote_name
from localmistral.models.ranges import Range
from localmistral.models.web import CONTINUES, Body, InterruptedTransferError, Source
from localmistral.units import format_bytes

# A piece is what one request asks for: large, so that the wait for each answer costs little, but
# enough of them that every connection has work until the end.
_LARGEST_PIECE = 64 << 20
_SMALLEST_PIECE = 4 << 20
_PIECES_PER_CONNECTION = 4
# How much arrives before it is written and recorded, which is what a killed process may lose: a
# 400th of what this run brought, but at most two seconds' worth; never so little that journal
# lines cost more than the data.
_RECORD_BYTES = 1 << 20
_SHORTEST_RECORD_S, _LONGEST_RECORD_S, _RECORDS_PER_RUN = 0.02, 2.0, 400
_SYNC_S = 5.0  # how often data is forced to disk, which is what a power cut may lose
_TICK_S = 0.1  # how often the caller hears of progress, and notices Ctrl-C on Windows
_POLL_S = 0.02  # how soon the hash notices new bytes
_HASHED_BYTES = 1 << 20
# Less than this between two failures is no success: a connection that breaks off after every few
# bytes would be tried for days.
_LEAST_GAIN_BYTES = 64 << 10
_PARTING_S = 0.3  # how long threads get to end by themselves once nothing they do counts


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long to wait for what, in seconds, and how often to try in vain."""

    stall_s: float = 30.0  # without a byte
    connect_s: float = 15.0
    tries: int = 7  # with next to nothing gained in between
    first_wait_s: float = 1.0  # doubled each time
    longest_wait_s: float = 30.0
    longest_asked_s: float = 900.0  # what a server may ask for; the Hub's windows are 300 s


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """How far one file is, in bytes."""

    done: int
    verified: int
    note: str


class GaveUpError(DownloadError):
    """No try came through; other files of the same host would fare no better."""


class _RestartError(Exception):
    """What is there can't be continued."""

    def __init__(self, reason: str, *, one_stream: bool) -> None:
        super().__init__(reason)
        self.one_stream = one_stream  # the server can't send ranges


class _StoppedError(Exception):
    """Nothing this thread does counts any more."""


@dataclass(slots=True, kw_only=True)
class _Piece:
    start: int  # moves on as bytes are written
    end: int


class Trouble:
    """Counts one thread's failures since enough was gained, and says how long to wait."""

    def __init__(self, name: str, patience: Patience) -> None:
        self._name, self._patience = name, patience
        self._failures, self._gained = 0, 0

    def wait_s(self, error: InterruptedTransferError, gained: int) -> float:
        """Seconds to wait before the next try; GaveUpError when there is none."""
        patience = self._patience
        self._failures += 1
        if gained >= self._gained + _LEAST_GAIN_BYTES:
            self._failures, self._gained = 1, gained
        name = quote_name(self._name)
        if self._failures >= patience.tries:
            raise GaveUpError(
                f"{name} couldn't be downloaded: {error.reason} ({self._failures} tries).",
                f"Check the network, then {CONTINUES}",
            ) from error
        growing = patience.first_wait_s * float(2 ** (self._failures - 1))
        if error.wait_s is None:
            return min(growing, patience.longest_wait_s)
        if error.wait_s > patience.longest_asked_s:
            raise GaveUpError(
                f"{name} can't be downloaded now: {error.reason} and asks to wait "
                f"{error.wait_s / 60:.0f} minutes.",
                f"After that, {CONTINUES}",
            ) from error
        return max(error.wait_s, patience.first_wait_s)


def fetch(
    source: Source,
    partial: Partial,
    *,
    connections: int,
    patience: Patience,
    report: Callable[[State], None],
) -> None:
    """Complete a partial file and verify it; `report` is called in this thread.

    Raises DownloadError with the partial kept, except where its hash is wrong: then it is removed.
    """
    failures, farthest, version_counts, note = 0, 0, True, ""
    while True:
        resumed = partial.done.bytes
        attempt = _Attempt(
            source, partial, connections, patience, version_counts=version_counts, note=note
        )
        try:
            if attempt.run(report) == source.identity:
                return
            if not resumed:
                partial.remove()
                raise _mismatch(source)
            note = "starting over: what an earlier download had left is damaged"
        except _RestartError as restart:
            note = f"starting over: {restart}"
            # A server that changes its etag with every answer must not restart us forever; the
            # hash decides in the end.
            connections, version_counts = (1 if restart.one_stream else connections), False
        gained = partial.done.bytes
        failures = 1 if gained >= farthest + _LEAST_GAIN_BYTES else failures + 1
        farthest = max(farthest, gained)
        if failures >= patience.tries:
            raise DownloadError(
                f"{quote_name(source.file.name)} breaks off again and again, and "
                "its server can't continue a download.",
                "Try again on a better connection",
            )
        partial.reset()


def read_bytes(source: Source, start: int, end: int, patience: Patience) -> bytes:
    """Bytes [start, end) of a remote file into memory, cut at its end; retries as `fetch`."""
    end = min(end, source.file.bytes)
    data = bytearray()
    trouble = Trouble(source.file.name, patience)
    while start + len(data) < end:
        try:
            with source.open(start + len(data), end) as body:
                # A server that ignores ranges sends the file from its beginning.
                unwanted = start + len(data) - body.start
                for chunk in body.chunks:
                    data += chunk[unwanted:]
                    unwanted = max(0, unwanted - len(chunk))
                    if start + len(data) >= end:
                        break
                else:
                    raise InterruptedTransferError("the connection ended early")
        except InterruptedTransferError as error:
            time.sleep(trouble.wait_s(error, len(data)))
    return bytes(data[: end - start])


def new_digest(key: str, size: int) -> "hashlib._Hash":
    """The hash that a blob's key is: sha256, or what git makes of small files (a sha1)."""
    if len(key) == 64:
        return hashlib.sha256()
    return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)


class _Attempt:
    """One go at all that is missing; its threads can't touch the file once it has ended."""

    def __init__(
        self,
        source: Source,
        partial: Partial,
        connections: int,
        patience: Patience,
        *,
        version_counts: bool,
        note: str,
    ) -> None:
        self._source, self._partial, self._patience = source, partial, patience
        self._version_counts = version_counts
        self._pieces = iter(_split(partial.done.gaps(partial.size), connections))
        self._connections = connections
        self._gate = threading.Lock()  # held while the file or the fields below change
        self._ended = threading.Event()
        self._error: BaseException | None = None
        self._digest = ""
        self._verified = 0
        self._gained = 0
        self._note = note
        self._began = time.monotonic()

    def run(self, report: Callable[[State], None]) -> str:
        """The hash of the complete file; raises whatever ended the attempt early."""
        jobs = [self._hash, self._sync_often, *[self._work] * self._connections]
        threads = [threading.Thread(target=self._guard, args=(j,), daemon=True) for j in jobs]
        try:
            for thread in threads:
                thread.start()
            while not self._ended.wait(_TICK_S):
                report(self._state())
        finally:
            self._end()
            # A thread that waits for a silent server is left behind: it can do no more harm.
            patient_until = time.monotonic() + _PARTING_S
            for thread in threads:
                if thread.is_alive():  # Ctrl-C may come before all have been started
                    thread.join(max(0.0, patient_until - time.monotonic()))
        if self._error is not None:
            raise self._error
        for thread in threads[:2]:  # those with the file open, which Windows then can't rename
            thread.join()
        report(self._state())
        return self._digest

    def _state(self) -> State:
        done, _ = self._partial.progress()
        return State(done=done, verified=self._verified, note=self._note)

    def _end(self, error: BaseException | None = None) -> None:
        with self._gate:
            if not self._ended.is_set():
                self._error = error
                self._ended.set()

    def _guard(self, job: Callable[[], None]) -> None:
        try:
            job()
        except _StoppedError:
            return
        except BaseException as error:  # noqa: BLE001  (raised by `run`, in the caller's thread)
            self._end(error)

    def _hash(self) -> None:
        """Follow the bytes from the start of the file; ends the attempt with the last one."""
        size = self._partial.size
        digest = new_digest(self._source.identity, size)
        buffer = memoryview(bytearray(_HASHED_BYTES))
        path = self._partial.path
        with say_disk_errors(path), path.open("rb", buffering=0) as file:
            frontier = 0
            while self._verified < size:
                while frontier <= self._verified:
                    _, frontier = self._partial.progress()
                    if frontier <= self._verified and self._ended.wait(_POLL_S):
                        return
                count = file.readinto(buffer[: frontier - self._verified])
                if not count:
                    raise DownloadError(f"{self._partial.path} was cut short by another program.")
                digest.update(buffer[:count])
                self._verified += count
                if self._ended.is_set():
                    return
        self._digest = digest.hexdigest()
        self._partial.sync()  # here, so that the caller's thread still hears Ctrl-C
        self._end()

    def _sync_often(self) -> None:
        while not self._ended.wait(_SYNC_S):
            self._partial.sync()

    def _work(self) -> None:
        while True:
            with self._gate:
                piece = next(self._pieces, None)
            if piece is None:
                return
            trouble = Trouble(self._source.file.name, self._patience)
            while piece.start < piece.end:
                try:
                    self._receive(piece)
                except InterruptedTransferError as error:
                    wait_s = trouble.wait_s(error, self._gained)
                    self._note = f"retrying in {wait_s:.0f} s: {error.reason}"
                    if self._ended.wait(wait_s):
                        return

    def _receive(self, piece: _Piece) -> None:
        """One request for the rest of a piece; what came is stored, however it ends."""
        with self._source.open(piece.start, piece.end) as body:
            if body.start != piece.start or body.end > piece.end:
                raise _RestartError("the server ignores ranges", one_stream=True)
            self._compare_version(body.version)
            waiting, size, recorded = list[bytes](), 0, time.monotonic()
            try:
                for chunk in body.chunks:
                    waiting.append(chunk)
                    size += len(chunk)
                    now = time.monotonic()
                    if size >= _RECORD_BYTES or now - recorded >= self._record_s(now):
                        due, waiting, size, recorded = waiting, [], 0, now
                        self._store(piece, body, b"".join(due))
            finally:
                self._store(piece, body, b"".join(waiting))
            if piece.start < body.end:
                raise InterruptedTransferError("the connection ended early")

    def _record_s(self, now: float) -> float:
        growing = (now - self._began) / _RECORDS_PER_RUN
        return min(max(growing, _SHORTEST_RECORD_S), _LONGEST_RECORD_S)

    def _store(self, piece: _Piece, body: Body, data: bytes) -> None:
        view = memoryview(data)[: max(0, body.end - piece.start)]
        for at in range(0, len(view), LONGEST_WRITE):
            part = view[at : at + LONGEST_WRITE]
            with self._gate:
                if self._ended.is_set():
                    raise _StoppedError
                self._partial.write(piece.start, part)
                self._gained += len(part)
                self._note = ""
            piece.start += len(part)

    def _compare_version(self, version: str) -> None:
        """Bytes of two versions of a file must not be mixed."""
        with self._gate:
            if self._ended.is_set() or version in ("", self._partial.version):
                return
            if self._partial.version and self._version_counts:
                raise _RestartError("the file changed on the server", one_stream=False)
            self._partial.remember_version(version)


def _split(gaps: tuple[Range, ...], connections: int) -> list[_Piece]:
    """Cut what is missing into pieces, in order; one per gap for a single stream."""
    missing = sum(end - start for start, end in gaps)
    largest = missing
    if connections > 1:
        even = missing // (connections * _PIECES_PER_CONNECTION)
        largest = min(max(even, _SMALLEST_PIECE), _LARGEST_PIECE)
    return [
        _Piece(start=at, end=min(at + largest, end))
        for start, end in gaps
        for at in range(start, end, max(largest, 1))
    ]


def _mismatch(source: Source) -> DownloadError:
    file = source.file
    kind = "sha256" if len(source.identity) == 64 else "git sha1"
    return DownloadError(
        f"{quote_name(file.name)} was downloaded whole ({format_bytes(file.bytes)}), but "
        f"has the wrong {kind} (a {kind} mismatch); it has been removed.",
        "Run the same command again; if it stays wrong, something on the way changes the data",
    )
