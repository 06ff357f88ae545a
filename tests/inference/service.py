"""A script that serves others, as its users start it: a process of its own on a free port."""

import os
import re
import subprocess
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class Service:
    """Ready once it has said where it can be found.

    process, url (of this machine), port; log: all that it has said so far, line by line;
    temporary: its own folder for temporary files.
    """

    def __init__(self, command: list, folder: Path, **environment: str):
        self.temporary = folder / "tmp"
        self.temporary.mkdir(parents=True)
        own = {"OMP_NUM_THREADS": "1", "TMPDIR": str(self.temporary), "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            [str(part) for part in command],
            cwd=ROOT,
            env=os.environ | own | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.log: list[str] = []
        for line in self.process.stdout:
            self.log.append(line)
            if found := re.search(r"http://127\.0\.0\.1:(\d+)", line):
                self.url, self.port = found[0], int(found[1])
                break
        else:
            raise AssertionError("".join(self.log))
        threading.Thread(target=lambda: self.log.extend(self.process.stdout), daemon=True).start()

    def stop(self, patience: float = 300) -> None:
        self.process.terminate()
        self.process.wait(patience)
