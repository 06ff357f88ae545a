"""What is asked of a visual, what it gives, and which of its frames are taken."""

from dataclasses import dataclass

import numpy as np


class VideoError(ValueError):
    """A visual that can't be read: `.path`, `.reason` (a short code), `.detail` (a sentence).

    Reasons: missing, unreadable (no known container, or a broken one), no_video, no_frames,
    too_large, too_long, corrupt, timeout, crashed.
    """

    def __init__(self, path, reason: str, detail: str):
        super().__init__(str(path), reason, detail)  # plain args, so that it survives pickling
        self.path, self.reason, self.detail = str(path), reason, detail

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}: {self.detail}"


@dataclass(frozen=True)
class ContainerInfo:
    """What the file says about itself, true or not; None where it says nothing."""

    format: str
    codec: str
    width: int  # as stored: before rotation, and of non-square pixels
    height: int
    pixel_format: str | None = None
    pixel_aspect: float = 1.0  # width of a stored pixel over its height
    fps: float | None = None
    seconds: float | None = None
    num_frames: int | None = None


@dataclass
class Frames:
    """Frames of one clip in order, and what the whole clip has."""

    frames: np.ndarray  # (F, H, W, 3) uint8 RGB, upright
    timestamps: np.ndarray  # (F,) seconds after the first visible frame
    num_frames_total: int  # visible frames in the clip
    info: ContainerInfo


@dataclass(frozen=True)
class Request:
    """One read, as the worker gets it; `read_frames` explains the fields."""

    path: str
    num_frames: int
    sampling: str
    fps: float | None
    backend: str
    max_pixels: int
    max_seconds: float
    max_bytes: int
    transform: dict | None = None  # FrameTransform's fields, to resize the frames by

    def choose(self, timestamps: np.ndarray) -> np.ndarray:
        """Indices of the frames to return, of a clip with frames at these seconds."""
        if self.sampling == "fps":
            indices = fps_indices(timestamps, self.fps)
            if len(indices) <= self.num_frames:
                return indices
        return uniform_indices(len(timestamps), self.num_frames)

    # All three are asked before anything is decoded.

    def check_picture(self, width: int, height: int) -> None:
        if width * height > self.max_pixels:
            detail = f"frames of {width}×{height} pixels are above {self.max_pixels} pixels"
            raise VideoError(self.path, "too_large", detail)

    def check_length(self, seconds: float) -> None:
        if seconds > self.max_seconds:
            detail = f"{seconds:.0f} s are above {self.max_seconds:g} s"
            raise VideoError(self.path, "too_long", detail)

    def check_output(self, num_frames: int, width: int, height: int) -> None:
        needed = num_frames * width * height * 3
        if needed > self.max_bytes:
            detail = f"{num_frames} frames of {width}×{height} are {needed} bytes, above "
            raise VideoError(self.path, "too_large", f"{detail}{self.max_bytes}")


def uniform_indices(total: int, num_frames: int) -> np.ndarray:
    """The frames at int(i·gap + gap/2) with gap = total/num_frames; all of a shorter clip."""
    if total <= num_frames:
        return np.arange(total)
    gap = total / num_frames
    return np.array([int(i * gap + gap / 2) for i in range(num_frames)])


def fps_indices(timestamps: np.ndarray, fps: float) -> np.ndarray:
    """For each moment 0, 1/fps, 2/fps, … the frame nearest to it, each frame once."""
    seconds = timestamps - timestamps[0]
    # A frame is the nearest one from the middle of the gap before it to that of the gap behind it:
    # it is taken if a moment lies there, and no list of moments is needed, however many they are.
    ends = np.append((seconds[1:] + seconds[:-1]) / 2, seconds[-1] + 1e-6)
    moments_before_end = np.floor(ends * fps) + 1
    return np.flatnonzero(np.diff(moments_before_end, prepend=0))
