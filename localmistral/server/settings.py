"""What a server is told: where it listens, who may ask, how much a request may bring.

Plain values; knows nothing of HTTP's messages.
"""

import ipaddress
from dataclasses import dataclass

from localmistral.errors import UsageError

MAX_BODY_BYTES = 64 << 20
"""The largest body: a few images as data URLs, or a 256k-token prompt many times over."""
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
MIN_KEY_LENGTH = 4
DRAIN_S = 30.0
"""Kubernetes' grace period: whoever stops services waits about as long before it kills them."""


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
        if any(len(key) < MIN_KEY_LENGTH or not key.isprintable() for key in self.api_keys):
            raise UsageError(
                f"An API key needs at least {MIN_KEY_LENGTH} printable characters.",
                "Take a longer one: localmistral serve --api-key KEY",
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
