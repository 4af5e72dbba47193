"""Removing models from the Hub's cache and from the program's own folder.

What goes is worked out first, so that it can be shown: the snapshot entries of the models, and of
their blobs those that no other entry of any snapshot needs. Never touches a file anywhere else.
Order of removal as in the Hub's library: entries, refs, blobs, so that nothing ever points to what
is gone. Asks nobody.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from localmistral.errors import LocalMistralError
from localmistral.models.cache import (
    LocalModel,
    delete_blob,
    models_folder,
    repository_folder,
    scan_local,
)
from localmistral.models.filenames import shard_siblings
from localmistral.models.names import quote_name


@dataclass(frozen=True, slots=True, kw_only=True)
class Removal:
    """What removing some models deletes, and the bytes it frees and leaves to others."""

    models: tuple[LocalModel, ...]
    entries: tuple[Path, ...]  # in snapshots, or files of the own folder
    blobs: tuple[Path, ...]
    freed_bytes: int
    kept_bytes: int  # of blobs that other entries need


def plan_removal(models: Sequence[LocalModel]) -> Removal:
    """What goes when these models go; LocalMistralError for files that aren't ours to remove.

    An image encoder goes with the last model that it belongs to.
    """
    entries = list(dict.fromkeys(path for local in models for path in _entries_of(local)))
    entries += _lone_encoders(models)
    for entry in entries:
        if not _may_go(entry, models):
            raise LocalMistralError(
                f"{quote_name(str(entry))} was placed there by hand, outside the Hub's cache and "
                "localmistral's own folder, so it isn't removed.",
                "Delete the file yourself.",
            )
    needed = {
        blob
        for repository in {local.repository for local in models if local.repository}
        for entry in _files_below(repository_folder(repository) / "snapshots")
        if entry not in entries and (blob := _blob_of(entry))
    }
    blobs = dict.fromkeys(blob for entry in entries if (blob := _blob_of(entry)))
    free = tuple(blob for blob in blobs if blob not in needed)
    plain = [entry for entry in entries if not entry.is_symlink()]
    return Removal(
        models=tuple(models),
        entries=tuple(entries),
        blobs=free,
        freed_bytes=sum(map(_size_of, (*free, *plain))),
        kept_bytes=sum(_size_of(blob) for blob in blobs if blob in needed),
    )


def remove(removal: Removal) -> None:
    """Carry out a removal, and leave the cache as the Hub's library expects it.

    LocalMistralError where the system refuses, as Windows does for a file in use.
    """
    try:
        for entry in removal.entries:
            entry.unlink(missing_ok=True)
        for repository in {local.repository for local in removal.models if local.repository}:
            tidy_repository(repository_folder(repository))
        for blob in removal.blobs:
            delete_blob(blob)
        for repository in {local.repository for local in removal.models if local.repository}:
            _remove_husk(repository_folder(repository))
    except OSError as error:
        raise LocalMistralError(
            f"{quote_name(str(error.filename))} can't be removed: {error.strerror}.",
            "End the programs that use the model, then type the same again.",
        ) from error


def tidy_repository(folder: Path) -> None:
    """Remove snapshots without files, and the refs to snapshots that aren't there."""
    snapshots = folder / "snapshots"
    for snapshot in _subfolders(snapshots):
        _remove_empty(snapshot)
    there = {snapshot.name for snapshot in _subfolders(snapshots)}
    for ref in _files_below(folder / "refs"):
        with suppress(UnicodeDecodeError):
            if ref.read_text(encoding="utf-8").strip() not in there:
                ref.unlink()
    for absent in _subfolders(folder / ".no_exist"):
        if absent.name not in there:
            for name in _files_below(absent):  # empty files: names the Hub doesn't have
                name.unlink()


def _entries_of(local: LocalModel) -> Iterator[Path]:
    """All that is there of a model, broken links among them."""
    for path in shard_siblings(local.path):
        if path.is_symlink() or path.exists():
            yield path


def _lone_encoders(models: Sequence[LocalModel]) -> list[Path]:
    """The image encoders of these models that belong to no model that stays."""
    going = {path for local in models for path in _entries_of(local)}
    staying = [local for local in scan_local().models if not going & {*local.files, local.path}]
    used = {local.mmproj for local in staying}
    return list(
        dict.fromkeys(
            local.mmproj
            for local in models
            if local.mmproj and local.mmproj not in used and _may_go(local.mmproj, models)
        )
    )


def _may_go(path: Path, models: Sequence[LocalModel]) -> bool:
    """Whether a file lies in a snapshot of these models' repositories or in the own folder."""
    repositories = {local.repository for local in models if local.repository}
    snapshots = [repository_folder(repository) / "snapshots" for repository in repositories]
    return any(folder in path.parents for folder in snapshots) or _is_own(path)


def _is_own(path: Path) -> bool:
    """Whether a file really lies in the program's own folder, links in its path followed."""
    folder = Path(os.path.realpath(models_folder()))
    return Path(os.path.realpath(path.parent)).is_relative_to(folder)


def _blob_of(entry: Path) -> Path | None:
    """The blob an entry links to, if it is one of its own repository's; one step, no further."""
    try:
        target = Path(os.path.normpath(entry.parent / entry.readlink()))
    except OSError:
        return None  # a file of its own, where the system has no links
    snapshots = target.parent.parent / "snapshots"
    return target if target.parent.name == "blobs" and snapshots in entry.parents else None


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0  # a broken link


def _subfolders(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if path.is_dir() and not path.is_symlink()]
    except OSError:
        return []


def _files_below(folder: Path) -> list[Path]:
    return [Path(parent, name) for parent, _, names in os.walk(folder) for name in names]


def _remove_husk(folder: Path) -> None:
    """Remove a repository's folder once nothing is in it: while a partial download is, the Hub's
    library wants to see its folders."""
    if not _files_below(folder):
        _remove_empty(folder)


def _remove_empty(folder: Path) -> None:
    """Remove a folder and the folders in it as far as no file is in them."""
    for parent, _, _ in os.walk(folder, topdown=False):
        with suppress(OSError):  # not empty
            Path(parent).rmdir()
