"""The process that decodes for `read_frames`: one request in, one reply out, until its input ends.

Native decoders crash, hang with Python's lock held and eat memory on broken files. Here this hits a
process that is there to be killed. A request is a line of JSON. A reply is a line of
JSON, and the frames' bytes: nothing of it is ever executed, should a file have taken this process
over.
"""

import json
import os
import signal
import sys
import warnings
from dataclasses import asdict
from typing import BinaryIO

import numpy as np

from dataset.clip import Request, VideoError
from dataset.decoding import decode

MEMORY = 4 << 30  # bytes of data; a decoder that wants more gets an error, not the machine
GRACE = 5  # seconds after which this process ends itself, should nobody be left to do it


def main() -> None:
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what libraries print must not get between the replies
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends us
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the kernel's doing: works against any code
    limit_memory()
    replies.write(b"ready\n")
    for line in sys.stdin.buffer:
        timeout, fields = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, timeout + GRACE)
        answer(replies, Request(**fields))
        signal.setitimer(signal.ITIMER_REAL, 0)


def answer(replies: BinaryIO, request: Request) -> None:
    try:
        clip = decode(request)
    except VideoError as error:
        header, frames = {"error": [error.reason, error.detail]}, b""
    except ValueError as error:
        header, frames = {"mistake": str(error)}, b""
    else:
        frames = memoryview(np.ascontiguousarray(clip.frames)).cast("B")
        header = {
            "shape": clip.frames.shape,
            "timestamps": clip.timestamps.tolist(),
            "num_frames_total": clip.num_frames_total,
            "info": asdict(clip.info),
        }
    replies.write(json.dumps(header).encode() + b"\n")
    written = 0
    while written < len(frames):
        written += replies.write(frames[written:])


def limit_memory() -> None:
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    soft = MEMORY if hard == resource.RLIM_INFINITY else min(MEMORY, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


if __name__ == "__main__":
    main()
