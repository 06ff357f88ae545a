"""One process or many: the same calls, which do nothing when there is one.

`torchrun --nproc_per_node N train_sft.py …` starts N processes, each with a share of every batch.
Gradients are summed here, by hand, once a step and after its last micro-batch, instead of by
DistributedDataParallel: a text-only batch gives the video summary no gradient, and a batch of
undecodable videos gives none at all; both would leave DDP's peers waiting. At this model's size
(0.1 to 0.5 GB of gradients) the overlap that DDP would buy is small.

Numbers and objects travel over gloo, gradients of a GPU over NCCL: asking what others counted
doesn't wait for the device, and gloo notices at once when a process is gone.

An error in one process is reported by that process. The others only see broken connections; they
look into the shared store for the reason and repeat it, instead of the transport's own complaint.
"""

import os
import socket
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from device import choose_device

# How long the survivors of a broken connection wait for each other before they name who is silent.
SECONDS_TO_ANSWER = 3.0


class ProcessLost(ConnectionError):
    """Another process failed, was killed or doesn't answer; the message says which."""


@dataclass(frozen=True)
class World:
    """This process's place among all: `rank` of `size`, and the device it computes on.

    As a context, an error inside is reported to the others, and a good end waits for them. Every
    call between the processes raises ProcessLost if one of them is gone.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    store: dist.Store | None = None  # where the processes leave notes; None: alone

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def __enter__(self) -> "World":
        return self

    def __exit__(self, kind, error: BaseException | None, trace) -> None:
        if self.size == 1:
            return
        if error is None or isinstance(error, SystemExit):
            with self._collective():
                dist.barrier()  # the main process may still be writing the last checkpoint
            dist.destroy_process_group()
        elif not isinstance(error, ProcessLost):
            self._report_failure(error)

    def print_rank0(self, text: str) -> None:
        """Prints once, not once a process."""
        if self.is_main:
            print(text, flush=True)

    def all_reduce_sum(self, *values: float) -> list[float]:
        """Each value summed over the processes (float64: token counts stay exact)."""
        totals = torch.tensor(values, dtype=torch.float64)
        if self.size > 1:
            with self._collective():
                dist.all_reduce(totals)
        return totals.tolist()

    def gather_objects(self, items: list[Any]) -> list[Any]:
        """The processes' lists, joined in order of rank, on every process."""
        parts: list[list[Any]] = [items] * self.size
        if self.size > 1:
            with self._collective():
                dist.all_gather_object(parts, items)
        return [item for part in parts for item in part]

    def broadcast_object(self, value: Any) -> Any:
        """The main process's value, on every process."""
        box = [value]
        if self.size > 1:
            with self._collective():
                dist.broadcast_object_list(box, src=0)
        return box[0]

    def broadcast_tensors(self, tensors: Iterable[torch.Tensor]) -> None:
        """All processes start from the main process's values."""
        if self.size > 1:
            with self._collective():
                for tensor in tensors:
                    dist.broadcast(tensor.detach(), src=0)

    def all_reduce_gradients(self, parameters: list[torch.nn.Parameter]) -> None:
        """Every gradient becomes its sum over the processes.

        A parameter that got no gradient anywhere keeps None, as it would with one process: the
        optimizer must not move it.
        """
        if self.size == 1:
            return
        holders = self.all_reduce_sum(*(p.grad is not None for p in parameters))
        used = [p for p, number in zip(parameters, holders, strict=True) if number]
        if not used:
            return
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in used]
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        with self._collective():
            dist.all_reduce(flat)
        for p, total in zip(used, flat.split([p.numel() for p in used]), strict=True):
            p.grad = total.view_as(p)

    def check_consistent(self, facts: dict[str, Any]) -> None:
        """Raises ValueError, with the processes on each side, where they hold different facts.

        Different flags would make them wait for each other for ever, different data or code would
        train something that no command line describes.
        """
        everyone = self.gather_objects([(facts, socket.gethostname())])
        lines = []
        for name in facts:
            sides = defaultdict(list)
            for rank, (theirs, host) in enumerate(everyone):
                sides[repr(theirs.get(name))].append(f"{rank} on {host}")
            if len(sides) > 1:
                given = (f"{value} in process {_shorten(who)}" for value, who in sides.items())
                lines.append(f"  {name}: {'; '.join(given)}")
        if lines:
            raise ValueError(
                "the processes don't agree:\n" + "\n".join(lines) + "\n"
                "Start all of them with the same flags, the same code and the same data."
            )

    @contextmanager
    def _collective(self) -> Iterator[None]:
        """Around a call between the processes: its failure becomes a ProcessLost that says who is
        missing. An error of the GPU itself, which may surface in any call, stays what it is."""
        try:
            yield
        except torch.AcceleratorError:
            raise
        except RuntimeError as error:
            lost = ProcessLost(self._describe_loss(error))
            lost.already_reported = f" on {socket.gethostname()}: " in str(lost)
            raise lost from None

    def _describe_loss(self, error: RuntimeError) -> str:
        if self.device.type == "cpu":  # who waits for us learns of it; on a GPU, this could hang
            dist.destroy_process_group()
        transport = f"({' '.join(str(error).split())[:200]})"
        try:
            self.store.set(f"survivor/{self.rank}", "")
            deadline = time.monotonic() + SECONDS_TO_ANSWER
            while time.monotonic() < deadline:
                if self.store.check(["failure"]):
                    return f"stopped because of {self.store.get('failure').decode()}"
                time.sleep(0.1)
            silent = _missing(self.store, "survivor", self.size)
            # Who has no connection to a dead process still waits: name the dead, if they are known.
            if silent := [rank for rank in silent if _is_gone(self.store, rank)] or silent:
                return (
                    f"process {_shorten(_with_hosts(self.store, silent))} no longer answers: it was"
                    f" killed (out of memory?), hangs, or the network is cut {transport}"
                )
            return f"the processes lost each other {transport}"
        except RuntimeError:  # the store is gone as well: it lives with torchrun or with process 0
            return f"torchrun or process 0 is gone; its own message says why {transport}"

    def _report_failure(self, error: BaseException) -> None:
        """For the other processes, and for torchrun's own summary of what failed first.

        All processes have a mistake in the flags or the data, and one of a machine prints it: the
        others' errors get the mark `already_reported`, which `launch` minds.
        """
        host, reason = socket.gethostname(), f"{type(error).__name__}: {error}"
        try:
            word = f"process {self.rank} on {host}: {reason}"
            first = self.store.compare_set("failure", "", word).decode()
            error.already_reported = first != word and f" on {host}: {reason}" in first
        except RuntimeError:
            return  # the store died before us; the reason is printed here all the same
        get_error_handler().record_exception(error)


def setup(device: str = "auto", timeout: float = 900) -> World:
    """Joins the processes that torchrun started, as its environment variables say; or is alone.

    timeout: seconds that a process waits for another, here and in training. Raises ValueError for
    a start that can't work, and where processes are missing (it names them) or can't exchange data.
    """
    chosen = choose_device(device)
    # Every batch has a new shape, and on a CPU oneDNN keeps the code that it made for 1024 of them:
    # gigabytes, which are never used again.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if size == 1:
        if chosen.index:  # else its loader would open a context on the first GPU too
            torch.cuda.set_device(chosen)
        return World(chosen)
    if chosen.type == "cuda":
        if chosen.index is not None:
            raise ValueError(f"--device {device}: {size} processes need {size} GPUs; give cuda")
        chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(chosen)
    host, store, limit = socket.gethostname(), None, timedelta(seconds=timeout)
    backend, device_id = ("gloo", None) if chosen.type == "cpu" else ("cpu:gloo,cuda:nccl", chosen)
    try:
        store, *_ = next(dist.rendezvous("env://", rank, size, timeout=limit))
        # torchrun keeps its store when it restarts the processes: what the dead ones wrote there
        # must not be taken for the living's (gloo connects to addresses that nobody listens on).
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"attempt{attempt}", store)
        store.set(f"host/{rank}", host)
        store.set(f"pid/{rank}", str(os.getpid()))
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=size, timeout=limit, device_id=device_id
        )
        dist.all_reduce(torch.zeros(1, device=chosen))
    except RuntimeError as error:
        missing = _missing(store, "host", size) if store else []
        who = f"process {_shorten(missing)} is missing; " if missing else ""
        raise ValueError(
            f"process {rank} of {size} on {host} can't join the others at "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} within {timeout:g} s "
            f"(--timeout): {who}{error}\n"
            "Is every machine up, the main process running, the port open? docs/training.md says "
            "what to try for several machines."
        ) from None
    return World(chosen, rank, size, store)


def is_restarted() -> bool:
    """Whether torchrun restarted these processes after one of them died."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def _missing(store: dist.Store, name: str, size: int) -> list[int]:
    return [rank for rank in range(size) if not store.check([f"{name}/{rank}"])]


def _is_gone(store: dist.Store, rank: int) -> bool:
    """Whether a process of this machine has ended; those of another one can't be asked."""
    try:
        os.kill(int(store.get(f"pid/{rank}")), 0)
    except ProcessLookupError:
        return store.get(f"host/{rank}").decode() == socket.gethostname()
    except PermissionError:
        pass
    return False


def _with_hosts(store: dist.Store, ranks: list[int]) -> list[str]:
    return [f"{rank} on {store.get(f'host/{rank}').decode()}" for rank in ranks]


def _shorten(names: list) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(map(str, names[:8])) + more
