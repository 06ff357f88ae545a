"""Worker processes for decoders that may hang or crash: a bad file costs its own result, no more.

    for path, result in in_workers(decode, paths, num_workers=4, seconds=60):
        if isinstance(result, Lost): …

Native code can't be stopped from Python: a decoder that loops with the interpreter's lock held
answers no thread and no signal handler. So each worker asks the kernel, before each item, to end it
when its time is over; the parent sees the pipe close, names the item, and starts another worker.
"""

import multiprocessing
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch

MEMORY = 4 << 30  # bytes that a worker may take beyond what it was started with


@dataclass
class Lost:
    """What came of an item instead of a result."""

    reason: str  # "timeout" or "crashed"
    detail: str


def in_workers(
    function: Callable, items: Iterable, num_workers: int, seconds: float
) -> Iterator[tuple]:
    """Yield (item, function(item) or Lost), in the order in which they get done.

    A worker holds its result until the caller comes for it, so that at most `num_workers` wait in
    memory. `seconds` is each item's time. With num_workers=0 everything happens here, unguarded.
    An exception in `function` is a mistake in this program: RuntimeError ends the whole.
    """
    items = iter(items)
    if num_workers == 0:
        for item in items:
            yield item, function(item)
        return
    # Forking costs a millisecond, where a fresh interpreter takes seconds to import torch. Other
    # systems' libraries don't bear it.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    workers: dict[Connection, tuple] = {}  # pipe to a worker → (its process, its item)
    started = []

    def give(pipe: Connection | None, process, item) -> None:
        if pipe is None:
            pipe, theirs = context.Pipe()
            process = context.Process(
                target=_work, args=(function, theirs, seconds, [*workers, pipe]), daemon=True
            )
            process.start()
            started.append(process)
            theirs.close()
        workers[pipe] = process, item
        with suppress(OSError):  # it has just died: its pipe tells
            pipe.send(item)

    try:
        for item in _first(items, num_workers):
            give(None, None, item)
        while workers:
            for pipe in wait(list(workers)):
                process, item = workers.pop(pipe)
                try:
                    succeeded, result = pipe.recv()
                except (EOFError, OSError):
                    succeeded, result = True, _obituary(process, seconds)
                    pipe.close()
                    pipe = None
                for following in _first(items, 1):  # now: the caller may take its time
                    give(pipe, process, following)
                if not succeeded:
                    raise RuntimeError(f"while working at {item!r}:\n{result}")
                yield item, result
    finally:
        for process in started:
            process.kill()
            process.join()


def _first(items: Iterator, number: int) -> Iterator:
    for _ in range(number):
        try:
            yield next(items)
        except StopIteration:
            return


def _work(function: Callable, pipe: Connection, seconds: float, others: list[Connection]) -> None:
    """A worker's whole life: it ends when the parent's side of the pipe closes, for any reason."""
    for other in others:  # inherited; an open copy would keep a worker whose parent died waiting
        other.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C is the parent's to handle
    torch.set_num_threads(1)  # the workers share the cores; OpenMP's threads don't survive a fork
    _limit_memory()
    while True:
        try:
            item = pipe.recv()
        except EOFError:
            return
        _set_timer(seconds)
        try:
            result = True, function(item)
        except Exception:
            result = False, traceback.format_exc()
        _set_timer(0)
        try:
            pipe.send(result)
        except OSError:
            return


def _limit_memory() -> None:
    """A decoder that wants gigabytes gets an error, before the system ends one of the others."""
    try:
        import resource

        used = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    except (ImportError, OSError):
        return  # not on Linux
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    soft = used + MEMORY
    if hard != resource.RLIM_INFINITY:
        soft = min(soft, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _set_timer(seconds: float) -> None:
    if hasattr(signal, "setitimer"):  # not on Windows
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # unhandled, it ends the process
        signal.setitimer(signal.ITIMER_REAL, seconds)


def _obituary(process, seconds: float) -> Lost:
    process.join()
    number = -process.exitcode
    if hasattr(signal, "SIGALRM") and number == signal.SIGALRM:
        return Lost("timeout", f"decoding took longer than {seconds:g} s")
    name = signal.Signals(number).name if number > 0 else f"exit code {process.exitcode}"
    return Lost("crashed", f"the decoding process died ({name})")
