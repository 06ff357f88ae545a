"""The decoding itself: from a file's bytes to exactly the frames that were asked for.

PyAV decodes by default. A demux pass lists every packet's timestamp without decoding, so that the
frames are chosen on the clip's visible time line (edit lists and discarded packets left out). The
decoder then jumps only where a keyframe saves work, and every frame that comes out is checked
against the list: a clip whose list can't be trusted is decoded in order instead. Nothing here
ever returns a frame that it isn't sure of: what can't be decoded raises `VideoError`, unless the
caller asked to keep what is damaged, which is then reported.

`dataset/video.py` is the door to this; there it runs in a process of its own (`serve`), so
nothing that a worker doesn't need, torch above all, is imported.
"""

import json
import os
import pickle
import signal
import sys
import warnings
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from itertools import chain, dropwhile, groupby

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from PIL import Image

from dataset.clip import ContainerInfo, Frames, Request, VideoError
from dataset.images import decode_image, is_image, on_white

av.logging.set_level(None)  # FFmpeg's own lines on stderr; what matters is raised

# Only containers that hold their own samples: a playlist disguised as mp4 would make FFmpeg open
# other local files, or fetch from the network. Streams without a container aren't among them:
# nothing says whether their last picture is whole.
CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,live_flv,asf,ogg,ivf,mxf,rm,nut,"
    "yuv4mpegpipe"
)
OPEN_ENDED = ("mpegts", "mpeg")  # nor is it in these: the last packet of theirs is left out
# "explode" makes damage an error instead of a concealed, invented picture; "bitstream" and "buffer"
# find most of it in WMV and MS-MPEG-4. "aggressive" would refuse what other encoders write.
ERRORS = "crccheck+bitstream+buffer+explode"
HELD_BYTES = 16 << 20  # packets up to this size stay in memory: no second read, no seek
MEMORY = 4 << 30  # bytes of data of a worker; a decoder that wants more gets an error
GRACE = 5  # seconds after which a worker ends itself, should nobody be left to do it


def serve() -> None:
    """One request in, one reply out, until the input ends: what a decoding process runs.

    Native decoders crash, hang with Python's lock held and eat memory on broken files. Here this
    hits a process that is there to be killed. A request is a pickle of (Request, timeout). A reply
    is the length of a JSON, that, and the frames' bytes: nothing of it is ever executed, should a
    file have taken this process over.
    """
    import resource

    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not get between the replies
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends us
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the kernel's doing: works against any code
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    soft = MEMORY if hard == resource.RLIM_INFINITY else min(MEMORY, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
    replies.write(b"ready")
    replies.flush()
    while True:
        try:
            request, timeout = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_REAL, timeout + GRACE)
        frames = b""
        try:
            reply = vars(decode(request))
        except VideoError as error:
            reply = {"video_error": [error.reason, error.detail]}
        except ValueError as error:
            reply = {"value_error": str(error)}
        else:
            frames = np.ascontiguousarray(reply.pop("frames"))
            reply |= {
                "shape": frames.shape,
                "timestamps": reply["timestamps"].tolist(),
                "info": asdict(reply["info"]),
            }
        header = json.dumps(reply).encode()
        replies.write(len(header).to_bytes(8) + header)
        replies.write(memoryview(frames).cast("B"))
        replies.flush()
        signal.setitimer(signal.ITIMER_REAL, 0)


def decode(request: Request) -> Frames:
    """Decode what `request` asks for. Raises VideoError, whatever is wrong with the file."""
    path = request.path
    try:
        if is_image(path):
            clip = decode_image(request)
        else:
            clip = (_decode_decord if request.backend == "decord" else _decode_pyav)(request)
        if request.transform:
            clip.frames = request.transform.resize_frames(clip.frames)
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
        # RecursionError, …). The reason is reported, and no frame is made up.
        reason = f"decoding failed: {type(error).__name__}: {error}"
        raise VideoError(path, "corrupt", reason) from error


# ---------------------------------------------------------------------------------------- PyAV


class _UntrustedIndex(Exception):
    """The packets' timestamps don't tell which frames will come out."""


def _decode_pyav(request: Request) -> Frames:
    try:
        return _decode_by_index(request)
    except (_UntrustedIndex, av.FFmpegError):  # some codecs can't start at every keyframe
        return _decode_in_order(request)


def _open(request: Request, errors: str = ERRORS):
    """Open the container and its best moving picture: (container, stream)."""
    # max_pixels holds for the probing decoder too, which would swallow a bomb before our check.
    path, limits = request.path, {"max_pixels": str(request.max_pixels)}
    options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file", **limits}
    try:
        container = av.open(path, options=options, metadata_errors="replace")
    except (av.FFmpegError, OSError, ValueError) as error:
        detail = f"not a video that can be opened: {error} (a stream without a container needs one:"
        raise VideoError(path, "unreadable", f"{detail} ffmpeg -i it -c copy new.mkv)") from error
    try:
        # Cover art of a music file is a video stream too; it isn't a moving picture.
        cover = av.stream.Disposition.attached_pic
        streams = [each for each in container.streams.video if not each.disposition & cover]
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
    context.options = {"err_detect": errors, **limits}
    return container, stream


def _info(container, stream) -> ContainerInfo:
    return ContainerInfo(
        codec=stream.codec_context.name,
        width=stream.width,
        height=stream.height,
        pixel_aspect=float(stream.sample_aspect_ratio or 1),
        fps=float(stream.average_rate) if stream.average_rate else None,
        seconds=None if container.duration is None else container.duration / av.time_base,
    )


def _demux(container, stream) -> Iterator[av.Packet]:
    """The stream's packets: from the first keyframe on, since a recording cut without care begins
    between two, to the end of the file or to where it was cut."""
    previous = None
    with suppress(av.FFmpegError, OSError):  # the next sample lies behind the end of the file
        for packet in container.demux(stream):
            if not packet.size:  # PyAV's flush; we make our own
                continue
            if previous is not None:
                yield previous
            if previous is not None or packet.is_keyframe:
                previous = packet
    is_open_ended = container.format.name in OPEN_ENDED
    if previous is not None and not previous.is_corrupt and not is_open_ended:
        yield previous


class _Packets:
    """What a demux pass learns without decoding: when packets are shown, and which are keyframes.

    Raises _UntrustedIndex where their times don't tell which frames will come out.
    """

    def __init__(self, container, stream):
        self.container, self.stream = container, stream
        self.held, held_bytes = [], 0
        self.pts, self.dts, self.keys, visible = [], [], [], []
        for number, packet in enumerate(_demux(container, stream)):
            self.pts.append(packet.pts)
            self.dts.append(packet.dts)
            if packet.is_keyframe:
                self.keys.append(number)
            # What an open group shows before its keyframe leans on a group that was cut away.
            if not packet.is_discard and (packet.pts or 0) >= (self.pts[0] or 0):
                visible.append(packet.pts)
            held_bytes += packet.size
            if held_bytes <= HELD_BYTES:
                self.held.append(packet)
        self.number_of = {time: number for number, time in enumerate(self.pts)}
        if not self.pts:
            raise VideoError(container.name, "no_frames", "the video stream holds no samples")
        if None in self.number_of or len(self.number_of) < len(self.pts) or not visible:
            raise _UntrustedIndex
        self.visible = sorted(visible)

    def keyframe_before(self, time: int) -> int:
        """Number of the keyframe that precedes a frame in the file *and* on the screen."""
        k = bisect_right(self.keys, self.number_of[time]) - 1
        while k >= 0 and self.pts[self.keys[k]] > time:
            k -= 1
        if k < 0:
            raise _UntrustedIndex
        return self.keys[k]

    def since(self, first: int) -> Iterator[av.Packet | None]:
        """Packets from number `first` (a keyframe) on in file order; None is the flush."""
        if len(self.held) == len(self.pts):
            packets = iter(self.held[first:])
        else:
            time = self.pts[first] if self.dts[first] is None else self.dts[first]
            self.container.seek(time, stream=self.stream)
            packets = _demux(self.container, self.stream)
            # A seek may land early; if it lands late, the packet never comes.
            packets = dropwhile(lambda packet: packet.pts != self.pts[first], packets)
        return chain(packets, [None])

    def decode(self, first: int, wanted: set[int]) -> Iterator[av.VideoFrame]:
        """The frames at the times `wanted`, decoded from keyframe number `first` on. All that come
        out are checked; _UntrustedIndex if one isn't what was listed."""
        context, start = self.stream.codec_context, self.pts[first]
        following = iter(self.visible[bisect_left(self.visible, start) :])
        context.flush_buffers()
        for packet in self.since(first):
            if packet is not None and packet.pts < start:  # of an open group: see above
                continue
            if packet is not None and packet.is_corrupt:
                break
            for frame in context.decode(packet):
                # Some files call every frame a keyframe. What comes after a false one is no error
                # to the decoder: it is garbage.
                is_false_key = frame.pts == start and not frame.key_frame
                if frame.is_corrupt or is_false_key or frame.pts != next(following, None):
                    raise _UntrustedIndex
                if frame.pts in wanted:
                    yield frame
                    wanted = wanted - {frame.pts}
                    if not wanted:
                        return
        raise _UntrustedIndex


def _decode_by_index(request: Request) -> Frames:
    """Choose by the packets' timestamps, decode from the nearest keyframes, check each frame."""
    container, stream = _open(request)
    with container:
        packets = _Packets(container, stream)
        visible = packets.visible
        seconds = (np.array(visible) - visible[0]) * float(stream.time_base)
        request.check_length(seconds[-1])
        indices = request.choose(seconds)
        request.check_output(len(indices), stream.width, stream.height)
        chosen, reformatter = (visible[index] for index in indices), VideoReformatter()
        images = [
            _to_rgb(request, len(indices), frame, reformatter)
            for first, wanted in groupby(chosen, packets.keyframe_before)
            for frame in packets.decode(first, set(wanted))
        ]
        frames, info = _stack(request, images), _info(container, stream)
        return Frames(frames, seconds[indices], len(visible), info)


def _decode_in_order(request: Request) -> Frames:
    """Decode everything from the start, keeping only what was chosen.

    How many frames will come isn't known beforehand, so a first pass lists their times and a
    second one picks: twice the work, for the few files without a usable index.
    """
    container, stream = _open(request)
    with container:
        info = _info(container, stream)
        rate = float(stream.average_rate or stream.guessed_rate or 25)
    damaged = []
    times = [frame.time for frame in _decode_all(request, damaged)]
    if not times:
        raise VideoError(request.path, "no_frames", "no frame of the video can be decoded")
    seconds = np.array(times, np.float64)  # what has no time is NaN
    if not (np.isfinite(seconds).all() and (np.diff(seconds) > 0).all()):
        seconds = np.arange(len(times)) / rate
    if request.on_damage == "error":  # what was broken is the end of a file that was cut
        damaged = []
    damaged = sorted({max(0.0, round(time - seconds[0], 3)) for time in damaged})
    seconds -= seconds[0]
    request.check_length(seconds[-1])

    indices = request.choose(seconds)
    request.check_output(len(indices), info.width, info.height)
    chosen, images, reformatter = set(indices.tolist()), [], VideoReformatter()
    for number, frame in enumerate(_decode_all(request, [])):
        if number in chosen:
            images.append(_to_rgb(request, len(indices), frame, reformatter))
        if len(images) == len(indices):
            break
    return Frames(_stack(request, images), seconds[indices], len(times), info, damaged)


def _decode_all(request: Request, damaged: list[float]) -> Iterator[av.VideoFrame]:
    """All frames in order, and the seconds of damage in `damaged`.

    With on_damage="error", only the last packet may be broken: a file that was cut ends so. With
    "keep", the frames come from a second decoder, which conceals damage as players do, and the
    errors of the first tell where it is.
    """
    keep = request.on_damage == "keep"
    (container, stream), (second, second_stream) = _open(request), _open(request, errors="0")
    strict, concealing = stream.codec_context, second_stream.codec_context
    broken = None
    with container, second:
        for packet in chain(_demux(container, stream), [None]):
            if broken is not None and packet is not None and not keep:
                detail = f"the data of the frame at {_seconds(broken):.3f} s is damaged"
                raise VideoError(request.path, "corrupt", detail)
            try:
                frames = strict.decode(packet)
                is_damaged = packet is not None and packet.is_corrupt
            except av.FFmpegError:
                if packet is None and not keep:
                    raise
                frames, is_damaged = [], True
            if is_damaged:
                broken = packet or broken
                damaged.append(_seconds(broken))
            if keep:
                try:
                    frames = concealing.decode(packet)
                except av.FFmpegError:
                    frames = []
            for frame in frames:
                if frame.is_corrupt:
                    damaged.append(frame.time or 0.0)
                    if not keep:
                        detail = f"the frame at {frame.time} s is damaged"
                        raise VideoError(request.path, "corrupt", detail)
                if keep or broken is None or frame.pts != broken.pts:
                    yield frame


def _seconds(packet: av.Packet | None) -> float:
    """When a packet is shown, as far as it says so."""
    time = None if packet is None else packet.dts if packet.pts is None else packet.pts
    return 0.0 if time is None else float(time * packet.time_base)


def _to_rgb(request: Request, num_frames: int, frame, reformatter: VideoReformatter) -> np.ndarray:
    """→ (H, W, 3) uint8 RGB, turned as its display matrix says; one of `num_frames`. `reformatter`
    keeps its tables from frame to frame: a frame's own starts threads each time, for 2 ms."""
    request.check_output(num_frames, frame.width, frame.height)  # whatever the header said
    has_alpha = any(component.is_alpha for component in frame.format.components)
    name = "rgba" if has_alpha else "rgb24"
    image = reformatter.reformat(frame, format=name, threads=1).to_ndarray()
    if has_alpha:
        image = on_white(image)
    if matrix := frame.side_data.get("DISPLAYMATRIX"):
        # A point (x, y) is shown at (a·x + c·y, b·x + d·y), y pointing down.
        a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
        if abs(b) > abs(a):
            image, a, d = image.swapaxes(0, 1), c, b
        image = image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
    return image


def _stack(request: Request, images: list[np.ndarray]) -> np.ndarray:
    if len({image.shape for image in images}) > 1:
        raise VideoError(request.path, "corrupt", "the picture changes its size within the clip")
    return np.stack(images)


# -------------------------------------------------------------------------------------- decord


def _decode_decord(request: Request) -> Frames:
    container, stream = _open(request)  # decord knows neither budgets nor an allow-list
    with container:
        info = _info(container, stream)
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    try:
        reader = decord.VideoReader(request.path, num_threads=1)
        seconds = reader.get_frame_timestamp(np.arange(len(reader)))[:, 0].astype(np.float64)
        seconds -= seconds[0]
        request.check_length(seconds[-1])
        indices = request.choose(seconds)
        request.check_output(len(indices), info.width, info.height)
        return Frames(reader.get_batch(indices).asnumpy(), seconds[indices], len(reader), info)
    except (decord.DECORDError, RuntimeError, IndexError, OSError) as error:
        detail = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise VideoError(request.path, "unreadable", f"decord can't read it: {detail}") from error
