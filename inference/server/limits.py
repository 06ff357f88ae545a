"""How much of the server one request and one client may take, and for how long."""

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from inference.flags import ServerFlags
from inference.server.metrics import Metrics
from inference.server.schema import APIError

# A request of many values takes seconds to parse, and no other thread runs meanwhile; one of the
# same size that is a video takes milliseconds. So what begins or divides values is counted, and
# escapes at a twentieth: PHP writes each / as \/, also in base64.
MAX_VALUES = 50_000


class Share:
    """So many of a thing for all clients; one of them, by its address, gets seven eighths."""

    def __init__(self, total: int, refusal: str):
        self.total, self.most = total, max(1, total - max(1, total // 8))
        self.refusal, self.taken = refusal, Counter()

    def check(self, client: str, number: int = 1) -> None:
        """Raises APIError (503) where there isn't as much left."""
        left = min(self.most - self.taken[client], self.total - self.taken.total())
        if number > left:
            raise APIError(503, self.refusal, "server_busy", headers={"Retry-After": "1"})

    @contextmanager
    def held(self, client: str, number: int = 1) -> Iterator[None]:
        """Raises APIError as `check`."""
        self.check(client, number)
        self.taken[client] += number
        try:
            yield
        finally:
            self.taken[client] -= number
            if not self.taken[client]:
                del self.taken[client]


def body_size(request: Request, flags: ServerFlags) -> int:
    """Bytes that are announced. Raises APIError."""
    if not (announced := request.headers.get("content-length", "")).isdecimal():
        # A body in chunks may have chunks of one byte each, which cost seconds to put together.
        close = {"Connection": "close"}
        raise APIError(411, "send the request with its Content-Length", headers=close)
    if int(announced) > flags.max_body:
        raise APIError(413, f"the request is above {flags.max_body_mb:g} MiB", "body_too_large")
    return int(announced)


async def read_body(request: Request, flags: ServerFlags) -> bytearray:
    """Raises APIError where it takes too long to arrive, or to parse."""
    body, values = bytearray(), 0.0
    try:
        async with asyncio.timeout(flags.upload_timeout):
            async for chunk in request.stream():
                body += chunk
                values += sum(map(chunk.count, (b'"', b",", b"[", b"{"))) + chunk.count(b"\\") / 20
                if values > MAX_VALUES:
                    raise APIError(413, "the request has too many values", "body_too_large")
    except TimeoutError:
        found = f"the request didn't arrive within {flags.upload_timeout:g} s"
        raise APIError(408, found) from None
    return body


class Deadline:
    """How long a request may take in all; counts what became of it."""

    def __init__(self, app: ASGIApp, seconds: float, metrics: Metrics):
        self.app, self.seconds, self.metrics = app, seconds, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            return await self.app(scope, receive, send)
        status, started = 0, time.perf_counter()

        async def watched(message):
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            async with asyncio.timeout(self.seconds):
                await self.app(scope, receive, watched)
        except TimeoutError:
            # A stream that has begun is cut: its reader was too slow, or the answer too long.
            error = APIError(504, f"no answer within {self.seconds:g} s", "timeout")
            if status == 0:
                await JSONResponse(error.body(), error.status)(scope, receive, watched)
        except Exception:  # counted only: uvicorn logs it and answers 500
            status = status or 500
            raise
        finally:
            self.metrics.requests.labels(str(status or 499)).inc()
            self.metrics.seconds.observe(time.perf_counter() - started)
