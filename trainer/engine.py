"""The training loop. Both stages call `fit`; what they train on what is decided before.

`train_step` is one optimizer step, from the micro-batches to the moved weights. `fit` repeats it
and, once in a while, evaluates, logs and saves.
"""

import itertools
import math
import secrets
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from device import choose_dtype
from lock import hold_lock
from trainer.checkpoint import find_state, list_states, remove_leftovers, save_state
from trainer.config import TrainConfig
from trainer.distributed import ProcessLost, World, is_restarted
from trainer.interrupt import StopRequest
from trainer.logger import MetricsLogger, format_losses
from trainer.optim import Optimizers, learning_rate_factor

Batch = dict[str, Any]  # "inputs" for the model's forward, counts, "sample_ids", "bad"

# A share of bad samples means nothing before so many were seen (or an epoch ended).
SAMPLES_TO_JUDGE = 200


class TrainingStopped(ValueError):
    """Training can't continue: a loss that isn't finite, too much data that can't be read, or a
    checkpoint that can't be written."""


class StoppedBySignal(SystemExit):
    """Somebody asked the run to end and it has saved; the code is the shell's for that signal."""


@dataclass
class Progress:
    """Where a run stands. With weights and optimizers it is all that a resumed run needs:
    randomness isn't in it, since the data order follows from (seed, epoch), dropout from (seed,
    step)."""

    step: int = 0  # optimizer steps done, skipped ones included
    samples_seen: int = 0
    samples_bad: int = 0
    best_loss: float = math.inf  # the lowest validation loss, and the step that had it
    best_step: int = 0
    validations_since_best: int = 0
    metrics: dict[str, Any] = field(default_factory=dict)  # the last line
    tracker_id: str = field(default_factory=lambda: secrets.token_hex(4))  # one curve, resumed too

    def add_validation(self, loss: float) -> bool:
        """Whether it is the lowest loss so far."""
        improved = loss < self.best_loss
        if improved:
            self.best_loss, self.best_step, self.validations_since_best = loss, self.step, 0
        else:
            self.validations_since_best += 1
        return improved


@dataclass
class StepStats:
    """One step's sums over all processes."""

    supervised: float  # tokens that the loss is taken of
    real: float  # tokens that aren't padding
    padded: float  # tokens with padding
    samples: float  # bad ones included
    bad: float  # samples that can't be decoded
    stopping: float  # processes that were asked to stop
    loss: float = 0.0  # mean of a supervised token
    grad_norm: float = 0.0


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
    """One optimizer step on the micro-batches of all processes.

    Nothing is trained where no process has a supervised token (every sample is bad), or where one
    is `stopping`. Raises TrainingStopped, before any weight moves, if the loss isn't finite.
    """
    stats = count_over_processes(micro_batches, stopping, world)
    if stats.stopping or not stats.supervised:
        return stats

    torch.manual_seed(config.seed + step * world.size + world.rank)  # dropout
    losses = []
    for batch in micro_batches:
        model.require_backward_grad_sync = batch is micro_batches[-1]
        loss = compute_loss(model, batch, config.dtype, world.device)
        # Each token weighs the same, in whichever micro-batch or process it stands.
        with world.exchange():
            scaler.scale(loss / stats.supervised).backward()
        losses.append(loss.detach())

    stats.grad_norm = optimizers.clip_gradients(scaler, config.grad_clip)
    (stats.loss,) = world.all_reduce_sum(float(sum(losses)) / stats.supervised)
    # float16 overflows now and then by design: the scaler lowers the scale, the step is skipped.
    finite_gradients = math.isfinite(stats.grad_norm) or scaler.is_enabled()
    if not math.isfinite(stats.loss) or not finite_gradients:
        raise TrainingStopped(describe_nonfinite_loss(micro_batches, losses, stats, step, world))
    optimizers.step(scaler, stats.grad_norm)
    optimizers.zero_grad()
    return stats


def compute_loss(model: nn.Module, batch: Batch, dtype: str, device: torch.device) -> Tensor:
    """Summed loss of one batch, under autocast; the model's own loss stays in float32.

    model: what `World.distribute` gave."""
    inputs = {
        name: value.to(device, non_blocking=True) if hasattr(value, "to") else value
        for name, value in batch["inputs"].items()
    }
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
    logger.log_bad_samples(world.gather_objects(bad))
    loss_sum, tokens = world.all_reduce_sum(float(loss_sum), tokens)
    return loss_sum / tokens if tokens else math.nan


def fit(
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
    `skip(batches)`. `save_weights(path, meta)` writes a checkpoint or raises OSError; `lineage`
    (what the data and the first weights are) goes into it and into the state, so that a resumed
    run is the same run. Raises TrainingStopped and StoppedBySignal as these classes say,
    ProcessLost where another process is gone, ValueError if the processes differ, another training
    writes to the run's folder, or the state found in it belongs to another run.
    """
    config.dtype = choose_dtype(config.dtype, world.device)
    world.check_consistent({**config.shared(), **lineage, "validation": val_loader is not None})
    with open_run_folder(config, world) as folder, StopRequest(verbose=world.is_main) as stop:
        # ---- where the run stands
        name, weights_path = config.run_name, folder.with_name(f"{config.run_name}.pth")
        identity = {**config.identity(), **lineage}
        state = load_state(folder, config.resume, identity, world)
        if state and state["finished"]:
            if world.broadcast_object(weights_path.is_file()):
                world.print_rank0(f"{name}: already finished, {weights_path} stands")
                return state["progress"]["metrics"]
            state = None  # its weights were taken away: somebody wants them made again
        # What a step is follows from the number of processes that the run started with. Others
        # that resume it cut the same batches in another way.
        processes = state["processes"] if state else world.size
        parts = train_loader.batch_sampler.plan_for(processes)
        accumulation_steps = config.accumulation_steps * parts
        steps_per_epoch = math.ceil(len(train_loader) / accumulation_steps)
        total_steps = min(config.epochs * steps_per_epoch, config.max_steps or math.inf)
        if total_steps == 0:
            raise ValueError("the training data gives no batch; add samples")

        # ---- model, optimizers and log, as they were
        model.to(world.device).train()
        optimizers = Optimizers(model, config)
        scaler = torch.amp.GradScaler(world.device.type, enabled=config.dtype == "float16")
        # It then has a scale in a process whose first batches give no gradient, too.
        scaler.scale(torch.zeros((), device=world.device))
        progress = Progress()
        if state:
            model.load_state_dict(state["model"])
            optimizers.load_state_dict(state["optimizers"])
            scaler.load_state_dict(state["scaler"])
            progress = Progress(**state["progress"])
        trainee = world.distribute(model)
        if world.is_main:
            remove_leftovers(folder, weights_path, progress.step)
        logger = MetricsLogger(
            config, world.is_main, progress.step, total_steps, progress.tracker_id
        )
        world.print_rank0(f"{name}: {optimizers.description}; on {world.device} in {config.dtype}")
        world.print_rank0(f"{name}: steps {progress.step} to {total_steps}")

        def save(finished: bool) -> None:
            """Weights, then the state that makes them part of the run."""
            if not world.is_main:
                return
            best = progress.best_step in (0, progress.step)
            if best or not config.patience:  # else the best weights stay
                meta = {"step": progress.step, "metrics": progress.metrics, "lineage": lineage}
                save_weights(weights_path, meta)
            state = {"identity": identity, "processes": processes, "progress": asdict(progress)}
            state |= {"finished": finished}
            if not finished:  # a finished run needs no more than the mark that it is finished
                state |= {"model": model.state_dict(), "optimizers": optimizers.state_dict()}
                state |= {"scaler": scaler.state_dict()}
            save_state(folder, progress.step, state, keep=1 if finished else config.keep_last)
            logger.draw_curves()

        batches, last = None, False
        while not last:
            # ---- once an epoch: a new order (or, resumed in its middle, the rest of the old one)
            epoch, step_in_epoch = divmod(progress.step, steps_per_epoch)
            if batches is None or step_in_epoch == 0:
                train_loader.batch_sampler.set_epoch(epoch)
                train_loader.batch_sampler.skip(step_in_epoch * accumulation_steps)
                batches = iter(train_loader)

            # ---- one optimizer step
            started = time.perf_counter()
            micro_batches = list(itertools.islice(batches, accumulation_steps))
            waited = time.perf_counter() - started
            rate = learning_rate_factor(
                progress.step, total_steps, config.warmup_iters, config.schedule
            )
            optimizers.set_learning_rates(rate)
            stopping = stop.signum is not None
            stats = train_step(
                trainee, micro_batches, optimizers, scaler, config, world, progress.step, stopping
            )
            if stats.stopping:  # this process, or another one
                signum = signal.Signals(stop.signum or signal.SIGTERM)
                if progress.step:
                    save(finished=False)
                    world.print_rank0(
                        f"{signum.name}: saved step {progress.step} of {total_steps}; the same "
                        "command resumes from there"
                    )
                raise StoppedBySignal(128 + signum)
            progress.step += 1
            progress.samples_seen += int(stats.samples)
            progress.samples_bad += int(stats.bad)
            logger.count_step(stats, waited)
            if stats.bad:
                bad = [record for batch in micro_batches for record in batch["bad"]]
                logger.log_bad_samples(world.gather_objects(bad))
            if progress.samples_seen >= SAMPLES_TO_JUDGE or step_in_epoch + 1 == steps_per_epoch:
                check_skipped_fraction(progress, config, logger)

            # ---- once in a while: evaluate, log, save
            last = progress.step == total_steps
            evaluating, saving, logging = (
                last or (interval > 0 and progress.step % interval == 0)
                for interval in (config.eval_interval, config.save_interval, config.log_interval)
            )
            if not (evaluating or saving or logging):
                continue
            metrics = {
                "step": progress.step,
                "epoch": round(progress.step / steps_per_epoch, 4),
                **logger.window_means(),
                "lr": config.learning_rate * rate,
                "grad_norm": stats.grad_norm,
                "bad_samples": progress.samples_bad,
            }
            if evaluating and val_loader is not None:
                metrics["val_loss"] = evaluate(trainee, val_loader, config, world, logger)
                improved = progress.add_validation(metrics["val_loss"])
                last = last or 0 < config.patience <= progress.validations_since_best
                saving = saving or last or (config.patience and improved)
            progress.metrics = logger.log(metrics)
            if saving:
                save(finished=last)
            logger.restart_window()

        logger.close()
        if progress.step < total_steps:
            world.print_rank0(
                f"{name}: stopped, {progress.validations_since_best} validations without a "
                f"val_loss under {progress.best_loss:.4f}"
            )
        of = f" of step {progress.best_step}" if config.patience and progress.best_step else ""
        where = f"; weights{of} in {weights_path}" if weights_path.is_file() else ""  # or a dry run
        world.print_rank0(f"{name}: {format_losses(progress.metrics)}{where}")
        return progress.metrics


@contextmanager
def open_run_folder(config: TrainConfig, world: World) -> Iterator[Path]:
    """The run's folder, made if missing and held against a second training of the same name.

    What can't be written there, or handed over by the loading processes, ends the run as
    TrainingStopped, with the state that is left.
    """
    folder = Path(config.out_dir) / config.run_name
    try:
        with ExitStack() as stack:
            if world.is_main:
                folder.mkdir(parents=True, exist_ok=True)
                stack.callback(hold_lock(folder / "lock", "training"))
            yield folder
    except ProcessLost:
        raise
    except (OSError, RuntimeError) as error:
        reason = describe_lack_of_room(error)
        if reason is None:
            raise
        states = list_states(folder)
        raise TrainingStopped(
            f"{folder}: {reason}\nThe last good state is {states[0] if states else 'none yet'}; "
            "the same command then resumes from there."
        ) from error


def describe_lack_of_room(error: OSError | RuntimeError) -> str | None:
    """What the user can do about an error of the disk or of shared memory; None: it is another."""
    if "shared memory" in str(error) or "</torch_" in str(error):
        return (
            f"the loading processes can't hand over a batch: {str(error).strip().splitlines()[-1]}"
            "\nShared memory (/dev/shm) is too small for --num_workers batches: lower it or "
            "--batch_size, or give the container more (docker run --ipc=host, or --shm-size 8g)"
        )
    # torch.save makes a RuntimeError about positions in a file of a full disk.
    reason = error if isinstance(error, OSError) else error.__context__
    if not isinstance(reason, OSError):
        return None
    return f"{reason}. Free space, or fix the folder's permissions"


def load_state(
    folder: Path, resume: str, identity: dict[str, Any], world: World
) -> dict[str, Any] | None:
    """The state that the run resumes from, the same on all processes; None: it starts.

    The main process alone reads: the others may be on machines that don't see its disk. A process
    that torchrun restarted resumes, whatever the first one was told.
    """
    wanted = world.is_main and (resume == "auto" or is_restarted())
    return world.broadcast_object(find_state(folder, identity) if wanted else None)


def count_over_processes(batches: list[Batch], stopping: bool, world: World) -> StepStats:
    keys = ("supervised_tokens", "real_tokens", "padded_tokens")
    tokens = [sum(batch[key] for batch in batches) for key in keys]
    bad = sum(len(batch["bad"]) for batch in batches)
    samples = sum(len(batch["sample_ids"]) for batch in batches) + bad
    return StepStats(*world.all_reduce_sum(*tokens, samples, bad, stopping))


def check_skipped_fraction(progress: Progress, config: TrainConfig, logger: MetricsLogger) -> None:
    """Raises TrainingStopped if more than --max_skipped_fraction of the samples were skipped."""
    if progress.samples_bad > config.max_skipped_fraction * progress.samples_seen:
        raise TrainingStopped(
            f"{progress.samples_bad} of {progress.samples_seen} samples can't be decoded, more "
            f"than --max_skipped_fraction {config.max_skipped_fraction}; they are named in "
            f"{logger.quarantine_path}"
        )


def describe_nonfinite_loss(
    batches: list[Batch], losses: list[Tensor], stats: StepStats, step: int, world: World
) -> str:
    """Names the samples of the micro-batches whose own loss isn't finite; of all of them where only
    the gradient isn't."""
    if not math.isfinite(stats.loss):
        batches = [b for b, loss in zip(batches, losses, strict=True) if not loss.isfinite()]
    ids = world.gather_objects([name for batch in batches for name in batch["sample_ids"]])
    return (
        f"step {step + 1}: loss {stats.loss}, gradient norm {stats.grad_norm}; no weight was moved."
        f" Samples: {', '.join(ids)}. Look at them, lower the learning rate or try --dtype float32"
    )
