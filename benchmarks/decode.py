"""What reading 8 or 32 frames of a clip costs, against decord and against decoding everything.

    python benchmarks/decode.py [--rounds 5] [--seconds 10 60 600]

Renders one h264 clip a length (640 × 360, 30 frames a second, noise that moves: about what a phone
records) and reads it with each reader in turn, so that what else the machine does hits all alike.
Each reader has one thread and a process of its own, and reads again until half a CPU-second is
spent. MB is the peak of its memory above what it took after its imports (torch among them); for
`read_frames`, the whole of its worker is added. The ratio to decord is that of the CPU-seconds, the
median over rounds; beside it stand the lowest and the highest.

Decoding everything keeps all frames, as simple loaders do; above a minute (12 GB at ten) it lets
them go, and is done once.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
READERS = ("read_frames", "in_process", "decord", "everything")
HEIGHT, WIDTH, RATE = 360, 640, 30
LEAST_CPU = 0.5  # seconds that a measurement takes
KEPT_SECONDS = 60  # of clips whose frames are all kept by who decodes everything


def make_clip(path: Path, seconds: int) -> None:
    """A keyframe every 250 frames and B-frames between, as x264 does it by itself. A long clip is a
    minute of pictures over and over: encoding would take longer than all that is measured."""
    random = np.random.default_rng(0)
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


def serve(reader: str) -> None:
    """Reads what its input names: a line with file and number of frames, a line back with cost."""
    read = READ[reader]()
    before = peak_memory()
    for line in sys.stdin:
        path, num_frames = json.loads(line)
        reads, cpu = 0, 0.0
        start, cpu_start = time.perf_counter(), cpu_seconds()
        while cpu < LEAST_CPU:  # CPU time of a worker is told in hundredths
            frames = read(path, num_frames)
            reads, cpu = reads + 1, cpu_seconds() - cpu_start
        cost = (time.perf_counter() - start) / reads, cpu / reads
        print(json.dumps([*cost, peak_memory() - before, list(frames.shape)]), flush=True)


def our_reader(**how):
    from dataset.video import read_frames

    return lambda path, num_frames: read_frames(path, num_frames, **how).frames


def decord_reader():
    import decord

    from dataset.clip import uniform_indices

    def read(path, num_frames):
        reader = decord.VideoReader(path, num_threads=1)
        return reader.get_batch(uniform_indices(len(reader), num_frames)).asnumpy()

    return read


def reader_of_everything():
    from dataset.clip import uniform_indices

    def read(path, num_frames):
        with av.open(path) as container:
            container.streams.video[0].codec_context.thread_count = 1
            stream = container.streams.video[0]
            chosen = uniform_indices(stream.frames, num_frames).tolist()
            frames = (frame.to_ndarray(format="rgb24") for frame in container.decode(stream))
            if stream.frames <= KEPT_SECONDS * RATE:
                return np.stack(list(frames))[chosen]
            return np.stack([frame for number, frame in enumerate(frames) if number in chosen])

    return read


READ = {
    "read_frames": our_reader,
    "in_process": lambda: our_reader(timeout=None),
    "decord": decord_reader,
    "everything": reader_of_everything,
}


def cpu_seconds() -> float:
    """Of this process and its workers, which are alive and so not yet in getrusage's children."""
    import psutil

    me = psutil.Process()
    return sum(sum(p.cpu_times()[:2]) for p in (me, *me.children()))


def peak_memory() -> int:
    """MB at most, of this process and its workers."""
    import psutil

    children = [Path(f"/proc/{child.pid}/status") for child in psutil.Process().children()]
    peaks = [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]
    for status in children:
        (line,) = (x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        peaks.append(int(line.split()[1]))
    return sum(peaks) // 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=int, nargs="+", default=[10, 60, 600])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--serve", choices=READERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args.serve)
    print("  clip frames       reader       s   CPU-s  /decord  low-high      MB")
    with tempfile.TemporaryDirectory() as folder:
        for seconds in args.seconds:
            clip = Path(folder) / f"{seconds}.mp4"
            make_clip(clip, seconds)
            for num_frames in (8, 32):
                compare(clip, seconds, num_frames, args.rounds)


def compare(clip: Path, seconds: int, num_frames: int, rounds: int) -> None:
    processes = {
        name: subprocess.Popen(
            [sys.executable, __file__, "--serve", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ
            | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        for name in READERS
    }
    costs: dict[str, list] = {name: [] for name in READERS}
    for turn in range(rounds + 1):
        for name in READERS if turn % 2 else READERS[::-1]:
            if name == "everything" and seconds > KEPT_SECONDS and turn != 1:
                continue
            process = processes[name]
            print(json.dumps([str(clip), num_frames]), file=process.stdin, flush=True)
            cost = json.loads(process.stdout.readline())
            assert cost[3] == [num_frames, HEIGHT, WIDTH, 3], (name, cost)
            if turn:  # the first round starts workers and fills caches
                costs[name].append(cost)
    for process in processes.values():
        process.stdin.close()
        process.wait()
    for name, rows in costs.items():
        wall, cpu = (statistics.median(row[i] for row in rows) for i in (0, 1))
        # Round by round: the two sides of a ratio saw the same machine. Decoding everything of a
        # long clip has one round only, the first: no strict zip.
        ratios = [ours[1] / other[1] for ours, other in zip(rows, costs["decord"], strict=False)]
        print(
            f"{seconds:>4} s {num_frames:>6} {name:>12} {wall:>7.3f} {cpu:>7.3f} "
            f"{statistics.median(ratios):>8.2f} {min(ratios):>5.2f}-{max(ratios):<5.2f} "
            f"{rows[-1][2]:>6}",
            flush=True,
        )


if __name__ == "__main__":
    main()
