"""What does a training step cost, and what does it make of the machine?

    python benchmarks/train_step.py             # 512 x 8, 32 frames, float32: 5 CPU-minutes
    python benchmarks/train_step.py --dtype float32 bfloat16
    python benchmarks/train_step.py --sizes     # docs/speed.md: cost against frames and width

The first form trains on made-up conversations about made-up features, with lengths like those of
VideoInstruct-100K, four ways, taking turns in one process:

    shared      as train_sft.py does by default: the questions about a video share its prefix
    single      --no-share_prefix: one conversation a row, rows of like length in a batch
    padded 512  every row padded to 512 tokens, logits at every place, as MiniMind-V trains
    padded 1536 the same at Cinego 2025's --max_seq_len

Data, batches, loss, clipping and optimizer are those of training; data loading isn't timed. The
peak is that of plain matrix products at the step's own shapes and dtype, timed between the steps.
The share of it counts useful arithmetic only: products with real tokens, pairs of tokens that may
see each other, logits where an answer is supervised. Padding, norms, softmax, the summary's filters
and the optimizer count as nothing but time.

Times are CPU-seconds over all threads where the device is a CPU, since neighbours on the machine
stretch the others, and wall time elsewhere; the table has both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, zip_longest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.nn.functional as F

from dataset.conversation import IGNORED
from dataset.samples import Samples, read_samples
from dataset.video_dataset import LengthGroupedBatchSampler, VideoDataset, collate
from model.cinego import Cinego
from model.config import CinegoConfig, LanguageModelConfig
from model.tokenizer import open_tokenizer
from trainer.config import TrainConfig
from trainer.dry_run import peak_memory
from trainer.engine import compute_loss
from trainer.optim import Optimizers

ROOT = Path(__file__).resolve().parents[1]
WORDS = ["red", "blue", "left", "right", "then", "the", "and", "a", "to", "is", "in", "on", "all"]
QUESTION = {"mean": 20, "spread": 6, "least": 8, "most": 40}  # normal
ANSWER = {"mean": 200, "spread": 0.6, "least": 16, "most": 800}  # log-normal; spread of the log
QUESTIONS_PER_VIDEO = 7  # VideoInstruct-100K: 100,010 pairs about some 13,000 videos
PATCHES, WIDTH = 50, 768  # CLIP ViT-B/32
SIZES = ((512, 8), (768, 16))
FRAMES = (4, 8, 16, 32, 64)


class Source:
    """Random features, one set a video, as fp16 like those on disk."""

    kind = "visual_features"

    def __init__(self, num_frames: int):
        self.num_frames = num_frames

    def load(self, name: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(int(name))
        return torch.randn(self.num_frames, PATCHES, WIDTH, generator=generator).half()


def make_samples(number: int, seed: int) -> Samples:
    """Conversations of one question and one answer; each word is one token."""
    rng = np.random.default_rng(seed)

    def words(count: float) -> str:
        return " ".join(rng.choice(WORDS, int(count)))

    lines = []
    for i in range(number):
        question = np.clip(rng.normal(QUESTION["mean"], QUESTION["spread"]), 8, QUESTION["most"])
        centre = np.log(ANSWER["mean"]) - ANSWER["spread"] ** 2 / 2  # of a log-normal's mean
        answer = np.clip(rng.lognormal(centre, ANSWER["spread"]), ANSWER["least"], ANSWER["most"])
        messages = [
            {"role": "user", "content": "<video>\n" + words(question)},
            {"role": "assistant", "content": words(answer)},
        ]
        video = str(i // QUESTIONS_PER_VIDEO)
        lines.append(json.dumps({"id": f"s{i}", "video": video, "conversations": messages}))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "samples.jsonl")
        path.write_text("\n".join(lines))
        return read_samples(path)  # which keeps the file open


@dataclass
class Way:
    """One way of making batches and a loss from the samples, and what its steps took."""

    name: str
    batches: list[dict]
    pad_to: int = 0
    cpu: float = 0.0
    wall: float = 0.0
    samples: int = 0
    supervised: int = 0
    real: int = 0
    padded: int = 0
    useful: float = 0.0  # floating-point operations
    times: list[float] = field(default_factory=list)


def make_way(
    name, samples, tokenizer, source, tokens_per_batch, steps, share=False, pad_to=0, rows=0
):
    dataset = VideoDataset(
        samples, tokenizer, source, lambda frames: PATCHES, pad_to or 1024, share_prefix=share
    )
    sampler = LengthGroupedBatchSampler(
        dataset.lengths, rows or 1, seed=0, tokens_per_batch=0 if rows else tokens_per_batch
    )
    # Of an epoch's batches a few, evenly from the shortest rows to the longest: a fair sample.
    batches = sorted(sampler, key=lambda batch: np.mean([dataset.lengths[row] for row in batch]))
    chosen = [batches[int((i + 0.5) * len(batches) / steps)] for i in range(steps)]
    np.random.default_rng(0).shuffle(chosen)
    return Way(
        name, [collate([dataset[row] for row in batch], pad_id=0) for batch in chosen], pad_to
    )


def padded_loss(
    model: Cinego, batch: dict, length: int, config: TrainConfig, device
) -> torch.Tensor:
    """As the ancestors train: every row padded to `length`, every place's logits made, the loss
    of each taken, and most of it masked away."""
    inputs = {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch["inputs"].items()}
    missing = (0, length - inputs["input_ids"].shape[1])
    labels = F.pad(inputs.pop("labels"), missing, value=IGNORED)
    inputs["input_ids"] = F.pad(inputs["input_ids"], missing)
    inputs["visual_mask"] = F.pad(inputs["visual_mask"], missing)
    dtype = getattr(torch, config.dtype)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        logits = model(**inputs).logits[:, :-1]
        targets = labels[:, 1:].clamp(min=0)
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return (losses * (labels[:, 1:] != IGNORED).flatten()).sum()


def visible_pairs(inputs: dict) -> int:
    """Pairs of tokens of which one may attend to the other, over all rows."""
    segments = inputs.get("segment_ids")
    if segments is None:
        lengths = (inputs["input_ids"] != 0).sum(1)  # the made-up words never take id 0
        return int((lengths * (lengths + 1) // 2).sum())
    pairs = 0
    for row in segments:
        shared = int((row == 0).sum())
        pairs += shared * (shared + 1) // 2
        for own in row[row > 0].bincount()[1:].tolist():
            pairs += own * (own + 1) // 2 + own * shared
    return pairs


def useful_operations(model: Cinego, batch: dict) -> float:
    """Floating-point operations of one forward and backward over what isn't padding."""
    config, inputs = model.config.language_model, batch["inputs"]
    tokens, supervised = batch["real_tokens"], batch["supervised_tokens"]

    def matrices(module) -> int:
        return sum(p.numel() for p in module.parameters() if p.ndim == 2)

    layers = model.language_model.model.layers
    # Nobody reads an unsupervised token after the last layer's attention.
    mlp = matrices(layers[-1].mlp)
    products = tokens * (matrices(layers) - mlp)
    products += supervised * (mlp + config.vocab_size * config.hidden_size)
    # Two products (scores, mixture) of head_dim each, for every head: hidden_size in all.
    products += 2 * visible_pairs(inputs) * config.hidden_size * len(layers)
    visuals = len(inputs["frames_per_visual"])
    # Frozen features take no gradient: the first products have two parts of three.
    summary, first = model.video_summary, model.video_summary.temporal[0].weight.numel() / 3
    products += visuals * (PATCHES - 1) * matrices(summary.spatial) * 2 / 3
    products += visuals * (matrices(summary.temporal) - first)
    products += visuals * PATCHES * (matrices(summary.ffn) + matrices(model.vision_proj))
    return 6.0 * products  # multiply and add, forward, and both gradients


def measure_peak(shapes: list[tuple[int, int, int]], dtype, device) -> dict:
    """Operations a CPU-second and a second, of plain products (m, k) x (k, n)."""
    best = {"cpu": 0.0, "wall": 0.0}
    for m, k, n in shapes:
        a, b = (torch.randn(size, device=device, dtype=dtype) for size in ((m, k), (n, k)))
        clock(lambda a=a, b=b: F.linear(a, b), device)  # the first makes the code
        _, wall, cpu = clock(lambda a=a, b=b: F.linear(a, b), device)
        best["wall"] = max(best["wall"], 2 * m * k * n / wall)
        best["cpu"] = max(best["cpu"], 2 * m * k * n / cpu)
    return best


def clock(work, device) -> tuple:
    """(result, seconds, CPU-seconds of all threads)"""
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    sync()
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    sync()
    return result, time.perf_counter() - wall, max(time.process_time() - cpu, 1e-9)


def one_step(model, optimizers, config, device, way: Way, batch: dict, timed: bool = True) -> None:
    scaler = torch.amp.GradScaler(device.type, enabled=False)

    def step() -> None:
        if way.pad_to:
            loss = padded_loss(model, batch, way.pad_to, config, device)
        else:
            loss = compute_loss(model, batch, config.dtype, device)
        (loss / batch["supervised_tokens"]).backward()
        norm = optimizers.clip_gradients(scaler, config.grad_clip)
        optimizers.step(scaler, norm)
        optimizers.zero_grad()

    _, wall, cpu = clock(step, device)
    if not timed:
        return
    rows = len(batch["inputs"]["input_ids"])
    way.times.append((cpu if device.type == "cpu" else wall) / len(batch["sample_ids"]))
    way.cpu, way.wall = way.cpu + cpu, way.wall + wall
    way.samples += len(batch["sample_ids"])
    way.supervised += batch["supervised_tokens"]
    way.real += batch["real_tokens"]
    way.padded += rows * way.pad_to if way.pad_to else batch["padded_tokens"]
    way.useful += useful_operations(model, batch)


def compare(args, dtype: str) -> list[dict]:
    device = torch.device(args.device)
    model = make_model(args.dim, args.n_layers).to(device).train()
    config = TrainConfig(dtype=dtype)
    optimizers = Optimizers(model, config)
    tokenizer = open_tokenizer("model/text_tokenizer")
    source, samples = Source(args.num_frames), make_samples(args.samples, args.seed)
    make = partial(make_way, samples=samples, tokenizer=tokenizer, source=source)
    make = partial(make, tokens_per_batch=args.tokens_per_batch)
    ways = [make("shared", steps=args.steps, share=True), make("single", steps=args.steps)]
    # These steps cost the same whatever the lengths: half as many, of few rows, are enough.
    few = {"steps": -(-args.steps // 2), "rows": args.padded_rows}
    ways += [make(f"padded {length}", pad_to=length, **few) for length in (512, 1536)]
    ways = [way for way in ways if way.name in args.ways] if args.ways else ways
    trained = {way.name: (model, optimizers) for way in ways}
    if args.compile:
        compiled = make_model(args.dim, args.n_layers).to(device).train()
        compiled.language_model.compile_layers()
        ways.append(Way("compiled", ways[0].batches))
        trained["compiled"] = (compiled, Optimizers(compiled, config))
        for batch in ways[0].batches[:2]:  # code is made in the first steps
            one_step(*trained["compiled"], config, device, ways[-1], batch, timed=False)

    hidden = model.config.language_model.intermediate_size
    vocabulary = model.config.language_model.vocab_size
    m, dim = args.tokens_per_batch, args.dim
    shapes = [(m, dim, hidden), (m, hidden, dim), (m, dim, dim), (512, dim, vocabulary)]
    peaks = defaultdict(list)
    one_step(model, optimizers, config, device, ways[0], ways[0].batches[0], timed=False)
    # Taking turns: what disturbs the machine for a while disturbs all of them.
    for turn in zip_longest(*(way.batches for way in ways)):
        for name, value in measure_peak(shapes, getattr(torch, dtype), device).items():
            peaks[name].append(value)
        for way, batch in zip(ways, turn, strict=True):
            if batch is not None:
                one_step(*trained[way.name], config, device, way, batch)

    clockwise = "cpu" if device.type == "cpu" else "wall"
    peak = {name: statistics.median(values) for name, values in peaks.items()}
    spread = max(peaks[clockwise]) / min(peaks[clockwise])
    print(
        f"\n{dtype}, {args.dim} x {args.n_layers}, {args.num_frames} frames x {PATCHES} x {WIDTH}, "
        f"{torch.get_num_threads()} threads; peak of matrix products: "
        f"{peak['cpu'] / 1e9:.1f} GFLOP a CPU-second, {peak['wall'] / 1e9:.1f} a second "
        f"(median of {len(peaks['cpu'])}, highest/lowest {spread:.2f})"
    )
    rows = []
    for way in ways:
        spent = {"cpu": way.cpu, "wall": way.wall}[clockwise]
        rows.append(
            {
                "way": way.name,
                "steps": len(way.times),
                "samples": way.samples,
                "wall_seconds": way.wall,
                "cpu_seconds": way.cpu,
                "samples_per_second": way.samples / spent,
                "supervised_per_second": way.supervised / spent,
                "padding": 1 - way.real / way.padded,
                "share_of_peak": way.useful / spent / peak[clockwise],
                "dtype": dtype,
            }
        )
    table(rows, clockwise)
    return rows


def table(rows: list[dict], clockwise: str) -> None:
    unit = "CPU-s" if clockwise == "cpu" else "s"
    print(
        f"{'':<12}{'samples':>8}{'s':>8}{'CPU-s':>8}{'samples/' + unit:>16}"
        f"{'supervised/' + unit:>18}{'padding':>9}{'of peak':>9}"
    )
    for row in rows:
        print(
            f"{row['way']:<12}{row['samples']:>8}{row['wall_seconds']:>8.1f}"
            f"{row['cpu_seconds']:>8.1f}{row['samples_per_second']:>16.3f}"
            f"{row['supervised_per_second']:>18.0f}{row['padding']:>9.1%}"
            f"{row['share_of_peak']:>9.1%}"
        )
    by_name = {row["way"]: row for row in rows}
    for ours in ("shared", "single"):
        for other in ("padded 512", "padded 1536"):
            if ours in by_name and other in by_name:
                samples, supervised = (
                    by_name[ours][unit] / by_name[other][unit]
                    for unit in ("samples_per_second", "supervised_per_second")
                )
                print(
                    f"{ours}: {samples:.2f} x the samples of {other}, "
                    f"{supervised:.2f} x its supervised tokens"
                )


def make_model(dim: int, n_layers: int) -> Cinego:
    torch.manual_seed(0)
    language_model = LanguageModelConfig(hidden_size=dim, num_hidden_layers=n_layers)
    return Cinego(CinegoConfig(language_model, vision_hidden_size=WIDTH, tokens_per_frame=PATCHES))


def one_size(args) -> None:
    """Lines of the cost table for one size of model, from few frames to many: the peak memory of
    the process is then that of the frames so far."""
    device = torch.device(args.device)
    model = make_model(args.dim, args.n_layers).to(device).train()
    config = TrainConfig(dtype=args.dtype[0])
    optimizers = Optimizers(model, config)
    tokenizer = open_tokenizer("model/text_tokenizer")
    samples = make_samples(args.samples, args.seed)
    for num_frames in FRAMES:
        source = Source(num_frames)
        way = make_way(
            "shared", samples, tokenizer, source, args.tokens_per_batch, args.steps, True
        )
        if num_frames == FRAMES[0]:  # the first step makes code and takes memory
            one_step(model, optimizers, config, device, way, way.batches[0], timed=False)
        for batch in way.batches:
            one_step(model, optimizers, config, device, way, batch)
        spent = way.cpu if device.type == "cpu" else way.wall
        row = {"dim": args.dim, "n_layers": args.n_layers, "num_frames": num_frames}
        row |= {"samples": way.samples, "seconds_per_step": spent / len(way.times)}
        row |= {"seconds_per_sample": spent / way.samples}
        row |= {"peak_memory_mb": round(peak_memory(device) / 2**20)}
        print(json.dumps(row), flush=True)


def sizes(args) -> list[dict]:
    unit = "s" if args.device.startswith("cuda") else "CPU-s"
    print(f"| size | frames | {unit} a step | {unit} a sample | peak memory, MB |")
    print("|---|--:|--:|--:|--:|", flush=True)
    rows = []
    for dim, n_layers in SIZES:
        flags = {"dim": dim, "n_layers": n_layers, "dtype": args.dtype[0], "steps": args.steps}
        flags |= {"tokens_per_batch": args.tokens_per_batch, "threads": args.threads}
        flags |= {"device": args.device, "samples": args.samples, "seed": args.seed}
        given = chain.from_iterable((f"--{name}", str(value)) for name, value in flags.items())
        command = [sys.executable, __file__, "--one_size", *given]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                rows.append(row := json.loads(line))
                print(
                    f"| {dim} x {n_layers} | {row['num_frames']} | {row['seconds_per_step']:.2f} | "
                    f"{row['seconds_per_sample']:.3f} | {row['peak_memory_mb']:,} |",
                    flush=True,
                )
        if process.returncode:
            raise SystemExit(process.returncode)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--n_layers", type=int, default=8)
    parser.add_argument("--num_frames", type=int, default=32)
    parser.add_argument("--samples", type=int, default=2016, help="conversations, seven a video")
    parser.add_argument("--steps", type=int, default=6, help="of the epoch's batches so many")
    parser.add_argument("--tokens_per_batch", type=int, default=4096)
    parser.add_argument("--padded_rows", type=int, default=2, help="rows of a padded step")
    parser.add_argument("--dtype", nargs="+", default=["float32"])
    parser.add_argument("--ways", nargs="+", help="some of them only, such as shared single")
    parser.add_argument("--compile", action="store_true", help="the first way with --compile too")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sizes", action="store_true", help="cost against frames and width")
    parser.add_argument("--one_size", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help="write the figures here, as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.one_size:
        return one_size(args)
    if args.sizes:
        rows = sizes(args)
    else:
        rows = [row for dtype in args.dtype for row in compare(args, dtype)]
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
