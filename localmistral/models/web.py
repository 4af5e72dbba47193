"""Byte ranges of one file over HTTP, from an address of the Hub and wherever that redirects to.

Says of each failure whether another try may help. Sends credentials to the address' own origin
and nowhere else, and keeps addresses out of messages: those that storage hosts sign are secrets.
Knows neither huggingface_hub nor the disk. Uses urllib3, which takes a third of
the time per byte that httpx2 takes, the Hub's library's own; certificates are judged as there.
"""

import email.utils
import hashlib
import re
import ssl
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from urllib.parse import unquote, urljoin, urlsplit

import httpx2
import urllib3
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    NameResolutionError,
    NewConnectionError,
    ProtocolError,
    ProxyError,
    ReadTimeoutError,
    SSLError,
)

from localmistral.errors import DownloadError
from localmistral.models.names import quote_name

_MAX_REDIRECTS = 10
_IDLE_CONNECTIONS = 32  # kept open for the next range; more than any caller runs at once
_READ_BYTES = 1 << 18  # at most, from a connection at once
_CREDENTIALS = ("authorization", "cookie", "proxy-authorization")
_REDIRECTS = (301, 302, 303, 307, 308)
_RETRIED_STATUSES = (408, 425, 429)  # and all from 500 on, but:
_LOGIN_REQUIRED = 511  # what captive portals are meant to answer
_REFUSALS = (401, 403, 404, 410)
# No number is longer than 19 digits: Python refuses to read those of thousands.
_COUNT = re.compile(r"[0-9]{1,19}")
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19}|\*)")
_HUB_WINDOW = re.compile(r";\s*r=0\s*;\s*t=([0-9]{1,9})")  # ratelimit: "api";r=0;t=55
_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
CONTINUES = "run the same command again: it continues"


class InterruptedTransferError(Exception):
    """Nothing came, or it broke off: another try may succeed. `wait_s` is what the server asks."""

    def __init__(self, reason: str, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.wait_s = wait_s


class FileChangedError(DownloadError):
    """What is at the address now isn't the file that was listed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteFile:
    """A file at an address of the Hub."""

    name: str  # for messages
    url: str
    bytes: int
    key: str | None  # sha256 or git sha1, where known
    headers: Mapping[str, str] = field(repr=False)  # may hold a token


@dataclass(frozen=True, slots=True, kw_only=True)
class Body:
    """An answer about to be read: bytes [start, end) of the file, though a connection may break.

    `start` is 0 where the server ignored the range that was asked for.
    """

    start: int
    end: int
    version: str  # a fingerprint of the strong etag of the bytes' own host; empty without one
    chunks: Iterator[bytes]


class Source:
    """Opens ranges of one file; several threads may. Remembers where the Hub redirected to."""

    def __init__(self, file: RemoteFile, *, stall_s: float, connect_s: float) -> None:
        self.file = file
        self.identity = file.key or ""  # sha256 or git sha1 as the Hub's answer names it
        self._timeout = urllib3.Timeout(connect=min(stall_s, connect_s), read=stall_s)
        self._location: str | None = None

    @contextmanager
    def open(self, start: int, end: int) -> Iterator[Body]:
        """Ask for bytes [start, end).

        Raises InterruptedTransferError, FileChangedError or another DownloadError, also for what
        goes wrong while the caller reads.
        """
        remembered = self._location
        try:
            with ExitStack() as stack, self._say_errors():
                try:
                    url, response = self._ask(remembered, start, end, stack)
                except ValueError as error:  # what the Hub redirects to is no address
                    raise self._unreadable(error) from None
                self._refuse_status(response, host_of(url), was_remembered=remembered is not None)
                self._location = url
                yield self._body(response, host_of(url), start, end)
        except InterruptedTransferError:
            self._location = None  # it may have expired
            raise

    def _ask(
        self, remembered: str | None, start: int, end: int, stack: ExitStack
    ) -> tuple[str, urllib3.BaseHTTPResponse]:
        """Where all redirects lead and the answer there, its body unread; the stack closes it."""
        hub = self.file.url
        url = remembered or hub
        is_hub = _origin(url) == _origin(hub)
        for _ in range(_MAX_REDIRECTS + 1):
            headers = {"Accept-Encoding": "identity", "Range": f"bytes={start}-{end - 1}"}
            for name, value in self.file.headers.items():
                if is_hub or name.lower() not in _CREDENTIALS:
                    headers.setdefault(name, value)
            response = _open_pool(_proxy_for(url)).request(
                "GET",
                url,
                headers=headers,
                timeout=self._timeout,
                preload_content=False,
                decode_content=False,
                redirect=False,
                retries=False,
            )
            stack.callback(response.close)
            if is_hub:
                self._check_identity(response)
            if not _is_redirect(response):
                return url, response
            # To the end where that is near, so that the connection can be used again.
            response.read(_READ_BYTES, decode_content=False)
            url = urljoin(url, response.headers["location"])
            # Once away from the Hub no credentials any more, even if it leads back there.
            is_hub = is_hub and _origin(url) == _origin(hub)
        raise DownloadError(f"{host_of(hub)} redirects more than {_MAX_REDIRECTS} times.")

    def _check_identity(self, response: urllib3.BaseHTTPResponse) -> None:
        """Compare the hash and size that the Hub's own answer names with those expected."""
        headers = response.headers
        own = "" if _is_redirect(response) else headers.get("etag", "")
        etag = headers.get("x-linked-etag", own)
        named = etag.removeprefix("W/").strip('"').lower()
        size = headers.get("x-linked-size", "")
        if response.status >= 400 or not _HASH.fullmatch(named):
            return  # a mirror's own etag says nothing about the content
        self.identity = self.identity or named
        same_kind = len(named) == len(self.identity)
        other_size = _COUNT.fullmatch(size) and int(size) != self.file.bytes
        if (same_kind and named != self.identity) or other_size:
            raise _changed(self.file, f"its hash there begins with {named[:12]}")

    def _refuse_status(
        self, response: urllib3.BaseHTTPResponse, host: str, *, was_remembered: bool
    ) -> None:
        status = response.status
        if status in (200, 206):
            return
        if status == _LOGIN_REQUIRED:
            raise portal(self.file.name, host)
        raise_if_temporary(status, host, response.headers)
        if status == 416:
            raise _changed(self.file, "it is shorter there")
        if was_remembered and status in _REFUSALS:
            raise InterruptedTransferError(f"{host} no longer takes the address it signed")
        raise refusal(self.file.name, host, status, response.headers.get("x-error-code", ""))

    def _body(self, response: urllib3.BaseHTTPResponse, host: str, start: int, end: int) -> Body:
        headers = response.headers
        is_page = headers.get("content-type", "").lower().startswith("text/html")
        if is_page and not self.file.name.lower().endswith((".html", ".htm")):
            raise portal(self.file.name, host)
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise DownloadError(f"{host} sends {self.file.name} compressed, though asked not to.")
        length = headers.get("content-length", "")
        if response.status == 206:
            got = _CONTENT_RANGE.fullmatch(headers.get("content-range", "").strip().lower())
            if got is None or int(got[1]) != start or int(got[2]) < start:
                raise InterruptedTransferError(f"{host} sent another range than was asked for")
            if got[3] not in ("*", str(self.file.bytes)):
                raise _changed(self.file, f"it has {int(got[3]):,} bytes there")
            end = min(end, int(got[2]) + 1)
        elif _COUNT.fullmatch(length) and int(length) != self.file.bytes:
            raise _changed(self.file, f"{int(length):,} bytes came")
        else:
            start, end = 0, self.file.bytes
        etag = headers.get("etag", "")
        version = hashlib.sha256(etag.encode()).hexdigest()[:32] if etag.startswith('"') else ""
        return Body(start=start, end=end, version=version, chunks=_chunks(response))

    @contextmanager
    def _say_errors(self) -> Iterator[None]:
        try:
            yield
        except NameResolutionError as error:
            raise InterruptedTransferError("the host's address isn't found") from error
        except NewConnectionError as error:
            raise InterruptedTransferError("no connection could be made") from error
        except ConnectTimeoutError as error:
            seconds = self._timeout.connect_timeout
            raise InterruptedTransferError(f"no connection for {seconds:g} s") from error
        except ReadTimeoutError as error:
            seconds = self._timeout.read_timeout
            raise InterruptedTransferError(f"no byte for {seconds:g} s") from error
        except (ProtocolError, ProxyError, SSLError) as error:
            if _is_certificate_error(error):
                raise _untrusted(host_of(self.file.url)) from error
            raise InterruptedTransferError("the connection broke") from error
        except HTTPError as error:
            raise self._unreadable(error) from None

    def _unreadable(self, error: Exception) -> DownloadError:
        """The kind of error alone: its words may quote headers and addresses."""
        name, host = quote_name(self.file.name), host_of(self.file.url)
        return DownloadError(f"{name} can't be read from {host}: {type(error).__name__}.")


def host_of(url: str) -> str:
    """The host of an address, without a port: all that messages show of it."""
    return urlsplit(url).hostname or "the Hub"


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _is_redirect(response: urllib3.BaseHTTPResponse) -> bool:
    return response.status in _REDIRECTS and "location" in response.headers


def _chunks(response: urllib3.BaseHTTPResponse) -> Iterator[bytes]:
    """The body as it arrives."""
    while chunk := response.read1(_READ_BYTES, decode_content=False):
        yield chunk


@lru_cache(maxsize=4)
def _open_pool(proxy: str | None) -> urllib3.PoolManager:
    """Connections, kept for the life of the process: one set for each proxy."""
    context = httpx2.create_ssl_context()
    if proxy is None:
        return urllib3.PoolManager(maxsize=_IDLE_CONNECTIONS, ssl_context=context)
    parts = urlsplit(proxy)
    if parts.scheme not in ("http", "https"):
        raise unusable_proxy()
    login = f"{unquote(parts.username)}:{unquote(parts.password or '')}" if parts.username else None
    return urllib3.ProxyManager(
        proxy,
        maxsize=_IDLE_CONNECTIONS,
        ssl_context=context,
        proxy_headers=urllib3.make_headers(proxy_basic_auth=login),
    )


def _proxy_for(url: str) -> str | None:
    """The proxy that the environment (or the system) names for an address."""
    parts = urlsplit(url)
    if not parts.hostname or urllib.request.proxy_bypass(parts.hostname):
        return None
    proxies = urllib.request.getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if not proxy or "://" in proxy:
        return proxy
    return f"http://{proxy}"  # as the Hub's library, curl and others read it


def raise_if_temporary(status: int, host: str, headers: Mapping[str, str]) -> None:
    """InterruptedTransferError for a status that another try may change."""
    if status in _RETRIED_STATUSES or status >= 500:
        raise InterruptedTransferError(f"{host} answered {status}", _asked_wait_s(headers))


def refusal(name: str, host: str, status: int, code: str = "") -> DownloadError:
    """What to say of a status that another try can't change; `code` is the Hub's X-Error-Code."""
    if code == "GatedRepo" or status == 403:
        return DownloadError(
            f"{host} refuses {quote_name(name)} (status {status}): access must be granted first.",
            "Accept its conditions on its page in a browser, then set HF_TOKEN to your token",
        )
    if status == 401:
        return DownloadError(
            f"{host} refuses {quote_name(name)} (status 401): it is private, doesn't exist, or "
            "the token is wrong.",
            "Set HF_TOKEN to a token that may read it",
        )
    if status in (404, 410):
        return DownloadError(f"There is no {quote_name(name)} on {host}.", "localmistral models")
    return DownloadError(f"{host} answered {status} for {quote_name(name)}.", f"Later, {CONTINUES}")


def unreachable(host: str, error: Exception) -> DownloadError:
    """What to say when a host can't be asked at all."""
    if _is_certificate_error(error):
        return _untrusted(host)
    return DownloadError(
        f"{host} can't be reached: {type(error).__name__}.",
        "Check the network; models on this disk run without it: localmistral list",
    )


def unusable_proxy() -> DownloadError:
    """What to say of a proxy that isn't spoken to over HTTP. Not its address, which may hold a
    password."""
    return DownloadError(
        "A proxy that the environment names is none of HTTP, but of SOCKS or another kind.",
        "Set HTTPS_PROXY to an HTTP proxy, or unset it and ALL_PROXY",
    )


def _is_certificate_error(error: BaseException | None) -> bool:
    """Whether a failed connection failed over whom to trust, which no second try changes."""
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _untrusted(host: str) -> DownloadError:
    """What to say when a host's certificate isn't trusted."""
    return DownloadError(
        f"The certificate of {host} is not trusted on this machine.",
        "Behind a proxy that reads TLS, set SSL_CERT_FILE to its certificate",
    )


def _asked_wait_s(headers: Mapping[str, str]) -> float | None:
    """Seconds the server asks to wait: the Hub's rate limit, or Retry-After in both its forms."""
    if window := _HUB_WINDOW.search(headers.get("ratelimit", "")):
        return float(window[1])
    asked = headers.get("retry-after", "").strip()
    if asked.isdecimal():
        return float(asked[:9])
    try:
        moment = email.utils.parsedate_to_datetime(asked)
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())


def _changed(file: RemoteFile, how: str) -> FileChangedError:
    return FileChangedError(
        f"{quote_name(file.name)} on the Hub isn't the file that was listed "
        f"({file.bytes:,} bytes): {how}.",
        "Run the same command again: it lists the repository anew",
    )


def portal(name: str, host: str) -> DownloadError:
    """What to say when something else than the Hub answers."""
    return DownloadError(
        f"{host} answered with a web page instead of {quote_name(name)}: probably a captive "
        "portal or a proxy.",
        f"Log in to the network in a browser, then {CONTINUES}",
    )
