"""One process or many: the same calls, which do nothing when there is one.

`torchrun --nproc_per_node N train_sft.py …` starts N processes, each with a share of every batch.
torch's DistributedDataParallel sums their gradients while the backward pass still runs. Numbers and
objects travel over gloo, gradients of a GPU over NCCL: asking what others counted doesn't wait for
the device, and gloo notices at once when a process is gone.

An error in one process is reported by that process. The others only see broken connections; they
look for the reason in the store where all met, and repeat it in place of the transport's complaint.
"""

import math
import os
import socket
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves, tree_map_only

from device import choose_device

SECONDS_TO_ANSWER = 3.0  # a process that doesn't beat for so long is gone
SECONDS_TO_NAME = 30.0  # whom one has waited for that long is named, though it may still come
HOST = socket.gethostname()


class ProcessLost(ConnectionError):
    """Another process failed, was killed or doesn't answer; the message says which."""


def sum_bucket(_, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Gradients summed over processes, where DistributedDataParallel would take their mean: each
    loss is divided by all processes' tokens already."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


@dataclass
class World:
    """This process's place among all: `rank` of `size`, and the device it computes on.

    As a context, an error inside is reported to the others, and a good end waits for them. Every
    call between the processes raises ProcessLost if one of them is gone.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    heart: "Heartbeat | None" = None  # None: alone

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def __enter__(self) -> "World":
        return self

    def __exit__(self, kind, error: BaseException | None, trace) -> None:
        if self.heart is None:
            return
        if error is None or isinstance(error, SystemExit):
            with self.exchange():
                dist.barrier()  # the main process may still be writing the last checkpoint
            self.heart.stopped.set()
            dist.destroy_process_group()
        elif not isinstance(error, ProcessLost):
            # All processes have a mistake in the flags or the data, and one of a machine prints it:
            # the others' errors get the mark `already_reported`, which `launch` minds.
            reason = f" on {HOST}: {type(error).__name__}: {error}"
            word = f"stopped because of process {self.rank}{reason}"
            first = self.heart.leave_word(word)
            error.already_reported = first != word and reason in first
            get_error_handler().record_exception(error)  # for torchrun's summary

    def print_rank0(self, text: str) -> None:
        """Prints once, not once a process."""
        if self.is_main:
            print(text, flush=True)

    def all_reduce_sum(self, *values: float) -> list[float]:
        """Each value summed over the processes (float64: token counts stay exact)."""
        totals = torch.tensor(values, dtype=torch.float64)
        if self.size > 1:
            with self.exchange():
                dist.all_reduce(totals)
        return totals.tolist()

    def gather_objects(self, items: list[Any]) -> list[Any]:
        """The processes' lists, joined in order of rank, on every process."""
        parts: list[list[Any]] = [items] * self.size
        if self.size > 1:
            with self.exchange():
                dist.all_gather_object(parts, items)
        return [item for part in parts for item in part]

    def broadcast_state(self, state: Any) -> Any:
        """The main process's nested dicts and lists, on every process; tensors, which are on the
        CPU, travel one by one and not as one pickle."""
        if self.size == 1:
            return state
        # On the "meta" device, a tensor is its shape and type alone.
        form = tree_map_only(Tensor, lambda t: t.to("meta"), state if self.is_main else None)
        form = self.gather_objects([form])[0]
        if not self.is_main:
            state = tree_map_only(Tensor, lambda t: torch.empty_like(t, device="cpu"), form)
        with self.exchange():
            for leaf in tree_leaves(state):
                if isinstance(leaf, Tensor):
                    dist.broadcast(leaf, src=0)
        return state

    def distribute(self, module: nn.Module) -> nn.Module:
        """The module, with the main process's weights, as one whose gradients are summed.

        While its `require_backward_grad_sync` is True, every process has to go backward, and gets
        the sums. A parameter that no process used keeps its gradient of None, as it would with one
        process: the optimizer must not move it. That takes `find_unused_parameters`.
        """
        if self.size == 1:
            return module
        with self.exchange():
            module = DistributedDataParallel(
                module, gradient_as_bucket_view=True, find_unused_parameters=True
            )
        module.register_comm_hook(None, sum_bucket)
        return module

    def check_consistent(self, facts: dict[str, Any]) -> None:
        """Raises ValueError, with the processes on each side, where they hold different facts.

        Different flags would make them wait for each other for ever, different data or code would
        train something that no command line describes.
        """
        everyone = self.gather_objects([(facts, HOST)])
        differing = []
        for name in facts:
            sides = defaultdict(list)
            for rank, (theirs, host) in enumerate(everyone):
                sides[repr(theirs.get(name))].append(f"{rank} on {host}")
            if len(sides) > 1:
                given = (f"{value} in process {_shorten(who)}" for value, who in sides.items())
                differing.append(f"  {name}: {'; '.join(given)}\n")
        if differing:
            raise ValueError(
                f"the processes don't agree:\n{''.join(differing)}"
                "Start all of them with the same flags, the same code and the same data."
            )

    @contextmanager
    def exchange(self) -> Iterator[None]:
        """Around what waits for other processes: a broken connection becomes a ProcessLost that
        says who is gone. Another error stays what it is."""
        if self.heart is None:
            yield
            return
        self.heart.entered, self.heart.waits_since = self.heart.entered + 1, time.monotonic()
        try:
            yield
        except RuntimeError as error:
            if "gloo" not in str(error) and not isinstance(error, dist.DistError):
                raise
            lost = ProcessLost(self.heart.explain(error))
            lost.already_reported = f" on {HOST}: " in str(lost)
            raise lost from None
        finally:
            self.heart.waits_since = math.inf


class Heartbeat(threading.Thread):
    """Tells the other processes that this one lives and how many exchanges it has entered; says who
    keeps it waiting in one, and who is gone when one breaks."""

    def __init__(self, store: dist.Store, rank: int, size: int):
        super().__init__(daemon=True)
        self.store, self.rank, self.others = store, rank, sorted({*range(size)} - {rank})
        self.entered, self.waits_since = 0, math.inf
        self.stopped = threading.Event()
        self._beat()

    def _beat(self) -> None:
        self.store.set(f"beat/{self.rank}", f"{HOST} {self.entered} {time.monotonic()}")

    def run(self) -> None:
        try:
            while not self.stopped.wait(SECONDS_TO_ANSWER / 5):
                self._beat()
                waited = time.monotonic() - self.waits_since
                if waited > SECONDS_TO_NAME:
                    late = _shorten(self._read_beats()[1])
                    text = f"process {self.rank} has waited {waited:.0f} s for process {late}"
                    print(text, file=sys.stderr, flush=True)
                    self.waits_since = math.inf  # it is said once
        except RuntimeError:
            return  # the store is gone

    def explain(self, error: RuntimeError) -> str:
        """Why an exchange broke, in the words of the process that knew it first."""
        transport = f"({' '.join(str(error).split())[:200]})"
        try:
            before, _ = self._read_beats()
            deadline = time.monotonic() + SECONDS_TO_ANSWER
            while time.monotonic() < deadline:
                if self.store.check(["failure"]):
                    return self.store.get("failure").decode()
                time.sleep(0.1)
            after, late = self._read_beats()
        except RuntimeError:
            return f"torchrun or process 0 is gone; its own message says why {transport}"
        gone = [who for who in after if after[who] == before[who]] or late or ["?"]
        return self.leave_word(
            f"process {_shorten(gone)} no longer answers: it was killed (out of memory?), hangs, "
            f"or the network is cut {transport}"
        )

    def leave_word(self, word: str) -> str:
        """For the others, unless another one was first; returns the first one's."""
        try:
            return self.store.compare_set("failure", "", word).decode()
        except RuntimeError:
            return word  # the store died before us

    def _read_beats(self) -> tuple[dict[str, str], list[str]]:
        """The others' last beats, and those that haven't come to this process's last exchange."""
        beats, late = {}, []
        for rank in self.others:
            host, entered, beat = self.store.get(f"beat/{rank}").decode().split()
            beats[f"{rank} on {host}"] = beat
            if int(entered) < self.entered:
                late.append(f"{rank} on {host}")
        return beats, late


def setup(device: str = "auto", timeout: float = 900) -> World:
    """Joins the processes that torchrun started, as its environment variables say; or is alone.

    timeout: seconds that a process waits for another, here and in training. Raises ValueError for
    a start that can't work, and where processes are missing or can't exchange data.
    """
    chosen = choose_device(device)
    # Every batch has a new shape, and on a CPU oneDNN keeps the code that it made for 1024 of them:
    # gigabytes, which are never used again.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if chosen.type == "cuda" and size > 1:
        if chosen.index is not None:
            raise ValueError(f"--device {device}: {size} processes need {size} GPUs; give cuda")
        chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if chosen.index:  # else the loader would open a context on the first GPU too
        torch.cuda.set_device(chosen)
    if size == 1:
        return World(chosen)
    backend, device_id = ("gloo", None) if chosen.type == "cpu" else ("cpu:gloo,cuda:nccl", chosen)
    limit, attempt = timedelta(seconds=timeout), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        store, *_ = next(dist.rendezvous("env://", rank, size, timeout=limit))
        # torchrun keeps its store when it restarts the processes: what the dead ones wrote there
        # must not be taken for the living's (gloo connects to addresses that nobody listens on).
        store = dist.PrefixStore(f"attempt{attempt}", store)
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=size, timeout=limit, device_id=device_id
        )
        heart = Heartbeat(store, rank, size)
        dist.all_reduce(torch.zeros(1, device=chosen))
    except RuntimeError as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ValueError(
            f"process {rank} of {size} on {HOST} can't join the others at {place} within "
            f"{timeout:g} s (--timeout): {error}\nIs every machine up, the main process running, "
            "the port open? docs/training.md says what to try for several machines."
        ) from None
    heart.start()
    return World(chosen, rank, size, heart)


def is_restarted() -> bool:
    """Whether torchrun restarted these processes after one of them died."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def _shorten(names: list[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more
