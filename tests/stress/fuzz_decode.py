"""Breaks small files in many ways and reads them: frames or a VideoError, and nothing else.

    python tests/stress/fuzz_decode.py [--files 2000] [--seed 0] [--timeout 20]

Files of many containers, codecs and picture formats are made here, each mutated file follows from
the seed alone, and one that does harm can be made again by its number: --only NUMBER --keep FILE.
Ends with status 1 if anything but frames or a VideoError came out.
"""

import argparse
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import av
import numpy as np
import psutil
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dataset.video import VideoError, read_frames  # noqa: E402

VIDEOS = {
    "h264.mp4": "libx264",
    "h264.mkv": "libx264",
    "h264.ts": "libx264",
    "h264.flv": "libx264",
    "hevc.mp4": "libx265",
    "vp8.webm": "libvpx",
    "vp9.webm": "libvpx-vp9",
    "mpeg4.avi": "mpeg4",
    "mpeg2.mpg": "mpeg2video",
    "mjpeg.mov": "mjpeg",
    "ffv1.mkv": "ffv1",
    "wmv2.wmv": "wmv2",
    "flv1.flv": "flv",
    "clip.gif": "gif",
}
PICTURES = ("jpg", "png", "webp", "bmp", "tif", "avif", "animated.webp", "animated.png")
EXTREMES = (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x80\0\0\0", b"\0\0\0\1")


def make_seeds(folder: Path) -> list[Path]:
    """One small valid file of each kind: a moving bar on noise, 12 frames of 96 × 64."""
    noise = np.random.default_rng(0).integers(0, 60, (64, 96, 3), np.uint8)
    frames = [noise.copy() for _ in range(12)]
    for number, frame in enumerate(frames):
        frame[:, number * 8 : number * 8 + 8] += 150
    for name, codec in VIDEOS.items():
        with av.open(str(folder / name), "w") as container:
            quiet = {"x265-params": "log-level=none"} if codec == "libx265" else {}
            stream = container.add_stream(codec, rate=10, options={"g": "5"} | quiet)
            stream.width, stream.height = 96, 64
            pix_fmt = {"mjpeg": "yuvj420p", "gif": "rgb8"}.get(codec, "yuv420p")
            stream.pix_fmt, stream.codec_context.thread_count = pix_fmt, 1
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
    first, *others = map(Image.fromarray, frames)
    for suffix in PICTURES:
        animation = {"save_all": True, "append_images": others} if "animated" in suffix else {}
        first.save(folder / f"picture.{suffix}", **animation)
    return sorted(folder.iterdir())


def mutate(data: bytes, other: bytes, dice: random.Random) -> bytes:
    """One to four wounds of the kinds that disks, networks and attackers make."""
    data = bytearray(data)
    for _ in range(dice.choice((1, 1, 2, 4))):
        # Half of them in the head, where a few bytes decide about everything that follows.
        end = len(data) if dice.random() < 0.5 else min(len(data), 1024)
        at, size = dice.randrange(max(1, end)), dice.choice((1, 4, 16, 200, 2000))
        kind = dice.randrange(8)
        if kind == 0:  # single bits
            for _ in range(dice.choice((1, 8, 64))):
                at = dice.randrange(max(1, end))
                data[at : at + 1] = bytes(b ^ 1 << dice.randrange(8) for b in data[at : at + 1])
        elif kind == 1:
            data[at : at + size] = dice.randbytes(size)
        elif kind == 2:
            data[at : at + size] = bytes(size)
        elif kind == 3:
            data[at : at + 4] = dice.choice(EXTREMES)
        elif kind == 4:
            del data[at : at + size]
        elif kind == 5:
            data[at:at] = data[at : at + size]
        elif kind == 6:
            del data[at:]
        else:
            data[at : at + size] = other[at : at + size]
    return bytes(data)


@dataclass
class Report:
    outcomes: Counter = field(default_factory=Counter)  # "frames", a reason, or an exception's name
    harmful: list[str] = field(default_factory=list)
    slowest: float = 0.0
    peak_mb: int = 0  # of the workers


def fuzz(
    files: range, seed: int, timeout: float, folder: Path, keep=None, on_damage="error"
) -> Report:
    """Reads the mutated files of these numbers."""
    seeds, report = make_seeds(folder), Report()
    contents = [path.read_bytes() for path in seeds]
    for number in files:
        dice = random.Random(f"{seed}/{number}")
        path, data = dice.choice(list(zip(seeds, contents, strict=True)))
        mutated = mutate(data, dice.choice(contents), dice)
        target = keep or folder / f"mutated{path.suffix}"
        target.write_bytes(mutated)
        start = time.monotonic()
        try:
            outcome = read_frames(target, 4, timeout=timeout, on_damage=on_damage)
            assert outcome.frames.dtype == np.uint8 and 1 <= len(outcome.frames) <= 4
            report.outcomes["frames"] += 1
        except VideoError as error:
            report.outcomes[error.reason] += 1
            if error.reason in ("crashed", "timeout"):
                print(f"  file {number} ({path.name}): {error.reason}: {error.detail}")
        except Exception as error:
            report.outcomes[type(error).__name__] += 1
            report.harmful.append(f"file {number} ({path.name}): {error!r}")
        report.slowest = max(report.slowest, time.monotonic() - start)
        for child in psutil.Process().children():
            report.peak_mb = max(report.peak_mb, child.memory_info().rss >> 20)
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=20, help="seconds a file")
    parser.add_argument("--only", type=int, help="read this one")
    parser.add_argument("--keep", type=Path, help="and leave it here")
    args = parser.parse_args()
    files = range(args.files) if args.only is None else range(args.only, args.only + 1)
    with TemporaryDirectory() as folder:
        report = fuzz(files, args.seed, args.timeout, Path(folder), args.keep)
    counts = ", ".join(f"{name} {count}" for name, count in report.outcomes.most_common())
    print(f"{len(files)} files of seed {args.seed}: {counts}")
    print(f"slowest {report.slowest:.1f} s; a worker took {report.peak_mb} MB at most")
    print("\n".join(report.harmful) or "nothing but frames and VideoErrors")
    return 1 if report.harmful else 0


if __name__ == "__main__":
    sys.exit(main())
