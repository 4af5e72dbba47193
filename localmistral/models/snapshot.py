"""What a commit's snapshot on this disk holds, and whether it is what its hashes say.

Knows neither the network nor huggingface_hub: it is given a lock for what it removes.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from localmistral.models.blobs import Place, discard, hash_file, linked_key
from localmistral.models.delivery import Lock
from localmistral.models.hub import (
    FileCheck,
    HubFile,
    OnProgress,
    Progress,
    check_commit,
    check_file,
)
from localmistral.models.journal import say_disk_errors
from localmistral.models.transfer import new_digest


def list_snapshot(place: Place, commit: str) -> tuple[HubFile, ...]:
    """The files of a commit, hashes by the names of their blobs.

    Files without a link to a blob have no hash; broken links count, with 0 bytes.
    """
    folder = place.snapshots / check_commit(commit)
    paths = [p for p in sorted(folder.rglob("*")) if p.is_symlink() or p.is_file()]
    return tuple(_describe(path, path.relative_to(folder).as_posix()) for path in paths)


def check_snapshot(
    place: Place,
    commit: str,
    files: Sequence[HubFile],
    *,
    lock: Lock,
    on_progress: OnProgress,
) -> tuple[FileCheck, ...]:
    """Hash files of a commit; a corrupt one is removed with all that links to it."""
    checks = []
    for index, file in enumerate(files):
        path = place.snapshot_path(commit, check_file(file).path)
        report = _reporter(files, index, on_progress)
        with say_disk_errors(path):
            check = _check(path, file, report)
            if check.state == "corrupt":
                key = file.key or linked_key(path) or ""
                with lock(place.lock_path(key), lambda r=report: r(0)):  # type: ignore[misc]
                    discard(place, path)
        checks.append(check)
    return tuple(checks)


def _describe(path: Path, name: str) -> HubFile:
    key = linked_key(path) or ""
    return HubFile(
        path=name,
        bytes=path.stat().st_size if path.is_file() else 0,
        sha256=key if len(key) == 64 else None,
        blob_id=key if len(key) == 40 else None,
    )


def _check(path: Path, file: HubFile, report: Callable[[int], None]) -> FileCheck:
    key = file.key or linked_key(path)
    if not path.is_file():
        return FileCheck(file=file, path=path, state="missing", problem="it isn't there")
    if key is None:
        return FileCheck(file=file, path=path, state="unknown", problem="its hash isn't known")
    size = path.stat().st_size
    problem = f"it has {size:,} bytes instead of {file.bytes:,}" if size != file.bytes else ""
    if not problem and hash_file(path, new_digest(key, size), report) != key:
        problem = f"its content doesn't fit its {'sha256' if len(key) == 64 else 'git sha1'}"
    if not problem:
        return FileCheck(file=file, path=path, state="ok")
    return FileCheck(file=file, path=path, state="corrupt", problem=f"{problem}; it was removed")


def _reporter(
    files: Sequence[HubFile], index: int, on_progress: OnProgress
) -> Callable[[int], None]:
    """What turns one file's count of hashed bytes into progress over all of them."""
    file, before = files[index], sum(f.bytes for f in files[:index])
    total = sum(f.bytes for f in files)

    def report(count: int) -> None:
        on_progress(
            Progress(
                file=file.path,
                file_done=count,
                file_bytes=file.bytes,
                done=before + count,
                total=total,
                resumed=0,
                phase="verifying",
            )
        )

    return report
