"""A function over many items in threads, its results as they come.

    for path, clip in in_any_order(decode, paths, num_workers=4):

Threads will do: what reads videos waits for its own processes anyway (see dataset/video.py).
"""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from itertools import islice


def in_any_order(function: Callable, items: Iterable, num_workers: int) -> Iterator[tuple]:
    """Yield (item, function(item)), in the order in which they get done; 0 workers: one by one.

    However long `items` is and however slow the caller, at most two items a worker are taken and
    not yet given. An exception in `function` ends the whole and is raised.
    """
    items = iter(items)
    if num_workers == 0:
        for item in items:
            yield item, function(item)
        return
    pool, running = ThreadPoolExecutor(num_workers), {}

    def submit(number: int) -> None:
        for item in islice(items, number):
            running[pool.submit(function, item)] = item

    try:
        submit(2 * num_workers)
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                item = running.pop(future)
                submit(1)  # now: the caller may take its time
                yield item, future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
