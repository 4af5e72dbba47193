"""Several files of one commit brought into the Hub's cache: what is there is taken, the rest comes
over the network, one file after the other under the Hub's own lock for each.

Sums progress over all files. Knows neither huggingface_hub nor HTTP: it is given a lock and a
source for each file.
"""

import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from localmistral.errors import DownloadError
from localmistral.models.blobs import (
    Place,
    adopt_twin,
    find_twin,
    has_size,
    hash_file,
    link_snapshot,
)
from localmistral.models.hub import HubFile, OnProgress, Phase, Progress
from localmistral.models.journal import Partial, recorded_bytes, say_disk_errors
from localmistral.models.names import quote_name
from localmistral.models.transfer import Patience, State, fetch, new_digest
from localmistral.models.web import Source
from localmistral.units import format_bytes

# What a download takes beyond its bytes: journals (a line of 40 bytes for what arrives in 20 ms or
# for each MiB) and the file system's own records of large files.
_OVERHEAD_PER_BYTE = 0.001
_OVERHEAD_BYTES = 1 << 20

Lock = Callable[[Path, Callable[[], None]], AbstractContextManager[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """What is to be brought where, and by which means. All files have a key."""

    place: Place
    commit: str
    files: tuple[HubFile, ...]
    lock: Lock  # given its file, and what to do time and again while another holds it
    open_source: Callable[[HubFile], Source]
    on_progress: OnProgress
    connections: int
    patience: Patience

    def run(self) -> tuple[Path, ...]:
        """Bring all files; their snapshot paths. DownloadError, with what has come kept."""
        present = [bytes_present(self.place, self.commit, file) for file in self.files]
        self._refuse_full_disk()
        paths = []
        for index, file in enumerate(self.files):
            tally = _Tally(
                file=file,
                # Of files before this one all is there, of later ones what was at the beginning.
                elsewhere=sum(f.bytes for f in self.files[:index]) + sum(present[index + 1 :]),
                total=sum(f.bytes for f in self.files),
                resumed=sum(present),
                on_progress=self.on_progress,
            )
            paths.append(self._bring(file, tally))
        return tuple(paths)

    def _refuse_full_disk(self) -> None:
        missing = missing_bytes(self.place, self.commit, self.files)
        if missing == 0:
            return
        needed = missing + int(missing * _OVERHEAD_PER_BYTE) + _OVERHEAD_BYTES
        folders = (self.place.blobs, *self.place.blobs.parents)
        folder = next((path for path in folders if path.is_dir()), self.place.cache)
        with say_disk_errors(folder):
            free = shutil.disk_usage(folder).free
        if needed > free:
            raise DownloadError(
                f"The download needs {_both(needed)} more, but the disk with {folder} has "
                f"{_both(free)} free.",
                "Free some space (localmistral rm NAME), or set HF_HOME to a folder elsewhere",
            )

    def _bring(self, file: HubFile, tally: "_Tally") -> Path:
        pointer = self.place.snapshot_path(self.commit, file.path)
        key = _key_of(file)
        if not has_size(pointer, file.bytes):
            lock_path = self.place.lock_path(key)
            with self.lock(lock_path, lambda: self._report_waiting(file, tally)):
                # Another process may have brought it while this one waited.
                if not has_size(pointer, file.bytes):
                    if not has_size(self.place.blobs / key, file.bytes):
                        self._bring_blob(file, tally)
                    with say_disk_errors(pointer):
                        link_snapshot(self.place, self.commit, file, key)
        tally.report("done", file.bytes)
        return pointer

    def _bring_blob(self, file: HubFile, tally: "_Tally") -> None:
        key = _key_of(file)
        blob = self.place.blobs / key
        with say_disk_errors(blob):
            # Without this folder the Hub's library calls the repository corrupt.
            self.place.snapshots.mkdir(parents=True, exist_ok=True)
            twin = find_twin(self.place, file, lambda path: self._hash(path, file, tally))
            if twin is not None:
                adopt_twin(twin, blob)
                return
        source = self.open_source(file)
        partial = Partial(self.place.blobs, key, file.bytes)
        try:
            tally.report("downloading", partial.done.bytes)
            fetch(
                source,
                partial,
                connections=self.connections,
                patience=self.patience,
                report=tally.report_state,
            )
            partial.complete(blob)
        finally:
            partial.leave()

    def _hash(self, path: Path, file: HubFile, tally: "_Tally") -> str:
        return hash_file(
            path,
            new_digest(_key_of(file), file.bytes),
            lambda done: tally.report("verifying", file.bytes, _percent(done, file.bytes)),
        )

    def _report_waiting(self, file: HubFile, tally: "_Tally") -> None:
        done = recorded_bytes(self.place.blobs, _key_of(file), file.bytes)
        tally.report("waiting", done, "another process is downloading this file")


@dataclass(slots=True, kw_only=True)
class _Tally:
    """Turns one file's progress into that of the whole download."""

    file: HubFile
    elsewhere: int  # bytes that are there of all other files
    total: int
    resumed: int
    on_progress: OnProgress

    def report(self, phase: Phase, file_done: int, note: str = "") -> None:
        self.on_progress(
            Progress(
                file=self.file.path,
                file_done=file_done,
                file_bytes=self.file.bytes,
                done=self.elsewhere + file_done,
                total=self.total,
                resumed=self.resumed,
                phase=phase,
                note=note,
            )
        )

    def report_state(self, state: State) -> None:
        if state.done < self.file.bytes:
            self.report("downloading", state.done, state.note)
        else:
            self.report("verifying", state.done, _percent(state.verified, self.file.bytes))


def bytes_present(place: Place, commit: str | None, file: HubFile) -> int:
    """How much of a file needn't be fetched: all where it is there, else what a partial has."""
    key = _key_of(file)
    here = [place.blobs / key]
    if commit is not None:
        here.append(place.snapshot_path(commit, file.path))
    if any(has_size(path, file.bytes) for path in here):
        return file.bytes
    return recorded_bytes(place.blobs, key, file.bytes)


def missing_bytes(place: Place, commit: str | None, files: Sequence[HubFile]) -> int:
    """What is still to be fetched; content that several files share counts once."""
    unique = {_key_of(file): file for file in files}.values()
    return sum(file.bytes - bytes_present(place, commit, file) for file in unique)


def _key_of(file: HubFile) -> str:
    if file.key is None:
        raise DownloadError(f"The Hub gives no hash for {quote_name(file.path)}.")
    return file.key


def _percent(done: int, size: int) -> str:
    return f"{done * 100 // size} % verified" if size else ""


def _both(count: int) -> str:
    return f"{format_bytes(count)} ({count:,} bytes)"
