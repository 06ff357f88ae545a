"""The training state on disk: written whole or not at all, and resumed only by the same run.

A run's states are `state-<step>-<checksum>.pt` in its folder, the newest `--keep_last` of them.
The checksum stands in the name, so that one rename makes a state and what vouches for it appear
together; a file that no longer fits its name is passed over for the one before. The weights stand
beside the folder, under the run's name.
"""

import hashlib
import math
import os
import pickle
import secrets
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from lock import hold_lock
from trainer.config import TrainConfig
from trainer.distributed import ProcessLost, World, is_restarted


class TrainingStopped(ValueError):
    """Training can't continue: a loss that isn't finite, too much data that can't be read, or a
    checkpoint that can't be written."""


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

    def count_validation(self, loss: float) -> bool:
        """Whether it is the lowest loss so far."""
        self.validations_since_best += 1
        if improved := loss < self.best_loss:
            self.best_loss, self.best_step, self.validations_since_best = loss, self.step, 0
        return improved


class Checkpoints:
    """States and weights of a run; a thread writes them while training continues.

    copy_weights(path, meta) copies the weights now, and what it returns writes them.
    """

    def __init__(
        self,
        config: TrainConfig,
        world: World,
        lineage: dict[str, Any],
        copy_weights: Callable[[Path, dict[str, Any]], Callable[[], None]],
    ):
        self.config, self.world, self.lineage = config, world, lineage
        self.copy_weights, self.identity = copy_weights, config.identity() | lineage
        self.folder = Path(config.out_dir) / config.run_name
        self.weights_path = self.folder.with_name(f"{config.run_name}.pth")
        self.processes = world.size  # that the run started with

    @contextmanager
    def open_folder(self) -> Iterator[None]:
        """The run's folder, made if missing and held against a second training of the same name.

        What can't be written there, or handed over by the loading processes, ends the run as
        TrainingStopped, with the state that is left.
        """
        try:
            with ExitStack() as stack:
                if self.world.is_main:
                    self.folder.mkdir(parents=True, exist_ok=True)
                    stack.callback(hold_lock(self.folder / "lock", "training"))
                self.thread = stack.enter_context(ThreadPoolExecutor(1))
                self.writing = self.thread.submit(int)  # the last write; this one does nothing
                yield
        except ProcessLost:
            raise
        except (OSError, RuntimeError) as error:
            reason = describe_lack_of_room(error)
            if reason is None:
                raise
            states = list_states(self.folder)
            then = "No state was written yet; the same command then starts from the beginning."
            if states:
                then = f"The last good state is {states[0]}; the same command then resumes there."
            raise TrainingStopped(f"{self.folder}: {reason}\n{then}") from error

    def load(self) -> dict[str, Any] | None:
        """The state to resume from, on every process; None: the run starts from the beginning.

        The main process alone reads: the others may be on machines that don't see its disk.
        """
        world, state = self.world, None
        if world.is_main and (self.config.resume == "auto" or is_restarted()):
            state = find_state(self.folder, self.identity)
        state = world.broadcast_state(state)
        if state and state["finished"] and not world.broadcast_state(self.weights_path.is_file()):
            state = None  # its weights were taken away: somebody wants them made again
        if state:
            self.processes = state["processes"]
        return state

    def save(
        self, progress: Progress, learning: dict[str, Any], finished: bool, *also: Callable
    ) -> None:
        """Writes the weights first, since the state makes them part of the run; then calls `also`.

        learning: what has a state_dict. A finished run needs no more than the mark that it is.
        """
        if not self.world.is_main:
            return
        self.writing.result()
        state = {"identity": self.identity, "processes": self.processes}
        state |= {"progress": asdict(progress), "finished": finished}
        if not finished:
            state |= {key: part.state_dict() for key, part in learning.items()}
            state = tree_map_only(Tensor, lambda t: t.to("cpu", copy=True), state)
        keep, step = 1 if finished else self.config.keep_last, progress.step
        writes = [partial(save_state, self.folder, step, state, keep), *also]
        if not self.config.patience or progress.best_step in (0, step):  # else the best ones stay
            meta = {"step": step, "metrics": progress.metrics, "lineage": self.lineage}
            writes.insert(0, self.copy_weights(self.weights_path, meta))
        self.writing = self.thread.submit(lambda: [write() for write in writes])

    def remove_leftovers(self, step: int) -> None:
        """Removes the states after `step`, as the run starts over or resumes from an earlier one,
        and what a kill in mid-write left of the weights."""
        if not self.world.is_main:
            return
        for path in list_states(self.folder):
            if int(path.name.split("-")[1]) > step:
                path.unlink()
        for suffix in (".pth", ".json"):
            for path in self.folder.parent.glob(f".{self.folder.name}{suffix}.*"):
                path.unlink()

    def check_writing(self, wait: bool = False) -> None:
        """Raises what the thread's write did, if it is done by now; wait: until it is."""
        if wait or self.writing.done():
            self.writing.result()


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


def save_state(folder: Path, step: int, state: dict[str, Any], keep: int) -> None:
    """Writes the state after `step`, then drops all but the last `keep` ones.

    Raises OSError (torch.save: RuntimeError, for a full disk) if it can't be written; the states
    before it stand as they were.
    """
    temporary = folder / "state.tmp"  # one name: a kill in mid-write leaves one such file, not many
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, folder / f"state-{step:08d}-{checksum(temporary)}.pt")
    finally:
        temporary.unlink(missing_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # else a power cut could take the rename back
    finally:
        os.close(descriptor)
    for path in list_states(folder)[keep:]:
        path.unlink()


def find_state(folder: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The newest state that is whole; None where there is no state at all.

    `identity` names what the run is (settings, data, first weights). A state of another run raises
    ValueError that lists the differences: to resume it would train something that neither command
    line describes. So does a run whose states are all damaged.
    """
    paths = list_states(folder)
    for path in paths:
        if path.stem.endswith(checksum(path)):
            break
        warning = f"{path} is damaged (its checksum doesn't fit); looking for an earlier state"
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    else:
        if paths:
            raise ValueError(f"{paths[0]}: damaged, and no earlier one is whole; --resume never")
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} isn't a training state: {error}") from None
    before = state["identity"]
    differences = [
        f"  {key}: {before.get(key)!r} then, {identity.get(key)!r} now"
        for key in sorted(before.keys() | identity.keys())
        if before.get(key) != identity.get(key)
    ]
    if differences:
        raise ValueError(
            f"{path} belongs to another run:\n" + "\n".join(differences) + "\n"
            "Give the same settings to resume it, --resume never to start over, or another "
            "--run_name."
        )
    return state


def list_states(folder: Path) -> list[Path]:
    """A run's states, the newest first."""
    return sorted(folder.glob("state-*-*.pt"), reverse=True)


def checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
