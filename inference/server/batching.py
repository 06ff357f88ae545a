"""One thread that runs the model for all requests: they join its batch, and leave it, at any token.

The web part of the server hands over `Job`s and gets text back through each job's own queue.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from dataclasses import dataclass, field

import numpy as np
import torch

from inference import Answer, Answerer, Batch, Question, Visual
from inference.server.metrics import Metrics
from inference.server.schema import APIError
from model.generate import Sampling

FRAMES_AT_ONCE = 64  # through the tower; bounds its memory whatever waits
log = logging.getLogger("uvicorn.error")


@dataclass
class Finished:
    reason: str  # "stop" or "length"
    prompt_tokens: int
    completion_tokens: int


@dataclass(eq=False)
class Job:
    """One request's way through the model. To be made inside of the event loop that reads it."""

    messages: list[dict]
    clips: list[np.ndarray]  # (F, S, S, 3) uint8 each
    sampling: Sampling
    stop: tuple[str, ...]
    cancelled: bool = False  # set by the reader; the model stops working on it at the next token
    ended: bool = False  # the reader has had the last event
    submitted: float = field(default_factory=time.perf_counter)
    # What comes out, in order: pieces of text, then Finished or an APIError.
    events: asyncio.Queue = field(default_factory=asyncio.Queue)
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)

    async def next(self) -> str | Finished:
        """The next piece of text, or the end. Raises APIError where the model failed."""
        event = await self.events.get()
        self.ended = not isinstance(event, str)
        if isinstance(event, APIError):
            raise event
        return event

    def send(self, event: str | Finished | APIError) -> None:
        """From the model's thread."""
        self.loop.call_soon_threadsafe(self.events.put_nowait, event)


class Batcher:
    def __init__(self, answerer: Answerer, metrics: Metrics, max_batch: int, wait: float):
        """wait: seconds that the first of a batch waits for others, while the model is idle."""
        self.answerer, self.metrics, self.max_batch, self.wait = answerer, metrics, max_batch, wait
        self.jobs: deque[Job] = deque()
        self.changed, self.stopping = threading.Condition(), False
        self.thread = threading.Thread(target=self._run, name="model", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def stop(self) -> None:
        """What was submitted is still answered."""
        with self.changed:
            self.stopping = True
            self.changed.notify()
        self.thread.join()

    def submit(self, job: Job) -> None:
        with self.changed:
            self.jobs.append(job)
            self.changed.notify()

    # ---- the model's thread

    def _run(self) -> None:
        batch, going = self.answerer.batch(), {}
        while True:
            new = self._next_jobs(self.max_batch - len(going), idle=not going)
            if not new and not going:
                if self.stopping and not self.jobs:
                    return
                continue  # whoever asked has left already
            try:
                self._step(batch, going, new)
            except Exception:
                # Whose fault it was can't be told: all of this batch end, the next ones start anew.
                log.exception("the model failed on a batch of %d", len(going) + len(new))
                for job in {*going.values(), *new}:
                    job.send(APIError(500, "the model failed", "internal_error"))
                batch, going = self.answerer.batch(), {}
            self.metrics.batch_rows.set(len(going))

    def _next_jobs(self, room: int, idle: bool) -> list[Job]:
        with self.changed:
            if idle:
                self.changed.wait_for(lambda: self.jobs or self.stopping)
                self.changed.wait_for(lambda: len(self.jobs) >= room or self.stopping, self.wait)
            new = [self.jobs.popleft() for _ in range(min(room, len(self.jobs)))]
            return [job for job in new if not job.cancelled]

    def _step(self, batch: Batch, going: dict[Answer, Job], new: list[Job]) -> None:
        """One token for every answer, the first one for the new ones."""
        for answer, job in list(going.items()):
            if job.cancelled:
                batch.cancel(answer)
                del going[answer]
        moved = batch.step() if going else []
        if new:
            added = batch.add(self._questions(new))
            going |= zip(added, new, strict=True)
            moved += added
        if moved:
            self.metrics.batch_size.observe(len(moved))
        for answer in moved:
            job = going[answer]
            if answer.completion_tokens == 1:
                self.metrics.first_token.observe(time.perf_counter() - job.submitted)
            if piece := answer.take():
                job.send(piece)
            if answer.finish_reason is not None:
                del going[answer]
                counts = (answer.prompt_tokens, answer.completion_tokens)
                self.metrics.tokens.labels("prompt").inc(counts[0])
                self.metrics.tokens.labels("completion").inc(counts[1])
                job.send(Finished(answer.finish_reason, *counts))

    def _questions(self, jobs: list[Job]) -> list[Question]:
        """Runs the tower once for the frames of all jobs."""
        clips = [clip for job in jobs for clip in job.clips]
        visuals = iter(())
        if clips:
            transform, frames = self.answerer.transform, torch.from_numpy(np.concatenate(clips))
            parts = [transform.normalize(part) for part in frames.split(FRAMES_AT_ONCE)]
            features = torch.cat([self.answerer.see(part) for part in parts])
            parts = features.split([len(clip) for clip in clips])
            visuals = (Visual("upload", part, [0.0] * len(part)) for part in parts)
        return [
            Question(job.messages, [next(visuals) for _ in job.clips], job.sampling, job.stop)
            for job in jobs
        ]
