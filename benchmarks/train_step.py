"""What does a training step cost, and what do shared prefixes and ragged batches save?

    python -m benchmarks.train_step                     # 512 x 8, 32 frames: 5 CPU-minutes
    python -m benchmarks.train_step --dtype float32 bfloat16 --threads 1

It trains on made-up conversations about made-up features, with lengths like those of
VideoInstruct-100K, four ways, taking turns in one process:

    shared       as train_sft.py does by default: the questions about a video share its prefix
    single       --no-share_prefix: one conversation a row, rows of like length in a batch
    padded 512   every row padded to 512 tokens, logits at every place, as MiniMind-V trains
    padded 1536  the same at Cinego 2025's --max_seq_len

Data, batches, loss, clipping and optimizer are those of training; data loading isn't timed. Times
are CPU-seconds over all threads where the device is a CPU, since neighbours on the machine stretch
the others, and wall time elsewhere.
"""

import argparse
import itertools
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from dataset.conversation import IGNORED
from dataset.sampler import LengthGroupedBatchSampler
from dataset.samples import Samples, read_samples
from dataset.video_dataset import VideoDataset, collate
from model.cinego import Cinego
from model.config import CinegoConfig, LanguageModelConfig
from model.tokenizer import open_tokenizer
from trainer.config import TrainConfig
from trainer.dry_run import peak_memory
from trainer.engine import SummedLoss, compute_loss
from trainer.optim import Optimizers

WORDS = ["red", "blue", "left", "right", "then", "the", "and", "a", "to", "is", "in", "on", "all"]
QUESTION_MEAN, QUESTION_SPREAD = 20, 6  # tokens, normal, 8 to 40
ANSWER_MEAN, ANSWER_SPREAD = 200, 0.6  # tokens, log-normal (spread of the log), 16 to 800
QUESTIONS_PER_VIDEO = 7  # VideoInstruct-100K: 100,010 pairs about some 13,000 videos
PATCHES, WIDTH = 50, 768  # CLIP ViT-B/32


@dataclass
class Source:
    """Random features, one set a video, as fp16 like those on disk."""

    num_frames: int
    kind = "visual_features"

    def read(self, name: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(int(name))
        return torch.randn(self.num_frames, PATCHES, WIDTH, generator=generator).half()


def make_samples(number: int, folder: str) -> Samples:
    """Conversations of one question and one answer; each word is one token."""
    rng = np.random.default_rng(0)
    lines = []
    for i in range(number):
        question = np.clip(rng.normal(QUESTION_MEAN, QUESTION_SPREAD), 8, 40)
        centre = np.log(ANSWER_MEAN) - ANSWER_SPREAD**2 / 2  # of a log-normal's mean
        answer = np.clip(rng.lognormal(centre, ANSWER_SPREAD), 16, 800)
        texts = [" ".join(rng.choice(WORDS, int(n))) for n in (question, answer)]
        turns = [
            {"from": who, "value": text} for who, text in zip(("human", "gpt"), texts, strict=True)
        ]
        lines.append(json.dumps({"video": str(i // QUESTIONS_PER_VIDEO), "conversations": turns}))
    path = Path(folder, "samples.jsonl")
    path.write_text("\n".join(lines))
    return read_samples(path)


def make_batches(
    samples: Samples, source: Source, steps: int, tokens: int = 0, rows: int = 0, **options
) -> list[dict]:
    """Of an epoch's batches a few, evenly from the shortest rows to the longest: a fair sample."""
    tokenizer = open_tokenizer("model/text_tokenizer")
    dataset = VideoDataset(samples, tokenizer, source, lambda frames: PATCHES, **options)
    sampler = LengthGroupedBatchSampler(dataset.lengths, rows or 1, tokens_per_batch=tokens)
    batches = sorted(sampler, key=lambda batch: np.mean([dataset.lengths[row] for row in batch]))
    chosen = [batches[int((i + 0.5) * len(batches) / steps)] for i in range(steps)]
    np.random.default_rng(0).shuffle(chosen)
    return [collate([dataset[row] for row in batch], pad_id=0) for batch in chosen]


def padded_loss(model: Cinego, batch: dict, length: int, dtype: str, device) -> torch.Tensor:
    """As the ancestors train: every row padded to `length`, every place's logits made, the loss
    of each taken, and most of it masked away."""
    inputs = {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch["inputs"].items()}
    del inputs["packed"]
    missing = (0, length - inputs["input_ids"].shape[1])
    labels = F.pad(inputs.pop("labels"), missing, value=IGNORED)[:, 1:]
    inputs["input_ids"] = F.pad(inputs["input_ids"], missing)
    inputs["visual_mask"] = F.pad(inputs["visual_mask"], missing)
    with torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32"):
        logits = model(**inputs).logits[:, :-1].flatten(0, 1)
        losses = F.cross_entropy(logits, labels.clamp(min=0).flatten(), reduction="none")
    return (losses * (labels != IGNORED).flatten()).sum()


def make_model(dim: int, n_layers: int) -> Cinego:
    torch.manual_seed(0)
    language_model = LanguageModelConfig(hidden_size=dim, num_hidden_layers=n_layers)
    return Cinego(CinegoConfig(language_model, vision_hidden_size=WIDTH, tokens_per_frame=PATCHES))


def time_step(model: Cinego, optimizers: Optimizers, batch: dict, pad_to: int, dtype: str, device):
    """Seconds of one step, of the processor's or by the wall: forward, backward, clip, move."""
    on_cpu = device.type == "cpu"
    clock = time.process_time if on_cpu else time.perf_counter
    synchronize = (lambda: None) if on_cpu else torch.cuda.synchronize
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    synchronize()
    started = clock()
    if pad_to:
        loss = padded_loss(model, batch, pad_to, dtype, device)
    else:
        loss = compute_loss(SummedLoss(model), batch, dtype, device)
    (loss / batch["supervised_tokens"]).backward()
    optimizers.step(scaler, optimizers.clip_gradients(scaler, max_norm=1.0))
    optimizers.zero_grad()
    synchronize()
    return clock() - started


def compare(args: argparse.Namespace, samples: Samples, dtype: str) -> None:
    device = torch.device(args.device)
    model = make_model(args.dim, args.n_layers).to(device).train()
    optimizers = Optimizers(model, TrainConfig())
    source = Source(args.num_frames)
    ragged = {"steps": args.steps, "tokens": args.tokens_per_batch, "max_length": 1024}
    # These steps cost the same whatever the lengths: half as many, of few rows, are enough.
    padded = {"steps": -(-args.steps // 2), "rows": args.padded_rows}
    ways = {
        "shared": (0, make_batches(samples, source, share_prefix=True, **ragged)),
        "single": (0, make_batches(samples, source, **ragged)),
        "padded 512": (512, make_batches(samples, source, max_length=512, **padded)),
        "padded 1536": (1536, make_batches(samples, source, max_length=1536, **padded)),
    }
    time_step(model, optimizers, ways["shared"][1][0], 0, dtype, device)  # the first makes code
    seconds = dict.fromkeys(ways, 0.0)
    # Taking turns: what disturbs the machine for a while disturbs all of them.
    for turn in itertools.zip_longest(*(batches for _, batches in ways.values())):
        for (name, (pad_to, _)), batch in zip(ways.items(), turn, strict=True):
            if batch is not None:
                seconds[name] += time_step(model, optimizers, batch, pad_to, dtype, device)

    unit = "CPU-s" if device.type == "cpu" else "s"
    print(
        f"\n{dtype}, {args.dim} x {args.n_layers}, {args.num_frames} frames x {PATCHES} x {WIDTH}, "
        f"{torch.get_num_threads()} threads, {peak_memory(device) / 2**20:,.0f} MB at most\n"
        f"             samples   {unit} samples/{unit} supervised/{unit} padding"
    )
    speed = {}
    for name, (pad_to, batches) in ways.items():
        number, spent = sum(len(batch["sample_ids"]) for batch in batches), seconds[name]
        supervised, real = (
            sum(b[key] for b in batches) for key in ("supervised_tokens", "real_tokens")
        )
        rows = (len(b["inputs"]["input_ids"]) for b in batches)
        places = pad_to * sum(rows) if pad_to else sum(b["padded_tokens"] for b in batches)
        speed[name] = number / spent, supervised / spent
        print(
            f"{name:<12} {number:>7} {spent:>7.1f} {number / spent:>10.3f} "
            f"{supervised / spent:>12.0f} {1 - real / places:>11.1%}"
        )
    for ours, other in itertools.product(list(ways)[:2], list(ways)[2:]):
        samples, tokens = (a / b for a, b in zip(speed[ours], speed[other], strict=True))
        print(f"{ours}: {samples:.2f} x the samples of {other}, {tokens:.2f} x its tokens")


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
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        samples = make_samples(args.samples, folder)
        for dtype in args.dtype:
            compare(args, samples, dtype)


if __name__ == "__main__":
    main()
