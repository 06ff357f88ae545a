"""One thread that runs the model for all users of a page or server.

Their sequences join one engine's batch and leave it at any token. Other work on the model (the
tower, above all) waits its turn in the same thread, between two steps.
"""

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from inference.chat_model import ChatModel
from inference.request import Sequence

HUNG_SECONDS = 60.0  # a step that takes longer doesn't end any more
log = logging.getLogger("uvicorn.error")


class Scheduler:
    def __init__(
        self,
        chat_model: ChatModel,
        max_batch: int = 16,
        wait: float = 0.0,
        on_step: Callable[[list[Sequence]], None] = lambda sequences: None,
    ):
        """wait: seconds that the first sequence waits for others while the model is idle. on_step
        is called, in the model's thread, with the sequences that took part in a step."""
        self.engine, self.device = chat_model.engine(), chat_model.device
        self.max_batch, self.wait, self.on_step = max_batch, wait, on_step
        self._new: deque[Sequence] = deque()
        self._receivers: dict[Sequence, Callable[[str], None]] = {}
        self._thread, self._lock = ThreadPoolExecutor(1, "model"), threading.Lock()
        self._ended = self._steps = False
        self._busy_since: float | None = None

    @property
    def is_healthy(self) -> bool:
        """False once the thread has ended, with the device perhaps, or hangs."""
        busy = self._busy_since
        return not self._ended and (busy is None or time.monotonic() - busy < HUNG_SECONDS)

    def run(self, function: Callable, *arguments: Any) -> Future:
        """Calls a function in the model's thread, between two steps. Raises RuntimeError once the
        thread has ended."""
        with self._lock:
            if self._ended:
                raise RuntimeError("the model's thread has ended; the log has the reason")
            return self._thread.submit(self._timed, function, *arguments)

    def submit(self, sequence: Sequence, receive: Callable[[str], None]) -> None:
        """receive is called in the model's thread with each new text, which is "" only at the end;
        `sequence.finish_reason` then tells why, "error" if the model failed. Raises RuntimeError
        once the thread has ended."""
        self._receivers[sequence] = receive
        self.run(self._join, sequence)

    def cancel(self, sequence: Sequence) -> None:
        """Its reader has left: ends at the next token, and still calls `receive` then."""
        self.run(self._cancel, sequence)

    def stream(self, sequence: Sequence) -> Iterator[str]:
        """As `Engine.stream`, from any thread. Raises RuntimeError where the model failed."""
        texts: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.submit(sequence, texts.put)
        try:
            yield from iter(texts.get, "")
        finally:
            if sequence.finish_reason is None:
                self.cancel(sequence)
                while texts.get():
                    pass
        if sequence.finish_reason == "error":
            raise RuntimeError("the model failed on this batch; the log has the reason")

    def stop(self) -> None:
        """What was submitted is still answered."""
        with self._lock:
            self._ended = True
        self._thread.submit(self._answer_all)
        self._thread.shutdown()

    # ---- the model's thread

    def _timed(self, function: Callable, *arguments: Any) -> Any:
        self._busy_since = time.monotonic()
        try:
            return function(*arguments)
        finally:
            self._busy_since = None

    def _join(self, sequence: Sequence) -> None:
        self._new.append(sequence)
        if not self._steps:
            self._steps = True
            time.sleep(self.wait)  # who comes meanwhile stands before the step
            self._thread.submit(self._timed, self._step)

    def _step(self) -> None:
        """One step for all; the next one waits behind whatever has come meanwhile."""
        self._step_once()
        self._steps = bool(self.engine.sequences or self._new)
        if self._steps and not self._ended:
            self._thread.submit(self._timed, self._step)

    def _answer_all(self) -> None:
        while self.engine.sequences or self._new:
            self._step_once()

    def _step_once(self) -> None:
        capacity = self.max_batch - len(self.engine.sequences)
        new = [self._new.popleft() for _ in range(min(capacity, len(self._new)))]
        try:
            moved = self.engine.step() if self.engine.sequences else []
            if new:
                self.engine.add(new)
            moved = [*moved, *new]
            for sequence in moved:
                if text := sequence.take_text():
                    self._receivers[sequence](text)
                self._end(sequence)
            self.on_step(moved)
        except Exception:
            # Which sequence it was can't be known: all of this batch end, the next ones are new.
            failed = [*self.engine.sequences, *new]
            log.exception("the model failed on a batch of %d", len(failed))
            self.engine.reset()
            self._fail(failed)
            self._check_device()

    def _check_device(self) -> None:
        try:
            torch.zeros(1, device=self.device).sum().item()
        except Exception:  # whatever it is: every waiting request has to hear of it
            log.exception("the model's device failed, so its thread ends")
            with self._lock:
                self._ended = True
            self._new.clear()
            self._thread.shutdown(wait=False, cancel_futures=True)
            self._fail(list(self._receivers))

    def _fail(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            sequence.finish("error")
            self._end(sequence)

    def _cancel(self, sequence: Sequence) -> None:
        if sequence in self._new:
            self._new.remove(sequence)
        self.engine.cancel(sequence)
        self._end(sequence)

    def _end(self, sequence: Sequence) -> None:
        """Tells its reader, once it has ended."""
        if sequence.finish_reason is not None and sequence in self._receivers:
            self._receivers.pop(sequence)("")
