"""Breaks small files in many ways and decodes them: frames or a VideoError, and nothing else.

    python -m tests.stress.fuzz_decode [--files 2000] [--seed 0] [--on_damage keep] [--only 17]

Each mutated file follows from the seed and its number alone: --only makes one that does harm again.
Ends with status 1 if anything but frames or a VideoError came out.
"""

import argparse
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from dataset.video import VideoError, read_frames
from tests.clips import make_numbered_clip

VIDEOS = {
    **dict.fromkeys(("h264.mp4", "h264.mkv", "h264.ts", "h264.flv"), "libx264"),
    "hevc.mp4": "libx265",
    "vp8.webm": "libvpx",
    "vp9.webm": "libvpx-vp9",
    "mpeg4.avi": "mpeg4",
    "mpeg2.mpg": "mpeg2video",
    "mjpeg.mov": "mjpeg",
    "ffv1.mkv": "ffv1",
    "wmv2.wmv": "wmv2",
    "flv1.flv": "flv",
}
OPTIONS = {"libx265": {"x265-params": "log-level=none"}, "mjpeg": {"pix_fmt": "yuvj420p"}}
PICTURES = ("jpg", "png", "webp", "bmp", "tif", "avif", "gif", "animated.webp", "animated.png")
EXTREMES = (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x80\0\0\0", b"\0\0\0\1")


def make_seeds(folder: Path) -> list[Path]:
    """One small valid file of each kind."""
    for name, codec in VIDEOS.items():
        options = {"g": "5", "size": (64, 96), "noise": 60, **OPTIONS.get(codec, {})}
        make_numbered_clip(folder / name, 12, codec, **options)
    noise = np.random.default_rng(0).integers(0, 255, (12, 64, 96, 3), np.uint8)
    first, *others = map(Image.fromarray, noise)
    for suffix in PICTURES:
        is_animated = "animated" in suffix or suffix == "gif"
        more = {"save_all": True, "append_images": others} if is_animated else {}
        first.save(folder / f"picture.{suffix}", **more)
    return sorted(folder.iterdir())


def mutate(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """One to four mutations of the kinds that disks, networks and attackers make."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        # Half of them in the head, where a few bytes decide about everything that follows.
        end = len(data) if rng.random() < 0.5 else min(len(data), 1024)
        at, size = rng.randrange(max(1, end)), rng.choice((1, 4, 16, 200, 2000))
        bits = bytes(byte ^ 1 << rng.randrange(8) for byte in data[at : at + size])
        replace, removed = rng.choice(
            [
                (bits, len(bits)),
                (rng.randbytes(size), size),
                (bytes(size), size),
                (rng.choice(EXTREMES), 4),
                (b"", size),  # lost
                (data[at : at + size], 0),  # twice
                (b"", len(data)),  # cut
                (other[at : at + size], size),
            ]
        )
        data[at : at + removed] = replace
    return bytes(data)


def fuzz(
    files: range, seed: int, folder: Path, on_damage: str = "error"
) -> tuple[Counter, list[str]]:
    """Decodes the mutated files of these numbers: how often there were frames and each reason of a
    VideoError, and the files that gave anything else."""
    seeds, outcomes, harmful = make_seeds(folder), Counter(), []
    contents = [path.read_bytes() for path in seeds]
    for number in files:
        rng = random.Random(f"{seed}/{number}")
        path, data = rng.choice(list(zip(seeds, contents, strict=True)))
        target = folder / f"mutated{path.suffix}"
        target.write_bytes(mutate(data, rng.choice(contents), rng))
        try:
            clip = read_frames(target, 4, timeout=20, on_damage=on_damage)
            assert clip.frames.dtype == np.uint8 and 1 <= len(clip.frames) <= 4
            outcomes["frames, damaged" if clip.damaged else "frames"] += 1
        except VideoError as error:
            outcomes[error.reason] += 1
        except Exception as error:
            harmful.append(f"file {number} ({path.name}): {error!r}")
    return outcomes, harmful


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--on_damage", default="error")
    parser.add_argument("--only", type=int, help="decode this one")
    args = parser.parse_args()
    files = range(args.files) if args.only is None else range(args.only, args.only + 1)
    with tempfile.TemporaryDirectory() as folder:
        outcomes, harmful = fuzz(files, args.seed, Path(folder), args.on_damage)
    print(f"{len(files)} files of seed {args.seed}: {dict(outcomes.most_common())}")
    print("\n".join(harmful) or "nothing but frames and VideoErrors")
    return 1 if harmful else 0


if __name__ == "__main__":
    sys.exit(main())
