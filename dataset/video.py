"""From a video or image file to exactly the frames that were asked for, whatever the file does.

    clip = read_frames("clips/a.mp4", num_frames=8)
    pixel_values = FrameTransform.from_pretrained(vision_path)(clip.frames)   # (F, 3, S, S)

How frames are chosen stands in `dataset/clip.py`, how they are decoded in `dataset/decoding.py` and
`dataset/images.py`. This module has it done in a process that can be killed: no Python timeout ends
native code that hangs, and no `except` catches one that crashes.
"""

import atexit
import fcntl
import json
import os
import pickle
import select
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from itertools import islice

import numpy as np

from dataset.clip import ContainerInfo, Frames, Request, VideoError
from dataset.decoding import decode, serve
from dataset.transforms import FrameTransform

# Of files that are taken for videos and images in a folder; what they hold is found by content.
VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".ts", ".flv")
VIDEO_SUFFIXES += (".wmv", ".3gp", ".ogv", ".gif")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".avif")
MEDIA_SUFFIXES = VIDEO_SUFFIXES + IMAGE_SUFFIXES

MAX_PIXELS = 8192 * 4352  # a frame of 8K; a 400 kB file can announce frames of gigabytes
MAX_SECONDS = 12 * 3600.0
MAX_BYTES = 2 << 30  # of the frames handed over: 345 of full HD
START_SECONDS = 60  # a worker takes a third of a second to start; a busy machine more
PIPE_BYTES = 1 << 20  # the kernel's usual 64 KiB would take twenty times as many turns


def read_frames(
    path,
    num_frames: int = 8,
    sampling: str = "uniform",
    fps: float | None = None,
    backend: str = "pyav",
    timeout: float | None = 60.0,
    max_pixels: int = MAX_PIXELS,
    max_seconds: float = MAX_SECONDS,
    max_bytes: int = MAX_BYTES,
    transform: FrameTransform | None = None,
    on_damage: str = "error",
    bounds: tuple[float, float] | None = None,
) -> Frames:
    """Decode at most `num_frames` frames of a video, or the one frame of an image.

    sampling="uniform" takes the middles of `num_frames` equal parts of the clip; "fps" one frame
    each 1/fps seconds, and falls back to uniform when those are more than `num_frames` (the rule
    of MiniCPM-V 2.6). A clip with fewer frames gives all of them. A GIF or an animated WebP or PNG
    is a clip. Pixels come as they are stored: `info.pixel_aspect` tells when they aren't square.

    backend: decord's faults are listed in docs/video.md.
    timeout: seconds, after which the decoding process is killed; it is kept for the next read, one
        for each thread that reads at the time. None decodes in this process: nothing to start or to
        copy, and no protection from a file that makes native code hang or crash.
    max_pixels (of a frame), max_seconds (of playing time), max_bytes (of all frames returned):
        checked on what the file's header and index say, before anything is decoded.
    transform: its `resize_frames` is applied where the decoding is done, so that only frames of the
        tower's size cross between the processes.
    on_damage: "error" gives exact frames or VideoError, as data must be. "keep" gives what a player
        shows of a damaged video, and `damaged` the seconds at which it is so: tell the user.
    bounds: (start, end) in seconds of the part of a video that is meant; None: all of it.

    Raises VideoError for what is wrong with the file, and a plain ValueError for arguments that
    make no sense.
    """
    if timeout is not None and not timeout > 0:
        raise ValueError(f"timeout is {timeout}; give seconds above 0, or None")
    # An absolute name can't be taken for a protocol ("concat:…"), and a pipe or device never ends.
    path = os.path.abspath(os.fsdecode(path))
    budgets = max_pixels, max_seconds, max_bytes
    how = transform, on_damage, bounds
    request = Request(path, num_frames, sampling, fps, backend, *budgets, *how)
    if "\0" in path or not os.path.isfile(path):
        raise VideoError(path, "missing", "there is no such file")
    if timeout is None:
        return decode(request)
    worker = _take_worker()
    try:
        clip = worker.decode(request, timeout)
    except (VideoError, ValueError):
        _give_back(worker)
        raise
    except BaseException:  # Ctrl-C: what the worker is about to say belongs to no request
        worker.kill()
        raise
    _give_back(worker)
    return clip


# --------------------------------------------------------------------------------- its processes


START = "import importlib, sys; importlib.import_module(sys.argv[1]).serve()"


class _Worker:
    """A decoding process; see `serve` in dataset/decoding.py for what goes between the two."""

    def __init__(self):
        settings = {
            "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path),
            "OPENBLAS_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",
        }
        self.process = subprocess.Popen(
            # -P: a file in the current directory must not pass for a module of ours.
            # The module by its own name, which is another in a directory of export_hf.py.
            [sys.executable, "-P", "-c", START, serve.__module__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,  # a buffer has a lock, and a fork may copy it while it is held
            env=os.environ | settings,
        )
        _alive.add(self)
        if sys.platform == "linux":
            fcntl.fcntl(self.process.stdout, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        try:
            self._receive(len(b"ready"), time.monotonic() + START_SECONDS)
        except (EOFError, TimeoutError):
            self.kill()
            raise RuntimeError("the decoding process doesn't start; its output tells why") from None

    def decode(self, request: Request, timeout: float) -> Frames:
        deadline = time.monotonic() + timeout
        try:
            self.process.stdin.write(pickle.dumps((request, timeout)))  # less than a pipe takes
            size = int.from_bytes(self._receive(8, deadline))
            reply = json.loads(self._receive(size, deadline).tobytes())
            if shape := reply.get("shape"):
                frames = self._receive(np.prod(shape), deadline).reshape(shape)
        except TimeoutError:
            self.kill()
            detail = f"not decoded within {timeout:g} seconds"
            raise VideoError(request.path, "timeout", detail) from None
        except (EOFError, BrokenPipeError):
            self.kill()
            detail = f"the decoding process died of it (exit status {self.process.returncode})"
            raise VideoError(request.path, "crashed", detail) from None
        if "video_error" in reply:
            raise VideoError(request.path, *reply["video_error"])
        if "value_error" in reply:
            raise ValueError(reply["value_error"])
        total, info = reply["num_frames_total"], ContainerInfo(**reply["info"])
        return Frames(frames, np.array(reply["timestamps"]), total, info, reply["damaged"])

    def _receive(self, size: int, deadline: float) -> np.ndarray:
        """So many bytes; EOFError where the process ends before, TimeoutError where it's late."""
        data, filled, poll = np.empty(size, np.uint8), 0, select.poll()
        poll.register(self.process.stdout, select.POLLIN)
        while filled < size:
            if not poll.poll(1000 * max(0, deadline - time.monotonic())):
                raise TimeoutError
            count = self.process.stdout.readinto(memoryview(data)[filled:])
            if not count:
                raise EOFError
            filled += count
        return data

    def kill(self) -> None:
        _alive.discard(self)
        self.process.kill()
        self.close()
        self.process.wait()

    def close(self) -> None:
        """Its input ends, and so does it."""
        self.process.stdin.close()
        self.process.stdout.close()


# Each operation on these is atomic: threads need no lock, which a fork could copy while it is held.
_alive: set[_Worker] = set()
_idle: deque[_Worker] = deque()


def _take_worker() -> _Worker:
    while _idle:
        with suppress(IndexError):  # another thread was faster
            worker = _idle.pop()
            if worker.process.poll() is None:
                return worker
            worker.kill()
    return _Worker()


def _give_back(worker: _Worker) -> None:
    if worker.process.returncode is None:
        _idle.append(worker)


@atexit.register
def _end_workers() -> None:
    while _idle:
        with suppress(IndexError):
            _idle.pop().kill()
    for worker in list(_alive):  # the thread that reads from it notices, and tidies up
        worker.process.kill()


@contextmanager
def reading_in_threads(
    function: Callable, items: Iterable, num_workers: int
) -> Iterator[Iterator[tuple]]:
    """For whoever reads many files: (item, function(item)) of each, in the order in which they get
    done, by so many threads; 0: one by one, in the caller's. Threads will do, since what decodes
    are processes, of which none is left after the block, whatever happened in it. (Else they end at
    exit, which waits for threads that still read.)

    However long `items` is and however slow the caller, at most two items a worker are taken and
    not yet given. An exception in `function` ends the whole and is raised.
    """
    pool, running, items = ThreadPoolExecutor(max(1, num_workers)), {}, iter(items)

    def results() -> Iterator[tuple]:
        if not num_workers:
            yield from ((item, function(item)) for item in items)
        running.update(
            (pool.submit(function, item), item) for item in islice(items, 2 * num_workers)
        )
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                item = running.pop(future)
                for following in islice(items, 1):  # now: the caller may take its time
                    running[pool.submit(function, following)] = following
                yield item, future.result()

    try:
        yield results()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        _end_workers()


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _forget_workers() -> None:
    """A forked process must not talk to its parent's workers."""
    _idle.clear()
    while _alive:
        worker = _alive.pop()
        worker.close()
        worker.process.returncode = 0  # not ours to wait for


os.register_at_fork(after_in_child=_forget_workers)
