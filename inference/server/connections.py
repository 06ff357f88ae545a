"""Connections that say nothing end; they never keep others out."""

import asyncio
from collections import Counter
from typing import ClassVar

from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_SILENT = 512  # connections without a complete header; one more closes the oldest of the
# address that has most of them: whoever opens many connections closes their own


class LimitedH11Protocol(H11Protocol):
    """uvicorn's own HTTP, with a deadline for headers: its keep-alive timeout begins only after a
    first answer, and ends with the first byte of the next request."""

    header_timeout: ClassVar[float] = 10.0
    silent: ClassVar[dict["LimitedH11Protocol", str]] = {}  # → its client's address; oldest first
    deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._wait_for_header()
        if len(self.silent) > MAX_SILENT:
            ((address, _),) = Counter(self.silent.values()).most_common(1)
            next(one for one, other in self.silent.items() if other == address).close()

    def handle_events(self) -> None:
        before = self.cycle
        super().handle_events()
        if self.cycle is not before:  # a complete header came
            self._header_came()

    def on_response_complete(self) -> None:
        self._wait_for_header()
        super().on_response_complete()  # handles a next request that is here already

    def connection_lost(self, exc: Exception | None) -> None:
        self._header_came()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """SIGTERM: running answers end as they would; a request that is only half here doesn't."""
        if self.cycle is not None and self.cycle.more_body and not self.cycle.response_started:
            self.close()
        super().shutdown()

    def close(self) -> None:
        self._header_came()
        self.transport.close()

    def _wait_for_header(self) -> None:
        self._header_came()
        self.silent[self] = self.client[0] if self.client else ""
        self.deadline = self.loop.call_later(self.header_timeout, self.close)

    def _header_came(self) -> None:
        self.silent.pop(self, None)
        if self.deadline is not None:
            self.deadline.cancel()
