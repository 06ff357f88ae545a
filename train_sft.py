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
    start = start_path(config, "pretrain_videolm_{dim}.pth")
    with setup(config.device, config.timeout) as world:
        tokenizer = open_tokenizer(config.tokenizer_path)
        visuals = open_visuals(config)

        # The whole model of the stage before
        if config.from_scratch:
            model = build_model(config, tokenizer, visuals)
        elif not start.is_file():
            raise ValueError(
                f"{start}: no such checkpoint; run train_pretrain.py first, or name one with "
                "--load_from"
            )
        else:
            model = load_video_language_model(start)
            model.vision_tower = visuals.tower
            check_start(model, start, config, tokenizer, visuals)
        set_up_training(model, config)  # --freeze_llm 0: all but the vision tower
        counts = ", ".join(f"{name} {n:,}" for name, n in model.parameter_counts().items())
        world.print_rank0(f"parameters: {counts}")

        loader = partial(build_loader, config=config, tokenizer=tokenizer, model=model, world=world)
        val_loader = loader(config.val_path, visuals.val) if config.val_path else None
        if config.dry_run:
            return dry_run(model, loader(config.data_path, visuals.train), config, world)
        train_loader = loader(config.data_path, visuals.train, shuffle=True)

        save = partial(save_checkpoint, model, config)
        lineage = describe_lineage(config, start, tokenizer, visuals)
        return fit(model, train_loader, val_loader, config, world, save, lineage)


if __name__ == "__main__":
    launch(main)
