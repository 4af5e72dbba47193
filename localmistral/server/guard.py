"""The gate in front of every route: who may ask, and what a body may be.

An ASGI layer that refuses before a body is read: DNS rebinding (Host), missing keys, bodies that
are no JSON, compressed or too large. A foreign page can't send JSON without asking first
(preflight), and without `allow_origins` nobody answers that. It also puts in order what the
routes should not have to know of: the forms of a path, and HEAD. Knows nothing of models.
"""

import contextlib
import hmac
import ipaddress
import json
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import quote

from localmistral.server.errors import Failure, describe_status
from localmistral.server.settings import LOCAL_NAMES, ServerSettings, read_host_name
from localmistral.server.wire import PROOF_PATH

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

REQUEST_ID = "request_id"
"""Where a request's id stands in the state of its scope."""
OPEN_PATHS = frozenset({"/health", "/", PROOF_PATH})
"""Told to anybody: whether the server lives, which one it is, and how to use it."""


class _TooLargeError(Exception):
    """The body went over the limit while it was read."""


class Guard:
    """Wraps `app`; see the module."""

    def __init__(self, app: App, settings: ServerSettings) -> None:
        self._app = app
        self._settings = settings
        self._hosts = {*LOCAL_NAMES, *map(read_host_name, settings.allow_hosts)}
        if settings.host not in ("0.0.0.0", "::", ""):
            self._hosts.add(settings.host.casefold().strip("[]"))
        keys = (*settings.api_keys, settings.local_token) if settings.api_keys else ()
        self._keys = [key.encode() for key in keys if key]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value for name, value in scope["headers"]}
        scope = _put_in_order(scope, headers)
        failure = self._refuse(scope, headers)
        if failure is not None:
            await _send_failure(failure, scope, send)
            return
        await self._pass_bounded(scope, receive, send)

    def _refuse(self, scope: Scope, headers: dict[str, bytes]) -> Failure | None:
        return (
            self._refuse_host(headers)
            or self._refuse_key(scope, headers)
            or self._refuse_body(scope, headers)
        )

    def _refuse_host(self, headers: dict[str, bytes]) -> Failure | None:
        host = headers.get("host", b"").decode("latin-1")
        name = read_host_name(host)
        # an address can't be rebound to another machine, a name can
        if name in self._hosts or (not self._settings.is_loopback and _is_address(name)):
            return None
        return describe_status(
            403,
            f"The Host {host[:100]!r} is not this server's; start it with --allow-host "
            f"{name[:100] or 'NAME'} to allow it.",
            code="host_not_allowed",
        )

    def _refuse_key(self, scope: Scope, headers: dict[str, bytes]) -> Failure | None:
        if not self._keys or scope["path"] in OPEN_PATHS or scope["method"] == "OPTIONS":
            return None
        bearer = headers.get("authorization", b"")
        bearer = bearer[7:] if bearer[:7].lower() == b"bearer " else b""
        # some clients send both, one of them meant for another server
        given = [key.strip() for key in (bearer, headers.get("x-api-key", b""))]
        # every key is compared, each in constant time: how long it takes tells nothing
        if sum(hmac.compare_digest(one, key) for one in given for key in self._keys):
            return None
        what = "The API key is wrong" if any(given) else "This server asks for an API key"
        return describe_status(
            401, f"{what}: send it as Authorization: Bearer KEY.", code="invalid_api_key"
        )

    def _refuse_body(self, scope: Scope, headers: dict[str, bytes]) -> Failure | None:
        has_body = "transfer-encoding" in headers or headers.get("content-length", b"0") != b"0"
        if scope["method"] != "POST" or not (has_body or "content-type" in headers):
            return None
        kind = headers.get("content-type", b"").decode("latin-1").partition(";")[0].strip().lower()
        if kind != "application/json":
            return describe_status(
                415,
                f"The Content-Type is {kind[:60] or 'missing'!r}, it must be application/json.",
                code="unsupported_media_type",
            )
        encoding = headers.get("content-encoding", b"identity").decode("latin-1").lower()
        if encoding.strip() not in ("", "identity"):
            return describe_status(
                415, f"Bodies of Content-Encoding {encoding[:40]!r} are not taken."
            )
        length = headers.get("content-length", b"0").decode("latin-1")
        if length.isdecimal() and int(length[:20]) > self._settings.max_body_bytes:
            return self._too_large()
        return None

    def _too_large(self) -> Failure:
        return describe_status(
            413,
            f"The body is larger than {self._settings.max_body_bytes:,} bytes.",
            code="request_too_large",
        )

    async def _pass_bounded(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, counting a body that came without a length; too large a one is answered here,
        whatever the application makes of its end."""
        count, is_over = 0, False

        async def receive_bounded() -> Message:
            nonlocal count, is_over
            message = await receive()
            count += len(message.get("body", b""))
            if count > self._settings.max_body_bytes:
                is_over = True
                raise _TooLargeError
            return message

        async def send_unless_over(message: Message) -> None:
            if not is_over:
                await send(message)

        with contextlib.suppress(_TooLargeError):
            await self._app(scope, receive_bounded, send_unless_over)
        if is_over:
            await _send_failure(self._too_large(), scope, send)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _put_in_order(scope: Scope, headers: dict[str, bytes]) -> Scope:
    """The scope with the path that is meant, and GET for HEAD, whose answer loses its body later.

    A base URL that ends in a slash, or lacks one, makes paths like //v1/models and /v1/models/. A
    path may also be a whole URL, as a proxy is asked, of the very host that the header names.
    """
    path: str = scope["path"]
    path = path.removeprefix("http://" + headers.get("host", b"").decode("latin-1"))
    path = "/" + re.sub("/+", "/", path).strip("/")
    method = "GET" if scope["method"] == "HEAD" else scope["method"]
    return {**scope, "path": path, "raw_path": quote(path).encode(), "method": method}


def request_id_of(scope: Scope) -> str:
    """The id that the outermost layer gave; empty where there is none."""
    return str(scope.get("state", {}).get(REQUEST_ID, ""))


async def _send_failure(failure: Failure, scope: Scope, send: Send) -> None:
    body = json.dumps(failure.to_body(scope["path"], request_id_of(scope))).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body))}
    headers |= {"connection": "close"} if failure.status == 413 else {}
    pairs = [(k.lower().encode(), v.encode()) for k, v in {**headers, **failure.headers}.items()]
    await send({"type": "http.response.start", "status": failure.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})
