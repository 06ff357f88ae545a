"""Stage 1, pretraining: a language model learns to read what the vision tower sees.

It starts from a language model (`out/lm_512.pth`) that knows no picture, and from a random video
summary and projector. With `--freeze_llm 2`, the default, only these two learn, from captions: the
language model keeps its language. `--from_scratch` starts a small language model from random
weights instead and trains it along, as the quickstart does.

    python train_pretrain.py --data_path captions.jsonl --images_path videos
    torchrun --nproc_per_node 4 train_pretrain.py --data_path captions.jsonl --use_feature \\
        --features_path dataset/features --dim 768 --n_layers 16

Writes out/pretrain_videolm_512.pth and .json, logs to out/pretrain_videolm_512/.
"""

from dataclasses import replace
from pathlib import Path

import stage
from cli import launch
from model.checkpoint import load_language_model
from model.cinego import Cinego
from model.config import CinegoConfig
from model.vision_tower import VisionTower


def load(path: Path, wanted: CinegoConfig, tower: VisionTower | None) -> Cinego:
    """A language model that sees for the first time."""
    if not path.exists():
        raise ValueError(
            f"{path}: no such language model; put MiniMind's weights there, name another with "
            "--load_from, or start from random weights with --from_scratch --freeze_llm 0"
        )
    language_model = load_language_model(path)
    print(language_model.load_report)  # which generation it is, and what was assumed of it
    model = Cinego(replace(wanted, language_model=language_model.config), tower)
    model.language_model, model.load_report = language_model, language_model.load_report
    return model


def main(argv: list[str] | None = None) -> dict:
    return stage.run(
        __doc__,
        run_name="pretrain_videolm_{dim}",
        start_weights="lm_{dim}.pth",
        load=load,
        argv=argv,
        freeze_llm=2,
        learning_rate=1e-3,  # few parameters, and random ones: they bear a high rate
    )


if __name__ == "__main__":
    launch(main)
