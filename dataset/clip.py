"""What is asked of a visual, what comes back, and which of its frames are taken."""

from dataclasses import dataclass, field, replace

import numpy as np

from dataset.transforms import FrameTransform


class VideoError(ValueError):
    """A visual that can't be decoded: `.path`, `.reason` (a short code), `.detail` (a sentence).

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

    codec: str
    width: int  # as stored: before rotation, and of non-square pixels
    height: int
    pixel_aspect: float = 1.0  # width of a stored pixel over its height
    fps: float | None = None
    seconds: float | None = None


@dataclass
class Frames:
    """Frames of one clip in order, and what the whole clip has."""

    frames: np.ndarray  # (F, H, W, 3) uint8 RGB, upright
    timestamps: np.ndarray  # (F,) seconds after the first visible frame
    num_frames_total: int  # visible frames in the clip
    info: ContainerInfo
    # Seconds at which the file is damaged; only with on_damage="keep", else damage is an error.
    # Frames from there to the next keyframe may show something that was never filmed.
    damaged: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Request:
    """One file to decode; `dataset.video.read_frames` explains the fields.

    Raises ValueError for what makes no sense. Its checks raise VideoError, before any decoding.
    """

    path: str
    num_frames: int
    sampling: str
    fps: float | None
    backend: str
    max_pixels: int
    max_seconds: float
    max_bytes: int
    transform: FrameTransform | None = None
    on_damage: str = "error"
    bounds: tuple[float, float] | None = None

    def __post_init__(self):
        if self.num_frames < 1:
            raise ValueError(f"num_frames is {self.num_frames}; ask for 1 frame or more")
        if self.sampling == "fps" and not (self.fps and 0 < self.fps < float("inf")):
            raise ValueError(f"sampling='fps' needs fps above 0, not {self.fps}")
        for name, known in (
            ("sampling", ("uniform", "fps")),
            ("backend", ("pyav", "decord")),
            ("on_damage", ("error", "keep")),
        ):
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"{name} {value!r} isn't known; choose one of {known}")

    def choose(self, timestamps: np.ndarray) -> np.ndarray:
        """Indices of the frames to return, of a clip with frames at these seconds."""
        if self.bounds is not None:
            start, end = self.bounds
            inside = np.flatnonzero((timestamps >= start) & (timestamps <= end))
            if not len(inside):  # shorter than a frame, or behind the end: the nearest one
                inside = np.abs(timestamps - start).argmin(keepdims=True)
            return inside[replace(self, bounds=None).choose(timestamps[inside])]
        if self.sampling == "fps":
            indices = fps_indices(timestamps, self.fps)
            if len(indices) <= self.num_frames:
                return indices
        return uniform_indices(len(timestamps), self.num_frames)

    def check_picture(self, width: int, height: int) -> None:
        if width * height > self.max_pixels:
            self._refuse("too_large", f"frames of {width}×{height}", f"{self.max_pixels} pixels")

    def check_length(self, seconds: float) -> None:
        if seconds > self.max_seconds:
            self._refuse("too_long", f"{seconds:.0f} s", f"{self.max_seconds:g} s")

    def check_output(self, num_frames: int, width: int, height: int) -> None:
        if num_frames * width * height * 3 > self.max_bytes:
            what = f"{num_frames} frames of {width}×{height}"
            self._refuse("too_large", what, f"{self.max_bytes} bytes")

    def _refuse(self, reason: str, what: str, limit: str) -> None:
        raise VideoError(self.path, reason, f"{what} are above the limit of {limit}")


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
