"""One thread that runs the model for all users of a page or server.

Their sequences join one engine's batch and leave it at any token. Other work on the model (the
tower, above all) waits its turn in the same thread: one piece of it between two steps.
"""

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
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
        self._work: deque[tuple[Future, Callable, tuple]] = deque()
        self._receivers: dict[Sequence, Callable[[str], None]] = {}
        self._changed, self._stopping = threading.Condition(), False
        self._busy_since: float | None = None
        self.thread = threading.Thread(target=self._run, name="model", daemon=True)
        self.thread.start()

    @property
    def is_healthy(self) -> bool:
        """False once the thread has ended, with the device perhaps, or hangs."""
        busy = self._busy_since
        hangs = busy is not None and time.monotonic() - busy > HUNG_SECONDS
        return self.thread.is_alive() and not hangs

    def submit(self, sequence: Sequence, receive: Callable[[str], None]) -> None:
        """receive is called in the model's thread with each new text, which is "" only at the end;
        `sequence.finish_reason` then tells why, "error" if the model failed. Raises RuntimeError
        once the thread has ended."""
        with self._changed:
            self._check_running()
            self._receivers[sequence] = receive
            self._new.append(sequence)
            self._changed.notify()

    def cancel(self, sequence: Sequence) -> None:
        """Its reader has left: ends at the next token, and still calls `receive` then."""
        with self._changed:
            if is_waiting := sequence in self._new:
                self._new.remove(sequence)
            else:
                self.run(self._cancel, sequence)
        if is_waiting:  # not under the lock: `receive` may wait for another who needs it
            self._cancel(sequence)

    def run(self, function: Callable, *arguments: Any) -> Future:
        """Calls a function in the model's thread, between two steps. Raises RuntimeError once the
        thread has ended."""
        future = Future()
        with self._changed:
            self._check_running()
            self._work.append((future, function, arguments))
            self._changed.notify()
        return future

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

    def _check_running(self) -> None:
        if self._stopping:
            raise RuntimeError("the model's thread has ended; the log has the reason")

    def stop(self) -> None:
        """What was submitted is still answered."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self.thread.join()

    # ---- the model's thread

    def _run(self) -> None:
        try:
            while (turn := self._next()) is not None:
                self._busy_since = time.monotonic()
                self._do(*turn)
                self._busy_since = None
        except Exception:  # whatever it is: every waiting request has to hear of it
            log.exception("the model's device failed, so its thread ends")
        finally:
            with self._changed:
                self._stopping = True
                while self._work:
                    self._work.popleft()[0].cancel()
            self._fail(list(self._receivers))

    def _do(self, work: tuple | None, new: list[Sequence]) -> None:
        try:
            if work is not None:
                future, function, arguments = work
                if future.set_running_or_notify_cancel():  # False: its client has left
                    try:
                        future.set_result(function(*arguments))
                    except Exception as error:
                        future.set_exception(error)
            self._step(new)
        except Exception:
            # Which sequence it was can't be known: all of this batch end, the next ones are new.
            failed = [*self.engine.sequences, *new]
            log.exception("the model failed on a batch of %d", len(failed))
            self.engine.reset()
            self._fail(failed)
            torch.zeros(1, device=self.device).sum().item()  # raises where the device has died

    def _fail(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            sequence.finish("error")
            self._end(sequence)

    def _next(self) -> tuple[tuple | None, list[Sequence]] | None:
        """The next piece of work and the sequences that join; None: it is time to stop."""
        engine = self.engine
        with self._changed:
            self._changed.wait_for(
                lambda: self._stopping or self._work or self._new or engine.sequences
            )
            capacity = self.max_batch - len(engine.sequences)
            if self._new and not (engine.sequences or self._work):
                self._changed.wait_for(lambda: len(self._new) >= capacity, self.wait)
            if self._stopping and not (self._work or self._new or engine.sequences):
                return None
            work = self._work.popleft() if self._work else None
            return work, [self._new.popleft() for _ in range(min(capacity, len(self._new)))]

    def _step(self, new: list[Sequence]) -> None:
        moved = self.engine.step() if self.engine.sequences else []
        if new:
            self.engine.add(new)
        moved = [*moved, *new]
        for sequence in moved:
            receive = self._receivers[sequence]
            if text := sequence.take_text():
                receive(text)
            if sequence.finish_reason is not None:
                self._end(sequence)
        if moved:
            self.on_step(moved)

    def _cancel(self, sequence: Sequence) -> None:
        if sequence in self.engine.sequences:
            self.engine.cancel(sequence)
        sequence.finish("cancelled")
        self._end(sequence)

    def _end(self, sequence: Sequence) -> None:
        if receive := self._receivers.pop(sequence, None):
            receive("")
