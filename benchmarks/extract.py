"""How near extraction comes to what the cores can do, and whether it survives being killed.

    python benchmarks/extract.py                      # 15 CPU-minutes on a CPU with bfloat16
    python benchmarks/extract.py --bfloat16_clips 8   # where it is emulated

Makes a random ViT-B/32 of full size and clips of 10 s, 640 × 360. Extracts with one process and
with two; before and behind, it measures apart what decoding a clip and what the bare tower cost in
CPU-seconds, each with all cores busy: cores / (their sum) is the limit in clips a second. Compares
with the simple way: decode every frame, one clip after the other. At last it kills extractions with
SIGKILL at random and compares the store, byte for byte, with one that nothing disturbed.

On a machine that others use too, clips a second say little. So each row begins with the share of
the limit that is left after their part is taken out: the CPU-seconds that the work needs, over
those that extraction spent (its imports apart) and those in which a core had nothing to do.
"""

import argparse
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
CORES = len(psutil.Process().cpu_affinity())
NUM_FRAMES, BATCH_SIZE = 8, 16
ENVIRONMENT = {"OMP_WAIT_POLICY": "passive", "PYTHONUNBUFFERED": "1"}

# ---------------------------------------------------------------------------------- what is read


def make_tower(folder: Path) -> None:
    import torch
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

    if (folder / "preprocessor_config.json").exists():
        return
    torch.manual_seed(0)
    config = CLIPVisionConfig(patch_size=32)  # the rest is ViT-B/32 by default
    CLIPVisionModel(config).save_pretrained(folder)
    CLIPImageProcessorPil().save_pretrained(folder)


def make_clips(folder: Path, number: int) -> None:
    """Four different clips of 300 frames, copied under as many names as needed."""
    import av
    import numpy as np

    folder.mkdir(parents=True, exist_ok=True)
    for clip in range(number):
        path = folder / f"{clip:03d}.mp4"
        if path.exists():
            continue
        if clip >= 4:
            shutil.copyfile(folder / f"{clip % 4:03d}.mp4", path)
            continue
        rng = np.random.default_rng(clip)
        ground = rng.integers(0, 256, (24, 80, 3), np.uint8).repeat(40, 0).repeat(24, 1)
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=30, options={"preset": "veryfast"})
            stream.width, stream.height, stream.pix_fmt = 640, 360, "yuv420p"
            for i in range(300):
                view = np.ascontiguousarray(ground[i : i + 360, 4 * i : 4 * i + 640])
                frame = av.VideoFrame.from_ndarray(view, format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())


# ------------------------------------------------- parts, each in a process of its own (see `part`)


def decode_part(out: Path, clips: int) -> None:
    """Decode and resize; prints CPU-seconds a clip."""
    from dataset.video import FrameTransform, read_frames

    transform = FrameTransform.from_pretrained(out / "tower")
    paths = sorted((out / "clips").glob("*.mp4"))[:clips]
    for number, path in enumerate([paths[0], *paths]):  # the first one warms up
        if number == 1:
            started = time.process_time()
        transform.resize_frames(read_frames(path, NUM_FRAMES, timeout=None).frames)
    print((time.process_time() - started) / len(paths))


def tower_part(out: Path, dtype: str, calls: int) -> None:
    """The bare tower, one thread, batches as extraction's; prints CPU-seconds a clip."""
    import torch

    from extract_features import convert_matrices
    from model.vision_tower import VisionTower

    torch.set_num_threads(1)
    tower = VisionTower.from_pretrained(out / "tower")
    convert_matrices(tower, dtype)
    pixels = torch.randn(BATCH_SIZE, 3, tower.image_size, tower.image_size)
    with torch.autocast("cpu", getattr(torch, dtype), enabled=dtype != "float32"):
        tower(pixels[:2])
        started = time.process_time()
        for _ in range(calls):
            tower(pixels)
    print((time.process_time() - started) / calls / BATCH_SIZE * NUM_FRAMES)


def simple_part(out: Path, clips: int) -> None:
    """Decode every frame, pick, resize, tower, save, one clip after the other: seconds a clip."""
    import av
    import numpy as np

    from dataset.video import FrameTransform, uniform_indices
    from model.vision_tower import VisionTower

    transform = FrameTransform.from_pretrained(out / "tower")
    tower = VisionTower.from_pretrained(out / "tower")
    started, cpu = time.perf_counter(), time.process_time()
    for path in sorted((out / "clips").glob("*.mp4"))[:clips]:
        with av.open(str(path)) as container:
            frames = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
        frames = frames[uniform_indices(len(frames), NUM_FRAMES)]
        np.save(out / "simple.npy", tower(transform(frames)).numpy())
    print((time.perf_counter() - started) / clips, (time.process_time() - cpu) / clips)


def part(*arguments, copies: int = CORES, threads: int = 1) -> list[float]:
    """Run a part in so many processes at once; the mean of what they print."""
    command = [sys.executable, "-m", "benchmarks.extract", "--part", *map(str, arguments)]
    environment = {**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": str(threads)}
    started = [
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(copies)
    ]
    outputs = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit(f"a part failed: {' '.join(command)}")
    rows = [list(map(float, output.split())) for output in outputs]
    return [sum(column) / copies for column in zip(*rows, strict=True)]


# -------------------------------------------------------------------------------------- extraction


@dataclass
class Run:
    """One extraction from the first clip to the last, without the processes' start."""

    seconds: float
    cpu: float  # CPU-seconds that it spent
    idle: float  # core-seconds in which a core had nothing to do, for this or any other program


def start(out: Path, store: str, clips: int, dtype: str, shard: str, threads: int):
    names = sorted((out / "clips").glob("*.mp4"))[:clips]
    return subprocess.Popen(
        [
            *(sys.executable, "extract_features.py", "--videos", *names),
            *("--images_path", out, "--features_path", out / store, "--shard", shard),
            *("--vision_path", out / "tower", "--dtype", dtype, "--device", "cpu"),
            *("--num_frames", str(NUM_FRAMES), "--batch_size", str(BATCH_SIZE)),
            *("--num_workers", str(threads)),
        ],
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": str(threads)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def until(process: subprocess.Popen, pattern: str) -> re.Match:
    for line in process.stdout:
        if found := re.search(pattern, line):
            return found
    raise SystemExit(f"extraction ended with code {process.wait()} before it said {pattern!r}")


def extract(out: Path, store: str, clips: int, dtype: str, processes: int) -> Run:
    threads = max(1, CORES // processes)
    running = [
        start(out, store, clips, dtype, f"{i}/{processes}", threads) for i in range(processes)
    ]
    for process in running:
        until(process, "to do")
    idle = idle_seconds()
    said = [process.communicate()[0] for process in running]
    idle = idle_seconds() - idle
    if any(process.returncode for process in running):
        raise SystemExit(f"extraction failed: {said}")
    told = re.findall(r"frames in ([\d.]+) s .*; ([\d.]+) CPU-seconds", "\n".join(said))
    seconds, cpu = zip(*(map(float, pair) for pair in told), strict=True)
    return Run(max(seconds), sum(cpu), idle)


def idle_seconds() -> float:
    times = psutil.cpu_times()
    return times.idle + getattr(times, "iowait", 0)


def measure(out: Path, dtype: str, clips: int) -> None:
    print(f"\n{dtype}, {clips} clips, {CORES} cores:")
    before = parts(out, dtype, clips)
    for processes in (1, 2):
        store = f"{dtype}-{processes}"
        shutil.rmtree(out / store, ignore_errors=True)
        run = extract(out, store, clips, dtype, processes)
        # Before and behind it: the machine may have become slower meanwhile.
        after = parts(out, dtype, clips)
        decoding, bare = ((x + y) / 2 for x, y in zip(before, after, strict=True))
        before = after
        limit, needed = CORES / (decoding + bare), clips * (decoding + bare)
        print(
            f"  {processes} process(es): {run.cpu / clips:.3f} CPU-s a clip, where decoding takes "
            f"{decoding:.3f} and the bare tower {bare:.3f}: "
            f"{100 * needed / (run.cpu + run.idle):.0f} % of the limit without others' part (cores "
            f"idle {run.idle:.1f} s). By the wall {clips / run.seconds:.3f} clips/s, "
            f"{100 * clips / run.seconds / limit:.0f} % of {limit:.3f}",
            flush=True,
        )
        if dtype == "float32" and processes == 1:
            wall, cpu = part("simple", out, min(clips, 4), copies=1, threads=CORES)
            print(
                f"    the simple way: {cpu:.3f} CPU-s a clip, {cpu * clips / run.cpu:.2f} times as "
                f"many; {1 / wall:.3f} clips/s, {wall * clips / run.seconds:.2f} times as long",
                flush=True,
            )
    same = contents(out / f"{dtype}-1") == contents(out / f"{dtype}-2")
    print(f"  stores of one process and of two are {'' if same else 'NOT '}byte-identical")


def parts(out: Path, dtype: str, clips: int) -> tuple[float, float]:
    """CPU-seconds a clip of decoding and of the bare tower."""
    (decoding,) = part("decode", out, min(clips, 12))
    (bare,) = part("tower", out, dtype, 4)
    return decoding, bare


# --------------------------------------------------------------------------------------- kills


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if not path.is_dir())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def kill_and_compare(out: Path, dtype: str, clips: int, kills: int) -> bool:
    shutil.rmtree(out / "killed", ignore_errors=True)
    dice, made = random.Random(), []
    for _ in range(kills):
        process = start(out, "killed", clips, dtype, "0/1", CORES)
        until(process, "to do")
        made.append(count(out / "killed"))
        # At random within the time that it takes to make a few clips; whatever it then does.
        few = min(clips, made[-1] + 1 + dice.randrange(max(1, clips // kills)))
        while process.poll() is None and count(out / "killed") < few:
            time.sleep(0.01)
        time.sleep(dice.uniform(0, 1))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    done = start(out, "killed", clips, dtype, "0/1", CORES)
    if done.communicate() and done.returncode:
        raise SystemExit(f"extraction ended with code {done.returncode}")
    same = contents(out / "killed") == contents(out / f"{dtype}-1")
    steps = ", ".join(map(str, [*made[1:], clips]))
    print(
        f"\n{kills} kills, visuals in the store after each and at the end: {steps}; the store is "
        f"{'' if same else 'NOT '}byte-identical to the undisturbed one"
    )
    return same


def count(folder: Path) -> int:
    return len(list(folder.rglob("*.npy")))


@contextmanager
def workplace(out: Path, clips: int) -> Iterator[None]:
    make_tower(out / "tower")
    make_clips(out / "clips", clips)
    yield
    for folder in out.iterdir():
        if folder.name not in ("tower", "clips"):
            shutil.rmtree(folder) if folder.is_dir() else folder.unlink()


def main() -> None:
    if sys.argv[1:2] == ["--part"]:
        name, out, *rest = sys.argv[2:]
        parts = {"decode": decode_part, "tower": tower_part, "simple": simple_part}
        parts[name](Path(out), *(int(x) if x.isdecimal() else x for x in rest))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out/benchmark_extract"))
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--bfloat16_clips", type=int, help="default: as many")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--kills", type=int, default=5)
    args = parser.parse_args()
    out = args.out.resolve()
    with workplace(out, args.clips):
        for dtype in args.dtypes:
            few = args.bfloat16_clips or args.clips
            measure(out, dtype, few if dtype == "bfloat16" else args.clips)
        if args.kills and not kill_and_compare(out, args.dtypes[0], args.clips, args.kills):
            raise SystemExit(1)


if __name__ == "__main__":
    main()
