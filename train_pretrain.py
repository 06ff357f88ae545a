"""Stage 1, pretraining: a language model learns to read what the vision tower sees.

It starts from a language model (`out/lm_512.pth`) that knows no picture, and from a random video
summary and projector. With `--freeze_llm 2`, the default, only these two learn, from captions: the
language model keeps its language. `--from_scratch` starts a small language model from random
weights instead and trains it along, as the quickstart does.

    python train_pretrain.py --data_path captions.jsonl --images_path videos
    torchrun --nproc_per_node 4 train_pretrain.py --data_path captions.jsonl --use_feature \\
        --features_path dataset/features --dim 768

Writes out/pretrain_videolm_512.pth and .json, logs to out/pretrain_videolm_512/.
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
from model.checkpoint import load_language_model
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
        run_name="pretrain_videolm_{dim}",
        freeze_llm=2,
        learning_rate=1e-3,  # few parameters, and random ones: they bear a high rate
    )
    with setup(config.device, config.timeout) as world:
        tokenizer = open_tokenizer(config.tokenizer_path)
        visuals = open_visuals(config)

        # A language model that has seen no picture, under a random summary and projector
        fix = "put MiniMind's weights there, or give --from_scratch --freeze_llm 0"
        start = start_path(config, "lm_{dim}.pth", fix)
        if config.from_scratch:
            model = build_model(config, tokenizer, visuals)
        else:
            language_model = load_language_model(start)
            world.print_rank0(str(language_model.load_report))  # its generation, what was assumed
            model = build_model(config, tokenizer, visuals, language_model)
            check_start(model, start, config, tokenizer, visuals)
        set_up_training(model, config, world)  # --freeze_llm 2: summary and projector alone

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
