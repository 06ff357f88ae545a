"""Real video files, made small."""

from pathlib import Path

import av
import numpy as np


def make_clip(path: Path, shade: int, size=(96, 128), frames=8, rate=8) -> Path:
    """A bar that moves to the right, in front of an even grey."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.height, stream.width = size
        for number in range(frames):
            picture = np.full((*size, 3), shade, np.uint8)
            picture[:, number * 8 : number * 8 + 32] = 255 - shade
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path
