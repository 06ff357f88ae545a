"""From the URL in a request to an open file, without reaching what a user may not reach.

`data:` URLs are always taken. Local files and the network are closed until the operator opens a
folder or names hosts: a server that fetches what it is told to is a door into the network that it
stands in (server-side request forgery).
"""

import asyncio
import base64
import binascii
import ipaddress
import os
import socket
import stat
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO
from urllib.parse import SplitResult, unquote, urljoin, urlsplit

import httpcore2

from inference.server.schema import APIError

MAX_REDIRECTS = 3
PORTS = {"http": 80, "https": 443}
_IPV6_UNICAST = ipaddress.ip_network("2000::/3")


def unnamed_file() -> BinaryIO:
    """A file for an upload that goes with its last reader. On Linux it lies in memory and has no
    name: it is gone even if this process is killed."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("visual", os.MFD_CLOEXEC), "w+b")
    return tempfile.NamedTemporaryFile()


def path_of(file: BinaryIO) -> str:
    """Where another process of this user finds the very file that is open here."""
    return f"/proc/{os.getpid()}/fd/{file.fileno()}" if sys.platform == "linux" else file.name


@dataclass
class MediaSource:
    """What may be opened, and how much of it."""

    max_bytes: int
    timeout: float  # seconds for a whole download
    allowed_path: Path | None = None
    # Hosts as the operator wrote them, "host" or "host:port". A name must lead to public addresses
    # alone; whoever means a machine of the own network writes its address.
    allowed_domains: frozenset[str] = frozenset()
    pool: httpcore2.AsyncConnectionPool | None = field(default=None, init=False)

    def __post_init__(self):
        self.allowed_domains = frozenset(name.lower() for name in self.allowed_domains)
        if self.allowed_path is not None:
            self.allowed_path = Path(self.allowed_path).resolve(strict=True)
        if self.allowed_domains:
            hosts = {_host(urlsplit(f"//{name}")) for name in self.allowed_domains}
            backend = _PublicOnly(filter(_is_address, hosts))
            self.pool = httpcore2.AsyncConnectionPool(
                network_backend=backend, max_connections=16, max_keepalive_connections=0
            )

    async def close(self) -> None:
        if self.pool is not None:
            await self.pool.aclose()

    async def open(self, url: str) -> BinaryIO:
        """Raises APIError: 400 where it may not or can't be opened, 413 where it is too large."""
        scheme = url[:8].partition(":")[0].lower()
        if scheme == "data":
            return self._open_data(url)
        if scheme == "file":
            return self._open_local(url)
        if scheme in PORTS:
            try:
                async with asyncio.timeout(self.timeout):
                    return await self._download(url)
            except TimeoutError:
                raise _refused(f"the download took longer than {self.timeout:g} s") from None
        raise _refused("a media URL must begin with data:, http:, https: or file:")

    def _open_data(self, url: str) -> BinaryIO:
        head, comma, text = url[5:].partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise _refused("a data: URL must read data:<type>;base64,<content>")
        try:
            data = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            raise _refused("the data: URL isn't valid base64") from None
        if len(data) > self.max_bytes:
            raise self._too_large()
        file = unnamed_file()
        file.write(data)
        file.flush()
        return file

    def _open_local(self, url: str) -> BinaryIO:
        if self.allowed_path is None:
            raise _refused("local files are closed on this server (--allowed_media_path)")
        try:
            parts = urlsplit(url)
            path = Path(unquote(parts.path, errors="strict")).resolve()
        except (ValueError, OSError, RuntimeError):  # NUL bytes, loops of links, wrong UTF-8
            raise _refused("not a file URL") from None
        # Outside, nothing is said about what exists: the same answer for all.
        if parts.netloc not in ("", "localhost") or not path.is_relative_to(self.allowed_path):
            raise _refused("that file isn't in the folder that this server opens")
        try:
            # Links are resolved; one put there since then isn't followed, a pipe isn't waited for.
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
            file = open(path, "rb", opener=lambda name, _: os.open(name, flags))  # noqa: SIM115
        except OSError:
            raise _refused("there is no such file in the folder that this server opens") from None
        about = os.fstat(file.fileno())
        if not stat.S_ISREG(about.st_mode) or about.st_size > self.max_bytes:
            file.close()
            raise self._too_large() if stat.S_ISREG(about.st_mode) else _refused("not a file")
        return file

    async def _download(self, url: str) -> BinaryIO:
        for _ in range(1 + MAX_REDIRECTS):
            target = self._check(url)
            # Without compression a small answer can't unfold into a large one.
            headers = {"User-Agent": "cinego", "Accept-Encoding": "identity"}
            timeouts = dict.fromkeys(("connect", "read", "write", "pool"), self.timeout)
            file = unnamed_file()
            try:
                async with self.pool.stream(
                    "GET", target, headers=headers, extensions={"timeout": timeouts}
                ) as response:
                    if response.status in (301, 302, 303, 307, 308):
                        file.close()
                        found = {name.lower(): value for name, value in response.headers}
                        url = urljoin(url, found.get(b"location", b"").decode("ascii", "replace"))
                        continue
                    if response.status != 200:
                        raise _refused(f"the host answered with status {response.status}")
                    async for chunk in response.aiter_stream():
                        if file.tell() + len(chunk) > self.max_bytes:
                            raise self._too_large()
                        file.write(chunk)
                file.flush()
                return file
            except BaseException as error:
                file.close()
                if isinstance(error, _PrivateAddress):
                    raise _refused("that host's address isn't a public one") from None
                if isinstance(error, httpcore2.NetworkError | httpcore2.ProtocolError | OSError):
                    raise _refused("that host can't be reached") from None
                if isinstance(error, httpcore2.TimeoutException):
                    raise TimeoutError from None
                raise
        raise _refused(f"more than {MAX_REDIRECTS} redirects")

    def _check(self, url: str) -> httpcore2.URL:
        """Of the first URL and of each that it leads to; what comes back is connected to as it is,
        so that no second parser can see another host in it."""
        try:
            parts = urlsplit(url)
            host, own = _host(parts), PORTS[parts.scheme]
            port = parts.port or own
        except (ValueError, KeyError):
            raise _refused("not an http URL") from None
        plain = url.isascii() and url.isprintable() and not set(url) & set(' \\"<>^`{|}')
        if parts.username is not None or parts.password is not None or not plain:
            raise _refused("the URL holds user data or signs that don't belong in one")
        named = {f"{host}:{port}"} | ({host} if port == own else set())
        if not self.allowed_domains & named:
            raise _refused("that host isn't allowed on this server (--allowed_media_domains)")
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        return httpcore2.URL(scheme=parts.scheme, host=host, port=port, target=target)

    def _too_large(self) -> APIError:
        mib = self.max_bytes / 2**20
        return APIError(413, f"the media are above {mib:g} MiB", "media_too_large")


def _refused(message: str) -> APIError:
    return APIError(400, message, "media_refused")


def _host(parts: SplitResult) -> str:
    return (parts.hostname or "").rstrip(".")


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
        return True
    except ValueError:
        return False


def is_public(address: str) -> bool:
    """Of the internet, and not one that only wraps an address of another network."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 6 and (ip not in _IPV6_UNICAST or ip.sixtofour or ip.teredo):
        return False
    return ip.is_global and not ip.is_multicast


class _PrivateAddress(Exception):
    pass


class _PublicOnly(httpcore2.AsyncNetworkBackend):
    """Resolves a name once, judges the addresses, and connects to the very one that it judged.

    Judging the name and leaving the connection to a second look-up would let a host of short
    memory answer with another address then (DNS rebinding).
    """

    def __init__(self, named: Iterable[str]):
        self.named = frozenset(named)  # addresses that the operator wrote down
        self.backend = httpcore2.AnyIOBackend()

    async def connect_tcp(self, host, port, timeout=None, local_address=None, socket_options=None):
        try:
            found = await asyncio.get_running_loop().getaddrinfo(
                host, port, type=socket.SOCK_STREAM
            )
        except (OSError, UnicodeError) as error:
            raise httpcore2.ConnectError(str(error)) from None
        addresses = [entry[4][0] for entry in found]
        if host not in self.named and not all(map(is_public, addresses)):
            raise _PrivateAddress(host)
        return await self.backend.connect_tcp(
            addresses[0], port, timeout, local_address, socket_options
        )

    async def connect_unix_socket(self, path, timeout=None, socket_options=None):
        raise _PrivateAddress(path)

    async def sleep(self, seconds: float) -> None:
        await self.backend.sleep(seconds)
