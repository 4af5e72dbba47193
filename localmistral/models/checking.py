"""Whether a model on disk is what was published, by its hashes.

The Hub's cache names a file by its hash, so this needs no network where the cache has links; where
it has none, the hashes are asked of the Hub. Nothing is known of files placed by hand.
"""

from pathlib import Path

from localmistral.errors import DownloadError
from localmistral.models.cache import LocalModel, repository_folder
from localmistral.models.download import check_files, list_repository, local_listing
from localmistral.models.filenames import shard_siblings
from localmistral.models.hub import FileCheck, HubFile, Listing, OnProgress


def check_local(local: LocalModel, *, on_progress: OnProgress) -> tuple[FileCheck, ...]:
    """Hash the shards and the image encoder of a model; a corrupt file is removed.

    Files placed by hand come back as unknown.
    """
    if local.repository is None or local.revision is None:
        return tuple(_unknown(path) for path in local.files)
    snapshot = repository_folder(local.repository) / "snapshots" / local.revision
    wanted = [*shard_siblings(local.path), *([local.mmproj] if local.mmproj else [])]
    paths = [path.relative_to(snapshot).as_posix() for path in wanted if snapshot in path.parents]
    listed = {file.path: file for file in _listing_of(local.repository, local.revision).files}
    there = [listed[path] for path in paths if path in listed]
    missing = [snapshot / path for path in paths if path not in listed]
    checks = check_files(local.repository, local.revision, there, on_progress=on_progress)
    return (*checks, *(_missing(path) for path in missing))


def _listing_of(repository: str, commit: str) -> Listing:
    """By the names of blobs; by the Hub where files have none, as far as it can be reached."""
    listing = local_listing(repository, commit)
    if all(file.key for file in listing.files):
        return listing
    try:
        published = {file.path: file for file in list_repository(repository, commit).files}
    except DownloadError:
        return listing  # the files without a hash come back as unknown
    files = tuple(published.get(file.path, file) for file in listing.files)
    return Listing(repository=repository, commit=commit, files=files)


def _unknown(path: Path) -> FileCheck:
    file = HubFile(path=path.name, bytes=path.stat().st_size)
    return FileCheck(file=file, path=path, state="unknown", problem="no hash is known of it")


def _missing(path: Path) -> FileCheck:
    file = HubFile(path=path.name, bytes=0)
    return FileCheck(file=file, path=path, state="missing", problem="it isn't there")
