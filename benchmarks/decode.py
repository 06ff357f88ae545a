"""What decoding 8 or 32 frames of a clip costs, against decord and against decoding everything.

    python -m benchmarks.decode [--rounds 5] [--seconds 10 60 600]

Renders one h264 clip a length (640 × 360, 30 frames a second, a keyframe every 250 frames: about
what a phone records) and decodes it with each reader in turn, one thread each, so that what else
the machine does hits all alike. The ratio to decord is that of the CPU-seconds, the median over
rounds, the lowest and the highest.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import numpy as np
import psutil

from dataset.clip import uniform_indices
from dataset.video import read_frames

HEIGHT, WIDTH, RATE = 360, 640, 30
LEAST_CPU = 0.5  # seconds that a measurement takes


def make_clip(path: Path, seconds: int, seed: int = 0) -> None:
    """Noise that moves. A long clip repeats a minute of packets: encoding takes longer than all."""
    random = np.random.default_rng(seed)
    scene = random.integers(0, 255, (HEIGHT // 8, WIDTH // 4, 3), np.uint8)
    scene = scene.repeat(16, axis=0).repeat(16, axis=1)
    length = min(seconds, 60) * RATE
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        packets = []
        for number in range(length):
            top, left = number % HEIGHT, number * 3 % WIDTH
            frame = np.ascontiguousarray(scene[top : top + HEIGHT, left : left + WIDTH])
            packets += stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24"))
        packets += stream.encode()
        times = [(packet.pts, packet.dts) for packet in packets]
        for first in range(0, seconds * RATE, length):
            for packet, (pts, dts) in zip(packets, times, strict=True):
                packet.pts, packet.dts = pts + first, dts + first
                packet.time_base, packet.stream = Fraction(1, RATE), stream
                container.mux(packet)


def by_decord(path: str, num_frames: int) -> np.ndarray:
    import decord

    reader = decord.VideoReader(path, num_threads=1)
    return reader.get_batch(uniform_indices(len(reader), num_frames)).asnumpy()


def by_everything(path: str, num_frames: int) -> np.ndarray:
    """Decodes every frame and picks at the end, as simple loaders do; of a long clip (12 GB at ten
    minutes), what isn't picked is let go."""
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        chosen = uniform_indices(stream.frames, num_frames).tolist()
        arrays = (frame.to_ndarray(format="rgb24") for frame in container.decode(stream))
        if stream.frames <= 60 * RATE:
            return np.stack(list(arrays))[chosen]
        return np.stack([array for number, array in enumerate(arrays) if number in chosen])


READERS = {
    "read_frames": read_frames,
    "decord": by_decord,
    "everything": by_everything,
}


def cpu_seconds() -> float:
    """Of this process and the one that decodes for it."""
    processes = psutil.Process(), *psutil.Process().children()
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def measure(run: Callable[[], object]) -> float:
    """CPU-seconds of one call."""
    run()  # starts the process, fills caches
    calls, start = 0, cpu_seconds()
    while not calls or cpu_seconds() - start < LEAST_CPU:
        run()
        calls += 1
    return (cpu_seconds() - start) / calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=int, nargs="+", default=[10, 60, 600])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    print("  clip frames       reader   CPU-s  /decord  low-high")
    for seconds in args.seconds:
        with tempfile.NamedTemporaryFile(suffix=".mp4") as clip:
            make_clip(clip.name, seconds)
            for num_frames in (8, 32):
                readers = {n: partial(read, clip.name, num_frames) for n, read in READERS.items()}
                rounds = [{n: measure(readers[n]) for n in readers} for _ in range(args.rounds)]
                for name in readers:
                    # Round by round: the two sides of a ratio saw the same machine.
                    ratios = [costs[name] / costs["decord"] for costs in rounds]
                    cpu = statistics.median(costs[name] for costs in rounds)
                    ratio = (
                        f"{statistics.median(ratios):>8.2f} {min(ratios):>5.2f}-{max(ratios):.2f}"
                    )
                    print(
                        f"{seconds:>4} s {num_frames:>6} {name:>12} {cpu:>7.3f} {ratio}", flush=True
                    )


if __name__ == "__main__":
    main()
