"""A request to stop: SIGTERM (Slurm's preemption), Ctrl-C or a lost terminal, between two steps."""

import os
import signal
import threading
import time
from typing import NoReturn

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

# torchrun passes Ctrl-C on to processes that may have had it from the terminal already: what comes
# within these seconds is the same request, what comes later is impatience.
SECONDS_OF_ONE_REQUEST = 3.0


def ignore_signals_in_worker(worker_id: int) -> None:
    """As a loader's `worker_init_fn`: its process ends when the training process says so.

    torchrun and Slurm signal every process of a job. A loader's process that dies of it raises an
    error in the training process, at whatever line that is, before anything is saved.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_wait_for_parent, args=(os.getppid(),), daemon=True).start()


def _wait_for_parent(parent: int) -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
        pass
    os._exit(0)


class StoppedBySignal(SystemExit):
    """Somebody asked the run to end and it has saved; the code is the shell's for that signal."""


class StopRequest:
    """As a context, turns the signals into `signum`, which the training loop looks at."""

    def __init__(self, verbose: bool):
        self.verbose, self.pid = verbose, os.getpid()
        self.signum: int | None = None
        self.since = 0.0
        self.previous: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for signum in SIGNALS:
                # nohup has the process ignore SIGHUP: leave it so.
                if signal.getsignal(signum) is not signal.SIG_IGN:
                    self.previous[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *error) -> None:
        for signum, handler in self.previous.items():
            signal.signal(signum, handler)

    def exit(self, step: int, total_steps: int) -> NoReturn:
        """Raises StoppedBySignal, for this process's signal or another one's, with the step that is
        saved; 0: none."""
        signum = self.signum or signal.SIGTERM
        if step and self.verbose:
            name = signal.Signals(signum).name
            saved = f"saved step {step} of {total_steps}"
            print(f"{name}: {saved}; the same command resumes from there", flush=True)
        raise StoppedBySignal(128 + signum)

    def _handle(self, signum: int, frame) -> None:
        if os.getpid() != self.pid:
            return  # a loader's worker that has just been forked
        if self.signum is None:
            self.signum, self.since = signum, time.monotonic()
            if self.verbose:  # not print: the signal may have come in the middle of one
                name = signal.Signals(signum).name
                os.write(2, f"\n{name}: saving after this step, then leaving\n".encode())
        elif signum == signal.SIGINT and time.monotonic() - self.since > SECONDS_OF_ONE_REQUEST:
            raise KeyboardInterrupt
