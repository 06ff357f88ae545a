"""What a CUDA device makes of this code: is it right, what waits, how busy is it?

    python -m benchmarks.gpu                       # all parts, about ten minutes
    python -m benchmarks.gpu --parts correct syncs # the two to run first

    correct   loss and gradients of a batch against float64 on the CPU, in every precision
    syncs     where the process waits for the device in a step, line by line; kernels a step
    mfu       tokens a second, MFU and memory over sizes of model and batch
    extract   frames a second of a CLIP ViT-B/32, without decoding
    generate  tokens a second of one stream and of many, with and without a CUDA graph

Data and models are made up. Without a CUDA device it says so and ends.
"""

import statistics
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.train_step import (
    PATCHES,
    WIDTH,
    Source,
    make_batches,
    make_model,
    make_samples,
    time_step,
)
from cli import Flags, flag, launch, parse_flags
from dataset.transforms import FrameTransform
from device import choose_device, peak_flops
from extract_features import TowerBatches
from model.cinego import Cinego
from model.config import CinegoConfig, LanguageModelConfig
from model.generate import DecodingBatch
from model.inference import prepare
from model.minimind import MiniMind
from model.vision_tower import VisionTower
from trainer.config import TrainConfig
from trainer.engine import SummedLoss, compute_loss
from trainer.optim import Optimizers

CPU = torch.device("cpu")
# name: how the weights are kept, autocast's type, and how far gradients may be off, relatively
PRECISIONS = {
    "float64": (torch.float64, "float32", 1e-9),
    "float32": (torch.float32, "float32", 1e-4),
    "bfloat16": (torch.float32, "bfloat16", 3e-2),
    "float16": (torch.float32, "float16", 5e-3),
}


@dataclass
class GpuFlags(Flags):
    """Benchmark"""

    parts: list[str] = flag(["correct", "syncs", "mfu", "extract", "generate"], "what to measure")
    tokens: list[int] = flag([4096, 16384, 65536], "tokens a batch, for mfu")

    def problems(self) -> list[str]:
        unknown = [part for part in self.parts if part not in PARTS]
        return [f"--parts {' '.join(unknown)}: choose of {', '.join(PARTS)}"] if unknown else []


def seconds(work: Callable[[], object], times: int = 1) -> float:
    """Wall time of one call, all of its kernels done."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(times):
        work()
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / times


def batches_of(tokens: int, number: int, share: bool) -> list[dict]:
    """Pinned, as a DataLoader hands them over."""
    with tempfile.TemporaryDirectory() as folder:
        samples = make_samples(max(112, tokens * number // 64), folder)
    how = {"tokens": tokens, "max_length": 1024, "share_prefix": share}
    batches = make_batches(samples, Source(8), number, **how)
    for batch in batches:
        inputs = batch["inputs"]
        inputs |= {k: v.pin_memory() for k, v in inputs.items() if hasattr(v, "to")}
    return batches


def model_flops(model: Cinego, batch: dict) -> float:
    """Of the language model's forward and backward for this batch, causal pairs only: 6 for each
    weight and token, and no more than what has to be computed (Kaplan et al., arXiv 2001.08361)."""
    config, packed = model.config.language_model, batch["inputs"]["packed"]
    weights = sum(p.numel() for p in model.language_model.model.layers.parameters())
    head = model.language_model.model.embed_tokens.weight.numel()
    lengths = zip(packed.query_lengths, packed.key_lengths, strict=True)
    pairs = sum(q * (k - q / 2) for q, k in lengths) * config.num_hidden_layers
    tokens = weights * len(packed.tokens_T) + head * len(packed.targets_N)
    return 6 * tokens + 12 * pairs * config.hidden_size


def training_step(model: Cinego, device: torch.device) -> Callable[[dict], float]:
    """A step in bfloat16; its seconds."""
    how = {"pad_to": 0, "dtype": "bfloat16", "device": device}
    return partial(time_step, model, Optimizers(model, TrainConfig()), **how)


def correct(device: torch.device, flags: GpuFlags) -> None:
    kinds = {"dct": {}, "dct, qk_norm": {"qk_norm": True}, "dct, experts": {"num_experts": 4}}
    for name, settings in {**kinds, "gpt4video": {}, "mean": {}}.items():
        torch.manual_seed(0)
        shape = LanguageModelConfig(hidden_size=256, num_hidden_layers=3, **settings)
        config = CinegoConfig(shape, name.split(",")[0], WIDTH, PATCHES)
        state = Cinego(config).state_dict()

        def gradients(where, batch, weights, autocast, config=config, state=state):
            model = Cinego(config).eval()
            model.load_state_dict(state)
            loss = compute_loss(SummedLoss(model.to(where, weights)), batch, autocast, where)
            loss.backward()
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            return loss.item(), torch.cat([grad.double().cpu().flatten() for grad in grads])

        for share in (True, False):
            (batch,) = batches_of(2048, 1, share)
            exact_loss, exact = gradients(CPU, batch, torch.float64, "float32")
            for precision, (weights, autocast, limit) in PRECISIONS.items():
                loss, found = gradients(device, batch, weights, autocast)
                error = ((found - exact).norm() / exact.norm()).item()
                verdict = "ok" if error < limit else f"WRONG: more than {limit:g}"
                case = f"{name:14} {'shared' if share else 'single':7} {precision:9}"
                figures = f"loss {loss / exact_loss - 1:+.1e}, gradient {error:.1e}"
                print(f"{case} {figures}  {verdict}", flush=True)


def syncs(device: torch.device, flags: GpuFlags) -> None:
    model = make_model(512, 8).to(device).train()
    step, kinds = training_step(model, device), torch.profiler.ProfilerActivity
    for share in (True, False):
        (batch,) = batches_of(16384, 1, share)
        step(batch), step(batch)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            step(batch)
            torch.cuda.set_sync_debug_mode("default")
        places = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in caught)
        with torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA]) as profile:
            step(batch)
        cuda = torch.autograd.DeviceType.CUDA
        rows = [row for row in profile.key_averages() if row.device_type == cuda]
        rows.sort(key=lambda row: -row.self_device_time_total)
        busy = sum(row.self_device_time_total for row in rows) / 1e3
        print(
            f"{'shared' if share else 'single'} rows: {sum(places.values())} waits {dict(places)}; "
            f"{sum(row.count for row in rows)} kernels, {busy:.1f} ms of them in a step of "
            f"{statistics.median(step(batch) for _ in range(5)) * 1e3:.1f} ms"
        )
        for row in rows[:12]:  # the attention path taken is among them: flash, fmha or cudnn
            print(f"  {row.count:5} x {row.self_device_time_total / 1e3:8.2f} ms  {row.key[:84]}")


def mfu(device: torch.device, flags: GpuFlags) -> None:
    peak = peak_flops(device, "bfloat16")
    for size in ((512, 8), (768, 16)):
        model = make_model(*size).to(device).train()
        step = training_step(model, device)
        for tokens in flags.tokens:
            batches = batches_of(tokens, 6, True)
            torch.cuda.reset_peak_memory_stats()
            first = list(map(step, batches))  # each of a new shape
            again = [statistics.median(step(batch) for _ in range(3)) for batch in batches]
            work = sum(model_flops(model, batch) for batch in batches)
            real = sum(batch["real_tokens"] for batch in batches)
            print(
                f"{size[0]} x {size[1]}, {tokens:6} tokens: {real / sum(again):10,.0f} tokens/s, "
                f"MFU {work / sum(again) / peak:.1%} of {peak / 1e12:.0f} TFLOP/s, new shapes "
                f"{statistics.median(first) / statistics.median(again):.2f} x the time, "
                f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB",
                flush=True,
            )


def extract(device: torch.device, flags: GpuFlags) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    transform, rng = FrameTransform(224, (0.5,) * 3, (0.5,) * 3), np.random.default_rng(0)
    tower = VisionTower(CLIPVisionModel(CLIPVisionConfig(patch_size=32)))
    clips = [rng.integers(0, 256, (8, 224, 224, 3), np.uint8) for _ in range(64)]
    for size in (128, 512):
        with TowerBatches(tower, transform, "bfloat16", device, size) as batches:
            for number in (64, 512):  # the first warms up
                decoded = ((str(i), ({}, clips[i % 60])) for i in range(number))
                started = time.perf_counter()
                found = {name: features for name, _, features in batches.run(decoded)}
                taken = time.perf_counter() - started
        same = all(torch.equal(found[str(i)], found[str(i % 60)]) for i in range(number))
        print(f"{size:4} frames a call: {number * 8 / taken:,.0f} frames/s; a frame's features are")
        print(f"     the same bytes wherever it stands in a batch: {same}")


def generate(device: torch.device, flags: GpuFlags) -> None:
    for dtype in ("float32", "bfloat16"):
        model = prepare(MiniMind(LanguageModelConfig()).to(device), dtype)
        for rows in (1, 16, 128):
            ids, answers = torch.randint(100, 6400, (rows, 80), device=device), []
            for graph in (False, True):
                batch = DecodingBatch(model, static=graph)
                answers.append([batch.prefill({"input_ids": ids}).argmax(-1).tolist()])

                def step(batch=batch, answer=answers[-1]):
                    answer.append(batch.decode(answer[-1]).argmax(-1).tolist())

                seconds(step, 10)  # warms up, or makes the graph
                each = seconds(step, 100)
                case = f"{dtype} {rows:4} rows {'one graph' if graph else 'kernels  '}"
                print(f"{case} {each * 1e3:.2f} ms a step, {rows / each:,.0f} tokens/s")
            same = sum(
                a == b for a, b in zip(*(zip(*a, strict=True) for a in answers), strict=True)
            )
            # In bfloat16 a tie may end otherwise: attention takes another kernel under a mask.
            print(f"     the same answers with and without a graph: {same} of {rows}", flush=True)


PARTS = {part.__name__: part for part in (correct, syncs, mfu, extract, generate)}


def main() -> None:
    flags = parse_flags(GpuFlags, __doc__)
    if not torch.cuda.is_available():
        print(
            f"no CUDA device: torch {torch.__version__} sees none, so there is nothing to measure"
        )
        return
    device = choose_device("cuda")
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}, "
        f"cuDNN {torch.backends.cudnn.version()}"
    )
    for part in flags.parts:
        print(f"\n{part}", flush=True)
        PARTS[part](device, flags)


if __name__ == "__main__":
    launch(main)
