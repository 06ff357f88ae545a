"""How near extraction comes to what the cores can do.

    python -m benchmarks.extract [--clips 24] [--dtypes float32 bfloat16]

Makes a random ViT-B/32 of full size and clips of 10 s, 640 × 360, and measures apart what decoding
a clip and what the bare tower cost in CPU-seconds, each with all cores busy; then extracts. On a
machine that others use too, clips a second say little: the share of the limit is the CPU-seconds
that the work needs, over those that extraction spent (its imports apart) and those in which a core
had nothing to do. Compares with the simple way: decode every frame, one clip after the other.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import psutil
import torch
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

from benchmarks.decode import by_everything, make_clip
from dataset.video import FrameTransform, read_frames
from extract_features import TowerBatches
from model.vision_tower import VisionTower

CORES = len(psutil.Process().cpu_affinity())
NUM_FRAMES, BATCH_SIZE = 8, 16


def decode_cost(out: Path) -> float:
    """CPU-seconds a clip of decoding and resizing."""
    transform = FrameTransform.from_pretrained(out / "tower")
    for turn in range(9):
        if turn == 1:  # the first warms up
            started = time.process_time()
        path = out / f"clips/{turn % 4:03d}.mp4"
        read_frames(path, NUM_FRAMES, timeout=None, transform=transform)
    return (time.process_time() - started) / 8


def tower_cost(out: Path, dtype: str) -> float:
    """CPU-seconds a clip of the bare tower, one thread, batches as extraction's."""
    tower, transform = parts(out)
    batches = TowerBatches(tower, transform, dtype, torch.device("cpu"), BATCH_SIZE)
    torch.set_num_threads(1)
    frames = torch.zeros(BATCH_SIZE, transform.image_size, transform.image_size, 3).byte().numpy()
    batches._features(frames)
    started = time.process_time()
    for _ in range(4):
        batches._features(frames)
    return (time.process_time() - started) / 4 / BATCH_SIZE * NUM_FRAMES


def simple_cost(out: Path) -> float:
    """CPU-seconds a clip of decoding every frame, picking, resizing, tower."""
    tower, transform = parts(out)
    started = time.process_time()
    for clip in range(4):
        tower(transform(by_everything(str(out / f"clips/{clip:03d}.mp4"), NUM_FRAMES)))
    return (time.process_time() - started) / 4


def parts(out: Path) -> tuple[VisionTower, FrameTransform]:
    tower = VisionTower.from_pretrained(out / "tower")
    return tower, FrameTransform.from_pretrained(out / "tower")


def on_all_cores(function, *arguments) -> float:
    """The mean of what as many processes as cores return, at once."""
    with ProcessPoolExecutor(CORES, mp_context=get_context("spawn")) as pool:
        return sum(pool.map(function, *([each] * CORES for each in arguments))) / CORES


def extract(out: Path, clips: int, dtype: str) -> tuple[float, float, float]:
    """(seconds, CPU-seconds, seconds of idle cores) without the start of the process."""
    command = f"--images_path {out} --features_path {out / dtype} --vision_path {out / 'tower'} "
    command += f"--dtype {dtype} --device cpu --num_frames {NUM_FRAMES} --batch_size {BATCH_SIZE} "
    command += f"--num_workers {CORES} --videos "
    command += " ".join(str(out / f"clips/{clip:03d}.mp4") for clip in range(clips))
    process = subprocess.Popen(
        [sys.executable, "extract_features.py", *command.split()],
        env={**os.environ, "OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": str(CORES)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    process.stdout.readline()  # "… to do": the imports are done
    idle = psutil.cpu_times().idle
    output = process.communicate()[0]
    idle = psutil.cpu_times().idle - idle
    seconds, cpu = re.search(r"frames in ([\d.]+) s .*; ([\d.]+) CPU-seconds", output).groups()
    return float(seconds), float(cpu), idle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--clips", type=int, default=24)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        (out / "clips").mkdir()
        torch.manual_seed(0)
        CLIPVisionModel(CLIPVisionConfig(patch_size=32)).save_pretrained(out / "tower")
        CLIPImageProcessorPil().save_pretrained(out / "tower")
        for clip in range(args.clips):
            path = out / f"clips/{clip:03d}.mp4"
            if clip < 4:
                make_clip(path, 10, seed=clip)
            else:
                shutil.copyfile(out / f"clips/{clip % 4:03d}.mp4", path)
        for dtype in args.dtypes:
            measure(out, dtype, args.clips)


def measure(out: Path, dtype: str, clips: int) -> None:
    decoding, bare = on_all_cores(decode_cost, out), on_all_cores(tower_cost, out, dtype)
    seconds, cpu, idle = extract(out, clips, dtype)
    limit = clips * (decoding + bare)
    print(
        f"{dtype}, {CORES} cores: {cpu / clips:.3f} CPU-s a clip, where decoding takes "
        f"{decoding:.3f} and the bare tower {bare:.3f}: {100 * limit / (cpu + idle):.0f} % of the "
        f"limit. By the wall {clips / seconds:.2f} clips/s, {100 * limit / CORES / seconds:.0f} %",
        flush=True,
    )
    if dtype == "float32":
        simple = simple_cost(out)
        print(f"  the simple way: {simple:.3f} CPU-s a clip, {simple * clips / cpu:.2f} ×")


if __name__ == "__main__":
    main()
