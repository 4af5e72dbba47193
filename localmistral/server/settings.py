"""What a server is told: where it listens, who may ask, how much a request may bring.

Plain values; knows nothing of HTTP's messages.
"""

import ipaddress
import re
from dataclasses import dataclass

from localmistral.errors import UsageError

MAX_BODY_BYTES = 64 << 20
"""The largest body: a few images as data URLs, or a 256k-token prompt many times over."""
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
MAX_PORT = 65_535
MIN_KEY_LENGTH = 4
DRAIN_S = 30.0
"""Kubernetes' grace period: whoever stops services waits about as long before it kills them."""


_HOST = re.compile(r"[\w.:-]+")
_ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[a-z0-9._:\[\]-]+")
"""As a browser sends it: in lower case, nothing after the name and port."""


def read_host_name(host: str) -> str:
    """The name in a Host header, without port and brackets; empty if it is malformed."""
    if host.startswith("["):
        name, bracket, port = host[1:].partition("]")
        rest = port.removeprefix(":") if bracket else "x"
    else:
        name, _, rest = host.partition(":")
    return name.casefold().removesuffix(".") if not rest or rest.isdecimal() else ""


def _is_key(key: str) -> bool:
    """Headers lose spaces at their ends: a key with one could never be sent."""
    return len(key) >= MIN_KEY_LENGTH and key.isprintable() and key == key.strip()


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """`allow_hosts` are further names that a Host header may carry, `allow_origins` the web pages
    (`https://name`, or `*`) that may read answers. `drain_s` is how long running answers may take
    after the server was told to end, `log` the form of the log: off, text or json.
    `local_token` is a key of this process's own, for programs that may read its runtime file."""

    host: str = "127.0.0.1"
    port: int = 8080
    api_keys: tuple[str, ...] = ()
    allow_hosts: tuple[str, ...] = ()
    allow_origins: tuple[str, ...] = ()
    max_body_bytes: int = MAX_BODY_BYTES
    drain_s: float = DRAIN_S
    log: str = "off"
    local_token: str = ""

    def __post_init__(self) -> None:
        if not self.is_loopback and not self.api_keys:
            raise UsageError(
                f"{self.host} can be reached from other machines, and no key is set.",
                "Set one: localmistral serve --host "
                f"{self.host} --api-key KEY, or listen on 127.0.0.1.",
            )
        if not all(map(_is_key, self.api_keys)):
            raise UsageError(
                f"An API key needs at least {MIN_KEY_LENGTH} printable characters, no spaces "
                "around them.",
                "Take another one: localmistral serve --api-key KEY",
            )
        for name in self.allow_hosts:
            if not _HOST.fullmatch(read_host_name(name)):
                raise UsageError(
                    f"{name[:60]!r} is no name that a Host header could carry.",
                    "Give a name or an address alone: localmistral serve --allow-host my-box.lan",
                )
        for origin in self.allow_origins:
            if not _ORIGIN.fullmatch(origin):
                raise UsageError(
                    f"{origin[:60]!r} is no origin of web pages.",
                    "Give scheme, name and port: localmistral serve --allow-origin "
                    "https://my-page.example",
                )

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can connect."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return False

    @property
    def local_host(self) -> str:
        """Where a client on this machine connects."""
        return "127.0.0.1" if self.host in ("0.0.0.0", "::", "") else self.host.strip("[]")

    @property
    def url(self) -> str:
        """What a client on this machine takes as its base, without `/v1`."""
        host = self.local_host
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"
