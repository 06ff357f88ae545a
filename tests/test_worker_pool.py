"""What hangs or crashes in native code costs its own item, and nothing else."""

import faulthandler
import multiprocessing
import os
import re
import signal
import time

import numpy as np
import psutil
import pytest

from dataset.worker_pool import Lost, in_workers


def work(item):
    if item == "crash":
        faulthandler.disable()  # pytest's, which would print pages
        os.kill(os.getpid(), signal.SIGSEGV)
    if item == "hang":  # in native code, holding the interpreter's lock: no thread can end it
        re.match(r"(a+)+$", "a" * 40 + "b")
    if item == "greed":
        return len(np.ones(6 << 30, np.uint8))
    if item == "mistake":
        raise KeyError("no such thing")
    return item * 2


def test_each_item_gets_its_result():
    assert sorted(in_workers(work, range(20), 3, seconds=10)) == [(i, 2 * i) for i in range(20)]
    assert list(in_workers(work, range(3), 0, seconds=10)) == [(0, 0), (1, 2), (2, 4)]
    assert list(in_workers(work, [], 2, seconds=10)) == []


def test_what_hangs_or_crashes_is_lost_alone():
    items = [1, "hang", 2, "crash", 3, "crash", *range(4, 9)]
    started = time.perf_counter()
    results = list(in_workers(work, items, 2, seconds=1))
    assert time.perf_counter() - started < 30
    lost = [(item, result.reason) for item, result in results if isinstance(result, Lost)]
    assert sorted(lost) == [("crash", "crashed"), ("crash", "crashed"), ("hang", "timeout")]
    assert sorted(i for i, result in results if not isinstance(result, Lost)) == list(range(1, 9))
    details = {result.detail for _, result in results if isinstance(result, Lost)}
    assert "decoding took longer than 1 s" in details
    assert "the decoding process died (SIGSEGV)" in details


def test_a_mistake_in_the_program_is_no_bad_file():
    with pytest.raises(RuntimeError, match="'mistake'(.|\n)*KeyError: 'no such thing'"):
        list(in_workers(work, [1, "mistake", 2], 1, seconds=10))


def test_memory_has_a_limit():
    with pytest.raises(RuntimeError, match="Unable to allocate 6.00 GiB"):
        list(in_workers(work, ["greed"], 1, seconds=10))


def test_workers_end_with_the_one_who_asked():
    results = in_workers(lambda item: os.getpid(), range(1000), 2, seconds=10)
    pids = {next(results)[1] for _ in range(20)}
    results.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    def parent():
        for _, pid in in_workers(lambda item: os.getpid(), range(10**9), 3, seconds=10):
            (tmp_path / str(pid)).touch()

    process = multiprocessing.get_context("fork").Process(target=parent)
    process.start()
    while len(list(tmp_path.iterdir())) < 3:
        time.sleep(0.01)
    process.kill()
    process.join()
    workers = [int(path.name) for path in tmp_path.iterdir()]
    deadline = time.perf_counter() + 20
    while any(map(is_running, workers)) and time.perf_counter() < deadline:
        time.sleep(0.01)
    assert not any(map(is_running, workers))


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE  # none may be left to reap it
    except psutil.NoSuchProcess:
        return False
