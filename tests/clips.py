"""Real video files, made small: what tests read stands nowhere but in the clone."""

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

BAR = 1 / 8  # of a numbered picture's height


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


def draw_number(number: int, height: int, width: int) -> np.ndarray:
    """A grey picture with the number as 16 blocks across its top, least significant bit left."""
    picture = np.full((height, width, 3), 90, np.uint8)
    for bit in range(16):
        left, right = bit * width // 16, (bit + 1) * width // 16
        picture[: int(height * BAR), left:right] = 235 if number >> bit & 1 else 16
    return picture


def read_number(frame: np.ndarray, bar: float = BAR) -> int:
    height, width = frame.shape[:2]
    row = frame[int(height * bar / 2)].mean(axis=-1)
    return sum(int(row[int((bit + 0.5) * width / 16)] > 128) << bit for bit in range(16))


def numbers(clip, bar: float = BAR) -> list[int]:
    """What `draw_number` drew on the frames of a clip."""
    return [read_number(frame, bar) for frame in clip.frames]


def make_numbered_clip(
    path: Path,
    total: int,
    codec: str = "libx264",
    size=(64, 128),
    pix_fmt: str = "yuv420p",
    noise: int = 0,
    times: list[int] | None = None,
    **options: str,
) -> Path:
    """Frame i shows the number i, at i or times[i] tenths of a second; `noise` fills the rest."""
    random = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10, options=options)
        stream.height, stream.width = size
        stream.pix_fmt, stream.codec_context.thread_count = pix_fmt, 1
        for number in range(total):
            picture = draw_number(number, *size)
            below = picture[int(size[0] * BAR) :]
            below += random.integers(0, noise + 1, below.shape, np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if times:
                frame.pts, frame.time_base = times[number], Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def remux(
    source: Path, target: Path, change: Callable = lambda packet, number: packet, **options
) -> Path:
    """Copies a video's packets; `change(packet, number)` gives one to write, or None to drop it."""
    with av.open(str(source)) as old, av.open(str(target), "w", options=options) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for number, packet in enumerate(old.demux(old.streams.video[0])):
            if packet.size and (packet := change(packet, number)):
                packet.stream = stream
                new.mux(packet)
    return target


def damage_packet(path: Path, choose: Callable[[list], av.Packet]) -> float:
    """Two thirds of the packet that `choose` takes of all become zeros, as if they had never been
    written; the seconds at which it is shown."""
    with av.open(str(path)) as container:
        packet = choose([packet for packet in container.demux(video=0) if packet.size])
        first, end = packet.pos + packet.size // 3, packet.pos + packet.size
        time = float(packet.pts * packet.time_base)
    data = path.read_bytes()
    path.write_bytes(data[:first] + bytes(end - first) + data[end:])
    return time
