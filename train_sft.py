"""Stage 2, supervised fine-tuning: the model that can see learns to answer.

It starts from what pretraining left (`out/pretrain_videolm_512.pth`) and trains summary, projector
and language model together on questions and answers, at a lower rate than before so that it keeps
what it knows.

    python train_sft.py --data_path questions.jsonl --images_path videos
    torchrun --nproc_per_node 4 train_sft.py --data_path questions.jsonl --use_feature \\
        --features_path dataset/features --dim 768

Writes out/sft_videolm_512.pth and .json, logs to out/sft_videolm_512/.
"""

from functools import partial

from build import (
    StageConfig,
    build_loader,
    build_model,
    check_start,
    describe_lineage,
    open_visuals,
    save_checkpoint,
    set_up_training,
    start_path,
)
from cli import launch, parse_flags
from model.checkpoint import load_video_language_model
from model.tokenizer import open_tokenizer
from trainer.distributed import setup
from trainer.dry_run import dry_run
from trainer.engine import fit


def main(argv: list[str] | None = None) -> dict:
    """The stage from its command line to its checkpoint; returns the last line of metrics.

    Raises ValueError for what doesn't fit together, before anything is written, and what `fit`
    raises.
    """
    config = parse_flags(
        StageConfig,
        __doc__,
        argv,
        run_name="sft_videolm_{dim}",
        freeze_llm=0,
        learning_rate=2e-4,
    )
    with setup(config.device, config.timeout) as world:
        tokenizer = open_tokenizer(config.tokenizer_path)
        visuals = open_visuals(config)

        # The whole model of the stage before
        start = start_path(config, "pretrain_videolm_{dim}.pth", "run train_pretrain.py first")
        if config.from_scratch:
            model = build_model(config, tokenizer, visuals)
        else:
            model = load_video_language_model(start)
            model.vision_tower = visuals.tower
            check_start(model, start, config, tokenizer, visuals)
        set_up_training(model, config, world)  # --freeze_llm 0: all but the vision tower

        loader = partial(build_loader, config=config, tokenizer=tokenizer, model=model, world=world)
        val_loader = loader(config.val_path, visuals.val) if config.val_path else None
        train_loader = loader(config.data_path, visuals.train, shuffle=not config.dry_run)
        if config.dry_run:
            return dry_run(model, train_loader, config, world)

        save = partial(save_checkpoint, model, config)
        samples = train_loader.dataset.samples
        lineage = describe_lineage(config, start, tokenizer, visuals, samples)
        return fit(model, train_loader, val_loader, config, world, save, lineage)


if __name__ == "__main__":
    launch(main)
