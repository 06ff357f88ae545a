"""One process or many: the same calls, which do nothing when there is one.

`torchrun --nproc_per_node N train_sft.py …` starts N processes, each with a share of every batch.
Gradients are summed here, by hand, after the last micro-batch, instead of by
DistributedDataParallel: a text-only batch gives the video summary no gradient, and a batch of
undecodable videos gives none at all; both would leave DDP's peers waiting. At this model's size
(0.1 to 0.4 GB of gradients) the overlap that DDP would buy is small.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from trainer.device import choose_device


@dataclass(frozen=True)
class World:
    """This process's place among all: `rank` of `size`, and the device it computes on."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def say(self, text: str) -> None:
        """Prints once, not once a process."""
        if self.is_main:
            print(text, flush=True)

    def sum(self, *values: float) -> list[float]:
        """Each value summed over the processes (float64: token counts stay exact)."""
        if self.size == 1:
            return [float(value) for value in values]
        totals = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(totals)
        return totals.tolist()

    def gather(self, items: list[Any]) -> list[Any]:
        """The processes' lists, joined in order of rank, on every process."""
        if self.size == 1:
            return items
        parts: list[list[Any]] = [[] for _ in range(self.size)]
        dist.all_gather_object(parts, items)
        return [item for part in parts for item in part]

    def sum_gradients(self, parameters: list[torch.nn.Parameter]) -> None:
        """Every gradient becomes its sum over the processes.

        A parameter that got no gradient anywhere keeps None, as it would with one process: the
        optimizer must not move it. Whether somebody has one travels in the same message.
        """
        if self.size == 1:
            return
        has = torch.tensor([float(p.grad is not None) for p in parameters], device=self.device)
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([has, *(grad.reshape(-1) for grad in grads)])
        dist.all_reduce(flat)
        has, *sums = flat.split([len(parameters), *(p.numel() for p in parameters)])
        for p, holders, total in zip(parameters, has.tolist(), sums, strict=True):
            p.grad = total.view_as(p) if holders else None

    def broadcast(self, tensors: Iterable[torch.Tensor]) -> None:
        """All processes start from the main process's values."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), src=0)

    def close(self) -> None:
        if self.size > 1:
            dist.barrier()  # the main process may still be writing the last checkpoint
            dist.destroy_process_group()


def setup(device: str = "auto") -> World:
    """Joins the processes that torchrun started, as its environment variables say; or is alone."""
    chosen = choose_device(device)
    # Every batch has a new shape, and on a CPU oneDNN keeps the code that it made for 1024 of them:
    # gigabytes, which are never used again.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World(chosen)
    if chosen == torch.device("cuda"):
        chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(chosen)
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    return World(chosen, dist.get_rank(), size)
