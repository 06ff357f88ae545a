"""Train the stand-in vision tower that ships in `demo/tower/`.

    python -m demo.train_tower      # about 30 CPU-minutes
    python -m demo.train_tower --start_from demo/tower --seed 1 \\
        --steps 1300 --learning_rate 1e-3 --muon_learning_rate 5e-3      # about 20 more

CLIP comes to a user trained by others; the demo world needs a tower that comes the same way. This
one has CLIP's class and format (`transformers.CLIPVisionModel`, 7 × 7 patches + CLS = 50 tokens a
frame). It learns on random stills of the demo world, not by contrast with text, which is slow from
zero, but from what the renderer knows of every patch: which object covers it, whether a centre lies
in it and where, how large the object is and how it is turned. The CLS token learns which objects
there are, how many in all, and where they stand.

Combinations object × count that the test set holds out never appear, and this must not teach that
they can't: a tower that learned how many of each class it sees took 15 % of the held-out pairs for
another number. So a third of all classes are *distractors*, which are no objects of this world:
random blobs, its shapes in other colours, its icons with their colours exchanged. Of these, as of
CLIP's objects, there may be any number, and none can be predicted from what they are.
"""

import copy
import io
import json
import math
import time
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm
from transformers import CLIPVisionConfig, CLIPVisionModel

from cli import Flags, flag, launch, parse_flags
from demo.objects import (
    COLOURS,
    DRAWINGS,
    ICONS,
    OBJECTS,
    SHAPES,
    Ellipse,
    Object,
    draw_sprite,
    sprite_of,
)
from demo.scene import split_of
from demo.world import FRAME_SIZE, background, paste
from device import choose_dtype
from model.vision_tower import VisionTower

WIDTH, LAYERS = 128, 5  # the features are WIDTH wide
PATCH_SIZE = 16
GRID = FRAME_SIZE // PATCH_SIZE
BACKGROUND = len(OBJECTS)  # label of a patch that shows no object
IGNORED = -100  # label of a patch that shows a distractor: cross-entropy's own default
DISTRACTORS = 0.35  # share of the classes in a picture that are no objects of this world
MAX_COUNT = 4
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's own


# ---- stills and their labels


class Stills(IterableDataset):
    """Endless random stills with their labels; worker w of seed s always makes the same ones."""

    def __init__(self, seed: int, batch_size: int, split: str = "train"):
        self.seed, self.batch_size, self.split = seed, batch_size, split

    def __iter__(self):
        worker = get_worker_info()
        rng = np.random.default_rng([self.seed, worker.id if worker else 0])
        while True:
            stills = [make_still(rng, self.split) for _ in range(self.batch_size)]
            yield {key: torch.from_numpy(np.stack([s[key] for s in stills])) for key in stills[0]}


def _sample_objects(rng: np.random.Generator, split: str) -> list[Object | None]:
    """Up to four objects, often three or four; `None` is a distractor, in training only.

    Training holds no (object, count) of the other splits; another split's most numerous object has
    a count of that split, as in the demo world.
    """
    while True:
        total = rng.choice(MAX_COUNT + 1, p=[0.04, 0.33, 0.19, 0.22, 0.22])
        classes = [OBJECTS[i] for i in rng.permutation(len(OBJECTS))[: rng.integers(1, 4)]]
        if split == "train":
            classes = [None if rng.random() < DISTRACTORS else item for item in classes]
        sampled = [classes[i] for i in rng.integers(len(classes), size=total)]
        counts = Counter(item for item in sampled if item)
        splits = [split_of(("count", item, n)) for item, n in counts.most_common()]
        if all(s == "train" for s in splits) if split == "train" else splits[:1] == [split]:
            return sampled


def _sample_places(rng: np.random.Generator, number: int) -> list[tuple[float, float, float]]:
    """x, y and diameter in pixels of `number` objects that don't touch."""
    while True:
        places = []
        for _ in range(60):
            if len(places) == number:
                return places
            d = rng.uniform(15, 50) if number == 1 else rng.uniform(16, 31)
            x, y = rng.uniform(d / 2, FRAME_SIZE - d / 2, 2)
            if all(math.hypot(x - a, y - b) > (d + c) / 2 + 2 for a, b, c in places):
                places.append((x, y, d))


def make_still(rng: np.random.Generator, split: str = "train") -> dict[str, np.ndarray]:
    """One picture, uint8 (3, H, W), and all that is known of it: for each patch its class and
    (is a centre; x, y, log size; cosine and sine of the turn), for the picture the classes present,
    their total number and the mean place."""
    picture = background(rng)
    objects = _sample_objects(rng, split)
    places = _sample_places(rng, len(objects))
    patch = np.full(GRID * GRID, BACKGROUND, dtype=np.int64)
    covered = np.full(GRID * GRID, 0.15, dtype=np.float32)  # less than this is background
    centre = np.zeros((GRID * GRID, 6), dtype=np.float32)
    present = np.zeros(len(OBJECTS), dtype=np.float32)
    distractor = make_distractor(rng)  # all distractors of a picture are of one class
    for item, (x, y, d) in zip(objects, places, strict=True):
        angle = rng.uniform(0, 360) if rng.random() < 0.5 else rng.uniform(-16, 16)
        silhouette = Image.new("L", (FRAME_SIZE, FRAME_SIZE))
        if item is None:
            size, corner = (round(d), round(d)), (round(x - d / 2), round(y - d / 2))
            stamp = distractor.rotate(angle, Image.BILINEAR).resize(size, Image.BOX)
            picture.paste(stamp, corner, stamp)
            silhouette.paste(255, corner, stamp)
            label, order = IGNORED, 0
        else:
            paste(picture, item, x, y, d, angle)
            paste(silhouette, item, x, y, d, angle, ink=255)
            label, order = OBJECTS.index(item), item.rotation_order
            present[label] = 1
        coverage = np.asarray(silhouette.reduce(PATCH_SIZE), dtype=np.float32).ravel() / 255
        patch[coverage > covered] = label
        covered = np.maximum(covered, coverage)
        column, row = int(x // PATCH_SIZE), int(y // PATCH_SIZE)
        turn = math.radians(angle) * order
        turn = (math.cos(turn), math.sin(turn)) if order else (0, 0)
        place = (x / PATCH_SIZE - column - 0.5, y / PATCH_SIZE - row - 0.5, math.log(d / 26))
        centre[row * GRID + column] = (1, *place, *turn)
    # mp4 halves the colour's resolution and blurs edges: JPEG does the same and is quick.
    if rng.random() < 0.8:
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=int(rng.integers(70, 96)), subsampling=2)
        picture = Image.open(file)
    middle = np.mean([[x, y, d * 2] for x, y, d in places] or [[0, 0, 0]], axis=0) / FRAME_SIZE
    return {
        "picture": np.asarray(picture).transpose(2, 0, 1),
        "patch": patch,
        "centre": centre,
        "present": present,
        "total": np.int64(len(objects)),
        "one_class": np.bool_(len(set(objects)) == 1 and len(objects) > 1),
        "middle": middle.astype(np.float32),
    }


def make_distractor(rng: np.random.Generator) -> Image.Image:
    """A sprite of something that is none of the objects (see the module's docstring)."""
    form = rng.integers(3)
    if form == 0:
        red, green, blue, alpha = sprite_of(Object(rng.choice(list(ICONS)))).split()
        bands = (green, blue, red) if rng.random() < 0.5 else (blue, red, green)
        return Image.merge("RGBA", (*bands, alpha)).reduce(2)
    colour = rng.integers(20, 256, 3)
    while min(np.linalg.norm(colour - known) for _, known in COLOURS.values()) < 80:
        colour = rng.integers(20, 256, 3)
    fill = tuple(colour.tolist())
    if form == 1:
        return draw_sprite(DRAWINGS[rng.choice(list(SHAPES))], fill).reduce(2)
    corners = rng.integers(4, 10)
    angles = 2 * math.pi * (np.arange(corners) + rng.uniform(-0.3, 0.3, corners)) / corners
    radii = rng.uniform(0.45, 1, corners)
    blob = list(zip(radii * np.cos(angles), radii * np.sin(angles), strict=True))
    parts = [(blob, fill)]
    if rng.random() < 0.5:
        x, y, wide, high = *rng.uniform(-0.25, 0.25, 2), *rng.uniform(0.1, 0.3, 2)
        spot = tuple(rng.integers(20, 256, 3).tolist())
        parts.append((Ellipse(x - wide, y - high, x + wide, y + high), spot))
    return draw_sprite(parts).reduce(2)


# ---- the tower and its training


def build_tower() -> CLIPVisionModel:
    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=WIDTH // 32,
        image_size=FRAME_SIZE,
        patch_size=PATCH_SIZE,
    )
    tower = CLIPVisionModel(config)
    # The default positions (std 0.02) drown in patch embeddings of about 0.5: a tower trained
    # from zero would not learn where things are. So: a quarter each of sin, cos of row, column.
    frequency = 100.0 ** (-torch.arange(WIDTH // 4) / (WIDTH // 4))
    row, column = torch.arange(GRID * GRID) // GRID, torch.arange(GRID * GRID) % GRID
    waves = [axis[:, None] * frequency * math.pi / 2 for axis in (row, column)]
    positions = torch.cat([f(wave) for wave in waves for f in (torch.sin, torch.cos)], dim=1)
    with torch.no_grad():
        tower.embeddings.position_embedding.weight[1:] = 0.5 * positions
    return tower


class Heads(nn.Module):
    """What is predicted from the tower's features while it learns, and thrown away afterwards."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.patch = nn.Linear(WIDTH, len(OBJECTS) + 1)
        self.centre = nn.Linear(WIDTH, 6)
        self.present = nn.Linear(WIDTH, len(OBJECTS))
        self.total = nn.Linear(WIDTH, MAX_COUNT + 1)
        self.middle = nn.Linear(WIDTH, 3)

    def forward(self, features_NPD: Tensor) -> dict[str, Tensor]:
        hidden = self.norm(features_NPD)
        out = {name: getattr(self, name)(hidden[:, 1:]) for name in ("patch", "centre")}
        cls = hidden[:, 0]
        return out | {name: getattr(self, name)(cls) for name in ("present", "total", "middle")}


def losses(out: dict[str, Tensor], batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weighted terms of the loss; rare labels weigh more, so that silence doesn't win."""
    weight = torch.ones(len(OBJECTS) + 1)
    weight[BACKGROUND] = 0.25  # most patches are background
    is_centre = batch["centre"][..., 0] > 0
    found, true = out["centre"][is_centre], batch["centre"][is_centre]
    turns = (true[:, 4:].abs().sum(1, keepdim=True) > 0).float()
    some = batch["total"] > 0
    bce = F.binary_cross_entropy_with_logits
    return {
        "patch": F.cross_entropy(out["patch"].flatten(0, 1), batch["patch"].flatten(), weight),
        "centre": bce(out["centre"][..., 0], is_centre.float(), pos_weight=torch.tensor(4.0)),
        "place": (found[:, 1:4] - true[:, 1:4]).abs().mean(),
        "turn": 0.3 * ((found[:, 4:] - true[:, 4:]) ** 2 * turns).mean(),
        # 46 or more of 48 objects are absent: that one is here must weigh as much as all of these.
        "present": 5.0 * bce(out["present"], batch["present"], pos_weight=torch.tensor(5.0)),
        "total": F.cross_entropy(out["total"], batch["total"]),
        "middle": 2.0 * (out["middle"] - batch["middle"])[some].abs().mean(),
    }


def encode(tower: CLIPVisionModel, pictures: Tensor) -> Tensor:
    """uint8 (N, 3, H, W) → features (N, P, D) before the final norm, as `VisionTower` gives."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    pixel_values = (pictures.float() / 255 - mean) / std
    hidden = tower.pre_layrnorm(tower.embeddings(pixel_values))
    return tower.encoder(inputs_embeds=hidden).last_hidden_state


@torch.no_grad()
def score(tower, heads, batches: list[dict], unseen: list[dict]) -> dict[str, float]:
    """Shares of right answers on stills that were never trained on; places in pixels.

    The total is scored on combinations (object, count) of the test set, which training never shows.
    """
    results = defaultdict(list)
    for batch in batches:
        out = heads(encode(tower, batch["picture"]))
        right = out["patch"].argmax(2) == batch["patch"]
        shown = (batch["patch"] != BACKGROUND) & (batch["patch"] != IGNORED)
        off = (out["middle"] - batch["middle"])[batch["total"] == 1][:, :2].abs() * FRAME_SIZE
        results["patch"].append(right[shown])
        results["background"].append(right[batch["patch"] == BACKGROUND])
        results["present"].append(((out["present"] > 0) == batch["present"].bool()).all(1))
        results["middle (px)"].append(off)
    for batch in unseen:
        total = batch["total"]
        right = heads(encode(tower, batch["picture"]))["total"].argmax(1) == total
        for n in range(1, MAX_COUNT + 1):
            results[f"unseen total {n}"].append(right[total == n])
        results["unseen total of one class"].append(right[batch["one_class"]])
    return {key: torch.cat(values).float().mean().item() for key, values in results.items()}


def save(tower: CLIPVisionModel, directory: Path, trained: dict) -> None:
    """A directory as CLIP's: fp16 weights, config, preprocessor; and how it was trained."""
    copy.deepcopy(tower).half().save_pretrained(directory)
    preprocessor = {"image_processor_type": "CLIPImageProcessor"}  # and its defaults, but for
    preprocessor["size"] = {"shortest_edge": FRAME_SIZE}
    preprocessor["crop_size"] = {"height": FRAME_SIZE, "width": FRAME_SIZE}
    preprocessor |= {"image_mean": MEAN, "image_std": STD}
    for name, values in (("preprocessor_config", preprocessor), ("training", trained)):
        (directory / f"{name}.json").write_text(json.dumps(values, indent=2) + "\n")


@dataclass
class TowerFlags(Flags):
    """Training of the tower"""

    out: Path = flag(Path("demo/tower"), "directory to write, in CLIP's format")
    start_from: Path | None = flag(
        None, "tower of this script to train further; give another --seed for new stills"
    )
    steps: int = flag(2000, "training steps", at_least=1)
    batch_size: int = flag(128, "stills a step", at_least=1)
    learning_rate: float = flag(2e-3, "AdamW's: embeddings, norms, heads")
    muon_learning_rate: float = flag(1e-2, "Muon's: matrices of the layers")
    seed: int = flag(0, "of weights and stills")


def main() -> None:
    flags = parse_flags(TowerFlags, __doc__)
    torch.manual_seed(flags.seed)
    tower, heads, before = build_tower(), Heads(), {}
    if flags.start_from:
        tower.load_state_dict(VisionTower.from_pretrained(flags.start_from).model.state_dict())
        before = {"before": json.loads((flags.start_from / "training.json").read_text())}
    matrices = [p for p in tower.encoder.parameters() if p.ndim == 2]
    parameters = [*tower.parameters(), *heads.parameters()]
    others = [p for p in parameters if not any(p is matrix for matrix in matrices)]
    muon = {"lr": flags.muon_learning_rate, "weight_decay": 0.01, "adjust_lr_fn": "original"}
    adamw = {"lr": flags.learning_rate, "weight_decay": 0.01, "betas": (0.9, 0.98)}
    optimizers = [torch.optim.Muon(matrices, **muon), torch.optim.AdamW(others, **adamw)]

    def schedule(step: int) -> float:
        return min((step + 1) / 100, 1 - step / flags.steps)

    schedulers = [torch.optim.lr_scheduler.LambdaLR(o, schedule) for o in optimizers]
    print(f"tower: {sum(p.numel() for p in tower.parameters()) / 1e6:.2f} M parameters")

    streams = [iter(Stills(flags.seed + 10_000, 200, split)) for split in ("train", "test")]
    held_out = [[next(batches) for _ in range(5)] for batches in streams]
    stills = Stills(flags.seed, flags.batch_size)
    loader = iter(DataLoader(stills, batch_size=None, num_workers=1, prefetch_factor=8))
    in_bfloat16 = choose_dtype("auto", torch.device("cpu")) == "bfloat16"
    started = time.process_time()
    for step in (bar := tqdm(range(flags.steps), desc="tower", unit="step")):
        batch = next(loader)
        with torch.autocast("cpu", torch.bfloat16, enabled=in_bfloat16):
            out = heads(encode(tower, batch["picture"]))
        parts = losses({key: value.float() for key, value in out.items()}, batch)
        sum(parts.values()).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
        if step % 20 == 0:
            bar.set_postfix({key: f"{value.item():.3f}" for key, value in parts.items()})
        if (step + 1) % 200 == 0 or step + 1 == flags.steps:
            scores = score(tower, heads, *held_out)
            tqdm.write(f"step {step + 1}: " + ", ".join(f"{k} {v:.3f}" for k, v in scores.items()))
            command = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(flags).items()}
            trained = {"command": command, "cpu_seconds": round(time.process_time() - started)}
            save(tower, flags.out, before | trained | {"held_out_stills": scores})


if __name__ == "__main__":
    launch(main)
