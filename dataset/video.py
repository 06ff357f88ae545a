"""From a video or image file to exactly the frames that were asked for.

PyAV reads by default. A demux pass lists every packet's timestamp without decoding, so that the
frames are chosen on the clip's visible time line (edit lists and discarded packets left out). The
decoder then jumps only where a keyframe saves work, and every frame that comes out is checked
against the list: a clip whose list can't be trusted is decoded in order instead. Nothing here
ever returns a frame that it isn't sure of: what can't be read raises `VideoError`.

    clip = read_frames("clips/a.mp4", num_frames=8)
    pixel_values = FrameTransform.from_pretrained(vision_path)(clip.frames)   # (F, 3, S, S)
"""

import io
import json
import math
import os
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import compress, dropwhile, pairwise
from pathlib import Path

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from PIL import Image, ImageOps

from dataset import parquet

av.logging.set_level(None)  # FFmpeg's own lines on stderr; what matters is raised

# Only containers that hold their own samples: a playlist disguised as mp4 would make FFmpeg open
# other local files, or fetch from the network.
CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,gif,h264,hevc"
)
MAX_PIXELS = 8192 * 4352  # 8K; a 400 kB file can announce frames of gigabytes
HELD_BYTES = 16 << 20  # packets up to this size stay in memory: no second read, no seek
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")  # an MPO opens as a JPEG


class VideoError(ValueError):
    """A visual that can't be read: `.path`, `.reason` (a short code), `.detail` (a sentence).

    Reasons: missing, unreadable (no known container, or a broken one), no_video, no_frames,
    too_large, too_long, corrupt.
    """

    def __init__(self, path, reason: str, detail: str):
        super().__init__(str(path), reason, detail)  # plain args, so that it survives pickling
        self.path, self.reason, self.detail = str(path), reason, detail

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}: {self.detail}"


@dataclass
class Frames:
    """Frames of one clip in order, and what the whole clip has."""

    frames: np.ndarray  # (F, H, W, 3) uint8 RGB, upright
    timestamps: np.ndarray  # (F,) seconds after the first visible frame
    num_frames_total: int  # visible frames in the clip


def read_frames(
    path,
    num_frames: int = 8,
    sampling: str = "uniform",
    fps: float | None = None,
    backend: str = "pyav",
    max_pixels: int = MAX_PIXELS,
    max_seconds: float = math.inf,
) -> Frames:
    """Read at most `num_frames` frames of a video, or the one frame of an image.

    sampling="uniform" takes the middles of `num_frames` equal parts of the clip; "fps" one frame
    each 1/fps seconds, and falls back to uniform when those are more than `num_frames` (the rule
    of MiniCPM-V 2.6). A clip with fewer frames gives all of them. A GIF is a clip. Frames above
    max_pixels are refused before one is decoded, clips that last longer than max_seconds once
    their packets are listed: whoever reads strangers' files sets both.

    backend="decord" is kept because the project's card names it. Known faults of decord 0.6:
    wrong frames on clips cut by stream copy (it ignores edit lists) and on some DivX files, no
    GIF, rotation ignored on old files, and a hang on some valid .ts files that no Python timeout
    can end. Raises VideoError, and a plain ValueError for arguments that make no sense.
    """
    if num_frames < 1:
        raise ValueError(f"num_frames is {num_frames}; ask for 1 frame or more")
    if sampling not in ("uniform", "fps"):
        raise ValueError(f"sampling {sampling!r} isn't known; choose 'uniform' or 'fps'")
    if sampling == "fps" and not (fps and fps > 0):
        raise ValueError(f"sampling='fps' needs fps above 0, not {fps}")
    if backend not in ("pyav", "decord"):
        raise ValueError(f"backend {backend!r} isn't known; choose 'pyav' or 'decord'")
    if backend == "decord" and max_pixels != MAX_PIXELS:
        raise ValueError("decord can't check max_pixels before it decodes: use pyav")

    # An absolute name can't be taken for a protocol ("concat:…"), and a pipe or device never ends.
    path = Path(os.path.abspath(path))
    if parquet.is_image(path):
        return _read_image(path, max_pixels, _row_bytes(path))
    if not path.is_file():
        raise VideoError(path, "missing", "there is no such file")
    if _is_image(path):
        return _read_image(path, max_pixels)

    def choose(timestamps: np.ndarray) -> np.ndarray:
        if (lasts := timestamps[-1] - timestamps[0]) > max_seconds:
            raise VideoError(path, "too_long", f"{lasts:.0f} s are above {max_seconds:g} s")
        if sampling == "fps":
            indices = fps_indices(timestamps, fps)
            if len(indices) <= num_frames:
                return indices
        return uniform_indices(len(timestamps), num_frames)

    if backend == "decord":
        return _read_decord(path, choose)
    return _read_pyav(path, choose, max_pixels)


def uniform_indices(total: int, num_frames: int) -> np.ndarray:
    """The frames at int(i·gap + gap/2) with gap = total/num_frames; all of a shorter clip."""
    if total <= num_frames:
        return np.arange(total)
    gap = total / num_frames
    return np.array([int(i * gap + gap / 2) for i in range(num_frames)])


def fps_indices(timestamps: np.ndarray, fps: float) -> np.ndarray:
    """For each moment 0, 1/fps, 2/fps, … the frame nearest to it, each frame once."""
    seconds = timestamps - timestamps[0]
    moments = np.arange(int(seconds[-1] * fps + 1e-6) + 1) / fps
    right = np.searchsorted(seconds, moments).clip(0, len(seconds) - 1)
    left = (right - 1).clip(0)
    return np.unique(np.where(moments - seconds[left] <= seconds[right] - moments, left, right))


# ---------------------------------------------------------------------------------------- PyAV

Choose = Callable[[np.ndarray], np.ndarray]


class _UntrustedIndex(Exception):
    """The packets' timestamps don't tell which frames will come out."""


def _read_pyav(path: Path, choose: Choose, max_pixels: int) -> Frames:
    try:
        try:
            return _read_by_index(path, choose, max_pixels)
        except (_UntrustedIndex, av.FFmpegError):  # some codecs can't start at every keyframe
            return _read_in_order(path, choose, max_pixels)
    except VideoError:
        raise
    except MemoryError as error:
        raise VideoError(path, "too_large", "the frames don't fit into memory") from error
    except (av.FFmpegError, OSError, ValueError) as error:
        raise VideoError(path, "corrupt", f"decoding failed: {error}") from error


def _open(path: Path, max_pixels: int):
    """Open the container and its best moving picture: (container, stream)."""
    # max_pixels holds for the probing decoder too, which would swallow a bomb before our check.
    options = {
        "format_whitelist": CONTAINERS,
        "protocol_whitelist": "file",
        "max_pixels": str(max_pixels),
    }
    try:
        container = av.open(str(path), options=options, metadata_errors="replace")
    except (av.FFmpegError, OSError, ValueError) as error:
        raise VideoError(path, "unreadable", f"not a video that can be opened: {error}") from error
    # Cover art of a music file is a video stream too; it isn't a moving picture.
    streams = [
        stream
        for stream in container.streams.video
        if not stream.disposition & av.stream.Disposition.attached_pic
    ]
    if not streams:
        container.close()
        raise VideoError(path, "no_video", "the file has no video stream")
    stream = max(streams, key=lambda stream: stream.width * stream.height)
    if stream.width * stream.height > max_pixels:
        container.close()
        detail = f"frames of {stream.width}×{stream.height} pixels are above {max_pixels} pixels"
        raise VideoError(path, "too_large", detail)
    context = stream.codec_context
    # One thread: workers run side by side anyway, and starting threads costs more than decoding a
    # short clip. "explode" makes damage an error instead of a concealed, invented picture.
    context.thread_count, context.thread_type = 1, "SLICE"
    context.options = {"err_detect": "explode", "max_pixels": str(max_pixels)}
    return container, stream


class _Packets:
    """What the demux pass learned: each packet's time, keyframe flag and visibility."""

    def __init__(self, container, stream):
        self.container, self.stream = container, stream
        self.pts, self.dts, self.is_key, self.is_visible = [], [], [], []
        self.held, held_bytes = [], 0
        for packet in container.demux(stream):
            if packet.size == 0:
                self.flush = packet  # comes last, and makes the decoder give up its last frames
                continue
            self.pts.append(packet.pts)
            self.dts.append(packet.dts)
            self.is_key.append(packet.is_keyframe)
            self.is_visible.append(not packet.is_discard)
            held_bytes += packet.size
            if held_bytes > HELD_BYTES:
                self.held = None
            elif self.held is not None:
                self.held.append(packet)

    def since(self, first: int) -> Iterator:
        """Packets from number `first` (a keyframe) on in file order, and the flush."""
        if self.held is not None:
            yield from self.held[first:]
            yield self.flush
            return
        time = self.pts[first] if self.dts[first] is None else self.dts[first]
        self.container.seek(time, stream=self.stream)
        packets = self.container.demux(self.stream)
        for packet in packets:  # a seek may land early; if it lands late, the packet never comes
            if packet.pts == self.pts[first]:
                yield packet
                yield from packets
                return
        raise _UntrustedIndex


class _Run:
    """Frames decoded from one keyframe on; `fed` is the number of the next packet to decode."""

    def __init__(self, stream, packets: _Packets, first: int):
        stream.codec_context.flush_buffers()
        self.fed, self.starts_at = first, packets.pts[first]
        self.frames = self._decode(packets.since(first))

    def _decode(self, packets: Iterator) -> Iterator[av.VideoFrame]:
        for packet in packets:
            self.fed += 1
            # In an open group, frames shown before their keyframe lean on the group before it,
            # which this run hasn't seen.
            if packet.pts is None or packet.pts >= self.starts_at:
                yield from packet.decode()


def _read_by_index(path: Path, choose: Choose, max_pixels: int) -> Frames:
    """Choose by the packets' timestamps, decode from the nearest keyframes, check each frame."""
    container, stream = _open(path, max_pixels)
    with container:
        packets = _Packets(container, stream)
        pts = packets.pts
        if not pts:
            raise VideoError(path, "no_frames", "the video stream holds no samples")
        if None in pts or len(set(pts)) < len(pts) or not any(packets.is_visible):
            raise _UntrustedIndex
        visible = sorted(compress(pts, packets.is_visible))
        seconds = (np.array(visible) - visible[0]) * float(stream.time_base)
        number_of = {time: number for number, time in enumerate(pts)}
        keys = [number for number, is_key in enumerate(packets.is_key) if is_key]

        indices, to_rgb, images, run = choose(seconds), _ToRGB(), [], None
        for wanted in (visible[index] for index in indices):
            # Start at the keyframe that precedes the frame in the file *and* on the screen.
            k = bisect_right(keys, number_of[wanted]) - 1
            while k >= 0 and pts[keys[k]] > wanted:
                k -= 1
            if k < 0:
                raise _UntrustedIndex
            if run is None or keys[k] >= run.fed:
                run = _Run(stream, packets, keys[k])
                following = iter(visible[bisect_left(visible, run.starts_at) :])
            for frame in run.frames:
                if frame.is_corrupt or frame.pts != next(following, None):
                    raise _UntrustedIndex
                if frame.pts == wanted:
                    images.append(to_rgb(frame))
                    break
            else:
                raise _UntrustedIndex
        return Frames(_stack(path, images), seconds[indices], len(visible))


def _read_in_order(path: Path, choose: Choose, max_pixels: int) -> Frames:
    """Decode everything from the start, keeping only what was chosen.

    How many frames will come isn't known beforehand, so a first pass lists their times and a
    second one picks: twice the work, for the few files without a usable index.
    """
    times = []
    for frame, time_base in _decode_all(path, max_pixels):
        if frame.is_corrupt:
            raise VideoError(path, "corrupt", f"frame {len(times)} is damaged")
        times.append(None if frame.pts is None else float(frame.pts * time_base))
    if not times:
        raise VideoError(path, "no_frames", "no frame of the video stream can be decoded")
    if None in times or any(b <= a for a, b in pairwise(times)):
        rate = _frame_rate(path, max_pixels)
        times = [number / rate for number in range(len(times))]
    seconds = np.array(times) - times[0]
    indices, to_rgb = choose(seconds), _ToRGB()
    chosen = set(indices.tolist())
    frames = (frame for frame, _ in _decode_all(path, max_pixels))
    images = [to_rgb(frame) for number, frame in enumerate(frames) if number in chosen]
    return Frames(_stack(path, images), seconds[indices], len(times))


def _decode_all(path: Path, max_pixels: int) -> Iterator:
    container, stream = _open(path, max_pixels)
    with container:
        # A recording cut without care may begin between keyframes: nothing is right before one.
        packets = dropwhile(lambda packet: not packet.is_keyframe, container.demux(stream))
        for packet in packets:
            for frame in packet.decode():
                yield frame, stream.time_base


def _frame_rate(path: Path, max_pixels: int) -> float:
    container, stream = _open(path, max_pixels)
    with container:
        return float(stream.average_rate or stream.guessed_rate or 25)


class _ToRGB:
    """Decoded frame → (H, W, 3) uint8 RGB, turned as its display matrix says."""

    def __init__(self):
        self.reformatter = VideoReformatter()  # keeps its conversion tables from frame to frame

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        image = self.reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
        matrix = frame.side_data.get("DISPLAYMATRIX")
        if matrix is None:
            return image
        # A point (x, y) is shown at (a·x + c·y, b·x + d·y), y pointing down.
        a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
        if abs(b) > abs(a):
            image, a, d = image.swapaxes(0, 1), c, b
        return image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def _stack(path: Path, images: list[np.ndarray]) -> np.ndarray:
    if len({image.shape for image in images}) > 1:
        raise VideoError(path, "corrupt", "the picture changes its size within the clip")
    return np.stack(images)


# -------------------------------------------------------------------------- decord and images


def _read_decord(path: Path, choose: Choose) -> Frames:
    try:
        import decord
    except ImportError as error:
        raise ValueError("--video_backend decord: decord isn't installed; use pyav") from error
    try:
        reader = decord.VideoReader(str(path), num_threads=1)
        if len(reader) == 0:
            raise VideoError(path, "no_frames", "the video stream holds no samples")
        seconds = reader.get_frame_timestamp(np.arange(len(reader)))[:, 0].astype(np.float64)
        seconds -= seconds[0]
        indices = choose(seconds)
        return Frames(reader.get_batch(indices).asnumpy(), seconds[indices], len(reader))
    except (decord.DECORDError, RuntimeError, IndexError, OSError) as error:
        detail = str(error).strip().splitlines()[0][:200]
        raise VideoError(path, "unreadable", f"decord can't read it: {detail}") from error


def _is_image(path: Path) -> bool:
    """By content, since a name may lie. A GIF isn't one: it is a clip."""
    try:
        with path.open("rb") as file:
            head = file.read(12)
    except OSError as error:
        raise VideoError(path, "unreadable", str(error)) from error
    starts = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM", b"II*\0", b"MM\0*")
    return head.startswith(starts) or (head[:4] == b"RIFF" and head[8:] == b"WEBP")


def _row_bytes(path: Path) -> io.BytesIO:
    try:
        return io.BytesIO(parquet.read_image(path))
    except ValueError as error:
        raise VideoError(path, "missing", str(error)) from error


def _read_image(path: Path, max_pixels: int, data: io.BytesIO | None = None) -> Frames:
    try:
        with Image.open(data or path, formats=IMAGE_FORMATS) as image:
            if image.width * image.height > max_pixels:
                detail = f"{image.width}×{image.height} pixels are above {max_pixels}"
                raise VideoError(path, "too_large", detail)
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16 bits a sample; PIL would clip, not scale
                image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
            if image.has_transparency_data:  # what lies under full transparency is arbitrary
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image.convert("RGBA"))
            frame = np.array(image.convert("RGB"))  # a copy: torch takes writable memory
    except VideoError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise VideoError(path, "corrupt", f"not an image that can be decoded: {error}") from error
    return Frames(frame[None], np.zeros(1), 1)


# ------------------------------------------------------------------------------- for the tower


@dataclass(frozen=True)
class FrameTransform:
    """Frames of any size → the tower's normalised input, as its `preprocessor_config.json` says.

    resize="crop" is CLIP's rule (shortest edge to image_size, then the centre), "squash" that of
    SigLIP and MiniMind-V (both edges, whatever the aspect). Pillow does the resampling, because
    CLIP and SigLIP were trained on its antialiased bicubic, rounding included; frames already of
    the tower's size pass through untouched.
    """

    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resize: str = "crop"
    rescale: float = 1 / 255
    resample: int = Image.Resampling.BICUBIC

    def __post_init__(self):
        if self.resize not in ("crop", "squash"):
            raise ValueError(f"resize {self.resize!r} isn't known; choose 'crop' or 'squash'")

    @classmethod
    def from_pretrained(cls, directory) -> "FrameTransform":
        """Reads `preprocessor_config.json` beside the tower's weights, or, where a whole processor
        was saved instead, the image processor in `processor_config.json`."""
        file = Path(directory) / "preprocessor_config.json"
        whole = Path(directory) / "processor_config.json"
        if whole.is_file() and not file.is_file():
            file = whole
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ValueError(
                f"{file}: missing; it says how frames are resized and normalised. Copy it from "
                "where the vision tower came from"
            ) from error
        except ValueError as error:
            raise ValueError(f"{file}: not JSON: {error}; download it again") from error
        return cls.from_config(config, file)

    @classmethod
    def from_config(cls, config: dict, source) -> "FrameTransform":
        """The settings of an image processor of transformers; `source` is named in errors."""
        try:
            config = config.get("image_processor", config)
            config = {name: value for name, value in config.items() if value is not None}
            if "size" not in config and "max_num_patches" in config:
                # SigLIP2's NaFlex takes any grid of patches: give it the square one.
                config["size"] = math.isqrt(config["max_num_patches"]) * config["patch_size"]
            size, crop = _edges(config["size"]), _edges(config.get("crop_size", config["size"]))
            is_crop = config.get("do_center_crop", "crop_size" in config)
            edges = {*size, *crop} if is_crop else {*size}
            if len(edges) > 1:
                raise ValueError(f"size {size} and crop_size {crop} differ")
            return cls(
                image_size=edges.pop(),
                mean=tuple(config["image_mean"]),
                std=tuple(config["image_std"]),
                resize="crop" if is_crop else "squash",
                rescale=config.get("rescale_factor", 1 / 255),
                resample=config.get("resample", Image.Resampling.BICUBIC),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{source}: {error!r}; what is needed is one square size, image_mean and image_std"
            ) from error

    def describe(self) -> dict:
        """As JSON keeps it, for the feature store's manifest."""
        return json.loads(json.dumps(asdict(self)))

    def resize_frames(self, frames: np.ndarray) -> np.ndarray:
        """(F, H, W, 3) uint8 → (F, S, S, 3) uint8, S the tower's size."""
        size, (height, width) = self.image_size, frames.shape[1:3]
        if height == width == size:
            return frames
        resized_height = resized_width = size
        if self.resize == "crop":
            if height <= width:
                resized_width = int(size * width / height)
            else:
                resized_height = int(size * height / width)
        top, left = (resized_height - size) // 2, (resized_width - size) // 2
        resized = np.empty((len(frames), size, size, 3), np.uint8)
        for index, frame in enumerate(frames):
            picture = Image.fromarray(np.ascontiguousarray(frame))
            picture = picture.resize((resized_width, resized_height), self.resample)
            resized[index] = np.asarray(picture)[top : top + size, left : left + size]
        return resized

    def normalize(self, frames: torch.Tensor) -> torch.Tensor:
        """(F, S, S, 3) uint8 → (F, 3, S, S) float32, (frame · rescale − mean) / std."""
        # A row of S·3 values at a time: three times faster than planes, and a convolution takes the
        # channels-last result as it is.
        num_frames, size = frames.shape[:2]
        mean, std = torch.tensor([self.mean, self.std], device=frames.device).repeat(1, size)
        pixels = frames.reshape(num_frames, size, size * 3).float()
        pixels = pixels.mul_(self.rescale / std).sub_(mean / std)
        return pixels.view(num_frames, size, size, 3).permute(0, 3, 1, 2)

    def __call__(self, frames: np.ndarray) -> torch.Tensor:
        """(F, H, W, 3) uint8 RGB → (F, 3, S, S) float32."""
        return self.normalize(torch.from_numpy(np.ascontiguousarray(self.resize_frames(frames))))


def _edges(size) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    if "shortest_edge" in size:
        return size["shortest_edge"], size["shortest_edge"]
    return size["height"], size["width"]
