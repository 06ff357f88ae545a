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
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

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

    def count_step(self, stats: "StepStats") -> None:
        self.step += 1
        self.samples_seen += int(stats.samples)
        self.samples_bad += int(stats.bad)

    def count_validation(self, loss: float) -> bool:
        """Whether it is the lowest loss so far."""
        self.validations_since_best += 1
        if improved := loss < self.best_loss:
            self.best_loss, self.best_step, self.validations_since_best = loss, self.step, 0
        return improved


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


def to_device(inputs: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The same on the device; to a GPU on a stream of their own, while it computes the batch
    before."""
    if device.type != "cuda":
        return {k: v.to(device) if hasattr(v, "to") else v for k, v in inputs.items()}
    compute, copying = torch.cuda.current_stream(), copy_stream(device)
    with torch.cuda.stream(copying):
        tensors = {k: v for k, v in inputs.items() if hasattr(v, "to")}
        moved = {k: v.to(device, non_blocking=True) for k, v in tensors.items()}
    compute.wait_stream(copying)
    for value in moved.values():  # else their memory could be given away before they are read
        if isinstance(value, Tensor):
            value.record_stream(compute)
        else:  # a PackedBatch
            value.map(lambda tensor: tensor.record_stream(compute))
    return inputs | moved


@cache
def copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


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
    save_weights: Callable[[Path, dict[str, Any]], Callable[[], None]],
    lineage: dict[str, Any],
) -> dict[str, Any]:
    """Trains `model` in place and returns the last line of metrics.

    `model(**batch["inputs"]).loss` is the *sum* of the cross-entropy over the batch's supervised
    tokens. `train_loader.batch_sampler` has `plan_for(processes)`, `set_epoch(epoch)` and
    `skip(batches)`. `save_weights(path, meta)` copies the weights and returns what writes them or
    raises OSError. `lineage` (what the data and the first weights are) goes into the checkpoint and
    into the state, so that a resumed run is the same run. Raises TrainingStopped and
    StoppedBySignal as these classes say, ProcessLost where another process is gone, ValueError if
    the processes differ, another training writes to the run's folder, or its state is of another.
    """
    config.dtype = choose_dtype(config.dtype, world.device)
    world.check_consistent({**config.shared(), **lineage, "validation": val_loader is not None})
    name, identity = config.run_name, config.identity() | lineage
    with (
        open_run_folder(config, world) as folder,
        StopRequest(verbose=world.is_main) as stop,
        ThreadPoolExecutor(1) as thread,
    ):
        # ---- where the run stands
        weights_path = folder.with_name(f"{name}.pth")
        wanted = world.is_main and (config.resume == "auto" or is_restarted())
        # The main process alone reads: the others may be on machines that don't see its disk.
        state = world.broadcast_state(find_state(folder, identity) if wanted else None)
        if state and state["finished"]:
            if world.broadcast_state(weights_path.is_file()):
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
        learning = {"model": model, "optimizers": optimizers, "scaler": scaler}
        progress = Progress()
        if state:
            for key, part in learning.items():
                part.load_state_dict(state[key])
            progress = Progress(**state["progress"])
            del state
        trainee = world.distribute(SummedLoss(model))
        if world.is_main:
            remove_leftovers(folder, weights_path, progress.step)
        logger = MetricsLogger(config, world, progress.step, total_steps, progress.tracker_id)
        world.print_rank0(f"{name}: {optimizers.description}; on {world.device} in {config.dtype}")
        world.print_rank0(f"{name}: steps {progress.step} to {total_steps}")
        copy_weights = partial(save_weights, weights_path)
        saver = CheckpointSaver(
            thread, folder, config, lineage, processes, learning, copy_weights, logger
        )

        stats, batches, last = None, None, False
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
            previous, stopping = stats, stop.signum is not None
            stats = train_step(
                trainee, micro_batches, optimizers, scaler, config, world, progress.step, stopping
            )
            # The step before has surely been computed by now, while the device has work.
            check_finite(previous, scaler, world)
            if saver.writing.done():
                saver.writing.result()  # raises what the write did
            if stats.stopping:  # this process, or another one
                save_and_exit(saver, progress, total_steps, stop.signum or signal.SIGTERM)
            progress.count_step(stats)
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
                saver.save(progress, finished=last)
            logger.restart_window()

        saver.writing.result()
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


@dataclass
class CheckpointSaver:
    """Copies weights and state of a run; a thread writes them while training continues."""

    thread: ThreadPoolExecutor
    folder: Path
    config: TrainConfig
    lineage: dict[str, Any]
    processes: int  # that the run started with
    learning: dict[str, Any]  # what has a state_dict
    copy_weights: Callable[[dict[str, Any]], Callable[[], None]]
    logger: MetricsLogger

    def __post_init__(self):
        self.writing = self.thread.submit(int)  # the last write; this one does nothing

    def save(self, progress: Progress, finished: bool) -> None:
        """The weights are written first, since the state makes them part of the run."""
        if not self.logger.world.is_main:
            return
        self.writing.result()
        state = {"identity": self.config.identity() | self.lineage, "processes": self.processes}
        state |= {"progress": asdict(progress), "finished": finished}
        if not finished:  # a finished run needs no more than the mark that it is finished
            state |= {key: part.state_dict() for key, part in self.learning.items()}
            state = tree_map_only(Tensor, lambda t: t.to("cpu", copy=True), state)
        keep, step = 1 if finished else self.config.keep_last, progress.step
        writes = [partial(save_state, self.folder, step, state, keep), self.logger.draw_curves]
        if not self.config.patience or progress.best_step in (0, step):  # else the best ones stay
            meta = {"step": step, "metrics": progress.metrics, "lineage": self.lineage}
            writes.insert(0, self.copy_weights(meta))
        self.writing = self.thread.submit(lambda: [write() for write in writes])


def save_and_exit(
    saver: CheckpointSaver, progress: Progress, total_steps: int, signum: int
) -> NoReturn:
    """As a signal asks for. Before the first step there is nothing to save."""
    name = signal.Signals(signum).name
    if progress.step:
        saver.save(progress, finished=False)
        saver.writing.result()
        saver.logger.world.print_rank0(
            f"{name}: saved step {progress.step} of {total_steps}; the same command resumes from "
            "there"
        )
    raise StoppedBySignal(128 + signum)


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
        then = "No state was written yet; the same command then starts from the beginning."
        if states:
            then = f"The last good state is {states[0]}; the same command then resumes from there."
        raise TrainingStopped(f"{folder}: {reason}\n{then}") from error


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
    if isinstance(reason, OSError):
        return f"{reason}. Free space, or fix the folder's permissions"
    return None


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
