"""Two optimizer steps that leave nothing behind, and what they tell about the whole run."""

import dataclasses
import math
import resource
import sys
import tempfile
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from device import peak_flops
from trainer.config import TrainConfig
from trainer.distributed import World
from trainer.engine import fit, plan_steps

STEPS = 2  # the first one is slower: code is made, memory is taken, workers start


def dry_run(
    model: nn.Module, loader: DataLoader, config: TrainConfig, world: World
) -> dict[str, Any]:
    """Trains for two steps in a temporary folder and prints what the whole run will cost.

    `loader` gives the batches of the longest rows first, so the memory is the most that a batch
    takes; its sampler has `lengths`, every row's estimated tokens. Returns the second step's line
    of metrics.
    """
    sampler = loader.batch_sampler
    _, steps_per_epoch, steps = plan_steps(loader, config, world.size)
    (tokens,) = world.all_reduce_sum(sum(int(sampler.lengths[batch].sum()) for batch in sampler))

    with tempfile.TemporaryDirectory() as folder:
        short = dataclasses.replace(
            config,
            out_dir=world.broadcast_state(folder),
            epochs=STEPS,  # an epoch has at least one
            max_steps=STEPS,
            log_interval=1,  # the figures are those of the second step alone
            patience=0,
            tracker="none",
            use_wandb=False,
        )
        metrics = fit(model, loader, None, short, world, lambda path, meta: int, {})

    speed, tokens_per_step = metrics["tokens_per_second"], tokens / steps_per_epoch
    hours, minutes = divmod(math.ceil(steps * tokens_per_step / speed / 60), 60)
    parameters = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # A weight costs 2 operations a token forward, 2 for the gradient that goes through it, 2 for
    # its own (Kaplan et al., arXiv 2001.08361). The tower and the summary see no text.
    learner = model.language_model.parameters()
    flops = sum(p.numel() * (6 if p.requires_grad else 4) for p in learner) * speed / world.size
    peak = peak_flops(world.device, short.dtype)  # by now it is never "auto"
    memory = peak_memory(world.device) / 2**20
    world.print_rank0(
        f"dry run: {STEPS} steps with the longest rows; nothing is written\n"
        f"  parameters  {parameters:,}, of which {trainable:,} learn\n"
        f"  memory      {memory:,.0f} MB at most, of this process\n"
        f"  speed       {speed:,.0f} tokens/s, {metrics['data_wait']:.0%} of the time waiting for "
        "data\n"
        f"  MFU         {flops / peak:.0%}: {flops / 1e12:.3g} TFLOP/s a process, of "
        f"{peak / 1e12:.3g} in plain {short.dtype} products\n"
        f"  the run     {steps:,} steps of about {tokens_per_step:,.0f} tokens: "
        f"{hours} h {minutes} min, without validation"
    )
    return metrics


def peak_memory(device: torch.device) -> int:
    """Bytes that the process, or its part of the device, held at most."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
