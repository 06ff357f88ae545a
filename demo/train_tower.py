"""Train the stand-in vision tower that ships in `demo/tower/`.

    python -m demo.train_tower      # about 16 CPU-minutes
    python -m demo.train_tower --start_from demo/tower --seed 1 \\
        --steps 1300 --learning_rate 1e-3 --muon_learning_rate 5e-3      # about 10 more

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
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

from cli import Flags, flag, launch, parse_flags
from dataset.transforms import FrameTransform
from demo.objects import COLOURS, DRAWINGS, ICONS, OBJECTS, SHAPES, Object, draw_sprite, sprite_of
from demo.scene import split_of
from demo.world import FRAME_SIZE, background, stamp_of
from device import choose_dtype
from model.vision_tower import VisionTower
from trainer.config import TrainConfig
from trainer.optim import Optimizers, learning_rate_factor

WIDTH, LAYERS = 128, 5  # the features are WIDTH wide
PATCH_SIZE = 16
GRID = FRAME_SIZE // PATCH_SIZE
BACKGROUND = len(OBJECTS)  # label of a patch that shows no object
IGNORED = -100  # label of a patch that shows a distractor: cross-entropy's own default
DISTRACTORS = 0.35  # share of the classes in a picture that are no objects of this world
MAX_COUNT = 4
# What is predicted while the tower learns, and how many numbers each: of every patch, of a picture.
OF_PATCHES = {"patch": len(OBJECTS) + 1, "centre": 6}
OF_PICTURES = {"present": len(OBJECTS), "total": MAX_COUNT + 1, "middle": 3}


# ---- stills and their labels


class Stills(Dataset):
    """Random stills with their labels; number i of a seed is always the same one."""

    def __init__(self, seed: int, number: int):
        self.seed, self.number = seed, number

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        return make_still(np.random.default_rng([self.seed, i]))


def _sample_objects(rng: np.random.Generator) -> list[Object | None]:
    """Up to four objects, often three or four, `None` for a distractor. No (object, count) is one
    of the held-out splits."""
    while True:
        total = rng.choice(MAX_COUNT + 1, p=[0.04, 0.33, 0.19, 0.22, 0.22])
        classes = [OBJECTS[i] for i in rng.permutation(len(OBJECTS))[: rng.integers(1, 4)]]
        classes = [None if rng.random() < DISTRACTORS else item for item in classes]
        sampled = [classes[i] for i in rng.integers(len(classes), size=total)]
        counts = Counter(item for item in sampled if item)
        if all(split_of(("count", item, n)) == "train" for item, n in counts.items()):
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


def make_still(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """One picture, uint8 (H, W, 3), and all that is known of it: for each patch its class and
    (is a centre; x, y, log size; cosine and sine of the turn), for the picture the classes present,
    their total number and the mean place."""
    picture = background(rng)
    objects = _sample_objects(rng)
    places = _sample_places(rng, len(objects))
    patch = np.full(GRID * GRID, BACKGROUND, dtype=np.int64)
    covered = np.full(GRID * GRID, 0.15, dtype=np.float32)  # less than this is background
    centre = np.zeros((GRID * GRID, 6), dtype=np.float32)
    present = np.zeros(len(OBJECTS), dtype=np.float32)
    distractor = make_distractor(rng)  # all distractors of a picture are of one class
    for item, (x, y, d) in zip(objects, places, strict=True):
        angle = rng.uniform(0, 360) if rng.random() < 0.5 else rng.uniform(-16, 16)
        label, order = IGNORED, 0
        if item is None:
            size = round(d), round(d)
            stamp = distractor.rotate(angle, Image.BILINEAR).resize(size, Image.BOX)
        else:
            stamp = stamp_of(item, round(d), round(angle) % 360)
            label, order = OBJECTS.index(item), item.rotation_order
            present[label] = 1
        silhouette = Image.new("L", (FRAME_SIZE, FRAME_SIZE))
        corner = round(x - stamp.width / 2), round(y - stamp.height / 2)
        picture.paste(stamp, corner, stamp)
        silhouette.paste(255, corner, stamp)
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
        "picture": np.array(picture),
        "patch": patch,
        "centre": centre,
        "present": present,
        "total": len(objects),
        "middle": middle.astype(np.float32),
    }


def make_distractor(rng: np.random.Generator) -> Image.Image:
    """A sprite of something that is none of the objects (see the module's docstring)."""
    if rng.random() < 1 / 3:
        red, green, blue, alpha = sprite_of(Object(rng.choice(list(ICONS)))).split()
        bands = (green, blue, red) if rng.random() < 0.5 else (blue, red, green)
        return Image.merge("RGBA", (*bands, alpha)).reduce(2)
    colour = rng.integers(20, 256, 3)
    while min(np.linalg.norm(colour - known) for _, known in COLOURS.values()) < 80:
        colour = rng.integers(20, 256, 3)
    angles = 2 * math.pi * np.arange(corners := rng.integers(4, 10)) / corners
    radii = rng.uniform(0.45, 1, corners)
    blob = list(zip(radii * np.cos(angles), radii * np.sin(angles), strict=True))
    forms = [[(blob, None)], DRAWINGS[rng.choice(list(SHAPES))]]
    return draw_sprite(forms[rng.integers(2)], tuple(colour.tolist())).reduce(2)


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


class TowerWithHeads(nn.Module):
    """The tower, and the heads that are thrown away afterwards."""

    def __init__(self):
        super().__init__()
        self.tower, self.norm = build_tower(), nn.LayerNorm(WIDTH)
        sizes = OF_PATCHES | OF_PICTURES
        self.heads = nn.ModuleDict({name: nn.Linear(WIDTH, sizes[name]) for name in sizes})
        self.processor = CLIPImageProcessorPil(
            size={"shortest_edge": FRAME_SIZE},
            crop_size={"height": FRAME_SIZE, "width": FRAME_SIZE},
        )
        self.transform = FrameTransform.from_config(self.processor.to_dict(), "the tower")

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        """uint8 (N, H, W, 3) → predictions from the features that `VisionTower` gives."""
        features_NPD = self.tower(self.transform.normalize(pictures)).last_hidden_state
        hidden_NPD = self.norm(features_NPD)
        found = {name: self.heads[name](hidden_NPD[:, 1:]) for name in OF_PATCHES}
        return found | {name: self.heads[name](hidden_NPD[:, 0]) for name in OF_PICTURES}

    def save(self, directory: Path, trained: dict) -> None:
        """A directory as CLIP's: fp16 weights, config, preprocessor; and how it was trained."""
        copy.deepcopy(self.tower).half().save_pretrained(directory)
        self.processor.save_pretrained(directory)
        (directory / "training.json").write_text(json.dumps(trained, indent=2) + "\n")


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


def main(argv: list[str] | None = None) -> None:
    flags = parse_flags(TowerFlags, __doc__, argv)
    torch.manual_seed(flags.seed)
    model, before = TowerWithHeads(), {}
    if flags.start_from:
        state = VisionTower.from_pretrained(flags.start_from).model.state_dict()
        model.tower.load_state_dict(state)
        before = {"before": json.loads((flags.start_from / "training.json").read_text())}
    rates = {"learning_rate": flags.learning_rate, "muon_learning_rate": flags.muon_learning_rate}
    optimizers = Optimizers(model, TrainConfig(optimizer="muon", weight_decay=0.01, **rates))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    print(optimizers.description)

    stills = Stills(flags.seed, flags.steps * flags.batch_size)
    loader = DataLoader(stills, flags.batch_size, num_workers=1, prefetch_factor=8)
    in_bfloat16 = choose_dtype("auto", torch.device("cpu")) == "bfloat16"
    started = time.process_time()
    # No still comes twice: the losses are those of stills that were never trained on.
    for step, batch in enumerate(bar := tqdm(loader, desc="tower", unit="step")):
        optimizers.set_learning_rates(learning_rate_factor(step, flags.steps, 100, "linear"))
        with torch.autocast("cpu", torch.bfloat16, enabled=in_bfloat16):
            out = model(batch["picture"])
        parts = losses({key: value.float() for key, value in out.items()}, batch)
        sum(parts.values()).backward()
        optimizers.step(scaler, optimizers.clip_gradients(scaler, max_norm=1.0))
        optimizers.zero_grad()
        last = {name: round(loss.item(), 4) for name, loss in parts.items()}
        bar.set_postfix(last, refresh=False)
    command = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(flags).items()}
    trained = {"command": command, "cpu_seconds": round(time.process_time() - started)}
    model.save(flags.out, before | trained | {"losses": last})


if __name__ == "__main__":
    launch(main)
