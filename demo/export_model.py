"""Make what ships: demo/model (the quickstart's model in float16) and demo/examples (four clips).

    python -m demo.export_model --load_from out/quickstart/sft.pth \\
        --features_path out/quickstart/features/train \\
        --val_features_path out/quickstart/features/val

The features tell how training frames look, so that the chat can say when a video looks nothing
like them (demo/known_world.py). The clips are of the test split: the model never saw their
combinations.
"""

import json
import shutil
import tempfile
from dataclasses import MISSING, dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from cli import Flags, flag, launch, parse_flags
from dataset.feature_store import FeatureStore
from demo.known_world import distance, fit_known_frames, statistics_of
from demo.world import make_clip
from inference.parts import DEMO_MODEL
from model.checkpoint import load_video_language_model, read_about, save_model

NOTE = (
    "This small model knows only the demo world: 48 coloured shapes and icons that move, turn, "
    "grow, shrink, blink or stay, one after another or up to four at a time."
)
# What of the training's settings says how frames are taken.
FRAME_SETTINGS = ("num_frames", "sampling", "fps", "resize", "tokenizer_path")
MARGIN = 1.5  # the threshold is so many times the farthest known clip's distance
EXAMPLES = {"order": 9, "two_step": 26, "count": 22}  # name: number of the clip
EXAMPLES_SEED = 777  # of the test split


def export_model(checkpoint: Path, known: list[Tensor], held_out: list[Tensor], out: Path) -> dict:
    """Writes `out` (.pth) in float16 with its .json and the statistics of `known`, the features of
    training clips; those of `held_out` count false alarms. Returns what was measured.
    Raises ValueError where `checkpoint` isn't a video-language model of ours."""
    model, about = load_video_language_model(checkpoint).half(), read_about(checkpoint)
    statistics = fit_known_frames(known)
    farthest = max(distance(clip, statistics) for clip in known)
    distances = [distance(clip, statistics) for clip in held_out]
    measured = {
        "note": NOTE,
        "threshold": round(MARGIN * farthest, 3),
        "farthest_training_clip": round(farthest, 3),
        "farthest_held_out_clip": round(max(distances), 3),
        "held_out_clips": len(held_out),
        "false_alarms": sum(value > MARGIN * farthest for value in distances),
    }
    training = {key: value for key, value in about["training"].items() if key in FRAME_SETTINGS}
    meta = {key: about[key] for key in ("commit", "lineage", "step") if key in about}
    training["vision_path"] = "demo/tower"
    save_model(out, model, {**meta, "training": training, "known_frames": measured})
    save_file(statistics, statistics_of(out))
    return measured


def make_examples(out: Path) -> None:
    """Writes one clip of each type in EXAMPLES, the first also backwards, and questions.jsonl."""
    out.mkdir(parents=True, exist_ok=True)
    lines = []
    with tempfile.TemporaryDirectory(dir=out) as folder:
        (Path(folder) / "clips").mkdir()
        for name, index in EXAMPLES.items():
            for line in make_clip(index, "test", EXAMPLES_SEED, Path(folder))[1]:
                backwards = line["video"].endswith("-reversed.mp4")
                if backwards and name != "order":
                    continue
                file = f"{name}{'-reversed' * backwards}.mp4"
                shutil.copyfile(Path(folder, line["video"]), out / file)
                lines.append(line | {"video": file})
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (out / "questions.jsonl").write_text(text, encoding="utf-8")


def read_features(directory: str) -> list[Tensor]:
    store = FeatureStore(directory)
    return [store.read(path) for path in store.paths() if "reason" not in store.find(path)]


@dataclass
class ExportFlags(Flags):
    """What ships"""

    load_from: Path = flag(MISSING, "the model to ship")
    features_path: str = flag(MISSING, "features that it was trained on")
    val_features_path: str = flag(MISSING, "features of held-out clips")
    out: Path = flag(DEMO_MODEL.parent.parent, "folder to write model/ and examples/ into")


def main() -> None:
    flags = parse_flags(ExportFlags, __doc__)
    checkpoint = flags.out / "model" / DEMO_MODEL.name
    known, held_out = read_features(flags.features_path), read_features(flags.val_features_path)
    measured = export_model(flags.load_from, known, held_out, checkpoint)
    make_examples(flags.out / "examples")
    print(f"{checkpoint}: {checkpoint.stat().st_size / 1e6:.2f} MB, {measured}")


if __name__ == "__main__":
    launch(main)
