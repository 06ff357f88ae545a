"""Train the stand-in vision tower that ships in `model/vision_model/demo_tower/`.

    python -m scripts.train_demo_tower      # about 50 CPU-minutes

CLIP comes to a user trained by others; the demo world needs a tower that comes the same way. This
one has CLIP's class and format (`transformers.CLIPVisionModel`, 7 × 7 patches + CLS = 50 tokens a
frame). It learns on random stills of the demo world, not by contrast with text, which is slow from
zero, but from what the renderer knows of every patch: which thing covers it, whether a centre lies
in it and where, how large the thing is and how it is turned. The CLS token learns how many of each
kind there are and where they stand. Combinations thing × count that the test set holds out never
appear.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm
from transformers import CLIPVisionConfig, CLIPVisionModel

from dataset.demo_objects import THINGS
from dataset.demo_world import FRAME_SIZE, background, paste, split_of

PATCH_SIZE = 16
GRID = FRAME_SIZE // PATCH_SIZE
BACKGROUND = len(THINGS)  # class of a patch that shows no thing
MAX_COUNT = 4
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's own


class Stills(IterableDataset):
    """Endless random stills with their labels; worker w of seed s always makes the same ones."""

    def __init__(self, seed: int, batch_size: int):
        self.seed, self.batch_size = seed, batch_size

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        rng = np.random.default_rng([self.seed, worker.id if worker else 0])
        while True:
            stills = [still(rng) for _ in range(self.batch_size)]
            yield {key: torch.from_numpy(np.stack([s[key] for s in stills])) for key in stills[0]}


def _things(rng: np.random.Generator) -> list:
    """Up to four things, often three or four, and no (thing, count) that the splits hold out."""
    while True:
        total = rng.choice(MAX_COUNT + 1, p=[0.04, 0.33, 0.19, 0.22, 0.22])
        kinds = rng.permutation(len(THINGS))[: max(1, rng.integers(1, 4))]
        if rng.random() < 0.4:
            kinds = kinds[:1]
        chosen = [THINGS[i] for i in rng.choice(kinds, total)]
        if all(split_of(("count", thing, chosen.count(thing))) == "train" for thing in set(chosen)):
            return chosen


def still(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """One picture and all that is known of it (see the module's docstring)."""
    picture = background(rng)
    things = _things(rng)
    alone = len(things) == 1
    spots: list[tuple[float, float, float]] = []
    while len(spots) < len(things):
        spots.clear()
        for _ in range(60):
            d = rng.uniform(15, 50) if alone else rng.uniform(16, 31)
            x, y = rng.uniform(d / 2, FRAME_SIZE - d / 2, 2)
            if all(math.hypot(x - a, y - b) > (d + c) / 2 + 2 for a, b, c in spots):
                spots.append((x, y, d))
                if len(spots) == len(things):
                    break

    patch = np.full(GRID * GRID, BACKGROUND, dtype=np.int64)
    covered = np.full(GRID * GRID, 0.15, dtype=np.float32)  # less than this is background
    centre = np.zeros(
        (GRID * GRID, 6), dtype=np.float32
    )  # is one, x, y, log size, cos and sin of the turn
    counts = np.zeros(len(THINGS), dtype=np.int64)
    for thing, (x, y, d) in zip(things, spots, strict=True):
        angle = rng.uniform(0, 360) if rng.random() < 0.5 else rng.uniform(-16, 16)
        paste(picture, thing, x, y, d, angle)
        shadow = Image.new("L", (FRAME_SIZE, FRAME_SIZE))
        paste(shadow, thing, x, y, d, angle, ink=255)
        coverage = np.asarray(shadow.reduce(PATCH_SIZE), dtype=np.float32).ravel() / 255
        patch[coverage > covered] = THINGS.index(thing)
        covered = np.maximum(covered, coverage)
        column, row = int(x // PATCH_SIZE), int(y // PATCH_SIZE)
        turn = math.radians(angle) * thing.rotation_order
        turn = (math.cos(turn), math.sin(turn)) if thing.rotation_order else (0, 0)
        place = (x / PATCH_SIZE - column - 0.5, y / PATCH_SIZE - row - 0.5, math.log(d / 26))
        centre[row * GRID + column] = (1, *place, *turn)
        counts[THINGS.index(thing)] += 1
    # mp4 halves the colour's resolution and blurs edges: JPEG does the same and is quick.
    if rng.random() < 0.8:
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=int(rng.integers(70, 96)), subsampling=2)
        picture = Image.open(file)
    middle = np.mean([[x, y, d * 2] for x, y, d in spots] or [[0, 0, 0]], axis=0) / FRAME_SIZE
    return {
        "picture": np.asarray(picture).transpose(2, 0, 1),
        "patch": patch,
        "centre": centre,
        "counts": counts,
        "middle": middle.astype(np.float32),
    }


def build_tower(width: int, layers: int) -> CLIPVisionModel:
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        image_size=FRAME_SIZE,
        patch_size=PATCH_SIZE,
    )
    tower = CLIPVisionModel(config)
    # The default positions (std 0.02) drown in patch embeddings of about 0.5: a tower trained
    # from zero would not learn where things are.
    with torch.no_grad():
        tower.embeddings.position_embedding.weight[1:] = 0.5 * sine_positions(GRID, width)
    return tower


def sine_positions(grid: int, width: int) -> torch.Tensor:
    """2-D sine-cosine positions (grid², width): a quarter each for sin, cos of row, column."""
    frequency = 100.0 ** (-torch.arange(width // 4) / (width // 4))
    row, column = (torch.arange(grid * grid) // grid, torch.arange(grid * grid) % grid)
    waves = [axis[:, None] * frequency * math.pi / 2 for axis in (row, column)]
    return torch.cat([f(wave) for wave in waves for f in (torch.sin, torch.cos)], dim=1)


class Heads(nn.Module):
    """What is read from the tower while it learns, and thrown away afterwards."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.patch = nn.Linear(width, len(THINGS) + 1)
        self.centre = nn.Linear(width, 6)
        self.counts = nn.Linear(width, len(THINGS) * (MAX_COUNT + 1))
        self.total = nn.Linear(width, MAX_COUNT + 1)
        self.middle = nn.Linear(width, 3)

    def forward(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.norm(features)
        cls, patches = hidden[:, 0], hidden[:, 1:]
        return {
            "patch": self.patch(patches),
            "centre": self.centre(patches),
            "counts": self.counts(cls).view(-1, len(THINGS), MAX_COUNT + 1),
            "total": self.total(cls),
            "middle": self.middle(cls),
        }


def losses(out: dict, batch: dict) -> dict[str, torch.Tensor]:
    weight = torch.ones(len(THINGS) + 1)
    weight[BACKGROUND] = 0.25  # most patches are background
    present = batch["counts"] > 0
    counts = F.cross_entropy(
        out["counts"].flatten(0, 1), batch["counts"].flatten(), reduction="none"
    ).view_as(present)
    is_centre = batch["centre"][..., 0] > 0
    found, true = out["centre"][is_centre], batch["centre"][is_centre]
    turns = (true[:, 4:].abs().sum(1, keepdim=True) > 0).float()
    some = batch["counts"].sum(1) > 0
    return {
        "patch": F.cross_entropy(out["patch"].flatten(0, 1), batch["patch"].flatten(), weight),
        "centre": F.binary_cross_entropy_with_logits(
            out["centre"][..., 0], is_centre.float(), pos_weight=torch.tensor(4.0)
        ),
        "place": (found[:, 1:4] - true[:, 1:4]).abs().mean(),
        "turn": 0.3 * ((found[:, 4:] - true[:, 4:]) ** 2 * turns).mean(),
        # One absent thing of 48 says little, a present one much.
        "counts": (counts * present).sum() / present.sum() * 0.5
        + (counts * ~present).sum() / len(counts) * 0.25,
        "total": 0.5 * F.cross_entropy(out["total"], batch["counts"].sum(1)),
        "middle": 2.0 * (out["middle"] - batch["middle"])[some].abs().mean(),
    }


@torch.no_grad()
def score(tower, heads, batches: list[dict]) -> dict[str, float]:
    """Shares of right answers on stills that were never trained on; places in pixels."""
    tower.eval()
    sums: dict[str, list[float]] = {}
    for batch in batches:
        out = heads(encode(tower, batch["picture"]))
        shown = batch["patch"] != BACKGROUND
        total = batch["counts"].sum(1)
        right = out["total"].argmax(1) == total
        exact = (out["counts"].argmax(2) == batch["counts"]).all(1)
        results = {
            "patch": (out["patch"].argmax(2) == batch["patch"])[shown],
            "background": (out["patch"].argmax(2) == batch["patch"])[~shown],
            "all counts": exact,
            "middle (px)": (out["middle"] - batch["middle"])[total == 1][:, :2].abs() * FRAME_SIZE,
        }
        results |= {f"total {n}": right[total == n] for n in range(1, MAX_COUNT + 1)}
        for key, value in results.items():
            sums.setdefault(key, []).append(value.float())
    tower.train()
    return {
        key: torch.cat([v.flatten() for v in values]).mean().item() for key, values in sums.items()
    }


def encode(tower: CLIPVisionModel, pictures: torch.Tensor) -> torch.Tensor:
    """uint8 (N, 3, H, W) → features (N, P, D) before the final norm, as `VisionTower` gives."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    pixel_values = (pictures.float() / 255 - mean) / std
    hidden = tower.pre_layrnorm(tower.embeddings(pixel_values))
    return tower.encoder(inputs_embeds=hidden).last_hidden_state


def save(tower: CLIPVisionModel, directory: Path, trained: dict) -> None:
    """A directory as CLIP's: fp16 weights, config, preprocessor; and how it was trained."""
    directory.mkdir(parents=True, exist_ok=True)
    half = CLIPVisionModel(tower.config).half()
    half.load_state_dict(tower.state_dict())
    half.save_pretrained(directory)
    size = {"height": FRAME_SIZE, "width": FRAME_SIZE}
    preprocessor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": FRAME_SIZE},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": size,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": MEAN,
        "image_std": STD,
        "do_convert_rgb": True,
    }
    (directory / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")
    (directory / "training.json").write_text(json.dumps(trained, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("model/vision_model/demo_tower"))
    parser.add_argument(
        "--width", type=int, default=128, help="hidden size; the features are this wide"
    )
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2400, help="training steps")
    parser.add_argument("--batch_size", type=int, default=128, help="stills a step")
    parser.add_argument(
        "--learning_rate", type=float, default=2e-3, help="AdamW: embeddings, norms, heads"
    )
    parser.add_argument(
        "--muon_learning_rate", type=float, default=1e-2, help="Muon: matrices of the layers"
    )
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="autocast"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    tower = build_tower(args.width, args.layers)
    heads = Heads(args.width)
    matrices = [p for p in tower.encoder.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in [*tower.parameters(), *heads.parameters()] if id(p) not in chosen]
    optimizers = [
        torch.optim.Muon(
            matrices, lr=args.muon_learning_rate, weight_decay=0.01, adjust_lr_fn="original"
        ),
        torch.optim.AdamW(others, lr=args.learning_rate, weight_decay=0.01, betas=(0.9, 0.98)),
    ]
    schedule = lambda step: min((step + 1) / 100, 1 - step / args.steps)  # noqa: E731
    schedulers = [torch.optim.lr_scheduler.LambdaLR(o, schedule) for o in optimizers]
    print(f"tower: {sum(p.numel() for p in tower.parameters()) / 1e6:.2f} M parameters")

    held_out = iter(Stills(args.seed + 10_000, 200))
    held_out = [next(held_out) for _ in range(5)]
    loader = iter(
        DataLoader(
            Stills(args.seed, args.batch_size), batch_size=None, num_workers=1, prefetch_factor=8
        )
    )
    started, scores = time.process_time(), {}
    for step in (bar := tqdm(range(args.steps), desc="tower", unit="step")):
        batch = next(loader)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.dtype == "bfloat16"):
            out = heads(encode(tower, batch["picture"]))
        parts = losses({key: value.float() for key, value in out.items()}, batch)
        sum(parts.values()).backward()
        nn.utils.clip_grad_norm_([*tower.parameters(), *heads.parameters()], 1.0)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
        if step % 20 == 0:
            bar.set_postfix({key: f"{value.item():.3f}" for key, value in parts.items()})
        if (step + 1) % 200 == 0 or step + 1 == args.steps:
            scores = score(tower, heads, held_out)
            tqdm.write(f"step {step + 1}: " + ", ".join(f"{k} {v:.3f}" for k, v in scores.items()))
            trained = {
                "command": vars(args) | {"out": str(args.out)},
                "cpu_seconds": round(time.process_time() - started),
            }
            save(tower, args.out, trained | {"held_out_stills": scores})


if __name__ == "__main__":
    main()
