"""From the URL in a request to an open file, without reaching what a client may not reach.

`data:` URLs are always taken. Local files and the network are closed until the operator opens a
folder or names hosts: a server that fetches what a client names is a door into the network that it
stands in (server-side request forgery).
"""

import asyncio
import binascii
import os
import stat
import sys
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryFile
from typing import BinaryIO
from urllib.parse import unquote_to_bytes, urlsplit

import httpx2

from inference.flags import ServerFlags
from inference.server.schema import APIError

MAX_URL = 4096  # characters of one that isn't data: longer ones aren't even parsed
PIECE = 1 << 20  # characters of base64 that are decoded at a time: no other thread runs meanwhile


def _new_file() -> BinaryIO:
    """For an upload. On Linux it has no name: it is gone even if this process is killed."""
    return TemporaryFile() if sys.platform == "linux" else NamedTemporaryFile()


def path_of(file: BinaryIO) -> str:
    """Where another process of this user finds the very file that is open here."""
    file.flush()
    path = f"/proc/{os.getpid()}/fd/{file.fileno()}"
    return path if os.path.exists(path) else file.name


class MediaSource:
    """What may be opened, and how much of it."""

    def __init__(self, flags: ServerFlags):
        self.max_bytes, self.timeout = flags.max_body, flags.media_timeout
        self.allowed_domains = {name.lower() for name in flags.allowed_media_domains or ()}
        path = flags.allowed_media_path
        self.allowed_path = None if path is None else Path(path).resolve(strict=True)
        self.http = httpx2.AsyncClient(
            # Without compression a small answer can't unfold into a large one.
            headers={"User-Agent": "cinego", "Accept-Encoding": "identity"},
            timeout=self.timeout,
            limits=httpx2.Limits(max_connections=16, max_keepalive_connections=0),
            follow_redirects=False,  # a redirect would leave the allow-list
            trust_env=False,
        )

    async def open(self, url: str) -> BinaryIO:
        """Raises APIError: 400 where it may not or can't be opened, 413 where it is too large."""
        scheme = url[:8].partition(":")[0].lower()
        if scheme != "data" and len(url) > MAX_URL:
            raise _refused(f"a URL of {len(url)} characters is above {MAX_URL}")
        if scheme == "data":
            return await asyncio.to_thread(self._open_data, url)
        if scheme == "file":
            return await asyncio.to_thread(self._open_local, url)
        if scheme in ("http", "https"):
            return await self._download(url)
        raise _refused("a media URL must begin with data:, http:, https: or file:")

    def _open_data(self, url: str) -> BinaryIO:
        comma = url.find(",", 0, 200)
        if comma < 0 or not url[:comma].lower().endswith(";base64"):
            raise _refused("a data: URL must read data:<type>;base64,<content>")
        file = _new_file()
        try:
            for start in range(comma + 1, len(url), PIECE):
                piece = url[start : start + PIECE]
                file.write(binascii.a2b_base64(piece, strict_mode=True))
        except ValueError:  # binascii.Error is one
            raise _refused("the data: URL isn't valid base64") from None
        return file

    def _open_local(self, url: str) -> BinaryIO:
        if self.allowed_path is None:
            raise _refused("local files are closed on this server (--allowed_media_path)")
        # The same answer for all: outside of the folder, nothing tells what exists.
        refused = _refused("there is no such file in the folder that this server opens")
        try:
            parts = urlsplit(url)
            if parts.netloc not in ("", "localhost"):
                raise refused
            # Whatever links do meanwhile: the kernel tells which file this handle is, and that very
            # file is read. O_PATH alone touches neither a device nor a pipe.
            handle = os.open(unquote_to_bytes(parts.path), os.O_PATH | os.O_CLOEXEC)
        except (OSError, ValueError):
            raise refused from None
        try:
            path, about = f"/proc/self/fd/{handle}", os.fstat(handle)
            is_inside = Path(os.readlink(path)).is_relative_to(self.allowed_path)
            if not is_inside or not stat.S_ISREG(about.st_mode):
                raise refused
            if about.st_size > self.max_bytes:
                raise self._too_large()
            return open(path, "rb")
        except OSError:
            raise refused from None
        finally:
            os.close(handle)

    async def _download(self, url: str) -> BinaryIO:
        try:
            target = httpx2.URL(url)
        except (httpx2.InvalidURL, ValueError):
            raise _refused("not an http URL") from None
        netloc = target.netloc.decode()
        default = {"http": 80, "https": 443}[target.scheme]
        named = {netloc} if target.port else {netloc, f"{netloc}:{default}"}
        # httpx connects to the host that was compared: no second parser can see another one in it.
        if not self.allowed_domains & named or target.userinfo:
            raise _refused("that host isn't allowed on this server (--allowed_media_domains)")
        file = _new_file()
        try:
            async with asyncio.timeout(self.timeout), self.http.stream("GET", target) as reply:
                if reply.status_code != 200:
                    raise _refused(f"the host answered with status {reply.status_code}")
                async for chunk in reply.aiter_raw():
                    if file.tell() + len(chunk) > self.max_bytes:
                        raise self._too_large()
                    file.write(chunk)
            return file
        except (TimeoutError, httpx2.TimeoutException):
            found = f"the download took longer than {self.timeout:g} s"
        except (httpx2.HTTPError, OSError):
            found = "that host can't be reached"
        raise _refused(found)

    def _too_large(self) -> APIError:
        mib = self.max_bytes / 2**20
        return APIError(413, f"the media are above {mib:g} MiB", "media_too_large")


def _refused(message: str) -> APIError:
    return APIError(400, message, "media_refused")
