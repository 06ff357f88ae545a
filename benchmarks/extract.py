"""How near extraction comes to what the cores can do.

    python -m benchmarks.extract [--clips 24] [--dtypes float32 bfloat16]

Makes a random ViT-B/32 of full size and clips of 10 s, 640 × 360, and measures apart what decoding
a clip and what the bare tower cost in CPU-seconds, each with all cores busy; then extracts. The
share of the limit is the CPU-seconds that the work needs, over those that extraction spent (its
imports apart) and those in which a core had nothing to do.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import psutil
import torch
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

from benchmarks.decode import make_clip, measure
from dataset.video import FrameTransform, read_frames
from extract_features import TowerBatches
from model.vision_tower import VisionTower

CORES = len(psutil.Process().cpu_affinity())
NUM_FRAMES, BATCH_SIZE = 8, 16


def unit_costs(out: Path, dtype: str) -> tuple[float, float]:
    """CPU-seconds a clip of decoding and resizing, and of the bare tower on one thread."""
    transform = FrameTransform.from_pretrained(out / "tower")
    tower = VisionTower.from_pretrained(out / "tower")
    batches = TowerBatches(tower, transform, dtype, torch.device("cpu"), BATCH_SIZE)
    torch.set_num_threads(1)
    frames = torch.zeros(BATCH_SIZE, transform.image_size, transform.image_size, 3).byte().numpy()

    read = partial(read_frames, out / "clips/000.mp4", NUM_FRAMES, timeout=None)
    decoding = measure(partial(read, transform=transform))
    return decoding, measure(partial(batches._features, frames)) / BATCH_SIZE * NUM_FRAMES


def extract(out: Path, dtype: str) -> tuple[float, float, float]:
    """(seconds, CPU-seconds, seconds of idle cores) without the start of the process."""
    command = f"--images_path {out} --features_path {out / dtype} --vision_path {out / 'tower'} "
    command += f"--dtype {dtype} --device cpu --num_frames {NUM_FRAMES} --batch_size {BATCH_SIZE} "
    command += f"--num_workers {CORES} --videos {out / 'clips'}"
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
            make_clip(out / f"clips/{clip:03d}.mp4", 10, seed=clip)
        for dtype in args.dtypes:
            with ProcessPoolExecutor(CORES, mp_context=get_context("spawn")) as pool:
                costs = pool.map(unit_costs, [out] * CORES, [dtype] * CORES)
                decoding, bare = (sum(each) / CORES for each in zip(*costs, strict=True))
            seconds, cpu, idle = extract(out, dtype)
            limit = args.clips * (decoding + bare)
            print(
                f"{dtype}, {CORES} cores: {cpu / args.clips:.3f} CPU-s a clip, where decoding "
                f"takes {decoding:.3f} and the bare tower {bare:.3f}: "
                f"{100 * limit / (cpu + idle):.0f} % of the limit. By the wall "
                f"{args.clips / seconds:.2f} clips/s, {100 * limit / CORES / seconds:.0f} %",
                flush=True,
            )


if __name__ == "__main__":
    main()
