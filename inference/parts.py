"""Which models there are, and which tower and tokenizer go with each."""

import json
import os
from pathlib import Path

from model.checkpoint import is_video_language_model, read_about
from model.vision_tower import VisionTower

ROOT = Path(__file__).resolve().parents[1]  # what ships is found from any folder
VISION_PATH = ROOT / "model/vision_model/clip-vit-base-patch32"
DEMO_MODEL = ROOT / "demo/model/sft_videolm_128.pth"  # knows the demo world only
DEMO_TOWER = ROOT / "demo/tower"
EXAMPLES = ROOT / "demo/examples"
TOKENIZER_PATH = ROOT / "model/text_tokenizer"


def default_model() -> Path:
    """The model of `train_sft.py` without flags, or else the small one that ships."""
    trained = Path("out/sft_videolm_512.pth")
    return trained if trained.is_file() else DEMO_MODEL


def default_clips() -> Path:
    """The user's own clips to ask about, or else those that ship."""
    own = Path("dataset/eval_videos")
    return own if own.is_dir() else EXAMPLES


def find_models(folder: str | Path) -> list[Path]:
    """The video-language models below `folder`: .pth files and exported directories, those that
    were trained to answer first, then the newest."""
    found = []
    for here, folders, files in os.walk(folder, followlinks=True):
        # An exported directory has no other models in it; runs and data have thousands of files.
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths = [Path(here, name) for name in files if name.endswith(".pth")]
        if "processor_config.json" in files:
            paths.append(Path(here))
        found += [path for path in paths if is_video_language_model(path)]
    return sorted(found, key=lambda path: ("pretrain" in path.name, -path.stat().st_mtime, path))


def find_parts(checkpoint: str | Path) -> tuple[Path, Path]:
    """The directories of the vision tower and of the tokenizer that go with a checkpoint.

    An exported directory is both. Else the tokenizer is that of training, where it still lies
    there, and the tower is the one that training named, the usual one, another beside that or the
    demo world's: the first of the right width, and of the right weights should several have it.
    Where nobody knows (files of others) or none is there, both are the usual ones.
    """
    checkpoint = Path(checkpoint)
    if (checkpoint / "processor_config.json").is_file():
        return checkpoint, checkpoint
    about = read_about(checkpoint)
    training = about.get("training", {})
    tokenizer = Path(training.get("tokenizer_path") or TOKENIZER_PATH)
    if not (tokenizer / "tokenizer_config.json").is_file():
        tokenizer = Path(TOKENIZER_PATH)
    usual = Path(VISION_PATH)
    # Training on features never looks at --vision_path: what it names may be another tower.
    places = [training.get("vision_path") or usual, usual, *sorted(usual.parent.glob("*/"))]
    places.append(DEMO_TOWER)
    width = about.get("model_config", {}).get("vision_hidden_size")
    towers = [place for place in dict.fromkeys(map(Path, places)) if _fits(place, width)]
    fingerprint = about.get("lineage", {}).get("vision_tower")
    if len(towers) > 1 and fingerprint is not None:
        towers = [place for place in towers if _fingerprint(place) == fingerprint]
    return (towers or [usual])[0], tokenizer


def _fits(place: Path, width: int | None) -> bool:
    """Whether there is a tower, and none of another width."""
    try:
        config = json.loads((place / "config.json").read_text(encoding="utf-8"))
        found = config.get("vision_config", config).get("hidden_size")
    except (OSError, ValueError, AttributeError):
        return False
    return None in (width, found) or found == width


def _fingerprint(place: Path) -> str | None:
    try:
        return VisionTower.from_pretrained(place).fingerprint()
    except ValueError:  # something else lies there
        return None
