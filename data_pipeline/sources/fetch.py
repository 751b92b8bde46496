"""Images by URL, bounded in size, time and redirects. Addresses inside a network are refused unless they are allowed.

The name is resolved once, every answer checked, and the connection made to the checked address: a name that changes its
answer in between (DNS rebinding) gains nothing. Proxies of the environment are not used.
"""

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import SplitResult, quote, urljoin, urlsplit

_CHUNK = 64 * 2**10
_REDIRECTS = (301, 302, 303, 307, 308)
_SAFE = "/%:@!$&'()*+,;=~-._"  # what stays as it is in an address
_AGENT = "Mozilla/5.0 (compatible; beeline)"


@dataclass(frozen=True)
class FetchLimits:
    """Bounds of one download."""

    max_bytes: int = 32 * 2**20
    """A longer answer is given up (too_large)."""
    timeout_s: float = 15
    """For all of it: connection, redirects and body, however slowly bytes drip. (The resolver has its own limit.)"""
    redirects: int = 4
    """More of them are refused."""
    threads: int = 32
    """Downloads at a time per worker."""
    allow_private: tuple[str, ...] = ()
    """Hosts that may lie in a private network, as written in the URL."""


class FetchError(Exception):
    """Why there is no image: fetch_refused, fetch_failed or too_large. `network` when nobody answered at all."""

    def __init__(self, status: str, reason: str, *, network: bool = False) -> None:
        super().__init__(reason)
        self.status, self.reason, self.network = status, reason, network


def fetch(url: str, bounds: FetchLimits) -> bytes:
    """The body behind a URL; FetchError otherwise."""
    until = time.monotonic() + bounds.timeout_s
    for _ in range(bounds.redirects + 1):
        parts = _check_url(url)
        connection = _connect(parts, bounds, until)
        clock = threading.Timer(_count_seconds_left(until), connection.cut)
        clock.daemon = True
        clock.start()
        try:
            answer = _send_request(connection, parts)
            if answer.status in _REDIRECTS:
                url = urljoin(url, answer.getheader("location") or "")
                continue
            if answer.status != 200:
                raise FetchError("fetch_failed", f"status {answer.status}")
            data, stated = _read_body(answer, bounds)
            _count_seconds_left(until)  # a connection that the clock has cut looks like one that came to its end
            if stated is not None and len(data) < stated:
                raise FetchError("fetch_failed", f"cut short: {len(data):,} of {stated:,} bytes")
            return data
        except (OSError, http.client.HTTPException, ValueError) as error:
            _count_seconds_left(until)
            silent = isinstance(error, OSError)
            raise FetchError("fetch_failed", f"{type(error).__name__} from {parts.hostname}", network=silent) from error
        finally:
            clock.cancel()
            connection.close()
    raise FetchError("fetch_refused", f"more than {bounds.redirects} redirects")


def _check_url(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - raises for a port that is no number
    except ValueError as error:
        raise FetchError("fetch_refused", "not an address") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise FetchError("fetch_refused", f"scheme {parts.scheme or 'none'}: only http and https are fetched")
    return parts


def _connect(parts: SplitResult, bounds: FetchLimits, until: float) -> "_Pinned":
    host, secure = parts.hostname or "", parts.scheme == "https"
    port = parts.port or (443 if secure else 80)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise FetchError("fetch_failed", f"no such host {host}", network=True) from error
    addresses = [str(item[4][0]) for item in found]
    if host not in bounds.allow_private:
        inside = [address for address in addresses if not _is_public(address)]
        if inside:
            raise FetchError("fetch_refused", f"{host} lies in a private network ({inside[0]})")
    kind = _PinnedHTTPS if secure else _PinnedHTTP
    return kind(host, port, addresses, until)


def _is_public(address: str) -> bool:
    ip = ipaddress.ip_address(address.split("%", 1)[0])
    if isinstance(ip, ipaddress.IPv6Address):
        # an IPv4 address in disguise counts as what it is
        embedded = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if embedded is not None:
            ip = embedded
        elif ip in ipaddress.ip_network("64:ff9b::/96"):
            ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return ip.is_global and not ip.is_multicast


class _Pinned(http.client.HTTPConnection):
    """Connects to addresses that were checked, whatever the name says now.

    `wire` stays when http.client lets go of `sock`: before the body of an answer that ends the connection.
    """

    wire: socket.socket | None = None

    def __init__(self, host: str, port: int, addresses: Sequence[str], until: float) -> None:
        super().__init__(host, port, timeout=_count_seconds_left(until))
        self._addresses, self._until = addresses, until

    def reach(self) -> socket.socket:
        """A connection to one of the addresses, tried in turn while there is time."""
        problem: OSError = OSError("no address")
        for address in dict.fromkeys(self._addresses):
            try:
                self.wire = socket.create_connection((address, self.port), timeout=_count_seconds_left(self._until))
                return self.wire
            except OSError as error:
                problem = error
        raise problem

    def cut(self) -> None:
        """End the connection; called from another thread. The reader sees an end of data. It shuts down the socket, not
        TLS, as a TLS shutdown would wait for the other side."""
        if self.wire is not None:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(self.wire, socket.SHUT_RDWR)


class _PinnedHTTP(_Pinned):
    def connect(self) -> None:
        self.sock = self.reach()


class _PinnedHTTPS(_Pinned, http.client.HTTPSConnection):
    def connect(self) -> None:
        self.wire = self.sock = ssl.create_default_context().wrap_socket(self.reach(), server_hostname=self.host)


def _send_request(connection: http.client.HTTPConnection, parts: SplitResult) -> http.client.HTTPResponse:
    path = quote(parts.path or "/", safe=_SAFE) + (f"?{quote(parts.query, safe=_SAFE + '?')}" if parts.query else "")
    headers = {"User-Agent": _AGENT, "Accept": "image/*,*/*;q=0.5", "Accept-Encoding": "identity"}
    connection.request("GET", path, headers=headers)
    return connection.getresponse()


def _read_body(answer: http.client.HTTPResponse, bounds: FetchLimits) -> tuple[bytes, int | None]:
    """All bytes that came, and how many were promised."""
    length = answer.getheader("content-length") or ""
    stated = int(length) if length.isdecimal() else None
    if stated is not None and stated > bounds.max_bytes:
        raise FetchError("too_large", f"{stated:,} bytes, at most {bounds.max_bytes:,}")
    data = bytearray()
    while True:
        chunk = answer.read1(_CHUNK)
        if not chunk:
            break
        data += chunk
        if len(data) > bounds.max_bytes:
            raise FetchError("too_large", f"more than {bounds.max_bytes:,} bytes")
    return bytes(data), stated


def _count_seconds_left(until: float) -> float:
    left = until - time.monotonic()
    if left <= 0:
        raise FetchError("fetch_failed", "took too long")
    return left
