"""What does summing the gradients cost, and how much of it does the backward pass hide?

    torchrun --standalone --nproc_per_node 4 -m benchmarks.all_reduce     # gloo over loopback

Every process goes backward through a model of real size, from a batch of about --tokens tokens:
without a sum; `then sum`, one all-reduce of all gradients in one piece after it; and `overlapped`,
as in training: DistributedDataParallel sums a bucket as soon as it is complete. Prints medians over
the steps, each step as long as its slowest process.
"""

import argparse
import statistics
import tempfile
import time

import torch
import torch.distributed as dist

from benchmarks.train_step import Source, make_batches, make_model, make_samples
from trainer.distributed import World, setup
from trainer.engine import SummedLoss, compute_loss

WAYS = {"alone": (False, False), "then sum": (False, True), "overlapped": (True, False)}


def compare(dim: int, n_layers: int, batch: dict, steps: int, world: World) -> None:
    model = make_model(dim, n_layers).to(world.device)
    module = world.distribute(SummedLoss(model))
    parameters = list(model.parameters())
    seconds = {way: [] for way in WAYS}
    for _ in range(steps + 1):  # taking turns; the first one makes code and memory
        for way, (overlap, sum_after) in WAYS.items():
            model.zero_grad()
            module.require_backward_grad_sync = overlap
            dist.barrier()
            started = time.perf_counter()
            compute_loss(module, batch, "float32", world.device).backward()
            if sum_after:
                dist.all_reduce(torch.cat([p.grad.flatten() for p in parameters]))
            if world.device.type == "cuda":
                torch.cuda.synchronize()
            seconds[way].append(max(world.gather_objects([time.perf_counter() - started])))
    alone, then, overlapped = (statistics.median(times[1:]) for times in seconds.values())
    world.print_rank0(
        f"{dim} x {n_layers}: {4 * sum(p.numel() for p in parameters) / 1e6:.1f} MB of gradients; "
        f"backward {alone:.2f} s, then sum {then - alone:+.2f} s, "
        f"overlapped {overlapped - alone:+.2f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--steps", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with setup() as world, tempfile.TemporaryDirectory() as folder:
        samples = make_samples(7, folder)
        (batch,) = make_batches(samples, Source(1), 1, tokens=args.tokens, max_length=args.tokens)
        world.print_rank0(f"{world.size} processes, {batch['real_tokens']} tokens each")
        for size in ((512, 8), (768, 16)):
            compare(*size, batch, args.steps, world)


if __name__ == "__main__":
    main()
