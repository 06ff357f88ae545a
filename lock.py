"""One process at a time in a folder that is being written; a second is told who the first is."""

import fcntl
import os
import socket
from collections.abc import Callable
from pathlib import Path


def hold_lock(path: str | os.PathLike, purpose: str, wait: bool = False) -> Callable[[], None]:
    """Locks the file `path`, made if missing, until the returned function is called, which removes
    it, or the process ends: the kernel gives up its locks, so that a dead one holds nobody up.

    Where the disk knows no locks or may not be written, there is none. Where another process has
    it: waits for it, or raises ValueError that names its process and host; `purpose` ("training")
    says for what.
    """
    while True:
        try:
            file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - it lives as long as the lock
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                break
        except FileNotFoundError:  # whoever had it removed it meanwhile
            if not Path(path).parent.is_dir():
                raise
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise ValueError(
                f"{Path(path).parent}: {holder} is {purpose} there; wait until it ends, or end it"
            ) from None
        except OSError:
            return lambda: None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()

    def release() -> None:
        Path(path).unlink(missing_ok=True)
        file.close()

    return release
