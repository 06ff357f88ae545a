"""Processes that know each other as torchrun's do, from a server that has imported what is slow."""

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(
    ["torch", "transformers", "matplotlib.figure", "tests.trainer.toy_training", "train_pretrain"]
)


def start(
    main: Callable, argv: list[str], log: Path, processes: int = 1, **environment: str
) -> list[multiprocessing.Process]:
    """`main(argv)` in so many processes, which write what they print to `log`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    started = []
    for rank in range(processes):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        arguments = (main, argv, log, environment | place)
        started.append(FORKSERVER.Process(target=_child, args=arguments))
        started[-1].start()
    return started


def finish(team: list[multiprocessing.Process], log: Path) -> None:
    """Waits for the processes, which have to end well."""
    for process in team:
        process.join()
        assert process.exitcode == 0, f"{log}: {log.read_text()[-2000:]}"


def _child(main: Callable, argv: list[str], log: Path, environment: dict[str, str]) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ |= environment
    # Its loader's processes come about as in any run, not from a server of their own.
    multiprocessing.set_start_method(None, force=True)
    sys.argv = ["train"]
    main(argv)
