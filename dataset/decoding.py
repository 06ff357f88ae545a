"""The decoding itself: from a file's bytes to exactly the frames that were asked for.

PyAV reads by default. A demux pass lists every packet's timestamp without decoding, so that the
frames are chosen on the clip's visible time line (edit lists and discarded packets left out). The
decoder then jumps only where a keyframe saves work, and every frame that comes out is checked
against the list: a clip whose list can't be trusted is decoded in order instead. Nothing here
ever returns a frame that it isn't sure of: what can't be read raises `VideoError`.

`dataset/video.py` is the door to this; there it runs in a process of its own (see
`dataset/decode_worker.py`), so nothing that a worker doesn't need, torch above all, is imported.
"""

import os
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from contextlib import suppress
from itertools import compress
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from PIL import Image

from dataset.clip import ContainerInfo, Frames, Request, VideoError
from dataset.images import is_image, on_white, read_image
from dataset.transforms import FrameTransform

av.logging.set_level(None)  # FFmpeg's own lines on stderr; what matters is raised

# Only containers that hold their own samples: a playlist disguised as mp4 would make FFmpeg open
# other local files, or fetch from the network.
CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,live_flv,asf,ogg,gif,"
    "h264,hevc,m4v,av1,obu,ivf,mjpeg,dv,mxf,rm,nut,yuv4mpegpipe"
)
# "explode" makes damage an error instead of a concealed, invented picture; "bitstream" and "buffer"
# find most of it in WMV and MS-MPEG-4. "aggressive" would refuse what other encoders write.
ERRORS = "crccheck+bitstream+buffer+explode"
# Streams without a container: nothing says how long their last picture is.
BARE = ("h264", "hevc", "m4v", "mpegvideo")
# Their decoders leave out by themselves what leans on frames before the first keyframe.
MARK_LEADING = ("hevc", "vvc")
MAX_DELAY = 17  # a decoder holds back 16 frames at most
LAST_BYTES = {"gif": b";", "mjpeg": b"\xff\xd9"}
HELD_BYTES = 16 << 20  # packets up to this size stay in memory: no second read, no seek


def decode(request: Request) -> Frames:
    """Read as `request` says.

    Raises VideoError, whatever is wrong with the file.
    """
    path = Path(request.path)
    try:
        if is_image(path):
            clip = read_image(request)
        else:
            clip = (_read_decord if request.backend == "decord" else _read_pyav)(request)
        if request.transform:
            clip.frames = FrameTransform(**request.transform).resize_frames(clip.frames)
        return clip
    except VideoError:
        raise
    except Image.DecompressionBombError as error:  # Pillow's own limit, above ours by default
        raise VideoError(path, "too_large", str(error)) from error
    except MemoryError as error:
        raise VideoError(path, "too_large", "the frames don't fit into memory") from error
    except ImportError as error:
        raise ValueError(f"--video_backend {request.backend}: {error}; use pyav") from error
    except Exception as error:
        # On random bytes, libraries fail in ways that they don't document (struct.error, KeyError,
        # RecursionError, …). The reason is told, and no frame is made up.
        reason = f"decoding failed: {type(error).__name__}: {error}"
        raise VideoError(path, "corrupt", reason) from error


# ---------------------------------------------------------------------------------------- PyAV


class _UntrustedIndex(Exception):
    """The packets' timestamps don't tell which frames will come out."""


def _read_pyav(request: Request) -> Frames:
    try:
        return _read_by_index(request)
    except (_UntrustedIndex, av.FFmpegError):  # some codecs can't start at every keyframe
        return _read_in_order(request)


def _open(request: Request):
    """Open the container and its best moving picture: (container, stream)."""
    # max_pixels holds for the probing decoder too, which would swallow a bomb before our check.
    max_pixels = str(request.max_pixels)
    options = {
        "format_whitelist": CONTAINERS,
        "protocol_whitelist": "file",
        "max_pixels": max_pixels,
    }
    path = request.path
    try:
        container = av.open(path, options=options, metadata_errors="replace")
    except (av.FFmpegError, OSError, ValueError) as error:
        raise VideoError(path, "unreadable", f"not a video that can be opened: {error}") from error
    try:
        # Cover art of a music file is a video stream too; it isn't a moving picture.
        streams = [
            stream
            for stream in container.streams.video
            if not stream.disposition & av.stream.Disposition.attached_pic
        ]
        if not streams:
            raise VideoError(path, "no_video", "the file has no video stream")
        stream = max(streams, key=lambda stream: stream.width * stream.height)
        request.check_picture(stream.width, stream.height)
    except BaseException:
        container.close()
        raise
    context = stream.codec_context
    # One thread: workers run side by side anyway, and starting threads costs more than decoding a
    # short clip.
    context.thread_count, context.thread_type = 1, "SLICE"
    context.options = {"err_detect": ERRORS, "max_pixels": max_pixels}
    return container, stream


def _info(container, stream) -> ContainerInfo:
    aspect = stream.sample_aspect_ratio
    length = container.duration
    return ContainerInfo(
        format=container.format.name,
        codec=stream.codec_context.name,
        width=stream.width,
        height=stream.height,
        pixel_format=stream.codec_context.pix_fmt,
        pixel_aspect=float(aspect) if aspect else 1.0,
        fps=float(stream.average_rate) if stream.average_rate else None,
        seconds=None if length is None else length / av.time_base,
        num_frames=stream.frames or None,
    )


def _demux(container, stream) -> Iterator:
    """The stream's packets, to the end of the file or to where it was cut."""
    packets = _whole_in_their_container(container, stream)
    return _whole_pictures(stream, packets) if container.format.name in BARE else packets


def _whole_in_their_container(container, stream) -> Iterator:
    packets, packet = container.demux(stream), None
    while True:
        try:
            following = next(packets, None)
        except (av.FFmpegError, OSError):  # the next sample lies behind the end of the file
            following = None
        if following is not None and following.size == 0:  # PyAV's flush; we make our own
            continue
        is_last = following is None
        if packet is not None and not (is_last and (packet.is_corrupt or _is_cut(container))):
            yield packet
        if is_last:
            return
        packet = following


def _is_cut(container) -> bool:
    """Whether the last packet is a part of one, for containers whose demuxers don't tell."""
    size, name = container.size, container.format.name
    if name == "mpegts":
        return all(size % packet for packet in (188, 192, 204))
    if name == "dv":
        return all(size % frame for frame in (120_000, 144_000))
    if name in LAST_BYTES:
        with open(container.name, "rb") as file:
            file.seek(-min(size, 64), os.SEEK_END)
            return not file.read().rstrip(b"\0").endswith(LAST_BYTES[name])
    return False


def _whole_pictures(stream, packets: Iterator) -> Iterator:
    """The packets of a bare stream; the last one only if it is whole.

    Then its picture is the same whatever follows it: a decoder that reads on where the file was cut
    draws what it finds there.
    """
    group, last = [], None  # from a keyframe on
    for packet in packets:
        if last is not None:
            yield last
        if packet.is_keyframe:
            group = []
        group.append(packet)
        last = packet
    if group and len({_look(stream, group, bytes([value]) * 64) for value in (0x55, 0xAA)}) == 1:
        yield last


def _look(stream, group: list, behind: bytes) -> tuple[int, ...]:
    context = av.CodecContext.create(stream.codec_context.name, "r")
    context.extradata, context.thread_count = stream.codec_context.extradata, 1
    frames = []
    with suppress(av.FFmpegError):  # the decoding proper will say so
        for packet in [*group[:-1], av.Packet(bytes(group[-1]) + behind), None]:
            frames += context.decode(packet)
    return tuple(hash(frame.to_ndarray(format="rgb24").tobytes()) for frame in frames[-MAX_DELAY:])


class _Packets:
    """What the demux pass learned: each packet's time, keyframe flag and visibility."""

    def __init__(self, container, stream):
        self.container, self.stream = container, stream
        self.pts, self.dts, self.is_key, self.is_visible = [], [], [], []
        self.damaged = set()  # numbers of packets of which the demuxer saw that bytes are missing
        self.held, held_bytes = [], 0
        for packet in _demux(container, stream):
            self.pts.append(packet.pts)
            self.dts.append(packet.dts)
            self.is_key.append(packet.is_keyframe)
            self.is_visible.append(not packet.is_discard)
            if packet.is_corrupt:
                self.damaged.add(len(self.pts) - 1)
            held_bytes += packet.size
            if held_bytes > HELD_BYTES:
                self.held = None
            elif self.held is not None:
                self.held.append(packet)
        self._leave_out_what_leans_on_nothing()

    def _leave_out_what_leans_on_nothing(self) -> None:
        """A recording cut without care begins between keyframes, or with an open group."""
        first = next((number for number, is_key in enumerate(self.is_key) if is_key), None)
        if first is None or None in self.pts:
            return
        start = self.pts[first]
        asks = self.stream.codec_context.name in MARK_LEADING and min(self.pts[first:]) < start
        leading = set(self._leading(first)) if asks else ()
        for number, time in enumerate(self.pts):
            if number < first or (time < start and time not in leading):
                self.is_visible[number] = False

    def _leading(self, first: int) -> Iterator[int]:
        """Times of the frames that the decoder gives before the one of the first keyframe."""
        for packet in self.since(first):
            for frame in self.stream.codec_context.decode(packet):
                if frame.pts is None or frame.pts >= self.pts[first]:
                    return
                yield frame.pts

    def since(self, first: int) -> Iterator:
        """Packets from number `first` (a keyframe) on in file order; None is the flush."""
        if self.held is not None:
            yield from self.held[first:]
            yield None
            return
        time = self.pts[first] if self.dts[first] is None else self.dts[first]
        self.container.seek(time, stream=self.stream)
        packets = _demux(self.container, self.stream)
        for packet in packets:  # a seek may land early; if it lands late, the packet never comes
            if packet.pts == self.pts[first]:
                yield packet
                yield from packets
                yield None
                return
        raise _UntrustedIndex


class _Run:
    """Frames decoded from one keyframe on; `fed` is the number of the next packet to decode."""

    def __init__(self, stream, packets: _Packets, first: int):
        self.context, self.damaged = stream.codec_context, packets.damaged
        self.context.flush_buffers()
        self.fed, self.starts_at = first, packets.pts[first]
        self.frames = self._decode(packets.since(first))

    def _decode(self, packets: Iterator) -> Iterator[av.VideoFrame]:
        for packet in packets:
            if self.fed in self.damaged:
                raise _UntrustedIndex
            self.fed += 1
            # In an open group, frames shown before their keyframe lean on the group before it,
            # which this run hasn't seen.
            if packet is None or packet.pts >= self.starts_at:
                yield from self.context.decode(packet)


def _read_by_index(request: Request) -> Frames:
    """Choose by the packets' timestamps, decode from the nearest keyframes, check each frame."""
    container, stream = _open(request)
    with container:
        packets = _Packets(container, stream)
        pts = packets.pts
        if not pts:
            raise VideoError(request.path, "no_frames", "the video stream holds no samples")
        if None in pts or len(set(pts)) < len(pts) or not any(packets.is_visible):
            raise _UntrustedIndex
        visible = sorted(compress(pts, packets.is_visible))
        seconds = (np.array(visible) - visible[0]) * float(stream.time_base)
        request.check_length(seconds[-1])
        number_of = {time: number for number, time in enumerate(pts)}
        keys = [number for number, is_key in enumerate(packets.is_key) if is_key]

        indices, run = request.choose(seconds), None
        images = _Images(request, len(indices), stream.width, stream.height)
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
                # Some files call every frame a keyframe. What comes after a false one is no error
                # to the decoder: it is garbage.
                if frame.pts == run.starts_at and not frame.key_frame:
                    raise _UntrustedIndex
                if frame.pts == wanted:
                    images.add(frame)
                    break
            else:
                raise _UntrustedIndex
        return Frames(images.all(), seconds[indices], len(visible), _info(container, stream))


def _read_in_order(request: Request) -> Frames:
    """Decode everything from the start, keeping only what was chosen.

    How many frames will come isn't known beforehand, so a first pass lists their times and a
    second one picks: twice the work, for the few files without a usable index.
    """
    container, stream = _open(request)
    with container:
        info = _info(container, stream)
        times = [frame.time for frame in _decode_all(request.path, container, stream)]
        rate = float(stream.average_rate or stream.guessed_rate or 25)
    if not times:
        raise VideoError(request.path, "no_frames", "no frame of the video can be decoded")
    seconds = np.array(times, np.float64)  # what has no time is NaN
    if not (np.isfinite(seconds).all() and (np.diff(seconds) > 0).all()):
        seconds = np.arange(len(times)) / rate
    seconds -= seconds[0]
    request.check_length(seconds[-1])

    indices = request.choose(seconds)
    images = _Images(request, len(indices), info.width, info.height)
    chosen, last = set(indices.tolist()), indices[-1]
    container, stream = _open(request)
    with container:
        for number, frame in enumerate(_decode_all(request.path, container, stream)):
            if number in chosen:
                images.add(frame)
            if number == last:
                break
    return Frames(images.all(), seconds[indices], len(times), info)


def _decode_all(path: str, container, stream) -> Iterator[av.VideoFrame]:
    """All frames in order. Only the last packet may be broken: a file that was cut ends so."""
    context, begun, broken = stream.codec_context, False, None
    for packet in _demux(container, stream):
        # A recording cut without care may begin between keyframes: nothing is right before one.
        begun = begun or packet.is_keyframe
        if not begun:
            continue
        if broken is not None:
            raise VideoError(path, "corrupt", f"the data of the frame at {broken.pts} is damaged")
        try:
            if packet.is_corrupt:
                broken = packet
            else:
                yield from _sound(path, context.decode(packet))
        except av.FFmpegError:
            broken = packet
    frames = context.decode(None)
    yield from _sound(path, (f for f in frames if broken is None or f.pts != broken.pts))


def _sound(path: str, frames) -> Iterator[av.VideoFrame]:
    for frame in frames:
        if frame.is_corrupt:
            raise VideoError(path, "corrupt", f"the frame at {frame.time} s is damaged")
        yield frame


class _Images:
    """Collects decoded frames as (H, W, 3) uint8 RGB, turned as their display matrix says."""

    def __init__(self, request: Request, count: int, width: int, height: int):
        request.check_output(count, width, height)
        self.request, self.count, self.added = request, count, 0
        self.reformatter = VideoReformatter()  # keeps its conversion tables from frame to frame

    def add(self, frame: av.VideoFrame) -> None:
        has_alpha = any(component.is_alpha for component in frame.format.components)
        name = "rgba" if has_alpha else "rgb24"
        image = self.reformatter.reformat(frame, format=name, threads=1).to_ndarray()
        if has_alpha:
            image = on_white(image)
        image = _upright(image, frame.side_data.get("DISPLAYMATRIX"))
        if not self.added:  # now the picture's size is sure, whatever the header said
            self.request.check_picture(frame.width, frame.height)
            self.request.check_output(self.count, frame.width, frame.height)
            self.images = np.empty((self.count, *image.shape), np.uint8)
        elif image.shape != self.images.shape[1:]:
            detail = "the picture changes its size within the clip"
            raise VideoError(self.request.path, "corrupt", detail)
        self.images[self.added] = image
        self.added += 1

    def all(self) -> np.ndarray:
        assert self.added == self.count, f"{self.added} frames of {self.count}"
        return self.images


def _upright(image: np.ndarray, matrix) -> np.ndarray:
    if matrix is None:
        return image
    # A point (x, y) is shown at (a·x + c·y, b·x + d·y), y pointing down.
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
    if abs(b) > abs(a):
        image, a, d = image.swapaxes(0, 1), c, b
    return image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


# -------------------------------------------------------------------------------------- decord


def _read_decord(request: Request) -> Frames:
    try:
        import decord
    except ImportError as error:
        raise ImportError("decord isn't installed") from error
    container, stream = _open(request)  # decord knows neither budgets nor an allow-list
    with container:
        info = _info(container, stream)
    decord.logging.set_level(decord.logging.QUIET)
    try:
        reader = decord.VideoReader(request.path, num_threads=1)
        if len(reader) == 0:
            raise VideoError(request.path, "no_frames", "the video stream holds no samples")
        seconds = reader.get_frame_timestamp(np.arange(len(reader)))[:, 0].astype(np.float64)
        seconds -= seconds[0]
        request.check_length(seconds[-1])
        indices = request.choose(seconds)
        request.check_output(len(indices), info.width, info.height)
        return Frames(reader.get_batch(indices).asnumpy(), seconds[indices], len(reader), info)
    except (decord.DECORDError, RuntimeError, IndexError, OSError) as error:
        detail = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise VideoError(request.path, "unreadable", f"decord can't read it: {detail}") from error
