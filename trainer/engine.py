"""The training loop. Both stages call `fit`; what they train on what is decided before.

`train_step` is one optimizer step, from the micro-batches to the moved weights. `fit` repeats it
and, once in a while, evaluates, logs and saves.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from device import choose_dtype, to_device
from trainer.checkpoint import Checkpoints, Progress, TrainingStopped
from trainer.config import TrainConfig
from trainer.distributed import World
from trainer.interrupt import StopRequest
from trainer.logger import MetricsLogger
from trainer.optim import Optimizers, learning_rate_factor

Batch = dict[str, Any]  # "inputs" for the model's forward, counts, "sample_ids", "bad"

# A share of bad samples means nothing before so many were seen (or an epoch ended).
SAMPLES_TO_JUDGE = 200


@dataclass
class StepStats:
    """One step: sums over all processes, and what the device may still be computing."""

    supervised: float  # tokens that the loss is taken of
    real: float  # tokens that aren't padding
    padded: float  # tokens with padding
    samples: float  # bad ones included
    bad: float  # samples that can't be decoded
    stopping: float  # processes that were asked to stop
    step: int = 0
    losses: list[Tensor] = field(default_factory=list)  # this process's, of each micro-batch
    sample_ids: list[list[str]] = field(default_factory=list)  # the same
    grad_norm: Tensor = torch.zeros(())  # on its way to the CPU,
    arrived: torch.cuda.Event | None = None  # where it is after this


class SummedLoss(nn.Module):
    """A model's loss of a batch, from which every process can go backward.

    `anchor` is 0, and no optimizer has it. With it there is a gradient where the model gives none:
    for text under a frozen language model, or for no batch at all, as every sample is bad.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        learning = next(p for p in model.parameters() if p.requires_grad)
        self.anchor = nn.Parameter(learning.new_zeros(()))

    def forward(self, inputs: dict[str, Any]) -> Tensor:
        return self.anchor + (self.model(**inputs).loss if inputs else 0.0)


def train_step(
    model: nn.Module,
    micro_batches: list[Batch],
    optimizers: Optimizers,
    scaler: torch.amp.GradScaler,
    config: TrainConfig,
    world: World,
    step: int,
    stopping: bool = False,
) -> StepStats:
    """One optimizer step on the micro-batches of all processes; model: a distributed SummedLoss.

    Nothing is trained where no process has a supervised token (every sample is bad), or where one
    is `stopping`; no weight moves where a gradient isn't finite. Nothing here waits for a GPU.
    """
    keys = ("supervised_tokens", "real_tokens", "padded_tokens")
    tokens = [sum(batch[key] for batch in micro_batches) for key in keys]
    bad = sum(len(batch["bad"]) for batch in micro_batches)
    samples = sum(len(batch["sample_ids"]) for batch in micro_batches) + bad
    stats = StepStats(*world.all_reduce_sum(*tokens, samples, bad, stopping), step)
    if stats.stopping or not stats.supervised:
        return stats

    torch.manual_seed(config.seed + step * world.size + world.rank)  # dropout
    for batch in micro_batches:
        model.require_backward_grad_sync = batch is micro_batches[-1]
        loss = compute_loss(model, batch, config.dtype, world.device)
        # Each token weighs the same, in whichever micro-batch or process it stands.
        with world.exchange():
            scaler.scale(loss / stats.supervised).backward()
        stats.losses.append(loss.detach())
        stats.sample_ids.append(batch["sample_ids"])

    grad_norm = optimizers.clip_gradients(scaler, config.grad_clip)
    optimizers.step(scaler, grad_norm)
    optimizers.zero_grad()
    stats.grad_norm = grad_norm.to("cpu", non_blocking=True)
    stats.arrived = torch.cuda.current_stream().record_event() if grad_norm.is_cuda else None
    return stats


def compute_loss(model: nn.Module, batch: Batch, dtype: str, device: torch.device) -> Tensor:
    """A SummedLoss of one batch, under autocast; the model's own loss stays in float32."""
    inputs = to_device(batch["inputs"], device)
    with torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32"):
        return model(inputs)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Iterable[Batch],
    config: TrainConfig,
    world: World,
    logger: MetricsLogger,
) -> float:
    """Mean loss a supervised token of held-out data; NaN if none of it can be decoded.

    Sums over processes come before the division: how the data is cut into batches has no say.
    """
    model.eval()
    loss_sum, tokens, bad = 0.0, 0, []
    for batch in loader:
        bad += batch["bad"]
        loss_sum += compute_loss(model, batch, config.dtype, world.device)
        tokens += batch["supervised_tokens"]
    model.train()
    logger.log_bad_samples(bad)
    loss_sum, tokens = world.all_reduce_sum(float(loss_sum), tokens)
    return loss_sum / tokens if tokens else math.nan


def fit(
    model: nn.Module,
    train_loader: Iterable[Batch],
    val_loader: Iterable[Batch] | None,
    config: TrainConfig,
    world: World,
    copy_weights: Callable[[Path, dict[str, Any]], Callable[[], None]],
    lineage: dict[str, Any],
) -> dict[str, Any]:
    """Trains `model` in place and returns the last line of metrics.

    `model(**batch["inputs"]).loss` is the *sum* of the cross-entropy over the batch's supervised
    tokens. `train_loader.batch_sampler` has `plan_for(processes)` and `set_epoch(epoch, skip)`.
    `copy_weights(path, meta)` returns what writes them or raises OSError. `lineage` (what the data
    and the first weights are) goes into the checkpoint and into the state, so that a resumed run is
    the same run. Raises TrainingStopped and StoppedBySignal as these classes say, ProcessLost where
    another process is gone, ValueError if the processes differ, another training writes to the
    run's folder, or its state is of another.
    """
    config.dtype = choose_dtype(config.dtype, world.device)
    world.check_consistent({**config.shared(), **lineage, "validation": val_loader is not None})
    checkpoints = Checkpoints(config, world, lineage, copy_weights)
    name, weights_path = config.run_name, checkpoints.weights_path
    with checkpoints.open_folder(), StopRequest(verbose=world.is_main) as stop:
        # ---- where the run stands
        state, progress = checkpoints.load(), Progress()
        if state:
            progress = Progress(**state["progress"])
            if state["finished"]:
                world.print_rank0(f"{name}: already finished, {weights_path} stands")
                return progress.metrics
        plan = plan_steps(train_loader, config, checkpoints.processes)
        accumulation_steps, steps_per_epoch, total_steps = plan

        # ---- model, optimizers and log, as they were
        model.to(world.device).train()
        optimizers = Optimizers(model, config)
        scaler = torch.amp.GradScaler(world.device.type, enabled=config.dtype == "float16")
        learning = {"model": model, "optimizers": optimizers, "scaler": scaler}
        if state:
            for key, part in learning.items():
                part.load_state_dict(state[key])
            del state
        trainee = world.distribute(SummedLoss(model))
        checkpoints.remove_leftovers(progress.step)
        logger = MetricsLogger(config, world, progress.step, total_steps, progress.tracker_id)
        world.print_rank0(f"{name}: {optimizers.description}; on {world.device} in {config.dtype}")
        world.print_rank0(f"{name}: steps {progress.step} to {total_steps}")

        batches = step_batches(train_loader, progress.step, steps_per_epoch, accumulation_steps)
        stats, last = None, False
        while not last:
            # ---- one optimizer step
            started = time.perf_counter()
            micro_batches = next(batches)
            waited = time.perf_counter() - started
            schedule = (config.warmup_iters, config.schedule)
            rate = learning_rate_factor(progress.step, total_steps, *schedule)
            optimizers.set_learning_rates(rate)
            previous, stopping = stats, stop.signum is not None
            stats = train_step(
                trainee, micro_batches, optimizers, scaler, config, world, progress.step, stopping
            )
            # The step before has surely been computed by now, while the device has work.
            check_finite(previous, scaler, world)
            checkpoints.check_writing()
            if stats.stopping:  # this process, or another one
                if progress.step:  # else there is nothing to save
                    checkpoints.save(progress, learning, False, logger.draw_curves)
                    checkpoints.check_writing(wait=True)
                stop.exit(progress.step, total_steps)
            progress.step += 1
            progress.samples_seen += int(stats.samples)
            progress.samples_bad += int(stats.bad)
            logger.count_step(stats, waited)
            if stats.bad:
                logger.log_bad_samples([bad for batch in micro_batches for bad in batch["bad"]])
            ends_epoch = progress.step % steps_per_epoch == 0
            if progress.samples_seen >= SAMPLES_TO_JUDGE or ends_epoch:
                check_skipped_fraction(progress, config, logger)

            # ---- once in a while: evaluate, log, save
            last = progress.step == total_steps
            evaluating, saving, logging = (
                last or (interval > 0 and progress.step % interval == 0)
                for interval in (config.eval_interval, config.save_interval, config.log_interval)
            )
            if not (evaluating or saving or logging):
                continue
            check_finite(stats, scaler, world)
            metrics = {
                "step": progress.step,
                "epoch": round(progress.step / steps_per_epoch, 4),
                **logger.window_means(),
                "lr": config.learning_rate * rate,
                "grad_norm": stats.grad_norm.item(),
                "bad_samples": progress.samples_bad,
            }
            if evaluating and val_loader is not None:
                metrics["val_loss"] = evaluate(trainee, val_loader, config, world, logger)
                improved = progress.count_validation(metrics["val_loss"])
                last = last or 0 < config.patience <= progress.validations_since_best
                saving = saving or last or (config.patience and improved)
            progress.metrics = logger.log(metrics)
            if saving:
                checkpoints.save(progress, learning, last, logger.draw_curves)
            logger.restart_window()

        checkpoints.check_writing(wait=True)
        logger.close(progress, weights_path)
        return progress.metrics


def plan_steps(
    loader: Iterable[Batch], config: TrainConfig, processes: int
) -> tuple[int, int, int]:
    """Micro-batches a step, steps an epoch and steps in all, of a run of that many processes.

    What a step is follows from the number of processes that the run started with. Others that
    resume it cut the same batches in another way. Raises ValueError if there is no batch.
    """
    accumulation_steps = config.accumulation_steps * loader.batch_sampler.plan_for(processes)
    steps_per_epoch = math.ceil(len(loader) / accumulation_steps)
    total_steps = min(config.epochs * steps_per_epoch, config.max_steps or math.inf)
    if total_steps == 0:
        raise ValueError("the training data gives no batch; add samples")
    return accumulation_steps, steps_per_epoch, total_steps


def step_batches(
    loader: Iterable[Batch], step: int, steps_per_epoch: int, accumulation_steps: int
) -> Iterator[list[Batch]]:
    """The micro-batches of each step from `step` on, endlessly; each epoch has its own order."""
    epoch, done = divmod(step, steps_per_epoch)
    while True:
        loader.batch_sampler.set_epoch(epoch, done * accumulation_steps)
        batches = iter(loader)
        for _ in range(done, steps_per_epoch):
            yield list(islice(batches, accumulation_steps))
        epoch, done = epoch + 1, 0


def check_skipped_fraction(progress: Progress, config: TrainConfig, logger: MetricsLogger) -> None:
    """Raises TrainingStopped if more than --max_skipped_fraction of the samples were skipped."""
    if progress.samples_bad > config.max_skipped_fraction * progress.samples_seen:
        raise TrainingStopped(
            f"{progress.samples_bad} of {progress.samples_seen} samples can't be decoded, more "
            f"than --max_skipped_fraction {config.max_skipped_fraction}; they are named in "
            f"{logger.quarantine_path}"
        )


def check_finite(stats: StepStats | None, scaler: torch.amp.GradScaler, world: World) -> None:
    """Raises TrainingStopped, with the samples of the micro-batches whose loss isn't finite (of
    all, where only a gradient isn't), but not for float16's overflows: these it meets by design."""
    if stats is None:
        return
    if stats.arrived:
        stats.arrived.synchronize()
    if stats.grad_norm.isfinite():
        return
    (loss,) = world.all_reduce_sum(float(sum(stats.losses)) / stats.supervised)
    if math.isfinite(loss) and scaler.is_enabled():
        return
    suspects = [
        name
        for ids, own in zip(stats.sample_ids, stats.losses, strict=True)
        if math.isfinite(loss) or not own.isfinite()
        for name in ids
    ]
    raise TrainingStopped(
        f"step {stats.step + 1}: loss {loss}, gradient norm {stats.grad_norm}; it moved no weight. "
        f"Samples: {', '.join(world.gather_objects(suspects))}. Look at them, lower the learning "
        "rate or try --dtype float32"
    )
