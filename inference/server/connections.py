"""Connections whose request isn't whole end; they never keep others out."""

import asyncio
from collections import defaultdict
from typing import ClassVar

from uvicorn.protocols.http.h11_impl import H11Protocol

# Connections whose request isn't here yet, or not all of it: in all, and of one address. One more
# closes the oldest of the address that has most: whoever opens many connections closes their own.
MAX_UNFINISHED, MAX_OF_ONE = 512, 128
PIECE = 4096  # bytes of a header that are parsed at a time


class LimitedH11Protocol(H11Protocol):
    """uvicorn's own HTTP, with a deadline for headers: its keep-alive timeout begins only after a
    first answer, and ends with the first byte of the next request."""

    header_timeout: ClassVar[float] = 10.0
    unfinished: ClassVar[defaultdict[str, dict]] = defaultdict(dict)  # address → its, oldest first
    deadline: asyncio.TimerHandle | None = None  # for a header; the app has one for the body
    is_chunked = False

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._begin()
        most = max(self.unfinished.values(), key=len)
        if len(most) > MAX_OF_ONE or sum(map(len, self.unfinished.values())) > MAX_UNFINISHED:
            next(iter(most)).close()

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
        if self.cycle is not before:  # a complete header came
            self.deadline.cancel()
            self.is_chunked = any(name == b"transfer-encoding" for name, _ in self.headers)
        if self.cycle and not (self.cycle.more_body or self.cycle.response_complete):
            self._end()  # all of it is here, and it is being answered

    def on_response_complete(self) -> None:
        self._begin()
        super().on_response_complete()  # handles a next request that is here already

    def connection_lost(self, exc: Exception | None) -> None:
        self._end()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """SIGTERM: running answers end as they would; a request that is only half here doesn't."""
        if self.cycle is not None and self.cycle.more_body and not self.cycle.response_started:
            self.close()
        super().shutdown()

    def close(self) -> None:
        self._end()
        self.transport.close()

    def _begin(self) -> None:
        self._end()
        self.unfinished[self._address][self] = None
        self.deadline = self.loop.call_later(self.header_timeout, self.close)

    def _end(self) -> None:
        self.unfinished[self._address].pop(self, None)
        if not self.unfinished[self._address]:
            del self.unfinished[self._address]
        if self.deadline is not None:
            self.deadline.cancel()

    @property
    def _address(self) -> str:
        return self.client[0] if self.client else ""
