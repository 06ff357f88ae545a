"""The training loop. Both stages run it; what they train on what is decided before they call it.

One update reads top to bottom in `train`: take the micro-batches, count their supervised tokens
over all processes, run forward and backward, sum the gradients, clip, check, step. Around it
stands what happens once in a while: an epoch begins, a validation, a line of metrics, a checkpoint.
"""

import itertools
import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from device import choose_dtype
from trainer.checkpoint import find_state, forget_after, list_states, save_state
from trainer.config import TrainConfig
from trainer.distributed import World, code_fingerprint, is_restarted
from trainer.interrupt import StopRequest
from trainer.logger import Journal, losses_of
from trainer.optim import Optimizers, rate_factor

Batch = dict[str, Any]  # "inputs" for the model's forward, counts, "sample_ids", "bad"

# A share of bad samples means nothing before so many were seen (or an epoch ended).
SAMPLES_TO_JUDGE = 200


class TrainingStopped(ValueError):
    """Training can't go on: a loss that isn't a number, too much data that can't be read, or a
    checkpoint that can't be written."""


class StoppedBySignal(SystemExit):
    """Somebody asked the run to end and it has saved; the code is the shell's for that signal."""


def train(
    model: nn.Module,
    train_loader: Iterable[Batch],
    val_loader: Iterable[Batch] | None,
    config: TrainConfig,
    world: World,
    save_weights: Callable[[Path, dict[str, Any]], None],
    lineage: dict[str, Any],
) -> dict[str, Any]:
    """Trains `model` in place and returns the last line of metrics.

    `model(**batch["inputs"]).loss` is the *sum* of the cross-entropy over the batch's supervised
    tokens. `train_loader.batch_sampler` has `plan_for(processes)`, `set_epoch(epoch)` and
    `skip(batches)`. `save_weights(path, meta)` writes a checkpoint; `lineage` (what the data and
    the first weights are) goes into it and into the state, so that a resumed run is the same run.
    Raises TrainingStopped and StoppedBySignal as these classes say, ValueError if there is nothing
    to train on, the processes differ, or the state found belongs to another run.
    """
    device, run = world.device, config.run_name
    config.dtype = choose_dtype(config.dtype, device)
    weights_path = Path(config.out_dir) / f"{run}.pth"
    folder = Path(config.out_dir) / run
    identity = {**config.identity(), **lineage}
    world.check_consistent(
        {**config.shared(), **lineage, "validation": val_loader is not None}
        | {"code": code_fingerprint(), "torch": torch.__version__}
    )
    # The main process alone reads: the others may be on machines that don't see its disk, and all
    # must begin at the same update.
    state = None
    if world.is_main:
        # A process that torchrun started anew goes on, whatever the first one was told.
        resume = "auto" if is_restarted() and list_states(folder) else config.resume
        state = find_state(folder, resume, identity)
    state = world.broadcast_object(state)

    # What an update is follows from the number of processes that the run began with. Others that
    # take it up cut the same batches in another way.
    processes = state["processes"] if state else world.size
    accumulation_steps = config.accumulation_steps * train_loader.batch_sampler.plan_for(processes)
    steps_an_epoch = math.ceil(len(train_loader) / accumulation_steps)
    total_steps = min(config.epochs * steps_an_epoch, config.max_steps or math.inf)
    if total_steps == 0:
        raise ValueError("the training data gives no batch; lower --batch_size or add samples")
    if state and state["finished"]:
        if world.broadcast_object(weights_path.is_file()):
            world.print_rank0(f"{run}: already finished, {weights_path} stands; nothing to do")
            return state["metrics"]
        state = None  # its weights were taken away: somebody wants them made again

    model.to(device).train()
    optimizers = Optimizers(model, config)
    scaler = torch.amp.GradScaler(device.type, enabled=config.dtype == "float16")

    # Loop state: all that a resumed run needs to go on as if nothing had happened. Randomness isn't
    # in it: the data order follows from (seed, epoch), dropout from (seed, step).
    step = 0  # updates done, skipped ones included
    samples_seen, samples_bad = 0, 0
    # The lowest validation loss, the update that had it, and the validations since.
    best_loss, best_step, stale = math.inf, 0, 0
    if state:
        model.load_state_dict(state["model"])
        optimizers.load_state_dict(state["optimizers"])
        scaler.load_state_dict(state["scaler"])
        step = state["step"]
        samples_seen, samples_bad = state["samples_seen"], state["samples_bad"]
        best_loss, best_step, stale = state["validations"]
    world.broadcast_tensors(model.state_dict().values())
    if world.is_main:
        forget_after(folder, step)
        for suffix in ("pth", "json"):  # what a kill in mid-write left of the weights
            for half in weights_path.parent.glob(f".{run}.{suffix}.*"):
                half.unlink()
    world.print_rank0(f"{run}: {optimizers.description}; on {device} in {config.dtype}")
    world.print_rank0(f"{run}: updates {step} to {total_steps}")
    if config.warmup_iters >= total_steps:
        world.print_rank0(
            f"warning: the run ends within its warm-up and never reaches its rates: lower "
            f"--warmup_iters {config.warmup_iters}"
        )

    journal = Journal(config, world.is_main, step, total_steps, state and state["journal"])
    batches = None
    metrics: dict[str, Any] = state["metrics"] if state else {}

    def save(last: bool) -> None:
        """Weights, then the state that makes them part of the run."""
        if not world.is_main:
            return
        state = {"step": step, "identity": identity, "processes": processes, "metrics": metrics}
        state["finished"] = last
        if not last:  # a finished run needs no more than the mark that it is finished
            state |= {
                "model": model.state_dict(),
                "optimizers": optimizers.state_dict(),
                "scaler": scaler.state_dict(),
                "samples_seen": samples_seen,
                "samples_bad": samples_bad,
                "validations": (best_loss, best_step, stale),
                "journal": journal.state(),
            }
        try:
            journal.sync()
            if not config.patience or best_step in (0, step):  # else the best ones stay
                save_weights(weights_path, {"step": step, "metrics": metrics, "lineage": lineage})
            save_state(folder, state, keep=1 if last else config.keep_last)
        except (OSError, RuntimeError) as error:  # torch.save tells of a full disk by the latter
            good = list_states(folder)
            raise TrainingStopped(
                f"the checkpoint of update {step} can't be written: {error}\n"
                f"The last good one is {good[0] if good else 'none yet'}. Free space or mend the "
                "folder's permissions; the same command then goes on from there."
            ) from error

    with StopRequest(loud=world.is_main) as stop:
        while step < total_steps:
            # ---- once an epoch: a new order (or, resumed in its middle, the rest of the old one)
            epoch, step_in_epoch = divmod(step, steps_an_epoch)
            if batches is None or step_in_epoch == 0:
                train_loader.batch_sampler.set_epoch(epoch)
                train_loader.batch_sampler.skip(step_in_epoch * accumulation_steps)
                batches = iter(train_loader)

            # ---- one update
            waiting = time.perf_counter()
            micro_batches = take(batches, accumulation_steps, stop)
            waited = time.perf_counter() - waiting
            *sums, stopping = world.all_reduce_sum(*count(micro_batches), stop.came())
            if stopping:
                leave(step, total_steps, save, stop, world)
            tokens, real, padded, seen, bad = sums
            samples_seen, samples_bad = samples_seen + seen, samples_bad + bad
            if bad:
                journal.quarantine(
                    world.gather_objects([b for part in micro_batches for b in part["bad"]])
                )
            judge = samples_seen >= SAMPLES_TO_JUDGE or step_in_epoch + 1 == steps_an_epoch
            if judge and samples_bad > config.max_skipped_fraction * samples_seen:
                raise TrainingStopped(
                    f"{samples_bad:.0f} of {samples_seen:.0f} samples can't be decoded, more than "
                    f"--max_skipped_fraction {config.max_skipped_fraction}; they are named "
                    f"in {journal.quarantine_path}"
                )

            loss = grad_norm = 0.0
            rate = rate_factor(step, total_steps, config.warmup_iters, config.schedule)
            filled = [batch for batch in micro_batches if batch["inputs"]]
            if tokens:  # else every sample of every process was bad: an update without a step
                torch.manual_seed(config.seed + step * world.size + world.rank)
                optimizers.set_rates(rate)
                losses = []
                for batch in filled:
                    loss_sum = loss_of(model, batch, config, device)
                    # Each token weighs the same, in whichever micro-batch or process it stands.
                    if loss_sum.requires_grad:  # text under a frozen model teaches nothing
                        scaler.scale(loss_sum / tokens).backward()
                    losses.append(loss_sum.detach())
                world.all_reduce_gradients(optimizers.parameters)
                grad_norm = optimizers.unscale_and_clip(scaler, config.grad_clip).item()
                (loss,) = world.all_reduce_sum(float(sum(losses)) / tokens)
                # float16 overflows now and then by design: the scaler skips such a step by itself.
                if not math.isfinite(loss) or not (math.isfinite(grad_norm) or scaler.is_enabled()):
                    raise TrainingStopped(blame(filled, losses, loss, grad_norm, step, world))
                optimizers.step(scaler)
                optimizers.zero_grad()
            step += 1
            journal.count(
                loss=loss * tokens, supervised=tokens, real=real, padded=padded, waited=waited
            )

            # ---- once in a while: validate, log, save
            last = step == total_steps
            evaluating, saving, logging = (
                last or (interval > 0 and step % interval == 0)
                for interval in (config.eval_interval, config.save_interval, config.log_interval)
            )
            if evaluating or saving or logging:
                metrics = {
                    "step": step,
                    "epoch": round(step / steps_an_epoch, 4),
                    **journal.figures(),
                    "lr": config.learning_rate * rate,
                    "grad_norm": grad_norm,
                    "bad_samples": int(samples_bad),
                }
                if evaluating and val_loader is not None:
                    metrics |= evaluate(model, val_loader, config, world, journal)
                    if metrics.get("val_loss", math.inf) < best_loss:
                        best_loss, best_step, stale = metrics["val_loss"], step, 0
                    else:
                        stale += 1
                    last = last or 0 < config.patience <= stale
                    saving = saving or last or (config.patience and best_step == step)
                metrics = journal.log(metrics)
                if saving:
                    save(last)
                    journal.draw()
                journal.open_window()
                if last:
                    break

    journal.close()
    if step < total_steps:
        world.print_rank0(
            f"{run}: stopped, {stale} validations without a val_loss under {best_loss:.4f}"
        )
    of = f" of update {best_step}" if config.patience and best_step else ""
    where = f"; weights{of} in {weights_path}" if weights_path.is_file() else ""  # none: a dry run
    world.print_rank0(f"{run}: {losses_of(metrics)}{where}")
    return metrics


def take(batches: Iterator[Batch], number: int, stop: StopRequest) -> list[Batch]:
    """The next micro-batches, fewer at an epoch's end."""
    try:
        return list(itertools.islice(batches, number))
    except RuntimeError:
        # Slurm signals every process of a job: the loader's workers are gone before we have heard.
        if not stop.came(within=1.0):
            raise
        return []


def leave(
    step: int, total_steps: int, save: Callable[[bool], None], stop: StopRequest, world: World
) -> None:
    """Ends a run that somebody wants ended; the state holds all updates done so far."""
    name = signal.Signals(stop.signum).name if stop.signum else "a signal to another process"
    if step:
        save(False)
        world.print_rank0(
            f"{name}: saved update {step} of {total_steps}; the same command goes on from there"
        )
    else:
        world.print_rank0(f"{name}: left before the first update, nothing to save")
    raise StoppedBySignal(128 + (stop.signum or signal.SIGTERM))


def count(batches: list[Batch]) -> tuple[int, ...]:
    """Supervised tokens, real tokens, tokens with padding, samples met, samples bad."""
    keys = ("supervised_tokens", "real_tokens", "padded_tokens")
    bad = sum(len(batch["bad"]) for batch in batches)
    good = sum(len(batch["sample_ids"]) for batch in batches)
    return *(sum(batch[key] for batch in batches) for key in keys), good + bad, bad


def loss_of(model: nn.Module, batch: Batch, config: TrainConfig, device: torch.device):
    """Summed loss of one batch, under autocast; the model's own loss stays in float32."""
    inputs = {
        name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in batch["inputs"].items()
    }
    dtype = getattr(torch, config.dtype)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        return model(**inputs).loss


@torch.no_grad()
def evaluate(
    model: nn.Module, loader: Iterable[Batch], config: TrainConfig, world: World, journal: Journal
) -> dict[str, float]:
    """Mean loss a supervised token of held-out data; nothing if none of it can be decoded.

    Sums over processes come before the division: how the data is cut into batches has no say.
    """
    model.eval()
    loss_sum, tokens, bad = 0.0, 0, []
    for batch in loader:
        bad += batch["bad"]
        if batch["inputs"]:
            loss_sum += loss_of(model, batch, config, world.device)
            tokens += batch["supervised_tokens"]
    model.train()
    journal.quarantine(world.gather_objects(bad))
    loss_sum, tokens = world.all_reduce_sum(float(loss_sum), tokens)
    if not tokens:  # training goes on: its weights are worth more than the figure
        world.print_rank0(
            "warning: no sample of the validation can be read, so there is no val_loss; "
            f"why stands in {journal.quarantine_path}"
        )
        return {}
    return {"val_loss": loss_sum / tokens}


def blame(
    batches: list[Batch], losses: list, loss: float, grad_norm: float, step: int, world: World
) -> str:
    """Names the samples of the micro-batches whose own loss isn't finite; of all of them where only
    the gradient isn't."""
    sick = [b for b, part in zip(batches, losses, strict=True) if not math.isfinite(float(part))]
    ids = names_of(batches if math.isfinite(loss) else sick, world)
    return (
        f"update {step + 1}: loss {loss}, gradient norm {grad_norm}; nothing was updated. Samples: "
        f"{', '.join(ids)}. Look at them, lower the learning rate or try --dtype float32"
    )


def names_of(batches: list[Batch], world: World) -> list[str]:
    return world.gather_objects([name for batch in batches for name in batch["sample_ids"]])
