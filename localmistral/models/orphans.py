"""GGUF files in the Hub's cache that no snapshot links to: nothing can find them, and they take
gigabytes. They are left when a process dies between a download's end and its link, or when links
are deleted by hand.

Looks at GGUF files alone: what other programs keep in the cache is theirs. Knows no network.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from localmistral.errors import LocalMistralError
from localmistral.models.cache import (
    delete_blob,
    hold_blob,
    repository_folder,
    repository_folders,
)
from localmistral.models.hub import HubFile, SweptFiles
from localmistral.models.journal import is_key
from localmistral.models.names import quote_name

_MAGIC = b"GGUF"


def find_orphans(repository: str | None = None) -> tuple[Path, ...]:
    """The blobs that no snapshot needs, of one repository or of all."""
    folders = repository_folders() if repository is None else [repository_folder(repository)]
    return tuple(blob for folder in folders for blob in _orphans_in(folder))


def sweep_orphans(repository: str | None = None, *, keep: Sequence[HubFile] = ()) -> SweptFiles:
    """Remove them, but for the content of `keep` and what a process is working on.

    LocalMistralError where the system refuses.
    """
    kept = {file.key for file in keep}
    count = freed = 0
    for blob in find_orphans(repository):
        if blob.name in kept:
            continue
        size = _remove(blob)
        count, freed = count + (size is not None), freed + (size or 0)
    return SweptFiles(count=count, bytes=freed)


def _remove(blob: Path) -> int | None:
    """The bytes freed; None where a process has it, or has linked it since it was found."""
    try:
        with hold_blob(blob) as is_held:
            if not is_held or blob not in _orphans_in(blob.parents[1]):
                return None
            size = blob.stat().st_size
            delete_blob(blob)
            return size
    except OSError as error:
        raise LocalMistralError(f"{quote_name(str(blob))} can't be removed: {error}.") from error


def _orphans_in(folder: Path) -> Iterator[Path]:
    try:
        blobs = [path for path in (folder / "blobs").iterdir() if is_key(path.name)]
    except OSError:
        return  # no such folder
    # Where links lead in the end, however they are written.
    linked = {
        os.path.realpath(Path(parent, name))
        for parent, _, names in os.walk(folder / "snapshots")
        for name in names
    }
    for blob in blobs:
        if os.path.realpath(blob) not in linked and _is_gguf(blob):
            yield blob


def _is_gguf(blob: Path) -> bool:
    try:
        with blob.open("rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except OSError:
        return False
