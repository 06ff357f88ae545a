"""Connections whose request isn't whole end, and nobody has more than a share of them."""

import asyncio
from collections import Counter
from typing import ClassVar

from uvicorn.protocols.http.h11_impl import H11Protocol

PIECE = 4096  # bytes of a header that are parsed at a time


class LimitedH11Protocol(H11Protocol):
    """uvicorn's own HTTP, with a deadline for headers: its keep-alive timeout begins only after a
    first answer, and ends with the first byte of the next request. An address has `most`
    connections at a time; one more is closed."""

    header_timeout: ClassVar[float] = 10.0
    most: ClassVar[int] = 256
    open: ClassVar[Counter[str]] = Counter()  # connections by address
    is_chunked = False

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.address = self.client[0] if self.client else ""
        self.open[self.address] += 1
        self.deadline = self.loop.call_later(self.header_timeout, transport.close)
        if self.open[self.address] > self.most:
            transport.close()

    def data_received(self, data: bytes) -> None:
        # Chunks of a byte each would be half a second of h11 for what one read brings: a header
        # comes first, by which the app refuses them.
        while data and not self.is_chunked:
            is_header = self.cycle is None or self.cycle.response_complete
            size = PIECE if is_header else len(data)
            super().data_received(data[:size])
            data = data[size:]

    def handle_events(self) -> None:
        before = self.cycle
        super().handle_events()
        if self.cycle is not before:  # a complete header came; the app has a deadline for the body
            self.deadline.cancel()
            self.is_chunked = any(name == b"transfer-encoding" for name, _ in self.headers)

    def on_response_complete(self) -> None:
        self.deadline.cancel()
        self.deadline = self.loop.call_later(self.header_timeout, self.transport.close)
        super().on_response_complete()  # handles a next request that is here already

    def connection_lost(self, exc: Exception | None) -> None:
        self.deadline.cancel()
        self.open[self.address] -= 1
        if not self.open[self.address]:
            del self.open[self.address]
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """SIGTERM: running answers end as they would; a request that is only half here doesn't."""
        if self.cycle is not None and self.cycle.more_body and not self.cycle.response_started:
            self.transport.close()
        super().shutdown()
