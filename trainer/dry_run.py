"""Two updates that leave nothing behind, and what they tell about the run that they belong to."""

import dataclasses
import math
import resource
import sys
import tempfile
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from trainer.config import TrainConfig
from trainer.distributed import World
from trainer.engine import train

UPDATES = 2  # the first one is slower: code is made, memory is taken, workers start


def dry_run(
    model: nn.Module, loader: DataLoader, config: TrainConfig, world: World
) -> dict[str, Any]:
    """Trains for two updates in a temporary folder and prints what the whole run will cost.

    `loader` gives the batches of the longest rows first, so the memory is the most that a batch
    takes; its sampler has `lengths`, every row's estimated tokens. Returns the printed figures.
    """
    sampler = loader.batch_sampler
    updates_an_epoch = math.ceil(len(loader) / config.accumulation_steps)
    updates = min(updates_an_epoch * config.epochs, config.max_steps or math.inf)
    micro_batches = list(sampler)
    real = sum(int(sampler.lengths[batch].sum()) for batch in micro_batches)
    padded = sum(int(sampler.lengths[batch].max()) * len(batch) for batch in micro_batches if batch)
    real, padded = world.all_reduce_sum(real, padded)

    with tempfile.TemporaryDirectory() as folder:
        short = dataclasses.replace(
            config,
            out_dir=world.broadcast_object(folder),
            epochs=UPDATES,  # an epoch has at least one
            max_steps=UPDATES,
            log_interval=1,  # the figures are those of the second update alone
            eval_interval=0,
            patience=0,
            resume="never",
            tracker="none",
            use_wandb=False,
        )
        metrics = train(model, loader, None, short, world, lambda path, meta: None, {})

    update_tokens = real / updates_an_epoch
    figures = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "updates": updates,
        "padding": 1 - real / padded,
        "tokens_per_second": metrics["tokens_per_second"],
        "data_wait": metrics["data_wait"],
        "memory_mb": peak_memory(world.device) / 2**20,
        "seconds": updates * update_tokens / metrics["tokens_per_second"],
    }
    hours, minutes = divmod(math.ceil(figures["seconds"] / 60), 60)
    world.print_rank0(
        f"dry run: {UPDATES} updates with the longest rows; nothing is written\n"
        f"  parameters  {figures['parameters']:,}, of which {figures['trainable']:,} learn\n"
        f"  memory      {figures['memory_mb']:,.0f} MB at most, of this process\n"
        f"  speed       {figures['tokens_per_second']:,.0f} tokens/s, "
        f"{figures['data_wait']:.0%} of the time waiting for data\n"
        f"  padding     {figures['padding']:.1%} of an epoch's tokens\n"
        f"  the run     {updates:,} updates of about {update_tokens:,.0f} tokens: "
        f"{hours} h {minutes} min, without validation"
    )
    return figures


def peak_memory(device: torch.device) -> int:
    """Bytes that the process, or its part of the device, held at most."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
