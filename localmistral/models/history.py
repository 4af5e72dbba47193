"""What this program remembers of its models, in its own folder: when one was last used, and which
downloads were begun.

Losing it loses nothing but words: the Hub's cache holds what counts. Knows neither the network nor
what is on disk.
"""

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from localmistral.models.hub import HubFile


@dataclass(frozen=True, slots=True, kw_only=True)
class BegunDownload:
    """A download that was begun, and may have been ended by anything since."""

    name: str  # what pull takes to go on
    repository: str
    commit: str
    quant: str
    files: tuple[HubFile, ...]


def state_folder() -> Path:
    """Where the program keeps what it remembers; it may not exist."""
    return platformdirs.user_state_path("localmistral", appauthor=False)


def record_use(path: Path) -> None:
    """Note that the model of this file was loaded now; a disk that refuses changes nothing."""
    record = _use_of(path)
    with suppress(OSError):
        record.parent.mkdir(parents=True, exist_ok=True)
        record.touch()


def last_used_s(path: Path) -> float | None:
    """When the model of this file was last used, in seconds since 1970: by our own record, else
    by when the file was last read by anyone; None where neither is known."""
    for candidate, attribute in ((_use_of(path), "st_mtime"), (path, "st_atime")):
        with suppress(OSError):
            return float(getattr(candidate.stat(), attribute))
    return None


def record_download(download: BegunDownload) -> None:
    """Remember a download that begins, so that `list` can name what is unfinished."""
    record = _download_of(download.name)
    files = [[f.path, f.bytes, f.sha256, f.blob_id] for f in download.files]
    document = {
        "name": download.name,
        "repository": download.repository,
        "commit": download.commit,
        "quant": download.quant,
        "files": files,
        "begun": time.time(),
    }
    with suppress(OSError):
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(document), encoding="utf-8")


def forget_download(name: str) -> None:
    """The download is complete, or its files are removed."""
    with suppress(OSError):
        _download_of(name).unlink(missing_ok=True)


def begun_downloads() -> Iterator[BegunDownload]:
    """The downloads that were begun and not forgotten, by name."""
    found = []
    for path in (state_folder() / "downloads").glob("*.json"):
        with suppress(OSError, ValueError, KeyError, TypeError):  # cut short: as if never written
            found.append(_parse(json.loads(path.read_text(encoding="utf-8"))))
    yield from sorted(found, key=lambda download: download.name)


def _parse(document: dict[str, object]) -> BegunDownload:
    rows = document["files"]
    if not isinstance(rows, list):
        raise TypeError("files is no list")
    files = tuple(
        HubFile(path=str(path), bytes=int(size), sha256=sha256, blob_id=blob_id)
        for path, size, sha256, blob_id in rows
    )
    texts = {key: str(document[key]) for key in ("name", "repository", "commit", "quant")}
    return BegunDownload(files=files, **texts)


def _use_of(path: Path) -> Path:
    return state_folder() / "used" / _digest(str(path.absolute()))


def _download_of(name: str) -> Path:
    return state_folder() / "downloads" / f"{_digest(name)}.json"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", errors="replace")).hexdigest()[:32]
