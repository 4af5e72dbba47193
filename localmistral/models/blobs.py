"""One repository's folder in the Hub's cache: blobs by hash, snapshots that link to them, refs.

Lays files down as the Hub's own library does, so that it and other programs see them; where links
can't be made (Windows without developer mode), a snapshot holds the file itself, as there.
Knows neither the network nor what a download is.
"""

import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from localmistral.models.hub import HubFile, check_commit, check_path, check_revision
from localmistral.models.journal import is_key

PREFIX = "models--"
_HASHED_BYTES = 1 << 20
# What marks a folder as one that backups may leave out: bford.info/cachedir.
_CACHE_TAG = "Signature: 8a477f597d28d172789f06886806bc55\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a repository's files lie; nothing of it need exist."""

    cache: Path
    folder: str  # `models--org--name`

    @property
    def blobs(self) -> Path:
        """The folder of contents, named by their hashes."""
        return self.cache / self.folder / "blobs"

    @property
    def snapshots(self) -> Path:
        """The folder with one folder per commit."""
        return self.cache / self.folder / "snapshots"

    def lock_path(self, key: str) -> Path:
        """The file that the Hub's library, too, locks while it brings this blob."""
        return self.cache / ".locks" / self.folder / f"{key}.lock"

    def snapshot_path(self, commit: str, path: str) -> Path:
        """Where a file of a commit belongs; DownloadError for names that aren't safe."""
        return self.snapshots.joinpath(check_commit(commit), *check_path(path))


def place_of(cache: Path, repository: str) -> Place:
    """`org/name` -> its folder in the cache."""
    return Place(cache=cache, folder=PREFIX + repository.replace("/", "--"))


def list_places(cache: Path) -> tuple[Place, ...]:
    """All model repositories in a cache; none where it can't be read."""
    try:
        names = sorted(p.name for p in cache.iterdir() if p.name.startswith(PREFIX) and p.is_dir())
    except OSError:
        return ()
    return tuple(Place(cache=cache, folder=name) for name in names)


def has_size(path: Path, size: int) -> bool:
    """Whether this is a file of that many bytes, through links."""
    try:
        return path.is_file() and path.stat().st_size == size
    except OSError:
        return False


def find_twin(place: Place, file: HubFile, digest: Callable[[Path], str]) -> Path | None:
    """The same content under another commit or name where snapshots hold files instead of links."""
    for path in _files_under(place.snapshots):
        if not path.is_symlink() and has_size(path, file.bytes) and digest(path) == file.key:
            return path
    return None


def adopt_twin(twin: Path, blob: Path) -> None:
    """Give a blob the content of a file that lies elsewhere, shared where the disk can do that."""
    blob.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(twin, blob)
    except OSError:
        shutil.copyfile(twin, blob)


def link_snapshot(place: Place, commit: str, file: HubFile, key: str) -> Path:
    """Let the commit's snapshot have a blob that is there, by a link or else by moving it."""
    pointer, blob = place.snapshot_path(commit, file.path), place.blobs / key
    if has_size(pointer, file.bytes) and (not pointer.is_symlink() or pointer.samefile(blob)):
        return pointer
    tag_cache(place.cache)
    pointer.parent.mkdir(parents=True, exist_ok=True)
    # A link under another name takes the place of what is there in one step.
    new = pointer.with_name(f".{uuid.uuid4().hex}")
    try:
        if os.environ.get("HF_HUB_DISABLE_SYMLINKS", "").upper() in ("1", "ON", "YES", "TRUE"):
            raise OSError
        new.symlink_to(os.path.relpath(blob, pointer.parent))
    except OSError:
        new = blob
    new.replace(pointer)
    return pointer


def write_ref(place: Place, revision: str, commit: str) -> None:
    """Note which commit a branch or tag stood for, by which other programs find the snapshot."""
    ref = place.cache.joinpath(place.folder, "refs", *check_revision(revision))
    if ref.is_file() and ref.read_text(encoding="utf-8", errors="replace").strip() == commit:
        return  # the cache may be one that can only be read
    ref.parent.mkdir(parents=True, exist_ok=True)
    new = ref.with_name(f".{uuid.uuid4().hex}")
    new.write_text(commit, encoding="utf-8")
    new.replace(ref)


def tag_cache(cache: Path) -> None:
    """Mark the cache for backup programs, as the Hub's library does."""
    tag = cache / "CACHEDIR.TAG"
    if not tag.exists():
        cache.mkdir(parents=True, exist_ok=True)
        tag.write_text(_CACHE_TAG, encoding="ascii")


def linked_key(path: Path) -> str | None:
    """The hash of the blob that a snapshot's link points to; None for anything else."""
    if not path.is_symlink():
        return None
    key = path.readlink().name
    return key if is_key(key) else None


def discard(place: Place, path: Path) -> None:
    """Delete a file of a snapshot, its blob and every link to that: nothing can load it then."""
    content, key = path.resolve(), linked_key(path)
    for other in _files_under(place.snapshots):
        if other.is_symlink() and other.resolve() == content:
            other.unlink()
    path.unlink(missing_ok=True)
    if key is not None:
        (place.blobs / key).unlink(missing_ok=True)  # itself a link where blobs are shared
    if content.is_relative_to(place.cache.resolve()):
        content.unlink(missing_ok=True)


def hash_file(path: Path, digest: "hashlib._Hash", report: Callable[[int], None]) -> str:
    """The hexadecimal digest of a file; `report` hears how many bytes are done."""
    buffer, done = memoryview(bytearray(_HASHED_BYTES)), 0
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            done += count
            report(done)
    return digest.hexdigest()


def _files_under(folder: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(folder):
        yield from (Path(parent, name) for name in names)
