"""What the Hub says about files, and whether its words may become names on this disk.

Pure values and checks: knows neither network nor cache. Everything that turns a name from the Hub
into a path goes through `check_path`, `check_commit` or `check_revision` first.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from localmistral.errors import DownloadError
from localmistral.models.names import quote_name

_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHA1 = re.compile(r"[0-9a-f]{40}")
# Names that Windows gives to devices, whatever follows their first dot.
_DEVICES = re.compile(
    r"(?:con|prn|aux|nul|conin\$|conout\$|com[0-9¹²³]|lpt[0-9¹²³]) *(?:\.|$)", re.I | re.ASCII
)
_UNPORTABLE = re.compile(r'[\x00-\x1f\x7f-\x9f\ud800-\udfff<>:"|?*\\]')
_LONGEST_NAME = 255  # bytes; the limit of ext4, APFS and NTFS for one component

Phase = Literal["waiting", "downloading", "verifying", "done"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HubFile:
    """One file of a repository at one commit."""

    path: str  # within the repository, with slashes
    bytes: int
    sha256: str | None = None  # None for small files that git itself stores
    blob_id: str | None = None  # git's own sha1, which identifies those

    @property
    def key(self) -> str | None:
        """What the Hub's cache names the content by; None while neither hash is known."""
        return self.sha256 or self.blob_id


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """All files of a repository at one commit."""

    repository: str
    commit: str  # 40 hexadecimal digits
    files: tuple[HubFile, ...]
    revision: str | None = None  # the branch or tag that was asked for


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a download is; all counts are bytes."""

    file: str  # path in the repository
    file_done: int
    file_bytes: int
    done: int  # over all files, with those that were there already
    total: int
    resumed: int  # of `done`, what was on this disk before the download began
    phase: Phase
    note: str = ""  # `retrying in 4 s: ...`; empty when all is well


OnProgress = Callable[[Progress], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class SweptFiles:
    """Partial downloads that were removed."""

    count: int
    bytes: int  # of disk that was freed


@dataclass(frozen=True, slots=True, kw_only=True)
class FileCheck:
    """What a look at one file on disk found."""

    file: HubFile
    path: Path  # in the snapshot
    state: Literal["ok", "missing", "corrupt", "unknown"]  # unknown: no hash to compare with
    problem: str = ""  # one sentence; empty when ok


def check_path(path: str) -> tuple[str, ...]:
    """The parts of a file's path in a repository, safe on every system; DownloadError else."""
    parts = tuple(path.split("/"))
    reason = next((reason for part in parts if (reason := _fault_of(part))), "")
    if reason:
        raise DownloadError(f"The Hub names a file {quote_name(path)}, which {reason}.")
    return parts


def check_commit(commit: str) -> str:
    """A commit as 40 hexadecimal digits; DownloadError else."""
    if not _SHA1.fullmatch(commit):
        raise DownloadError(f"The Hub names a commit {quote_name(commit)}, which is no git hash.")
    return commit


def check_revision(revision: str) -> tuple[str, ...]:
    """The parts of a branch's or tag's name; DownloadError where they can't be file names."""
    parts = tuple(revision.split("/"))
    if any(_fault_of(part) for part in parts):
        raise DownloadError(f"{quote_name(revision)} can't be the name of a revision.")
    return parts


def check_file(file: HubFile) -> HubFile:
    """A file whose path, size and hashes may all be used; DownloadError else."""
    check_path(file.path)
    sha256_fits = file.sha256 is None or _SHA256.fullmatch(file.sha256)
    blob_id_fits = file.blob_id is None or _SHA1.fullmatch(file.blob_id)
    if not (sha256_fits and blob_id_fits and file.bytes >= 0):
        raise DownloadError(f"The Hub gives {quote_name(file.path)} a size or hash that is none.")
    return file


def _fault_of(part: str) -> str:
    """Why one part of a path can't be a file name, as the end of a sentence; empty when it can."""
    if part in ("", ".", ".."):
        return "leads outside its folder"
    if _UNPORTABLE.search(part) or part.endswith((" ", ".")):
        return "has characters that no file name may have everywhere"
    if _DEVICES.match(part):
        return "is the name of a device on Windows"
    if len(part.encode("utf-8", "surrogatepass")) > _LONGEST_NAME:
        return f"has a part longer than {_LONGEST_NAME} bytes"
    return ""
