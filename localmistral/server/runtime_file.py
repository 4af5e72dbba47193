"""Which servers of this user run on this machine: one small file each, for `run` to find them.

The file holds a random key that its server accepts, so only its owner may read it. Knows nothing
of HTTP, and takes nobody's word: whether a server really answers is for the reader to see.
"""

import contextlib
import json
import logging
import os
import socket
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import platformdirs

logger = logging.getLogger("localmistral.server")

_MODE = 0o600
_JSON_TYPES: dict[Any, Any] = {str: str, int: int, bool: bool, float: (int, float)}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerRecord:
    """A server as its file describes it.

    `machine` is the host's name, since home folders may be shared; `names` are what a request may
    call the model, `path` its first file. `started` is in seconds since 1970.
    """

    pid: int
    machine: str
    host: str
    port: int
    token: str
    names: tuple[str, ...]
    path: str
    name: str
    title: str
    context: int
    has_effort_switch: bool
    started: float

    def serves(self, wanted: str) -> bool:
        """Whether `wanted`, as -m takes it, is the model of this server."""
        if wanted.casefold() in {name.casefold() for name in self.names} and not _is_file(wanted):
            return True
        with contextlib.suppress(OSError, ValueError):
            return Path(wanted).samefile(self.path)
        return False


def _is_file(name: str) -> bool:
    """A file's own name may be a model's too: then the file is what counts."""
    try:
        return Path(name).is_file()
    except (OSError, ValueError):
        return False


def servers_folder() -> Path:
    """Where the files are; it may not exist."""
    return platformdirs.user_state_path("localmistral", appauthor=False) / "servers"


def machine_name() -> str:
    return socket.gethostname()


@contextlib.contextmanager
def published(record: ServerRecord) -> Iterator[None]:
    """The server can be found while the block lasts; one that can't be written is only said."""
    path = servers_folder() / f"{record.machine}-{record.pid}.json"
    try:
        _write(path, record)
    except OSError as error:
        logger.warning(
            "%s can't be written (%s): `localmistral run` won't use this server.",
            path,
            error.strerror,
        )
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()


def _write(path: Path, record: ServerRecord) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    # made with its mode, so that at no moment somebody else could open it
    handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _MODE)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump(asdict(record), file)
    partial.replace(path)


def read_servers() -> tuple[ServerRecord, ...]:
    """The servers of this machine whose process lives, the last one started first.

    Files of processes that are gone, and what can't be read as a record, are removed.
    """
    found = []
    for path in servers_folder().glob("*.json"):
        record = _read(path)
        if record is None or (record.machine == machine_name() and not _is_running(record.pid)):
            _remove(path)
        elif record.machine == machine_name():
            found.append(record)
    return tuple(sorted(found, key=lambda record: record.started, reverse=True))


def forget(record: ServerRecord) -> None:
    """Remove the file of a server that turned out not to be there any more."""
    _remove(servers_folder() / f"{record.machine}-{record.pid}.json")


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def _read(path: Path) -> ServerRecord | None:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        values = {field.name: document[field.name] for field in fields(ServerRecord)}
        kinds = {field.name: _JSON_TYPES.get(field.type, list) for field in fields(ServerRecord)}
        if not all(isinstance(values[name], kinds[name]) for name in values):
            return None
        return ServerRecord(**{**values, "names": tuple(map(str, values["names"]))})
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _is_running(pid: int) -> bool:
    import psutil

    return bool(pid > 0 and psutil.pid_exists(pid))
