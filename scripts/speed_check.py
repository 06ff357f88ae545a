"""Is my machine's speed normal, and which part holds training up? A minute, nothing to prepare.

    python -m scripts.speed_check                          # 512 x 8, CLIP ViT-B/32, 8 frames
    python -m scripts.speed_check --dim 768 --n_layers 16 --device cuda

Measures each part alone on made-up data of real sizes: decoding, the vision tower, the loader
(features from disk to a batch), the training step. Videos a second compare the parts with each
other. How much of this machine's own matrix product the tower and the step reach compares the
machine with others: that share hardly depends on how fast a machine is. On a CPU the clock counts
processor time, so that neighbours on the machine don't matter.
"""

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModel

from benchmarks.decode import make_clip
from benchmarks.train_step import make_batches, make_model, make_samples, time_step
from cli import Flags, flag, launch, parse_flags
from dataset.video import read_frames
from device import choose_device
from model.vision_tower import VisionTower
from trainer.config import TrainConfig
from trainer.optim import Optimizers

# Share of the matrix product's speed below which something is wrong. Measured on 2 cores of a CPU
# with AVX-512: tower 0.88, step 0.71; on the same machine with six times the work that it has cores
# for, tower 0.40. Of GPUs nothing was measured: their shares are shown without a verdict.
USUAL = {"cpu": {"tower": 0.5, "step": 0.4}}


@dataclass
class SpeedFlags(Flags):
    """Speed check"""

    dim: int = flag(512, "width of the language model", at_least=64)
    n_layers: int = flag(8, "its layers", at_least=1)
    num_frames: int = flag(8, "frames of a video", at_least=1)
    video_seconds: int = flag(10, "length of the made-up videos, 640 x 360", at_least=1)
    dtype: str = flag("float32", "of the training step: float32 or bfloat16")
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, mps")
    seconds: float = flag(8.0, "time for each part", at_least=0.1)


@dataclass
class Part:
    """What one part of the way from a file to a trained step costs."""

    name: str
    videos_per_second: float  # of the whole machine
    flops_per_second: float = 0.0


class CachedSource:
    """Features on disk, as extract_features.py leaves them."""

    kind = "visual_features"

    def __init__(self, folder: str, num_frames: int):
        self.path = Path(folder, "features.npy")
        features = np.random.default_rng(0).standard_normal((num_frames, 50, 768))
        np.save(self.path, features.astype(np.float16))

    def load(self, name: str) -> torch.Tensor:
        return torch.from_numpy(np.load(self.path))


def measure_rate(run: Callable[[], object], device: torch.device, seconds: float) -> float:
    """How many runs are done in a second, after one to warm up."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    # Processor time adds up over the cores that a part uses; a second has as many of them.
    cores = torch.get_num_threads() if device.type == "cpu" else 1
    is_cuda = device.type == "cuda"
    finish = partial(torch.cuda.synchronize, device) if is_cuda else lambda: None
    run(), finish()
    start, wall, count = clock(), time.perf_counter(), 0
    while time.perf_counter() - wall < seconds:
        run(), finish()
        count += 1
    return count * cores / max(clock() - start, 1e-9)


def measure_decoding(flags: SpeedFlags, folder: str) -> Part:
    path = Path(folder, "clip.mp4")
    make_clip(path, flags.video_seconds)
    # One core after the other: decoding runs in as many processes as there are cores.
    decode = partial(read_frames, path, flags.num_frames, timeout=None)
    rate = measure_rate(decode, torch.device("cpu"), flags.seconds)
    return Part("decode", rate / torch.get_num_threads() * (os.cpu_count() or 1))


def measure_tower(flags: SpeedFlags, device: torch.device) -> Part:
    tower = VisionTower(CLIPVisionModel(CLIPVisionConfig(patch_size=32))).to(device)
    pixels = torch.randn(flags.num_frames, 3, 224, 224, device=device)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        tower(pixels)
    rate = measure_rate(partial(tower, pixels), device, flags.seconds)
    return Part("tower", rate, rate * counter.get_total_flops())


def measure_loader_and_step(flags: SpeedFlags, device: torch.device, folder: str) -> list[Part]:
    samples, source = make_samples(84, folder), CachedSource(folder, flags.num_frames)
    load = partial(make_batches, samples, source, 2, tokens=1024, share_prefix=True)
    batches = load()
    videos = sum(len(batch["inputs"]["frames_per_visual"]) for batch in batches)
    rate = measure_rate(load, torch.device("cpu"), flags.seconds) * videos
    loader = Part("loader", rate / torch.get_num_threads() * (os.cpu_count() or 1))
    model = make_model(flags.dim, flags.n_layers).to(device)
    optimizers = Optimizers(model, TrainConfig())

    def step() -> None:
        for batch in batches:
            time_step(model, optimizers, batch, 0, flags.dtype, device)

    with FlopCounterMode(display=False) as counter:
        step()
    rate = measure_rate(step, device, flags.seconds)
    return [loader, Part("step", rate * videos, rate * counter.get_total_flops())]


def describe(parts: list[Part], product: float, device: str) -> str:
    """The table, what is slow, and what to do about it."""
    usual = USUAL.get(device, {})
    lines = [f"{'':<10}{'videos/s':>10}{'GFLOP/s':>10}{'of a product':>14}"]
    slow = []
    for part in parts:
        lines.append(f"{part.name:<10}{part.videos_per_second:>10.1f}")
        if part.flops_per_second:
            share = part.flops_per_second / product
            lines[-1] += f"{part.flops_per_second / 1e9:>10.0f}{share:>14.0%}"
            if share < usual.get(part.name, 0):
                slow.append(f"{part.name} ({share:.0%}, usual is {usual[part.name]:.0%} or more)")
    lines.append(f"a large matrix product: {product / 1e9:.0f} GFLOP/s")
    rate = {part.name: part.videos_per_second for part in parts}
    for job, names in (
        ("Extracting features", ("decode", "tower")),
        ("Training on features", ("loader", "step")),
        ("Training on videos", ("decode", "tower", "step")),
    ):
        slowest = min(names, key=lambda name: rate[name])
        lines.append(f"{job} waits for: {slowest} ({rate[slowest]:.1f} videos/s)")
    if slow:
        lines.append(
            f"NOT NORMAL: {', '.join(slow)}. Close other programs; compare torch's version and "
            "threads (OMP_NUM_THREADS), power limits, and --dtype bfloat16 where the device has it"
        )
    elif usual:
        lines.append("Normal: the tower and the step make use of this machine as they should.")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    flags = parse_flags(SpeedFlags, __doc__, argv)
    device = choose_device(flags.device)
    with tempfile.TemporaryDirectory() as folder:
        parts = [measure_decoding(flags, folder), measure_tower(flags, device)]
        parts += measure_loader_and_step(flags, device, folder)
    # FLOPs a second of a large matrix product: what the machine can reach at all.
    size = 1024 if device.type == "cpu" else 8192
    a = torch.randn(size, size, device=device, dtype=getattr(torch, flags.dtype))
    product = measure_rate(lambda: a @ a, device, flags.seconds / 2) * 2 * size**3
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(describe(parts, product, device.type))


if __name__ == "__main__":
    launch(main)
