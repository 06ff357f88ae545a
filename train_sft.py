"""Stage 2, supervised fine-tuning: the model that can see learns to answer.

It starts from what pretraining left (`out/pretrain_videolm_512.pth`) and trains summary, projector
and language model together on questions and answers, at a lower rate than before so that it keeps
what it knows.

    python train_sft.py --data_path questions.jsonl --images_path videos
    torchrun --nproc_per_node 4 train_sft.py --data_path questions.jsonl --use_feature \\
        --features_path dataset/features --dim 768 --n_layers 16

Writes out/sft_videolm_512.pth and .json, logs to out/sft_videolm_512/.
"""

from pathlib import Path

import stage
from cli import launch
from model.checkpoint import load_video_language_model
from model.cinego import Cinego
from model.config import CinegoConfig
from model.vision_tower import VisionTower


def load(path: Path, wanted: CinegoConfig, tower: VisionTower | None) -> Cinego:
    """The whole model of the stage before."""
    if not path.is_file():
        raise ValueError(
            f"{path}: no such checkpoint; run train_pretrain.py first, or name one with --load_from"
        )
    model = load_video_language_model(path)
    model.vision_tower = tower
    return model


def main(argv: list[str] | None = None) -> dict:
    return stage.run(
        __doc__,
        run_name="sft_videolm_{dim}",
        start_weights="pretrain_videolm_{dim}.pth",
        load=load,
        argv=argv,
        freeze_llm=0,
        learning_rate=2e-4,
    )


if __name__ == "__main__":
    launch(main)
