"""From a video or image file to exactly the frames that were asked for, whatever the file does.

    clip = read_frames("clips/a.mp4", num_frames=8)
    pixel_values = FrameTransform.from_pretrained(vision_path)(clip.frames)   # (F, 3, S, S)

How frames are chosen stands in `dataset/clip.py`, how they are decoded in `dataset/decoding.py` and
`dataset/images.py`. This module has it done in a process that can be killed: no Python timeout ends
native code that hangs, and no `except` catches one that crashes.
"""

import atexit
import json
import os
import select
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict

import numpy as np

from dataset.clip import (
    ContainerInfo,
    Frames,
    Request,
    VideoError,
    fps_indices,
    uniform_indices,
)
from dataset.decode_worker import main as decode_requests
from dataset.decoding import decode
from dataset.transforms import FrameTransform

__all__ = [
    "SUFFIXES",
    "ContainerInfo",
    "FrameTransform",
    "Frames",
    "VideoError",
    "ending_workers",
    "fps_indices",
    "read_frames",
    "uniform_indices",
]

# Of files that are taken for videos and images in a folder; what they are is told by content.
SUFFIXES = {
    *(".mp4", ".mkv", ".webm", ".avi", ".mov", ".ts", ".mpg", ".mpeg", ".m4v", ".gif"),
    *(".png", ".jpg", ".jpeg", ".webp", ".bmp"),
}
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
) -> Frames:
    """Read at most `num_frames` frames of a video, or the one frame of an image.

    sampling="uniform" takes the middles of `num_frames` equal parts of the clip; "fps" one frame
    each 1/fps seconds, and falls back to uniform when those are more than `num_frames` (the rule
    of MiniCPM-V 2.6). A clip with fewer frames gives all of them. A GIF or an animated WebP or PNG
    is a clip. Pixels come as they are stored: `info.pixel_aspect` tells when they aren't square.

    timeout: seconds, after which the decoding process is killed. It is kept for the next read, one
    for each thread that reads at the time. None decodes in this process: nothing to start, nothing
    to copy, and no protection from a file that makes native code hang or crash.

    max_pixels (of a frame), max_seconds (of playing time) and max_bytes (of all frames that are
    returned) are checked on what the file's header and index say, before anything is decoded.

    transform: its `resize_frames` is applied where the decoding is done, so that only frames of the
    tower's size cross between the processes.

    backend="decord" is kept because the project's card names it. Its known faults are listed in
    docs/video.md: wrong frames on some files, and hangs, which the timeout ends.

    Raises VideoError for what is wrong with the file, and a plain ValueError for arguments that
    make no sense.
    """
    if num_frames < 1:
        raise ValueError(f"num_frames is {num_frames}; ask for 1 frame or more")
    if sampling not in ("uniform", "fps"):
        raise ValueError(f"sampling {sampling!r} isn't known; choose 'uniform' or 'fps'")
    if sampling == "fps" and not (fps and 0 < fps < float("inf")):
        raise ValueError(f"sampling='fps' needs fps above 0, not {fps}")
    if backend not in ("pyav", "decord"):
        raise ValueError(f"backend {backend!r} isn't known; choose 'pyav' or 'decord'")
    if timeout is not None and not timeout > 0:
        raise ValueError(f"timeout is {timeout}; give seconds above 0, or None")

    # An absolute name can't be taken for a protocol ("concat:…"), and a pipe or device never ends.
    path = os.path.abspath(os.fsdecode(path))
    if "\0" in path or not os.path.isfile(path):
        raise VideoError(path, "missing", "there is no such file")
    request = Request(
        *(path, num_frames, sampling, fps, backend, max_pixels, max_seconds, max_bytes),
        transform=transform and transform.describe(),
    )
    if timeout is None:
        return decode(request)
    worker = _take_worker()
    try:
        clip = worker.read(request, timeout)
    except (VideoError, ValueError):
        _give_back(worker)
        raise
    except BaseException:  # Ctrl-C: what the worker is about to say belongs to no request
        worker.kill()
        raise
    _give_back(worker)
    return clip


# --------------------------------------------------------------------------------- its processes


class _Worker:
    """A decoding process; see dataset/decode_worker.py for what is said between the two."""

    def __init__(self):
        settings = {
            "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path),
            "OPENBLAS_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",
        }
        self.process = subprocess.Popen(
            # -P: a file in the current directory must not pass for a module of ours.
            [sys.executable, "-P", "-m", decode_requests.__module__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=os.environ | settings,
        )
        _alive.add(self)
        self.replies = self.process.stdout.fileno()
        if sys.platform == "linux":
            import fcntl

            fcntl.fcntl(self.replies, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        self.readable = select.poll()  # unlike select.select, it takes handles above 1023
        self.readable.register(self.replies, select.POLLIN)
        self.ahead = b""  # read, but not yet asked for
        self.deadline = time.monotonic() + START_SECONDS
        try:
            started = self._line() == b"ready"
        except TimeoutError:
            started = False
        if not started:
            self.kill()
            raise RuntimeError("the decoding process doesn't start; its output tells why")

    def read(self, request: Request, timeout: float) -> Frames:
        self.deadline = time.monotonic() + timeout
        try:
            self._send(json.dumps([timeout, asdict(request)]).encode() + b"\n")
            reply = json.loads(self._line())
            if "shape" in reply:
                frames = np.empty(reply["shape"], np.uint8)
                self._fill(memoryview(frames).cast("B"))
        except TimeoutError:
            self.kill()
            detail = f"not decoded within {timeout:g} seconds"
            raise VideoError(request.path, "timeout", detail) from None
        except (EOFError, BrokenPipeError):
            self.kill()
            detail = f"the decoding process died of it (exit status {self.process.returncode})"
            raise VideoError(request.path, "crashed", detail) from None
        if "error" in reply:
            raise VideoError(request.path, *reply["error"])
        if "mistake" in reply:
            raise ValueError(reply["mistake"])
        return Frames(
            frames,
            np.array(reply["timestamps"]),
            reply["num_frames_total"],
            ContainerInfo(**reply["info"]),
        )

    def _send(self, data: bytes) -> None:
        sent = 0
        while sent < len(data):
            sent += self.process.stdin.write(data[sent:])

    def _line(self) -> bytes:
        while b"\n" not in self.ahead:
            self.ahead += self._some(1 << 16)
        line, self.ahead = self.ahead.split(b"\n", 1)
        return line

    def _fill(self, into: memoryview) -> None:
        into[: len(self.ahead)] = self.ahead
        filled, self.ahead = len(self.ahead), b""
        while filled < len(into):
            self._wait()
            count = os.readv(self.replies, [into[filled:]])
            if not count:
                raise EOFError
            filled += count

    def _some(self, most: int) -> bytes:
        self._wait()
        data = os.read(self.replies, most)
        if not data:
            raise EOFError
        return data

    def _wait(self) -> None:
        left = self.deadline - time.monotonic()
        if left <= 0 or not self.readable.poll(left * 1000):
            raise TimeoutError

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
def ending_workers() -> Iterator[None]:
    """For whoever reads a lot, in threads: after this block no decoding process is left, whatever
    happened in it. Their CPU time counts as that of ended children. (Without it they end at exit,
    which waits for threads that still read.)"""
    try:
        yield
    finally:
        _end_workers()


def _forget_workers() -> None:
    """A forked process must not talk to its parent's workers."""
    _idle.clear()
    while _alive:
        worker = _alive.pop()
        worker.close()
        worker.process.returncode = 0  # not ours to wait for


os.register_at_fork(after_in_child=_forget_workers)
