"""One process or many: the same calls, which do nothing when there is one.

`torchrun --nproc_per_node N train_sft.py …` starts N processes, each with a share of every batch.
Gradients are summed here, by hand, once an update and after its last micro-batch, instead of by
DistributedDataParallel: a text-only batch gives the video summary no gradient, and a batch of
undecodable videos gives none at all; both would leave DDP's peers waiting. At this model's size
(0.1 to 0.5 GB of gradients) the overlap that DDP would buy is small.

What goes wrong in one process is told by that process. The others see broken connections only;
they ask the store what happened and repeat it, instead of the transport's own complaint.
"""

import hashlib
import json
import os
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from device import choose_device

# How long the survivors of a broken connection wait for each other before they name who is silent.
SECONDS_TO_ANSWER = 3.0


class ProcessLost(ConnectionError):
    """Another process failed, was killed or doesn't answer; the message says which."""


@dataclass(frozen=True)
class World:
    """This process's place among all: `rank` of `size`, and the device it computes on.

    As a context, an error inside is told to the others, and a good end waits for them.
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
        if error is None or isinstance(error, SystemExit):
            self.close()
        elif self.size > 1 and not isinstance(error, ProcessLost):
            _leave_word(self.store, self.rank, f"{kind.__name__}: {error}")

    def say(self, text: str) -> None:
        """Prints once, not once a process."""
        if self.is_main:
            print(text, flush=True)

    def sum(self, *values: float) -> list[float]:
        """Each value summed over the processes (float64: token counts stay exact)."""
        if self.size == 1:
            return [float(value) for value in values]
        totals = torch.tensor(values, dtype=torch.float64, device=self.device)
        with self._together():
            dist.all_reduce(totals)
            return totals.tolist()

    def gather(self, items: list[Any]) -> list[Any]:
        """The processes' lists, joined in order of rank, on every process."""
        if self.size == 1:
            return items
        parts: list[list[Any]] = [[] for _ in range(self.size)]
        with self._together():
            dist.all_gather_object(parts, items)
        return [item for part in parts for item in part]

    def from_main(self, value: Any) -> Any:
        """The main process's value, on every process."""
        if self.size == 1:
            return value
        box = [value]
        with self._together():
            dist.broadcast_object_list(box, src=0)
        return box[0]

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
        with self._together():
            dist.all_reduce(flat)
        has, *sums = flat.split([len(parameters), *(p.numel() for p in parameters)])
        for p, holders, total in zip(parameters, has.tolist(), sums, strict=True):
            p.grad = total.view_as(p) if holders else None

    def broadcast(self, tensors: Iterable[torch.Tensor]) -> None:
        """All processes start from the main process's values."""
        if self.size > 1:
            with self._together():
                for tensor in tensors:
                    dist.broadcast(tensor.detach(), src=0)

    def agree(self, facts: dict[str, Any]) -> None:
        """Raises ValueError, with the processes on each side, where they hold different facts.

        Different flags would make them wait for each other for ever, different data or code would
        train something that no command line describes.
        """
        if self.size == 1:
            return
        everyone = self.gather([(facts, socket.gethostname())])
        lines = []
        for name in sorted({name for theirs, _ in everyone for name in theirs}):
            sides: dict[str, list[str]] = {}
            for rank, (theirs, host) in enumerate(everyone):
                sides.setdefault(repr(theirs.get(name)), []).append(f"{rank} on {host}")
            if len(sides) > 1:
                told = (f"{value} in process {_several(who)}" for value, who in sides.items())
                lines.append(f"  {name}: {'; '.join(told)}")
        if lines:
            raise ValueError(
                "the processes don't agree:\n" + "\n".join(lines) + "\n"
                "Start all of them with the same flags, the same code and the same data."
            )

    def close(self) -> None:
        if self.size > 1:
            with self._together():
                dist.barrier()  # the main process may still be writing the last checkpoint
            dist.destroy_process_group()

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Around a collective call: its failure becomes a ProcessLost that says who is missing."""
        try:
            yield
        except RuntimeError as error:
            raise ProcessLost(self._what_happened(error)) from None

    def _what_happened(self, error: RuntimeError) -> str:
        if dist.get_backend() == "gloo":  # NCCL's own watchdog ends those who wait for us
            dist.destroy_process_group()
        told = f"({' '.join(str(error).split())[:200]})"
        try:
            self.store.set(f"survivor/{self.rank}", "")
            deadline = time.monotonic() + SECONDS_TO_ANSWER
            while time.monotonic() < deadline:
                if self.store.check(["failure"]):
                    return f"stopped because of {self.store.get('failure').decode()}"
                time.sleep(0.1)
            silent = [r for r in range(self.size) if not self.store.check([f"survivor/{r}"])]
            if silent:
                return (
                    f"process {_several(_with_hosts(self.store, silent))} no longer answers: it was"
                    f" killed (out of memory?), hangs, or the network is cut {told}"
                )
            return f"the processes lost each other {told}"
        except RuntimeError:  # the store is gone as well: it lives with torchrun or with process 0
            return f"the process that holds all together is gone; its own message says why {told}"


def setup(device: str = "auto", timeout: float = 900) -> World:
    """Joins the processes that torchrun started, as its environment variables say; or is alone.

    timeout: seconds that a process waits for another, here and in training. Raises ValueError that
    names the processes which don't come, or says that they can't exchange data.
    """
    chosen = choose_device(device)
    # Every batch has a new shape, and on a CPU oneDNN keeps the code that it made for 1024 of them:
    # gigabytes, which are never used again.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if size == 1:
        return World(chosen)
    if chosen == torch.device("cuda"):
        local, here = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= here:
            raise ValueError(f"--nproc_per_node: process {local} of this machine, {here} GPUs")
        chosen = torch.device("cuda", local)
        torch.cuda.set_device(chosen)
    store = _meet(rank, size, timeout)
    backend = "nccl" if chosen.type == "cuda" else "gloo"
    try:
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout)
        )
        ranks = torch.tensor([float(rank)], device=chosen)
        dist.all_reduce(ranks)
        total = ranks.item()
    except RuntimeError as error:
        raise ValueError(
            f"process {rank} on {socket.gethostname()} can't exchange data with the others over "
            f"{backend}: {error}\nA wrong network interface or a firewall is the usual cause: "
            "GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME names the interface, NCCL_DEBUG=INFO says "
            "what NCCL tries, NCCL_IB_DISABLE=1 and NCCL_P2P_DISABLE=1 leave out what often fails."
        ) from None
    assert total == size * (size - 1) / 2, f"the all-reduce gave {total} for {size} processes"
    return World(chosen, rank, size, store)


def _meet(rank: int, size: int, timeout: float) -> dist.Store:
    """The store that all processes share, once every one of them is there."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    deadline = time.monotonic() + timeout
    # The store lives in torchrun, or in the main process if somebody else started the processes.
    hosting = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    while not hosting and not _answers(host, port):
        if time.monotonic() > deadline:
            raise ValueError(
                f"process {rank} of {size} on {socket.gethostname()} can't reach {host}:{port}, "
                f"where the processes meet, within {timeout:.0f} s (--timeout): is that machine "
                "up, the main process running, and the port open?"
            )
        time.sleep(0.1)
    store = dist.TCPStore(
        host,
        port,
        is_master=hosting,
        wait_for_workers=False,  # it would wait for a number of them, and not know who is missing
        multi_tenant=True,
        timeout=timedelta(seconds=timeout),
    )
    # torchrun keeps its store when it restarts the processes: what the dead ones wrote there must
    # not be taken for the living's (gloo then connects to addresses that nobody listens on).
    store = dist.PrefixStore(f"attempt{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    store.set(f"host/{rank}", socket.gethostname())
    names = [f"host/{other}" for other in range(size)]
    while not store.check(names):
        if time.monotonic() > deadline:
            missing = [str(r) for r, name in enumerate(names) if not store.check([name])]
            present = _with_hosts(store, [r for r in range(size) if str(r) not in missing])
            raise ValueError(
                f"process {_several(missing)} of {size} didn't come to {host}:{port} within "
                f"{timeout:.0f} s (--timeout); here are {_several(present)}"
            )
        time.sleep(0.05)
    return store


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError:
        return False
    return True


def code_fingerprint() -> str:
    """16 hex digits of all that is run here: a machine with an older checkout is told apart."""
    root, digest = Path(__file__).resolve().parents[1], hashlib.sha256()
    for folder in (".", "model", "dataset", "trainer"):
        for path in sorted((root / folder).glob("*.py")):
            digest.update(f"{folder}/{path.name}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def restarted() -> bool:
    """Whether torchrun started these processes anew, after one of them died."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def _leave_word(store: dist.Store, rank: int, reason: str) -> None:
    """For the other processes, and for torchrun's own summary of what failed first."""
    word = f"process {rank} on {socket.gethostname()}: {reason}"
    try:
        store.compare_set("failure", "", word)
    except RuntimeError:
        return  # the store died before us; the reason is printed here all the same
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"py_callstack": reason, "timestamp": str(int(time.time()))}
        text = json.dumps({"message": {"message": reason, "extraInfo": extra}})
        Path(path).write_text(text, encoding="utf-8")


def _with_hosts(store: dist.Store, ranks: list[int]) -> list[str]:
    return [f"{rank} on {store.get(f'host/{rank}').decode()}" for rank in ranks]


def _several(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
