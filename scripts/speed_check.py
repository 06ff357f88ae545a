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
from benchmarks.train_step import Source, make_batches, make_model, make_samples, time_step
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
class SourceOnDisk(Source):
    """The same features for all videos, read from a file as in training."""

    path: Path

    def read(self, name: str) -> torch.Tensor:
        return torch.from_numpy(np.load(self.path))


def measure_rate(run: Callable[[], object], device: torch.device, seconds: float) -> float:
    """How many runs are done in a second, after one to warm up."""
    on_cpu, clock = device.type == "cpu", time.perf_counter
    if on_cpu:
        clock = time.process_time  # adds up over the cores: a second has as many of them
    run()
    start, wall, count = clock(), time.perf_counter(), 0
    while time.perf_counter() - wall < seconds:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        count += 1
    return count * (torch.get_num_threads() if on_cpu else 1) / max(clock() - start, 1e-9)


def measure_on_all_cores(run: Callable[[], object], seconds: float) -> float:
    """The same of what runs in as many processes as there are cores."""
    rate = measure_rate(run, torch.device("cpu"), seconds)
    return rate / torch.get_num_threads() * (os.cpu_count() or 1)


def measure(flags: SpeedFlags, device: torch.device, folder: Path) -> dict[str, tuple]:
    """Each part's name: videos a second of the whole machine, FLOPs a second or None."""
    clip, seconds = folder / "clip.mp4", flags.seconds
    make_clip(clip, flags.video_seconds)
    decode = partial(read_frames, clip, flags.num_frames, timeout=None)
    parts = {"decode": (measure_on_all_cores(decode, seconds), None)}

    tower = VisionTower(CLIPVisionModel(CLIPVisionConfig(patch_size=32))).to(device)
    pixels = torch.randn(flags.num_frames, 3, 224, 224, device=device)
    rate = measure_rate(partial(tower, pixels), device, seconds)
    parts["tower"] = rate, rate * count_flops(partial(tower, pixels))

    source = SourceOnDisk(flags.num_frames, folder / "features.npy")
    np.save(source.path, Source(flags.num_frames).read("0").numpy())
    samples = make_samples(84, folder)
    load = partial(make_batches, samples, source, 2, tokens=1024, share_prefix=True)
    batches = load()
    videos = sum(len(batch["inputs"]["frames_per_visual"]) for batch in batches)
    parts["loader"] = measure_on_all_cores(load, seconds) * videos, None

    model = make_model(flags.dim, flags.n_layers).to(device)
    optimizers = Optimizers(model, TrainConfig())

    def step() -> None:
        for batch in batches:
            time_step(model, optimizers, batch, 0, flags.dtype, device)

    rate = measure_rate(step, device, seconds)
    parts["step"] = rate * videos, rate * count_flops(step)
    return parts


def count_flops(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def describe(parts: dict[str, tuple], product: float, device: str) -> str:
    """The table, what is slow, and what to do about it."""
    usual, slow = USUAL.get(device, {}), []
    lines = [f"{'':<10}{'videos/s':>10}{'GFLOP/s':>10}{'of a product':>14}"]
    for name, (rate, flops) in parts.items():
        lines.append(f"{name:<10}{rate:>10.1f}")
        if flops:
            lines[-1] += f"{flops / 1e9:>10.0f}{flops / product:>14.0%}"
            if flops / product < usual.get(name, 0):
                slow.append(f"{name} ({flops / product:.0%}, usual is {usual[name]:.0%} or more)")
    lines.append(f"a large matrix product: {product / 1e9:.0f} GFLOP/s")
    for job, names in (
        ("Extracting features", ("decode", "tower")),
        ("Training on features", ("loader", "step")),
        ("Training on videos", ("decode", "tower", "step")),
    ):
        slowest = min(names, key=lambda name: parts[name][0])
        lines.append(f"{job} waits for: {slowest} ({parts[slowest][0]:.1f} videos/s)")
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
        parts = measure(flags, device, Path(folder))
    # FLOPs a second of a large matrix product: what the machine can reach at all.
    size = 1024 if device.type == "cpu" else 8192
    a = torch.randn(size, size, device=device, dtype=getattr(torch, flags.dtype))
    product = measure_rate(lambda: a @ a, device, flags.seconds / 2) * 2 * size**3
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(describe(parts, product, device.type))


if __name__ == "__main__":
    launch(main)
