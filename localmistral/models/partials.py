"""Unfinished downloads on this disk: whose they are, and how far they got.

The Hub's cache names their files by hash alone; the names come from what was remembered when the
download began. Removes no file.
"""

from dataclasses import dataclass
from pathlib import Path

from localmistral.models.blobs import PREFIX, list_places
from localmistral.models.cache import hub_cache
from localmistral.models.download import missing_bytes
from localmistral.models.history import BegunDownload, begun_downloads, forget_download
from localmistral.models.journal import DATA_SUFFIX, allocated_bytes, partial_keys


@dataclass(frozen=True, slots=True, kw_only=True)
class PartialDownload:
    """A download that hasn't ended: `name` is what pull takes to go on, as far as it's known."""

    name: str
    repository: str
    quant: str | None
    done_bytes: int  # on this disk, finished files of it included
    bytes: int | None  # of the whole; None where nothing is remembered of it


def list_partials() -> tuple[PartialDownload, ...]:
    """All unfinished downloads in the Hub's cache, by name; those in progress elsewhere too."""
    found = {begun: _measure(begun) for begun in begun_downloads()}
    known = {
        (begun.repository, file.key)
        for begun, partial in found.items()
        if partial is not None
        for file in begun.files
    }
    partials = [partial for partial in found.values() if partial is not None]
    for place in list_places(hub_cache()):
        repository = place.folder.removeprefix(PREFIX).replace("--", "/")
        keys = [key for key in partial_keys(place.blobs) if (repository, key) not in known]
        if keys:
            partials.append(_unnamed(repository, [place.blobs / key for key in keys]))
    return tuple(sorted(partials, key=lambda partial: partial.name))


def forget_swept() -> None:
    """Remember no longer what has nothing unfinished on this disk; downloads that another process
    is at stay."""
    unfinished = {key for place in list_places(hub_cache()) for key in partial_keys(place.blobs)}
    for begun in begun_downloads():
        if unfinished.isdisjoint(file.key for file in begun.files):
            forget_download(begun.name)


def _measure(begun: BegunDownload) -> PartialDownload | None:
    """None for one that was finished or swept since by someone else."""
    total = sum(file.bytes for file in begun.files)
    missing = missing_bytes(begun.repository, begun.files, commit=begun.commit)
    if not 0 < missing < total:
        return None
    return PartialDownload(
        name=begun.name,
        repository=begun.repository,
        quant=begun.quant,
        done_bytes=total - missing,
        bytes=total,
    )


def _unnamed(repository: str, blobs: list[Path]) -> PartialDownload:
    files = [blob.with_name(f"{blob.name}{DATA_SUFFIX}") for blob in blobs]
    there = [file for file in files if file.is_file()]
    return PartialDownload(
        name=f"hf:{repository}",
        repository=repository,
        quant=None,
        done_bytes=sum(map(allocated_bytes, there)),
        bytes=None,
    )
