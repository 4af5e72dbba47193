"""A Hub on loopback, as much of it as huggingface_hub and the program use, with faults to order.

Two real HTTP servers: the Hub itself on 127.0.0.1, and a storage host that it redirects to, under
the name localhost, so that the two are different hosts. Every request is noted with what it
carried and how many bytes of a body left.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

BLOCK_BYTES = 64 << 10
PAGE = b"<!DOCTYPE html><html><body>Please log in to the hotel's network</body></html>"

Host = Literal["api", "hub", "data"]


# Every request needs them, and hashing large contents takes longer than sending them.
@lru_cache(maxsize=16)
def sha256_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@lru_cache(maxsize=16)
def etag_of(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


@dataclass(slots=True, kw_only=True)
class Stored:
    """One file of a repository."""

    content: bytes
    lfs: bool = True
    served: bytes | None = None  # what the storage host sends instead, under another etag

    @property
    def sha256(self) -> str:
        return sha256_of(self.content)

    @property
    def blob_id(self) -> str:
        """git's sha1: of the file, or of the pointer that git keeps of a large one."""
        text = f"sha256:{self.sha256}".encode() if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(text) + text).hexdigest()

    @property
    def key(self) -> str:
        return self.sha256 if self.lfs else self.blob_id


@dataclass(slots=True, kw_only=True)
class Fault:
    """What goes wrong, at which host, for which paths, and how often (None: always)."""

    kind: Literal[
        "cut",
        "cut_whole",  # ignores the range, and cuts what it sends instead
        "stall",
        "status",
        "ignore_range",
        "flip",
        "html",
        "redirect",
        "short_range",
    ]
    at: Host = "data"
    path: str = "*"
    times: int | None = None
    after: int = 0  # bytes of a body before a cut or stall; the byte whose lowest bit flips
    status: int = 500
    headers: dict[str, str] = field(default_factory=dict)
    location: str = ""


@dataclass(slots=True, kw_only=True)
class Seen:
    """One request, as it came and as it was answered."""

    host: Host
    method: str
    path: str
    range: str | None
    authorization: str | None
    proxy_authorization: str | None
    began: float
    status: int = 0
    sent: int = 0  # bytes of the body


@dataclass(slots=True, kw_only=True)
class Repository:
    """A repository at its newest commit; older commits keep answering."""

    commits: list[tuple[str, dict[str, Stored]]]
    gated: bool = False
    token: str | None = None  # the only one that may read it

    @property
    def commit(self) -> str:
        return self.commits[-1][0]

    @property
    def files(self) -> dict[str, Stored]:
        return self.commits[-1][1]

    def at(self, revision: str) -> tuple[str, dict[str, Stored]] | None:
        if revision == "main":
            return self.commits[-1]
        return next((pair for pair in self.commits if pair[0] == revision), None)


class Hub:
    """The servers' shared state; make one with `running_hub`."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.faults: list[Fault] = []
        self.seen: list[Seen] = []
        self.bytes_per_second: float | None = None  # over all connections
        self.closing = threading.Event()
        self.lock = threading.Lock()
        self._free_at = 0.0
        self._hub = _serve(self, _HubHandler)
        self._data = _serve(self, _DataHandler)
        self.endpoint = f"http://127.0.0.1:{self._hub.server_address[1]}"
        self.data_endpoint = f"http://localhost:{self._data.server_address[1]}"

    def publish(self, repository: str, files: dict[str, Stored]) -> str:
        """Make a commit that has just these files; its hash."""
        text = repr([repository, time.monotonic(), sorted((p, f.key) for p, f in files.items())])
        commit = hashlib.sha1(text.encode()).hexdigest()
        if repository in self.repositories:
            self.repositories[repository].commits.append((commit, files))
        else:
            self.repositories[repository] = Repository(commits=[(commit, files)])
        return commit

    def order(self, fault: Fault) -> Fault:
        self.faults.append(fault)
        return fault

    def sent_bytes(self, host: Host = "data") -> int:
        """Bytes of bodies that left so far."""
        return sum(seen.sent for seen in self.seen if seen.host == host)

    def take_fault(self, host: Host, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.at == host and fault.times != 0 and fnmatch.fnmatch(path, fault.path):
                    if fault.times is not None:
                        fault.times -= 1
                    return fault
        return None

    def pace(self, count: int) -> None:
        """Wait until `count` more bytes may leave."""
        if self.bytes_per_second is None:
            return
        with self.lock:
            now = time.monotonic()
            start = max(self._free_at, now)
            self._free_at = start + count / self.bytes_per_second
        self.closing.wait(max(0.0, start - now))

    def close(self) -> None:
        self.closing.set()
        for server in (self._hub, self._data):
            server.shutdown()
            server.server_close()


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A Hub without repositories, until the block ends."""
    hub = Hub()
    try:
        yield hub
    finally:
        hub.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64
    hub: Hub

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients may go away at any moment here; what else goes wrong, a test shall notice."""
        import sys

        if not isinstance(sys.exception(), OSError | ValueError):
            super().handle_error(request, client_address)


def _serve(hub: Hub, handler: type[_Handler]) -> _Server:
    server = _Server(("127.0.0.1", 0), handler)
    server.hub = hub
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    return server


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server
    seen: Seen

    def setup(self) -> None:
        super().setup()
        # What lies in a socket's buffer counts as sent; keep that little.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BLOCK_BYTES)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet: `Hub.seen` has it."""

    def note(self, host: Host) -> Fault | None:
        hub, headers = self.server.hub, self.headers
        self.seen = Seen(
            host=host,
            method=self.command,
            path=unquote(self.path),
            range=headers.get("Range"),
            authorization=headers.get("Authorization"),
            proxy_authorization=headers.get("Proxy-Authorization"),
            began=time.monotonic(),
        )
        hub.seen.append(self.seen)
        return hub.take_fault(host, unquote(self.path))

    def answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.seen.status = status
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.send_body(body)

    def send_body(self, body: bytes, stop_after: int | None = None) -> None:
        view = memoryview(body)[:stop_after]
        for at in range(0, len(view), BLOCK_BYTES):
            block = view[at : at + BLOCK_BYTES]
            self.server.hub.pace(len(block))
            # Counted first: who has received it must find it counted.
            self.seen.sent += len(block)
            try:
                self.wfile.write(block)
            except OSError:
                self.seen.sent -= len(block)
                raise

    def answer_json(self, value: Any, status: int = 200, **headers: str) -> None:
        body = json.dumps(value).encode()
        self.answer(status, {"Content-Type": "application/json"} | headers, body)

    def answer_simple_fault(self, fault: Fault | None) -> bool:
        """Whether the fault is one that needs nothing of the file."""
        if fault is None:
            return False
        if fault.kind == "status":
            self.answer(fault.status, fault.headers)
        elif fault.kind == "html":
            self.answer(200, {"Content-Type": "text/html; charset=utf-8"}, PAGE)
        elif fault.kind == "redirect":
            self.answer(302, {"Location": fault.location})
        else:
            return False
        return True

    def send_content(self, content: bytes, headers: dict[str, str], fault: Fault | None) -> None:
        """A file or a range of it, with what is to go wrong."""
        start, end, status = 0, len(content), 200
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        kind = fault.kind if fault else None
        if fault and kind == "flip":
            changed = bytearray(content)
            changed[fault.after] ^= 1
            content = bytes(changed)
        if asked and kind not in ("ignore_range", "cut_whole"):
            start, status = int(asked[1]), 206
            end = min(int(asked[2]) + 1 if asked[2] else end, end)
            if kind == "short_range":
                end = min(end, start + max(1, (end - start) // 2))
            if start >= len(content):
                self.answer(416, {"Content-Range": f"bytes */{len(content)}"})
                return
            headers = headers | {"Content-Range": f"bytes {start}-{end - 1}/{len(content)}"}
        body = content[start:end]
        if fault is None or kind not in ("cut", "cut_whole", "stall"):
            self.answer(status, headers, body)
            return
        self.seen.status = status
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.send_body(body, fault.after)
        if kind == "stall":
            self.server.hub.closing.wait(60)
        self.close_connection = True


class _HubHandler(_Handler):
    """The API and `resolve`."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        """paths-info: describe the paths in the form."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        is_form = "form" in self.headers.get("Content-Type", "")
        paths = parse_qs(body).get("paths", []) if is_form else json.loads(body)["paths"]
        self._answer_api([*paths])

    def do_GET(self) -> None:
        if self.path.startswith("/api/"):
            self._answer_api(None)
        else:
            self._resolve()

    def _answer_api(self, paths: list[str] | None) -> None:
        if self.answer_simple_fault(self.note("api")):
            return
        path = urlsplit(self.seen.path).path
        asked = re.fullmatch(
            r"/api/models/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+))?/?", path
        )
        repository = self.server.hub.repositories.get(asked[1]) if asked else None
        if asked is None or repository is None:
            self.answer_json({"error": "Repository not found"}, 404, **_code("RepoNotFound"))
            return
        if not self._may_read(repository):
            self.answer_json({"error": "Invalid username or password."}, 401)
            return
        found = repository.at(asked[3] or "main")
        if found is None:
            self.answer_json({"error": "Invalid rev id"}, 404, **_code("RevisionNotFound"))
        elif asked[2] in ("tree", "paths-info"):
            files = {p: f for p, f in found[1].items() if paths is None or p in paths}
            self.answer_json([_tree_entry(p, f) for p, f in files.items()])
        else:
            self.answer_json(_info(asked[1], *found))

    def _may_read(self, repository: Repository) -> bool:
        token = repository.token
        return token is None or self.seen.authorization == f"Bearer {token}"

    def _resolve(self) -> None:
        fault = self.note("hub")
        if self.answer_simple_fault(fault):
            return
        path = urlsplit(self.seen.path).path
        asked = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        repository = self.server.hub.repositories.get(asked[1]) if asked else None
        found = repository.at(asked[2]) if asked and repository else None
        if asked is None or repository is None or found is None:
            self.answer(404, _code("RepoNotFound"))
            return
        if not self._may_read(repository):
            self.answer(401, {"X-Error-Message": "Invalid username or password."})
            return
        if repository.gated:
            self.answer(403, _code("GatedRepo"))
            return
        commit, files = found
        stored = files.get(asked[3])
        if stored is None:
            self.answer(404, _code("EntryNotFound") | {"X-Repo-Commit": commit})
            return
        headers = {"X-Repo-Commit": commit, "ETag": f'"{stored.blob_id}"'}
        if not stored.lfs:
            headers |= {"Content-Type": "text/plain; charset=utf-8"}
            self.send_content(stored.content, headers, fault)
            return
        data = self.server.hub.data_endpoint
        self.answer(
            302,
            headers
            | {
                "X-Linked-ETag": f'"{stored.sha256}"',
                "X-Linked-Size": str(len(stored.content)),
                "Location": f"{data}/{asked[1]}/{commit}/{asked[3]}?signature=top-secret",
            },
        )


class _DataHandler(_Handler):
    """The storage host: contents of large files."""

    def do_GET(self) -> None:
        fault = self.note("data")
        if self.answer_simple_fault(fault):
            return
        path = urlsplit(self.seen.path).path
        asked = re.fullmatch(r"/([^/]+/[^/]+)/([0-9a-f]{40})/(.+)", path)
        repository = self.server.hub.repositories.get(asked[1]) if asked else None
        found = repository.at(asked[2]) if asked and repository else None
        stored = found[1].get(asked[3]) if asked and found else None
        if stored is None:
            self.answer(404, {})
            return
        content = stored.content if stored.served is None else stored.served
        headers = {
            "ETag": f'"{etag_of(content)}"',
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
        }
        self.send_content(content, headers, fault)


def _code(code: str) -> dict[str, str]:
    return {"X-Error-Code": code, "X-Error-Message": code}


def _info(repository: str, commit: str, files: dict[str, Stored]) -> dict[str, Any]:
    return {
        "_id": "0" * 24,
        "id": repository,
        "modelId": repository,
        "sha": commit,
        "private": False,
        "gated": False,
        "disabled": False,
        "tags": [],
        "downloads": 0,
        "likes": 0,
        "siblings": [_sibling(path, stored) for path, stored in files.items()],
    }


def _sibling(path: str, stored: Stored) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "rfilename": path,
        "size": len(stored.content),
        "blobId": stored.blob_id,
    }
    if stored.lfs:
        entry["lfs"] = {"sha256": stored.sha256, "size": len(stored.content), "pointerSize": 134}
    return entry


def _tree_entry(path: str, stored: Stored) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "type": "file",
        "path": path,
        "size": len(stored.content),
        "oid": stored.blob_id,
    }
    if stored.lfs:
        entry["lfs"] = {"oid": stored.sha256, "size": len(stored.content), "pointerSize": 134}
    return entry
